// To talk with the model: a conversation or a text to go on with, in one pane or in two that differ in their settings.

import { asCurl, asJson, asPython } from "./code.js";
import { copy, make, plural, say } from "./dom.js";
import { Pane } from "./pane.js";

const SAVED = "shoal-playground", MOST_TURNS = 100;
const PROMPTS = { chat: "Write a function that reverses a string.", completion: "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n" };

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
    this.draftTools = [make("label", { class: "check" }, this.drafts, "Colour drafted tokens"),
      make("span", { class: "legend" }, make("span", {}, make("i", { class: "accepted" }), "drafted, kept"), make("span", {}, make("i", { class: "rejected" }), "draft rejected, corrected"))];
    this.grid = make("div", { class: "panes" });
    this.verdict = make("p", { class: "verdict", role: "status" });
    this.input = make("textarea", { rows: 2, "aria-label": "Your text", placeholder: "Your text; Enter sends, Shift+Enter is a new line", onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && this.mode === "chat") { event.preventDefault(); this.send(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.send(); }
    } });
    this.go = make("button", { class: "first" }, "Send");
    this.halt = make("button", { type: "button", disabled: true, onclick: () => this.panes.forEach((pane) => pane.stop()) }, "Stop");
    this.dialog = this.codeDialog();
    root.append(
      make("div", { class: "bar" }, this.modes.chat, this.modes.completion, this.compare, make("label", { class: "check" }, this.logprobs, "Probabilities on hover"), ...this.draftTools,
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
    for (const tool of this.draftTools) tool.hidden = this.method === "off";
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

  async answer(panes = this.open) {
    this.busy(true);
    this.judge();
    const watching = setInterval(() => this.judge(), 150);
    const seed = this.isTwo ? Math.floor(Math.random() * 2 ** 31) : undefined; // one for both, or they would differ for no reason
    await Promise.all(panes.map((pane) => pane.answer(seed)));
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
  edit(turns, index) {
    if (this.running) return;
    this.input.value = turns[index].content;
    const place = turns.slice(0, index).filter(({ role }) => role === "user").length;
    for (const pane of this.open) {
      const from = pane.turns.indexOf(pane.turns.filter(({ role }) => role === "user")[place]);
      pane.turns = from < 0 ? pane.turns : pane.turns.slice(0, from);
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
      say(pane.title, this.isTwo ? `Settings of ${pane.name}` : "Settings");
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
    const turns = (pane) => pane.turns.slice(-MOST_TURNS).map(({ role, content, calls, call }) => ({ role, content, calls, call }));
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
