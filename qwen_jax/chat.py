"""Talk to a model: python -m qwen_jax.chat --checkpoint DIR

DIR is a Hugging Face folder or the workdir of a run of ours. Without more it is a conversation in the terminal: Ctrl-C
stops an answer, Ctrl-D or /exit leaves, /new starts over. --prompt TEXT answers once. --input FILE answers a file of
JSON lines, {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}, in batches, and writes each line
with "completion", "num_tokens" and "finished" (whether the model ended by itself) to --output. "-" is the standard
input or output.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

import jax
import numpy as np

from qwen_jax import models, rollout, sharding, tokenizer
from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are those Qwen publishes for answers without thinking."""

    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.8
    top_k: int = 20  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0


@dataclass(frozen=True)
class Chat:
    """The flags."""

    checkpoint: str  # a Hugging Face folder, or the workdir of a run
    adapter: str = ""  # folder of a peft LoRA adapter to add to it
    prompt: str | None = None  # answer this once and leave
    input: str | None = None  # a file of JSON lines to answer; "-" for the standard input
    output: str = "-"  # where the answers to --input go
    system: str | None = None  # the system message; None leaves it to the template
    generation: str = "auto"  # whose chat template: qwen, qwen1.5, qwen2, qwen2.5, qwen3; auto goes by the tokenizer
    thinking: bool = True  # Qwen3 only: think before answering
    max_new_tokens: int = 512
    sampling: Sampling = Sampling()
    seed: int = 0
    batch_size: int = 8  # prompts of --input answered at once; does not change the answers
    dtype: str = "auto"  # float32 or bfloat16; auto: float32 on a CPU, where bfloat16 is slower
    tensor: int = 1  # devices to split the model over


@dataclass(frozen=True)
class Model:
    """A loaded model with all it takes to answer messages."""

    config: QwenConfig
    weights: rollout.Prepared
    tok: tokenizer.Tokenizer
    flags: Chat

    @property
    def generation(self) -> str:
        """Whose template: the flag, or the generation whose control tokens the tokenizer has."""
        return generation_of(self.tok) if self.flags.generation == "auto" else self.flags.generation

    def ids(self, messages: list[dict]) -> list[int]:
        """Returns the prompt of a conversation, the --system message in front unless it has one."""
        if self.flags.system is not None and messages[:1] and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.flags.system}, *messages]
        return tokenizer.chat.render(
            messages, self.tok, generation=self.generation, add_generation_prompt=True,
            enable_thinking=self.flags.thinking or self.generation != "qwen3",
        )[0]  # fmt: skip

    def options(self) -> dict:
        """Returns the keywords of `rollout.generate` and `rollout.stream`."""
        return dict(
            dataclasses.asdict(self.flags.sampling),
            max_new_tokens=self.flags.max_new_tokens,
            stop_ids=tokenizer.chat.stop_ids(self.tok),
            num_tokens=self.tok.vocab_size,
        )

    def answer(self, messages: list[dict], key: jax.Array) -> Iterator[str]:
        """Yields the answer in pieces of whole characters, as they are certain; it ends where the model's reach does.

        Raises:
          InputError: a conversation that leaves no room for an answer.
        """
        prompt, text, options = self.ids(messages), self.tok.stream(skip_special=True), self.options()
        limit = self.config.max_position_embeddings
        if len(prompt) >= limit:
            raise InputError(f"the conversation has {len(prompt)} tokens; the model reads at most {limit}")
        options["max_new_tokens"] = min(options["max_new_tokens"], limit - len(prompt))
        for token in rollout.stream(self.config, self.weights, prompt, key, **options):
            if piece := text.push(token):
                yield piece
        if rest := text.finish():
            yield rest

    def complete(self, prompts: list[list[int]], key: jax.Array, first_row: int) -> Iterator[dict]:
        """Answers a batch of prompts, the first of which is row `first_row`; yields what each output line adds."""
        options = self.options()
        out = rollout.generate(self.config, self.weights, prompts, key, first_row=first_row, **options)
        for tokens, length in zip(np.asarray(out.tokens), np.asarray(out.lengths).tolist(), strict=True):
            yield {
                "completion": self.tok.decode(tokens[:length], skip_special=True),
                "num_tokens": length,
                "finished": int(tokens[length - 1]) in options["stop_ids"],
            }


