"""Check that the contenders of benchmark.py compute the same thing, before any of them is timed."""

import importlib.metadata
import importlib.util
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_reformer.modeling.ops.lsh_hashing import draw_rotations, hash_vectors

from .contenders import (
    CONTENDERS,
    GRADIENT,
    HIDDEN,
    WEIGHT_SCALE,
    StockAttention,
    draw,
    make_attention,
    make_model,
    numbered_on,
    reason_of,
)
from .language_models import make_ids, stock_model, training_step
from .shape import SEED, Shape


# Where stock penalises attention to oneself in checks: still nothing beside any other score, and of a size at which
# float32 keeps the digits of a log-sum-exp. At its own -1e5 tokens that see only themselves are up to 0.5% off.
SELF_SCORE = -150.0
LIMITS = {"output": 1e-4, "gradients": 1e-3, "loss": 1e-4, "model gradients": 1e-2, "buckets": 1e-4}
BFLOAT16_LOSS_LIMIT = 2**-7  # what bfloat16 resolves


# Agreement


@dataclass
class Agreement:
    """
    The errors found so far, each with its limit; the first one above it ends the program.

    Attributes:
        found: A row for each comparison.
        failed: Contenders that could not be compared, with the reason.
    """

    found: list[dict] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, error: float, limit: float, **where) -> None:
        """Note an error.

        Raises:
            SystemExit: it is above the limit, or no number.
            ValueError: so is that of a peer, which takes that peer out only.
        """
        self.found.append({**where, "error": error, "limit": limit})
        contender = CONTENDERS.get(where["contender"])
        if not error <= limit and contender and not contender.implementation:
            raise ValueError(f"{where['what']} off by {error:.1e} from {where['reference']}, {limit:.1e} is allowed")
        if not error <= limit:
            place = ", ".join(f"{name} {value}" for name, value in where.items() if name not in ("contender", "what"))
            raise SystemExit(
                f"{where['contender']} disagrees with {where['reference']}: {where['what']} off by {error:.1e}, "
                f"{limit:.1e} is allowed ({place}). Nothing was measured, because times of wrong results mean nothing."
            )

    @contextmanager
    def trying(self, name: str):
        """What may fail here takes the contender out."""
        try:
            yield
        except Exception as error:
            self.failed[name] = reason_of(error)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to the expected norm."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def outcome(attention: nn.Module, shape: Shape, **buckets) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output for random hidden states, and gradients of all that have some."""
    hidden, gradient = (draw(replace(shape, rounds=1, dtype="fp32"), place) for place in (HIDDEN, GRADIENT))
    hidden = hidden.detach().requires_grad_()
    with shape.autocast():
        output = attention(hidden, **buckets)
    output.backward(gradient.to(output.dtype))
    gradients = [hidden.grad] if hidden.grad is not None else []
    return output.detach(), gradients + [parameter.grad for parameter in attention.parameters()]


def errors_of(actual: tuple, expected: tuple) -> dict[str, float]:
    """The error of the output, and the largest of a gradient."""
    gradients = [relative_error(*pair) for pair in zip(actual[1], expected[1], strict=True)]
    return {"output": relative_error(actual[0], expected[0]), "gradients": max(gradients)}


def check_attention(names: list[str], shape: Shape, agreement: Agreement, *, with_projections: bool) -> None:
    """
    Compare attention to stock's, given the same buckets, and dense attention to plain SDPA.

    In bfloat16 twice the reference's own error against float32 is allowed.
    """
    exact = replace(shape, dtype="fp32")
    names = [name for name in names if CONTENDERS[name].attention]
    case = {"case": "operator" if with_projections else "attention", "length": shape.length}
    for hashes, reference in ((True, "stock"), (False, "sdpa")):
        family = [name for name in names if CONTENDERS[name].hashes == hashes and name != reference]
        if not family:
            continue
        where = case | ({"rounds": shape.rounds} if hashes else {}) | {"reference": reference}
        with reference_backend(hashes), patched_package():
            make = partial(make_attention, with_projections=with_projections)
            oracle = make(reference, exact)
            shared = share_buckets(oracle, exact, agreement, where) if hashes else {}
            expected = outcome(oracle, exact, **shared)
            limits = {what: LIMITS[what] for what in ("output", "gradients")}
            if shape.dtype == "bf16":
                own_errors = errors_of(outcome(make(reference, shape), shape, **shared), expected)
                limits = {what: 2 * error for what, error in own_errors.items()}
        for name in family:
            with patched_package(), agreement.trying(name):
                errors = errors_of(outcome(make(name, shape), shape, **shared), expected)
                for what, error in errors.items():
                    agreement.add(error, limits[what], contender=name, what=what, **where)


def reference_backend(hashes: bool):
    """Dense attention is compared to the plainest there is."""
    return nullcontext() if hashes else sdpa_kernel(SDPBackend.MATH)


def patched_package():
    """`reformer-pytorch` with `SELF_SCORE`, if it is installed."""
    if importlib.util.find_spec("reformer_pytorch") is None:
        return nullcontext()
    return patch("reformer_pytorch.reformer_pytorch.TOKEN_SELF_ATTN_VALUE", SELF_SCORE)


