// Tools, keys, and the beginning.

// Drawings to begin with, as in the link but not compressed; made by datasets.prepare.drawings.
const EXAMPLES = {
  bicycle: "AkgangeQCgdIG0QpPDkuQSBHDEcDRRU9JzE1Iz8RRQBJEkUkPzI1PidGFUgDSA5CHjouKjwcRAhKSBqoDZAKCUgZRCs8Ny5BIEcMSQNDFT0nMTUjPxFFAEkSRSQ_MjU-J0QVSgNIDkIeOC4sPBpECkpIBfoEkArqAasDrAMAjwKsA4UDAEgCgAiQCsMBxwRIAsgFyAXqAQBIA4QLkAqbAZUFwgEl",
  cup: "AkgarA2mCAc6EzYfMCkkMRozCjcDMxEtHSMrGTENNwA7DjcaMyQpLh80ETgBNAoyGComIDAUNgg6SBrODKYIAyILIhEcFxYbDh0IHwEdCxkRFRkNHQchACMIIQ4dFhkaER4LIAEeBhwQGBYSHAwiBCJIBf4D-gSCCAC5Af4GjQUAuQH9BkgagAz6BA8eLR5LGGMUcwx9BoEBAXkJaw9XFT0ZHx0AHyAbPhtYFWwPegmCAQF-BnQOZBJMGi4cEB4",
  flower: "AkgCgAiACCbiBUgahAvSCwUSDxIXECEOJQgpBCsBJwUjCR0NExELEQATDBMUDx4NJAkoBSwBKgQmCCIMGBAQEgYUSBq2C5YGAygPJBcgHRojEicGJQElCyEVGxsTIwklACcKJRQjHBsiFSYLJgMoCCQSHhgYIhAkBChIGqoKiAgDKA8kFyIdGCMSJwglAyULIRUbGxMjCSUAJwolFCMcGyIVJgsmASgGJBIeGhggECQEKEgakgiICAMoDyQVIh8YIxIlCCcDJQshFRsbESMJJQAnCiUSIxwbIhUmCygBJgYkEiAaFiAQJAQoSBqGB5YGAygPJBUgHxojEiUGJwElCyEVGxsRIwklACcKJRIjHBsiFSYLKAMmCCQSIBgWIhAkBChIGpIIpAQDJg8mFSAfGiMQJQgnASULIRUbHREhCSUAJwonEiEcHSITJg0oASYIJBAgGhYgECYEKEgaqgqkBAMmDyYXIB0aIxAnCCUBJQshFRsdEyEJJQAnCicUIRwdIhMmDSYBKAgkEB4aGCAQJgQoSBqaCZYGAyYNJBcgHRohECcGJQElCx8TGRsTIwkjACcKJRQhGhsgEyYLJgMoCCIQHhoYHg4mBCY",
  house: "AkgF6AnqApwBAACEA5sBAACDA0gFhgSKB_IHAACKBvEHAACJBkgEkgOKB-4EnQTsBJ4E2QkASAXIBcIJ6gEAANID6QEAANEDSAXkCPQIiAIAAOgBhwIAAOcB",
  sailboat: "AkgCgAi2CgDdB0gEvgj-AogE6gaHBAAA6QZIBMAH9AOTA_QFlAMAAPMFSAXqAsYKqgoA6QGmAv0GAMEBpQI",
  umbrella: "AkgFgAiyBwDuBFx0fE0AY0gCgAiSAwB1SBr0AtgHBksQSRxJJkMuPTg5QDFIKUwhUBlUDVQDVgRUDlAaTCJIKkAyODouPiZEHEoQSgZMlQoASAKACJID6QHGBEgCgAiSA-gBxgQ",
};

function showMessage(text, alarm = false) {
  at("status").textContent = text;
  at("status").classList.toggle("alarm", alarm);
  at("status").classList.remove("busy");
}

function busy(text) {
  showMessage(text);
  at("status").classList.add("busy");
  list.ariaBusy = "true";
  at("start").hidden = !isEmpty();
}

// What depends on what is on the paper and what was found.
function tools() {
  const base = cover(), none = !found.length;
  at("start").hidden = !isEmpty();
  list.hidden = isEmpty() && none;
  at("as").hidden = !base?.file;
  at("as").textContent = base?.photo ? "It is a drawing" : "It is a photo";
  at("as").title = base?.photo ? "Searched as a photo; search with it as a drawing, cleaned up" : "Searched as a drawing; search with it as a photo, as it is";
  at("back").hidden = !base?.like || !beforeCover();
  at("select").hidden = at("details").hidden = none;
  at("legend").hidden = none || !document.body.classList.contains("numbers");
  if (none && selecting) select(false);
  watch();
}

