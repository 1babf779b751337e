"""
Run a program that finds this package's classes: `python -m hf_reformer PROGRAM [ARGUMENTS...]`.

PROGRAM is a script (`run_clm.py`), a command that a package installed (`lm_eval`, `transformers`) or a module, as
after `python -m`. It sees the same `sys.argv` as without this, and its exit code is this one's.

Imported first, hf_reformer serves every checkpoint of model_type "reformer" in this process and in those that it
forks, such as the workers of a DataLoader on Linux. A process that starts Python anew has to import it itself. So a
program of several processes is started as `accelerate launch -m hf_reformer run_clm.py ...` or `torchrun ... -m
hf_reformer run_clm.py ...`, not the other way round.

    python -m hf_reformer run_clm.py --model_name_or_path runs/demo --do_eval ...
    python -m hf_reformer lm_eval --model hf --model_args pretrained=runs/demo --tasks wikitext
    python -m hf_reformer serve runs/demo

`serve` is `hf-reformer serve`, unless there is a file of that name.
"""

import os
import runpy
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

from .commands.entry_point import main as run_command


def run(program: str):
    """Run `program` in place of this module; `sys.argv` is its own."""
    # For `-m` Python has put the current folder in front, which only a module wants there.
    in_front = 0 if getattr(sys.flags, "safe_path", False) else 1
    if os.path.isfile(program):
        sys.path[:in_front] = [os.path.dirname(os.path.abspath(program))][:in_front]
        runpy.run_path(program, run_name="__main__")
        return
    if program == "serve":
        del sys.path[:in_front]
        sys.argv.insert(0, "hf-reformer")
        run_command()
        return
    for command in entry_points(group="console_scripts", name=program):
        del sys.path[:in_front]
        sys.exit(command.load()())
    if not _is_module(program):
        sys.exit(f"{program!r} is no file, no installed command and no module. See `python -m hf_reformer --help`.")
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def _is_module(name):
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def main():
    """Take this module's own name out of `sys.argv` and run what comes next, or say how."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    del sys.argv[0]
    run(sys.argv[0])


if __name__ == "__main__":
    main()
