"""Rows moved to the front of a padded batch and back, and the token that stands for a row."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import DROPOUT, STACKS, make_model, random_ids

from hf_reformer import ReformerModel
from hf_reformer.modeling.ops.padding import first_real_token, last_real_token, pool, shift_rows


MASK = torch.tensor(
    [
        [True, True, True, True, True],
        [True, True, False, False, False],
        [False, False, True, True, True],
        [False, True, False, True, False],
        [False, False, False, False, False],
    ]
)


def test_first_and_last_real_token():
    assert first_real_token(MASK).tolist() == [0, 0, 2, 1, 0]
    assert last_real_token(MASK).tolist() == [4, 1, 4, 3, 0]


def test_first_real_token_of_a_long_row():
    """Of many equal values the first counts."""
    mask = torch.zeros(1, 100_000, dtype=torch.bool)
    mask[:, 777:] = True
    assert first_real_token(mask).tolist() == [777]
    assert last_real_token(mask).tolist() == [99_999]


@pytest.mark.parametrize("dim", [1, 2])
def test_shift_rows_rolls_each_row(dim):
    tensor, shift = torch.randn(3, 5, 6), torch.tensor([0, 2, 4])
    shifted = shift_rows(tensor, shift, dim=dim)
    for row in range(3):
        assert torch.equal(shifted[row], tensor[row].roll(-int(shift[row]), dims=dim - 1))
    assert torch.equal(shift_rows(shifted, -shift, dim=dim), tensor)


def test_shift_rows_of_one_row_for_all():
    positions = torch.arange(5)[None]
    assert shift_rows(positions, torch.tensor([0, 1, 3])).tolist() == [
        [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 0],
        [3, 4, 0, 1, 2],
    ]
    assert shift_rows(None, torch.tensor([1])) is None


def test_shift_rows_is_differentiable():
    tensor = torch.randn(3, 5, 2, requires_grad=True)
    shift, gradient = torch.tensor([0, 2, 4]), torch.randn(3, 5, 2)
    (actual,) = torch.autograd.grad(shift_rows(tensor, shift), tensor, gradient)
    assert torch.equal(actual, shift_rows(gradient, -shift))


def test_pool():
    hidden_states = torch.arange(25.0).view(5, 5, 1)
    causal, bidirectional = (SimpleNamespace(is_decoder=is_decoder, pad_token_id=0) for is_decoder in (True, False))
    ids = MASK.long() * 7
    for mask, input_ids in ((MASK, None), (MASK.long(), torch.ones_like(ids)), (None, ids)):
        assert pool(hidden_states, input_ids, mask, causal).flatten().tolist() == [4, 6, 14, 18, 20]
        assert pool(hidden_states, input_ids, mask, bidirectional).flatten().tolist() == [0, 5, 12, 16, 20]
    for config in (causal, SimpleNamespace(is_decoder=True, pad_token_id=None)):
        assert pool(hidden_states, None, None, config).flatten().tolist() == [4, 9, 14, 19, 24]


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_left_padding_is_right_padding(stack, circular):
    """In outputs, hidden states, attention maps and gradients, bit by bit, in training with dropout too."""
    model = make_model(ReformerModel, attn_layers=STACKS[stack], circular_look_around=circular, **DROPOUT).train()
    ids, lengths = random_ids(3, 40), torch.tensor([40, 23, 7])
    right = torch.arange(40) < lengths[:, None]
    shift = lengths - 40
    results = []
    for mask, row_ids in ((right, ids), (shift_rows(right, shift), shift_rows(ids, shift))):
        torch.manual_seed(5)
        model.zero_grad()
        output = model(row_ids, attention_mask=mask, output_hidden_states=True)
        back = [output.last_hidden_state, *output.hidden_states]
        if mask is not right:
            back = [shift_rows(tensor, -shift) for tensor in back]
        (back[0] * right[..., None]).pow(2).sum().backward()
        model.eval()
        maps = model(row_ids, attention_mask=mask, output_attentions=True).attentions
        model.train()
        if mask is not right:
            maps = [shift_rows(shift_rows(weights, -shift, dim=2), -shift, dim=3) for weights in maps]
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append([*(tensor[right] for tensor in back), *gradients, *maps])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
