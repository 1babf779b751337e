"""How long a run will take, said after its first steps."""

import time

from tqdm.auto import tqdm
from transformers import TrainerCallback


TIMED_STEPS = 3
# Forward alone, without backward, which runs the layers again, and without the optimizer.
EVALUATION_SHARE = 0.25


class SayTimeLeft(TrainerCallback):
    """
    Times a few steps and says once how long the rest will take.

    Args:
        num_evaluated: Windows in an evaluation, on all devices.
    """

    def __init__(self, num_evaluated: int):
        self.num_evaluated = num_evaluated
        self.first_step = self.begun = self.ended = None

    def on_step_end(self, args, state, control, **kwargs):
        self.ended = time.monotonic()
        if self.begun is None:
            # The first step also sets up.
            self.first_step, self.begun = state.global_step, self.ended
        elif state.global_step == self.first_step + TIMED_STEPS and state.is_world_process_zero:
            seconds = (self.ended - self.begun) / TIMED_STEPS
            left = state.max_steps - state.global_step
            evaluations = left // state.eval_steps if args.eval_strategy == "steps" else 0
            windows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            in_steps = left + evaluations * EVALUATION_SHARE * self.num_evaluated / windows
            minutes = round(in_steps * seconds / 60)
            tqdm.write(
                f"a step takes {seconds:.2f} s, so {left:,} more and {evaluations} evaluations take "
                f"{f'about {minutes}' if minutes else 'less than a'} min on this machine"
            )

    def on_evaluate(self, args, state, control, **kwargs):
        if self.begun is not None and self.ended is not None:
            # As if the steps had gone on at once.
            self.begun += time.monotonic() - self.ended
