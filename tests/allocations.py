"""Watches every tensor that PyTorch's operators return, forward and backward, on the CPU."""

import weakref
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """
    While active, notes the shapes of all results and how many bytes of them are alive at once.

    Attributes:
        shapes: Every shape that was returned.
        peak: The largest number of bytes alive at one time, of what was made since the beginning.
    """

    def __init__(self):
        super().__init__()
        self.shapes = set()
        self.peak = self.alive = 0
        self._known = set()

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(prod, self.shapes))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            self.shapes.add(tuple(tensor.shape))
            self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage, given):
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._known.remove(key)
        self.alive -= size


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
