// The drawing pad: strokes of a pointer, or a picture that was opened, as an encoded image.

const PIXELS = 280; // of the pad's longer side
const SIDE = 100; // the pad's own unit is a hundredth of its shorter side
const LARGEST = 512; // pixels of an opened picture's longer side; the service lays it out at 256
// Sent as they are; the service takes WebP, too, but heeds its note of how a camera was held, as Chromium does not.
const TYPES = ["image/png", "image/jpeg", "image/bmp", "image/gif"];
const BRUSH = 8; // once laid out in 20 of 28 pixels, about as thick as MNIST's strokes
const STEPS = 50; // that Undo takes back
const BLANK = { strokes: [], opened: null };

export class Pad {
  #canvas;
  #context;
  #shown = BLANK; // strokes, each a Path2D, or an opened picture as `decoded` returns it; never changed in place
  #past = []; // what was shown before, the last one last
  #opening = null; // File that is being decoded, unless something else was drawn meanwhile
  #ink = "#fff";
  #ground = "#000";
  #changed;
  #turn = 0; // counts what was drawn
  #told = 0; // the last of them that `changed` heard of
  #down = new Set(); // ids of the pointers that draw

  /** @param {(picture: Blob | null, settled: boolean, drawn: number) => void} changed gets the picture, or null
   *    if there is none, whether all pointers are up, and when it was drawn, in milliseconds as `performance` has them */
  constructor(canvas, changed) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#changed = changed;
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
  }

  /**
   * Draw as the training images are: of their shape, and light on dark or dark on light.
   * @returns whether there is a drawing, whose new picture `changed` will get
   */
  useImage({ width, height, polarity }) {
    [this.#ink, this.#ground] = polarity === "dark_on_light" ? ["#000", "#fff"] : ["#fff", "#000"];
    const longer = Math.max(width, height);
    this.#canvas.width = Math.max(1, Math.round((PIXELS * width) / longer));
    this.#canvas.height = Math.max(1, Math.round((PIXELS * height) / longer));
    const drawn = this.#shown.strokes.length > 0;
    if (drawn) this.#draw();
    else this.#paint();
    return drawn;
  }

  get isOpening() {
    return this.#opening !== null;
  }

  clear() {
    this.#show(BLANK);
  }

  /** Bring back what was shown before the last stroke, picture or clearing. */
  undo() {
    this.#opening = null;
    if (this.#past.length === 0) return;
    this.#shown = this.#past.pop();
    this.#draw();
  }

  /** @param {string} path an SVG path in a square of 100 by 100 */
  show(path) {
    this.#show({ strokes: [new Path2D(path)], opened: null });
  }

  /** Show a picture; false if the browser cannot read it. */
  async open(file) {
    this.#opening = file;
    const opened = await decoded(file);
    if (this.#opening !== file) return true; // something else was drawn or opened meanwhile
    this.#opening = null;
    if (!opened) return false;
    this.#show({ strokes: [], opened });
    return true;
  }

  #show(shown, settled = true) {
    this.#opening = null;
    if (shown !== this.#shown) this.#past.push(this.#shown); // clearing nothing is no step
    if (this.#past.length > STEPS) this.#past.shift();
    this.#shown = shown;
    this.#draw(settled);
  }

  #begin(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.#canvas.setPointerCapture(event.pointerId);
    const stroke = new Path2D();
    let [x, y] = this.#place(event);
    stroke.moveTo(x, y);
    stroke.lineTo(x + 0.01, y); // a tap is a dot: lines without length are not drawn
    this.#down.add(event.pointerId);
    this.#show({ strokes: [...this.#shown.strokes, stroke], opened: null }, false);

    const listening = new AbortController();
    const on = (type, listen) => this.#canvas.addEventListener(type, listen, { signal: listening.signal });
    on("pointermove", (moved) => {
      if (moved.pointerId !== event.pointerId || !this.#shown.strokes.includes(stroke)) return; // or it was cleared
      const points = (moved.getCoalescedEvents?.() ?? [moved]).map((point) => this.#place(point));
      if (points.every((point) => point[0] === x && point[1] === y)) return; // a pen's pressure changed, say
      for (const point of points) stroke.lineTo(...point);
      [x, y] = points.at(-1);
      this.#draw(false);
    });
    const end = (ended) => {
      if (ended.pointerId !== event.pointerId) return;
      listening.abort();
      this.#down.delete(event.pointerId);
      if (this.#shown.strokes.length > 0) this.#draw(this.#down.size === 0); // its own, or another finger's
    };
    on("pointerup", end);
    on("pointercancel", end);
  }

  #place(event) {
    const box = this.#canvas.getBoundingClientRect();
    const unit = Math.min(box.width, box.height) / SIDE;
    return [
      (event.clientX - box.left - box.width / 2) / unit + SIDE / 2,
      (event.clientY - box.top - box.height / 2) / unit + SIDE / 2,
    ];
  }

  #draw(settled = true) {
    this.#paint();
    const turn = ++this.#turn;
    const drawn = performance.now();
    const tell = (picture) => {
      if (turn < this.#told) return; // pictures may be encoded out of order: what comes after a newer one is old
      this.#told = turn;
      this.#changed(picture, settled, drawn);
    };
    const { strokes, opened } = this.#shown;
    if (strokes.length === 0) tell(opened?.sent ?? null);
    else this.#canvas.toBlob(tell, "image/png");
  }

  #paint() {
    const { width, height } = this.#canvas;
    const { strokes, opened } = this.#shown;
    const context = this.#context;
    context.resetTransform();
    context.fillStyle = opened ? "#808080" : this.#ground; // shows where a picture is transparent
    context.fillRect(0, 0, width, height);
    if (opened) {
      const { picture } = opened;
      const zoom = Math.min(width / picture.width, height / picture.height);
      const [w, h] = [picture.width * zoom, picture.height * zoom];
      context.imageSmoothingEnabled = zoom < 1;
      context.imageSmoothingQuality = "high";
      context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
      return;
    }
    const unit = Math.min(width, height) / SIDE;
    context.translate((width - unit * SIDE) / 2, (height - unit * SIDE) / 2);
    context.scale(unit, unit);
    context.strokeStyle = this.#ink;
    context.lineWidth = BRUSH;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of strokes) context.stroke(stroke);
  }
}

/** A file's picture on a canvas and as it is sent; null if the browser cannot read it. */
async function decoded(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const asItIs = TYPES.includes(file.type) && Math.max(bitmap.width, bitmap.height) <= LARGEST;
  const picture = drawn(bitmap);
  bitmap.close(); // many megabytes of a photograph do not wait for the garbage collector
  return { picture, sent: asItIs ? file : await picture.convertToBlob({ type: "image/png" }) };
}

/** A canvas with the picture, made smaller if it is larger than anything a network looks at. */
function drawn(bitmap) {
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(
    Math.max(1, Math.round(bitmap.width * scale)),
    Math.max(1, Math.round(bitmap.height * scale)),
  );
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high"; // or a photograph's thin strokes fall between its pixels
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}
