"""What became of each test of transformers' suites: kept while pytest runs (a plugin), read as Markdown afterwards."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest


# Why tests are skipped, for a reader who knows neither suite nor package: words of the skip, and the reason.
REASONS = {
    "test requires (multiple accelerators|accelerator|MPS)": "The machine has no accelerator.",
    "test requires (the kernels library|Flash Attention)": "Flash attention, also from the `kernels` library, knows "
    "dense and sliding-window attention; sparse layers refuse it and have kernels of their own.",
    "test requires (ExecuTorch|ONNXScript|OpenVINO|optimum-quanto)": "The package is not installed: none of what it "
    "makes of a model is claimed to work.",
    "A cache cannot be exported": "A cache has shapes that follow from padding and buckets; exporting one is refused, "
    "exporting the model without it is tested.",
    "static cache|without graph breaks|4D attention masks": "`_can_compile_fullgraph` is False: it means a static "
    "cache, which is refused, because ours grows; our own compiles as one program. Masks have two dimensions.",
    "new attention mask API": "`_supports_attention_backend` is False: sparse layers have implementations of their "
    "own. Packed rows are tested in tests/test_modeling_documents.py.",
    "RoPE|partial rope": "Rotary positions have no module of their own to be looked for, and turn whole heads.",
    "sliding window mask": "There is no `sliding_window` in the config.",
    "does not have position embeddings": "Tables of positions change their size at loading, by the config's "
    "`axial_pos_shape` or `max_position_embeddings`.",
    "grouped_mm|sparse experts|router_logits|MTP|recurrent layer": "The model has no experts, no extra heads that "
    "predict further tokens, no recurrent layers.",
    "non standard Cache|Do not take a cache": "A cache is a `ReformerCache`; both its names are tested in "
    "tests/test_decoding_cache.py.",
    "capture_outputs": "The model returns hidden states and maps itself; hooks would see rows as they are shifted.",
    "_keep_in_fp32_modules": "No module has to stay in float32: the streams do, in layers of any dtype.",
    "No conversion found": "Published checkpoints load under the names of weights that they have.",
    "TP plan": "There is no plan for tensor parallelism; what there is: FSDP, ZeRO, sequence parallelism.",
    "omposite|subconfigs|Reformer(Model|ForConditionalGeneration) does not support SDPA": "There are no models inside "
    "with configs of their own kind.",
    "sequence-to-sequence|decoder-only": "It is about labels that a causal head shifts, or about those of an encoder "
    "with a decoder, which are aligned; the other configs have no such head.",
    "is encoder-decoder|doesn't prepare `position_ids`": "It continues a prompt; with an encoder, `generate` takes "
    "neither embeddings nor positions of the text that goes on.",
    "uses another name": "Hidden states of an encoder and a decoder have names of their own; layers give them in the "
    "same way as those of one stack.",
    "no `base_model_class`": "An encoder with a decoder has no model without a head that `AutoModel` makes. Its two "
    "sides are models of one stack, of which rotary positions are tested.",
    "pipeline_model_mapping|Timm|PyTesseract|requires av|not implemented": "A pipeline for images, sound, video or "
    "tables.",
}

HEAD = """\
# Transformers' own test suites

`make contract` runs the common suites that transformers has for its own models on those of this package: nine small
configs ({causal, both ways, encoder with decoder} x {local, LSH, both kinds of layers}) and every pipeline for text.
It writes this page and [contract.json](contract.json). A test that skips one of a config's models counts as skipped.

Nothing is switched off. What the suites let authors of models say for themselves is said for

- the classes that generate: they have other names, because the suites leave out stock's Reformer by name, and make a
  cache unless told otherwise, because the suites continue from what a plain call returns; here a cache is made on
  request. The suites set `is_decoder` in every config that they let generate, which an encoder with a decoder refuses;
- gradient checkpointing, which is tested on layers that are not reversible; reversible ones compute again anyway;
- the content of a cache, which is not keys and values of every token;
- `test_sdpa_can_dispatch_non_composite_models`: a choice of attention is kept; without one the config names none,
  since each call takes the fastest implementation that can serve it;
- `test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions`: "sdpa" keeps no attention maps; a call that
  asks it for them is refused and does not get None;
- tests of rotary positions, which have a config with such positions, in LSH layers too;
- `test_model_rope_scaling_from_config_1_dynamic`: frequencies that change with the length of the input are refused,
  since cached keys are turned already;
