"""
Sequences too long for one GPU, sharded over several. See docs/sequence_parallel.md.

Each rank holds a shard of every sequence. Everything but attention works on tokens one by one, so it runs on shards.
For attention, the ranks exchange shards of the sequence for shards of the heads and back (Ulysses; Jacobs et al. 2023,
arXiv 2309.14509): a rank hashes, sorts and attends with some heads, over the whole length.
"""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import PrepareModuleInput, PrepareModuleOutput, parallelize_module
from transformers import PreTrainedModel

from ..modeling.argument_checks import check_one_document_per_row
from ..modeling.layers.full_attention import full_attention_mask
from ..modeling.ops.chunking import circle_length_of
from ..modeling.ops.row_layout import RowLayout
from ..modeling.packed_rows import labels_of_next_tokens


IGNORED = -100
SEQUENCE, HEADS = Shard(1), Shard(2)  # of [B, L, H * D]

EXCHANGES = {
    "layers.*.attention.self_attention.*": PrepareModuleOutput(output_layouts=SEQUENCE, desired_output_layouts=HEADS),
    "layers.*.attention.output": PrepareModuleInput(
        input_layouts=HEADS, desired_input_layouts=SEQUENCE, use_local_output=True
    ),
}


def shard_sequences(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Make `model` expect a shard of every sequence on each rank of `mesh`, as `shard_batch` cuts them.

    It adds hooks and changes no weights; their gradients are those of the rank's own tokens, to be summed over the
    ranks. Adapters must be there already, because their projections are exchanged, too.

    Args:
        model: any Reformer; what it computes per token comes out sharded.
        mesh: one dimension, one rank for each shard.

    Raises:
        ValueError: if the heads cannot be shared out evenly.
    """
    reformer: Any = model.base_model
    num_heads = reformer.config.num_attention_heads
    if num_heads % mesh.size():
        raise ValueError(f"{num_heads} heads cannot be shared out evenly to {mesh.size()} ranks.")

    def tell_layers_of_the_whole(encoder, arguments, options):
        given = options["attention_mask"], options["position_ids"]
        return arguments, options | _whole_sequence(reformer, mesh, *arguments, *given)

    def keep_own_rotations(self_attention, arguments, options):
        rotations = options["rotations"]
        if rotations is None:
            return None
        return arguments, options | {"rotations": rotations.chunk(mesh.size())[mesh.get_local_rank()]}

    parallelize_module(reformer.encoder, mesh, EXCHANGES)
    reformer.encoder.register_forward_pre_hook(tell_layers_of_the_whole, with_kwargs=True)
    for layer in reformer.encoder.layers:
        layer.attention.self_attention.register_forward_pre_hook(keep_own_rotations, with_kwargs=True)


def _whole_sequence(reformer, mesh, hidden_states, attention_mask, position_ids) -> dict:
    """What the layers are told about a sequence, of which `hidden_states` and the others are a shard."""
    length = hidden_states.shape[1] * mesh.size()
    if attention_mask is not None:
        attention_mask = DTensor.from_local(attention_mask, mesh, [SEQUENCE]).full_tensor()
    if reformer.config.position_kind == "rotary":
        position_ids = DTensor.from_local(position_ids, mesh, [SEQUENCE]).full_tensor()
    whole = hidden_states.new_empty(len(hidden_states), length, 0)
    return {
        "length": length,
        "circle_length": circle_length_of(reformer.config, length),
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "full_attention_mask": full_attention_mask(reformer.config, whole, attention_mask),
    }


def shard_batch(
    mesh: DeviceMesh, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> dict:
    """This rank's part of a batch for causal language modelling, as keyword arguments of the model.

    The losses of all ranks add up to the loss of the batch. Padding is moved to the end of its row.

    Args:
        mesh: as for `shard_sequences`.
        input_ids, labels, attention_mask: `[B, L]`, the same on every rank; L a multiple of the number of ranks.

    Raises:
        ValueError: if the length cannot be cut evenly, or a row holds several documents.
    """
    length, num_shards = input_ids.shape[1], mesh.size()
    if length % num_shards:
        raise ValueError(f"{length} tokens cannot be cut into {num_shards} shards of one length; pad them.")
    check_one_document_per_row(attention_mask, None, {})
    is_real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    # A shard's last token predicts the first one of the next shard, so labels are shifted before they are cut.
    targets = labels_of_next_tokens(labels, is_real, ignore_index=IGNORED)
    num_items = (targets != IGNORED).sum()
    if attention_mask is not None:
        layout = RowLayout.of_mask(is_real)
        input_ids, targets, attention_mask = (layout.into(rows) for rows in (input_ids, targets, is_real))

    def own(rows):
        return None if rows is None else rows.chunk(num_shards, dim=1)[mesh.get_local_rank()].contiguous()

    return {
        "input_ids": own(input_ids),
        "position_ids": own(torch.arange(length, device=input_ids.device)[None]),
        "attention_mask": own(attention_mask),
        "labels": own(targets),
        "shift_labels": own(targets),
        "num_items_in_batch": num_items,
    }
