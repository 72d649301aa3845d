import pytest

from qwen_jax import tokenizer
from tests.tokenizer.samples import CORPUS


@pytest.fixture(scope="session")
def tiny():
    """A vocabulary of a few hundred tokens, learned from the samples, with ChatML's control tokens."""
    return tokenizer.train(CORPUS, 600)


@pytest.fixture(scope="session")
def tiny3(tiny):
    """The same vocabulary with all control tokens of Qwen3."""
    names = tokenizer.controls.table("qwen3")
    return tokenizer.ByteBPE(tiny.vocabulary, {name: tiny.regular_size + i for i, name in enumerate(names)})
