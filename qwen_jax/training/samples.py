"""Completions of fixed held-out prompts, sampled before, during and after training: samples/step_00000100.jsonl."""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from qwen_jax import rollout
from qwen_jax.batches import LMBatch
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data import prompts
from qwen_jax.errors import InputError
from qwen_jax.files import write_whole
from qwen_jax.ops import lora as arithmetic
from qwen_jax.sharding import Layout
from qwen_jax.tokenizer import Tokenizer, chat
from qwen_jax.training import hosts

FOLDER = "samples"


@dataclass(frozen=True)
class SamplesConfig:
    """What is sampled while a run trains, and how often."""

    prompts: int = 4  # held-out documents that are continued, the likeliest token each time; 0: none
    max_new_tokens: int = 64
    every: int = 0  # steps; 0: only at the start and the end

    def __post_init__(self):
        for name, least in (("prompts", 0), ("max_new_tokens", 1), ("every", 0)):
            if getattr(self, name) < least:
                raise InputError(f"samples.{name} is {getattr(self, name)}; expected at least {least}")


def sampler(
    model: QwenConfig,
    tok: Tokenizer,
    rows: Mapping[str, Sequence[LMBatch]],
    *,
    config: SamplesConfig,
    layout: Layout,
    lora: LoraConfig | None = None,
) -> Callable[..., list[dict]] | None:
    """Returns (params, *frozen) -> samples, or None where there is nothing to ask.

    It is compiled when it is first called. The weights stay split as they are trained: slower than decoding might be,
    and a model that can be trained can be sampled. Every process of a run calls it, and gets all samples.

    Args:
      model: the model.
      tok: its tokenizer.
      rows: domain -> held-out rows, whose first documents are the prompts.
      config: how many, and how long.
      layout: where the parameters are.
      lora: of the adapters that are `params`, beside the frozen base.

    Returns:
      Samples are {"domain", "prompt", "reference", "completion": texts, "tokens": of the completion, "finished":
      whether the model ended it}. Control tokens show as they are written.
    """
    room = model.max_position_embeddings - config.max_new_tokens
    asked = prompts.from_rows(rows, config.prompts, longest=room) if config.prompts else []
    if not asked:
        return None
    stops = chat.stop_ids(tok)

    def sample(params, *frozen) -> list[dict]:
        if frozen:
            scale = arithmetic.scale(lora.rank, lora.alpha, rslora=lora.rslora)
            params = arithmetic.join(*frozen, params, scale=scale, row_ids=lora.row_ids)
        answers = rollout.generate(
            model, params, [prompt.ids for prompt in asked], jax.random.key(0), temperature=0.0, stop_ids=stops,
            max_new_tokens=config.max_new_tokens, num_tokens=tok.vocab_size, layout=layout,
        )  # fmt: skip
        tokens, lengths = jax.device_get((answers.tokens, answers.lengths))
        return [_sample(tok, *of_one, stops) for of_one in zip(asked, tokens, lengths, strict=True)]

    return sample


def _sample(tok: Tokenizer, asked: prompts.Prompt, tokens: np.ndarray, length: int, stops: tuple[int, ...]) -> dict:
    answer = tokens[:length].tolist()
    return {
        "domain": asked.domain,
        "prompt": tok.decode(asked.ids),
        "reference": tok.decode(asked.answer),
        "completion": tok.decode(answer),
        "tokens": len(answer),
        "finished": answer[-1] in stops,
    }


def write(workdir: pathlib.Path, step: int, samples: list[dict]) -> None:
    """Keeps the samples of a step, on the first process."""
    if hosts.is_first():
        folder = workdir / FOLDER
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({"step": step, **sample}, ensure_ascii=False) for sample in samples]
        write_whole(folder / f"step_{step:08}.jsonl", "".join(f"{line}\n" for line in lines))


def read(workdir: pathlib.Path) -> dict[int, list[dict]]:
    """Returns what was kept: step -> samples, steps ascending."""
    found = {}
    for path in sorted((workdir / FOLDER).glob("step_*.jsonl")):
        if number := re.fullmatch(r"step_(\d+)", path.stem):
            found[int(number[1])] = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    return found
