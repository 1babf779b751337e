"""Rows without their padding and back, and the token that stands for a row."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import DROPOUT, STACKS, make_model, random_ids

from hf_reformer import ReformerModel
from hf_reformer.modeling.ops.padding import first_real_token, last_real_token, pool
from hf_reformer.modeling.ops.row_layout import RowLayout


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


def test_rows_without_their_padding():
    layout = RowLayout.of_mask(MASK)
    tokens = torch.arange(5)[None]
    expected = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [2, 3, 4, 0, 1], [1, 3, 0, 2, 4], [0, 1, 2, 3, 4]]
    assert layout.into(tokens).tolist() == expected
    # Padding behind a token shows that token.
    shown = [[0, 1, 2, 3, 4], [0, 1, 1, 1, 1], [0, 1, 2, 3, 4], [0, 1, 1, 3, 3], [0, 1, 2, 3, 4]]
    assert layout.back(layout.into(tokens)).tolist() == shown
    for shape, dim in (((5, 5, 2), 1), ((5, 3, 5), 2), ((5, 2, 3, 5), 3)):
        tensor = torch.randn(shape)
        back = layout.back(layout.into(tensor, dim), dim)
        for row, columns in enumerate(shown):
            assert torch.equal(back[row], tensor[row].index_select(dim - 1, torch.tensor(columns)))
    assert layout.has_place.tolist() == [[place == here for here, place in enumerate(row)] for row in shown]
    assert layout.is_taken.sum(1).tolist() == layout.has_place.sum(1).tolist()


def test_pool():
    hidden_states = torch.arange(25.0).view(5, 5, 1)
    settings = {"pad_token_id": 0, "classifier_pooling": "token"}
    causal, bidirectional = (SimpleNamespace(is_decoder=is_decoder, **settings) for is_decoder in (True, False))
    ids = MASK.long() * 7
    for mask, input_ids in ((MASK, None), (MASK.long(), torch.ones_like(ids)), (None, ids)):
        assert pool(hidden_states, input_ids, mask, causal).flatten().tolist() == [4, 6, 14, 18, 20]
        assert pool(hidden_states, input_ids, mask, bidirectional).flatten().tolist() == [0, 5, 12, 16, 20]
    for config in (causal, SimpleNamespace(is_decoder=True, pad_token_id=None, classifier_pooling="token")):
        assert pool(hidden_states, None, None, config).flatten().tolist() == [4, 9, 14, 19, 24]


@pytest.mark.parametrize("is_decoder", [True, False])
def test_pool_of_all_tokens(is_decoder):
    config = SimpleNamespace(is_decoder=is_decoder, pad_token_id=0, classifier_pooling="mean")
    hidden_states = torch.arange(50.0).view(5, 5, 2)
    # What stands in the place of padding does not count, whatever it is.
    padded = hidden_states.masked_fill(~MASK[..., None], torch.nan)
    expected = torch.stack(
        [row[real].sum(0) / max(1, len(row[real])) for row, real in zip(hidden_states, MASK, strict=True)]
    )
    ids = MASK.long() * 7
    for mask, input_ids in ((MASK, None), (MASK.long(), torch.ones_like(ids)), (None, ids)):
        torch.testing.assert_close(pool(padded, input_ids, mask, config), expected)
    torch.testing.assert_close(pool(hidden_states, None, None, config), hidden_states.mean(1))
    numbers = torch.tensor([[1, 1, 2, 2, 2], [0, 1, 1, 1, 0], [1, 2, 3, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    of_documents = [
        row[kind == number].mean(0)
        for row, kind in zip(hidden_states, numbers, strict=True)
        for number in kind[kind > 0].unique()
    ]
    torch.testing.assert_close(pool(hidden_states, None, None, config, numbers), torch.stack(of_documents))


def roll_rows(tensor, shift, dim=1):
    """Each row moved by its number of places to the right."""
    return torch.stack([row.roll(int(places), dims=dim - 1) for row, places in zip(tensor, shift, strict=True)])


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_left_padding_is_right_padding(stack, circular):
    """In outputs, hidden states, attention maps and gradients, bit by bit, in training with dropout too."""
    model = make_model(ReformerModel, attn_layers=STACKS[stack], circular_look_around=circular, **DROPOUT).train()
    ids, lengths = random_ids(3, 40), torch.tensor([40, 23, 7])
    right = torch.arange(40) < lengths[:, None]
    shift = 40 - lengths
    results = []
    for mask, row_ids in ((right, ids), (roll_rows(right, shift), roll_rows(ids, shift))):
        torch.manual_seed(5)
        model.zero_grad()
        output = model(row_ids, attention_mask=mask, output_hidden_states=True)
        back = [output.last_hidden_state, *output.hidden_states]
        if mask is not right:
            back = [roll_rows(tensor, -shift) for tensor in back]
        (back[0] * right[..., None]).pow(2).sum().backward()
        model.eval()
        maps = model(row_ids, attention_mask=mask, output_attentions=True).attentions
        model.train()
        if mask is not right:
            maps = [roll_rows(roll_rows(weights, -shift, dim=2), -shift, dim=3) for weights in maps]
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        of_real = right[:, None, :, None] & right[:, None, None]
        results.append([*(tensor[right] for tensor in back), *gradients, *(weights * of_real for weights in maps)])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
