// The engine view's elements, built once from the tables in charts.js. No behaviour here.

import { CHARTS, TILES } from "./charts.js";
import { h, icon } from "./dom.js";
import { WINDOWS } from "./series.js";

function windowChoice(onchange) {
  const choices = WINDOWS.map(({ id, label }, i) =>
    h(
      "label",
      {},
      h("input", { type: "radio", name: "window", value: id, checked: i === 0, onchange }),
      h("span", {}, label),
    ),
  );
  return h(
    "fieldset",
    { class: "segments" },
    h("legend", { class: "hidden" }, "Time window"),
    ...choices,
  );
}

function head(on) {
  return h(
    "header",
    { class: "engine-head" },
    h("h1", {}, "Engine"),
    h("span", { class: "state", id: "engine-live", role: "status" }, "connecting"),
    h(
      "div",
      { class: "engine-tools" },
      windowChoice(on.window),
      h(
        "button",
        {
          type: "button",
          class: "button with-icon",
          id: "engine-pause",
          "aria-pressed": "false",
          onclick: on.pause,
        },
        icon("pause"),
        h("span", {}, "Pause"),
      ),
      h(
        "button",
        {
          type: "button",
          class: "button with-icon",
          id: "engine-load",
          "aria-pressed": "false",
          title: "Send short and long prompts together, to see them share the steps",
          onclick: on.load,
        },
        icon("bolt"),
        h("span", {}, "Sample load"),
      ),
    ),
  );
}

const tile = ([id, title, unit]) =>
  h(
    "div",
    { class: "tile" },
    h("dt", {}, title),
    h(
      "dd",
      {},
      h("span", { class: "figure", id: `tile-${id}` }, "\u2013"),
      h("span", { class: "unit" }, unit),
    ),
  );

function legend(chart) {
  if (chart.layers.length < 2) return null;
  const entries = chart.layers.map(({ key, name, kind }) =>
    h(
      "li",
      {},
      h("i", { class: `key key-${kind}`, "data-key": key }),
      name,
      chart.figures && h("b", { id: `figure-${key}` }, "\u2013"),
    ),
  );
  return h("ul", { class: "legend" }, ...entries);
}

function card(chart) {
  const isMain = chart.id === "batch";
  const role = isMain
    ? { role: "slider", tabindex: 0, "aria-valuemin": 0, "aria-valuemax": 0, "aria-valuenow": 0 }
    : { role: "img" };
  const canvas = h("canvas", { id: `chart-${chart.id}`, "aria-label": chart.title, ...role });
  const value =
    chart.layers.length === 1 && h("output", { class: "now", id: `now-${chart.id}` }, "\u2013");
  return h(
    "section",
    { class: `card card-${chart.id}` },
    h(
      "header",
      {},
      h("h2", {}, chart.title, chart.unit && h("small", {}, chart.unit)),
      value,
      legend(chart),
    ),
    canvas,
    isMain && h("p", { class: "readout", id: "readout" }, "\u00a0"),
  );
}

/** on: {window, pause, load} event handlers. */
export function engineLayout(on) {
  return [
    h(
      "div",
      { class: "engine-inner" },
      head(on),
      h("p", { class: "engine-message", id: "engine-message", role: "alert", hidden: true }),
      h("dl", { class: "tiles" }, ...TILES.map(tile)),
      h(
        "div",
        { class: "cards" },
        ...CHARTS.map(card),
        h(
          "section",
          { class: "card card-facts" },
          h("header", {}, h("h2", {}, "Facts")),
          h("dl", { class: "facts", id: "facts" }),
        ),
      ),
    ),
  ];
}
