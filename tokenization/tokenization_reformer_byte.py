"""The byte tokenizer of the enwik8-style Reformers: the id of a byte is its value plus two."""

import codecs
import json
import sys
from collections.abc import Iterable
from importlib import import_module
from numbers import Integral
from types import MappingProxyType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoConfig, AutoTokenizer, BatchEncoding, TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils.hub import cached_file


PAD_ID = 0
EOS_ID = 1
FIRST_BYTE_ID = 2
BASE_VOCAB_SIZE = 258
HEAD_TOKENS = MappingProxyType({"mask_token": "<mask>", "cls_token": "<cls>", "sep_token": "<sep>"})
# what an id decodes to that no token has
REPLACEMENT = "\ufffd".encode()

# a chat as plain text, for a tokenizer that was saved without a template: the name of a role, a colon and its words
CHAT_TEMPLATE = (
    "{%- if tools -%}{{ raise_exception('This chat template knows no tools: leave them out, or set "
    "tokenizer.chat_template to one that does.') }}{%- endif -%}"
    "{%- macro words(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for part in content or [] -%}{%- if part.type != 'text' -%}"
    "{{ raise_exception('This chat template takes text, but a part of a message is of type ' ~ part.type ~ '.') }}"
    "{%- endif -%}{{- part.text -}}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- for message in messages -%}{{- message.role + ':\n' -}}{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- words(message.content) + (eos_token or '') -}}{%- endgeneration -%}"
    "{%- else -%}{{- words(message.content) -}}{%- endif -%}{{- '\n\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:\n' -}}{%- endif -%}"
)

# the id of each byte, under the printable character that the tokenizers library writes for that byte
BYTE_IDS = MappingProxyType({symbol: byte + FIRST_BYTE_ID for byte, symbol in bytes_to_unicode().items()})


def _check_names(tokens: Iterable[str | AddedToken]) -> None:
    """Raise ValueError where adding one of `tokens` would take over the id of a byte."""
    for token in map(str, tokens):
        if not token or token in BYTE_IDS:
            raise ValueError(
                f"{token!r} cannot be a special or an added token of a byte tokenizer: it is empty or one of the 256 "
                "characters that stand for the bytes. Choose a longer name, for example '<mask>'."
            )


def _check_vocab(vocab: Any) -> None:
    """Raise ValueError unless `vocab` maps two names to the ids 0 and 1, and every byte to its value plus two."""
    if not (isinstance(vocab, dict) and len(vocab) == BASE_VOCAB_SIZE and BYTE_IDS.items() <= vocab.items()):
        raise ValueError(
            f"Not the vocabulary of a byte tokenizer: {type(vocab).__name__}. Its 258 entries are pad, end of text, "
            "and each byte at its value plus 2; there is nothing to train. Load the tokenizer of another model with "
            "AutoTokenizer or with the class that saved it."
        )


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs.get(key) for key in ("cache_dir", "revision", "subfolder", "token") if kwargs.get(key)}


def _longest_input(path: str, **kwargs: Any) -> int | None:
    """Return how many tokens the model in the folder or repository `path` takes, if there is a config that says so."""
    # Code that came with the config is trusted where this tokenizer's is.
    given = {name: kwargs[name] for name in ("local_files_only", "trust_remote_code") if name in kwargs}
    try:
        config = AutoConfig.from_pretrained(path, **given, **_hub_arguments(kwargs))
    except (OSError, ValueError, StrictDataclassError):
        return None
    return getattr(config, "max_sequence_length", None)


def _is_sentencepiece_checkpoint(path: str, **kwargs: Any) -> bool:
    """Tell whether the folder or repository `path` has a sentencepiece vocabulary and names no tokenizer class."""
    if get_tokenizer_config(path, **kwargs).get("tokenizer_class"):
        return False
    where = _hub_arguments(kwargs)
    local_files_only = kwargs.get("local_files_only", False)
    vocab_file = cached_file(
        path, "spiece.model", local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False, **where
    )
    return vocab_file is not None


def _names_in(post_processor: Any) -> set[str]:
    """Return what a saved post-processor calls the tokens that it puts around a text."""
    state = {} if post_processor is None else json.loads(post_processor.__getstate__())
    return {piece["SpecialToken"]["id"] for piece in state.get("single", []) if "SpecialToken" in piece}


