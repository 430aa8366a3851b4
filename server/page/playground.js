// To talk with the model: a conversation or a text to go on with, in one pane or in two that differ in their settings.

import { Answer } from "./answer.js";
import { asCurl, asJson, asPython } from "./code.js";
import { copy, make, plural, say } from "./dom.js";
import { Settings } from "./fields.js";

const SAVED = "shoal-playground", MOST_TURNS = 100;
const PROMPTS = { chat: "Write a function that reverses a string.", completion: "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n" };

/** One conversation under one set of settings. */
class Pane {
  constructor(playground, name) {
    this.playground = playground;
    this.name = name;
    this.settings = new Settings(() => playground.save());
    this.turns = []; // { role, content, answer }
    this.talk = make("div", { class: "talk" });
    this.column = make("div", { class: "column" }, this.talk);
    this.changes = make("span", { class: "faint" });
    this.side = make("details", { class: "side" }, make("summary", {}, make("b", {}, `Settings of ${name}`), " ", this.changes), this.settings.element);
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
    const system = this.settings.system.value, messages = turns.map(({ role, content }) => ({ role, content }));
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
      button("Edit", () => this.playground.edit(index));
      return make("article", { class: "message user" }, make("div", { class: "who" }, this.isChat ? "You" : "Prompt", tools), make("div", { class: this.isChat ? "text" : "text code" }, turn.content));
    }
    if (index === this.turns.length - 1) button("Again", () => this.playground.again());
    button("Copy", (self) => copy(self, turn.content));
    const content = turn.answer ? turn.answer.element : make("div", { class: "text" }, turn.content);
    return make("article", { class: "message assistant" }, make("div", { class: "who" }, this.isChat ? "Model" : "Text", tools), content);
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
    turn.content = turn.answer.content || turn.answer.calls.map((call) => `${call.name}(${call.arguments})`).join("\n");
    this.show();
  }

  stop() {
    this.turns.at(-1)?.answer?.stop();
  }
}

