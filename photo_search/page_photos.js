// Searching, the photos found, and the one that is open.

const MOST = 200, FEW = 12, LONGEST = 15_000;  // photos shown at most and at least; milliseconds between two tries
let turn = 0, running = null, index = null, about = null;  // answers to anything but the latest turn are dropped
let asked = null, found = [], ended = false;  // the last query; the photos found, copies together; whether there are no more
let cards = new Map(), wake = () => {};

// The query: what /find is asked, but for how many.
async function query() {
  const base = cover(), strokes = visible().filter(item => item.points && !item.erase).length > 0;
  const options = {weight: at("weight").value, folder: folderNumber(), as_drawn: Number(base?.photo || !at("clean").checked)};
  if (at("likeness").hidden) delete options.weight;
  if (base?.like) {
    const mixed = strokes ? {as_drawn: Number(!at("clean").checked)} : {};
    return {options: {...options, ...mixed, photo: base.like.photo}, body: strokes ? await strokesAlone() : null};
  }
  return {options, body: base && visible().length === 1 ? base.file : await drawn(paper, SENT)};
}

async function search() {
  const own = ++turn, began = performance.now();
  running?.abort();
  running = new AbortController();
  wake();
  tools();
  if (isEmpty()) {
    asked = null;
    return settle(own, []);
  }
  busy("Searching …");
  if (index === null) return;  // it begins once the server has said what there is
  const next = await query();
  if (own !== turn) return;
  asked = next;
  wanted = pageful();
  const answer = await answered(own, wanted);
  if (!answer) return;
  const took = Math.round(performance.now() - began);
  const areGone = answer.missing && !answer.found.length;
  await settle(own, answer.found, answer.all, areGone ? "None of these photos exists now; is their disk mounted?" : described(answer, took));
  if (own === turn) performance.measure("photos", {start: began, end: performance.now()});
}

// More of the same, as one scrolls. They are the photos found so far and others after them.
let adding = false, wanted = 0;

async function more() {
  if (adding || ended || !found.length || !asked || list.ariaBusy === "true" || wanted >= whole(MOST)) return;
  adding = true;
  const own = turn;
  wanted = Math.min(wanted + pageful(), whole(MOST));
  const answer = await answered(own, wanted);
  if (answer) await settle(own, answer.found, answer.all);
  adding = false;
  if (answer && own === turn && endIsNear()) more();
}

// What the server answers to the query; null if another search has begun, or if it refuses, with a message. A server that
// does not answer is asked again.
async function answered(own, k) {
  for (let pause = 1000; ; pause = Math.min(2 * pause, LONGEST)) {
    try {
      const options = new URLSearchParams({index, k, ...asked.options});
      const answer = await ask(`find?${options}`, {method: "POST", body: asked.body, signal: running.signal});
      return own === turn ? answer : null;
    } catch (error) {
      if (own !== turn) return null;
      if (error.status === 410) {
        await renew();
        return null;
      }
      if (!error.again) {
        refusal(own, error);
        return null;
      }
      busy(`${error.message}; asking again …`);
      await paused(pause);
      if (own !== turn) return null;
    }
  }
}

const paused = time => new Promise(resolve => {
  setTimeout(resolve, time);
  wake = resolve;
});
addEventListener("online", () => wake());
document.addEventListener("visibilitychange", () => document.hidden || wake());

function refusal(own, error) {
  const little = error.status === 400 && /sketch is blank|no line differs from/.test(error.message) && !cover();
  settle(own, [], true, little ? "Draw a little more" : error.message);
  if (!little) showMessage(error.message, true);
}

// The index has changed: its photos and folders have other numbers.
async function renew() {
  await learn();
  if (items.some(item => item.like)) {
    items = items.slice(0, done).filter(item => !item.like);
    done = items.length;
    render();
    keep();
    if (isEmpty()) {
      settle(++turn, []);
      return showMessage("The photos were indexed again; draw, or choose a photo anew");
    }
  }
  return search();
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error("No answer from the server"), {again: true});
  }
  const isJson = answer.headers.get("content-type")?.startsWith("application/json");
  if (answer.ok) return isJson ? answer.json() : answer.blob();
  const why = isJson ? (await answer.json()).error : `The page gets no answer (status ${answer.status})`;
  const again = [408, 429, 502, 503, 504].includes(answer.status), soon = 1000 * answer.headers.get("retry-after");
  throw Object.assign(new Error(why), {status: answer.status, again, soon});
}

