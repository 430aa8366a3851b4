// The lives of requests, each on one line: why it waited, what was computed, and what it gave way to.

import { duration, make, plural, short } from "./dom.js";
import { colour, prepared, widthOf, within } from "./palette.js";
import { hideTip, showTip } from "./tip.js";

const WAITS = {
  policy: "the policy held it back", rows: "all rows were taken", blocks: "there were too few blocks", budget: "the step had no tokens left",
  behind: "one before it had to wait",
};
const HIGH = 9, MOST_LINES = 28, AXIS = 14, LEAST_SECONDS = 0.5, MOST_SECONDS = 60;

function stateWords({ state, blocks, by }) {
  const [kind, reason] = state.split("-");
  if (kind === "wait" || kind === "again") {
    const why = reason === "blocks" && blocks ? `it needed ${plural(blocks, "block")}, and there were fewer` : WAITS[reason];
    return kind === "wait" ? `waited: ${why}` : `preempted${by ? ` for ${short(by)}` : ""}, waited: ${why}`;
  }
  return { prefill: "prompt computed", decode: "decoded", pause: "paused by the policy", padding: "padding", lost: "the engine died; waited for the next" }[state] ?? state;
}

function colourName(state) {
  if (state.startsWith("wait")) return "wait";
  if (state.startsWith("again") || state === "lost") return "rejected";
  return state;
}

export class LifeView {
  constructor(feed, select) {
    this.feed = feed;
    this.canvas = make("canvas", { role: "img", "aria-label": "Lives of the last requests" });
    this.title = make("p", { class: "faint" });
    this.list = make("ol", { tabindex: 0, "aria-label": "The life of the chosen request" });
    const legend = [["wait", "waits"], ["prefill", "prefill"], ["decode", "decodes"], ["pause", "paused"], ["rejected", "preempted, or without an engine"]];
    this.element = make("section", { class: "panel life", "aria-label": "Lives of requests" }, make("div", { class: "head" }, make("h2", {}, "Lives of requests"), this.title), this.canvas,
      make("div", { class: "legend" }, ...legend.map(([kind, text]) => make("span", {}, make("i", { class: kind }), text))), this.list);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", hideTip);
    this.canvas.addEventListener("click", (event) => { const life = this.lifeAt(event); if (life) select(life.id); });
  }

  draw(selected) {
    const { feed } = this, entry = feed.entries[feed.at];
    if (!entry) return;
    const now = entry.at, all = [...feed.lives.all.values()].filter((life) => life.arrived <= now);
    const chosen = feed.lives.all.get(selected);
    let shown = all.slice(-MOST_LINES);
    if (chosen && chosen.arrived <= now && !shown.includes(chosen)) shown = [chosen, ...shown.slice(1)];
    const seconds = Math.min(now - Math.min(...shown.map((life) => life.arrived), now - LEAST_SECONDS), MOST_SECONDS), from = now - seconds;
    const [draw, width, height] = prepared(this.canvas, Math.max(shown.length, 6) * HIGH + AXIS);
    const x = (time) => Math.max(((time - from) / seconds) * width, 0);
    [this.shown, this.from, this.seconds] = [shown, from, seconds];
    shown.forEach((life, index) => {
      const y = index * HIGH;
      for (const segment of life.segments) {
        if (segment.to < from || segment.from > now) continue;
        const name = colourName(segment.state), left = x(segment.from), wide = Math.max(x(Math.min(segment.to, now)) - left, 1);
        draw.fillStyle = colour(name);
        if (name === "wait") draw.fillRect(left, y + 3, wide, 2);
        else draw.fillRect(left, y + 1, wide, HIGH - 3);
      }
      if (life.id === selected) {
        draw.fillStyle = colour("mark");
        draw.fillRect(0, y + HIGH - 1.5, width, 1.5);
      }
      for (const { at } of life.preemptions) {
        if (at >= from && at <= now) {
          draw.fillStyle = colour("mark");
          draw.fillRect(x(at) - 1, y, 2, HIGH - 1);
        }
      }
    });
    draw.fillStyle = colour("line");
    draw.fillRect(0, height - AXIS, width, 1);
    draw.fillStyle = colour("faint");
    draw.font = "10px system-ui, sans-serif";
    draw.textAlign = "left";
    draw.fillText(`${duration(seconds)} before`, 0, height - 2);
    draw.textAlign = "right";
    draw.fillText(this.feed.paused ? "the step that is shown" : "now", width, height - 2);
    this.tell(chosen);
    const text = chosen ? "" : `the last ${plural(shown.length, "request")}, ${duration(seconds)}; choose one`;
    if (!chosen && this.title.textContent !== text) this.title.textContent = text;
    this.canvas.setAttribute("aria-label", `Lives of the last ${plural(shown.length, "request")}`);
  }

  /** The life of the chosen request in words. */
  tell(life) {
    const stamp = life ? `${life.id} ${life.segments.length} ${life.ended} ${Math.round((life.segments.at(-1)?.to ?? 0) * 4)}` : "";
    if (stamp === this.stamp) return;
    this.stamp = stamp;
    this.list.hidden = !life;
    if (!life) return;
    const end = life.ended ?? life.segments.at(-1)?.to ?? life.arrived;
    this.title.textContent = `${life.id}: ${duration(end - life.arrived)}${life.ended ? "" : " so far"}, prompt of ${plural(life.prompt, "token")}${life.cached ? ` (${life.cached} cached)` : ""}, now ${life.tokens}`;
    this.list.replaceChildren(...life.segments.filter(({ from, to }) => to > from).map((segment) => make("li", {}, make("i", { class: colourName(segment.state) }), make("span", { class: "mono" }, duration(segment.to - segment.from)), stateWords(segment))));
  }

  lifeAt(event) {
    return this.shown?.[Math.floor(within(this.canvas, event)[1] / HIGH)];
  }

  hover(event) {
    const life = this.lifeAt(event);
    if (!life) return hideTip();
    const time = this.from + (within(this.canvas, event)[0] / widthOf(this.canvas)) * this.seconds;
    const segment = life.segments.find((one) => one.from <= time && time <= one.to);
    return showTip(`${short(life.id)}${segment ? `: ${stateWords(segment)}, ${duration(segment.to - segment.from)}` : ""}`, event.clientX, event.clientY);
  }
}
