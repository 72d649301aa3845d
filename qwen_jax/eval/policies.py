"""What a policy has become: its own answers, their distance from the reference's, and what a reward model says of them.

Shapes: N answers, T tokens of the longest prompt and answer.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import models, rollout, tokenizer
from qwen_jax.config import LoraConfig, QwenConfig
from qwen_jax.data.preferences import Answers, PreferenceRows
from qwen_jax.errors import InputError
from qwen_jax.eval import own_answers
from qwen_jax.sharding import Layout
from qwen_jax.tokenizer import Tokenizer, chat
from qwen_jax.training import hosts, metrics, pretrained, samples
from qwen_jax.training.page import Block, Picture, Table, Text


@dataclass(frozen=True)
class JudgeConfig:
    """What looks at the policy's own answers while it trains."""

    reward: str = ""  # workdir or Hugging Face folder of a reward model with the same tokenizer; empty: nobody looks
    prompts: int = 4  # different held-out prompts
    each: int = 16  # answers to each
    max_new_tokens: int = 48
    every: int = 0  # steps; 0: only at the start and the end


@dataclass(frozen=True)
class Judge:
    """A reference model and what rates answers, that look at answers to some prompts.

    Attributes:
      tok: the tokenizer of all three models.
      model, reference: config of policy and reference, and the reference's parameters; None looks at no distance.
      scorer, reward: config and parameters of the reward model; None where `rate` tells alone.
      prompts: ids each, as they are rendered for an answer.
      domains: one name for each prompt.
      layout: where all parameters are.
      rate: (prompts, answers), ids each -> a reward each, [N], added to the reward model's; None adds nothing.
    """

    tok: Tokenizer
    model: QwenConfig
    reference: dict | None
    scorer: QwenConfig | None
    reward: dict | None
    prompts: Sequence[Sequence[int]]
    domains: Sequence[str]
    layout: Layout
    rate: Callable[[list[list[int]], list[list[int]]], np.ndarray] | None = None

    def __post_init__(self):
        if self.scorer is None and self.rate is None:
            raise InputError("nothing rates the answers; expected a reward model or reward functions")
        if self.scorer is not None and self.scorer.head != "score":
            raise InputError(
                'the reward model has no score head (config.head is "vocabulary"); expected a reward model'
            )

    def samples(self, params: dict, key: jax.Array, *, each: int, max_new_tokens: int) -> list[dict]:
        """Returns `each` answers of the policy to every prompt, at temperature 1.

        Each is {"domain", "prompt", "completion", "tokens", "finished"} as of `training.samples`; "kl", the answer's
        log(p / p of the reference) in nats, whose mean is the policy's distance KL(policy | reference), 0 without one;
        "log_prob", its own; "reward"; "ids"; and "answer", what the completion says without control tokens. What did
        not end is scored by the reward model as if it ended there.
        """
        asked = [list(prompt) for prompt in self.prompts for _ in range(each)]
        stops = chat.stop_ids(self.tok)
        found = rollout.generate(
            self.model, params, asked, key, max_new_tokens=max_new_tokens, stop_ids=stops,
            num_tokens=self.tok.vocab_size, layout=self.layout,
        )  # fmt: skip
        tokens, lengths, log_probs = jax.device_get((found.tokens, found.lengths, found.log_probs))
        answers = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        sums = np.array([row[:length].sum() for row, length in zip(log_probs, lengths, strict=True)])
        kl = np.zeros_like(sums) if self.reference is None else sums - self._log_probs(asked, answers)
        reward = np.zeros_like(sums) if self.rate is None else np.asarray(self.rate(asked, answers), np.float32)
        if self.scorer is not None:
            reward = reward + self._scores(asked, answers, self.tok.special_tokens["<|im_end|>"], stops)
        return [
            {
                "domain": self.domains[place // each],
                "prompt": self.tok.decode(asked[place]),
                "reference": "",
                "completion": self.tok.decode(answer),
                "tokens": len(answer),
                "finished": answer[-1] in stops,
                "kl": float(kl[place]),
                "log_prob": float(sums[place]),
                "reward": float(reward[place]),
                "ids": answer,
                "answer": self.tok.decode(answer, skip_special=True),
            }
            for place, answer in enumerate(answers)
        ]

    def _log_probs(self, asked: list[list[int]], answers: list[list[int]]) -> np.ndarray:
        """Returns [N], log p of each answer under the reference."""
        tokens_NT, segments_NT = self._padded([q + a for q, a in zip(asked, answers, strict=True)])
        found_NT = models.log_probs(
            self.model, self.reference, tokens_NT, jnp.roll(tokens_NT, -1, axis=1), segment_ids=segments_NT,
            layout=self.layout,
        )  # fmt: skip
        found_NT = np.asarray(jax.device_get(found_NT))
        return np.array([
            row[len(q) - 1 : len(q) - 1 + len(a)].sum() for row, q, a in zip(found_NT, asked, answers, strict=False)
        ])  # fmt: skip

    def _scores(self, asked, answers, end: int, stops) -> np.ndarray:
        ended = [q + (a if a[-1] in stops else [*a, end]) for q, a in zip(asked, answers, strict=True)]
        tokens_NT, segments_NT = self._padded(ended)
        found_NT = models.scores(self.scorer, self.reward, tokens_NT, segment_ids=segments_NT, layout=self.layout)
        found_NT = np.asarray(jax.device_get(found_NT))
        return np.array([row[len(ids) - 1] for row, ids in zip(found_NT, ended, strict=False)])

    def _padded(self, lists: list[list[int]]) -> tuple[jax.Array, jax.Array]:
        """Rows of one length, a multiple of 64 and of what the mesh splits, so that few programs are compiled."""
        step, rows = 64 * self.layout.size("length"), self.layout.size("batch")
        size = -(-max(map(len, lists)) // step) * step
        tokens = np.zeros((-(-len(lists) // rows) * rows, size), np.int32)
        segments = np.zeros_like(tokens)
        for place, ids in enumerate(lists):
            tokens[place, : len(ids)], segments[place, : len(ids)] = ids, 1
        return jnp.asarray(tokens), jnp.asarray(segments)

    def scores(self, answers: Answers, *, at_once: int = 64) -> np.ndarray:
        """Returns what the reward model says of answers that people rated, [n] float32, for `preferences.scored`.

        Args:
          answers: each with its prompt; those to one prompt need not be read together.
          at_once: how many are read in one pass.
        """
        rows = [document.ids.tolist() for document in answers.documents]
        end, stops, none = self.tok.special_tokens["<|im_end|>"], chat.stop_ids(self.tok), [[]] * at_once
        parts = (rows[start : start + at_once] for start in range(0, len(rows), at_once))
        return np.concatenate([self._scores(none[: len(some)], some, end, stops) for some in parts])


def distinct_prompts(answers: Answers, most: int) -> tuple[list[list[int]], list[str]]:
    """Returns the first different prompts of answers, as ids up to where the answer begins, and their domains."""
    found: dict[tuple[int, ...], str] = {}
    for place in np.flatnonzero(np.diff(answers.groups, prepend=-1)):
        ids, mask = answers.documents[int(place)]
        found.setdefault(tuple(ids[: int(np.argmax(mask))].tolist()), answers.domains[int(answers.groups[place])])
        if len(found) == most:
            break
    return [list(ids) for ids in found], list(found.values())


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give every id the same meaning."""
    if one.vocab_size != other.vocab_size or one.special_tokens != other.special_tokens:
        return False
    special = set(one.special_tokens.values())
    return all(one.token_bytes(id) == other.token_bytes(id) for id in range(one.vocab_size) if id not in special)


def make_judge(
    config: JudgeConfig,
    model: QwenConfig,
    held_out: Mapping[str, PreferenceRows],
    tok: Tokenizer,
    layout: Layout,
    reference: dict | None,
) -> Judge:
    """Returns the judge of a policy's answers to the first held-out prompts of each domain; raises as `load_reward`."""
    prompts, domains = [], []
    for name, rows in held_out.items():
        found = distinct_prompts(rows.answers, -(-config.prompts // len(held_out)))
        prompts, domains = prompts + found[0], domains + [name] * len(found[0])
    scorer, reward = load_reward(config.reward, model, layout, tok)
    return Judge(tok, model, reference, scorer, reward, prompts, domains, layout)


def sampler(judge: Judge, config: JudgeConfig, lora: LoraConfig, *, seed: int) -> Callable[..., list[dict]]:
    """Returns (params, *frozen) -> what the judge says of the policy's answers, for `training.loop.fit`."""

    def sample(params, *frozen) -> list[dict]:
        params = models.lora.merge(*frozen, params, lora) if frozen else params
        return judge.samples(params, jax.random.key(seed), each=config.each, max_new_tokens=config.max_new_tokens)

    return sample


def base_params(config, layout: Layout) -> dict:
    """Returns the parameters of the base: what the policy begins as, and its reference."""
    if config.base == "random":
        return models.init(config.model, jax.random.key(config.seed), mesh=layout.mesh)
    return pretrained.load_params(config.base, models.placed(config.model, layout))


def load_reward(path: str, policy: QwenConfig, layout: Layout, tok: Tokenizer) -> tuple[QwenConfig, dict]:
    """Returns config and parameters of a reward model, computed in the policy's types; "random" is one nobody trained.

    Raises:
      InputError: where none was given, it has no score head, or other tokens than the policy.
    """
    if path == "random":
        scorer = policy.replace(head="score")
        return scorer, models.init(scorer, jax.random.key(1), mesh=layout.mesh)
    if not path:
        raise InputError("no reward model was given; expected the workdir or the Hugging Face folder of one")
    scorer = pretrained.read_config(path).replace(dtype=policy.dtype, param_dtype=policy.param_dtype)
    if scorer.head != "score":
        raise InputError(f"{path} has no score head: expected a reward model")
    if not same_tokens(tok, tokenizer.load(pretrained.tokenizer_path(path))):
        raise InputError(f"{path} has another tokenizer than the policy; expected a reward model of the same base")
    return scorer, pretrained.load_params(path, models.placed(scorer, layout))


def frontier(kept: dict[int, list[dict]]) -> list[tuple[int, float, float, float]]:
    """Returns (step, mean KL, mean reward, standard error of the reward) of samples by step."""
    rows = []
    for step, some in kept.items():
        kl, reward = (np.array([sample[name] for sample in some]) for name in ("kl", "reward"))
        rows.append((step, float(kl.mean()), float(reward.mean()), float(reward.std() / np.sqrt(len(reward)))))
    return rows


def write(folder: pathlib.Path) -> list[Block]:
    """Writes plots/dpo.png into a run's folder; returns what its report shows besides the curves of the loss."""
    scores = [row for row in metrics.read(folder) if "validation/accuracy" in row]
    kept = {step: some for step, some in samples.read(folder).items() if "kl" in some[0]}
    rows = frontier(kept)
    hosts.once(lambda: plot(folder / "plots" / "dpo.png", rows, scores))
    names = ("accuracy", "reward_margin", "reward_chosen", "reward_rejected")
    table = [[str(row["step"]), *(f"{row[f'validation/{name}']:.3f}" for name in names)] for row in scores]
    blocks = [
        Text("Held-out pairs", 2),
        Text(
            "Accuracy is the share of held-out pairs whose preferred answer has the higher implicit reward, "
            "beta log(policy / reference): the win rate judged by people's own labels. At step 0 the two are one, and "
            "no pair is ranked: knowing nothing is 0.5."
        ),
        Table(["step", "accuracy", "margin", "reward of the preferred", "of the other"], table),
    ]
    blocks.append(Picture("plots/dpo.png", "held-out pairs, and reward against KL"))
    return [*blocks, *own_answers.blocks(kept)]


def by_n(rewards: list[list[float]]) -> list[dict]:
    """Returns of n = 1, 2, 4, ... the mean reward of the best of n, its standard error, and the bound of its KL.

    The mean over all ways to choose n of a prompt's N samples: with rewards in order, the k-th smallest is the best of
    comb(k - 1, n - 1) of comb(N, n). The bound log n - (n - 1) / n is in nats an answer (arXiv:2401.01879, theorem 1).

    Args:
      rewards: of each prompt's samples, as many for each.
    """
    ordered = np.sort(np.array(rewards, np.float64), axis=1)
    count, found, n = ordered.shape[1], [], 1
    while n <= count:
        weights = [math.comb(k, n - 1) / math.comb(count, n) for k in range(count)]
        best = ordered @ np.array(weights)
        error = float(best.std() / np.sqrt(len(best)))
        found.append({"n": n, "reward": float(best.mean()), "error": error, "kl_bound": math.log(n) - (n - 1) / n})
        n *= 2
    return found


def plot_by_n(path: pathlib.Path, figures: list[dict]) -> None:
    """Draws the reward of the best of n against the bound of its KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    bound, reward, error = ([row[name] for row in figures] for name in ("kl_bound", "reward", "error"))
    axis.errorbar(bound, reward, yerr=error, marker="o", capsize=3)
    for row in figures:
        axis.annotate(str(row["n"]), (row["kl_bound"], row["reward"]))
    axis.set(xlabel="log n - (n - 1) / n, nats", ylabel="reward of the best of n")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot(path: pathlib.Path, rows: list[tuple[int, float, float, float]], scores: list[dict]) -> None:
    """Draws reward against KL, and the held-out accuracy and reward margin of each evaluation.

    Args:
      path: the PNG to write.
      rows: of `frontier`; none leaves the first picture out.
      scores: lines of metrics.jsonl that have "validation/accuracy".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (a, b) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    if rows:
        steps, kl, reward, error = zip(*rows, strict=True)
        a.errorbar(kl, reward, yerr=error, marker="o", capsize=3)
        for step, x, y in zip(steps, kl, reward, strict=True):
            a.annotate(str(step), (x, y))
    a.set(xlabel="KL(policy | reference), nats an answer", ylabel="reward model's score", title="by step")
    steps = [row["step"] for row in scores]
    b.plot(steps, [row["validation/accuracy"] for row in scores], marker="o", label="accuracy")
    b.set(xlabel="step", ylabel="share of held-out pairs", title="held-out pairs")
    margin = b.twinx()
    margin.plot(steps, [row["validation/reward_margin"] for row in scores], ls="--", color="C1", label="reward margin")
    margin.set(ylabel="implicit reward margin")
    b.legend(loc="upper left")
    margin.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
