"""sentence-transformers: vectors of texts, scores of pairs, training both."""

from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from .setting import Check, Setting, expect, expect_close
from .texts import sentences


TOOLS = ("sentence-transformers", "transformers")
ROUNDING = 1e-5
STEPS = 3
TRAINING = {"disable_tqdm": True, "max_steps": STEPS, "report_to": [], "save_strategy": "no", "use_cpu": True}


def encode(setting: Setting) -> dict[str, Any]:
    """Vectors of texts alone and in a batch, before and after saving."""
    texts = sentences()[:6]
    model = SentenceTransformer(setting.masked, device="cpu")
    vectors = model.encode(texts, convert_to_tensor=True)
    alone = torch.stack([model.encode(text, convert_to_tensor=True) for text in texts])
    figures = {"alone off": expect_close("vectors of texts alone", alone, vectors, ROUNDING)}
    model.save(str(setting.folder / "encoder"))
    again = SentenceTransformer(str(setting.folder / "encoder"), device="cpu").encode(texts, convert_to_tensor=True)
    expect_close("vectors after loading again", again, vectors, ROUNDING)
    return figures


def train_encoder(setting: Setting) -> dict[str, Any]:
    """Neighbouring sentences are drawn together."""
    texts = sentences()[:16]
    model = SentenceTransformer(setting.masked, device="cpu")
    before = model.encode(texts, convert_to_tensor=True)
    trainer = SentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(output_dir=str(setting.folder), **TRAINING),
        train_dataset=Dataset.from_dict({"anchor": texts[:-1], "positive": texts[1:]}),
        loss=MultipleNegativesRankingLoss(model),
    )
    loss = trainer.train().training_loss
    expect("vectors have changed", not torch.equal(model.encode(texts, convert_to_tensor=True), before))
    return {"loss": loss}


def score(setting: Setting) -> dict[str, Any]:
    """Scores of pairs by a cross-encoder, before and after saving."""
    texts = sentences()[:6]
    pairs = list(pairwise(texts))
    model = CrossEncoder(setting.masked, num_labels=1, device="cpu")
    scores = model.predict(pairs, convert_to_tensor=True)
    expect("the best match is ranked first", len(model.rank(texts[0], texts[1:])) == len(texts) - 1)
    model.save_pretrained(str(setting.folder / "scorer"))
    again = CrossEncoder(str(setting.folder / "scorer"), device="cpu").predict(pairs, convert_to_tensor=True)
    expect_close("scores after loading again", again, scores, ROUNDING)
    return {"scores": [round(float(value), 4) for value in scores]}


def train_scorer(setting: Setting) -> dict[str, Any]:
    """Pairs that follow each other against pairs that do not."""
    texts = sentences()[:16]
    model = CrossEncoder(setting.masked, num_labels=1, device="cpu")
    labels = [float(place % 2) for place in range(15)]
    trainer = CrossEncoderTrainer(
        model,
        args=CrossEncoderTrainingArguments(output_dir=str(setting.folder), **TRAINING),
        train_dataset=Dataset.from_dict({"first": texts[:-1], "second": texts[1:], "label": labels}),
        loss=BinaryCrossEntropyLoss(model),
    )
    return {"loss": trainer.train().training_loss}


CHECKS: dict[str, Check] = {
    "encode, save, load": encode,
    "train": train_encoder,
    "CrossEncoder": score,
    "CrossEncoder, train": train_scorer,
}
