"""The language-model loss in chunks: cross-entropy over the whole sequence, without the whole logits."""

import pytest
import torch
from allocations import Allocations
from tiny_models import VOCAB, make_model, random_ids
from torch import nn

from hf_reformer import ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.modeling.lm_loss import chunked_cross_entropy


LENGTH, SIZE, CLASSES = 13, 6, 11


class Head(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        weight = torch.randn(CLASSES, SIZE, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight.to(dtype))
        self.bias = nn.Parameter(torch.randn(CLASSES, generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, hidden_states):
        return nn.functional.linear(hidden_states, self.weight, self.bias)


def make_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(2, LENGTH, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(CLASSES, (2, LENGTH), generator=generator)
    labels[0, 3:6] = labels[1, -1] = -100
    return hidden_states, labels


def whole_cross_entropy(hidden_states, head, labels, *, num_items_in_batch=None, ignore_index=-100):
    logits = head(hidden_states)
    # In half precision transformers' loss computes in float32, too.
    logits = logits.float() if logits.dtype != torch.float64 else logits
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction=reduction
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def run(function, hidden_states, labels, dtype=torch.float64, **options):
    """Loss, and gradients of the hidden states, the weight and the bias."""
    hidden_states, head = hidden_states.detach().clone().to(dtype).requires_grad_(), Head(dtype)
    loss = function(hidden_states, head, labels, **options)
    loss.backward()
    return loss.detach(), hidden_states.grad, head.weight.grad, head.bias.grad


@pytest.mark.parametrize(
    "options", [{}, {"ignore_index": 3}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(50)}], ids=str
)
@pytest.mark.parametrize("chunk_size", [1, 4, 12, 13, 14, 100])
def test_equals_the_whole(chunk_size, options):
    hidden_states, labels = make_inputs()
    if "ignore_index" in options:
        labels = labels.masked_fill(labels == -100, 3)
    expected = run(whole_cross_entropy, hidden_states, labels, **options)
    actual = run(chunked_cross_entropy, hidden_states, labels, chunk_size=chunk_size, **options)
    assert expected[0].dtype == actual[0].dtype == torch.float64
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_non_contiguous_inputs():
    hidden_states, labels = make_inputs()
    expected = run(whole_cross_entropy, hidden_states, labels)
    strided = hidden_states.mT.contiguous().mT, labels.T.contiguous().T
    for ours, theirs in zip(run(chunked_cross_entropy, *strided, chunk_size=4), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_items", [None, 0, 5])
def test_nothing_but_ignored_labels(num_items):
    """The mean of nothing is not a number, as PyTorch has it; the gradients are zero and harm no weight."""
    hidden_states, labels = make_inputs()
    labels = torch.full_like(labels, -100)
    expected = run(whole_cross_entropy, hidden_states, labels, num_items_in_batch=num_items)
    actual = run(chunked_cross_entropy, hidden_states, labels, chunk_size=4, num_items_in_batch=num_items)
    assert torch.equal(actual[0].isnan(), expected[0].isnan())
    assert num_items != 5 or actual[0] == 0
    assert not any(gradient.any() for gradient in actual[1:])


def test_pieces_of_ignored_labels_only():
    hidden_states, labels = make_inputs()
    labels[:, :8] = -100
    expected = run(whole_cross_entropy, hidden_states, labels)
    for ours, theirs in zip(run(chunked_cross_entropy, hidden_states, labels, chunk_size=4), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_the_whole_in_it(dtype):
    hidden_states, labels = make_inputs()
    exact = run(whole_cross_entropy, hidden_states, labels)
    whole = run(whole_cross_entropy, hidden_states, labels, dtype)
    actual = run(chunked_cross_entropy, hidden_states, labels, dtype, chunk_size=4)
    assert actual[0].dtype == torch.float32
    for ours, theirs, truth in zip(actual, whole, exact, strict=True):
        assert ours.dtype == theirs.dtype
        # The loss is one number, whose own error may happen to be none: there the rounding of the format counts.
        rounding = torch.finfo(ours.dtype).eps * truth.norm()
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + rounding


def test_autocast_with_the_backward_outside():
    hidden_states, labels = make_inputs(torch.float32)
    exact = run(whole_cross_entropy, hidden_states.double(), labels)
    results = []
    for function, options in ((whole_cross_entropy, {}), (chunked_cross_entropy, {"chunk_size": 4})):
        leaf, head = hidden_states.clone().requires_grad_(), Head(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(leaf, head, labels, **options)
        loss.backward()
        results.append((leaf.grad, head.weight.grad, head.bias.grad))
    for theirs, ours, truth in zip(*results, exact[1:], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


def test_the_logits_never_exist():
    """In forward and backward no tensor is larger than the logits of one piece or than the weights."""
    length, size, classes = 64, 4, 100
    hidden_states = torch.randn(2, length, size, requires_grad=True)
    head, labels = nn.Linear(size, classes), torch.randint(classes, (2, length))
    with Allocations() as allocations:
        chunked_cross_entropy(hidden_states, head, labels, chunk_size=8).backward()
    assert allocations.largest == 2 * 8 * classes
    # And they go, piece by piece: never as many bytes as those of all logits.
    assert allocations.peak < 2 * length * classes * 4


MODELS = [ReformerForCausalLM, ReformerForMaskedLM]


def model_results(model_class, chunk_size, ids, labels, **arguments):
    model = make_model(model_class, chunk_size_lm_head=chunk_size, hash_seed=2).train()
    output = model(ids, labels=labels, **arguments)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("arguments", [{}, {"num_items_in_batch": torch.tensor(9)}], ids=["mean", "items"])
@pytest.mark.parametrize("chunk_size", [1, 16, 1000])
@pytest.mark.parametrize("model_class", MODELS)
def test_models(model_class, chunk_size, arguments):
    ids = random_ids(2, 37)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    whole, expected = model_results(model_class, 0, ids, labels, **arguments)
    chunked, actual = model_results(model_class, chunk_size, ids, labels, **arguments)
    assert whole.logits.shape == (2, 37, VOCAB)
    assert chunked.logits is None
    # In float32, as transformers computes its loss.
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_what_the_labels_are_compared_with(chunk_size):
    """The causal model predicts the next token, the masked one the same; `shift_labels` are taken as they are."""
    ids, labels = random_ids(2, 37), random_ids(2, 37)
    for model_class in MODELS:
        model = make_model(model_class)
        log_probabilities = model(ids).logits.log_softmax(-1)
        causal = model_class is ReformerForCausalLM
        rows = log_probabilities[:, :-1] if causal else log_probabilities
        expected = -rows.gather(2, labels[:, int(causal) :, None]).mean()
        model.config.chunk_size_lm_head = chunk_size
        torch.testing.assert_close(model(ids, labels=labels).loss, expected)
        if causal:
            shifted = -log_probabilities.gather(2, labels[..., None]).mean()
            torch.testing.assert_close(model(ids, labels=ids, shift_labels=labels).loss, shifted)


@pytest.mark.parametrize("model_class", MODELS)
def test_no_tensor_of_a_model_in_training_holds_all_logits(model_class):
    model = make_model(
        model_class, vocab_size=1000, chunk_size_lm_head=8, local_attn_chunk_length=8, lsh_attn_chunk_length=8
    ).train()
    ids = random_ids(1, 120)
    with Allocations() as allocations:
        model(ids, labels=ids).loss.backward()
    assert allocations.largest == max(parameter.numel() for parameter in model.parameters()) < 120 * 1000