def _bytes_of(token: str | None, named: set[str]) -> bytes:
    """Return the bytes of a byte's name, of several in one string, of a token in `named`, or of text."""
    if token is None:
        # what convert_ids_to_tokens gives for an id that no token has
        return REPLACEMENT
    if token not in named and BYTE_IDS.keys() >= set(token):
        data = bytes(BYTE_IDS[symbol] - FIRST_BYTE_ID for symbol in token)
        # letters such as "ö" name bytes as well, but a text of them is hardly ever the names of a character's bytes
        if len(token) == 1 or data.decode(errors="ignore").encode() == data:
            return data
    return token.encode("utf-8", "surrogateescape")


class _Pieces(dict):
    """The bytes of each id; of an id that no token has, a replacement character."""

    def __missing__(self, token_id: Any) -> bytes:
        if isinstance(token_id, Integral) and int(token_id) >= 0:
            return REPLACEMENT
        raise KeyError(token_id)


def _came_with_a_checkpoint() -> bool:
    """Whether this file was loaded by `trust_remote_code=True`."""
    return __name__.startswith("transformers_modules.")


class ReformerByteTokenizer(TokenizersBackend):
    r"""
    Construct a byte tokenizer: no vocabulary file, no unknown text, 258 ids.

    | id        | token                                                                     |
    |-----------|---------------------------------------------------------------------------|
    | 0         | padding                                                                   |
    | 1         | end of text                                                               |
    | 2 ... 257 | the UTF-8 byte `id - 2`                                                   |
    | 258 ...   | what was asked for: mask, cls, sep, bos, unk, any added token             |

    These are the ids google/reformer-enwik8 was trained on (the `encode` and `decode` functions of its model card).
    After adding a token, call `model.resize_token_embeddings(len(tokenizer))`. `add_head_tokens()` names mask, cls and
    sep for the heads that need them.

    A text begins with cls and ends with sep where these have a name, and a pair is `cls A sep B sep` then, with
    `return_token_type_ids=True` 0 up to the first sep and 1 behind it; a Reformer has no use for these. No end of text
    is appended to an input unless `add_eos_token=True`. Truncation counts bytes, so it may cut a character in two.
    Offsets count characters: the bytes of one character share its span. With
    `is_split_into_words=True` nothing is put between the words; keep the spaces in them.

    A special token's name inside a text, such as a typed "<pad>", becomes that token's id, as in every Hugging Face
    tokenizer. For a corpus, or text you do not trust, pass `split_special_tokens=True` (here or per call): then the
    name is encoded as the bytes it is made of.

    Decoding joins all bytes before it reads them as UTF-8. `TextStreamer` prints words or letters (as the release of
    transformers has it), and a `DecodeStream` of the tokenizers library waits for the end of a character, so neither
    shows half a character as a replacement character. An id that no token has, which a model with a larger embedding
    table may generate, is decoded to one replacement character.

    A chat (`apply_chat_template`) is plain text: for each message its role, a colon, a new line, its words and an
    empty line; end of text stands behind the words of the assistant. A template that was saved with a tokenizer, or
    set as its `chat_template`, is used instead.

    Loaded from a folder or repository with a Reformer's `config.json`, a tokenizer that was saved without
    `model_max_length` has the model's longest input as that.

    The ids of raw bytes, of a file that is not UTF-8, or of a corpus of many MB (encoding takes about 0.4 seconds and
    200 MB of memory per MB of text) need no tokenizer: `numpy.frombuffer(data, numpy.uint8).astype(numpy.int64) + 2`.
    `decode(ids, errors="surrogateescape").encode("utf-8", "surrogateescape")` gives those bytes back.

    This tokenizer inherits from [`TokenizersBackend`] which contains most of the main methods. Users should refer to
    this superclass for more information regarding those methods.

    Args:
        vocab (`dict[str, int]`, *optional*):
            The 258 entries of a saved tokenizer; `from_pretrained` passes them. Leave it out otherwise.
        errors (`str`, *optional*, defaults to `"replace"`):
            What decoding does with bytes that are not UTF-8: the name of a Python error handler, such as "replace",
            "ignore", "backslashreplace", "surrogateescape" (loses nothing) or "strict" (raises; not for streaming).
            See [bytes.decode](https://docs.python.org/3/library/stdtypes.html#bytes.decode).
        pad_token (`str` or `tokenizers.AddedToken`, *optional*, defaults to `"<pad>"`):
            The name of id 0.
        eos_token (`str` or `tokenizers.AddedToken`, *optional*, defaults to `"</s>"`):
            The name of id 1.
        kwargs (`dict[str, Any]`, *optional*):
            What every tokenizer takes: `mask_token`, `cls_token`, `sep_token`, `bos_token`, `unk_token`,
            `extra_special_tokens`, `padding_side`, `truncation_side`, `model_max_length`, `split_special_tokens`,
            `add_eos_token`.

    Raises:
        ValueError: an unknown error handler; a `vocab_size`; one name for both ids 0 and 1; a token that is empty or
            stands for a byte; the vocabulary of another tokenizer.

    Example:

    ```python
    >>> tokenizer = ReformerByteTokenizer(mask_token="<mask>")
    >>> tokenizer("hi 🙂").input_ids
    [106, 107, 34, 242, 161, 155, 132]
    >>> tokenizer.decode([106, 107, 34, 242, 161, 155, 132])
    'hi 🙂'
    >>> tokenizer.decode([106, 107, 34, 242, 161, 155])
    'hi \ufffd'
    >>> tokenizer("a<mask>").input_ids, tokenizer("a<mask>", split_special_tokens=True).input_ids
    ([99, 258], [99, 62, 111, 99, 117, 109, 64])
    >>> [byte + 2 for byte in b"\xff\x00"]
    [257, 2]

    ```
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    # Whether `push_to_hub` sends code, too, and where that is otherwise.
    _pushes_code: "tuple[bool, str | None]" = (False, None)
    _tokenizer: Tokenizer  # type: ignore[assignment]

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        errors: str = "replace",
        pad_token: str | AddedToken | None = "<pad>",
        eos_token: str | AddedToken | None = "</s>",
        **kwargs: Any,
    ) -> None:
        if "vocab_size" in kwargs:
            raise ValueError(
                f"vocab_size={kwargs['vocab_size']!r}: the number of ids is not a choice, it is 258 and one for each "
                "added token. Add tokens with mask_token= or extra_special_tokens=; an embedding table may have more "
                "rows than the tokenizer has ids."
            )
        if not _came_with_a_checkpoint():
            # Saved from here, a tokenizer has no code beside it.
            kwargs.pop("auto_map", None)
        try:
            codecs.lookup_error(errors)
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"errors={errors!r} is no error handler. Use 'replace', 'ignore', 'backslashreplace', "
                "'surrogateescape', 'strict', or a name given to codecs.register_error."
            ) from error
        if vocab is None:
            names = {str(pad_token or "<pad>"): PAD_ID, str(eos_token or "</s>"): EOS_ID}
            _check_names(names)
            if len(names) != FIRST_BYTE_ID:
                raise ValueError(
                    f"pad_token and eos_token are both {str(pad_token)!r}, but name two ids, 0 and 1. Give them two "
                    "names; to pad with end of text, set tokenizer.pad_token = tokenizer.eos_token afterwards."
                )
            vocab = {**names, **BYTE_IDS}
        _check_vocab(vocab)
        self.errors = errors
        # without merges every byte stays a token; without the regular expression a text is split in one go, which
        # encodes 1 MB of source code in 0.4 seconds instead of 1.1
        self._tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        # a saved tokenizer says there whether it adds bos and eos, and nowhere else
        saved = _names_in(kwargs.get("post_processor"))
        for role, name in (("bos", kwargs.get("bos_token")), ("eos", eos_token)):
            kwargs.setdefault(f"add_{role}_token", bool(saved & {role, str(name)}))
        super().__init__(errors=errors, pad_token=pad_token, eos_token=eos_token, **kwargs)
        self.update_post_processor()
        # a tokenizer_object among the keywords, as train_new_from_iterator passes it, replaces what was built here
        _check_vocab(self._tokenizer.get_vocab(with_added_tokens=False))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *init_inputs, **kwargs):
        """
        Load a tokenizer, with the arguments of `TokenizersBackend.from_pretrained`.

        `AutoTokenizer` comes here for every Reformer that names no tokenizer class. google/reformer-enwik8 has no
        tokenizer file and gets this class. google/reformer-crime-and-punishment has a sentencepiece vocabulary, and
        gets the tokenizer of transformers.
        """
        package = sys.modules.get("hf_reformer")
        if package is not None and _came_with_a_checkpoint():
            # Beside code that came with a checkpoint. Its models are then the imported package's, too.
            return package.ReformerByteTokenizer.from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
        if kwargs.get("_from_auto") and _is_sentencepiece_checkpoint(pretrained_model_name_or_path, **kwargs):
            return AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, *init_inputs, **{**kwargs, "tokenizer_type": "reformer"}
            )
        tokenizer = super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
        if tokenizer.model_max_length > LARGE_INTEGER:
            longest = _longest_input(pretrained_model_name_or_path, **kwargs)
            tokenizer.model_max_length = longest or tokenizer.model_max_length
        return tokenizer

    def push_to_hub(self, repo_id: str, *, remote_code: bool = False, code_repository: str | None = None, **kwargs):
        """Same as `PreTrainedTokenizerBase.push_to_hub`; `remote_code` and `code_repository` as of the models."""
        self._pushes_code = remote_code, code_repository
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            self._pushes_code = False, None

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        with_code, code_repository = self._pushes_code
        # By name, so that this file needs no other where it came with a checkpoint. There, saving has written it.
        if with_code and not _came_with_a_checkpoint():
            import_module("hf_reformer.modeling.remote_code").add_code(working_dir, code_repository)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def add_head_tokens(self) -> int:
        """
        Name mask, cls and sep, those that have no name yet: `"<mask>"`, `"<cls>"` and `"<sep>"`.

        Returns:
            `int`: How many tokens are new. Call `model.resize_token_embeddings(len(tokenizer))` if there are any.
        """
        unnamed = {role: name for role, name in HEAD_TOKENS.items() if getattr(self, role) is None}
        return self.add_special_tokens({**unnamed})

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict] | None = None) -> str:
        """Return the template that is asked for or was saved, else one of plain text, which no file holds."""
        if chat_template is None and not self.chat_template:
            return CHAT_TEMPLATE
        return super().get_chat_template(chat_template, tools)

    def update_post_processor(self) -> None:
        """Put around a text and a pair of texts the tokens that have a name, bos and eos only if asked for."""
        wanted = {"bos": self.add_bos_token, "cls": True, "sep": True, "eos": self.add_eos_token}
        tokens = []
        for role, is_wanted in wanted.items():
            name = self._special_tokens_map.get(f"{role}_token")
            token_id = None if name is None else self._tokenizer.token_to_id(str(name))
            if is_wanted and token_id is not None:
                tokens.append({"id": role, "ids": [token_id], "tokens": [str(name)]})
        pieces = {"$A", "$B", *(token["id"] for token in tokens)}
        single = [f"{piece}:0" for piece in ("bos", "cls", "$A", "sep", "eos") if piece in pieces]
        second = [f"{piece}:1" for piece in ("bos", "$B", "sep", "eos") if piece in pieces]
        self._tokenizer.post_processor = TemplateProcessing(single=single, pair=single + second, special_tokens=tokens)

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.SPECIAL_TOKENS_ATTRIBUTES and value is not None:
            _check_names([value])
        super().__setattr__(key, value)
        if key.removesuffix("_id") in self.SPECIAL_TOKENS_ATTRIBUTES:
            self.update_post_processor()

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:
        _check_names(new_tokens)
        added = super()._add_tokens(new_tokens, special_tokens=special_tokens)
        self.update_post_processor()
        return added

    def _encode_plus(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        try:
            return super()._encode_plus(*args, **kwargs)
        except TypeError as error:
            raise ValueError(
                f"Each text must be a str of valid Unicode, not None, another type or a lone surrogate ({error}). "
                "Drop empty rows; the ids of raw bytes are [byte + 2 for byte in data]."
            ) from error

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """
        Decode tokens, as `convert_ids_to_tokens` gives them, to text.

        Args:
            tokens (`list[str]`): Names of bytes and of added tokens, several in one string, or text that was decoded
                before, as the pipeline for token classification passes it.

        Returns:
            `str`: The text; `errors` of the constructor says what becomes of bytes that are not UTF-8.
        """
        named = {*self._names_of_two_ids(), *self.added_tokens_encoder}
        return b"".join([_bytes_of(token, named) for token in tokens]).decode("utf-8", errors=self.errors)

    def _names_of_two_ids(self) -> list[str]:
        return [str(self._tokenizer.id_to_token(token_id)) for token_id in (PAD_ID, EOS_ID)]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        # the library's decoder always replaces, drops ids it does not know, and garbles added tokens such as "<é>";
        # and no space is cleaned up here, because each one is a byte of the text
        pieces = _Pieces({byte_id: bytes([byte_id - FIRST_BYTE_ID]) for byte_id in BYTE_IDS.values()})
        for token_id, name in zip((PAD_ID, EOS_ID), self._names_of_two_ids(), strict=True):
            pieces[token_id] = name.encode()
        for token_id, token in self.added_tokens_decoder.items():
            pieces[token_id] = b"" if skip_special_tokens and token.special else token.content.encode()
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        try:
            data = b"".join([pieces[token_id] for token_id in token_ids])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Cannot decode {error}: an id is an integer from 0 on. Replace the label -100 by "
                "tokenizer.pad_token_id."
            ) from error
        return data.decode("utf-8", errors=errors or self.errors)


__all__ = ["ReformerByteTokenizer"]