def share_buckets(stock: StockAttention, shape: Shape, agreement: Agreement, where: dict) -> dict:
    """Buckets for all, made by our hashing; on a CPU, where a seed gives the same rotations, stock's must be those."""
    set_self_score(stock)
    with torch.no_grad():
        hidden = draw(replace(shape, rounds=1), HIDDEN)
        vectors = stock.inner.query_key(hidden).unflatten(-1, (shape.num_heads, -1))
    buckets = own_buckets(vectors, shape.rounds, shape.num_buckets)
    if shape.device == "cpu":
        stock.inner.hash_seed = SEED
        theirs = stock.inner._hash_vectors(vectors.transpose(1, 2), shape.rounds, None)
        differ = (theirs != numbered_on(buckets, shape.num_buckets)).float().mean().item()
        agreement.add(differ, LIMITS["buckets"], contender="our hashing", what="share of buckets", **where)
    return {"buckets": buckets}


def own_buckets(vectors: torch.Tensor, rounds: int, num_buckets: int | list[int]) -> torch.Tensor:
    """Buckets of `[B, L, H, D]` with the seed of the checks."""
    rotations = draw_rotations(*vectors.shape[2:], rounds, num_buckets, device=vectors.device, seed=SEED)
    return hash_vectors(vectors, rotations, num_buckets)


def set_self_score(stock: nn.Module) -> None:
    """`SELF_SCORE` in every layer."""
    for name, buffer in stock.named_buffers():
        if "self_mask" in name:
            buffer.fill_(SELF_SCORE)


def check_models(names: list[str], shape: Shape, agreement: Agreement) -> None:
    """Compare ours to stock with the same weights, seed of hashing and text, and recomputed activations to stored."""
    ours = [name for name in names if CONTENDERS[name].implementation]
    for layer in sorted({CONTENDERS[name].layer for name in ours}):
        of_layer = [name for name in ours if CONTENDERS[name].layer == layer]
        _check_models_with(layer, of_layer, shape, agreement)


def _check_models_with(layer: str, ours: list[str], shape: Shape, agreement: Agreement) -> None:
    torch.manual_seed(SEED)
    stock = stock_model(shape, layer=layer, seed=SEED).to(shape.device).train()
    set_self_score(stock)
    with torch.no_grad():
        for name, weight in stock.named_parameters():
            if weight.ndim == 2 and "embeddings" not in name:
                weight.mul_(WEIGHT_SCALE)
    if shape.device != "cpu" and layer == "lsh":
        hash_as_ours(stock)
    ids = make_ids(shape)
    found = {"stock": (training_step(stock, ids, shape), gradient_of(stock))}
    for name in sorted(ours, key=lambda name: CONTENDERS[name].reversible):
        with agreement.trying(name):
            own = CONTENDERS[name].own(shape)
            model = CONTENDERS[name].model(own, seed=SEED).to(shape.device).train()
            model.load_state_dict(stock.state_dict())
            found[name] = training_step(model, ids, own), gradient_of(model)
            for reference in {"stock", f"{name}-plain"} & found.keys():
                errors = [relative_error(*pair) for pair in zip(found[name], found[reference], strict=True)]
                where = {"case": "model", "length": shape.length, "rounds": shape.rounds, "reference": reference}
                limit = LIMITS["loss"] if own.dtype == "fp32" else BFLOAT16_LOSS_LIMIT
                agreement.add(errors[0], limit, contender=name, what="loss", **where)
                # In bfloat16 hidden states differ enough to fall into other buckets.
                if own.dtype == "fp32":
                    limit = LIMITS["model gradients" if reference == "stock" else "gradients"]
                    agreement.add(errors[1], limit, contender=name, what="gradients", **where)


def check_causality(names: list[str], shape: Shape, agreement: Agreement) -> None:
    """
    See that models do not read on: other tokens in the second half leave the logits of the first half as they were.

    Not those that hash: which keys of its bucket a token meets depends on how many come after it.
    """
    ids, half = make_ids(shape), shape.length // 2
    changed = torch.cat([ids[:, :half], ids[:, half:].flip(1)], dim=1)
    for name in names:
        contender = CONTENDERS[name]
        if not contender.model or contender.hashes or not contender.causal:
            continue
        with agreement.trying(name), torch.no_grad():
            model = make_model(name, contender.own(shape)).eval()
            logits, others = (model(text, use_cache=False).logits[:, :half] for text in (ids, changed))
            where = {"case": "model", "length": shape.length, "reference": "itself without what comes after"}
            agreement.add(relative_error(others, logits), LIMITS["output"], contender=name, what="logits", **where)


def gradient_of(model: nn.Module) -> torch.Tensor:
    """Of all weights of the layers, in one vector; that of the head is larger and hardly depends on attention."""
    named = sorted((name, weight) for name, weight in model.named_parameters() if ".encoder." in name)
    return torch.cat([weight.grad.flatten() for _, weight in named])


def hash_as_ours(stock: nn.Module) -> None:
    """On a GPU the same seed gives stock other rotations, so its hashing is replaced."""

    def hash_with(attention, vectors, num_hashes, *_, **__):
        return numbered_on(own_buckets(vectors.transpose(1, 2), num_hashes, attention.num_buckets), num_buckets)

    for layer in stock.reformer.encoder.layers:
        attention = layer.attention.self_attention
        num_buckets = attention.num_buckets
        attention._hash_vectors = partial(hash_with, attention)
