"""Axial position embeddings against their definition on the whole grid, and learned ones against a table."""

from math import prod

import pytest
import torch
from tiny_models import make_model, tiny_config

from hf_reformer import ReformerConfig, ReformerModel
from hf_reformer.modeling.layers.position_embeddings import AxialPositionEmbeddings, PositionEmbeddings, resized_table


GRIDS = {
    "one axis": ((12,), (32,)),
    "two axes": ((4, 6), (8, 24)),
    "three axes": ((3, 4, 2), (5, 17, 10)),
    "four axes": ((2, 3, 4, 2), (4, 4, 8, 16)),
    "axes of length one": ((1, 5, 1), (8, 8, 16)),
}


def make_axial(shape, dims, dropout=0.0):
    config = tiny_config(axial_pos_shape=shape, axial_pos_embds_dim=dims, hidden_dropout_prob=dropout)
    module = AxialPositionEmbeddings(config).double()
    for table in module.weights:
        torch.nn.init.normal_(table)
    return module


def whole_grid(tables, shape):
    """Every axis's table broadcast over the grid, side by side, positions in row-major order."""
    vectors = torch.cat([table.expand(*shape, -1) for table in tables], dim=-1)
    return vectors.reshape(prod(shape), -1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_definition(grid, training):
    shape, dims = GRIDS[grid]
    module = make_axial(shape, dims).train(training)
    assert module.shape == shape
    assert [tuple(table.shape) for table in module.weights] == [
        (*(size if axis == i else 1 for axis, size in enumerate(shape)), dims[i]) for i in range(len(dims))
    ]
    every_position, any_positions = torch.arange(prod(shape))[None], torch.randint(prod(shape), (3, 50))
    for position_ids in (every_position, every_position[:, :1], every_position[:, :5], any_positions):
        tables = [table.detach().clone().requires_grad_() for table in module.weights]
        expected = whole_grid(tables, shape)[position_ids]
        actual = module(position_ids)
        assert torch.equal(actual, expected)
        gradient = torch.randn_like(actual)
        for ours, theirs in zip(
            torch.autograd.grad(actual, list(module.weights), gradient),
            torch.autograd.grad(expected, tables, gradient),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", [-1, 24, 25, 1000])
def test_positions_outside_the_grid_fail(position):
    with pytest.raises(IndexError):
        make_axial((4, 6), (8, 24))(torch.tensor([[0, position]]))


@pytest.mark.parametrize("grid", ["one axis", "two axes", "three axes"])
def test_dropout_drops_whole_columns_of_the_grid(grid):
    shape, dims = GRIDS[grid]
    module = make_axial(shape, dims, dropout=0.25).train()
    position_ids = torch.stack([torch.randperm(prod(shape)) for _ in range(500)])
    expected = whole_grid(module.weights, shape)[position_ids]
    # Each vector is 0 or whole, and larger by what the dropped ones lack.
    factors = (module(position_ids) / expected).detach()
    torch.testing.assert_close(factors.amin(-1), factors.amax(-1))
    factors = factors[..., 0]
    kept = factors > 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.75))
    # The last coordinate is the column, and all positions of a row's column share their fate.
    columns = position_ids % shape[-1]
    kept_columns = torch.zeros(500, shape[-1], dtype=torch.bool).scatter(1, columns, kept)
    assert torch.equal(kept_columns.gather(1, columns), kept)
    # Five standard deviations around three quarters; and every row has a draw of its own.
    sigma = (0.25 * 0.75 / kept_columns.numel()) ** 0.5
    assert kept_columns.double().mean() == pytest.approx(0.75, abs=5 * sigma)
    assert len(kept_columns.unique(dim=0)) > 1
    assert (kept_columns.double().mean(0) - 0.75).abs().max() < 5 * (0.25 * 0.75 / 500) ** 0.5

    assert torch.equal(module.eval()(position_ids), expected)


def test_dropout_of_everything():
    module = make_axial((4, 6), (8, 24), dropout=1.0).train()
    assert not module(torch.arange(24)[None]).any()


