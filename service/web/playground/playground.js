// The page: what it knows of pictures and answers is in `state`; events change that, and `render` shows it.

import * as api from "./api.js";
import { Dimensions } from "./dimensions.js";
import { EXAMPLES } from "./examples.js";
import { Pad } from "./pad.js";

const FIRST = "5"; // the example that a visitor finds
const PATIENCE = 300; // milliseconds until the page says that it reads

const state = {
  models: [],
  model: null, // the chosen one of them
  picture: null, // Blob: the image to look at
  settled: true, // false while a stroke is being drawn
  answered: null, // the picture that was read, or refused, last
  passing: false, // whether a stroke of it was still being drawn
  slow: false, // whether that is not yet this one, for longer than a blink
  found: null, // the prediction for it
  label: "", // the class whose capsule is drawn from
  deltas: [], // tweak of each dimension
  tweaked: null, // data URL: the reconstruction with these tweaks
  readAgain: null, // the prediction for that
  unswept: false, // whether the strips could not be had
};

const byId = (id) => document.getElementById(id);
const pad = new Pad(byId("pad"), (picture, settled, drawn) => {
  Object.assign(state, { picture, settled });
  if (drawn > complained) showProblem(null);
  if (picture) render();
  else forget();
  look();
});
const dimensions = new Dimensions(byId("dimensions"), bend);

// What is asked of the service -----------------------------------------------------------------------
// Each of these asks for what the state says at its beginning, and forgets an answer that comes too late.

const look = asked(async (superseded) => {
  const { model, picture, settled, passing } = state;
  if (!model || !picture) return;
  // While a stroke is drawn each picture is old before it is read, but shows where things go.
  const late = () =>
    state.model !== model || !state.picture || (state.settled && state.picture !== picture);
  try {
    const found = await api.predict(model, picture, superseded);
    if (late()) return;
    Object.assign(state, { answered: picture, passing: !settled });
    if (passing && JSON.stringify(found.capsules) === JSON.stringify(state.found?.capsules)) {
      render();
      sweep(); // a stroke that added nothing since: what was chosen stays
      return;
    }
    state.found = found;
    choose(found.label);
  } catch (error) {
    if (late() || superseded.aborted) return;
    forget();
    state.answered = picture;
    render();
    throw error;
  }
});

const draw = asked(async (superseded) => {
  const { model, found, label, deltas, picture } = state;
  if (!found) return;
  const late = () => state.found !== found || state.label !== label;
  try {
    const tweaked = await api.reconstruct(model, found.capsules, label, tweaks(), superseded);
    if (late()) return;
    if (tweaked !== state.tweaked) outdated ??= setTimeout(forgetReading, PATIENCE);
    state.tweaked = tweaked;
    if (state.deltas === deltas) readAgain();
    render();
  } catch (error) {
    if (late() || state.picture !== picture || superseded.aborted) return;
    Object.assign(state, { tweaked: null, readAgain: null });
    render();
    throw error;
  }
});

const readAgain = asked(async (superseded) => {
  const { model, tweaked } = state;
  if (!tweaked) return;
  let read = null;
  try {
    read = await api.predictDrawing(model, tweaked, superseded);
  } catch (error) {
    if (state.tweaked === tweaked) throw error;
  } finally {
    if (state.tweaked === tweaked) {
      clearTimeout(outdated);
      outdated = null;
      state.readAgain = read;
      render();
    }
  }
});

let outdated = null; // timer until the reading of a picture that was shown before is taken away

function forgetReading() {
  outdated = null;
  state.readAgain = null;
  render();
}

const sweep = asked(async (superseded) => {
  const { model, found, label, picture } = state;
  if (!found || !state.settled) return;
  const late = () => state.found !== found || state.label !== label;
  state.unswept = false;
  try {
    const swept = await api.sweep(model, found.capsules, label, superseded);
    if (!late()) dimensions.showStrips(swept.reconstructions);
  } catch (error) {
    if (late() || state.picture !== picture || superseded.aborted) return;
    state.unswept = true;
    throw error;
  }
});

