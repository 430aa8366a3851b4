// Figures of `shoal loadtest`: its summary.json, opened from the disk and never sent anywhere.

import { duration, make, number, say } from "./dom.js";

const MOST_BYTES = 64 * 2 ** 20;

export class ReportView {
  constructor() {
    this.file = make("input", { type: "file", accept: ".json,application/json", "aria-label": "summary.json of a load test", onchange: () => this.open() });
    this.problem = make("p", { class: "bad", role: "alert" });
    this.about = make("p", { class: "faint" });
    this.tables = make("div", { class: "column" });
    this.element = make("section", { class: "panel", "aria-label": "A load test" },
      make("div", { class: "head" }, make("h2", {}, "A load test"), make("p", { class: "faint" }, "Open the summary.json that shoal loadtest wrote.")), this.file, this.problem, this.about, this.tables);
  }

  async open() {
    const [file] = this.file.files;
    if (!file) return;
    this.tables.replaceChildren();
    say(this.about, "");
    say(this.problem, "");
    try {
      if (file.size > MOST_BYTES) throw new Error("it is too large");
      const summary = JSON.parse(await file.text());
      if (!Array.isArray(summary.cells)) throw new Error("it has no cells, so it is no summary of a load test");
      this.show(summary);
    } catch (error) {
      say(this.problem, `${file.name}: ${error.message}`);
    }
  }

  show({ made_at: made, model, machine, cells }) {
    say(this.about, [made, typeof model === "string" ? model : model?.name, typeof machine === "string" ? machine : machine?.cpu].filter((one) => typeof one === "string").join(", "));
    const groups = new Map();
    for (const cell of cells) {
      const name = [cell.section, cell.workload, JSON.stringify(cell.load)].filter(Boolean).join(", ").replaceAll('"', "").slice(0, 160);
      groups.set(name, [...(groups.get(name) ?? []), cell]);
    }
    this.tables.replaceChildren(...[...groups].map(([name, some]) => this.table(name, some)));
  }

  table(name, cells) {
    const figures = [...new Set(cells.flatMap((cell) => Object.keys(cell.measured?.median ?? {})))];
    const words = (figure, value) => (typeof value !== "number" ? "" : /ttft|itl|tpot|latency|seconds/.test(figure) ? duration(value) : number(value));
    return make("div", {}, make("h3", {}, name), make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": name }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Setup"), ...figures.map((figure) => make("th", { scope: "col", class: "right" }, figure.replaceAll("_", " "))))),
      make("tbody", {}, ...cells.map((cell) => make("tr", {}, make("th", { scope: "row" }, typeof cell.setup === "string" ? cell.setup : cell.setup?.name ?? JSON.stringify(cell.setup)), ...figures.map((figure) => make("td", { class: "right" }, words(figure, cell.measured?.median?.[figure])))))))));
  }
}
