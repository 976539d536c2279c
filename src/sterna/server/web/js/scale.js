// A chart's vertical scale: round numbers, grows at once, shrinks only after a while, so that the
// picture does not breathe with every step.

const SHRINK_AFTER_MS = 2500;

/** The next round number whose half, the middle grid line, is round too. */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return (
    [1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.999) * power
  );
}

export class Scale {
  top;
  #lowSince = null;
  #least;

  constructor(least) {
    this.#least = least;
    this.top = least;
  }

  /** Fit the largest value in view; returns the top of the axis. */
  fit(largest, now = performance.now()) {
    const wanted = Math.max(this.#least, roundUp(Math.max(largest, 1e-9)));
    if (wanted >= this.top) {
      this.top = wanted;
      this.#lowSince = null;
    } else {
      this.#lowSince ??= now;
      if (now - this.#lowSince > SHRINK_AFTER_MS) {
        this.top = wanted;
        this.#lowSince = null;
      }
    }
    return this.top;
  }
}
