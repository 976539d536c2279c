// Block Markdown to a list of plain objects: {kind, raw, ...}. A small, forgiving subset of
// CommonMark plus tables; made for text that is still being written, so an unclosed fence is code.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+|$)/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

const isBlank = (line) => line.trim() === "";
const isTable = (lines, i) =>
  lines[i].includes("|") &&
  i + 1 < lines.length &&
  lines[i + 1].includes("|") &&
  TABLE_RULE.test(lines[i + 1]);

function startsBlock(lines, i) {
  const line = lines[i];
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    QUOTE.test(line) ||
    ITEM.test(line) ||
    isTable(lines, i)
  );
}

/** First index from `i` on where `stop(index)` holds, else the end. */
function scan(lines, i, stop) {
  while (i < lines.length && !stop(i)) i += 1;
  return i;
}

function fence(lines, i) {
  const [, mark, lang] = lines[i].match(FENCE);
  const close = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  const end = scan(lines, i + 1, (k) => close.test(lines[k]));
  return [{ kind: "code", lang, text: lines.slice(i + 1, end).join("\n") }, end + 1];
}

function quote(lines, i) {
  const end = scan(lines, i, (k) => !QUOTE.test(lines[k]));
  const inner = lines.slice(i, end).map((line) => line.replace(QUOTE, ""));
  return [{ kind: "quote", inner: inner.join("\n") }, end];
}

/** Items start at the first marker's indent; deeper lines belong to the item above. */
function list(lines, i) {
  const [, { length: indent }, marker] = lines[i].match(ITEM);
  const ordered = /\d/.test(marker);
  const items = [];
  let end = i;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const match = line.match(ITEM);
    const depth = line.match(/^\s*/)[0].length;
    if (match && depth <= indent + 1 && !RULE.test(line)) {
      if (/\d/.test(match[2]) !== ordered) break;
      items.push({ width: match[0].length, lines: [line.slice(match[0].length)] });
    } else if (isBlank(line)) {
      const next = scan(lines, end, (k) => !isBlank(lines[k]));
      const goes = next < lines.length && (/^\s{2,}/.test(lines[next]) || ITEM.test(lines[next]));
      if (!goes) break;
      items.at(-1).lines.push("");
    } else if (depth > indent || !(isBlank(lines[end - 1]) || startsBlock(lines, end))) {
      items.at(-1).lines.push(line.slice(Math.min(depth, items.at(-1).width)));
    } else break;
  }
  const start = ordered ? Number.parseInt(marker, 10) : 1;
  return [
    { kind: "list", ordered, start, items: items.map((item) => item.lines.join("\n").trimEnd()) },
    end,
  ];
}

const cells = (line) =>
  line
    .trim()
    .replace(/^\||(?<!\\)\|$/g, "")
    .split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll("\\|", "|"));

function table(lines, i) {
  const align = cells(lines[i + 1]).map((c) =>
    c.endsWith(":") ? (c.startsWith(":") ? "center" : "end") : "start",
  );
  const end = scan(lines, i + 2, (k) => isBlank(lines[k]) || !lines[k].includes("|"));
  return [
    { kind: "table", align, head: cells(lines[i]), rows: lines.slice(i + 2, end).map(cells) },
    end,
  ];
}

function paragraph(lines, i) {
  const end = scan(lines, i + 1, (k) => isBlank(lines[k]) || startsBlock(lines, k));
  return [{ kind: "paragraph", text: lines.slice(i, end).join("\n").trim() }, end];
}

function block(lines, i) {
  const line = lines[i];
  if (FENCE.test(line)) return fence(lines, i);
  const heading = line.match(HEADING);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, i + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, i + 1];
  if (QUOTE.test(line)) return quote(lines, i);
  if (ITEM.test(line)) return list(lines, i);
  return isTable(lines, i) ? table(lines, i) : paragraph(lines, i);
}

/** Markdown source to blocks; `raw` is the block's own source, equal raw means equal block. */
export function parseBlocks(source) {
  const lines = source.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n");
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    if (isBlank(lines[i])) {
      i += 1;
      continue;
    }
    const [parsed, end] = block(lines, i);
    blocks.push({ ...parsed, raw: lines.slice(i, end).join("\n") });
    i = end;
  }
  return blocks;
}
