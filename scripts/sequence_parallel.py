"""Sequences too long for one GPU, sharded over several. See docs/sequence_parallel.md.

Each rank holds a shard of every sequence. Everything but attention works on tokens one by one, so it runs on shards.
For attention, the ranks exchange shards of the sequence for shards of the heads and back (Ulysses; Jacobs et al. 2023,
arXiv 2309.14509): a rank hashes, sorts and attends with some heads, over the whole length.

Run as a program it compares a sharded model with the same model in one process, and their memory:

    torchrun --nproc_per_node 2 scripts/sequence_parallel.py
"""

import argparse
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import PrepareModuleInput, PrepareModuleOutput, parallelize_module

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.modeling.ops.chunking import circle_length_of
from hf_reformer.modeling.ops.padding import first_real_token, shift_rows


IGNORED = -100
SEQUENCE, HEADS = Shard(1), Shard(2)  # of [B, L, H * D]

EXCHANGES = {
    "layers.*.attention.self_attention.*": PrepareModuleOutput(output_layouts=SEQUENCE, desired_output_layouts=HEADS),
    "layers.*.attention.output": PrepareModuleInput(
        input_layouts=HEADS, desired_input_layouts=SEQUENCE, use_local_output=True
    ),
}


def shard_sequences(model: nn.Module, mesh: DeviceMesh):
    """Make `model` expect a shard of every sequence on each rank of `mesh`, as `shard_batch` cuts them.

    It adds hooks and changes no weights; their gradients are those of the rank's own tokens, to be summed over the
    ranks. Adapters must be there already, because their projections are exchanged, too.

    Args:
        model: any Reformer; what it computes per token comes out sharded.
        mesh: one dimension, one rank for each shard.

    Raises:
        ValueError: if the heads cannot be shared out evenly.
    """
    reformer = model.base_model
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
        "full_attention_mask": reformer._full_attention_mask(whole, attention_mask),
    }


