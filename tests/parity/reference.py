"""transformers as the reference: random models, their logits and the gradients of their mean loss, as numpy."""

import numpy as np
import torch
import transformers

from tests.parity.batches import scored

torch.set_num_threads(2)

SHAPES = {
    "qwen2-tied": dict(tie_word_embeddings=True),
    "qwen2-untied": dict(rms_norm_eps=1e-5, rope_theta=3e5),
    "qwen2-14-heads": dict(hidden_size=56, num_attention_heads=14, vocab_size=83),
    "qwen2-head-dim": dict(hidden_size=40, head_dim=16),
    "qwen2-yarn": dict(
        head_dim=16,
        rope_theta=100.0,
        max_position_embeddings=128,
        rope=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "qwen3": dict(hidden_size=48, head_dim=16, rms_norm_eps=1e-5),
    "qwen3-tied-14-heads": dict(hidden_size=36, num_attention_heads=14, head_dim=6, tie_word_embeddings=True),
    "qwen2_moe": dict(
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=28
    ),
    "qwen3_moe": dict(
        num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, norm_topk_prob=True, head_dim=16
    ),
    "qwen3_moe-some-dense": dict(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, norm_topk_prob=True,
        num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[3],
    ),
}  # fmt: skip


def make(name: str, seed: int = 0):
    """Returns a transformers model in which no parameter has its initial value, so that a forgotten one shows."""
    rope = {"rope_type": "default", "rope_theta": SHAPES[name].get("rope_theta", 1e4)} | SHAPES[name].get("rope", {})
    fields = {
        "vocab_size": 67, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": "eager",
        "rope_parameters": rope,
    } | {key: value for key, value in SHAPES[name].items() if key not in ("rope", "rope_theta")}  # fmt: skip
    kind = name.split("-")[0].title().replace("_", "")
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    draw = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in parameter_name else 0.0
            parameter.copy_(torch.from_numpy(draw.normal(centre, 0.2, parameter.shape).astype(np.float32)))
    return model


def logits(model, tokens: np.ndarray, segments: np.ndarray) -> torch.Tensor:
    """Returns [rows, length, vocabulary]; what is computed for padding means nothing.

    Rows of one document are one padded batch. Rows of several are taken apart, each document in a call of its own.
    """
    ids = torch.from_numpy(tokens).long()
    if segments.max() <= 1:
        mask = torch.from_numpy(segments > 0).long()
        return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    rows = []
    for row, marks in zip(ids, torch.from_numpy(segments), strict=True):
        documents = [row[marks == mark] for mark in marks.unique_consecutive()]
        rows.append(torch.cat([model(document[None]).logits[0] for document in documents]))
    return torch.stack(rows)


def loss_and_gradients(model, tokens: np.ndarray, segments: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the mean of -log p(next token of the document) and its gradient for each trained tensor by name."""
    model.zero_grad()
    log_p = logits(model, tokens, segments)[:, :-1].log_softmax(-1)
    targets = torch.from_numpy(tokens[:, 1:]).long()[..., None]
    mask = torch.from_numpy(scored(segments))
    loss = -log_p.gather(-1, targets)[..., 0][mask].mean()
    loss.backward()
    gradients = {name: p.grad.float().numpy() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), dict(part for name, x in gradients.items() for part in _published(name, x))


def _published(name: str, x: np.ndarray):
    """Yields the tensors of a checkpoint; in memory transformers keeps all experts of a layer in two arrays."""
    layer, fused, kind = name.rpartition(".experts.")
    if not fused:
        yield name, x
        return
    for expert, of_expert in enumerate(x):
        parts = np.split(of_expert, 2) if kind == "gate_up_proj" else [of_expert]
        for part, projection in zip(parts, kind.removesuffix("_proj").split("_"), strict=True):
            yield f"{layer}.experts.{expert}.{projection}_proj.weight", part
