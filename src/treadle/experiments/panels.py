"""Parts of figures that all of them share: panels, labels that fit, a note and a legend beside the panels."""

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_CHARACTERS = 28
"""Longest line of a label; longer names are wrapped."""
LABEL_LINES = 3


def wrapped(name: str) -> str:
    """Return a name in lines that fit beside an axis; a very long one keeps its beginning and its end."""
    most = LABEL_CHARACTERS * LABEL_LINES
    if len(name) > most:
        name = f"{name[: most // 2 - 1]}…{name[-most // 2 + 1 :]}"
    return "\n".join(textwrap.wrap(name.replace("$", r"\$"), LABEL_CHARACTERS)) or name


def write_note(figure: "Figure", text: str) -> None:
    """Write what holds for all panels over them."""
    figure.suptitle("\n".join(textwrap.wrap(text, int(figure.get_figwidth() * 13))), fontsize=9)


def write_legend(figure: "Figure", axis: "Axes") -> None:
    """Write what the marks of a panel mean under all panels."""
    handles, labels = axis.get_legend_handles_labels()
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = min(len(labels), max(1, int(figure.get_figwidth() / (0.085 * longest + 0.6))))
    lines = max(1 + label.count("\n") for label in labels) * -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * lines + 0.2)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def make_panels(count: int, width: float = 3.8, height: float = 3.0) -> "tuple[Figure, list[Axes]]":
    """Return a figure and its panels, at most three in a row; width and height of one are in inches."""
    from matplotlib.figure import Figure

    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]
