"""The models of tasks: new ones by the recipe, read both ways, or an existing one with a new head."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration.configuration_reformer import ReformerConfig
from ..tokenization.tokenization_reformer_byte import ReformerByteTokenizer
from ..training.masked_pretraining import MaskedStage
from ..training.recipe import ModelRecipe
from ..training.row_batches import existing, longest_input
from .command_line import config_of, named_tokenizer, parse_settings


# Tokens of a text that are read where nothing else is said.
LONGEST_BY_DEFAULT = 4096
SHORTEST = 8


@dataclass
class TaskModelArguments:
    """What learns the task: a new model, after masked pretraining if that is asked for, or an existing one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Begin with this folder or Hub name; without it a new model is built."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Any tokenizer; by default the existing model's, and bytes for a new model."}
    )
    context_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that are read of a text; by default those of the longest for training, at most "
            f"{LONGEST_BY_DEFAULT}."
        },
    )
    pretrain_steps: int = field(
        default=0, metadata={"help": "Steps of filling in hidden tokens of the training texts, before the task."}
    )
    pretrain_learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate of these steps."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens hidden in these steps."})
    packing: bool = field(
        default=False, metadata={"help": "In training, short texts share rows, each by itself, instead of padding."}
    )
    set: list[str] = field(
        default_factory=list, metadata={"help": "Any other settings of the config, such as reversible=False."}
    )

    def __post_init__(self):
        if self.context_length is not None and self.context_length < SHORTEST:
            raise ValueError(f"context_length is {self.context_length}; a text needs at least {SHORTEST} tokens.")
        if self.pretrain_steps < 0:
            raise ValueError(f"pretrain_steps is {self.pretrain_steps}; it must be at least 0.")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability is {self.mlm_probability}; it must lie between 0 and 1.")
        if self.pretrain_steps and self.model_name_or_path:
            raise ValueError(
                f"pretrain_steps is {self.pretrain_steps}, but {self.model_name_or_path} is trained already. Leave "
                "one of them out; hf-reformer train --objective masked goes on with a masked model."
            )

    @property
    def masked_stage(self) -> MaskedStage:
        """The stage before the task."""
        return MaskedStage(self.pretrain_steps, self.pretrain_learning_rate, self.mlm_probability)

    def context_for(self, lengths: Sequence[int], config: PreTrainedConfig | None = None) -> int:
        """Tokens that are read of a text, for training texts of these lengths and an existing model's config."""
        if self.context_length is not None:
            return self.context_length
        longest = None if config is None else longest_input(config)
        return max(min(max(lengths), LONGEST_BY_DEFAULT, longest or LONGEST_BY_DEFAULT), SHORTEST)


def load_tokenizer(arguments: TaskModelArguments) -> PreTrainedTokenizerBase:
    """The named tokenizer, the existing model's, or bytes; with what a head and padding need."""
    tokenizer = named_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path)
    if isinstance(tokenizer, ReformerByteTokenizer) and not getattr(existing_config(arguments), "is_decoder", False):
        tokenizer.add_head_tokens()
    if tokenizer.pad_token is None:
        stand_in = tokenizer.eos_token or tokenizer.sep_token
        if stand_in is None:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        else:
            tokenizer.pad_token = stand_in
    if arguments.pretrain_steps and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def existing_config(arguments: TaskModelArguments) -> PreTrainedConfig | None:
    """Of the model that is named, as it was saved."""
    name = arguments.model_name_or_path
    return None if name is None else AutoConfig.from_pretrained(existing(name))


def load_config(
    arguments: TaskModelArguments,
    recipe: ModelRecipe,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    labels: Sequence[str] | None = None,
) -> PreTrainedConfig:
    """
    The config of the existing model, or of a new one, with the names of labels.

    Raises:
        ValueError: `set` names what the existing model does not have, or the recipe was changed beside it.
    """
    settings, name = parse_settings(arguments.set), arguments.model_name_or_path
    config = config_of(name, settings, recipe, context_length, tokenizer, is_decoder=False)
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def load_model(
    classes: tuple[type[PreTrainedModel], Any],
    arguments: TaskModelArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    pretrained: Path | None = None,
) -> PreTrainedModel:
    """
    A new model, the pretrained one with a head, or the existing one with a head that fits.

    Args:
        classes: The Reformer of the task, and the Auto class.
        pretrained: Folder of a masked model of the same config.
    """
    reformer_class, auto_class = classes
    if pretrained is not None:
        return reformer_class.from_pretrained(pretrained, config=config)
    if arguments.model_name_or_path is None:
        return reformer_class(cast(ReformerConfig, config))
    model = auto_class.from_pretrained(arguments.model_name_or_path, config=config, ignore_mismatched_sizes=True)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    return model
