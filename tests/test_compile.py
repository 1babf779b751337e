"""torch.compile of the layers and of whole models trains with the same gradients."""

import pytest
import torch
from reversible_models import BATCH, LENGTH, gradients_of, layers_of, make, make_inputs
from tiny_models import DROPOUT, NO_ATTENTION_DROPOUT, POSITIONS, STACKS, TINY, assert_close, random_ids
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_reformer import ReformerForMaskedLM, ReformerForSequenceClassification
from hf_reformer.modeling.kernels import triton_launch
from hf_reformer.modeling.layers import reversible as reversible_module
from hf_reformer.modeling.layers.reversible import ReversibleTape
from hf_reformer.modeling.layers.traced_stack import TracedStack


pytestmark = pytest.mark.compile


MIXED = {"attn_layers": STACKS["mixed"]}
# What is compiled is eager code, so that is what it equals bit by bit.
EAGER = {"attn_implementation": "eager"}
RIGHT = torch.arange(LENGTH) < torch.tensor([LENGTH, 20])[:, None]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


class Counter:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.programs = []

    @property
    def graphs(self):
        return len(self.programs)

    def __call__(self, graph, inputs):
        self.programs.append(graph)
        return graph.forward


def one_seed_per_call(graph, inputs):
    """A backend that draws from the default generator once for each call of a graph, as Inductor does on a GPU."""

    def run(*args):
        seed = torch.randint(2**31, ()).item()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return graph(*args)

    return run


def compile_layers(model, backend="aot_eager"):
    """Attention and feed-forward of each layer, each as a single graph."""
    for layer in layers_of(model):
        layer.attention.compile(fullgraph=True, backend=backend)
        layer.feed_forward.compile(fullgraph=True, backend=backend)


def train(model, call=None, autocast=False, length=LENGTH, **inputs):
    """Loss, gradients, and the generator's state after one step."""
    torch.manual_seed(3)
    inputs = make_inputs(length=length, dtype=model.dtype) | inputs
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (model if call is None else call)(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(model, inputs)}, torch.get_rng_state()


def assert_equal_training(actual, expected):
    assert_close(actual[0], expected[0])


@pytest.fixture
def streams(monkeypatch):
    """What each layer took in, and what its backward recovered of it: two dictionaries by layer."""
    taken, recovered = {}, {}
    invert_half, verify_input = reversible_module._invert, ReversibleTape.verify_input

    @torch.compiler.disable
    def take(tape, layer_idx, streams):
        streams = verify_input(tape, layer_idx, streams)
        taken[layer_idx] = torch.stack(streams).detach()
        return streams

    def invert(call, half, *args):
        streams, *rest = invert_half(call, half, *args)
        if half is call.halves[0]:
            recovered[call.layer_idx] = torch.stack(streams)
        return streams, *rest

    monkeypatch.setattr(ReversibleTape, "verify_input", take)
    monkeypatch.setattr(reversible_module, "_invert", invert)
    return taken, recovered


# Attention and feed-forward compiled, layer by layer.


