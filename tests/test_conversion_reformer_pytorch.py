"""Models of reformer-pytorch beside what becomes of them."""

import json

import pytest
import torch
from safetensors.torch import save_model
from tiny_models import random_ids
from torch import nn

from hf_reformer import ReformerForCausalLM, ReformerForMaskedLM, convert_reformer_pytorch
from hf_reformer.commands import convert
from scripts.maintain.reformer_pytorch_agreement import CASES, make_theirs, same_buckets


theirs = pytest.importorskip("reformer_pytorch")

SIZES = {
    "num_tokens": 50,
    "dim": 32,
    "depth": 2,
    "max_seq_len": 128,
    "heads": 2,
    "dim_head": 8,
    "bucket_size": 16,
    "causal": True,
}
# Beside those of the script, at sizes that are quick.
FULL_UP_TO_64 = "full attention up to 64"
OTHERS = {
    FULL_UP_TO_64: {"full_attn_thres": 64, "absolute_position_emb": True},
    "axial positions, three axes": {"axial_position_emb": True, "axial_position_shape": (4, 4, 8)},
    "head size that follows": {"dim_head": None, "absolute_position_emb": True},
    "memory and time": {"ff_chunks": 3, "attn_chunks": 2, "reverse_thres": 1000},
    "dropout": {"lsh_dropout": 0.1, "ff_dropout": 0.1, "layer_dropout": 0.1, "post_attn_dropout": 0.1},
}
ROUNDED = 1e-6


@pytest.fixture
def same_rotations():
    with same_buckets():
        yield


def make(**changes):
    arguments = SIZES | changes
    return make_theirs(arguments).double(), arguments


@pytest.mark.parametrize("case", CASES | OTHERS)
def test_logits_are_theirs_on_the_same_buckets(case, same_rotations):
    """
    Float64, relative norm. What is left: keys are divided by a norm with 1e-6 under its root here, and with a bound of
    1e-12 there.
    """
    model, arguments = make(**(CASES | OTHERS)[case])
    ours = convert_reformer_pytorch(model.state_dict(), **arguments)
    assert type(ours) is (ReformerForCausalLM if arguments["causal"] else ReformerForMaskedLM)
    assert ours.dtype == torch.float64 and not ours.training
    # A shorter text would have fewer buckets there, unless it is not hashed.
    for length in (64, 128) if case == FULL_UP_TO_64 else (128,):
        ids = random_ids(2, length)
        with torch.no_grad():
            expected, actual = model(ids), ours(ids).logits
        assert (actual - expected).norm() <= ROUNDED * expected.norm()


