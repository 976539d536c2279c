// One streamed answer: reads the chunks into a message and measures as the user experiences it
// (times are the browser's: from the click to the first text, and between texts).

import { streamChat } from "./api.js";

/**
 * Fill `message` from the stream; `onText(piece)` runs after each piece. Throws what streamChat
 * throws; what arrived until then stays in the message.
 */
export async function streamAnswer(body, message, signal, onText) {
  const started = performance.now();
  let first = null;
  let pieces = 0;
  const measure = (usage) => {
    message.stats = figures({ started, first, pieces, usage });
  };
  for await (const { text, finish, usage } of streamChat(body, signal)) {
    if (finish) message.finish = finish;
    if (usage) measure(usage);
    if (!text) continue;
    first ??= performance.now();
    pieces += 1;
    message.content += text;
    measure(null);
    onText(text);
  }
}

/** Until the usage arrives a piece counts as a token; the server sends about one a token. */
function figures({ started, first, pieces, usage }) {
  const now = performance.now();
  const completion = usage?.completion_tokens ?? pieces;
  const seconds = first === null ? 0 : (now - first) / 1000;
  return {
    ttft: first === null ? null : first - started,
    tokensPerSecond: seconds > 0 && completion > 1 ? (completion - 1) / seconds : null,
    completion,
    prompt: usage?.prompt_tokens,
    cached: usage?.prompt_tokens_details?.cached_tokens,
    total: usage?.total_tokens,
  };
}
