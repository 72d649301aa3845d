"""Human chats: the real two-person conversations of `chitchat-dataset` 0.9.0 (MIT), as a TFDS dataset.

The file holds 7,168 chats of a university's chit-chat challenge (2018), 258,145 messages. What is kept of each: the
words, in order, messages sent in a row joined by line breaks so that roles alternate. The person who wrote first is
"user", the other "assistant". 3,996 chats, 242,967 messages in 135,523 turns remain: 3,591 chats to train on, 200 for
validation, 205 for the test.

What is dropped, and why (counts of the real file):
  - 33 messages that are empty or only blank. Where a turn vanishes with them, its neighbours, being of one speaker,
    are merged.
  - 3,151 chats in which nobody ever answered (one sender): there is no exchange to learn from.
  - 21 chats that repeat another one when case, blanks and punctuation are ignored ("Hello? / hi").
  - people's ids, time stamps and ratings: nothing here uses them, and ids are personal. No message of the file is
    marked as a system's or a bot's.
  - the prompt (a topic suggested to both sides, in 6,929 chats): it is nobody's message.
The words themselves are not filtered: a few people named themselves, and a few chats hold runs of "f" or "ink ink".
Some of the 1,315 people wrote hundreds of chats and appear in every split: the splits hold different conversations, not
different people.

Splits are made by a hash of the content, before anything is fitted: 90% train, 5% validation, 5% test. A chat keeps
its split whatever else is added or removed, and near-copies, having one hash, cannot be in two splits.
"""

import collections
import contextlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import tensorflow_datasets as tfds

from qwen_jax.data import packages
from qwen_jax.data.formats import content_hash, percent_of
from qwen_jax.errors import InputError

logger = logging.getLogger(__name__)

Conversation = list[dict[str, str]]  # OpenAI messages: {"role": "user" | "assistant", "content": text}

SPLITS = ("train", "validation", "test")
_MANIFEST = "sha256sums.json"


class Chitchat(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder. `load` is the way to the data; this class is how it is written, as array_record."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Two-sided chats, without copies, split by content."}

    def _info(self) -> tfds.core.DatasetInfo:
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"messages": tfds.features.Sequence(message)}),
            homepage="https://github.com/BYU-PCCL/chitchat-dataset",
        )

    def _split_generators(self, dl_manager):
        chats, counts = clean(read_raw(packages.fetch(packages.CHITCHAT)))
        logger.info("chitchat: %s", ", ".join(f"{count} {kind}" for kind, count in counts.items()))
        return {split: self._generate_examples(chats, split) for split in SPLITS}

    def _generate_examples(self, chats: dict[str, Conversation], split: str):
        for key, conversation in chats.items():
            if split_of(key) == split:
                yield key, {"messages": conversation}


class Conversations(Sequence):
    """Random access to the conversations of one split: a sequence of lists of OpenAI messages."""

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        messages = self._source[index % len(self)]["messages"]
        return [
            {"role": role.decode(), "content": content.decode()}
            for role, content in zip(messages["role"], messages["content"], strict=True)
        ]


def load(split: str) -> Conversations:
    """The chats of a split; the dataset is fetched and built on first use, then read from the cache.

    Args:
      split: "train", "validation" or "test", or a TFDS slice of one, such as "train[:10%]".

    Returns:
      A random-access sequence of conversations, each a list of `{"role": ..., "content": ...}`, always in one order.

    Raises:
      InputError: the split does not exist, or the package cannot be fetched.
    """
    builder = tfds.builder_from_directory(build())
    try:
        return Conversations(builder.as_data_source(split))
    except ValueError:
        raise InputError(
            f"chitchat: no split {split!r}; there are {', '.join(SPLITS)} and slices as 'train[:10%]'"
        ) from None


def build() -> pathlib.Path:
    """Makes the dataset in the cache if it is not there whole; returns its folder.

    The folder is made under another name and renamed when it is complete, hashes of its files included: a build that
    was interrupted is never taken for one that was not, and a file that was damaged later is noticed and built again.

    Raises:
      InputError: the package cannot be fetched.
    """
    target = packages.cache_folder() / "datasets" / f"chitchat-{Chitchat.VERSION}"
    if _is_whole(target):
        return target
    logger.info("building the chitchat dataset in %s", target)
    with packages.scratch_folder(target.parent) as scratch:
        made = _write_records(scratch)
        try:
            if target.exists():
                logger.warning("%s is damaged: replaced by a new build", target)
                os.replace(target, scratch / "damaged")
            os.replace(made, target)
        except OSError:
            if not _is_whole(target):  # otherwise another process was faster, with the same result
                raise
    return target


def _write_records(scratch: pathlib.Path) -> pathlib.Path:
    tfds.disable_progress_bar()
    builder = Chitchat(data_dir=scratch / "tfds", file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # tfds prints; what is worth saying has been logged
        builder.download_and_prepare()
    folder = pathlib.Path(builder.data_dir)
    hashes = {file.name: packages.file_sha256(file) for file in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(hashes, indent=1))
    return folder


def _is_whole(folder: pathlib.Path) -> bool:
    try:
        hashes = json.loads((folder / _MANIFEST).read_text())
        return all(packages.file_sha256(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError):
        return False


def read_raw(path: os.PathLike | str) -> Iterator[list[tuple[str, str]]]:
    """The chats of the raw file, each as its (sender, text) pairs in order.

    Raises:
      InputError: the file is not JSON, or not of the expected form.
    """
    try:
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected the chats as JSON, found {error}") from None
    for key, chat in raw.items():
        try:
            yield [(message["sender"], message["text"]) for turn in chat["messages"] for message in turn]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path}: chat {key}: expected messages of sender and text, found {type(error).__name__} {error}"
            ) from None


def clean(chats: Iterable[list[tuple[str, str]]]) -> tuple[dict[str, Conversation], dict[str, int]]:
    """Merges, filters and deduplicates raw chats (the module says what is dropped and why).

    Args:
      chats: each a list of (sender, text).

    Returns:
      The conversations by content hash, and how many chats or messages were kept or dropped, by kind.
    """
    kept, counts = {}, collections.Counter()
    for chat in chats:
        written = [(sender, text.strip()) for sender, text in chat if text.strip()]
        counts["empty messages dropped"] += len(chat) - len(written)
        if len({sender for sender, _ in written}) != 2:
            counts["chats without an answer dropped"] += 1
            continue
        conversation = _merge_turns(written)
        key = content_hash(conversation)
        if key in kept:
            counts["copies dropped"] += 1
            continue
        kept[key] = conversation
        counts["chats kept"] += 1
        counts["messages kept"] += len(written)
        counts["turns kept"] += len(conversation)
    return kept, dict(counts)


def _merge_turns(written: list[tuple[str, str]]) -> Conversation:
    """One message per turn, its lines being the messages sent in a row; the first sender is the user."""
    conversation, last = [], None
    for sender, text in written:
        if sender == last:
            conversation[-1]["content"] += "\n" + text
        else:
            conversation.append({"role": "user" if sender == written[0][0] else "assistant", "content": text})
        last = sender
    return conversation


def split_of(key: str) -> str:
    """The split of a conversation, from its content hash alone."""
    percent = percent_of(key)
    return "train" if percent < 90 else "validation" if percent < 95 else "test"
