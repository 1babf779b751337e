"""
Convert checkpoints that trax itself wrote, and compare logits with those that trax computes.

    python -m scripts.maintain.trax_agreement --trax_python trax_python/bin/python

The other Python is one that has trax; `trax_models.py`, which runs in it, says how to make it. The table goes to the
terminal, its numbers to docs/conversions_trax.json.

trax computes each model in float32 and, with the same weights and rotations, in float64. LSH layers get trax's own
buckets, because the random numbers of jax and of PyTorch differ; from trax's rotations the buckets are computed here,
too, and compared. So what is left in float64 is rounding, and would be large if anything were different.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from hf_reformer.modeling.conversion.trax_weights import convert_trax
from hf_reformer.modeling.ops.lsh_hashing import hash_vectors


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "conversions_trax.json"
FIXTURE = ROOT / "tests" / "data"
LIMIT = 1e-10

SIZES = {"vocab_size": 50, "d_model": 32, "d_ff": 48, "d_attention_key": 8, "d_attention_value": 8, "n_heads": 2}
AXIAL = {"pos_type": "axial", "pos_axial_shape": [8, 8], "pos_d_axial_embs": [8, 24], "max_len": 64}
THREE_AXES = {"pos_type": "axial", "pos_axial_shape": [4, 4, 4], "pos_d_axial_embs": [8, 8, 16], "max_len": 64}
LEARNED, NO_POSITIONS = {"max_len": 80}, {"pos_type": "no", "max_len": 64}
TINY = SIZES | {"vocab_size": 16, "d_model": 8, "d_ff": 16, "d_attention_key": 4, "d_attention_value": 4}
TINY |= {"pos_type": "axial", "pos_axial_shape": [4, 4], "pos_d_axial_embs": [4, 4], "max_len": 16}


def _local(before=1, after=0, length=16):
    return {"kind": "local", "settings": {"chunk_len": length, "n_chunks_before": before, "n_chunks_after": after}}


def _lsh(rounds=1, buckets=8, before=1, after=0, length=16):
    settings = {"chunk_len": length, "n_chunks_before": before, "n_chunks_after": after}
    return {"kind": "lsh", "settings": settings | {"n_hashes": rounds, "n_buckets": buckets}}


FULL = {"kind": "full", "settings": {}}


def _case(layers, layout, positions=AXIAL, activation="relu", length=64, sizes=SIZES, **more):
    model = sizes | positions
    return {"layers": layers, "layout": layout, "model": model, "activation": activation, "length": length} | more


CASES = {
    "local": _case([_local()] * 2, "save_to_file"),
    "local, neighbours on both sides": _case([_local(2, 1)] * 2, "Loop", LEARNED, "gelu_new"),
    "full": _case([FULL] * 2, "flat_weights", LEARNED, "gelu"),
    "LSH, 1 round": _case([_lsh()] * 2, "save_to_file"),
    "LSH, 4 rounds": _case([_lsh(4)] * 2, "Loop", LEARNED, "gelu_new"),
    "LSH, 2 rounds, 4 x 4 buckets": _case([_lsh(2, [4, 4])] * 2, "flat_weights", NO_POSITIONS),
    "LSH, neighbours on both sides": _case([_lsh(2, 8, 1, 1)] * 2, "weights", LEARNED),
    "local, LSH, full": _case([_local(), _lsh(2), FULL], "weights", THREE_AXES, "gelu_new"),
    "local, LSH, in bfloat16": _case([_local(), _lsh(2)], "Loop", AXIAL, bfloat16=True),
    "local, LSH, one chunk": _case([_local(), _lsh(2)], "flat_weights", LEARNED, length=16),
    # Small enough to be in the repository (--fixture).
    "local, LSH, of the tests": _case([_local(length=4), _lsh(2, 4, length=4)], "save_to_file", {}, "relu", 16, TINY),
}
for number, case in enumerate(CASES.values()):
    case["seed"] = number


def settings_of(case: dict) -> dict:
    """What a user has to say of a case, because the file does not."""
    kinds = {layer["kind"]: layer["settings"] for layer in case["layers"]}
    settings = {"attn_layers": [layer["kind"] for layer in case["layers"]], "hidden_act": case["activation"]}
    if case["model"].get("pos_type") == "no":
        settings["position_embedding_type"] = "none"
    for kind in {"local", "lsh"} & set(kinds):
        settings[f"{kind}_attn_chunk_length"] = kinds[kind]["chunk_len"]
        settings[f"{kind}_num_chunks_before"] = kinds[kind]["n_chunks_before"]
        settings[f"{kind}_num_chunks_after"] = kinds[kind]["n_chunks_after"]
    if "lsh" in kinds:
        settings |= {"num_hashes": kinds["lsh"]["n_hashes"], "num_buckets": kinds["lsh"]["n_buckets"]}
    return settings


def shifted(tokens: np.ndarray) -> torch.Tensor:
    """What trax's `ShiftRight` makes of its input, and what our model is given."""
    ids = torch.from_numpy(tokens).long()
    return torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)


