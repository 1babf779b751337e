"""Watches every tensor that PyTorch's operators return, forward and backward, on the CPU."""

from math import prod

from hf_reformer.modeling.memory.allocations import AllocationLedger, tensors_in


class Allocations(AllocationLedger):
    """
    The package's ledger, which also notes the shapes of all results, views included.

    Attributes:
        shapes: Every shape that was returned.
    """

    def __init__(self):
        super().__init__()
        self.shapes = set()

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(prod, self.shapes))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.shapes.update(tuple(tensor.shape) for tensor in tensors_in(result))
        return result
