"""A vector for a text: the mean of its real tokens' vectors; and a folder that sentence-transformers loads."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..modeling.ops.padding import mean_of_rows
from .row_batches import NO_BOUND, check_length, encode, existing, longest_input, through_model


OUTPUTS = (".npy", ".parquet")
# Modules of sentence-transformers by the folder that they are in, in their order.
MODULES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}


def load_encoder(
    name: str, device: torch.device, context_length: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model without its head, and its tokenizer, which cuts texts at `model_max_length`.

    Args:
        name: Folder or name on the Hub; with any head.
        context_length: Tokens that are read of a text; by default what the tokenizer or the table of positions says,
            and all of them where nothing does.

    Raises:
        ValueError: The context is longer than the table of positions.
    """
    # The name of a special token in a text is text, for whoever loads what is saved, too.
    tokenizer = AutoTokenizer.from_pretrained(existing(name), split_special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = longest_input(AutoConfig.from_pretrained(name))
    with _silence():
        # That a head is left out is meant so.
        model = AutoModel.from_pretrained(name).eval()
    model.to(device)
    if context_length is not None:
        check_length(context_length, model.config)
        tokenizer.model_max_length = context_length
    elif longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return model, tokenizer


@contextmanager
def _silence() -> Iterator[None]:
    """No report of weights that a class has no place for."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def embed_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    normalize: bool = False,
    quiet: bool = False,
) -> tuple[np.ndarray, int]:
    """
    A vector for each text, float32, `[N, output size]`, and how many texts were cut at the tokenizer's longest.

    Args:
        model: Without a head.
        normalize: Make each vector's length 1.
        quiet: Show no bar.
    """
    ids, num_cut = encode(texts, tokenizer, tokenizer.model_max_length)
    vectors = through_model(
        model, ids, mean_of_tokens, pad_token_id=tokenizer.pad_token_id, description="embedding", quiet=quiet
    )
    if normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return vectors.numpy(), num_cut


def mean_of_tokens(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of each row's real tokens, special ones included, `[B, output size]`."""
    return mean_of_rows(model(**batch).last_hidden_state, batch["attention_mask"].bool())


def write_vectors(path: Path, vectors: np.ndarray, rows: Sequence[int], extra: Mapping[str, Sequence]) -> None:
    """
    Write vectors as an array, or as a table with the number of each one's row, from 1, and other columns.

    Args:
        path: Ends with .npy or .parquet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, vectors)
        return
    width = vectors.shape[1]
    columns = {"row": pa.array([row + 1 for row in rows]), **{name: pa.array(list(of)) for name, of in extra.items()}}
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    pq.write_table(pa.table(columns), path)


def save_sentence_transformer(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, normalize: bool = False
) -> None:
    """
    Write a folder that `SentenceTransformer(folder)` loads and that gives the same vectors.

    Args:
        folder: Is made.
        model: Without a head.
        normalize: Make each vector's length 1.

    Raises:
        ValueError: The folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something already; give a new folder.")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Without a number sentence-transformers takes `max_position_embeddings`, which cuts where no table ends.
    _write(folder / "sentence_bert_config.json", {"max_seq_length": min(tokenizer.model_max_length, NO_BOUND)})
    width = getattr(model.config, "output_size", model.config.hidden_size)
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    _write(folder / "1_Pooling" / "config.json", pooling)
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(MODULES.items())
        if normalize or path != "2_Normalize"
    ]
    for module in modules:
        (folder / str(module["path"])).mkdir(parents=True, exist_ok=True)
    _write(folder / "modules.json", modules)


def _write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
