"""The requests of lm-evaluation-harness, answered by our models.

A request is anything with `.args`: (context, continuation), (text,), or (context, options). What they say is data: no
text becomes a control token. Where the harness asks for a chat template, the control tokens of the rendered prompt
travel through its strings as marks that no data can hold.
"""

import functools
import itertools
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax

from qwen_jax import rollout
from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.eval import scoring
from qwen_jax.sharding import Layout
from qwen_jax.tokenizer import Tokenizer, chat

ONE_DEVICE = Layout()
END_OF_TEXT = "<|endoftext|>"
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")
OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", *SAMPLING)


class Request(Protocol):
    """An `lm_eval.api.instance.Instance`, or its like."""

    @property
    def args(self) -> tuple: ...


class HarnessModel:
    """What `lm_eval.api.model.LM` asks of a model, without the harness.

    Args:
      config, params, tok: the model.
      layout: mesh and rules of params.
      batch_size: requests answered at once.
      generation: whose chat template.
      max_new_tokens: of an answer whose request does not say.
      seed: of answers that are drawn.
    """

    def __init__(
        self,
        config: QwenConfig,
        params: dict,
        tok: Tokenizer,
        *,
        layout: Layout = ONE_DEVICE,
        batch_size: int = 8,
        generation: str = "qwen2",
        max_new_tokens: int = 256,
        seed: int = 0,
    ):
        if END_OF_TEXT not in tok.special_tokens:
            raise InputError(f"the tokenizer has no {END_OF_TEXT}, which stands before a text without a context")
        self._config, self._params, self._tok, self._layout = config, params, tok, layout
        self._batch_size, self._generation, self._seed = batch_size, generation, seed
        self._max_new_tokens = max_new_tokens
        self._prefix = tok.special_tokens[END_OF_TEXT]
        nonce = secrets.token_hex(8)
        self._mark = lambda name: f"⟦{nonce} {name}⟧"
        self._marks = re.compile("|".join(re.escape(self._mark(name)) for name in tok.special_tokens))

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Returns (log-probability, whether it is what greedy decoding gives) of each continuation.

        A context longer than the model reads loses its beginning.

        Raises:
          InputError: a continuation of more tokens than the model reads, or of none.
        """
        return [tuple(found) for found in self._scores([self._pair(*request.args) for request in requests])]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Returns the log-probability of each text, after `<|endoftext|>`; see `scoring.windows`."""
        limit = self._config.max_position_embeddings
        pairs = [scoring.windows(self._encode(request.args[0]), self._prefix, limit) for request in requests]
        scores = iter(self._scores(list(itertools.chain.from_iterable(pairs))))
        return [sum(found.log_prob for found in itertools.islice(scores, len(of_one))) for of_one in pairs]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Returns an answer to each context, up to the first of options["until"] or the model's own end.

        Options: until, max_gen_toks, do_sample, temperature, top_p, top_k, min_p, repetition_penalty. Without do_sample
        the likeliest token is taken each time. A context that leaves no room loses its beginning.

        Raises:
          InputError: an option that is not known.
        """
        found: list[str] = [""] * len(requests)
        spelt = [json.dumps(request.args[1], sort_keys=True) for request in requests]
        for options in sorted(set(spelt)):
            mine = [place for place, mark in enumerate(spelt) if mark == options]
            contexts = [self._encode(requests[place].args[0]) or [self._prefix] for place in mine]
            for place, text in zip(mine, self._generate(contexts, json.loads(options)), strict=True):
                found[place] = text
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as a text that only this model reads: its control tokens are marks.

        Without add_generation_prompt the last message is left open.
        """
        ids, _ = chat.render(
            chat_history, self._tok, generation=self._generation, add_generation_prompt=add_generation_prompt
        )
        if not add_generation_prompt:
            ids = ids[: len(ids) - 1 - ids[::-1].index(self._tok.special_tokens["<|im_end|>"])]
        names = {index: name for name, index in self._tok.special_tokens.items()}
        parts = []
        for name, run in itertools.groupby(ids, key=names.get):
            run = list(run)
            parts.append(self._tok.decode(run) if name is None else self._mark(name) * len(run))
        return "".join(parts)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template, for the harness's records."""
        return chat.jinja(self._generation) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its caches by."""
        return f"qwen_jax-{self._generation}-{self._tok.vocab_size}"

    def _encode(self, text: str) -> list[int]:
        """Returns the ids of a text, in which only our own marks are control tokens."""
        ids, start = [], 0
        for mark in self._marks.finditer(text):
            ids += self._tok.encode(text[start : mark.start()])
            ids.append(self._tok.special_tokens[mark.group()[1:-1].split(" ", 1)[1]])
            start = mark.end()
        return [*ids, *self._tok.encode(text[start:])]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the ids of both, cut in those of the whole, as the harness cuts them."""
        if not context:
            before, after = [self._prefix], self._encode(continuation)
        else:
            spaces = len(context) - len(context.rstrip())  # they belong to the token behind them
            bare, rest = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
            before = self._encode(bare)
            after = self._encode(bare + rest)[len(before) :]
            before = before or [self._prefix]
        limit = self._config.max_position_embeddings
        if not 0 < len(after) <= limit:
            raise InputError(
                f"the continuation {continuation[:40]!r} has {len(after)} tokens of its own; expected 1 to {limit}"
            )
        return before[-(limit + 1 - len(after)) :], after

    def _scores(self, pairs) -> list[scoring.Scored]:
        return scoring.score(self._config, self._params, pairs, batch_size=self._batch_size, layout=self._layout)

    @functools.cached_property
    def _prepared(self) -> rollout.Prepared:
        return rollout.prepare(self._config, self._params, layout=self._layout)

    def _generate(self, contexts: list[list[int]], options: dict[str, Any]) -> Iterable[str]:
        if unknown := options.keys() - set(OPTIONS):
            raise InputError(f"the option {sorted(unknown)[0]!r} of an answer is not known; expected {OPTIONS}")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        room = int(options.get("max_gen_toks", self._max_new_tokens))
        limit = self._config.max_position_embeddings
        if not 0 < room < limit:
            raise InputError(f"max_gen_toks is {room}; the model reads {limit} tokens, expected from 1 to {limit - 1}")
        sampling = {"temperature": 0.0}
        if options.get("do_sample") and options.get("temperature", 1.0):
            sampling = {"temperature": options.get("temperature", 1.0)}
            sampling |= {name: options[name] for name in SAMPLING if name in options}
        stops = sorted({*chat.stop_ids(self._tok), *itertools.chain.from_iterable(map(self._ending, until))})
        order = sorted(range(len(contexts)), key=lambda place: len(contexts[place]))
        texts = [""] * len(contexts)
        for start in range(0, len(order), self._batch_size):
            mine = order[start : start + self._batch_size]
            answers = rollout.generate(
                self._config, self._prepared, [contexts[place][-(limit - room) :] for place in mine],
                jax.random.key(self._seed), first_row=start, max_new_tokens=room, stop_ids=stops,
                num_tokens=self._tok.vocab_size, **sampling,
            )  # fmt: skip
            tokens, lengths = jax.device_get((answers.tokens, answers.lengths))
            for place, ids, length in zip(mine, tokens, lengths, strict=True):
                text = self._tok.decode(ids[:length].tolist(), skip_special=True)
                texts[place] = functools.reduce(lambda text, stop: text.split(stop, 1)[0], filter(None, until), text)
        return texts

    def _ending(self, stop: str) -> tuple[int, ...]:
        """Returns the tokens after which an answer is sure to hold `stop`: it need not go on."""
        spelt = [index for index, piece in enumerate(self._pieces) if stop and stop.encode() in piece]
        control = self._tok.special_tokens.get(stop)
        return (*spelt, *(() if control is None else (control,)))

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each token; none of a control token."""
        return [self._tok.decode_bytes([index], skip_special=True) for index in range(self._tok.vocab_size)]
