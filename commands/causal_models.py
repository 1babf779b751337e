"""Folders of models that write, for commands that run one: what is wrong is said before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils.hub import cached_file

from ..tokenization.tokenization_reformer_byte import BASE_VOCAB_SIZE
from ..training.row_batches import existing


ARCHITECTURES = ("ReformerForCausalLM", "ReformerModelWithLMHead")
# It reads one text and writes another.
FOR_PAIRS = "ReformerForConditionalGeneration"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


def check_model(model: str, architectures: Sequence[str] = ARCHITECTURES) -> str:
    """
    The class of a model, by its config.

    Raises:
        ValueError: It is not there, none of these Reformers, or has no tokenizer that fits.
    """
    existing(model.partition("@")[0])
    name, _, revision = (model, "", "") if Path(model).exists() else model.partition("@")
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(f"The folder {model} has no config.json; name the folder of a saved model.")
    where = {"revision": revision} if revision else {}
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **where)
    except OSError as error:
        raise ValueError(f"{model} is no folder here, and not found on the Hub: {first_line(error)}") from error
    if config.get("model_type") != "reformer":
        raise ValueError(f"{model} is a {config.get('model_type')} by its config.json, no Reformer.")
    architecture = (config.get("architectures") or ["None"])[0]
    if architecture not in architectures:
        does = "reads one text and writes another" if architecture == FOR_PAIRS else "continues no text"
        raise ValueError(
            f"{model} is a {architecture} by its config.json, which {does}; name a model that is a "
            f"{' or a '.join(architectures)}."
        )
    check_tokenizer(model, name, config["vocab_size"], where)
    return architecture


def check_tokenizer(model: str, name: str, vocab_size: int, where: dict[str, str]) -> None:
    """
    Raises:
        ValueError: There is no tokenizer, or one with more tokens than the model.
    """
    files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where) for file in TOKENIZER_FILES]
    # A model of bytes needs no file.
    if not any(files) and vocab_size != BASE_VOCAB_SIZE:
        raise ValueError(
            f"{model} has no tokenizer ({', '.join(TOKENIZER_FILES)}), and with {vocab_size} tokens it is no model of "
            f"bytes, which has {BASE_VOCAB_SIZE}. Save the tokenizer beside the model: tokenizer.save_pretrained(...)."
        )
    tokens = len(AutoTokenizer.from_pretrained(name, **where))
    if tokens > vocab_size:
        raise ValueError(
            f"The tokenizer of {model} has {tokens} tokens, the model {vocab_size}. Save the one that it was trained "
            "with, or call model.resize_token_embeddings(len(tokenizer))."
        )


def first_line(error: Exception) -> str:
    """What an error says, as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
