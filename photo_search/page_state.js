// What stays: the link in the address, what this browser remembers of settings, what this tab remembers of the drawing.

const FORM = 2;  // of the strokes in a link: bytes of variable length; 1 has no pressures
const CHOICES = ["weight", "width", "clean", "pressure", "folder"];  // inputs that are remembered
let kept = 0, standard = "0.2", wantedFolder = "";

const stored = (storage, name, value) => {
  try {
    return value === undefined ? window[storage].getItem(name) : window[storage].setItem(name, value);
  } catch {
    return null;  // full, or forbidden
  }
};

function remember() {
  const choices = Object.fromEntries(CHOICES.map(name => [name, at(name).type === "checkbox" ? at(name).checked : at(name).value]));
  stored("localStorage", "page", JSON.stringify({...choices, numbers: document.body.classList.contains("numbers")}));
}

function recall() {
  let choices = {};
  try {
    choices = JSON.parse(stored("localStorage", "page")) ?? {};
  } catch { /* another program's, or damaged */ }
  for (const name of CHOICES) {
    if (typeof choices[name] === "boolean") at(name).checked = choices[name];
    else if (typeof choices[name] === "string") at(name).value = choices[name];
  }
  if (typeof choices.weight !== "string") at("weight").value = standard;
  showNumbers(choices.numbers === true);
}

// The link: strokes as differences of coordinates, compressed, the photo that stands for them, and what was chosen.
async function keep() {
  const own = ++kept, fragment = await fragmentOf();
  if (own !== kept) return;
  history.replaceState({done}, "", location.pathname + fragment);
  stored("sessionStorage", "page", JSON.stringify({fragment, done, items: items.map(saved)}));
}

async function fragmentOf() {
  const strokes = visible().filter(item => item.points), parts = [], base = cover();
  const packs = strokes.length && !base?.file && "CompressionStream" in window;
  if (packs) parts.push("d=" + encode(await piped(pack(strokes), new CompressionStream("deflate-raw"), Infinity)));
  if (base?.like) parts.push(`like=${index}.${base.like.photo}`);
  if (!at("likeness").hidden && at("weight").value !== standard) parts.push(`w=${at("weight").value}`);
  if (!at("clean").checked) parts.push("c=0");
  if (at("folder").value) parts.push(`f=${encodeURIComponent(at("folder").value)}`);
  return parts.length ? `#${parts.join("&")}` : "";
}

// The browser's Back and Forward, between searches with photos of the index.
async function travel({state}) {
  if (!state) return;  // a link; see hashchange
  const fragment = location.hash;
  done = Math.min(state.done, items.length);
  if (fragment === await fragmentOf()) changed();
  else await restore();
}

const saved = item => item.points ? item : isCover(item) ? {
  photo: item.photo, like: item.like && {...item.like, index}, source: item.file && (item.source ??= sourceOf(item.picture)),
} : {};

function sourceOf(picture) {
  if (!picture) return "";
  const [wide, high] = sizeOf(picture), scale = Math.min(1, 896 / Math.max(wide, high)), copy = document.createElement("canvas");
  [copy.width, copy.height] = [Math.ceil(wide * scale), Math.ceil(high * scale)];
  blank(copy.getContext("2d"));
  copy.getContext("2d").drawImage(picture, 0, 0, copy.width, copy.height);
  return copy.toDataURL("image/jpeg", 0.9);
}

async function loaded(item) {
  if (Array.isArray(item.points)) {
    if (!isStroke(item)) throw new RangeError("no stroke");
    return item;
  }
  if (item.like) {
    if (item.like.index !== index) return {};  // of an index that is no more
    const again = {...item, picture: await pictureOf(item.like.photo)};
    sharpen(again);
    return again;
  }
  if (!item.source) return {};
  const image = new Image();
  image.src = item.source;
  await image.decode();
  return {...item, picture: image, file: await drawn(image, 1024)};
}

const isStroke = ({width, points, pressures}) => width > 0 && width < 1000 && points.length >= 2 && points.length % 2 === 0 &&
  [...points, ...pressures ?? []].every(value => value >= 0 && value <= UNITS) &&
  (!pressures || 2 * pressures.length === points.length);

// Bring back what this tab had, if it had what the address says; its history, too.
async function reload() {
  try {
    const before = JSON.parse(stored("sessionStorage", "page"));
    if (!before?.items.length || (location.hash && before.fragment !== location.hash)) return false;
    items = await Promise.all(before.items.map(loaded));
    done = Math.min(before.done, items.length);
    return true;
  } catch {
    items = [];
    done = 0;
    return false;
  }
}

// Take what the address says. A damaged link leaves what was there. Returns whether it says anything.
async function restore() {
  const parts = new URLSearchParams(location.hash.slice(1)), text = parts.get("d"), liked = parts.get("like");
  if (text === null && liked === null) return false;
  let strokes = [], base = [];
  try {
    if (text !== null && !/^[\w-]+$/.test(text)) throw new RangeError("no text of this kind");
    if (text) strokes = unpack(await piped(decode(text), new DecompressionStream("deflate-raw"), 1 << 20));
    if (liked !== null) {
      const [, own, photo] = liked.match(/^([\w]+)\.(\d{1,9})$/) ?? [];
      if (!own) throw new RangeError("names no photo");
      if (own !== index) return refuse("The photo in this link is of an earlier index; the photos were indexed again since");
      const picture = await pictureOf(Number(photo));
      base = [{picture, like: {photo: Number(photo), name: `photo ${photo}`, path: ""}, photo: true}];
    }
  } catch {
    return refuse("The drawing in this link is damaged");
  }
  const weight = parts.get("w") ?? standard;
  if (/^0(\.\d)?$/.test(weight)) at("weight").value = weight;
  at("clean").checked = parts.get("c") !== "0";
  at("folder").value = parts.get("f") ?? "";
  items = [...base, ...strokes];
  done = items.length;
  changed();
  base.forEach(sharpen);
  return true;
}

function refuse(why) {
  refused = why;
  showMessage(why, true);
  if (done) keep();
  return false;
}

let refused = "";

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
  const bytes = [FORM];
  const put = value => {
    for (; value > 127; value >>>= 7) bytes.push(value & 127 | 128);
    bytes.push(value);
  };
  const puts = (values, apart) => values.forEach((value, i) => {
    const by = value - (values[i - apart] ?? 0);
    put(by < 0 ? -2 * by - 1 : 2 * by);
  });
  for (const {width, erase, points, pressures} of strokes) {
    put(4 * width + 2 * Boolean(pressures) + Number(erase));
    put(points.length / 2);
    puts(points, 2);
    puts(pressures ?? [], 1);
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
  const takes = (count, apart, most) => {
    const values = [];
    while (values.length < count) {
      const by = take(4 * UNITS), value = (values.at(-apart) ?? 0) + (by & 1 ? -(by + 1) / 2 : by / 2);
      if (value < 0 || value > most) throw new RangeError("off the paper");
      values.push(value);
    }
    return values;
  };
  if (bytes[0] !== 1 && bytes[0] !== FORM) throw new RangeError("of another form");
  const strokes = [];
  while (place < bytes.length) {
    const old = bytes[0] === 1, head = take(old ? 1000 : 2000), count = take(1 << 20), width = old ? head >> 1 : head >> 2;
    if (!count || !width) throw new RangeError("empty");
    const points = takes(2 * count, 2, UNITS), pressures = !old && head & 2 ? takes(count, 1, 255) : null;
    strokes.push({width, erase: Boolean(head & 1), points, ...pressures && {pressures}});
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
