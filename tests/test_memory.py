"""The memory of a training step: what it is, and that it is predicted."""

import doctest
import importlib
import os
import re
from dataclasses import replace

import pytest
import torch
from allocations import Allocations
from tiny_models import DROPOUT, POSITIONS, TIED, TINY
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hf_reformer import ReformerConfig, ReformerForCausalLM, estimate_memory
from hf_reformer.commands import memory
from hf_reformer.modeling.layers import feed_forward
from hf_reformer.modeling.memory import memory_measurement
from hf_reformer.modeling.memory.allocations import AllocationLedger
from hf_reformer.modeling.memory.memory_estimate import TrainingSetup, TrainingStep


# Long rows, so that activations are more than the weights.
SETTINGS = TINY | {
    "axial_pos_shape": [32, 32],
    "circular_look_around": False,
    "is_decoder": True,
    "max_position_embeddings": 1024,
    "num_hashes": 1,
}
CHUNKED = {"chunk_size_feed_forward": 64, "chunk_size_lm_head": 64}
TWO_SIDES = {"is_encoder_decoder": True, "is_decoder": False, "decoder_attn_layers": ["lsh", "full", "local"]}


def make_config(**changes):
    return ReformerConfig(**(SETTINGS | changes))


def allocated(config, **setup):
    return memory_measurement.measure(config, TrainingSetup(**setup)).allocated


# Prediction and measurement.

