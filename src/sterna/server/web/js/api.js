// The server's HTTP API: one place that adds the key, and turns every failure into an ApiError
// whose `kind` says what the page can do about it.

import { sentence } from "./format.js";
import { readEvents } from "./sse.js";
import { loadKey } from "./store.js";

/**
 * kind: "auth" (ask for a key), "busy" (429, wait retryAfter seconds), "draining" (503),
 * "invalid" (the request has to change), "server" (5xx), "offline" (no answer), "cut" (stream broke).
 */
export class ApiError extends Error {
  constructor(kind, message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const KINDS = { 401: "auth", 403: "auth", 408: "server", 429: "busy", 503: "draining" };

const kindOf = (status) => KINDS[status] ?? (status >= 500 ? "server" : "invalid");

/** Retry-After is seconds or an HTTP date; null when absent or unreadable. */
export function retryAfterSeconds(value, now = Date.now()) {
  if (!value) return null;
  if (/^\s*\d+(\.\d+)?\s*$/.test(value)) return Number(value);
  const date = Date.parse(value);
  return Number.isNaN(date) ? null : Math.max(0, (date - now) / 1000);
}

async function errorOf(response) {
  let message = "";
  try {
    const body = await response.json();
    message = body?.error?.message ?? body?.detail ?? "";
  } catch {
    // A proxy's HTML page, say; the status has to do.
  }
  return new ApiError(
    kindOf(response.status),
    typeof message === "string" && message
      ? sentence(message)
      : `The server answered ${response.status}.`,
    { status: response.status, retryAfter: retryAfterSeconds(response.headers.get("Retry-After")) },
  );
}

/** fetch with the key; resolves to an ok Response or throws ApiError (or AbortError). */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  const key = loadKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", "The server does not answer.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

export const getJson = async (path, signal) => (await call(path, { signal })).json();

/** Events of a stream; a broken connection becomes an ApiError of kind "cut". */
export async function* streamEvents(path, options = {}) {
  const response = await call(path, options);
  try {
    yield* readEvents(response.body);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("cut", "The connection was lost before the end.");
  }
}

/** Chunks of a streamed chat completion: {text, finish, usage}, each maybe absent. */
export async function* streamChat(body, signal) {
  for await (const { data } of streamEvents("/v1/chat/completions", { body, signal })) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error)
      throw new ApiError("server", sentence(chunk.error.message ?? "The answer failed."));
    const choice = chunk.choices?.[0];
    yield { text: choice?.delta?.content ?? "", finish: choice?.finish_reason, usage: chunk.usage };
  }
  throw new ApiError("cut", "The connection was lost before the end.");
}