def shard_batch(
    mesh: DeviceMesh, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> dict:
    """This rank's part of a batch for causal language modelling, as keyword arguments of the model.

    The losses of all ranks add up to the loss of the batch. Left-padded rows are moved to the front.

    Args:
        mesh: as for `shard_sequences`.
        input_ids, labels, attention_mask: `[B, L]`, the same on every rank; L a multiple of the number of ranks.

    Raises:
        ValueError: if the length cannot be cut evenly, or a row has padding between its tokens.
    """
    length, num_shards = input_ids.shape[1], mesh.size()
    if length % num_shards:
        raise ValueError(f"{length} tokens cannot be cut into {num_shards} shards of one length; pad them.")
    # A shard's last token predicts the first one of the next shard, so labels are shifted before they are cut.
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    num_items = (targets != IGNORED).sum()
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        shift = first_real_token(attention_mask)
        input_ids, targets, attention_mask = (shift_rows(rows, shift) for rows in (input_ids, targets, attention_mask))
        if (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("A row has padding between its tokens; sharded rows may have it at their ends only.")

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


def differences(model: nn.Module, mesh: DeviceMesh, batch: dict) -> dict[str, float]:
    """How far a sharded copy of a causal language model is from the model itself.

    Args:
        model: the same on every rank, as are the states of the random generators.
        mesh: as for `shard_sequences`.
        batch: the arguments of `shard_batch`.

    Returns:
        Norm of the difference relative to the norm of what is expected, of the logits, the loss and each gradient.
    """
    sharded = deepcopy(model)
    shard_sequences(sharded, mesh)
    expected = _logits_loss_and_gradients(model, batch)
    if "attention_mask" in batch:
        expected["logits"] = shift_rows(expected["logits"], first_real_token(batch["attention_mask"].bool()))
    wrapped = nn.parallel.DistributedDataParallel(sharded, process_group=mesh.get_group())
    # It takes the mean of the ranks' gradients, and their sum is wanted.
    actual = _logits_loss_and_gradients(wrapped, shard_batch(mesh, **batch), scale=mesh.size())
    actual["logits"] = DTensor.from_local(actual["logits"], mesh, [SEQUENCE]).full_tensor()
    dist.all_reduce(actual["loss"], group=mesh.get_group())
    return {name: float((actual[name] - value).norm() / value.norm()) for name, value in expected.items()}


def _logits_loss_and_gradients(model, batch, scale=1):
    inputs = {name: rows for name, rows in batch.items() if name in ("input_ids", "position_ids", "attention_mask")}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        logits = model(**inputs).logits
    with torch.random.fork_rng(devices=[]):
        loss = model(**batch).loss
        (loss * scale).backward()
    weights = getattr(model, "module", model).named_parameters()
    return {name: weight.grad for name, weight in weights if weight.requires_grad} | {
        "logits": logits,
        "loss": loss.detach(),
    }


def peak_memory(model: nn.Module, batch: dict) -> dict[str, float]:
    """MiB of a training step at its peak: the weights, their gradients, and everything else."""
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        model(**batch).loss.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    kept = {"weights": peak[_MemRefType.PARAM] / 2**20, "gradients": peak[_MemRefType.GRAD] / 2**20}
    return kept | {"all else": peak["Total"] / 2**20 - sum(kept.values())}


def small_config(length: int, **changes) -> ReformerConfig:
    """A model of 10 million weights for sequences of `length` tokens, a multiple of 128."""
    settings = {
        "attn_layers": ["local", "lsh"] * 3,
        "axial_pos_embds_dim": [64, 192],
        "axial_pos_shape": [128, length // 128],
        "chunk_size_feed_forward": 1024,
        "chunk_size_lm_head": 1024,
        "circular_look_around": False,
        "feed_forward_size": 1024,
        "hidden_dropout_prob": 0.0,
        "hidden_size": 256,
        "local_attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": length,
        "num_attention_heads": 8,
        "attention_head_size": 32,
        "num_buckets": 256,
        "num_hashes": 2,
        "vocab_size": 8000,
    }
    return ReformerConfig(**(settings | changes))


def main(arguments: list[str] | None = None):
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens of the memory comparison")
    length = parser.parse_args(arguments).length
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def show(line):
        if mesh.get_local_rank() == 0:
            print(line, flush=True)

    torch.manual_seed(0)
    config = small_config(1024, attn_layers=["local", "lsh", "full", "lsh"])
    model = ReformerForCausalLM(config).double()
    input_ids = torch.randint(config.vocab_size, (1, 1024))
    found = differences(model, mesh, {"input_ids": input_ids, "labels": input_ids})
    show(f"torch {torch.__version__}, {mesh.size()} ranks, {torch.get_num_threads()} threads each")
    show(f"float64, {' '.join(config.attn_layers)}, {input_ids.shape[1]} tokens, relative to one process:")
    show(f"  logits {found.pop('logits'):.1e}, loss {found.pop('loss'):.1e}")
    show(f"  gradients of {len(found)} weights: largest {max(found.values()):.1e}")

    config = small_config(length)
    model = ReformerForCausalLM(config)
    input_ids = torch.randint(config.vocab_size, (1, length))
    show(f"float32, {' '.join(config.attn_layers)}, {length} tokens, peak of a training step in MiB:")
    if mesh.get_local_rank() == 0:
        show(f"  one process  {_in_words(peak_memory(model, {'input_ids': input_ids, 'labels': input_ids}))}")
    dist.barrier()
    model.zero_grad()
    shard_sequences(model, mesh)
    show(f"  each rank    {_in_words(peak_memory(model, shard_batch(mesh, input_ids, input_ids)))}")
    dist.destroy_process_group()


def _in_words(parts: dict[str, float]) -> str:
    return f"{sum(parts.values()):.0f}: " + ", ".join(f"{name} {size:.0f}" for name, size in parts.items())


if __name__ == "__main__":
    main()
