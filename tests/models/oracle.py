"""The decoder written again from the papers, in plain numpy, one document and one head at a time."""

import functools
import math

import numpy as np

from qwen_jax.models.stacks import stacks


def rms_norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def frequency(config, i, length):
    """The angle of pair i between neighbours, in a document that was read with a prompt of `length`."""
    H, theta, yarn, v1 = config.head_dim, config.rope_theta, config.yarn, config.v1_lengths
    if v1.use_dynamic_ntk and length > v1.seq_length:
        theta *= (2 ** math.ceil(math.log2(length / v1.seq_length) + 1) - 1) ** (H / (H - 2))
    plain = theta ** (-2 * i / H)
    if not yarn.on:
        return plain
    pair = lambda turns: (
        H * math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta) / 2
    )
    low, high = max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), H - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def rope(x_TH, positions, config, length):
    H = x_TH.shape[-1]
    out = np.empty_like(x_TH)
    for i in range(H // 2):
        angle = positions * frequency(config, i, length)
        a, b = x_TH[:, i], x_TH[:, i + H // 2]
        out[:, i], out[:, i + H // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores(config, q_TH, k_TH, positions, prompt):
    """Logits [T, T] of one head before the mask; tokens behind the prompt were read one by one."""
    yarn, chunks, v1 = config.yarn, config.dual_chunk, config.v1_lengths
    m = np.ones(len(positions))
    if yarn.on:
        m *= 0.1 * math.log(yarn.factor) + 1
    if chunks.on and chunks.original_max_position_embeddings:
        read = np.maximum(prompt, positions + 1)
        m = np.maximum(0.1 * np.log(read / chunks.original_max_position_embeddings) + 1, 1)
    q_TH, k_TH = q_TH * m[:, None], k_TH * m[:, None]
    if v1.use_logn_attn:
        q_TH = q_TH * np.maximum(np.log(positions + 1) / math.log(v1.seq_length), 1)[:, None]
    turn = lambda x_TH, positions: rope(x_TH, positions, config, prompt)
    if not chunks.on:
        return turn(q_TH, positions) @ turn(k_TH, positions).T
    s, farthest = chunks.stride, chunks.chunk_size - (chunks.clamp == "paper")
    k_TH, apart = turn(k_TH, positions % s), positions[:, None] // s - positions // s
    places = positions % s, np.minimum(positions % s + s, farthest), np.full_like(positions, min(2 * s - 1, farthest))
    return np.choose(np.clip(apart, 0, 2), [turn(q_TH, place) @ k_TH.T for place in places])


def attention(config, params, x_TD, positions, prompt):
    N, K = config.num_attention_heads, config.num_key_value_heads
    T = len(x_TD)
    heads = []
    for n in range(N):
        g = n // (N // K)
        q, k, v = (
            x_TD @ params[name]["kernel"][:, i] + (params[name]["bias"][i] if config.qkv_bias else 0)
            for name, i in (("q", n), ("k", g), ("v", g))
        )
        if config.qk_norm:
            q = rms_norm(q, params["q_norm"]["scale"], config.rms_norm_eps)
            k = rms_norm(k, params["k_norm"]["scale"], config.rms_norm_eps)
        logits = scores(config, q, k, positions, prompt) / np.sqrt(config.head_dim)
        logits[np.triu_indices(T, 1)] = -np.inf
        heads.append(softmax(logits) @ v @ params["o"]["kernel"][n])
    return sum(heads)


def mlp(x, gate, up, down):
    gate = x @ gate
    return (gate / (1 + np.exp(-gate)) * (x @ up)) @ down


def experts(config, params, x_TD):
    """Token by token; the gate and the shared expert as in transformers' qwen2_moe."""
    out = np.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        probs = softmax(x @ params["router"])
        best = np.argsort(-probs)[: config.num_experts_per_tok]
        total = probs[best].sum() if config.norm_topk_prob else 1.0
        for e in best:
            out[t] += probs[e] / total * mlp(x, *(params[name][e] for name in ("gate", "up", "down")))
        if config.shared_expert_intermediate_size:
            shared = mlp(x, *(params["shared"][name]["kernel"] for name in ("gate", "up", "down")))
            out[t] += shared / (1 + np.exp(-(x @ params["shared_gate"]["kernel"])))
    return out


def layer_params(config, params, i):
    """The parameters of one layer, wherever its stack is."""
    take = lambda tree, place: {k: take(v, place) if isinstance(v, dict) else v[place] for k, v in tree.items()}
    for stack in stacks(config):
        for place, path in enumerate(stack.blocks()):
            if i in stack.layers(place):
                block = functools.reduce(dict.__getitem__, path, params)
                return take(block, stack.layers(place).index(i))


def logits(config, params, tokens_T, prompt=None):
    """Returns [T, V] float64 logits of one document, of which the first `prompt` tokens were read at once, or all."""
    prompt = len(tokens_T) if prompt is None else prompt
    cast = lambda tree: {k: cast(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}
    params, positions = cast(params), np.arange(len(tokens_T))
    h = params["embedding"][tokens_T]
    for i in range(config.num_hidden_layers):
        p = layer_params(config, params, i)
        h = h + attention(
            config, p["attention"], rms_norm(h, p["attention_norm"]["scale"], config.rms_norm_eps), positions, prompt
        )
        x = rms_norm(h, p["mlp_norm"]["scale"], config.rms_norm_eps)
        if config.is_sparse(i):
            h = h + experts(config, p["moe"], x)
        else:
            h = h + mlp(x, *(p["mlp"][name]["kernel"] for name in ("gate", "up", "down")))
    h = rms_norm(h, params["final_norm"]["scale"], config.rms_norm_eps)
    return h @ (params["embedding"] if config.tie_word_embeddings else params["head"]).T
