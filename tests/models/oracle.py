"""The decoder written again from the papers, in plain numpy, one document and one head at a time."""

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rope(x_TH, positions, theta):
    H = x_TH.shape[-1]
    out = np.empty_like(x_TH)
    for i in range(H // 2):
        angle = positions * theta ** (-2 * i / H)
        a, b = x_TH[:, i], x_TH[:, i + H // 2]
        out[:, i], out[:, i + H // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(config, params, x_TD, positions):
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
        q, k = rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta)
        scores = q @ k.T / np.sqrt(config.head_dim)
        scores[np.triu_indices(T, 1)] = -np.inf
        heads.append(softmax(scores) @ v @ params["o"]["kernel"][n])
    return sum(heads)


def logits(config, params, tokens_T):
    """Returns [T, V] float64 logits of one document."""
    cast = lambda tree: {k: cast(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}
    params, positions = cast(params), np.arange(len(tokens_T))
    layer = lambda tree, i: {k: layer(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
    h = params["embedding"][tokens_T]
    for i in range(config.num_hidden_layers):
        p = layer(params["layers"], i)
        h = h + attention(
            config, p["attention"], rms_norm(h, p["attention_norm"]["scale"], config.rms_norm_eps), positions
        )
        x = rms_norm(h, p["mlp_norm"]["scale"], config.rms_norm_eps)
        gate = x @ p["mlp"]["gate"]["kernel"]
        h = h + (gate / (1 + np.exp(-gate)) * (x @ p["mlp"]["up"]["kernel"])) @ p["mlp"]["down"]["kernel"]
    h = rms_norm(h, params["final_norm"]["scale"], config.rms_norm_eps)
    return h @ (params["embedding"] if config.tie_word_embeddings else params["head"]).T
