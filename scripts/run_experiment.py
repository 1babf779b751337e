"""
Run an experiment of docs/experiments.md, or draw and tabulate what has been run.

    python -m scripts.run_experiment twins --only "lsh, successors" --seeds 0 1 2
    python -m scripts.run_experiment twins --report

The experiments are the modules of scripts/experiments/. Each run is a file in docs/experiments/ and is not repeated;
one that was stopped goes on from its last checkpoint in runs/experiments/, so several may run side by side.
"""

import importlib
import sys
from pathlib import Path

from . import experiments


# Each is imported only when it is asked for: some bring other people's models along.
NAMES = sorted(
    path.stem
    for path in Path(experiments.__file__).parent.glob("*.py")
    if "\ndef main(" in path.read_text(encoding="utf-8")
)


def main(argv: list[str]) -> None:
    """Hand the arguments behind the name to the experiment."""
    if not argv or argv[0] not in NAMES:
        sys.exit(f"{__doc__.strip()}\n\nName one of: {', '.join(NAMES)}.")
    importlib.import_module(f".experiments.{argv[0]}", __package__).main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
