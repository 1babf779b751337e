"""ListOps and the classification of bytes: their examples, and tiny runs of both experiments."""

import statistics
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_reformer import ReformerForSequenceClassification
from scripts import run_experiment
from scripts.experiments import byte_classification, classification, listops, resumable


SYMBOLS = {12: "min", 13: "max", 14: "median", 15: "total"}
TINY_SIZE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 16,
    "reversible": False,
}
TINY = {
    "baselines": lambda splits: {"guess": 0.1},
    "batch_size": 2,
    "pretraining_steps": 2,
    "tuning_steps": 3,
    "grid_steps": 1,
    "eval_every": 2,
    "watched": 2,
    "learning_rates": (1e-3, 2e-3),
    "model": TINY_SIZE,
}


@pytest.fixture(scope="module")
def expressions():
    return listops.read_splits({"test": 100, "validation": 20, "train": 200})


@pytest.fixture(scope="module")
def files():
    """The files of each split, of two parts."""
    root = byte_classification.Path(torch.__file__).parent
    return [byte_classification.read_files(root / part) for part in ("ao", "nn")]


@pytest.fixture(params=["listops", "byte_classification"])
def tiny(request, monkeypatch, tmp_path, expressions):
    """An experiment that takes no time, and how it is started."""
    module = {"listops": listops, "byte_classification": byte_classification}[request.param]

    def read():
        cut = [(getattr(expressions, name), size) for name, size in (("train", 8), ("validation", 4), ("test", 4))]
        parts = [
            classification.Examples(
                [tokens[: 40 + 8 * row] for row, tokens in enumerate(examples.tokens[:size])],
                examples.labels[:size] % module.TASK.num_labels,
            )
            for examples, size in cut
        ]
        return classification.Splits(*parts)

    monkeypatch.setattr(module, "TASK", replace(module.TASK, read=read, **TINY))
    monkeypatch.setattr(resumable, "CHECKPOINTS", tmp_path / "checkpoints")
    return module, [request.param, "--results", str(tmp_path / "results"), "--seeds", "0", "--only"]


def independent_value(tokens):
    """The value of an expression, by Python's own evaluation of it as calls."""
    text = "".join(
        f"{SYMBOLS[token]}([" if token in SYMBOLS else "])," if token == 16 else f"{token - 2}," for token in tokens
    )
    names = {"median": lambda values: int(statistics.median(values)), "total": lambda values: sum(values) % 10}
    return eval(text, names)[0]


def depth_and_arguments(tokens):
    """The number of operators around the innermost token, and how many arguments operators have."""
    open_operators, deepest, numbers = [], 0, set()
    for token in tokens:
        if token == 16:
            numbers.add(open_operators.pop())
            continue
        if open_operators:
            open_operators[-1] += 1
        if token in SYMBOLS:
            open_operators.append(0)
        deepest = max(deepest, len(open_operators))
    return deepest, numbers


def test_labels_are_the_values_of_the_expressions(expressions):
    assert independent_value([13, 4, 12, 9, 8, 16, 2, 16]) == 6 and independent_value([14, 3, 4, 16]) == 1
    for tokens, label in zip(expressions.test.tokens, expressions.test.labels, strict=True):
        assert independent_value(tokens.tolist()) == label
        assert listops.known_value(int(tokens[0]), iter(tokens[1:].tolist()), 10) == label


def test_expressions_are_those_of_the_published_rules(expressions):
    examples = expressions.train
    assert len(examples) == 200 and examples.lengths.min() > 500 and examples.lengths.max() < 2000
    shapes = [depth_and_arguments(tokens.tolist()) for tokens in examples.tokens]
    assert max(depth for depth, _ in shapes) == 9 and set().union(*(numbers for _, numbers in shapes)) == {
        *range(2, 11)
    }
    counts = Counter(np.concatenate(examples.tokens).tolist())
    assert counts.keys() == set(range(2, 17)) and counts[16] == sum(counts[token] for token in SYMBOLS)
    for alike in (range(2, 12), range(12, 16)):
        assert max(counts[token] for token in alike) < 1.1 * min(counts[token] for token in alike)


