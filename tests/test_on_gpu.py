"""That what needs a GPU is one command, whose parts are commands that exist, and that it ends in time."""

import json
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch

from scripts.bench import benchmark, on_gpu
from scripts.bench.on_gpu import Part, in_words, parts_of, run_parts


# Starts a process that would run for long, and writes its number into a file.
STARTS_ANOTHER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({path!r}, "w").write(str(process.pid))
{then}
"""


def test_the_parts_share_all_of_the_time(tmp_path):
    assert sum(part.share for part in parts_of(tmp_path)) == pytest.approx(1)


def test_the_benchmarks_take_what_they_are_given(tmp_path):
    commands = [part.arguments for part in parts_of(tmp_path) if "scripts.bench.benchmark" in part.arguments]
    assert len(commands) == 4
    for command in commands:
        arguments = benchmark.make_parser().parse_args(command[2:])
        assert arguments.out.parent == tmp_path
        for case in arguments.cases:
            names = {name for name, _ in benchmark.competitors(case, arguments.contenders, arguments.rounds)}
            assert names == set(arguments.contenders)


@pytest.mark.slow
def test_a_part_that_fails_or_lasts_too_long_does_not_stop_the_next(tmp_path):
    child = tmp_path / "child"
    parts = [
        Part("fails", ["-c", "print('because of this'); raise SystemExit(3)"], 0.3),
        Part("lasts", ["-c", STARTS_ANOTHER.format(path=str(child), then="process.wait()")], 0.1),
        Part("works", ["-c", "print('done')"], 0.6),
    ]
    fails, lasts, works = run_parts(parts, tmp_path, seconds=20)
    assert (fails.status, lasts.status, works.status) == (3, None, 0)
    # Its own tenth, and what the first has left of its share.
    assert 2 < lasts.seconds < 8.5
    assert has_ended(child)
    assert (tmp_path / "fails.log").read_text() == "because of this\n"
    assert (tmp_path / "works.log").read_text() == "done\n"
    written = json.loads((tmp_path / "parts.json").read_text())
    assert [part["status"] for part in written["parts"]] == [3, None, 0]
    assert "status 3" in in_words(fails) and "time was over" in in_words(lasts)


@pytest.mark.slow
def test_what_a_part_has_left_running_is_stopped(tmp_path):
    child = tmp_path / "child"
    run_parts([Part("leaves", ["-c", STARTS_ANOTHER.format(path=str(child), then="")], 1.0)], tmp_path, seconds=60)
    assert has_ended(child)


def has_ended(path, within=10) -> bool:
    """Whether the process whose number stands in a file is gone after so many seconds."""
    process_id, until = int(path.read_text()), time.monotonic() + within
    with suppress(psutil.NoSuchProcess):
        # Killed, it is there until somebody asks for its status.
        while psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
    return True


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match=r"scripts\.bench\.benchmark"):
        on_gpu.main(["--out", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


def test_a_time_of_zero_is_refused(capsys):
    with pytest.raises(SystemExit):
        on_gpu.main(["--minutes", "0"])
    assert "--minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_exists():
    shown = subprocess.run([sys.executable, "-m", "scripts.bench.on_gpu", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--minutes" in shown.stdout
