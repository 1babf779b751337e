"""
Counts the memory of tensors, real or fake, and knows what each was made for.

Every result of PyTorch's operators is seen, forward and backward; what a kernel allocates and frees within itself is
not.
"""

import math
import re
import sys
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from linecache import getline
from pathlib import Path
from types import FrameType

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..layers.hooks import blind
from ..ops.operators import IMPLEMENTATIONS


# The modules whose variables name allocations: those of `modeling`, its rooms included.
HERE = str(Path(__file__).parents[1])


@dataclass
class Allocation:
    """
    A piece of memory and the tensor it was made for.

    Attributes:
        nbytes: Size of the memory.
        shape, dtype: Those of the tensor.
        purpose: What the ledger's `purpose` was; whoever knows better may change it.
        module: Name of the module at work, "" for the model itself and whatever is outside of it.
        name: The variable it was assigned to in this package's code, or the operation that made it.
        born, died: When, in allocations and releases since the beginning.
    """

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    purpose: str
    module: str
    name: str
    born: int
    died: float = math.inf


class AllocationLedger(TorchDispatchMode):
    """
    While active, keeps an account of all memory that tensors take and give back.

    Memory that is there before is not counted.

    Attributes:
        alive: Bytes in use now, of what was counted.
        peak: The most that were in use at one time, since the beginning or since `restart_peak`.
        purpose: Written on every new allocation.
        allocations: All that were counted, in their order.
    """

    def __init__(self, purpose: str = ""):
        super().__init__()
        self.alive = self.peak = 0
        self.purpose = purpose
        self._peak_time = self._time = 0
        self.allocations: list[Allocation] = []
        self._open: dict[int, Allocation] = {}
        self._modules = _ModulesAtWork()

    def restart_peak(self):
        """From now on, `peak` is that of what follows."""
        self.peak, self._peak_time = self.alive, self._time

    def at_peak(self) -> list[Allocation]:
        """What was in use when most was."""
        return [allocation for allocation in self.allocations if allocation.born <= self._peak_time < allocation.died]

    def find(self, tensor: torch.Tensor) -> Allocation | None:
        """The memory of a tensor that is still there; None for memory from before."""
        return self._open.get(id(tensor.untyped_storage()))

    @contextmanager
    def watch_modules(self, model: nn.Module) -> Iterator[None]:
        """Within it, allocations carry the name of the module in whose forward or backward they are made."""
        with self._modules.watch(model):
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in IMPLEMENTATIONS:
            # What one of this package's operators allocates within itself counts, too.
            with self:
                return IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            storage = id(tensor.untyped_storage())
            if storage not in given and storage not in self._open:
                self._enter(tensor, func)
        return result

    def _enter(self, tensor, func):
        storage = tensor.untyped_storage()
        module, name = self._modules.describe(func)
        self._time += 1
        allocation = Allocation(
            storage.nbytes(), tuple(tensor.shape), tensor.dtype, self.purpose, module, name, born=self._time
        )
        self.allocations.append(allocation)
        self._open[id(storage)] = allocation
        self.alive += allocation.nbytes
        if self.alive > self.peak:
            self.restart_peak()
        weakref.finalize(storage, self._close, id(storage))

    def _close(self, key):
        allocation = self._open.pop(key)
        self._time += 1
        allocation.died = self._time
        self.alive -= allocation.nbytes


class _ModulesAtWork:
    """
    Which module an operator works for.

    In forward that is the innermost module that has been entered. In backward it is the one in whose forward autograd
    numbered the node that is running.
    """

    def __init__(self):
        self._entered = []
        self._first_numbers, self._names = [-1], [""]

    @contextmanager
    def watch(self, model):
        handles = []
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(blind(lambda module, args, name=name: self._enter(name))),
                module.register_forward_hook(blind(lambda module, args, output: self._leave()), always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name):
        self._entered.append(name)
        self._note()

    def _leave(self):
        self._entered.pop()
        self._note()

    def _note(self):
        self._first_numbers.append(torch._C._autograd._get_sequence_nr())
        self._names.append(self._entered[-1] if self._entered else "")

    def describe(self, func) -> tuple[str, str]:
        """Name of the module, and of what is made."""
        node, module = torch._C._current_autograd_node(), ""
        if self._entered:
            module = self._entered[-1]
        elif node is not None:
            module = self._names[bisect_right(self._first_numbers, node._sequence_nr()) - 1]
        # A module that runs in backward with gradients enabled is a recomputation.
        if node is None or isinstance(node, BackwardCFunction) or torch.is_grad_enabled():
            return module, _variable() or func.overloadpacket.__name__
        return module, f"gradient of {node.name().removesuffix('0').removesuffix('Backward')}"


def _variable() -> str | None:
    """What the line of this package that is being executed assigns to, or the line that called its function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(HERE) and code.co_filename != __file__:
            line = getline(code.co_filename, frame.f_lineno).strip()
            if not line.startswith("return ") or code.co_name == "forward":
                assigned = re.match(r"([\w, ]+) = ", line)
                return assigned and assigned[1]
        frame = frame.f_back
    return None


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
