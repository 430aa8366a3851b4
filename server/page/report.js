// Reports of `shoal loadtest`, opened from the disk and never sent anywhere: report.html and summary.json.

import { duration, make, number, plural, say, table } from "./dom.js";

const MOST_BYTES = 64 * 2 ** 20, TIMES = /p50|p90|p99|mean|seconds/;
const FIRST = ["throughput", "goodput", "ttft p50", "ttft p99", "itl p50", "itl p99", "e2e p50", "e2e p99", "errors"];
// What is taken over from a report: elements without a life of their own, and pictures that it holds itself.
const KEPT = new Set(["article", "aside", "b", "caption", "code", "dd", "details", "dl", "dt", "em", "figcaption", "figure", "h2", "h3", "li", "ol", "p", "pre", "section", "small", "span", "strong", "summary", "table", "tbody", "td", "th", "thead", "tr", "ul"]);
const LEFT_OUT = new Set(["head", "script", "style", "template", "iframe", "object", "noscript", "svg", "math"]);
const CLASSES = { panels: "pictures", legend: "wide", scroll: "scroll", group: "group", alarm: "bad", when: "faint" };

export class ReportView {
  constructor() {
    this.file = make("input", { type: "file", accept: ".html,.json,text/html,application/json", "aria-label": "Report of a load test", onchange: () => this.open() });
    this.problem = make("p", { class: "bad", role: "alert" });
    this.report = make("div", { class: "report" });
    this.element = make("section", { class: "panel", "aria-label": "A load test" },
      make("div", { class: "head" }, make("h2", {}, "A load test"), make("p", { class: "faint" }, "Open the report.html or the summary.json that shoal loadtest wrote.")), this.file, this.problem, this.report);
  }

  async open() {
    const [file] = this.file.files;
    if (!file) return;
    this.report.replaceChildren();
    say(this.problem, "");
    try {
      if (file.size > MOST_BYTES) throw new Error("it is too large");
      const text = await file.text();
      this.report.replaceChildren(...(/^\s*</.test(text) ? pageOf(text) : summaryOf(text)));
    } catch (error) {
      say(this.problem, `${file.name}: ${error.message}`);
    }
  }
}

// -- report.html -------------------------------------------------------------------------------------------------------

/** What a report shows.  It is parsed apart from the page, where nothing runs or loads, and only its texts are taken. */
function pageOf(text) {
  const { body } = new DOMParser().parseFromString(text.replace(/<style[^]*?<\/style>/gi, ""), "text/html");
  if (!body.querySelector("table, figure")) throw new Error("it has neither tables nor pictures, so it is no report of a load test");
  return copied(body);
}

function copied(parent) {
  return [...parent.childNodes].flatMap((node) => {
    if (node.nodeType === Node.TEXT_NODE) return [node.data];
    const name = node.localName;
    if (node.nodeType !== Node.ELEMENT_NODE || LEFT_OUT.has(name)) return [];
    if (name === "img") return picture(node);
    if (name === "h1") return [make("h2", {}, ...copied(node))];
    if (!KEPT.has(name) && !CLASSES[node.className]) return copied(node);
    const isScroll = node.className === "scroll";
    return [make(KEPT.has(name) ? name : "div", { class: CLASSES[node.className], colspan: node.getAttribute("colspan"), tabindex: isScroll && 0, role: isScroll && "region", "aria-label": isScroll && "Figures" }, ...copied(node))];
  });
}

function picture(image) {
  const source = image.getAttribute("src") ?? "";
  return source.startsWith("data:image/") ? [make("img", { src: source, alt: image.getAttribute("alt") ?? "", class: CLASSES[image.className] })] : [];
}

// -- summary.json ------------------------------------------------------------------------------------------------------

function summaryOf(text) {
  const { cells, made_at: made, model, machine } = JSON.parse(text);
  if (!Array.isArray(cells)) throw new Error("it has no cells, so it is no summary of a load test");
  const told = [made, model, machine?.processor].filter((one) => typeof one === "string").join(", ");
  const groups = Map.groupBy(cells, (cell) => [...new Set([cell.section, cell.workload, loadOf(cell.load)])].filter(Boolean).join(", "));
  return [make("p", { class: "faint" }, told), ...[...groups].flatMap(([name, some]) => figuresOf(name, some))];
}

/** A row for each figure and a column for each setup, as in report.html. */
function figuresOf(name, cells) {
  const medians = cells.map((cell) => cell.measured?.median ?? {}), figures = [...new Set(medians.flatMap(Object.keys))];
  const text = (figure, value) => (typeof value !== "number" ? "" : TIMES.test(figure) ? duration(value) : number(value));
  const some = (label, shown) => table(label, ["", ...cells.map((cell) => setupOf(cell.setup))], shown.map((figure) => [figure, ...medians.map((median) => text(figure, median[figure]))]));
  return [make("h3", {}, name), some(name, FIRST.filter((figure) => figures.includes(figure))), make("details", {}, make("summary", {}, "All figures"), some(`${name}: all figures`, figures))];
}

function setupOf(setup) {
  if (typeof setup !== "object" || setup === null) return String(setup);
  return [setup.policy, setup.speculation !== "off" && setup.speculation, ...(setup.options ?? [])].filter(Boolean).join(" ");
}

function loadOf(load) {
  if (typeof load !== "object" || load === null) return String(load ?? "");
  return load.users ? plural(load.users, "user") : `${number(load.rate)} requests a second`;
}
