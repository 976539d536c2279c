// Keeps the stream of engine steps (GET /engine/steps) open while it is wanted, reconnecting with
// growing pauses. It is closed while nobody looks: a browser has six connections to a server.

import { call } from "./api.js";
import { readEvents } from "./sse.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 8000;

export class StepFeed {
  #onStep;
  #onLive;
  #controller = null;
  #newest = -1;

  /** onStep(step) for each step; onLive(isLive) when the stream opens or breaks. */
  constructor(onStep, onLive) {
    this.#onStep = onStep;
    this.#onLive = onLive;
  }

  get isOpen() {
    return this.#controller !== null;
  }

  set isOpen(value) {
    if (value === this.isOpen) return;
    this.#controller?.abort();
    this.#controller = value ? new AbortController() : null;
    if (value) this.#run(this.#controller.signal);
  }

  async #run(signal) {
    let pause = FIRST_PAUSE_MS;
    while (!signal.aborted) {
      try {
        const response = await call(`/engine/steps?since=${this.#newest}`, { signal });
        pause = FIRST_PAUSE_MS;
        this.#onLive(true);
        for await (const { event, data } of readEvents(response.body)) {
          if (event !== "step") continue;
          const step = JSON.parse(data);
          this.#newest = step.step;
          this.#onStep(step);
        }
      } catch {
        // Refused, unreachable or broken off: the pause below is the answer to each of them.
      }
      if (signal.aborted) return;
      this.#newest = -1; // it may be another server now, which counts from 0
      this.#onLive(false);
      await new Promise((resolve) => setTimeout(resolve, pause));
      pause = Math.min(LONGEST_PAUSE_MS, 2 * pause);
    }
  }
}