def generation_of(tok: tokenizer.Tokenizer) -> str:
    """Returns the generation whose control tokens the tokenizer has."""
    marks = (("<|extra_0|>", "qwen"), ("<think>", "qwen3"), ("<tool_call>", "qwen2.5"))
    return next((name for mark, name in marks if mark in tok.special_tokens), "qwen2")


def load(flags: Chat) -> Model:
    """Reads config, weights and tokenizer, and lays the weights out for decoding.

    Raises:
      InputError: a folder that is no model, a tokenizer with more tokens than the model, a flag out of range.
    """
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("tensor", 1)):
        if getattr(flags, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; expected at least {least}")
    layout = Layout()
    if flags.tensor > 1:
        mesh_config = sharding.MeshConfig(fsdp=1, tensor=flags.tensor)
        layout = Layout(sharding.make_mesh(mesh_config, jax.devices()[: flags.tensor]))
    config, params, tok = load_model(flags.checkpoint, adapter=flags.adapter, dtype=flags.dtype, layout=layout)
    return Model(config, rollout.prepare(config, params, layout=layout), tok, flags)


def load_model(
    checkpoint: str, *, adapter: str = "", dtype: str = "auto", layout: Layout
) -> tuple[QwenConfig, dict, tokenizer.Tokenizer]:
    """Returns config, parameters on their devices, and tokenizer of a model to use.

    Args:
      checkpoint: a Hugging Face folder, or the workdir of a run.
      adapter: folder of a peft LoRA adapter to add to it.
      dtype: of the computation, and of the weights where a run did not keep its own; "auto": float32 on a CPU, where
        bfloat16 is slower.
      layout: mesh and rules.

    Raises:
      InputError: a folder that is no model, or a tokenizer with more tokens than the model.
    """
    from qwen_jax import hf
    from qwen_jax.training import pretrained  # orbax is slow to import, and --help needs none of it

    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    tok = tokenizer.load(pretrained.tokenizer_path(checkpoint))
    config = pretrained.read_config(checkpoint).replace(dtype=dtype)
    if not pretrained.is_run(checkpoint):
        config = config.replace(param_dtype=dtype)
    if tok.vocab_size > config.vocab_size:
        raise InputError(f"{checkpoint}: the tokenizer has {tok.vocab_size} tokens, the model {config.vocab_size} rows")
    shapes = models.abstract(config)
    if layout.mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: one, shapes)
    else:
        places = sharding.tree_shardings(models.axes(config), shapes, layout)
    put = lambda struct, place: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=place)
    params = pretrained.load_params(checkpoint, jax.tree.map(put, shapes, places))
    if adapter:
        params = jax.jit(hf.load_adapter(adapter, config).merge, out_shardings=places, donate_argnums=0)(params)
    return config, params, tok


def converse(model: Model, ask: Callable[[str], str] = input, out: TextIO | None = None) -> None:
    """Talks until the user leaves. `ask` reads a line, raising EOFError at the end; `out` is where answers appear."""
    out, messages, turn = out or sys.stdout, [], 0
    print("Ctrl-C stops an answer, Ctrl-D or /exit leaves, /new starts over.", file=out)
    while True:
        try:
            line = ask("> ").strip()
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)", file=out)
            continue
        if line == "/exit":
            return
        if line == "/new":
            messages = []
        elif line:
            turn += 1
            messages = _turn(model, [*messages, {"role": "user", "content": line}], turn, out)


