// Inline Markdown to DOM nodes: code, bold, italic, strike, links, bare URLs, escapes.
// Images are not loaded (nothing leaves the origin): they become links.

import { h } from "./dom.js";

// One alternation, tried left to right at each position. Order matters: code binds tightest.
const INLINE = new RegExp(
  [
    /(?<ticks>`+)(?<code>[^]+?)(?<!`)\k<ticks>(?!`)/,
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /\*\*\*(?<both>[^\s*](?:[^*]*[^\s*])?)\*\*\*/,
    /\*\*(?<bold>\S(?:[^]*?\S)?)\*\*(?!\*)/,
    /(?<!\w)__(?<bold2>\S(?:[^]*?\S)?)__(?!\w)/,
    /~~(?<strike>\S(?:[^]*?\S)?)~~/,
    /\*(?<em>[^\s*](?:[^*]*[^\s*])?)\*/,
    /(?<!\w)_(?<em2>[^\s_](?:[^_]*[^\s_])?)_(?!\w)/,
    /!?\[(?<text>[^\]\n]*)\]\(\s*(?<href>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+"[^"\n]*")?\s*\)/,
    /(?<url>https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_])/,
  ]
    .map((pattern) => pattern.source)
    .join("|"),
  "g",
);

// Deeper nesting than people write is left as text: a model cannot exhaust the stack.
const MAX_DEPTH = 8;

/** Only these schemes become links; "javascript:" and friends stay text. */
export function safeHref(href) {
  try {
    const url = new URL(href, location.href);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(href, ...children) {
  const safe = safeHref(href);
  if (!safe) return h("span", {}, ...children);
  return h("a", { href: safe, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

function node({ groups: g, 0: raw }, depth) {
  const inner = (text) => inline(text, depth + 1);
  if (g.code !== undefined) return h("code", {}, g.code.replace(/^ (.*\S.*) $/s, "$1"));
  if (g.escaped !== undefined) return g.escaped;
  if (g.both) return h("em", {}, h("strong", {}, ...inner(g.both)));
  if (g.bold ?? g.bold2) return h("strong", {}, ...inner(g.bold ?? g.bold2));
  if (g.strike) return h("del", {}, ...inner(g.strike));
  if (g.em ?? g.em2) return h("em", {}, ...inner(g.em ?? g.em2));
  if (g.href !== undefined) return link(g.href, ...(g.text ? inner(g.text) : [g.href]));
  return g.url ? link(g.url, g.url) : raw;
}

/** Text to a list of strings and elements. */
export function inline(text, depth = 0) {
  if (depth > MAX_DEPTH) return [text];
  const out = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > from) out.push(text.slice(from, match.index));
    out.push(node(match, depth));
    from = match.index + match[0].length;
  }
  if (from < text.length) out.push(text.slice(from));
  return out;
}
