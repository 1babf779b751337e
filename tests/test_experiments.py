"""The experiments of docs/experiments.md: tiny runs of each, what is not repeated, and the tables on the page."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from hf_reformer.training.run_report import TEMPLATE
from scripts import run_experiment
from scripts.experiments import (
    context,
    copy_reverse,
    copying,
    docstring_pairs,
    duplication,
    switches,
    synthetic,
    twins,
)


EXPERIMENTS = {"copying": copying, "duplication": duplication}
TINY = {
    "steps": {32: 4},
    "grid_steps": 2,
    "every": 2,
    "batch_size": 2,
    "few": 2,
    "many": 2,
    "learning_rates": (1e-3, 2e-3),
}


@pytest.fixture(params=EXPERIMENTS)
def tiny(request, monkeypatch):
    """An experiment's name and its module, with a task that takes no time."""
    module = EXPERIMENTS[request.param]
    monkeypatch.setattr(module, "TASK", replace(module.TASK, **TINY))
    # Its tables are of the one length it has.
    monkeypatch.setattr(copying, "LENGTH", 32)
    threads = torch.get_num_threads()
    yield request.param, module
    torch.set_num_threads(threads)


def test_runs_are_files_and_are_not_repeated(tiny, tmp_path, monkeypatch, capsys):
    name, module = tiny
    arguments = [name, "--seeds", "0", "--only", "dense-separate", "lsh-2", "--results", str(tmp_path / name)]
    run_experiment.main(arguments)
    printed = capsys.readouterr().out
    rates = ["0.001", "0.002"]
    names = [f"{contender}-32" for contender in ("dense-separate", "lsh-2")]
    assert sorted(path.stem for path in tmp_path.rglob("*.json")) == sorted(
        [f"{run}-0" for run in names] + [f"{run}-{rate}" for run in names for rate in rates]
    )
    result = json.loads((tmp_path / name / "lsh-2-32-0.json").read_text())
    assert [point["step"] for point in result["curve"]] == [2, 4]
    assert list(result["evaluated"]) == ["lsh-2", *module.TASK.evaluations["lsh-2"]]
    assert {"machine", "versions"} <= result.keys() and result["settings"]["model"]["attn_layers"][-1] == "lsh"
    assert module.tables(synthetic.read_runs(tmp_path / name)) in printed
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.width > 500

    monkeypatch.setattr(synthetic, "measure", lambda task, run, *_: pytest.fail(f"{run} was measured again"))
    run_experiment.main(arguments)
    (tmp_path / name / "lsh-2-32-0.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="contender='lsh-2', length=32, seed=0"):
        run_experiment.main(arguments)


def test_a_result_of_other_settings_is_not_taken_for_this_one(tiny, tmp_path, monkeypatch):
    name, module = tiny
    arguments = [name, "--seeds", "0", "--only", "dense-shared", "--results", str(tmp_path / name)]
    run_experiment.main(arguments)
    monkeypatch.setattr(module, "TASK", replace(module.TASK, batch_size=3))
    with pytest.raises(ValueError, match=r"is of a run with the settings .* Give other --results"):
        run_experiment.main(arguments)


def test_one_rate_for_all_needs_no_grid(tiny, tmp_path):
    name, _ = tiny
    given = ["--learning_rate", "3e-3", "--seeds", "1", "--only", "dense-separate", "dense-shared"]
    run_experiment.main([name, *given, "--results", str(tmp_path / "rate")])
    runs = synthetic.read_runs(tmp_path / "rate")
    assert len(runs) == len(list(tmp_path.rglob("*.json"))) == 2
    assert [(run["settings"]["learning_rate"], run["settings"]["seed"]) for run in runs] == [(3e-3, 1)] * 2


def test_a_run_is_the_same_again(tiny):
    _, module = tiny
    run = synthetic.Run(module.TASK.name, "lsh-2", 32, seed=3, learning_rate=1e-3, steps=4)
    first, second = (synthetic.measure(module.TASK, run, ("lsh-2",)) | {"cpu_seconds": 0} for _ in range(2))
    assert first == second


def test_the_second_word_is_the_first():
    tokens, labels = duplication.draw_sequences(3, 16, torch.Generator().manual_seed(0))
    assert tokens.shape == (3, 16) and (tokens[:, [0, 8]] == 0).all() and (tokens[:, 1:8] > 0).all()
    assert torch.equal(tokens[:, 9:], tokens[:, 1:8]) and torch.equal(labels[:, 9:], tokens[:, 9:])
    assert (labels[:, :9] == synthetic.IGNORED).all()


def test_what_counts_has_been_there_a_period_before():
    tokens, labels = copying.draw_sequences(50, 128, torch.Generator().manual_seed(0))
    begins = (labels != synthetic.IGNORED).int().argmax(1)
    assert begins.min() >= 22 and begins.max() <= 64
    for row, label, begin in zip(tokens, labels, begins.tolist(), strict=True):
        period = begin - 1
        assert torch.equal(row[period:], row[:-period])
        assert torch.equal(label[begin:], row[begin:]) and (label[:begin] == synthetic.IGNORED).all()


@pytest.mark.parametrize(
    ("folder", "module"), [("copying", copying), ("duplication", duplication), ("duplication_at_1e-3", duplication)]
)
def test_the_tables_in_the_docs_are_those_of_the_files(folder, module):
    runs = synthetic.read_runs(synthetic.RESULTS / folder)
    page = synthetic.RESULTS.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert runs and not set(module.tables(runs).splitlines()) - set(page)


@pytest.mark.parametrize(
    ("table", "records"),
    [
        (twins.table, lambda: twins.read_records(twins.RESULTS, twins.NUM_STEPS)),
        (context.tables, lambda: context.read_records(context.RESULTS)),
        (switches.tables, lambda: switches.read_runs(switches.RESULTS)),
        (copy_reverse.table, lambda: copy_reverse.read_records(synthetic.RESULTS / "copy_reverse")),
        (docstring_pairs.table, lambda: docstring_pairs.read_records(synthetic.RESULTS / "docstring_pairs")),
    ],
    ids=lambda value: getattr(value, "__module__", None),
)
def test_a_table_in_the_docs_is_that_of_the_files(table, records):
    page = synthetic.RESULTS.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert records() and not set(table(records()).splitlines()) - set(page)


def test_the_model_card_has_what_was_found():
    rows = context.card_table(context.read_records(context.RESULTS)).splitlines()
    assert len(rows) == 2 + len(context.ON_THE_CARD)
    assert not set(rows) - set(TEMPLATE.read_text(encoding="utf-8").splitlines())
