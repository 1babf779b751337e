"""Runs of train.py that are stopped, killed, mixed up or diverge: nothing is lost or goes on as something else."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import DEFAULT_CALLBACKS

from hf_reformer.commands import train
from hf_reformer.training import interruptions, run_checkpoints, run_identity, run_trainer, time_left
from scripts import demo


SCRIPTS = Path(__file__).parent.parent / "scripts"

SETTINGS = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 16,
    "lsh_attn_chunk_length": 8,
    "dropout": 0.1,
    "context_length": 32,
    "max_held_out_windows": 1,
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "eval_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def arguments_of(text_folder, output_dir, **changed):
    given = SETTINGS | {"text_path": text_folder, "output_dir": output_dir} | changed
    return [
        word
        for name, value in given.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"Line {number}, plain text.\n" * (number + 9), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(text_folder, tmp_path_factory):
    """The folder of a run that nothing interrupts, with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    train.main(arguments_of(text_folder, folder))
    return folder


@pytest.fixture
def begun(whole, tmp_path):
    """A copy of that run's checkpoints."""
    for step in (2, 4):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def assert_same_weights(folder, expected_folder):
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, expected_folder))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# Signals


class SendSignals(TrainerCallback):
    """Sends this process signals in the middle of the third step."""

    signals = ()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.fixture
def send_signals(monkeypatch):
    def send(*signals):
        callback = type("SendTheseSignals", (SendSignals,), {"signals": signals})
        monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, callback])

    # A shell that starts the tests in the background has SIGINT ignored.
    before = signal.getsignal(signal.SIGINT)
    yield send
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_signal_saves_the_step_and_the_run_goes_on(send_signals, text_folder, whole, tmp_path, capfd):
    send_signals(signal.SIGTERM)
    # A run that wants no checkpoints gets one, too.
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments_of(text_folder, tmp_path, save_strategy="no"))
    assert stopped.value.code == 143
    printed = capfd.readouterr()
    assert "SIGTERM: finishing this step" in printed.err
    assert f"SIGTERM: stopped after step 3, saved in {tmp_path / 'checkpoint-3'}" in printed.out
    assert not (tmp_path / "model.safetensors").exists()
    send_signals()
    train.main(arguments_of(text_folder, tmp_path, resume_from_checkpoint="last"))
    assert_same_weights(tmp_path, whole)


