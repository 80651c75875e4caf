"use strict";
// The paper: strokes, pictures, what was done and can be undone.

const at = id => document.getElementById(id);
const paper = at("paper"), ink = paper.getContext("2d"), finished = document.createElement("canvas");
finished.width = finished.height = paper.width;
const UNITS = 1023, ERASER = 3;  // coordinates go from 0 to UNITS; how much wider the eraser is than the pen
const BEND = 24;  // units before and after a point that its curve takes; nearer points are joined by curves alone
const DOT = 1.4;  // diameter of a dot, in widths of the pen
const EDGE = 1.6;  // width of a line with its white edge on a photo, in widths of the pen
const PALM = 500;  // milliseconds after the last sign of a pen in which touches are the hand that holds it
const SENT = 448, BYTES = 4 << 20, SIDE = 4096, DECODED = ["image/png", "image/jpeg", "image/webp", "image/gif"];

// What was done, one after the other: strokes {width, erase, points: [x, y, x, y, ...], pressures: [0 to 255, ...] or
// none}, {} for a cleared paper, and what covers it: {picture, file, photo} or, for a photo of the index, {picture, like:
// {photo, name, path}}. The first `done` of them are on the paper, the others can be redone.
let items = [], done = 0, stroke = null, erasing = false;

function visible() {
  const now = items.slice(0, done);
  return now.slice(now.findLastIndex(item => !item.points) + (isCover(now.findLast(item => !item.points)) ? 0 : 1));
}

const isCover = item => Boolean(item?.file || item?.like);
const cover = () => visible().find(isCover) ?? null;
const beforeCover = () => items.slice(0, done).findLastIndex(isCover);  // how many items were there before the cover came
const isEmpty = () => erased || !visible().some(item => isCover(item) || !item.erase);
let erased = false;  // whether the eraser left nothing

function render() {
  const brush = finished.getContext("2d");
  blank(brush);
  for (const item of visible()) item.points ? paint(brush, item) : item.picture && spread(brush, item.picture);
  erased = !cover() && visible().some(item => item.erase) && isBlank();
  refresh();
  at("undo").disabled = !done;
  at("redo").disabled = done === items.length;
  at("clear").disabled = isEmpty();
  at("link").disabled = isEmpty() || !("CompressionStream" in window) || Boolean(cover()?.file);
}

function isBlank() {
  const small = document.createElement("canvas"), brush = small.getContext("2d", {willReadFrequently: true});
  small.width = small.height = SENT;
  brush.drawImage(finished, 0, 0, SENT, SENT);
  return brush.getImageData(0, 0, SENT, SENT).data.every(value => value > 230);
}

// What is finished, with the stroke under way.
function refresh() {
  ink.drawImage(finished, 0, 0);
  if (stroke) paint(ink, stroke);
  at("hint").hidden = Boolean(stroke) || !isEmpty();
  if (!at("mini").hidden) drawMini();
}

function blank(brush) {
  brush.fillStyle = "white";
  brush.fillRect(0, 0, brush.canvas.width, brush.canvas.height);
}

function spread(brush, picture) {
  const side = brush.canvas.width, [wide, high] = sizeOf(picture), scale = Math.min(side / wide, side / high);
  brush.imageSmoothingQuality = "high";
  brush.drawImage(picture, (side - wide * scale) / 2, (side - high * scale) / 2, wide * scale, high * scale);
}

const sizeOf = picture => [picture.naturalWidth || picture.width, picture.naturalHeight || picture.height];

// A stroke; on a photo, which may be dark, a line has a white edge.
function paint(brush, item) {
  if (cover()?.photo && !item.erase) trace(brush, {...item, width: EDGE * item.width, erase: true});
  trace(brush, item);
}

