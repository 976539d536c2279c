// What the browser keeps: conversation, settings and theme in localStorage, the API key in
// sessionStorage (gone with the tab). Blocked or full storage degrades to memory, silently:
// the page works, it just forgets.

const memory = new Map();

function read(storage, key) {
  try {
    return window[storage].getItem(key) ?? memory.get(key) ?? null;
  } catch {
    return memory.get(key) ?? null;
  }
}

function write(storage, key, value) {
  memory.set(key, value);
  try {
    if (value === null) window[storage].removeItem(key);
    else window[storage].setItem(key, value);
  } catch {
    // Quota or privacy mode; the copy in memory serves this tab.
  }
}

function readJson(key, fallback) {
  try {
    return JSON.parse(read("localStorage", key)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Messages: {role, content, stats?, finish?, error?}; anything malformed is dropped. */
export function loadConversation() {
  const stored = readJson("sterna.conversation", []);
  if (!Array.isArray(stored)) return [];
  return stored.filter(
    (m) => m && (m.role === "user" || m.role === "assistant") && typeof m.content === "string",
  );
}

export const saveConversation = (messages) =>
  write("localStorage", "sterna.conversation", JSON.stringify(messages));

export function loadSettings() {
  const stored = readJson("sterna.settings", {});
  return stored && typeof stored === "object" && !Array.isArray(stored) ? stored : {};
}

export const saveSettings = (values) =>
  write("localStorage", "sterna.settings", JSON.stringify(values));

export const loadTheme = () => read("localStorage", "sterna.theme");
export const saveTheme = (theme) => write("localStorage", "sterna.theme", theme);
export const loadKey = () => read("sessionStorage", "sterna.key");
export const saveKey = (key) => write("sessionStorage", "sterna.key", key);
