"""The run of transformers' own suites: what is kept of it, what docs/contract.md says, where the suites come from."""

import ast
import json
import os
import subprocess
import sys
import tarfile

import pytest

from scripts.maintain import contract, contract_results, contract_sources


RUNS = json.loads(contract.FIGURES.read_text(encoding="utf-8"))

SOME_TESTS = """
import unittest

class FromTransformers:
    def test_passes(self): pass
    def test_fails(self): self.assertEqual(1, 2)
    @unittest.skip("test requires accelerator")
    def test_skips(self): pass
    def test_skips_a_part(self):
        for number in range(3):
            with self.subTest(number):
                if number == 1: self.skipTest("not for one")
    def test_fails_in_part(self):
        for number in range(3):
            with self.subTest(number):
                if number == 0: self.skipTest("not for none")
                self.assertEqual(number, 1)

class config_a(FromTransformers, unittest.TestCase):
    def test_passes(self): super().test_passes()

class config_b(FromTransformers, unittest.TestCase):
    def test_fails(self): pass
"""


def test_the_worst_of_a_test_is_kept(tmp_path):
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ["-c", str(tmp_path / "pytest.ini"), "-p", "contract_results", "--outcomes", str(tmp_path / "kept.json")]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_some.py")]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=contract.SUITES.parent, env=environment, capture_output=True)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert list(kept) == ["FromTransformers"]
    tests = {test: {config: text[:4] for config, text in of.items()} for test, of in kept["FromTransformers"].items()}
    assert tests == {
        "test_passes": {"config_a": "pass", "config_b": "pass"},
        "test_fails": {"config_a": "fail", "config_b": "pass"},
        "test_skips": {"config_a": "skip", "config_b": "skip"},
        "test_skips_a_part": {"config_a": "skip", "config_b": "skip"},
        "test_fails_in_part": {"config_a": "fail", "config_b": "fail"},
    }
    assert kept["FromTransformers"]["test_fails"]["config_a"].endswith("AssertionError: 1 != 2")
    assert contract_results.counts(kept) == {"fail": 3, "skip": 4, "pass": 3}
    assert contract_results.unexplained(kept) == ["test_skips_a_part: skip: not for one"]
    run = {"transformers": "5.0.0", "torch": "", "python": "", "processor": "", "origins": [], "left_out": []}
    section = contract_results.markdown({"5.0.0": {**run, "tests": kept}})
    for words in ("3 pass, 3 fail, 4 skip", "No reason: skip: not for one", "| The machine has no accelerator. | 2 |"):
        assert words in section


def test_the_table_is_that_of_the_results():
    assert contract.TABLE.read_text(encoding="utf-8") == contract_results.markdown(RUNS)


@pytest.mark.parametrize("release", RUNS)
def test_nothing_failed_or_was_skipped_without_a_reason(release):
    tests = RUNS[release]["tests"]
    assert contract_results.counts(tests)["fail"] == 0
    assert contract_results.unexplained(tests) == []


def test_what_is_adapted_is_told():
    tree = ast.parse(contract.SUITES.read_text(encoding="utf-8"))
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    adapted = [name for name in names if name.startswith("test_") and name != "test_config"]
    assert adapted
    assert [name for name in adapted if f"`{name}`" not in contract_results.HEAD] == []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder with a source distribution of a release of which there is nothing else."""
    monkeypatch.setattr(contract_sources.transformers, "__version__", "5.0.0")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_common.py").write_text("released = True\n")
    with tarfile.open(tmp_path / "transformers-5.0.0.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "tests", "transformers-5.0.0/tests")
    return tmp_path


def test_what_the_source_distribution_lacks_comes_from_the_repository(cache, tmp_path):
    repository = tmp_path / "repository"
    for name in contract_sources.IN_REPOSITORY:
        (repository / name).mkdir(parents=True)
        (repository / name / "test_more.py").write_text("")
    (repository / "tests" / "test_common.py").write_text("released = False\n")
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init"], ["add", "."], [*identity, "commit", "-m", "x"], ["tag", "v5.0.0"]):
        subprocess.run(["git", *command], cwd=repository, check=True, capture_output=True)
    sources = contract_sources.assemble(cache, str(repository))
    assert sources.left_out == []
    assert "repository at v5.0.0" in sources.origins[1]
    assert (sources.folder / "tests" / "generation" / "test_more.py").is_file()
    assert (sources.folder / "tests" / "test_common.py").read_text() == "released = True\n"
    assert (sources.folder / "src" / "transformers" / "modeling_utils.py").is_file()


def test_without_the_repository_suites_are_left_out(cache, tmp_path):
    sources = contract_sources.assemble(cache, str(tmp_path / "nowhere"))
    assert "tests/generation" in sources.left_out
    assert len(sources.origins) == 1
    assert "GenerationTesterMixin" in (sources.folder / "tests" / "generation" / "test_utils.py").read_text()
