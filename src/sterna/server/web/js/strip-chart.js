// A strip chart on a canvas: the newest row at the right edge, fixed slot width, layers as stacked
// bars, lines or areas, two grid lines, a cursor. Sharp on every pixel density; no dependencies.

import { Scale } from "./scale.js";

const GUTTER = 44; // room for the axis labels, CSS px
const PAD = { top: 8, bottom: 6 };

/** What a CSS variable resolves to now, theme included (light-dark() needs a real element). */
function resolveColor(probe, name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

/**
 * spec: {slot, least, format, layers: [{key, color, kind: "bar"|"line"|"area"|"limit", dash?}]}
 * slot in CSS px; `least` is the smallest top of the scale; "bar" layers stack in order; a "limit"
 * is a dashed line, drawn only where the scale reaches it.
 */
export class StripChart {
  #canvas;
  #context;
  #spec;
  #scale;
  #colors = new Map();
  #width = 0;
  #height = 0;

  constructor(canvas, spec) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#spec = spec;
    this.#scale = new Scale(spec.least);
    new ResizeObserver(() => this.#resize()).observe(canvas);
    document.addEventListener("themechange", () => this.#colors.clear());
  }

  get slots() {
    return Math.max(1, Math.floor((this.#width - GUTTER) / this.#spec.slot));
  }

  /** Slots back from the newest row at a pointer's x, or null outside the plot. */
  backAt(clientX) {
    const x = clientX - this.#canvas.getBoundingClientRect().left;
    const back = Math.floor((this.#width - x) / this.#spec.slot);
    return x >= GUTTER && back >= 0 && back < this.slots ? back : null;
  }

  #resize() {
    const { width, height } = this.#canvas.getBoundingClientRect();
    if (width === 0) return;
    const density = devicePixelRatio || 1;
    this.#width = width;
    this.#height = height;
    this.#canvas.width = Math.round(width * density);
    this.#canvas.height = Math.round(height * density);
    this.#context.setTransform(density, 0, 0, density, 0, 0);
    this.#canvas.dispatchEvent(new Event("resized"));
  }

  #color(name) {
    if (!this.#colors.has(name)) this.#colors.set(name, resolveColor(this.#canvas, name));
    return this.#colors.get(name);
  }

  /** rows: oldest first, null = gap. back: cursor as slots from the newest, or null. */
  draw(rows, back = null) {
    if (this.#width === 0) return;
    const shown = rows.slice(-this.slots);
    const bars = this.#spec.layers.filter((layer) => layer.kind === "bar");
    const value = (row, key) => (Number.isFinite(row[key]) ? row[key] : 0);
    let largest = 0;
    for (const row of shown) {
      if (!row) continue;
      largest = Math.max(
        largest,
        bars.reduce((sum, layer) => sum + value(row, layer.key), 0),
      );
      for (const { kind, key } of this.#spec.layers) {
        if (kind === "line" || kind === "area") largest = Math.max(largest, value(row, key));
      }
    }
    const top = this.#scale.fit(largest);
    this.#context.clearRect(0, 0, this.#width, this.#height);
    this.#grid(top);
    if (back !== null && back < this.slots) this.#cursor(back);
    if (bars.length) this.#bars(shown, bars, top);
    for (const layer of this.#spec.layers) {
      if (layer.kind === "limit") this.#limit(shown, layer, top);
      else if (layer.kind !== "bar") this.#line(shown, layer, top);
    }
  }

  #y(value, top) {
    const room = this.#height - PAD.top - PAD.bottom;
    return PAD.top + room * (1 - value / top);
  }

  #x(i, length) {
    return this.#width - (length - i) * this.#spec.slot;
  }

  #grid(top) {
    const pen = this.#context;
    pen.font = `11px ${getComputedStyle(this.#canvas).fontFamily}`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.lineWidth = 1;
    for (const share of [0, 0.5, 1]) {
      const y = Math.round(this.#y(share * top, top)) + 0.5;
      pen.strokeStyle = this.#color(share === 0 ? "--axis" : "--grid");
      pen.beginPath();
      pen.moveTo(GUTTER, y);
      pen.lineTo(this.#width, y);
      pen.stroke();
      pen.fillStyle = this.#color("--ink-soft");
      pen.fillText(this.#spec.format(share * top), GUTTER - 8, Math.max(y, 8));
    }
  }

  #cursor(back) {
    const { slot } = this.#spec;
    this.#context.fillStyle = this.#color("--cursor");
    this.#context.fillRect(
      this.#width - (back + 1) * slot,
      PAD.top,
      slot,
      this.#height - PAD.top - PAD.bottom,
    );
  }

  #bars(rows, layers, top) {
    const pen = this.#context;
    const gap = this.#spec.slot > 3 ? 1 : 0;
    for (const [i, row] of rows.entries()) {
      if (!row) continue;
      let base = this.#y(0, top);
      for (const { key, color } of layers) {
        if (!(row[key] > 0)) continue;
        // At least 1.5 px: eight decodes under a 512-token chunk have to stay visible.
        const height = Math.max(1.5, (row[key] / top) * (this.#y(0, top) - PAD.top));
        pen.fillStyle = this.#color(color);
        pen.fillRect(this.#x(i, rows.length), base - height, this.#spec.slot - gap, height);
        base -= height;
      }
    }
  }

  #limit(rows, { key, color }, top) {
    const limit = rows.findLast((row) => row)?.[key];
    if (!limit || limit > top * 1.001) return;
    const pen = this.#context;
    const y = Math.round(this.#y(limit, top)) + 0.5;
    pen.save();
    pen.setLineDash([4, 4]);
    pen.strokeStyle = this.#color(color);
    pen.beginPath();
    pen.moveTo(GUTTER, y);
    pen.lineTo(this.#width, y);
    pen.stroke();
    pen.restore();
  }

  /** Each run of rows without a gap is one path. */
  #line(rows, layer, top) {
    let run = [];
    for (let i = 0; i <= rows.length; i += 1) {
      const value = rows[i]?.[layer.key];
      if (Number.isFinite(value))
        run.push([this.#x(i, rows.length) + this.#spec.slot / 2, this.#y(value, top)]);
      else if (run.length) {
        this.#path(run, layer, this.#y(0, top));
        run = [];
      }
    }
  }

  #path(points, { kind, color, dash }, floor) {
    const pen = this.#context;
    pen.save();
    pen.beginPath();
    if (points.length === 1) pen.moveTo(points[0][0] - 1.5, points[0][1]);
    for (const [x, y] of points) pen.lineTo(x, y);
    pen.strokeStyle = this.#color(color);
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    pen.setLineDash(dash ?? []);
    pen.stroke();
    if (kind === "area") {
      pen.lineTo(points.at(-1)[0], floor);
      pen.lineTo(points[0][0], floor);
      pen.globalAlpha = 0.14;
      pen.fillStyle = this.#color(color);
      pen.fill();
    }
    pen.restore();
  }
}
