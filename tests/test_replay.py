"""Backward of reversible layers runs them again in the state of forward, whatever is in them, and leaves no trace."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from reversible_models import HIDDEN, PROJECTIONS, gradients_of, layers_of, make, make_inputs
from tiny_models import DROPOUT, STACKS, assert_close, assert_equal_tensors
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from hf_reformer.modeling.layers.replay import Recording


MIXED = {"attn_layers": STACKS["mixed"], "chunk_size_feed_forward": 8}


def train(reversible, prepare, between=lambda model: None, forwards=1, **config):
    """Losses, gradients, buffers and random numbers of one step, whose model `between` changes before backward."""
    model = make(reversible, **MIXED | config)
    torch.manual_seed(2)
    model = prepare(model) or model
    inputs = make_inputs()
    torch.manual_seed(3)
    losses = [model(**inputs).loss for _ in range(forwards)]
    between(model)
    training = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    sum(losses).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == training
    results = {f"loss {i}": loss.detach() for i, loss in enumerate(losses)}
    buffers = {name: buffer.double() for name, buffer in model.named_buffers()}
    return results | buffers | gradients_of(model, inputs)


def assert_trains_like_ordinary_autograd(prepare, *args, **kwargs):
    expected, actual = (train(reversible, prepare, *args, **kwargs) for reversible in (False, True))
    assert_close(actual, expected)


# Random numbers of whatever draws them.


class Noise(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, hidden_states):
        return self.module(hidden_states) * (1 + torch.rand(HIDDEN, dtype=hidden_states.dtype))


class DropPath(Noise):
    """Leaves out whole rows of the batch."""

    def forward(self, hidden_states):
        kept = hidden_states.new_empty(len(hidden_states), 1, 1).bernoulli_(0.5)
        return self.module(hidden_states) * 2 * kept


def put_into_layers(kind):
    def prepare(model):
        for layer in layers_of(model):
            layer.attention.output = kind(layer.attention.output)
            layer.feed_forward.output = kind(layer.feed_forward.output)

    return prepare


def add_adapter(config_class):
    def prepare(model):
        config = config_class(r=2, alpha=2, rank_dropout=0.5, target_modules=PROJECTIONS, init_weights=False)
        return get_peft_model(model, config).train()

    return prepare


def drop_in_a_hook(model):
    for layer in layers_of(model):
        layer.feed_forward.dense.register_forward_hook(lambda module, args, output: nn.functional.dropout(output, 0.5))


DRAWING = {
    "noise": put_into_layers(Noise),
    "DropPath": put_into_layers(DropPath),
    "LoHa": add_adapter(LoHaConfig),
    "LoKr": add_adapter(LoKrConfig),
    "functional dropout": drop_in_a_hook,
}


@pytest.mark.parametrize("prepare", DRAWING.values(), ids=DRAWING)
def test_random_numbers_are_replayed_whoever_draws_them(prepare):
    assert_trains_like_ordinary_autograd(prepare)


# Training and evaluation.


def switch_one_dropout(model):
    layers_of(model)[1].feed_forward.output.dropout.eval()


@pytest.mark.parametrize(
    ("before", "between"),
    [
        (nn.Module.train, nn.Module.eval),
        (nn.Module.eval, nn.Module.train),
        (nn.Module.train, switch_one_dropout),
    ],
    ids=["to evaluation", "to training", "one dropout"],
)
def test_a_switch_between_forward_and_backward_changes_nothing(before, between):
    assert_trains_like_ordinary_autograd(lambda model: before(model) and None, between, **DROPOUT)


# State that a forward pass changes.


class RunningScale(nn.Module):
    """Divides by a running mean, which is a new tensor after each call."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, hidden_states):
        output = self.module(hidden_states)
        self.scale = (self.scale + output.detach().abs().mean()) / 2
        return output / self.scale


class BatchNorm(Noise):
    def __init__(self, module):
        super().__init__(module)
        self.norm = nn.BatchNorm1d(HIDDEN, momentum=None, dtype=torch.float64)

    def forward(self, hidden_states):
        output = self.module(hidden_states)
        return output + self.norm(output.mT).mT


def normalise_spectrum(normalise):
    def prepare(model):
        for layer in layers_of(model):
            normalise(layer.attention.output.dense)
            normalise(layer.feed_forward.dense.dense)
        model.double()

    return prepare


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize(
    "prepare",
    [
        normalise_spectrum(spectral_norm),
        normalise_spectrum(parametrizations.spectral_norm),
        put_into_layers(BatchNorm),
        put_into_layers(RunningScale),
    ],
    ids=["spectral_norm", "parametrised spectral_norm", "BatchNorm", "a new tensor"],
)
def test_buffers_that_a_forward_changes(prepare, forwards):
    """They move on once for each forward, and backward sees those of its own forward."""
    assert_trains_like_ordinary_autograd(prepare, forwards=forwards)


def test_backward_can_run_twice_on_buffers_that_change():
    model, inputs = make(True, **MIXED), make_inputs()
    normalise_spectrum(spectral_norm)(model)
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    first = {name: gradient.clone() for name, gradient in gradients_of(model, inputs).items()}
    loss.backward()
    assert_equal_tensors(gradients_of(model, inputs), {name: 2 * gradient for name, gradient in first.items()})


def test_only_what_changes_is_kept():
    module = nn.Sequential(spectral_norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 4)).eval())
    recording = Recording(module)
    with recording.recorded(torch.device("cpu")):
        module(torch.randn(3, 4))
    kept = [held for held in recording._buffers if held.before is not None]
    assert [held.name for held in kept] == ["weight_u", "weight_v"]
    assert all(held.place is module[0]._buffers for held in kept)


def test_cached_parametrisations_are_refused():
    model = make(True)
    normalise_spectrum(parametrizations.spectral_norm)(model)
    with parametrize.cached(), pytest.raises(ValueError, match=r"parametrize.cached.*config.reversible=False"):
        model(**make_inputs())
    make(False)(**make_inputs())


# Weights.


def test_other_weights_for_one_forward():
    """`functional_call` puts the model's own back before backward."""
    results = []
    for reversible in (False, True):
        model, inputs = make(reversible, **MIXED), make_inputs()
        weights = {name: (1.5 * weight).detach().requires_grad_() for name, weight in model.named_parameters()}
        torch.manual_seed(3)
        loss = torch.func.functional_call(model, weights, (), inputs).loss
        loss.backward()
        found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        results.append({"loss": loss.detach(), "inputs": inputs["inputs_embeds"].grad} | found)
        assert all(weight.grad is None for weight in model.parameters())
    assert_close(*reversed(results))


@pytest.mark.parametrize("reversible", [False, True])
def test_a_weight_changed_before_backward_is_an_error(reversible):
    model = make(reversible)
    loss = model(**make_inputs()).loss
    with torch.no_grad():
        layers_of(model)[0].feed_forward.dense.dense.weight.mul_(2)
    message = r"`weight` of a reversible layer.*after backward" if reversible else "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
