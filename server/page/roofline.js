// The roofline: what a machine can compute and read at once, and where the steps of a plan stand under it.

import { make, number, prefixed } from "./dom.js";
import { colour, prepared, within } from "./palette.js";
import { hideTip, showTip } from "./tip.js";

const HEIGHT = 300, LEFT = 56, RIGHT = 20, TOP = 18, BOTTOM = 38, NEAR = 12;

export class Roofline {
  constructor() {
    this.canvas = make("canvas", { role: "img" });
    this.summary = make("p", { class: "faint" });
    const legend = [["prefill", "prefill"], ["decode", "decode, by sequences"]].map(([kind, text]) => make("span", {}, make("i", { class: kind }), text));
    this.element = make("section", { class: "panel", "aria-label": "Roofline", hidden: true }, make("div", { class: "head" }, make("h2", {}, "Roofline"), this.summary), this.canvas, make("div", { class: "legend" }, ...legend));
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", hideTip);
  }

  show(plan) {
    this.plan = plan;
    this.element.hidden = false;
    const { computed_in_a_second_flops: rate, read_in_a_second_bytes: bandwidth, ridge_flops_per_byte: ridge } = plan.facts;
    this.summary.textContent = `${plan.machine.name}: ${prefixed(rate, "FLOP/s")}, ${prefixed(bandwidth, "B/s")}; from ${number(ridge)} FLOPs a byte on, computing is the limit`;
    this.canvas.setAttribute("aria-label", `Roofline. ${this.summary.textContent}. Its steps are in the table "Roofline".`);
    this.draw();
  }

  draw() {
    if (!this.plan || this.element.hidden || !this.canvas.clientWidth) return;
    const { facts, steps, context } = this.plan, rate = facts.computed_in_a_second_flops, bandwidth = facts.read_in_a_second_bytes;
    const [draw, width] = prepared(this.canvas, HEIGHT), shown = steps.filter(({ length }) => length === context);
    const intensities = [rate / bandwidth, ...shown.map((step) => step.flops_per_byte)].map(Math.log10);
    const [left, right] = [Math.floor(Math.min(...intensities)), Math.ceil(Math.max(...intensities) + 0.3)];
    const [bottom, top] = [Math.floor(left + Math.log10(bandwidth)), Math.ceil(Math.log10(rate) + 0.1)];
    const x = (intensity) => LEFT + ((Math.log10(intensity) - left) / (right - left)) * (width - LEFT - RIGHT);
    const y = (flops) => HEIGHT - BOTTOM - ((Math.log10(flops) - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
    draw.font = "11px system-ui, sans-serif";
    draw.fillStyle = colour("faint");
    draw.strokeStyle = colour("line");
    draw.lineWidth = 1;
    for (let power = left; power <= right; power += 1) {
      stroke(draw, [[x(10 ** power), TOP], [x(10 ** power), HEIGHT - BOTTOM]]);
      draw.textAlign = "center";
      draw.fillText(power < 0 ? (10 ** power).toFixed(-power) : prefixed(10 ** power), x(10 ** power), HEIGHT - BOTTOM + 15);
    }
    for (let power = bottom; power <= top; power += 1) {
      stroke(draw, [[LEFT, y(10 ** power)], [width - RIGHT, y(10 ** power)]]);
      draw.textAlign = "right";
      draw.fillText(prefixed(10 ** power), LEFT - 8, y(10 ** power) + 4);
    }
    draw.textAlign = "center";
    draw.fillText("FLOPs for each byte that is read", (LEFT + width - RIGHT) / 2, HEIGHT - 6);
    draw.textAlign = "left";
    draw.fillText("FLOP/s", 4, 11);
    draw.strokeStyle = colour("ink");
    draw.lineWidth = 2;
    stroke(draw, [[x(10 ** left), y(10 ** left * bandwidth)], [x(rate / bandwidth), y(rate)], [x(10 ** right), y(rate)]]);
    this.points = shown.map((step) => ({ step, at: [x(step.flops_per_byte), y(step.flops / step.seconds)] }));
    for (const { step, at } of this.points) {
      const isDecode = step.step === "decode";
      draw.fillStyle = colour(step.step);
      draw.beginPath();
      if (isDecode) draw.arc(...at, 5.5, 0, 7);
      else draw.rect(at[0] - 5, at[1] - 5, 10, 10);
      draw.fill();
      draw.fillStyle = colour("ink");
      draw.fillText(isDecode ? String(step.sequences) : "prefill", at[0] + 7, at[1] + 17);
    }
  }

  hover(event) {
    const [x, y] = within(this.canvas, event), found = this.points?.find(({ at }) => Math.hypot(at[0] - x, at[1] - y) < NEAR);
    if (!found) return hideTip();
    const { step } = found;
    return showTip(`${step.step}, ${step.sequences === 1 ? "1 sequence" : `${step.sequences} sequences`} of ${number(step.length)} tokens\nat most ${prefixed(step.tokens_per_second, "tokens/s")}; ${step.limit} is the limit`, event.clientX, event.clientY);
  }
}

function stroke(draw, points) {
  draw.beginPath();
  for (const [x, y] of points) draw.lineTo(x, y);
  draw.stroke();
}
