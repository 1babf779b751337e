"""Two real processes, DDP and FSDP2, train as one process does with the whole batch."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from reversible_models import layers_of, relative_error
from tiny_models import DROPOUT, STACKS, TIED, VOCAB, assert_close, assert_equal_tensors, gradients, make_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import WORLD_SIZE, full

from hf_reformer import ReformerForCausalLM, ReformerForConditionalGeneration


pytestmark = pytest.mark.distributed


MODEL = {"attn_layers": STACKS["mixed"], "hash_seed": 3, "chunk_size_feed_forward": 8}
LAYERS = len(MODEL["attn_layers"])
TWO_SIDES = {"is_encoder_decoder": True, "decoder_attn_layers": ["local", "lsh"]}
TWO_DOCUMENTS = torch.cat([torch.arange(12), torch.arange(25)])[None]


def rows_of(rank=None):
    """Four rows of token ids, or a rank's two of them."""
    ids = torch.randint(VOCAB, (4, 37), generator=torch.Generator().manual_seed(0))
    return ids if rank is None else ids[rank::WORLD_SIZE]


@dataclass
class Case:
    """A model, and what it is trained with."""

    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    lora: bool = False
    micro_batches: int = 1
    packed: bool = False
    model_class: type = ReformerForCausalLM

    def build(self, **changes):
        model = make_model(self.model_class, **(MODEL | self.changes | changes)).to(self.dtype)
        if self.lora:
            # With its usual weights an adapter computes 0.
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        return model.train()

    def loss(self, model, ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return model(ids, labels=ids, position_ids=TWO_DOCUMENTS if self.packed else None).loss

    def train(self, model, ids):
        """Two steps without an optimizer, the second in micro-batches; its gradients remain."""
        self.loss(model, ids).backward()
        model.zero_grad()
        *first, last = ids.chunk(self.micro_batches)
        with without_communication(model):
            for rows in first:
                (self.loss(model, rows) / self.micro_batches).backward()
        (self.loss(model, last) / self.micro_batches).backward()


@contextmanager
def without_communication(model):
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


CASES = {
    "float64": Case(),
    "lora": Case(lora=True),
    "autocast": Case(dtype=torch.float32, autocast=True),
    "lora and autocast": Case(dtype=torch.float32, autocast=True, lora=True),
    "accumulation": Case(micro_batches=2),
    "accumulation and autocast": Case(dtype=torch.float32, autocast=True, micro_batches=2),
    "chunked loss": Case(changes={"chunk_size_lm_head": 16}),
    "tied embeddings": Case(changes=TIED),
    "packed": Case(packed=True),
    "encoder and decoder": Case(TWO_SIDES, model_class=ReformerForConditionalGeneration),
    "encoder and decoder, autocast": Case(
        TWO_SIDES, torch.float32, autocast=True, micro_batches=2, model_class=ReformerForConditionalGeneration
    ),
}


def shard(model, **options):
    options["mesh"] = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in layers_of(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp, static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "ddp, bucket view": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fsdp2": shard,
    "fsdp2, kept gathered": lambda model: shard(model, reshard_after_forward=False),
}


def full_gradients(model):
    return {name: full(gradient) for name, gradient in gradients(model).items()}


def train_on_rank(rank, wrapper, case):
    model = CASES[case].build()
    CASES[case].train(WRAPPERS[wrapper](model), rows_of(rank))
    return full_gradients(model)


def train_rank_after_rank(case, seeds=(None, None), **changes):
    """One process does what each rank does, and takes the mean of the gradients."""
    means = {}
    for rank, seed in enumerate(seeds):
        model = case.build(**changes)
        if seed is not None:
            torch.manual_seed(seed)
        case.train(model, rows_of(rank))
        for name, gradient in gradients(model).items():
            means[name] = means.get(name, 0) + gradient / WORLD_SIZE
    return means


@pytest.fixture(autouse=True)
def one_thread():
    """As on the ranks: with more of them, sums are made in another order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def expected():
    """What one process gets, by case."""
    torch.set_num_threads(1)
    return {name: train_rank_after_rank(case) for name, case in CASES.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_are_bit_equal_to_those_of_one_process(two_ranks, expected, wrapper, case):
    for actual in two_ranks.run(train_on_rank, wrapper, case):
        assert_equal_tensors(actual, expected[case])


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.dtype == torch.float64])
def test_they_equal_ordinary_autograd_on_the_whole_batch(expected, case):
    model = CASES[case].build(reversible=False)
    CASES[case].train(model, rows_of())
    assert_close(expected[case], gradients(model))


# Random numbers.


RANDOM = Case(changes=DROPOUT | {"hash_seed": None})


def train_at_random(rank, wrapper):
    model = RANDOM.build()
    wrapped = WRAPPERS[wrapper](model)
    torch.manual_seed(100 + rank)
    RANDOM.train(wrapped, rows_of(rank))
    return full_gradients(model), torch.get_rng_state()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_each_rank_draws_its_own_dropout_and_rotations(two_ranks, wrapper):
    (actual, first_state), (_, second_state) = two_ranks.run(train_at_random, wrapper)
    assert_close(actual, train_rank_after_rank(RANDOM, seeds=(100, 101), reversible=False))
    # The state of the second rank was left by this process, too.
    assert torch.equal(second_state, torch.get_rng_state())
    assert not torch.equal(first_state, second_state)


# The order of things in backward: a layer's gradients leave before the layer below is recomputed.


def watch_recomputation(model, events):
    for layer in layers_of(model):
        layer.feed_forward.layer_norm.register_forward_pre_hook(
            lambda *_, index=layer.layer_idx: events.append(("computed", index))
        )


def order_of_ddp(rank):
    case = Case(changes={"chunk_size_feed_forward": 0})
    model, events = case.build(), []
    watch_recomputation(model, events)
    for layer in layers_of(model):
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, index=layer.layer_idx: events.append(("gradient", index))
            )
    # A bucket for nearly every parameter, so that many of them are full before backward ends.
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-6)

    def reduce(state, bucket):
        events.append(("reduced", None))
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, reduce)
    case.loss(wrapped, rows_of(rank)).backward()
    events.clear()
    wrapped.zero_grad()
    case.loss(wrapped, rows_of(rank)).backward()
    return events, [len(list(layer.parameters())) for layer in layers_of(model)]


def test_ddp_reduces_the_gradients_of_a_layer_before_the_next_is_recomputed(two_ranks):
    events, parameters = two_ranks.run(order_of_ddp)[0]
    forward, backward = events[:LAYERS], events[LAYERS:]
    assert forward == [("computed", index) for index in range(LAYERS)]
    for index in range(LAYERS):
        assert backward.count(("gradient", index)) == parameters[index]
    for index in range(1, LAYERS):
        below = backward.index(("computed", index - 1))
        assert backward[:below].count(("gradient", index)) == parameters[index]
        assert backward[backward.index(("computed", index)) : below].count(("reduced", None)) > 0


def watch_fsdp(model, events):
    watch_recomputation(model, events)
    for layer in layers_of(model):
        layer.set_all_reduce_hook(lambda _, index=layer.layer_idx: events.append(("reduced", index)))


FSDP_ORDER = [("computed", index) for index in range(LAYERS)]
FSDP_ORDER += [(event, index) for index in reversed(range(LAYERS)) for event in ("computed", "reduced")]


def order_of_fsdp(rank):
    case = Case(changes={"chunk_size_feed_forward": 0})
    model, events = shard(case.build()), []
    watch_fsdp(model, events)
    case.train(model, rows_of(rank))
    return events


def test_fsdp_reduces_the_gradients_of_a_layer_before_the_next_is_recomputed(two_ranks):
    for events in two_ranks.run(order_of_fsdp):
        assert events == 2 * FSDP_ORDER


# Mixed precision of FSDP2: it casts the streams between the layers, and the tape undoes it.


# Whole, because the pieces' bfloat16 gradients would be added in another order than by ordinary autograd.
BFLOAT16 = Case(changes={"chunk_size_feed_forward": 0}, dtype=torch.float32)
OUTPUT_DTYPES = {"kept": None, "bfloat16": torch.bfloat16}


def shard_bfloat16(model, output_dtype):
    return shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype))


def train_bfloat16(rank, output_dtype):
    results, ids = {}, rows_of(rank)
    for reversible in (True, False):
        model, events = shard_bfloat16(BFLOAT16.build(reversible=reversible), output_dtype), []
        if reversible:
            watch_fsdp(model, events)
        BFLOAT16.train(model, ids)
        grads = full_gradients(model)

        model.zero_grad()
        output = model(ids, labels=ids, output_hidden_states=True)
        output.hidden_states[1].float().square().mean().backward()
        with torch.no_grad():
            evaluated = model.eval()(ids).logits
        results[reversible] = {
            "gradients": grads,
            "of a hidden state": full_gradients(model),
            "logits": {"training": output.logits.detach(), "evaluation": evaluated},
            "events": events,
        }
    return results


@pytest.mark.parametrize("output_dtype", OUTPUT_DTYPES.values(), ids=OUTPUT_DTYPES)
def test_mixed_precision_of_fsdp_is_ordinary_autograds(two_ranks, output_dtype):
    results = two_ranks.run(train_bfloat16, output_dtype)[0]
    assert_equal_tensors(results[True]["gradients"], results[False]["gradients"])
    assert_equal_tensors(results[True]["of a hidden state"], results[False]["of a hidden state"])
    logits = results[True]["logits"]
    assert torch.equal(logits["evaluation"], logits["training"])
    assert_equal_tensors(logits, results[False]["logits"])
    forward = FSDP_ORDER[:LAYERS]
    assert results[True]["events"][: 2 * len(FSDP_ORDER)] == 2 * FSDP_ORDER
    assert results[True]["events"][-LAYERS:] == forward

    exact, autocast = Case(BFLOAT16.changes), Case(BFLOAT16.changes, torch.float32, autocast=True)
    reference, error_of = train_rank_after_rank(exact), train_rank_after_rank(autocast)
    assert relative_error(results[True]["gradients"], reference) <= 2 * relative_error(error_of, reference)


def change_a_stream(rank):
    model = BFLOAT16.build()
    layers_of(model)[1].register_forward_hook(lambda layer, args, output: (output[0], 2 * output[1], *output[2:]))
    with pytest.raises(RuntimeError) as error:
        BFLOAT16.loss(shard_bfloat16(model, None), rows_of(rank))
    return str(error.value)


def test_a_stream_that_is_changed_beside_the_cast_is_noticed(two_ranks):
    for message in two_ranks.run(change_a_stream):
        assert "The output of layer 1 was changed on its way to layer 2" in message


# Checkpoints.


PLAIN = Case()


def train_some_steps(model, optimizer, ids, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        PLAIN.loss(model, ids).backward()
        optimizer.step()


def make_with_optimizer(seed=None, prepare=lambda model: model):
    model = PLAIN.build()
    if seed is not None:
        torch.manual_seed(seed)
        nn.init.normal_(model.lm_head.decoder.weight)
    model = prepare(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def save_checkpoint(folder, model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load_checkpoint(folder, model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def snapshot(model, optimizer):
    """Parameters and the optimizer's state, whole."""
    state = {name: full(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"{name} {key}": full(value) for key, value in optimizer.state[parameter].items()}
    return state


def train_and_save(rank, folder):
    model, optimizer = make_with_optimizer(prepare=shard)
    train_some_steps(model, optimizer, rows_of(rank), steps=2)
    save_checkpoint(folder / "sharded", model, optimizer)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "pretrained", state_dict=whole)
    saved = snapshot(model, optimizer)
    train_some_steps(model, optimizer, rows_of(rank), steps=1)
    return saved, full_gradients(model)


def load_and_train(rank, folder):
    model, optimizer = make_with_optimizer(seed=5, prepare=shard)
    load_checkpoint(folder, model, optimizer)
    loaded = snapshot(model, optimizer)
    train_some_steps(model, optimizer, rows_of(rank), steps=1)
    return loaded, full_gradients(model)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_sharded_checkpoints_move_between_one_process_and_two(two_ranks, tmp_path):
    (saved, next_gradients), _ = two_ranks.run(train_and_save, tmp_path)
    model, optimizer = make_with_optimizer(seed=4)
    load_checkpoint(tmp_path / "sharded", model, optimizer)
    assert_equal_tensors(snapshot(model, optimizer), saved)
    assert_equal_tensors(
        dict(ReformerForCausalLM.from_pretrained(tmp_path / "pretrained").named_parameters()),
        {name: parameter.detach() for name, parameter in model.named_parameters()},
    )
    train_some_steps(model, optimizer, rows_of(), steps=1)
    assert_close(gradients(model), next_gradients)

    save_checkpoint(tmp_path / "single", model, optimizer)
    loaded, next_gradients = two_ranks.run(load_and_train, tmp_path / "single")[0]
    assert_equal_tensors(loaded, snapshot(model, optimizer))
    train_some_steps(model, optimizer, rows_of(), steps=1)
    assert_close(gradients(model), next_gradients)
