// The retention viewer: slices of the series that was read, and on them what the model was and was not shown.
"use strict";
addEventListener("DOMContentLoaded", async () => {
  const box = document.getElementById("viewer");
  if (!box) return;
  const find = (id) => document.getElementById(id);
  const canvas = find("picture"), slider = find("slice"), tiles = find("tiles"), strip = find("strip");
  const opacity = find("opacity"), anchor = find("anchor");
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
  await show(middle(), true);

  function explain(text) {
    find("no-picture").textContent = text;
    find("no-picture").hidden = false;
  }

  function isRead(source) { return source.state === "shown" || source.state === "in-slab"; }

  // The slice nearest to the middle of the stack that the model was given.
  function middle() {
    const half = (count - 1) / 2;
    const read = map.sources.map((source, index) => [Math.abs(index - half), index, source]).filter(([, , source]) => isRead(source));
    return read.length ? read.sort((a, b) => a[0] - b[0])[0][1] : Math.round(half);
  }

  function makeStrip() {
    map.sources.forEach((source) => {
      const tick = document.createElement("i");
      tick.className = isRead(source) ? "read" : source.state;
      strip.append(tick);
    });
    const go = (event) => {
      const box = strip.getBoundingClientRect();
      show(Math.floor((event.clientX - box.left) / box.width * count));
    };
    strip.addEventListener("pointerdown", (event) => { strip.setPointerCapture(event.pointerId); go(event); });
    strip.addEventListener("pointermove", (event) => { if (strip.hasPointerCapture(event.pointerId)) go(event); });
  }

  // Slices of the input that stands for a slice that was not given.
  function anchorsOf(source) {
    if (source.state !== "represented" || source.input_index === null) return [];
    return map.inputs[source.input_index].sources;
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
    const anchors = anchorsOf(source);
    let text = `Slice ${at + 1} of ${count}${position}: ${source.reason || STATES[source.state] || source.state}.`;
    if (anchors.length) text += ` ${named(anchors)} for it.`;
    if (source.state === "in-slab" && input) text += ` Slices ${input.sources[0] + 1} to ${input.sources.at(-1) + 1}, ${input.operation}.`;
    if (isRead(source) && input) {
      const kept = [...input.tokens].filter((code) => code === "0").length;
      text += ` ${kept} of ${input.tokens.length} tokens kept.`;
    }
    find("caption").textContent = text;
    anchor.hidden = !anchors.length;
    if (anchors.length) anchor.textContent = `Go to slice ${anchors[0] + 1}, which was read`;
    const badge = find("slice-state");
    badge.textContent = isRead(source) ? "given to the model" : `not given: ${source.state.replace("-", " ")}`;
    badge.className = "badge s-" + (isRead(source) ? "read" : source.state);
    find("number").textContent = `${at + 1} / ${count}`;
    [...strip.children].forEach((tick, index) => tick.toggleAttribute("data-anchor", anchors.includes(index)));
    [...strip.children].forEach((tick, index) => tick.toggleAttribute("data-here", index === at));
    slider.setAttribute("aria-valuetext", text);
  }

  function named(slices) {
    return slices.length === 1 ? `Slice ${slices[0] + 1} stands` : `Slices ${slices[0] + 1} to ${slices.at(-1) + 1} stand`;
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
    find("level").textContent = shown?.values ? `C ${Math.round(centre)} W ${Math.round(width)}` : "";
    if (!tiles.checked) return;
    paint.globalAlpha = Number(opacity.value) / 100;
    if (!isRead(source)) notGiven(rows || 512, columns || 512);
    else if (input) drawTokens(input, scale);
    paint.globalAlpha = 1;
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

  // Kept tokens stay clear within a line, merged ones turn blue, dropped ones dark red: as in the Secondary Capture.
  function drawTokens(input, scale) {
    const [[a, b, c], [d, e, f]] = input.source_pixels_from_token;
    const corner = (x, y) => [a * x + b * y + c, d * x + e * y + f];
    const code = (row, column) => row < 0 || column < 0 || row >= map.rows || column >= map.columns ? "-" : input.tokens[row * map.columns + column];
    const outline = new Path2D();
    for (let row = 0; row < map.rows; row++) for (let column = 0; column < map.columns; column++) {
      const own = code(row, column);
      const corners = [corner(column, row), corner(column + 1, row), corner(column + 1, row + 1), corner(column, row + 1)];
      if (own !== "0") {
        paint.fillStyle = own === "1" ? "rgba(37, 99, 235, .42)" : "rgba(62, 10, 14, .68)";
        paint.beginPath();
        corners.forEach((point) => paint.lineTo(...point));
        paint.fill();
        continue;
      }
      [[-1, 0], [0, 1], [1, 0], [0, -1]].forEach(([down, right], side) => {
        if (code(row + down, column + right) === "0") return;
        outline.moveTo(...corners[side]);
        outline.lineTo(...corners[(side + 1) % 4]);
      });
    }
    paint.strokeStyle = "#2dd4bf";
    paint.lineWidth = 1.5 / scale;
    paint.stroke(outline);
  }

  function notGiven(rows, columns) {
    paint.fillStyle = "rgba(62, 10, 14, .5)";
    paint.fillRect(0, 0, columns, rows);
    paint.strokeStyle = "#ff8c00";
    const width = Math.max(2, Math.min(rows, columns) / 96);
    paint.lineWidth = width;
    paint.strokeRect(width / 2, width / 2, columns - width, rows - width);
  }

  slider.addEventListener("input", () => show(Number(slider.value) - 1));
  tiles.addEventListener("change", draw);
  opacity.addEventListener("input", draw);
  anchor.addEventListener("click", () => show(anchorsOf(map.sources[at])[0]));
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "t") { tiles.checked = !tiles.checked; draw(); return; }
    if (event.key === "a" && !anchor.hidden) { anchor.click(); return; }
    const chosen = find("windows").children[Number(event.key) - 1];
    if (chosen) { chosen.click(); return; }
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
