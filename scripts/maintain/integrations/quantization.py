"""Quantised weights on a CPU: torchao and bitsandbytes through `from_pretrained`."""

from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from .setting import Check, Setting, expect, expect_close, tokenized
from .texts import sentences


TOOLS = ("torchao", "bitsandbytes", "transformers", "accelerate")
# What int8 and 4-bit weights of this size may cost; a module left out or read wrongly costs far more.
EIGHT_BITS, FOUR_BITS = 0.1, 0.6


def quantise(make_config: Any, tolerance: float, setting: Setting) -> dict[str, Any]:
    """Load quantised, save and load again, compare logits with the whole model's, generate."""
    batch = tokenized(setting.causal, sentences()[:3])
    model = AutoModelForCausalLM.from_pretrained(
        setting.causal, quantization_config=make_config(), device_map="cpu", dtype=torch.float32
    )
    # before the first call, which packs weights of 4 bits anew for a CPU
    model.save_pretrained(setting.folder / "quantised")
    whole = AutoModelForCausalLM.from_pretrained(setting.causal)
    with torch.no_grad():
        logits, expected = (subject(**batch).logits[batch["attention_mask"] == 1] for subject in (model, whole))
    figures = {"logits off": expect_close("logits", logits, expected, tolerance)}
    written = model.generate(**batch, max_new_tokens=4, do_sample=False)
    AutoTokenizer.from_pretrained(setting.causal).batch_decode(written)
    again = AutoModelForCausalLM.from_pretrained(setting.folder / "quantised", device_map="cpu")
    with torch.no_grad():
        expect_close("logits after loading again", again(**batch).logits[batch["attention_mask"] == 1], logits, 1e-4)
    return figures


def torchao_config(name: str) -> TorchAoConfig:
    """Transformers' config around one of torchao's, by name."""
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)())


def adapt(setting: Setting) -> dict[str, Any]:
    """QLoRA: an adapter on 4-bit weights."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(setting.causal, quantization_config=config, device_map="cpu")
    model = get_peft_model(
        prepare_model_for_kbit_training(model), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    )
    batch = tokenized(setting.causal, sentences()[:3])
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    expect("every adapter weight has a gradient", all(gradient is not None for gradient in gradients))
    return {"loss": float(loss.detach())}


CHECKS: dict[str, Check] = {
    "torchao, int8 weights": partial(quantise, partial(torchao_config, "Int8WeightOnlyConfig"), EIGHT_BITS),
    "torchao, int8 weights and activations": partial(
        quantise, partial(torchao_config, "Int8DynamicActivationInt8WeightConfig"), EIGHT_BITS
    ),
    "bitsandbytes, 8 bits": partial(quantise, partial(BitsAndBytesConfig, load_in_8bit=True), EIGHT_BITS),
    "bitsandbytes, 4 bits": partial(
        quantise,
        partial(BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        FOUR_BITS,
    ),
    "bitsandbytes, QLoRA": adapt,
}
