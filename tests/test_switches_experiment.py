"""Switches after training, the time of a step, other values of keys, and what a GPU is for: tiny runs, and oracles."""

import json
from itertools import chain, count, product
from types import SimpleNamespace

import pytest
import torch
from text_experiments import SMALL, has_picture, small

from hf_reformer.modeling.ops.lsh_hashing import num_buckets_of
from hf_reformer.modeling.ops.lsh_reference import lsh_attention_reference
from scripts import run_experiment
from scripts.experiments import gpu, masked, recall, step_time, switches, text_models
from scripts.experiments.text_training import Training
from scripts.experiments.value_variants import BothNeighbours, HalfShifted, HalfTwoOn, LearnedMix


LENGTH = 40
# Windows that reach everything, so that buckets alone decide.
REACHING = {"lsh_attn_chunk_length": 8, "lsh_num_chunks_before": 8, "num_buckets": 4}


@pytest.mark.slow
def test_switches_are_measured_once_and_tabulated(text_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(text_models.CONTENDERS, "lsh, successors", small(**text_models.SHIFTED))
    results, twins = tmp_path / "switches", tmp_path / "twins"
    arguments = ["switches", "--only", "lsh, successors", "--seeds", "0", "--steps", "2", "--context_length", "128"]
    arguments += ["--grid_steps", "1", "--text_path", text_folder, "--results", str(results), "--twins", str(twins)]
    run_experiment.main(arguments)
    [path] = results.glob("*.json")
    record = json.loads(path.read_text())
    assert record["variants"].keys() == switches.VARIANTS.keys()
    trained = record["variants"][switches.WINDOWS]
    evaluated = json.loads((twins / path.name).read_text())["evaluations"][-1]
    assert abs(trained["bits_per_byte"] - evaluated["bits_per_byte"]) < 1e-4
    for variant in ("chunks of 128", "chunks of 256", "the first 1,024 bytes exact"):
        # No longer than a chunk, a text is attended to exactly.
        measured = record["variants"][variant]
        assert abs(measured["bits_per_byte"] - record["variants"]["dense"]["bits_per_byte"]) < 1e-5
        assert all(share == pytest.approx(1) for shares in measured["recall"].values() for share in shares)
    assert 0 < trained["recall"]["weight"][0] < 1
    assert switches.tables(switches.read_runs(results)) in capsys.readouterr().out
    assert has_picture(tmp_path / "switches.png")

    monkeypatch.setattr(Training, "_train", lambda *_: pytest.fail("it was trained again"))
    run_experiment.main(arguments)
    run_experiment.main(["switches", "--report", "--results", str(results)])


def test_the_time_of_a_step_is_measured_by_length(text_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_time, "REPEATS", 2)
    shifted, names = text_models.SHIFTED, (*step_time.OURS, *step_time.DENSE)
    for name in step_time.OURS:
        monkeypatch.setitem(text_models.CONTENDERS, name, small(**shifted))
    dense = (small(**shifted, full_attention_threshold=4096), small(["local", "full"]))
    for name, make_model in zip(step_time.DENSE, dense, strict=True):
        monkeypatch.setitem(text_models.CONTENDERS, name, make_model)
    results = tmp_path / "switches"
    run_experiment.main(["switches", "--lengths", "128", "256", "--results", str(results)])
    records = step_time.read(results / "step_time")
    assert [record["length"] for record in records] == [128, 256]
    times = [record[key][name] for record in records for key in step_time.PASSES for name in names]
    assert {entry["runs"] for entry in times} == {2}
    printed = capsys.readouterr().out
    assert "| the model, CPU ms | 128 | 256 |" in printed and step_time.crossovers(records)[0] in printed
    assert has_picture(tmp_path / "switches_step_time.png")
    monkeypatch.setattr(step_time, "measure", lambda length: pytest.fail(f"{length} was measured again"))
    run_experiment.main(["switches", "--lengths", "128", "--results", str(results)])


@pytest.fixture
def model():
    return small(["local", "lsh", "lsh"], lsh_attn_chunk_length=8, num_buckets=4)(64).eval()


def test_keys_that_are_met_are_those_of_the_oracle(model):
    """The reference's output is its map where values are unit vectors, and each weight counts where scores are 0."""
    ids = torch.randint(0, 256, (1, 64))
    kinds = {"windows": {}, "own bucket only": switches.CHUNKS, "circle": switches.STOCK}
    for rounds, (name, changes) in product((1, 3), kinds.items()):
        twin = switches.with_settings(model, {"lsh_attn_chunk_length": 8, "num_hashes": rounds} | changes)
        layer, hidden_states = recall.lsh_layers(twin)[0], recall.inputs_of_lsh_layers(model, ids)[0]
        met = recall.keys_met(layer, hidden_states)
        circle_length = 64 if twin.config.circular_look_around else None
        rotations = layer.draw_rotations(64, circle_length, None, hidden_states.device)
        buckets = layer(hidden_states, circle_length=circle_length, rotations=rotations)[2]
        unit_vectors = torch.eye(64).double()[None, :, None].expand(-1, -1, 2, -1)
        expected = lsh_attention_reference(
            torch.zeros_like(unit_vectors), unit_vectors, buckets, **layer_options(layer)
        )
        expected = expected.transpose(1, 2) > 0
        if twin.config.lsh_sliding_window:
            expected[:, :, :8] = torch.eye(64).bool()[:8]
            expected[:, :, 1:8] = torch.ones(64, 64).tril(-1).bool()[1:8]
        assert torch.equal(met, expected), name


def layer_options(layer):
    config = layer.config
    return {
        "chunk_length": config.lsh_attn_chunk_length,
        "causal": True,
        "circular_look_around": config.circular_look_around,
        "attend_across_buckets": config.attend_across_buckets,
        "sliding_window": config.lsh_sliding_window,
    }


def test_recall_is_one_where_everything_is_met(model):
    changes = {
        "dense": {"full_attention_threshold": 64},
        "one chunk": switches.ACROSS | {"lsh_attn_chunk_length": 64},
        "hashed": {"lsh_attn_chunk_length": 8, "buckets_per_chunk": 0.5},
        "more rounds": {"lsh_attn_chunk_length": 8, "buckets_per_chunk": 0.5, "num_hashes": 8},
    }
    twins = {name: switches.with_settings(model, settings) for name, settings in changes.items()}
    shares = recall.recalls(model, twins, torch.randint(0, 256, (2, 64)))
    for name in ("dense", "one chunk"):
        assert all(share == pytest.approx(1, abs=1e-12) for of_all in shares[name].values() for share in of_all)
    both = (chain(*shares[name].values()) for name in ("hashed", "more rounds"))
    for hashed, more in zip(*both, strict=True):
        assert 0 < hashed < more <= 1
    assert set(shares["dense"]) == set(switches.RECALLS)


def test_baselines_of_recall_are_as_many_keys():
    masks = recall.baselines(200)
    counts = torch.arange(200).clamp(max=recall.NUM_KEYS)
    for mask in masks.values():
        assert torch.equal(mask[0].sum(1), counts) and not mask[0].triu().any()
    assert masks[recall.NEAREST][0, 199].nonzero().min() == 199 - recall.NUM_KEYS
    assert masks[recall.RANDOM][0, 199].nonzero().min() < 100


def test_recall_counts_weight_and_largest_keys():
    weights = torch.zeros(1, 10, 10)
    weights[0, 8:, :8] = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1]) / 36
    met = torch.zeros(1, 10, 10).bool()
    met[0, 8, :8], met[0, 9, 4:8] = True, True
    shares = recall.recall_of(weights, weights.topk(8).indices, met)
    torch.testing.assert_close(shares.float(), torch.tensor([(1 + 10 / 36) / 2, 0.5, 0.75]))


