"""Reward functions as users write them, good and bad; loaded into processes of their own by the tests."""

import os
import sys
import time

import numpy as np


def length(samples):
    return [len(sample.answer) for sample in samples]


def told(samples):
    """What the prompt's record says: a value, or what to do instead."""
    return np.array([_one(sample) for sample in samples])


def _one(sample):
    what = sample.reference["do"]
    if what == "raise":
        raise KeyError("no such\nthing")
    if what == "hang":
        time.sleep(1000)
    if what == "die":
        os._exit(7)
    return what


def one_for_all(samples):
    return [1.0]


def strings(samples):
    return ["1"] * len(samples)


def not_a_list(samples):
    return 1.0


def loaded(samples):
    return [name in sys.modules for name in ("jax", "flax")]


def process(samples):
    print("what a user prints is not part of the answer")
    return [os.getpid()] * len(samples)


not_callable = 3
