"""Learning from answers that were just sampled: one step of the loop samples, scores, and updates several times.

    collecting.Collector: prompts -> answers of the policy as it is -> Rollout
    score:   old and reference log-probabilities, values, reward model: one pass, no gradient -> Lesson
    updates: epochs x minibatches, each the one `train_step` on the policy and on the value model

Score and updates are one program, which `loop.fit` runs as it runs any other. Models arrive as functions, and what is
not trained (reference, reward model, the base of adapters) as plain arguments.

Shapes: B answers, T places of a row, U updates in a step of the loop, R rows of an update.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import sharding
from qwen_jax.batches import Rollout
from qwen_jax.objectives import divergence, masked
from qwen_jax.sharding import Layout
from qwen_jax.training.lessons import (
    NOTHING,
    Experience,
    Lesson,
    Moments,
    RLState,
    UpdatesConfig,
    importance,
    normalised,
    rollout_struct,
)
from qwen_jax.training.program import Program
from qwen_jax.training.state import TrainState


@dataclass(frozen=True)
class Roles:
    """The models as functions; rollout may be a Lesson, what they read is tokens and segment_ids (and ends).

    Attributes:
      policy: (params, rollout, *frozen) -> log-probability of the tokens that follow, [B, T] float32.
      reference: (rollout, *frozen) -> the same; None: no reference.
      value: (params, rollout, *frozen) -> [B, T] float32, worth of the answer before the next token; None: no critic.
      reward: (rollout, *frozen) -> [B] float32, added to rollout.rewards; None: nothing is.
      credit: (scores_B, Lesson without advantages, kl_coef) -> Lesson with them.
      adapt: (kl_coef, nats an answer from the reference) -> kl_coef of the next step.
    """

    policy: Callable
    reference: Callable | None
    value: Callable | None
    reward: Callable | None
    credit: Callable
    adapt: Callable = lambda kl_coef, kl: kl_coef


@dataclass(frozen=True)
class Reinforced(Program):
    """A Program whose train_step takes (RLState, Experience, *frozen).

    Attributes:
      policy, value: the programs of the two models; value None without one.
      begin: (TrainState of the policy, of the value model or ()) -> RLState; donates both.
      score: (RLState, Rollout, *frozen) -> (Lesson, rewards [B]): what the first update of a step sees.
      log_probs: (params, Rollout, *frozen) -> what roles.policy gives. This and what score gives is whole everywhere.
    """

    policy: Program | None = None
    value: Program | None = None
    begin: Callable | None = None
    score: Callable | None = None
    log_probs: Callable | None = None


def build(
    policy: Program,
    value: Program | None,
    roles: Roles,
    updates: UpdatesConfig,
    *,
    rows: int,
    each: int,
    length: int,
    kl_coef: float,
    mixed: Any = NOTHING,
) -> Reinforced:
    """Puts the policy, its critic and the way to learn from a rollout together.

    Args:
      policy: from `program.build`; its batch is (Lesson, LMBatch or ()) of one minibatch.
      value: the same of the value model; its batch is a Lesson.
      roles: the models as functions.
      updates: how a rollout is learned from.
      rows: B.
      each: of how many answers to one prompt each.
      length: T.
      kl_coef: of the first step.
      mixed: the text rows of a step as structs, U times those of a minibatch; () for none.

    Raises:
      InputError: where rows cannot be cut into minibatches, or the mesh does not divide them.
    """
    layout = policy.layout
    whole = sharding.replicated(layout)
    place = lambda structs, axes: jax.tree.map(
        lambda s, names: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout.sharding(names, s.shape, "rollout")),
        structs, axes,
    )  # fmt: skip
    of_mixed = jax.tree.map(lambda _: ("batch", "length"), mixed)
    batch = place(Experience(rollout_struct(rows, length), mixed), Experience(Rollout.axes(), of_mixed))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    state = RLState(*policy.state, value.state if value else NOTHING, Moments(scalar, scalar, scalar), scalar)
    places = lambda structs: jax.tree.map(lambda struct: struct.sharding, structs)

    def begin(of_policy: TrainState, of_value) -> RLState:
        zero = jnp.float32(0)
        return RLState(*of_policy, of_value, Moments(zero, zero, zero), jnp.float32(kl_coef))

    def score(state, rollout, *frozen):
        return _score(state, rollout, frozen, roles, updates, each)[:2]

    def step(state, batch, *frozen):
        lesson, _, moments, metrics = _score(state, batch.rollout, frozen, roles, updates, each)
        state, learned = _update(state, lesson, batch.mixed, frozen, policy, value, updates)
        kl = metrics.get("rollout/kl", jnp.float32(0))
        metrics |= learned | {"policy/kl_coef": state.kl_coef}
        adapted = jnp.where(learned["policy/updates"] > 0, roles.adapt(state.kl_coef, kl), state.kl_coef)
        return state._replace(moments=moments, kl_coef=adapted), metrics

    return Reinforced(
        layout=layout, state=state, batch=batch, frozen=policy.frozen, policy=policy, value=value,
        init=policy.init, start=policy.start, eval_step=policy.eval_step,
        begin=jax.jit(begin, out_shardings=places(state), donate_argnums=(0, 1)),
        score=jax.jit(
            score, in_shardings=(places(state), places(batch.rollout), *places(policy.frozen)), out_shardings=whole
        ),
        log_probs=jax.jit(
            roles.policy, in_shardings=(places(policy.state.params), places(batch.rollout), *places(policy.frozen)),
            out_shardings=whole,
        ),
        train_step=jax.jit(
            step,
            in_shardings=(places(state), places(batch), *places(policy.frozen)),
            out_shardings=(places(state), whole),
            donate_argnums=0,
        ),
    )  # fmt: skip


def _score(state: RLState, rollout: Rollout, frozen: tuple, roles: Roles, updates: UpdatesConfig, each: int):
    """Returns the Lesson, the rewards as they were given, their moments with these, and metrics."""
    mask_BT, seen_B = rollout.mask, jnp.any(rollout.mask != 0, axis=1)

    def read(part):
        return (
            roles.policy(state.params, part, *frozen),
            roles.reference(part, *frozen) if roles.reference else NOTHING,
            roles.value(state.value.params, part, *frozen) if roles.value else NOTHING,
            part.rewards + (roles.reward(part, *frozen) if roles.reward else 0.0),
        )

    # As many rows at a time as an update computes, so that no more memory is needed than it takes.
    old_BT, ref_BT, values_BT, raw_B = _in_pieces(read, rollout, updates.minibatches * updates.microbatches)
    moments, scores_B = normalised(state.moments, raw_B, seen_B, updates.rewards)
    lesson = Lesson(
        rollout.tokens, rollout.segment_ids, mask_BT, old_BT, ref_BT, jnp.zeros_like(old_BT), values_BT, values_BT
    )
    lesson = roles.credit(scores_B, lesson, state.kl_coef)
    metrics = rollout_metrics(rollout, lesson, raw_B, seen_B, each)
    if updates.truncate:
        weights_BT = importance(old_BT, rollout.sampling_log_probs, updates.truncate)
        metrics |= {"rollout/importance": masked.mean(weights_BT, mask_BT)}
        lesson = lesson._replace(advantages=jnp.where(mask_BT != 0, lesson.advantages * weights_BT, 0.0))
    return jax.lax.stop_gradient(lesson), raw_B, moments, metrics


def _in_pieces(function: Callable, rows, count: int):
    """Returns function(rows) computed for B / count rows at a time; every device keeps the rows it has."""
    if count == 1:
        return function(rows)
    cut = lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    join = lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(cut, rows)))


def rollout_metrics(rollout: Rollout, lesson: Lesson, rewards_B: jax.Array, seen_B: jax.Array, each: int) -> dict:
    """Returns what is watched of a rollout; entropy is estimated by the log-probabilities of what was sampled."""
    mask_BT, old_BT = rollout.mask, lesson.old_log_probs
    gap_BT = jnp.where(mask_BT != 0, jnp.abs(old_BT - rollout.log_probs), 0.0)
    ended_B = jnp.take_along_axis(mask_BT, jnp.maximum(rollout.ends - 1, 0)[:, None], axis=1)[:, 0]
    spread = lambda x, weights: jnp.sqrt(masked.mean(jnp.square(x - masked.mean(x, weights)), weights))
    rewards_NG = rewards_B.reshape(-1, each)
    metrics = {
        "reward": masked.mean(rewards_B, seen_B),
        "reward_spread": spread(rewards_B, seen_B),
        "reward_errors": 1.0 - jnp.mean(seen_B.astype(jnp.float32)),
        "flat_groups": jnp.mean((jnp.max(rewards_NG, axis=1) == jnp.min(rewards_NG, axis=1)).astype(jnp.float32)),
        "length": masked.mean(jnp.sum(mask_BT, axis=1), seen_B),
        "unfinished": 1.0 - masked.mean(ended_B, seen_B),
        "entropy": -masked.mean(old_BT, mask_BT),
        "advantage_spread": spread(lesson.advantages, mask_BT),
        "gap": masked.mean(gap_BT, mask_BT),  # of the sampler's log-probabilities from the trainer's
        "gap_max": jnp.max(gap_BT),
    }
    if lesson.ref_log_probs is not NOTHING:
        kl_BT = divergence.per_token(old_BT, lesson.ref_log_probs, estimator="k1")
        metrics["kl"] = masked.mean(masked.total(kl_BT, mask_BT, axis=1), seen_B)
    return {f"rollout/{name}": figure for name, figure in metrics.items()}


def _update(state: RLState, lesson: Lesson, mixed, frozen: tuple, policy: Program, value, updates: UpdatesConfig):
    """Makes all updates of a step. Returns the state, and metrics over the updates."""
    B, U, layout = lesson.tokens.shape[0], updates.each_step, policy.layout
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    orders = [jax.random.permutation(jax.random.fold_in(key, epoch), B) for epoch in range(updates.epochs)]
    rows_UR = jnp.stack(orders).reshape(U, B // updates.minibatches)
    cut = lambda x: x.reshape(x.shape[0] // U, U, *x.shape[1:]).swapaxes(0, 1)  # as `_in_pieces`
    numbers_U = state.step * U + jnp.arange(U)

    def update(carry, inputs):
        of_policy, of_value, going = carry
        number, rows_R, text = inputs
        part = jax.tree.map(lambda x: _rows(x, rows_R, layout), lesson)
        wanted = going & (number >= updates.value_only)
        of_policy, metrics = _where(
            wanted, lambda s: policy.train_step(s, (part, text), *frozen), of_policy,
            always=not (updates.value_only or updates.stop_kl),
        )  # fmt: skip
        if updates.stop_kl:
            going &= metrics["kl_old"] <= updates.stop_kl
        judged = {}
        if value is not None:
            of_value, judged = value.train_step(of_value, part, *frozen)
        return (of_policy, of_value, going), (wanted, metrics, judged)

    start = TrainState(state.step * U, state.params, state.opt_state, state.key), state.value, jnp.bool_(True)
    (of_policy, of_value, _), (made_U, metrics, judged) = jax.lax.scan(
        update, start, (numbers_U, rows_UR, jax.tree.map(cut, mixed))
    )
    told = _over_updates(metrics, made_U) | {"policy/updates": jnp.sum(made_U.astype(jnp.float32))}
    if value is not None:
        of_critic = _over_updates(judged, jnp.ones_like(made_U), "value")
        told["skipped"] += of_critic.pop("value/skipped")
        told |= of_critic
    return state._replace(
        step=state.step + 1, params=of_policy.params, opt_state=of_policy.opt_state, value=of_value
    ), told


def _rows(x: jax.Array, rows_R: jax.Array, layout: Layout) -> jax.Array:
    return sharding.constrain(x[rows_R], ("batch", "length"), layout)


def _where(wanted: jax.Array, update: Callable, state: TrainState, *, always: bool) -> tuple[TrainState, dict]:
    """Runs the update where it is wanted; elsewhere the state stays, and metrics are 0."""
    if always:
        return update(state)
    shapes = jax.eval_shape(update, state)[1]
    zeros = {name: jnp.zeros(struct.shape, struct.dtype) for name, struct in shapes.items()}
    return jax.lax.cond(wanted, update, lambda state: (state, zeros), state)


SHARED = ("loss", "weight", "grad_norm", "learning_rate", "skipped")  # what the loop asks of any step


def _over_updates(metrics: dict, made_U: jax.Array, of: str = "") -> dict:
    """Returns means over the updates that were made; of "weight" the sum, of extremes the extreme.

    Names are put behind `of`; without it what the loop asks for keeps its name, and the others are the policy's.
    """
    count = jnp.maximum(jnp.sum(made_U.astype(jnp.float32)), 1.0)
    told = {name: jnp.sum(jnp.where(made_U, figure_U, 0.0)) / count for name, figure_U in metrics.items()}
    told["weight"] *= count
    if "ratio_max" in metrics:
        largest_U, least_U = (jnp.where(made_U, metrics[name], 1.0) for name in ("ratio_max", "ratio_min"))
        first = jnp.argmax(made_U)
        told |= {
            "ratio_max": jnp.max(largest_U),
            "ratio_min": jnp.min(least_U),
            "first_ratio_gap": jnp.maximum(largest_U[first] - 1.0, 1.0 - least_U[first]),
        }
    prefix = lambda name: name if not of and name in SHARED else f"{of or 'policy'}/{name}"
    return {prefix(name): figure for name, figure in told.items()}
