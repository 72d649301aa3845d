"""Writing a byte-level vocabulary as `tokenizer.json` and `tokenizer_config.json`."""

import json
import os
import pathlib

from qwen_jax.files import write_whole
from qwen_jax.tokenizer import merges, splitting
from qwen_jax.tokenizer.alphabet import to_text

_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def write(tokenizer, folder: str | os.PathLike, chat_template: str | None) -> None:
    """Writes both files of a `ByteBPE` tokenizer; see `ByteBPE.save`."""
    folder = pathlib.Path(folder)
    document = json.dumps(_document(tokenizer), ensure_ascii=False)  # first: it may be refused
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer_config.json", as_json(config(tokenizer, chat_template)))
    write_whole(folder / "tokenizer.json", document)


def config(tokenizer, chat_template: str | None, tokenizer_class: str = "Qwen2Tokenizer") -> dict:
    """The `tokenizer_config.json` of a tokenizer: control tokens, which of them end and pad a text, chat template."""
    chat_template = chat_template or tokenizer.chat_template
    names = tokenizer.special_tokens
    end_of_text = "<|endoftext|>" if "<|endoftext|>" in names else None
    return {
        "tokenizer_class": tokenizer_class,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token.pop("id")): token for token in _added_tokens(tokenizer)},
        "bos_token": None,
        "eos_token": "<|im_end|>" if "<|im_end|>" in names else end_of_text,
        "pad_token": end_of_text,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        **({"chat_template": chat_template} if chat_template else {}),
    }


def as_json(document: dict) -> str:
    """A JSON file for people to read."""
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def _document(tokenizer) -> dict:
    vocabulary = {to_text(token): i for token, i in sorted(tokenizer.vocabulary.items(), key=lambda item: item[1])}
    if list(tokenizer.special_tokens.values()) != list(range(len(vocabulary), tokenizer.vocab_size)):
        # Readers number control tokens behind the vocabulary unless they stand in it; these stand elsewhere.
        vocabulary |= tokenizer.special_tokens
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer),
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": splitting.to_json(tokenizer.pattern),
        "post_processor": _LEVEL,
        "decoder": _LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[to_text(left), to_text(right)] for left, right in merges.find(tokenizer.order)],
        },
    }


def _added_tokens(tokenizer) -> list[dict]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": name, **plain, "special": name not in tokenizer.shown}
        for name, index in tokenizer.special_tokens.items()
    ]
