// What the playground asks of the service. Paths are relative, so that a proxy may serve it below a prefix.

const KEY = "capsnet-api-key";
const LIMIT = 60_000; // milliseconds; the service's own limits are shorter
const REPEATS = 3; // of a question that a busy service refuses
const LONGEST_REST = 5; // seconds before each

/** An answer that is no success, as the problem document says it (RFC 9457). */
export class Problem extends Error {
  /** @param {number} rest seconds after which to ask again; 0 if that would not help */
  constructor(status, document, rest = 0) {
    super(document.detail ?? document.title ?? `The service answered ${status}.`);
    this.status = status;
    this.rest = rest;
    this.received = document.received;
    this.expected = document.expected;
  }
}

let key = null;
try {
  key = sessionStorage.getItem(KEY);
} catch {
  // A browser may keep nothing for a page; then the key lives as long as the page.
}

/** Keep an API key for the requests to come, as long as this tab lives. */
export function useKey(text) {
  key = text;
  try {
    sessionStorage.setItem(KEY, text);
  } catch {
    // as above
  }
}

export function hasKey() {
  return key !== null;
}

/** The service's address of `path`, without a name and password that this page's own may have. */
export function address(path) {
  return new URL(path, location.origin + location.pathname);
}

/** Ask, and again while the service is too busy to answer, unless the question is superseded meanwhile. */
async function ask(path, read, options, superseded = new AbortController().signal) {
  for (let repeats = 0; ; repeats++) {
    try {
      return await askOnce(path, read, options);
    } catch (error) {
      if (!error.rest || repeats === REPEATS) throw error;
      await pause(Math.min(error.rest, LONGEST_REST), superseded);
      if (superseded.aborted) throw error;
    }
  }
}

/** So many seconds, or until the signal. */
function pause(seconds, signal) {
  return new Promise((done) => {
    if (signal.aborted) done();
    setTimeout(done, 1000 * seconds);
    signal.addEventListener("abort", done);
  });
}

async function askOnce(path, read, options = {}) {
  const headers = new Headers(options.headers);
  if (hasKey()) headers.set("X-API-Key", asBytes(key));
  try {
    const answer = await fetch(address(path), { ...options, headers, signal: AbortSignal.timeout(LIMIT) });
    if (answer.ok) return await read(answer);
    const rest = answer.status === 503 ? Number(answer.headers.get("Retry-After")) : 0; // a date is NaN
    throw new Problem(answer.status, (await answer.json().catch(() => null)) ?? {}, rest);
  } catch (error) {
    if (error instanceof Problem) throw error;
    throw new Problem(0, { detail: "The service does not answer, or something in between does. Is it running?" });
  }
}

/** A text's UTF-8 bytes, each as a character: headers take no others. */
function asBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

const asJson = (answer) => answer.json();
const asBlob = (answer) => answer.blob();

function post(path, document, superseded, read = asJson, accept = "application/json") {
  const headers = { "Content-Type": "application/json", Accept: accept };
  return ask(path, read, { method: "POST", headers, body: JSON.stringify(document) }, superseded);
}

/** @returns the served models, each `{name, version, default, device, precision, manifest}` */
export async function models() {
  return (await ask("models", asJson)).models;
}

/** A served model as requests name it. */
export function reference(model) {
  return `${model.name}/${model.version}`;
}

function of(path, model, query = {}) {
  return `${path}?${new URLSearchParams({ model: reference(model), ...query })}`;
}

// Each of these is not repeated to a busy service once the AbortSignal `superseded` is aborted.

/**
 * @param {Blob} picture an encoded image
 * @returns the prediction with its capsules, its reconstruction and the image as the network saw it
 */
export async function predict(model, picture, superseded) {
  const path = of("predict", model, {
    capsules: true,
    reconstruction: true,
    image: true,
    top_k: model.manifest.labels_per_image,
  });
  const headers = { "Content-Type": picture.type };
  return (await ask(path, asJson, { method: "POST", headers, body: picture }, superseded)).predictions[0];
}

/** @param {string} drawing a data URL of the model's own size, taken as it is */
export async function predictDrawing(model, drawing, superseded) {
  const path = of("predict", model, { preprocess: "none" });
  return (await post(path, { images: [drawing] }, superseded)).predictions[0];
}

/**
 * @param capsules one vector for each class, as `predict` gave them
 * @param tweaks `[{dimension, delta}]`
 * @returns {Promise<string>} the reconstruction, a data URL
 */
export async function reconstruct(model, capsules, label, tweaks, superseded) {
  return (await post(of("reconstruct", model), { capsules, class: label, tweaks }, superseded)).reconstruction;
}

/** @returns `{deltas, reconstructions}`: a row of data URLs for each dimension, one for each delta */
export function sweep(model, capsules, label, superseded) {
  return post(of("reconstruct/sweep", model), { capsules, class: label }, superseded);
}

/** @returns {Promise<Blob>} the sweep as the labelled figure, with the tweaks done before */
export function sweepFigure(model, capsules, label, tweaks, superseded) {
  return post(of("reconstruct/sweep", model), { capsules, class: label, tweaks }, superseded, asBlob, "image/png");
}

/**
 * `work`, one run at a time: asked for again while it runs, it runs once more afterwards, however often.
 * @param {(superseded: AbortSignal) => Promise<void>} work gets a signal that it was asked for again
 */
export function oneAtATime(work) {
  let running = null; // AbortController
  let again = false;
  return async () => {
    again = true;
    running?.abort();
    if (running) return;
    try {
      while (again) {
        again = false;
        running = new AbortController();
        await work(running.signal);
      }
    } finally {
      running = null;
    }
  };
}
