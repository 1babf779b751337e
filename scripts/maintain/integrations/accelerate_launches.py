"""accelerate: two processes that train one model, weights that wait on the CPU or on disk."""

import sys
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

from .example_scripts import LENGTH, TRAINING
from .launching import read_results, run_program
from .setting import Check, Setting, expect, expect_close, tokenized
from .texts import sentences, write_text


TOOLS = ("accelerate", "transformers", "datasets", "evaluate")
TWO_PROCESSES = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
ROUNDING = 1e-5


def launch(setting: Setting) -> dict[str, Any]:
    """run_clm with two processes."""
    path, output_dir = write_text(setting.folder / "text.txt"), setting.folder / "output"
    run_program(
        *(setting.examples / "language-modeling/run_clm.py", "--model_name_or_path", setting.causal),
        *("--output_dir", output_dir, "--train_file", path, "--validation_file", path, "--block_size", LENGTH),
        *TRAINING,
        through=TWO_PROCESSES,
    )
    return read_results(output_dir)


def offload(where: str, setting: Setting) -> dict[str, Any]:
    """Weights that are brought in by hooks when a module runs give the logits of weights that are there."""
    batch = tokenized(setting.causal, sentences()[:3])
    whole = AutoModelForCausalLM.from_pretrained(setting.causal)
    with torch.no_grad():
        expected = whole(**batch).logits
    if where == "cpu":
        model = cpu_offload(whole, execution_device=torch.device("cpu"))
    elif where == "disk":
        model = disk_offload(whole, str(setting.folder / "weights"), execution_device=torch.device("cpu"))
    else:
        places = {name: "disk" for name, _ in whole.named_children()}
        places[next(reversed(places))] = "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            setting.causal, device_map=places, offload_folder=str(setting.folder / "weights")
        )
    with torch.no_grad():
        off = expect_close("logits", model(**batch).logits, expected, ROUNDING)
    written = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expect("four tokens were written", written.shape[1] == batch["input_ids"].shape[1] + 4)
    return {"logits off": off}


CHECKS: dict[str, Check] = {
    "run_clm, two processes": launch,
    "offload to the CPU": partial(offload, "cpu"),
    "offload to disk": partial(offload, "disk"),
    "device_map with disk": partial(offload, "device_map"),
}
FROM_SOURCE = {"run_clm, two processes"}
