"""
New memory that nobody has written to holds NaN, or the largest integer, in the place of what happens to be there.

torch's own `fill_uninitialized_memory` works with deterministic algorithms only, which are not what users run. A mode
of torch sees no allocation in a backward pass or in an operator of ours.
"""

import functools

import torch


ALLOCATIONS = {
    torch: ("empty", "empty_like", "empty_strided"),
    torch.Tensor: ("new_empty", "new_empty_strided"),
}


def fill_unwritten_memory(replace=setattr):
    """Replace the functions of torch that give new memory, in this process; `replace` takes what `setattr` takes."""
    # `torch.device` as a context knows the functions by their identity, which it looks up once.
    with torch.device("cpu"):
        torch.empty(0)
    for owner, names in ALLOCATIONS.items():
        for name in names:
            replace(owner, name, _filled(getattr(owner, name)))


def _filled(allocate):
    @functools.wraps(allocate)
    def allocate_and_fill(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(_worst(tensor.dtype))

    return allocate_and_fill


def _worst(dtype):
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).max
