"""
The contenders of benchmark.py: attention operators, and the language models of language_models.py.

Shapes: B batch, L length, H heads, D head size, R hashing rounds, `hidden_size` = H * D.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers.models.reformer.configuration_reformer import ReformerConfig as StockConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention as StockLSHSelfAttention
from transformers.utils import logging

from hf_reformer.modeling.memory.memory_measurement import peak_of_events, resident_bytes
from hf_reformer.modeling.ops.lsh_operator import LSH_IMPLEMENTATIONS

from .language_models import (
    PackageModel,
    llama_model,
    longformer_model,
    make_ids,
    mamba2_model,
    minimax_model,
    mistral_model,
    own_model,
    stock_model,
    training_step,
    xlstm_model,
)
from .processes import KEPT
from .shape import SEED, Shape


# Which random vectors: after those that take the place of projections.
HIDDEN, GRADIENT = 3, 4
# For the check of models: with the first weights of training the loss would hardly depend on attention.
WEIGHT_SCALE = 4.0


# Attention: projections, then the operator


@lru_cache(maxsize=5)
def draw(shape: Shape, place: int, scale: float = 1.0) -> torch.Tensor:
    """Random vectors `[B, L, hidden_size]`, one tensor for all contenders of a length; `place` is which of them."""
    size = (shape.batch_size, shape.length, shape.hidden_size)
    return (torch.randn(size, generator=torch.Generator().manual_seed(SEED + place)) * scale).to(shape.device)


class GivenVectors(nn.Module):
    """In the place of a projection: ignores its input and returns vectors that are there already."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.vectors


class OwnAttention(nn.Module):
    """Our LSH self-attention, taken from a model with one layer."""

    projections = ("query_key", "value")

    def __init__(self, shape: Shape, implementation: str):
        super().__init__()
        self.inner = own_model(replace(shape, num_layers=1), implementation).reformer.encoder.layers[0]
        self.inner = self.inner.attention.self_attention

    def forward(self, hidden_states, buckets=None):
        length, rotations = hidden_states.shape[1], None
        if buckets is None:
            rotations = self.inner.draw_rotations(length, length, None, hidden_states.device)
        return self.inner(hidden_states, circle_length=length, rotations=rotations, buckets=buckets)[0]


class StockAttention(nn.Module):
    """The LSH self-attention of transformers."""

    projections = ("query_key", "value")

    def __init__(self, shape: Shape):
        super().__init__()
        self.inner = StockLSHSelfAttention(StockConfig(**shape.reformer_settings(seed=None)), layer_idx=0)

    def forward(self, hidden_states, buckets=None):
        if buckets is not None:
            buckets = numbered_on(buckets, self.inner.num_buckets)
        return self.inner(hidden_states, buckets=buckets).hidden_states


class PackageAttention(nn.Module):
    """The LSH self-attention of `reformer-pytorch`, without its projection of the output, which others do not have."""

    projections = ("toqk", "tov")

    def __init__(self, shape: Shape):
        super().__init__()
        from reformer_pytorch import LSHSelfAttention

        self.inner = LSHSelfAttention(
            shape.hidden_size,
            heads=shape.num_heads,
            bucket_size=shape.chunk_length,
            n_hashes=shape.rounds,
            causal=True,
            full_attn_thres=0,
        )
        self.inner.to_out = nn.Identity()
        self.num_buckets = shape.num_buckets

    def forward(self, hidden_states, buckets=None):
        if buckets is None:
            return self.inner(hidden_states)
        attend, flat = self.inner.lsh_attn, numbered_on(buckets, self.num_buckets).flatten(0, 1)
        # It divides scores by the root of the head size, and stock does not.
        undo = attend.register_forward_pre_hook(
            lambda _, vectors: (vectors[0] * vectors[0].shape[-1] ** 0.5, vectors[1])
        )
        with patch.object(attend, "hash_vectors", lambda *_, **__: flat):
            output = self.inner(hidden_states)
        undo.remove()
        return output


