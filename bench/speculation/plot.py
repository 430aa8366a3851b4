"""The picture of speculation: speed-up, acceptance and mean length against concurrency."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

_COLOURS = {2: "#56b4e9", 4: "#0072b2", 8: "#cc79a7", "adaptive": "#d55e00"}  # of Okabe and Ito, for every kind of eye
_FIGURES = {
    "speed-up": "speed-up (tokens/s, on / off)",
    "accepted/drafted": "accepted / drafted",
    "mean k": "mean k (drafted tokens a step)",
}


def draw(path: Path, model: str, rows: list[dict[str, Any]]) -> None:
    """Draw a column for each proposer and a row for each figure; solid lines are greedy, dashed at temperature 0.8.

    Args:
        rows: of the benchmark's table; those that differ in their concurrency alone follow each other.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (only here; it takes half a second)

    methods = list(dict.fromkeys(row["proposer"] for row in rows))
    figure = Figure(figsize=(1 + 4 * len(methods), 9), layout="constrained")
    axes = figure.subplots(len(_FIGURES), len(methods), sharex=True, sharey="row", squeeze=False)
    for (method, k, temperature), group in groupby(rows, itemgetter("proposer", "k", "temperature")):
        line = list(group)
        label = f"{k if k == 'adaptive' else f'k = {k}'}, {f'T = {temperature}' if temperature else 'greedy'}"
        style = {"color": _COLOURS[k], "linestyle": "--" if temperature else "-", "marker": ".", "label": label}
        for axis, name in zip(axes[:, methods.index(method)], _FIGURES, strict=True):
            axis.plot([row["concurrency"] for row in line], [row[name] for row in line], **style)
    for axis, label in zip(axes[:, 0], _FIGURES.values(), strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    for axis, method in zip(axes[0], methods, strict=True):
        axis.set_title(method)
        axis.axhline(1.0, color="black", linewidth=0.8)
    ticks = sorted({row["concurrency"] for row in rows})
    for axis in axes[-1]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, ticks)
        axis.set_xlabel("concurrency (requests at once)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Speculation on {model}")
    figure.savefig(path, dpi=110)
