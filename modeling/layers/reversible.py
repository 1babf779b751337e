"""
Reversible residual layers (paper section 3; Gomez et al. 2017, arXiv 1707.04585).

A layer maps two streams `x1, x2` to `y1 = x1 + F(x2)` and `y2 = x2 + G(y1)`. Backward recovers `x2 = y2 - G(y1)` and
`x1 = y1 - F(x2)` from the layer's output, so a stack of layers stores the output of its last layer and nothing else.

There is one autograd Function per layer, with the layer's parameters among its inputs. Their gradients leave through
autograd like any other, so hooks on parameters and on layers (DDP, FSDP) see what they expect.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.differentiation import is_inside_transform, once_differentiable, refuse_derivatives
from ..ops.row_layout import RowLayout, into_rows, out_of_rows
from ..ops.softmax_kernels import distinct
from .feed_forward import ChunkReformerFeedForward
from .replay import Recording, version_of


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


@dataclass
class ReversibleLayerCall:
    """
    One call of a layer: what its recomputation needs besides the streams.

    Attributes:
        attention: The module F. Its results are what it adds, the attention map or None, and the buckets or None.
        attention_kwargs: Its arguments; in the recomputation they have the buckets instead of the rotations.
        feed_forward: The module G. It works on pieces of the sequence, one at a time; `split` makes them.
        on_grid: Exact mode: round updates to the grid on which the inversion is exact.
        tape: Shared by the layers of one forward pass.
        layer_idx: Place of the layer in the stack, 0 first.
        stores_output: Whether the layer keeps its own output, as the last one must.
        overwrites: Nobody needs the streams that come in: without a graph, those that go out take their memory.
        of_attention, of_feed_forward: Recordings of the modules.
        autocast: Of the forward pass.
    """

    attention: nn.Module
    attention_kwargs: dict[str, Any]
    feed_forward: ChunkReformerFeedForward
    on_grid: bool
    tape: ReversibleTape
    layer_idx: int
    stores_output: bool
    overwrites: bool = False
    of_attention: Recording = field(init=False)
    of_feed_forward: Recording = field(init=False)
    autocast: dict[str, Any] = field(init=False)


def run_with_graph(
    call: ReversibleLayerCall, x1: torch.Tensor, x2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    One layer under ordinary autograd, which stores what it needs.

    Args:
        x1, x2: Streams, `[B, L, hidden_size]`.

    Returns:
        The streams y1 and y2, with the numbers of `run_reversibly`, and the attention map or None.
    """
    attention, feed_forward = call.attention, call.feed_forward
    update, weights, _ = attention(narrowed(x2, attention), **call.attention_kwargs)
    # The pieces are split here, as in backward. So random numbers are the same, and a compiled module is one program.
    split = feed_forward.split
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y1 = x1 + _update_of(x1, update, call)
        updates = [feed_forward(narrowed(piece, feed_forward)) for piece in split(y1)]
        return y1, x2 + _update_of(x2, feed_forward.join(updates), call), weights
    y1, y2 = (stream if call.overwrites else torch.empty_like(stream) for stream in (x1, x2))
    _add_in_pieces(x1, update, y1, on_grid=call.on_grid)
    # Freed before something else takes memory.
    del update
    for x2_piece, y1_piece, y2_piece in distinct(zip(*map(split, (x2, y1, y2)), strict=True), x2):
        update = feed_forward(narrowed(y1_piece, feed_forward))
        _add_in_pieces(x2_piece, update, y2_piece, on_grid=call.on_grid)
    return y1, y2, weights