const saveFigure = asked(async (superseded) => {
  const { model, found, label } = state;
  if (!found) return;
  const figure = await api.sweepFigure(model, found.capsules, label, tweaks(), superseded);
  const url = URL.createObjectURL(figure);
  Object.assign(document.createElement("a"), { href: url, download: `sweep-${label}.png` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
});

/** `work`, one run at a time, with its errors shown until it succeeds or the visitor goes on to something else. */
function asked(work) {
  const question = api.oneAtATime(async (superseded) => {
    const began = performance.now();
    try {
      await work(superseded);
      if (failed === question && !superseded.aborted) showProblem(null);
    } catch (error) {
      if (!superseded.aborted || !(error instanceof api.Problem)) showProblem(error, began, question);
    }
  });
  return question;
}

function tweaks() {
  return state.deltas.flatMap((delta, dimension) => (delta ? [{ dimension, delta }] : []));
}

// What changes the state -----------------------------------------------------------------------------

async function start() {
  let models;
  try {
    models = await api.models();
  } catch (error) {
    showProblem(error, undefined, start);
    return;
  }
  if (failed === start) showProblem(null);
  if (models.length === 0) {
    showProblem(new api.Problem(0, { detail: "No model is served at present." }));
    return;
  }
  byId("playground").hidden = false;
  state.models = models;
  const choice = byId("model");
  choice.replaceChildren(...models.map((model) => new Option(`${model.name} ${model.version}`, api.reference(model))));
  byId("model-choice").hidden = models.length < 2;
  const first = models.find((model) => model.default) ?? models[0];
  choice.value = api.reference(first);
  useModel(first);
  const untouched = !state.picture && !pad.isOpening && byId("problem").hidden;
  if (untouched && first.manifest.classes.includes(FIRST)) pad.show(EXAMPLES[FIRST]);
}

function useModel(model) {
  forget();
  state.model = model;
  const { classes, image } = model.manifest;
  document.documentElement.style.setProperty("--shape", `${image.width} / ${image.height}`);
  const drawn = pad.useImage(image);
  byId("measured").hidden = Object.keys(model.manifest.dimensions).length === 0;
  byId("classes").replaceChildren(...classes.map(classItem));
  const examples = Object.keys(EXAMPLES).filter((label) => classes.includes(label));
  byId("examples").hidden = examples.length === 0;
  byId("examples").replaceChildren(...examples.map(exampleButton));
  dimensions.show(model.manifest, classes[0]);
  render();
  if (!drawn) look();
}

function forget() {
  Object.assign(state, { answered: null, found: null, label: "", deltas: [], tweaked: null, readAgain: null });
  dimensions.reset();
  render();
}

function bend(deltas) {
  state.deltas = deltas;
  // What is asked again below takes its own complaint away, or the slider would jump at each move.
  if (![draw, readAgain, sweep].includes(failed)) showProblem(null);
  render();
  draw();
  if (state.unswept) sweep();
}

function choose(label) {
  Object.assign(state, { label, deltas: [], tweaked: null, readAgain: null });
  const list = byId("classes");
  const chosen = list.children[state.model.manifest.classes.indexOf(label)];
  list.scrollTop = chosen.offsetTop - (list.clientHeight - chosen.offsetHeight) / 2; // among many
  if (label === state.found.label) state.tweaked = state.found.reconstruction;
  dimensions.show(state.model.manifest, label);
  render();
  if (state.tweaked) readAgain();
  else draw();
  sweep();
}

// What shows it --------------------------------------------------------------------------------------

let timer = null; // until a reading counts as slow
let resting = null; // what had the focus when its part of the page became inert, unless the visitor went on
for (const type of ["pointerdown", "keydown"]) document.addEventListener(type, () => (resting = null), true);

function render() {
  const { model, found, label, tweaked, readAgain: read } = state;
  if (!model) return;
  showWaiting();
  byId("model-facts").textContent = facts(model);
  byId("output").classList.toggle("empty", !found);
  say("verdict", verdict());
  document.querySelectorAll("#classes input").forEach((input, index) => {
    const length = found?.lengths[index] ?? 0;
    const item = input.closest("label");
    item.style.setProperty("--length", length);
    item.querySelector(".length").textContent = found ? length.toFixed(2) : "";
    input.disabled = !found;
    input.checked = input.value === label;
  });
  show("seen", found?.image);
  show("reconstruction", found?.reconstruction);
  show("tweaked", tweaked);
  byId("error").textContent = found ? `, error ${found.reconstruction_error.toFixed(1)}` : "";
  say("tweaked-caption", tweaked ? caption(label, read) : "");
  const request = found ? curl() : "";
  if (byId("curl").textContent !== request) say("copied", ""); // what was copied is another one
  say("curl", request);
  for (const control of document.querySelectorAll("#output button, #output input")) control.disabled = !found;
  link("save", tweaked);
  link("save-seen", found?.image);
}

/** Leave what belongs to the picture before as it is while another, that is no longer drawn on, is read. */
function showWaiting() {
  const waits = state.picture !== null && state.settled && state.picture !== state.answered;
  if (waits) {
    timer ??= setTimeout(() => {
      state.slow = true;
      render();
    }, PATIENCE);
  } else {
    clearTimeout(timer);
    timer = null;
    state.slow = false;
  }
  const focused = document.activeElement;
  if (waits && focused.closest("#classes, #output")) resting ??= focused;
  for (const id of ["classes", "output"]) {
    byId(id).inert = waits;
    byId(id).setAttribute("aria-busy", String(waits));
    byId(id).classList.toggle("slow", state.slow);
  }
  if (waits) return;
  if (resting && focused === document.body) resting.focus({ preventScroll: true });
  resting = null;
}

/** To those who listen, who would otherwise hear unchanged words again. */
function say(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

function caption(label, read) {
  const again = read ? `: read again as “${read.label}”, ${read.length.toFixed(2)}` : "";
  return `“${label}”, ${tweaks().length ? "bent" : "as it is"}${again}`;
}

function show(id, source) {
  const image = byId(id);
  if (source) image.src = source;
  else image.removeAttribute("src");
}

function link(id, target) {
  const anchor = byId(id);
  if (target) anchor.href = target;
  else anchor.removeAttribute("href");
  anchor.setAttribute("aria-disabled", String(!target));
}

function facts({ device, precision, manifest }) {
  const { test_images: images } = manifest.measured;
  // A variant in fp32 is not served everywhere, and where it is nobody could tell.
  const variant = manifest.variants.find((each) => each.precision === precision && precision !== "fp32");
  const mistakes = (variant ?? manifest.measured).test_mistakes;
  const millions = (manifest.provenance.parameters / 1e6).toFixed(1);
  const routing = manifest.capsules.routing_iterations;
  const network =
    manifest.architecture === "capsnet"
      ? `CapsNet, ${routing} routing iteration${routing === 1 ? "" : "s"}`
      : "Efficient-CapsNet";
  const error = images ? `, ${((100 * mistakes) / images).toFixed(2)} % test error` : "";
  return `${network}, ${millions} million parameters${error}; runs on ${device} in ${precision}`;
}

function verdict() {
  const { found, model } = state;
  if (state.slow) return "Reading…";
  if (!found) return state.picture ? "" : "Draw something.";
  const count = model.manifest.labels_per_image;
  const labels = found.top.slice(0, count).map((each) => `“${each.label}”`);
  const doubt = found.in_distribution ? "" : " But it is unusual, and perhaps no class at all.";
  return `This is ${labels.join(" and ")}.${doubt}`;
}

function curl() {
  const { model, label } = state;
  const url = api.address("reconstruct");
  if (!model.default) url.searchParams.set("model", api.reference(model));
  const request = JSON.stringify({ class: label, tweaks: tweaks() });
  return [
    `curl ${quoted(url.href)}`,
    ...(api.hasKey() ? ["-H 'X-API-Key: YOUR-KEY'"] : []),
    "-H 'Accept: image/png'",
    "-F image=@image.png",
    `--form-string ${quoted(`request=${request}`)}`,
    "-o tweaked.png",
  ].join(" \\\n  ");
}

/** As one word of a shell's command. */
function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function classItem(label) {
  const item = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "class", value: label });
  const name = Object.assign(document.createElement("span"), { textContent: label });
  const length = Object.assign(document.createElement("span"), { className: "length" });
  item.append(input, name, length);
  input.addEventListener("change", () => {
    showProblem(null);
    choose(label);
  });
  return item;
}

function exampleButton(label) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: label });
  button.setAttribute("aria-label", `Example ${label}`);
  button.addEventListener("click", () => pad.show(EXAMPLES[label]));
  return button;
}

