"""
Run an experiment of docs/experiments.md, or draw and tabulate what has been run.

    python scripts/run_experiment.py twins --only "lsh, successors" --seeds 0 1 2
    python scripts/run_experiment.py twins --report

The experiments are the modules of scripts/experiments/. Each run is a file in docs/experiments/ and is not repeated;
one that was stopped goes on from its last checkpoint in runs/experiments/, so several may run side by side.
"""

import importlib
import pkgutil
import sys

import experiments


NAMES = sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))


def main(argv: list[str]) -> None:
    """Hand the arguments behind the name to the experiment."""
    known = [name for name in NAMES if hasattr(importlib.import_module(f"experiments.{name}"), "main")]
    if not argv or argv[0] not in known:
        sys.exit(f"{__doc__.strip()}\n\nName one of: {', '.join(known)}.")
    importlib.import_module(f"experiments.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
