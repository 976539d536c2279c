// Small DOM helpers. Every element of the page is made here with textContent and attributes:
// nothing assigns innerHTML, so text from a model cannot become markup (the CSP enforces it).

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/**
 * Make an element: h("button", { class: "x", onclick: f, "aria-label": "y" }, "text", child).
 * `false`, `null` and `undefined` attributes and children are left out.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** An icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Exchange a button's icon without rebuilding it (keeps focus). */
export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

export function iconButton(name, label, onclick, extra = {}) {
  return h(
    "button",
    {
      type: "button",
      class: "icon-button small",
      "aria-label": label,
      title: label,
      onclick,
      ...extra,
    },
    icon(name),
  );
}

/** Write to the clipboard and show a check mark on the button for a moment. */
export async function copyFrom(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text); // plain http on another host: no clipboard API there
  }
  setIcon(button, "check");
  button.dataset.done = "";
  say("Copied");
  setTimeout(() => {
    setIcon(button, "copy");
    delete button.dataset.done;
  }, 1400);
}

function copyBySelection(text) {
  const area = h("textarea", { class: "hidden", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Tell a screen reader, politely. */
export function say(text) {
  const line = h("p", {}, text);
  const live = byId("live");
  live.append(line);
  while (live.childElementCount > 20) live.firstElementChild.remove();
}

export const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
