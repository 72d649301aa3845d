"""Users' functions: whatever one does, its samples fail and the others have their values."""

import math
import os
import pathlib
import subprocess
import sys
import time

import pytest

from qwen_jax.errors import InputError
from qwen_jax.rewards import Sample
from qwen_jax.rewards.calling import Trouble, call
from qwen_jax.rewards.outside import Outside
from tests.rewards import functions

HERE = "tests.rewards.functions"


def sample(do="", answer=""):
    return Sample([{"role": "user", "content": "?"}], answer, reference={"do": do})


@pytest.fixture(scope="module")
def told():
    outside = Outside(f"{HERE}:told", timeout=1.0, alone=1.0)
    yield outside
    outside.close()


def kinds(found):
    return [one.kind if isinstance(one, Trouble) else one for one in found]


@pytest.mark.parametrize("bad, kind", [("raise", "raised"), ("hang", "timeout"), ("die", "died")])
def test_only_the_sample_that_does_it_fails_and_the_next_batch_is_answered(told, bad, kind):
    begin = time.monotonic()
    assert kinds(told([sample(1.5), sample(2.5), sample(bad)])) == [1.5, 2.5, kind]
    assert time.monotonic() - begin < 60  # not the 1000 seconds that it sleeps
    assert told([sample(3.0)]) == [3.0]


def test_all_that_hang_cost_two_batches_of_time_not_one_each():
    outside = Outside(f"{HERE}:told", timeout=0.4, alone=0.2)
    found = outside([sample("hang")] * 40)
    assert kinds(found) == ["timeout"] * 40
    assert sum("took over 0.2 s" in one.text for one in found) <= 2 and "not reached" in found[-1].text
    assert outside([]) == [] and outside([sample(1.0)]) == [1.0]
    outside.close()


def test_what_raises_is_told_in_one_line_with_its_type(told):
    (found,) = told([sample("raise")])
    assert found == Trouble("raised", r"KeyError: 'no such\nthing'")


def test_values_that_are_no_finite_numbers_fail_alone(told):
    found = told([sample(1.0), sample(math.nan), sample(-math.inf)])
    assert kinds(found) == [1.0, "finite", "finite"] and found[1].text == "returned nan"


def test_a_process_is_kept_between_batches_and_is_not_this_one_and_prints_elsewhere():
    outside = Outside(f"{HERE}:process", timeout=30.0)
    first, second = outside([sample()] * 2), outside([sample()])
    assert first[0] == first[1] == second[0] != os.getpid()
    outside.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first[0]), 0)


def test_the_process_has_loaded_no_jax_and_would_not_take_the_accelerator():
    outside = Outside(f"{HERE}:loaded", timeout=30.0)
    assert outside([sample()] * 2) == [0.0, 0.0]
    outside.close()


@pytest.mark.parametrize(
    "path, line",
    [
        ("length", "not named as package.module:function"),
        (f"{HERE}:absent", "has no function 'absent'"),
        (f"{HERE}:not_callable", "has no function 'not_callable'"),
        ("tests.rewards.absent:length", "ModuleNotFoundError: No module named 'tests.rewards.absent'"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_line_before_the_run(path, line):
    with pytest.raises(InputError, match=line) as error:
        Outside(path, timeout=1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, kind", [("one_for_all", "length"), ("strings", "number"), ("not_a_list", "raised")])
def test_a_function_that_returns_something_else_is_told_what(name, kind):
    found = call(getattr(functions, name), [sample(), sample()])
    assert kinds(found if isinstance(found, list) else [found])[0] == kind


def test_the_process_ends_with_the_run_even_if_it_is_killed(tmp_path):
    """Started by a program that is killed while the function hangs: nobody is left to end it."""
    code = f"""
import os, threading
from qwen_jax.rewards import Sample
from qwen_jax.rewards.outside import Outside
outside = Outside("{HERE}:told", timeout=100.0)
print(outside._process.pid, flush=True)
threading.Timer(0.5, lambda: os.kill(os.getpid(), 9)).start()
outside([Sample([], "", reference=dict(do="hang"))])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -9
    child = int(run.stdout)
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        stat = pathlib.Path(f"/proc/{child}/stat")
        if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return  # ended; whoever took it over has not asked yet
        time.sleep(0.1)
    pytest.fail("the function's process is still there")
