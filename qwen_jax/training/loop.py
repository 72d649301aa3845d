"""The loop every run shares: resume, train, evaluate, checkpoint, report."""

import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from qwen_jax import sharding
from qwen_jax.batches import Loss
from qwen_jax.errors import InputError
from qwen_jax.training import heap, hosts, preemption, samples
from qwen_jax.training.accounts import Accounts
from qwen_jax.training.accounts import read as read_accounts
from qwen_jax.training.checkpoint import Checkpoints
from qwen_jax.training.metrics import MetricsWriter, Progress
from qwen_jax.training.preemption import Preempted
from qwen_jax.training.program import Program
from qwen_jax.training.state import TrainState
from qwen_jax.training.throughput import peak_flops

ACCOUNTS = "accounts"  # beside the position in the data, in each checkpoint


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
    """Batches with a position: a grain.DatasetIterator, or anything that has these three.

    One that has a method `see` besides is given the newest parameters before each batch, to sample from the policy as
    it is. Its batch n has to be a function of them and of n alone. What it has as `metrics`, name -> figure of the
    batch it gave last, is logged with those of the step; one that has `watch` is called with (step, figures) of each
    finished step, and may stop the run by raising.
    """

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
    validation: Mapping[str, Callable[[], Iterable]] | None = None,
    sample: Callable[..., list[dict]] | None = None,
    sample_every: int = 0,
    lengths: Sequence[int] = (),
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
      validation: domain -> what makes a fresh pass over its validation batches. The loss is that of all tokens; of
        several domains each has its own besides.
      sample: (params, *frozen) -> samples, see `samples.sampler`.
      sample_every: how often it is called; 0: only at the start and the end.
      lengths: of the rows of training batches, where they have several: each divides that of program.batch, and its
        batches have as many more rows. One step is compiled for each.
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
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        state, accounts = _resume(checkpoints, program, batches, label)
        if state is None:
            say(label, "making the parameters of step 0")
            state = initial()
        start = int(state.step)
        writer = MetricsWriter(workdir, start=start)
        stack.callback(writer.close)
        progress = Progress(label, start=start, total=config.steps)
        stack.callback(progress.close)
        accounts.flops_per_token = flops_per_token
        run = _Run(program, config, workdir, writer, progress, checkpoints, accounts, frozen)
        run.validation, run.sample, run.sample_every = validation or {}, sample, sample_every
        run.structs = program.batches(lengths)
        state = run.train(state, batches, start, stack.enter_context(preemption.watch()))
        if start < config.steps or not read_accounts(workdir):
            accounts.save(workdir)
        return state


def _resume(checkpoints: Checkpoints, program: Program, batches: Batches, label: str):
    """Returns the newest state and the run's accounts; (None, new ones) where there is no checkpoint."""
    restored = checkpoints.restore(program.state)
    if restored is None:
        return None, Accounts()
    state, data_state, complaints = restored
    accounts = Accounts(**data_state.pop(ACCOUNTS, {}))
    batches.set_state(data_state)
    for line in complaints:
        say(label, f"{line}; going back to step {int(state.step)}")
    say(label, f"resuming at step {int(state.step)} from {checkpoints.folder}")
    return state, accounts


def say(label: str, text: str) -> None:
    """Prints a line of a run, on the first process."""
    if hosts.is_first():
        print(f"[{label}] {text}", flush=True)


