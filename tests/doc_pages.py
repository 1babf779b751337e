"""The pages of the documentation: their blocks of code, and what a user who types them has on the disk."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tiny_models import WINDOWS, make_model
from transformers import ReformerTokenizer

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"))
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(hf-reformer [a-z]+ [^`\n]*--[^`\n]*)`")
SENTENCE = "The quick brown fox jumps over the lazy dog, and reads on. "
# What stands for a model that somebody has trained.
SMALL = WINDOWS | {"position_embedding_type": "rotary", "initializer_range": 0.05, "vocab_size": 258}


@dataclass(frozen=True)
class Block:
    """
    Attributes:
        page: Its name in the repository.
        line: Where the block's code begins.
        language: Behind the backticks.
        text: The code.
    """

    page: str
    line: int
    language: str
    text: str


def blocks_of(page: str, *languages: str) -> list[Block]:
    """The blocks of code of a page in these languages, or in any."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in BLOCK.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def commands_in(shell: str) -> list[str]:
    """The commands of a shell block, each as one line, without comments."""
    lines = shell.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def commands_of(page: str) -> list[str]:
    """The commands of all shell blocks of a page."""
    return [command for block in blocks_of(page, "bash") for command in commands_in(block.text)]


def commands_in_prose(page: str) -> list[str]:
    """Those that its running text and tables name, whole ones or what is new in them."""
    return INLINE.findall(BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8")))


def save(model, folder: Path, tokenizer=None) -> None:
    """A model with its tokenizer, bytes if none is given."""
    model.save_pretrained(folder)
    (tokenizer or ReformerByteTokenizer()).save_pretrained(folder)


def write_texts(folder: Path) -> None:
    """Texts, tables, sequences and code."""
    for name in ("my_texts", "many_short_texts", "my_dataset", "my_tables", "my_project", "genomes"):
        (folder / name).mkdir()
    for number in range(6):
        text = f"Text {number}: {SENTENCE * (number + 4)}\n"
        (folder / "my_texts" / f"{number}.txt").write_text(text)
        (folder / "many_short_texts" / f"{number}.txt").write_text(text[: 60 + 20 * number])
        (folder / "my_project" / f"module_{number}.py").write_text(f'"""{text.strip()}"""\n')
    for place in ("genomes/chromosome.fa", "genes.fasta"):
        (folder / place).write_text(">one\n" + "ACGTNacgt\n" * 60)
    rows = "".join(f'"{number}: {SENTENCE}",{number % 2}\n' for number in range(24))
    (folder / "today.log").write_text(SENTENCE + "\n" + SENTENCE[::-1] + "\n")
    for place in ("my_dataset/rows.csv", "my_tables/rows.csv", "reviews.csv", "new.csv"):
        (folder / place).write_text(f"{'content' if 'dataset' in place else 'text'},label\n{rows}")
    write_records(folder)
    for name in ("my_text.txt", "a_long_text.txt"):
        (folder / name).write_text(SENTENCE * 20)


def write_records(folder: Path) -> None:
    """Texts with spans, and questions."""
    spans = [{"start": 4, "end": 9, "label": "speed"}]
    (folder / "reports.jsonl").write_text(
        "".join(json.dumps({"text": f"{SENTENCE} {n}", "spans": spans}) + "\n" for n in range(12))
    )
    rows = "".join(f'Who jumps?,"{SENTENCE} {number}",fox\n' for number in range(12))
    (folder / "questions.csv").write_text(f"question,context,answer\n{rows}")
    rows = "".join(f'"{SENTENCE}{number}",{number}\n' for number in range(12))
    (folder / "pairs.csv").write_text(f"source,target\n{rows}")


def make_user_folder(folder: Path) -> None:
    """What the pages take for granted: texts, and models that were trained before."""
    write_texts(folder)
    save(make_model(ReformerForCausalLM, **SMALL), folder / "runs" / "mine")
    save(make_model(ReformerForCausalLM, **SMALL | {"attn_layers": ["lsh"]}), folder / "runs" / "draft")
    masked = SMALL | {"is_decoder": False}
    save(make_model(ReformerForConditionalGeneration, **masked, is_encoder_decoder=True), folder / "runs" / "pairs")
    save(make_model(ReformerForSequenceClassification, **masked), folder / "runs" / "reviews")
    save(make_model(ReformerForTokenClassification, **masked), folder / "runs" / "reports")
    for name in ("masked", "dna"):
        save(make_model(ReformerForMaskedLM, **masked), folder / "runs" / name)


def make_hub_cache(folder: Path) -> None:
    """A cache of the Hub with small models under the names of the published ones; that of bytes has no tokenizer."""
    model = make_model(ReformerForCausalLM, vocab_size=258)
    for name in ("reformer-enwik8", "reformer-crime-and-punishment"):
        repository = folder / f"models--google--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        model.save_pretrained(repository / "snapshots" / ("0" * 40))
    subwords = ReformerTokenizer(vocab={"<unk>": 0, "</s>": 1, "▁": 2, "a": 3}, merges=[])
    subwords.save_pretrained(repository / "snapshots" / ("0" * 40))


def copied(folder: Path, target: Path) -> Path:
    """A folder of one's own to type in."""
    return Path(shutil.copytree(folder, target))
