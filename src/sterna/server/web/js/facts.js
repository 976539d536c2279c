// The engine's fixed facts and running totals (GET /engine/state) as a list of terms and values.

import { h } from "./dom.js";
import { count, label } from "./format.js";

// Shown by the charts and tiles already.
const ELSEWHERE = new Set([
  "running",
  "waiting",
  "kv_usage",
  "ttft_ms",
  "itl_ms",
  "totals",
  "num_kv_blocks",
  "block_size",
]);

function textOf(value) {
  if (value === null || value === undefined || value === "") return "\u2013";
  if (typeof value === "number")
    return Number.isInteger(value) ? count(value) : String(Number(value.toPrecision(4)));
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value)) return value.map(textOf).join(", ");
  if (typeof value === "object")
    return Object.entries(value)
      .map(([k, v]) => `${label(k)} ${textOf(v)}`)
      .join(", ");
  return String(value);
}

/** [term, value] pairs in reading order: what runs, how it is set, what it did. */
export function factsOf(state, version) {
  const facts = Object.entries(state)
    .filter(([name]) => !ELSEWHERE.has(name))
    .map(([name, value]) => [label(name), textOf(value)]);
  if (state.num_kv_blocks) {
    const tokens = state.num_kv_blocks * state.block_size;
    facts.push([
      "KV cache",
      `${count(state.num_kv_blocks)} blocks of ${count(state.block_size)}: ${count(tokens)} tokens`,
    ]);
  }
  for (const [name, value] of Object.entries(state.totals ?? {}))
    facts.push([label(name), textOf(value)]);
  if (version) facts.push(["Version", version]);
  return facts;
}

/** Update in place: rows are only rebuilt when the set of terms changes. */
export function showFacts(list, facts) {
  const rows = [...list.children];
  if (
    rows.length === facts.length &&
    rows.every((row, i) => row.firstChild.textContent === facts[i][0])
  ) {
    rows.forEach((row, i) => {
      if (row.lastChild.textContent !== facts[i][1]) row.lastChild.textContent = facts[i][1];
    });
    return;
  }
  list.replaceChildren(
    ...facts.map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", {}, value))),
  );
}
