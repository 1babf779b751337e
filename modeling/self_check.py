"""
What protects from releases of transformers and torch that nobody has tested this package with.

A release may change what it calls and how, without an error: transformers 5.24 passes the cache to models by another
name, so that a package made for 5.23 wrote wrong text from the second token on. With a tested release nothing is done.
With any other the import computes a few small things in two ways each, and fails if they differ.
"""

import tempfile
from importlib.metadata import version

import torch
from packaging.version import Version
from torch import nn
from transformers.utils import logging

from ..configuration.configuration_reformer import ReformerConfig
from .modeling_reformer import ReformerForCausalLM


logger = logging.get_logger(__name__)

# Releases from the first, and below the second. CONTRIBUTING.md says which of them the tests ran with, and how a bound
# moves.
TESTED = {"torch": ("2.11", "2.16"), "transformers": ("5.17", "5.25")}

# In float64, for sums in another order; and for what transformers gives in float32.
TOLERANCE, FLOAT32_TOLERANCE = 1e-9, 1e-6


def check_installed_releases():
    """
    Check releases of torch and transformers that were not tested, and warn once if they pass; else do nothing.

    Raises:
        ImportError: Something is wrong with one of them.
    """
    untested = [f"{package} {version(package)}" for package in TESTED if not is_tested(package, version(package))]
    if not untested:
        return
    bounds = ", ".join(f"{package}>={first},<{end}" for package, (first, end) in TESTED.items())
    try:
        run_checks()
    except Exception as error:
        raise ImportError(
            f"hf_reformer has not been tested with {' and '.join(untested)}, and does not work right with it: {error} "
            f"Install {bounds}, or a newer hf_reformer."
        ) from error
    logger.warning(
        f"hf_reformer has not been tested with {' and '.join(untested)}, only with {bounds}. A short check found "
        "nothing wrong."
    )


def is_tested(package: str, installed: str) -> bool:
    """Whether a release of a package is within its bounds. Previews count as the release that they precede."""
    first, end = (Version(bound).release for bound in TESTED[package])
    return first <= Version(installed).release[: len(first)] and Version(installed).release[: len(end)] < end


def run_checks():
    """
    Compute generated text, losses, gradients and saved weights each in two ways.

    Raises:
        RuntimeError: Two ways differ.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = _small_model()
        ids = torch.randint(3, model.config.vocab_size, (2, 40))
        ids[0, :7] = model.config.pad_token_id
        for check in (_check_generation, _check_loss, _check_gradients, _check_saving):
            check(model, ids)


def _small_model(**changes) -> ReformerForCausalLM:
    config = ReformerConfig(
        attn_layers=["local", "lsh", "full"],
        axial_pos_embds_dim=[4, 12],
        axial_pos_shape=[8, 16],
        max_position_embeddings=128,
        num_attention_heads=2,
        attention_head_size=8,
        feed_forward_size=32,
        hidden_size=16,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        lsh_sliding_window=True,
        attend_across_buckets=False,
        circular_look_around=False,
        num_buckets=4,
        num_hashes=2,
        hash_seed=0,
        initializer_range=0.3,
        vocab_size=20,
        eos_token_id=1,
        **changes,
    )
    return ReformerForCausalLM(config).double().eval()


def _check_generation(model, ids):
    mask = (ids != model.config.pad_token_id).long()
    made = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        mask = nn.functional.pad(mask, (0, made.sequences.shape[1] - mask.shape[1]), value=1)
        expected = model(made.sequences, attention_mask=mask).logits[:, ids.shape[1] - 1 : -1]
    message = "`generate` does not give the logits of the forward pass."
    _compare(torch.stack(made.logits, dim=1), expected, message, FLOAT32_TOLERANCE)


def _check_loss(model, ids):
    with torch.no_grad():
        output = model(ids, labels=ids)
        expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    _compare(output.loss, expected, "The loss is not the cross-entropy of the next tokens.", FLOAT32_TOLERANCE)


def _check_gradients(model, ids):
    gradients = []
    for settings in ({}, {"reversible": False, "attn_implementation": "eager"}):
        twin = _small_model(**settings).train()
        twin.load_state_dict(model.state_dict())
        logits = twin(ids).logits
        gradients.append(torch.autograd.grad(logits.square().mean(), [*twin.parameters()]))
    for actual, expected in zip(*gradients, strict=True):
        _compare(actual, expected, "The gradients of reversible layers and fused attention are wrong.")


def _check_saving(model, ids):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = ReformerForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, weight in model.state_dict().items():
        _compare(loaded.state_dict()[name], weight, f"`{name}` is not loaded as it was saved.", 0.0)


def _compare(actual: torch.Tensor, expected: torch.Tensor, message: str, tolerance: float = TOLERANCE):
    """RuntimeError with the message unless two tensors agree."""
    if not (actual - expected).norm() <= tolerance * expected.norm():
        raise RuntimeError(message)
