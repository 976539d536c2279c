// Watches the server: which model it serves and how its engine is doing. One poller for the page;
// it rests while the tab is hidden. Events: "model", "state", "health".

import { call, getJson } from "./api.js";
import { askForKey } from "./key-dialog.js";

// Fast while the engine view is open, slow for the header's dot.
const FAST_MS = 1000;
const SLOW_MS = 8000;

export class Monitor extends EventTarget {
  model = null;
  maxModelLen = null;
  version = null;
  state = null;
  /** "wait" | "up" | "down" | "draining" | "auth" */
  health = "wait";
  #period = SLOW_MS;
  #timer = 0;
  #hasAsked = false;

  start() {
    document.addEventListener("visibilitychange", () => this.refresh());
    this.refresh();
  }

  set isFast(value) {
    this.#period = value ? FAST_MS : SLOW_MS;
    this.refresh();
  }

  /** Look now, and from now on at the set period. */
  refresh() {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#look();
  }

  async #look() {
    clearTimeout(this.#timer);
    try {
      if (this.model === null) await this.#loadModel();
      this.state = await getJson("/engine/state");
      this.maxModelLen ??= this.state.max_model_len ?? null;
      this.#setHealth("up");
      this.dispatchEvent(new Event("state"));
    } catch (error) {
      if (!error.kind) throw error;
      await this.#failed(error);
    } finally {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.refresh(), this.#period);
    }
  }

  async #loadModel() {
    const { data } = await getJson("/v1/models");
    this.model = data[0].id;
    this.maxModelLen = data[0].max_model_len ?? null;
    const version = await call("/version").then(
      (r) => r.json(),
      () => ({}),
    );
    this.version = version.version ?? null;
    this.dispatchEvent(new Event("model"));
  }

  /** A key is asked for once by itself; later only when the user does something that needs it. */
  async #failed(error) {
    const states = { auth: "auth", draining: "draining", offline: "down" };
    // Another answer than these still proves that the server is there.
    this.#setHealth(states[error.kind] ?? "up");
    if (error.kind === "offline") this.model = null; // it may come back with another model
    if (error.kind !== "auth" || this.#hasAsked) return;
    this.#hasAsked = true;
    if (await askForKey()) this.refresh();
  }

  #setHealth(health) {
    this.health = health;
    this.dispatchEvent(new Event("health"));
  }
}
