"""How drawings look: themes for light and dark pages, axes, marks. No global plotting state is touched."""

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megalrps.evaluation.words import short_count

_DOTS_PER_INCH = 160
_WIDTH = 9.0  # inches: 1,440 dots, sharp at the page's width on a screen of double density


@dataclass(frozen=True)
class Theme:
    """Colours of one colour scheme; ``versions`` after Okabe and Ito, for readers who do not see all colours."""

    paper: str
    ink: str
    soft: str
    line: str
    main: str
    versions: tuple[str, ...]

    def version_ink(self, index: int) -> str:
        return self.versions[index % len(self.versions)]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1d2530",
    soft="#5b6675",
    line="#e3e7ec",
    main="#3d4754",
    versions=("#0072b2", "#d55e00", "#009e73", "#b4529a", "#b07d00", "#2f97cf", "#7a5195"),
)
DARK = Theme(
    paper="#12161c",
    ink="#e4e9f0",
    soft="#9aa6b5",
    line="#29313c",
    main="#b9c3cf",
    versions=("#56b4e9", "#ff8f4a", "#3ecfa0", "#e48ac6", "#e6b73c", "#8fd0f5", "#b79ae0"),
)


def new_axes(theme: Theme, height: float) -> Axes:
    """The axes of a new figure of the page's width, ``height`` inches high."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, layout="constrained", facecolor=theme.paper)
    axes = figure.add_subplot(facecolor=theme.paper)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(theme.soft)
    axes.tick_params(colors=theme.soft, labelsize=11)
    axes.grid(axis="y", color=theme.line, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def label_axes(axes: Axes, theme: Theme, x: str, y: str) -> None:
    axes.set_xlabel(x, color=theme.soft, fontsize=11)
    axes.set_ylabel(y, color=theme.soft, fontsize=11)


def count_axis(axes: Axes) -> None:
    """Ticks of the x axis as short counts."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def write_beside(
    axes: Axes, theme: Theme, text: str, point: tuple[float, float], colour: str, offset: tuple[int, int]
) -> None:
    """A label in ``colour`` beside ``point`` (data coordinates), ``offset`` points away, legible over lines."""
    horizontal = "left" if offset[0] > 0 else "right" if offset[0] < 0 else "center"
    vertical = "bottom" if offset[1] > 0 else "top" if offset[1] < 0 else "center"
    axes.annotate(
        text,
        point,
        xytext=offset,
        textcoords="offset points",
        color=colour,
        fontsize=11,
        fontweight="bold",
        ha=horizontal,
        va=vertical,
        bbox={"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.75, "pad": 1.0},
        zorder=6,
    )


def mark(
    axes: Axes, theme: Theme, point: tuple[float, float], ink: str, *, hollow: bool = False, pale: bool = False
) -> None:
    """A circle at ``point``: hollow for a fork, full for a release, pale for one that is not there yet."""
    face = theme.paper if hollow or pale else ink
    edge = 1.2 if pale else 2.0
    axes.plot(*point, "o", color=ink, markerfacecolor=face, markersize=9, markeredgewidth=edge, zorder=5, clip_on=False)


def figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=11)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
