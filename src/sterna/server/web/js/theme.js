// The theme button: system, light, dark, in that order. "system" follows prefers-color-scheme.

import { byId } from "./dom.js";
import { loadTheme, saveTheme } from "./store.js";

const ORDER = ["system", "light", "dark"];

function show(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = byId("theme");
  button.title = `Theme: ${theme}`;
  button.setAttribute("aria-label", `Theme: ${theme}`);
  document.dispatchEvent(new Event("themechange"));
}

export function initTheme() {
  let theme = ORDER.includes(loadTheme()) ? loadTheme() : "system";
  show(theme);
  byId("theme").addEventListener("click", () => {
    theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
    saveTheme(theme);
    show(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(theme));
}