class DenseAttention(nn.Module):
    """Causal attention to everything, with a projection more than LSH attention has, and no hashing."""

    projections = ("query", "value", "key")

    def __init__(self, shape: Shape, backend: str = "default"):
        super().__init__()
        self.inner = nn.ModuleDict(
            {name: nn.Linear(shape.hidden_size, shape.hidden_size, bias=False) for name in self.projections}
        )
        self.num_heads = shape.num_heads
        self.attend = flex_attend(shape) if backend == "flex" else partial(sdpa_attend, backend)

    def forward(self, hidden_states):
        query, key, value = (
            self.inner[name](hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        return self.attend(query, key, value).transpose(1, 2).flatten(2)


def sdpa_attend(backend: str, query, key, value):
    """SDPA with a backend of its own choice ("default") or a certain one, which raises where it cannot run."""
    chosen = nullcontext() if backend == "default" else sdpa_kernel(getattr(SDPBackend, backend))
    with chosen:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def flex_attend(shape: Shape):
    """FlexAttention, compiled for one length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Each length compiles anew; beyond a few, one function would fall back to eager mode.
    torch.compiler.reset()
    mask = torch.compile(create_block_mask)(
        lambda batch, head, query, key: query >= key, None, None, shape.length, shape.length, device=shape.device
    )
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def numbered_on(buckets: torch.Tensor, num_buckets: int | list[int]) -> torch.Tensor:
    """Our buckets `[B, H, R, L]` as both peers number them, each round on from the one before: `[B, H, R * L]`."""
    total = torch.tensor(num_buckets).prod().item()
    offsets = torch.arange(buckets.shape[2], device=buckets.device).view(-1, 1) * total
    return (buckets.long() + offsets).flatten(2)


def make_attention(name: str, shape: Shape, *, with_projections: bool) -> nn.Module:
    """A contender's attention; every one has the same projections, or else is given the same vectors."""
    attention = CONTENDERS[name].attention(shape)
    give_projections(attention, shape, with_projections)
    return attention.to(shape.device).train()


def give_projections(attention: nn.Module, shape: Shape, with_projections: bool) -> None:
    """Set the weights of the projections, or put the vectors in their place."""
    for place, name in enumerate(attention.projections):
        # Queries large enough that attention is not the same everywhere.
        scale = 1.0 if place == 1 else WEIGHT_SCALE
        if with_projections:
            size = (shape.hidden_size, shape.hidden_size)
            weight = torch.randn(size, generator=torch.Generator().manual_seed(SEED + place))
            projection = nn.Linear(*size, bias=False)
            projection.weight.data = weight * scale / shape.hidden_size**0.5
        else:
            # The same tensor, whatever is computed with it.
            vectors = draw(replace(shape, rounds=1, dtype="fp32"), place, scale)
            projection = GivenVectors(vectors.bfloat16() if shape.dtype == "bf16" else vectors)
        attention.inner.add_module(name, projection)


# The registry


@dataclass(frozen=True)
class Contender:
    """
    One of those compared.

    Attributes:
        words: What it is.
        attention: Makes its attention, from a shape; None for a model only.
        model: Makes its language model; None for an operator only.
        hashes: Whether it has hashing rounds.
        growth: Power of the length by which time and memory grow, as long as only one length was measured.
        trains_only: The model reads a prompt as another contender does.
        implementation: Of ours, which one.
        layer: Of ours, the kind of its attention layers.
        reversible: Of ours, whether activations are computed again instead of stored.
        causal: Tokens see only themselves and what came before.
        dtype: What it computes in, whatever the others do; None for the same.
        package: What must be installed.
        needs_cuda: Not on a CPU.
    """

    words: str
    attention: Callable[[Shape], nn.Module] | None = None
    model: Callable[[Shape], nn.Module] | None = None
    hashes: bool = True
    growth: float = 1.0
    trains_only: bool = False
    implementation: str | None = None
    layer: str = "lsh"
    reversible: bool = True
    causal: bool = True
    dtype: str | None = None
    package: str | None = None
    needs_cuda: bool = False

    @property
    def is_reference(self) -> bool:
        """Whether others are compared to it; where several are, to the first."""
        return self.implementation is not None and not self.trains_only

    @property
    def is_comparable(self) -> bool:
        """Whether it is ours and computes as the others do, so that a crossover says something about attention."""
        return self.implementation is not None and self.dtype is None

    @property
    def cases(self) -> set[str]:
        """The cases it takes part in."""
        found = {"attention", "operator"} if self.attention else set()
        if self.model:
            found |= {"step", "memory"} if self.trains_only else {"step", "memory", "prefill"}
        return found

    def own(self, shape: Shape) -> Shape:
        """What it takes part with: `shape`, in its own dtype."""
        return replace(shape, dtype=self.dtype or shape.dtype)

    def missing(self, device: str) -> str | None:
        """Why it cannot be measured here; None if it can."""
        if self.package and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return f"{self.package} is not installed: pip install {self.package}"
        if self.implementation and self.implementation not in LSH_IMPLEMENTATIONS:
            return f"LSH attention has no implementation {self.implementation!r} here"
        if self.needs_cuda and device != "cuda":
            return "it needs --device cuda"
        return None


def own_contenders() -> dict[str, Contender]:
    """
    Each implementation of ours, the fastest first.

    `-plain` stores activations instead of recomputing them, `-local` has local layers instead of LSH layers, `-bf16`
    computes under autocast beside others that do not.
    """
    found = {}
    for name in ("triton", "sdpa", "eager"):
        facts = {"implementation": name, "needs_cuda": name == "triton"}
        found[f"ours-{name}"] = Contender(
            f"hf_reformer, {name}",
            attention=partial(OwnAttention, implementation=name),
            model=partial(own_model, implementation=name),
            **facts,
        )
        found[f"ours-{name}-plain"] = Contender(
            f"hf_reformer, {name}, reversible=False",
            model=partial(own_model, implementation=name, reversible=False),
            trains_only=True,
            reversible=False,
            **facts,
        )
        found[f"ours-{name}-local"] = Contender(
            f"hf_reformer, {name}, local",
            model=partial(own_model, implementation=name, layer="local"),
            hashes=False,
            trains_only=True,
            layer="local",
            **facts,
        )
        found[f"ours-{name}-bf16"] = Contender(
            f"hf_reformer, {name}, bfloat16 autocast",
            model=partial(own_model, implementation=name),
            trains_only=True,
            dtype="bf16",
            **facts,
        )
    return found


def dense_contenders() -> dict[str, Contender]:
    """Attention to everything, by each kernel."""
    facts = {"hashes": False, "growth": 2.0}
    found = {"sdpa": Contender("SDPA, causal", attention=DenseAttention, **facts)}
    backends = {"sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION", "flex": "flex"}
    for name, backend in backends.items():
        attention = partial(DenseAttention, backend=backend)
        words = "FlexAttention, compiled" if backend == "flex" else f"SDPA, {backend.lower()}"
        found[name] = Contender(words, attention=attention, needs_cuda=True, **facts)
    found["llama"] = Contender("Llama, SDPA", model=llama_model, **facts)
    found["llama-checkpointed"] = Contender(
        "Llama, SDPA, gradient checkpointing", model=partial(llama_model, checkpointed=True), trains_only=True, **facts
    )
    return found


def long_text_contenders() -> dict[str, Contender]:
    """Models of transformers that people choose for long texts; what each is stands in language_models.py."""
    facts = {"hashes": False, "trains_only": True}
    return {
        "mistral-window": Contender("Mistral with a window, SDPA", model=mistral_model, growth=2.0, **facts),
        "longformer": Contender("Longformer, both ways", model=longformer_model, causal=False, **facts),
        "minimax": Contender("MiniMax, lightning attention", model=minimax_model, **facts),
        "xlstm": Contender("xLSTM", model=xlstm_model, **facts),
        "mamba2": Contender("Mamba2, without its kernels", model=mamba2_model, **facts),
    }


CONTENDERS = {
    **own_contenders(),
    "stock": Contender("transformers Reformer", attention=StockAttention, model=stock_model),
    # Its buckets are not factorised: hashing takes L * L / chunk_length.
    "reformer-pytorch": Contender(
        "reformer-pytorch", PackageAttention, PackageModel, growth=2.0, package="reformer-pytorch"
    ),
    **dense_contenders(),
    **long_text_contenders(),
}


def make_model(name: str, shape: Shape) -> nn.Module:
    """A contender's language model, for training."""
    torch.manual_seed(SEED)
    return CONTENDERS[name].model(shape).to(shape.device).train()


def peer_versions() -> dict[str, str]:
    """Of the packages that take part, as far as they are installed."""
    found = {}
    for name in ("hf_reformer", "reformer-pytorch", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


# Memory


def peak_of_step(kind: str, name: str, shape: Shape, threads: int) -> tuple[int, float]:
    """
    Peak bytes of a training step above what stands after the model was made, and its seconds, in a fresh process.

    A step of a short text comes first, so that what libraries keep for themselves is there already.

    Args:
        kind: "allocated" for what PyTorch's allocator has given out at once, "resident" for what the process held on a
            CPU, with what the C library does not give back between.

    Raises:
        OSError: the system does not tell.
    """
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    shape = CONTENDERS[name].own(shape)
    short = replace(shape, length=min(shape.length, shape.short_length), ff_chunk=0)
    training_step(make_model(name, short), make_ids(short), short)
    gc.collect()
    model, ids = make_model(name, shape), make_ids(shape)
    before, start = start_peak(shape.device), time.perf_counter()
    if kind == "allocated" and shape.device == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            training_step(model, ids, shape)
        seconds = time.perf_counter() - start
        return peak_of_events(profiler), seconds
    if not before:
        raise OSError("this system does not tell resident memory")
    training_step(model, ids, shape)
    after = read_peak(shape.device)
    return after - before, time.perf_counter() - start


def start_peak(device: str) -> int:
    """Let the peak of memory start anew; bytes in use now, 0 where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if resident_bytes("VmHWM") is None:
        return 0
    # What is free already, but still resident, would be taken again unseen; unless it is to be kept.
    if not KEPT.keys() & os.environ.keys() and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident_bytes("VmRSS")


def read_peak(device: str) -> int:
    """The peak since then, once all work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM") or 0


def free_memory(device: str) -> float:
    """Bytes that are there to be taken; infinity where the system does not tell."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text(encoding="utf-8")) if path.is_file() else None
    return 1024 * int(found[1]) if found else math.inf


def reason_of(error: Exception) -> str:
    """Why a contender failed, in a line."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"it failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
