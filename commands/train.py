"""
Train a Reformer, causal, masked or sequence to sequence, and measure it in bits per byte on held-out text.

    hf-reformer train --output_dir runs/mine --text_path my_texts --max_steps 1000
    hf-reformer train --objective seq2seq --data pairs.csv --output_dir runs/pairs
    hf-reformer train settings.yaml
    accelerate launch -m hf_reformer.commands.train --output_dir runs/mine --dataset_name my_dataset

Every argument has a default: the recipe's (hf_reformer.training), and for text the standard library of the running
Python. A model that reads one text and writes another needs pairs of texts, and has options of its own, which
`hf-reformer train --objective seq2seq --help` lists. For many GPUs see docs/distributed.md.
"""

import sys
from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from datasets import disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from ..configuration.configuration_reformer import ReformerConfig
from ..modeling.modeling_reformer import ReformerForCausalLM, ReformerForMaskedLM
from ..training.bits_trainer import BitsPerByteTrainer, CompareOnEvaluate, collate_causal
from ..training.compression import reference_figures
from ..training.contribution import without_attention
from ..training.corpus import Corpus, DataArguments, Windows, build_corpus
from ..training.recipe import ModelRecipe
from ..training.row_batches import longest_input
from ..training.run_checkpoints import RunArguments, find_checkpoint, saving
from ..training.run_identity import check_same_run, identify_run
from ..training.run_report import describe_run, layers_of, write_curve, write_log, write_model_card
from ..training.run_trainer import check_finite, check_strategy, run_training
from ..training.time_left import SayTimeLeft
from .command_line import (
    alignment_in_windows,
    config_of,
    make_parser,
    mistakes_end,
    named_tokenizer,
    parse_file,
    parse_groups,
    parse_settings,
)
from .train_pairs import OBJECTIVE, PairDataArguments
from .train_pairs import parse_arguments as parse_pair_arguments
from .train_pairs import run as run_pairs
from .training_process import run_and_end


OBJECTIVE_SENTENCE = {
    "causal": "predicts the next token of a text",
    "masked": "fills in masked tokens of a text",
}
# Options that texts do not have.
OF_PAIRS = {f"--{item.name}" for item in fields(PairDataArguments)} - {
    f"--{item.name}" for item in fields(DataArguments)
}
UNIT_SENTENCE = {
    "causal": (
        "Bits per byte: what the model spends, on average, to predict a byte of held-out text it was not trained on, "
        "beside what can be said about the very same bytes without it. Lower is better."
    ),
    "masked": (
        "Bits per masked byte: what the model spends, on average, on a byte of held-out text that was hidden from it "
        "while it saw what stands before and after. This is no compression, so it cannot be compared with the bits "
        "per byte of a causal model. Lower is better."
    ),
}


