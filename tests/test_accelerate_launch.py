"""`accelerate launch` with the files in scripts/accelerate/: two processes that train, save and go on as one does."""

import json
from pathlib import Path

import pytest
import torch
from launching import run_python
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_reformer.commands import train


pytestmark = pytest.mark.distributed


ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
TESTS = ROOT / "tests"


STEPS, CHECKPOINT, LEARNING_RATE = 3, "checkpoint-2", 0.01
CPU = ["--use_cpu", "True"]
# With --use_cpu accelerate would leave DeepSpeed out; DeepSpeed finds out by itself that there is only the CPU.
GLOO = ["--ddp_backend", "gloo"]


# The script, its device, and a file that no other strategy leaves in a checkpoint.
LAUNCHES = {
    "ddp": (SCRIPTS / "train.py", CPU, "optimizer.pt"),
    "fsdp2": (TESTS / "fsdp_on_cpu.py", CPU, "pytorch_model_fsdp.bin"),
    "deepspeed_zero2": (TESTS / "deepspeed_on_cpu.py", GLOO, "global_step2/mp_rank_00_model_states.pt"),
    "deepspeed_zero3": (TESTS / "deepspeed_on_cpu.py", GLOO, "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt"),
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"Line {number}, plain text.\n" * (number + 9), encoding="utf-8")
    return folder


def arguments_of(text_folder, output_dir, batch_size, **given):
    values = {
        "attn_layers": "local full",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "attention_head_size": 8,
        "feed_forward_size": 16,
        "text_path": text_folder,
        "context_length": 32,
        # Not as many for each process.
        "max_held_out_windows": 3,
        "output_dir": output_dir,
        # Muon makes an update of full size from a gradient near zero, so it blows the order of a sum up.
        "muon": False,
        "learning_rate": LEARNING_RATE,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_steps": 2,
        "disable_tqdm": True,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
    }
    stated = {name: value for name, value in (values | given).items() if value is not None}
    return [word for name, value in stated.items() for word in (f"--{name}", *str(value).split())]


def launch(config, script, arguments):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", SCRIPTS / "accelerate" / f"{config}.yaml"]
    processes = ["--num_processes", "2", "--main_process_port", "0"]
    return run_python(*launcher, *processes, script, *arguments)


def losses_of(folder):
    log = json.loads((folder / "training_log.json").read_text())
    logged = [row[name] for row in log["log_history"] for name in ("loss", "eval_bits_per_byte") if name in row]
    return [*logged, *log["figures"].values()]


def assert_same_weights(folder, expected_folder, auto_class=AutoModelForCausalLM):
    model, expected = (auto_class.from_pretrained(path).state_dict() for path in (folder, expected_folder))
    # A step of AdamW moves a number by about the learning rate.
    torch.testing.assert_close(model, expected, rtol=0, atol=1e-4 * LEARNING_RATE)


@pytest.fixture(scope="module")
def one_process(text_folder, tmp_path_factory):
    """The folder of a run in one process, with twice the rows."""
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    train.main(arguments_of(text_folder, folder, batch_size=2) + CPU)
    return folder


@pytest.fixture(scope="module")
def launched(text_folder, tmp_path_factory):
    """Launches with a config file, once, and returns the output folder."""
    folders = {}

    def run(config):
        if config not in folders:
            folders[config] = tmp_path_factory.mktemp(config)
            script, device, _ = LAUNCHES[config]
            done = launch(config, script, arguments_of(text_folder, folders[config], batch_size=1) + device)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("held-out: ") == 1
        return folders[config]

    return run


@pytest.mark.parametrize("config", LAUNCHES)
def test_two_processes_train_as_one_with_twice_the_rows(config, launched, one_process):
    folder = launched(config)
    assert (folder / CHECKPOINT / LAUNCHES[config][2]).is_file()
    assert losses_of(folder) == pytest.approx(losses_of(one_process), rel=1e-6)
    assert_same_weights(folder, one_process)


def test_a_run_of_two_processes_goes_on_in_one(launched, one_process, text_folder, tmp_path):
    resume = {"resume_from_checkpoint": launched("ddp") / CHECKPOINT}
    torch.set_num_threads(1)
    train.main(arguments_of(text_folder, tmp_path, batch_size=2, **resume) + CPU)
    assert losses_of(tmp_path) == pytest.approx(losses_of(one_process), rel=1e-6)
    assert_same_weights(tmp_path, one_process)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """What trains an encoder with a decoder instead."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"source": f"{letter} {number}", "target": 3 * letter} for number in range(15) for letter in "abcd"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"objective": "seq2seq", "data": path}


def arguments_of_pairs(pairs, output_dir, batch_size):
    return arguments_of(None, output_dir, batch_size, context_length=None, max_held_out_windows=None, **pairs)


@pytest.fixture(scope="module")
def pairs_in_one_process(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    train.main(arguments_of_pairs(pairs, folder, batch_size=4) + CPU)
    return folder


@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero3"])
def test_one_process_measures_what_two_have_sharded(config, pairs, pairs_in_one_process, tmp_path):
    """It writes targets, while the other does not take part."""
    script, device, _ = LAUNCHES[config]
    done = launch(config, script, arguments_of_pairs(pairs, tmp_path, batch_size=2) + device)
    assert done.returncode == 0, done.stderr
    logs = [json.loads((folder / "training_log.json").read_text()) for folder in (tmp_path, pairs_in_one_process)]
    figures, expected = (log["figures"].pop("this model") for log in logs)
    assert figures == pytest.approx(expected, rel=1e-6) and figures.keys() == {"bits_per_target_byte", "exact"}
    assert logs[0]["figures"] == logs[1]["figures"]
    assert_same_weights(tmp_path, pairs_in_one_process, AutoModelForSeq2SeqLM)


def test_muon_under_deepspeed_is_refused_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    arguments = arguments_of(tmp_path / "nowhere", tmp_path, batch_size=1, muon=True)
    with pytest.raises(ValueError, match=r"DeepSpeed flattens the matrices.*--muon False"):
        train.main(arguments)


def test_fsdp_without_accelerators_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate shards with FSDP on accelerators only"):
        train.main(arguments_of(tmp_path / "nowhere", tmp_path, batch_size=1) + CPU)
