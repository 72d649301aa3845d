"""How a model reads further than it was trained to, as plain data. A config holds one of each kind, off by default.

The arithmetic is in `ops.rope_scaling` and `ops.dual_chunk`. Field names are those of the published config.json files
where there are any.
"""

from dataclasses import dataclass

from qwen_jax.errors import InputError

CLAMPS = ("code", "paper")


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., arXiv:2309.00071): low frequencies are stretched by `factor`, and logits sharpened a little.

    It acts at every length, short ones too. A factor of 1 is plain RoPE.

    Raises:
      InputError: on a factor below 1, or another value without meaning.
    """

    factor: float = 1.0  # reaches factor * original_max_position_embeddings
    original_max_position_embeddings: int = 32_768  # the length of training
    beta_fast: float = 32.0  # turns within that length from which on a frequency is left alone
    beta_slow: float = 1.0  # turns up to which it is stretched whole
    attention_factor: float | None = None  # multiplies cos and sin; None computes it from the fields around it
    mscale: float = 0.0  # both of them set: the factor is their quotient (DeepSeek's models); 0 is unset
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        if not self.factor >= 1:
            raise InputError(f"yarn.factor is {self.factor}; expected at least 1 (1 leaves RoPE as it is)")
        if self.original_max_position_embeddings < 1:
            raise InputError(
                f"yarn.original_max_position_embeddings is {self.original_max_position_embeddings}; expected at least 1"
            )
        if not self.beta_fast >= self.beta_slow > 0:
            raise InputError(
                f"yarn.beta_fast is {self.beta_fast} and yarn.beta_slow {self.beta_slow}; expected fast >= slow > 0"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise InputError(f"yarn.attention_factor is {self.attention_factor}; expected more than 0")

    @property
    def on(self) -> bool:
        """Whether RoPE differs from the plain one."""
        return self.factor > 1 or self.attention_factor is not None


@dataclass(frozen=True)
class DualChunk:
    """Dual chunk attention (An et al., arXiv:2402.17463) with the attention temperature of Qwen2.5-1M (2501.15383).

    No two tokens are further apart than the model was trained on: see `ops.dual_chunk`. Up to chunk_size tokens it is
    plain attention.

    Raises:
      InputError: on a local window of more than half a chunk, where even neighbours would lose their distance.
    """

    chunk_size: int = 0  # the length of training; chunks start every chunk_size - local_size tokens. 0 is off
    local_size: int = 0  # distances up to this one are exact
    original_max_position_embeddings: int = 0  # beyond this length the temperature acts; 0 is never
    clamp: str = "code"  # the greatest distance: chunk_size as in the published inference code, or one less (paper)

    def __post_init__(self):
        if self.chunk_size < 0 or self.original_max_position_embeddings < 0:
            raise InputError(
                f"dual_chunk.chunk_size is {self.chunk_size} and dual_chunk.original_max_position_embeddings "
                f"{self.original_max_position_embeddings}; expected 0 (off) or more"
            )
        if self.on and not 1 <= self.local_size <= self.chunk_size / 2:
            raise InputError(
                f"dual_chunk.local_size is {self.local_size}; expected 1 to {self.chunk_size // 2}, "
                f"half of chunk_size {self.chunk_size}"
            )
        if self.clamp not in CLAMPS:
            raise InputError(f"dual_chunk.clamp is {self.clamp!r}; expected one of {', '.join(CLAMPS)}")

    @property
    def on(self) -> bool:
        """Whether there are chunks at all."""
        return self.chunk_size > 0

    @property
    def stride(self) -> int | None:
        """Tokens from one chunk's start to the next one's; None without chunks."""
        return self.chunk_size - self.local_size if self.on else None

    @property
    def farthest(self) -> int:
        """The greatest position a query may take."""
        return self.chunk_size if self.clamp == "code" else self.chunk_size - 1


@dataclass(frozen=True)
class V1Lengths:
    """Qwen v1 beyond its training length (arXiv:2309.16609, section 2.3): dynamic NTK and LogN scaling.

    Qwen v1 does neither while it trains.

    Raises:
      InputError: where one is on and seq_length is no length.
    """

    seq_length: int = 0  # the length of training, up to which neither does anything
    use_dynamic_ntk: bool = False  # RoPE's base grows with the prompt's length
    use_logn_attn: bool = False  # a query is multiplied by the logarithm of its position to the base seq_length

    def __post_init__(self):
        if self.on and self.seq_length < 2:
            raise InputError(f"v1_lengths.seq_length is {self.seq_length}; expected the length of training, at least 2")

    @property
    def on(self) -> bool:
        """Whether one of the two is."""
        return self.use_dynamic_ntk or self.use_logn_attn
