"""Several implementations of one attention: each says what it cannot do, and a request is met or refused."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


NAMES = ("eager", "sdpa", "triton")


# trf-ignore: TRF031 this goes in, it is no output
@dataclass(frozen=True)
class AttentionCall:
    """
    What an implementation must be able to do to serve a call.

    Attributes:
        device, dtype, head_size: Of the projected vectors.
        chunk_length, num_before, num_after: Tokens per chunk, and neighbouring chunks looked at.
        length: Tokens.
        dropout_p: Dropout on the attention probabilities.
        return_weights: Whether the attention map is wanted.
        counts_keys_once: Whether a key that several hashing rounds find counts once.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    chunk_length: int
    num_before: int
    num_after: int
    length: int
    dropout_p: float = 0.0
    return_weights: bool = False
    counts_keys_once: bool = False


# trf-ignore: TRF031 this goes in, it is no output
@dataclass(frozen=True)
class Implementation:
    """
    Attributes:
        attend: The function.
        why_not: Why it cannot serve a call and what to do, in a sentence; None if it can.
        is_default_on: Types of device where it is taken when none is asked for; None for all.
    """

    attend: Callable
    why_not: Callable[[AttentionCall], str | None] = lambda call: None
    is_default_on: tuple[str, ...] | None = None


def check_requested(name: str | None):
    """ValueError for an `attn_implementation` that sparse layers do not have."""
    if name not in (None, *NAMES):
        raise ValueError(
            f"`attn_implementation={name!r}` is not possible: sparse layers have {list(NAMES)}. "
            "Choose one of these, or none, for the fastest that can do what each call asks."
        )


def choose_implementation(implementations: dict[str, Implementation], requested: str | None, call: AttentionCall):
    """
    The function that serves a call.

    Args:
        implementations: By name, the fastest first; "eager" can do everything.
        requested: A name, or None for the fastest that can.

    Raises:
        ValueError: There is no such name, or that implementation cannot do what is asked of it.
    """
    if requested is None:
        # A compiler makes one kernel of plain operations and cannot look into ours.
        if torch.compiler.is_compiling():
            return implementations["eager"].attend
        return next(one for one in implementations.values() if _is_default_for(one, call)).attend
    if requested not in implementations:
        raise ValueError(
            f"There is no implementation {requested!r} of this attention; choose one of {sorted(implementations)}, or "
            "None for the fastest that can do what is asked. A model takes it as `attn_implementation`."
        )
    reason = implementations[requested].why_not(call)
    if reason is not None:
        raise ValueError(f"The {requested!r} implementation of this attention {reason}")
    return implementations[requested].attend


def _is_default_for(implementation: Implementation, call: AttentionCall) -> bool:
    devices = implementation.is_default_on
    return (devices is None or call.device.type in devices) and implementation.why_not(call) is None