def give_buckets(model, computed) -> list[float]:
    """Let the LSH layers take trax's buckets; in the list appears which part of ours from its rotations is equal."""
    equal = []

    def take(layer, rotations, buckets):
        def hash_as_trax(vectors, _, num_buckets, implementation):
            examples = zip(vectors.split(1), rotations, strict=True)
            ours = torch.cat([hash_vectors(example, own, num_buckets) for example, own in examples])
            equal.append((ours == buckets).double().mean().item())
            return buckets

        layer._hash = hash_as_trax

    layers = [layer.attention.self_attention for layer in model.reformer.encoder.layers]
    for number, layer in enumerate(layer for layer in layers if hasattr(layer, "_hash")):
        take(layer, *(torch.from_numpy(computed[f"{name}{number}"]) for name in ("rotations", "buckets")))
    return equal


def logits_of(folder: Path, case: dict, dtype: torch.dtype):
    """Ours, from the checkpoint in `folder` computed in `dtype`; the dtype of the file; equal parts of buckets."""
    computed = np.load(folder / "computed.npz")
    model = convert_trax(folder, **settings_of(case))
    file_dtype = str(model.dtype).removeprefix("torch.")
    model = model.to(dtype)
    equal = give_buckets(model, computed)
    with torch.no_grad():
        return model(shifted(computed["tokens"])).logits.numpy(), file_dtype, equal


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference, relative to the norm."""
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def compare(work: Path) -> list[dict]:
    """One row of figures for each case whose results are in `work`."""
    rows = []
    for name, case in CASES.items():
        single, double = (work / precision / name for precision in ("float32", "float64"))
        theirs = [np.load(folder / "computed.npz")["logits"] for folder in (single, double)]
        ours, _, _ = logits_of(single, case, torch.float32)
        exact, file_dtype, equal = logits_of(double, case, torch.float64)
        rows.append(
            {
                "model": name,
                "layout": case["layout"],
                "dtype": file_dtype,
                "float64": distance(exact, theirs[1]),
                "equal_buckets": min(equal, default=None),
                "float32_ours": distance(ours, theirs[1]),
                "float32_trax": distance(theirs[0], theirs[1]),
            }
        )
    return rows


def table_of(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| layers | file | dtype | ours and trax, float64 | equal buckets | float32 ours | float32 trax |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        equal = "" if row["equal_buckets"] is None else f"{row['equal_buckets']:.2%}".replace(".00", "")
        figures = " | ".join(f"{row[name]:.1e}" for name in ("float32_ours", "float32_trax"))
        start = f"| {row['model']} | `{row['layout']}` | {row['dtype']} | {row['float64']:.1e} | {equal} | "
        lines.append(start + figures + " |")
    return "\n".join(lines)


def write_fixture(work: Path):
    """The smallest checkpoint, as trax wrote it, and what trax computed in float64, for the tests."""
    folder = work / "float64" / list(CASES)[-1]
    FIXTURE.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "model.pkl.gz", FIXTURE / "trax_model.pkl.gz")
    computed = np.load(folder / "computed.npz")
    tensors = {name: torch.from_numpy(computed[name]).contiguous() for name in computed.files}
    save_file(tensors, FIXTURE / "trax_computed.safetensors")


def main():
    """Run trax, compare, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trax_python", required=True, help="a Python that has trax")
    parser.add_argument("--fixture", action="store_true", help="also write the checkpoint of tests/data anew")
    arguments = parser.parse_args()
    program = Path(__file__).with_name("trax_models.py")
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "2"}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
        for precision in ("float32", "float64"):
            command = [arguments.trax_python, program, work / "cases.json", work / precision]
            flags = ["--float64"] if precision == "float64" else []
            subprocess.run([*command, *flags], check=True, env=environment)
        rows = compare(work)
        theirs = json.loads((work / "float64" / "versions.json").read_text(encoding="utf-8"))
        if arguments.fixture:
            write_fixture(work)
    ours = {name: version(name) for name in ("hf_reformer", "torch", "transformers")}
    ours |= {"python": platform.python_version()}
    command = "python -m scripts.maintain.trax_agreement --trax_python trax_python/bin/python"
    machine = f"{platform.machine()}, {platform.system()}, CPU"
    results = {"command": command, "machine": machine, "ours": ours, "trax": theirs, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table_of(rows))
    different = [row["model"] for row in rows if not row["float64"] < LIMIT]
    if different:
        raise SystemExit(f"Other logits than trax's, beyond {LIMIT}: {different}")


if __name__ == "__main__":
    main()
