"""Every method of PEFT: a training step, gradients as plain autograd gives them, merging, saving and loading again."""

from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, PreTrainedModel

from .setting import Check, Setting, expect, expect_close, tokenized
from .texts import sentences


TOOLS = ("peft", "transformers")
# Merged weights are sums in float32.
ROUNDING = 1e-4
# Recovered streams differ in the last digits from stored ones.
GRADIENT_ROUNDING = 1e-3

EVERY_LINEAR = {"target_modules": "all-linear"}
EMBEDDING = {"reformer": "word_embeddings", "control": "embed_tokens"}
PROMPT = {"num_virtual_tokens": 4, "num_attention_heads": 2, "num_layers": 2, "token_dim": 64}
# What a method needs beside its defaults, or instead of all linear layers. None: made for named models, for several
# adapters at a time, or around whole blocks of one stream.
OPTIONS: dict[str, dict[str, Any] | None] = {
    "ADALORA": EVERY_LINEAR | {"total_step": 10},
    "ADAPTION_PROMPT": None,
    "ADAMSS": EVERY_LINEAR | {"r": 4, "num_subspaces": 2, "subspace_rank": 1},
    "BEFT": {"target_modules": r".*(feed_forward\.\w+\.dense|[qv]_proj)"},
    "BOFT": EVERY_LINEAR | {"boft_block_size": 4},
    "C3A": EVERY_LINEAR | {"block_size": 16},
    "CARTRIDGE": PROMPT,
    "CPT": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": EVERY_LINEAR | {"n_frequency": 16},
    "IA3": EVERY_LINEAR | {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": r".*(layer_?norm|norm)"},
    "MISS": EVERY_LINEAR | {"r": 4},
    "MULTITASK_PROMPT_TUNING": PROMPT,
    "OFT": EVERY_LINEAR | {"oft_block_size": 4},
    "POLY": None,
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": PROMPT | {"encoder_hidden_size": 16},
    "ROAD": EVERY_LINEAR | {"group_size": 16},
    "SHADOW": None,
    "SHIRA": EVERY_LINEAR | {"r": 4},
    "UNILORA": EVERY_LINEAR | {"theta_d_length": 64},
    "VBLORA": EVERY_LINEAR | {"num_vectors": 8, "vector_length": 16, "topk": 2},
    "WAVEFT": EVERY_LINEAR | {"n_frequency": 16},
    "XLORA": None,
}
# Methods that put a cache of their own before the text.
KEYS_AND_VALUES = ("CARTRIDGE", "PREFIX_TUNING")
# Settings of which random numbers in forward, or where the adapter sits, are the point.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, dropout": ("LORA", EVERY_LINEAR | {"lora_dropout": 0.3}),
    "LoRA, DoRA": ("LORA", EVERY_LINEAR | {"use_dora": True}),
    "LoRA, word embeddings": ("LORA", {"target_modules": list(EMBEDDING.values())}),
    "LoRA, trainable tokens": ("LORA", EVERY_LINEAR | {"trainable_token_indices": [5, 6, 7]}),
    "LoRA, head saved": ("LORA", EVERY_LINEAR | {"modules_to_save": ["lm_head"]}),
    "LOHA, rank dropout": ("LOHA", EVERY_LINEAR | {"rank_dropout": 0.5}),
    "LOKR, rank dropout": ("LOKR", EVERY_LINEAR | {"rank_dropout": 0.5}),
    "LOHA, module dropout": ("LOHA", EVERY_LINEAR | {"module_dropout": 0.5}),
}


def adapt(method: str, options: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Train an adapter for one step, merge it where the method can, save it, load it again."""
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    batch = tokenized(setting.causal, sentences()[:3])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if method == "TRAINABLE_TOKENS":
        some = batch["input_ids"].unique()[-3:].tolist()
        options = {"target_modules": [EMBEDDING[setting.subject]], "token_indices": some}
    if method == "MULTITASK_PROMPT_TUNING":
        batch["task_ids"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)

    model, figures = adapted(config_class, options, setting), {}
    try:
        gradients = gradients_of(model, batch)
    except ValueError as error:
        if setting.is_ours and method in KEYS_AND_VALUES:
            return {"refused": str(error)}
        raise
    expect("the adapter gets a gradient", any(bool(gradient.any()) for gradient in gradients.values()))
    if setting.is_ours:
        plain = gradients_of(adapted(config_class, options, setting, reversible=False), batch)
        expect("the same parameters get gradients as with plain autograd", plain.keys() == gradients.keys())
        figures["gradients off"] = expect_close("gradients", joined(gradients), joined(plain), GRADIENT_ROUNDING)
    torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.1).step()

    logits = logits_of(model, batch)
    model.save_pretrained(setting.folder)
    again = PeftModel.from_pretrained(load(setting), setting.folder)
    expect_close("logits after loading again", logits_of(again, batch), logits, ROUNDING)
    if hasattr(model, "merge_and_unload"):
        try:
            merged = model.merge_and_unload()
        except (AttributeError, NotImplementedError) as error:
            return figures | {"merging": f"not offered: {error}"}
        figures["merged off"] = expect_close("logits after merging", logits_of(merged, batch), logits, ROUNDING)
    return figures


def load(setting: Setting, **given: Any) -> PreTrainedModel:
    """The causal model, with dropout in its hidden states."""
    return AutoModelForCausalLM.from_pretrained(setting.causal, **given)


def adapted(config_class: type, options: dict[str, Any], setting: Setting, **given: Any) -> PeftModel:
    """The model with an adapter whose weights are drawn anew from the same seed."""
    torch.manual_seed(1)
    config = config_class(task_type="CAUSAL_LM", **options)
    return get_peft_model(load(setting, **given), config)


def gradients_of(model: PeftModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of a training step, dropout and all, that starts from the same seed."""
    model.train()
    torch.manual_seed(2)
    model(**batch).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def joined(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All numbers in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the real tokens in evaluation mode."""
    mask = batch["attention_mask"]
    logits = model.eval()(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return logits[:, -mask.shape[1] :][mask == 1]


CHECKS: dict[str, Check] = {
    str(method.value): partial(adapt, method.value, OPTIONS.get(method.value, EVERY_LINEAR))
    for method in PEFT_TYPE_TO_CONFIG_MAPPING
    if OPTIONS.get(method.value, EVERY_LINEAR) is not None
} | {name: partial(adapt, method, options) for name, (method, options) in VARIANTS.items()}
