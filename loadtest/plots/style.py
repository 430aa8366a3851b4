"""What all pictures share: size, type, and a colour for each policy that is the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from shoal.loadtest.records import Setup

WIDTH = 9.5  # inches
DPI = 120
INK, POINTS, FAINT, PADDING = "#333333", "#7a7a7a", "#dddddd", "#b3b3b3"

# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLOURS = {
    "static": "#D55E00",
    "static-nopad": "#E69F00",
    "fcfs": "#0072B2",
    "sjf": "#009E73",
    "priority": "#CC79A7",
    "fair": "#56B4E9",
    "deadline": "#555555",
}
OTHER_COLOUR = "#8C6D31"
Line = Literal["-", "--", ":", "-."]
LINES: dict[str, Line] = {"off": "-", "draft": "--", "ngram": ":"}
OTHER_LINE: Line = "-."
MARKERS = {"off": "o", "draft": "^", "ngram": "s"}
OTHER_MARKER = "D"

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True, slots=True)
class Image:
    """The same pixels twice: as a file for documents, and in the half or third of the bytes for the page."""

    png: bytes
    webp: bytes


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the report shows it.

    Attributes:
        name: of its file and its anchor.
        caption: what to look for.
    """

    name: str
    title: str
    caption: str
    image: Image


@contextmanager
def canvas(height: float) -> Iterator[Figure]:
    """A figure of the report's width, in whose block text and axes have the report's style."""
    with rc_context(RC):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        yield figure


def render(figure: Figure) -> Image:
    """Draw a figure once, and encode it twice."""
    agg = FigureCanvasAgg(figure)
    agg.draw()  # type: ignore[no-untyped-call]  # matplotlib has no types for it
    pixels = np.asarray(agg.buffer_rgba())[:, :, :3]  # type: ignore[no-untyped-call]  # nor for this
    return Image(_encoded(pixels, "png", optimize=True), _encoded(pixels, "webp", lossless=True))


def _encoded(pixels: NDArray[np.uint8], kind: str, **options: bool) -> bytes:
    buffer = BytesIO()
    imsave(buffer, pixels, format=kind, dpi=DPI, pil_kwargs=options)
    return buffer.getvalue()


def colour(setup: Setup) -> str:
    return COLOURS.get(setup.policy, OTHER_COLOUR)


def line_style(setup: Setup) -> Line:
    return LINES.get(setup.speculation, OTHER_LINE)


def marker(setup: Setup) -> str:
    return MARKERS.get(setup.speculation, OTHER_MARKER)


def legend(figure: Figure, setups: Iterable[Setup], *, markers: bool = False) -> None:
    """Names the setups above all axes."""
    handles = [
        Line2D(
            [],
            [],
            color=colour(setup),
            linestyle=line_style(setup),
            marker=marker(setup) if markers else "",
            markersize=5,
            label=setup.name,
        )
        for setup in setups
    ]
    legend_of(figure, handles)


def legend_of(figure: Figure, handles: Sequence[Artist], num_columns: int = 5) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=min(num_columns, len(handles)), handlelength=2.2)


def log_seconds(axes: Axes, axis: str) -> None:
    """Make an axis on which all is drawn logarithmic, its ticks labelled in the unit that fits."""
    own = axes.xaxis if axis == "x" else axes.yaxis
    axes.set(**{f"{axis}scale": "log"})
    least, most = own.get_view_interval()
    subs = (1,) if most > 100 * least else (1, 2, 5) if most > 8 * least else (1, 1.5, 2, 3, 5, 7)
    own.set_major_locator(LogLocator(subs=subs, numticks=8))
    own.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    own.set_minor_formatter(NullFormatter())


def duration(seconds: float) -> str:
    """A round duration with its unit."""
    if seconds >= 1:
        return f"{seconds:g} s"
    return f"{seconds * 1e3:g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:g} µs"