let failed = null; // the question that is complained of, if it was one
let complained = 0; // when that began what failed last: what was drawn before does not take the complaint away

/**
 * @param {api.Problem | null} problem null when the visitor goes on to something else
 * @param {number} began when what failed did, in milliseconds of `performance`
 * @param {(() => void) | null} question what failed, if it can be asked again
 */
function showProblem(problem, began = performance.now(), question = null) {
  if (problem && !(problem instanceof api.Problem)) throw problem; // a fault of this page's: for the console
  if (!state.settled) return; // or the pad would move under the stroke, whose end is read in any case
  if (problem) complained = began;
  failed = question;
  const alert = byId("problem");
  const hadFocus = alert.contains(document.activeElement);
  const { message, received, expected, status } = problem ?? {};
  const lines = [message, received && `Received: ${received}`, expected && `Expected: ${expected}`];
  const paragraphs = lines.filter(Boolean).map((textContent) => Object.assign(document.createElement("p"), { textContent }));
  const mayPass = status === 0 || status === 429 || status >= 500;
  const asksNoMore = [look, start].includes(question); // or a slider, a class or a button asks again
  alert.replaceChildren(...paragraphs, ...(mayPass && asksNoMore ? [retryButton(question)] : []));
  alert.hidden = !problem;
  if (hadFocus) alert.querySelector("button")?.focus();
  if (status === 401) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
}

