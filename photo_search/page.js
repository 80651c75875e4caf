"use strict";
const at = id => document.getElementById(id);
const paper = at("paper"), pen = paper.getContext("2d"), list = at("photos"), viewer = at("viewer");
const UNITS = 1023, ERASER = 3;  // coordinates go from 0 to UNITS; how much wider the eraser is than the pen
const SENT = 448, BYTES = 4 << 20, SIDE = 4096, DECODED = ["image/png", "image/jpeg", "image/webp", "image/gif"];

// What was done, one after the other: strokes {width, erase, points: [x, y, x, y, ...]}, {} for a cleared paper and
// {picture, file} for one that covers it. The first `done` of them are on the paper, the others can be redone.
let items = [], done = 0, stroke = null, erasing = false;
let index = null, like = null;  // the index that numbers belong to; the photo that stands for a drawing
let found = [], cards = new Map();

// The paper

function visible() {
  const now = items.slice(0, done);
  return now.slice(now.findLastIndex(item => !item.points) + (now.findLast(item => !item.points)?.picture ? 0 : 1));
}

function isEmpty() { return !visible().some(item => item.picture || !item.erase); }

function render() {
  pen.fillStyle = "white";
  pen.fillRect(0, 0, paper.width, paper.height);
  for (const item of visible().concat(stroke ?? [])) item.picture ? place(item.picture) : trace(item);
  at("hint").hidden = Boolean(stroke) || !isEmpty();
  at("undo").disabled = !done;
  at("redo").disabled = done === items.length;
  at("clear").disabled = isEmpty();
  at("link").disabled = isEmpty() || !("CompressionStream" in window) || Boolean(visible()[0].picture);
}

function place(picture) {
  const scale = Math.min(paper.width / picture.width, paper.height / picture.height);
  const [width, height] = [picture.width * scale, picture.height * scale];
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, (paper.width - width) / 2, (paper.height - height) / 2, width, height);
}

function trace({width, erase, points}) {
  const scale = paper.width / UNITS, at = i => [points[i] * scale, points[i + 1] * scale];
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = width * scale;
  pen.strokeStyle = erase ? "white" : "black";
  pen.beginPath();
  pen.moveTo(...at(0));
  for (let i = 2; i < points.length - 2; i += 2) {
    const [x, y] = at(i), [nextX, nextY] = at(i + 2);
    pen.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
  }
  pen.lineTo(...at(points.length - 2));
  pen.stroke();
}

function act(item) {
  items = [...items.slice(0, done), item];
  done = items.length;
  changed();
}

function step(by) {
  const next = Math.min(Math.max(done + by, 0), items.length);
  if (stroke || (next === done && !like)) return;
  done = next;
  changed();
}

function changed() {
  like = null;
  render();
  keep();
  search();
}

// Strokes

function extend(event) {
  const box = paper.getBoundingClientRect(), points = stroke.points;
  const coalesced = event.getCoalescedEvents?.() ?? [];
  for (const {clientX, clientY} of coalesced.length ? coalesced : [event]) {
    const [x, y] = [(clientX - box.left) / box.width, (clientY - box.top) / box.height]
      .map(value => Math.round(Math.min(Math.max(value, 0), 1) * UNITS));
    const [lastX, lastY] = points.slice(-2);
    if (!points.length || Math.hypot(x - lastX, y - lastY) >= 3) points.push(x, y);
  }
}

paper.addEventListener("pointerdown", event => {
  if (stroke || !event.isPrimary || ![0, 5].includes(event.button)) return;  // 5: the other end of a pen
  event.preventDefault();
  paper.focus({preventScroll: true, focusVisible: false});
  paper.setPointerCapture(event.pointerId);
  const erase = erasing || event.button === 5;
  stroke = {width: at("width").valueAsNumber * (erase ? ERASER : 1), erase, points: [], pointer: event.pointerId};
  extend(event);
  render();
});
paper.addEventListener("pointermove", event => {
  if (stroke?.pointer !== event.pointerId) return;
  extend(event);
  render();
});
paper.addEventListener("pointerup", event => {
  if (stroke?.pointer !== event.pointerId) return;
  const {pointer, ...whole} = stroke;
  stroke = null;
  act(whole);
});
paper.addEventListener("pointercancel", drop);

