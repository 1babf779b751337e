"""Draw docs/reversible_stack.png: one layer of the stack, forward and backward."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


DOCS = Path(__file__).parents[2] / "docs"
FIRST, SECOND = 2.0, 0.0  # heights of the two streams
FORWARD, BACKWARD, KEPT = "#1f5fa8", "#b5451b", "#4a7a2c"


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str, style: str = "-") -> None:
    """An arrow from `start` to `end`."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linestyle": style, "lw": 1.6})


def box(ax: Axes, x: float, y: float, text: str, color: str) -> None:
    """A function of the layer."""
    look = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": color, "lw": 1.6}
    ax.text(x, y, text, ha="center", va="center", fontsize=10, bbox=look, zorder=3)


def joint(ax: Axes, x: float, y: float, sign: str, color: str) -> None:
    """Where an update is added to a stream or taken from it."""
    look = {"boxstyle": "circle,pad=0.18", "facecolor": color, "edgecolor": color}
    ax.text(x, y, sign, ha="center", va="center", fontsize=12, color="white", bbox=look, zorder=3)


def draw_layer(ax: Axes, *, title: str, sign: str, color: str, ends: list[str]) -> None:
    """Two streams, F between them and G between them; leftwards where `sign` is a minus."""
    leftwards = sign == "−"
    left, right = (9.4, 0.6) if leftwards else (0.6, 9.4)
    for height in (FIRST, SECOND):
        arrow(ax, (left, height), (right, height), color)
    update, middle = 3.1, (FIRST + SECOND) / 2
    for x, name, start, end in (
        (update, "F\nattention", SECOND, FIRST),
        (10 - update, "G\nfeed-forward", FIRST, SECOND),
    ):
        arrow(ax, (x, start), (x, end - 0.17 if end > start else end + 0.17), color)
        box(ax, x, middle, name, color)
        joint(ax, x, end, sign, color)
    for x, height, text in zip((0.3, 0.3, 9.7, 9.7), (FIRST, SECOND) * 2, ends, strict=True):
        ax.text(x, height, text, ha="center", va="center", fontsize=12)
    ax.set_title(title, color=color, fontsize=12, loc="left")
    ax.set(xlim=(-0.2, 10.2), ylim=(-1.6, 2.6))
    ax.axis("off")


def main() -> None:
    """Draw and save the figure."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6.6), layout="constrained")
    streams = ["$x_1$", "$x_2$", "$y_1$", "$y_2$"]
    draw_layer(above, title="forward: a layer adds, and stores no activation", sign="+", color=FORWARD, ends=streams)
    kept = "kept until backward: buckets (int32: token × head × round), random state"
    above.text(5, -0.95, kept, ha="center", color=KEPT, fontsize=10)
    above.text(5, -1.4, "the last layer also keeps $y_1$, $y_2$", ha="center", color=KEPT, fontsize=10)
    title = "backward: the layer runs once more, is subtracted, and passes its input down"
    draw_layer(below, title=title, sign="−", color=BACKWARD, ends=streams)
    steps = (
        (10 - 3.1, "first G, a piece of the sequence at a time:\n$x_2 = y_2 - G(y_1)$, gradients of G, freed"),
        (3.1, "then F, with the forward's buckets:\n$x_1 = y_1 - F(x_2)$, gradients of F, freed"),
    )
    for x, text in steps:
        below.text(x, -0.95, text, ha="center", va="center", fontsize=10, color=BACKWARD)
    below.text(0.3, -0.75, "to the layer\nbelow, on the\ntape", ha="center", va="center", fontsize=9, color=KEPT)
    figure.savefig(DOCS / "reversible_stack.png", dpi=110)


if __name__ == "__main__":
    main()
