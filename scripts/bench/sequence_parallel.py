"""
A model that is sharded over its sequences (docs/sequence_parallel.md) beside itself in one process, and their memory.

    torchrun --nproc_per_node 2 -m scripts.bench.sequence_parallel
"""

import argparse
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.modeling.ops.row_layout import RowLayout
from hf_reformer.training.sequence_sharding import SEQUENCE, shard_batch, shard_sequences


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
    is_real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    layout = RowLayout.of_mask(is_real)
    is_real = layout.into(is_real)[..., None]
    expected["logits"] = layout.into(expected["logits"]) * is_real
    wrapped = nn.parallel.DistributedDataParallel(sharded, process_group=mesh.get_group())
    # It takes the mean of the ranks' gradients, and their sum is wanted.
    actual = _logits_loss_and_gradients(wrapped, shard_batch(mesh, **batch), scale=mesh.size())
    actual["logits"] = DTensor.from_local(actual["logits"], mesh, [SEQUENCE]).full_tensor() * is_real
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