// What there is to search in.
async function learn() {
  for (let pause = 1000; ; pause = Math.min(2 * pause, LONGEST)) {
    try {
      about = await ask("about");
      break;
    } catch (error) {
      if (!error.again) throw error;
      busy(error.soon ? error.message : `${error.message}; asking again …`);
      await paused(error.soon || pause);
    }
  }
  index = about.index;
  cards.clear();
  standard = String(about.cluster_weight);
  at("likeness").hidden = about.matchings.length < 2;
  const path = [], options = about.folders.map(({name, depth, photos}, i) => {
    path.splice(depth, Infinity, name);
    return {value: path.join("/"), photos, i};
  });
  folders = new Map(options.map(({value, i}) => [value, i]));
  at("folders").replaceChildren(...options.map(({value, photos}) =>
    element("option", {value, label: `${value} (${photos.toLocaleString("en")})`})));
  at("where").hidden = about.folders.length < 2;
  at("show").hidden = !about.show;
}

let folders = new Map();  // from path, as it is shown, to number

const folderNumber = () => folders.get(at("folder").value) ?? "";

// Photos

const list = at("photos");
const columns = () => getComputedStyle(list).gridTemplateColumns.split(" ").length;
const whole = count => Math.floor(count / columns()) * columns() || count;  // rows

// As many photos as fill the window, in whole rows.
function pageful() {
  const across = columns(), side = (list.clientWidth || 600) / across + 56;
  return Math.min(across * Math.max(Math.ceil(innerHeight / side), Math.ceil(FEW / across)), whole(MOST));
}

const endIsNear = () => at("end").getBoundingClientRect().top < innerHeight + (scrollY ? 600 : 0);
addEventListener("scroll", () => endIsNear() && more(), {passive: true});

function described({photo, cluster_weight: weight, matching}, took) {
  const like = cover()?.like, name = like && isolated(like.name = photo.name || like.name);
  const strokes = visible().some(item => item.points && !item.erase), folder = at("folder").value;
  const what = !like ? cover()?.photo ? "Photos that look like this photo" : "Photos that look like the drawing" :
    strokes ? `Photos between ${name} and the drawing` : `Photos like ${name}`;
  const formula = matching === "one-to-one" ? "distance d" :
    `${weight} D + ${Number((1 - weight).toFixed(3))} d, with distance d and cluster distance D`;
  at("formula").textContent = `${formula}; ${matching}, ${took}\u00a0ms`;
  return what + (folderNumber() === "" ? "" : `, in ${isolated(folder)}`);
}

const isolated = text => `\u2068${text}\u2069`;  // from the direction of the text around it

// Show the answer to a turn; copies of a photo are one card, and the last row is whole unless nothing comes after it.
async function settle(own, answer, isAll = true, text = null) {
  const together = new Map();
  for (const each of answer) {
    const key = each.digest ?? `photo ${each.photo}`, first = together.get(key);
    first ? first.copies.push(each) : together.set(key, {...each, copies: []});
  }
  const groups = [...together.values()];
  found = isAll ? groups : groups.slice(0, whole(groups.length));
  ended = isAll;
  const shown = found.map((each, i) => {
    if (!cards.has(each.photo)) cards.set(each.photo, card(each));
    const own = cards.get(each.photo);
    own.fill(each, i);
    return own.item;
  });
  arrange(shown);
  list.ariaBusy = "false";
  at("status").classList.remove("busy");
  tools();
  if (isEmpty()) showMessage(about ? `${about.photos.toLocaleString("en")} photos` : "");
  else if (text !== null) showMessage(answer.length ? text : text.startsWith("Photos") ? `No other photos ${folderNumber() === "" ? "there" : "in this folder"}` : text);
  await Promise.allSettled(shown.slice(0, pageful()).map(item => item.querySelector("img").decode()));
  if (cards.size > 1000) cards = new Map(found.map(each => [each.photo, cards.get(each.photo)]));
  if (own === turn) {
    list.dataset.turn = own;
    if (endIsNear()) more();
  }
}

