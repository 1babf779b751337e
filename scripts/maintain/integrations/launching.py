"""Programs of other people, run as a person would: on a command line, Reformers through `python -m hf_reformer`."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .setting import Wrong


# evaluate takes a metric from a folder of its name in the working directory before it asks the Hub
METRICS = Path(__file__).parent / "metrics"
LAUNCHER = ["-m", "hf_reformer"]
LAST_LINES = 12


def run_program(*arguments: object, through: list[str] | None = None) -> str:
    """
    Run a script or program that gets the package imported first; return what it printed.

    Args:
        through: What stands before the launcher instead of the interpreter, such as `accelerate launch`.

    Raises:
        Wrong: it ended with another exit status than 0.
    """
    command = [*(through or [sys.executable]), *LAUNCHER, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=METRICS, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    if done.returncode:
        raise Wrong(f"exit status {done.returncode}: " + "\n".join(done.stdout.splitlines()[-LAST_LINES:]))
    return done.stdout


def read_results(output_dir: Path) -> dict[str, float]:
    """The figures that a Trainer left in its folder, without those of speed."""
    figures = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))
    return {name: figures[name] for name in ("train_loss", "eval_loss", "eval_accuracy", "eval_f1") if name in figures}
