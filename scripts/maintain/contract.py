"""
Run transformers' own common test suites on the package; docs/contract.md says what came of it.

    python -m scripts.maintain.contract                  # the installed transformers; half an hour on one core
    python -m scripts.maintain.contract -k causal_lsh    # a part, as pytest selects it; nothing is written
    python -m scripts.maintain.contract --table          # docs/contract.md again, from docs/contract.json

The suites come from the source distribution and, for generation, export and pipelines, from the repository at the tag
of the installed version: `--repository` takes the path of a clone, `--revision` another tag or branch. Where there is
none these suites are left out, and the table says so. Fails if a test fails, or if one is skipped without a reason in
contract_results.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_reformer.training.provenance import machine, versions

from .contract_results import counts, markdown, unexplained
from .contract_sources import CACHE, REPOSITORY, Sources, assemble


DOCS = Path(__file__).parents[2] / "docs"
FIGURES, TABLE = DOCS / "contract.json", DOCS / "contract.md"
SUITES = Path(__file__).parent / "contract_suites.py"
SETTINGS = """\
[pytest]
addopts = -q --tb=short -p no:cacheprovider -p no:warnings -p contract_results
timeout = 600
"""

# Read when the suites are imported: run what is marked as slow, in this process, without the network.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "RUN_SLOW": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "_INSIDE_SUB_PROCESS": "1",
}


def parse_arguments(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and what is left for pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where downloads are kept (%(default)s)")
    parser.add_argument("--repository", default=REPOSITORY, help="URL or path of a clone (%(default)s)")
    parser.add_argument("--revision", help="tag or branch (v and the installed version)")
    parser.add_argument("--table", action="store_true", help="only write docs/contract.md again")
    return parser.parse_known_args(given)


def run(sources: Sources, options: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    """What became of the tests that pytest selects with `options`: `[suite][test][configuration]`."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes, settings = Path(folder) / "outcomes.json", Path(folder) / "pytest.ini"
        settings.write_text(SETTINGS, encoding="utf-8")
        path = [str(sources.folder), str(SUITES.parent), os.environ.get("PYTHONPATH")]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(settings),
            "--rootdir",
            folder,
            "--outcomes",
            str(outcomes),
        ]
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        subprocess.run([*command, *options, str(SUITES)], cwd=sources.folder, env=environment)
        if not outcomes.is_file():
            sys.exit("pytest ended without results.")
        return json.loads(outcomes.read_text(encoding="utf-8"))


def write(sources: Sources, tests: dict[str, dict[str, dict[str, str]]]) -> None:
    """Put the results into docs/contract.json, beside those with other versions, and write the table."""
    runs = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    used = versions()
    runs[used["transformers"]] = {
        **machine(),
        **used,
        "origins": sources.origins,
        "left_out": sources.left_out,
        "tests": tests,
    }
    FIGURES.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    TABLE.write_text(markdown(runs), encoding="utf-8")


def main(given: list[str]) -> int:
    """Return 1 if a test failed or was skipped for no known reason."""
    arguments, options = parse_arguments(given)
    if arguments.table:
        TABLE.write_text(markdown(json.loads(FIGURES.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    sources = assemble(arguments.cache, arguments.repository, arguments.revision)
    tests = run(sources, options)
    if not options:
        write(sources, tests)
    for name in sources.left_out:
        print(f"left out, because the repository of transformers cannot be had: {name}")
    for outcome in unexplained(tests):
        print(f"no reason in contract_results.py: {outcome}")
    total = counts(tests)
    print(", ".join(f"{number} {outcome}" for outcome, number in total.items()))
    return 1 if total["fail"] or unexplained(tests) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
