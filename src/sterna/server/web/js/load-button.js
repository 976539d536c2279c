// The "Sample load" button of the engine view: starts the load, stops it, tells how it failed.

import { ApiError } from "./api.js";
import { byId } from "./dom.js";
import { sampleLoad } from "./sample-load.js";

export class LoadButton {
  #monitor;
  #controller = null;

  constructor(monitor) {
    this.#monitor = monitor;
  }

  async toggle() {
    if (this.#controller) {
      this.#controller.abort();
      return;
    }
    this.#controller = new AbortController();
    this.#show("Stop load");
    this.#tell("");
    const { model, maxModelLen } = this.#monitor;
    try {
      await sampleLoad(model, maxModelLen, this.#controller.signal);
    } catch (error) {
      if (error instanceof ApiError) this.#tell(`The sample load ended: ${error.message}`);
      else if (error.name !== "AbortError") throw error;
    } finally {
      this.#controller.abort(); // one part failed: the others end too
      this.#controller = null;
      this.#show("Sample load");
    }
  }

  #show(label) {
    byId("engine-load").setAttribute("aria-pressed", String(this.#controller !== null));
    byId("engine-load").querySelector("span").textContent = label;
  }

  #tell(text) {
    byId("engine-message").textContent = text;
    byId("engine-message").hidden = text === "";
  }
}