def _turn(model: Model, messages: list[dict], turn: int, out: TextIO) -> list[dict]:
    """Answers the last message. Returns the conversation with the answer, or without the message if it cannot be."""
    pieces = []
    try:
        for piece in model.answer(messages, jax.random.fold_in(jax.random.key(model.flags.seed), turn)):
            pieces.append(piece)
            print(piece, end="", file=out, flush=True)
    except InputError as error:
        print(f"error: {error} (/new starts over)", file=out)
        return messages[:-1]
    except KeyboardInterrupt:
        print(" (stopped)", end="", file=out)
    print(file=out)
    return [*messages, {"role": "assistant", "content": "".join(pieces)}]


def answer_lines(model: Model, lines: TextIO, out: TextIO) -> None:
    """Answers JSON lines in batches; an answer depends on its line's place and --seed, not on its batch.

    Raises:
      InputError: a line that is no request, or no UTF-8, named by its number; the lines before it are answered.
    """
    batch, done, key = [], 0, jax.random.key(model.flags.seed)

    def flush():
        answers = model.complete([prompt for _, prompt in batch], key, done)
        for (request, _), answer in zip(batch, answers, strict=True):
            print(json.dumps({**request, **answer}, ensure_ascii=False), file=out, flush=True)
        return done + len(batch)

    for number, line in _numbered(lines):
        try:
            batch += [_request(model, line)] if line.strip() else []
        except InputError as error:
            if batch:
                flush()
            raise InputError(f"input line {number}: {error}") from None
        if len(batch) == model.flags.batch_size:
            done, batch = flush(), []
    if batch:
        flush()


def _numbered(lines: TextIO) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            yield number, line
    except UnicodeDecodeError as error:
        raise InputError(f"input line {number + 1} or one soon after it: {error}") from None


def _request(model: Model, line: str) -> tuple[dict, list[int]]:
    """Returns a line's object and its prompt."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(request, dict) or ("prompt" in request) == ("messages" in request):
        raise InputError('expected an object with either "prompt" or "messages"')
    messages = request.get("messages", [{"role": "user", "content": request.get("prompt")}])
    prompt, limit = model.ids(messages), model.config.max_position_embeddings
    if len(prompt) + model.flags.max_new_tokens > limit:
        raise InputError(f"{len(prompt)} tokens and --max-new-tokens {model.flags.max_new_tokens} exceed {limit}")
    return request, prompt


def _opened(path: str, mode: str):
    """A file, or the standard stream where the path is "-"."""
    if path == "-":
        return contextlib.nullcontext(sys.stdin if mode == "r" else sys.stdout)
    try:
        return open(path, mode, encoding="utf-8-sig" if mode == "r" else "utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def run(flags: Chat) -> None:
    """Does what the flags ask for."""
    if flags.prompt is not None and flags.input is not None:
        raise InputError("--prompt and --input are two ways to ask; give one")
    if flags.input is not None and _same_file(flags.input, flags.output):
        raise InputError(f"--input and --output are both {flags.output}, which would be lost; give another --output")
    print(f"loading {flags.checkpoint} ...", file=sys.stderr)
    model = load(flags)
    print(f"{model.config.param_counts()['total']:,} parameters; the first answer compiles the model", file=sys.stderr)
    if flags.input is not None:
        with _opened(flags.input, "r") as lines, _opened(flags.output, "w") as out:
            answer_lines(model, lines, out)
    elif flags.prompt is not None:
        for piece in model.answer([{"role": "user", "content": flags.prompt}], jax.random.key(flags.seed)):
            print(piece, end="", flush=True)
        print()
    else:
        converse(model)


def main(argv: list[str] | None = None) -> None:
    """The command. Exit status 2: bad input, told in one line; 130: Ctrl-C."""
    import tyro

    flags = tyro.cli(tyro.conf.OmitArgPrefixes[Chat], args=argv, prog="python -m qwen_jax.chat", description=__doc__)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of each of its steps
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history in input()
    try:
        run(flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our answers has gone; nothing more can be said on that road
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