CASES = {
    "mixed": ({}, {}),
    "mixed, batch of 4, chunked": (CHUNKED, {"batch_size": 4, "length": 500}),
    "lsh, 4 rounds, SGD": ({"attn_layers": ["lsh"] * 2, "num_hashes": 4}, {"optimizer": "sgd"}),
    "local, bfloat16 weights": ({"attn_layers": ["local"] * 2}, {"dtype": torch.bfloat16, "batch_size": 4}),
    "mixed, bfloat16 autocast": ({"attn_layers": ["local", "lsh"] * 2}, {"autocast_dtype": torch.bfloat16}),
    "within a budget": ({"attn_layers": ["local", "lsh"] * 2, "activation_memory": "700KB"}, {"batch_size": 4}),
    "ordinary autograd": ({"reversible": False}, {"batch_size": 4, "length": 300}),
    "masked, full, dropout": ({"is_decoder": False, "attn_layers": ["full", "lsh"], **DROPOUT}, {"length": 256}),
    "rotary positions": ({"attn_layers": ["local", "lsh"] * 2} | POSITIONS["LSH rotary"], {}),
    "weights, accumulation": (CHUNKED | {"vocab_size": 20000}, {"length": 128, "gradient_accumulation_steps": 3}),
    "weights, tied": (CHUNKED | TIED | {"vocab_size": 20000}, {"length": 128}),
    "forward": ({"attn_layers": ["local", "lsh"] * 2} | POSITIONS["rotary"], {"mode": "forward", "batch_size": 4}),
    "forward, full, masked": ({"is_decoder": False, "attn_layers": ["full", "lsh"]}, {"mode": "forward"}),
    "prefill": ({"attn_layers": ["local", "lsh"] * 2}, {"mode": "prefill", "batch_size": 4}),
    "encoder and decoder": (TWO_SIDES, {"target_length": 100, "batch_size": 2}),
    "encoder and decoder, prefill": (TWO_SIDES, {"target_length": 10, "mode": "prefill"}),
    "weights, Muon": ({"feed_forward_size": 20000}, {"length": 16, "optimizer": memory.MUON}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_predicted_is_what_the_allocator_counts(case):
    """
    Measured by events of PyTorch's allocator, which also see what kernels use for themselves. In these cases nearly
    nothing; the softmax over rounds is the exception.
    """
    settings, setup = CASES[case]
    config = make_config(**settings)
    predicted = estimate_memory(config, **setup)
    measured = allocated(config, **setup)
    assert 0.95 * measured <= predicted.peak <= 1.01 * measured


@pytest.mark.parametrize(("settings", "setup"), [CASES["mixed"], CASES["weights, accumulation"]])
def test_parts_of_the_peak(settings, setup):
    """Gradients of all parameters stand at the peak where weights dominate, and in backward those so far."""
    config = make_config(**settings)
    estimate = estimate_memory(config, **setup)
    parameters = [*ReformerForCausalLM(config).parameters()]
    weights = sum(parameter.nbytes for parameter in parameters)
    assert estimate.parameters == weights
    # AdamW also counts the steps of each parameter, in float32.
    assert estimate.optimizer_state == 2 * weights + 4 * len(parameters)
    assert 0 < estimate.gradients <= weights
    assert (estimate.gradients == weights) == (config.vocab_size == 20000)
    parts = (estimate.parameters, estimate.gradients, estimate.optimizer_state, estimate.activations)
    assert estimate.peak == sum(parts) == sum(group.nbytes for group in estimate.groups)
    assert estimate_memory(config, **setup | {"optimizer": "none"}).optimizer_state == 0


@pytest.mark.parametrize("mode", ["forward", "prefill"])
def test_reading_takes_no_more_for_more_layers(mode):
    """But for what a cache keeps of each, keys, values, and beside them what finds them again."""
    two, six = (
        estimate_memory(make_config(attn_layers=["local", "lsh"] * pairs), mode=mode, length=1000) for pairs in (1, 3)
    )
    grown = six.activations - two.activations
    assert (two.gradients, two.optimizer_state) == (0, 0)
    config = make_config()
    keys_and_values = 2 * 1000 * config.num_attention_heads * config.attention_head_size * 4
    assert grown < 0.02 * two.activations if mode == "forward" else grown > 2 * keys_and_values
    with pytest.raises(ValueError, match=r"one of \['training', 'forward', 'prefill'\], but got 'eval'"):
        estimate_memory(make_config(), mode="eval")
    with pytest.raises(ValueError, match=r"`mode='prefill'` is for causal models"):
        estimate_memory(make_config(is_decoder=False), mode="prefill")


def test_a_budget_is_part_of_the_prediction():
    setup = {"length": 1000, "batch_size": 4, "optimizer": "none"}
    changes = {"attn_layers": ["local"] * 8}
    update = 4 * 1000 * SETTINGS["hidden_size"] * 4
    without, few = (
        estimate_memory(make_config(activation_memory=size, **changes), **setup).activations
        for size in (0, 8 * update)
    )
    assert 7 * update <= few - without <= 9 * update


def test_a_target_is_read_beside_the_source():
    """More layers of the decoder cost no more, but for their weights; a longer target does."""
    setup = {"length": 512, "optimizer": "none"}
    few, many = (make_config(**TWO_SIDES | {"decoder_attn_layers": ["lsh"] * depth}) for depth in (2, 6))
    short = estimate_memory(few, target_length=512, **setup)
    assert estimate_memory(many, target_length=512, **setup).activations <= short.activations
    assert estimate_memory(few, target_length=1024, **setup).activations > 1.5 * short.activations
    assert estimate_memory(few, **setup).peak == short.peak
    places = {group.place for group in estimate_memory(few, target_length=1024, **setup).groups}
    assert any(place.startswith("decoder's ") for place in places)
    with pytest.raises(ValueError, match="`target_length` is for `is_encoder_decoder=True`"):
        estimate_memory(make_config(), target_length=100)


def test_accumulation_keeps_gradients_beside_the_next_batch():
    """From the second batch on; a third changes nothing."""
    config = make_config(vocab_size=20000, **CHUNKED)
    once, twice, thrice = (
        estimate_memory(config, length=64, gradient_accumulation_steps=steps, optimizer="sgd") for steps in (1, 2, 3)
    )
    # The gradients of the tables of words, in and out, are there twice while they are added.
    assert twice.peak - once.peak >= 20000 * 32 * 4
    assert thrice == twice


def test_the_length_is_what_the_model_takes_or_is_made_for():
    for positions in POSITIONS.values():
        config = make_config(max_position_embeddings=128, **positions)
        assert TrainingStep(config, TrainingSetup()).batch["input_ids"].shape == (1, 128)


def test_the_step_is_a_training_step():
    step = TrainingStep(make_config(), TrainingSetup(length=128))
    step.make_optimizer()
    before = {name: parameter.clone() for name, parameter in step.model.named_parameters()}
    step()
    for name, parameter in step.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name


def test_prediction_allocates_nothing_and_leaves_no_trace():
    config = make_config(**DROPOUT)
    settings, random_state = config.to_dict(), torch.get_rng_state()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        estimate = estimate_memory(config, batch_size=64)
    assert memory_measurement.peak_of_events(profiler) < 0.01 * estimate.peak
    assert torch.equal(torch.get_rng_state(), random_state)
    assert config.to_dict() == settings


def test_precision_is_that_of_the_setup():
    def dtypes(purpose, **setup):
        groups = estimate_memory(make_config(), length=64, **setup).groups
        return {group.dtype for group in groups if group.purpose == purpose}

    assert dtypes("parameters", dtype=torch.bfloat16) == {torch.bfloat16}
    assert dtypes("parameters", autocast_dtype=torch.bfloat16) == {torch.float32}
    assert torch.bfloat16 in dtypes("activations", autocast_dtype=torch.bfloat16)
    assert torch.bfloat16 not in dtypes("activations")


def test_example():
    results = doctest.testmod(importlib.import_module("hf_reformer.modeling.memory.memory_estimate"))
    assert (results.attempted, results.failed) == (6, 0)


# What is where.


def test_groups_of_tensors_have_names():
    config = make_config(attn_layers=["local", "lsh"] * 2, reversible=False, attn_implementation="eager")
    estimate = estimate_memory(config, length=512)
    assert list(estimate.groups) == sorted(estimate.groups, key=lambda group: -group.nbytes)
    found = {(group.purpose, group.place, group.name): group for group in estimate.groups}
    for kind, layers in (("LSH", "1, 3"), ("local", "0, 2")):
        group = found["activations", f"{kind} attention of layers {layers}", "probabilities"]
        assert (group.shape, group.dtype, group.count) == ((1, 2, 32, 16, 32), torch.float32, 2)
        assert group.nbytes == 2 * 2 * 32 * 16 * 32 * 4
    places = {group.place for group in estimate.groups if group.purpose == "parameters"}
    assert places == {
        "embeddings",
        "end of the stack",
        "head",
        "local attention of layers 0, 2",
        "LSH attention of layers 1, 3",
        "feed-forward of layers 0, 1, 2, 3",
    }


@pytest.mark.parametrize("reversible", [False, True])
def test_backward_is_attributed_to_the_layer_whose_it_is(reversible):
    """Each layer's gradients of its own weights are made in its own backward, recomputed or not."""
    step = TrainingStep(make_config(attn_layers=["local"] * 3, reversible=reversible), TrainingSetup(length=64))
    with AllocationLedger() as ledger, ledger.watch_modules(step.model):
        step.compute()
    names = {id(parameter.grad.untyped_storage()): name for name, parameter in step.model.named_parameters()}
    assert len(names) == len([*step.model.parameters()])
    for name, parameter in step.model.named_parameters():
        if "layers" in name and name.endswith("query.weight"):
            allocation = ledger.find(parameter.grad)
            assert allocation.module == name.removesuffix(".weight")
            assert allocation.name.startswith("gradient of")


def test_what_a_checkpoint_recomputes_is_not_called_a_gradient():
    class Doubled(nn.Module):
        def forward(self, numbers):
            return torch.utils.checkpoint.checkpoint(lambda x: x.sin().cos(), numbers, use_reentrant=False)

    model, numbers = Doubled(), torch.ones(10, requires_grad=True)
    with AllocationLedger() as ledger, ledger.watch_modules(model):
        model(numbers).sum().backward()
    names = [allocation.name for allocation in ledger.allocations]
    assert names.count("sin") == 2
    assert "gradient of Cos" in names


def test_the_ledger_leaves_out_what_was_there_before():
    before = torch.ones(100)
    with AllocationLedger() as ledger:
        view, same = before[:50], before.add_(1)
    assert (ledger.alive, ledger.peak, ledger.at_peak()) == (0, 0, [])
    assert ledger.find(view) is ledger.find(same) is None


def test_the_ledger_forgets_what_is_freed():
    with AllocationLedger() as ledger:
        first = torch.ones(100)
        view, second = first[:50], torch.ones(200)
        del first, second
        third = torch.ones(250)
        ledger.purpose = "late"
        fourth = torch.ones(1)
    assert ledger.alive == 4 * (100 + 250 + 1) == ledger.peak
    assert [allocation.nbytes for allocation in ledger.at_peak()] == [400, 1000, 4]
    assert ledger.find(view).purpose == ledger.find(third).purpose == "" != ledger.find(fourth).purpose == "late"
    ledger.restart_peak()
    del view, third
    with ledger:
        fifth = torch.ones(2)
    assert (ledger.alive, ledger.peak) == (4 * 3, 4 * 351)
    ledger.restart_peak()
    assert [allocation.nbytes for allocation in ledger.at_peak()] == [4, 8]
    assert ledger.find(fifth) is ledger.allocations[-1]
    assert ledger.find(torch.ones(1)) is None


# How memory grows.

LENGTH, WIDE, WORDS = 1024, 200, 300


def largest_tensor(**changes):
    """Elements of the largest tensor in a whole step, with small chunks of attention and every kind of it but full."""
    config = make_config(
        attention_head_size=4,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
        feed_forward_size=WIDE,
        vocab_size=WORDS,
        **DROPOUT,
        **(CHUNKED | changes),
    )
    step = TrainingStep(config, TrainingSetup())
    with Allocations() as allocations:
        step.make_optimizer()
        step()
    assert (1, 64, WIDE) in allocations.shapes or config.chunk_size_feed_forward == 0
    return allocations.largest


@pytest.mark.parametrize("reversible", [True, False])
def test_no_tensor_of_a_step_is_as_large_as_the_logits_or_the_wide_activations(reversible):
    assert largest_tensor(reversible=reversible) < LENGTH * WIDE


def test_such_a_tensor_would_be_seen():
    assert largest_tensor(chunk_size_feed_forward=0) == LENGTH * WIDE
    assert largest_tensor(chunk_size_lm_head=0) == LENGTH * WORDS


def test_a_cpu_takes_as_many_tokens_at_a_time_as_suit_it(monkeypatch):
    monkeypatch.setattr(feed_forward, "ACTIVATIONS_AT_ONCE", 64 * WIDE)
    assert largest_tensor(chunk_size_feed_forward=0) < LENGTH * WIDE


def relative_growth(shallow, deep):
    return abs(deep - shallow) / shallow


@pytest.mark.slow
def test_activations_do_not_grow_with_depth():
    """Measured; without parameters and gradients, which small layers have few of."""
    activations = []
    for depth in (6, 12):
        config = make_config(attn_layers=["local", "lsh"] * (depth // 2), feed_forward_size=32)
        weights = sum(parameter.nbytes for parameter in ReformerForCausalLM(config).parameters())
        activations.append(allocated(config, optimizer="none") - 2 * weights)
    assert relative_growth(*activations) < 0.05


@pytest.mark.slow
def test_activations_of_65536_tokens_do_not_grow_with_depth():
    """The length and width that docs/memory.md measures, predicted: 23.3 times a stream in float32."""
    activations = []
    for depth in (2, 6):
        config = ReformerConfig(
            attn_layers=["local", "lsh"] * (depth // 2),
            axial_pos_embds_dim=[128, 384],
            axial_pos_shape=[256, 256],
            chunk_size_feed_forward=16384,
            chunk_size_lm_head=4096,
            circular_look_around=False,
            feed_forward_size=2048,
            hidden_dropout_prob=0.0,
            hidden_size=512,
            is_decoder=True,
            local_attention_probs_dropout_prob=0.0,
            max_position_embeddings=65536,
            num_attention_heads=8,
            num_buckets=[32, 64],
            vocab_size=32000,
        )
        activations.append(estimate_memory(config, optimizer="none").activations)
    assert relative_growth(*activations) < 0.05
    one_stream = 65536 * 512 * 4
    assert activations[0] < 24 * one_stream
    # Without reversible layers the deeper stack takes several times as much.
    config.reversible = False
    assert estimate_memory(config, optimizer="none").activations > 3 * activations[0]


# Errors.


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, but got 0"),
        ({"length": 0}, "`length` must be at least 1, but got 0"),
        ({"gradient_accumulation_steps": -1}, "`gradient_accumulation_steps` must be at least 1, but got -1"),
        ({"dtype": torch.int8}, r"`dtype` must be a floating-point type, but got torch\.int8"),
        ({"autocast_dtype": torch.float64}, r"`autocast_dtype` must be torch\.bfloat16, torch\.float16 or None"),
        ({"optimizer": "adam"}, r"`optimizer` must be one of \['adamw', 'none', 'sgd'\] or a function .* got 'adam'"),
        ({"device": "xpu"}, "`device` is 'xpu', which this machine does not have"),
        ({"length": 1025}, "The input has 1025 tokens, the position embeddings reach 1024"),
    ],
)
def test_a_step_that_cannot_be(setup, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(make_config(), **setup)


# The script.

SMALL = "--length 512 --hidden_size 32 --num_attention_heads 2 --attention_head_size 8 --feed_forward_size 64 ".split()


def peaks_printed(output):
    """The peaks, by what is said of them."""
    lines = re.findall(r"^ *([\d,.]+) MiB +(.*)$", output, re.MULTILINE)
    return {words: float(size.replace(",", "")) for size, words in lines}


def mebibytes(nbytes):
    return pytest.approx(nbytes / 2**20, abs=0.051)


@pytest.mark.slow
def test_script_explains_and_advises(capsys):
    command = [
        *SMALL,
        *"--attn_layers local lsh".split(),
        # Attention weights, which are in float32 in any case, are then few.
        *"--local_attn_chunk_length 8 --num_hashes 2 --batch_size 4".split(),
        *"--set reversible=False hash_seed=7 --groups 3 --measure".split(),
    ]
    memory.main(command)
    printed = peaks_printed(capsys.readouterr().out)

    arguments, recipe = memory.parse_arguments(command)
    config, setup = memory.make_config(arguments, recipe), memory.make_setup(arguments)
    assert (config.reversible, config.hash_seed, config.num_hashes, config.is_decoder) == (False, 7, 2, True)
    predicted = memory.estimate(config, setup)
    assert printed["predicted peak of a training step"] == mebibytes(predicted.peak)
    for part in ("parameters", "gradients", "optimizer_state", "activations"):
        assert printed[part.replace("_", " ")] == mebibytes(getattr(predicted, part))
    largest = predicted.groups[0]
    times = "" if largest.count == 1 else f"{largest.count} x "
    words = f"{largest.place}: {times}{largest.name} {list(largest.shape)} float32"
    assert printed[words] == mebibytes(largest.nbytes)
    assert printed["everything else"] == mebibytes(sum(group.nbytes for group in predicted.groups[3:]))

    (measured,) = (size for words, size in printed.items() if words.startswith("measured, allocated by PyTorch"))
    assert predicted.peak / 2**20 == pytest.approx(measured, rel=0.05)

    # Each change with the peak it would lead to.
    expected = {
        "--set reversible=True": (memory.changed(config, reversible=True), setup),
        "--batch_size 1 --gradient_accumulation_steps 4": (
            config,
            replace(setup, batch_size=1, gradient_accumulation_steps=4),
        ),
    }
    advice = {re.sub(r"^\(.*?\)  |:.*", "", words): peak for words, peak in printed.items()}
    for change, step in expected.items():
        assert advice[change] == mebibytes(memory.estimate(*step).peak)
    assert {"--autocast bfloat16", "--dtype bfloat16"} <= advice.keys()
    # Rounds are combined as they come.
    assert "--set num_hashes=1" not in advice
    # Pieces of what is kept for backward anyway save nothing.
    assert "--set chunk_size_feed_forward=256" not in advice


def test_script_takes_a_saved_config(tmp_path):
    make_config(vocab_size=77).save_pretrained(tmp_path)
    changes = ["--set", "num_buckets=[4,8]", 'attn_layers=["lsh"]', "hidden_act=gelu", "hash_seed=None"]
    arguments, recipe = memory.parse_arguments(["--model_name_or_path", str(tmp_path), *changes])
    config = memory.make_config(arguments, recipe)
    assert (config.vocab_size, config.hidden_size) == (77, 32)
    assert (config.num_buckets, config.attn_layers, config.hidden_act) == ([4, 8], ("lsh",), "gelu")


def test_advice_is_what_is_not_set_yet():
    setup = TrainingSetup(length=4096, optimizer="none", autocast_dtype=torch.bfloat16, dtype=torch.bfloat16)
    assert memory.alternatives(make_config(**CHUNKED), setup) == {}
    assert list(memory.alternatives(make_config(), setup)) == [
        "--set chunk_size_feed_forward=256: smaller pieces, the same numbers",
        "--set chunk_size_lm_head=256: smaller pieces, the same numbers",
    ]
    (advice,) = memory.alternatives(make_config(**CHUNKED, activation_memory="1MB"), setup).values()
    assert advice[0].activation_memory == 0


def test_advice_can_be_given_to_the_command(tmp_path):
    for number, settings in enumerate(
        ({"reversible": False, "num_hashes": 2}, {"activation_memory": "1MB", "num_hashes": 2})
    ):
        make_config(**settings).save_pretrained(tmp_path / f"{number}")
        given = ["--model_name_or_path", str(tmp_path / f"{number}"), "--batch_size", "4", "--length", "4096"]
        arguments, recipe = memory.parse_arguments(given)
        found = memory.alternatives(memory.make_config(arguments, recipe), memory.make_setup(arguments))
        assert len(found) >= 8
        for words, (config, setup) in found.items():
            arguments, recipe = memory.parse_arguments([*given, *words.split(":")[0].split()])
            assert memory.make_config(arguments, recipe).to_dict() == config.to_dict()
            assert memory.make_setup(arguments) == setup


def vanish(model):
    os._exit(9)


@pytest.mark.slow
def test_a_step_that_kills_its_process():
    with pytest.raises(MemoryError, match="killed; most likely memory ran out"):
        memory.measure_in_fresh_process(make_config(), TrainingSetup(optimizer=vanish))


def test_a_step_that_does_not_fit():
    with pytest.raises(MemoryError, match="does not fit into this machine's memory"):
        memory_measurement.measure(make_config(vocab_size=10**13), TrainingSetup())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--batch_size", "0"], "`batch_size` must be at least 1, but got 0"),
        (["--set", "reversibel=False"], "--set takes settings of ReformerConfig as name=value, but got 'reversibel=F"),
        (["--set", "num_hashes"], "--set takes settings of ReformerConfig as name=value, but got 'num_hashes'"),
        (["--set", "num_buckets=7"], "`num_buckets` must be an even number"),
        (["--model_name_or_path", "no/such/folder"], "no/such/folder"),
        (["--device", "mps"], "`device` is 'mps', which this machine does not have"),
        (["--device", "toaster"], "`device` is 'toaster', which this machine does not have"),
    ],
)
def test_script_explains_a_mistake(arguments, message, capsys):
    with pytest.raises(SystemExit):
        memory.main(arguments)
    assert message in capsys.readouterr().err
