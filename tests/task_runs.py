"""Runs of the commands that train on labels, as tests start them: small, without a bar, as options or as a call."""

from tiny_models import TINY_RECIPE


QUIET = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "eval_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def options(given):
    """What one would type; None leaves an option out."""
    return [
        word
        for name, value in given.items()
        if value is not None
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def run_small(parse, train, folder, **changed):
    """Train a tiny new model, or an existing one that is named, without checkpoints."""
    new = {} if "model_name_or_path" in changed else TINY_RECIPE | {"initializer_range": 0.3}
    return train(*parse(options(new | QUIET | {"output_dir": folder, "save_strategy": "no"} | changed)))
