// A request as others would send it: curl, Python, JSON.

import { key } from "./api.js";

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** JSON as Python writes it. */
function python(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  const inner = `${indent}    `;
  if (Array.isArray(value)) return value.length ? `[\n${value.map((one) => inner + python(one, inner)).join(",\n")},\n${indent}]` : "[]";
  if (typeof value === "object") return `{\n${Object.entries(value).map(([name, one]) => `${inner}${JSON.stringify(name)}: ${python(one, inner)}`).join(",\n")},\n${indent}}`;
  return JSON.stringify(value);
}

const KNOWN = new Set(["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "presence_penalty", "frequency_penalty", "logit_bias", "n", "user"]);

export function asJson(body) {
  return JSON.stringify(body, null, 2);
}

export function asCurl(path, body) {
  const url = new URL(path, document.baseURI).href, headers = key.get() ? ` \\\n  -H 'authorization: Bearer YOUR_KEY'` : "";
  return `curl -N ${quoted(url)}${headers} \\\n  -H 'content-type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}`;
}

export function asPython(path, body) {
  const base = new URL("v1", document.baseURI).href, isChat = path.includes("chat");
  const own = Object.fromEntries(Object.entries(body).filter(([name]) => KNOWN.has(name))), extra = Object.fromEntries(Object.entries(body).filter(([name]) => !KNOWN.has(name)));
  const lines = Object.entries(own).map(([name, value]) => `    ${name}=${python(value, "    ")},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${python(extra, "    ")},`);
  const piece = isChat ? "chunk.choices[0].delta.content" : "chunk.choices[0].text";
  return `from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key.get() ? '"YOUR_KEY"' : '"unused"'})\nstream = client.${isChat ? "chat." : ""}completions.create(\n${lines.join("\n")}\n)\nfor chunk in stream:\n    if chunk.choices:\n        print(${piece} or "", end="", flush=True)\n`;
}