function retryButton(question) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Try again" });
  button.addEventListener("click", question);
  return button;
}

// Events ---------------------------------------------------------------------------------------------

// What stays at the top of the window: nothing that takes the focus may lie behind it.
for (const id of ["pictures", "problem"]) {
  const measure = () => document.documentElement.style.setProperty(`--${id}`, `${byId(id).offsetHeight}px`);
  new ResizeObserver(measure).observe(byId(id));
}

async function open(file) {
  const began = performance.now();
  if (file && !(await pad.open(file))) {
    const detail = `This browser cannot open “${file.name}” as a picture. It may be damaged, or of a kind unknown here.`;
    showProblem(new api.Problem(0, { detail }), began);
  }
}

byId("undo").addEventListener("click", () => pad.undo());
byId("clear").addEventListener("click", () => pad.clear());
byId("file").addEventListener("change", (event) => {
  open(event.target.files[0]);
  event.target.value = ""; // so that the same file can be opened again
});
document.addEventListener("paste", (event) => open(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  open(event.dataTransfer.files[0]);
});
byId("model").addEventListener("change", (event) => {
  showProblem(null);
  useModel(state.models.find((model) => api.reference(model) === event.target.value));
});
byId("reset").addEventListener("click", () => {
  dimensions.reset();
  bend([]);
});
byId("figure").addEventListener("click", saveFigure);
byId("copy").addEventListener("click", async () => {
  say("copied", "");
  try {
    await navigator.clipboard.writeText(byId("curl").textContent);
    say("copied", "Copied.");
  } catch {
    say("copied", "Selected, for you to copy.");
    getSelection().selectAllChildren(byId("curl")); // without TLS there is a clipboard on this machine alone
  }
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(byId("key").value);
  byId("key-form").hidden = true;
  showProblem(null);
  if (!state.model) {
    start();
    return;
  }
  forget(); // the key was changed while the page was open
  look();
});

start();
