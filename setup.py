"""Packaging of hf_reformer: the folders beside it are installed under its one import name."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).parent

PACKAGE_DIR = {
    "hf_reformer": "hf_reformer",
    "hf_reformer.commands": "commands",
    "hf_reformer.configuration": "configuration",
    "hf_reformer.modeling": "modeling",
    "hf_reformer.modeling.conversion": "modeling/conversion",
    "hf_reformer.modeling.decoding": "modeling/decoding",
    "hf_reformer.modeling.kernels": "modeling/kernels",
    "hf_reformer.modeling.layers": "modeling/layers",
    "hf_reformer.modeling.memory": "modeling/memory",
    "hf_reformer.modeling.ops": "modeling/ops",
    "hf_reformer.starter": "starter",
    "hf_reformer.tokenization": "tokenization",
    "hf_reformer.training": "training",
}

# what training needs, and nobody who only imports the package
TRAIN = [
    "accelerate",
    "datasets",
    "matplotlib",
    "nervaluate",
    "numpy",
    "pyarrow",
    "regex",
    "scikit-learn",
    "torchmetrics",
    "tqdm",
]
# what `make docs` builds the site with
DOCS = ["mkdocs", "mkdocs-material", "mkdocstrings[python]"]


def read_version() -> str:
    """Return `__version__` as written in the facade, which cannot be imported before torch is installed."""
    source = (ROOT / "hf_reformer" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


class BuildWithModelCard(build_py):
    """Puts the template of model cards beside the folders, where `hf_reformer.training` reads it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(ROOT / "model_card.md", Path(self.build_lib) / "hf_reformer" / "model_card.md")


setup(
    name="hf_reformer",
    version=read_version(),
    description="The Reformer for Hugging Face Transformers: LSH attention, reversible layers, chunked feed-forward",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hf_reformer authors",
    project_urls={"Paper": "https://arxiv.org/abs/2001.04451"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir=PACKAGE_DIR,
    packages=list(PACKAGE_DIR),
    cmdclass={"build_py": BuildWithModelCard},
    entry_points={"console_scripts": ["hf-reformer = hf_reformer.commands.entry_point:main"]},
    package_data={"hf_reformer": ["py.typed"], "hf_reformer.starter": ["*.json", "*.safetensors", "README.md"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<5.25",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "packaging",
    ],
    extras_require={
        "train": TRAIN,
        "serve": ["transformers[serving]"],
        # accelerate as for every command that generates
        "demo": ["accelerate", "gradio", "matplotlib"],
        "docs": [*TRAIN, *DOCS, "setuptools>=77"],
        "contract": [*TRAIN, "httpx", "parameterized", "peft", "pytest", "pytest-timeout"],
        "test": [
            *TRAIN,
            *DOCS,
            "codespell",
            "deepspeed",
            "gradio",
            "hypothesis",
            "ipykernel",
            "mypy",
            "nbclient",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "openai",
            "peft",
            "pytest",
            "pytest-xdist",
            "reformer-pytorch",
            "ruff",
            "selenium",
            "sentence-transformers",
            "setuptools>=77",
            "transformers-mlinter",
            "transformers[serving]",
            "triton; sys_platform == 'linux'",
        ],
        # what scripts/maintain/check_integrations.py tries the package in
        "integrations": [
            *TRAIN,
            "bitsandbytes",
            "evaluate",
            "kernels",
            "lightning",
            "lm_eval",
            "peft",
            "sentence-transformers",
            "seqeval",
            "torchao",
            "transformers[serving]",
            "trl",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
