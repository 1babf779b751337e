"""
The operators alone, as a folder for the `kernels` library of Hugging Face: LSH and local attention, hashing.

    python -m scripts.maintain.kernel_folder runs/kernel

It holds `build.toml` and `torch-ext/` for kernel-builder, and, as Triton compiles on the machine that runs it, the
builds, too: `kernels.get_local_kernel(Path("runs/kernel"))` loads them, and a repository on the Hub holds the same
files. They need PyTorch and, for the fast kernels of a GPU, Triton.
"""

import argparse
import hashlib
import json
from pathlib import Path

import hf_reformer
from hf_reformer.modeling.remote_code import flat_files


NAME = "hf_reformer"
FUNCTIONS = {
    "lsh_operator": ["lsh_attention"],
    "local_operator": ["local_attention"],
    "lsh_hashing": ["draw_rotations", "hash_vectors"],
}
# Where Triton's kernels are tried, and the CPU, where plain and fused operations of PyTorch are.
BACKENDS = ("cpu", "cuda", "rocm")
BUILD = """[general]
name = "hf-reformer"
license = "Apache-2.0"
version = 1
backends = [{backends}]
"""


def sources() -> dict[str, str]:
    """The files of the package that the folder holds, by name."""
    imports = [f"from .{module} import {', '.join(names)}" for module, names in FUNCTIONS.items()]
    public = sorted(name for names in FUNCTIONS.values() for name in names)
    about = f'"""Attention of the Reformer, from hf_reformer {hf_reformer.__version__}."""'
    facade = "\n".join([about, "", *sorted(imports), "", "", f"__all__ = {json.dumps(public)}", ""])
    return {"__init__.py": facade} | flat_files([f"hf_reformer.modeling.ops.{module}" for module in FUNCTIONS])


def write_kernel(folder: Path) -> None:
    """Write sources and builds into `folder`."""
    files = sources()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    write(folder, {"build.toml": BUILD.format(backends=backends)})
    write(folder / "torch-ext" / NAME, files)
    for backend in BACKENDS:
        metadata = {
            "name": "hf-reformer",
            # Several versions may be loaded side by side.
            "id": f"_{NAME}_{digest}",
            "version": 1,
            "license": "Apache-2.0",
            "backend": {"type": backend},
            "python-depends": [],
        }
        build = folder / "build" / f"torch-{backend}"
        write(build, {"metadata.json": json.dumps(metadata, indent=2) + "\n"} | files)


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write the folder that is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    write_kernel(folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in (folder / 'build').iterdir()))}")


if __name__ == "__main__":
    main()
