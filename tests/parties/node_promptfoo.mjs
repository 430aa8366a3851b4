// promptfoo with the defaults of its providers: https://www.promptfoo.dev/docs/providers/openai.
import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { mkdtemp, readFile, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";

const { SHOAL_MODEL } = process.env;
const schema = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const json = { type: "json_schema", json_schema: { name: "weather", strict: true, schema } };
const isLike = { type: "similar", value: "the weather", threshold: -1, provider: `openai:embedding:${SHOAL_MODEL}` };
const config = {
  prompts: ["What is the weather in {{city}}?"],
  providers: [
    `openai:chat:${SHOAL_MODEL}`, // its max_tokens are 1024
    `openai:completion:${SHOAL_MODEL}`,
    `openai:responses:${SHOAL_MODEL}`,
    `anthropic:messages:${SHOAL_MODEL}`,
    { id: `openai:chat:${SHOAL_MODEL}`, label: "json", config: { response_format: json } },
  ],
  tests: ["Paris", "Rome"].map((city) => ({ vars: { city }, assert: [isLike] })),
};

const folder = await mkdtemp(path.join(tmpdir(), "promptfoo-"));
await writeFile(path.join(folder, "config.json"), JSON.stringify(config));
const modules = path.join(path.dirname(process.argv[1]), "node_modules");
const words = ["eval", "-c", "config.json", "-o", "results.json", "--no-cache", "--no-progress-bar", "--no-table"];
const quiet = { PROMPTFOO_DISABLE_TELEMETRY: "1", PROMPTFOO_DISABLE_UPDATE: "1", PROMPTFOO_CONFIG_DIR: folder };
const done = spawnSync(path.join(modules, "node/bin/node"), [path.join(modules, ".bin/promptfoo"), ...words], {
  cwd: folder,
  env: { ...process.env, ...quiet },
  encoding: "utf8",
});
console.log(done.stdout, done.stderr);
assert.equal(done.status, 0);
const { results } = JSON.parse(await readFile(path.join(folder, "results.json"), "utf8"));
assert.deepEqual([results.stats.successes, results.stats.errors], [10, 0]);
const structured = results.results.filter(({ provider }) => provider.label === "json");
assert.equal(structured.length, 2);
for (const { response } of structured) assert.ok(["Paris", "Rome"].includes(response.output.city));