// A line through points, its corners rounded by quadratic curves; of points that are close by curves from midpoint to
// midpoint. A pen's pressure makes it wider and narrower.
function trace(brush, {width, erase, points, pressures}) {
  const scale = brush.canvas.width / UNITS, count = points.length / 2;
  const wide = i => width * scale * (pressures ? 0.6 + 0.8 * pressures[i] / 255 : 1);
  const at = i => [points[2 * i] * scale, points[2 * i + 1] * scale];
  const towards = ([x, y], [toX, toY]) => {
    const share = Math.min(0.5, BEND * scale / Math.hypot(toX - x, toY - y));
    return [x + (toX - x) * share, y + (toY - y) * share];
  };
  brush.lineCap = brush.lineJoin = "round";
  brush.lineWidth = wide(0);
  brush.strokeStyle = brush.fillStyle = erase ? "white" : "black";
  brush.beginPath();
  if (count === 1) {
    brush.arc(...at(0), DOT * wide(0) / 2, 0, 2 * Math.PI);
    return brush.fill();
  }
  brush.moveTo(...at(0));
  for (let i = 1; i < count - 1; i++) {
    const after = towards(at(i), at(i + 1));
    brush.lineTo(...towards(at(i), at(i - 1)));
    brush.quadraticCurveTo(...at(i), ...after);
    if (!pressures) continue;
    brush.stroke();
    brush.beginPath();
    brush.moveTo(...after);
    brush.lineWidth = wide(i);
  }
  brush.lineTo(...at(count - 1));
  brush.stroke();
}

function act(...more) {
  items = [...items.slice(0, done), ...more];
  done = items.length;
  changed();
}

function step(by) {
  const next = Math.min(Math.max(done + by, 0), items.length);
  if (stroke || next === done) return;
  done = next;
  changed();
}

function changed() {
  render();
  keep();
  search();
}

// Strokes

let penAt = -Infinity;  // when a pen was last seen on the paper, or above it

function extend(event, isLast = false) {
  const box = paper.getBoundingClientRect(), {points, pressures} = stroke;
  const coalesced = event.getCoalescedEvents?.() ?? [];
  for (const {clientX, clientY, pressure} of coalesced.length ? coalesced : [event]) {
    const [x, y] = [(clientX - box.left) / box.width, (clientY - box.top) / box.height]
      .map(value => Math.round(Math.min(Math.max(value, 0), 1) * UNITS));
    const [lastX, lastY] = points.slice(-2);
    if (points.length && Math.hypot(x - lastX, y - lastY) < (isLast ? 1 : 3)) continue;
    points.push(x, y);
    pressures?.push(isLast && !pressure ? pressures.at(-1) ?? 128 : Math.round(255 * pressure));
  }
}

paper.addEventListener("pointerdown", event => {
  const {pointerId, pointerType, button} = event;
  if (![0, 5].includes(button)) return;  // 5: the other end of a pen
  if (pointerType === "touch" && event.timeStamp - penAt < PALM) return;
  if (stroke && !(stroke.type === "touch" && pointerType === "pen")) return;  // a pen takes over from the palm
  event.preventDefault();
  paper.focus({preventScroll: true, focusVisible: false});
  paper.setPointerCapture(pointerId);
  const erase = erasing || button === 5, pressed = pointerType === "pen" && at("pressure").checked;
  stroke = {
    width: at("width").valueAsNumber * (erase ? ERASER : 1), erase, points: [], pointer: pointerId, type: pointerType,
    ...pressed && !erase && {pressures: []},
  };
  extend(event);
  refresh();
});
paper.addEventListener("pointermove", event => {
  if (stroke?.pointer !== event.pointerId) return;
  extend(event);
  refresh();
});
paper.addEventListener("pointerup", event => {
  if (stroke?.pointer !== event.pointerId) return;
  extend(event, true);
  const {pointer, type, ...whole} = stroke;
  stroke = null;
  act(whole);
});
paper.addEventListener("pointercancel", event => stroke?.pointer === event.pointerId && drop());
for (const name of ["pointerdown", "pointermove", "pointerup"]) {
  paper.addEventListener(name, event => {
    if (event.pointerType !== "pen") return;
    penAt = event.timeStamp;
    at("pressing").hidden = false;
  }, {capture: true});
}

function drop() {
  stroke = null;
  refresh();
}

// Pictures instead of strokes

async function take(file) {
  if (!file) return showMessage("That is no file; save the picture first, then drop the file", true);
  const picture = await decoded(file);
  if (!picture) return showMessage(`${file.name || "This"} is not a picture that this browser can read`, true);
  const photo = isPhoto(picture), fits = file.size <= BYTES && Math.max(...sizeOf(picture)) <= SIDE;
  act({picture, photo, file: fits && DECODED.includes(file.type) ? file : await drawn(picture, 1024)});
}

