"""
LSH attention as Triton kernels: nothing of the size of the scores is ever in memory, forward or backward.

Shapes: B batch, L length, H heads, D head size, R rounds, P padded length.
"""

import os
from functools import lru_cache

import torch
from torch import nn

from .differentiation import OnceDifferentiable, once_differentiable
from .implementations import AttentionCall
from .lsh_options import LSHOptions


HEAD_SIZES = (32, 64, 128)
CHUNK_LENGTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_NEIGHBOURS = 2
MIN_CAPABILITY = (8, 0)


def lsh_attention_triton(
    query_key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    order: torch.Tensor,
    key_mask: torch.Tensor | None,
    options: LSHOptions,
    return_weights: bool = False,
) -> tuple[torch.Tensor, None]:
    """
    Chunked LSH attention (paper section 2, "LSH attention"), all rounds combined.

    A token that sees nothing but itself gets exactly its value, or with `options.value_shift` zeros.

    Args:
        query_key, value: `[B, L, H, D]`, float32, bfloat16 or float16; any strides. With `options.value_shift` the
            values are what the keys carry.
        buckets: `[B, H, R, P]`, integer, the bucket of each position; P is a multiple of the chunk length.
        order: `[B, H, R, P]`, integer, the positions of each round in sorted order; those from L on are padding.
        key_mask: `[B, P]`, bool, or None if every token is real.

    Returns:
        Output `[B, L, H, D]`, and None for the attention map. What `why_not_triton` excludes must not be asked for.
    """
    length, padded_length = query_key.shape[1], order.shape[3]
    chunk_length = kernel_chunk_length(options.chunk_length, length, options.around)
    if chunk_length != options.chunk_length:
        # Only the first chunk of each round has tokens. Padding by a negative number cuts off.
        added = (0, chunk_length - padded_length)
        order, buckets = nn.functional.pad(order, added, value=length), nn.functional.pad(buckets, added)
        key_mask = None if key_mask is None else nn.functional.pad(key_mask, added, value=False)
    own_buckets = None if options.attend_across_buckets else buckets.int().contiguous()
    mask = None if key_mask is None else key_mask.contiguous()
    return _LSHAttention.apply(
        query_key, value, order.int().contiguous(), own_buckets, mask, chunk_length, options
    ), None


class _LSHAttention(OnceDifferentiable):
    @staticmethod
    @torch.compiler.disable
    def forward(ctx, query_key, value, order, buckets, key_mask, chunk_length, options):
        from .triton_kernels import KernelOptions
        from .triton_launch import IS_INTERPRETED, attention_forward

        query_key, value = with_contiguous_rows(query_key), with_contiguous_rows(value)
        num_rounds, padded_length = order.shape[2:]
        kernel_options = KernelOptions(
            chunk_length=chunk_length,
            head_size=query_key.shape[-1],
            num_before=options.num_chunks_before,
            num_after=options.num_chunks_after,
            causal=options.causal,
            circular=options.circular_look_around,
            sliding_window=options.sliding_window,
            own_bucket=not options.attend_across_buckets,
            shared_qk=True,
            own_value=not options.value_shift,
            is_sorted=True,
            has_mask=key_mask is not None,
            is_padded=padded_length > query_key.shape[1],
            widen=IS_INTERPRETED,
        )
        tables = order, buckets, key_mask
        output, log_sum_exp, key_scale = attention_forward(
            query_key, query_key, value, tables, num_rounds, padded_length, kernel_options
        )
        ctx.save_for_backward(query_key, value, output, log_sum_exp, key_scale, *tables)
        ctx.kernel_options = kernel_options
        return output

    @staticmethod
    @once_differentiable
    @torch.compiler.disable
    def backward(ctx, gradient):
        from .triton_launch import attention_backward

        query_key, value, output, log_sum_exp, key_scale, *tables = ctx.saved_tensors
        num_rounds, padded_length = tables[0].shape[2:]
        rows, numbers = (query_key, query_key, value), (log_sum_exp, key_scale)
        gradients = attention_backward(
            rows, gradient, output, numbers, tables, num_rounds, padded_length, ctx.kernel_options
        )
        return *gradients, None, None, None, None, None


def with_contiguous_rows(rows: torch.Tensor) -> torch.Tensor:
    """`rows` with a contiguous last dimension, which is all that the kernels need."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def kernel_chunk_length(chunk_length: int, length: int, around: tuple[int, int]) -> int:
    """`chunk_length`, or where all tokens are in one chunk, one that suits the kernels."""
    if length > chunk_length or around != (0, 0):
        return chunk_length
    return next((suitable for suitable in CHUNK_LENGTHS if suitable >= length), chunk_length)


def why_not_triton(call: AttentionCall) -> str | None:
    """Why the Triton kernels cannot serve a call of LSH or local attention, or None."""
    around = call.num_before, call.num_after
    chunk_length = kernel_chunk_length(call.chunk_length, call.length, around)
    reason = call.why_not_fused("Set it to 0 (stock Reformer's default for LSH attention)")
    if reason is not None:
        return reason
    if call.counts_keys_once:
        return "counts a key once for each round that finds it; use another with `allow_duplicate_attention=False`."
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
    # The driver's answer is kept, as it is asked for at every call; a compiler warns where it sees that.
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
    # Not before it is needed: importing Triton takes a while, and the package does not require it.
    from .triton_launch import IS_INTERPRETED, triton

    if triton is None:
        return "needs Triton, which is not installed: `pip install triton`, or use 'eager'."
    if is_interpreted != IS_INTERPRETED:
        return "cannot follow a change of TRITON_INTERPRET once Triton is imported; set it before Python starts."
    if device.type == "cuda" and not _is_recent(device):
        lowest = ".".join(map(str, MIN_CAPABILITY))
        return f"needs a CUDA device of compute capability {lowest} or later, which {device} is not; use 'eager'."
    return None
