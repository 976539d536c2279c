// The live engine view: steps stream in (step-feed.js), are kept (series.js) and drawn
// (strip-chart.js) at most once a frame; figures and percentiles come from the monitor's polls.

import { CHARTS } from "./charts.js";
import { byId, reducedMotion } from "./dom.js";
import { engineLayout } from "./engine-layout.js";
import { factsOf, showFacts } from "./facts.js";
import { count, ms, percent, plural, rate } from "./format.js";
import { LoadButton } from "./load-button.js";
import { StepSeries, WINDOWS } from "./series.js";
import { StepFeed } from "./step-feed.js";
import { StripChart } from "./strip-chart.js";

const RATE_SECONDS = 3;
const FRAME_MS = 40;
const CALM_FRAME_MS = 1000; // prefers-reduced-motion
const MAX_POLLS = 600;

export class EngineView {
  #monitor;
  #series = new StepSeries();
  #polls = [];
  #charts = new Map();
  #feed = new StepFeed(
    (step) => this.#series.push(step),
    (isLive) => {
      this.#isLive = isLive;
    },
  );
  #isLive = false;
  #isShown = false;
  #isPaused = false;
  #frozen = null;
  #seconds = null;
  #back = null;
  #drawnAt = 0;
  #frameId = 0;

  constructor(monitor) {
    this.#monitor = monitor;
    const load = new LoadButton(monitor);
    byId("view-engine").append(
      ...engineLayout({
        window: (event) => this.#choose(event.target.value),
        pause: () => this.#pause(),
        load: () => load.toggle(),
      }),
    );
    for (const spec of CHARTS)
      this.#charts.set(spec.id, new StripChart(byId(`chart-${spec.id}`), spec));
    this.#listenToCursor();
    monitor.addEventListener("state", () => this.#onState());
    document.addEventListener("visibilitychange", () => this.#follow());
    document.addEventListener("themechange", () => this.#draw());
  }

  set isShown(value) {
    this.#isShown = value;
    this.#follow();
  }

  /** Stream and draw only while someone can see it. */
  #follow() {
    const isSeen = this.#isShown && !document.hidden;
    this.#feed.isOpen = isSeen;
    cancelAnimationFrame(this.#frameId);
    if (isSeen) this.#frameId = requestAnimationFrame((now) => this.#frame(now));
  }

  #frame(now) {
    const period = reducedMotion() ? CALM_FRAME_MS : FRAME_MS;
    if (now - this.#drawnAt >= period) {
      this.#drawnAt = now;
      if (!this.#isPaused) {
        this.#draw();
        this.#tiles();
      }
      this.#badge();
    }
    this.#frameId = requestAnimationFrame((next) => this.#frame(next));
  }

  #choose(id) {
    this.#seconds = WINDOWS.find((choice) => choice.id === id).seconds;
    this.#draw();
  }

  #pause() {
    this.#isPaused = !this.#isPaused;
    const button = byId("engine-pause");
    button.setAttribute("aria-pressed", String(this.#isPaused));
    if (this.#isPaused) this.#frozen = this.#rows();
  }

  /** The rows of every step chart; while paused, those of the moment of the pause. */
  #rows() {
    const rows = new Map();
    for (const { id, source } of CHARTS) {
      if (source === "steps")
        rows.set(id, this.#series.rows(this.#seconds, this.#charts.get(id).slots));
    }
    return rows;
  }

  #draw() {
    const rows = this.#isPaused ? this.#frozen : this.#rows();
    for (const { id, source } of CHARTS) {
      if (source === "steps") this.#charts.get(id).draw(rows.get(id), this.#back);
      else this.#charts.get(id).draw(this.#polls);
    }
    this.#readout(rows.get("batch"));
    const newest = rows.get("batch").findLast((row) => row);
    for (const [id, format] of [
      ["duration", ms],
      ["kv", percent],
    ]) {
      byId(`now-${id}`).textContent = format(newest?.[id]);
    }
  }

  #readout(rows) {
    const row = this.#back === null ? rows.findLast((r) => r) : rows.at(-1 - this.#back);
    const text = row
      ? readoutText(row)
      : this.#series.length
        ? "No step ran here."
        : "No step yet: send a message or start the sample load.";
    const line = byId("readout");
    if (line.textContent !== text) line.textContent = text;
    if (document.activeElement === byId("chart-batch"))
      byId("chart-batch").setAttribute("aria-valuetext", text);
  }

  #listenToCursor() {
    for (const { id, source } of CHARTS) {
      if (source !== "steps") continue;
      const canvas = byId(`chart-${id}`);
      canvas.addEventListener("pointermove", (event) =>
        this.#moveTo(this.#charts.get(id).backAt(event.clientX)),
      );
      canvas.addEventListener("pointerleave", () => this.#moveTo(null));
    }
    const main = byId("chart-batch");
    main.addEventListener("blur", () => this.#moveTo(null));
    main.addEventListener("keydown", (event) => {
      const steps = {
        ArrowLeft: 1,
        ArrowRight: -1,
        PageUp: 10,
        PageDown: -10,
        Home: Infinity,
        End: -Infinity,
      };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const limit = this.#charts.get("batch").slots - 1;
      this.#moveTo(Math.min(limit, Math.max(0, (this.#back ?? -1) + steps[event.key])));
    });
  }

  #moveTo(back) {
    this.#back = back;
    const main = byId("chart-batch");
    const slots = this.#charts.get("batch").slots;
    main.setAttribute("aria-valuemax", String(slots));
    main.setAttribute("aria-valuenow", String(slots - (back ?? 0)));
    this.#draw();
  }

  #tiles() {
    const { decode, prompt, busy } = this.#series.rates(RATE_SECONDS);
    const { running, waiting, kv_usage: kv } = this.#monitor.state ?? {};
    const shown = {
      "decode-rate": rate(decode),
      "prompt-rate": rate(prompt),
      running: count(running),
      waiting: count(waiting),
      "kv-use": percent(kv),
      busy: percent(busy),
    };
    for (const [id, text] of Object.entries(shown)) {
      if (byId(`tile-${id}`).textContent !== text) byId(`tile-${id}`).textContent = text;
    }
  }

  #badge() {
    const isBusy = this.#series.length > 0 && this.#series.rates(1).steps > 0;
    const state = this.#isPaused
      ? "paused"
      : !this.#isLive
        ? "reconnecting"
        : isBusy
          ? "running"
          : "idle";
    const badge = byId("engine-live");
    if (badge.textContent === state) return;
    badge.textContent = state;
    badge.dataset.state = state;
  }

  #onState() {
    const state = this.#monitor.state;
    const row = {};
    for (const name of ["ttft", "itl"]) {
      for (const p of ["p50", "p90", "p99"]) {
        row[`${name}_${p}`] = state[`${name}_ms`]?.[p] ?? null;
        byId(`figure-${name}_${p}`).textContent = ms(row[`${name}_${p}`]);
      }
    }
    this.#polls.push(row);
    if (this.#polls.length > MAX_POLLS) this.#polls.shift();
    showFacts(byId("facts"), factsOf(state, this.#monitor.version));
  }
}

function readoutText({
  first,
  steps,
  decode,
  drafted,
  accepted,
  prompt,
  budget,
  duration,
  kv,
  running,
  waiting,
  preempted,
}) {
  const which = steps === 1 ? `Step ${count(first)}` : `Mean of ${plural(steps, "step")}`;
  const parts = [
    `${rate(decode).replace(/\.0$/, "")} decode + ${rate(prompt).replace(/\.0$/, "")} prompt of ${count(budget)}`,
    ...(drafted ? [`${rate(accepted)} of ${rate(drafted)} guesses right`] : []),
    ms(duration),
    `${count(running)} running`,
    `${count(waiting)} waiting`,
    `KV ${percent(kv)}`,
  ];
  if (preempted) parts.push(`${count(preempted)} preempted`);
  return `${which}: ${parts.join(", ")}`;
}