- `test_can_capture_specific_layers_hidden_states`: it runs, though the class names nothing that hooks could record;
- `test_training_overfit`: without dropout, and causal models with `lsh_sliding_window`: only with windows does
  generation read a text as training did. An encoder with a decoder is trained only: the prompt that it would be given
  to continue would be its source."""

# From the worst to the best: a test that skips one of its models counts as skipped.
OUTCOMES = ("fail", "skip", "pass")


class Collector:
    """Keeps the outcome of each test under `[suite][test][configuration]`."""

    def __init__(self, path: Path):
        self.path = path
        self.tests = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Note with a report which class of transformers its test comes from."""
        report = yield
        report.suite = suite_of(item.cls, item.originalname)
        return report

    def pytest_runtest_logreport(self, report):
        """Keep the worst of what became of a test, its subtests and what goes before and after."""
        if report.passed and report.when != "call":
            return
        outcome = "pass" if report.passed else f"fail: {_error(report)}" if report.failed else f"skip: {_skip(report)}"
        _, configuration, test = report.nodeid.split("::")
        seen = self.tests.setdefault(report.suite, {}).setdefault(test, {})
        seen[configuration] = min(seen.get(configuration, "pass"), outcome, key=_severity)

    def pytest_sessionfinish(self):
        """Write the outcomes down."""
        self.path.write_text(json.dumps(self.tests), encoding="utf-8")


def pytest_addoption(parser):
    """Where the outcomes go."""
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config):
    """Begin to collect."""
    config.pluginmanager.register(Collector(config.getoption("--outcomes")))


def suite_of(cls: type, test: str) -> str:
    """The name of the class that first defined `test`, which those in contract_suites.py inherit from."""
    return [base for base in cls.__mro__ if test in vars(base)][-1].__name__


def _severity(outcome: str) -> int:
    return OUTCOMES.index(outcome[:4])


def _error(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    where = f"{Path(crash.path).name}:{crash.lineno}: " if crash else ""
    return (where + " ".join((crash.message if crash else str(report.longrepr)).split()))[:300]


def _skip(report) -> str:
    words = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(words.removeprefix("Skipped: ").split())


def outcomes(tests: dict[str, dict[str, dict[str, str]]]) -> list[tuple[str, str, str, str]]:
    """Every outcome with its suite, test and configuration."""
    return [
        (suite, test, configuration, outcome)
        for suite, of_suite in sorted(tests.items())
        for test, of_test in sorted(of_suite.items())
        for configuration, outcome in sorted(of_test.items())
    ]


def counts(tests: dict[str, dict[str, dict[str, str]]]) -> dict[str, int]:
    """How many tests failed, were skipped, passed."""
    found = Counter(outcome[:4] for *_, outcome in outcomes(tests))
    return {outcome: found[outcome] for outcome in OUTCOMES}


def reason_for(outcome: str) -> str | None:
    """Why a test was skipped, if `REASONS` knows."""
    return next((reason for words, reason in REASONS.items() if re.search(words, outcome)), None)


def unexplained(tests: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """What skipped tests say for themselves where `REASONS` has nothing to add."""
    skipped = [(test, outcome) for _, test, _, outcome in outcomes(tests) if outcome.startswith("skip")]
    return sorted({f"{test}: {outcome}" for test, outcome in skipped if reason_for(outcome) is None})


def markdown(runs: dict[str, dict]) -> str:
    """docs/contract.md for the runs in docs/contract.json, the newest transformers first."""
    lines = [HEAD]
    for run in sorted(runs.values(), key=lambda run: [int(part) for part in run["transformers"].split(".")[:2]])[::-1]:
        lines += _section(run)
    return "\n".join(lines) + "\n"


def _section(run: dict) -> list[str]:
    total = counts(run["tests"])
    lines = [
        f"\n## Transformers {run['transformers']}\n",
        f"{total['pass']} pass, {total['fail']} fail, {total['skip']} skip. torch {run['torch']}, Python "
        f"{run['python']}, {run['processor']}. Suites: {', '.join(run['origins'])}.",
    ]
    if run["left_out"]:
        lines.append(f"Left out, because the repository could not be had: {', '.join(run['left_out'])}.")
    suites = {suite: counts({suite: tests}) for suite, tests in run["tests"].items()}
    lines += ["\n| suite | pass | fail | skip |\n|---|---|---|---|"]
    lines += [f"| {suite} | {of['pass']} | {of['fail']} | {of['skip']} |" for suite, of in sorted(suites.items())]
    skipped, failed = {}, {}
    for _, test, configuration, outcome in outcomes(run["tests"]):
        if outcome.startswith("skip"):
            skipped.setdefault(reason_for(outcome) or f"No reason: {outcome}", []).append(test)
        elif outcome.startswith("fail"):
            failed.setdefault(f"`{test}`: {outcome}", []).append(configuration)
    if failed:
        lines += ["\n| fails | with |\n|---|---|"]
        lines += [f"| {what.replace('|', '/')} | {', '.join(where)} |" for what, where in failed.items()]
    if skipped:
        lines += ["\n| skipped because | times | tests |\n|---|---|---|"]
    for reason, tests in sorted(skipped.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {reason} | {len(tests)} | {', '.join(f'`{test}`' for test in sorted(set(tests)))} |")
    return lines
