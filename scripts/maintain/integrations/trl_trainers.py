"""TRL's trainers, a few steps each."""

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from .setting import Check, Setting, expect, expect_close
from .texts import sentences


TOOLS = ("trl", "peft", "transformers", "accelerate", "datasets")
STEPS = 3
ROUNDING = 1e-4


def arguments(config_class: type, setting: Setting, **given: Any) -> Any:
    """TRL's arguments for a few steps on a CPU that leave nothing behind but the log."""
    shared = {
        "bf16": False,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": STEPS,
        "output_dir": str(setting.folder),
        "per_device_train_batch_size": 2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
    }
    return config_class(**(shared | given))


def train(trainer: Trainer) -> dict[str, Any]:
    """Take the steps; the losses must be numbers."""
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    expect(f"{STEPS} losses were logged, each a number", len(losses) == STEPS and all(map(is_number, losses)))
    return {"losses": [round(loss, 4) for loss in losses]}


def is_number(value: float) -> bool:
    """Whether a loss is neither infinite nor NaN."""
    return abs(value) < float("inf")


def make_tuner(setting: Setting, *, loaded: bool = False, adapter: Any = None, **options: Any) -> SFTTrainer:
    """A trainer for supervised tuning of a model given as a path or, loaded, as an object."""
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(setting.causal) if loaded else setting.causal,
        args=arguments(SFTConfig, setting, **({"max_length": 128} | options)),
        train_dataset=Dataset.from_dict({"text": sentences()[:12]}),
        processing_class=AutoTokenizer.from_pretrained(setting.causal),
        peft_config=adapter,
    )


def tune(setting: Setting, **options: Any) -> dict[str, Any]:
    """Supervised tuning; the trainer's loss is the model's own."""
    trainer = make_tuner(setting, **options)
    batch, model = next(iter(trainer.get_train_dataloader())), trainer.model.eval()
    with torch.no_grad():
        own, theirs = model(**batch).loss, trainer.compute_loss(model, dict(batch))
    expect_close("the loss of SFTTrainer", theirs, own, ROUNDING)
    return train(trainer)


def tune_packed(setting: Setting, **options: Any) -> dict[str, Any]:
    """Several documents in a row: the loss is that of documents alone, or a Reformer says that it cannot do it."""
    trainer = make_tuner(setting, **options)
    batch, model = next(iter(trainer.get_train_dataloader())), trainer.model.eval()
    try:
        with torch.no_grad():
            packed = trainer.compute_loss(model, dict(batch))
    except ValueError as error:
        return {"refused": str(error)}
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    documents = batch["input_ids"].tensor_split(starts[1:], dim=1)
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in documents]
    alone = sum(losses) / sum(ids.shape[1] - 1 for ids in documents)
    expect_close(f"the loss of {len(documents)} packed documents", packed, alone, ROUNDING)
    return train(trainer)


def tune_adapter(setting: Setting) -> dict[str, Any]:
    """Supervised tuning of a LoRA adapter, which the trainer adds."""
    return tune(setting, adapter=LoraConfig(target_modules="all-linear", r=4))


def preferences(**columns: list[str]) -> Dataset:
    """Beginnings of sentences with the right rest and a wrong one."""
    texts = [sentence.split(maxsplit=2) for sentence in sentences()[:12]]
    prompts = [f"{first} {second} " for first, second, _ in texts]
    rests = [rest for _, _, rest in texts]
    return Dataset.from_dict({"prompt": prompts, "chosen": rests, "rejected": [*rests[1:], rests[0]]} | columns)


def prefer(setting: Setting, **options: Any) -> dict[str, Any]:
    """
    Direct preference optimisation; before the first step the model is its own reference, so the margin is 0.

    For a Reformer this takes rotations that are not drawn anew, in a config that the reference is loaded with.
    """
    path = setting.folder / "fixed rotations"
    model = AutoModelForCausalLM.from_pretrained(setting.causal, **({"hash_seed": 0} if setting.is_ours else {}))
    model.save_pretrained(path)
    trainer = DPOTrainer(
        str(path),
        args=arguments(DPOConfig, setting, max_length=128, **options),
        train_dataset=preferences(),
        processing_class=AutoTokenizer.from_pretrained(setting.causal),
    )
    figures = train(trainer)
    margin = next(row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row)
    expect(f"the first margin is 0 without dropout, not {margin}", abs(margin) < ROUNDING)
    return figures | {"first margin": margin}


def judge(setting: Setting) -> dict[str, Any]:
    """A reward model: a classifier with one output on the causal model."""
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(setting.causal, num_labels=1),
        args=arguments(RewardConfig, setting, max_length=128),
        train_dataset=preferences(),
        processing_class=AutoTokenizer.from_pretrained(setting.causal),
    )
    return train(trainer)


def count_vowels(completions: list[str], **columns: Any) -> list[float]:
    """A reward that needs no model."""
    return [sum(letter in "aeiou" for letter in completion) / 10 for completion in completions]


def reinforce(trainer_class: type, config_class: type, setting: Setting, **options: Any) -> dict[str, Any]:
    """Sample completions, reward them, learn from them."""
    trainer = trainer_class(
        setting.causal,
        reward_funcs=count_vowels,
        args=arguments(
            config_class, setting, max_completion_length=16, num_generations=2, generation_batch_size=2, **options
        ),
        train_dataset=preferences().select_columns("prompt"),
        processing_class=AutoTokenizer.from_pretrained(setting.causal),
    )
    return train(trainer)


def separate(setting: Setting) -> dict[str, Any]:
    """Kahneman-Tversky optimisation on single completions."""
    wanted = preferences()
    trainer = KTOTrainer(
        setting.causal,
        args=arguments(KTOConfig, setting, max_length=128),
        train_dataset=Dataset.from_dict(
            {
                "prompt": wanted["prompt"],
                "completion": wanted["chosen"],
                "label": [place % 2 == 0 for place in range(len(wanted))],
            }
        ),
        processing_class=AutoTokenizer.from_pretrained(setting.causal),
    )
    return train(trainer)


CHECKS: dict[str, Check] = {
    "SFT, a path": tune,
    "SFT, an object": partial(tune, loaded=True),
    "SFT, packed rows": partial(tune_packed, packing=True),
    "SFT, padding-free": partial(tune_packed, padding_free=True, max_length=None),
    "SFT, LoRA": tune_adapter,
    "SFT, gradient checkpointing": partial(tune, gradient_checkpointing=True),
    "DPO": prefer,
    "DPO, precomputed reference": partial(prefer, precompute_ref_log_probs=True),
    "reward model": judge,
    "GRPO": partial(reinforce, GRPOTrainer, GRPOConfig),
    "GRPO with a reference": partial(reinforce, GRPOTrainer, GRPOConfig, beta=0.1),
    "RLOO": partial(reinforce, RLOOTrainer, RLOOConfig),
    "KTO": separate,
}
