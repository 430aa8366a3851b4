// One answer as it comes: its tokens, what was drafted of them, and how fast it was.

import { ask, events } from "./api.js";
import { duration, make, number, say } from "./dom.js";
import { hideTip, showTip } from "./tip.js";

const NUM_ALTERNATIVES = 5;

/** Streams one answer. */
export class Answer {
  constructor() {
    this.text = make("div", { class: "text" });
    this.figures = make("div", { class: "figures", role: "status" });
    this.problem = make("p", { class: "bad", role: "alert", hidden: true });
    this.element = make("div", {}, this.text, this.figures, this.problem);
    this.tokens = []; // { text, logprob, alternatives, drafted }: drafted is "kept", "fixed" (chosen in place of a rejected one) or ""
    this.content = "";
    this.thoughts = "";
    this.calls = [];
    this.controller = new AbortController();
    this.text.addEventListener("pointerover", (event) => this.hover(event.target, event.clientX, event.clientY));
    this.text.addEventListener("pointerleave", hideTip);
    this.text.addEventListener("focusin", (event) => { const box = event.target.getBoundingClientRect(); this.hover(event.target, box.left, box.bottom); });
    this.text.addEventListener("focusout", hideTip);
  }

  stop() {
    this.controller.abort();
  }

  /** Sends the request; resolves when the answer has ended, however it did. */
  async run(path, body, { showsLogprobs }) {
    this.began = performance.now();
    this.path = path;
    const asked = { ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    if (showsLogprobs) Object.assign(asked, path.includes("chat") ? { logprobs: true, top_logprobs: NUM_ALTERNATIVES } : { logprobs: NUM_ALTERNATIVES });
    try {
      const answer = await ask(path, { body: asked, signal: this.controller.signal });
      for await (const { data } of events(answer)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        this.take(chunk);
      }
      this.end = this.finish ?? "ended";
    } catch (error) {
      this.end = error.name === "AbortError" ? "stopped" : "failed";
      if (this.end === "failed") {
        this.problem.hidden = false;
        say(this.problem, error.message);
      }
    }
    this.took = performance.now() - this.began;
    this.showFigures();
  }

  take(chunk) {
    const choice = chunk.choices[0], before = this.usage;
    this.usage = chunk.usage ?? this.usage;
    if (chunk.seed !== undefined) this.seed = chunk.seed;
    if (!choice) return this.showFigures();
    this.finish = choice.finish_reason ?? this.finish;
    const piece = choice.text ?? choice.delta?.content ?? "", thought = choice.delta?.reasoning_content ?? "";
    for (const call of choice.delta?.tool_calls ?? []) this.addCall(call);
    const scored = choice.logprobs?.content ?? legacy(choice.logprobs);
    if (piece || thought || scored.length) {
      this.first ??= performance.now() - this.began;
      const drafts = (usage) => usage?.completion_tokens_details ?? { accepted_prediction_tokens: 0, rejected_prediction_tokens: 0 };
      const kept = drafts(this.usage).accepted_prediction_tokens - drafts(before).accepted_prediction_tokens;
      const rejected = drafts(this.usage).rejected_prediction_tokens - drafts(before).rejected_prediction_tokens;
      this.add(piece, thought, scored, kept, rejected);
    }
    return this.showFigures();
  }

  /** The tokens of one chunk: the first `kept` of them were drafted, and the one behind them corrects the next draft. */
  add(piece, thought, scored, kept, rejected) {
    this.content += piece;
    this.thoughts += thought;
    const drafted = (index) => (index < kept ? "kept" : rejected ? "fixed" : "");
    // Where tokens and text do not agree (characters of several tokens, thoughts) the text counts.
    const agree = scored.length && scored.map((one) => one.token).join("") === piece;
    const made = agree ? scored.map((one, index) => ({ text: one.token, logprob: one.logprob, alternatives: one.top_logprobs.map(({ token, logprob }) => [token, logprob]), drafted: drafted(index) })) : [{ text: piece || thought, drafted: kept ? "kept" : drafted(0), thought: !piece && Boolean(thought) }];
    for (const token of made.filter(({ text }) => text)) {
      token.element = make("span", { class: `token ${token.drafted}${token.thought ? " faint" : ""}`, tabindex: token.alternatives ? 0 : undefined }, token.text);
      token.element.token = token;
      this.tokens.push(token);
      this.text.append(token.element);
    }
  }

  addCall({ index, id, function: { name, arguments: piece } = {} }) {
    this.calls[index] ??= { id: "", name: "", arguments: "", element: this.text.appendChild(make("pre")) };
    const call = this.calls[index];
    call.id += id ?? "";
    call.name += name ?? "";
    call.arguments += piece ?? "";
    say(call.element, `${call.name}(${call.arguments})`);
  }

  showFigures() {
    const usage = this.usage, count = usage?.completion_tokens ?? 0, details = usage?.completion_tokens_details;
    const seconds = ((this.took ?? performance.now() - this.began) - (this.first ?? 0)) / 1000;
    const figures = [
      ["", count > 1 && seconds > 0 ? `${number((count - 1) / seconds)} tokens/s` : ""],
      ["first token", this.first ? duration(this.first / 1000) : ""],
      ["tokens", usage ? `${usage.prompt_tokens} + ${count}` : ""],
      ["cached", usage?.prompt_tokens_details?.cached_tokens || ""],
      ["drafts kept", details && details.accepted_prediction_tokens + details.rejected_prediction_tokens ? `${details.accepted_prediction_tokens} of ${details.accepted_prediction_tokens + details.rejected_prediction_tokens}` : ""],
      ["seed", this.took ? this.seed ?? "" : ""],
      ["end", this.end ?? ""],
    ].filter(([, value]) => value !== "");
    this.figures.replaceChildren(...figures.map(([name, value]) => make("span", {}, name ? `${name} ` : "", make("b", {}, String(value)))));
  }

  hover(element, x, y) {
    const token = element.token;
    if (!token?.alternatives) return hideTip();
    const rows = token.alternatives.map(([text, logprob]) => make("tr", { class: text === token.text ? "chosen" : undefined }, make("td", {}, JSON.stringify(text)), make("td", {}, `${number(100 * Math.exp(logprob))}%`), make("td", {}, logprob.toFixed(2)), make("td", {}, shareBar(Math.exp(logprob)))));
    const drafted = { kept: "drafted, and kept", fixed: "chosen in the place of a rejected draft" }[token.drafted];
    return showTip([make("div", {}, `${JSON.stringify(token.text)}: ${number(100 * Math.exp(token.logprob))}%${drafted ? `, ${drafted}` : ""}`), make("table", {}, make("tbody", {}, ...rows))], x, y);
  }

  /** Mark where the text parts from another one, after so many characters. */
  markFrom(at) {
    let seen = 0;
    for (const { text, element } of this.tokens) {
      element.classList.toggle("turning", at !== null && seen <= at && at < seen + text.length);
      element.classList.toggle("after", at !== null && seen + text.length > at);
      seen += text.length;
    }
  }
}

function shareBar(value) {
  const bar = make("i", { class: "share" });
  bar.style.width = `${6 * value}rem`;
  return bar;
}

/** The log-probabilities of a completion in the shape of a chat's. */
function legacy(logprobs) {
  return (logprobs?.tokens ?? []).map((token, index) => ({ token, logprob: logprobs.token_logprobs[index], top_logprobs: Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([name, logprob]) => ({ token: name, logprob })) }));
}
