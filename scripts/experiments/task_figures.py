"""
What vectors and scores are worth beside baselines, for docs/tasks.md.

    hf-reformer embed --model runs/demo --data functions.csv --context_length 512 --output vectors.npy
    python -m scripts.experiments.task_figures vectors functions.csv vectors.npy
    hf-reformer score --model runs/demo --data lines.csv --output scores.csv
    python -m scripts.experiments.task_figures scores lines.csv scores.csv

Vectors: accuracy and macro F1 of logistic regression on them, on a fifth of the texts of each label, beside what
`hf-reformer classify` sets beside a model. Scores: the chance that an odd line has a higher score than an ordinary one
(area under the ROC curve), beside the length of a line and the bits per byte of a table of three bytes together,
counted in the text that the model was trained on.
"""

import argparse
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_reformer.training.classification_figures import baselines, classification_figures
from hf_reformer.training.corpus import TextArguments, read_standard_library, split_documents
from hf_reformer.training.labelled_texts import LabelledDataArguments, read_labelled
from hf_reformer.training.tables import read_table
from hf_reformer.training.task_report import figures_table


# Of the count of each sequence, so that one that was never seen has a chance, too.
SMOOTHING = 0.1


def of_vectors(texts: Path, vectors: Path) -> dict[str, dict[str, float]]:
    """Figures of logistic regression on vectors, and of the baselines."""
    sides, found = read_labelled(LabelledDataArguments(data=str(texts))), np.load(vectors)
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    regression.fit(found[sides.train.rows], sides.train.labels)
    predicted = regression.predict(found[sides.held_out.rows])
    own = {"logistic regression on the vectors": classification_figures(sides.held_out.labels, predicted)}
    return own | baselines(sides.train, sides.held_out)


def bits_by_counting(text: bytes, lines: list[str]) -> list[float]:
    """Bits per byte of each line by the counts of three bytes together in the text, a line feed in front of it."""
    triples = Counter(zip(text, text[1:], text[2:], strict=False))
    pairs = Counter(pairwise(text))
    bits = []
    for line in lines:
        data = b"\n\n" + line.encode()
        chances = [
            (triples[triple] + SMOOTHING) / (pairs[triple[:2]] + 256 * SMOOTHING)
            for triple in zip(data, data[1:], data[2:], strict=False)
        ]
        bits.append(-sum(map(math.log2, chances)) / len(chances))
    return bits


def of_scores(texts: Path, scores: Path) -> dict[str, dict[str, float]]:
    """The area under the ROC curve of the scores, and of the baselines."""
    table = read_table(texts)
    is_odd = [said == "yes" for said in table["odd"]]
    train, _ = split_documents(read_standard_library(), TextArguments().held_out_fraction)
    candidates = {
        "bits per byte of the model": [float(bits) for bits in read_table(scores)["bits_per_byte"]],
        "bits per byte of a table of three bytes": bits_by_counting(
            "\n".join(train["text"]).encode(), table["text"][:]
        ),
        "length of the line": [len(line) for line in table["text"]],
    }
    return {name: {"area under the curve": roc_auc_score(is_odd, values)} for name, values in candidates.items()}


def main(argv: list[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("kind", choices=("vectors", "scores"))
    parser.add_argument("texts", type=Path, help="the csv file")
    parser.add_argument("result", type=Path, help="what hf-reformer embed or score wrote of it")
    given = parser.parse_args(argv)
    print(figures_table((of_vectors if given.kind == "vectors" else of_scores)(given.texts, given.result)))


if __name__ == "__main__":
    main()