class _Run:
    """What the steps of one `fit` share."""

    validation: Mapping[str, Callable[[], Iterable]]
    sample: Callable[..., list[dict]] | None
    sample_every: int
    structs: dict[int, Any]  # row length -> a training batch

    def __init__(self, program, config, workdir, writer, progress, checkpoints, accounts, frozen):
        self.program, self.config, self.workdir, self.writer, self.progress = program, config, workdir, writer, progress
        self.checkpoints, self.accounts, self.frozen, self.skipped = checkpoints, accounts, frozen, 0
        self.compiled: set[str] = set()
        rows, length = jax.tree.leaves(program.batch)[0].shape[:2]
        self.tokens_per_step = rows * length

    def train(self, state: TrainState, batches: Batches, start: int, told_to_stop: Callable[[int], bool]) -> TrainState:
        config, progress, timed = self.config, self.progress, self.accounts.timed
        if start >= config.steps:
            progress.say(f"already at step {start} of {config.steps}: nothing to train")
            return state
        step_fns = self._prepare(state.params, start)
        waiting = None
        self._start_clock(start)
        see, self.watch = getattr(batches, "see", None), getattr(batches, "watch", None)
        for step in range(start + 1, config.steps + 1):
            with timed("data"):
                if see is not None:
                    see(state.params)
                batch = next(batches)
                length = jax.tree.leaves(batch)[0].shape[1]
                batch = sharding.put(batch, self.structs[length])
            with timed("step"):
                state, metrics = step_fns[length](state, batch, *self.frozen)
                self._settle(waiting)  # reading figures waits for the device: those of step n - 1 while n runs
            waiting = (step, metrics | getattr(batches, "metrics", {}))
            last = step == config.steps
            stop = not last and told_to_stop(step)  # then there may not be the time to evaluate
            due = lambda every, step=step, last=last: last or (every and step % every == 0)
            evaluate = self.validation and due(config.eval_every) and not stop
            sample = self.sample and due(self.sample_every) and not stop
            save = stop or due(config.checkpoint_every)
            if evaluate or sample or save:
                with timed("step"):
                    self._settle(waiting)
                scores = self._evaluate(step, state.params) if evaluate else None
                if save:
                    self._save(state, batches, scores)
                if sample:
                    self._sample(step, state.params)
                waiting = None
                self._start_clock(step)
            if stop:
                raise Preempted(f"told to stop: step {step} of {config.steps} is saved in {self.checkpoints.folder}")
        with timed("checkpoint"):
            self.checkpoints.wait()
        return state

    def _prepare(self, params, start: int):
        """Compiles, looks at the model that training begins with, and returns the compiled step of each row length."""
        accounts = self.accounts
        accounts.starts += 1
        accounts.peak_flops, accounts.peak_source = peak_flops(self.program.layout.mesh)
        self.progress.say(f"peak {accounts.peak_flops / 1e12:.3g} TFLOP/s ({accounts.peak_source})")
        with accounts.timed("compile"):
            step_fns = {}
            for length, batch in self.structs.items():
                what = f"the train step{f' on rows of {length}' if len(self.structs) > 1 else ''}"
                step_fns[length] = self._compiled(what, self.program.train_step, self.program.state, batch)
            if self.validation:
                function, params_struct = self.program.eval_step, self.program.state.params
                self.eval_step = self._compiled("the evaluation", function, params_struct, self.program.batch)
        accounts.take_memory(max(step_fns.items())[1])
        if start == 0 and self.validation:
            self._evaluate(0, params)
        if start == 0 and self.sample:
            self._sample(0, params)
        return step_fns

    def _start_clock(self, step: int) -> None:
        self.clock, self.timed_from = time.perf_counter(), step

    def _settle(self, waiting) -> None:
        """Takes in the figures of a finished step: counts it, checks it, and logs it where it is due."""
        if waiting is None:
            return
        step, metrics = waiting
        self._check_finite(step, metrics)
        if self.watch is not None:
            self.watch(step, {name: float(value) for name, value in metrics.items()})
        self.accounts.steps += 1
        self.accounts.weight += float(metrics["weight"])
        self.progress.update()
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._log(step, metrics, (time.perf_counter() - self.clock) / (step - self.timed_from))
            self._start_clock(step)

    def _compiled(self, what: str, function, first, batch):
        """Compiles a function of (first, batch) and says how long it took: silence reads as a hang."""
        self.progress.say(f"compiling {what}; nothing is printed meanwhile")
        begin = time.perf_counter()
        compiled = function.lower(first, batch, *self.program.frozen).compile()
        heap.release()
        self.progress.say(f"compiled in {time.perf_counter() - begin:.1f} s")
        return compiled

    def _log(self, step: int, metrics: dict, seconds: float) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        tokens_per_second = self.tokens_per_step / seconds
        values |= {
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "model_flops_utilisation": tokens_per_second * self.accounts.flops_per_token / self.accounts.peak_flops,
        }
        self.writer.write(step, values)
        shown = ("rollout/reward", "rollout/kl", "loss", "learning_rate", "grad_norm", "tokens_per_second")
        shown += ("model_flops_utilisation",)
        self.progress.show(step, {name: values[name] for name in shown if name in values})

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

    def _save(self, state: TrainState, batches: Batches, scores: dict[str, float] | None) -> None:
        with self.accounts.timed("checkpoint"):
            told = batches.get_state() | {ACCOUNTS: dataclasses.asdict(self.accounts)}
            self.checkpoints.save(state, told, scores)

    def _sample(self, step: int, params) -> None:
        first = "samples" not in self.compiled
        self.progress.say(f"step {step}: sampling{', which compiles first' if first else ''}")
        self.compiled.add("samples")
        with self.accounts.timed("first samples" if first else "samples"):
            samples.write(self.workdir, step, self.sample(params, *self.frozen))

    def _evaluate(self, step: int, params) -> dict[str, float] | None:
        """Writes the loss over all validation tokens, and by domain; returns what can rank a checkpoint."""
        self.progress.say(f"step {step}: evaluating")
        with self.accounts.timed("evaluation"):
            sums = {domain: self._sums(domain, params) for domain in self.validation}
        named = {"validation": jax.tree.map(lambda *values: sum(values), *sums.values())}
        if len(sums) > 1:
            named |= {f"validation/{domain}": of_one for domain, of_one in sums.items()}
        scores = {}
        for name, loss in named.items():
            mean = loss.total / loss.weight
            scores |= {f"{name}/loss": mean, f"{name}/perplexity": float(np.exp(np.float64(mean)))}
            scores |= {f"{name}/{metric}": value / loss.weight for metric, value in loss.metrics.items()}
        self.writer.write(step, scores)
        told = "".join(f", {name.split('/', 1)[1]} {scores[f'{name}/loss']:.4f}" for name in list(named)[1:])
        self.progress.say(f"step {step}: validation loss {scores['validation/loss']:.4f}{told}")
        return scores if np.isfinite(named["validation"].total) else None  # what is not finite ranks nothing

    def _sums(self, domain: str, params) -> Loss:
        """Returns the Loss of one domain's batches, added up."""
        found = None
        for batch in self.validation[domain]():
            loss = self.eval_step(params, sharding.put(batch, self.program.batch), *self.frozen)
            loss = jax.tree.map(float, jax.device_get(loss._replace(tally=())))
            found = loss if found is None else jax.tree.map(operator.add, found, loss)
        if found is None or not found.weight:
            raise InputError(f"the validation batches{f' of {domain}' if domain else ''} have no target to learn")
        return found
