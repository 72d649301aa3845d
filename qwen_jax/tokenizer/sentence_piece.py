"""SentencePiece vocabularies (unigram or BPE over characters, bytes as a fallback) behind the same face.

Models trained here keep white space as it is and spell what they do not know by bytes, so that decoding gives the text
back; they carry the normalizer name "nfc", by which `load` knows that text is brought to normal form C before. Models
of others are encoded exactly as SentencePiece itself does, and lose what their normalisation loses.
"""

import os
import pathlib
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator

from qwen_jax.errors import InputError
from qwen_jax.files import write_whole
from qwen_jax.tokenizer import controls, writing
from qwen_jax.tokenizer.face import Tokenizer
from qwen_jax.tokenizer.learning import checked

_SPACE = "\u2581"  # how pieces spell a space
_UNKNOWN = " \u2047 "  # how SentencePiece decodes its unknown piece
# The trainer drops every sentence that has a character it uses for itself.
_RESERVED = re.compile(f"[\0\t\u2585{_SPACE}]+")


class SentencePiece(Tokenizer):
    """A tokenizer around a SentencePiece model.

    Its control pieces, and those user-defined pieces that are written `<…>`, are control tokens here: text never makes
    them. Further control tokens follow the model's pieces.
    """

    def __init__(self, model: bytes, special_tokens: dict[str, int], *, shown: Collection[str] = controls.SHOWN):
        """Builds a tokenizer.

        Args:
            model: a serialised SentencePiece model.
            special_tokens: the ids of further control tokens.
            shown: control tokens that decoding never skips.

        Raises:
            InputError: not a SentencePiece model, or an id is given twice.
        """
        from sentencepiece import SentencePieceProcessor

        proto = _parse(model)
        kinds = type(proto.pieces[0])
        spellings, own = {}, {}
        for index, piece in enumerate(proto.pieces):
            if piece.type == kinds.USER_DEFINED and re.fullmatch(r"<[^<>]+>", piece.piece):
                piece.type = kinds.CONTROL
            if piece.type == kinds.CONTROL:
                own[piece.piece] = index
            elif piece.type == kinds.BYTE:
                spellings[index] = bytes([int(piece.piece[1:-1], 16)])
            else:
                text = piece.piece.replace(_SPACE, " ")
                if piece.type == kinds.UNKNOWN:  # published folders list it among the control tokens; it spells text
                    special_tokens = {n: i for n, i in special_tokens.items() if (n, i) != (piece.piece, index)}
                    text = _UNKNOWN
                spellings[index] = text.encode("utf-8")
        super().__init__(spellings, own | special_tokens, shown=shown)
        self.model = proto.SerializeToString()
        self.nfc = proto.normalizer_spec.name == "nfc"
        self.adds_space = proto.normalizer_spec.add_dummy_prefix
        self._processor = SentencePieceProcessor(model_proto=self.model)
        self._spelt_space = [i for byte in _SPACE.encode() for i, s in spellings.items() if s == bytes([byte])][:3]

    def _encode_data(self, text: str) -> list[int]:
        if not self.nfc:
            return self._processor.encode(text)
        # The character that stands for a space in pieces is spelt by its bytes, or it would come back as a space.
        first, *others = [self._processor.encode(part) for part in unicodedata.normalize("NFC", text).split(_SPACE)]
        return first + [index for part in others for index in self._spelt_space + part]

    def decode_bytes(self, ids, *, skip_special: bool = False, continued: bool = False) -> bytes:
        """As of every tokenizer; a space that the model adds before a text is taken off again."""
        spelt = super().decode_bytes(ids, skip_special=skip_special)
        return spelt[1:] if self.adds_space and not continued and spelt.startswith(b" ") else spelt

    def save(self, folder: str | os.PathLike, *, chat_template: str | None = None) -> None:
        """Writes `tokenizer.model` and `tokenizer_config.json`, which `load` reads; each appears whole or not at all.

        Args:
            folder: made if it is missing; other files in it are left alone.
            chat_template: as in `ByteBPE.save`.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        flags = {"legacy": False, "add_bos_token": False, "add_eos_token": False}
        write_whole(
            folder / "tokenizer_config.json",
            writing.as_json(writing.config(self, chat_template, "LlamaTokenizer") | flags),
        )
        write_whole(folder / "tokenizer.model", self.model)

    def __getstate__(self) -> dict:
        names = ("model", "special_tokens", "shown", "chat_template")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["model"], state["special_tokens"], shown=state["shown"])
        self.chat_template = state["chat_template"]


def read(path: pathlib.Path, listed: dict[str, tuple[int, bool]] | None) -> SentencePiece:
    """Reads a `.model` file.

    Args:
        path: the file.
        listed: control tokens beside those of the model: id and "special" flag of each.

    Raises:
        InputError: not a SentencePiece model.
    """
    listed = listed or {}
    try:
        return SentencePiece(
            path.read_bytes(),
            {name: index for name, (index, _) in listed.items()},
            shown=[name for name, (_, special) in listed.items() if not special],
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Iterable[str] = controls.CHATML,
    *,
    model_type: str = "unigram",
) -> SentencePiece:
    """Trains a SentencePiece model, for comparison with byte-level BPE: digits singly, bytes as a fallback.

    Args:
        texts: any iterable of strings.
        vocab_size: the size to reach: pieces, 256 bytes, the unknown piece and `special_tokens` together.
        special_tokens: control tokens, which follow the pieces.
        model_type: "unigram" or "bpe".

    Returns:
        The tokenizer; smaller than asked for, with a warning, where the text does not suffice.

    Raises:
        InputError: a text is not a string or not encodable, `vocab_size` is too small, or control tokens overlap.

    References:
        Kudo and Richardson 2018 (arXiv:1808.06226); Kudo 2018 (arXiv:1804.10959).
    """
    import io

    from sentencepiece import SentencePieceTrainer

    special_tokens = tuple(special_tokens)
    controls.check(special_tokens, "special_tokens")
    if model_type not in ("unigram", "bpe"):
        raise InputError(f"model_type is {model_type!r}; it is unigram or bpe")
    writer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=writer,
            vocab_size=vocab_size - len(special_tokens),
            model_type=model_type,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,
            character_coverage=0.9995,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"SentencePiece cannot train {vocab_size=} on these texts: {' '.join(str(error).split())}"
        ) from None
    proto = _parse(writer.getvalue())
    proto.normalizer_spec.name = "nfc"
    found = len(proto.pieces) + len(special_tokens)
    if found < vocab_size:
        warnings.warn(f"the text suffices for {found:,} tokens, not {vocab_size:,}", stacklevel=2)
    specials = {name: len(proto.pieces) + i for i, name in enumerate(special_tokens)}
    return SentencePiece(proto.SerializeToString(), specials)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in checked(texts):
        yield from filter(None, _RESERVED.split(unicodedata.normalize("NFC", text)))


def _parse(model: bytes):
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        proto = ModelProto.FromString(model)
    except DecodeError:
        proto = ModelProto()
    if not proto.pieces:
        raise InputError(f"these {len(model):,} bytes are not a SentencePiece model")
    return proto