def mixed_value(kind, layer, value, head, j):
    """What key j carries, as the class says."""
    zeros = torch.zeros_like(value[0, 0])
    own, before = value[j, head], value[j - 1, head] if j else zeros[head]
    after = value[j + 1, head] if j + 1 < len(value) else zeros[head]
    is_second_half = head >= layer.num_heads // 2
    if kind is HalfShifted:
        return own if is_second_half else after
    if kind is LearnedMix:
        return layer.of_own[head] * own + layer.of_successor[head] * after
    if kind is HalfTwoOn:
        return after
    return layer.of_own[head] * own + layer.of_predecessor[head] * before + layer.of_successor[head] * after


def slow_attention(kind, layer, hidden_states, buckets):
    """`[L, H, D]`: one query, one head and one key at a time."""
    query_key, value = (
        project(hidden_states)[0].unflatten(-1, (layer.num_heads, -1)) for project in (layer.query_key, layer.value)
    )
    causal, size = layer.config.is_decoder, layer.head_size
    output = torch.zeros_like(value)
    for head, i in product(range(layer.num_heads), range(LENGTH)):
        late = kind is HalfTwoOn and head >= layer.num_heads // 2
        vectors = torch.cat([torch.zeros_like(query_key[:1]), query_key])[:-1] if late else query_key
        is_exact = causal and i < layer.options.chunk_length
        keys = [
            j
            for j in range(i if causal else LENGTH)
            if j != i and (is_exact or buckets[0, head, 0, i] == buckets[0, head, 0, j])
        ]
        if not keys:
            output[i, head] = 0 if causal else mixed_value(kind, layer, value, head, i)
            continue
        unit = vectors[:, head] * (vectors[:, head].pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() / size**0.5
        weights = torch.stack([vectors[i, head] @ unit[j] for j in keys]).softmax(0)
        carried = torch.stack([mixed_value(kind, layer, value, head, j) for j in keys])
        output[i, head] = weights @ carried
    return output


def varied_layer(kind):
    if kind is BothNeighbours:
        settings = {"lsh_num_chunks_after": 8}
        model = text_models.with_lsh_layers(
            kind, lambda: text_models.masked_reformer(LENGTH, ["lsh"], **SMALL | REACHING | settings)
        )
    else:
        model = text_models.with_lsh_layers(kind, lambda: small(["lsh"], **REACHING, lsh_value_shift=1)(LENGTH))
    [layer] = recall.lsh_layers(model.double().eval())
    assert type(layer) is kind
    for name, weight in layer.named_parameters():
        if name.startswith("of_"):
            torch.nn.init.normal_(weight)
    return layer


@pytest.mark.parametrize("kind", [HalfShifted, LearnedMix, HalfTwoOn, BothNeighbours])
def test_other_values_are_those_of_the_oracle(kind):
    layer, hidden_states = varied_layer(kind), torch.randn(1, LENGTH, 32).double()
    rotations = layer.draw_rotations(LENGTH, None, None, hidden_states.device)
    output, _, buckets = layer(hidden_states, rotations=rotations)
    assert len(buckets.unique()) > 1 and num_buckets_of(layer.config, LENGTH, None) == 4
    expected = slow_attention(kind, layer, hidden_states, buckets)
    torch.testing.assert_close(output[0].unflatten(-1, (2, -1)), expected, rtol=0, atol=1e-10)
    names = [name for name, _ in layer.named_parameters()]
    gradients = [torch.autograd.grad(result.pow(2).sum(), list(layer.parameters())) for result in (output, expected)]
    for name, actual, of_oracle in zip(names, *gradients, strict=True):
        torch.testing.assert_close(actual, of_oracle, rtol=0, atol=1e-8, msg=name)
    with pytest.raises(ValueError, match="takes whole windows only"):
        layer(hidden_states, attention_mask=torch.ones(1, LENGTH).bool())


@pytest.mark.parametrize("kind", [HalfShifted, LearnedMix, HalfTwoOn])
def test_other_values_are_not_of_the_future(kind):
    layer, hidden_states = varied_layer(kind), torch.randn(1, LENGTH, 32).double()
    rotations = layer.draw_rotations(LENGTH, None, None, hidden_states.device)
    before = layer(hidden_states, rotations=rotations)[0]
    hidden_states[:, 25:] = torch.randn(1, LENGTH - 25, 32)
    after = layer(hidden_states, rotations=rotations)[0]
    torch.testing.assert_close(after[:, :25], before[:, :25], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, 25:], before[:, 25:])


