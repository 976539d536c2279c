// Server-sent events from a fetch body (EventSource cannot POST nor send Authorization).
// Follows the WHATWG event-stream grammar: LF, CRLF or CR line ends, comments, several data lines.

/** Yields {event, data} for each event of the body; leaving the loop cancels the body. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      for (;;) {
        const end = lineEnd(buffer);
        if (!end) break;
        const line = buffer.slice(0, end.at);
        buffer = buffer.slice(end.next);
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
          continue;
        }
        const [name, text] = field(line);
        if (name === "data") data.push(text);
        else if (name === "event") event = text;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already broken: nothing to release
  }
}

/** Where the first line ends; null while its end has not arrived (a final CR may be half a CRLF). */
function lineEnd(buffer) {
  const at = buffer.search(/[\r\n]/);
  if (at < 0) return null;
  if (buffer[at] === "\n") return { at, next: at + 1 };
  if (at + 1 === buffer.length) return null;
  return { at, next: buffer[at + 1] === "\n" ? at + 2 : at + 1 };
}

function field(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  const text = line.slice(colon + 1);
  return [line.slice(0, colon), text.startsWith(" ") ? text.slice(1) : text];
}
