"""How what a cache keeps grows: seldom, and so that a compiled step stays valid."""

import torch


def room_for(count: int, capacity: int, most: int | None) -> int:
    """
    How many places to make where there are `capacity` and more are needed: geometrically more, so that few steps do.

    Args:
        count: Places that are needed.
        most: What will hardly be needed more of; growing stops there first, and goes on as before where it is passed.
    """
    room = max(count + 64, capacity * 5 // 4)
    return room if most is None or count > most else min(room, most)


def with_any_size(buffer: torch.Tensor, dim: int) -> torch.Tensor:
    """`buffer`, whose size in `dim` is to be a variable of compiled programs from the first one on."""
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(buffer, dim)
    return buffer
