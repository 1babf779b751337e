"""
Reversible residual layers (paper section 3; Gomez et al. 2017, arXiv 1707.04585).

A layer maps two streams `x1, x2` to `y1 = x1 + F(x2)` and `y2 = x2 + G(y1)`. Backward recovers `x2 = y2 - G(y1)` and
`x1 = y1 - F(x2)` from the layer's output, so a stack of layers stores the output of its last layer and nothing else.
Each of the updates is a `Half`. A decoder's layer has a third, so its streams come out with their roles exchanged.

There is one autograd Function per layer, with the layer's parameters among its inputs. Their gradients leave through
autograd like any other, so hooks on parameters and on layers (DDP, FSDP) see what they expect.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.differentiation import is_inside_transform, once_differentiable, refuse_derivatives
from ..ops.row_layout import RowLayout, into_rows, out_of_rows
from ..ops.softmax_kernels import distinct
from .feed_forward import join
from .output_projection import can_do_without_result, without_result
from .replay import Recording, version_of
from .source import Source


# In exact mode streams are multiples of these, by dtype. Sums of such numbers are exact below 1024 in float32 and
# below 131,072 in float64, and so is the inversion of a layer. Beyond, it is right to within a unit in the last place.
GRID = {torch.float32: 2.0**-14, torch.float64: 2.0**-36}
# Elements that are added at a time on a CPU. The system clears new memory page by page, which takes longer than the
# sum. The memory that one piece has freed is reused for the next one without that.
ADDED_AT_ONCE = 2**20


class RoundToGrid(torch.autograd.Function):
    """Casts to `dtype` and rounds to multiples of `GRID[dtype]`; the gradient passes unrounded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return _on_grid(numbers, dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.dtype], output: torch.Tensor):
        numbers, ctx.grid_dtype = inputs
        ctx.given_dtype = numbers.dtype

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.given_dtype), None


class _RoundToGridInForwardMode(RoundToGrid):
    """The same with derivatives in forward mode, which compilers do not take."""

    @staticmethod
    def jvp(ctx, tangent: torch.Tensor, _) -> torch.Tensor:
        return tangent.to(ctx.grid_dtype)