@pytest.mark.parametrize("shape", [(2, 3), (4, 6), (7, 2), (9, 13)])
def test_axial_resizing_crops_and_starts_again(shape):
    module = make_axial((4, 6), (8, 24))
    module.weights[1].requires_grad_(False)
    old = [table.detach().clone() for table in module.weights]
    module.resize(list(shape))
    assert module.shape == shape
    assert [table.requires_grad for table in module.weights] == [True, False]
    for axis, table in enumerate(module.weights):
        for i in range(shape[axis]):
            assert torch.equal(table.select(axis, i), old[axis].select(axis, i % old[axis].shape[axis]))
    position_ids = torch.arange(prod(shape))[None]
    assert torch.equal(module(position_ids)[0], whole_grid(module.weights, shape))


@pytest.mark.parametrize("shape", [24, (24,), (4, 6, 1), (4, 0), ()])
def test_axial_resizing_keeps_the_number_of_axes(shape):
    with pytest.raises(ValueError, match=r"2 axes of lengths \[4, 6\] .* one positive length per axis"):
        make_axial((4, 6), (8, 24)).resize(shape)


def make_learned(dropout=0.0):
    return PositionEmbeddings(
        tiny_config(axial_pos_embds=False, max_position_embeddings=10, hidden_dropout_prob=dropout)
    ).double()


def test_learned_positions():
    module = make_learned().train()
    assert module.shape == 10
    position_ids = torch.randint(10, (3, 7))
    output = module(position_ids)
    assert torch.equal(output, module.embedding.weight[position_ids])
    output.sum().backward()
    counts = torch.bincount(position_ids.flatten(), minlength=10)
    assert torch.equal(module.embedding.weight.grad, counts[:, None].double().expand(-1, 32))
    for position in (-1, 10):
        with pytest.raises(IndexError):
            module(torch.tensor([[position]]))


def test_dropout_of_learned_positions():
    module = make_learned(dropout=0.25).train()
    position_ids = torch.arange(10).expand(100, -1)
    output, expected = module(position_ids), module.embedding.weight[position_ids]
    kept = output != 0
    torch.testing.assert_close(output[kept], expected[kept] / 0.75)
    assert kept.double().mean() == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / 32000) ** 0.5)
    assert torch.equal(module.eval()(position_ids), expected)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("length", [1, 4, 10, 25])
def test_learned_resizing_crops_and_starts_again(length, trained):
    module = make_learned()
    module.embedding.weight.requires_grad_(trained)
    old = module.embedding.weight.detach().clone()
    module.resize(length)
    assert module.shape == length
    assert module.embedding.weight.requires_grad == trained
    assert torch.equal(module.embedding.weight, old[torch.arange(length) % 10])


@pytest.mark.parametrize("length", [0, -3, (4, 6), 2.0])
def test_learned_resizing_takes_a_number(length):
    with pytest.raises(ValueError, match="must be a positive integer, but got"):
        make_learned().resize(length)


def test_a_resized_table_is_a_copy():
    table = torch.randn(3, 1, 4)
    resized_table(table, 2, 0).zero_()
    assert table.all()


@pytest.mark.parametrize("length", [1, 17, 100, 128])
@pytest.mark.parametrize("training", [True, False])
def test_any_length_up_to_the_grid(length, training):
    """The grid of 8 x 16 positions serves every length, in training too."""
    model = make_model(ReformerModel).train(training)
    ids = torch.randint(50, (2, length))
    embeddings = model.embeddings(ids)
    tables = whole_grid(model.embeddings.position_embeddings.weights, (8, 16))
    expected = model.embeddings.word_embeddings.weight[ids] + tables[:length]
    assert torch.equal(embeddings, expected)


@pytest.mark.parametrize("kind", ["axial", "learned", "rotary", "none"])
def test_one_of_two_settings_names_the_kind_of_positions(kind):
    config = ReformerConfig(position_embedding_type=kind)
    assert (config.position_kind, config.axial_pos_embds) == (kind, kind == "axial")
    assert ReformerConfig(axial_pos_embds=config.axial_pos_embds).position_kind == (
        "axial" if kind == "axial" else "learned"
    )
