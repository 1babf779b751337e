"""
Check the package in other people's tools, a Reformer and a control model side by side; resumable.

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers runs/transformers
    make integrations INTEGRATIONS="--transformers_source runs/transformers"
    python -m scripts.maintain.check_integrations --only trl "peft: LORA"         # tools, or single checks
    python -m scripts.maintain.check_integrations --only trl --again              # though their results are there
    python -m scripts.maintain.check_integrations --list

Every check runs in a process of its own, with a limit of time, offline. The models are random and tiny. A result is
kept until the versions of the tool, the check or, for the Reformer, the package have changed. What fails for the
control too is the tool's matter. Without --transformers_source the example scripts are left out. Results go to
docs/integrations.json and, for people, to docs/integrations.md.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from .integrations.setting import CONTROL, OURS, Check, Setting, save_models
from .integrations_report import write_report


ROOT = Path(__file__).parents[2]
DOCS, WORK = ROOT / "docs", ROOT / "runs" / "integrations"
# What every check and every program that it starts is given.
ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "HF_HOME": str(WORK / "hf_home"),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

TOOLS = {
    "examples": "example_scripts",
    "trl": "trl_trainers",
    "peft": "peft_methods",
    "sentence-transformers": "sentence_encoders",
    "lightning": "lightning_trainer",
    "lm_eval": "language_model_evaluation",
    "quantization": "quantization",
    "accelerate": "accelerate_launches",
    "serve": "serving",
    "kernels": "kernel_library",
    "impossible": "impossible",
}
SHARED = ("setting", "texts", "launching")
SUBJECTS = (OURS, CONTROL)
# Checks are forked from a process that has imported the tools and computed nothing.
START_METHOD = "forkserver"
# Results are published; where things lie on a machine is left out.
FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.+@ -]+/)+")
LONGEST_ERROR = 1500
STARTED = time.perf_counter()


def say(*words: object) -> None:
    """A line of progress."""
    print(f"[{time.perf_counter() - STARTED:6.0f} s]", *words, flush=True)


def hash_of(paths: list[Path]) -> str:
    """A short name for the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def key_of(module: ModuleType, subject: str, examples: Path | None) -> dict[str, str]:
    """What a result depends on: versions, the sources of the check, of the examples and, for ours, of the package."""
    versions = {}
    for name in ("torch", *module.TOOLS):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    folder = Path(__file__).parent / "integrations"
    key = versions | {"check": hash_of([Path(module.__file__), *(folder / f"{name}.py" for name in SHARED)])}
    if examples:
        key["examples"] = hash_of(sorted(examples.glob("*/*.py")))
    if subject == OURS:
        package = [module for name, module in sys.modules.items() if name.partition(".")[0] == "hf_reformer"]
        key["hf_reformer"] = hash_of(sorted(Path(module.__file__) for module in package))
    return key


def find_checks(wanted: list[str] | None) -> dict[str, tuple[ModuleType, Check]]:
    """
    Checks by name, `tool: check`, with their modules.

    Raises:
        ValueError: a name that no tool and no check has.
    """
    found = {}
    for tool, module_name in TOOLS.items():
        if wanted is None or any(name.partition(":")[0] == tool for name in wanted):
            module = importlib.import_module(f".integrations.{module_name}", __package__)
            found |= {f"{tool}: {name}": (module, check) for name, check in module.CHECKS.items()}
    if wanted is None:
        return found
    chosen = {name: pair for name, pair in found.items() if name in wanted or name.partition(":")[0] in wanted}
    unknown = [name for name in wanted if name not in chosen and name not in TOOLS]
    if unknown:
        raise ValueError(f"--only {unknown}: choose tools ({', '.join(TOOLS)}) or checks as --list names them.")
    return chosen


def run_in_child(module_name: str, check_name: str, setting: Setting, log: Path, answer: Any) -> None:
    """Run one check with its output in a log; send what became of it."""
    os.setsid()
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        check = importlib.import_module(module_name).CHECKS[check_name]
        figures = check(setting)
        result = {"refused": figures["refused"]} if "refused" in figures else {"ok": True, "figures": figures}
    except BaseException as error:
        traceback.print_exc()
        result = {"ok": False, "error": FOLDERS.sub("…/", f"{type(error).__name__}: {error}")[-LONGEST_ERROR:]}
    answer.send(result)
    sys.stdout.flush()


def run_check(name: str, module: ModuleType, setting: Setting, limit: float) -> dict[str, Any]:
    """Run one check in a process of its own and return its result."""
    shutil.rmtree(setting.folder, ignore_errors=True)
    setting.folder.mkdir(parents=True)
    begun = time.perf_counter()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    target = (module.__name__, name.partition(": ")[2], setting, setting.folder / "log.txt", sending)
    child = multiprocessing.get_context(START_METHOD).Process(target=run_in_child, args=target)
    child.start()
    sending.close()
    try:
        result = receiving.recv() if receiving.poll(limit) else {"ok": False, "error": f"took more than {limit:.0f} s"}
    except EOFError:
        child.join()
        result = {"ok": False, "error": f"the process died with exit code {child.exitcode}"}
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.join()
    return result | {"seconds": round(time.perf_counter() - begun, 1)}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--only", nargs="+", help="tools or checks to run; all others keep their results")
    parser.add_argument("--again", action="store_true", help="run what has a result already, too")
    parser.add_argument("--list", action="store_true", help="name the checks and end")
    parser.add_argument("--transformers_source", type=Path, help="a checkout of transformers, for its example scripts")
    parser.add_argument(
        "--results", type=lambda name: Path(name).resolve(), default=DOCS / "integrations.json", help="a JSON file"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for one check (default %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.transformers_source:
        arguments.transformers_source = arguments.transformers_source.resolve() / "examples" / "pytorch"
        if not arguments.transformers_source.is_dir():
            parser.error(f"there is no {arguments.transformers_source}; clone the tag of your version of transformers")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run what has no result yet; return 1 if a Reformer fails where the control does not."""
    arguments = parse_arguments(argv)
    checks = find_checks(arguments.only)
    if arguments.list:
        print("\n".join(checks))
        return 0
    models = WORK / "models"
    models.mkdir(parents=True, exist_ok=True)
    save_models(models)
    os.chdir(WORK)
    os.environ |= ENVIRONMENT
    multiprocessing.set_forkserver_preload(sorted({module.__name__ for module, _ in checks.values()}))
    results = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else {}
    if arguments.only is None:
        results = {name: results.get(name, {}) for name in checks}
    for number, (name, (module, _)) in enumerate(checks.items(), start=1):
        is_example = name.partition(": ")[2] in getattr(module, "FROM_SOURCE", ())
        examples = arguments.transformers_source if is_example else None
        if is_example and not examples:
            say(f"{number}/{len(checks)} {name}: left out without --transformers_source")
            continue
        for subject in SUBJECTS:
            key, known = key_of(module, subject, examples), results.get(name, {}).get(subject, {})
            if known.get("key") == key and not arguments.again:
                continue
            folder = WORK / "checks" / name.replace(": ", "-").replace(" ", "_").replace(",", "") / subject
            setting = Setting(subject, models, folder, examples)
            result = run_check(name, module, setting, arguments.limit)
            results.setdefault(name, {})[subject] = result | {"key": key}
            outcome = "ok" if result.get("ok") else result.get("refused") or result["error"]
            say(f"{number}/{len(checks)} {name}, {subject}, {result['seconds']:.0f} s: {outcome[-300:]}")
            arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    failures = write_report(arguments.results.with_suffix(".md"), results)
    say(f"{len(results)} checks, {len(failures)} fail for the Reformer alone", *failures)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
