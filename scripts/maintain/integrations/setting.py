"""What a check is given: the models of its subject, a folder of its own, where transformers' example scripts are."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hf_reformer import ReformerByteTokenizer, ReformerConfig, ReformerForCausalLM, ReformerForMaskedLM

from .texts import sentences


OURS, CONTROL = "reformer", "control"
KINDS = ("causal", "masked")
CONTEXT = 256
SPECIAL_TOKENS = {"mask_token": "<mask>", "cls_token": "<cls>", "sep_token": "<sep>"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# Large enough for what a tool leaves out to show in the logits.
WEIGHT_STD = 0.15


@dataclass(frozen=True)
class Setting:
    """One run of a check for one subject; `examples` is there for checks that are `FROM_SOURCE` of transformers."""

    subject: str
    models: Path
    folder: Path
    examples: Path | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the models are Reformers."""
        return self.subject == OURS

    @property
    def causal(self) -> str:
        """Folder of a causal language model and its tokenizer."""
        return str(self.models / self.subject / "causal")

    @property
    def masked(self) -> str:
        """Folder of a masked language model and its tokenizer."""
        return str(self.models / self.subject / "masked")


# Runs a tool on the models of a setting; returns figures for the report, and raises where the tool fails.
Check = Callable[[Setting], dict[str, Any]]


class Wrong(Exception):
    """The tool ran through, but what it computed is wrong."""


def save_models(models: Path) -> None:
    """Write the random models of both subjects, with their tokenizers, below `models`."""
    for subject, kind in ((subject, kind) for subject in (OURS, CONTROL) for kind in KINDS):
        folder = models / subject / kind
        tokenizer = _byte_tokenizer() if subject == OURS else _control_tokenizer()
        random.seed(0)
        torch.manual_seed(0)
        model = (_reformer if subject == OURS else _control)(kind, tokenizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=WEIGHT_STD)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = ReformerByteTokenizer(model_max_length=CONTEXT, **SPECIAL_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _control_tokenizer() -> PreTrainedTokenizerBase:
    special = ["<pad>", "</s>", "<unk>", *SPECIAL_TOKENS.values()]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(sentences(), vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        **SPECIAL_TOKENS,
    )
    return tokenizer


def _reformer(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """One local and one LSH layer with the switches that the recipe for new models sets."""
    config = ReformerConfig(
        attention_head_size=32,
        attend_across_buckets=False,
        attn_layers=["local", "lsh"],
        axial_norm_std=WEIGHT_STD,
        axial_pos_embds_dim=[32, 32],
        axial_pos_shape=[16, CONTEXT // 16],
        circular_look_around=False,
        eos_token_id=tokenizer.eos_token_id,
        feed_forward_size=128,
        hidden_size=64,
        initializer_range=WEIGHT_STD,
        is_decoder=kind == "causal",
        local_attn_chunk_length=16,
        local_num_chunks_after=int(kind == "masked"),
        lsh_attn_chunk_length=16,
        lsh_num_chunks_after=int(kind == "masked"),
        lsh_sliding_window=kind == "causal",
        max_position_embeddings=CONTEXT,
        num_attention_heads=2,
        num_buckets=8,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
    )
    return (ReformerForCausalLM if kind == "causal" else ReformerForMaskedLM)(config)


def _control(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    sizes = {
        "hidden_size": 64,
        "initializer_range": WEIGHT_STD,
        "intermediate_size": 128,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }
    if kind == "causal":
        return LlamaForCausalLM(LlamaConfig(attention_bias=True, bos_token_id=None, mlp_bias=True, **sizes))
    return BertForMaskedLM(BertConfig(**sizes))


def tokenized(path: str, texts: list[str], **given: Any) -> dict[str, torch.Tensor]:
    """Texts as a padded batch for the model in `path`."""
    return AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt", **given)


def expect_close(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The relative distance of two tensors.

    Raises:
        Wrong: it is above `tolerance`, or a number is not finite.
    """
    distance = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not distance <= tolerance:
        raise Wrong(f"{what}: {distance:.2g} off, at most {tolerance:.2g} is allowed")
    return distance


def expect(what: str, holds: bool) -> None:
    """Raise Wrong, saying that `what` does not hold, unless it does."""
    if not holds:
        raise Wrong(f"not so: {what}")
