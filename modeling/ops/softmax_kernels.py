"""
Softmax attention with its log-sum-exp, and the gradient of a softmax over more than what one call saw.

PyTorch's fused kernels keep no score matrix, but its public function does not return the log-sum-exp that several
hashing rounds are combined with. The kernels behind it do. They are private, so each is used only where it is there as
it was when this was written, and plain matrix products do the same elsewhere.

The backward function takes the output and log-sum-exp of the whole softmax of which a call computed a part. With them
`exp(score - log-sum-exp)` and `rowsum(output * its gradient)` are those of the whole, so its results are exactly the
part's share of the gradient: there is no gradient of the log-sum-exp.

Shapes: G groups, N chunks, C queries of a chunk, W keys of its window, D head size.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .differentiation import once_differentiable
from .operators import AttentionFunction


class RowGradients(NamedTuple):
    """Gradients of queries, keys and values, in their shapes."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def additive_mask_dtype(query: torch.Tensor) -> torch.dtype:
    """The dtype that `attend` takes its mask in."""
    return query.dtype if query.device.type == "cuda" else torch.promote_types(query.dtype, torch.float32)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Softmax attention of each chunk to its window.

    Args:
        query: `[G, N, C, D]`.
        key, value: `[G, N, W, D]`; windows may overlap in memory.
        mask: `[G, N, C, W]`, or 1 for N, added to the scores; `additive_mask_dtype(query)`.
        scale: Of the scores.

    Returns:
        `[G, N, C, D]` in the dtype of `query`, and the log-sum-exp `[G, N, C]`, float32 at least.
    """
    kernel = _kernel_for(query)
    if kernel == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    if kernel == "cuda":
        output, log_sum_exp, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask.expand(*query.shape[:3], -1), True, 0.0, False, scale=scale
        )
        return output, log_sum_exp
    scores = _scores(query, key, mask, scale)
    # Each softmax is divided by its own sum: a log-sum-exp near the score of a mask has lost its digits.
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def attend_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    gradient: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scale: float,
) -> RowGradients:
    """
    Gradients of `attend`, or of its share in a softmax over more.

    Args:
        gradient, output: `[G, N, C, D]`, of the whole softmax.
        log_sum_exp: `[G, N, C]`, of the whole softmax.
    """
    kernel = _kernel_for(query)
    if kernel == "cpu":
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, output, log_sum_exp, 0.0, False, attn_mask=mask, scale=scale
        )
        return RowGradients(*gradients)
    if kernel == "cuda":
        no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
        if query.dtype != torch.float32:
            # The kernel gives wrong gradients then unless the output lies in memory as it has written it.
            output = output.transpose(1, 2).contiguous().transpose(1, 2)
        needed = [True, True, True, False]
        *gradients, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            *(gradient, query, key, value, mask.expand(*query.shape[:3], -1), output, log_sum_exp),
            *(no_dropout, no_dropout, 0.0, needed, False),
            scale=scale,
        )
        return RowGradients(*gradients)
    probabilities = (_scores(query, key, mask, scale) - log_sum_exp[..., None]).exp_()
    delta = (gradient * output).to(probabilities.dtype).sum(-1, keepdim=True)
    probabilities_grad = (gradient @ value.mT).to(probabilities.dtype)
    scores_grad = (probabilities_grad.sub_(delta).mul_(probabilities) * scale).to(query.dtype)
    probabilities = probabilities.to(value.dtype)
    return RowGradients(scores_grad @ key, scores_grad.mT @ query, probabilities.mT @ gradient)


def has_causal_kernel(rows: torch.Tensor) -> bool:
    """Whether `CausalAttention` takes such vectors."""
    return rows.device.type == "cpu" and _HAS_CPU_KERNEL


class CausalAttention(AttentionFunction):
    """
    Softmax attention of each query to the keys up to its own place, of queries, keys and values `[B, H, L, D]`.

    The kernel skips what is masked and needs no mask. Only where `has_causal_kernel`.
    """

    @staticmethod
    def forward(query, key, value, scale):
        # Its one option is the scale.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, output, log_sum_exp, 0.0, True, scale=ctx.options
        )
        return *gradients, None


def distinct(pieces: Iterable, rows: torch.Tensor) -> Iterator:
    """
    The pieces of a call that make a difference to anything, first the largest.

    With fake tensors, which have shapes only, the first stands for all: they are made to count memory, and there are
    thousands of pieces.
    """
    for piece in pieces:
        yield piece
        if isinstance(rows, FakeTensor):
            return


def _scores(query, key, mask, scale):
    scores = query @ key.mT
    return scores.to(mask.dtype if mask.dtype.itemsize > 2 else torch.float32).mul_(scale).add_(mask)


def _kernel_for(query: torch.Tensor) -> str | None:
    """The fused kernel that takes such queries: "cpu", "cuda", or None for matrix products."""
    if query.device.type == "cpu" and _HAS_CPU_KERNEL:
        return "cpu"
    # The kernel pads its log-sum-exp to a multiple of 32 queries, and reads masks and vectors in rows of 16 bytes.
    is_aligned = query.shape[2] % 32 == 0 and query.shape[3] * query.dtype.itemsize % 16 == 0
    if query.device.type == "cuda" and _HAS_CUDA_KERNEL and query.dtype != torch.float64 and is_aligned:
        return "cuda"
    return None


def _takes(name: str, *arguments: str) -> bool:
    """Whether a private operator is there and takes these arguments."""
    operator = getattr(torch.ops.aten, name, None)
    return operator is not None and [a.name for a in operator.default._schema.arguments] == list(arguments)


_VECTORS = ("query", "key", "value")
_FOR_CPU = ("dropout_p", "is_causal", "attn_mask", "scale")
_HAS_CPU_KERNEL = _takes("_scaled_dot_product_flash_attention_for_cpu", *_VECTORS, *_FOR_CPU) and _takes(
    "_scaled_dot_product_flash_attention_for_cpu_backward", "grad_out", *_VECTORS, "out", "logsumexp", *_FOR_CPU
)
_FOR_CUDA = ("dropout_p", "is_causal", "scale")
_HAS_CUDA_KERNEL = _takes(
    "_scaled_dot_product_efficient_attention", *_VECTORS, "attn_bias", "compute_log_sumexp", *_FOR_CUDA
) and _takes(
    "_scaled_dot_product_efficient_attention_backward",
    *("grad_out_", *_VECTORS, "attn_bias", "out", "logsumexp", "philox_seed", "philox_offset", "dropout_p"),
    *("grad_input_mask", "is_causal", "scale"),
)
