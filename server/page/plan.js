// What a model costs: the planner's numbers for a machine, a context, a batch and ways of splitting, and its roofline.

import { get } from "./api.js";
import { copy, make, number, plural, prefixed, say, table } from "./dom.js";
import { descriptions, Field } from "./fields.js";
import { Roofline } from "./roofline.js";

const EXAMPLE = {
  model_type: "llama", vocab_size: 128256, hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32,
  num_attention_heads: 32, num_key_value_heads: 8, max_position_embeddings: 8192, rms_norm_eps: 1e-5, rope_theta: 500000,
  hidden_act: "silu", tie_word_embeddings: false, torch_dtype: "bfloat16",
};

export class PlanView {
  constructor(root) {
    this.fields = new Map();
    this.row = make("div", { class: "form" });
    this.config = make("textarea", { rows: 6, spellcheck: "false", placeholder: "empty: the model that is served here" });
    this.button = make("button", { class: "first" }, "Plan");
    this.problem = make("p", { class: "bad", role: "alert" });
    this.command = make("code", { class: "faint" });
    this.asJson = make("button", { type: "button", disabled: true, onclick: (event) => copy(event.currentTarget, JSON.stringify(this.plan, null, 2)) }, "Copy JSON");
    this.tiles = make("dl", { class: "tiles" });
    this.roofline = new Roofline();
    this.tables = make("div", { class: "tables" });
    const example = make("button", { type: "button", onclick: () => { this.config.value = JSON.stringify(EXAMPLE, null, 2); this.fields.get("machine")?.write("h100"); this.run(); } }, "An 8-billion-parameter Llama on an H100");
    root.append(
      make("section", { class: "panel", "aria-label": "A plan" },
        make("div", { class: "head" }, make("h2", {}, "What a model costs"), make("p", { class: "faint" }, "Bounds by formulas, which no step can beat; see docs/planner.md")),
        make("form", { class: "column", onsubmit: (event) => { event.preventDefault(); this.run(); } }, this.row,
          make("details", {}, make("summary", {}, "Another model, by its config.json"), make("div", { class: "column" }, make("label", {}, "config.json", this.config), make("div", { class: "bar" }, example))),
          make("div", { class: "bar" }, this.button, this.asJson, this.command)), this.problem),
      this.tiles, this.roofline.element, this.tables);
    addEventListener("shoal-theme", () => this.roofline.draw());
    addEventListener("resize", () => this.roofline.draw());
  }

  async shown(isShown) {
    if (!isShown) return;
    this.roofline.draw();
    if (this.fields.size) return;
    for (const [name, schema] of Object.entries((await descriptions()).plan ?? {})) {
      if (name !== "config" && !this.fields.has(name)) this.fields.set(name, new Field(name, schema, () => {}));
    }
    this.row.replaceChildren(...[...this.fields.values()].map((field) => field.element));
    await this.run();
  }

  read() {
    const body = {};
    for (const [name, field] of this.fields) {
      const value = field.read();
      if (value !== undefined) body[name] = value;
    }
    if (this.config.value.trim()) {
      try { body.config = JSON.parse(this.config.value); } catch { throw new Error("config.json: this is no JSON"); }
    }
    return body;
  }

  async run() {
    say(this.problem, "");
    this.button.disabled = true;
    try {
      const body = this.read(), { plan, tables } = await get("v1/engine/plan", { body });
      const { config, ...options } = body;
      this.plan = plan;
      this.asJson.disabled = false;
      say(this.command, ["shoal plan", config ? "config.json" : plan.model, ...Object.entries(options).map(([name, value]) => `--${name} ${value}`)].join(" "));
      this.tiles.replaceChildren(...headlines(plan).map(([name, value, unit]) => make("div", { class: "tile" }, make("dt", {}, name), make("dd", {}, value, " ", make("small", {}, unit)))));
      this.roofline.show(plan);
      this.tables.replaceChildren(...tables.map(({ title, columns, rows }) => make("section", { class: "panel", "aria-label": title }, make("h2", {}, title), table(title, columns, rows))));
    } catch (error) {
      say(this.problem, error.message);
    }
    this.button.disabled = false;
  }
}

/** What one wants to know first: names, values and units. */
function headlines({ facts, steps, fit, context }) {
  const [prefill, ...decodes] = steps, [alone, ...others] = decodes.filter(({ length }) => length === context), most = others.at(-1);
  const bound = (step) => [prefixed(step.tokens_per_second), "tokens/s at most"];
  return [
    ["Parameters", prefixed(facts.num_parameters), `${prefixed(facts.num_weights_of_one_token)} for a token`],
    ["Weights", prefixed(facts.weights_bytes, "B"), `of ${prefixed(facts.memory_bytes, "B")}`],
    [`Prefill of ${number(context)} tokens`, ...bound(prefill)],
    ["Decode, 1 sequence", ...bound(alone)],
    ...(most ? [[`Decode, ${plural(most.sequences, "sequence")}`, ...bound(most)]] : []),
    ["Fit beside the weights", number(fit.at(-1).requests), `requests of ${number(fit.at(-1).length)} tokens`],
  ];
}
