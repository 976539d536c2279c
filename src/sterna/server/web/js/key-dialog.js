// Asks for the API key when the server answers 401. One dialog at a time, whoever asks.

import { byId } from "./dom.js";
import { loadKey, saveKey } from "./store.js";

let open = null;

/** Resolves to true when a key was entered, false when the user declined. */
export function askForKey() {
  open ??= new Promise((resolve) => ask(resolve)).finally(() => {
    open = null;
  });
  return open;
}

function ask(resolve) {
  const dialog = byId("key-dialog");
  byId("key-text").textContent = loadKey()
    ? "The key given before was refused. Keys are kept in this browser tab only."
    : "It is kept in this browser tab only.";
  byId("key-input").value = "";
  let given = false;
  byId("key-form").onsubmit = () => {
    given = true;
    saveKey(byId("key-input").value.trim());
  };
  byId("key-cancel").onclick = () => dialog.close();
  dialog.onclose = () => resolve(given);
  dialog.showModal();
}

/** A key in the address (?api_key=) has done its work as a cookie: take it out of sight. */
export function hideKeyInAddress() {
  const url = new URL(location.href);
  const key = url.searchParams.get("api_key");
  if (key === null) return;
  if (key) saveKey(key);
  url.searchParams.delete("api_key");
  history.replaceState(null, "", url);
}