# `torch.compile` of a whole model would compile forward and not the recomputation in backward, which then drew other
# random numbers and rounded differently. Attention and feed-forward that are compiled by themselves stay so in both.
@torch.compiler.disable
def run_reversibly(call: ReversibleLayerCall, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The streams y1 and y2 of one layer, which stores nothing for backward but what `call` says."""
    if is_inside_transform():
        refuse_derivatives("inside of `torch.func`, or in forward mode")
    call.of_attention, call.of_feed_forward = Recording(call.attention), Recording(call.feed_forward)
    parameters = *call.of_attention.parameters, *call.of_feed_forward.parameters
    return ReversibleLayerFunction.apply(call, x1, x2, *parameters)


class ReversibleLayerFunction(torch.autograd.Function):
    """`run_reversibly` with a backward that recomputes F and G once each, inverting the layer on the way."""

    @staticmethod
    def forward(ctx, call, x1, x2, *parameters):
        device, attention, feed_forward = x1.device, call.attention, call.feed_forward
        call.autocast = autocast_state(device)
        with call.of_attention.recorded(device), _as_in_recomputation(call):
            update, _, buckets = attention(_leaf_for(attention, x2), **call.attention_kwargs)
        call.attention_kwargs = call.attention_kwargs | {"rotations": None, "buckets": buckets}
        y1 = _add_in_pieces(x1, update.detach(), torch.empty_like(x1), on_grid=call.on_grid)
        # Here and below: freed before something else takes memory.
        del update
        y2 = torch.empty_like(x2)
        with call.of_feed_forward.recorded(device):
            for x2_piece, y1_piece, y2_piece in zip(*map(feed_forward.split, (x2, y1, y2)), strict=True):
                with _as_in_recomputation(call):
                    update = feed_forward(_leaf_for(feed_forward, y1_piece))
                _add_in_pieces(x2_piece, update.detach(), y2_piece, on_grid=call.on_grid)
                del update
        ctx.call = call
        if call.stores_output:
            ctx.save_for_backward(y1, y2)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx, y1_grad, y2_grad):
        call = ctx.call
        y1, y2 = ctx.saved_tensors if call.stores_output else call.tape.receive(call.layer_idx)
        with call.of_feed_forward.replayed():
            x2, y1_grad, feed_forward_grads = _invert_feed_forward(call, y1, y2, y1_grad, y2_grad)
        with call.of_attention.replayed():
            x1, x2_grad, attention_grads = _invert_attention(call, y1, x2, y1_grad, y2_grad)
        if call.layer_idx > 0:
            call.tape.hand_down(call.layer_idx - 1, (x1, x2))
        return None, y1_grad, x2_grad, *attention_grads, *feed_forward_grads


@contextmanager
def _as_in_recomputation(call) -> Iterator[None]:
    """
    What is compiled runs in forward as in `_recompute`, with a graph that is then thrown away.

    So it is the same program: one made for inference may round and draw random numbers in another way.
    """
    modules = *call.of_attention.modules, *call.of_feed_forward.modules
    if not any(module._compiled_call_impl is not None for module in modules):
        yield
        return
    with torch.enable_grad(), torch.autocast(**call.autocast):
        yield


def _invert_feed_forward(call, y1, y2, y1_grad, y2_grad):
    """`x2 = y2 - G(y1)`, the gradient of `y1` through G added, and the gradients of G's parameters."""
    split, grads = call.feed_forward.split, None
    x2, whole_grad = _memory_for_input(call, y2), torch.empty_like(y1_grad)
    for y1_piece, y2_piece, y1_grad_piece, y2_grad_piece, x2_piece, grad_piece in zip(
        *map(split, (y1, y2, y1_grad, y2_grad, x2, whole_grad)), strict=True
    ):
        update, piece_grad, piece_grads = _recompute(call, call.of_feed_forward, y1_piece, y2_grad_piece, {})
        _add_in_pieces(y2_piece, update, x2_piece, sign=-1, on_grid=call.on_grid)
        _add_in_pieces(y1_grad_piece, piece_grad, grad_piece)
        grads = piece_grads if grads is None else [_sum(*pair) for pair in zip(grads, piece_grads, strict=True)]
    return x2, whole_grad, grads


def _invert_attention(call, y1, x2, y1_grad, y2_grad):
    """`x1 = y1 - F(x2)`, the gradient of `x2` through F added, and the gradients of F's parameters."""
    update, x2_grad, grads = _recompute(call, call.of_attention, x2, y1_grad, call.attention_kwargs)
    x1 = _add_in_pieces(y1, update, _memory_for_input(call, y1), sign=-1, on_grid=call.on_grid)
    return x1, _add_in_pieces(y2_grad, x2_grad, torch.empty_like(y2_grad)), grads


def _memory_for_input(call, output_stream):
    """
    Memory for a stream that a layer recovers from its output.

    It is that of the output where nobody else has seen it: the layer above has recovered it, and modules, whose hooks
    may keep what they are given, were given a narrower copy.
    """
    modules = call.attention, call.feed_forward
    was_copied = all(output_stream.dtype != module.layer_norm.weight.dtype for module in modules)
    return output_stream if was_copied and not call.stores_output else torch.empty_like(output_stream)


def _update_of(stream, update, call):
    """What is added to a stream, with a graph where there is one."""
    return round_to_grid(update, stream.dtype) if call.on_grid else update


def _add_in_pieces(stream, update, out, *, sign=1, on_grid=False):
    """`out = stream + sign * update`, without a graph; `out` may be `stream`."""
    rows = stream.shape[1]
    if stream.device.type == "cpu":
        rows = max(1, ADDED_AT_ONCE * rows // max(1, stream.numel()))
    pieces = zip(*(whole.split(rows, dim=1) for whole in (stream, update, out)), strict=True)
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


def _recompute(call, recording, stream, output_grad, kwargs):
    """What a module adds for `stream`, the gradients of `stream`, and of each parameter (None if it needs none)."""
    trained = [parameter for parameter in recording.parameters if parameter.requires_grad]
    with torch.enable_grad(), torch.autocast(**call.autocast):
        inputs = _leaf_for(recording.module, stream)
        # A view, because profilers put hooks on what modules are given, and not every hook may be put on a leaf.
        output = recording.module(inputs.view_as(inputs), **kwargs)
    update, *_ = output if isinstance(output, tuple) else (output,)
    inputs_grad, *grads = torch.autograd.grad(
        update, (inputs, *trained), output_grad.to(update.dtype), allow_unused=True
    )
    trained_grads = iter(grads)
    parameter_grads = [next(trained_grads) if each.requires_grad else None for each in recording.parameters]
    return update.detach(), inputs_grad, parameter_grads


def _state_of(stream):
    # Wrappers of modules may pass views on. A view shares memory and version counter with its base.
    return id(stream.untyped_storage()), stream.storage_offset(), version_of(stream)


def _is_cast(stream: torch.Tensor, original: torch.Tensor) -> bool:
    if stream.dtype == original.dtype or stream.shape != original.shape:
        return False
    # Compared as bits, so that a NaN equals itself.
    return torch.equal(stream.view(torch.uint8), original.to(stream.dtype).view(torch.uint8))


def _sum(first, second):
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
