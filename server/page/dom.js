// Elements and numbers: all that is ever shown is text, and nothing is made HTML.

/** An element with these attributes and children; an attribute that begins with "on" is a listener. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** Sets text only where it changes, so that nothing is laid out or read aloud in vain. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** A number with three digits or so. */
export function number(value) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 100 || Number.isInteger(value)) return whole.format(value);
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
}

/** A duration in seconds, in the unit that fits. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 1e-3) return `${number(seconds * 1e6)} µs`;
  if (seconds < 1) return `${number(seconds * 1e3)} ms`;
  return seconds < 120 ? `${number(seconds)} s` : `${number(seconds / 60)} min`;
}

export function share(value) {
  return Number.isFinite(value) ? `${whole.format(100 * value)}%` : "–";
}

export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  const unit = value >= 2 ** 30 ? ["GiB", 2 ** 30] : ["MiB", 2 ** 20];
  return `${number(value / unit[1])} ${unit[0]}`;
}

export function plural(count, one, many = `${one}s`) {
  return `${whole.format(count)} ${count === 1 ? one : many}`;
}

const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** A number with a prefix for thousands. */
export function prefixed(value, what = "") {
  const [size, prefix] = PREFIXES.find(([least]) => value >= least) ?? [1, ""];
  return `${number(value / size)} ${prefix}${what}`.trim();
}

const NUMBER = /^(?:[-+]?\d\S*(?: \w+)?|–|)$/;

/** A table in a box of its own, which scrolls; columns of numbers stand on the right. */
export function table(label, columns, rows) {
  const classes = columns.map((_, place) => (rows.every((row) => NUMBER.test(row[place])) ? "right" : undefined));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, make("table", {},
    make("thead", {}, make("tr", {}, ...columns.map((name, place) => (name ? make("th", { scope: "col", class: classes[place] }, name) : make("td"))))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text, place) => (place ? make("td", { class: classes[place] ?? "words" }, text) : make("th", { scope: "row", class: classes[place] }, text))))))));
}

/** A short name of a request: the ids of one call differ at their ends. */
export function short(id) {
  const parts = id.match(/^([a-z]+)-([^-]+)-(\d+)-(\d+)$/);
  return parts ? `${parts[2].slice(-6)}${parts[3] === "0" && parts[4] === "0" ? "" : `.${parts[3]}.${parts[4]}`}` : id.slice(-10);
}

/** Puts text on the clipboard, and says so on the button for a moment. */
export async function copy(button, text) {
  await navigator.clipboard.writeText(text);
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}
