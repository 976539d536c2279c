// A small load to look at: short prompts that decode for a while, joined by long prompts. With
// SplitFuse the long ones show as full bars to the budget while the decodes run on underneath.
// Two HTTP requests carry all prompts, because a browser opens six connections at most.

import { call } from "./api.js";

const SHORT = [
  "The sea was calm and",
  "In the north the summer",
  "A bird that flies from pole to pole",
  "The first light of the morning",
  "Once there was a lighthouse",
  "To bake good bread",
  "The engine started slowly and",
  "Between the two islands",
];
const SENTENCE = "The arctic tern sees more daylight than any other animal on this planet. ";
const SENTENCE_TOKENS = 14;
const LONG_TOKENS = 1500;

/** Prompts differ in their first words, or the prefix cache would skip the work to be seen. */
const longPrompt = (i, tokens) =>
  `Note ${Math.random().toString(36).slice(2)} ${i}. ${SENTENCE.repeat(Math.max(1, tokens / SENTENCE_TOKENS))}`;

const complete = (model, prompts, maxTokens, signal) =>
  call("/v1/completions", {
    body: { model, prompt: prompts, max_tokens: maxTokens, temperature: 0.8, ignore_eos: true },
    signal,
  });

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

/** Resolves when all is answered; throws ApiError or AbortError. */
export async function sampleLoad(model, maxModelLen, signal) {
  const long = Math.min(LONG_TOKENS, Math.floor((maxModelLen ?? 2048) / 2));
  const joinLate = async () => {
    await pause(1200, signal);
    await complete(
      model,
      [0, 1, 2].map((i) => longPrompt(i, long)),
      48,
      signal,
    );
    await pause(600, signal);
    await complete(
      model,
      [3, 4].map((i) => longPrompt(i, long)),
      48,
      signal,
    );
  };
  await Promise.all([complete(model, SHORT, 320, signal), joinLate()]);
}
