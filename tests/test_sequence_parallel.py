"""Sequences sharded over two real processes: everything equals one process."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from allocations import Allocations
from peft import LoraConfig, get_peft_model
from tiny_models import POSITIONS, gradients, make_model, random_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from two_ranks import WORLD_SIZE

from hf_reformer import ReformerForCausalLM
from hf_reformer.training import sequence_sharding
from scripts.bench import sequence_parallel


pytestmark = pytest.mark.distributed


LENGTH = 72
MIXED = {
    "attn_layers": ["local", "lsh", "full", "lsh"],
    "chunk_size_feed_forward": 7,
    "chunk_size_lm_head": 5,
    "num_attention_heads": 4,
}
NO_CIRCLE = {"circular_look_around": False}
# Changes of the model and of the batch. Without `num_buckets`, it follows from the length.
CASES = {
    "reversible": ({"num_buckets": None}, {}),
    "ordinary autograd": ({"num_buckets": None, "reversible": False}, {}),
    "whole logits": ({"chunk_size_lm_head": 0}, {}),
    "no circle": (NO_CIRCLE, {}),
    "length that is no multiple of a chunk": (NO_CIRCLE, {"length": 70}),
    "padding on the right": (NO_CIRCLE, {"padding": slice(20, None)}),
    "padding between tokens": (NO_CIRCLE, {"padding": slice(30, 50)}),
    "padding on the left": ({"num_buckets": None}, {"padding": slice(0, 50)}),
    # A row of 20 tokens is attended to exactly, in a batch that is hashed.
    "short row": (NO_CIRCLE | {"full_attention_threshold": 24}, {"padding": slice(20, None)}),
    # A shard would be attended to exactly, the whole is hashed.
    "short shards": (NO_CIRCLE, {"length": 24}),
    "exact": ({}, {"length": 16}),
    "fresh rotations": ({}, {"training": True}),
    "rotary positions": (NO_CIRCLE | POSITIONS["LSH rotary"], {"padding": slice(0, 50)}),
    "no positions": (NO_CIRCLE | POSITIONS["none"], {}),
    "adapters": ({}, {"adapters": True}),
}


def make_mesh():
    return init_device_mesh("cpu", (WORLD_SIZE,))


def differences(rank, changes, length=LENGTH, padding=None, training=False, adapters=False):
    model = make_model(ReformerForCausalLM, **(MIXED | changes)).double().train(training)
    if adapters:
        get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    input_ids = random_ids(2, length)
    batch = {"input_ids": input_ids, "labels": input_ids.clone()}
    if padding is not None:
        batch["attention_mask"] = torch.ones_like(input_ids)
        batch["attention_mask"][0, padding] = 0
        batch["labels"][0, padding] = -100
    return sequence_parallel.differences(model, make_mesh(), batch)


@pytest.mark.parametrize("case", CASES)
def test_shards_equal_one_process(two_ranks, case):
    changes, batch = CASES[case]
    for errors in two_ranks.run(partial(differences, changes=changes, **batch)):
        bounds = dict.fromkeys(errors, 1e-10)
        if case == "whole logits":
            # Transformers adds up the tokens' losses in float32; the ranks do in another order.
            bounds["loss"] = 2 * 2 * LENGTH * 2**-24
        assert {"logits", "loss"} < errors.keys()
        assert all("lora" in name for name in errors.keys() - {"logits", "loss"}) == ("adapters" in batch)
        assert {name: error for name, error in errors.items() if not error <= bounds[name]} == {}


def fsdp_differences(rank):
    """Of the gradients, with the weights sharded over the same ranks."""
    model = make_model(ReformerForCausalLM, **MIXED).double()
    mesh, input_ids, sharded = make_mesh(), random_ids(2, LENGTH), deepcopy(model)
    sequence_sharding.shard_sequences(sharded, mesh)
    for module in (*sharded.reformer.encoder.layers, sharded):
        fully_shard(module, mesh=mesh)
    loss = sharded(**sequence_sharding.shard_batch(mesh, input_ids, input_ids)).loss
    (loss * WORLD_SIZE).backward()
    actual = {name: weight.grad.full_tensor() for name, weight in sharded.named_parameters()}
    model(input_ids, labels=input_ids).loss.backward()
    expected = gradients(model)
    return {name: float((actual[name] - value).norm() / value.norm()) for name, value in expected.items()}


def test_sharded_weights_get_the_gradients_of_one_process(two_ranks):
    for errors in two_ranks.run(fsdp_differences):
        assert {name: error for name, error in errors.items() if not error <= 1e-10} == {}


def num_exchanges(rank, kind):
    """Collectives of a training step with one layer."""
    model = make_model(ReformerForCausalLM, attn_layers=[kind])
    mesh, input_ids = make_mesh(), random_ids(1, LENGTH)
    sequence_sharding.shard_sequences(model, mesh)
    with CommDebugMode() as collectives:
        model(**sequence_sharding.shard_batch(mesh, input_ids, input_ids)).loss.backward()
    return collectives.get_total_counts()


# Forward, its repetition in backward, and the gradients: each exchanges what is projected, and the result.
@pytest.mark.parametrize(("kind", "count"), [("lsh", 3 * (2 + 1)), ("local", 3 * (3 + 1)), ("full", 3 * (3 + 1))])
def test_exchanges_of_a_layer(two_ranks, kind, count):
    assert two_ranks.run(num_exchanges, kind) == [count] * WORLD_SIZE


def peak_bytes(rank, length, sharded):
    """Of a training step."""
    settings = {"axial_pos_shape": [16, 32], "chunk_size_feed_forward": 32, "chunk_size_lm_head": 32}
    model = make_model(ReformerForCausalLM, max_position_embeddings=512, **settings, **NO_CIRCLE)
    input_ids = random_ids(1, length)
    batch = {"input_ids": input_ids, "labels": input_ids}
    if sharded:
        mesh = make_mesh()
        sequence_sharding.shard_sequences(model, mesh)
        batch = sequence_sharding.shard_batch(mesh, **batch)
    with Allocations() as allocations:
        model(**batch).loss.backward()
    return allocations.peak


def test_twice_the_ranks_take_twice_the_length_in_the_same_memory(two_ranks):
    alone = two_ranks.run(peak_bytes, 256, False)
    assert all(peak <= alone[0] for peak in two_ranks.run(peak_bytes, 256 * WORLD_SIZE, True))


def refuses(rank, message, num_heads=2, length=8, numbers=None):
    model = make_model(ReformerForCausalLM, num_attention_heads=num_heads)
    mesh, input_ids = make_mesh(), random_ids(1, length)
    with pytest.raises(ValueError, match=message):
        sequence_sharding.shard_sequences(model, mesh)
        sequence_sharding.shard_batch(mesh, input_ids, input_ids, numbers)


@pytest.mark.parametrize(
    "case",
    [
        ("3 heads cannot be shared out evenly to 2 ranks", 3),
        ("7 tokens cannot be cut into 2 shards", 2, 7),
        ("would read each other", 2, 4, torch.tensor([[1, 1, 2, 2]])),
    ],
    ids=["heads", "length", "documents"],
)
def test_what_cannot_be_sharded_is_refused(two_ranks, case):
    two_ranks.run(refuses, *case)
