"""
Kernels as operators of PyTorch, `torch.ops.hf_reformer.*`.

A compiler sees an operator as one step: of what happens inside it knows the shapes only. So a compiled model runs the
same kernels as an uncompiled one.
"""

import hashlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch


# Code that came with a checkpoint may be loaded beside the package, and several times.
NAMESPACE = __name__.partition(".")[0]
if NAMESPACE != "hf_reformer":
    NAMESPACE = "hf_reformer_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]

# What an operator runs: `AllocationLedger` counts what that allocates.
IMPLEMENTATIONS: dict[Any, Callable] = {}


def operator(schema: str, shapes: Callable, changes: tuple[str, ...] = ()) -> Callable:
    """
    A decorator that registers a function as a PyTorch operator of the same name. The operator has no gradient.

    Args:
        schema: Types and names of the arguments, and types of the results, as PyTorch writes them.
        shapes: With the arguments of the function, new tensors of the shapes, strides and dtypes of its results.
        changes: Names of the tensors that it writes to, which the schema marks, too.
    """

    def register(function):
        name = f"{NAMESPACE}::{function.__name__.lstrip('_')}"
        registered = torch.library.custom_op(name, function, mutates_args=changes, schema=schema)
        registered.register_fake(shapes)
        overload = getattr(getattr(torch.ops, NAMESPACE), function.__name__.lstrip("_")).default
        IMPLEMENTATIONS[overload] = function
        return overload

    return register


class AttentionFunction(torch.autograd.Function):
    """
    Attention as an operator that takes tensors and, last, its options; backward needs all of that, and the results.

    Only the first result has a gradient.
    """

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, *outputs)
        ctx.mark_non_differentiable(*outputs[1:])


def schema_of(options: type) -> str:
    """The fields of a dataclass of numbers, as arguments of a schema."""
    types = {"int": "SymInt", "bool": "bool", "float": "float"}
    return ", ".join(f"{types[getattr(field.type, '__name__', '')]} {field.name}" for field in fields(options))


def arguments_of(options: Any) -> list:
    """The values of such a dataclass, for an operator with such a schema."""
    return [getattr(options, name) for name in options.__dataclass_fields__]
