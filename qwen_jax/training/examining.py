"""A first rollout, as the doctor reads it: sampled, scored, and computed once more, before anything is learned."""

import jax
import numpy as np

from qwen_jax import sharding
from qwen_jax.batches import Rollout
from qwen_jax.tokenizer import Tokenizer, chat
from qwen_jax.training import doctor
from qwen_jax.training.collecting import PAD, Collector
from qwen_jax.training.doctor import DoctorConfig, Evidence, Finding
from qwen_jax.training.lessons import Lesson, RLState
from qwen_jax.training.reinforce import Reinforced


def examine(
    built: Reinforced,
    state: RLState,
    collector: Collector,
    frozen: tuple,
    tok: Tokenizer,
    config: DoctorConfig,
    *,
    centred: bool = True,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Finding]:
    """Returns what the doctor finds; the collector stands where it stood, and the run will sample this rollout again.

    Args:
      built: of the run.
      state: of step 0, not donated.
      collector: at its beginning.
      frozen: the arrays of built.frozen.
      tok: the policy's.
      config: what is healthy.
      centred: the advantages of a rollout have a mean of 0: whitened or less their group's, and not weighed after that.
      pairs: the reward model's scores of answers that people preferred, and of the others.
    """
    begin = collector.get_state()
    collector.see(state.params)
    rollout = sharding.put(next(collector).rollout, built.batch.rollout)
    collector.set_state(begin)
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(built.layout))
    lesson, rewards_B = built.score(state, rollout, *frozen)
    again_BT = built.log_probs(state.params, rollout, *frozen)
    found = jax.device_get((lesson, whole(rollout), again_BT, rewards_B))
    seen = evidence(*found, tok, scored=bool(built.frozen) and "reward" in built.frozen[0])
    chosen, rejected = pairs or (None, None)
    return doctor.examine(seen._replace(centred=centred, chosen=chosen, rejected=rejected), config)


def evidence(lesson: Lesson, rollout: Rollout, log_probs_BT, rewards_B, tok: Tokenizer, *, scored: bool) -> Evidence:
    """Returns arrays of a step as the doctor wants them: figures stand at their token, where ours stand before it."""
    at = lambda x: np.roll(x, 1, axis=1) if len(x) else None
    return Evidence(
        tokens=rollout.tokens, mask=at(rollout.mask), stop_ids=chat.stop_ids(tok), pad_id=PAD,
        vocab_size=tok.vocab_size, log_probs=at(log_probs_BT), old_log_probs=at(lesson.old_log_probs),
        rollout_log_probs=at(rollout.log_probs), sampling_log_probs=at(rollout.sampling_log_probs),
        reference_log_probs=at(lesson.ref_log_probs), advantages=at(lesson.advantages), values=at(lesson.old_values),
        returns=at(lesson.returns), rewards=rewards_B,
        score_tokens=np.take_along_axis(rollout.tokens, rollout.ends[:, None], axis=1)[:, 0] if scored else None,
    )  # fmt: skip
