// The batch: on the left its rows, step after step; on the right what each row is and how far it has come.

import { make, plural, short } from "./dom.js";
import { KINDS, ROW } from "./feed.js";
import { colour, prepared, rowColour, widthOf, within } from "./palette.js";
import { hideTip, showTip } from "./tip.js";

const COLUMN = 7, GAP = 12, LEAST_ROWS = 8;
const WORDS = { prefill: "prompt is computed", decode: "decodes", pause: "pauses", padding: "padding" };

export class BatchView {
  /** `select` is told of the request that is clicked. */
  constructor(feed, select) {
    this.feed = feed;
    this.select = select;
    this.canvas = make("canvas", { role: "img", "aria-label": "The batch, a row for each sequence", tabindex: 0 });
    this.summary = make("p", { class: "faint" });
    const legend = [["prefill", "", "prefill"], ["decode", "", "decode"], ["accepted", "", "drafts accepted"], ["rejected", "hollow", "drafts rejected"], ["padding", "hatched", "padding"], ["pause", "hollow", "paused"], ["empty", "", "empty"]];
    this.table = make("tbody");
    const head = ["Row", "Request", "Does", "Tokens", "This step", "Drafted", "Kept"].map((name) => make("th", { scope: "col" }, name));
    this.details = make("details", { ontoggle: () => this.fillTable() }, make("summary", {}, "The step as a table"),
      make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "The step as a table" }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), this.table)));
    this.element = make("section", { class: "panel", "aria-label": "Batch" },
      make("div", { class: "head" }, make("h2", {}, "Batch"), this.summary), this.canvas,
      make("div", { class: "legend" }, ...legend.map(([kind, shape, text]) => make("span", {}, make("i", { class: `${kind} ${shape}` }), text))), this.details);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", hideTip);
    this.canvas.addEventListener("click", (event) => this.click(event));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    this.places = { left: 0, height: 12, width: 0, first: 0 };
    this.chosen = null;
  }

  draw(selected) {
    const { feed } = this, at = feed.at, entry = feed.entries[at];
    const step = entry ? feed.step(entry) : { batch: [] };
    const narrow = widthOf(this.canvas) < 560, history = Math.round(widthOf(this.canvas) * (narrow ? 0.34 : 0.46));
    const columns = Math.max(Math.floor(history / COLUMN), 1), first = Math.max(at - columns + 1, 0);
    let most = LEAST_ROWS;
    for (let index = first; index <= at; index += 1) most = Math.max(most, feed.entries[index].rows.length);
    const shown = Math.min(Math.max(most, this.most ?? 0), feed.limits?.max_num_seqs ?? most);
    this.most = Math.max(most, (this.most ?? most) - 0.05); // rows that were there a moment ago do not jump away
    const height = shown > 40 ? 9 : shown > 20 ? 12 : 16;
    const [draw, width] = prepared(this.canvas, shown * height);
    const left = columns * COLUMN;
    this.places = { left, height, width, first, columns };
    const inner = height - (height > 9 ? 3 : 2);

    // Rows, step after step: a colour for what was done, and a shape for those who do not see colours.
    draw.fillStyle = colour("empty");
    for (let row = 0; row < shown; row += 1) draw.fillRect(0, row * height, left, inner);
    for (let index = first; index <= at; index += 1) {
      const { rows } = feed.entries[index], x = (columns - 1 - (at - index)) * COLUMN;
      for (let row = 0; row < rows.length && row < shown; row += 1) {
        if (rows[row]) cell(draw, KINDS[rows[row]], x, row * height, COLUMN - 1, inner);
      }
    }
    draw.fillStyle = colour(feed.paused ? "mark" : "faint");
    draw.fillRect(left - 1, 0, 1, shown * height);

    // What each row is now: computed tokens, those of this step, drafts, and all that it may become.
    const from = left + GAP, name = narrow ? 0 : height > 9 ? 62 : 0, wide = width - from - name;
    const longest = step.batch.reduce((longest, row) => Math.max(longest, row[ROW.most]), 64);
    draw.font = `${Math.min(height - 3, 11)}px ui-monospace, Menlo, monospace`;
    draw.textBaseline = "middle";
    for (const row of step.batch) {
      const y = row[ROW.row] * height, x = (tokens) => from + name + (tokens / longest) * wide;
      if (name) {
        draw.fillStyle = row[ROW.id] === selected ? colour("mark") : colour("faint");
        draw.fillText(short(row[ROW.id]), from, y + inner / 2 + 0.5);
      }
      draw.fillStyle = colour("empty");
      draw.fillRect(x(0), y, x(row[ROW.most]) - x(0), inner);
      draw.fillStyle = rowColour(row[ROW.row]);
      draw.globalAlpha = 0.42;
      draw.fillRect(x(0), y, x(row[ROW.computed]) - x(0), inner);
      draw.globalAlpha = 1;
      if (row[ROW.cached]) {
        draw.fillStyle = colour("cached");
        draw.fillRect(x(0), y + inner - 3, x(row[ROW.cached]) - x(0), 3);
      }
      draw.fillStyle = colour("faint");
      draw.fillRect(x(row[ROW.prompt]) - 0.5, y, 1, inner);
      bar(draw, row, x, y, inner);
      if (row[ROW.id] === selected) {
        draw.strokeStyle = colour("mark");
        draw.lineWidth = 2;
        draw.strokeRect(x(0) - 1, y - 0.5, Math.max(x(row[ROW.most]) - x(0), 4) + 2, inner + 1);
      }
    }
    if (entry) this.describe(entry, step);
    if (this.details.open && feed.paused) this.fillTable();
  }

  describe(entry, step) {
    const scheduled = step.batch.reduce((sum, row) => sum + row[ROW.scheduled], 0);
    const merged = entry.numSteps > 1 ? `, the last of ${entry.numSteps}` : "";
    const text = `Step ${entry.number}${merged}: ${plural(step.batch.length, "row")}, ${plural(scheduled, "token")}`;
    if (this.summary.textContent !== text) {
      this.summary.textContent = text;
      this.canvas.setAttribute("aria-label", `The batch, a row for each sequence. ${text}. The step as a table follows.`);
    }
  }

  fillTable() {
    const entry = this.feed.entries[this.feed.at];
    if (!this.details.open || !entry || this.filled === entry) return;
    this.filled = entry;
    this.table.replaceChildren(...this.feed.step(entry).batch.map((row) => make("tr", {},
      make("td", {}, row[ROW.row]), make("td", {}, make("button", { class: "id", onclick: () => this.select(row[ROW.id]) }, short(row[ROW.id]))),
      make("td", {}, WORDS[row[ROW.state]]), make("td", {}, `${row[ROW.tokens]} of ${row[ROW.most]}`), make("td", {}, row[ROW.scheduled]), make("td", {}, row[ROW.drafted]), make("td", {}, row[ROW.accepted]))));
  }

  // -- hands -------------------------------------------------------------------------------------------------------

  find(event) {
    const [x, y] = within(this.canvas, event), row = Math.floor(y / this.places.height);
    const column = Math.floor(x / COLUMN), { left, columns } = this.places;
    const at = x < left ? this.feed.at - (columns - 1 - column) : this.feed.at;
    const entry = this.feed.entries[at];
    const found = entry && this.feed.step(entry).batch.find((one) => one[ROW.row] === row);
    return { at, entry, found };
  }

  hover(event) {
    const { entry, found } = this.find(event);
    if (!found) hideTip();
    else showTip(`${found[ROW.id]}\nrow ${found[ROW.row]}, step ${entry.number}: ${WORDS[found[ROW.state]]}\n${found[ROW.scheduled]} tokens computed behind ${found[ROW.computed]}; prompt ${found[ROW.prompt]}${found[ROW.cached] ? ` (${found[ROW.cached]} found in the cache)` : ""}, now ${found[ROW.tokens]} of at most ${found[ROW.most]}${found[ROW.drafted] ? `\n${found[ROW.accepted]} of ${found[ROW.drafted]} drafted tokens kept` : ""}${found[ROW.preemptions] ? `\n${plural(found[ROW.preemptions], "preemption")}` : ""}`, event.clientX, event.clientY);
  }

  click(event) {
    const { at, found } = this.find(event);
    if (within(this.canvas, event)[0] < this.places.left && at >= 0) this.feed.look(at);
    if (found) this.select(found[ROW.id]);
  }

  move(event) {
    const moves = { ArrowUp: -1, ArrowDown: 1 };
    const batch = this.feed.entries[this.feed.at] && this.feed.step(this.feed.entries[this.feed.at]).batch;
    if (!(event.key in moves) || !batch?.length) return;
    event.preventDefault();
    const rows = [...batch].sort((a, b) => a[ROW.row] - b[ROW.row]), now = rows.findIndex((row) => row[ROW.id] === this.chosen);
    this.chosen = rows[(now + moves[event.key] + rows.length) % rows.length][ROW.id];
    this.select(this.chosen);
  }
}

