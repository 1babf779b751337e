"""The mechanics of chunks against slow forms, element by element."""

import pytest
import torch

from hf_reformer.modeling.ops.chunking import (
    circular_offsets,
    gather_rows,
    look_adjacent,
    neighbour_exists,
    pad_mask,
    pad_rows,
    padded_to_multiple,
    scatter_to_map,
)


AROUND = [(0, 0), (1, 0), (0, 1), (2, 3), (5, 4)]


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_padded_to_multiple(multiple):
    for length in range(1, 30):
        padded = padded_to_multiple(length, multiple)
        assert padded % multiple == 0
        assert length <= padded < length + multiple


@pytest.mark.parametrize("added", [0, 3])
def test_pad_rows(added):
    rows = torch.randn(2, 5, 3, 4)
    padded = pad_rows(rows, 5 + added)
    assert padded.shape == (2, 3, 5 + added, 4)
    assert torch.equal(padded[:, :, :5], rows.transpose(1, 2))
    assert not padded[:, :, 5:].any()


def test_pad_mask():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    device = mask.device
    assert torch.equal(pad_mask(mask, 2, 3, 3, device), mask)
    assert pad_mask(None, 2, 3, 5, device).tolist() == [[True, True, True, False, False]] * 2
    assert pad_mask(mask, 2, 3, 5, device).tolist() == [
        [True, False, True, False, False],
        [True, True, True, False, False],
    ]


@pytest.mark.parametrize("contiguous", [True, False])
def test_gather_rows(contiguous):
    rows = torch.randn(2, 7, 3, 4, dtype=torch.float64).transpose(1, 2)
    rows = (rows.contiguous() if contiguous else rows).requires_grad_()
    # Some rows several times, others never.
    index = torch.randint(6, (2, 3, 11))
    gathered = gather_rows(rows, index)
    gradient = torch.randn_like(gathered)
    (rows_grad,) = torch.autograd.grad(gathered, rows, gradient)
    expected_grad = torch.zeros(2, 3, 7, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            for m in range(11):
                assert torch.equal(gathered[b, h, m], rows[b, h, index[b, h, m]])
                expected_grad[b, h, index[b, h, m]] += gradient[b, h, m]
    torch.testing.assert_close(rows_grad, expected_grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("before", "after"), AROUND)
def test_look_adjacent_goes_round_the_circle(before, after):
    chunks = torch.randn(2, 3, 4, 5, 6)
    window = look_adjacent(chunks, circular_offsets(before, after, 4))
    for chunk in range(4):
        # Further round the circle than once is the chunk itself, as in stock Reformer.
        offsets = [offset if abs(offset) < 4 else 0 for offset in range(-before, after + 1)]
        neighbours = [chunks[:, :, (chunk + offset) % 4] for offset in offsets]
        assert torch.equal(window[:, :, chunk], torch.cat(neighbours, dim=2))


@pytest.mark.parametrize(("before", "after"), AROUND)
@pytest.mark.parametrize("rounds", [1, 3])
def test_neighbour_exists(rounds, before, after):
    chunks_per_round, chunk_length = 4, 2
    exists = neighbour_exists(
        rounds * chunks_per_round, chunks_per_round, before, after, chunk_length, torch.device("cpu")
    )
    assert exists.shape == (rounds * chunks_per_round, 1, (before + 1 + after) * chunk_length)
    for chunk in range(rounds * chunks_per_round):
        first = chunk // chunks_per_round * chunks_per_round
        expected = []
        for neighbour in range(chunk - before, chunk + after + 1):
            expected += [first <= neighbour < first + chunks_per_round] * chunk_length
        assert exists[chunk, 0].tolist() == expected


def test_scatter_to_map_adds_up_repeated_keys():
    length, chunk_length, window = 6, 3, 5
    positions = torch.stack([torch.randperm(length) for _ in range(4)]).view(2, 2, 2, chunk_length)
    key_positions = torch.randint(length, (2, 2, 2, window))
    probabilities = torch.rand(2, 2, 2, chunk_length, window, dtype=torch.float64)
    dense = scatter_to_map(probabilities, positions, key_positions, length)
    expected = torch.zeros(2, 2, length, length, dtype=torch.float64)
    for b, h, n, c, w in torch.cartesian_prod(*map(torch.arange, probabilities.shape)):
        expected[b, h, positions[b, h, n, c], key_positions[b, h, n, w]] += probabilities[b, h, n, c, w]
    torch.testing.assert_close(dense, expected, rtol=1e-14, atol=1e-14)
