"""
Bytes of real text: which of eight parts of PyTorch an excerpt of 2,048 bytes of its Python source is from.

    python -m scripts.run_experiment byte_classification                    # seeds 0, 1, 2
    python -m scripts.run_experiment byte_classification --report

The text is there wherever this package is installed. It depends on PyTorch's version, so records carry a digest of it.
Files are on one side each, chosen by a hash of their names: a fifth for the test, a fifth for validation. They are cut
into excerpts, of which as many are taken of each part. All parts have one language and, by and large, one style; each
names some of the others. With PyTorch 2.13 one test excerpt in ten has 128 bytes together that a training excerpt has,
headers and idioms. Beside the models stand the share of the most frequent label and logistic regression on the
frequencies of single bytes, and of 3 or 5 bytes together.

The head reads the mean of all bytes, because no place of an excerpt counts more than others. What is fixed beforehand
is in `classification`; a step is of 4 excerpts.

Planned: in CPU seconds on one core of an AMD EPYC that multiplies in bfloat16, other processes beside, a step took 0.6
(local), 0.8 (local+lsh) and 1.3 to 1.6 (local+full), in runs of 6 to 100 steps; 40 excerpts of the test took 2.0, 2.9
and 4.9. So a stage takes at most 13 minutes, 25 from random weights, all seeds of all contenders about 6 to 7 hours,
of which the learning rates take one.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_reformer import ReformerByteTokenizer
from hf_reformer.training.corpus import read_text, split_documents

from .classification import Examples, Splits, Task, parse_arguments, run_and_report


PARTS = ("_dynamo", "_inductor", "ao", "distributed", "fx", "nn", "testing", "utils")
# What a program wrote, near copies of one another.
LEFT_OUT = "serialized_patterns"
EXCERPT = 2048
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.2
# Of each part.
SIZES = {"train": 440, "validation": 60, "test": 100}
DATA_SEED = 0
FIRST_BYTE_ID = 2
# Sequences of bytes share this many weights, by a hash.
NUM_WEIGHTS = 2**18
ORDERS, EPOCHS = (1, 3, 5), 10


def read_files(part: Path) -> dict[str, list[bytes]]:
    """The files of each split that hold an excerpt."""
    files = read_text(part, "*.py")
    kept = [
        row for row, file in enumerate(files) if len(file["text"].encode()) >= EXCERPT and LEFT_OUT not in file["name"]
    ]
    files = files.select(kept)
    # The same hash decides twice: the lowest fifth, then the next.
    rest, test = split_documents(files, TEST_SHARE)
    train, validation = split_documents(rest, TEST_SHARE + VALIDATION_SHARE)
    splits = {"train": train, "validation": validation, "test": test}
    return {name: [text.encode() for text in split["text"]] for name, split in splits.items()}


def excerpts(files: list[bytes]) -> np.ndarray:
    """Whole excerpts of each file, `[N, L]`, that share no byte."""
    whole = [np.frombuffer(file[: len(file) // EXCERPT * EXCERPT], np.uint8).reshape(-1, EXCERPT) for file in files]
    return np.concatenate(whole)


def read_splits(sizes: dict[str, int] | None = None, seed: int = DATA_SEED) -> Splits:
    """As many excerpts of each part, in random order."""
    generator, root = np.random.default_rng(seed), Path(torch.__file__).parent
    parts = [read_files(root / part) for part in PARTS]
    splits = {}
    for name, size in (sizes or SIZES).items():
        found = [generator.permutation(excerpts(files[name])) for files in parts]
        for part, rows in zip(PARTS, found, strict=True):
            if len(rows) < size:
                raise ValueError(f"torch/{part} has {len(rows)} excerpts for {name}, not {size}: another version?")
        rows = np.concatenate([rows[:size] for rows in found])
        labels = np.repeat(np.arange(len(PARTS)), size)
        order = generator.permutation(len(labels))
        splits[name] = Examples(list(rows[order].astype(np.int64) + FIRST_BYTE_ID), labels[order])
    return Splits(**splits)


def codes_of_sequences(examples: Examples, order: int) -> torch.Tensor:
    """`[N, L - order + 1]`: a hash of the bytes at each place and the `order - 1` before; of one byte its id."""
    ids = np.stack(examples.tokens)
    codes = ids[:, order - 1 :].copy()
    for back in range(1, order):
        codes = (codes * 1_000_003 + ids[:, order - 1 - back : ids.shape[1] - back]) % (2**31 - 1)
    return torch.from_numpy(codes % NUM_WEIGHTS)


def logistic_regression(splits: Splits, order: int) -> float:
    """Test accuracy on frequencies of sequences of bytes, of the pass that is best on validation examples."""
    codes = {name: codes_of_sequences(getattr(splits, name), order) for name in SIZES}
    labels = {name: torch.from_numpy(getattr(splits, name).labels) for name in SIZES}
    model = nn.EmbeddingBag(NUM_WEIGHTS, len(PARTS), mode="mean", _weight=torch.zeros(NUM_WEIGHTS, len(PARTS)))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=6.0)
    generator, found = torch.Generator().manual_seed(DATA_SEED), []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels["train"]), generator=generator).split(256):
            cross_entropy(model(codes["train"][rows]), labels["train"][rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            hits = [model(codes[name]).argmax(1) == labels[name] for name in ("validation", "test")]
        found.append(tuple(hit.double().mean().item() for hit in hits))
    return max(found, key=lambda shares: shares[0])[1]


def baselines(splits: Splits) -> dict[str, float]:
    """Test accuracy of the most frequent label in training, and of logistic regressions."""
    most_frequent = np.bincount(splits.train.labels).argmax()
    found = {"the most frequent label": float(np.mean(splits.test.labels == most_frequent))}
    for order in ORDERS:
        name = "single bytes" if order == 1 else f"{order} bytes together"
        found[f"logistic regression, {name}"] = logistic_regression(splits, order)
    return found


TASK = Task(
    name="byte_classification",
    title="Parts of PyTorch",
    read=read_splits,
    baselines=baselines,
    num_labels=len(PARTS),
    vocab_size=len(ReformerByteTokenizer()),
    context_length=EXCERPT,
    mean_pooled=True,
    batch_size=4,
)


def main(argv: list[str] | None = None) -> None:
    """Make the runs that are missing; table and figure."""
    run_and_report(TASK, parse_arguments(__doc__, TASK, argv))