def round_to_grid(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`RoundToGrid`, without what autograd costs where it has nothing to do."""
    if not torch.is_grad_enabled():
        return _on_grid(numbers, dtype)
    return (RoundToGrid if torch.compiler.is_compiling() else _RoundToGridInForwardMode).apply(numbers, dtype)


def _on_grid(numbers, dtype):
    # Scaling by a power of two and rounding to integers are exact in any precision, so there is no need for the wider
    # one before the end. Half precision alone has no room for the scaled numbers.
    numbers = numbers.float() if numbers.dtype == torch.float16 else numbers
    return (numbers / GRID[dtype]).round_().mul_(GRID[dtype]).to(dtype)


class _PassCast(torch.autograd.Function):
    """
    The original of a cast tensor. Its gradient goes to the original, past the cast.

    The cast stays in the graph without a gradient, because wrappers of modules let their own work follow from it.
    """

    @staticmethod
    def forward(ctx, cast: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        return original.view_as(original)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradient


class _Follow(torch.autograd.Function):
    """The numbers of a stream; their derivatives are those of what is shown of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(stream: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return stream.view_as(stream)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor):
        stream, shown = inputs
        ctx.stream_dtype, ctx.shown_dtype = stream.dtype, shown.dtype

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradient.to(ctx.shown_dtype)

    @staticmethod
    def jvp(ctx, _, tangent: torch.Tensor) -> torch.Tensor:
        return tangent.to(ctx.stream_dtype)


def show_stream(
    stream: torch.Tensor, dtype: torch.dtype, layout: RowLayout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What a caller, whose tokens stand in the rows by `layout`, gets to see of a stream, and the stream, which follows
    from it.

    So what the caller sees has a gradient.
    """
    shown = out_of_rows(layout, stream.to(dtype))
    if shown is stream or not torch.is_grad_enabled():
        return shown, stream
    return shown, _Follow.apply(stream, into_rows(layout, shown))


class _LayerOutput(NamedTuple):
    """
    What a tape knows of a layer's output.

    Attributes:
        streams: The output.
        states: Where it was in memory, and how often it had been changed.
        kept: Its layer does not need the layer above to recover it.
    """

    streams: tuple[torch.Tensor, torch.Tensor]
    states: list[tuple]
    kept: bool


class ReversibleTape:
    """
    What the layers of one forward pass know of each other's streams.

    In forward each layer records its output, and the next one verifies its input: it must be that output. A cast in
    between, as mixed-precision FSDP makes it, is undone. In backward a layer recovers the output of the layer below
    and hands it down; that layer receives it.

    Args:
        streams: The input of the first layer.
    """

    def __init__(self, streams: tuple[torch.Tensor, torch.Tensor]):
        self._recorded: dict[int, _LayerOutput] = {}
        self._last_recorded: int | None = None
        # The one output that is recovered and not yet received, by its layer.
        self._handed_down: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.record_output(-1, streams, kept=True)

    @torch.compiler.disable
    def record_output(self, layer_idx: int, streams: tuple[torch.Tensor, torch.Tensor], kept: bool):
        """Record a layer's output. With `kept`, its backward does not need the layer above to recover it."""
        # Tensors inside of `torch.func` have no storage to compare. Reversible layers refuse such transforms anyway.
        if is_inside_transform():
            return
        # Gradient checkpointing runs layers again in backward. Only the first run counts.
        if self._last_recorded is None or self._last_recorded < layer_idx:
            self._last_recorded = layer_idx
            self._recorded[layer_idx] = _LayerOutput(streams, list(map(_state_of, streams)), kept)

    @torch.compiler.disable
    def verify_input(
        self, layer_idx: int, streams: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The input of a layer, which is what the layer below has recorded, given the streams that arrived."""
        if layer_idx - 1 not in self._recorded:
            return streams
        output = self._recorded.pop(layer_idx - 1)
        if list(map(_state_of, streams)) == output.states:
            return streams
        if all(map(_is_cast, streams, output.streams)):
            if output.kept and torch.is_grad_enabled():
                self._recorded[layer_idx - 1] = output
            return tuple(map(_PassCast.apply, streams, output.streams))
        if output.kept:
            return streams
        raise RuntimeError(
            f"The output of layer {layer_idx - 1} was changed on its way to layer {layer_idx}, by a hook or a "
            "wrapper, and could not be recovered in backward. Leave it as it is, pass `output_hidden_states=True` to "
            "keep every layer's output, or set `config.reversible=False`."
        )

    def hand_down(self, layer_idx: int, streams: tuple[torch.Tensor, torch.Tensor]):
        """Keep the output of a layer for its backward; the layer above has recovered it."""
        self._handed_down = {layer_idx: streams}

    def receive(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of a layer for its backward, as the layer above has handed it down."""
        handed_down, self._handed_down = self._handed_down, {}
        if layer_idx not in handed_down:
            raise RuntimeError(
                f"The backward pass entered the reversible stack at the output of layer {layer_idx}, which was not "
                "stored. Pass `output_hidden_states=True` to use a layer's output in a loss, or set "
                "`config.reversible=False`."
            )
        return handed_down[layer_idx]


def whole(sequence: torch.Tensor) -> tuple[torch.Tensor]:
    """The sequence as one piece, for modules that need all of it."""
    return (sequence,)


@dataclass
class Half:
    """
    One of the two or three updates of a layer: a module reads one stream, and what it makes of it is added to the
    other. The next half reads the stream that was added to.

    Attributes:
        module: Begins with a `layer_norm`. Its result is the update or, beside it, the attention map or None, and the
            buckets or None.
        kwargs: Its arguments; in the recomputation they have the buckets instead of the rotations.
        split: Makes pieces of the sequence that are worked on one at a time.
        reads_source: The module has an argument `source`, that of the call.
        recording: Of the module.
    """

    module: nn.Module
    kwargs: dict[str, Any] = field(default_factory=dict)
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]] = whole
    reads_source: bool = False
    recording: Recording = field(init=False)

    def run(
        self, stream: torch.Tensor, source: Source | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The update that follows from a piece of a stream, the attention map or None, and the buckets or None."""
        others = {"source": source} if self.reads_source else {}
        output = self.module(stream, **self.kwargs, **others)
        return output if isinstance(output, tuple) else (output, None, None)


@dataclass
class ReversibleLayerCall:
    """
    One call of a layer: what its recomputation needs besides the streams.

    Attributes:
        halves: What the layer does, in order.
        on_grid: Exact mode: round updates to the grid on which the inversion is exact.
        tape: Shared by the layers of one forward pass.
        layer_idx: Place of the layer in the stack, 0 first.
        stores_output: Whether the layer keeps its own output, as the last one must.
        keeps: Modules whose updates are kept for backward, which then does without their last projection.
        overwrites: Nobody needs the streams that come in: without a graph, those that go out take their memory.
        source: What a decoder's layers read of the encoder.
        autocast: Of the forward pass.
    """

    halves: Sequence[Half]
    on_grid: bool
    tape: ReversibleTape
    layer_idx: int
    stores_output: bool
    keeps: Collection[nn.Module] = ()
    overwrites: bool = False
    source: Source | None = None
    autocast: dict[str, Any] = field(init=False)


def run_with_graph(
    call: ReversibleLayerCall, x1: torch.Tensor, x2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """
    One layer under ordinary autograd, which stores what it needs.

    Args:
        x1, x2: Streams, `[B, L, hidden_size]`.

    Returns:
        The streams that come out, with the numbers of `run_reversibly`, and the attention map or None of each half.
    """
    add = _add_with_graph if torch.is_grad_enabled() or torch.compiler.is_compiling() else _add_in_place
    all_weights = []
    for half in call.halves:
        out, weights = add(call, half, x1, x2)
        x1, x2 = x2, out
        all_weights.append(weights)
    return x1, x2, all_weights


# `torch.compile` of a whole model would compile forward and not the recomputation in backward, which then drew other
# random numbers and rounded differently. Attention and feed-forward that are compiled by themselves stay so in both.
@torch.compiler.disable
def run_reversibly(call: ReversibleLayerCall, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The streams that come out of one layer, which stores nothing for backward but what `call` says."""
    if is_inside_transform():
        refuse_derivatives("inside of `torch.func`, or in forward mode")
    parameters = []
    for half in call.halves:
        half.recording = Recording(half.module)
        parameters += half.recording.parameters
    source = None if call.source is None else call.source.hidden_states
    return ReversibleLayerFunction.apply(call, x1, x2, source, *parameters)


class ReversibleLayerFunction(torch.autograd.Function):
    """`run_reversibly` with a backward that recomputes each half once, inverting the layer on the way."""

    @staticmethod
    def forward(ctx, call, x1, x2, source, *parameters):
        call.autocast = autocast_state(x1.device)
        kept, ctx.counts = [], []
        for half in call.halves:
            out, buckets, before = None, None, len(kept)
            with half.recording.recorded(x2.device):
                for place, piece in enumerate(half.split(x2)):
                    with _as_in_recomputation(call, half):
                        update, _, buckets = half.run(_leaf_for(half.module, piece), call.source)
                    if out is None:
                        # Not before the module has run, which may need more memory than this.
                        out = torch.empty_like(x1)
                        targets, outs = half.split(x1), half.split(out)
                    _add_in_pieces(targets[place], update.detach(), outs[place], on_grid=call.on_grid)
                    kept += [update.detach()] if half.module in call.keeps else []
                    # Freed before something else takes memory.
                    del update
            if "rotations" in half.kwargs:
                half.kwargs = half.kwargs | {"rotations": None, "buckets": buckets}
            ctx.counts.append(len(kept) - before)
            x1, x2 = x2, out
        ctx.call = call
        # Who changes what the encoder has put out before backward is told so.
        ctx.save_for_backward(source, *((x1, x2) if call.stores_output else ()), *kept)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        call, (_, *kept) = ctx.call, ctx.saved_tensors
        if call.stores_output:
            streams, kept = kept[:2], kept[2:]
        else:
            streams = call.tape.receive(call.layer_idx)
        source_grad, parameter_grads = None, []
        for half, count in zip(reversed(call.halves), reversed(ctx.counts), strict=True):
            kept, updates = kept[: len(kept) - count], kept[len(kept) - count :]
            with half.recording.replayed():
                streams, gradients, half_source_grad, half_grads = _invert(call, half, streams, gradients, updates)
            source_grad = summed(source_grad, half_source_grad)
            parameter_grads = [*half_grads, *parameter_grads]
        if call.layer_idx > 0:
            call.tape.hand_down(call.layer_idx - 1, streams)
        return None, *gradients, source_grad, *parameter_grads


@contextmanager
def _as_in_recomputation(call, half) -> Iterator[None]:
    """
    What is compiled runs in forward as in `_recompute`, with a graph that is then thrown away.

    So it is the same program: one made for inference may round and draw random numbers in another way.
    """
    if not any(module._compiled_call_impl is not None for module in half.recording.modules):
        yield
        return
    with torch.enable_grad(), torch.autocast(**call.autocast):
        yield


def _invert(call, half, streams, gradients, updates):
    """
    The streams as they were before `half`, their gradients, that of the source (None if it needs none), and those of
    the parameters.

    Without `updates`, those that `half` has kept, they are computed again.
    """
    (stream, target), (stream_grad, target_grad) = streams, gradients
    # Both are made when the first piece has been recomputed, which may need more memory than this.
    before, whole_grad, source_grad, grads = None, None, None, None
    # Whatever decided the pieces in forward may decide otherwise now.
    split = partial(torch.split, split_size_or_sections=[each.shape[1] for each in updates], dim=1)
    split = split if updates else half.split
    pieces = zip(*map(split, (stream, target, stream_grad, target_grad)), updates or repeat(None), strict=False)
    for place, (piece, target_piece, grad_piece, target_grad_piece, kept) in enumerate(pieces):
        update, through, source_part, piece_grads = _recompute(call, half, piece, target_grad_piece, kept)
        if before is None:
            before, whole_grad = _memory_for_input(call, target), torch.empty_like(stream_grad)
            recovered, whole_grads = split(before), split(whole_grad)
        _add_in_pieces(target_piece, update, recovered[place], sign=-1, on_grid=call.on_grid)
        _add_in_pieces(grad_piece, through, whole_grads[place])
        source_grad = summed(source_grad, source_part)
        grads = piece_grads if grads is None else [summed(*pair) for pair in zip(grads, piece_grads, strict=True)]
        del update, through
    return (before, stream), (target_grad, whole_grad), source_grad, grads


def _memory_for_input(call, output_stream):
    """
    Memory for a stream that a layer recovers from its output.

    It is that of the output where nobody else has seen it: the layer above has recovered it, and modules, whose hooks
    may keep what they are given, were given a narrower copy.
    """
    was_copied = all(output_stream.dtype != half.module.layer_norm.weight.dtype for half in call.halves)
    return output_stream if was_copied and not call.stores_output else torch.empty_like(output_stream)


def _add_with_graph(call, half, target, stream):
    """`target` with what `half` makes of `stream`, and the attention map."""
    # The pieces are split here, as in backward. So random numbers are the same, and a compiled module is one program.
    updates, weights = [], None
    for piece in half.split(stream):
        update, weights, _ = half.run(narrowed(piece, half.module), call.source)
        updates.append(update)
    return target + _update_of(target, join(updates), call), weights


def _add_in_place(call, half, target, stream):
    """The same without a graph, in the memory of `target` if nobody needs it any more."""
    out = target if call.overwrites else None
    weights = None
    for place, piece in distinct(enumerate(half.split(stream)), stream):
        update, weights, _ = half.run(narrowed(piece, half.module), call.source)
        if place == 0:
            out = torch.empty_like(target) if out is None else out
            targets, outs = half.split(target), half.split(out)
        _add_in_pieces(targets[place], update, outs[place], on_grid=call.on_grid)
        # Freed before something else takes memory.
        del update
    return out, weights


def _update_of(stream, update, call):
    """What is added to a stream, with a graph where there is one."""
    return round_to_grid(update, stream.dtype) if call.on_grid else update


def _add_in_pieces(stream, update, out, *, sign=1, on_grid=False):
    """`out = stream + sign * update`, without a graph; `out` may be `stream`."""
    pieces = [(stream, update, out)]
    if stream.device.type == "cpu" and stream.numel() > ADDED_AT_ONCE:
        rows = max(1, ADDED_AT_ONCE * stream.shape[1] // stream.numel())
        pieces = zip(*(tensor.split(rows, dim=1) for tensor in (stream, update, out)), strict=True)
    for stream_piece, update_piece, out_piece in distinct(pieces, stream):
        update_piece = _on_grid(update_piece, stream.dtype) if on_grid else update_piece
        torch.add(stream_piece, update_piece, alpha=sign, out=out_piece)
    return out


def narrowed(stream: torch.Tensor, module: Any) -> torch.Tensor:
    """
    A stream in what a module, which begins with a `layer_norm`, computes in.

    The module would cast it, too. Cast outside, the gradient of its input is no wider than all its others.
    """
    return stream.to(module.layer_norm.weight.dtype)


def _leaf_for(module, stream):
    """A stream as a module gets it, cut off from the graph before; where a graph is made, it begins here."""
    return narrowed(stream.detach(), module).requires_grad_(torch.is_grad_enabled())


def _recompute(call, half, stream, output_grad, kept):
    """
    What a half adds for a piece of a stream, which may be `kept`; the gradients of the piece, of the source, and of
    each parameter (None if it needs none).
    """
    parameters = half.recording.parameters
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    source, read = call.source, []
    if half.reads_source and source.hidden_states.requires_grad:
        read = [source.hidden_states.detach().requires_grad_()]
        source = replace(source, hidden_states=read[0])
    with torch.enable_grad(), torch.autocast(**call.autocast), _as_needed(call, half, kept):
        inputs = _leaf_for(half.module, stream)
        # A view, because profilers put hooks on what modules are given, and not every hook may be put on a leaf.
        update, _, _ = half.run(inputs.view_as(inputs), source)
    inputs_grad, *grads = torch.autograd.grad(
        update, (inputs, *read, *trained), output_grad.to(update.dtype), allow_unused=True
    )
    source_grad = grads.pop(0) if read else None
    trained_grads = iter(grads)
    parameter_grads = [next(trained_grads) if each.requires_grad else None for each in parameters]
    return update.detach() if kept is None else kept, inputs_grad, source_grad, parameter_grads


def _as_needed(call, half, kept):
    """Without the numbers of the last projection, if they are `kept` and nobody else reads them."""
    if kept is None or not can_do_without_result(half.module):
        return nullcontext()
    return without_result(call.autocast["dtype"] if call.autocast["enabled"] else None)


def _state_of(stream):
    # Wrappers of modules may pass views on. A view shares memory and version counter with its base.
    return id(stream.untyped_storage()), stream.storage_offset(), version_of(stream)


def _is_cast(stream: torch.Tensor, original: torch.Tensor) -> bool:
    if stream.dtype == original.dtype or stream.shape != original.shape:
        return False
    # Compared as bits, so that a NaN equals itself.
    return torch.equal(stream.view(torch.uint8), original.to(stream.dtype).view(torch.uint8))


def summed(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of two gradients, of which either may be missing."""
    if first is None or second is None:
        return second if first is None else first
    return first + second


def autocast_state(device: torch.device) -> dict:
    """The arguments of a `torch.autocast` like the one that is active."""
    # A device without autocast, such as meta, is like the CPU.
    device_type = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    # No cast cache: a cast that was made without gradients must not be reused in the recomputation.
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": False,
    }