function hold(eraser) {
  erasing = eraser;
  at("eraser").ariaPressed = String(eraser);
  at("pen").ariaPressed = String(!eraser);
}

function showNumbers(on) {
  document.body.classList.toggle("numbers", on);
  at("details").ariaPressed = String(on);
  at("legend").hidden = !on || !found.length;
}

const widen = by => {
  at("width").value = at("width").valueAsNumber + by;
  remember();
};
at("pen").onclick = () => hold(false);
at("eraser").onclick = () => hold(true);
at("undo").onclick = () => step(-1);
at("redo").onclick = () => step(1);
at("clear").onclick = () => isEmpty() || act({});
at("back").onclick = () => {
  step(beforeCover() - done);
  paper.focus({preventScroll: true, focusVisible: false});
};
at("as").onclick = () => {
  cover().photo = !cover().photo;
  changed();
};
at("details").onclick = () => {
  showNumbers(!document.body.classList.contains("numbers"));
  remember();
};
at("help").onclick = () => at("guide").showModal();
for (const each of document.querySelectorAll("dialog")) each.querySelector(".head button").onclick = () => each.close();
at("guide").addEventListener("click", event => event.target === at("guide") && at("guide").close());
at("link").onclick = async () => {
  await keep();
  showMessage(await copied(location.href) ? "The link to this search is copied" :
    "The address of this page is the link to this search; copy it from the browser's address bar");
};
for (const name of ["width", "pressure"]) at(name).onchange = remember;
for (const name of ["clean", "weight"]) {
  at(name).onchange = () => {
    remember();
    keep();
    search();
  };
}
at("folder").oninput = at("folder").onchange = () => {
  const known = !at("folder").value || folders.has(at("folder").value);
  at("folder").setCustomValidity(known ? "" : "no such folder");
  const now = known ? at("folder").value : null;
  if (now === null || now === lastFolder) return;
  lastFolder = now;
  remember();
  keep();
  search();
};
let lastFolder = "";

const KEYS = {
  p: () => hold(false), e: () => hold(true), "[": () => widen(-4), "]": () => widen(4), o: () => at("choose").click(),
  l: () => at("link").click(), f: () => at("where").hidden || at("folder").focus(), "?": () => at("help").click(),
  Delete: () => at("clear").click(), Backspace: () => at("clear").click(), Escape: () => selecting ? select(false) : drop(),
};
document.addEventListener("keydown", event => {
  if (document.querySelector("dialog[open]") || event.target === at("folder")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  let run = null;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") run = () => step(event.shiftKey ? 1 : -1);
    if (key === "y") run = () => step(1);
  } else if (!event.altKey) {
    run = KEYS[key];
  }
  if (!run) return;
  event.preventDefault();
  run();
});

// The small drawing stays in view while the paper is not.

let paperSeen = true;
function watch() {
  at("mini").hidden = paperSeen || isEmpty();
  if (!at("mini").hidden) drawMini();
}

function drawMini() {
  const small = at("mini").firstElementChild;
  small.getContext("2d").drawImage(paper, 0, 0, small.width, small.height);
}

new IntersectionObserver(([{intersectionRatio}]) => {
  paperSeen = intersectionRatio > 0.25;
  watch();
}, {threshold: 0.25}).observe(at("sheet"));
at("mini").onclick = () => {
  scrollTo({top: 0, behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"});
  paper.focus({preventScroll: true, focusVisible: false});
};
let across = 0;
new ResizeObserver(() => {
  const now = columns();
  if (now === across || !found.length) return;
  across = now;
  if (!ended && found.length % now) more();
}).observe(list);

// Drawings to begin with

function example([name, text]) {
  const strokes = unpack(decode(text)), picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("viewBox", `0 0 ${UNITS} ${UNITS}`);
  picture.setAttribute("aria-hidden", "true");
  for (const {points} of strokes) {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    line.setAttribute("points", points.join(" "));
    picture.append(line);
  }
  const button = element("button", {}, picture, name);
  button.onclick = () => {
    act(...strokes);
    paper.focus({preventScroll: true, focusVisible: false});
  };
  return button;
}

at("examples").replaceChildren(...Object.entries(EXAMPLES).map(example));

async function begin() {
  recall();
  render();
  tools();
  await learn();
  recall();  // the folder and the weight are of this index
  lastFolder = at("folder").value;
  if (!folders.has(lastFolder)) at("folder").value = lastFolder = "";
  if (done) return search();
  if (await reload()) return changed();
  if (await restore()) return;
  await settle(turn, []);
  if (refused) showMessage(refused, true);
}

addEventListener("popstate", travel);
addEventListener("hashchange", () => history.state || restore());
const ready = begin().catch(error => showMessage(error.message, true));
