"""Twins on text, what context brings, and docstrings as a text: tiny runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from text_experiments import has_picture, small

from scripts import run_experiment
from scripts.experiments import context, docstrings, long_text, resumable, text_models, text_training, twins


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
        last = twins.train(arguments, "full", 0, 1e-2, 6)["evaluations"][-1]
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


def test_what_context_brings_is_measured(small_contenders, text_folder, tmp_path, monkeypatch, capsys):
    for name, value in (("RANGES", (64, 256)), ("DISTANCES", (100, 300)), ("PASSAGE", 64)):
        monkeypatch.setattr(long_text, name, value)
    for name, value in (
        ("TRAINED_BYTES", 256),
        ("CONTEXT_LENGTH", 128),
        ("NUM_EVALUATIONS", 1),
        ("TWINS", tmp_path / "twins"),
    ):
        monkeypatch.setattr(context, name, value)
    for name, value in (("NUM_STEPS", 4), ("CONTEXT_LENGTH", 64), ("EVAL_EVERY", 4), ("GRID_STEPS", 1)):
        monkeypatch.setattr(twins, name, value)
    read = text_training.read_corpus
    monkeypatch.setattr(text_training, "read_corpus", lambda run: read(replace(run, text_path=text_folder)))
    names = ["full", "lsh, successors"]
    run_experiment.main(["twins", "--only", *names, "--seeds", "0", "--results", str(context.TWINS)])
    run_experiment.main(["context", "--only", *names, "--seeds", "0", "--results", str(tmp_path / "context")])
    runs = context.read_records(tmp_path / "context")
    assert list(runs) == [(name, length) for length in (64, 128) for name in names]
    for record in (record for records in runs.values() for record in records):
        assert list(record["positions"]) == ["0-64", "64-256"] and list(record["repetition"]) == ["100", "300"]
    printed = capsys.readouterr().out
    assert "| lsh, successors | 64 | 1 |" in printed and "| full | 128 | 1 |" in printed
    assert has_picture(tmp_path / "context.png")


def test_docstrings_are_a_text(tmp_path):
    folder = docstrings.write_docstrings("accelerate", tmp_path)
    texts = {path.relative_to(folder): path.read_text() for path in folder.rglob("*.txt")}
    text = texts[Path("accelerator.txt")]
    assert "Creates an instance of an accelerator for distributed training" in text and "def " not in text[:500]
    paragraphs = [paragraph for text in texts.values() for paragraph in text.split("\n\n") if len(paragraph) > 1000]
    assert len(set(paragraphs)) == len(paragraphs)
    with pytest.raises(ValueError, match="no installed package nowhere_to_be_found"):
        docstrings.write_docstrings("nowhere_to_be_found", tmp_path)
