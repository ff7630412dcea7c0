"""The training engine: what stands between a loop and its steps, so that it repeats exactly and survives a kill.

All random numbers of a step are a function of (seed, stage, epoch, pass, step), and so are its images: what a
checkpoint needs besides weights is only where it was written, and a training that goes on from one ends with the same
bytes: on a CPU, or with `deterministic` on a GPU of the same kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from densenas.files import writing
from densenas.images.loading import Batches, seed_of
from densenas.ranks import rank_and_world
from densenas.runs.progress import epoch_may_have_ended, progress, spare
from densenas.runs.run import Run
from densenas.training.checkpoint import Checkpoint, Part, Position, Row
from densenas.training.device import keep_freed_memory, warn_of_long_spins
from densenas.training.processes import Interruption


@contextmanager
def resumable(
    run: Run,
    stage: str,
    configuration: Mapping[str, Any],
    parts: Mapping[str, Part],
    steps: Sequence[int],
) -> Iterator[Training]:
    """A training that the same call goes on with, at the step that the last checkpoint was written behind.

        with resumable(run, "retrain", configuration, parts, steps) as training:
            for epoch in training.epochs():
                for images, labels in training.batches("train", batches):
                    training.record(step(images, labels))
                training.end_epoch({"lr": lr})

    `parts` (with state_dict and load_state_dict) are all that the steps change, `configuration` holds the seed and all
    else that decides the outcome, `steps` how many steps each epoch has. Checkpoints are kept in runs/<run>/<stage>.pt
    after every epoch, every two minutes within one, and on Ctrl-C or SIGTERM; <stage>.previous.pt is the one before,
    <stage>.best.pt that of the epoch with the highest accuracy on val, or on train as long as there is no pass over
    val. Raises FloatingPointError, naming the step, where a loss or a part's state is not finite: no checkpoint holds
    such. Raises OSError with one sentence where the disk is full.
    """
    keep_freed_memory()
    warn_of_long_spins()
    with alone(run), Interruption(stage) as interruption:
        checkpoint = Checkpoint(run, stage, configuration, parts)
        checkpoint.resume()
        display = Display(run, stage, checkpoint.position, steps)
        try:
            yield Training(checkpoint, display, interruption, len(steps))
        except FloatingPointError as error:
            raise checkpoint.not_finite(str(error)) from None
        finally:
            # One left open would come back below the bar of the call that goes on.
            display.bar.close()
        display.close()


def alone(run: Run) -> AbstractContextManager[None]:
    """`Run.alone` for the first of several processes that train together; the others follow it."""
    return run.alone() if rank_and_world()[0] == 0 else nullcontext()


class Training:
    """A training under way, see `resumable`."""

    def __init__(
        self, checkpoint: Checkpoint, display: Display, interruption: Interruption, epochs: int
    ) -> None:
        self.checkpoint = checkpoint
        self.position = checkpoint.position
        self.display = display
        self.interruption = interruption
        self.number_of_epochs = epochs
        self.passes = 0  # that this epoch has begun
        self.name = ""  # of the present pass
        self.clock = 0.0

    @property
    def history(self) -> list[Row]:
        """A row for each finished epoch."""
        return self.position.history

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to do."""
        for epoch in range(len(self.history), self.number_of_epochs):
            self.position.row.setdefault("epoch", epoch)
            self.passes = 0
            yield epoch

    def batches(self, name: str, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """A pass over images and labels, from where it stands; `name` (train, val) heads its columns in the history.

        PyTorch's generator is seeded for each step. A pass that a checkpoint has behind it yields nothing.
        """
        number = self.passes
        self.passes += 1
        if number < self.position.passes:
            self.display.skip(len(batches))
            return
        self.name = name
        self.display.skip(self.position.steps)
        epoch, seed = len(self.history), self.checkpoint.configuration["seed"]
        self.clock = time.perf_counter()
        for images, labels in batches.epoch(epoch, start=self.position.steps):
            place = (seed, self.checkpoint.stage, epoch, number, self.position.steps)
            torch.manual_seed(seed_of(*place))
            yield images, labels
        self.checkpoint.check_finite()
        self.position.end_pass(name)

    def record(self, outcome: Tensor) -> None:
        """Notes a step's loss and share of correct predictions, a tensor (2,); keeps a checkpoint where one is due."""
        # Where the host waits for the device; a search draws its candidates from alpha right behind it.
        loss, top1 = outcome.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {self.name} loss")
        now = time.perf_counter()
        self.position.add(loss, top1, now - self.clock)
        self.clock = now
        self.display.step(self.position)
        stopping = self.interruption.asked and self.checkpoint.rank == 0
        if stopping or self.checkpoint.is_due():
            self.checkpoint.check_finite()
            self.checkpoint.save()
        if stopping:
            self.display.bar.close()
            self.interruption.obey(self.checkpoint.path)

    def end_epoch(self, columns: Row) -> None:
        """Adds a row to the history, with these columns beside those of the passes; keeps a checkpoint."""
        self.position.end_epoch(columns)
        self.checkpoint.save()
        self.display.epoch(self.position)


class Display:
    """What a training shows of itself: a progress bar, TensorBoard, history.csv; nothing but on the first process."""

    def __init__(self, run: Run, stage: str, position: Position, steps: Sequence[int]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.run = run
        self.stage = stage
        self.epochs = len(steps)
        first = rank_and_world()[0] == 0
        done = len(position.history)
        behind = sum(steps[:done])
        self.bar = progress(sum(steps), stage, initial=behind, disable=not first)
        self.board = None
        if first:
            with writing(run.work / "tensorboard"):
                self.board = SummaryWriter(run.work / "tensorboard" / stage, purge_step=done)
            if position.history:  # a kill may have come between the checkpoint and this
                run.write_history(stage, position.history)

    def skip(self, steps: int) -> None:
        """Steps that were done before the checkpoint."""
        self.bar.update(steps)

    def step(self, position: Position) -> None:
        values = position.means()
        if position.history and "expected_cost" in position.history[-1]:
            values["cost"] = position.history[-1]["expected_cost"]
        epoch = f"{self.stage}, epoch {len(position.history) + 1} of {self.epochs}"
        self.bar.set_description(epoch, refresh=False)
        self.bar.set_postfix(values, refresh=False)
        spare(self.bar)
        self.bar.update()

    def epoch(self, position: Position) -> None:
        if self.board:
            self.run.write_history(self.stage, position.history)
            with writing(self.run.work / "tensorboard"):
                for name, value in position.history[-1].items():
                    self.board.add_scalar(name, value, len(position.history) - 1)
            epoch_may_have_ended()

    def close(self) -> None:
        if self.board:
            with writing(self.run.work / "tensorboard"):
                self.board.close()
