"""Where final answers stand, what penalties say, which problems there are: against cases, formulas and loops."""

import collections
import re
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax import rewards
from qwen_jax.errors import InputError
from qwen_jax.rewards import Sample, extraction, tasks, terms


@pytest.mark.parametrize(
    "form, answer, found",
    [
        ("number", "12 plus 7 is 19.", "19"),
        ("number", "It is -1,234.50, or so.", "-1234.50"),
        ("number", "12-7", "7"),
        ("number", "(3)-4", "4"),
        ("number", "\N{MINUS SIGN}5 degrees", "-5"),
        ("number", "1,2345", "2345"),
        ("number", "none", None),
        ("tag", "<think>4?</think> <answer>4</answer> no, <answer> 5 </answer>", "5"),
        ("tag", "<answer>1 <answer>2</answer>", "2"),
        ("tag", "<answer>2", None),
        ("tag", "<answer> </answer>", None),
        ("boxed", r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} and \boxed{2", "1"),
        ("boxed", "2", None),
        ("whole", " yes\n", "yes"),
        ("whole", " ", None),
    ],
)
def test_the_final_answer_is_the_last_one(form, answer, found):
    assert extraction.extract(answer, form) == found


@pytest.mark.parametrize(
    "form, good, bad",
    [
        ("number", "It is 4.", "4 is it"),
        ("tag", "so <answer>4</answer>", "<answer>4</answer> so"),
        ("tag", "<answer>4</answer>.", "<answer>4</answer><answer>4</answer>"),
        ("boxed", r"so $\boxed{4}$.", r"\boxed{4} it is"),
        ("boxed", r"\[\boxed{4}\]", r"\boxed{4} \boxed{4}"),
        ("whole", "4", " "),
    ],
)
def test_the_form_is_kept_by_one_answer_at_the_end(form, good, bad):
    reward = terms.well_formed(form)
    assert reward([Sample([], good), Sample([], bad)]) == [1.0, 0.0]


@given(st.text(alphabet=r"<answer>/\boxed{} 0123-.,$", max_size=40), st.sampled_from(list(extraction.ASKS)))
def test_no_text_breaks_extraction_and_nothing_is_well_formed_without_an_answer(text, form):
    found = extraction.extract(text, form)
    assert found is None or (found and found == found.strip())
    assert found is not None or not extraction.well_formed(text, form)
    assert form != "number" or found is None or extraction.number(found) is not None


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "It is {}.", "{:,}", "1 + 1 = {:,}"]))
def test_any_number_is_found_again(value, text):
    assert extraction.number(extraction.extract(text.format(value), "number")) == value


def test_numbers_are_exact_and_what_is_none_is_none():
    assert extraction.number("0.1") == Fraction(1, 10) and extraction.number("1e400") == 10**400
    assert extraction.number("1/0") is extraction.number("nan") is extraction.number("") is None


@given(st.integers(0, 40), st.integers(1, 20), st.integers(0, 20))
def test_the_punishment_of_length_is_the_papers(length, longest, margin):
    margin = min(margin, longest)
    if length <= longest - margin:
        expected = 0.0
    elif length <= longest:
        expected = (longest - margin - length) / margin
    else:
        expected = -1.0
    (found,) = terms.overlong(longest, margin)([Sample([], "", [7] * length)])
    assert found == pytest.approx(expected)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_repetition_counts_what_was_there_before(ids, size):
    grams = [tuple(ids[n : n + size]) for n in range(len(ids)) if n + size <= len(ids)]
    again = sum(gram in grams[:place] for place, gram in enumerate(grams))
    (found,) = terms.repetition(size)([Sample([], "", ids)])
    assert found == pytest.approx(-again / len(grams) if grams else 0.0)


def test_what_did_not_end_is_punished():
    assert terms.unfinished([Sample([], "", [1], finished) for finished in (True, False)]) == [0.0, -1.0]


def test_problems_are_the_same_each_time_differ_by_seed_and_are_in_one_split():
    by_split = {split: tasks.load("sums", split, 40, seed=1) for split in tasks.SPLITS}
    assert by_split["train"] == tasks.load("sums", "train", 60, seed=1)[:40]
    others = [problem.question for problem in tasks.load("sums", "train", 40, seed=2)]
    assert others != [problem.question for problem in by_split["train"]]
    questions = collections.Counter(problem.question for some in by_split.values() for problem in some)
    questions.update(set(others) - {problem.question for problem in by_split["train"]})
    assert max(questions.values()) == 1


def test_solutions_are_right_and_the_right_number_is_worth_1():
    for problem in tasks.load("sums most=50 terms=3", "test", 20):
        text = problem.question.removeprefix("What is ").removesuffix("?")
        assert re.fullmatch(r"\d+( (plus|minus) \d+){2}", text)
        total = eval(text.replace("plus", "+").replace("minus", "-"))
        assert problem.solution == f"{text} is {total}."
        asked = lambda answer, reference=problem.reference: Sample([], answer, reference=reference)
        found = tasks.score_sums([asked(str(total)), asked(f"{total}.0"), asked(str(total + 1)), asked("many")])
        assert found == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "task, split, line",
    [
        ("products", "train", "the task 'products' is unknown"),
        ("sums", "all", "no split 'all'; expected one of train, validation, test"),
        ("sums least=3", "train", "is not sums most=M terms=T"),
        ("sums most", "train", "has 'most' behind its name; expected OPTION=VALUE"),
        ("sums most=1", "test", "different problems in its test split; expected 30 or more"),
    ],
)
def test_problems_that_there_are_not_are_one_line(task, split, line):
    with pytest.raises(InputError, match=line):
        tasks.load(task, split, 30)


def test_a_task_whose_package_is_missing_is_one_line_before_anything_is_sampled(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "qwen_jax.rewards.gym", raising=False)
    monkeypatch.delattr(rewards, "gym", raising=False)
    for asked in (lambda: tasks.load("gym/gcd", "train", 1), lambda: tasks.scorer("gym/gcd")):
        with pytest.raises(InputError, match="'gym/gcd' needs reasoning-gym: pip install"):
            asked()
