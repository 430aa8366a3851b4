"""The picture of speculation: speed-up, acceptance and mean length against concurrency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bench.speculation.serving import Gain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bench.speculation import Case

_COLOURS = {2: "#56b4e9", 4: "#0072b2", 8: "#cc79a7", None: "#d55e00"}  # of Okabe and Ito, for every kind of eye
_FIGURES: dict[str, Callable[[Gain], float]] = {
    "speed-up (tokens/s, on / off)": lambda gain: gain.speed_up,
    "accepted / drafted": lambda gain: gain.acceptance_rate,
    "mean k (drafted tokens a step)": lambda gain: gain.mean_spec_tokens,
}


def draw(path: Path, model: str, gains: Mapping[Case, Gain]) -> None:
    """Draw a column for each proposer and a row for each figure; solid lines are greedy, dashed at temperature 0.8."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (only here; it takes half a second)

    methods = list(dict.fromkeys(case.method for case in gains))
    figure = Figure(figsize=(1 + 4 * len(methods), 9), layout="constrained")
    axes = figure.subplots(len(_FIGURES), len(methods), sharex=True, sharey="row", squeeze=False)
    for column, method in enumerate(methods):
        for row, (label, value) in enumerate(_FIGURES.items()):
            of_method = {case: value(gain) for case, gain in gains.items() if case.method == method}
            _lines(axes[row, column], of_method)
            if column == 0:
                axes[row, column].set_ylabel(label)
        axes[0, column].axhline(1.0, color="black", linewidth=0.8)
        axes[0, column].set_title(method)
        axes[-1, column].set_xlabel("concurrency (requests at once)")
    for of_figure in axes:
        of_figure[0].set_ylim(bottom=0)  # last, for it ends the automatic scaling of the row
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(f"Speculation on {model}")
    figure.savefig(path, dpi=110)


def _lines(axes: Axes, values: Mapping[Case, float]) -> None:
    lines = dict.fromkeys((case.num_spec_tokens, case.temperature) for case in values)
    for length, temperature in lines:
        points = [
            (case.concurrency, value)
            for case, value in values.items()
            if (case.num_spec_tokens, case.temperature) == (length, temperature)
        ]
        how = "greedy" if temperature == 0 else f"T = {temperature}"
        axes.plot(
            *zip(*points, strict=True),
            color=_COLOURS[length],
            linestyle="-" if temperature == 0 else "--",
            linewidth=2.2 if length is None else 1.2,
            marker="o",
            markersize=3,
            label=f"{'adaptive' if length is None else f'k = {length}'}, {how}",
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({case.concurrency for case in values})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.grid(alpha=0.3)