@dataclass
class ModelArguments:
    """What is trained: a new model by the recipe, or an existing one."""

    objective: str = field(
        default="causal",
        metadata={
            "help": "Predict the next token, or hidden ones, or write a text for another: --objective seq2seq --help.",
            "choices": ["causal", "masked", OBJECTIVE],
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens hidden from a masked model."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on from this folder or Hub name; without it a new model is built."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Any tokenizer; by default the existing model's, and bytes for a new model."}
    )
    set: list[str] = field(
        default_factory=list, metadata={"help": "Any other settings of the config, such as reversible=False."}
    )

    def __post_init__(self):
        if self.objective not in ("causal", "masked"):
            raise ValueError(
                f"objective is {self.objective!r}; it must be 'causal' or 'masked'. 'seq2seq' is for the command "
                "line; from Python call `train_pairs` of hf_reformer.commands.train_pairs."
            )

        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability is {self.mlm_probability}; it must lie between 0 and 1.")

    @property
    def causal(self) -> bool:
        """Whether the model predicts the next token."""
        return self.objective == "causal"

    @property
    def identity(self) -> dict[str, str | float]:
        """What of this decides the course of a run."""
        return {"objective": self.objective} | ({} if self.causal else {"mlm_probability": self.mlm_probability})


@dataclass
class Objective:
    """What decides which other options there are."""

    objective: str | None = None


def objective_of(argv: list[str]) -> str | None:
    """The objective that a command line, or the one JSON or YAML file named there, says; None if it says none."""
    of_file = parse_file(make_parser(Objective, description=__doc__), argv, allow_extra_keys=True)
    if of_file is not None:
        return of_file[0].objective
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--objective", nargs="?")
    return parser.parse_known_args(argv)[0].objective


def parse_arguments(argv: list[str]) -> tuple[Any, ModelRecipe, Any, Any]:
    """
    Arguments from the command line, or from the one JSON or YAML file named there.

    Returns:
        Of the model, the recipe, the data and the run; with the objective seq2seq those of `train_pairs.py`.

    Raises:
        ValueError: There is no such option or objective, or an option is of another objective.
    """
    objective = objective_of(argv)
    if objective == OBJECTIVE:
        return parse_pair_arguments(argv)
    if objective not in (None, *OBJECTIVE_SENTENCE):
        raise ValueError(
            f"objective is {objective!r}; it must be one of {', '.join(OBJECTIVE_SENTENCE)}, {OBJECTIVE}."
        )
    foreign = [word for word in argv if word.partition("=")[0] in OF_PAIRS]
    if foreign:
        raise ValueError(
            f"{foreign[0]} is for pairs of texts, which --objective {OBJECTIVE} reads. Add it; or name a text with "
            "--text_path, or a data set with --dataset_name."
        )
    return parse_groups(argv, ModelArguments, ModelRecipe, DataArguments, RunArguments, of=__doc__)


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The named tokenizer, the existing model's, or bytes; with a mask token where the objective needs one."""
    tokenizer = named_tokenizer(arguments.tokenizer_name or arguments.model_name_or_path)
    if not arguments.causal and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def load_config(
    arguments: ModelArguments, recipe: ModelRecipe, context_length: int, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedConfig:
    """
    The config of the existing model, or of a new one.

    Raises:
        ValueError: `set` names what the existing model does not have, or the recipe was changed beside it.
    """
    settings, name = parse_settings(arguments.set), arguments.model_name_or_path
    return config_of(name, settings, recipe, context_length, tokenizer, is_decoder=arguments.causal)


def load_model(
    arguments: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The existing model, its vocabulary grown to the tokenizer's if need be, or a new one."""
    if arguments.model_name_or_path is None:
        # Not by `from_config`, which begins with other weights under ZeRO-3.
        return (ReformerForCausalLM if arguments.causal else ReformerForMaskedLM)(cast(ReformerConfig, config))
    auto_class = AutoModelForCausalLM if arguments.causal else AutoModelForMaskedLM
    model = auto_class.from_pretrained(arguments.model_name_or_path, config=config)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    return model


def tokens_per_byte(windows: Windows, arguments: ModelArguments) -> float:
    """Predicted tokens per byte of text under the objective."""
    return windows.causal_tokens_per_byte if arguments.causal else windows.masked_tokens_per_byte


def train(
    model_arguments: ModelArguments,
    recipe: ModelRecipe,
    data_arguments: DataArguments,
    training_arguments: RunArguments,
) -> dict[str, float]:
    """
    Train, evaluate and save; returns the held-out bits per byte (`model`) with the reference figures.

    The output folder then holds the model (safetensors), its tokenizer, README.md (the model card), loss_curve.png and
    training_log.json.
    """
    check_strategy(training_arguments)
    checkpoint = find_checkpoint(training_arguments)
    tokenizer = load_tokenizer(model_arguments)
    if training_arguments.disable_tqdm or training_arguments.process_index > 0:
        disable_progress_bars()
    config = load_config(model_arguments, recipe, data_arguments.context_length, tokenizer)
    alignment = alignment_in_windows(config, data_arguments.packing)
    with training_arguments.main_process_first(desc="reading the text"):
        corpus = build_corpus(data_arguments, tokenizer, alignment)
    set_seed(training_arguments.seed)
    model = load_model(model_arguments, config, tokenizer)
    # What precedes a byte is all that these figures know, so they say nothing about a masked model.
    references = reference_figures(corpus.held_out.text) if model_arguments.causal else {}
    trainer = BitsPerByteTrainer(
        model=model,
        args=training_arguments,
        data_collator=collate_causal
        if model_arguments.causal
        else DataCollatorForLanguageModeling(tokenizer, mlm_probability=model_arguments.mlm_probability),
        train_dataset=corpus.train.dataset,
        eval_dataset=corpus.held_out.dataset,
        processing_class=tokenizer,
        callbacks=[SayTimeLeft(len(corpus.held_out.dataset)), CompareOnEvaluate(references)],
        tokens_per_byte=tokens_per_byte(corpus.held_out, model_arguments),
        predicts_next=model_arguments.causal,
    )
    if trainer.is_world_process_zero():
        describe(trainer, data_arguments, corpus)
    trainer.run = identify_run(trainer, corpus, model_arguments.identity)
    if checkpoint is not None:
        check_same_run(checkpoint, trainer.run, accept_changes=training_arguments.accept_changes)
    run_training(trainer, training_arguments, checkpoint)
    figures = {"model": final_bits_per_byte(trainer), **bits_without_lsh(trainer), **references}
    check_finite(figures["model"], "The held-out loss", training_arguments.learning_rate)
    with saving(training_arguments.output_dir):
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            save_report(trainer, model_arguments, data_arguments, corpus, figures)
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    return figures


def final_bits_per_byte(trainer: Trainer) -> float:
    """Held-out bits per byte of the final weights, taken from the log where the last step has just been evaluated."""
    for row in reversed(trainer.state.log_history):
        just_now = row["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end
        if just_now and "eval_bits_per_byte" in row:
            return row["eval_bits_per_byte"]
    return trainer.evaluate()["eval_bits_per_byte"]


def bits_without_lsh(trainer: BitsPerByteTrainer) -> dict[str, float]:
    """The same without the attention of LSH layers, which shows what they contribute; nothing if there are none."""
    if "lsh" not in getattr(trainer.model.config, "attn_layers", ()):
        return {}
    with without_attention(trainer.model):
        metrics = trainer.evaluate(metric_key_prefix="without_lsh")
    return {"LSH attention off": metrics["without_lsh_bits_per_byte"]}


def describe(trainer: BitsPerByteTrainer, data_arguments: DataArguments, corpus: Corpus) -> None:
    """Say what is trained on what."""
    config = trainer.model.config
    print(f"text: {data_arguments.source}")
    print(f"train: {corpus.train.describe()}")
    print(f"held-out: {corpus.held_out.describe()}")
    print(
        f"model: {type(trainer.model).__name__}, {trainer.model.num_parameters():,} parameters, "
        f"layers {layers_of(config)}",
        flush=True,
    )


def save_report(
    trainer: BitsPerByteTrainer,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    corpus: Corpus,
    figures: dict[str, float],
) -> None:
    """Write the model card, the loss curve and the log into the output folder."""
    folder, args = Path(trainer.args.output_dir), trainer.args
    tokens_per_step = (
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size * corpus.train.tokens_per_window
    )
    unit = "bits per byte" if model_arguments.causal else "bits per masked byte"
    write_curve(
        folder / "loss_curve.png",
        trainer.state.log_history,
        tokens_per_step=tokens_per_step,
        train_tokens_per_byte=tokens_per_byte(corpus.train, model_arguments),
        references={name: value for name, value in figures.items() if name != "model"},
        unit=unit,
    )
    write_log(
        folder / "training_log.json",
        run=trainer.run,
        figures=figures,
        model_arguments=vars(model_arguments),
        data_arguments=vars(data_arguments),
        training_arguments=args.to_sanitized_dict(),
        config=trainer.model.config.to_diff_dict(),
        log_history=trainer.state.log_history,
    )
    facts = describe_model(trainer, model_arguments, data_arguments) | {
        "unit": unit,
        "unit_sentence": UNIT_SENTENCE[model_arguments.objective],
        "source": data_arguments.source,
        "train": corpus.train.describe(),
        "held_out": corpus.held_out.describe(),
        "tokens_per_step": f"{tokens_per_step:,.0f}",
        "tokens_seen": f"{trainer.state.global_step * tokens_per_step:,.0f}",
    }
    write_model_card(folder / "README.md", facts, figures)
    print(f"\n{unit} on held-out text:")
    for name, value in sorted(figures.items(), key=lambda item: item[1]):
        print(f"  {name:<18} {value:.3f}")
    then = f"; hf-reformer generate --model {folder} --prompt ..." if model_arguments.causal else ""
    print(f"{folder}: model, README.md, loss_curve.png, training_log.json{then}", flush=True)


def describe_model(
    trainer: BitsPerByteTrainer, model_arguments: ModelArguments, data_arguments: DataArguments
) -> dict[str, str | int]:
    """What the model card says about the model and how it was optimised."""
    longest = longest_input(trainer.model.config)
    start = model_arguments.model_name_or_path or "random"
    return describe_run(trainer, data_arguments.context_length, start) | {
        "pipeline_tag": "text-generation" if model_arguments.causal else "fill-mask",
        "objective": OBJECTIVE_SENTENCE[model_arguments.objective],
        "longest_input": (
            "takes inputs of any length" if longest is None else f"refuses inputs longer than {longest:,} tokens"
        ),
    }


def main(argv: list[str] | None = None) -> None:
    """Train as the command line, or the settings file on it, says."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if arguments[0].objective == OBJECTIVE:
        run_pairs(*arguments)
    else:
        train(*arguments)


def run_process(argv: list[str] | None = None) -> None:
    """`main` as all that this process does: a mistake ends it with its message, a signal with its exit code."""
    with mistakes_end("train"):
        run_and_end(main, argv)


if __name__ == "__main__":
    run_process()
