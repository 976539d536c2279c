// The one line above the message box that says what went wrong and what can be done about it.
// With a countdown it repeats the first action by itself when the time is up.

import { byId, h, iconButton } from "./dom.js";

let timer = 0;

export function hideNotice() {
  clearInterval(timer);
  byId("notice").hidden = true;
  byId("notice").replaceChildren();
}

/**
 * @param {string} text what happened
 * @param {{tone?: "bad"|"wait", actions?: {label: string, run: () => void}[], seconds?: number}} how
 */
export function showNotice(text, { tone = "bad", actions = [], seconds = 0 } = {}) {
  hideNotice();
  const line = h("span", { class: "notice-text" }, text);
  const buttons = actions.map(({ label, run }) =>
    h(
      "button",
      {
        type: "button",
        class: "button small",
        onclick: () => {
          hideNotice();
          run();
        },
      },
      label,
    ),
  );
  const box = byId("notice");
  box.dataset.tone = tone;
  box.replaceChildren(line, ...buttons, iconButton("close", "Dismiss", hideNotice));
  box.hidden = false;
  if (seconds > 0) countDown(line, text, seconds, actions[0].run);
}

/** The text's "{s}" is the number of seconds left; aria-hidden so that it is not read each second. */
function countDown(line, text, seconds, run) {
  const due = performance.now() + seconds * 1000;
  const [before, after] = text.split("{s}");
  const number = h("span", { class: "countdown", "aria-hidden": "true" });
  line.replaceChildren(before, number, after);
  const tick = () => {
    const left = Math.ceil((due - performance.now()) / 1000);
    number.textContent = `${Math.max(0, left)} s`;
    if (left > 0) return;
    hideNotice();
    run();
  };
  tick();
  timer = setInterval(tick, 250);
}
