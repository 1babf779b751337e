"""torch.export, and ONNX behind it, keep the outputs."""

import onnxruntime
import pytest
import torch
from reversible_models import BATCH, LENGTH
from tiny_models import POSITIONS, STACKS, make_model, random_ids
from torch import nn

from hf_reformer import ReformerForCausalLM, ReformerForMaskedLM, ReformerForSequenceClassification


pytestmark = pytest.mark.compile


MIXED = {"attn_layers": STACKS["mixed"]}
# What is exported is eager code, so that is what it equals bit by bit.
EAGER = {"attn_implementation": "eager"}
RIGHT = torch.arange(LENGTH) < torch.tensor([LENGTH, 20])[:, None]


@pytest.mark.parametrize(
    ("model_class", "masked", "positions"),
    [
        (ReformerForCausalLM, True, "LSH rotary"),
        (ReformerForMaskedLM, True, "axial"),
        (ReformerForSequenceClassification, False, "axial"),
    ],
)
def test_an_exported_program_repeats_the_model(model_class, masked, positions, tmp_path):
    """Also for other ids, and each time: the rotations do not move on."""
    model = make_model(model_class, **MIXED, **EAGER, **POSITIONS[positions])
    inputs = {"input_ids": random_ids(BATCH, LENGTH)}
    if masked:
        inputs["attention_mask"] = RIGHT.flip(1).long()
    torch.export.save(torch.export.export(model, (), inputs), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for _ in range(2):
        inputs["input_ids"] = random_ids(BATCH, LENGTH)
        with torch.no_grad():
            assert torch.equal(program(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("config", [{"hash_seed": 5}, {"num_buckets": [4, 6]}, {"num_buckets": None}], ids=str)
def test_an_exported_program_hashes_like_the_model(config):
    model = make_model(ReformerForCausalLM, attn_layers=["lsh"], **config, **EAGER)
    ids = random_ids(BATCH, LENGTH)
    program = torch.export.export(model, (ids,)).module()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(program(ids).logits, model(ids).logits)


RECIPE = POSITIONS["LSH rotary"] | {
    "lsh_value_shift": 1,
    "lsh_sliding_window": True,
    "circular_look_around": False,
    "attend_across_buckets": False,
}
# One program for any batch and length; the last two fill their chunks.
SHAPES = [(2, 77), (3, 101), (1, 333), (2, 64), (4, 112)]
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


class Logits(nn.Module):
    """A model as ONNX takes it: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def padded(batch, length):
    """Ids, and a mask that hides the second half of the last row."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return random_ids(batch, length), mask


@pytest.mark.parametrize("model_class", [ReformerForCausalLM, ReformerForMaskedLM])
def test_one_exported_program_serves_all_batches_and_lengths(model_class, tmp_path):
    """As it is, and in ONNX's runtime. To export the model itself to ONNX exports this program first, too."""
    recipe = RECIPE if model_class is ReformerForCausalLM else {}
    shape = {"axial_pos_shape": [16, 32], "max_position_embeddings": 512}
    model = Logits(make_model(model_class, **MIXED, **recipe, **shape)).eval()
    dynamic_shapes = {"input_ids": DYNAMIC, "attention_mask": DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(model, padded(2, 77), dynamic_shapes=dynamic_shapes)
        path = tmp_path / "model.onnx"
        torch.onnx.export(program, f=path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
        for shape in SHAPES:
            ids, mask = padded(*shape)
            (in_onnx,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
            expected = model(ids, mask)[mask.bool()]
            for logits in (program.module()(ids, mask), torch.from_numpy(in_onnx)):
                # Float32; the program runs plain operations.
                assert (logits[mask.bool()] - expected).norm() <= 1e-5 * expected.norm(), shape


def test_hidden_states_of_any_batch_and_length():
    """Then layers are exported one by one."""
    model = make_model(ReformerForCausalLM, **MIXED, **RECIPE, axial_pos_shape=[16, 32], max_position_embeddings=512)
    model.config.output_hidden_states, model.config.use_cache = True, False
    with torch.no_grad():
        program = torch.export.export(model.eval(), padded(2, 77)[:1], dynamic_shapes={"input_ids": DYNAMIC}).module()
        for shape in SHAPES:
            ids, _ = padded(*shape)
            states, expected = program(ids).hidden_states, model(ids).hidden_states
            assert len(states) == len(expected) > 2
            for state, its in zip(states, expected, strict=True):
                assert (state - its).norm() <= 1e-5 * its.norm(), shape


def test_exporting_a_cache_is_refused():
    model = make_model(ReformerForCausalLM)
    with pytest.raises(ValueError, match=r"cannot be exported.*use_cache=False"):
        torch.export.export(model, (), {"input_ids": random_ids(1, 20), "use_cache": True})


def test_exporting_leaves_the_generator_alone():
    model = make_model(ReformerForCausalLM, attn_layers=["lsh"])
    before = torch.get_rng_state()
    torch.export.export(model, (torch.full((1, LENGTH), 3),))
    assert torch.equal(torch.get_rng_state(), before)
