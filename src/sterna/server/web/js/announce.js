// Speaks a streamed answer to screen readers in whole sentences, at most one utterance a second:
// token by token would be noise.

import { say } from "./dom.js";

const PERIOD_MS = 1000;

export class Announcer {
  #pending = "";
  #spokenAt = 0;

  push(text) {
    this.#pending += text;
    const now = performance.now();
    if (now - this.#spokenAt < PERIOD_MS) return;
    const end = [...this.#pending.matchAll(/[.!?:]\s|\n/g)].at(-1);
    if (!end) return;
    const length = end.index + end[0].length;
    say(this.#pending.slice(0, length).trim());
    this.#pending = this.#pending.slice(length);
    this.#spokenAt = now;
  }

  finish(remark) {
    say(`${this.#pending.trim()} ${remark}`.trim());
    this.#pending = "";
  }
}
