"""lm_eval's three kinds of requests, on tasks whose data lie beside the check."""

import json
from typing import Any

import lm_eval
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from .launching import run_program
from .setting import Check, Setting, expect
from .texts import sentences


TOOLS = ("lm_eval", "transformers")
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "end",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(setting: Setting) -> None:
    """A file of documents, and one for each task."""
    rows = []
    for place, text in enumerate(sentences()[:8]):
        start, end = text[: len(text) // 2], text[len(text) // 2 :]
        rows.append({"text": text * 4, "start": start, "end": end, "choices": [end, end[::-1]], "label": place % 2})
    data = setting.folder / "documents.json"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (setting.folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | source | task), encoding="utf-8")


def evaluate(setting: Setting) -> dict[str, Any]:
    """All tasks with a batch of 3 and again with 1: padding must not count."""
    write_tasks(setting)
    manager = TaskManager(include_path=str(setting.folder))
    figures = []
    for batch_size in (3, 1):
        model = HFLM(pretrained=setting.causal, device="cpu", dtype="float32", batch_size=batch_size)
        results = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
        figures.append({f"{task}, {name}": value for task, row in results.items() for name, value in row.items()})
    numbers = [{name: value for name, value in row.items() if isinstance(value, float)} for row in figures]
    expect("every task has its figure", len(numbers[0]) >= len(TASKS))
    off = max(abs(numbers[0][name] - numbers[1][name]) for name in numbers[0])
    expect(f"batches of 3 and of 1 give the same, not {off} off", off < 1e-3)
    return numbers[0]


def evaluate_from_the_command_line(setting: Setting) -> dict[str, Any]:
    """The same tasks as a person types it."""
    write_tasks(setting)
    output = run_program(
        *("lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={setting.causal},dtype=float32"),
        *("--tasks", ",".join(TASKS), "--include_path", setting.folder, "--device", "cpu", "--batch_size", 2),
        *("--output_path", setting.folder / "results"),
    )
    expect("a table was printed", "bits_per_byte" in output)
    return {}


CHECKS: dict[str, Check] = {
    "choice, rolling, generation": evaluate,
    "lm_eval, the command": evaluate_from_the_command_line,
}
