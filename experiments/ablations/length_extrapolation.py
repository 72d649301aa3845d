"""Reading further than the length of training: plain RoPE, dynamic NTK, YaRN, dual chunk attention, its temperature.

    python -m experiments.ablations.length_extrapolation cpu --workdir runs/length_extrapolation

One model is trained at 256 tokens and read at 256 to 8,192 in each way, without any further training. Source: the text
of 4,000 human chats (data.chitchat), joined: a row is one document across the ends of chats, so that long rows are real
text with positions from 0, of which the far part says little. Half of the training rows hold pass keys, or a model
so small could not retrieve at any length. Every length scores the same tokens of the validation text, cut otherwise.

Expected with seed 0 on two CPU cores, 8 minutes: perplexity 74.1 at 256 tokens; at 4,096 plain RoPE 54% above that,
dynamic NTK 7%, YaRN 5%, DCA 2.3%, with its temperature 1.5%. Of pass keys half the digits are right at 256 tokens, few
keys whole: too small a model for that part (docs/results/length_extrapolation).
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import pretrain
from experiments.long_context import text
from qwen_jax import models, sharding, tokenizer
from qwen_jax.batches import LMBatch
from qwen_jax.config import DualChunk, QwenConfig, V1Lengths, Yarn
from qwen_jax.data import loader, long_text, packing
from qwen_jax.data.conversations import Document
from qwen_jax.errors import InputError
from qwen_jax.files import write_whole
from qwen_jax.training import checkpoint, command, loop, page, report, supervised, workdir
from qwen_jax.training.page import Picture, Table, Text
from qwen_jax.training.samples import SamplesConfig

LABEL = "length_extrapolation"


@dataclass(frozen=True)
class Config:
    """How the model is trained, and what it is read at."""

    pretrain: pretrain.Config
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    scored_tokens: int = 65_536  # of the validation text, a multiple of every length
    tokens_at_once: int = 8_192
    training_passkeys: int = 16_000  # different ones, of all lengths up to that of training
    passkey_share: float = 0.5  # of the training rows
    answer_weight: float = 16.0  # of a token of an answer in the loss; the text around it has none
    passkeys: int = 16  # asked at each length, at depths spread evenly
    local_share: int = 8  # dual chunks: chunk_size is the length of training, local_size this fraction of it


def cpu() -> Config:
    """0.5M parameters in two layers, trained for 1,000 steps on human chats and pass keys: two CPU cores, 8 minutes."""
    base = pretrain.small()
    loop = dataclasses.replace(base.loop, steps=1000, eval_every=250, checkpoint_every=250)
    optimizer = dataclasses.replace(base.optimizer, decay_steps=250)
    model, samples = base.model.replace(num_hidden_layers=2), SamplesConfig(prompts=0)
    return Config(dataclasses.replace(base, model=model, optimizer=optimizer, loop=loop, samples=samples))


def smoke() -> Config:
    """Two steps on made-up chats, read at twice their length: seconds, no network."""
    base = dataclasses.replace(pretrain.smoke(), length=128)
    return Config(base, lengths=(128, 256), scored_tokens=512, tokens_at_once=512, training_passkeys=8, passkeys=2)


RECIPES = {"cpu": cpu, "smoke": smoke}


def ways(model: QwenConfig, trained: int, length: int, local_share: int) -> dict[str, QwenConfig]:
    """Returns the same model reading `length` tokens in each way; at the length of training all are plain RoPE."""
    chunks = DualChunk(trained, trained // local_share)
    reach = {
        "none": {},
        "dynamic NTK": dict(v1_lengths=V1Lengths(trained, use_dynamic_ntk=True)),
        "YaRN": dict(yarn=Yarn(length / trained, trained)),
        "DCA": dict(dual_chunk=chunks),
        "DCA + temperature": dict(dual_chunk=dataclasses.replace(chunks, original_max_position_embeddings=trained)),
    }
    return {name: model.replace(max_position_embeddings=length, **fields) for name, fields in reach.items()}


def train(config: Config, folder: Path, recipe: str) -> Document:
    """Trains the model, or what of it is left, on text and pass keys; returns the validation text."""
    base = config.pretrain
    built = pretrain.build(base, sharding.make_mesh(base.mesh))
    workdir.prepare(folder, base, experiment="ablations.length_extrapolation", recipe=recipe)
    tok = pretrain.run_tokenizer(base, folder)
    read, held_out = (text(base, tok, split) for split in ("train", "validation"))
    # Of all lengths: among few tokens the answer is found by chance often enough to be learned from.
    orders = np.random.default_rng(base.seed).uniform(size=config.training_passkeys)
    least = long_text.shortest_passkey(tok)
    lengths = (least * (base.length / least) ** orders).astype(int)
    keys = long_text.passkeys(read, tok, lengths, seed=base.seed)
    keys = packing.PackedRows([Document(x.ids, config.answer_weight * x.loss_mask) for x in keys], base.length)
    stream = packing.StreamRows([read], base.length, seed=base.seed)
    rows = packing.MixedRows([stream, keys], [1 - config.passkey_share, config.passkey_share])
    validation = packing.StreamRows([held_out], base.length, seed=base.seed).first(base.validation_rows)
    supervised.fit(
        built, rows, {base.dataset: validation}, tok, config=base, workdir=folder, experiment=LABEL, recipe=recipe,
        initial=lambda: built.init(jax.random.key(base.seed)),
    )  # fmt: skip
    return held_out


@functools.partial(jax.jit, static_argnames="model")
def read(model: QwenConfig, params, tokens_BT: jax.Array, targets_BT: jax.Array):
    """Returns the log-probability of each target, and whether it was the likeliest token, [B, T]."""
    log_probs_BTV = jax.nn.log_softmax(models.forward(model, params, tokens_BT))
    found_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return found_BT, jnp.argmax(log_probs_BTV, axis=-1) == targets_BT


def score(config: Config, model: QwenConfig, params, rows: dict[str, Sequence[LMBatch]], length: int) -> dict:
    """Returns what this model makes of rows of text and of pass keys, as JSON."""
    found = {}
    for name, some in rows.items():
        batches = loader.evaluation(some, batch_size=config.tokens_at_once // length)
        read_all = [jax.device_get(read(model, params, batch.tokens, batch.targets)) for batch in batches]
        found[name] = [np.concatenate(arrays)[: len(some)] for arrays in zip(*read_all, strict=True)]
    nats_RT, answers_RT = -found["text"][0], found["passkeys"][1][:, -1 - long_text.DIGITS : -1]
    borders = [0, *(n for n in config.lengths if n <= length)]
    return {
        "loss": float(nats_RT.mean()),
        "loss_by_position": [float(nats_RT[:, a:b].mean()) for a, b in itertools.pairwise(borders)],
        "passkeys": float(answers_RT.all(axis=1).mean()),
        "digits": float(answers_RT.mean()),
    }


def score_all(config: Config, folder: Path, held_out: Document) -> dict[str, dict[str, dict]]:
    """Returns {way: {length: score}}; what results.json has already is not computed again."""
    path, seed = folder / "results.json", config.pretrain.seed + 1
    results = json.loads(path.read_text()) if path.exists() else {}
    model, params = checkpoint.load_params(folder / "trained")
    tok = tokenizer.load(folder / "trained" / "tokenizer")
    scored = Document(*(x[: config.scored_tokens + 1] for x in held_out))
    for length in config.lengths:
        keys = long_text.passkeys(held_out, tok, [length] * config.passkeys, seed=seed, spread=True)
        rows = {
            "text": packing.StreamRows([scored], length, seed=0).first(config.scored_tokens // length),
            "passkeys": packing.StreamRows(keys, length, seed=0),
        }
        for way, reader in ways(model, config.pretrain.length, length, config.local_share).items():
            of_way = results.setdefault(way, {})
            if str(length) not in of_way:
                of_way[str(length)] = score(config, reader, params, rows, length)
                write_whole(path, json.dumps(results, indent=1))
                loop.say(LABEL, f"{way} at {length}: {of_way[str(length)]}")
    return results


def run(config: Config, folder, recipe: str) -> dict[str, dict[str, dict]]:
    """Trains and reads what is not done yet, and writes the report."""
    trained = config.pretrain.length
    if (
        any(config.scored_tokens % n or config.tokens_at_once % n for n in config.lengths)
        or config.lengths[0] != trained
    ):
        raise InputError(
            f"lengths are {config.lengths}; expected divisors of scored_tokens {config.scored_tokens} and of "
            f"tokens_at_once {config.tokens_at_once}, from the length of training, {trained}, on"
        )
    folder = workdir.prepare(
        folder, config, experiment="ablations.length_extrapolation", recipe=recipe, recipes=RECIPES
    )
    held_out = train(config, folder / "trained", recipe)
    if len(held_out.ids) <= config.scored_tokens:
        raise InputError(f"the validation text has {len(held_out.ids)} tokens; expected over {config.scored_tokens}")
    results = score_all(config, folder, held_out)
    plot(config, results, folder / "plots" / "length_extrapolation.png")
    report.summarise(folder, title=f"length_extrapolation {recipe}", blocks=summary(config, results))
    loop.say(LABEL, f"done: {folder / 'report.md'}, curves in {folder / 'plots'}")
    return results


def summary(config: Config, results: dict[str, dict[str, dict]]) -> list[page.Block]:
    """Returns what of the report tells the scores."""
    lengths, base = config.lengths, config.pretrain
    first, last = str(lengths[0]), str(lengths[-1])
    tokens = base.loop.steps * base.batch_size * base.length
    told = (
        f"{base.model.param_counts()['total']:,} parameters, trained on {tokens:,} tokens in rows of {base.length}, "
        f"{config.passkey_share:.0%} of them pass keys; seed {base.seed}. Perplexity of the same "
        f"{config.scored_tokens:,} tokens of held-out text at every length; {config.passkeys} pass keys of "
        f"{long_text.DIGITS} digits at each."
    )
    tables = {
        "Perplexity": (lengths, lambda of: [f"{np.exp(x['loss']):.2f}" for x in of.values()]),
        f"Perplexity over that at {first}": (
            lengths, lambda of: [f"{np.exp(x['loss'] - of[first]['loss']):.3f}" for x in of.values()]
        ),
        "Pass keys found (digits)": (
            lengths, lambda of: [f"{x['passkeys']:.0%} ({x['digits']:.0%})" for x in of.values()]
        ),
        f"Nats per token by position, read at {last}": (
            [f"{a}–{b}" for a, b in itertools.pairwise((0, *lengths))],
            lambda of: [f"{x:.3f}" for x in of[last]["loss_by_position"]],
        ),
    }  # fmt: skip
    blocks = [Text(told), Picture("plots/length_extrapolation.png", "curves")]
    for title, (columns, cells) in tables.items():
        blocks += [Text(title, 2), Table(["", *map(str, columns)], [[way, *cells(of)] for way, of in results.items()])]
    return blocks


def plot(config: Config, results: dict[str, dict[str, dict]], path: Path) -> None:
    """Draws perplexity over the length read at, the loss by position at the longest, and the pass keys found."""
    from matplotlib.figure import Figure

    lengths = config.lengths
    middles = [(a + b) / 2 for a, b in itertools.pairwise((0, *lengths))]
    figure = Figure(figsize=(14, 4), layout="constrained")
    perplexity, position, passkeys = figure.subplots(1, 3)
    for way, found in results.items():
        style = dict(marker="o", ms=4, label=way)
        perplexity.plot(lengths, [np.exp(x["loss"]) for x in found.values()], **style)
        position.plot(middles, found[str(lengths[-1])]["loss_by_position"], **style)
        passkeys.plot(lengths, [x["passkeys"] for x in found.values()], **style)
    perplexity.set(xlabel="tokens read", ylabel="perplexity", yscale="log")
    position.set(xlabel=f"position in {lengths[-1]} tokens", ylabel="nats per token")
    passkeys.set(xlabel="tokens read", ylabel="pass keys found", ylim=(-0.05, 1.05))
    for axes in (perplexity, position, passkeys):
        axes.set_xscale("log", base=2)
    perplexity.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    command.main(__doc__, RECIPES, run)
