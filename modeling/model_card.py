"""The card of a checkpoint, README.md: how to load it, and metadata that follow from its class."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


PIPELINES = {
    "ReformerForCausalLM": "text-generation",
    "ReformerForConditionalGeneration": "text2text-generation",
    "ReformerForMaskedLM": "fill-mask",
    "ReformerForQuestionAnswering": "question-answering",
    "ReformerForSequenceClassification": "text-classification",
    "ReformerForTokenClassification": "token-classification",
    "ReformerModel": "feature-extraction",
}
TAGS = ("reformer", "lsh-attention", "reversible", "long-context")
WITH_CODE = "custom_code"
# In a template, where somebody is to write.
UNSAID = "[More Information Needed]"
SECTION = re.compile(r"^## How to load it\n.*?(?=^#{1,2} |\Z)", re.DOTALL | re.MULTILINE)
WITH_PACKAGE = """## How to load it

With the package `hf_reformer`, which has to be imported:

```python
from hf_reformer import {model_class}

model = {model_class}.from_pretrained("{name}")
```

`import hf_reformer` is enough for `AutoModel` classes and pipelines; `python -m hf_reformer` runs a program that does
not import it.
"""
WITHOUT_PACKAGE = """
Without the package, by the code that comes with the weights, once you have read and trust that:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained(
    "{name}",
    trust_remote_code=True,
    revision="main",  # better a commit that you have looked at{pinned}
)
```

Without `trust_remote_code=True` and without the package, loading ends in an error: transformers' own Reformer does not
take it, because it would compute something else.
"""
LIMITS = """## Limits

It knows what it was trained on. Who saved it has not said here on what that was, with what it was measured, or under
which license it may be used.
"""


def is_blank(text: str) -> bool:
    """Whether a card is the template that transformers pushes, of which nobody has filled in anything."""
    template = ModelCard.from_template(ModelCardData(), model_description="").text
    return UNSAID in text and text.count(UNSAID) == template.count(UNSAID)


def write_card(
    folder: str | Path,
    model_class: str,
    name: str,
    auto_class: str | None = None,
    code_repository: str | None = None,
    **metadata,
) -> None:
    """
    Write the section "How to load it" of a checkpoint's card, README.md, or replace it; without a card, make one.

    Args:
        model_class: The class of the model.
        name: What the checkpoint is called, in a repository or a folder.
        auto_class: If its code comes with it: the Auto class that loads it.
        code_repository: Where that code is, if not in the folder.
        **metadata: What else the card says, such as `license`, `language` or `datasets`.
    """
    path = Path(folder) / "README.md"
    how = WITH_PACKAGE.format(name=name, model_class=model_class)
    if auto_class is not None:
        pinned = "" if code_repository is None else f'\n    code_revision="main",  # the same, of {code_repository}'
        how += WITHOUT_PACKAGE.format(name=name, auto_class=auto_class, pinned=pinned)
    card = ModelCard.load(path) if path.is_file() else None
    if card is not None and not is_blank(card.text):
        said_by_others = "hf_reformer" in card.text and not SECTION.search(card.text)
        if auto_class is None and said_by_others:
            return
        card.text = f"\n{how}\n{SECTION.sub('', card.text).strip()}\n"
    else:
        known = {} if card is None else card.data.to_dict()
        card = ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {name}\n\n{how}\n{LIMITS}")
        card.data = ModelCardData(**known)
    known = card.data.to_dict() | metadata
    tags = [tag for tag in known.get("tags") or [] if tag != WITH_CODE]
    known["tags"] = [*dict.fromkeys([*tags, *TAGS, *([] if auto_class is None else [WITH_CODE])])]
    known.setdefault("library_name", "transformers")
    if model_class in PIPELINES and known.get("pipeline_tag") in (None, *PIPELINES.values()):
        known["pipeline_tag"] = PIPELINES[model_class]
    card.data = ModelCardData(**known)
    card.save(path)
