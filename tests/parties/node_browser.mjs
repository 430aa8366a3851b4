// A page on another origin, in Chromium: what fetch() and OpenAI's client may read there, and that other pages may not.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtemp, readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import path from "node:path";

const { OPENAI_BASE_URL, SHOAL_MODEL, SHOAL_PAGE } = process.env;
const SECONDS = 120;

// Runs in the page.
async function ask(baseURL, model) {
  const { default: OpenAI, NotFoundError } = await import("/openai/index.mjs");
  const messages = [{ role: "user", content: "What is the weather in Paris?" }];
  const asked = { model, messages, max_tokens: 24, seed: 1 };
  const client = new OpenAI({ baseURL, apiKey: "unused", dangerouslyAllowBrowser: true, maxRetries: 0 });
  const post = (body) =>
    fetch(`${baseURL}/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: "Bearer unused", "x-stainless-lang": "js" },
      body: JSON.stringify({ ...asked, ...body }),
    });

  const streamed = await post({ stream: true, made_up: 1 });
  const reader = streamed.body.pipeThrough(new TextDecoderStream()).getReader();
  let events = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) events += part.value;
  const refused = await post({ model: "other" });
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
    text += chunk.choices[0].delta.content ?? "";
  const error = await client.chat.completions.create({ ...asked, model: "other" }).catch((error) => error);
  return {
    streamed: { status: streamed.status, headers: Object.fromEntries(streamed.headers), events },
    refused: { status: refused.status, headers: Object.fromEntries(refused.headers), body: await refused.json() },
    client: { text, isNotFound: error instanceof NotFoundError, requestId: error.requestID },
  };
}

const PAGE = `<!doctype html><title>A page</title><script type="module">
${ask}
const said = await ask(${JSON.stringify(OPENAI_BASE_URL)}, ${JSON.stringify(SHOAL_MODEL)}).catch((error) => ({ error: String(error) }));
await fetch("/said", { method: "POST", body: JSON.stringify(said) });
</script>`;

let tell;
const server = createServer(async (request, response) => {
  if (request.method === "POST") {
    let body = "";
    for await (const part of request) body += part;
    tell(JSON.parse(body));
    response.end();
  } else if (request.url.startsWith("/openai/")) {
    const file = await readFile(path.join("node_modules", path.normalize(request.url))).catch(() => "");
    response.writeHead(200, { "content-type": "text/javascript" }).end(file);
  } else {
    response.writeHead(200, { "content-type": "text/html" }).end(PAGE);
  }
});

// What the page says that a browser has opened at this address.
async function open(url) {
  const said = new Promise((resolve, reject) => {
    tell = resolve;
    setTimeout(() => reject(new Error(`${url} said nothing`)), SECONDS * 1000).unref();
  });
  const profile = await mkdtemp(path.join(tmpdir(), "chromium-"));
  const options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-proxy-server", `--user-data-dir=${profile}`];
  const browser = spawn("chromium", [...options, url], { stdio: "ignore", detached: true });
  try {
    return await said;
  } finally {
    process.kill(-browser.pid, "SIGKILL");
  }
}

process.chdir(path.dirname(process.argv[1]));
const { port } = new URL(SHOAL_PAGE);
await new Promise((resolve) => server.listen(Number(port), "127.0.0.1", resolve));

const { streamed, refused, client, error } = await open(SHOAL_PAGE);
assert.equal(error, undefined);
assert.equal(streamed.status, 200);
const chunks = streamed.events.match(/^data: \{.*$/gm);
const texts = chunks.map((line) => JSON.parse(line.slice(6)).choices[0].delta.content ?? "");
assert.equal(texts.join(""), client.text);
assert.ok(client.text && streamed.events.endsWith("data: [DONE]\n\n"));
assert.equal(streamed.headers["x-ignored-fields"], "made_up");
assert.ok(streamed.headers["x-request-id"] && refused.headers["x-request-id"]);
assert.equal(refused.status, 404);
assert.equal(refused.body.error.code, "model_not_found");
assert.ok(client.isNotFound && client.requestId);

const stranger = await open(`http://localhost:${port}`); // another name is another origin
assert.match(stranger.error ?? "", /TypeError: Failed to fetch/);
process.exit(0);
