// Markdown to DOM, incrementally: a streamed answer re-renders only its unfinished last blocks,
// so earlier text keeps its nodes (and the reader's selection).

import { parseBlocks } from "./blocks.js";
import { copyFrom, h, iconButton } from "./dom.js";
import { inline } from "./inline.js";

// Lists in quotes in lists ... deeper than this stays plain text.
const MAX_DEPTH = 6;

const RENDER = {
  paragraph: (b) => h("p", {}, ...inline(b.text)),
  // The page has its own h1; an answer's headings start below it.
  heading: (b) => h(`h${Math.min(6, b.level + 2)}`, { class: `h-${b.level}` }, ...inline(b.text)),
  rule: () => h("hr"),
  code: codeBlock,
  quote: (b, depth) => h("blockquote", {}, ...nested(b.inner, depth)),
  list: listBlock,
  table: tableBlock,
};

function nested(source, depth) {
  if (depth >= MAX_DEPTH) return [source];
  return parseBlocks(source).map((block) => RENDER[block.kind](block, depth + 1));
}

function codeBlock(block) {
  const copy = iconButton("copy", "Copy code", () => copyFrom(copy, block.text));
  const head = h("figcaption", {}, h("span", {}, block.lang || "text"), copy);
  const pre = h("pre", { tabindex: 0, "aria-label": "Code" }, h("code", {}, block.text));
  return h("figure", { class: "code" }, head, pre);
}

function listBlock(block, depth) {
  const items = block.items.map((source) => {
    const task = source.match(/^\[([ xX])\] /);
    const children = nested(task ? source.slice(4) : source, depth);
    const tight = children.length && children[0].tagName === "P" && !source.includes("\n\n");
    const content = tight ? [...children[0].childNodes, ...children.slice(1)] : children;
    const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " " });
    return h("li", task ? { class: "task" } : {}, box, ...content);
  });
  const start = block.ordered && block.start !== 1 ? block.start : null;
  return h(block.ordered ? "ol" : "ul", { start }, ...items);
}

function tableBlock(block) {
  const cell = (tag, text, i) =>
    h(tag, { class: `to-${block.align[i] ?? "start"}` }, ...inline(text ?? ""));
  const row = (values) => h("tr", {}, ...block.head.map((_, i) => cell("td", values[i], i)));
  const head = h("tr", {}, ...block.head.map((text, i) => cell("th", text, i)));
  return h(
    "div",
    { class: "table", tabindex: 0, role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, head), h("tbody", {}, ...block.rows.map(row))),
  );
}

/** A rendered Markdown text that can grow. */
export class MarkdownView {
  #root;
  #raws = [];

  constructor(root) {
    this.#root = root;
  }

  update(source) {
    const blocks = parseBlocks(source);
    let same = 0;
    while (same < blocks.length && blocks[same].raw === this.#raws[same]) same += 1;
    while (this.#root.childElementCount > same) this.#root.lastElementChild.remove();
    for (const block of blocks.slice(same)) this.#root.append(RENDER[block.kind](block, 0));
    this.#raws = blocks.map((block) => block.raw);
  }
}
