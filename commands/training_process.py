"""What a command that trains does as all that its process does: it leaves the process group, with an exit code."""

import atexit
import os
import sys
from collections.abc import Callable

from accelerate import PartialState

from ..training.interruptions import Interrupted


def end_process(code: int = 0) -> None:
    """
    Leave the process group, and with several processes end this one at once, with this exit code.

    Threads of a process group that are alive when the interpreter ends can abort a run that is done, now and then even
    if the group was destroyed: then the launcher calls all of it failed.
    """
    state = PartialState()
    is_one_of_several = state.num_processes > 1
    state.destroy_process_group()
    if is_one_of_several:
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def run_and_end(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """`main` as all that this process does; its exit code says whether a signal ended it."""
    try:
        main(argv)
    except Interrupted as interrupted:
        end_process(interrupted.exit_status)
        raise
    end_process()
