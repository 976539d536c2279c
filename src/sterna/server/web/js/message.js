// One message of the thread as a list item: its text, its actions, and for an answer its figures.

import { copyFrom, h, iconButton } from "./dom.js";
import { count, ms, plural, rate } from "./format.js";
import { MarkdownView } from "./markdown.js";

const ENDINGS = {
  length: "Stopped at the token limit.",
  stopped: "Stopped by you.",
  abort: "Stopped by the server.",
};

/** What one answer cost, as short phrases. */
export function statsText({ ttft, tokensPerSecond, completion, prompt, cached }) {
  const parts = [];
  if (ttft != null) parts.push(`first token ${ms(ttft)}`);
  if (tokensPerSecond != null) parts.push(`${rate(tokensPerSecond)} tok/s`);
  if (completion != null) parts.push(plural(completion, "token"));
  if (prompt != null)
    parts.push(`prompt ${count(prompt)}${cached ? ` (${count(cached)} cached)` : ""}`);
  return parts;
}

export class MessageItem {
  #message;
  #body = h("div", { class: "body" });
  #stats = h("p", { class: "stats" });
  #ending = h("p", { class: "ending", hidden: true });
  #markdown = null;

  /** `on` holds the callbacks for the actions this message offers: {redo, edit}. */
  constructor(message, on) {
    this.#message = message;
    const isUser = message.role === "user";
    if (!isUser) this.#markdown = new MarkdownView(this.#body);
    const copy = iconButton("copy", "Copy message", () => copyFrom(copy, message.content));
    const actions = h(
      "div",
      { class: "actions" },
      copy,
      on.edit && iconButton("edit", "Edit message", on.edit),
      on.redo && iconButton("redo", isUser ? "Answer this" : "Regenerate", on.redo),
      !isUser && this.#stats,
    );
    const who = h("h2", { class: "hidden" }, isUser ? "You" : "Answer");
    this.element = h(
      "li",
      { class: `message ${message.role}` },
      who,
      this.#body,
      this.#ending,
      actions,
    );
    this.update();
  }

  /** Show the message as it is now. */
  update() {
    const { content, finish, error, stats } = this.#message;
    if (this.#markdown) this.#markdown.update(content);
    else this.#body.textContent = content;
    const ending = error ?? ENDINGS[finish] ?? (finish && !content ? "The answer is empty." : null);
    this.#ending.hidden = !ending;
    this.#ending.textContent = ending ?? "";
    this.#ending.classList.toggle("bad", Boolean(error));
    if (stats) this.#stats.replaceChildren(...statsText(stats).map((part) => h("span", {}, part)));
  }

  set isStreaming(value) {
    this.element.classList.toggle("streaming", value);
    this.#body.setAttribute("aria-busy", String(value));
  }
}