// Put cards into the list. What has the focus keeps it; if it is gone, what is now in its place gets it.
function arrange(shown) {
  const held = list.contains(document.activeElement) ? document.activeElement : null;
  const place = held ? [...list.children].indexOf(held.closest("li")) : -1, before = [...list.children];
  const same = before.findIndex((item, i) => item !== shown[i]), kept = same < 0 ? before.length : same;
  before.slice(kept).forEach(item => item.remove());
  list.append(...shown.slice(kept));
  if (!held) return;
  const item = held.isConnected ? held.closest("li") : shown[Math.min(Math.max(place, 0), shown.length - 1)];
  (item?.querySelector(held.classList.contains("more") ? ".more" : ".photo") ?? paper).focus({preventScroll: true});
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const address = (kind, photo) => `${kind}/${index}/${photo}`;
const folderOf = path => path.split(/[\\/]/).at(-2) ?? "";

function card(each) {
  const {photo, name, path} = each;
  const picture = element("img", {alt: "", draggable: false, src: address("thumbnail", photo)});
  const copies = element("span", {className: "copies"});
  const button = element("button", {className: "photo", title: path}, picture, copies);
  const more = element("button", {className: "more", textContent: "More like this", ariaLabel: `More like this: ${name}`});
  const parts = element("span", {className: "parts"});
  const under = element("span", {className: "under"}, element("span", {className: "in", dir: "auto", textContent: folderOf(path)}), more);
  const item = element("li", {}, button, element("span", {className: "name", dir: "auto", textContent: name, title: path}), under, parts);
  const place = () => found.findIndex(other => other.photo === photo);
  button.onclick = () => selecting ? pick(found[place()]) : open(place());
  more.onclick = () => similar(each, picture);
  const fill = (now, place) => {
    const many = now.copies.length ? `, ${now.copies.length + 1} copies` : "";
    button.ariaLabel = `${place + 1}. ${name}${many}`;
    copies.hidden = !many;
    copies.textContent = many.slice(2);
    parts.replaceChildren(element("b", {textContent: now.score.toFixed(3)}), `  ${apart(now)}`);
    mark(button, now);
  };
  return {item, fill, button};
}

function apart({distance, cluster_distance}) {
  const cluster = cluster_distance === null ? "" : ` · D\u00a0${cluster_distance.toFixed(3)}`;
  return `d\u00a0${distance.toFixed(3)}${cluster}`;
}

// A photo of the index in the place of the drawing: its thumbnail at once, then the photo itself.
function similar(each, picture) {
  viewer.close();
  const item = {picture, like: {photo: each.photo, name: each.name, path: each.path}, photo: true};
  history.pushState({done: done + 1}, "");
  act(item);
  at("results").scrollIntoView({block: "start"});
  scrollTo({top: 0});
  sharpen(item);
}

// The photo itself in the place of its thumbnail, which stays if the photo is gone, or no picture any more.
async function sharpen(item) {
  try {
    item.picture = await createImageBitmap(await ask(address("photo", item.like.photo)));
  } catch {
    return;
  }
  if (visible().includes(item)) render();
}

async function pictureOf(photo) {
  const image = new Image();
  image.src = address("thumbnail", photo);
  await image.decode();
  return image;
}

// Several photos

let selecting = false;
const chosen = new Map();  // path: name

function pick({path, name, copies}) {
  chosen.has(path) ? chosen.delete(path) : chosen.set(path, name);
  refill();
}

function mark(button, {path}) {
  if (selecting) button.ariaPressed = String(chosen.has(path));
  else button.removeAttribute("aria-pressed");
}

function refill() {
  found.forEach(each => mark(cards.get(each.photo).button, each));
  list.classList.toggle("selecting", selecting);
  at("picked").hidden = !selecting;
  at("select").ariaPressed = String(selecting);
  at("number").textContent = `${chosen.size} selected`;
  at("copylist").disabled = at("savelist").disabled = !chosen.size;
}

function select(on) {
  selecting = on;
  if (!on) chosen.clear();
  refill();
}

const paths = () => [...chosen.keys()].join("\n") + "\n";
at("select").onclick = () => select(!selecting);
at("done").onclick = () => {
  select(false);
  at("select").focus();
};
at("all").onclick = () => {
  for (const {path, name} of found) chosen.set(path, name);
  refill();
};
at("copylist").onclick = async () => {
  at("number").textContent = await copied(paths()) ? `The paths of ${chosen.size} are copied` : "This browser does not allow it; download the list";
};
at("savelist").onclick = () => {
  const link = element("a", {href: URL.createObjectURL(new Blob([paths()], {type: "text/plain"})), download: "photos.txt"});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
};

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = element("textarea", {value: text, readOnly: true}), before = document.activeElement;
    (viewer.open ? viewer : document.body).append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    before?.focus();
    return done;
  }
}

