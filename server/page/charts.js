// Small pictures of numbers.

import { colour, prepared } from "./palette.js";

/** A line over time with the ground below it filled; each of the `points` [time, value] holds since the one before. */
export function line(canvas, points, { to, seconds, name = "accent", most = 0 }) {
  const [draw, width, height] = prepared(canvas);
  const top = Math.max(most, ...points.map(([, value]) => value), 1e-9);
  const x = (time) => width - ((to - time) / seconds) * width, y = (value) => height - 1 - (value / top) * (height - 3);
  if (points.length < 2) return;
  draw.beginPath();
  draw.moveTo(x(points[0][0]), y(points[0][1]));
  points.slice(1).forEach(([time, value], index) => {
    draw.lineTo(x(points[index][0]), y(value));
    draw.lineTo(x(time), y(value));
  });
  draw.strokeStyle = colour(name);
  draw.lineWidth = 1.5;
  draw.stroke();
  draw.lineTo(x(points.at(-1)[0]), height);
  draw.lineTo(x(points[0][0]), height);
  draw.globalAlpha = 0.16;
  draw.fillStyle = colour(name);
  draw.fill();
  draw.globalAlpha = 1;
}

/** Stacked columns, one for each list of parts, the last at the right end. */
export function stacks(canvas, columns, names) {
  const [draw, width, height] = prepared(canvas), wide = 5;
  const shown = columns.slice(-Math.floor(width / wide)), sums = shown.map((parts) => parts.reduce((sum, part) => sum + part, 0));
  const top = [...sums].sort((a, b) => a - b)[Math.floor(sums.length * 0.97)] || 1;
  shown.forEach((parts, index) => {
    let y = height;
    const x = width - (shown.length - index) * wide;
    parts.forEach((part, which) => {
      const high = (part / top) * (height - 2);
      draw.fillStyle = colour(names[which]);
      draw.fillRect(x, y - high, wide - 1, high);
      y -= high;
    });
  });
  return top;
}

/** Columns of one run, and its mean as a line. */
export function columns(canvas, values, { name = "accent", most, seconds }) {
  const [draw, width, height] = prepared(canvas), bottom = height - 14, wide = width / Math.max(seconds, 1);
  draw.fillStyle = colour(name);
  values.forEach((value, index) => {
    const high = (value / Math.max(most, 1)) * (bottom - 16);
    draw.fillRect(index * wide, bottom - high, Math.max(wide - 1, 1), high);
  });
  draw.fillStyle = colour("line");
  draw.fillRect(0, bottom, width, 1);
  return [draw, width, height];
}
