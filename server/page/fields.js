// The parameters of a request, with the ranges and meanings that the server gives them.

import { get } from "./api.js";
import { make } from "./dom.js";

const FIRST = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "speculation", "priority"];
// What the page says itself, or would not show.
const ELSEWHERE = new Set(["model", "messages", "prompt", "stream", "stream_options", "stop", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "n", "echo", "n_predict", "repeat_penalty", "max_completion_tokens", "return_token_ids", "return_tokens_as_token_ids", "prompt_logprobs", "request_id", "receipt", "timing", "functions", "function_call", "modalities", "best_of", "suffix", "end_after"]);

let described = null, nextId = 0;

/** By kind of request, the fields that the server describes. */
export function descriptions() {
  described ??= get("page/fields.json").catch(() => { described = null; return {}; });
  return described;
}

/** The field's own type among those that it may have. */
function typeOf(schema) {
  return (schema.anyOf ?? [schema]).find((one) => one.type !== "null") ?? {};
}

function rangeOf(schema) {
  const type = typeOf(schema), parts = [];
  const isLow = type.minimum > -(2 ** 31), isHigh = type.maximum < 2 ** 31 - 1;
  if (type.exclusiveMinimum !== undefined) parts.push(`above ${type.exclusiveMinimum}`);
  if (isLow && isHigh) parts.push(`${type.minimum} to ${type.maximum}`);
  else if (isLow) parts.push(`at least ${type.minimum}`);
  else if (isHigh) parts.push(`at most ${type.maximum}`);
  if (schema.default !== undefined && schema.default !== null && !(Array.isArray(schema.default) && !schema.default.length)) parts.push(`default ${schema.default}`);
  return parts.join(", ");
}

/** A field of a form; `read` gives its value, undefined if it is left out. */
export class Field {
  constructor(name, schema, changed) {
    this.name = name;
    const type = typeOf(schema), range = rangeOf(schema);
    [this.isNumber, this.isWhole] = [["number", "integer"].includes(type.type), type.type === "integer"];
    if (type.enum || type.type === "boolean") {
      const values = type.enum ?? [true, false];
      this.input = make("select", {}, make("option", { value: "" }, "default"), ...values.map((value) => make("option", { value: JSON.stringify(value) }, String(value))));
      this.isJson = true;
    } else if (this.isNumber) {
      this.input = make("input", { type: "number", step: this.isWhole ? 1 : "any", min: type.minimum ?? type.exclusiveMinimum, max: type.maximum, inputmode: "decimal", placeholder: schema.default ?? "default" });
    } else if (type.type === "string") {
      this.input = make("input", { type: "text", spellcheck: "false", placeholder: "default" });
    } else {
      this.input = make("input", { type: "text", spellcheck: "false", placeholder: "JSON" });
      this.isJson = true;
    }
    this.input.addEventListener("change", changed);
    const id = `field-${nextId++}`;
    this.input.id = id;
    if (range) this.input.setAttribute("aria-describedby", `${id}-range`);
    this.element = make("div", { class: "field", title: schema.description ?? "" }, make("label", { for: id }, name), this.input, range && make("span", { class: "range", id: `${id}-range` }, range));
  }

  read() {
    const text = this.input.value.trim();
    if (!text) return undefined;
    if (this.isJson) {
      try { return JSON.parse(text); } catch { throw new Error(`${this.name}: this is no JSON`); }
    }
    return this.isNumber ? Number(text) : text;
  }

  write(value) {
    this.input.value = value === undefined ? "" : this.isJson ? JSON.stringify(value) : String(value);
  }
}