LSH = {"attn_layers": ["lsh"]}
CASES = {
    "causal": ("aot_eager", MIXED, {}),
    "bidirectional": ("eager", MIXED | {"model_class": ReformerForMaskedLM}, {"attention_mask": RIGHT}),
    "padding": ("eager", MIXED, {"attention_mask": RIGHT.flip(1)}),
    "without the circle, attention maps": (
        "eager",
        MIXED | {"circular_look_around": False},
        {"attention_mask": RIGHT, "output_attentions": True},
    ),
    "chunked feed-forward": ("aot_eager", {"attn_layers": ["local"], "chunk_size_feed_forward": 8}, {}),
    "as in the paper": ("eager", LSH | {"attend_across_buckets": False, "allow_duplicate_attention": False}, {}),
    "one round, factors": ("eager", LSH | {"num_hashes": 1, "num_buckets": [4, 6]}, {}),
    "successors, buckets by length": (
        "eager",
        LSH | {"lsh_value_shift": 1, "num_buckets": None},
        {"attention_mask": RIGHT.flip(1)},
    ),
    "rotary positions": ("eager", MIXED | POSITIONS["LSH rotary"], {"attention_mask": RIGHT.flip(1)}),
    "exact attention": ("eager", LSH | {"full_attention_threshold": 64}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_layers_train_with_the_same_gradients(case):
    backend, config, inputs = CASES[case]
    config = DROPOUT | config
    expected = train(make(False, **config), **inputs)
    model = make(True, **config)
    compile_layers(model, backend)
    actual = train(model, **inputs)
    assert_equal_training(actual, expected)
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
def test_kernels_are_steps_of_the_program(implementation):
    if implementation == "triton" and not triton_launch.IS_INTERPRETED and not torch.cuda.is_available():
        pytest.skip("Triton is not installed, or not set to its interpreter")
    config = NO_ATTENTION_DROPOUT | {"attn_layers": ["lsh", "local"], "attention_head_size": 32}
    config |= {"attn_implementation": implementation, "dtype": torch.float32, "num_hashes": 1}
    model, counter = make(False, **config), Counter()
    # The interpreter of Triton is slow.
    expected = train(make(False, **config), length=20)
    for layer in layers_of(model):
        layer.attention.compile(backend=counter, fullgraph=True)
    assert_equal_training(train(model, length=20), expected)
    assert counter.graphs == 2
    graphs = [part.graph for program in counter.programs for part in program.modules() if hasattr(part, "graph")]
    called = {node.target for graph in graphs for node in graph.nodes}
    names = {"sdpa": ["lsh_sdpa", "local_sdpa"], "triton": ["triton_attention", "triton_hash", "triton_sort"]}
    assert {getattr(torch.ops.hf_reformer, name).default for name in names[implementation]} <= called


def test_compiled_layers_under_ordinary_autograd():
    config = LSH | DROPOUT | {"chunk_size_feed_forward": 8}
    model = make(False, **config)
    compile_layers(model)
    assert_equal_training(train(model), train(make(False, **config)))


@pytest.mark.parametrize("reversible", [False, True])
def test_compiled_layers_under_autocast(reversible):
    """Bit by bit: the steps are the same, and so are the casts."""
    config = MIXED | DROPOUT | {"dtype": torch.float32}
    expected, _ = train(make(reversible, **config), autocast=True)
    model = make(reversible, **config)
    compile_layers(model, "eager")
    actual, _ = train(model, autocast=True)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_compiled_layers_in_evaluation():
    model = make(True, **MIXED, **EAGER).eval()
    with torch.no_grad():
        expected = model(**make_inputs()).logits
        compile_layers(model, "eager")
        assert torch.equal(model(**make_inputs()).logits, expected)


def test_layers_of_a_kind_share_graphs_and_lengths_share_them_too():
    counter = Counter()
    model = make(True, attn_layers=STACKS["mixed"] * 2, num_hashes=1, **DROPOUT)
    compile_layers(model, counter)
    train(model)
    # Local, full, feed-forward; LSH that hashes, and that repeats with given buckets.
    assert counter.graphs == 5
    train(model)
    assert counter.graphs == 5
    train(model, length=LENGTH + 16)
    assert counter.graphs <= 10
    graphs = counter.graphs
    train(model, length=LENGTH + 60)
    assert counter.graphs == graphs


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["local", "full"])
def test_forward_runs_the_graph_of_backward(kind, autocast):
    """And no other: two graphs need not round alike or draw alike."""
    counter = Counter()
    model = make(True, dtype=torch.float32, attn_layers=[kind, kind], chunk_size_feed_forward=8)
    compile_layers(model, counter)
    train(model, autocast=autocast, length=32)
    assert counter.graphs == 2


@pytest.mark.parametrize("chunk_size", [0, 8])
def test_dropout_is_replayed_where_graphs_have_seeds_of_their_own(chunk_size):
    config = DROPOUT | {"attn_layers": ["lsh", "full"], "chunk_size_feed_forward": chunk_size}
    results = []
    for reversible in (False, True):
        model = make(reversible, **config)
        compile_layers(model, one_seed_per_call)
        results.append(train(model))
    assert_equal_training(*reversed(results))
    with pytest.raises(AssertionError):
        assert_equal_training(train(make(False, **config)), results[0])


def test_inductor_trains_lsh_with_the_same_gradients():
    config = LSH | {"num_hashes": 1}
    expected = train(make(False, **config), length=32)
    model = make(True, **config)
    compile_layers(model, "inductor")
    assert_equal_training(train(model, length=32), expected)


def test_inductor_inverts_bit_by_bit(streams):
    """Its dropout, too, whose random numbers are its own."""
    taken, recovered = streams
    model = make(True, dtype=torch.float32, attn_layers=["local"] * 6, chunk_size_feed_forward=16, **DROPOUT)
    compile_layers(model, "inductor")
    train(model, autocast=True, length=32)
    assert len(recovered) == 6
    for layer_idx, tensor in recovered.items():
        assert torch.equal(tensor, taken[layer_idx]), layer_idx


# Whole models compiled, as one program.


# Whether it is reversible, and its settings.
WHOLE = {
    "reversible": (True, MIXED | {"chunk_size_feed_forward": 8}),
    # What draws is not computed again.
    "reversible, dropout": (True, MIXED | DROPOUT),
    "ordinary, dropout": (False, MIXED | DROPOUT),
    "successors": (True, {"attn_layers": ["local", "lsh"], "lsh_value_shift": 1} | POSITIONS["LSH rotary"]),
    "mean of the streams, loss in pieces": (
        True,
        {"attn_layers": ["full"], "combine_streams": "mean", "exact_inversion": False, "chunk_size_lm_head": 8},
    ),
    "both ways": (True, {"attn_layers": ["lsh", "full"], "model_class": ReformerForMaskedLM}),
    "classifier": (True, {"attn_layers": ["local"], "model_class": ReformerForSequenceClassification}),
}


def labels_of(config):
    if config.get("model_class") is ReformerForSequenceClassification:
        return {"labels": torch.arange(BATCH) % 2}
    return {}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_model_trains_as_one_program(case):
    reversible, config = WHOLE[case]
    inputs = {"attention_mask": RIGHT.flip(1)} | labels_of(config)
    expected = train(make(False, **config), **inputs)
    model = make(reversible, **config)
    actual = train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), **inputs)
    assert_equal_training(actual, expected)
    # What comes next draws the same random numbers.
    assert torch.equal(actual[1], expected[1])


