"""The stack of layers: attention of each kind and feed-forward in reversible residual layers."""

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch._dynamo.decorators import skip
from transformers.modeling_layers import GradientCheckpointingLayer

from ...configuration.byte_sizes import bytes_of
from ..decoding.decoding_cache import CachedStep
from ..ops.differentiation import is_inside_transform
from ..ops.row_layout import RowLayout, out_of_rows
from .feed_forward import ChunkReformerFeedForward
from .full_attention import FullSelfAttention
from .hooks import works_unseen
from .local_attention import LocalSelfAttention
from .lsh_attention import LSHSelfAttention
from .output_projection import OutputProjection, can_do_without_result, ends_in_projection
from .reversible import (
    Half,
    ReversibleLayerCall,
    ReversibleTape,
    autocast_state,
    round_to_grid,
    run_reversibly,
    run_with_graph,
    show_stream,
)
from .rotary_positions import rotation_of
from .source import Source
from .traced_stack import TracedStack, can_be_traced, is_repeatable


# Elements of a stream from which its memory is worth saving.
LARGE_STREAM = 2**20
SELF_ATTENTION = {"lsh": LSHSelfAttention, "local": LocalSelfAttention, "full": FullSelfAttention}


class ReformerAttention(nn.Module):
    """LayerNorm, self-attention and output projection, the function F of the reversible layer."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attention = SELF_ATTENTION[config.attn_layers[layer_idx]](config, layer_idx)
        size = config.num_attention_heads * config.attention_head_size
        self.output = OutputProjection(config, size, bias=config.attention_output_bias)

    @ends_in_projection
    def forward(
        self, hidden_states: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: `[B, L, hidden_size]`.
            **kwargs: Passed to the self-attention of the layer's kind.

        Returns:
            Output `[B, L, hidden_size]`, the attention map or None, the buckets or None.
        """
        hidden_states = self.layer_norm(hidden_states.to(self.layer_norm.weight.dtype))
        context, weights, buckets = self.self_attention(hidden_states, **kwargs)
        return self.output(context), weights, buckets