/** The form of all parameters of one pane. */
export class Settings {
  constructor(changed) {
    this.changed = changed;
    this.fields = new Map();
    this.system = make("textarea", { rows: 2, placeholder: "none", onchange: changed });
    this.stop = make("textarea", { rows: 2, placeholder: "one a line; \\n is a new line", spellcheck: "false", onchange: changed });
    this.first = make("div", { class: "two" });
    this.rest = make("div", {});
    this.format = make("select", { onchange: () => { this.schemaRow.hidden = this.format.value !== "schema"; this.patternRow.hidden = !["regex", "choice"].includes(this.format.value); changed(); } },
      ...[["", "anything"], ["json", "a JSON object"], ["schema", "JSON of a schema"], ["regex", "a pattern"], ["choice", "one of these"]].map(([value, text]) => make("option", { value }, text)));
    this.schema = make("textarea", { rows: 6, spellcheck: "false", onchange: changed });
    this.schema.value = JSON.stringify({ type: "object", properties: { name: { type: "string" }, fish: { type: "integer" } }, required: ["name", "fish"] }, null, 2);
    this.pattern = make("textarea", { rows: 2, spellcheck: "false", placeholder: "a pattern, or one choice a line", onchange: changed });
    this.tools = make("textarea", { rows: 5, spellcheck: "false", placeholder: '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]', onchange: changed });
    this.schemaRow = make("label", { hidden: true }, "Schema", this.schema);
    this.patternRow = make("label", { hidden: true }, "Pattern or choices", this.pattern);
    this.systemRow = make("label", {}, "System prompt", this.system);
    this.toolsRow = make("label", {}, "Tools, as JSON", this.tools);
    this.mustCall = make("input", { type: "checkbox", onchange: changed });
    this.element = make("div", { class: "settings panel" }, this.systemRow, this.first, make("label", {}, "Stop strings", this.stop),
      make("label", {}, "The answer is", this.format), this.schemaRow, this.patternRow,
      make("details", {}, make("summary", {}, "Tools"), make("div", {}, this.toolsRow, make("label", { class: "check" }, this.mustCall, "The model has to call one"))),
      make("details", {}, make("summary", {}, "All parameters"), this.rest));
  }

  /** Lay out the fields of this kind of request; values that are there stay. */
  async show(kind) {
    const all = (await descriptions())[kind] ?? {}, before = this.fields;
    this.kind = kind;
    this.fields = new Map();
    const names = [...FIRST, ...Object.keys(all).filter((name) => !FIRST.includes(name) && !ELSEWHERE.has(name))].filter((name) => all[name]);
    for (const name of names) {
      const field = new Field(name, all[name], this.changed);
      if (before.has(name)) field.input.value = before.get(name).input.value;
      else if (name in (this.saved ?? {})) field.write(this.saved[name]);
      this.fields.set(name, field);
    }
    this.saved = undefined;
    this.first.replaceChildren(...names.filter((name) => FIRST.includes(name)).map((name) => this.fields.get(name).element));
    this.rest.replaceChildren(...names.filter((name) => !FIRST.includes(name)).map((name) => this.fields.get(name).element));
    this.systemRow.hidden = this.toolsRow.parentElement.parentElement.hidden = kind !== "chat";
  }

  /** The part of a request that is set here. */
  read() {
    const body = {};
    for (const [name, field] of this.fields) {
      const value = field.read();
      if (value !== undefined) body[name] = value;
    }
    const stop = this.stop.value.split("\n").filter(Boolean).map((text) => text.replaceAll("\\n", "\n"));
    if (stop.length) body.stop = stop;
    const json = (text, what) => { try { return JSON.parse(text); } catch { throw new Error(`${what}: this is no JSON`); } };
    switch (this.format.value) {
      case "json": body.response_format = { type: "json_object" }; break;
      case "schema": body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: json(this.schema.value, "Schema") } }; break;
      case "regex": body.structured_outputs = { regex: this.pattern.value }; break;
      case "choice": body.structured_outputs = { choice: this.pattern.value.split("\n").filter(Boolean) }; break;
      default:
    }
    if (this.kind === "chat" && this.tools.value.trim()) {
      body.tools = json(this.tools.value, "Tools");
      if (this.mustCall.checked) body.tool_choice = "required";
    }
    return body;
  }

  set(name, value) {
    if (this.fields.has(name)) this.fields.get(name).write(value);
    else this.saved = { ...this.saved, [name]: value };
  }

  save() {
    const values = {};
    for (const [name, field] of this.fields) if (field.input.value) values[name] = field.input.value;
    return { values, system: this.system.value, stop: this.stop.value, format: this.format.value, schema: this.schema.value, pattern: this.pattern.value, tools: this.tools.value, mustCall: this.mustCall.checked };
  }

  load({ values = {}, system = "", stop = "", format = "", schema = this.schema.value, pattern = "", tools = "", mustCall = false }) {
    this.mustCall.checked = mustCall;
    [this.system.value, this.stop.value, this.schema.value, this.pattern.value, this.tools.value] = [system, stop, schema, pattern, tools];
    this.format.value = format;
    this.format.dispatchEvent(new Event("change"));
    for (const [name, value] of Object.entries(values)) if (this.fields.has(name)) this.fields.get(name).input.value = value;
  }
}
