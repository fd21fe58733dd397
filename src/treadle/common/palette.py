"""The colours of adapters, the same in a terminal, in plots and on the server's page."""

COLOURS = ("#2186cf", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f7f7f")
"""By place on the N axis; after the last they repeat. The page's `colours.js` has the same.

They are Okabe and Ito's, which colour-blind people can tell apart. Blue is lighter, yellow darker, and grey stands for
black, so that all can be read on light and on dark."""


def colour(index: int) -> str:
    """Return the colour of the adapter at a place on the N axis."""
    return COLOURS[index % len(COLOURS)]
