"""What makes a run the run it is, so that one does not go on as another without a word."""

import json
import warnings
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .run_checkpoints import read_run
from .run_trainer import RunTrainer


# What the config says besides the model.
NOT_THE_MODEL = ("transformers_version", "_name_or_path", "architectures", "dtype", "use_cache")
# What may change on the way; it is said.
FREE_SETTINGS = ("chunk_size_feed_forward", "chunk_size_lm_head", "reversible", "exact_inversion", "activation_memory")
FREE_ARGUMENTS = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "muon",
    "optim",
    "bf16",
    "fp16",
)


class Side(Protocol):
    """What a run is trained on, or measured on."""

    @property
    def digest(self) -> str:
        """A short name that other text does not have."""
        ...


class Sides(Protocol):
    """What a run reads."""

    @property
    def train(self) -> Side: ...

    @property
    def held_out(self) -> Side: ...


def identify_run(trainer: RunTrainer, corpus: Sides, objective: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    What decides the course of a run.

    Args:
        trainer: Before it trains.
        corpus: What is read.
        objective: What the model learns to do.

    Returns:
        `fixed`: the model, the text and its order; `free`: how it is optimised.
    """
    args, config = trainer.args, trainer.model.config.to_diff_dict()
    fixed = {name: value for name, value in config.items() if name not in NOT_THE_MODEL + FREE_SETTINGS} | objective
    fixed |= {
        "training text": corpus.train.digest,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "windows in a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    free = {name: getattr(trainer.model.config, name, None) for name in FREE_SETTINGS}
    free |= {name: getattr(args, name) for name in FREE_ARGUMENTS} | {"held-out text": corpus.held_out.digest}
    # As JSON gives it back.
    return json.loads(json.dumps({"fixed": fixed, "free": free}, default=str))


def check_same_run(checkpoint: str, run: dict[str, dict[str, Any]], *, accept_changes: bool) -> None:
    """
    Compare the run with that of the checkpoint it goes on from; what may differ and does is a warning.

    Raises:
        ValueError: it is another run, or has no steps left.
    """
    steps = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if 0 < run["free"]["max_steps"] < steps:
        raise ValueError(
            f"{checkpoint} is {steps} steps old, and max_steps is {run['free']['max_steps']}: nothing is left to "
            "train. Give more steps or an earlier checkpoint."
        )
    before = read_run(checkpoint)
    if before is None:
        warnings.warn(f"{checkpoint} does not say which run it is of, so nothing can be compared.", stacklevel=2)
        return
    refuse_other_run(checkpoint, before, run, accept_changes=accept_changes)


def refuse_other_run(
    checkpoint: str | Path,
    before: dict[str, dict[str, Any]],
    run: dict[str, dict[str, Any]],
    *,
    accept_changes: bool,
) -> None:
    """
    Compare a run with the one before it; what may differ and does is a warning.

    Raises:
        ValueError: it is another run.
    """
    free, fixed = (_differences(before[part], run[part]) for part in ("free", "fixed"))
    if fixed and not accept_changes:
        raise ValueError(
            f"{checkpoint} is of another run: {'; '.join(fixed)}. Give what it had, or --accept_changes True, or "
            "begin in another output_dir."
        )
    if free or fixed:
        warnings.warn(f"Going on from {checkpoint} with changes: {'; '.join(fixed + free)}.", stacklevel=3)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name, 'not given')}, is {now.get(name, 'not given')}" for name in names]