def test_the_rounding_is_that_of_the_norm(same_rotations):
    """With queries 3,000 times as long it weighs 10 million times less, in scores that are 3,000 times as large."""
    model, arguments = make(absolute_position_emb=True, n_hashes=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("toqk.weight"):
                weight *= 3000
        ids = random_ids(2, 128)
        expected = model(ids)
        actual = convert_reformer_pytorch(model.state_dict(), **arguments)(ids).logits
    assert (actual - expected).norm() <= 1e-9 * expected.norm()


def test_hashing_turned_vectors_is_something_else(same_rotations):
    """Buckets follow from content alone, positions from the place: a converted model knows both."""
    model, arguments = make()
    converted = convert_reformer_pytorch(model.state_dict(), **arguments)
    assert converted.config.lsh_rotary == "after_hashing"
    converted.config.lsh_rotary = True
    other = ReformerForCausalLM(converted.config).double().eval()
    other.load_state_dict(converted.state_dict())
    ids = random_ids(2, 128)
    with torch.no_grad():
        expected, actual = model(ids), other(ids).logits
    assert (actual - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("wrapper", ["Autopadder", "TrainingWrapper", "DataParallel"])
def test_weights_of_wrappers_and_in_files(wrapper, tmp_path, same_rotations):
    model, arguments = make()
    wrap = {"Autopadder": theirs.Autopadder, "TrainingWrapper": TrainingWrapper, "DataParallel": nn.DataParallel}
    torch.save(wrap[wrapper](model).state_dict(), tmp_path / "model.pt")
    ours, ids = convert_reformer_pytorch(tmp_path / "model.pt", **arguments), random_ids(2, 128)
    with torch.no_grad():
        assert (ours(ids).logits - model(ids)).norm() <= ROUNDED * model(ids).norm()


def TrainingWrapper(model):
    from reformer_pytorch.generative_tools import TrainingWrapper

    return TrainingWrapper(model)


def test_weights_that_a_file_holds_once(tmp_path, same_rotations):
    model, arguments = make(weight_tie=True)
    save_model(model, tmp_path / "model.safetensors")
    ours, ids = convert_reformer_pytorch(tmp_path / "model.safetensors", **arguments), random_ids(2, 128)
    with torch.no_grad():
        assert (ours(ids).logits - model(ids)).norm() <= ROUNDED * model(ids).norm()


@pytest.mark.parametrize("changes", [{}, {"weight_tie": True, "weight_tie_embedding": True}], ids=["", "shared"])
def test_weights_are_copies(changes, tmp_path):
    model, arguments = make(**changes)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ours = convert_reformer_pytorch(model.state_dict(), **arguments)
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 1
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_trains_generates_and_comes_back(tmp_path):
    model, arguments = make()
    ours = convert_reformer_pytorch({name: weight.float() for name, weight in model.state_dict().items()}, **arguments)
    ids = random_ids(2, 128)
    ours.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    ours.eval().save_pretrained(tmp_path)
    again = ReformerForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(ids, **options), ours.generate(ids, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_scale_norm": True}, "`use_scale_norm=True` has no counterpart in a Reformer here: ScaleNorm in the"),
        ({"use_rezero": True}, "`use_rezero=True` .*: ReZero"),
        ({"num_mem_kv": 4}, "`num_mem_kv=4` .*: memory keys and values"),
        ({"n_local_attn_heads": 1}, "`n_local_attn_heads=1` .*: heads with local attention"),
        ({"pkm_layers": (1,)}, r"`pkm_layers=\(1,\)` .*: product-key memories"),
        ({"return_embeddings": True}, "`return_embeddings=True` .*: models without a head"),
        ({"full_attn_thres": 64}, "`full_attn_thres=64`: up to that length .* Give 0"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(changes, message):
    model, arguments = make(**changes)
    with pytest.raises(ValueError, match=message):
        convert_reformer_pytorch(model.state_dict(), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, r"it has no num_layers"),
        ({"use_full_attn": "no"}, "`use_full_attn` of `ReformerLM` must be True or False, but got 'no'"),
        ({"depth": "two"}, "`depth` of `ReformerLM` must be a whole number of at least 1, but got 'two'"),
        ({"bucket_size": 0}, "`bucket_size` of `ReformerLM` must be a whole number of at least 1"),
        ({"full_attn_thres": None}, "`full_attn_thres` of `ReformerLM` must be a whole number of at least 0"),
        ({"axial_position_shape": 8}, "`axial_position_shape` of `ReformerLM` must be a list of numbers"),
        ({"ff_dropout": 2.0}, "`ff_dropout` of `ReformerLM` must be a number between 0 and 1"),
        ({"ff_activation": torch.nn.ELU}, "`ff_activation=ELU` is not known. It must be one of GELU"),
        ({"num_tokens": 60}, r"`token_emb.weight` has the shape \(50, 32\), but .* ask for \(60, 32\)"),
        ({"depth": 3}, r"The weights have no `reformer.layers.blocks.2.f.net.norm.weight`"),
        ({"depth": 1}, r"The weights hold reformer.layers.blocks.1.f.net.norm.weight, .*, ...: .* nothing of these"),
        ({"absolute_position_emb": True}, "have no `pos_emb.emb.weight`"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    model, arguments = make()
    with pytest.raises(ValueError, match=message):
        convert_reformer_pytorch(model.state_dict(), **arguments | changes)


def test_arguments_that_are_missing():
    with pytest.raises(ValueError, match="num_tokens, max_seq_len is missing"):
        convert_reformer_pytorch({}, dim=32, depth=2)


def test_files_that_hold_something_else(tmp_path):
    model, arguments = make()
    with pytest.raises(ValueError, match="is no file"):
        convert_reformer_pytorch(tmp_path / "none.pt", **arguments)
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    (tmp_path / "empty.pt").touch()
    for name in ("model.pt", "broken.safetensors", "empty.pt"):
        with pytest.raises(ValueError, match="damaged, or holds no state dict that can be read without running code"):
            convert_reformer_pytorch(tmp_path / name, **arguments)
    with pytest.raises(ValueError, match=r"not finite .* \['reformer.embeddings"):
        convert_reformer_pytorch(
            model.state_dict() | {"token_emb.weight": torch.full((50, 32), torch.nan)}, **arguments
        )
    frequencies = {"layer_pos_emb.inv_freq": torch.ones(4)}
    with pytest.raises(ValueError, match="other frequencies"):
        convert_reformer_pytorch(model.state_dict() | frequencies, **arguments)
    torch.save({"model": model.state_dict()}, tmp_path / "nested.pt")
    for weights in (tmp_path / "nested.pt", {"model": model.state_dict()}):
        with pytest.raises(ValueError, match="no state dict, tensors by name"):
            convert_reformer_pytorch(weights, **arguments)


def test_the_command(tmp_path, capsys, same_rotations):
    model, arguments = make()
    torch.save(model.float().state_dict(), tmp_path / "model.pt")
    settings = [f"{name}={json.dumps(value)}" for name, value in arguments.items()]
    given = ["reformer-pytorch", "--weights", str(tmp_path / "model.pt"), "--output_dir", str(tmp_path / "out")]
    convert.main([*given, "--set", *settings])
    assert "ReformerForCausalLM with" in capsys.readouterr().out
    ours, ids = ReformerForCausalLM.from_pretrained(tmp_path / "out").double(), random_ids(2, 128)
    with torch.no_grad():
        assert (ours(ids).logits - model.double()(ids)).norm() <= ROUNDED * model(ids).norm()
    for wrong, message in (
        (["--set", *settings], "holds something already"),
        (["--set", "num_heads=2"], "--set takes settings of ReformerLM as name=value, but got 'num_heads=2'"),
    ):
        target = "out" if wrong[1] == settings[0] else "other"
        with pytest.raises(SystemExit, match=message):
            convert.main([*given[:-1], str(tmp_path / target), *wrong])
