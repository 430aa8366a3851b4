"""The picture of how well the digital twin predicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from shoal.loadtest import accuracy
from shoal.loadtest.accuracy import compare
from shoal.loadtest.figures import title
from shoal.loadtest.plots import style
from shoal.loadtest.records import Setup
from shoal.loadtest.report_data import Cell

LARGEST = 40.0  # percent; what is beyond is drawn at the edge, as a triangle


def errors(cells: Sequence[Cell]) -> Figure:
    """Relative errors of the predictions, a column for each figure, with the band that it should keep within."""
    found = [
        (cell.setup, {figure.name: figure for figure in compare(cell.predicted, cell.measured.median)})
        for cell in cells
        if cell.predicted
    ]
    names = list(dict.fromkeys(name for _, own in found for name in own))
    with style.canvas(4.0) as figure:
        axes = figure.subplots()
        for place, name in enumerate(names):
            _column(axes, place, [(setup, own[name]) for setup, own in found if name in own])
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_xticks(range(len(names)), [title(name).replace(" ", "\n") for name in names])
        axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(-1.05 * LARGEST, 1.05 * LARGEST))
        axes.set_ylabel("error of the prediction [%]")
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y")
        style.legend(figure, dict.fromkeys(setup for setup, _ in found), markers=True)
        return figure


def _column(axes: Axes, place: int, figures: Sequence[tuple[Setup, accuracy.Figure]]) -> None:
    """The errors of one figure side by side, over its band."""
    if limit := figures[0][1].limit:
        axes.add_patch(Rectangle((place - 0.45, -100 * limit), 0.9, 200 * limit, color="#e3ede3", linewidth=0))
    for (setup, figure), offset in zip(figures, np.linspace(-0.36, 0.36, len(figures)), strict=True):
        if figure.error is not None:
            inside = min(max(100 * figure.error, -LARGEST), LARGEST)
            marker = style.marker(setup) if inside == 100 * figure.error else ("v" if figure.error < 0 else "^")
            axes.plot(place + offset, inside, marker, color=style.colour(setup), markersize=4.5, alpha=0.8)