def test_contenders_of_other_values_and_chunks_train():
    added = [name for name in text_models.CONTENDERS if "half" in name or "mix" in name or "chunks" in name]
    assert len(added) == 5
    for name in added:
        model = text_models.CONTENDERS[name](512).train()
        ids = torch.randint(2, 258, (1, 80))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert all(weight.grad is not None for weight in model.parameters()), name
    assert model.config.lsh_attn_chunk_length == 256


def test_masked_models_train(text_folder, tmp_path, monkeypatch, capsys):
    def both_neighbours(length):
        return text_models.with_lsh_layers(
            BothNeighbours, lambda: text_models.masked_reformer(length, ["local", "lsh"], **SMALL)
        )

    monkeypatch.setitem(text_models.MASKED, "lsh, both neighbours", both_neighbours)
    arguments = ["masked", "--only", "lsh, both neighbours", "--seeds", "0", "--steps", "4", "--eval_windows", "2"]
    arguments += ["--grid_steps", "1"]
    run_experiment.main(
        [*arguments, "--context_length", "128", "--text_path", text_folder, "--results", str(tmp_path / "masked")]
    )
    [path] = (tmp_path / "masked").glob("*.json")
    record = json.loads(path.read_text())
    assert 0 < record["evaluations"][-1]["bits_per_masked_byte"] < 20
    assert [name.rpartition(".")[2] for name in record["mix"]] == ["of_own", "of_predecessor", "of_successor"]
    assert "| lsh, both neighbours | 1 |" in capsys.readouterr().out and has_picture(tmp_path / "masked.png")


