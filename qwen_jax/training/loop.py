"""The loop every run shares: resume, train, evaluate, checkpoint, report."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from qwen_jax import sharding
from qwen_jax.errors import InputError
from qwen_jax.training import hosts, preemption
from qwen_jax.training.checkpoint import Checkpoints
from qwen_jax.training.metrics import MetricsWriter, Progress
from qwen_jax.training.preemption import Preempted
from qwen_jax.training.program import Program
from qwen_jax.training.state import TrainState
from qwen_jax.training.throughput import peak_flops


@dataclass(frozen=True)
class LoopConfig:
    """How long, and how often what."""

    steps: int = 1000
    log_every: int = 10
    eval_every: int = 100  # 0: only at the start and the end
    checkpoint_every: int = 100  # a multiple of eval_every, so that each checkpoint has the metric that ranks it
    keep_checkpoints: int = 2  # the newest ones; the best one is kept besides
    max_skipped: int = 10  # consecutive steps with a loss or gradient that is not finite, before the run gives up

    def __post_init__(self):
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped"):
            if getattr(self, name) < 1:
                raise InputError(f"loop.{name} is {getattr(self, name)}; expected at least 1")
        if self.eval_every < 0:
            raise InputError(f"loop.eval_every is {self.eval_every}; expected 0 (start and end only) or more")
        if self.eval_every and self.checkpoint_every % self.eval_every:
            raise InputError(
                f"loop.checkpoint_every is {self.checkpoint_every}; expected a multiple of loop.eval_every "
                f"{self.eval_every}, so that each checkpoint is ranked by a validation loss"
            )


class Batches(Protocol):
    """Batches with a position: a grain.DatasetIterator, or anything that has these three."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict: ...
    def set_state(self, state: dict) -> None: ...


def fit(
    program: Program,
    batches: Batches,
    *,
    config: LoopConfig,
    workdir,
    initial: Callable[[], TrainState],
    validation: Callable[[], Iterable] | None = None,
    flops_per_token: float,
    label: str = "train",
    frozen: tuple = (),
) -> TrainState:
    """Trains to config.steps, from the newest checkpoint in workdir if there is one.

    Stopped at any moment and started again, a run ends with the parameters it would have had without the stop: state,
    data position and random key are restored together.

    Args:
      program: from `program.build`.
      batches: yields this process's rows of each global batch, for ever.
      config: how long, and how often what.
      workdir: a folder that `workdir.prepare` made.
      initial: makes the state of step 0; called only where there is no checkpoint.
      validation: makes a fresh pass over the validation batches.
      flops_per_token: of a training step, for utilisation.
      label: goes before each line.
      frozen: the arrays of program.frozen.

    Returns:
      The state after the last step, also saved.

    Raises:
      InputError: where no checkpoint can be read or written, or config.max_skipped steps in a row were not finite.
      Preempted: after SIGTERM, when the step under way is saved.
    """
    checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    try:
        state = _resume(checkpoints, program, batches, label)
        if state is None:
            say(label, "making the parameters of step 0")
            state = initial()
        start = int(state.step)
        writer = MetricsWriter(workdir, start=start)
        progress = Progress(label, start=start, total=config.steps)
        run = _Run(program, config, writer, progress, checkpoints, validation, flops_per_token, frozen)
        try:
            with preemption.watch() as told_to_stop:
                return run.train(state, batches, start, told_to_stop)
        finally:
            progress.close()
            writer.close()
    finally:
        checkpoints.close()


def _resume(checkpoints: Checkpoints, program: Program, batches: Batches, label: str) -> TrainState | None:
    restored = checkpoints.restore(program.state)
    if restored is None:
        return None
    state, data_state, complaints = restored
    batches.set_state(data_state)
    for line in complaints:
        say(label, f"{line}; going back to step {int(state.step)}")
    say(label, f"resuming at step {int(state.step)} from {checkpoints.folder}")
    return state


def say(label: str, text: str) -> None:
    """Prints a line of a run, on the first process."""
    if hosts.is_first():
        print(f"[{label}] {text}", flush=True)