def test_a_whole_model_trains_under_autocast():
    """To the precision of bfloat16: the compiler rounds elsewhere."""
    config = {"attn_layers": ["local", "lsh"], "dtype": torch.float32}
    expected, _ = train(make(True, **config), autocast=True)
    model = make(True, **config)
    actual, _ = train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), autocast=True)
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= 2.0**-7 * tensor.norm(), name


def test_inductor_trains_a_whole_reversible_model():
    """Seeds decide the buckets, because Inductor draws random numbers of its own."""
    config = LSH | {"num_hashes": 1, "hash_seed": 3}
    (expected, _), model = train(make(False, **config)), make(True, **config)
    actual, _ = train(model, torch.compile(model, fullgraph=True))
    for name, tensor in expected.items():
        # The loss is in float32.
        assert (actual[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


@pytest.mark.parametrize("kind", ["lsh", "full"])
def test_a_compiled_reversible_model_stores_buckets_and_the_last_output(kind):
    """One more layer is no more than its buckets and the order that follows from them."""
    stored_bytes = []
    for depth in (1, 2):
        torch.compiler.reset()
        model = make(True, attn_layers=[kind] * depth)
        node = torch.compile(model, fullgraph=True, backend="aot_eager")(**make_inputs()).loss.grad_fn
        while "Compiled" not in node.name():
            node = node.next_functions[0][0]
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        tensors = [tensor for tensor in node.saved_tensors if tensor is not None]
        stored_bytes.append(sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in weights))
    padded_length = -(-LENGTH // TINY["lsh_attn_chunk_length"]) * TINY["lsh_attn_chunk_length"]
    buckets = BATCH * TINY["num_attention_heads"] * TINY["num_hashes"] * padded_length * 4
    assert stored_bytes[1] - stored_bytes[0] <= (2 * buckets if kind == "lsh" else 0)


def hook_a_layer(layers):
    layers[0].register_forward_hook(lambda module, inputs, output: None)


def add_noise(layers):
    layers[0].attention.output.dense.register_forward_hook(lambda module, inputs, output: output + torch.randn(32))


def add_an_adapter(layers):
    dense = layers[0].feed_forward.output
    dense.dense = nn.Sequential(dense.dense, nn.AlphaDropout(0.3))


def wrap_a_method(layers):
    forward = layers[0].attention.output.forward
    layers[0].attention.output.forward = lambda hidden_states: 2 * forward(hidden_states)


def share_a_weight(layers):
    layers[1].attention.self_attention.query.weight = layers[0].attention.self_attention.query.weight


CHANGES = [hook_a_layer, add_noise, add_an_adapter, wrap_a_method, share_a_weight]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_may_differ_the_second_time_is_not_computed_again(change):
    """Not by the same program: only what is known to compute the same, and nothing else."""
    config = {"attn_layers": ["local", "full"]}
    models = make(False, **config), make(True, **config)
    for model in models:
        change(layers_of(model))
    expected = train(models[0])
    assert_equal_training(train(models[1], torch.compile(models[1], backend="aot_eager")), expected)


@pytest.mark.parametrize("kind", ["local", "lsh", "full"])
def test_a_program_that_broke_in_two_inverts_as_well(kind):
    """What `torch.compile` cannot trace runs as it is."""
    model = make(True, attn_layers=[kind] * 2, hash_seed=3)
    names = ("circle_length", "attention_mask", "full_attention_mask", "shift", "rotation")
    kwargs = dict.fromkeys(names) | {"return_weights": False}
    stack = TracedStack(model.reformer.encoder.layers, False, None, kwargs)
    found = []
    for reversible in (False, True):
        model.zero_grad()
        hidden_states = make_inputs()["inputs_embeds"]
        streams, _ = stack.run(hidden_states, reversible)
        torch.cat(streams).sin().sum().backward()
        found.append(gradients_of(model, {"inputs_embeds": hidden_states}))
    assert_close(*reversed(found))


def test_a_weight_that_changes_before_backward_is_noticed():
    model = make(True, attn_layers=["local"])
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(**make_inputs()).loss
    with torch.no_grad():
        layers_of(model)[0].attention.self_attention.query.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_compiled_transform_gets_derivatives_of_its_own():
    found = []
    for reversible in (False, True):
        model = make(reversible, attn_layers=["local"])
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        inputs = {name: tensor.detach() for name, tensor in make_inputs().items()}

        def loss(weights, model=model, inputs=inputs):
            return torch.func.functional_call(model, weights, (), inputs).loss

        found.append(torch.compile(torch.func.grad(loss), backend="aot_eager")(weights))
    assert_close(found[1], found[0])


def test_lengths_share_programs():
    """One for the first length, one for lengths that fill their chunks, one for those that do not."""
    counter, model = Counter(), make(True, attn_layers=["local", "lsh"])
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (48, 64, 77, 101):
        model.zero_grad()
        actual = train(model, compiled, length=length)
        model.zero_grad()
        assert_equal_training(actual, train(model, length=length))
    assert counter.graphs <= 3


def test_a_whole_model_evaluates():
    model = make(True, **MIXED).eval()
    with torch.no_grad():
        actual = torch.compile(model, backend="eager", fullgraph=True)(**make_inputs()).logits
        assert torch.equal(actual, model(**make_inputs()).logits)


@pytest.mark.parametrize("shape", [[8, 16], [4, 6, 7]])
def test_position_tables_learn_the_same_in_inductor(shape):
    """At a length that does not fill the rows of the grid."""
    dims = [8, 24] if len(shape) == 2 else [8, 8, 16]
    table = make(True, axial_pos_shape=shape, axial_pos_embds_dim=dims).reformer.embeddings.position_embeddings
    weights = torch.randn(BATCH, LENGTH, 32, dtype=torch.float64)

    def loss():
        return (weights * table(torch.arange(LENGTH).expand(BATCH, -1))).sum()

    expected = torch.autograd.grad(loss(), table.parameters())
    for actual, gradient in zip(torch.autograd.grad(torch.compile(loss)(), table.parameters()), expected, strict=True):
        assert (actual - gradient).norm() <= 1e-10 * gradient.norm()


def test_trainer_compiles(tmp_path):
    weights = []
    for compiles in (False, True):
        model = make(True, hash_seed=5, **LSH, **DROPOUT)
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            torch_compile=compiles,
            torch_compile_backend="aot_eager" if compiles else None,
        )
        torch.manual_seed(0)
        ids = random_ids(4, LENGTH)
        Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
        weights.append(dict(model.named_parameters()))
    assert_close(weights[1], weights[0])