export class Playground {
  constructor(root) {
    this.mode = "chat";
    this.model = "";
    this.panes = [new Pane(this, "A"), new Pane(this, "B")];
    this.isTwo = false;
    this.running = 0;
    const mode = (name, text) => make("button", { type: "button", "aria-pressed": "false", onclick: () => this.setMode(name) }, text);
    this.modes = { chat: mode("chat", "Chat"), completion: mode("completion", "Complete") };
    this.compare = make("button", { type: "button", "aria-pressed": "false", onclick: () => { this.isTwo = !this.isTwo; this.lay(); this.save(); } }, "Compare");
    this.logprobs = make("input", { type: "checkbox", checked: true, onchange: () => this.save() });
    this.drafts = make("input", { type: "checkbox", checked: true, onchange: () => { this.lay(); this.save(); } });
    this.grid = make("div", { class: "panes" });
    this.verdict = make("p", { class: "verdict", role: "status" });
    this.input = make("textarea", { rows: 3, "aria-label": "Your text", placeholder: "Your text; Enter sends, Shift+Enter is a new line", onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && this.mode === "chat") { event.preventDefault(); this.send(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.send(); }
    } });
    this.go = make("button", { class: "first" }, "Send");
    this.halt = make("button", { type: "button", disabled: true, onclick: () => this.panes.forEach((pane) => pane.stop()) }, "Stop");
    this.dialog = this.codeDialog();
    root.append(
      make("div", { class: "bar" }, this.modes.chat, this.modes.completion, this.compare, make("label", { class: "check" }, this.logprobs, "Probabilities on hover"), make("label", { class: "check" }, this.drafts, "Colour drafted tokens"),
        make("span", { class: "legend" }, make("span", {}, make("i", { class: "accepted" }), "drafted, kept"), make("span", {}, make("i", { class: "rejected" }), "draft rejected, corrected")),
        make("span", { class: "grow" }), make("button", { type: "button", onclick: () => this.showCode() }, "Code"), make("button", { type: "button", onclick: () => this.clear() }, "New")),
      this.verdict, this.grid,
      make("form", { class: "compose", onsubmit: (event) => { event.preventDefault(); this.send(); } }, this.input, make("div", { class: "bar" }, this.go, this.halt, make("span", { class: "grow" }), make("span", { class: "faint" }, "The history stays in this browser."))),
      this.dialog);
    addEventListener("shoal-info", ({ detail }) => this.learn(detail));
    this.load();
  }

  shown() {}

  learn(info) {
    this.model = info.model;
    this.method = info.settings.speculation.method;
  }

  // -- talking -----------------------------------------------------------------------------------------------------

  get open() {
    return this.isTwo ? this.panes : this.panes.slice(0, 1);
  }

  async send() {
    const text = this.input.value;
    if (!text.trim() || this.running) return;
    for (const pane of this.open) {
      if (this.mode === "completion") pane.turns = [];
      pane.turns.push({ role: "user", content: text });
    }
    if (this.mode === "chat") this.input.value = "";
    await this.answer();
  }

  async answer() {
    this.busy(true);
    this.judge();
    const watching = setInterval(() => this.judge(), 150);
    const seed = this.isTwo ? Math.floor(Math.random() * 2 ** 31) : undefined; // one for both, or they would differ for no reason
    await Promise.all(this.open.map((pane) => pane.answer(seed)));
    clearInterval(watching);
    this.busy(false);
    this.judge();
    this.save();
  }

  busy(isBusy) {
    this.running = isBusy ? 1 : 0;
    this.go.disabled = isBusy;
    this.halt.disabled = !isBusy;
  }

  /** The last answer anew. */
  async again() {
    if (this.running) return;
    for (const pane of this.open) while (pane.turns.at(-1)?.role === "assistant") pane.turns.pop();
    await this.answer();
  }

  /** A turn of the user goes back into the box, and all that followed it is gone. */
  edit(index) {
    if (this.running) return;
    this.input.value = this.panes[0].turns[index]?.content ?? "";
    for (const pane of this.open) {
      pane.turns = pane.turns.slice(0, index);
      pane.show();
    }
    this.input.focus();
    this.judge();
  }

  clear() {
    this.panes.forEach((pane) => pane.stop());
    for (const pane of this.panes) {
      pane.turns = [];
      pane.show();
    }
    this.input.value = PROMPTS[this.mode];
    this.judge();
    this.save();
  }

  /** Whether the two last answers are the same, or where they part. */
  judge() {
    const answers = this.isTwo ? this.panes.map((pane) => pane.turns.at(-1)?.answer) : [];
    if (answers.length < 2 || !answers.every(Boolean)) {
      say(this.verdict, "");
      return;
    }
    const texts = answers.map((answer) => answer.content), [a, b] = texts, areOver = answers.every((answer) => answer.took !== undefined), least = Math.min(a.length, b.length);
    let at = 0;
    while (at < least && a[at] === b[at]) at += 1;
    const parts = at < least || (areOver && a.length !== b.length);
    this.verdict.className = `verdict ${parts ? "differ" : "same"}`;
    if (parts) say(this.verdict, `The texts part after ${plural(at, "character")}.`);
    else say(this.verdict, areOver ? `The texts are the same, ${plural(at, "character")} of them.` : `The same so far: ${plural(at, "character")}.`);
    for (const answer of answers) answer.markFrom(parts ? at : null);
  }

  // -- the page ----------------------------------------------------------------------------------------------------

  setMode(mode) {
    this.mode = mode;
    for (const pane of this.panes) {
      pane.turns = [];
      pane.settings.show(mode);
    }
    this.input.value = PROMPTS[mode];
    this.lay();
    this.judge();
    this.save();
  }

  lay() {
    for (const [name, button] of Object.entries(this.modes)) button.setAttribute("aria-pressed", String(name === this.mode));
    this.compare.setAttribute("aria-pressed", String(this.isTwo));
    this.grid.classList.toggle("two", this.isTwo);
    this.grid.classList.toggle("drafts", this.drafts.checked);
    this.grid.replaceChildren(...this.open.map((pane) => pane.element));
    for (const pane of this.open) {
      pane.side.open = !this.isTwo && innerWidth > 960;
      pane.show();
    }
    if (this.isTwo && this.method && this.method !== "off" && !this.panes.some((pane) => Object.keys(pane.settings.save().values).length)) this.panes[1].settings.set("speculation", "off");
  }

  codeDialog() {
    this.code = make("pre", { tabindex: 0, "aria-label": "The request" });
    this.kinds = ["curl", "Python", "JSON"].map((name) => make("button", { type: "button", "aria-pressed": "false", onclick: () => this.showCode(name) }, name));
    return make("dialog", { "aria-label": "The request as code" }, make("div", { class: "bar" }, ...this.kinds, make("span", { class: "grow" }), make("button", { type: "button", onclick: (event) => copy(event.currentTarget, this.code.textContent) }, "Copy"), make("button", { type: "button", onclick: () => this.dialog.close() }, "Close")), make("p", { class: "faint" }, "The request of the first pane, with what stands in the box."), this.code);
  }

  showCode(kind = "curl") {
    const [pane] = this.panes, text = this.input.value;
    const turns = this.mode === "completion" || text.trim() ? [...(this.mode === "chat" ? pane.turns : []), { role: "user", content: text }] : pane.turns.filter((turn, index) => turn.role === "user" || index < pane.turns.length - 1);
    try {
      const body = { model: this.model, ...pane.body(turns), stream: true };
      this.code.textContent = kind === "JSON" ? asJson(body) : (kind === "curl" ? asCurl : asPython)(pane.path, body);
    } catch (error) {
      this.code.textContent = error.message;
    }
    for (const button of this.kinds) button.setAttribute("aria-pressed", String(button.textContent === kind));
    if (!this.dialog.open) this.dialog.showModal();
  }

  save() {
    for (const pane of this.panes) pane.showChanges();
    const turns = (pane) => pane.turns.slice(-MOST_TURNS).map(({ role, content }) => ({ role, content }));
    const saved = { mode: this.mode, isTwo: this.isTwo, logprobs: this.logprobs.checked, drafts: this.drafts.checked, panes: this.panes.map((pane) => ({ turns: turns(pane), settings: pane.settings.save() })) };
    try { localStorage.setItem(SAVED, JSON.stringify(saved)); } catch { /* it is full, or not allowed */ }
  }

  async load() {
    let saved = {};
    try { saved = JSON.parse(localStorage.getItem(SAVED)) ?? {}; } catch { /* what is there is not ours */ }
    this.mode = saved.mode === "completion" ? "completion" : "chat";
    this.isTwo = saved.isTwo === true;
    [this.logprobs.checked, this.drafts.checked] = [saved.logprobs !== false, saved.drafts !== false];
    this.input.value = saved.panes ? "" : PROMPTS[this.mode];
    this.panes.forEach((pane, index) => { pane.turns = (saved.panes?.[index]?.turns ?? []).filter(({ role, content }) => role && typeof content === "string"); });
    this.lay();
    await Promise.all(this.panes.map((pane) => pane.settings.show(this.mode)));
    this.panes.forEach((pane, index) => { if (saved.panes?.[index]?.settings) pane.settings.load(saved.panes[index].settings); pane.showChanges(); });
  }
}
