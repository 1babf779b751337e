"""
Continue a text, or write the target for a source: the prompt goes in, what follows is printed as it comes.

    hf-reformer generate --model runs/demo --prompt "import os" --max_new_tokens 200 --do_sample --top_p 0.9
    hf-reformer generate --model runs/demo --prompt_file draft.txt
    cat draft.txt | hf-reformer generate --model runs/demo
    hf-reformer generate --model runs/demo --prompt_file draft.txt --set num_hashes=4
    hf-reformer generate --model runs/pairs --prompt_file source.txt

A causal model prints the prompt and its continuation. One that `hf-reformer train --objective seq2seq` made reads the
prompt and prints what it writes for it.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TextStreamer, set_seed

from ..training.row_batches import check_length, longest_input
from .causal_models import ARCHITECTURES, FOR_PAIRS, check_model
from .command_line import mistakes_end, parse_settings, usable_device


NEW_TOKENS = 256
SAMPLING = ("temperature", "top_k", "top_p")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line; a value that cannot work ends the program with a message."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a saved model, or a name on the Hub")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", help="text to continue, or to read; without it and --prompt_file it is read from stdin"
    )
    source.add_argument("--prompt_file", type=Path, help="UTF-8 file with this text")
    parser.add_argument(
        "--max_new_tokens", type=int, help=f"tokens to write (default {NEW_TOKENS}; for pairs as its targets were)"
    )
    parser.add_argument("--do_sample", action="store_true", help="draw each token instead of taking the likeliest")
    parser.add_argument("--temperature", type=float, help="below 1 sharpens, above 1 flattens; with --do_sample")
    parser.add_argument("--top_k", type=int, help="draw among this many likeliest tokens; with --do_sample")
    parser.add_argument("--top_p", type=float, help="draw among the tokens that hold this probability; same")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default %(default)s)")
    parser.add_argument(
        "--set", nargs="+", default=[], help="other settings of the config than the model's, such as num_hashes=4"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        parser.error(f"--max_new_tokens is {arguments.max_new_tokens}; it must be at least 1")
    unused = [f"--{name}" for name in SAMPLING if getattr(arguments, name) is not None]
    if unused and not arguments.do_sample:
        parser.error(f"{', '.join(unused)} has no effect without --do_sample; add it")
    return arguments


def read_prompt(arguments: argparse.Namespace) -> str:
    """The text to continue.

    Raises:
        ValueError: if there is none.
    """
    if arguments.prompt is not None:
        prompt = arguments.prompt
    elif arguments.prompt_file is not None:
        if not arguments.prompt_file.is_file():
            raise ValueError(f"There is no file at {arguments.prompt_file}; check --prompt_file.")
        prompt = arguments.prompt_file.read_bytes().decode("utf-8")
    else:
        prompt = sys.stdin.buffer.read().decode("utf-8")
    if not prompt:
        raise ValueError("The prompt is empty; give some text with --prompt, --prompt_file or on stdin.")
    return prompt


def generate(arguments: argparse.Namespace) -> None:
    """Print the prompt and, token by token, its continuation; of a model for pairs, what it writes for the prompt.

    Raises:
        ValueError: if the prompt is empty, or does not fit the model together with the new tokens; if `set` names
            what is no setting.
    """
    settings = parse_settings(arguments.set)
    prompt, device = read_prompt(arguments), usable_device(arguments.device)
    for_pairs = check_model(arguments.model, (*ARCHITECTURES, FOR_PAIRS)) == FOR_PAIRS
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    auto_class = AutoModelForSeq2SeqLM if for_pairs else AutoModelForCausalLM
    model = auto_class.from_pretrained(arguments.model, **settings).eval()
    model.to(device)
    # What a model for pairs was trained to write is in its generation config.
    trained = getattr(model.generation_config, "max_new_tokens", None) if for_pairs else None
    new_tokens = arguments.max_new_tokens or trained or NEW_TOKENS
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=for_pairs, verbose=False).to(device)
    length = inputs["input_ids"].shape[1]
    longest = longest_input(model.config)
    if for_pairs and longest is not None:
        check_length(length, model.config, "The length of the prompt")
        check_length(new_tokens, model.config, "max_new_tokens")
    elif longest is not None and length + new_tokens > longest:
        raise ValueError(
            f"The prompt has {length} tokens, which with {new_tokens} new ones is more than the "
            f"{longest} that this model takes; shorten one of them."
        )
    set_seed(arguments.seed)
    sampling = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=arguments.do_sample,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )


def main(argv: list[str] | None = None) -> None:
    """Generate; a mistake in the arguments ends the program with its message."""
    arguments = parse_arguments(argv)
    with mistakes_end("generate"):
        generate(arguments)
