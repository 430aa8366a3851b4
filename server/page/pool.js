// The block pool as a map: a cell for each block, in the colour of the row that owns it.

import { get } from "./api.js";
import { make, plural, short } from "./dom.js";
import { ROW } from "./feed.js";
import { colour, prepared, rowColour, unit, widthOf, within } from "./palette.js";
import { hideTip, showTip } from "./tip.js";

const FREE = 46, CACHED = 45, SHARED = 43, FIRST_ROW = 48;
const MOST_HEIGHT = 300, MOST_TEXTS = 50, FRESH_MS = 1500;

export class PoolView {
  constructor(feed, select) {
    this.feed = feed;
    this.select = select;
    this.canvas = make("canvas", { role: "img", tabindex: 0, "aria-label": "The block pool" });
    this.summary = make("p", { class: "faint" });
    this.live = make("p", { class: "unseen", role: "status" });
    const legend = [["decode", "", "owned (by row)"], ["shared", "hatched", "shared"], ["cached", "", "cached"], ["empty", "", "free"]];
    this.element = make("section", { class: "panel", "aria-label": "Block pool" }, make("div", { class: "head" }, make("h2", {}, "Block pool"), this.summary), this.canvas,
      make("div", { class: "legend" }, ...legend.map(([kind, shape, text]) => make("span", {}, make("i", { class: `${kind} ${shape}` }), text))), this.live);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", hideTip);
    this.canvas.addEventListener("blur", hideTip);
    this.canvas.addEventListener("click", (event) => { const [owner] = this.ownersOf(this.cellAt(event)); if (owner) select(owner[ROW.id]); });
    this.canvas.addEventListener("keydown", (event) => this.move(event));
    this.texts = new Map();
    this.cursor = 0;
    this.columns = 1;
    this.size = 8;
  }

  draw(selected) {
    const entry = this.feed.entries[this.feed.at];
    if (!entry) return;
    const step = this.feed.step(entry), { blocks } = step, width = widthOf(this.canvas);
    let size = 14;
    while (size > 3 && Math.ceil(blocks.length / Math.floor(width / size)) * size > MOST_HEIGHT) size -= 1;
    const columns = Math.max(Math.floor(width / size), 1), rows = Math.ceil(blocks.length / columns), inner = size > 4 ? size - 1 : size;
    [this.columns, this.size, this.blocks] = [columns, size, blocks];
    const [draw] = prepared(this.canvas, rows * size);
    const chosen = step.batch.find((row) => row[ROW.id] === selected)?.[ROW.row] ?? -1;
    const table = new Set(chosen >= 0 ? this.feed.tables.get(selected) : []);
    const counts = { free: 0, cached: 0, shared: 0 };
    for (let cell = 0; cell < blocks.length; cell += 1) {
      const mark = blocks.charCodeAt(cell), x = (cell % columns) * size, y = Math.floor(cell / columns) * size;
      if (mark === FREE) {
        counts.free += 1;
        draw.fillStyle = colour("empty");
      } else if (mark === CACHED) {
        counts.cached += 1;
        draw.fillStyle = colour("cached");
      } else if (mark === SHARED) {
        counts.shared += 1;
        draw.fillStyle = colour("shared");
      } else draw.fillStyle = rowColour(mark - FIRST_ROW);
      draw.fillRect(x, y, inner, inner);
      if (mark === SHARED && inner > 4) {
        draw.fillStyle = colour("cached");
        draw.fillRect(x + 1, y + 1, inner / 2, inner / 2);
      }
      if (chosen >= 0 && (mark === FIRST_ROW + chosen || (mark === SHARED && table.has(cell)))) {
        draw.strokeStyle = colour("mark");
        draw.lineWidth = 1.5;
        draw.strokeRect(x + 0.5, y + 0.5, inner - 1, inner - 1);
      }
    }
    const each = step.blocks_per_cell > 1 ? `, ${step.blocks_per_cell} a cell` : "";
    const text = `${plural(step.num_owned_blocks, "block")} owned of ${step.num_blocks}${each}; ${counts.shared} shared, ${counts.cached} cached`;
    if (this.summary.textContent !== text) {
      this.summary.textContent = text;
      this.canvas.setAttribute("aria-label", `The block pool: ${text}. Arrow keys move from block to block.`);
    }
  }

