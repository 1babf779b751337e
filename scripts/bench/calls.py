"""What benchmark.py times: calls that are made once, and wait in the process that times them."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from . import contenders, language_models
from .contenders import CONTENDERS
from .history import Refused
from .shape import Shape
from .timing import Clocked, captured, clocked, sample


# On a GPU operators are also timed without Python, which can take longer than the kernels: replayed from a CUDA graph.
REPLAYED = ", replayed"
LONGEST_REPLAYED_S = 0.02  # in longer calls Python makes no difference
# By name and rounds: the calls that wait here, and the device that they run on.
_WAITING: dict[tuple[str, int | None], tuple[Callable, str]] = {}


def make_call(case: str, pass_name: str, name: str, shape: Shape) -> Callable[[], list[torch.Tensor]]:
    """What is to be timed; it returns the tensors that must be finite, and keeps none."""
    shape = CONTENDERS[name].own(shape)
    if case in ("step", "prefill"):
        model, ids = contenders.make_model(name, shape), language_models.make_ids(shape)
        if case == "prefill":
            model.eval()
            return lambda: [language_models.prefill(model, ids, shape)]
        return lambda: [language_models.training_step(model, ids, shape), *take_gradients(model)]
    attention = contenders.make_attention(name, shape, with_projections=case == "operator")
    hidden, gradient = (
        contenders.draw(replace(shape, rounds=1, dtype="fp32"), place)
        for place in (contenders.HIDDEN, contenders.GRADIENT)
    )

    @torch.no_grad()
    def forward():
        with shape.autocast():
            return [attention(hidden)]

    def forward_and_backward():
        entering = hidden.detach().requires_grad_()
        with shape.autocast():
            output = attention(entering)
        output.backward(gradient.to(output.dtype))
        return [output.detach(), *take_gradients(attention), *([entering.grad] if entering.grad is not None else [])]

    return forward if pass_name.removesuffix(REPLAYED) == "forward" else forward_and_backward


def take_gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of all parameters that have one, away from them."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad(set_to_none=True)
    return gradients


def warm_up(call: Callable, shape: Shape, limit: float) -> tuple[float, int]:
    """
    Seconds of a call, on a GPU of a second one, since the first compiles; and the bytes that a call took at its peak.

    Raises:
        Refused: it is too slow, or does not give numbers.
    """
    before = contenders.start_peak(shape.device)
    begun = time.perf_counter()
    tensors = call()
    seconds = time.perf_counter() - begun
    taken = contenders.read_peak(shape.device) - before
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise Refused("it gives NaN or infinity")
    del tensors
    if shape.device == "cuda":
        seconds = sample(call, shape.device)
    if seconds > limit:
        raise Refused(f"one run took {seconds:.0f} s, above the limit of {limit:g} s")
    return seconds, taken


def prepare(case: str, pass_name: str, name: str, rounds: int | None, shape: Shape, limit: float) -> tuple[float, int]:
    """
    Make a call, run it, and let it wait: its seconds, and the bytes that it took at its peak.

    Raises:
        Refused: it cannot be measured, for whatever reason.
    """
    shape = replace(shape, rounds=rounds or 1)
    try:
        call = make_call(case, pass_name, name, shape)
        seconds, taken = warm_up(call, shape, limit)
        if pass_name.endswith(REPLAYED):
            if seconds > LONGEST_REPLAYED_S:
                raise Refused(f"a call takes {seconds:.2g} s, of which Python is little")
            call = captured(call)
            seconds = sample(call, shape.device)
    except Refused:
        raise
    except Exception as error:
        raise Refused(contenders.reason_of(error)) from error
    finally:
        gc.collect()
    _WAITING[name, rounds] = call, shape.device
    return seconds, taken


def clock(name: str, rounds: int | None, calls: int) -> Clocked:
    """
    What a call that waits here takes, as the mean of some.

    Raises:
        Refused: none waits, since the process in which it did was killed, or it fails.
    """
    if (name, rounds) not in _WAITING:
        raise Refused("the process that it was in was killed; most likely memory ran out")
    call, device = _WAITING[name, rounds]
    try:
        return clocked(call, device, calls)
    except Exception as error:
        raise Refused(contenders.reason_of(error)) from error


def forget() -> None:
    """Let all calls go that wait here."""
    _WAITING.clear()
    gc.collect()
