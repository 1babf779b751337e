"""What the tests of the reversible stack share: models with and without it, their inputs and their gradients."""

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import NO_ATTENTION_DROPOUT, TINY, VOCAB, make_model

from hf_reformer import ReformerForCausalLM, ReformerForSequenceClassification
from hf_reformer.modeling.layers.encoder import ReformerLayer


# The third is tested in test_triton.py.
IMPLEMENTATIONS = ["eager", "sdpa"]
BATCH, LENGTH, HIDDEN = 2, 37, TINY["hidden_size"]
PROJECTIONS = ["query_key", "query", "key", "value", "output.dense", "dense.dense"]


def with_each_implementation(names):
    """Names of cases with each implementation that can do them: attention maps are eager's."""
    return [(name, each) for name in names for each in IMPLEMENTATIONS if each == "eager" or "maps" not in name]


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ReformerLayer)]


def make(reversible, model_class=ReformerForCausalLM, dtype=torch.float64, **changes):
    if changes.get("attn_implementation") not in (None, "eager"):
        # Fused kernels refuse it.
        changes |= NO_ATTENTION_DROPOUT
    return make_model(model_class, reversible=reversible, **changes).train().to(dtype)


def add_lora(model):
    """Adapters with a dropout of their own on every projection; not at their start, where half the gradients are 0."""
    config = LoraConfig(r=2, lora_dropout=0.3, target_modules=PROJECTIONS, init_lora_weights=False)
    return get_peft_model(model, config).train()


def make_inputs(model_class=ReformerForCausalLM, length=LENGTH, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(length)
    embeds = scale * torch.randn(BATCH, length, HIDDEN, generator=generator, dtype=torch.float64)
    shape = (BATCH,) if model_class is ReformerForSequenceClassification else (BATCH, length)
    labels = torch.randint(3 if len(shape) == 1 else VOCAB, shape, generator=generator)
    return {"inputs_embeds": embeds.to(dtype).requires_grad_(), "labels": labels}


def gradients_of(model, inputs):
    """Of all weights and of `inputs_embeds`, where there are any."""
    leaves = {"inputs_embeds": inputs["inputs_embeds"], **dict(model.named_parameters())}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def relative_error(actual, expected):
    """Of all gradients together."""
    difference = sum((actual[name].double() - tensor.double()).pow(2).sum() for name, tensor in expected.items())
    return (difference / sum(tensor.double().pow(2).sum() for tensor in expected.values())).sqrt()
