"""What no Reformer can do: it must say so at once, with the reason."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .setting import Check, Setting, Wrong, tokenized
from .texts import sentences


TOOLS = ("transformers",)


def try_to(do: Callable[[PreTrainedModel, Setting], Any], setting: Setting) -> dict[str, Any]:
    """A Reformer refuses by a ValueError; what it says is the figure. The control does it."""
    model = AutoModelForCausalLM.from_pretrained(setting.causal)
    if not setting.is_ours:
        do(model, setting)
        return {}
    try:
        do(model, setting)
    except ValueError as error:
        return {"refused": str(error)}
    raise Wrong("it was neither refused nor is it known to be right")


def generate(cache: str, model: PreTrainedModel, setting: Setting) -> None:
    """Generate with a cache that transformers makes."""
    batch = tokenized(setting.causal, sentences()[:2])
    model.generate(**batch, max_new_tokens=3, do_sample=False, cache_implementation=cache)


def batch_continuously(model: PreTrainedModel, setting: Setting) -> None:
    """Continuous batching with a paged cache."""
    ids = AutoTokenizer.from_pretrained(setting.causal)(sentences()[:2])["input_ids"]
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=model.config.eos_token_id)
    outputs = model.generate_batch(ids, generation_config=config, progress_bar=False)
    if not outputs:
        raise Wrong("no answers")


def attend_elsewhere(model: PreTrainedModel, setting: Setting) -> None:
    """Attention by a function that somebody registered, which is how vLLM's transformers backend works."""
    AttentionInterface.register("elsewhere", sdpa_attention_forward)
    other = AutoModelForCausalLM.from_pretrained(setting.causal, attn_implementation="elsewhere")
    with torch.no_grad():
        other(**tokenized(setting.causal, sentences()[:2]))


CHECKS: dict[str, Check] = {
    "static cache": partial(try_to, partial(generate, "static")),
    "quantised cache": partial(try_to, partial(generate, "quantized")),
    "offloaded cache": partial(try_to, partial(generate, "offloaded")),
    "continuous batching": partial(try_to, batch_continuously),
    "attention registered by others": partial(try_to, attend_elsewhere),
}
