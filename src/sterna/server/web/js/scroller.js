// Keeps the newest text in view while the reader is at the end, and leaves a reader who scrolled
// up alone; the "Latest" button brings them back.

import { byId, reducedMotion } from "./dom.js";

// Closer to the end than this counts as being at the end (about two lines).
const NEAR_PX = 56;

export class Scroller {
  #box = byId("scroll");
  #jump = byId("jump");
  #follows = true;

  constructor() {
    this.#box.addEventListener("scroll", () => this.#look(), { passive: true });
    this.#jump.addEventListener("click", () => {
      this.#box.scrollTo({
        top: this.#box.scrollHeight,
        behavior: reducedMotion() ? "auto" : "smooth",
      });
    });
    new ResizeObserver(() => this.grew()).observe(this.#box);
  }

  #look() {
    const { scrollHeight, scrollTop, clientHeight } = this.#box;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_PX;
    this.#jump.hidden = this.#follows;
  }

  /** The thread got longer: follow it, unless the reader is elsewhere. */
  grew() {
    if (this.#follows) this.#box.scrollTop = this.#box.scrollHeight;
    else this.#look();
  }

  toEnd() {
    this.#follows = true;
    this.#jump.hidden = true;
    this.#box.scrollTop = this.#box.scrollHeight;
  }
}
