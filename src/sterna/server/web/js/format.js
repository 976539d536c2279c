// Numbers and times as people read them. Everything returns a string; missing values are a dash.

const NONE = "\u2013";
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en-US", {
  minimumFractionDigits: 1,
  maximumFractionDigits: 1,
});

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (isNumber(value) ? whole.format(value) : NONE);

/** A rate: one decimal below 100, none above. */
export function rate(value) {
  if (!isNumber(value)) return NONE;
  return value > 0 && value < 99.95 ? tenth.format(value) : whole.format(value);
}

/** Milliseconds, switching to seconds from one second on. */
export function ms(value) {
  if (!isNumber(value)) return NONE;
  if (value === 0) return "0 ms";
  if (value >= 1000) return `${(value / 1000).toFixed(value < 10_000 ? 2 : 1)} s`;
  return `${value < 9.95 ? value.toFixed(1) : whole.format(value)} ms`;
}

export const percent = (share) =>
  isNumber(share)
    ? `${share > 0 && share < 0.0995 ? (100 * share).toFixed(1) : whole.format(100 * share)} %`
    : NONE;

/** 1,234,567 as 1.2 M, for axes and totals. */
export function short(value) {
  if (!isNumber(value)) return NONE;
  if (value >= 1e6) return `${tenth.format(value / 1e6)} M`;
  if (value >= 1e4) return `${whole.format(value / 1e3)} k`;
  return Number.isInteger(value) ? whole.format(value) : tenth.format(value);
}

/** A server's message as a sentence: "prompt too long" as "Prompt too long." */
export const sentence = (text) =>
  text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

const LABELS = { max_model_len: "Longest sequence" };

/** "num_kv_blocks" as "KV blocks", for values whose names the server chooses. */
export function label(name) {
  if (name in LABELS) return LABELS[name];
  const text = name
    .replace(/^num_/, "")
    .replaceAll("_", " ")
    .replace(/\bkv\b/gi, "KV")
    .replace(/\b(ttft|itl|cpu|gpu)\b/gi, (word) => word.toUpperCase());
  return text.charAt(0).toUpperCase() + text.slice(1);
}