def test_all_digits_are_labels_and_the_outer_ones_more_often(expressions):
    counts = np.bincount(np.concatenate([expressions.train.labels, expressions.test.labels]), minlength=10)
    assert counts.min() > 0 and min(counts[0], counts[9]) > np.median(counts)


def test_no_expression_is_on_two_sides_and_a_seed_makes_the_same(expressions):
    sides = [
        {tokens.tobytes() for tokens in getattr(expressions, side).tokens} for side in ("train", "validation", "test")
    ]
    assert [len(side) for side in sides] == [200, 20, 100] and len(set.union(*sides)) == 320
    again, other = (listops.read_splits({"test": 3, "validation": 1, "train": 1}, seed) for seed in (0, 1))
    assert all(map(np.array_equal, again.test.tokens, expressions.test.tokens))
    assert again.description["digest"] != other.description["digest"] != expressions.description["digest"]


def test_who_sees_deeper_guesses_better(expressions):
    shares = list(listops.baselines(expressions).values())
    assert shares == sorted(shares) and shares[0] < shares[-1] < 1


def test_no_file_is_on_two_sides(files):
    for splits in files:
        texts = [set(splits[name]) for name in ("train", "validation", "test")]
        assert all(texts) and not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_excerpts_are_of_the_files(files):
    found = byte_classification.excerpts(files[0]["test"])
    assert found.shape[1] == 2048 and len(found) == sum(len(file) // 2048 for file in files[0]["test"])
    assert found[0].tobytes() == files[0]["test"][0][:2048]


def test_labels_of_bytes_are_balanced(files, monkeypatch):
    monkeypatch.setattr(byte_classification, "PARTS", ("ao", "nn"))
    monkeypatch.setattr(byte_classification, "read_files", lambda part: files[("ao", "nn").index(part.name)])
    monkeypatch.setattr(byte_classification, "EPOCHS", 2)
    splits = byte_classification.read_splits({"train": 30, "validation": 10, "test": 20})
    assert [np.bincount(getattr(splits, name).labels).tolist() for name in ("train", "test")] == [[30, 30], [20, 20]]
    for tokens, label in zip(splits.test.tokens, splits.test.labels, strict=True):
        excerpt = (tokens - 2).astype(np.uint8).tobytes()
        assert [any(excerpt in file for file in splits["test"]) for splits in files][label]
    shares = byte_classification.baselines(splits)
    assert shares.pop("the most frequent label") == 0.5 and len(shares) == 3
    with pytest.raises(ValueError, match=r"torch/ao has \d+ excerpts for test, not 100000"):
        byte_classification.read_splits({"test": 100_000})


def test_codes_tell_sequences_apart():
    examples = classification.Examples([np.array([5, 6, 7, 5, 6, 7, 6])], np.array([0]))
    assert byte_classification.codes_of_sequences(examples, 1)[0].tolist() == [5, 6, 7, 5, 6, 7, 6]
    codes = byte_classification.codes_of_sequences(examples, 3)[0].tolist()
    assert len(codes) == 5 and codes[0] == codes[3] and len(set(codes)) == 4


def test_runs_are_files_and_are_not_repeated(tiny, tmp_path, monkeypatch, capsys):
    module, arguments = tiny
    run_experiment.main([*arguments, "local+lsh"])
    # Libraries may print before.
    _, begin, tables = capsys.readouterr().out.partition("| layers")
    printed = begin + tables
    records = classification.read_records(tmp_path / "results")
    assert [stage for _, stage in records] == ["masked", "pretrained", "random"]
    assert [len(list((tmp_path / "results" / folder).glob("*.json"))) for folder in ("", "grid")] == [4, 6]
    pretrained, random = (records["local+lsh", start][0] for start in ("pretrained", "random"))
    assert (pretrained["step"], random["step"]) == (3, 5) and [row["step"] for row in random["evaluations"]] == [
        2,
        4,
        5,
    ]
    assert 0 <= random["test"]["accuracy"] <= 1 and {"machine", "versions", "settings"} <= random.keys()
    assert "| guess |  |  |  | 10.0 |  |" in printed and "| local+lsh | random weights | 1 |" in printed
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.width > 500

    monkeypatch.setattr(resumable.ResumableTraining, "_train", lambda *_: pytest.fail("It was trained again."))
    run_experiment.main([*arguments, "local+lsh"])
    run_experiment.main([*arguments, "local+lsh", "--report"])
    assert capsys.readouterr().out == printed * 2
    monkeypatch.setattr(module, "TASK", replace(module.TASK, model=TINY_SIZE | {"num_hashes": 2}))
    with pytest.raises(ValueError, match=r"is of a run with the settings .* Give another --results"):
        run_experiment.main([*arguments, "local+lsh"])


def test_what_was_learned_from_hidden_tokens_is_what_labels_begin_with(tiny, tmp_path):
    module, _ = tiny
    experiment = classification.Experiment(module.TASK, tmp_path)
    training = experiment.training("local", "pretrained", seed=1, learning_rate=1e-3)
    model = training.make_model()
    assert isinstance(model, ReformerForSequenceClassification) and model.config.num_labels == module.TASK.num_labels
    base = training.base.folder
    saved = classification.ReformerForMaskedLM.from_pretrained(base).reformer.state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.reformer.state_dict().items())
    # Only its record is kept in the repository.
    (base / "model.safetensors").rename(tmp_path / "kept.safetensors")
    (base / "config.json").unlink()
    base.rmdir()
    training.base.weights()
    assert (base / "model.safetensors").read_bytes() == (tmp_path / "kept.safetensors").read_bytes()


