"""What all pictures share: matplotlib without global state, colours, legends, and files."""

import functools
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from recbole_mmdiff.errors import ConfigError
from recbole_mmdiff.files import write_atomically

DPI = 150
#: tells colours apart for the colour-blind (Okabe and Ito 2008); black and grey are left for truths
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
MARKERS = "osDvP*X<>ph"
GREY = "#8a8a8a"
#: a user's own matplotlibrc (TeX, sizes, styles) does not change the pictures; labels are no formulas
STYLE = {"text.parse_math": False, "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10,
         "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd",
         "grid.linewidth": 0.6, "lines.linewidth": 1.6, "lines.markersize": 5,
         "axes.formatter.useoffset": False, "pdf.fonttype": 42}


def require_matplotlib() -> None:
    """Raises ConfigError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError('plots: matplotlib is not installed: pip install "recbole-mmdiff[viz]", or '
                          'leave the plots out') from error


def styled(draw: Callable) -> Callable:
    """Run a drawing function under our style, whatever the user's matplotlibrc says.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    @functools.wraps(draw)
    def inside(*args, **kwargs):
        require_matplotlib()
        import matplotlib

        with matplotlib.rc_context(), warnings.catch_warnings():
            # Labels in scripts that the font lacks show boxes; a constant axis is widened.
            warnings.simplefilter("ignore", UserWarning)
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)
    return inside


def new_figure(width: float, height: float):
    """An empty figure of so many inches, drawn by Agg, that keeps labels and legends apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def colours(count: int) -> list[tuple]:
    """``count`` colours as RGBA: Okabe and Ito's, then tab20's that are neither grey nor used up."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    more = [tuple(colour) for colour in colormaps["tab20"](range(20))]
    # tab20's saturated halves of brown, purple, red, olive; then its light halves.
    chosen = [more[at] for at in (10, 8, 6, 16, 1, 3, 5, 9, 11, 13, 17, 19, 7, 0, 2, 4, 12, 18)]
    palette = [to_rgba(colour) for colour in OKABE_ITO] + chosen
    return [palette[number % len(palette)] for number in range(count)]


def line_styles(labels: Sequence[str]) -> dict[str, dict]:
    """Label -> colour and marker of its line; the marker tells it apart where colours cannot."""
    return {label: {"color": colour, "marker": MARKERS[number % len(MARKERS)]}
            for number, (label, colour) in enumerate(zip(labels, colours(len(labels)), strict=True))}


def legend(figure, handles: Sequence, labels: Sequence[str], markerscale: float = 1) -> None:
    """A legend to the right of all axes."""
    figure.legend(handles, [wrapped(label, 32) for label in labels], loc="outside right upper",
                  frameon=False, markerscale=markerscale)


def shorten(text: str, length: int) -> str:
    """The text on one line, cut in its middle to a length: labels often differ at their ends."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[:length - 1 - tail]}…{text[len(text) - tail:]}"


def wrapped(text: str, width: int, lines: int = 3) -> str:
    """The text on at most so many lines of so many letters."""
    return textwrap.fill(shorten(text, width * lines), width)


def use_log(values: Sequence[float]) -> bool:
    """Whether values are better shown on a log scale: all positive, spanning a factor of 100."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= 100


def plain_log_axis(axis) -> None:
    """A log scale whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.axes.set_xscale("log") if axis.axis_name == "x" else axis.axes.set_yscale("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure, path: Path, pdf: bool = False) -> list[Path]:
    """Write a figure as PNG (and PDF beside it), whole or not at all; returns the paths."""
    paths = [path.with_name(path.name + ".png")]
    if pdf:
        paths.append(path.with_name(path.name + ".pdf"))
    for target in paths:
        with write_atomically(target) as temporary:
            # No date, so that the same results make the same file.
            metadata = {"CreationDate": None} if target.suffix == ".pdf" else None
            figure.savefig(temporary, dpi=DPI, format=target.suffix[1:], metadata=metadata)
    return paths
