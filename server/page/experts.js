// How the router spreads tokens over the experts, layer by layer.

import { make } from "./dom.js";
import { colour, prepared, within } from "./palette.js";
import { hideTip, showTip } from "./tip.js";

export class ExpertsView {
  constructor(feed) {
    this.feed = feed;
    this.canvas = make("canvas", { role: "img", "aria-label": "Load of the experts, by layer" });
    this.summary = make("p", { class: "faint" });
    this.element = make("section", { class: "panel", "aria-label": "Experts", hidden: true }, make("div", { class: "head" }, make("h2", {}, "Experts"), this.summary), this.canvas,
      make("p", { class: "faint" }, "A line for each layer, a cell for each expert: the darker or brighter, the more rows the router sends there, in the last seconds."));
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", hideTip);
  }

  draw() {
    const { experts } = this.feed;
    this.element.hidden = !experts?.length;
    if (!experts?.length) return;
    const count = experts[0].length, high = experts.length > 24 ? 8 : 15;
    const [draw, width] = prepared(this.canvas, experts.length * high), left = 26, wide = (width - left) / count;
    [this.high, this.wide, this.left] = [high, wide, left];
    const top = Math.max(...experts.map((layer) => Math.max(...layer) / (sum(layer) || 1)), 1 / count);
    draw.font = "10px ui-monospace, Menlo, monospace";
    draw.textBaseline = "middle";
    experts.forEach((layer, l) => {
      const all = sum(layer) || 1;
      draw.globalAlpha = 1;
      draw.fillStyle = colour("faint");
      if (high > 8) draw.fillText(String(l), 2, l * high + high / 2);
      layer.forEach((value, e) => {
        draw.globalAlpha = 1;
        draw.fillStyle = colour("empty");
        draw.fillRect(left + e * wide, l * high, wide - 1, high - 1);
        draw.globalAlpha = value / all / top;
        draw.fillStyle = colour("accent");
        draw.fillRect(left + e * wide, l * high, wide - 1, high - 1);
      });
    });
    draw.globalAlpha = 1;
    // 1 if all experts of a layer have as much, more if some have too much: the mean over the layers.
    const skew = experts.map((layer) => (Math.max(...layer) * count) / (sum(layer) || Infinity)).reduce((a, b) => a + b, 0) / experts.length;
    const text = `the fullest has ${skew.toFixed(1)} times its share`;
    if (this.summary.textContent !== text) {
      this.summary.textContent = text;
      this.canvas.setAttribute("aria-label", `Load of ${count} experts in ${experts.length} layers: on average ${text}.`);
    }
  }

  hover(event) {
    const [x, y] = within(this.canvas, event), l = Math.floor(y / this.high), e = Math.floor((x - this.left) / this.wide);
    const layer = this.feed.experts?.[l];
    if (!layer || e < 0 || e >= layer.length) return hideTip();
    return showTip(`Layer ${l}, expert ${e}: ${((100 * layer[e]) / (sum(layer) || 1)).toFixed(1)}% of the rows`, event.clientX, event.clientY);
  }
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
