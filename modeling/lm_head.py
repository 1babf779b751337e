"""The language models' head: a projection to the vocabulary, its loss, its resizing, and the names of its bias."""

import torch
from torch import nn

from .argument_checks import check_labels
from .lm_loss import chunked_cross_entropy


class ReformerOnlyLMHead(nn.Module):
    """
    Projection of both streams to the vocabulary.

    Its bias has two names, `bias` and `decoder.bias`, because files of some versions of transformers have the one,
    some the other, some both. It is one parameter, and what is saved holds it under both.
    """

    def __init__(self, config):
        super().__init__()
        self.decoder = nn.Linear(2 * config.hidden_size, config.vocab_size)
        self.share_bias()
        self.register_state_dict_post_hook(_copy_shared_bias)
        self.register_load_state_dict_pre_hook(_name_bias_twice)
        self.register_load_state_dict_post_hook(_share_loaded_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., 2 * hidden_size]` to logits `[..., V]`."""
        return self.decoder(hidden_states)

    def share_bias(self):
        """Make `bias` the projection's again, after something replaced one of the two."""
        self.bias = self.decoder.bias

    def replace_decoder(self, decoder: nn.Linear):
        """Take another projection. One without a bias gets the old one's values, and 0 for tokens it did not have."""
        if decoder.bias is None:
            kept = self.bias.data[: decoder.out_features].to(decoder.weight)
            bias = nn.functional.pad(kept, (0, decoder.out_features - len(kept)))
            decoder.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        self.decoder = decoder
        self.share_bias()


def _copy_shared_bias(head, state_dict, prefix, local_metadata):
    """Files cannot hold one tensor under two names."""
    if prefix + "bias" in state_dict:
        state_dict[prefix + "bias"] = state_dict[prefix + "bias"].clone()


def _name_bias_twice(head, state_dict, prefix, *args):
    """The projection's own bias counts; state dicts of before it had one have only the other."""
    name, projection = prefix + "bias", prefix + "decoder."
    if projection + "bias" in state_dict:
        state_dict[name] = state_dict[projection + "bias"]
    elif name in state_dict and projection + "weight" in state_dict:
        state_dict[projection + "bias"] = state_dict[name]


def _share_loaded_bias(head, incompatible_keys):
    """Loading with `assign=True` gives each name a parameter of its own."""
    head.share_bias()


# trf-ignore: TRF004 `_tied_weights_keys` counts only if word embeddings are tied, and two different values untie it
class LMHeadMixin:
    """What the two language models share: the head, its resizing, and the loss in chunks."""

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.lm_head.replace_decoder(new_embeddings)

    def _init_added_lm_head_bias_with_mean(self, old_lm_head, new_lm_head, added_num_tokens):
        # Added tokens get no bias, however their weights begin.
        new_lm_head.bias.data[-added_num_tokens:] = 0

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        """
        Same as `PreTrainedModel.tie_weights`, which comes after loading, and the two names of the head's bias are one
        parameter again. Where a checkpoint has both, the one of the projection counts.
        """
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        names = {"lm_head.bias", "lm_head.decoder.bias"}
        missing = names & (missing_keys or set())
        if missing == {"lm_head.decoder.bias"}:
            if self.lm_head.bias.is_meta:
                raise ValueError(
                    "The language model's head cannot be read from disk as it is needed: the file names its bias "
                    "`lm_head.bias` only, as files of older versions do. Save it anew: load it with `device_map=None` "
                    "and call `save_pretrained`."
                )
            self.lm_head.decoder.bias = self.lm_head.bias
        self.lm_head.share_bias()
        if missing_keys is not None:
            missing_keys -= {"lm_head.decoder.bias"} if missing == names else names

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
