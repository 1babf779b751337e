"""Several implementations of one attention: each says what it cannot do, and a request is met or refused."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .differentiation import is_inside_transform, refuse_derivatives
from .local_options import LocalOptions
from .lsh_options import LSHOptions


NAMES = ("eager", "sdpa", "triton")


# trf-ignore: TRF031 this goes in, it is no output
@dataclass(frozen=True)
class AttentionCall:
    """
    What an implementation must be able to do to serve a call.

    Attributes:
        device, dtype, head_size: Of the projected vectors.
        chunk_length, num_chunks_before, num_chunks_after: Tokens per chunk, and neighbouring chunks looked at.
        length: Tokens.
        dropout_p: Dropout on the attention probabilities.
        return_weights: Whether the attention map is wanted.
        allow_duplicate_attention: Whether a key counts once for each hashing round that finds it.
        documents_on_the_circle: Whether documents share a row, whose rounds share a circle, and only they keep tokens
            from seeing each other.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    chunk_length: int
    num_chunks_before: int
    num_chunks_after: int
    length: int
    dropout_p: float = 0.0
    return_weights: bool = False
    allow_duplicate_attention: bool = True
    documents_on_the_circle: bool = False

    def why_not_fused(self, without_dropout: str) -> str | None:
        """
        Why a kernel that keeps no probabilities cannot serve the call and what to do, or None.

        Args:
            without_dropout: How to do without dropout.
        """
        if self.return_weights:
            return "keeps no attention probabilities to return; use 'eager' for attention maps."
        if self.dropout_p:
            return (
                f"has no dropout on attention probabilities, but `dropout_p` is {self.dropout_p}. {without_dropout}, "
                "or use 'eager'."
            )
        return None


# trf-ignore: TRF031 this goes in, it is no output
@dataclass(frozen=True)
class Implementation:
    """
    Attributes:
        attend: The function.
        why_not: Why it cannot serve a call and what to do, in a sentence, or None. Without it, it can do everything.
        is_default_on: Types of device where it is taken when none is asked for; None for all.
        not_by_default: Pairs of a type of device and a dtype where it can be asked for, but the next one is faster.
    """

    attend: Callable
    why_not: Callable[[AttentionCall], str | None] | None = None
    is_default_on: tuple[str, ...] | None = None
    not_by_default: tuple[tuple[str, torch.dtype], ...] = ()


def check_requested(name: str | None):
    """ValueError for an `attn_implementation` that sparse layers do not have."""
    if name not in (None, *NAMES):
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported: sparse layers have {list(NAMES)}. '
            "Choose one of these, or none, for the fastest that can do what each call asks."
        )


def check_keeps_weights(name: str | None):
    """ValueError for an `attn_implementation` that has no attention maps to return, wherever they are computed."""
    if name not in (None, "eager"):
        raise ValueError(
            f"The {name!r} implementation of attention keeps no attention probabilities to return; use "
            "`attn_implementation='eager'` for attention maps, or leave it out."
        )


def choose_implementation(
    implementations: dict[str, Implementation],
    requested: str | None,
    query: torch.Tensor,
    options: LSHOptions | LocalOptions,
    return_weights: bool,
    has_documents: bool = False,
) -> Callable:
    """
    The function that serves a call.

    Args:
        implementations: By name, the fastest first; "eager" can do everything.
        requested: A name, or None for the fastest that can.
        query: `[B, L, H, D]`.
        has_documents: Whether rows hold several documents.

    Raises:
        ValueError: There is no such name, or that implementation cannot do what is asked of it.
    """
    is_transformed = is_inside_transform()
    call = AttentionCall(
        device=query.device,
        dtype=query.dtype,
        head_size=query.shape[3],
        chunk_length=options.chunk_length,
        num_chunks_before=options.num_chunks_before,
        num_chunks_after=options.num_chunks_after,
        length=query.shape[1],
        dropout_p=options.dropout_p,
        return_weights=return_weights,
        # Local attention has no rounds that could find a key twice.
        allow_duplicate_attention=not isinstance(options, LSHOptions) or options.allow_duplicate_attention,
        documents_on_the_circle=has_documents
        and options.circular_look_around
        and isinstance(options, LSHOptions)
        and options.attend_across_buckets,
    )
    if requested is None:
        # An exported program should run where this package is not installed.
        if is_transformed or torch.compiler.is_exporting():
            return implementations["eager"].attend
        return next(one for one in implementations.values() if _is_default_for(one, call)).attend
    if requested not in implementations:
        raise ValueError(
            f"There is no implementation {requested!r} of this attention; choose one of {sorted(implementations)}, or "
            "None for the fastest that can do what is asked. A model takes it as `attn_implementation`."
        )
    if is_transformed and requested != "eager":
        refuse_derivatives("inside of `torch.func`, or in forward mode")
    implementation = implementations[requested]
    if implementation.why_not is not None and (reason := implementation.why_not(call)) is not None:
        raise ValueError(f"The {requested!r} implementation of this attention {reason}")
    return implementation.attend


def _is_default_for(implementation: Implementation, call: AttentionCall) -> bool:
    devices, device = implementation.is_default_on, call.device.type
    is_wanted = (devices is None or device in devices) and (device, call.dtype) not in implementation.not_by_default
    return is_wanted and (implementation.why_not is None or implementation.why_not(call) is None)