function drop() {
  stroke = null;
  render();
}

// Pictures instead of strokes

async function take(file) {
  if (!file) return tell("That is no file; save the picture first, then drop the file", true);
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    return tell(`${file.name || "This"} is not a picture that this browser can read`, true);
  }
  const fits = file.size <= BYTES && Math.max(picture.width, picture.height) <= SIDE && DECODED.includes(file.type);
  act({picture, file: fits ? file : await drawn(picture, 1024)});
}

// A picture, or the paper, as PNG no larger than `side`, on white.
function drawn(source, side) {
  const scale = Math.min(1, side / Math.max(source.width, source.height));
  const copy = document.createElement("canvas"), brush = copy.getContext("2d");
  copy.width = Math.max(1, Math.round(source.width * scale));
  copy.height = Math.max(1, Math.round(source.height * scale));
  brush.fillStyle = "white";
  brush.fillRect(0, 0, copy.width, copy.height);
  brush.imageSmoothingQuality = "high";
  brush.drawImage(source, 0, 0, copy.width, copy.height);
  return new Promise(resolve => copy.toBlob(resolve, "image/png"));
}

document.addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(each => each.type.startsWith("image/"));
  if (file) take(file);
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, event => {
    event.preventDefault();
    at("sheet").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
at("choose").onclick = () => at("file").click();
at("file").onchange = () => {
  if (at("file").files.length) take(at("file").files[0]);
  at("file").value = "";
};

// The link: strokes as differences of coordinates, compressed, in the fragment of the address

let kept = 0;

async function keep() {
  const own = ++kept, strokes = visible();
  let fragment = "";
  if (strokes.length && !strokes[0].picture && "CompressionStream" in window) {
    fragment = "#d=" + encode(await piped(pack(strokes), new CompressionStream("deflate-raw"), Infinity));
  }
  if (own === kept) history.replaceState(null, "", location.pathname + fragment);
}

async function restore() {
  const text = location.hash.match(/^#d=([\w-]+)$/)?.[1];
  if (!text) return;
  try {
    items = unpack(await piped(decode(text), new DecompressionStream("deflate-raw"), 1 << 20));
  } catch {
    return tell("The drawing in this link is damaged", true);
  }
  done = items.length;
  changed();
}

async function piped(bytes, through, most) {
  const reader = new Blob([bytes]).stream().pipeThrough(through).getReader(), parts = [];
  for (let size = 0; ;) {
    const {value, done} = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    if ((size += value.length) > most) throw new RangeError("too long");
    parts.push(value);
  }
}

function pack(strokes) {
  const bytes = [1];  // of this form
  const put = value => {
    for (; value > 127; value >>>= 7) bytes.push(value & 127 | 128);
    bytes.push(value);
  };
  for (const {width, erase, points} of strokes) {
    put(2 * width + Number(erase));
    put(points.length / 2);
    points.forEach((value, i) => {
      const by = value - (points[i - 2] ?? 0);
      put(by < 0 ? -2 * by - 1 : 2 * by);
    });
  }
  return new Uint8Array(bytes);
}

function unpack(bytes) {
  let place = 1;
  const take = most => {
    let value = 0, shift = 0;
    do {
      if (place >= bytes.length || shift > 21) throw new RangeError("torn");
      value |= (bytes[place] & 127) << shift;
      shift += 7;
    } while (bytes[place++] & 128);
    if (value > most) throw new RangeError("too large");
    return value;
  };
  if (bytes[0] !== 1) throw new RangeError("of another form");
  const strokes = [];
  while (place < bytes.length) {
    const head = take(1000), points = [];
    for (let left = 2 * take(1 << 20); left; left--) {
      const by = take(4 * UNITS), value = (points.at(-2) ?? 0) + (by & 1 ? -(by + 1) / 2 : by / 2);
      if (value < 0 || value > UNITS) throw new RangeError("off the paper");
      points.push(value);
    }
    if (!points.length) throw new RangeError("empty");
    strokes.push({width: head >> 1, erase: Boolean(head & 1), points});
  }
  return strokes;
}

function encode(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function decode(text) {
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), each => each.charCodeAt(0));
}

at("link").onclick = async () => {
  await keep();
  try {
    await navigator.clipboard.writeText(location.href);
    tell("The link to this drawing is copied");
  } catch {
    tell("The address of this page is the link to this drawing; copy it from the browser's address bar");
  }
};
addEventListener("hashchange", restore);

// Searching

let turn = 0, running = null;  // answers to anything but the latest turn are dropped

async function search(again = true) {
  const own = ++turn, began = performance.now();
  running?.abort();
  running = new AbortController();
  at("like").hidden = !like;
  if (!like && isEmpty()) return show([]);
  list.ariaBusy = "true";
  try {
    const options = new URLSearchParams({
      index, k: at("count").value, matching: at("matching").value, folder: at("folder").value,
      as_drawn: at("clean").checked ? 0 : 1,
    });
    if (like) options.set("photo", like.photo);
    const first = visible()[0], whole = first?.file && visible().length === 1 ? first.file : null;
    const body = like ? null : whole ?? await drawn(paper, SENT);
    const answer = await ask(`/find?${options}`, {method: "POST", body, signal: running.signal});
    if (own !== turn) return;
    const asked = Math.round(performance.now() - began);
    await show(answer.found);
    if (own !== turn) return;
    performance.measure("photos", {start: began, end: performance.now()});
    const photos = `${found.length} photo${found.length === 1 ? "" : "s"}`;
    tell(`${photos} ${like ? `like ${like.name}` : "found"}, ${answer.matching}, ${asked} ms`);
  } catch (error) {
    if (own !== turn) return;
    if (error.status === 410 && again) return renew().catch(failure => tell(failure.message, true));
    show([]);
    tell(error.message, true);
  }
  list.ariaBusy = "false";
  list.dataset.turn = own;
}

// The index has changed: its photos and folders have other numbers.
async function renew() {
  await learn();
  if (like) {
    like = null;
    show([]);
    tell("The photos were indexed again; draw, or choose a photo anew");
  } else {
    search(false);
  }
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The page gets no answer; is search_photos.py still running?");
  }
  const isJson = answer.headers.get("content-type")?.startsWith("application/json");
  if (answer.ok) return isJson ? answer.json() : answer.blob();
  const why = isJson ? (await answer.json()).error : `The page gets no answer (status ${answer.status})`;
  throw Object.assign(new Error(why), {status: answer.status});
}

