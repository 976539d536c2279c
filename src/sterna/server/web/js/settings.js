// The settings panel: fields from the table in fields.js, kept in localStorage, and turned into
// the request body. Also shows the same request as a curl command.

import { byId, copyFrom, h, icon, iconButton } from "./dom.js";
import { FIELDS, GROUPS, fieldOf, problemOf, requestBody } from "./fields.js";
import { loadKey, loadSettings, saveSettings } from "./store.js";

const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export class SettingsPanel {
  #panel = byId("settings");
  #toggle = byId("settings-toggle");
  #values = loadSettings();
  #monitor;
  #rows = new Map();
  /** Set by the app: the messages for the curl command. */
  conversation = () => [];

  constructor(monitor) {
    this.#monitor = monitor;
    this.#panel.append(this.#head(), ...GROUPS.map((group) => this.#group(group)), this.#foot());
    this.#toggle.addEventListener("click", () => {
      this.isOpen = this.#panel.hidden;
      if (this.isOpen) this.#panel.querySelector("textarea, input").focus();
    });
    this.#refresh();
  }

  get isOpen() {
    return !this.#panel.hidden;
  }

  set isOpen(value) {
    const hadFocus = this.#panel.contains(document.activeElement);
    this.#panel.hidden = !value;
    document.body.classList.toggle("with-settings", value);
    this.#toggle.setAttribute("aria-expanded", String(value));
    if (!value && hadFocus) this.#toggle.focus();
  }

  /** The first invalid field as {field, text}, or null. */
  get problem() {
    for (const field of FIELDS) {
      const text = problemOf(field, this.#values);
      if (text) return { field: field.name, text };
    }
    return null;
  }

  requestBody(messages) {
    return requestBody(this.#monitor.model, this.#values, messages);
  }

  reveal(name) {
    this.isOpen = true;
    this.#rows.get(name).input.focus();
  }

  #head() {
    const close = iconButton("close", "Close settings", () => {
      this.isOpen = false;
    });
    return h("header", { class: "settings-head" }, h("h2", {}, "Settings"), close);
  }

  #group([title, isGrid, names]) {
    const rows = names.map((name) => this.#row(fieldOf(name)));
    return h(
      "fieldset",
      {},
      h("legend", {}, title),
      h("div", { class: isGrid ? "small-fields" : "fields" }, ...rows),
    );
  }

  #row(field) {
    const id = `set-${field.name}`;
    const problem = h("p", { class: "problem", id: `${id}-problem`, hidden: true });
    const input = this.#input(field, id);
    const slider = field.slider && this.#slider(field);
    const hint = field.hint && h("p", { class: "hint", id: `${id}-hint` }, field.hint);
    const label = h("label", { for: id }, field.label);
    const row = slider
      ? h("div", { class: "field with-slider" }, label, input, slider, hint, problem)
      : h("div", { class: "field" }, label, input, hint, problem);
    this.#rows.set(field.name, { row, input, slider, problem });
    return row;
  }

  #input(field, id) {
    const shared = { id, "aria-describedby": `${id}-hint ${id}-problem`, spellcheck: "false" };
    const onInput = (event) => this.#set(field.name, event.target.value);
    if (field.kind === "choice") {
      const options = field.options.map(([value, text]) => h("option", { value }, text));
      return h("select", { ...shared, onchange: onInput }, ...options);
    }
    if (field.kind === "number") {
      const { min, max, step } = field;
      // step "any": the browser must not refuse 0.123; whole numbers are checked by the table.
      const bounds = { min, max, step: step === 1 ? 1 : "any", inputmode: "decimal" };
      return h("input", {
        ...shared,
        ...bounds,
        type: "number",
        placeholder: field.usual,
        oninput: onInput,
      });
    }
    const look = {
      rows: field.rows,
      placeholder: field.placeholder,
      class: field.code ? "code-input" : null,
    };
    return h("textarea", { ...shared, ...look, oninput: onInput });
  }

  #slider({ name, label, min, max, step }) {
    return h("input", {
      type: "range",
      min,
      max,
      step,
      "aria-label": `${label} slider`,
      oninput: (event) => this.#set(name, event.target.value),
    });
  }

  #foot() {
    const reset = h(
      "button",
      { type: "button", class: "button", onclick: () => this.#reset() },
      "Reset all",
    );
    const curl = h(
      "button",
      { type: "button", class: "button with-icon", onclick: () => copyFrom(curl, this.#curl()) },
      icon("copy"),
      "Copy as curl",
    );
    return h("footer", { class: "settings-foot" }, reset, curl);
  }

  #set(name, value) {
    this.#values[name] = value;
    saveSettings(this.#values);
    this.#refresh();
  }

  #reset() {
    this.#values = {};
    saveSettings(this.#values);
    this.#refresh();
  }

  #refresh() {
    for (const field of FIELDS) this.#show(field);
    this.#rows.get("schema").row.hidden = this.#values.format !== "json_schema";
    const changed = FIELDS.filter(
      ({ name }) => name !== "schema" && (this.#values[name] ?? "") !== "",
    ).length;
    byId("settings-count").hidden = changed === 0;
    byId("settings-count").textContent = String(changed);
    this.#toggle.setAttribute("aria-label", changed ? `Settings, ${changed} changed` : "Settings");
  }

  #show(field) {
    const { row, input, slider, problem } = this.#rows.get(field.name);
    const value = this.#values[field.name] ?? "";
    if (input.value !== value && document.activeElement !== input) input.value = value;
    if (slider) {
      slider.value = value === "" ? field.usual : value;
      slider.style.setProperty(
        "--fill",
        `${(100 * (slider.value - field.min)) / (field.max - field.min)}%`,
      );
    }
    row.classList.toggle("changed", value !== "");
    const text = problemOf(field, this.#values);
    problem.hidden = !text;
    problem.textContent = text ?? "";
    input.setAttribute("aria-invalid", String(Boolean(text)));
  }

  #curl() {
    const messages = this.conversation();
    const asked = messages.length ? messages : [{ role: "user", content: "Hello" }];
    const until = asked.at(-1).role === "assistant" ? asked.slice(0, -1) : asked;
    const body = this.problem
      ? requestBody(this.#monitor.model, {}, until)
      : this.requestBody(until);
    const url = `${location.origin}/v1/chat/completions`;
    const key = loadKey() ? ' -H "Authorization: Bearer $API_KEY"' : "";
    return `curl -N ${url} -H 'Content-Type: application/json'${key} -d ${shellQuote(JSON.stringify(body))}`;
  }
}
