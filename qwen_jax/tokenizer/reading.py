"""Reading the files in which byte-level vocabularies are published."""

import base64
import binascii
import json
import os
import pathlib

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import controls, merges, sentence_piece, splitting
from qwen_jax.tokenizer.alphabet import to_bytes
from qwen_jax.tokenizer.byte_bpe import ByteBPE
from qwen_jax.tokenizer.face import Tokenizer

_MALFORMED = (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, MemoryError, RecursionError)


def load(path: str | os.PathLike, *, generation: str | None = None) -> Tokenizer:
    """Reads a tokenizer from files.

    Args:
        path: a `.tiktoken` rank file; a `tokenizer.json`; a SentencePiece `.model`; or a folder that holds
            `tokenizer.json`, `vocab.json` and `merges.txt`, one rank file, or `tokenizer.model`, looked for in this
            order. Beside `vocab.json` and `tokenizer.model`, control tokens are read from `tokenizer_config.json`;
            beside `qwen.tiktoken`, further regular tokens from `qwen_extra.tiktoken`.
        generation: whose control tokens follow the regular tokens, for files that list none: "qwen" (default for rank
            files), "qwen1.5", "qwen2" (default for `vocab.json`), "qwen2.5" or "qwen3".

    Returns:
        The tokenizer. All routes to the Qwen vocabulary give the same ids.

    Raises:
        InputError: a file is missing or malformed (the message names file and line or field), or `generation` is given
            for a file that lists its own control tokens.

    References:
        qwen_spec.md 1.3 and 1.4.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _main_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file or folder")
    try:
        tok = _read(path, generation)
        tok.chat_template = _chat_template(path.parent)
    except InputError:
        raise
    except _MALFORMED as error:  # a field of another kind than the format has
        raise InputError(
            f"{path}: malformed, or a file beside it is: {type(error).__name__} {str(error)[:100]!r}"
        ) from error
    return tok


def _read(path: pathlib.Path, generation: str | None) -> Tokenizer:
    if path.suffix == ".tiktoken":
        return _read_ranks(path, generation or "qwen")
    if path.name == "vocab.json":
        return _read_vocabulary_and_merges(path.parent, generation)
    if path.suffix not in (".json", ".model"):
        raise InputError(f"{path}: a tokenizer file ends in .tiktoken, .json or .model")
    if generation is not None:
        raise InputError(f"{path}: lists its own control tokens; leave out generation={generation!r}")
    return _read_document(path) if path.suffix == ".json" else sentence_piece.read(path, listed_controls(path.parent))


def _chat_template(folder: pathlib.Path) -> str | None:
    """The folder's chat template: a file of its own in newer checkpoints, a field of the config in older ones."""
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = read_json(config).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON object.

    Raises:
        InputError: not JSON (the message names the line), or not an object.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{path}: not valid JSON: {where}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a {type(document).__name__}; it has to be a JSON object")
    return document


def listed_controls(folder: pathlib.Path) -> dict[str, tuple[int, bool]] | None:
    """The control tokens that a folder's `tokenizer_config.json` lists: id and "special" flag; None without a list."""
    path = folder / "tokenizer_config.json"
    listed = read_json(path).get("added_tokens_decoder") if path.is_file() else None
    if not listed:
        return None
    return _controls([{"id": int(index), **token} for index, token in listed.items()], path)


def _main_file(folder: pathlib.Path) -> pathlib.Path:
    ranks = [path for path in sorted(folder.glob("*.tiktoken")) if path.name != "qwen_extra.tiktoken"]
    if len(ranks) > 1:
        raise InputError(f"{folder}: holds {len(ranks)} rank files ({', '.join(p.name for p in ranks)}); name one")
    for path in (folder / "tokenizer.json", folder / "vocab.json", *ranks, folder / "tokenizer.model"):
        if path.is_file():
            return path
    raise InputError(
        f"{folder}: no tokenizer in this folder; looked for tokenizer.json, vocab.json + merges.txt, *.tiktoken, "
        "tokenizer.model"
    )


def _read_ranks(path: pathlib.Path, generation: str) -> ByteBPE:
    names = controls.table(generation)
    vocabulary = _rank_lines(path)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(f"{path}: ranks have to be 0..{len(vocabulary) - 1}, each once; some are missing")
    special_tokens = {name: len(vocabulary) + i for i, name in enumerate(names)}
    extra = path.with_name("qwen_extra.tiktoken")
    if path.name == "qwen.tiktoken" and extra.is_file():
        taken = {*vocabulary.values(), *special_tokens.values()}
        vocabulary |= {
            token: i for token, i in _rank_lines(extra).items() if token not in vocabulary and i not in taken
        }
    try:
        return ByteBPE(vocabulary, special_tokens)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _rank_lines(path: pathlib.Path) -> dict[bytes, int]:
    vocabulary: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            spelling, rank = line.split()
            token = base64.b64decode(spelling, validate=True)
            index = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}, line {number}: found {line[:60]!r}; a line is `base64 rank`") from None
        if token in vocabulary or not token or index < 0:
            raise InputError(f"{path}, line {number}: token {token!r} is empty, listed before, or of negative rank")
        if index in line_of_rank:
            raise InputError(f"{path}, line {number}: rank {index} stands in line {line_of_rank[index]} already")
        vocabulary[token], line_of_rank[index] = index, number
    return vocabulary