async function learn() {
  const about = await ask("/about");
  index = about.index;
  cards.clear();
  const options = (select, rows) => {
    const before = select.selectedOptions[0]?.text;
    select.replaceChildren(...rows.map(([text, value]) => new Option(text, value, false, text === before)));
  };
  options(at("matching"), about.matchings.toReversed().map(each => [each, each]));
  options(at("folder"), [
    ["all folders", ""],
    ...about.folders.map((each, i) => ["\u2003".repeat(each.depth) + each.name, i]),
  ]);
  at("where").hidden = about.folders.length < 2;
  if (!found.length) tell(`${about.photos.toLocaleString("en")} photos wait for a drawing`);
}

// Photos

async function show(answer) {
  found = answer;
  const shown = found.map((each, i) => {
    if (!cards.has(each.photo)) cards.set(each.photo, card(each));
    const own = cards.get(each.photo);
    own.fill(each, i);
    return own.item;
  });
  list.replaceChildren(...shown);
  at("legend").hidden = !found.length;
  if (!found.length) {
    list.ariaBusy = "false";
    list.dataset.turn = turn;
    tell("Draw, and photos appear here");
  }
  await Promise.allSettled(shown.map(item => item.querySelector("img").decode()));
  if (cards.size > 1000) cards = new Map(found.map(each => [each.photo, cards.get(each.photo)]));
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function card({photo, name, path}) {
  const picture = element("img", {alt: "", draggable: false, src: `/thumbnail/${index}/${photo}`});
  const button = element("button", {className: "photo", title: path}, picture);
  const more = element("button", {className: "more", ariaLabel: `More like ${name}`, title: "More like this photo", textContent: "≈"});
  const parts = element("span", {className: "parts"});
  const item = element("li", {}, button, more, element("span", {className: "name", textContent: name, title: path}), parts);
  button.onclick = () => open(found.findIndex(each => each.photo === photo));
  more.onclick = () => similar({photo, name});
  const fill = (each, place) => {
    button.ariaLabel = `${place + 1}. ${name}, score ${each.score.toFixed(3)}`;
    parts.replaceChildren(element("b", {textContent: each.score.toFixed(3)}), `  ${apart(each)}`);
  };
  return {item, fill};
}

function apart({distance, cluster_distance}) {
  const cluster = cluster_distance === null ? "" : ` · D\u00a0${cluster_distance.toFixed(3)}`;
  return `d\u00a0${distance.toFixed(3)}${cluster}`;
}

function similar(photo) {
  like = photo;
  viewer.close();
  search();
  scrollTo({top: 0});
}

let opened = 0;

async function open(place) {
  const each = found[opened = place], picture = viewer.querySelector("img"), trouble = at("trouble");
  const address = `/photo/${index}/${each.photo}`;
  at("title").textContent = each.name;
  at("facts").textContent = `${each.path} · score ${each.score.toFixed(3)} · ${apart(each)}`;
  at("alone").href = address;
  at("previous").disabled = !place;
  at("next").disabled = place === found.length - 1;
  if (!viewer.open) viewer.showModal();
  trouble.hidden = true;
  let shown;
  try {
    shown = URL.createObjectURL(await ask(address));
  } catch (error) {
    shown = "";
    trouble.textContent = error.message;
  }
  if (found[opened] !== each) return URL.revokeObjectURL(shown);
  URL.revokeObjectURL(picture.src);
  picture.hidden = at("alone").hidden = !shown;
  trouble.hidden = Boolean(shown);
  picture.alt = each.name;
  if (shown) picture.src = shown;
}

const turnTo = place => found[place] && open(place);
at("previous").onclick = () => turnTo(opened - 1);
at("next").onclick = () => turnTo(opened + 1);
at("similar").onclick = () => similar(found[opened]);
at("close").onclick = () => viewer.close();
viewer.addEventListener("click", event => event.target === viewer && viewer.close());
viewer.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") turnTo(opened - 1);
  if (event.key === "ArrowRight") turnTo(opened + 1);
});

