"""
What trax itself computes: models of its `ReformerLM`, saved by its own code, with their logits. See `trax_agreement`.

This file runs in a Python that has trax, not in this package's, and imports nothing of it. trax is from 2021, and runs
unchanged with jax 0.4.13 on Python 3.9:

    python3.9 -m venv trax_python
    trax_python/bin/pip install "jax==0.4.13" "jaxlib==0.4.13" "numpy<1.24" "scipy<1.11" gin-config absl-py six
    trax_python/bin/pip install --no-deps "trax==1.4.1"

TensorFlow and what else trax imports for its data and its plots is not needed: empty modules stand in for them, with
the few functions on files that saving takes.
"""

import argparse
import functools
import gzip
import importlib.abc
import importlib.machinery
import json
import os
import pickle
import platform
import sys
import types
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock


NOT_NEEDED = {
    "gym",
    "matplotlib",
    "psutil",
    "t5",
    "tensorflow",
    "tensorflow_datasets",
    "tensorflow_text",
    "transformers",
}


class StandIn(types.ModuleType):
    """A module in which everything is there and does nothing."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for the modules that are not needed."""

    def find_spec(self, name, path, target=None):
        is_needed = name.split(".")[0] not in NOT_NEEDED
        return None if is_needed else importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        if module.__name__ == "tensorflow":
            files = types.SimpleNamespace(GFile=open, exists=os.path.exists, rename=replace)
            module.io = types.SimpleNamespace(gfile=files)
            module.TensorShape, module.DType = type("TensorShape", (), {}), type("DType", (), {})


def replace(source, target, overwrite=False):
    """`tf.io.gfile.rename`."""
    os.replace(source, target)


sys.meta_path.insert(0, Finder())

