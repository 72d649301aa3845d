"""Which control tokens of a chat a base model has never learned: LoRA on kernels alone would never emit them.

A base model is trained on text: `<|im_start|>` and `<|im_end|>` have rows in its vocabulary that no text ever used, and
a frozen embedding and head keep them so (QwenLM/Qwen issue 622). `resolve` says which rows a LoRA run trains beside its
adapters.
"""

import dataclasses
import os

import numpy as np

from qwen_jax import tokenizer
from qwen_jax.config import LoraConfig
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.training import pretrained, workdir

SMALL = 0.5  # an untrained row is shorter than this part of nearly all others (weight decay shrinks what nothing uses)
ALIKE = 0.95  # or as parallel as this to the rows behind the tokenizer's last token, which nothing ever used


def resolve(lora: LoraConfig, base: str | os.PathLike, tok: Tokenizer, *, template: str) -> LoraConfig:
    """Returns the config with row_ids filled in.

    Args:
      lora: with a rank.
      base: Hugging Face folder or workdir of a run; "random" has learned nothing.
      tok: the base's tokenizer.
      template: the chat format.

    Raises:
      InputError: where control_rows is "freeze" and the base has not learned rows that every chat needs.
    """
    needed = chat_tokens(tok, template)
    if lora.control_rows == "train":
        return dataclasses.replace(lora, row_ids=needed)
    missing = _unlearned(base, needed, tok.vocab_size)
    if missing and lora.control_rows == "freeze":
        names = {id: name for name, id in tok.special_tokens.items()}
        raise InputError(
            f"{base} has not learned {', '.join(names[id] for id in missing)}, of which chats are made, and "
            'lora.control_rows is "freeze": the tuned model could not end an answer; expected "auto" or "train", or a '
            "base that has learned them"
        )
    return dataclasses.replace(lora, row_ids=missing)


def chat_tokens(tok: Tokenizer, template: str) -> tuple[int, ...]:
    """Returns the ids of the control tokens that a conversation in this format is made of, ascending."""
    messages = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    ids, _ = tokenizer.chat.render(messages, tok, generation=template)
    return tuple(sorted(set(ids) & set(tok.special_tokens.values())))


def _unlearned(base: str | os.PathLike, ids: tuple[int, ...], used: int) -> tuple[int, ...]:
    if base == "random":
        return ids
    if pretrained.is_run(base):  # pretraining reads plain text, everything else chats
        return ids if workdir.read(base)["experiment"] == "pretrain" else ()
    from qwen_jax import hf

    tables = hf.load_tables(base).values()
    return tuple(id for id in ids if any(untrained(table, id, used=used, among=ids) for table in tables))


def untrained(table_VD: np.ndarray, row: int, *, used: int, among: tuple[int, ...]) -> bool:
    """Tells whether a row of an embedding or head looks as if no text had ever used it.

    It does where it is much shorter than the others, equal to another control token's (both made, neither trained), or
    parallel to the rows behind the tokenizer's last token.

    Args:
      table_VD: the embedding or the head.
      row: which row.
      used: the tokenizer's vocab_size; rows from there on are padding.
      among: ids of control tokens.
    """
    mine = table_VD[row].astype(np.float32)
    lengths = np.linalg.norm(table_VD[:used].astype(np.float32), axis=1)
    if np.linalg.norm(mine) < SMALL * np.quantile(lengths, 0.01):
        return True
    if any(np.array_equal(table_VD[row], table_VD[other]) for other in among if other != row):
        return True
    padding = table_VD[used:].astype(np.float32).mean(0) if len(table_VD) > used else np.zeros_like(mine)
    return bool(mine @ padding > ALIKE * np.linalg.norm(mine) * np.linalg.norm(padding))
