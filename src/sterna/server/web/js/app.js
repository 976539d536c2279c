// Where the page starts: makes the parts, connects them, and owns what spans them - the two views
// (in the address's hash), the header's model line and the keyboard.

import { Chat } from "./chat.js";
import { byId, h } from "./dom.js";
import { EngineView } from "./engine.js";
import { hideKeyInAddress } from "./key-dialog.js";
import { Monitor } from "./monitor.js";
import { SettingsPanel } from "./settings.js";
import { initTheme } from "./theme.js";

// Small enough for a small model to answer well; each shows another kind of answer.
const IDEAS = [
  "Give me three facts about the ocean as a list.",
  "Write a Python function that reverses a string.",
  "Why is the sky blue? Answer in one sentence.",
  "Tell a very short story about an arctic tern.",
];

const HEALTH = {
  wait: "connecting",
  down: "not reachable",
  draining: "shutting down",
  auth: "needs an API key",
};

hideKeyInAddress();
initTheme();
const monitor = new Monitor();
const settings = new SettingsPanel(monitor);
const chat = new Chat(settings, monitor);
const engine = new EngineView(monitor);
settings.conversation = () => chat.messages;

function showView() {
  const view = location.hash === "#engine" ? "engine" : "chat";
  for (const name of ["chat", "engine"]) byId(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.view = view;
  document.title = view === "engine" ? "Engine - Sterna" : "Sterna";
  if (view === "engine") settings.isOpen = false;
  engine.isShown = view === "engine";
  monitor.isFast = view === "engine";
}

function showModel() {
  const line = byId("model");
  const name = monitor.health === "up" ? monitor.model : HEALTH[monitor.health];
  line.querySelector(".dot").dataset.state = monitor.health;
  const text = line.querySelector(".model-name");
  if (text.textContent !== name) text.textContent = name;
  line.title = name;
}

function onKey(event) {
  const isTyping = event.target.closest?.("input, textarea, select, [contenteditable]");
  if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    location.hash = "#chat";
    showView();
    chat.focus();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (chat.isBusy) chat.stop();
    else if (chat.isEditing) chat.cancelEdit();
    else settings.isOpen = false;
  }
}

byId("ideas").append(
  ...IDEAS.map((text) =>
    h("li", {}, h("button", { type: "button", onclick: () => chat.start(text) }, text)),
  ),
);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  location.hash = "#chat";
  showView();
  chat.focus();
});
addEventListener("hashchange", showView);
addEventListener("keydown", onKey);
monitor.addEventListener("health", showModel);
monitor.addEventListener("model", showModel);
showView();
monitor.start();
document.documentElement.dataset.ready = "";
