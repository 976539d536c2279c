// The conversation: owns the list of messages, sends it, and decides what the user can do next.
// Every failure ends in a notice that says what happened and offers the way on.

import { Announcer } from "./announce.js";
import { streamAnswer } from "./answer.js";
import { Composer } from "./composer.js";
import { byId, say } from "./dom.js";
import { plural } from "./format.js";
import { askForKey } from "./key-dialog.js";
import { MessageItem } from "./message.js";
import { hideNotice, showNotice } from "./notice.js";
import { Scroller } from "./scroller.js";
import { loadConversation, saveConversation } from "./store.js";

// Without a Retry-After the page asks again after this long.
const RETRY_AFTER_S = 5;

export class Chat {
  #messages = loadConversation();
  #settings;
  #monitor;
  #controller = null;
  #scroller = new Scroller();
  #composer = new Composer({
    send: (text) => this.#send(text),
    stop: () => this.stop(),
    edit: () => this.#editLast(),
    cancelEdit: () => this.cancelEdit(),
  });

  constructor(settings, monitor) {
    this.#settings = settings;
    this.#monitor = monitor;
    byId("clear").addEventListener("click", () => this.#clear());
    addEventListener("pagehide", () => saveConversation(this.#messages));
    monitor.addEventListener("model", () => this.#showContext());
    this.#render();
    this.#composer.focusGently();
  }

  get isBusy() {
    return this.#controller !== null;
  }

  get isEditing() {
    return this.#composer.isEditing;
  }

  get messages() {
    return this.#messages;
  }

  focus() {
    this.#composer.focus();
  }

  start(text) {
    if (!this.isBusy) this.#send(text);
  }

  stop() {
    this.#controller?.abort();
  }

  cancelEdit() {
    this.#composer.isEditing = false;
    this.#composer.fill("");
    this.#composer.focus();
  }

  #send(text) {
    if (this.#composer.isEditing) this.#dropLastTurn();
    this.#composer.isEditing = false;
    this.#composer.fill("");
    this.#messages.push({ role: "user", content: text });
    this.#answer();
  }

  #regenerate() {
    if (this.#messages.at(-1)?.role === "assistant") this.#messages.pop();
    this.#answer();
  }

  #editLast() {
    const last = this.#messages.findLast((m) => m.role === "user");
    if (!last || this.isBusy) return;
    this.#composer.isEditing = true;
    this.#composer.fill(last.content);
    this.#composer.focus();
  }

  #dropLastTurn() {
    const at = this.#messages.findLastIndex((m) => m.role === "user");
    if (at >= 0) this.#messages.splice(at);
  }

  #clear() {
    if (this.#messages.length === 0) return;
    this.stop();
    const old = this.#messages;
    this.#messages = [];
    saveConversation([]);
    this.#render();
    const undo = () => {
      this.#messages = [...old, ...this.#messages];
      saveConversation(this.#messages);
      this.#render();
    };
    showNotice("Conversation cleared.", { tone: "wait", actions: [{ label: "Undo", run: undo }] });
    this.#composer.focusGently();
  }

  /** Ask for an answer to the conversation as it stands. */
  async #answer() {
    hideNotice();
    const problem = this.#settings.problem;
    if (problem) {
      this.#render();
      showNotice(problem.text, {
        actions: [{ label: "Show settings", run: () => this.#settings.reveal(problem.field) }],
      });
      return;
    }
    const body = this.#settings.requestBody(this.#messages);
    const message = { role: "assistant", content: "" };
    this.#messages.push(message);
    this.#controller = new AbortController();
    const item = this.#render();
    item.isStreaming = true;
    this.#composer.isBusy = true;
    const failure = await this.#stream(body, message, item);
    this.#controller = null;
    this.#composer.isBusy = false;
    if (failure && message.content === "") this.#messages.pop();
    saveConversation(this.#messages);
    this.#render();
    if (failure) this.#explain(failure);
  }

  /** Resolves to what went wrong, or null. Paints at most once a frame. */
  async #stream(body, message, item) {
    const { signal } = this.#controller;
    const announcer = new Announcer();
    let frame = 0;
    const paint = () => {
      frame = 0;
      item.update();
      this.#scroller.grew();
    };
    try {
      await streamAnswer(body, message, signal, (text) => {
        frame ||= requestAnimationFrame(paint);
        announcer.push(text);
      });
      announcer.finish(`Answer finished, ${plural(message.stats?.completion ?? 0, "token")}.`);
      return null;
    } catch (error) {
      if (error.name === "AbortError") {
        message.finish = "stopped";
        say("Stopped.");
        return message.content ? null : error;
      }
      if (!error.kind) throw error; // a bug of the page: let the console show it
      if (message.content) message.error = `${error.message} The answer is incomplete.`;
      return error;
    } finally {
      cancelAnimationFrame(frame);
      item.isStreaming = false;
    }
  }

  #explain(error) {
    const again = { label: "Try again", run: () => this.#regenerate() };
    const text = error.message;
    switch (error.kind) {
      case undefined: // stopped by the user before the first text
        return;
      case "auth":
        this.#askKey(again);
        return;
      case "busy":
        showNotice("The server is full. Asking again in {s}.", {
          tone: "wait",
          actions: [{ ...again, label: "Ask now" }],
          seconds: Math.max(1, error.retryAfter ?? RETRY_AFTER_S),
        });
        return;
      case "draining":
        showNotice("The server is shutting down and takes no new requests.", {
          tone: "wait",
          actions: [again],
        });
        return;
      case "invalid":
        showNotice(text, { actions: [{ label: "Edit message", run: () => this.#editLast() }] });
        return;
      default:
        showNotice(text, { actions: [again] });
    }
  }

  async #askKey(again) {
    if (await askForKey()) {
      this.#monitor.refresh();
      again.run();
    } else {
      showNotice("The server asks for an API key.", {
        actions: [{ label: "Enter key", run: () => this.#askKey(again) }],
      });
    }
  }

  /** Draw the whole thread; returns the last message's item. Only structure changes come here. */
  #render() {
    const last = this.#messages.length - 1;
    const lastUser = this.#messages.findLastIndex((m) => m.role === "user");
    const items = this.#messages.map(
      (message, i) =>
        new MessageItem(
          message,
          this.isBusy
            ? {}
            : {
                redo: i === last ? () => this.#regenerate() : null,
                edit: i === lastUser ? () => this.#editLast() : null,
              },
        ),
    );
    const hadFocus = byId("thread").contains(document.activeElement);
    byId("thread").replaceChildren(...items.map((item) => item.element));
    byId("hero").hidden = items.length > 0;
    byId("clear").classList.toggle("away", items.length === 0);
    this.#showContext();
    this.#scroller.toEnd();
    if (hadFocus) this.#composer.focusGently(); // the focused button is gone
    return items.at(-1);
  }

  #showContext() {
    const used = this.#messages.findLast((m) => m.stats?.total)?.stats.total;
    const limit = this.#monitor.maxModelLen;
    const show = used && limit;
    byId("context").textContent = show
      ? `${used.toLocaleString("en-US")} of ${plural(limit, "token")}`
      : "";
    byId("context").classList.toggle("near", Boolean(show && used > 0.85 * limit));
  }
}
