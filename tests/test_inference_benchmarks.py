"""What the benchmarks of trained models count, and that they go on where they stopped."""

import copy
import json

import pytest
import torch
from tiny_models import POSITIONS, WINDOWS, make_model, random_ids

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM
from scripts.bench import benchmark_assisted, inference
from scripts.bench.trained import Figures, write


NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model():
    return make_model(ReformerForCausalLM, **WINDOWS, **POSITIONS["rotary"])


@pytest.fixture(scope="module")
def prompt():
    torch.manual_seed(0)
    return random_ids(1, 100)


def test_plain_generation_takes_a_step_for_each_token(model, prompt):
    written = write(model, prompt, NEW_TOKENS, do_sample=False)
    assert (len(written.ids), written.steps, written.tokens_per_step) == (NEW_TOKENS, NEW_TOKENS - 1, 1)
    assert written.prefill_s > 0 and written.decode_s > 0


def test_a_draft_that_is_right_saves_steps(model, prompt):
    plain = write(model, prompt, NEW_TOKENS, do_sample=False)
    # The calls of a model of its own are not counted.
    assisted = write(model, prompt, NEW_TOKENS, do_sample=False, assistant_model=copy.deepcopy(model))
    assert assisted.ids == plain.ids
    assert assisted.steps < plain.steps and assisted.tokens_per_step > 2


def test_texts_that_part_are_found(model, prompt):
    ids = write(model, prompt, NEW_TOKENS, do_sample=False).ids
    assert benchmark_assisted.first_difference(model, prompt, ids, ids) is None
    other = [*ids[:7], ids[7] + 1, *ids[8:]]
    found = benchmark_assisted.first_difference(model, prompt, ids, other)
    assert found["place"] == 7 and found["logits_apart"] > 0


def test_ways_are_compared_and_summed_up(model, prompt):
    figures = benchmark_assisted.compare(model, copy.deepcopy(model), {"100, 0": prompt}, NEW_TOKENS, "100, 0, greedy")
    assert [figures[way].get("differs") for way in benchmark_assisted.WAYS] == [None, None, None]
    lines = list(benchmark_assisted.rows({"100, 0, greedy": figures}))
    assert [line[:3] for line in lines] == [["100", "greedy", way] for way in benchmark_assisted.WAYS]
    assert [line[6] for line in lines] == ["", "1 of 1", "1 of 1"]


def test_what_is_in_the_file_is_not_measured_again(tmp_path, capsys):
    path, calls = tmp_path / "figures.json", []
    for again in (False, False, True):
        figures = Figures(path, {"about": 1})
        figures.measure(["a", "b"], lambda case: calls.append(case) or {"figure": case}, again)
    assert calls == ["a", "b", "a", "b"]
    assert json.loads(path.read_text())["cases"] == {"a": {"figure": "a"}, "b": {"figure": "b"}}
    assert '"processor"' in capsys.readouterr().out


@pytest.mark.slow
def test_weights_of_sixteen_bits_stand_beside_the_whole_model(tmp_path):
    settings = WINDOWS | POSITIONS["rotary"] | {"vocab_size": 258}
    make_model(ReformerForCausalLM, **settings).save_pretrained(tmp_path)
    ReformerByteTokenizer().save_pretrained(tmp_path)
    figures = inference.measure(tmp_path, random_ids(2, 300), "bfloat16")
    assert figures["checkpoint_bytes"] < 0.7 * figures["whole_checkpoint_bytes"]
    assert figures["bits_per_byte"] == pytest.approx(figures["whole_bits_per_byte"], rel=0.05)
    refused = inference.refusals(tmp_path, random_ids(1, 120))
    assert "no error" not in refused.values() and len(refused) > 5
