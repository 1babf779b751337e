"""Every test starts from the same global state and leaves it as it was."""

import os
import random


os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it once, when it is imported
# Triton reads it once, too: without a GPU its kernels run in the interpreter.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# With several workers (pytest -n) each has one core; PyTorch reads it once, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from transformers.utils import logging
from two_ranks import TwoRanks
from unwritten_memory import fill_unwritten_memory


@pytest.fixture(scope="session", autouse=True)
def unwritten_memory():
    """Reading what nobody has written shows: in tests, and in what fixtures make for many of them."""
    with pytest.MonkeyPatch.context() as patch:
        fill_unwritten_memory(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def global_state():
    """Seed torch before each test and restore afterwards whatever a test may change for the whole process."""
    python_rng, numpy_rng, torch_rng = random.getstate(), np.random.get_state(), torch.get_rng_state()
    default_dtype, num_threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_deterministic, cudnn_benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    verbosity = logging.get_verbosity()

    torch.manual_seed(0)
    yield

    logging.set_verbosity(verbosity)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn_deterministic, cudnn_benchmark
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.set_num_threads(num_threads)
    torch.set_default_dtype(default_dtype)
    torch.set_rng_state(torch_rng)
    np.random.set_state(numpy_rng)
    random.setstate(python_rng)


@pytest.fixture
def fixed_buckets(monkeypatch):
    """Rounding may turn a vector into another bucket; these are the same in every precision, wherever one begins."""

    def hash_vectors(vectors, rotations, num_buckets, implementation):
        shape = (vectors.shape[0], vectors.shape[2], rotations.shape[2], vectors.shape[1])
        return torch.randint(8, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)

    hashing = "hf_reformer.modeling.layers.lsh_attention.LSHSelfAttention._hash"
    monkeypatch.setattr(hashing, staticmethod(hash_vectors))


@pytest.fixture
def text_folder(tmp_path, monkeypatch):
    """A folder of text for experiments, whose checkpoints go elsewhere than into the repository."""
    monkeypatch.setattr("scripts.experiments.resumable.CHECKPOINTS", tmp_path / "checkpoints")
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(" ".join(str(number + 7 * i) for i in range(600)))
    return str(folder)


@pytest.fixture(scope="module")
def own_datasets_cache(tmp_path_factory):
    """Where `datasets` keeps what it has read, instead of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Two processes that compute together."""
    ranks = TwoRanks(tmp_path_factory.mktemp("two_ranks"))
    yield ranks
    ranks.close()
