// The message box: grows with its text, Enter sends, Shift+Enter breaks the line, and one button
// that is Send or Stop.

import { byId, setIcon } from "./dom.js";

// On touch keyboards Enter has to break the line: there is no Shift+Enter.
const hasKeyboard = () => !matchMedia("(pointer: coarse)").matches;

export class Composer {
  #input = byId("prompt");
  #send = byId("send");
  #isBusy = false;
  #isEditing = false;

  /** @param {{send: (text: string) => void, stop: () => void, edit: () => void, cancelEdit: () => void}} on */
  constructor(on) {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#isBusy) on.stop();
      else this.#submit(on.send);
    });
    this.#input.addEventListener("input", () => this.#fit());
    this.#input.addEventListener("keydown", (event) => {
      if (event.isComposing) return; // an input method is choosing characters
      if (event.key === "Enter" && !event.shiftKey && hasKeyboard()) {
        event.preventDefault();
        if (!this.#isBusy) this.#submit(on.send);
      } else if (event.key === "ArrowUp" && this.#input.value === "" && !this.#isBusy) {
        event.preventDefault();
        on.edit();
      }
    });
    byId("edit-cancel").addEventListener("click", on.cancelEdit);
    this.#look();
  }

  #submit(send) {
    const text = this.#input.value.trim();
    if (text) send(text);
  }

  set isBusy(value) {
    this.#isBusy = value;
    this.#look();
  }

  get isEditing() {
    return this.#isEditing;
  }

  set isEditing(value) {
    this.#isEditing = value;
    byId("editing").hidden = !value;
  }

  fill(text) {
    this.#input.value = text;
    this.#fit();
  }

  focus() {
    this.#input.focus();
  }

  /** Focus only where that does not pull up a touch keyboard. */
  focusGently() {
    if (hasKeyboard()) this.#input.focus({ preventScroll: true });
  }

  #fit() {
    this.#input.style.height = "auto";
    this.#input.style.height = `${this.#input.scrollHeight}px`;
    this.#look();
  }

  #look() {
    const label = this.#isBusy ? "Stop" : "Send";
    this.#send.setAttribute("aria-label", label);
    this.#send.title = label;
    this.#send.classList.toggle("stop", this.#isBusy);
    this.#send.disabled = !this.#isBusy && this.#input.value.trim() === "";
    setIcon(this.#send, this.#isBusy ? "stop" : "send");
  }
}
