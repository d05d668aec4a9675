// The sliders: one for each dimension of the chosen capsule, over the strip of what it draws alone.

// How the manifest's effects are said, and their units.
const EFFECTS = {
  thickness: ["stroke thickness", "\u00a0px"],
  slant: ["slant", "°"],
  width: ["width", "\u00a0px"],
  height: ["height", "\u00a0px"],
  ink: ["ink", "\u00a0%"],
  across: ["to the right", "\u00a0px"],
  down: ["downwards", "\u00a0px"],
};

export class Dimensions {
  #list;
  #moved;
  #rows = []; // of each dimension its elements and its delta
  #step = 0;

  /** @param {(deltas: number[]) => void} moved gets every dimension's delta after one was moved */
  constructor(list, moved) {
    this.#list = list;
    this.#moved = moved;
  }

  /** Begin anew, every slider at 0, for the class `label` of a model. */
  show(manifest, label) {
    const { digit_dimensions: count, tweak_range: range, tweak_step: step } = manifest.capsules;
    const meanings = manifest.dimensions[label] ?? [];
    this.#step = step / 5; // finer than the strip's
    if (this.#rows.length !== count) {
      this.#rows = Array.from({ length: count }, (_, dimension) => this.#row(dimension));
      this.#list.replaceChildren(...this.#rows.map((row) => row.item));
    }
    this.#rows.forEach((row, dimension) => {
      Object.assign(row.slider, { min: range[0], max: range[1], step: this.#step });
      row.name.textContent = meanings[dimension]?.name ?? `dimension ${dimension}`;
      row.effects.textContent = describe(meanings[dimension]);
    });
    this.#list.classList.add("waiting"); // for strips of this class
    this.reset();
  }

  reset() {
    for (const row of this.#rows) this.#set(row, 0);
  }

  /** @param rows of each dimension the data URLs of its strip, from the range's one end to the other */
  showStrips(rows) {
    this.#list.classList.remove("waiting");
    this.#rows.forEach(({ strip, item }, dimension) => {
      const drawings = rows[dimension];
      item.style.setProperty("--columns", drawings.length);
      while (strip.childElementCount > drawings.length) strip.lastElementChild.remove();
      while (strip.childElementCount < drawings.length) {
        strip.append(Object.assign(document.createElement("img"), { alt: "", draggable: false }));
      }
      drawings.forEach((drawing, column) => (strip.children[column].src = drawing));
    });
  }

  #row(dimension) {
    const element = (tag, properties) => Object.assign(document.createElement(tag), properties);
    const id = `dimension-${dimension}`;
    const item = element("li", { className: "dimension" });
    const label = element("label", { htmlFor: id });
    const number = element("span", { className: "number", textContent: dimension });
    const name = element("span", { className: "name" });
    const value = element("span", { className: "value" });
    const strip = element("div", { className: "strip" }); // for pointers alone: the slider does the same
    const slider = element("input", { id, type: "range" });
    const effects = element("p", { id: `${id}-effects`, className: "effects" });
    slider.setAttribute("aria-describedby", effects.id);
    value.setAttribute("aria-hidden", "true"); // the slider says it
    label.append(number, " ", name);
    item.append(label, value, strip, slider, effects);
    const row = { item, name, value, strip, slider, effects };

    const changed = () => {
      this.#set(row, slider.valueAsNumber);
      this.#moved(this.#rows.map((each) => each.delta));
    };
    slider.addEventListener("input", changed);
    let before = 0; // the delta when a finger came down, which may turn out to scroll the page
    slider.addEventListener("pointerdown", () => (before = row.delta));
    slider.addEventListener("pointercancel", () => {
      slider.value = before;
      changed();
    });
    slider.addEventListener("dblclick", () => {
      slider.value = 0;
      changed();
    });
    strip.addEventListener("click", (event) => {
      const column = [...strip.children].indexOf(event.target);
      if (column < 0) return;
      const [low, high] = [Number(slider.min), Number(slider.max)];
      slider.value = low + ((high - low) * column) / Math.max(1, strip.childElementCount - 1);
      slider.focus();
      changed();
    });
    return row;
  }

  #set(row, delta) {
    row.delta = Math.abs(delta) < this.#step / 2 ? 0 : Number(delta.toFixed(6));
    row.slider.value = row.delta;
    row.value.textContent = signed(row.delta, 2);
    row.slider.setAttribute("aria-valuetext", row.value.textContent);
    row.item.classList.toggle("moved", row.delta !== 0);
  }
}

/** What a sweep through the range does, measured: "slant +11.5°, width −3.3 px". */
function describe(meaning) {
  return Object.entries(meaning?.effects ?? {})
    .map(([measure, { change }]) => {
      const [noun, unit] = EFFECTS[measure];
      return `${noun} ${signed(change, 1)}${unit}`;
    })
    .join(", ");
}

/** A number with its sign; a typographic minus, so that both signs are as wide. */
function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return "0";
  return `${value < 0 ? "−" : "+"}${text}`;
}
