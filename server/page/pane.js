// One conversation under one set of settings.

import { Answer } from "./answer.js";
import { copy, make, say } from "./dom.js";
import { Settings } from "./fields.js";

export class Pane {
  constructor(playground, name) {
    this.playground = playground;
    this.name = name;
    this.settings = new Settings(() => playground.save());
    this.turns = []; // { role, content, calls, call, answer }: an assistant's calls of tools, and the call of which a tool tells the result
    this.talk = make("div", { class: "talk" });
    this.column = make("div", { class: "column" }, this.talk);
    this.changes = make("span", { class: "faint" });
    this.side = make("details", { class: "side" }, make("summary", {}, this.title = make("b"), " ", this.changes), this.settings.element);
    this.element = make("section", { class: "pane", "aria-label": `Pane ${name}` }, this.column, this.side);
  }

  get isChat() {
    return this.playground.mode === "chat";
  }

  get path() {
    return this.isChat ? "v1/chat/completions" : "v1/completions";
  }

  /** The request that would have the last turn answered. */
  body(turns = this.turns) {
    const settings = this.settings.read();
    if (!this.isChat) return { prompt: turns.findLast(({ role }) => role === "user")?.content ?? "", ...settings };
    const system = this.settings.system.value, messages = turns.map(messageOf);
    return { messages: system ? [{ role: "system", content: system }, ...messages] : messages, ...settings };
  }

  /** The settings that are not the default, in words. */
  showChanges() {
    const { values, system, stop, format } = this.settings.save();
    const told = [...Object.entries(values).map(([name, value]) => `${name} ${value}`.replaceAll('"', "")), system && "system prompt", stop && "stop", format];
    say(this.changes, told.filter(Boolean).join(", ") || "defaults");
  }

  show() {
    this.showChanges();
    const hint = this.isChat ? "Say something to the model. Two panes show what a setting changes, and what it does not." : "The model goes on with your text.";
    this.talk.replaceChildren(...(this.turns.length ? this.turns.map((turn, index) => this.message(turn, index)) : [make("p", { class: "hint" }, hint)]));
  }

  message(turn, index) {
    const tools = make("span", { class: "tools" });
    const button = (text, does) => tools.append(make("button", { type: "button", class: "plain", onclick: (event) => does(event.currentTarget) }, text));
    if (turn.role === "user") {
      button("Edit", () => this.playground.edit(this.turns, index));
      return make("article", { class: "message user" }, make("div", { class: "who" }, this.isChat ? "You" : "Prompt", tools), make("div", { class: this.isChat ? "text" : "text code" }, turn.content));
    }
    if (turn.role === "tool") return make("article", { class: "message user" }, make("div", { class: "who" }, "Result of a tool"), make("div", { class: "text code" }, turn.content));
    const isLast = index === this.turns.length - 1;
    if (isLast) button("Again", () => this.playground.again());
    button("Copy", (self) => copy(self, turn.content || callsAsText(turn.calls)));
    const content = turn.answer ? turn.answer.element : make("div", { class: "text" }, turn.content, ...(turn.calls ?? []).map((call) => make("pre", {}, callsAsText([call]))));
    return make("article", { class: "message assistant" }, make("div", { class: "who" }, this.isChat ? "Model" : "Text", tools), content, isLast && turn.calls?.length > 0 && this.results(turn.calls));
  }

  /** A form for what the called tools would say. */
  results(calls) {
    const boxes = calls.map(() => make("textarea", { rows: 2, spellcheck: "false" }));
    const send = (event) => {
      event.preventDefault();
      if (this.playground.running) return;
      this.turns.push(...calls.map((call, index) => ({ role: "tool", content: boxes[index].value, call: call.id })));
      this.playground.answer([this]);
    };
    return make("form", { class: "column", onsubmit: send }, ...calls.map((call, index) => make("label", {}, `Result of ${call.name}`, boxes[index])), make("div", { class: "bar" }, make("button", {}, "Tell the model")));
  }

  /** Have the last turn answered. */
  async answer(seed) {
    const turn = { role: "assistant", content: "", answer: new Answer() };
    let body;
    try {
      body = this.body();
      if (seed !== undefined) body.seed ??= seed;
      if (this.playground.model) body = { model: this.playground.model, ...body };
    } catch (error) {
      turn.answer.problem.hidden = false;
      say(turn.answer.problem, error.message);
    }
    this.turns.push(turn);
    this.show();
    turn.answer.element.scrollIntoView({ block: "nearest" });
    if (body) await turn.answer.run(this.path, body, { showsLogprobs: this.playground.logprobs.checked });
    [turn.content, turn.calls] = [turn.answer.content, turn.answer.calls.map(({ id, name, arguments: given }) => ({ id, name, arguments: given }))];
    this.show();
  }

  stop() {
    this.turns.at(-1)?.answer?.stop();
  }
}

/** A turn as the API takes it. */
function messageOf({ role, content, calls, call }) {
  if (role === "tool") return { role, content, tool_call_id: call };
  if (!calls?.length) return { role, content };
  return { role, content: content || null, tool_calls: calls.map(({ id, ...called }) => ({ id, type: "function", function: called })) };
}

function callsAsText(calls) {
  return calls.map((call) => `${call.name}(${call.arguments})`).join("\n");
}