def test_a_run_goes_on_from_its_checkpoint(tiny, tmp_path, monkeypatch):
    module, _ = tiny
    experiment = classification.Experiment(module.TASK, tmp_path / "whole")
    whole = experiment.training("local+full", "random", seed=3, learning_rate=1e-3)()
    experiment.results = tmp_path / "parts"
    training = experiment.training("local+full", "random", seed=3, learning_rate=1e-3)
    steps, whole_step = [], training._step

    def stopped(model, optimizer, batch, step):
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return whole_step(model, optimizer, batch, step)

    monkeypatch.setattr(training, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        training()
    record = training()
    assert steps == [0, 1, 2, 3, 2, 3, 4] and record["test"] == whole["test"]
    assert [row["loss"] for row in record["evaluations"]] == [row["loss"] for row in whole["evaluations"]]
    assert not training.checkpoint.exists()


def test_hidden_tokens_are_the_labels_and_padding_is_neither():
    examples = classification.Examples([np.full(400, 5), np.full(300, 6), np.array([7, 7])], np.zeros(3))
    inputs, labels = classification.hide(examples.batch(np.array([0, 1])), seed=0)
    hidden = labels != -100
    assert (inputs["input_ids"] == classification.MASK).equal(hidden) and not hidden[1, 300:].any()
    assert labels[hidden].unique().tolist() == [5, 6] and 0.1 < hidden.sum() / 700 < 0.2
    assert inputs["attention_mask"].sum(1).tolist() == [400, 300]
    for seed in range(5):
        inputs, labels = classification.hide(examples.batch(np.array([2])), seed)
        assert (labels != -100).any() and "attention_mask" not in inputs


def test_batches_take_every_example_once_and_are_of_about_one_length():
    lengths = np.random.default_rng(0).integers(500, 2000, 64)
    order = classification.order_of_batches(lengths, 4, seed=0)
    batches = [next(order) for _ in range(32)]
    assert sorted(np.concatenate(batches[:16])) == list(range(64)) == sorted(np.concatenate(batches[16:]))
    assert np.mean([np.ptp(lengths[rows]) for rows in batches]) < 200
    again = classification.order_of_batches(lengths, 4, seed=0)
    assert all(np.array_equal(rows, next(again)) for rows in batches)


def test_the_mean_of_the_tokens_leaves_out_padding():
    torch.manual_seed(0)
    task = replace(byte_classification.TASK, model=TINY_SIZE)
    model = classification.MeanPooledClassifier(task.config("local")).eval()
    examples = classification.Examples([np.arange(2, 52), np.arange(2, 32)], np.zeros(2))
    together = model(**examples.batch(np.array([0, 1]))).logits
    for row in (0, 1):
        torch.testing.assert_close(together[row], model(**examples.batch(np.array([row]))).logits[0])
