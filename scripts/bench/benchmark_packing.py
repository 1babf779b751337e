"""
What packing is worth: training steps on documents of many lengths, packed into rows, beside the same ones padded.

    python -m scripts.bench.benchmark_packing              # some minutes on two cores
    python -m scripts.bench.benchmark_packing --table      # of docs/packing.json

The documents are files of Python's standard library that are no longer than the context; the model is the recipe's.
Forward and backward, without the optimizer; the ways take turns. Also what it costs to keep documents apart: a row of
16,384 tokens beside the same row as one document. Writes docs/packing.json.
"""

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM
from hf_reformer.modeling.packed_rows import alignment_of
from hf_reformer.training import DataCollatorForPacking, recipe_config
from hf_reformer.training.corpus import read_standard_library
from hf_reformer.training.provenance import machine, versions


RESULTS = Path(__file__).parents[2] / "docs" / "packing.json"
CONTEXT, NUM_DOCUMENTS, ROWS_PADDED, SEED = 4096, 32, 4, 0
ROW, DOCUMENTS_IN_ROW = 16384, (1, 16)
MOST_APART = 1e-5


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default docs/packing.json)")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    return parser.parse_args(argv)


def documents(context: int, count: int) -> list[dict[str, list[int]]]:
    """A random sample of the files that are no longer than the context, as tokens."""
    tokenizer = ReformerByteTokenizer()
    texts = [text for text in read_standard_library()["text"][:] if 1 < len(text.encode()) <= context]
    return [{"input_ids": tokenizer(text).input_ids} for text in random.Random(SEED).sample(texts, count)]


def padded(examples: list[dict[str, list[int]]], size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of `size` documents, padded on the right to the longest of them."""
    batches = []
    for start in range(0, len(examples), size):
        rows = [torch.tensor(example["input_ids"]) for example in examples[start : start + size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def row_of(count: int) -> dict[str, torch.Tensor]:
    """A row of random tokens, as so many documents of one length."""
    ids = torch.randint(2, 258, (1, ROW), generator=torch.Generator().manual_seed(SEED))
    batch = {"input_ids": ids, "labels": ids}
    return batch if count == 1 else batch | {"position_ids": (torch.arange(ROW) % (ROW // count))[None]}


def seconds_of(model: ReformerForCausalLM, batches: list[dict[str, torch.Tensor]]) -> float:
    """Of forward and backward over all batches."""
    start = time.perf_counter()
    for batch in batches:
        model(**batch).loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def check_agreement(model: ReformerForCausalLM, ways: dict[str, list[dict[str, torch.Tensor]]]) -> None:
    """
    The loss of all documents must be the same padded and packed, where both hash alike.

    Raises:
        SystemExit: It is not.
    """
    hash_seed, model.config.hash_seed = model.config.hash_seed, SEED
    with torch.no_grad():
        padded, packed = (
            sum(model(**batch, num_items_in_batch=1).loss.item() for batch in ways[name])
            for name in ("padded", "packed")
        )
    model.config.hash_seed = hash_seed
    if abs(packed - padded) > MOST_APART * padded:
        raise SystemExit(f"padded and packed documents disagree: their losses sum up to {padded} and {packed}")


def measure(repeats: int) -> dict[str, dict]:
    """Medians and what was run, the ways in turn."""
    torch.manual_seed(SEED)
    model = ReformerForCausalLM(recipe_config(CONTEXT)).train()
    examples = documents(CONTEXT, NUM_DOCUMENTS)
    collate = DataCollatorForPacking(CONTEXT, alignment_of(model.config))
    packed = collate(examples)
    rows = [{name: tensor[i : i + 2] for name, tensor in packed.items()} for i in range(0, len(packed["labels"]), 2)]
    ways = {"padded": padded(examples, ROWS_PADDED), "packed": rows}
    ways |= {f"{count} in a row of {ROW:,}": [row_of(count)] for count in DOCUMENTS_IN_ROW}
    check_agreement(model, ways)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(repeats + 1)):
        for name, batches in ways.items():
            seconds[name].append(seconds_of(model, batches))
    num_tokens = sum(len(example["input_ids"]) for example in examples)
    return {
        name: {
            # The first time warms up.
            "seconds": median(seconds[name][1:]),
            "tokens": num_tokens if name in ("padded", "packed") else ROW,
            "places": sum(batch["input_ids"].numel() for batch in batches),
        }
        for name, batches in ways.items()
    }


def table(measured: dict[str, dict]) -> str:
    """As Markdown."""
    lines = ["| | real tokens | tokens in rows | seconds | real tokens a second |", "|---|---|---|---|---|"]
    for name, row in measured.items():
        speed = row["tokens"] / row["seconds"]
        lines.append(f"| {name} | {row['tokens']:,} | {row['places']:,} | {row['seconds']:.2f} | {speed:,.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, unless only the table is wanted."""
    arguments = parse_arguments(argv)
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        stored = {"measured": measure(arguments.repeats), "machine": machine(), "versions": versions()}
        arguments.results.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(arguments.results.read_text(encoding="utf-8"))["measured"]))


if __name__ == "__main__":
    main()
