"""The checkpoints of a run: which are whole, whose they are, and from which one a run goes on."""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from .arguments import ReformerTrainingArguments


# Written into a checkpoint when everything else is there.
RUN_FILE = "run.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class RunArguments(ReformerTrainingArguments):
    """The recipe's arguments, and what shall become of checkpoints that are there before the run."""

    output_dir: str = field(default="runs/train", metadata={"help": "Where checkpoints and the model go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints that another run left in output_dir."}
    )
    accept_changes: bool = field(
        default=False, metadata={"help": "Resume although the model, the text or its order differ from before."}
    )


def mark_whole(checkpoint: Path, run: dict[str, Any]) -> None:
    """Note that a checkpoint is whole, and which run's it is."""
    aside = checkpoint / f"{RUN_FILE}.part"
    aside.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, checkpoint / RUN_FILE)


def read_run(checkpoint: str | Path) -> dict[str, Any] | None:
    """Which run's checkpoint this is; None if that is not noted, or cannot be read."""
    try:
        run = json.loads((Path(checkpoint) / RUN_FILE).read_text(encoding="utf-8"))
    # A file that was cut off is no text or no JSON.
    except (FileNotFoundError, ValueError):
        return None
    return run if isinstance(run, dict) and {"fixed", "free"} <= run.keys() else None


def newest_whole(folder: str | Path) -> str | None:
    """The newest checkpoint in a folder that is whole."""
    return next((found for found in reversed(sort_checkpoints(str(folder))) if read_run(found)), None)


@contextmanager
def saving(folder: str | Path) -> Iterator[None]:
    """
    An error for want of room while something is saved into a folder says what to do; any other stays as it is.

    Raises:
        OSError: there was no room.
    """
    try:
        yield
    except Exception as error:
        if not _says_no_room(error):
            raise
        there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free / 2**20
        raise OSError(
            f"{folder} could not be saved ({error}). {free:,.0f} MiB are free there. Make room or choose another "
            "output_dir; --resume_from_checkpoint last goes on from the newest checkpoint that is whole."
        ) from error


def _says_no_room(error: Exception) -> bool:
    """PyTorch and safetensors have no error of their own for it, only words."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in NO_ROOM)
    # The writer of `torch.save` does not say why it could not go on.
    return isinstance(error, RuntimeError) and "inline_container.cc" in str(error)


def find_checkpoint(arguments: RunArguments) -> str | None:
    """
    The checkpoint to go on from; `last` means the newest in the output folder that is whole.

    Raises:
        ValueError: there is none, or the output folder holds those of another run.
    """
    wanted = arguments.resume_from_checkpoint
    if wanted == "last":
        return _find_last(arguments.output_dir)
    if wanted is not None:
        if not Path(wanted).is_dir():
            raise ValueError(
                f"resume_from_checkpoint is {wanted}, which is no folder; give a checkpoint folder or 'last'."
            )
        if not (Path(wanted) / TRAINER_STATE_NAME).is_file():
            raise ValueError(f"{wanted} has no {TRAINER_STATE_NAME}: it is no checkpoint, or was not finished.")
    others = checkpoints_in_the_way(arguments)
    if others and not arguments.overwrite_output_dir:
        raise ValueError(
            f"{arguments.output_dir} holds checkpoints of an earlier run, up to {Path(others[-1]).name}. Go on "
            "from it with --resume_from_checkpoint last, delete them with --overwrite_output_dir True, or choose "
            "another output_dir."
        )
    return wanted


def checkpoints_in_the_way(arguments: RunArguments) -> list[str]:
    """Those in the output folder, unless the run goes on from one of them."""
    wanted, folder = arguments.resume_from_checkpoint, Path(arguments.output_dir).resolve()
    if wanted == "last":
        return []
    # The folder or the checkpoint may be a link.
    goes_on = wanted is not None and folder in (Path(wanted).resolve().parent, Path(wanted).parent.resolve())
    return [] if goes_on else sort_checkpoints(arguments.output_dir)


def _find_last(folder: str) -> str:
    found, checkpoints = newest_whole(folder), sort_checkpoints(folder)
    if found is None and checkpoints:
        raise ValueError(
            f"No checkpoint in {folder} is whole: none has a {RUN_FILE}, which is written last. Name one if you know "
            "better, or begin anew with --overwrite_output_dir True."
        )
    if found is None:
        raise ValueError(f"There is no checkpoint in {folder}; leave out resume_from_checkpoint.")
    unfinished = [Path(path).name for path in checkpoints[checkpoints.index(found) + 1 :]]
    if unfinished:
        warnings.warn(
            f"{', '.join(unfinished)} in {folder} was not finished; going on from {Path(found).name}.", stacklevel=3
        )
    return found