def test_masks_hide_what_the_labels_say():
    ids = torch.randint(2, 258, (4, 1000))
    read, labels = masked.mask_some(ids, torch.Generator().manual_seed(0))
    is_masked = read == text_models.MASK_ID
    assert 0.13 < is_masked.float().mean() < 0.17
    assert torch.equal(labels[is_masked], ids[is_masked]) and torch.equal(read[~is_masked], ids[~is_masked])
    assert (labels[~is_masked] == masked.IGNORED).all()


@pytest.mark.slow
def test_what_a_gpu_is_for_runs_within_its_time(text_folder, tmp_path, monkeypatch, capsys):
    # Each look at this clock takes a tenth of a second.
    ticks = count()
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))
    results = tmp_path / "gpu"
    arguments = ["gpu", "--tiny", "--device", "cpu", "--text_path", text_folder]
    arguments += ["--results", str(results), "--minutes"]
    run_experiment.main([*arguments, "0.12"])
    records = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert {record["contender"] for record in records.values()} == gpu.TINY.twins.keys()
    for record in records.values():
        assert len(record["evaluations"]) == gpu.NUM_EVALUATIONS and record["device"] == "cpu"
        assert list(record["positions"]) == ["0-64", "64-256", "256-512"]
        assert record["seconds"] >= record["seconds_given"] == pytest.approx(1.44)
    assert len({record["step"] for record in records.values()}) == 1
    assert [path.stem for path in (results / "duplication").glob("*-0.json")] == ["lsh-2-32-0"]
    printed = capsys.readouterr().out
    assert gpu.table([records[name] for name in sorted(records)]) in printed and has_picture(tmp_path / "gpu.png")

    monkeypatch.setattr(gpu, "train_for", lambda *_: pytest.fail("it was trained again"))
    run_experiment.main([*arguments, "0.12"])
    # With another time it is another run, and for this one there is none left.
    run_experiment.main([*arguments, "0.001"])
    assert "There is no time for llama-256" in capsys.readouterr().out
