"""Hugging Face's `kernels`: the operators of the package from a folder in the Hub's format."""

from typing import Any

import torch
from kernels import get_local_kernel

import hf_reformer

from ..kernel_folder import write_kernel
from .setting import Check, Setting, expect


TOOLS = ("kernels",)


def load(setting: Setting) -> dict[str, Any]:
    """Ours computes what the package does. There is no control: others' kernels are compiled for GPUs."""
    if not setting.is_ours:
        return {}
    write_kernel(setting.folder)
    kernel = get_local_kernel(setting.folder, trust_remote_code=True)
    torch.manual_seed(0)
    query_key, value = torch.randn(2, 200, 2, 16, requires_grad=True), torch.randn(2, 200, 2, 16)
    gradients = []
    for module in (kernel, hf_reformer):
        rotations = module.draw_rotations(2, 16, 2, 8, device="cpu", seed=0)
        buckets = module.hash_vectors(query_key.detach(), rotations, 8)
        output, _ = module.lsh_attention(query_key, value, buckets, chunk_length=16, causal=True)
        gradients += torch.autograd.grad(output.square().sum(), query_key)
    expect("the same gradients as by the package", torch.equal(*gradients))
    expect("operators of its own", any(name.startswith("hf_reformer_") for name in dir(torch.ops)))
    return {"functions": sorted(kernel.__all__)}


CHECKS: dict[str, Check] = {"a folder of kernels": load}
