// The engine at work: the batch, the queue, the blocks, the time; and the hands that stop it on the screen and step back.

import { ask } from "./api.js";
import { BatchView } from "./batch.js";
import { line, stacks } from "./charts.js";
import { bytes, duration, make, number, plural, say, share, short } from "./dom.js";
import { ExpertsView } from "./experts.js";
import { WAIT } from "./feed.js";
import { LifeView } from "./life.js";
import { PoolView } from "./pool.js";

const PARTS = [["schedule", "schedule"], ["build", "build"], ["forward", "forward"], ["sample", "sample"], ["propose", "divide and draft"], ["update", "update"], ["send", "send"]];
const PART_COLOURS = ["pause", "prefill", "decode", "shared", "accepted", "rejected", "padding"];
const REASONS = { policy: "held back by the policy", rows: "all rows are taken", budget: "the step has no tokens left", behind: "behind the first" };
const MEMORY_MS = 3000, MOST_QUEUED = 10;

export class EngineView {
  constructor(root, feed) {
    this.feed = feed;
    this.root = root;
    this.selected = "";
    this.isShown = this.isDue = false;
    const select = (id) => this.select(id);
    [this.batch, this.pool, this.experts, this.life] = [new BatchView(feed, select), new PoolView(feed, select), new ExpertsView(feed), new LifeView(feed, select)];
    root.append(this.notice(), this.idle(), this.tiles(), this.time(), make("div", { class: "columns" },
      make("div", { class: "column" }, this.batch.element, this.life.element, this.split()),
      make("div", { class: "column" }, this.queue(), this.pool.element, this.experts.element, this.speculation(), this.memory())));
    feed.addEventListener("change", () => this.soon());
    addEventListener("shoal-theme", () => this.soon());
    addEventListener("resize", () => this.soon());
    addEventListener("shoal-info", ({ detail }) => { this.info = detail; this.soon(); });
    addEventListener("keydown", (event) => this.press(event));
  }

  shown(isShown) {
    this.isShown = isShown;
    clearInterval(this.timer);
    if (isShown) {
      this.measure();
      this.timer = setInterval(() => this.measure(), MEMORY_MS);
      this.soon();
    }
  }

  /** Draw at the next frame, once. */
  soon() {
    if (!this.isShown || this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => { this.isDue = false; this.draw(); });
  }

  select(id) {
    this.selected = id;
    this.find.value = id;
    this.soon();
  }

  // -- the parts ---------------------------------------------------------------------------------------------------

  notice() {
    this.noticeText = make("p", { class: "notice", role: "status" });
    return this.noticeText;
  }

  /** What to do while nothing runs. */
  idle() {
    const start = async () => {
      try { await ask("v1/engine/loads", { body: { workload: "mixed", users: 24, seconds: 20 } }); } catch (error) { say(this.idleText, error.message); }
    };
    this.idleText = make("span", { role: "status" }, "Nothing runs. Talk in the Playground, or let some users come.");
    this.idleBox = make("div", { class: "panel idle", hidden: true }, this.idleText, make("button", { type: "button", class: "first", onclick: start }, "Start a load"));
    return this.idleBox;
  }

  tiles() {
    const tile = (name) => {
      const [value, canvas] = [make("span"), make("canvas", { "aria-hidden": "true" })], unit = make("small");
      return { value, unit, canvas, element: make("div", { class: "tile" }, make("dt", {}, name), make("dd", {}, value, " ", unit), canvas) };
    };
    this.tile = { output: tile("Output"), steps: tile("Steps"), batch: tile("Batch"), blocks: tile("KV cache"), hits: tile("Prefix hits"), drafts: tile("Drafts kept") };
    return make("dl", { class: "tiles" }, ...Object.values(this.tile).map(({ element }) => element));
  }