/** One row in one step. */
function cell(draw, kind, x, y, width, height) {
  draw.fillStyle = colour(kind);
  if (kind === "rejected" || kind === "pause") {
    draw.strokeStyle = colour(kind);
    draw.lineWidth = 1.5;
    draw.strokeRect(x + 0.75, y + 0.75, width - 1.5, height - 1.5);
  } else if (kind === "padding") {
    for (let line = 0; line < height; line += 3) draw.fillRect(x, y + line, width, 1.5);
  } else {
    draw.fillRect(x, y, width, height);
    if (kind === "accepted") {
      draw.fillStyle = colour("panel");
      draw.fillRect(x + width / 2 - 1, y + height / 2 - 1, 2, 2);
    }
  }
}

/** The tokens of this step in a row's line. */
function bar(draw, row, x, y, height) {
  const [computed, drafted, accepted] = [row[ROW.computed], row[ROW.drafted], row[ROW.accepted]], end = computed + row[ROW.scheduled];
  const least = (from, to) => [x(from), y, Math.max(x(to) - x(from), 3), height];
  draw.fillStyle = colour(row[ROW.state] === "decode" ? "decode" : row[ROW.state]);
  if (end > computed) draw.fillRect(...least(computed, end - drafted));
  if (accepted) {
    draw.fillStyle = colour("accepted");
    draw.fillRect(...least(end - drafted, end - drafted + accepted));
  }
  if (drafted > accepted) {
    draw.strokeStyle = colour("rejected");
    draw.lineWidth = 1.5;
    const [left, top, width, high] = least(end - drafted + accepted, end);
    draw.strokeRect(left + 0.75, top + 0.75, width - 1.5, high - 1.5);
  }
}
