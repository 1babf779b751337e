"""The kernels as operators of PyTorch: what compilers are told of them is true."""

import pytest
import torch
from torch.library import opcheck

from hf_reformer import draw_rotations, hash_vectors, local_attention, lsh_attention
from hf_reformer.modeling.kernels import triton_launch
from hf_reformer.modeling.ops.operators import IMPLEMENTATIONS


pytestmark = pytest.mark.compile


HEAD_SIZE, LENGTH, BUCKETS = 32, 20, 8


def calls_of(implementation, masked):
    """Every operator that LSH and local attention call for a gradient, with its arguments."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in IMPLEMENTATIONS:
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    # The interpreter of Triton is slow.
    dtype, heads = (torch.float32, 1) if implementation == "triton" else (torch.float64, 2)
    query, key, value = torch.randn(3, 2, LENGTH, heads, HEAD_SIZE, dtype=dtype).requires_grad_().unbind()
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 13])[:, None] if masked else None
    kwargs = {"chunk_length": 16, "causal": True, "attention_mask": mask, "implementation": implementation}
    with Recorder():
        rotations = draw_rotations(heads, HEAD_SIZE, 2, BUCKETS, device=query.device, seed=3)
        buckets = hash_vectors(query.detach(), rotations, BUCKETS, implementation)
        output, _ = lsh_attention(query, value, buckets, num_buckets=BUCKETS, value_shift=int(masked), **kwargs)
        (output + local_attention(query, key, value, **kwargs)[0]).sum().backward()
    return calls


@pytest.mark.parametrize(("implementation", "masked"), [("sdpa", False), ("sdpa", True), ("triton", True)])
def test_shapes_strides_and_schemas_are_those_of_the_results(implementation, masked):
    if implementation == "triton" and not triton_launch.IS_INTERPRETED:
        pytest.skip("Triton is not installed, or not set to its interpreter")
    calls = calls_of(implementation, masked)
    names = {func._schema.name.removeprefix("hf_reformer::") for func, _ in calls}
    attention = {"lsh_sdpa", "lsh_sdpa_backward", "local_sdpa", "local_sdpa_backward"}
    if implementation == "triton":
        attention = {"triton_attention", "triton_attention_backward", "triton_hash", "triton_sort"}
    assert names == attention | {"draw_from_seed"}
    for func, arguments in calls:
        arguments = tuple(argument.detach() if torch.is_tensor(argument) else argument for argument in arguments)
        opcheck(func, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
