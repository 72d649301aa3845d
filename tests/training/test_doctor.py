"""The doctor: a healthy rollout passes, and each illness that can be put into it is found by its own check."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.training import doctor
from qwen_jax.training.doctor import DoctorConfig, Evidence

HEALTH = DoctorConfig()
PAD, STOP, B, T, PROMPT = 0, 9, 6, 14, 4


def healthy(seed=0, **changes) -> Evidence:
    """Answers of 2 to T - PROMPT tokens behind prompts of PROMPT, each with its stop id, then padding."""
    draw = np.random.default_rng(seed)
    tokens, mask = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
    for row in range(B):
        size = int(draw.integers(2, T - PROMPT + 1))
        tokens[row, : PROMPT + size] = draw.integers(1, 9, PROMPT + size)
        tokens[row, PROMPT + size - 1] = STOP
        mask[row, PROMPT : PROMPT + size] = 1
    log_probs = np.where(mask != 0, -draw.gamma(2.0, 1.0, (B, T)), np.nan)  # what is masked must not be read
    rewards = draw.normal(0, 1, B)
    returns = np.where(mask != 0, rewards[:, None], np.nan)
    fields = dict(
        tokens=tokens, mask=mask, stop_ids=(STOP,), pad_id=PAD, vocab_size=10, log_probs=log_probs,
        old_log_probs=log_probs, rollout_log_probs=log_probs + 1e-5, sampling_log_probs=log_probs,
        reference_log_probs=log_probs, score_tokens=np.full(B, STOP), rewards=rewards,
        advantages=rewards - rewards.mean(), values=returns + 0.1, returns=returns, chosen=draw.normal(1, 1, 50),
        rejected=draw.normal(-1, 1, 50), same_tokens=True,
    )  # fmt: skip
    return Evidence(**fields | changes)


def shifted(x):
    return np.roll(np.nan_to_num(x, nan=-3.0), 1, axis=1)


def failed(evidence, config=HEALTH):
    return [finding.name for finding in doctor.examine(evidence, config) if not finding.passed]


@given(st.integers(0, 10**6))
def test_a_healthy_rollout_passes_every_check(seed):
    found = doctor.examine(healthy(seed))
    assert [finding.name for finding in found] == list(doctor.NAMES)
    assert [finding for finding in found if not finding.passed and finding.name != "reward model"] == []
    doctor.insist(found, DoctorConfig(tolerated=("reward model",)))


H = healthy()
NOTHING = np.zeros_like(H.mask)
ILLNESSES = {
    "a stop id outside the vocabulary": (dict(stop_ids=(STOP, 10)), ["stop ids"]),
    "no stop id": (dict(stop_ids=()), ["stop ids", "ends", "score"]),
    "pad is stop": (dict(pad_id=STOP), ["padding", "score"]),
    "other words": (dict(same_tokens=False), ["vocabulary"]),
    "answers never end": (dict(tokens=np.where(H.tokens == STOP, 1, H.tokens)), ["ends"]),
    "the mask is late by one": (dict(mask=np.roll(H.mask, 1, axis=1), values=None, log_probs=None,
                                     rollout_log_probs=None), ["ends"]),
    "an empty answer": (dict(mask=H.mask * (np.arange(B) > 0)[:, None]), ["ends"]),
    "old log-probabilities are of the next token": (dict(old_log_probs=shifted(H.log_probs)), ["ratio"]),
    "dropout": (dict(log_probs=H.log_probs + 2e-3), ["ratio", "rollout", "kl"]),
    "the rollout's are of the next token": (dict(rollout_log_probs=shifted(H.log_probs), sampling_log_probs=None),
                                            ["rollout"]),
    "the trainer's are not finite": (dict(log_probs=H.log_probs * np.inf, reference_log_probs=None),
                                     ["ratio", "rollout"]),
    "filters that were not recorded": (dict(sampling_log_probs=np.where(H.tokens == 3, -np.inf, H.log_probs)),
                                       ["sampling"]),
    "another reference": (dict(reference_log_probs=H.log_probs - 0.1), ["kl"]),
    "a score read at padding": (dict(score_tokens=np.array([STOP] * 5 + [PAD])), ["score"]),
    "a score read one early": (dict(score_tokens=np.full(B, 3)), ["score"]),
    "equal rewards": (dict(rewards=np.ones(B)), ["rewards"]),
    "a reward that is nan": (dict(rewards=np.array([1, 2, np.nan, 3, 4, 5])), ["rewards"]),
    "no advantages": (dict(advantages=np.zeros(B)), ["advantages"]),
    "advantages beside 0": (dict(advantages=H.advantages + 3), ["advantages"]),
    "values of another size": (dict(values=H.returns + 100), ["values"]),
    "a reward model that knows nothing": (dict(chosen=H.rejected, rejected=H.chosen), ["reward model"]),
}  # fmt: skip


@pytest.mark.parametrize("changes, names", ILLNESSES.values(), ids=ILLNESSES)
def test_an_illness_is_found_by_its_check_and_stops_the_run_in_one_line(changes, names):
    evidence = H._replace(**changes)
    assert failed(evidence) == names
    with pytest.raises(InputError, match=f"stops this run before its first update: {names[0]}: found") as error:
        doctor.insist(doctor.examine(evidence))
    assert "\n" not in str(error.value) and ("failed, too" in str(error.value)) == (len(names) > 1)
    doctor.insist(doctor.examine(evidence), DoctorConfig(tolerated=tuple(names)))


def test_advantages_of_groups_are_centred_over_answers_however_long_they_are():
    lead = np.array([1.0, -1.0] * (B // 2)) - (H.mask.sum(axis=1) == 2)  # short ones are worse
    lead -= lead.mean()
    spread_BT = np.where(H.mask != 0, lead[:, None], np.nan)
    assert abs(np.nanmean(spread_BT)) > HEALTH.centre * np.nanstd(spread_BT)  # over tokens they are not
    assert failed(H._replace(advantages=spread_BT)) == []
    by_token = np.where(H.mask != 0, 1.0 + np.arange(T) % 2, np.nan)
    assert failed(H._replace(advantages=by_token)) == ["advantages"]


def test_what_was_not_centred_need_not_be_centred():
    assert failed(H._replace(advantages=H.advantages + 3, centred=False)) == []


def test_a_policy_has_a_tolerance_of_its_own():
    off = H._replace(rollout_log_probs=H.log_probs + 0.05)
    assert failed(off) == ["rollout"] and failed(off, DoctorConfig(log_probs=0.1)) == []
    with pytest.raises(InputError, match="doctor.tolerated has 'ratios'; expected some of stop ids"):
        DoctorConfig(tolerated=("ratios",))


def test_what_is_not_given_is_not_examined():
    found = doctor.examine(Evidence(H.tokens, H.mask, H.stop_ids, H.pad_id, H.vocab_size))
    assert [finding.name for finding in found] == ["stop ids", "padding", "ends"]


def test_findings_are_a_table_a_page_and_a_file(tmp_path):
    found = doctor.examine(H._replace(pad_id=STOP))
    lines = doctor.table(found).splitlines()
    assert len(lines) == len(found) and sum(line.startswith("FAILED") for line in lines) == 2
    rows = doctor.report(found)[1].rows
    assert [row[1] for row in rows if row[0] == "NO" and row[4]] == ["padding", "score"]
    assert doctor.read(tmp_path) == []
    doctor.keep(tmp_path, found)
    assert doctor.read(tmp_path) == found


def test_a_histogram_is_where_values_are():
    assert doctor.histogram(np.array([0.0] * 8 + [1.0] + [12.0] * 4)) == "0 █▂▁▁▁▁▁▁▁▁▁▅ 12"