  // -- hands -------------------------------------------------------------------------------------------------------

  cellAt(event) {
    const [x, y] = within(this.canvas, event), column = Math.floor(x / this.size);
    return column < this.columns ? Math.floor(y / this.size) * this.columns + column : -1;
  }

  /** The rows of the batch that own a cell: one, or several that share it. */
  ownersOf(cell) {
    const mark = this.blocks?.charCodeAt(cell), entry = this.feed.entries[this.feed.at], batch = entry ? this.feed.step(entry).batch : [];
    if (mark === SHARED) return batch.filter((row) => this.feed.tables.get(row[ROW.id])?.includes(cell));
    return batch.filter((row) => row[ROW.row] === mark - FIRST_ROW);
  }

  /** What is in a cell, in words. */
  describe(cell) {
    const mark = this.blocks.charCodeAt(cell);
    if (mark === FREE) return `Block ${cell}: free`;
    if (mark === CACHED) return `Block ${cell}: cached; a prompt that starts alike may find it, until it is evicted`;
    const owners = this.ownersOf(cell), [owner] = owners;
    if (!owner) return `Block ${cell}: ${mark === SHARED ? "shared by several requests" : `row ${mark - FIRST_ROW}`}`;
    const id = owner[ROW.id], place = this.placeOf(id, cell);
    const head = `Block ${cell}: ${mark === SHARED ? `shared by ${owners.map((one) => short(one[ROW.id])).join(", ")}` : `row ${owner[ROW.row]}, ${short(id)}`}`;
    if (!place) return head;
    const [from, to] = place, tokens = this.texts.get(id)?.tokens;
    return `${head}\ntokens ${from} to ${to - 1} of ${owner[ROW.tokens]}${tokens ? `\n${tokens.slice(from, to).join("")}` : ""}`;
  }

  placeOf(id, cell) {
    const index = this.feed.tables.get(id)?.indexOf(cell) ?? -1, size = this.feed.limits?.block_size ?? 16;
    const place = Math.floor(index / (this.feed.limits?.cache_groups?.length ?? 1));
    return index < 0 ? null : [place * size, (place + 1) * size];
  }

  hover(event) {
    const cell = this.cellAt(event);
    if (!this.blocks || cell < 0 || cell >= this.blocks.length) hideTip();
    else this.show(cell, event.clientX, event.clientY);
  }

  show(cell, x, y) {
    showTip(this.describe(cell), x, y);
    this.shown = cell;
    const [owner] = this.ownersOf(cell);
    if (owner) this.read(owner[ROW.id]).then(() => { if (this.shown === cell) showTip(this.describe(cell), x, y); });
  }

  /** The tokens of a request, while it is unfinished; and after that what was read of it. */
  async read(id) {
    const known = this.texts.get(id);
    if (known && performance.now() - known.at < FRESH_MS) return;
    this.texts.set(id, { tokens: known?.tokens, at: performance.now() });
    try {
      const { tokens } = await get(`v1/engine/requests/${encodeURIComponent(id)}`);
      this.texts.set(id, { tokens, at: performance.now() });
    } catch { /* it has ended, or is another's */ }
    while (this.texts.size > MOST_TEXTS) this.texts.delete(this.texts.keys().next().value);
  }

  move(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    if (!(event.key in moves) || !this.blocks) return;
    event.preventDefault();
    event.stopPropagation();
    this.cursor = Math.min(Math.max(this.cursor + moves[event.key], 0), this.blocks.length - 1);
    const box = this.canvas.getBoundingClientRect();
    this.show(this.cursor, box.left + (this.cursor % this.columns) * this.size * unit(), box.top + Math.floor(this.cursor / this.columns) * this.size * unit());
    this.live.textContent = this.describe(this.cursor);
  }
}
