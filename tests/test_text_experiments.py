"""Twins on text, what context brings, and docstrings as a text: tiny runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text_experiments import has_picture, small

from scripts import run_experiment
from scripts.experiments import context, docstrings, long_text, resumable, text_models, twins


pytestmark = pytest.mark.slow


@pytest.fixture
def small_contenders(monkeypatch):
    """LSH layers with values of successors, and full ones."""
    monkeypatch.setitem(text_models.CONTENDERS, "lsh, successors", small(**text_models.SHIFTED))
    monkeypatch.setitem(
        text_models.CONTENDERS, "lsh, successors, 2 rounds", small(**text_models.SHIFTED, num_hashes=2)
    )
    monkeypatch.setitem(text_models.CONTENDERS, "full", small(["local", "full"]))


def twins_arguments(text_folder, results, *contenders):
    return [
        *("twins", "--only", *contenders, "--seeds", "0", "1", "--steps", "6", "--grid_steps", "2"),
        *("--eval_every", "2", "--context_length", "128", "--text_path", text_folder, "--results", str(results)),
    ]


def test_twins_are_trained_once_with_the_best_rate(small_contenders, text_folder, tmp_path, monkeypatch, capsys):
    results = tmp_path / "twins"
    arguments = twins_arguments(text_folder, results, "lsh, successors", "lsh, successors, 2 rounds", "full")
    run_experiment.main(arguments)
    records = [json.loads(path.read_text()) for path in results.glob("*.json")]
    runs = {name: [record for record in records if record["run"]["contender"] == name] for name in twins.CONTENDERS}
    assert {name: len(of_it) for name, of_it in runs.items() if of_it} == {
        # Four rates, then two seeds; more rounds have the rate of one.
        "lsh, successors": 6,
        "full": 6,
        "lsh, successors, 2 rounds": 2,
    }
    for name in ("lsh, successors", "full"):
        trials = {
            record["run"]["learning_rate"]: record["evaluations"][-1]["bits_per_byte"]
            for record in runs[name]
            if record["run"]["num_steps"] == 2
        }
        best = min(trials, key=trials.get)
        whole = [record for record in runs[name] if record["run"]["num_steps"] == 6]
        whole += runs["lsh, successors, 2 rounds"] if name != "full" else []
        assert trials.keys() == set(twins.GRID) and {record["run"]["learning_rate"] for record in whole} == {best}
    assert [row["step"] for row in whole[0]["evaluations"]] == [2, 4, 6]
    assert "| lsh, successors, 2 rounds | 2 |" in capsys.readouterr().out and has_picture(tmp_path / "twins.png")

    monkeypatch.setattr(resumable.ResumableTraining, "_train", lambda *_: pytest.fail("it was trained again"))
    run_experiment.main(arguments)
    run_experiment.main(["twins", "--report", "--results", str(results)])


def test_a_twin_that_was_stopped_goes_on(small_contenders, text_folder, tmp_path, monkeypatch):
    def last_evaluation(results):
        arguments = twins.parse_arguments(twins_arguments(text_folder, results, "full")[1:])
        last = twins.training(arguments, "full", 0, 1e-2, 6)()["evaluations"][-1]
        return {key: value for key, value in last.items() if "seconds" not in key}

    whole, evaluate = last_evaluation(tmp_path / "whole"), twins.Training.evaluate

    def stop_at_the_second(training, model):
        if training.checkpoint.is_file():
            raise KeyboardInterrupt
        return evaluate(training, model)

    with monkeypatch.context() as stopped:
        stopped.setattr(twins.Training, "evaluate", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            last_evaluation(tmp_path / "stopped")
    [checkpoint] = resumable.CHECKPOINTS.glob("*.pt")
    assert torch.load(checkpoint, weights_only=False)["record"]["step"] == 2
    assert last_evaluation(tmp_path / "stopped") == whole and not checkpoint.exists()


def test_a_model_whose_weights_are_gone_is_trained_again(small_contenders, text_folder, tmp_path, monkeypatch):
    arguments = twins.parse_arguments(twins_arguments(text_folder, tmp_path / "twins", "full")[1:])
    training = twins.training(arguments, "full", 0, 1e-2, 2)
    weights = training.trained_model().state_dict()
    training.weights.unlink()
    with monkeypatch.context() as stopped:
        stopped.setattr(training, "_train", lambda *_: pytest.fail("it is trained again"))
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            training.trained_model()
    # What was there is there until there is another.
    assert training.path.is_file()
    for name, weight in training.trained_model().state_dict().items():
        assert torch.equal(weight, weights[name])
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("it was trained twice"))
    assert not training.trained_model().training


def test_what_context_brings_is_measured(small_contenders, text_folder, tmp_path, monkeypatch, capsys):
    lengths, distances = (64, 256), (70, 100)
    for module in (context, long_text):
        monkeypatch.setattr(module, "LENGTHS", lengths)
        monkeypatch.setattr(module, "DISTANCES", distances)
    for name, value in (("PASSAGE", 64), ("BEFORE", 32), ("MOST_PASSAGES", 2), ("LEAST_PASSAGES", 2)):
        monkeypatch.setattr(long_text, name, value)
    names, results = ["lsh, successors", "full"], tmp_path / "context"
    arguments = [*("context", "--only", *names, "--seeds", "0", "--steps", "8", "--grid_steps", "1")]
    arguments += ["--eval_every", "4", "--context_length", "128", "--text_path", text_folder]
    arguments += ["--twins", str(tmp_path / "twins"), "--results", str(results)]
    run_experiment.main(arguments)
    records = context.read_records(results)
    ways = {"lsh, successors": list(long_text.OF_LSH), "full": [long_text.AS_TRAINED, long_text.RESCALED]}
    assert list(records) == [(name, length, way) for length in (128, 512) for name in names for way in ways[name]]
    for [record] in records.values():
        assert list(record["windows"]) == ["64", "256"] and list(record["positions"]) == ["0-64", "64-256"]
        assert list(record["repetition"]) == ["70", "100"]
    bits = {key: record["windows"] for key, [record] in records.items() if key[1] == 128}
    assert len({of_it["256"] for of_it in bits.values()}) == len(bits)
    # Positions are rescaled for texts that are longer than those of the training.
    assert bits["full", 128, long_text.AS_TRAINED]["64"] == bits["full", 128, long_text.RESCALED]["64"]
    assert context.tables(records) in capsys.readouterr().out and has_picture(tmp_path / "context.png")

    monkeypatch.setattr(resumable.ResumableTraining, "_train", lambda *_: pytest.fail("it was trained again"))
    run_experiment.main(arguments)


class Copies(torch.nn.Module):
    """Knows a byte if the three before it, and the byte, stood together before; guesses among 258 otherwise."""

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 258)
        for row, ids in enumerate(input_ids.tolist()):
            seen = {}
            for end in range(3, len(ids) + 1):
                key = tuple(ids[end - 3 : end])
                if key in seen:
                    logits[row, end - 1, ids[seen[key]]] = 100
                if end < len(ids):
                    seen[key] = end
        return SimpleNamespace(logits=logits)


def test_a_passage_is_known_where_it_comes_again():
    text = torch.randint(2, 258, (4096,), generator=torch.Generator().manual_seed(0))
    guess = np.log2(258)
    for distance in (256, 1000):
        bits = long_text.bits_of_repetition(Copies(), text, distance)
        assert bits["again"] < 0.1 and abs(bits["first"] - guess) < 0.1 and abs(bits["late"] - guess) < 0.1
    text[3000:3100] = text[:100]
    bits = long_text.bits_of_windows(Copies(), text, 4096)
    assert bits.shape == (1, 4095) and (bits[0, 3002:3099] < 0.1).mean() > 0.95 and (bits[0, :2999] > 7).mean() > 0.95
    ranges = long_text.bits_of_positions(bits, (3000, 3100, 4096))
    assert list(ranges) == ["0-3000", "3000-3100", "3100-4096"]
    assert ranges["3000-3100"] == pytest.approx(bits[0, 2999:3099].mean())


def test_docstrings_are_a_text(tmp_path):
    folder = docstrings.write_docstrings("accelerate", tmp_path)
    texts = {path.relative_to(folder): path.read_text() for path in folder.rglob("*.txt")}
    text = texts[Path("accelerator.txt")]
    assert "Creates an instance of an accelerator for distributed training" in text and "def " not in text[:500]
    paragraphs = [paragraph for text in texts.values() for paragraph in text.split("\n\n") if len(paragraph) > 1000]
    assert len(set(paragraphs)) == len(paragraphs)
    with pytest.raises(ValueError, match="no installed package nowhere_to_be_found"):
        docstrings.write_docstrings("nowhere_to_be_found", tmp_path)