  time() {
    this.pause = make("button", { type: "button", class: "first", onclick: () => (this.feed.paused ? this.feed.resume() : this.feed.pause()) }, "Pause");
    this.back = make("button", { type: "button", "aria-label": "One step back", onclick: () => this.feed.look(this.feed.at - 1) }, "◀");
    this.on = make("button", { type: "button", "aria-label": "One step on", onclick: () => this.feed.look(this.feed.at + 1) }, "▶");
    this.slider = make("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Time", oninput: () => this.feed.look(Number(this.slider.value)) });
    this.where = make("output");
    this.known = make("datalist", { id: "known-requests" });
    this.find = make("input", { list: "known-requests", placeholder: "Find a request", "aria-label": "Find a request", spellcheck: "false", onfocus: () => this.list(), onchange: () => this.jump() });
    const jump = make("button", { type: "button", onclick: () => this.jump() }, "Go to its start");
    return make("div", { class: "panel time", role: "toolbar", "aria-label": "Time" }, this.pause, this.back, this.on, this.slider, this.where, make("span", { class: "find" }, this.find, this.known, jump));
  }

  queue() {
    this.queueText = make("p", { class: "faint" });
    this.queueList = make("ol", { class: "queue" });
    return make("section", { class: "panel", "aria-label": "Waiting queue" }, make("div", { class: "head" }, make("h2", {}, "Waiting"), this.queueText), this.queueList);
  }

  split() {
    this.splitBar = make("div", { class: "split", "aria-hidden": "true" }, ...PARTS.map((_, index) => make("i", { class: `p${index}` })));
    this.partTexts = PARTS.map(() => make("dd"));
    this.splitCanvas = make("canvas", { role: "img", class: "history", "aria-label": "Time of the last steps, by part" });
    this.splitText = make("p", { class: "faint" });
    return make("section", { class: "panel", "aria-label": "Time of a step" }, make("div", { class: "head" }, make("h2", {}, "Time of a step"), this.splitText), this.splitBar,
      make("dl", { class: "partlist" }, ...PARTS.map(([, name], index) => make("div", {}, make("dt", {}, make("i", { class: `p${index}` }), name), this.partTexts[index]))), this.splitCanvas);
  }

  speculation() {
    this.draftTexts = { method: make("dd"), k: make("dd"), rate: make("dd"), length: make("dd") };
    this.positions = make("div", { class: "positions", role: "img", "aria-label": "Acceptance by place in the proposal" });
    this.draftsPanel = make("section", { class: "panel", "aria-label": "Speculation" }, make("div", { class: "head" }, make("h2", {}, "Speculation")),
      make("dl", { class: "pairs" }, make("dt", {}, "method"), this.draftTexts.method, make("dt", {}, "drafted tokens a proposal (k)"), this.draftTexts.k, make("dt", {}, "accepted"), this.draftTexts.rate, make("dt", {}, "tokens a verified row"), this.draftTexts.length), this.positions);
    return this.draftsPanel;
  }

  memory() {
    this.memoryTexts = { cache: make("dd"), engine: make("dd"), api: make("dd"), policy: make("dd"), limits: make("dd") };
    return make("section", { class: "panel", "aria-label": "Memory and limits" }, make("div", { class: "head" }, make("h2", {}, "Memory and limits")),
      make("dl", { class: "pairs" }, make("dt", {}, "KV cache"), this.memoryTexts.cache, make("dt", {}, "engine process"), this.memoryTexts.engine, make("dt", {}, "API process"), this.memoryTexts.api, make("dt", {}, "policy"), this.memoryTexts.policy, make("dt", {}, "rows, tokens a step"), this.memoryTexts.limits));
  }

  // -- hands -------------------------------------------------------------------------------------------------------

  press(event) {
    if (!this.isShown || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, textarea, canvas")) return;
    if (event.key === " " && event.target.closest?.("button, summary, a")) return;
    const does = { " ": () => (this.feed.paused ? this.feed.resume() : this.feed.pause()), ArrowLeft: () => this.feed.look(this.feed.at - 1), ArrowRight: () => this.feed.look(this.feed.at + 1), l: () => this.feed.resume() };
    if (!does[event.key]) return;
    event.preventDefault();
    does[event.key]();
  }

  list() {
    this.known.replaceChildren(...[...this.feed.lives.all.keys()].slice(-60).reverse().map((id) => make("option", { value: id })));
  }

  jump() {
    const wanted = this.find.value.trim(), life = this.feed.lives.all.get(wanted) ?? [...this.feed.lives.all.values()].findLast((one) => wanted && one.id.includes(wanted));
    if (!life) return;
    this.select(life.id);
    const begun = life.segments.find(({ state }) => !state.startsWith("wait"));
    if (begun) this.feed.lookAt(begun.from);
  }

  // -- drawing -----------------------------------------------------------------------------------------------------

  draw() {
    const { feed } = this, entry = feed.entries[feed.at];
    const words = { refused: `The engine's events cannot be had: ${feed.problem}`, connecting: feed.entries.length ? "The stream was cut; it goes on as soon as the server answers." : "Waiting for the engine." };
    const notice = words[feed.state] ?? (feed.isAlive || feed.state === "off" ? "" : "The engine has died. Another one takes its place, and the requests go on in it.");
    say(this.noticeText, notice);
    this.noticeText.hidden = !notice;
    this.drawTime(entry);
    if (!entry) return;
    this.idleBox.hidden = Boolean(feed.paused) || Boolean(notice) || entry.running > 0 || entry.waiting > 0;
    const step = feed.step(entry);
    this.batch.draw(this.selected);
    this.pool.draw(this.selected);
    this.life.draw(this.selected);
    this.experts.draw();
    this.drawTiles(entry);
    this.drawQueue(step);
    this.drawSplit();
    this.drawSpeculation();
    say(this.memoryTexts.policy, step.policy);
    if (feed.limits) say(this.memoryTexts.limits, `${feed.limits.max_num_seqs}, ${feed.limits.max_num_batched_tokens}`);
    if (this.info) say(this.memoryTexts.cache, bytes(this.info.kv_cache_bytes));
  }

  drawTime(entry) {
    const { feed } = this, last = feed.entries.at(-1);
    say(this.pause, feed.paused ? "Go live" : "Pause");
    this.pause.setAttribute("aria-pressed", String(Boolean(feed.paused)));
    this.back.disabled = !entry || feed.at <= 0;
    this.on.disabled = !feed.paused || feed.at >= feed.entries.length - 1;
    this.slider.max = Math.max(feed.entries.length - 1, 0);
    this.slider.value = Math.max(feed.at, 0);
    const text = !entry ? "nothing yet" : feed.paused ? `${duration(last.at - entry.at)} ago, step ${entry.number}` : `live, step ${entry.number}`;
    say(this.where, text);
    this.slider.setAttribute("aria-valuetext", text);
  }

  drawTiles(entry) {
    const { feed, tile } = this, sums = feed.recent(1.5), to = entry.at, seconds = 60;
    const over = (value) => {
      const points = [];
      let [time, sum, span] = [0, 0, 0];
      for (let at = feed.at; at >= 0 && feed.entries[at].at > to - seconds; at -= 1) {
        const one = feed.entries[at];
        [sum, span, time] = [sum + value(one) * one.seconds, span + one.seconds, one.at];
        if (span >= 0.4) {
          points.push([time, sum / span]);
          [sum, span] = [0, 0];
        }
      }
      return points.reverse();
    };
    const rate = (count) => (one) => (one.seconds ? count(one) / one.seconds : 0);
    const show = ({ value, unit, canvas }, text, what, points, name, most) => {
      say(value, text);
      say(unit, what);
      line(canvas, points, { to, seconds, name, most });
    };
    const idle = sums.seconds === 0;
    show(tile.output, idle ? "0" : number(sums.output / sums.seconds), "tokens/s", over(rate((one) => one.numOutput)), "decode");
    show(tile.steps, idle ? "0" : number(sums.steps / sums.seconds), "a second", over(rate((one) => one.numSteps)), "accent");
    show(tile.batch, number(entry.running), `of ${feed.limits?.max_num_seqs ?? "?"}, ${entry.waiting} waiting`, over((one) => one.running), "prefill", feed.limits?.max_num_seqs / 2);
    show(tile.blocks, share(entry.owned / entry.blocks), `${entry.owned} of ${entry.blocks}`, over((one) => one.owned), "accepted");
    const lately = feed.recent(20);
    show(tile.hits, share(lately.hits / lately.queries), "in 20 s", over(rate((one) => one.hits)), "pause");
    show(tile.drafts, share(lately.accepted / lately.drafted), lately.drafted ? "in 20 s" : "no drafts", over(rate((one) => one.accepted)), "accepted");
  }

  drawQueue(step) {
    say(this.queueText, step.num_waiting ? `${plural(step.num_waiting, "request")}, in the order of ${step.policy}` : "nobody waits");
    const lines = step.waiting.slice(0, MOST_QUEUED).map((one) => ({
      id: one[WAIT.id],
      age: duration(one[WAIT.age]),
      why: `${one[WAIT.reason] === "blocks" ? `needs ${plural(one[WAIT.blocks], "block")}, ${step.num_blocks - step.num_owned_blocks} are left` : REASONS[one[WAIT.reason]]}${one[WAIT.preemptions] ? `; preempted${one[WAIT.gaveWayTo] && one[WAIT.gaveWayTo] !== one[WAIT.id] ? ` for ${short(one[WAIT.gaveWayTo])}` : ""}` : ""}`,
    }));
    while (this.queueList.children.length > lines.length) this.queueList.lastChild.remove();
    while (this.queueList.children.length < lines.length) {
      const id = make("button", { type: "button", class: "id", onclick: () => this.select(id.value) });
      this.queueList.append(make("li", {}, id, make("span"), make("span", { class: "why" })));
    }
    lines.forEach(({ id, age, why }, index) => {
      const [button, time, reason] = this.queueList.children[index].children;
      button.value = id;
      button.classList.toggle("chosen-id", id === this.selected);
      say(button, short(id));
      say(time, age);
      say(reason, why);
    });
  }

  drawSplit() {
    const { feed } = this, { parts, measured } = feed.recent(2), whole = parts.reduce((sum, part) => sum + part, 0);
    if (!measured) return;
    parts.forEach((part, index) => {
      this.splitBar.children[index].style.flexGrow = part / whole;
      say(this.partTexts[index], duration(part / measured));
    });
    say(this.splitText, `${duration(whole / measured)} on average`);
    const columns = [];
    for (let at = feed.at; at >= 0 && columns.length < 200; at -= 1) if (feed.entries[at].parts) columns.push([...feed.entries[at].parts]);
    const top = stacks(this.splitCanvas, columns.reverse(), PART_COLOURS);
    this.splitCanvas.setAttribute("aria-label", `Time of the last ${columns.length} measured steps, by part; nearly all take less than ${duration(top)}`);
  }

  drawSpeculation() {
    const method = this.info?.settings.speculation.method ?? "off";
    this.draftsPanel.hidden = method === "off";
    if (method === "off") return;
    const { feed } = this, sums = feed.recent(20), perPosition = [];
    let [rows, drafted, kept] = [0, 0, 0];
    for (let at = feed.at; at >= Math.max(feed.at - 200, 0); at -= 1) {
      const entry = feed.entries[at];
      entry.perPosition.forEach((count, index) => { perPosition[index] = (perPosition[index] ?? 0) + count; });
      for (const [count, accepted] of entry.proposals) [rows, drafted, kept] = [rows + 1, drafted + count, kept + accepted];
    }
    say(this.draftTexts.method, method);
    say(this.draftTexts.k, rows ? number(drafted / rows) : "–");
    say(this.draftTexts.rate, share(sums.accepted / sums.drafted));
    say(this.draftTexts.length, rows ? number(1 + kept / rows) : "–");
    const most = Math.max(...perPosition, 1);
    while (this.positions.children.length > perPosition.length) this.positions.lastChild.remove();
    while (this.positions.children.length < perPosition.length) this.positions.append(make("i"));
    perPosition.forEach((count, index) => { this.positions.children[index].style.height = `${(100 * count) / most}%`; });
  }

  /** Memory of the processes, from the metrics. */
  async measure() {
    try {
      const text = await (await ask("metrics")).text();
      const read = (name) => Number(text.match(new RegExp(`^${name}(?:{[^}]*})? ([0-9.e+]+)$`, "m"))?.[1] ?? NaN);
      say(this.memoryTexts.engine, bytes(read("shoal:engine_resident_memory_bytes")));
      say(this.memoryTexts.api, bytes(read("process_resident_memory_bytes")));
    } catch { /* the next look may have an answer */ }
  }
}
