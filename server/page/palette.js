// The colours of the page as canvases need them, in the theme that is shown.

const probe = document.createElement("span");
probe.hidden = true;
document.documentElement.append(probe);
let known = new Map();

/** The colour of a variable of the style sheet. */
export function colour(name) {
  if (!known.has(name)) {
    probe.style.color = `var(--${name})`;
    known.set(name, getComputedStyle(probe).color);
  }
  return known.get(name);
}

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** A colour for the request in a row: neighbours differ in hue, and every other one in lightness. */
export function rowColour(row) {
  const name = `row ${row}`;
  if (!known.has(name)) {
    const light = (isDark() ? 66 : 54) + (row % 2 ? 8 : -6);
    known.set(name, `hsl(${(row * 137.5 + 205) % 360} ${isDark() ? 58 : 52}% ${light}%)`);
  }
  return known.get(name);
}

export function forget() {
  known = new Map();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { forget(); dispatchEvent(new Event("shoal-theme")); });

/** CSS pixels of a unit of pictures, which grows with the letters: 1 where they have 16 pixels. */
export function unit() {
  known.set("unit", known.get("unit") ?? parseFloat(getComputedStyle(document.documentElement).fontSize) / 16);
  return known.get("unit");
}

addEventListener("resize", () => known.delete("unit"));

/** The width of a canvas, in units. */
export function widthOf(canvas) {
  return canvas.clientWidth / unit();
}

/** Where in a canvas an event is, in units. */
export function within(canvas, event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / unit(), (event.clientY - box.top) / unit()];
}

/** A canvas of this height on the screen, cleared; what is drawn is in units. */
export function prepared(canvas, height = canvas.clientHeight / unit()) {
  const ratio = Math.min(devicePixelRatio || 1, 3) * unit(), width = widthOf(canvas);
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) {
    [canvas.width, canvas.height] = [wide, high];
    canvas.style.height = `${height * unit()}px`;
  }
  const draw = canvas.getContext("2d");
  draw.setTransform(ratio, 0, 0, ratio, 0, 0);
  draw.clearRect(0, 0, width, height);
  return [draw, width, height];
}
