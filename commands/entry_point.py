"""`hf-reformer COMMAND [ARGUMENTS...]`."""

import sys
from importlib import import_module
from importlib.metadata import version


# Name, the function that runs it, and what it does.
COMMANDS = {
    "train": ("train:run_process", "train a model, causal, masked or sequence to sequence, on your own text"),
    "classify": ("classify:run_process", "train a classifier on your own labels, or label texts with one"),
    "tag": ("tag:run_process", "train a model that finds and labels parts of texts, or use one"),
    "answer": ("answer:run_process", "train a model that answers questions with a part of a text, or use one"),
    "embed": ("embed:main", "a vector for each text, also as a folder for sentence-transformers"),
    "score": ("score:main", "bits per byte of each text, to find odd ones"),
    "evaluate": ("evaluate:main", "measure a model in bits per byte on held-out text, at several lengths"),
    "generate": ("generate:main", "continue a text"),
    "export": ("export:main", "save a model with its code, for people without the package"),
    "serve": ("serve:main", "serve a model to clients of OpenAI's API"),
    "demo": ("demo:main", "a page in the browser that shows what a model reads"),
    "convert": ("convert:main", "make a model from weights of trax, reformer-pytorch, GPT-2 or Llama"),
    "memory": ("memory:main", "predict the memory of a training step, and say what would help"),
}
# What `pip install hf_reformer` leaves out, by the extra that brings it. A command needs "train", or that of its name.
OF_EXTRA = {
    "train": ("accelerate", "datasets", "matplotlib", "nervaluate", "numpy", "pyarrow", "sklearn", "torchmetrics"),
    "serve": ("accelerate", "fastapi", "openai", "pydantic", "uvicorn"),
    "demo": ("accelerate", "gradio", "matplotlib"),
}


def usage() -> str:
    """What can be typed."""
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: hf-reformer COMMAND [ARGUMENTS...]", "", *lines, "", "hf-reformer COMMAND --help says more."]
    )


def main() -> None:
    """Run the command that is named on the command line, or say which there are."""
    _, *given = sys.argv
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if given else 2)
    name, *arguments = given
    if name == "--version":
        print(f"hf_reformer {version('hf_reformer')}")
        return
    if name not in COMMANDS:
        sys.exit(f"{name!r} is no command of hf-reformer.\n\n{usage()}")
    module, _, function = COMMANDS[name][0].partition(":")
    # What parsers of arguments call the program.
    sys.argv = [f"hf-reformer {name}", *arguments]
    try:
        command = getattr(import_module(f".{module}", __package__), function)
    except ModuleNotFoundError as error:
        extra = name if name in OF_EXTRA else "train"
        if (error.name or "").partition(".")[0] not in OF_EXTRA[extra]:
            raise
        sys.exit(f"hf-reformer {name} needs {error.name}, which is not installed: pip install 'hf_reformer[{extra}]'.")
    command()