// Tools and keys

function tell(text, alarm = false) {
  at("status").textContent = text;
  at("status").classList.toggle("alarm", alarm);
}

function hold(eraser) {
  erasing = eraser;
  at("eraser").ariaPressed = String(eraser);
  at("pen").ariaPressed = String(!eraser);
}

const widen = by => { at("width").value = at("width").valueAsNumber + by; };
at("pen").onclick = () => hold(false);
at("eraser").onclick = () => hold(true);
at("undo").onclick = () => step(-1);
at("redo").onclick = () => step(1);
at("clear").onclick = () => isEmpty() || act({});
at("like").querySelector("button").onclick = () => { like = null; search(); };
for (const name of ["clean", "matching", "count", "folder"]) at(name).onchange = () => search();

const KEYS = {
  p: () => hold(false), e: () => hold(true), "[": () => widen(-4), "]": () => widen(4), o: () => at("choose").click(),
  l: () => at("link").click(), Delete: () => at("clear").click(), Backspace: () => at("clear").click(), Escape: drop,
};
document.addEventListener("keydown", event => {
  if (viewer.open) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  let run = null;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") run = () => step(event.shiftKey ? 1 : -1);
    if (key === "y") run = () => step(1);
  } else if (event.target === paper && !event.altKey) {
    run = KEYS[key];
  }
  if (!run) return;
  event.preventDefault();
  run();
});

render();
const ready = learn().then(restore).catch(error => tell(error.message, true));