# Read before jax is imported: computing in float64, which tells a rounding from a difference.
if "--float64" in sys.argv:
    os.environ["JAX_ENABLE_X64"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jaxlib  # noqa: E402
import numpy as np  # noqa: E402
from trax import fastmath, shapes  # noqa: E402
from trax import layers as tl  # noqa: E402
from trax.models import ReformerLM  # noqa: E402
from trax.supervised import training  # noqa: E402


# Rotations of 32 bits in both precisions, so that both hash alike.
fastmath.random.normal = lambda key, shape: jax.random.normal(key, tuple(shape), np.float32)

ATTENTION = {"lsh": tl.LSHSelfAttention, "local": tl.SelfAttention, "full": tl.SelfAttention}
ACTIVATIONS = {"relu": tl.Relu, "gelu_new": tl.FastGelu, "gelu": tl.Gelu}


def build(case):
    """A `ReformerLM` in eval mode, not yet initialized."""
    sizes = {name: tuple(size) if isinstance(size, list) else size for name, size in case["model"].items()}
    kinds = [functools.partial(ATTENTION[layer["kind"]], **layer["settings"]) for layer in case["layers"]]
    return ReformerLM(
        attention_type=kinds,
        n_layers=len(kinds),
        ff_activation=ACTIVATIONS[case["activation"]],
        dropout=0.0,
        mode="eval",
        **sizes,
    )


def stir(weights, seed):
    """Weights as after training: none is 0 or 1, so that none can change places with another unseen."""
    random = np.random.RandomState(seed)

    def changed(weight):
        numbers = random.standard_normal(weight.shape)
        if weight.ndim == 1:
            return np.asarray(weight + 0.3 * numbers, np.float32)
        return np.asarray(numbers * weight.shape[-2] ** -0.5, np.float32)

    return fastmath.nested_map(changed, weights)


def save(model, folder, layout, signature):
    """Write the model as trax does, or did, by trax's code where it still has it."""
    path = folder / "model.pkl.gz"
    if layout == "save_to_file":
        model.save_to_file(str(path), input_signature=signature)
    elif layout == "Loop":
        loop = types.SimpleNamespace(
            _output_dir=str(folder),
            is_chief=True,
            _model=model,
            _eval_model=model,
            _use_memory_efficient_trainer=False,
            _trainer_per_task=[types.SimpleNamespace(slots=())],
            _batch_signature=(signature,),
            _history=types.SimpleNamespace(to_dict=dict),
            step=1,
        )
        loop._to_bits = functools.partial(training.Loop._to_bits, loop)
        training.inputs.save_data_counters = lambda folder: None
        training.Loop.save_checkpoint(loop, "model")
    elif layout == "flat_weights":
        # As the trainer of trax 1.3 wrote its arrays, which then were NumPy's.
        flat, state = (
            list(map(np.asarray, part)) for part in tl.flatten_weights_and_state(model.weights, model.state)
        )
        content = {"step": 1, "flat_weights": flat, "flat_state": state, "input_signature": signature}
        with gzip.open(path, "wb") as file:
            pickle.dump(content, file, protocol=4)
    else:
        # As the trainer of trax 1.2 did.
        content = {"step": 1, "weights": fastmath.nested_map(np.asarray, model.weights), "slots": (), "opt_params": {}}
        (folder / "model.pkl").write_bytes(pickle.dumps(content, protocol=3))


def rotations_of(case, hash_rngs):
    """What each LSH layer hashes with, `[examples, heads, D, rounds, sum(factors) / 2]`."""
    found = []
    layers = [layer["settings"] for layer in case["layers"] if layer["kind"] == "lsh"]
    for settings, keys in zip(layers, hash_rngs):  # noqa: B905 Python 3.9
        factors = settings["n_buckets"]
        width = (factors if isinstance(factors, int) else sum(factors)) // 2
        shape = (case["model"]["d_attention_key"], settings["n_hashes"], width)
        drawn = []
        for key in keys:
            _, key = fastmath.random.split(key)
            drawn.append(np.asarray(fastmath.random.normal(key, shape), np.float32))
        heads = case["model"]["n_heads"]
        found.append(np.stack(drawn).reshape(-1, heads, *shape))
    return found


def buckets_of(case, states):
    """The buckets of each LSH layer, `[examples, heads, rounds, L]`."""
    found = []
    layers = [layer["settings"] for layer in case["layers"] if layer["kind"] == "lsh"]
    for settings, state in zip(layers, states):  # noqa: B905 Python 3.9
        factors = settings["n_buckets"]
        number = factors if isinstance(factors, int) else int(np.prod(factors))
        shape = (-1, case["model"]["n_heads"], settings["n_hashes"], case["length"])
        # Each round has numbers of its own.
        found.append(np.asarray(state).reshape(shape) % number)
    return found


def run(case, folder, is_float64):
    """Save the model of `case` in `folder`, and beside it what it computes."""
    tokens = np.random.RandomState(case["seed"]).randint(0, case["model"]["vocab_size"], (2, case["length"]))
    tokens = tokens.astype(np.int32)
    model = build(case)
    signature = shapes.signature(tokens)
    model.init(signature, rng=fastmath.random.get_prng(case["seed"]))
    weights = stir(model.weights, case["seed"])
    if case.get("bfloat16"):
        weights = fastmath.nested_map(lambda weight: np.asarray(weight).astype(jax.numpy.bfloat16), weights)
    model.weights = fastmath.nested_map(jax.numpy.asarray, weights)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder, case["layout"], signature)
    # Only now, so that a file in bfloat16 is compared in the precision of the others.
    dtype = np.float64 if is_float64 else np.float32
    model.weights = fastmath.nested_map(lambda weight: jax.numpy.asarray(np.asarray(weight).astype(dtype)), weights)
    states = tl.flatten_weights_and_state((), model.state)[1]
    rotations = rotations_of(case, [state for state in states if state.dtype == np.uint32 and state.ndim == 2])
    logits = model(tokens)
    states = tl.flatten_weights_and_state((), model.state)[1]
    buckets = buckets_of(case, [state for state in states if state.dtype == np.int32 and state.ndim == 2])
    results = {"tokens": tokens, "logits": np.asarray(logits)}
    results.update({f"rotations{index}": rotation for index, rotation in enumerate(rotations)})
    results.update({f"buckets{index}": bucket for index, bucket in enumerate(buckets)})
    np.savez(folder / "computed.npz", **results)


def main():
    """Run each case of a JSON file in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", type=Path, help="JSON: settings by name of the case")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--float64", action="store_true")
    arguments = parser.parse_args()
    for name, case in json.loads(arguments.cases.read_text()).items():
        run(case, arguments.folder / name, arguments.float64)
    versions = {"trax": version("trax"), "jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__}
    versions["python"] = platform.python_version()
    (arguments.folder / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
