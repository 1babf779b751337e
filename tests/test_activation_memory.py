"""What reversible layers keep within `activation_memory`: the same results, and less is computed twice."""

from dataclasses import replace

import pytest
import torch
from allocations import Allocations
from huggingface_hub.errors import StrictDataclassClassValidationError
from reversible_models import BATCH, HIDDEN, LENGTH, add_lora, layers_of, make, make_inputs, relative_error
from seq2seq_models import ALL_DROPOUT
from seq2seq_models import make as make_two_sides
from seq2seq_models import train as train_two_sides
from test_reversible import VARIANTS, evaluate
from tiny_models import DROPOUT, STACKS, TINY, assert_close
from torch.utils.flop_counter import flop_registry

from hf_reformer import ReformerConfig
from hf_reformer.configuration.byte_sizes import bytes_of


# Of a stream in float64.
UPDATE = BATCH * LENGTH * HIDDEN * 8
ALL = "1GiB"
# Operations of the last projections of a layer, feed-forward first, then attention.
LAST = [2 * BATCH * LENGTH * HIDDEN * size for size in (TINY["feed_forward_size"], HIDDEN // 2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_ordinary_autograd(name):
    expected, expected_state = evaluate(VARIANTS[name], False, "sdpa" if "maps" not in name else "eager")
    variant = replace(VARIANTS[name], config=VARIANTS[name].config | {"activation_memory": ALL})
    actual, state = evaluate(variant, True, "sdpa" if "maps" not in name else "eager")
    assert_close(actual, expected)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("changes", [{}, ALL_DROPOUT, {"chunk_size_feed_forward": 8} | ALL_DROPOUT])
def test_an_encoder_with_a_decoder(changes):
    expected = train_two_sides(make_two_sides(reversible=False, **changes))
    assert_close(train_two_sides(make_two_sides(activation_memory=ALL, **changes)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    def gradients_within(memory):
        model, inputs = make(True, dtype=torch.float32, activation_memory=memory, **DROPOUT), make_inputs()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype):
            model(inputs_embeds=inputs["inputs_embeds"].float(), labels=inputs["labels"]).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected, actual = gradients_within(0), gradients_within(ALL)
    assert actual.keys() == expected.keys()
    # Half a unit in the last place of what the layers compute in.
    assert relative_error(actual, expected) < torch.finfo(dtype).eps / 2


class Operations(Allocations):
    """Also counts what PyTorch counts of matrix products, whose own counter looks at modules with hooks."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func._overloadpacket in flop_registry:
            self.count += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def step(memory, prepare=lambda model: model, **changes):
    """Operations of a training step, and the bytes in use between forward and backward."""
    model, inputs = prepare(make(True, activation_memory=memory, **changes)), make_inputs()
    torch.manual_seed(3)
    with Operations() as operations:
        loss = model(**inputs).loss
        kept = operations.alive
        loss.backward()
    return operations.count, kept


@pytest.mark.parametrize(
    ("memory", "saved"),
    [
        (1, []),
        (UPDATE - 1, []),
        (UPDATE, LAST[:1]),
        (3 * UPDATE, LAST[:1] * 3),
        (5 * UPDATE - 1, LAST[:1] * 3 + LAST[1:]),
        (6 * UPDATE, LAST * 3),
        (ALL, LAST * 3),
    ],
)
def test_feed_forwards_come_first_and_no_more_is_kept_than_allowed(memory, saved):
    stack = {"attn_layers": STACKS["mixed"]}
    operations, kept = step(0, **stack)
    fewer, more = step(memory, **stack)
    assert operations - fewer == sum(saved)
    assert more - kept == len(saved) * UPDATE
    if memory != ALL:
        assert more - kept <= memory


def test_the_budget_is_one_of_bytes_of_what_is_computed_in():
    """Under autocast an update has half of the bytes, so twice as many are kept."""
    encoder = make(True, attn_layers=["local"] * 4, dtype=torch.float32, activation_memory=UPDATE).reformer.encoder
    stream = torch.zeros(BATCH, LENGTH, HIDDEN, dtype=torch.float64)
    assert encoder._updates_to_keep(stream) == [0, 0, 1, 1]
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder._updates_to_keep(stream) == [1, 1, 1, 1]


def look_at_projections(model):
    for layer in layers_of(model):
        layer.feed_forward.output.dense.register_forward_hook(look_at_projections.hook)
    return model


def test_what_a_hook_sees_is_computed():
    seen = []
    look_at_projections.hook = lambda module, args, output: seen.append(output.detach())
    operations, kept = step(0, look_at_projections, exact_inversion=True)
    # In forward and in the recomputation, the last layer first.
    expected, seen = seen, []
    fewer, more = step(ALL, look_at_projections, exact_inversion=True)
    assert len(seen) == 4 and all(map(torch.equal, seen, expected))
    # Attention, which has none, does without.
    assert operations - fewer == 2 * LAST[1] and more - kept == 2 * UPDATE


def test_adapters_on_the_projection_are_computed_and_nothing_is_kept_for_them():
    assert step(ALL, add_lora) == step(0, add_lora)


def test_hooks_on_saved_tensors_have_them():
    """As offloading needs it."""
    packed = []
    model, inputs = make(True, activation_memory=ALL), make_inputs()

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    # Two halves of two layers, and the last layer's output.
    assert packed.count((BATCH, LENGTH, HIDDEN)) >= 6
    expected = make(True), make_inputs()
    expected[0](**expected[1]).loss.backward()
    assert_close({"embeds": inputs["inputs_embeds"].grad}, {"embeds": expected[1]["inputs_embeds"].grad})


@pytest.mark.parametrize(
    ("size", "number"),
    [(0, 0), (5, 5), ("7", 7), ("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("500 MB", 500_000_000), ("3KB", 3000)],
)
def test_sizes(size, number):
    assert bytes_of("size", size) == number
    assert ReformerConfig(activation_memory=size).activation_memory == size


@pytest.mark.parametrize("size", [-1, "", "-2GiB", "2 gigs", "GiB", "2gib", "1e9"])
def test_sizes_that_are_none(size):
    with pytest.raises(StrictDataclassClassValidationError, match="`activation_memory` must be a number of bytes"):
        ReformerConfig(activation_memory=size)