def _read_document(path: pathlib.Path) -> ByteBPE:
    document = read_json(path)
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        raise InputError(
            f"{path}: no model.vocab and model.merges; this is not the tokenizer.json of a byte-pair model"
        )
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise InputError(f"{path}: model.type is {model.get('type')!r}; only byte-level BPE can be read from JSON")
    for field in ("ignore_merges", "dropout", "end_of_word_suffix", "continuing_subword_prefix"):
        if model.get(field):
            raise InputError(f"{path}: model.{field} is {model[field]!r}; only its absence is supported")
    normalizer = (document.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise InputError(f"{path}: normalizer is {normalizer!r}; readable are NFC and none")
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return _from_text(
        model["vocab"],
        pairs,
        _controls(document.get("added_tokens") or [], path),
        where=str(path),
        merge_at=lambda index: f"{path}, model.merges[{index}]",
        pattern=splitting.from_json(document.get("pre_tokenizer"), str(path)),
        nfc=normalizer == "NFC",
    )


def _read_vocabulary_and_merges(folder: pathlib.Path, generation: str | None) -> ByteBPE:
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    if not merges_path.is_file():
        raise InputError(f"{merges_path}: missing beside vocab.json")
    vocabulary = read_json(vocab_path)
    listed = listed_controls(folder)
    if listed is not None and generation is not None:
        raise InputError(f"{folder}: tokenizer_config.json lists the control tokens; leave out {generation=}")
    if listed is None:
        free = len(vocabulary)
        listed = {}
        for name in controls.table(generation or "qwen2"):
            listed[name] = (vocabulary.get(name, free), name not in controls.SHOWN)
            free += name not in vocabulary
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    numbered = [
        (n, line) for n, line in enumerate(lines, 1) if line.strip() and not (n == 1 and line[:9] == "#version:")
    ]
    return _from_text(
        vocabulary,
        [tuple(line.rstrip("\r").split(" ")) for _, line in numbered],
        listed,
        where=str(vocab_path),
        merge_at=lambda index: f"{merges_path}, line {numbered[index][0]}",
    )


def _controls(added_tokens: list[dict], path: pathlib.Path) -> dict[str, tuple[int, bool]]:
    """Name to (id, special flag) of a list of added tokens."""
    listed: dict[str, tuple[int, bool]] = {}
    for position, token in enumerate(added_tokens):
        where = f"{path}: added token {position}"
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise InputError(f"{where} has no content and integer id: {str(token)[:100]}")
        if token["content"] in listed:
            raise InputError(f"{where}: special token {token['content']!r} is listed twice")
        if stripping := [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]:
            raise InputError(
                f"{where}: {token['content']!r} has {stripping[0]} set, which would change the text around it"
            )
        listed[token["content"]] = (token["id"], bool(token.get("special", True)))
    return listed


def _from_text(vocab, pairs, listed, *, where, merge_at, pattern=splitting.QWEN, nfc=True) -> ByteBPE:
    """Builds a tokenizer from a vocabulary and merges spelt in the byte alphabet."""
    regular: dict[str, int] = {text: i for text, i in vocab.items() if text not in listed}
    if bad := next((text for text, i in regular.items() if type(i) is not int or i < 0), None):
        raise InputError(f"{where}: the id of {bad!r} is {regular[bad]!r}; it has to be an integer from 0")
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise InputError(f"{merge_at(index)}: found {' '.join(map(str, pair))!r}; a merge is two tokens")
        unknown = next((text for text in (*pair, "".join(pair)) if text not in regular), None)
        if unknown is not None:
            raise InputError(
                f"{merge_at(index)}: {' '.join(pair)!r} does not fit: {unknown!r} is not in the vocabulary"
            )
    try:
        spellings = {text: to_bytes(text) for text in regular}
    except ValueError as error:
        raise InputError(f"{where}: {error}, and it is not listed among the control tokens") from None
    vocabulary = {spellings[text]: i for text, i in regular.items()}
    single = sorted((token for token in vocabulary if len(token) == 1), key=vocabulary.__getitem__)
    byte_pairs = [(spellings[left], spellings[right]) for left, right in pairs]
    order = single + [left + right for left, right in byte_pairs]
    wrong = merges.check(byte_pairs, order)
    if wrong is not None:
        raise InputError(
            f"{merge_at(wrong)}: {' '.join(pairs[wrong])!r} does not fit: an earlier merge makes this token"
        )
    special_tokens = {name: i for name, (i, _) in listed.items()}
    shown = [name for name, (_, special) in listed.items() if not special]
    try:
        return ByteBPE(vocabulary, special_tokens, order=order, pattern=pattern, nfc=nfc, shown=shown)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
