// A small load against this very server, and two runs of it side by side.

import { get } from "./api.js";
import { columns } from "./charts.js";
import { duration, make, number, plural, say } from "./dom.js";
import { colour } from "./palette.js";
import { ReportView } from "./report.js";

const POLL_MS = 500, TIMELINE_SECONDS = 0.5;
const WORKLOADS = { chat: "chat: prompts of some sentences, answers of some", mixed: "mixed: short answers, and a few that are ten times as long", shared: "shared: prompts that begin alike", long: "long: long prompts, short answers" };
const FIGURES = [
  ["output tokens/s", (run) => run.tokens_per_second, number, 1], ["answered", (run) => run.num_requests, number, 1], ["failed", (run) => run.num_failed, number, -1],
  ["first token, half below", (run) => run.ttft?.p50 / 1000, duration, -1], ["first token, 95% below", (run) => run.ttft?.p95 / 1000, duration, -1],
  ["between tokens, half below", (run) => run.itl?.p50 / 1000, duration, -1], ["between tokens, 95% below", (run) => run.itl?.p95 / 1000, duration, -1],
  ["whole answer, half below", (run) => run.e2e?.p50 / 1000, duration, -1], ["whole answer, 95% below", (run) => run.e2e?.p95 / 1000, duration, -1],
];

export class LoadView {
  constructor(root, feed) {
    this.feed = feed;
    this.runs = [];
    this.picked = [];
    this.workload = make("select", {}, ...Object.entries(WORKLOADS).map(([value, text]) => make("option", { value }, text)));
    this.users = make("input", { type: "number", min: 1, max: 128, value: 16 });
    this.seconds = make("input", { type: "number", min: 1, max: 120, value: 10 });
    this.policy = make("select", {}, make("option", { value: "" }, "that of the server"));
    this.policyRow = make("label", { hidden: true }, "Policy", this.policy);
    this.start = make("button", { class: "first" }, "Start");
    this.end = make("button", { type: "button", disabled: true, onclick: () => this.cancel() }, "End it");
    this.problem = make("p", { class: "bad", role: "alert" });
    this.chips = make("div", { class: "chips", role: "group", "aria-label": "Runs; two are shown" });
    this.cards = make("div", { class: "runs" });
    this.report = new ReportView();
    root.append(
      make("section", { class: "panel", "aria-label": "A load" }, make("div", { class: "head" }, make("h2", {}, "A load against this server"), make("p", { class: "faint" }, "Users that each wait for their answer, in the server itself. Watch them in the ", make("a", { href: "#engine" }, "Engine view"), ".")),
        make("form", { class: "form", onsubmit: (event) => { event.preventDefault(); this.begin(); } }, make("label", {}, "Workload", this.workload), make("label", {}, "Users", this.users), make("label", {}, "Seconds", this.seconds), this.policyRow, this.start, this.end), this.problem),
      this.chips, this.cards, this.report.element);
    addEventListener("shoal-theme", () => this.draw());
    addEventListener("resize", () => this.draw());
  }

  shown(isShown) {
    this.isShown = isShown;
    clearInterval(this.timer);
    if (isShown) {
      this.look();
      this.timer = setInterval(() => this.look(), POLL_MS);
    }
  }

  async look() {
    try {
      const { data, policies } = await get("v1/engine/loads");
      this.take(data, policies);
    } catch (error) {
      say(this.problem, error.status === 404 ? "This server has no loads: page is off." : error.message);
    }
  }

  take(runs, policies) {
    const isNew = runs[0]?.id !== this.runs[0]?.id;
    this.runs = runs;
    if (this.policy.length !== policies.length + 1) {
      this.policy.replaceChildren(make("option", { value: "" }, "that of the server"), ...policies.map((name) => make("option", {}, name)));
      this.policyRow.hidden = !policies.length;
    }
    if (isNew) this.picked = runs.slice(0, 2).map(({ id }) => id).reverse();
    const isRunning = runs[0]?.state === "running";
    [this.start.disabled, this.end.disabled] = [isRunning, !isRunning];
    const stamp = JSON.stringify([runs, this.picked]);
    if (stamp !== this.stamp) {
      this.stamp = stamp;
      this.draw();
    }
  }

  async begin() {
    say(this.problem, "");
    this.start.disabled = true;
    try {
      await get("v1/engine/loads", { body: { workload: this.workload.value, users: Number(this.users.value), seconds: Number(this.seconds.value), policy: this.policy.value || null } });
    } catch (error) {
      say(this.problem, error.message);
      this.start.disabled = false;
    }
    await this.look();
  }

  async cancel() {
    try { await get(`v1/engine/loads/${this.runs[0].id}`, { method: "DELETE" }); } catch (error) { say(this.problem, error.message); }
    await this.look();
  }

  // -- drawing -----------------------------------------------------------------------------------------------------

  draw() {
    if (!this.isShown) return;
    this.chips.replaceChildren(...this.runs.map((run) => make("button", { type: "button", "aria-pressed": String(this.picked.includes(run.id)), onclick: () => { this.picked = [...this.picked.filter((id) => id !== run.id), run.id].slice(-2); this.draw(); } }, `${run.policy}, ${run.workload}, ${plural(run.users, "user")}${run.state === "running" ? ", now" : ""}`)));
    const shown = this.picked.map((id) => this.runs.find((run) => run.id === id)).filter(Boolean);
    const most = Math.max(...shown.flatMap(({ timeline }) => timeline), 1);
    this.cards.replaceChildren(...shown.map((run) => this.card(run, shown.find((other) => other !== run))));
    shown.forEach((run, index) => this.picture(this.cards.children[index].querySelector("canvas"), run, most));
  }

  card(run, other) {
    const told = FIGURES.map(([name, of, words, sign]) => {
      const [mine, its] = [of(run), other && of(other)], isBetter = other && Number.isFinite(mine) && Number.isFinite(its) && sign * (mine - its) > Math.abs(its) * 0.02;
      return [make("dt", {}, name), make("dd", { class: isBetter ? "better" : undefined }, words(mine ?? NaN), isBetter ? make("span", { class: "unseen" }, " (better)") : "")];
    });
    return make("section", { class: "panel run", "aria-label": `Run under ${run.policy}` },
      make("div", { class: "head" }, make("h2", {}, run.policy), make("p", { class: "faint" }, `${run.workload}, ${plural(run.users, "user")}, ${run.state === "running" ? `${duration(run.elapsed)} of ${duration(run.seconds)}` : `${run.state} after ${duration(run.elapsed)}`}`)),
      make("canvas", { role: "img", "aria-label": `Output tokens a second over time: ${number(run.tokens_per_second)} on average` }), make("dl", { class: "pairs" }, ...told.flat()), run.problem && make("p", { class: "bad" }, run.problem));
  }

  picture(canvas, run, most) {
    const [draw, width, height] = columns(canvas, run.timeline, { name: "decode", most, seconds: run.seconds / TIMELINE_SECONDS });
    draw.fillStyle = colour("faint");
    draw.font = "10px system-ui, sans-serif";
    draw.fillText(`${number(most / TIMELINE_SECONDS)} tokens/s`, 2, 10);
    draw.fillText("0 s", 2, height - 3);
    draw.textAlign = "right";
    draw.fillText(`${number(run.seconds)} s`, width - 2, height - 3);
  }
}