// What a file shows, to draw on a canvas; null if this browser cannot read it, or would not give it back.
async function decoded(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    const image = new Image();
    image.src = URL.createObjectURL(file);
    try {
      await image.decode();
      const copy = document.createElement("canvas"), [wide, high] = sizeOf(image).map(side => side || 1024);
      [copy.width, copy.height] = [wide, high].map(side => Math.ceil(1024 * side / Math.max(wide, high)));
      const brush = copy.getContext("2d");
      blank(brush);
      brush.drawImage(image, 0, 0, copy.width, copy.height);
      brush.getImageData(0, 0, 1, 1);
      return copy;
    } catch {
      return null;
    } finally {
      URL.revokeObjectURL(image.src);
    }
  }
}

// Whether a picture is a photo rather than a drawing: more than a 20th of it has another colour than the brightest quarter,
// which is paper in a drawing, or a quarter is darker than what is bright beside it. Of 540 sketches of four data sets, and
// 150 as sheets photographed in bad light, none is a photo by this; of 600 photos 95 % are.
function isPhoto(picture) {
  const side = 64, block = 8, across = side / block;
  const small = document.createElement("canvas"), brush = small.getContext("2d", {willReadFrequently: true});
  small.width = small.height = side;
  blank(brush);
  brush.imageSmoothingQuality = "high";
  brush.drawImage(picture, 0, 0, side, side);
  const bytes = brush.getImageData(0, 0, side, side).data, grey = pixel => (pixel[0] + pixel[1] + pixel[2]) / 3;
  let pixels = Array.from({length: side ** 2}, (_, i) => bytes.slice(4 * i, 4 * i + 3));
  const sorted = values => values.toSorted((one, other) => one - other);
  if (sorted(pixels.map(grey))[side ** 2 / 2] < 90) pixels = pixels.map(pixel => pixel.map(value => 255 - value));
  const bright = sorted(pixels.map(grey))[0.75 * side ** 2], sheet = pixels.filter(pixel => grey(pixel) >= bright);
  const tint = [0, 1, 2].map(i => Math.max(30, sheet.reduce((sum, pixel) => sum + pixel[i], 0) / sheet.length));
  const blocks = Array.from({length: across ** 2}, () => []);
  const blockOf = i => Math.floor(i / side / block) * across + Math.floor(i % side / block);
  pixels.forEach((pixel, i) => blocks[blockOf(i)].push(grey(pixel)));
  const papers = blocks.map(values => Math.max(30, sorted(values)[Math.floor(0.85 * values.length)]));
  const coloured = pixels.filter(pixel => {
    const relative = tint.map((value, i) => pixel[i] / value);
    return Math.max(...relative) - Math.min(...relative) > 0.15;
  });
  const dark = pixels.filter((pixel, i) => 1 - grey(pixel) / papers[blockOf(i)] > 0.12);
  return coloured.length > 0.05 * side ** 2 || dark.length > 0.25 * side ** 2;
}

// A picture, or the paper, as PNG no larger than `side`, on white.
function drawn(source, side) {
  const [wide, high] = sizeOf(source), scale = Math.min(1, side / Math.max(wide, high));
  const copy = document.createElement("canvas"), brush = copy.getContext("2d");
  copy.width = Math.max(1, Math.round(wide * scale));
  copy.height = Math.max(1, Math.round(high * scale));
  blank(brush);
  brush.imageSmoothingQuality = "high";
  brush.drawImage(source, 0, 0, copy.width, copy.height);
  return new Promise(resolve => copy.toBlob(resolve, "image/png"));
}

// The strokes alone, without the photo that they are drawn on.
function strokesAlone() {
  const copy = document.createElement("canvas");
  copy.width = copy.height = SENT;
  blank(copy.getContext("2d"));
  for (const item of visible()) if (item.points) trace(copy.getContext("2d"), item);
  return drawn(copy, SENT);
}

document.addEventListener("paste", event => {
  if (event.target instanceof HTMLInputElement) return;
  const file = [...event.clipboardData.files].find(each => each.type.startsWith("image/"));
  const text = event.clipboardData.getData("text/plain");
  if (file) return take(file);
  if (/^\s*(<\?xml[^>]*>\s*)?<svg[\s>]/.test(text)) return take(new File([text], "drawing.svg", {type: "image/svg+xml"}));
  showMessage("That is no picture; copy a picture, then paste it here");
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
