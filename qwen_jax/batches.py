"""The structs that travel between the floors: batches going down into a step, losses coming back up.

All are NamedTuples, so they are JAX pytrees without this file (or a data worker that imports it) loading JAX.

Shapes: B batch, T sequence length, A answers that a row has room for.
"""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax on the device


class LMBatch(NamedTuple):
    """Packed rows for next-token training. Several documents may share a row; none sees another.

    Attributes:
      tokens: [B, T] int32, what the model reads.
      targets: [B, T] int32, the token that follows each position (any valid id where loss_mask is 0).
      loss_mask: [B, T] float32, weight of each target in the loss; 0 where there is no target to learn.
      segment_ids: [B, T] int32, 1, 2, ... number the documents of a row; 0 marks padding.
      positions: [B, T] int32, position inside the document, from 0 (0 in padding).
    """

    tokens: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array


class PreferenceBatch(NamedTuple):
    """Packed rows of answers that people compared. All answers to one prompt stand in one row, each with its prompt.

    Answer a of a row is its segment a + 1.

    Attributes:
      tokens, targets, loss_mask, segment_ids, positions: [B, T] as in LMBatch; what is learned is the answers.
      ends: [B, A] int32, place in the row of the answer's last token, `<|im_end|>`; 0 where there is no answer.
      groups: [B, A] int32, 1, 2, ... number the prompts of a row; 0 where there is no answer.
      values: [B, A] float32, what people think of the answer; only those of one group are comparable.
      reference: [B, A] float32, log-probability of the answer under a reference model; 0 where nobody asked for it.
    """

    tokens: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array
    positions: Array
    ends: Array
    groups: Array
    values: Array
    reference: Array

    @classmethod
    def axes(cls) -> "PreferenceBatch":
        """Returns the logical axes of each array: the answers of a row are not split."""
        return cls(*[("batch", "length")] * 5, *[("batch", None)] * 4)


class Rollout(NamedTuple):
    """Answers that a policy has sampled, one a row; those to one prompt stand next to each other.

    Place t of [B, T] holds figures of the token at t + 1, as everywhere where tokens are learned.

    Attributes:
      tokens: [B, T] int32, prompt and answer, and the end of the turn where the answer was cut off; 0 behind.
      segment_ids: [B, T] int32, 1 where there is a token, else 0.
      mask: [B, T] float32, 1 where the token that follows was sampled; all 0 in an answer that nobody could rate.
      log_probs: [B, T] float32, of the token that follows under the policy itself, when it was sampled; 0 where masked.
      sampling_log_probs: [B, T] float32, the same in the distribution it was drawn from, filters and all.
      ends: [B] int32, the place of the row's last token, where a reward model reads its score.
      rewards: [B] float32, from what is no model on the mesh.
    """

    tokens: Array
    segment_ids: Array
    mask: Array
    log_probs: Array
    sampling_log_probs: Array
    ends: Array
    rewards: Array

    @classmethod
    def axes(cls) -> "Rollout":
        """Returns the logical axes of each array."""
        return cls(*[("batch", "length")] * 5, *[("batch",)] * 2)


class Loss(NamedTuple):
    """What an objective hands to the train step: sums, so that adding microbatches is exact.

    Attributes:
      total: scalar float32, the sum of the loss over everything it counts (tokens, pairs).
      weight: scalar float32, how much it counted. The step optimises sum(total) / sum(weight).
      metrics: name -> scalar float32 sum, under the same weight: reported as sum / sum(weight).
      tally: pytree of sums that the loss of later microbatches of the same step may look at; no gradient flows in them.
    """

    total: Array
    weight: Array
    metrics: dict[str, Array]
    tally: Any = ()

    @classmethod
    def from_mean(cls, mean: Array, weight: Array, metrics: dict[str, Array], tally: Any = ()) -> "Loss":
        """Wraps what `objectives.*.loss` returns: a mean, and metrics that are means under the same weight."""
        return cls(mean * weight, weight, {name: value * weight for name, value in metrics.items()}, tally)
