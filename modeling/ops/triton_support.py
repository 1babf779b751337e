"""What the Triton kernels can do, and where they run."""

import os
from functools import lru_cache

import torch

from .implementations import AttentionCall


HEAD_SIZES = (32, 64, 128)
CHUNK_LENGTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_NEIGHBOURS = 2
MIN_CAPABILITY = (8, 0)


def kernel_chunk_length(chunk_length: int, length: int, around: tuple[int, int]) -> int:
    """`chunk_length`, or where all tokens are in one chunk, one that suits the kernels."""
    if length > chunk_length or around != (0, 0):
        return chunk_length
    return next((suitable for suitable in CHUNK_LENGTHS if suitable >= length), chunk_length)


def why_not_triton(call: AttentionCall) -> str | None:
    """Why the Triton kernels cannot serve a call of LSH or local attention, or None."""
    around = call.num_chunks_before, call.num_chunks_after
    chunk_length = kernel_chunk_length(call.chunk_length, call.length, around)
    reason = call.why_not_fused("Set it to 0 (stock Reformer's default for LSH attention)")
    if reason is not None:
        return reason
    if not call.allow_duplicate_attention:
        return "counts a key once for each round that finds it; use another with `allow_duplicate_attention=False`."
    if call.documents_on_the_circle:
        return (
            "keeps documents of a row apart by buckets; with `circular_look_around=True` and "
            "`attend_across_buckets=True` use another."
        )
    if call.head_size not in HEAD_SIZES:
        return f"has kernels for head sizes {list(HEAD_SIZES)}, but not {call.head_size}; use 'eager'."
    if chunk_length not in CHUNK_LENGTHS:
        return f"has kernels for chunks of {list(CHUNK_LENGTHS)} tokens, but not {chunk_length}; use 'eager'."
    if max(around) > MAX_NEIGHBOURS:
        return f"looks at up to {MAX_NEIGHBOURS} chunks on either side, but not at {max(around)}; use 'eager'."
    if call.dtype not in DTYPES:
        return f"computes in float32, bfloat16 or float16, but not in {call.dtype}; use 'eager'."
    return why_not_on(call.device)


_capability_of = lru_cache(torch.cuda.get_device_capability)


def _is_recent(device):
    # The capability is cached, because every call needs it. The compiler warns about a cached function.
    ask = torch.cuda.get_device_capability if torch.compiler.is_compiling() else _capability_of
    return ask(device) >= MIN_CAPABILITY


def why_not_on(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not is_interpreted:
        return (
            f"needs a CUDA device, but the tensors are on {device}; move the model to one, or use 'eager'. (For "
            "tests, TRITON_INTERPRET=1 in the environment runs the kernels on the CPU.)"
        )
    # Imported on demand: it takes a while, and the package does not require Triton.
    from ..kernels.triton_launch import IS_INTERPRETED, triton

    if triton is None:
        return "needs Triton, which is not installed: `pip install triton`, or use 'eager'."
    if is_interpreted != IS_INTERPRETED:
        return "cannot follow a change of TRITON_INTERPRET once Triton is imported; set it before Python starts."
    if device.type == "cuda" and not _is_recent(device):
        lowest = ".".join(map(str, MIN_CAPABILITY))
        return f"needs a CUDA device of compute capability {lowest} or later, which {device} is not; use 'eager'."
    return None
