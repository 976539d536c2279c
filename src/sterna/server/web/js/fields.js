// The table of settings: one row a request field. The panel, its validation and the request body
// are all made from it. An empty field is not sent, so the server's own default holds.

/** kind: "number" (with min/max a slider where `slider` is set), "text", "lines", "choice". */
export const FIELDS = [
  {
    name: "system",
    kind: "text",
    label: "System prompt",
    rows: 4,
    placeholder: "Who the model is and how it should answer",
  },
  {
    name: "temperature",
    kind: "number",
    slider: true,
    min: 0,
    max: 2,
    step: 0.05,
    usual: 1,
    label: "Temperature",
    hint: "0 is greedy: always the most probable token",
  },
  {
    name: "top_p",
    kind: "number",
    slider: true,
    min: 0.01,
    max: 1,
    step: 0.01,
    usual: 1,
    label: "Top p",
    hint: "keep the most probable tokens that sum to p",
  },
  {
    name: "min_p",
    kind: "number",
    slider: true,
    min: 0,
    max: 1,
    step: 0.01,
    usual: 0,
    label: "Min p",
    hint: "drop tokens below p times the best one",
  },
  {
    name: "top_k",
    kind: "number",
    min: 0,
    max: 1_000_000,
    step: 1,
    usual: 0,
    label: "Top k",
    hint: "0 is off",
  },
  {
    name: "max_tokens",
    kind: "number",
    min: 1,
    max: 10_000_000,
    step: 1,
    usual: "no limit",
    label: "Max tokens",
    hint: "an answer's length",
  },
  {
    name: "seed",
    kind: "number",
    min: 0,
    max: 2 ** 53 - 1,
    step: 1,
    usual: "random",
    label: "Seed",
    hint: "same seed, same tokens",
  },
  {
    name: "presence_penalty",
    kind: "number",
    min: -2,
    max: 2,
    step: 0.1,
    usual: 0,
    label: "Presence",
    hint: "-2 to 2",
  },
  {
    name: "frequency_penalty",
    kind: "number",
    min: -2,
    max: 2,
    step: 0.1,
    usual: 0,
    label: "Frequency",
    hint: "-2 to 2",
  },
  {
    name: "repetition_penalty",
    kind: "number",
    min: 0.01,
    max: 10,
    step: 0.05,
    usual: 1,
    label: "Repetition",
    hint: "1 is off",
  },
  {
    name: "stop",
    kind: "lines",
    rows: 2,
    max: 16,
    label: "Stop strings",
    hint: "one a line; \\n is a line break",
    placeholder: "none",
  },
  {
    name: "format",
    kind: "choice",
    label: "Answer format",
    options: [
      ["", "Free text"],
      ["json_object", "JSON object"],
      ["json_schema", "JSON schema"],
    ],
  },
  {
    name: "schema",
    kind: "text",
    rows: 7,
    code: true,
    label: "JSON schema",
    placeholder: '{"type": "object", "properties": {}}',
  },
];

/** How the panel groups them: [title, is a grid of small fields, names]. */
export const GROUPS = [
  ["Instructions", false, ["system"]],
  ["Sampling", false, ["temperature", "top_p", "min_p"]],
  ["Limits", true, ["top_k", "max_tokens", "seed"]],
  ["Penalties", true, ["presence_penalty", "frequency_penalty", "repetition_penalty"]],
  ["Output", false, ["stop", "format", "schema"]],
];

export const fieldOf = (name) => FIELDS.find((field) => field.name === name);

const stopStrings = (text) =>
  text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));

/** What is wrong with a value, or null. `values` are all values, as the panel's strings. */
export function problemOf(field, values) {
  const value = values[field.name] ?? "";
  if (field.kind === "number" && value !== "") {
    const number = Number(value);
    if (!Number.isFinite(number) || number < field.min || number > field.max)
      return `${field.label} is ${value}; it has to be from ${field.min} to ${field.max}.`;
    if (field.step === 1 && !Number.isInteger(number))
      return `${field.label} has to be a whole number.`;
  }
  if (field.kind === "lines" && stopStrings(value).length > field.max)
    return `At most ${field.max} stop strings.`;
  if (field.name === "schema" && values.format === "json_schema") return schemaProblem(value);
  return null;
}

function schemaProblem(text) {
  try {
    const schema = JSON.parse(text);
    if (schema === null || typeof schema !== "object" || Array.isArray(schema))
      return "The JSON schema has to be an object.";
    return null;
  } catch (error) {
    return text.trim()
      ? `The JSON schema is not valid JSON: ${error.message}.`
      : "The JSON schema is empty.";
  }
}

function responseFormat(values) {
  if (values.format === "json_object") return { type: "json_object" };
  if (values.format !== "json_schema") return undefined;
  return {
    type: "json_schema",
    json_schema: { name: "answer", strict: true, schema: JSON.parse(values.schema) },
  };
}

/** The body of POST /v1/chat/completions for these messages; undefined fields drop out of JSON. */
export function requestBody(model, values, messages) {
  const body = {
    model: model ?? undefined,
    messages: [],
    stream: true,
    stream_options: { include_usage: true },
  };
  if (values.system?.trim()) body.messages.push({ role: "system", content: values.system });
  body.messages.push(...messages.map(({ role, content }) => ({ role, content })));
  for (const { name, kind } of FIELDS) {
    if (kind === "number" && (values[name] ?? "") !== "") body[name] = Number(values[name]);
  }
  const stop = stopStrings(values.stop ?? "");
  if (stop.length) body.stop = stop;
  body.response_format = responseFormat(values);
  return body;
}