class _Run:
    """What the steps of one `fit` share."""

    def __init__(self, program, config, writer, progress, checkpoints, validation, flops_per_token, frozen):
        self.program, self.config, self.writer, self.progress = program, config, writer, progress
        self.checkpoints, self.validation = checkpoints, validation
        self.flops_per_token, self.frozen, self.skipped = flops_per_token, frozen, 0
        rows, length = jax.tree.leaves(program.batch)[0].shape[:2]
        self.tokens_per_step = rows * length

    def train(self, state: TrainState, batches: Batches, start: int, told_to_stop: Callable[[int], bool]) -> TrainState:
        config, progress = self.config, self.progress
        if start >= config.steps:
            progress.say(f"already at step {start} of {config.steps}: nothing to train")
            return state
        self.peak, source = peak_flops(self.program.layout.mesh)
        progress.say(f"peak {self.peak / 1e12:.3g} TFLOP/s ({source})")
        step_fn = self._compiled("the train step", self.program.train_step, self.program.state)
        if self.validation:
            self.eval_step = self._compiled("the evaluation", self.program.eval_step, self.program.state.params)
            if start == 0:
                self._evaluate(0, state.params)  # what training begins with
        waiting = None
        self._start_clock(start)
        for step in range(start + 1, config.steps + 1):
            state, metrics = step_fn(state, sharding.put(next(batches), self.program.batch), *self.frozen)
            self._settle(waiting)  # reading figures waits for the device: those of step n - 1 are read while n runs
            waiting = (step, metrics)
            last = step == config.steps
            evaluate = self.validation and (last or (config.eval_every and step % config.eval_every == 0))
            save = last or step % config.checkpoint_every == 0
            stop = not last and told_to_stop(step)  # then there may not be the time to evaluate
            if evaluate or save or stop:
                self._settle(waiting)
                scores = self._evaluate(step, state.params) if evaluate and not stop else None
                if save or stop:
                    self.checkpoints.save(state, batches.get_state(), scores)
                waiting = None
                self._start_clock(step)
            if stop:
                raise Preempted(f"told to stop: step {step} of {config.steps} is saved in {self.checkpoints.folder}")
        return state

    def _start_clock(self, step: int) -> None:
        self.clock, self.timed_from = time.perf_counter(), step

    def _settle(self, waiting) -> None:
        """Takes in the figures of a finished step: counts it, checks it, and logs it where it is due."""
        if waiting is None:
            return
        step, metrics = waiting
        self._check_finite(step, metrics)
        self.progress.update()
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._log(step, metrics, (time.perf_counter() - self.clock) / (step - self.timed_from))
            self._start_clock(step)

    def _compiled(self, what: str, function, first):
        """Compiles a function of (first, batch) and says how long it took: silence reads as a hang."""
        self.progress.say(f"compiling {what}; nothing is printed meanwhile")
        begin = time.perf_counter()
        compiled = function.lower(first, self.program.batch, *self.program.frozen).compile()
        self.progress.say(f"compiled in {time.perf_counter() - begin:.1f} s")
        return compiled

    def _log(self, step: int, metrics: dict, seconds: float) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        tokens_per_second = self.tokens_per_step / seconds
        values |= {
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "model_flops_utilisation": tokens_per_second * self.flops_per_token / self.peak,
        }
        self.writer.write(step, values)
        shown = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "model_flops_utilisation")
        self.progress.show(step, {name: values[name] for name in shown})

    def _check_finite(self, step: int, metrics: dict) -> None:
        """Counts skipped steps in a row; too many end the run before it wastes more."""
        self.skipped = self.skipped + 1 if float(metrics["skipped"]) else 0
        if self.skipped:
            self.progress.say(f"step {step}: loss {float(metrics['loss'])} or its gradient is not finite: skipped")
        if self.skipped >= self.config.max_skipped:
            raise InputError(
                f"the last {self.skipped} steps to step {step} had a loss or gradient that is not finite; stopped. The "
                f"checkpoints in {self.checkpoints.folder} are untouched; try a lower optimizer.peak_lr"
            )

    def _evaluate(self, step: int, params) -> dict[str, float] | None:
        self.progress.say(f"step {step}: evaluating")
        total, weight, sums = 0.0, 0.0, {}
        for batch in self.validation():
            loss = jax.device_get(self.eval_step(params, sharding.put(batch, self.program.batch), *self.frozen))
            total, weight = total + float(loss.total), weight + float(loss.weight)
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in loss.metrics.items()}
        if not weight:
            raise InputError("the validation batches have no target to learn: every loss_mask is 0")
        scores = {"validation/loss": total / weight}
        scores |= {f"validation/{name}": value / weight for name, value in sums.items()}
        self.writer.write(step, scores)
        self.progress.say(f"step {step}: validation loss {scores['validation/loss']:.4f}")
        return scores if np.isfinite(total) else None  # a loss that is not finite cannot rank a checkpoint
