"""The language models' head: a projection to the vocabulary, its loss, its resizing, and the names of its bias."""

from collections.abc import Sequence

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

from .argument_checks import check_labels
from .decoding.generation import Model
from .lm_loss import chunked_cross_entropy


logger = logging.get_logger(__name__)


class ReformerOnlyLMHead(nn.Module):
    """
    Projection of the streams, side by side or their mean, to the vocabulary.

    In files its bias has two names, because some versions of transformers read the one, some the other: see
    `LMHeadMixin`. Here it is the projection's.
    """

    def __init__(self, config):
        super().__init__()
        self.decoder = nn.Linear(config.output_size, config.vocab_size)
        self.register_load_state_dict_pre_hook(_name_bias_once)

    @property
    def bias(self) -> nn.Parameter:
        """`[V]`."""
        return self.decoder.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., output_size]` to logits `[..., V]`."""
        return self.decoder(hidden_states)

    def replace_decoder(self, decoder: nn.Linear):
        """Take another projection. One without a bias gets the old one's values, and 0 for tokens it did not have."""
        if decoder.bias is None:
            kept = self.bias.data[: decoder.out_features].to(decoder.weight)
            bias = nn.functional.pad(kept, (0, decoder.out_features - len(kept)))
            decoder.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        self.decoder = decoder


def _name_bias_once(head, state_dict, prefix, *args):
    _keep_one_bias(state_dict, prefix)


def _keep_one_bias(state_dict: dict, prefix: str):
    """Rename the bias that transformers 5.0 to 5.23 has; beside the projection's, which counts, leave it out."""
    other = state_dict.pop(prefix + "bias", None)
    if other is not None:
        state_dict.setdefault(prefix + "decoder.bias", other)


class LMHeadMixin(Model):
    """
    What the two language models share: the head, its tying, its resizing, its bias in files, and the loss in chunks.

    Files of transformers v4 hold the bias as `lm_head.bias` and as `lm_head.decoder.bias`, those of 5.0 to 5.23 under
    the first name. 5.24 has two biases and computes with the second one. What is saved here holds it under both.
    """

    _keys_to_ignore_on_load_unexpected = [r"lm_head\.bias"]

    @property
    def _tied_weights_keys(self) -> dict[str, str] | None:
        # Read by transformers where `tie_word_embeddings` is set.
        # CODEPATH: published checkpoints read both streams, which are wider than a word embedding; new models may not.
        if self.config.output_size != self.config.hidden_size:
            return None
        return {"lm_head.decoder.weight": "reformer.embeddings.word_embeddings.weight"}

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head.replace_decoder(new_embeddings)

    def _init_added_lm_head_bias_with_mean(self, old_lm_head, new_lm_head, added_num_tokens):
        # Added tokens get no bias, however their weights begin.
        new_lm_head.bias.data[-added_num_tokens:] = 0

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """Same as `PreTrainedModel.save_pretrained`, with the head's bias under both of its names."""
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        bias = state_dict.get("lm_head.decoder.bias")
        if bias is not None and not bias.is_meta:
            # Files cannot hold one tensor under two names.
            state_dict["lm_head.bias"] = bias.clone()
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        # Under its first name alone the bias would be left out.
        if state_dict is None and _has_first_name_only(checkpoint_files or ()):
            state_dict = {}
            for file in checkpoint_files:
                state_dict |= load_state_dict(file)
        if state_dict is not None:
            state_dict = dict(state_dict)
            _keep_one_bias(state_dict, "lm_head.")
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _logits_and_loss(self, hidden_states, labels, kept=slice(None), **kwargs):
        """Logits of the `kept` positions, or None where training computes the loss in pieces; the loss, or None."""
        if labels is not None:
            self._check_labels(labels, hidden_states.shape[:2], **kwargs)
        # CODEPATH: published checkpoints have `chunk_size_lm_head=0`; above 0 the logits never exist in training.
        in_pieces = labels is not None and self.config.chunk_size_lm_head > 0
        logits = None if in_pieces and self.training else self.lm_head(hidden_states[:, kept])
        if labels is None:
            return logits, None
        if in_pieces:
            return logits, self._chunked_loss(hidden_states, labels, **kwargs)
        # transformers takes a view of them, which columns of a larger batch do not have.
        labels = labels.contiguous()
        return logits, self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

    def _check_labels(self, labels, expected, shift_labels=None, ignore_index=-100, **kwargs):
        check_labels(labels, expected, self.config.vocab_size, ignore_index=ignore_index)
        if shift_labels is not None:
            check_labels(shift_labels, expected, self.config.vocab_size, "shift_labels", ignore_index)

    def _chunked_loss(
        self, hidden_states, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
    ):
        if self.config.is_decoder:
            shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
            labels = shifted if shift_labels is None else shift_labels
        return chunked_cross_entropy(
            hidden_states,
            self.lm_head,
            labels,
            chunk_size=self.config.chunk_size_lm_head,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
        )


def _has_first_name_only(files: Sequence[str]) -> bool:
    """Whether safetensors files hold `lm_head.bias` and not `lm_head.decoder.bias`. Others are those of v4."""
    names = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as weights:
                names |= set(weights.keys()) & {"lm_head.bias", "lm_head.decoder.bias"}
    return names == {"lm_head.bias"}


def untie_embeddings(config):
    """Let words go in and come out by matrices of their own where one cannot do both."""
    # CODEPATH: a file of a stock model, which reads both streams, may ask for what only new models can do.
    if config.tie_word_embeddings and config.output_size != config.hidden_size:
        logger.warning_once(
            "`tie_word_embeddings=True` is not possible: the LM head reads both streams and is twice as wide as a "
            "word embedding. The weights stay separate, as in stock Reformer, which ignores the setting."
        )
        config.tie_word_embeddings = False
