"""`make integrations`: what is run again, what counts as a failure, the page. The tools are not run here."""

import json
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest

from scripts.maintain import check_integrations
from scripts.maintain.integrations import impossible, setting, texts
from scripts.maintain.integrations.setting import CONTROL, OURS, Setting, Wrong
from scripts.maintain.integrations_report import write_report


KEY = {"torch": "2.13.0", "trl": "1.16.0", "check": "abc"}


def works(**figures):
    return {"ok": True, "figures": figures, "key": KEY}


def fails(error):
    return {"ok": False, "error": error, "key": KEY}


def refused(reason):
    return {"refused": reason, "key": KEY}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    setting.save_models(folder)
    return folder


def answer(given):
    """A check that says what it was given."""
    print("words for the log")
    return {"subject": given.subject, "kept": sorted(path.name for path in given.folder.iterdir())}


def misuse(given):
    raise ValueError(f"no such thing in {given.folder}/sub folder/file.py")


def say_no(given):
    return {"refused": "for a reason"}


def die(given):
    os._exit(3)


def sleep(given):
    time.sleep(60)


CHECKS = {"answer": answer, "misuse": misuse, "no": say_no, "die": die, "sleep": sleep}
TOOLS = ()


def test_a_check_runs_apart_and_whatever_becomes_of_it_is_a_result(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(check_integrations.ROOT / "tests"))
    monkeypatch.setattr(check_integrations, "START_METHOD", "fork")
    module, limits = SimpleNamespace(__name__="test_integrations"), {"sleep": 0.5}
    # Those of other tests.
    children = set(multiprocessing.active_children())
    results = {
        name: check_integrations.run_check(
            f"tool: {name}", module, Setting(OURS, tmp_path, tmp_path / name), limits.get(name, 60)
        )
        for name in CHECKS
    }
    assert all(result.pop("seconds") < 60 for result in results.values())
    assert results == {
        "answer": {"ok": True, "figures": {"subject": OURS, "kept": ["log.txt"]}},
        "misuse": {"ok": False, "error": "ValueError: no such thing in …/file.py"},
        "no": {"refused": "for a reason"},
        "die": {"ok": False, "error": "the process died with exit code 3"},
        "sleep": {"ok": False, "error": "took more than 0 s"},
    }
    assert "words for the log" in (tmp_path / "answer" / "log.txt").read_text()
    assert "Traceback" in (tmp_path / "misuse" / "log.txt").read_text()
    assert set(multiprocessing.active_children()) == children


def run_main(monkeypatch, tmp_path, *arguments):
    """The names of what was run."""
    run = []

    def note(name, module, setting, limit):
        run.append((name, setting.subject))
        return {"ok": True, "figures": {}, "seconds": 0.0}

    monkeypatch.setattr(check_integrations, "run_check", note)
    monkeypatch.setattr(check_integrations, "save_models", lambda folder: None)
    monkeypatch.setattr(check_integrations, "WORK", tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    assert check_integrations.main(["--results", str(tmp_path / "results.json"), *arguments]) == 0
    return run


def test_results_are_kept_until_something_they_depend_on_changes(tmp_path, monkeypatch):
    static, both = "impossible: static cache", [OURS, CONTROL]
    assert run_main(monkeypatch, tmp_path, "--only", static) == [(static, subject) for subject in both]
    assert run_main(monkeypatch, tmp_path, "--only", static) == []
    assert len(run_main(monkeypatch, tmp_path, "--only", static, "--again")) == 2
    # another check of the same tool is not known yet
    assert len(run_main(monkeypatch, tmp_path, "--only", "impossible")) == 2 * len(impossible.CHECKS) - 2

    results = json.loads((tmp_path / "results.json").read_text())
    results[static][OURS]["key"]["hf_reformer"] = "an earlier state"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert run_main(monkeypatch, tmp_path, "--only", "impossible") == [(static, OURS)]
    monkeypatch.setattr(check_integrations, "version", lambda name: "another release")
    assert len(run_main(monkeypatch, tmp_path, "--only", static)) == 2


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'impossible: nothing'.*choose tools"):
        check_integrations.find_checks(["impossible", "impossible: nothing"])


def test_only_what_fails_for_the_reformer_alone_counts(tmp_path):
    page = tmp_path / "integrations.md"
    results = {
        "trl: a": {OURS: works(loss=1.23456), CONTROL: works(loss=2.0)},
        "trl: b": {OURS: fails("a | b\nc"), CONTROL: works()},
        "trl: c": {OURS: fails("both"), CONTROL: fails("both")},
        "peft: d": {OURS: refused("needs keys"), CONTROL: works()},
        "peft: e": {OURS: fails("alone")},
    }
    assert write_report(page, results) == ["trl: b", "peft: e"]
    lines = page.read_text(encoding="utf-8").splitlines()
    assert "Versions: torch 2.13.0, trl 1.16.0." in lines
    assert "| a | works | works | loss 1.23 (2) |" in lines
    assert r"| b | **fails** | works | a \| b c |" in lines
    assert "| c | the control fails too | fails | both |" in lines
    assert "| d | refused | works | needs keys |" in lines
    assert "| e | **fails** | not run | alone |" in lines


@pytest.mark.parametrize("name", impossible.CHECKS)
def test_what_is_impossible_is_refused_early(name, models, tmp_path):
    assert impossible.CHECKS[name](Setting(OURS, models, tmp_path))["refused"]


def test_what_is_neither_refused_nor_known_is_a_failure(models, tmp_path):
    with pytest.raises(Wrong, match="neither refused"):
        impossible.try_to(lambda model, given: None, Setting(OURS, models, tmp_path))


def test_texts_are_real_and_answers_are_where_they_are_said_to_be(tmp_path):
    data = json.loads(texts.write_questions(tmp_path / "questions.json").read_text(encoding="utf-8"))["data"]
    assert len(data) == texts.ROWS
    for row in data:
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        assert row["context"][start : start + len(text)] == text
