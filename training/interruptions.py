"""SIGTERM and Ctrl-C during training: the step is finished and saved before the process ends."""

import os
import signal
import threading
import time

import torch
import torch.distributed as dist
from transformers import TrainerCallback


SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on a Ctrl-C that its processes have got already.
SAME_KEYSTROKE_SECONDS = 1.0


class Interrupted(SystemExit):
    """The run was told to stop, and has saved what it had; the code is what shells give for the signal."""

    def __init__(self, number: int):
        self.exit_status = 128 + number
        super().__init__(self.exit_status)


class StopOnSignal(TrainerCallback):
    """
    Ends training after the step in which a signal came, with a checkpoint; all ranks do if one gets it.

    In the last step it ends anyway, and the run is finished as if none had come.

    As a context it takes the signals on entering and gives them back on leaving. A second Ctrl-C stops at once.

    Attributes:
        number: The signal that came on any rank, once training has ended for it, else 0.
    """

    def __init__(self):
        self.number = 0
        self._received, self._received_at = 0, 0.0
        self._before, self._ranks = {}, None

    def __enter__(self) -> "StopOnSignal":
        # Only the main thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = number, now
            # Printing could find the stream in the middle of another write.
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving it.\n".encode())
        elif number == signal.SIGINT and now - self._received_at > SAME_KEYSTROKE_SECONDS:
            raise KeyboardInterrupt

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # Signals are the host's, so ranks agree on them without waiting for a GPU.
            self._ranks = dist.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            return
        self.number = self._on_any_rank(self._received)
        if self.number:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.number:
            control.should_save = control.should_evaluate = False

    def _on_any_rank(self, number: int) -> int:
        if self._ranks is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._ranks)
        return int(largest)
