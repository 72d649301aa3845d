"""Text to ids and back: byte-level BPE as in every Qwen model, SentencePiece for ablations, and ChatML.

tok = tokenizer.load("qwen.tiktoken")            # or tokenizer.train(texts, vocab_size=32_000)
ids = tok.encode("text is data, even <|im_end|>")
ids, mask = tokenizer.chat.render(messages, tok, generation="qwen2.5")
"""

from qwen_jax.tokenizer import chat
from qwen_jax.tokenizer.byte_bpe import ByteBPE
from qwen_jax.tokenizer.controls import GENERATIONS
from qwen_jax.tokenizer.extending import extend
from qwen_jax.tokenizer.face import Tokenizer
from qwen_jax.tokenizer.learning import train
from qwen_jax.tokenizer.reading import load
from qwen_jax.tokenizer.sentence_piece import SentencePiece, train_sentencepiece
from qwen_jax.tokenizer.streaming import StreamDecoder

__all__ = [
    "GENERATIONS",
    "ByteBPE",
    "SentencePiece",
    "StreamDecoder",
    "Tokenizer",
    "chat",
    "extend",
    "load",
    "train",
    "train_sentencepiece",
]