// One photo, large

const viewer = at("viewer"), view = viewer.querySelector("img");
let opened = 0, first = null;  // the place of the photo that is open; the photo that was opened by a click

async function open(place) {
  const each = found[opened = place], trouble = at("trouble"), source = address("photo", each.photo);
  at("title").textContent = each.name;
  at("path").textContent = [each, ...each.copies].map(({path}) => path).join("\n");
  at("facts").textContent = `score ${each.score.toFixed(3)} · ${apart(each)}`;
  at("alone").href = at("save").href = source;
  at("save").download = each.name;
  at("copypath").textContent = "Copy path";
  at("show").textContent = "Show in folder";
  at("previous").disabled = !place;
  at("next").disabled = place === found.length - 1;
  if (!viewer.open) {
    first = each.photo;
    viewer.showModal();
  }
  if (document.activeElement?.disabled) at("similar").focus();
  trouble.hidden = true;
  let shown;
  try {
    shown = URL.createObjectURL(await ask(source));
  } catch (error) {
    shown = "";
    trouble.textContent = error.message;
  }
  if (found[opened] !== each || !viewer.open) return URL.revokeObjectURL(shown);
  URL.revokeObjectURL(view.src);
  view.hidden = at("alone").hidden = at("save").hidden = !shown;
  trouble.hidden = Boolean(shown);
  view.alt = each.name;
  if (shown) view.src = shown;
  if (place > found.length - 4) more();
}

const turnTo = place => found[place] && open(place);
at("previous").onclick = () => turnTo(opened - 1);
at("next").onclick = () => turnTo(opened + 1);
at("similar").onclick = () => similar(found[opened], cards.get(found[opened].photo).item.querySelector("img"));
at("copypath").onclick = async () => {
  at("copypath").textContent = await copied(found[opened].path) ? "Copied" : "Copy it from above";
};
at("show").onclick = async () => {
  const {photo} = found[opened];
  try {
    await ask(address("show", photo), {method: "POST"});
  } catch (error) {
    at("show").textContent = error.message;
  }
};
viewer.addEventListener("click", event => event.target === viewer && viewer.close());
viewer.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") turnTo(opened - 1);
  if (event.key === "ArrowRight") turnTo(opened + 1);
});
viewer.addEventListener("close", () => {
  URL.revokeObjectURL(view.src);
  view.removeAttribute("src");
  if (found[opened]?.photo !== first) cards.get(found[opened]?.photo)?.button.focus();
});

let swipe = null;  // where a finger came down on the photo
view.addEventListener("pointerdown", event => {
  swipe = event.pointerType === "touch" ? {x: event.clientX, y: event.clientY} : null;
});
view.addEventListener("pointerup", event => {
  const by = swipe ? event.clientX - swipe.x : 0, across = swipe ? Math.abs(event.clientY - swipe.y) : 0;
  swipe = null;
  if (Math.abs(by) > 40 && Math.abs(by) > 2 * across) turnTo(opened + (by < 0 ? 1 : -1));
});
