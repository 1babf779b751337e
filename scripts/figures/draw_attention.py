"""
Draw the worked example of docs/how_it_works.md: lsh_hashing.png, lsh_keys.png, lsh_successor.png, axial_positions.png.

    python -m scripts.figures.draw_attention

What is drawn is what the operators computed; nothing is trained.
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import ConnectionPatch, Rectangle
from PIL import Image

from hf_reformer import ReformerConfig, hash_vectors
from hf_reformer.modeling.layers.position_embeddings import AxialPositionEmbeddings

from .worked_example import CHUNK_LENGTH, LENGTH_OF_VECTORS, NUM_BUCKETS, TEXT, Example, make_example


DOCS = Path(__file__).parents[2] / "docs"
DPI = 110
BUCKET_COLORS = ["#9fc6e8", "#f5c78f", "#b5dbb5", "#e3bbe3"]
MET, ALONE, FUTURE, QUERY = "#1f5fa8", "#c9c9c9", "#f4f4f4", "#b5451b"
# A space can be seen.
LETTERS = TEXT.replace(" ", "␣")
# Of the text: the second "h", and the first, which it finds.
READER, FOUND = 10, 1


def draw_plane(ax: Axes, example: Example, number: int) -> None:
    """The vectors of the letters in the plane, with the buckets of a round as background."""
    edge = 1.35 * LENGTH_OF_VECTORS
    axis = torch.linspace(-edge, edge, 301)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(1, -1, 1, 2)
    rotations = example.rotations[:, :, number : number + 1]
    background = hash_vectors(points, rotations, NUM_BUCKETS).view(301, 301).numpy()
    colors = ListedColormap(BUCKET_COLORS)
    extent = (-edge, edge, -edge, edge)
    ax.imshow(
        background, origin="lower", extent=extent, cmap=colors, vmin=0, vmax=NUM_BUCKETS - 1, interpolation="nearest"
    )
    for letter in sorted(set(LETTERS)):
        at = [place for place, other in enumerate(LETTERS) if other == letter]
        x, y = example.vectors[at].T.numpy()
        ax.plot(x, y, "o", color="black", markersize=3)
        middle = example.vectors[at].mean(0)
        x, y = (middle * 1.19).tolist()
        ax.text(x, y, letter, ha="center", va="center", fontsize=13, family="DejaVu Sans Mono")
    for column in rotations[0, :, 0].T:
        x, y = (column / column.norm() * edge * 0.55).tolist()
        ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "#444444", "lw": 1.3})
    ax.set(xticks=[], yticks=[], title=f"Round {number + 1}: two random directions make four buckets")


def draw_cells(ax: Axes, places: list[int], buckets: list[int], *, y: float, gap: int | None = None) -> list[float]:
    """Letters in a row, coloured by bucket, their positions below; with a gap behind each chunk. Returns where."""
    left = []
    for index, (place, bucket) in enumerate(zip(places, buckets, strict=True)):
        x = index + (0.45 * (index // gap) if gap else 0)
        left.append(x + 0.46)
        ax.add_patch(Rectangle((x, y), 0.92, 0.8, facecolor=BUCKET_COLORS[bucket], edgecolor="#555555", lw=0.8))
        ax.text(x + 0.46, y + 0.5, LETTERS[place], ha="center", va="center", fontsize=13, family="DejaVu Sans Mono")
        ax.text(x + 0.46, y + 0.14, str(place), ha="center", va="center", fontsize=7, color="#333333")
    return left


def draw_order(ax: Axes, example: Example) -> None:
    """The text, and its letters in the sorted order of round 1, cut into chunks."""
    buckets, order = example.buckets[0].tolist(), example.order[0].tolist()
    above = draw_cells(ax, list(range(len(TEXT))), buckets, y=3.0)
    below = draw_cells(ax, order, [buckets[place] for place in order], y=0.4, gap=CHUNK_LENGTH)
    for index, place in enumerate(order):
        color = BUCKET_COLORS[buckets[place]]
        line = ConnectionPatch((above[place], 3.0), (below[index], 1.2), "data", "data", color=color, lw=1.4)
        ax.add_artist(line)
    for chunk in range(len(TEXT) // CHUNK_LENGTH):
        x = below[chunk * CHUNK_LENGTH] - 0.46
        ax.text(x + 1.96, 0.08, f"chunk {chunk}", ha="center", va="center", fontsize=9, color="#444444")
    ax.text(0, 4.02, "Round 1: each token has a bucket (its colour). The number is its position.", fontsize=11)
    ax.text(0, -0.55, "Sorted by bucket, then by position, and cut into chunks of four", fontsize=11)
    ax.set(xlim=(-0.2, 17.6), ylim=(-0.8, 4.4))
    ax.axis("off")


def save(figure: plt.Figure, name: str) -> None:
    """Into docs/, with as few colours as drawings need, so that the file is small."""
    path = DOCS / name
    figure.savefig(path, dpi=DPI)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def draw_hashing(example: Example) -> None:
    """lsh_hashing.png."""
    figure = plt.figure(figsize=(9.4, 8.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.15, 1])
    for number in range(2):
        draw_plane(figure.add_subplot(grid[0, number]), example, number)
    draw_order(figure.add_subplot(grid[1, :]), example)
    save(figure, "lsh_hashing.png")


def draw_matrix(ax: Axes, counts: torch.Tensor, title: str) -> None:
    """Which keys (columns) each query (row) meets; a darker cell was met in two rounds."""
    size = len(TEXT)
    ax.imshow(np.triu(np.ones((size, size)), k=1), cmap=ListedColormap(["white", FUTURE]), vmin=0, vmax=1)
    for query, key in counts.nonzero().tolist():
        color = ALONE if query == key else MET
        alpha = 1.0 if query == key or counts[query, key] > 1 else 0.55
        ax.add_patch(Rectangle((key - 0.5, query - 0.5), 1, 1, facecolor=color, alpha=alpha))
        if LETTERS[query] == LETTERS[key] and query != key:
            ax.text(key, query, LETTERS[key], ha="center", va="center", fontsize=7.5, color="white", weight="bold")
    ax.set_xticks(range(size), list(LETTERS), family="DejaVu Sans Mono", fontsize=9)
    ax.set_yticks(range(size), list(LETTERS), family="DejaVu Sans Mono", fontsize=9)
    ax.set_xticks(np.arange(-0.5, size), minor=True)
    ax.set_yticks(np.arange(-0.5, size), minor=True)
    ax.grid(which="minor", color="#e4e4e4", lw=0.5)
    ax.tick_params(length=0, which="both")
    ax.set_title(title, fontsize=10.5)
    ax.set_xlabel("key", fontsize=9)


def draw_keys(example: Example) -> None:
    """lsh_keys.png."""
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 4.7), layout="constrained")
    titles = ["Round 1", "Round 2", "Both rounds: one softmax over all of it"]
    for ax, title, rounds in zip(axes, titles, ([0], [1], [0, 1]), strict=True):
        draw_matrix(ax, example.keys_met(rounds), title)
    axes[0].set_ylabel("query", fontsize=9)
    note = (
        "Blue: the query reads this key (dark: found in both rounds; a letter: the key is the query's like). "
        "Grey: nothing else was found, so the token reads itself. Above the diagonal is the future."
    )
    figure.supxlabel(note, fontsize=9)
    save(figure, "lsh_keys.png")


def draw_weights(ax: Axes, weights: list[float], title: str, color: str) -> None:
    """The letters with what of each value one query reads."""
    ax.bar(range(len(TEXT)), weights, color=color, width=0.8)
    for place, weight in enumerate(weights):
        if weight > 0.01:
            ax.text(place, weight + 0.03, f"{weight:.2f}", ha="center", fontsize=9)
    ax.set_xticks(range(len(TEXT)), list(LETTERS), family="DejaVu Sans Mono", fontsize=13)
    ax.get_xticklabels()[READER].set_color(QUERY)
    ax.get_xticklabels()[READER].set_weight("bold")
    ax.set(ylim=(0, 1.2), yticks=[0, 0.5, 1], ylabel="share of each\nletter's value")
    ax.tick_params(axis="x", length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10.5, loc="left")


def draw_successor(example: Example) -> None:
    """lsh_successor.png."""
    figure, axes = plt.subplots(2, 1, figsize=(8.6, 4.6), layout="constrained")
    titles = [
        "lsh_value_shift=0: the second h (red) finds the first h, and reads: h",
        "lsh_value_shift=1: it finds the same key, and reads what came after it: e",
    ]
    for shift, (ax, title, color) in enumerate(zip(axes, titles, ("#8aa0b5", MET), strict=True)):
        draw_weights(ax, example.attend([0, 1], value_shift=shift)[READER].tolist(), title, color)
    save(figure, "lsh_successor.png")


@torch.no_grad()
def draw_axial() -> None:
    """axial_positions.png: two tables of 4 vectors, and the 16 vectors that are made of them."""
    torch.manual_seed(0)
    settings = {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [4, 4], "hidden_size": 8, "hidden_dropout_prob": 0.0}
    layer = AxialPositionEmbeddings(ReformerConfig(max_position_embeddings=16, **settings))
    for table in layer.weights:
        table.normal_()
    rows, columns = (table.flatten(0, -2) for table in layer.weights)
    vectors = layer(torch.arange(16)[None])[0]
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 4.4), width_ratios=[1, 1, 2], layout="constrained")
    look = {"cmap": "PuOr", "vmin": -2.5, "vmax": 2.5, "aspect": "auto"}
    for ax, table, title in zip(axes, (rows, columns), ("table of rows", "table of columns"), strict=False):
        ax.imshow(table.numpy(), **look)
        ax.set_title(f"{title}\n4 vectors of 4 numbers", fontsize=10.5)
        ax.set(xticks=[], yticks=range(4))
    axes[2].imshow(vectors.numpy(), **look)
    axes[2].axvline(3.5, color="black", lw=1.2)
    labels = [f"position {place}: row {place // 4}, column {place % 4}" for place in range(16)]
    axes[2].set_yticks(range(16), labels, fontsize=9)
    axes[2].yaxis.tick_right()
    axes[2].set_title("16 positions\nvector of the row | vector of the column", fontsize=10.5)
    axes[2].set_xticks([])
    for ax in axes:
        ax.tick_params(length=0)
    save(figure, "axial_positions.png")


def main() -> None:
    """Draw and save all figures."""
    example = make_example()
    if not example.keys_met([0, 1])[READER, FOUND]:
        raise RuntimeError(f"Query {READER} does not find key {FOUND}; choose another seed in worked_example.py.")
    draw_hashing(example)
    draw_keys(example)
    draw_successor(example)
    draw_axial()


if __name__ == "__main__":
    main()
