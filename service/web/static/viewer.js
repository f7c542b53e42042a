// The retention viewer: slices of the series that was read, and on them what the model was and was not shown.
"use strict";
addEventListener("DOMContentLoaded", async () => {
  const box = document.getElementById("viewer");
  if (!box) return;
  const find = (id) => document.getElementById(id);
  const canvas = find("picture"), slider = find("slice"), tiles = find("tiles"), strip = find("strip");
  const paint = canvas.getContext("2d");
  const STATES = {
    "shown": "shown to the model",
    "in-slab": "shown, averaged with its neighbours",
    "represented": "not read: it hardly differs from a slice that was",
    "sampled-out": "not read: left out by sampling",
    "duplicate-position": "not read: another slice stands at this position",
    "unreadable": "could not be decoded",
  };
  const PRESETS = { CT: [["Soft tissue", 40, 400], ["Lung", -600, 1500], ["Bone", 400, 1800], ["Brain", 40, 80]] };
  const frames = new Map(); // slice -> Promise of {rows, columns, values}
  const KEPT_FRAMES = 48;
  let map, at = 0, centre = 40, width = 400, shown = null, preset = -1;

  const answer = await fetch(box.dataset.retention);
  if (!answer.ok) return explain((await answer.json()).detail);
  map = await answer.json();
  const count = map.sources.length;
  if (!count) return explain("No slices are on record for this analysis.");
  slider.max = count;
  makeStrip();
  makeWindows();
  await show(Math.max(0, map.sources.findIndex((one) => one.state === "shown" || one.state === "in-slab")), true);

  function explain(text) {
    find("no-picture").textContent = text;
    find("no-picture").hidden = false;
  }

  function isRead(source) { return source.state === "shown" || source.state === "in-slab"; }

  function makeStrip() {
    map.sources.forEach((source, index) => {
      const tick = document.createElement("i");
      tick.className = isRead(source) ? "read" : source.state;
      tick.addEventListener("click", () => show(index));
      strip.append(tick);
    });
  }

  function makeWindows() {
    const presets = PRESETS[map.modality] || [];
    presets.forEach(([name, c, w], index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "small";
      button.textContent = name;
      button.addEventListener("click", () => { preset = index; centre = c; width = w; mark(); draw(); });
      find("windows").append(button);
    });
    if (presets.length) { preset = 0; mark(); }
  }

  function mark() {
    [...find("windows").children].forEach((button, index) => button.setAttribute("aria-pressed", String(index === preset)));
  }

  function load(index) {
    if (!frames.has(index)) {
      frames.set(index, fetchFrame(index));
      if (frames.size > KEPT_FRAMES) frames.delete(frames.keys().next().value);
    }
    return frames.get(index);
  }

  async function fetchFrame(index) {
    if (!box.dataset.frames) return { fault: "Images are not part of your role; the map of tokens is." };
    const response = await fetch(box.dataset.frames + index);
    if (!response.ok) return { fault: (await response.json()).detail };
    return {
      rows: Number(response.headers.get("X-Rows")),
      columns: Number(response.headers.get("X-Columns")),
      values: new Int16Array(await response.arrayBuffer()),
    };
  }

  async function show(index, first) {
    at = Math.min(count - 1, Math.max(0, index));
    slider.value = at + 1;
    describe();
    const wanted = at;
    const frame = await load(at);
    if (wanted !== at) return;
    shown = frame;
    if (first && !(map.modality in PRESETS) && frame.values) automatic(frame.values);
    find("no-picture").hidden = !frame.fault;
    if (frame.fault) find("no-picture").textContent = frame.fault;
    draw();
    box.dataset.slice = String(at + 1);
    for (const next of [at + 1, at - 1]) if (next >= 0 && next < count) load(next);
  }

  function automatic(values) {
    const sorted = Int16Array.from(values.filter((_, index) => index % 17 === 0)).sort();
    const low = sorted[Math.floor(sorted.length * 0.01)], high = sorted[Math.floor(sorted.length * 0.99)];
    centre = (low + high) / 2;
    width = Math.max(1, high - low);
  }

  function inputOf(source) {
    const own = map.inputs.find((one) => one.sources.includes(at));
    return own || (source.input_index === null ? null : map.inputs[source.input_index]);
  }

  function describe() {
    const source = map.sources[at];
    const input = source.input_index === null ? null : map.inputs[source.input_index];
    const position = source.position_mm === null ? "" : ` at ${source.position_mm.toFixed(1)} mm`;
    let text = `Slice ${at + 1} of ${count}${position}: ${source.reason || STATES[source.state] || source.state}.`;
    if (source.state === "represented" && input) text += ` Slice ${input.sources[0] + 1} stands for it.`;
    if (source.state === "in-slab" && input) text += ` Slices ${input.sources[0] + 1} to ${input.sources.at(-1) + 1}, ${input.operation}.`;
    if (isRead(source) && input) {
      const kept = [...input.tokens].filter((code) => code === "0").length;
      text += ` ${kept} of ${input.tokens.length} tokens kept.`;
    }
    find("caption").textContent = text;
    const badge = find("slice-state");
    badge.textContent = isRead(source) ? "read" : source.state.replace("-", " ");
    badge.className = "badge s-" + (isRead(source) ? "read" : source.state);
    [...strip.children].forEach((tick, index) => tick.toggleAttribute("data-here", index === at));
    slider.setAttribute("aria-valuetext", text);
  }

  function draw() {
    const size = canvas.width;
    paint.setTransform(1, 0, 0, 1, 0, 0);
    paint.fillStyle = "#05080c";
    paint.fillRect(0, 0, size, size);
    const source = map.sources[at], input = inputOf(source);
    let rows = shown?.rows, columns = shown?.columns;
    if (!rows && input) {
      const m = input.source_pixels_from_token;
      columns = Math.abs(m[0][0] * map.columns + m[0][1] * map.rows) || 512;
      rows = Math.abs(m[1][0] * map.columns + m[1][1] * map.rows) || 512;
    }
    const scale = size / Math.max(rows || 512, columns || 512);
    const left = (size - (columns || 512) * scale) / 2, top = (size - (rows || 512) * scale) / 2;
    paint.setTransform(scale, 0, 0, scale, left, top);
    if (shown?.values) paint.drawImage(windowed(shown), 0, 0);
    find("level").textContent = shown?.values ? `C ${Math.round(centre)}  W ${Math.round(width)}` : "";
    if (!tiles.checked) return;
    if (!isRead(source)) return veil(rows || 512, columns || 512);
    if (input) for (let row = 0; row < map.rows; row++) for (let column = 0; column < map.columns; column++) {
      tile(input, row, column, input.tokens[row * map.columns + column], scale);
    }
  }

  function windowed({ rows, columns, values }) {
    const picture = document.createElement("canvas");
    picture.width = columns;
    picture.height = rows;
    const pixels = new ImageData(columns, rows), grey = pixels.data;
    const low = centre - width / 2, factor = 255 / width;
    for (let index = 0; index < values.length; index++) {
      const value = (values[index] - low) * factor; // Uint8ClampedArray clamps
      grey[4 * index] = grey[4 * index + 1] = grey[4 * index + 2] = value;
      grey[4 * index + 3] = 255;
    }
    picture.getContext("2d").putImageData(pixels, 0, 0);
    return picture;
  }

  function tile(input, row, column, code, scale) {
    const [[a, b, c], [d, e, f]] = input.source_pixels_from_token;
    const corner = (x, y) => [a * x + b * y + c, d * x + e * y + f];
    const inset = code === "0" ? 1 / (scale * Math.hypot(a, d)) : 0;
    paint.beginPath();
    for (const [x, y] of [[0, 0], [1, 0], [1, 1], [0, 1]]) {
      paint.lineTo(...corner(column + (x ? 1 - inset : inset), row + (y ? 1 - inset : inset)));
    }
    paint.closePath();
    if (code === "0") {
      paint.strokeStyle = "rgba(45, 212, 191, .75)";
      paint.lineWidth = 1.5 / scale;
      paint.stroke();
    } else {
      paint.fillStyle = code === "1" ? "rgba(217, 119, 6, .42)" : "rgba(5, 8, 12, .72)";
      paint.fill();
    }
  }

  function veil(rows, columns) {
    paint.fillStyle = "rgba(5, 8, 12, .45)";
    paint.fillRect(0, 0, columns, rows);
    paint.strokeStyle = "rgba(251, 113, 133, .55)";
    paint.lineWidth = Math.max(1, columns / 256);
    paint.beginPath();
    const step = Math.max(rows, columns) / 14;
    for (let offset = -rows; offset < columns; offset += step) {
      paint.moveTo(offset, 0);
      paint.lineTo(offset + rows, rows);
    }
    paint.save();
    const path = new Path2D();
    path.rect(0, 0, columns, rows);
    paint.clip(path);
    paint.stroke();
    paint.restore();
  }

  slider.addEventListener("input", () => show(Number(slider.value) - 1));
  tiles.addEventListener("change", draw);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -5, PageDown: 5, Home: -count, End: count }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at + step);
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    show(at + Math.sign(event.deltaY));
  }, { passive: false });

  let grip = null;
  canvas.addEventListener("pointerdown", (event) => {
    grip = { x: event.clientX, y: event.clientY, centre, width, slice: at, touch: event.pointerType === "touch" };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const dx = event.clientX - grip.x, dy = event.clientY - grip.y;
    if (grip.touch) { show(grip.slice + Math.round(dx / 16)); return; } // one finger scrolls
    const speed = Math.max(0.5, grip.width / 300);
    width = Math.max(1, grip.width + dx * speed);
    centre = grip.centre + dy * speed;
    preset = -1;
    mark();
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { grip = null; });
});
