// Engine steps kept in memory and cut into the rows that a chart draws: one row a step, or one a
// slice of time (means over the steps in it; no step, no row value).

// Two minutes at 200 steps a second, the longest time window at the fastest decode seen.
const CAPACITY = 24_000;

// Steps that began up to this long before a window are looked at: they may reach into it.
const LONGEST_STEP_S = 5;

/** Windows the user can choose; null seconds = one bar a step. */
export const WINDOWS = [
  { id: "steps", label: "Steps", seconds: null },
  { id: "15", label: "15 s", seconds: 15 },
  { id: "120", label: "2 min", seconds: 120 },
];

/** Tokens that drafts saved: right guesses, beside each decode's own token. */
const accepted = (step) =>
  (step.drafts ?? []).reduce((sum, draft) => sum + draft.num_accepted, 0);

const mean = (steps, name) => steps.reduce((sum, step) => sum + step[name], 0) / steps.length;
const last = (steps, name) => steps.at(-1)[name];

/** The chart row of a group of steps. Durations in ms, times in seconds on the server's clock. */
function rowOf(steps) {
  return {
    first: steps[0].step,
    steps: steps.length,
    decode: mean(steps, "num_decode_tokens"),
    drafted: steps.reduce((sum, step) => sum + (step.num_draft_tokens ?? 0), 0) / steps.length,
    accepted: steps.reduce((sum, step) => sum + accepted(step), 0) / steps.length,
    prompt: mean(steps, "num_prompt_tokens"),
    budget: last(steps, "token_budget"),
    duration: 1000 * mean(steps, "duration"),
    kv: last(steps, "kv_usage"),
    running: last(steps, "num_running"),
    waiting: last(steps, "num_waiting"),
    preempted: steps.reduce((sum, step) => sum + step.num_preempted, 0),
  };
}

export class StepSeries {
  #steps = [];
  #lastArrival = 0;

  push(step) {
    const previous = this.#steps.at(-1);
    // A restarted server counts from 0 again, on another clock: begin anew.
    if (previous && (step.step < previous.step || step.started < previous.started))
      this.#steps = [];
    this.#steps.push(step);
    if (this.#steps.length > CAPACITY) this.#steps.splice(0, CAPACITY / 4);
    this.#lastArrival = performance.now();
  }

  get length() {
    return this.#steps.length;
  }

  /** Now on the server's monotonic clock, in seconds (as far as the last step tells). */
  get now() {
    const newest = this.#steps.at(-1);
    return newest.started + newest.duration + (performance.now() - this.#lastArrival) / 1000;
  }

  /** The newest `slots` rows, oldest first; null where nothing ran. */
  rows(seconds, slots) {
    if (this.#steps.length === 0) return [];
    if (seconds === null) return this.#steps.slice(-slots).map((step) => rowOf([step]));
    const width = seconds / slots;
    const end = Math.floor(this.now / width); // whole slices: bars move, they do not flicker
    const groups = Array.from({ length: slots }, () => []);
    const begin = end - slots;
    for (const step of this.#since(begin * width - LONGEST_STEP_S)) {
      // A step longer than a slice fills every slice it ran in.
      const to = Math.min(slots - 1, Math.floor((step.started + step.duration) / width) - begin);
      const from = Math.max(0, Math.floor(step.started / width) - begin);
      for (let i = from; i <= to; i += 1) groups[i].push(step);
    }
    return groups.map((steps) => (steps.length ? rowOf(steps) : null));
  }

  /** Tokens and steps a second over the last `seconds`. */
  rates(seconds) {
    if (this.#steps.length === 0) return { decode: 0, prompt: 0, steps: 0, busy: 0 };
    const steps = this.#since(this.now - seconds);
    const span = Math.min(seconds, Math.max(0.25, this.now - this.#steps[0].started));
    const sum = (name) => steps.reduce((total, step) => total + step[name], 0) / span;
    return {
      decode:
        sum("num_decode_tokens") + steps.reduce((total, step) => total + accepted(step), 0) / span,
      prompt: sum("num_prompt_tokens"),
      steps: steps.length / span,
      busy: Math.min(1, sum("duration")),
    };
  }

  /** Steps that started at or after `time`, by bisection. */
  #since(time) {
    let low = 0;
    let high = this.#steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#steps[middle].started < time) low = middle + 1;
      else high = middle;
    }
    return this.#steps.slice(low);
  }
}