class ReformerLayer(GradientCheckpointingLayer):
    """`y1 = x1 + attention(x2)`, `y2 = x2 + feed_forward(y1)`."""

    # DeepSpeed's mark for modules whose parameters ZeRO-3 gathers together: backward needs all of a layer's at once.
    _z3_leaf = True

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention = ReformerAttention(config, layer_idx)
        self.feed_forward = ChunkReformerFeedForward(config)

    # Why it is skipped: see `ReformerEncoder._run_layers`.
    @skip
    def forward(
        self,
        attn_output: torch.Tensor,
        hidden_states: torch.Tensor,
        source_states: torch.Tensor | None = None,
        *,
        tape: ReversibleTape,
        stores_output: bool,
        keeps: Collection[nn.Module] = (),
        on_grid: bool = False,
        overwrites: bool = False,
        num_hashes: int | None = None,
        length: int | None = None,
        circle_length: int | None = None,
        return_weights: bool = False,
        cached: CachedStep | None = None,
        source: Source | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        """
        Args:
            attn_output, hidden_states: The streams x1 and x2, `[B, L, hidden_size]`.
            source_states: `source.hidden_states` of a layer that is checkpointed.
            tape, stores_output, keeps, on_grid, overwrites: See `reversible.ReversibleLayerCall`.
            num_hashes: Hashing rounds, instead of the config's.
            length: Tokens of the whole sequence, where the streams are a shard of it.
            cached: What is known of the text so far, and where the tokens of this call go in it.
            source: What a decoder's layer reads of the encoder.
            **kwargs: Masks and the rotation for the self-attention.

        Returns:
            The streams that come out, and the attention map or None of each half.
        """
        x1, x2 = tape.verify_input(self.layer_idx, (attn_output, hidden_states))
        if source is not None and source_states is not None:
            source = replace(source, hidden_states=source_states)
        rotations = self.draw_rotations(x2, length, num_hashes, circle_length, cached)
        how = {"circle_length": circle_length, "return_weights": return_weights, "cached": cached, **kwargs}
        call = ReversibleLayerCall(
            halves=self.halves({"rotations": rotations, "buckets": None, **how}, source),
            on_grid=on_grid,
            tape=tape,
            layer_idx=self.layer_idx,
            stores_output=stores_output,
            keeps=keeps,
            overwrites=overwrites,
            source=source,
        )
        # A cache must see each token once, so nothing may be recomputed. A map with a gradient needs a graph.
        reversible = self.config.reversible and cached is None and not return_weights and torch.is_grad_enabled()
        maps: list[torch.Tensor | None]
        if reversible:
            y1, y2 = run_reversibly(call, x1, x2)
            maps, is_kept = [None] * len(call.halves), stores_output or not y2.requires_grad
        else:
            y1, y2, maps = run_with_graph(call, x1, x2)
            is_kept = True
        tape.record_output(self.layer_idx, (y1, y2), is_kept)
        return y1, y2, maps

    def updating(self) -> list[nn.Module]:
        """The modules of `halves`, in order."""
        return [self.attention, self.feed_forward]

    def halves(self, attention_kwargs: dict[str, Any], source: Source | None = None) -> list[Half]:
        """What the layer does, in order, given the arguments of its self-attention."""
        return [Half(self.attention, attention_kwargs), Half(self.feed_forward, split=self.feed_forward.split)]

    def draw_rotations(
        self,
        stream: torch.Tensor,
        length: int | None,
        num_hashes: int | None,
        circle_length: int | None,
        cached: CachedStep | None = None,
    ) -> torch.Tensor | None:
        """See `LSHSelfAttention.draw_rotations`; None for layers of other kinds."""
        self_attention = self.attention.self_attention
        if not isinstance(self_attention, LSHSelfAttention):
            return None
        length = length or (stream.shape[1] if cached is None else cached.step.num_columns)
        kept = None if cached is None else cached.layer
        return self_attention.draw_rotations(length, circle_length, num_hashes, stream.device, kept)


def run_without_checkpoint(function: Callable, *args):
    """In place of `torch.utils.checkpoint.checkpoint`, for layers that store nothing that it could save."""
    return function(*args)


class _ShownStates:
    """
    The hidden states that a caller asked for.

    Args:
        asked: All of them (True), none, or some by index; a negative one counts from the end.
        num_states: How many there are.
        dtype, layout: See `show_stream`.
    """

    def __init__(
        self, asked: bool | int | list[int] | None, num_states: int, dtype: torch.dtype, layout: RowLayout | None
    ):
        if asked is None or isinstance(asked, bool):
            indices = list(range(num_states)) if asked else []
        else:
            indices = [asked] if isinstance(asked, int) else asked
        self._wanted = {index % num_states for index in indices if -num_states <= index < num_states}
        self._dtype, self._layout = dtype, layout
        self._states: list[torch.Tensor | None] = []

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def wants(self, index: int) -> bool:
        """Whether the state of this index was asked for."""
        return index in self._wanted

    def append(self, stream: torch.Tensor) -> torch.Tensor:
        """The next state; what follows goes on with what is returned."""
        shown = None
        if self.wants(len(self._states)):
            shown, stream = show_stream(stream, self._dtype, self._layout)
        self._states.append(shown)
        return stream

    def states(self) -> tuple[torch.Tensor | None, ...] | None:
        """All states, with None for what was not asked for; None if nothing was."""
        return tuple(self._states) if self._wanted else None


class ReformerEncoder(nn.Module):
    """All layers, and the LayerNorm over what becomes of the two streams."""

    layer_class = ReformerLayer
    # Modules of a layer that compute the same each time they are given the same.
    repeatable: tuple[type[nn.Module], ...] = (ReformerLayer, ReformerAttention)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.output_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        return_hidden_states: bool | int | list[int] | None = None,
        return_weights: bool = False,
        layout: RowLayout | None = None,
        cached: list[CachedStep] | None = None,
        owns_input: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None, tuple[list[torch.Tensor | None], ...] | None]:
        """
        Args:
            hidden_states: `[B, L, hidden_size]`, the input of both streams.
            position_ids: `[B or 1, L]`, for rotary positions; None counts from 0.
            return_hidden_states: Also return the second stream before each layer and after the last: all of them, or
                those with these indices. What is returned is kept in memory.
            return_weights: Also return each layer's attention map, for which layers are not run reversibly.
            layout: Where the caller's tokens stand in the rows; None if the rows are the caller's. Results are in the
                caller's order.
            cached: What each layer knows of the text so far, and where the tokens of this call go in it.
            owns_input: Nobody else has `hidden_states`.
            **kwargs: Passed to each layer.

        Returns:
            `[B, L, output_size]`; the hidden states, with None for what was not asked for, or None; of each layer the
            attention map or None of each half, or None.
        """
        result_dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        shown = _ShownStates(return_hidden_states, len(self.layers) + 1, result_dtype, layout)
        rotation = rotation_of(self.config, position_ids, hidden_states)
        given, (hidden_states, on_grid) = hidden_states, self._begin_streams(hidden_states)
        owns_input = owns_input or hidden_states is not given
        how = {"on_grid": on_grid, "return_weights": return_weights, "layout": layout, "rotation": rotation, **kwargs}
        if torch.compiler.is_compiling() and not shown and self._can_be_traced():
            streams, all_maps = self._trace_layers(hidden_states, cached, **how)
        else:
            streams, all_maps = self._run_layers(hidden_states, shown, cached, owns_input, **how)
        output = self.layer_norm(self._combine_streams(streams))
        return (
            out_of_rows(layout, self.dropout(output)),
            shown.states(),
            tuple(all_maps) if return_weights else None,
        )

    def _trace_layers(self, hidden_states, cached, on_grid, num_hashes, **kwargs):
        """The last layer's streams and the maps of all layers, as one program."""
        stack = TracedStack(self.layers, on_grid, num_hashes, kwargs, cached, kwargs.pop("source", None))
        # A cache must see each token once.
        reversible = (
            cached is None and self.config.reversible and torch.is_grad_enabled() and not kwargs["return_weights"]
        )
        # An exported program has no backward pass of ours, and `torch.func` wants derivatives of its own.
        if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
            reversible = False
        return stack.run(hidden_states, reversible and is_repeatable(self.layers, self.repeatable))

    def _can_be_traced(self):
        return all(type(layer) is self.layer_class and can_be_traced(layer) for layer in self.layers)

    # The compiler would make a program for each layer, because `layer_idx` differs. It compiles what `forward` calls.
    # `torch.compiler.disable(recursive=False)` means the same, but `torch.export` cannot pass through its wrapper.
    @skip
    def _run_layers(self, hidden_states, shown, cached, owns_input, **kwargs):
        """The last layer's streams and the maps of all layers, one layer after the other."""
        attn_output = hidden_states = shown.append(hidden_states)
        all_maps = []
        overwrites = not shown and hidden_states.numel() >= LARGE_STREAM and works_unseen(self.layers)
        if overwrites:
            # From here on each stream has memory of its own, and keeps it through all layers.
            attn_output = hidden_states.clone()
            hidden_states = hidden_states if owns_input else hidden_states.clone()
        tape = ReversibleTape((attn_output, hidden_states))
        keeps = self._modules_that_keep(hidden_states)
        for layer in self.layers:
            is_last, is_kept = layer.layer_idx == len(self.layers) - 1, shown.wants(layer.layer_idx + 1)
            if _lacks_gradient(hidden_states) and _is_trained(layer):
                # If the input needs no gradient, hooks on the layer's backward would run before it.
                attn_output, hidden_states = _as_leaf(attn_output), _as_leaf(hidden_states)
            source = kwargs.get("source")
            # Checkpointing gives gradients to what it is given by position.
            by_position = () if source is None or not layer.gradient_checkpointing else (source.hidden_states,)
            attn_output, hidden_states, maps = layer(
                attn_output,
                hidden_states,
                *by_position,
                tape=tape,
                stores_output=is_last or is_kept,
                keeps=keeps,
                overwrites=overwrites,
                cached=None if cached is None else cached[layer.layer_idx],
                **kwargs,
            )
            all_maps.append(maps)
            hidden_states = shown.append(hidden_states)
        return tape.verify_input(len(self.layers), (attn_output, hidden_states)), all_maps

    def _modules_that_keep(self, stream: torch.Tensor) -> set[nn.Module]:
        """
        Modules whose updates are kept for backward, within `config.activation_memory`.

        Feed-forwards, which end each layer, save most; each has its place before any attention. Backward frees the
        updates of the last layers first.
        """
        budget = bytes_of("activation_memory", self.config.activation_memory)
        if budget == 0 or not torch.is_grad_enabled():
            return set()
        autocast, dtype = autocast_state(stream.device), self.layer_norm.weight.dtype
        # Autocast leaves float64 as it is.
        dtype = autocast["dtype"] if autocast["enabled"] and dtype != torch.float64 else dtype
        by_layer = [layer.updating()[::-1] for layer in self.layers[::-1]]
        usable = filter(can_do_without_result, chain(*zip(*by_layer, strict=True)))
        return set(islice(usable, budget // max(1, stream.numel() * dtype.itemsize)))

    def _combine_streams(self, streams: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """`[B, L, output_size]`, in the precision of the layers."""
        dtype = self.layer_norm.weight.dtype
        # CODEPATH: published checkpoints read both streams; the mean, in their own precision, is for new models.
        if self.config.combine_streams == "mean":
            return (torch.add(*streams) / 2).to(dtype)
        return torch.cat([stream.to(dtype) for stream in streams], dim=-1)

    def _begin_streams(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """What goes into the first layer, in a precision above that of the layers, and whether it is on a grid."""
        layers_dtype, exact = self.layer_norm.weight.dtype, self.config.exact_inversion
        low_precision = layers_dtype.itemsize < 4 or autocast_state(embeddings.device)["enabled"]
        if not low_precision and (torch.compiler.is_exporting() or not torch.is_grad_enabled()):
            # Nothing is inverted, so nothing has to be exact.
            return embeddings, False
        # MPS has no float64.
        if exact is None:
            exact = low_precision or (layers_dtype == torch.float32 and embeddings.device.type != "mps")
        if exact:
            return round_to_grid(embeddings, torch.float32 if low_precision else torch.float64), True
        return embeddings.float() if low_precision else embeddings, False


def _lacks_gradient(hidden_states: torch.Tensor) -> bool:
    # Inside of `torch.func` no leaves can be made, and none are needed.
    return torch.is_grad_enabled() and not hidden_states.requires_grad and not is_inside_transform()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _as_leaf(tensor: torch.Tensor) -> torch.Tensor:
    # `detach` would drop the tangent of a dual number.
    return tensor.view_as(tensor).requires_grad_()
