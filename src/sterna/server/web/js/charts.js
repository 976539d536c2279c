// The charts of the engine view as a table: what each shows and how. Colors are CSS variables, so
// that both themes come from css/tokens.css.

import { percent, short } from "./format.js";

/** Milliseconds for an axis; the unit is in the title until seconds say their own. */
const axisMs = (value) => (value >= 1000 ? `${value / 1000} s` : short(value));

const percentiles = (key) => [
  { key: `${key}_p50`, color: "--p50", kind: "area", name: "p50" },
  { key: `${key}_p90`, color: "--p90", kind: "line", name: "p90" },
  { key: `${key}_p99`, color: "--p99", kind: "line", name: "p99" },
];

/** source: "steps" (rows of series.js) or "polls" (rows of GET /engine/state). */
export const CHARTS = [
  {
    id: "batch",
    title: "Batch composition",
    unit: "tokens in a step",
    source: "steps",
    slot: 5,
    least: 8,
    format: short,
    layers: [
      { key: "decode", color: "--decode", kind: "bar", name: "decode" },
      { key: "prompt", color: "--prefill", kind: "bar", name: "prompt" },
      { key: "budget", color: "--limit", kind: "limit", name: "token budget" },
    ],
  },
  {
    id: "duration",
    title: "Step time",
    unit: "ms",
    source: "steps",
    slot: 3,
    least: 2,
    format: axisMs,
    layers: [{ key: "duration", color: "--time", kind: "bar", name: "step" }],
  },
  {
    id: "queue",
    title: "Requests",
    unit: "",
    source: "steps",
    slot: 3,
    least: 4,
    format: short,
    layers: [
      { key: "running", color: "--decode", kind: "area", name: "running" },
      { key: "waiting", color: "--prefill", kind: "line", name: "waiting" },
    ],
  },
  {
    id: "kv",
    title: "KV cache",
    unit: "blocks held",
    source: "steps",
    slot: 3,
    least: 0.1,
    format: percent,
    layers: [{ key: "kv", color: "--kv", kind: "area", name: "in use" }],
  },
  {
    id: "ttft",
    title: "Time to first token",
    unit: "ms",
    source: "polls",
    slot: 4,
    least: 10,
    format: axisMs,
    layers: percentiles("ttft"),
    figures: "ttft_ms",
  },
  {
    id: "itl",
    title: "Between tokens",
    unit: "ms",
    source: "polls",
    slot: 4,
    least: 5,
    format: axisMs,
    layers: percentiles("itl"),
    figures: "itl_ms",
  },
];

export const TILES = [
  ["decode-rate", "Decode", "tok/s"],
  ["prompt-rate", "Prompts", "tok/s"],
  ["running", "Running", "requests"],
  ["waiting", "Waiting", "requests"],
  ["kv-use", "KV cache", "in use"],
  ["busy", "Engine", "busy"],
];
