"""Runs `hf-reformer train` once for each list of arguments; the command line gives a JSON list of them."""

import json
import sys

import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from hf_reformer.commands.train import main
from hf_reformer.commands.training_process import end_process


class OwnRandomNumbers(TrainerCallback):
    """The Trainer gives all ranks the same random numbers. Here each has its own, so that it must get its own back."""

    def on_train_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed + 1000 * args.process_index)


if __name__ == "__main__":
    DEFAULT_CALLBACKS.append(OwnRandomNumbers)
    for arguments in json.loads(sys.argv[1]):
        main(arguments)
    end_process()
