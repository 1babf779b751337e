"""Small encoders with decoders, and what they are trained with."""

import torch
from tiny_models import NO_ATTENTION_DROPOUT, STACKS, WINDOWS, gradients, make_model, random_ids

from hf_reformer import ReformerForConditionalGeneration


TWO_SIDES = {"is_encoder_decoder": True, "decoder_attn_layers": STACKS["mixed"]}
SOURCE, TARGET = 40, 29
ALL_DROPOUT = NO_ATTENTION_DROPOUT | {"hidden_dropout_prob": 0.2, "cross_attention_probs_dropout_prob": 0.2}
# Buckets that do not depend on who hashed before, and a loss in float64.
SAME_EACH_TIME = {"hash_seed": 3, "chunk_size_lm_head": 16}
# The first row's source is whole, the second's is padded behind, the third's in front.
MASK = torch.ones(3, SOURCE, dtype=torch.long)
MASK[1, 25:] = 0
MASK[2, :13] = 0


def make(**changes):
    """Float64, with windows, so that a row's result does not depend on its padding."""
    return make_model(ReformerForConditionalGeneration, **(TWO_SIDES | WINDOWS | changes)).double()


def inputs_of(length=TARGET):
    torch.manual_seed(2)
    labels = random_ids(3, length)
    # The third target is shorter.
    labels[2, length // 2 :] = -100
    return {"input_ids": random_ids(3, SOURCE), "attention_mask": MASK, "labels": labels}


def train(model, **inputs):
    torch.manual_seed(3)
    loss = model.train()(**(inputs or inputs_of())).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}