def test_a_ctrl_c_that_a_launcher_passes_on_as_well_counts_once(send_signals, text_folder, tmp_path):
    send_signals(signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments_of(text_folder, tmp_path))
    assert stopped.value.code == 130
    assert run_checkpoints.newest_whole(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_second_ctrl_c_stops_at_once(send_signals, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(interruptions, "SAME_KEYSTROKE_SECONDS", 0.0)
    send_signals(signal.SIGTERM, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments_of(text_folder, tmp_path, save_strategy="no"))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_signal_in_the_last_step_changes_nothing():
    stop, control = interruptions.StopOnSignal(), TrainerControl()
    stop._receive(signal.SIGTERM, None)
    stop.on_step_end(None, TrainerState(global_step=4, max_steps=4), control)
    assert not stop.number and not control.should_save
    stop.on_step_end(None, TrainerState(global_step=3, max_steps=4), control)
    assert stop.number == signal.SIGTERM and control.should_save


def test_a_run_that_was_killed_after_its_last_step_is_only_finished(begun, text_folder, whole):
    train.main(arguments_of(text_folder, begun, resume_from_checkpoint="last"))
    assert_same_weights(begun, whole)
    assert json.loads((begun / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.distributed
def test_one_of_two_ranks_gets_the_signal_and_both_save(text_folder, tmp_path):
    settings = {"max_steps": 10**6, "save_strategy": "no", "ddp_backend": "gloo"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, SCRIPTS / "train.py"]
    process = subprocess.Popen(
        [*command, *arguments_of(text_folder, tmp_path / "run", **settings)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = iter(process.stdout.readline, "")
    assert any("'loss'" in line for line in lines)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    assert any("SIGTERM: stopped after step" in line for line in lines)
    assert process.wait(timeout=120) != 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert run_checkpoints.read_run(checkpoint)
    assert {f"rng_state_{rank}.pth" for rank in range(2)} <= {path.name for path in checkpoint.iterdir()}


# Checkpoints that were not finished


def test_a_full_disk_is_named_and_the_run_goes_on_before_it(begun, text_folder, whole):
    shutil.rmtree(begun / "checkpoint-4")
    sizes = [(whole / "checkpoint-4" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The weights can be written, the state of the optimizer cannot.
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes) // 2, before[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be saved \(.*\)\. [\d,]+ MiB are free there"):
            train.main(arguments_of(text_folder, begun, resume_from_checkpoint="last"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (begun / "checkpoint-4").is_dir()
    with pytest.warns(UserWarning, match=r"checkpoint-4 in .* was not finished; going on from checkpoint-2"):
        train.main(arguments_of(text_folder, begun, resume_from_checkpoint="last"))
    assert_same_weights(begun, whole)
    assert run_checkpoints.newest_whole(begun) == str(begun / "checkpoint-4")


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), False),
        (RuntimeError("some fault"), False),
        (KeyError("steps"), False),
    ],
    ids=repr,
)
def test_only_want_of_room_asks_for_room(error, is_full, tmp_path):
    with pytest.raises((OSError, type(error)), match=r".") as raised, run_checkpoints.saving(tmp_path):
        raise error
    assert (raised.value is not error) == ("Make room" in str(raised.value)) == is_full


def find(folder, wanted=None, **changed):
    return run_checkpoints.find_checkpoint(
        run_checkpoints.RunArguments(output_dir=str(folder), resume_from_checkpoint=wanted, **changed)
    )


def test_a_checkpoint_written_again_is_not_whole_meanwhile(begun, text_folder, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.BitsPerByteTrainer, "_save_rng_state", die)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments_of(text_folder, begun, resume_from_checkpoint=begun / "checkpoint-2"))
    with pytest.warns(UserWarning, match="checkpoint-4 in .* was not finished"):
        assert find(begun, "last") == str(begun / "checkpoint-2")


def test_old_checkpoints_are_deleted_once_the_new_one_is_whole(begun, text_folder, monkeypatch):
    shutil.rmtree(begun / "checkpoint-4")
    settings = {"resume_from_checkpoint": "last", "save_total_limit": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_trainer, "mark_whole", Mock(side_effect=KeyboardInterrupt))
        train.main(arguments_of(text_folder, begun, **settings))
    assert run_checkpoints.newest_whole(begun) == str(begun / "checkpoint-2")
    with pytest.warns(UserWarning, match="checkpoint-4 in .* was not finished"):
        train.main(arguments_of(text_folder, begun, **settings))
    assert [path.name for path in begun.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("content", [b"", b'{"fixed": {', b"\xff\xfe", b"[]", b"{}"], ids=repr)
def test_a_run_file_that_was_cut_off(content, begun):
    (begun / "checkpoint-4" / run_checkpoints.RUN_FILE).write_bytes(content)
    assert run_checkpoints.newest_whole(begun) == str(begun / "checkpoint-2")


def test_no_checkpoint_is_whole(begun):
    for step in (2, 4):
        (begun / f"checkpoint-{step}" / run_checkpoints.RUN_FILE).unlink()
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole.*run\.json"):
        find(begun, "last")
    (begun / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 has no trainer_state\.json"):
        find(begun, begun / "checkpoint-4")


# Whose checkpoints they are


def test_a_new_run_in_the_folder_of_another(begun, text_folder, whole):
    with pytest.raises(ValueError, match=r"holds checkpoints of an earlier run, up to checkpoint-4\. Go on"):
        train.main(arguments_of(text_folder, begun))
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        find(begun, str(whole / "checkpoint-4"))
    # Nothing is deleted before all else is known to be right.
    with pytest.raises(ValueError, match="There is no file or folder"):
        train.main(arguments_of(text_folder / "nowhere", begun, overwrite_output_dir=True))
    assert len(list(begun.glob("checkpoint-*"))) == 2
    train.main(arguments_of(text_folder, begun, overwrite_output_dir=True, max_steps=1))
    assert [path.name for path in begun.glob("checkpoint-*")] == ["checkpoint-1"]


def test_links_to_the_folder_or_the_checkpoint_resumed(begun, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "run").symlink_to(begun)
    (elsewhere / "checkpoint").symlink_to(begun / "checkpoint-4")
    (begun / "checkpoint-6").symlink_to(elsewhere)
    for folder, wanted in [
        (elsewhere / "run", begun / "checkpoint-4"),
        (begun, elsewhere / "run" / "checkpoint-4"),
        (begun, elsewhere / "checkpoint"),
        (begun, begun / "checkpoint-6"),
    ]:
        arguments = run_checkpoints.RunArguments(output_dir=str(folder), resume_from_checkpoint=str(wanted))
        assert not run_checkpoints.checkpoints_in_the_way(arguments)


def test_the_demo_deletes_no_checkpoints_of_others(begun, whole, monkeypatch):
    names = {path.name for path in begun.iterdir()}
    for name in names:
        (begun / name / run_checkpoints.RUN_FILE).unlink()
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        demo.main(["--output_dir", str(begun)])
    assert {path.name for path in begun.iterdir()} == names
    run = run_checkpoints.read_run(whole / "checkpoint-4")
    run_checkpoints.mark_whole(begun / "checkpoint-2", run | {"free": {}})
    shutil.copytree(whole / "checkpoint-4", begun / "checkpoint-6")
    shutil.copy(whole / "training_log.json", begun)
    demo.delete_own_checkpoints(str(begun))
    assert {path.name for path in begun.glob("checkpoint-*")} == names


def test_a_resumed_run_says_what_differs(begun, text_folder):
    other_text = text_folder.parent / "other"
    other_text.mkdir(exist_ok=True)
    (other_text / "a.txt").write_text("Other text.\n" * 200)
    for changed, message in {
        "num_hashes": (2, "num_hashes was 1, is 2"),
        "context_length": (64, "training text was "),
        "seed": (1, "seed was 42, is 1"),
        "per_device_train_batch_size": (2, "windows in a step was 1, is 2"),
        "objective": ("masked", "objective was causal, is masked"),
        "text_path": (other_text, "training text was "),
    }.items():
        arguments = arguments_of(text_folder, begun, resume_from_checkpoint="last", **{changed: message[0]})
        with pytest.raises(ValueError, match=rf"checkpoint-4 is of another run: .*{message[1]}.*--accept_changes"):
            train.main(arguments)


def test_changes_that_are_accepted_are_said(whole):
    checkpoint = whole / "checkpoint-4"
    run = run_checkpoints.read_run(checkpoint)
    run["fixed"]["num_hashes"], run["free"]["learning_rate"] = 2, 0.02
    with pytest.warns(UserWarning, match=r"with changes: num_hashes was 1, is 2; learning_rate was 0\.01, is 0\.02"):
        run_identity.check_same_run(checkpoint, run, accept_changes=True)
    run["fixed"]["num_hashes"] = 1
    with pytest.warns(UserWarning, match=r"with changes: learning_rate was 0\.01, is 0\.02\."):
        run_identity.check_same_run(checkpoint, run, accept_changes=False)


def test_nothing_left_to_train(begun, text_folder):
    with pytest.raises(ValueError, match="checkpoint-4 is 4 steps old, and max_steps is 3"):
        train.main(arguments_of(text_folder, begun, resume_from_checkpoint="last", max_steps=3))


def test_a_checkpoint_that_does_not_say_whose_it_is(begun):
    checkpoint = begun / "checkpoint-4"
    run = run_checkpoints.read_run(checkpoint)
    (checkpoint / run_checkpoints.RUN_FILE).unlink()
    assert find(begun, checkpoint) == checkpoint
    with pytest.warns(UserWarning, match="does not say which run it is of"):
        run_identity.check_same_run(checkpoint, run, accept_changes=False)


# Divergence and impossible values


def test_a_loss_that_is_no_number_ends_the_run(text_folder, tmp_path):
    with pytest.raises(ValueError, match=r"The loss of step \d+ is nan: .*lower learning_rate \(it is 1e\+06\)"):
        train.main(arguments_of(text_folder, tmp_path, learning_rate=1e6, max_steps=50, save_strategy="no"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0; it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; it must be at least 1"),
        ({"learning_rate": -1}, "learning_rate is -1.0; it must be a number from 0 on"),
        ({"learning_rate": "nan"}, "learning_rate is nan; it must be a number from 0 on"),
        ({"mlm_probability": 1.5}, "mlm_probability is 1.5; it must lie between 0 and 1"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_read(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(arguments_of(tmp_path / "nowhere", tmp_path, **changed))


def test_bfloat16_on_a_cpu_that_emulates_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.warns(UserWarning, match=r"bf16 is True, but this device \(cpu\) has no instructions for it"):
        train.check_strategy(run_checkpoints.RunArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True))


# How long it will take


def test_time_left(monkeypatch, capsys, tmp_path):
    # Four steps, an evaluation of eight seconds behind the second, and more steps.
    clock = iter([10.0, 12.0, 20.0, 22.0, 24.0, *range(30, 40)])
    monkeypatch.setattr(time_left.time, "monotonic", lambda: next(clock))
    arguments = run_checkpoints.RunArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True)
    state = TrainerState(max_steps=1003, eval_steps=500, is_world_process_zero=True)
    callback = time_left.SayTimeLeft(num_evaluated=80)
    for state.global_step in range(1, 10):
        callback.on_step_end(arguments, state, TrainerControl())
        if state.global_step == 2:
            callback.on_evaluate(arguments, state, TrainerControl())
    # Three steps took 6 s. 999 steps, and one evaluation of 40 batches at a quarter of a step each.
    assert capsys.readouterr().out == (
        "a step takes 2.00 s, so 999 more and 1 evaluations take about 34 min on this machine\n"
    )
