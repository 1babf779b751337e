"""How good a classifier is: accuracy and macro F1 beside baselines on the same texts, and what is taken for what."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from sklearn.pipeline import make_pipeline

from .labelled_texts import LabelledTexts
from .tables import have_blanks


MOST_FEATURES, MOST_PASSES = 200_000, 1000
# A matrix with more labels has no numbers in its cells.
MOST_NUMBERED = 20


def classification_figures(labels: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """`accuracy`, and `macro_f1`: the mean over the labels there are, each counting alike."""
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", labels=sorted(set(labels)), zero_division=0)),
    }


def baselines(train: LabelledTexts, measured: LabelledTexts) -> dict[str, dict[str, float]]:
    """
    The same figures of what takes no Reformer: logistic regression on TF-IDF, and the most frequent label.

    Words and pairs of words are counted, or where texts have hardly any blanks, sequences of 1 to 5 characters.

    Args:
        train: What the regression learns from: the whole texts, however much of them a model reads.
        measured: What the figures are of.
    """
    most_frequent = Counter(train.labels).most_common(1)[0][0]
    has_words = have_blanks(train.texts) and any(map(str.isalnum, "".join(text[:1000] for text in train.texts[:1000])))
    counted = (
        {"ngram_range": (1, 2), "token_pattern": r"(?u)\w+"}
        if has_words
        else {"analyzer": "char", "ngram_range": (1, 5)}
    )
    name = f"TF-IDF of {'words and their pairs' if has_words else '1 to 5 characters'}, logistic regression"
    regression = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, max_features=MOST_FEATURES, **counted),
        LogisticRegression(C=10, max_iter=MOST_PASSES),
    )
    return {
        name: classification_figures(
            measured.labels, regression.fit(train.texts, train.labels).predict(measured.texts)
        ),
        "the most frequent label": classification_figures(measured.labels, [most_frequent] * len(measured)),
    }


def draw_confusion(path: Path, labels: Sequence[str], predicted: Sequence[str], names: Sequence[str]) -> None:
    """Draw which label is taken for which: a row for each label, a column for each prediction, shares of the row."""
    counts = confusion_matrix(labels, predicted, labels=list(names))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = float(np.clip(0.6 * len(names) + 2, 4, 16))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the label's texts", shrink=0.8)
    shown = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    if len(names) <= MOST_NUMBERED:
        axes.set_xticks(range(len(names)), shown, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), shown)
        for row, column in np.ndindex(counts.shape):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="predicted", ylabel="label")
    figure.savefig(path, dpi=120)
