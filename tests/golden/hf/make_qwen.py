"""Makes the golden folder of Qwen v1 with its published modeling file, which transformers does not include.

python -m tests.golden.hf.make_qwen FOLDER

FOLDER holds modeling_qwen.py, configuration_qwen.py and qwen_generation_utils.py of a published Qwen-7B (those of the
September 2023 upload made the figures here). They are run, so read them first; they need torch, transformers and
einops. They were written for transformers 4.32; on 5.23 one method that has since been removed is put back.

The folder written is like those of make.py: weights and config.json under the published names, and figures.npz, its
gradients under the names of Qwen2, which is how `hf.save` writes such a model.
"""

import importlib
import pathlib
import sys

import numpy as np
import safetensors.torch
import torch
import transformers

from tests.parity import reference
from tests.parity.batches import KINDS, batch

HERE = pathlib.Path(__file__).parent
FIELDS = dict(
    vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, kv_channels=8, intermediate_size=88,
    seq_length=64, max_position_embeddings=256, layer_norm_epsilon=1e-5, rotary_emb_base=3e5, attn_dropout_prob=0.0,
    emb_dropout_prob=0.0, fp32=True, use_flash_attn=False, use_dynamic_ntk=True, use_logn_attn=True,
)  # fmt: skip

RENAMED = {
    "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "transformer.h": "model.layers",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip


def make(folder: pathlib.Path):
    """Returns a published model in which no parameter has its initial value."""
    transformers.PreTrainedModel.get_head_mask = lambda self, mask, layers: [None] * layers
    sys.path.insert(0, str(folder.parent))
    modeling = importlib.import_module(f"{folder.name}.modeling_qwen")
    model = modeling.QWenLMHeadModel(modeling.QWenConfig(**FIELDS)).eval()
    draw = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "ln_" in name else 0.0
            drawn = torch.from_numpy(draw.normal(centre, 0.2, parameter.shape).astype(np.float32))
            parameter.copy_(drawn.bfloat16())
    return model


def as_qwen2(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a tensor of Qwen v1 as the one or three tensors that it is in Qwen2."""
    if ".attn.c_attn." in name:
        layer, kind = name.split(".")[2], name.split(".")[-1]
        return {
            f"model.layers.{layer}.self_attn.{n}_proj.{kind}": y for n, y in zip("qkv", np.split(x, 3), strict=True)
        }
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return {name: x}


def beyond_training(model) -> dict[str, np.ndarray]:
    """One document of 160 tokens, 2.5 times seq_length: read whole, and from token 80 on decoded one by one."""
    tokens, prompt = np.random.default_rng(9).integers(0, model.config.vocab_size, (1, 160), dtype=np.int32), 80
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        whole, decoded = model(ids, use_cache=False).logits, []
        step = model(ids[:, :prompt], use_cache=True)
        for t in range(prompt, tokens.shape[1]):
            step = model(ids[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            decoded.append(step.logits)
    return {"long/tokens": tokens, "long/logits": whole.numpy(), "long/decoded": torch.cat(decoded, 1).numpy()}


def main(folder: str) -> None:
    model, target = make(pathlib.Path(folder).absolute()), HERE / "qwen"
    target.mkdir(exist_ok=True)
    model.config.architectures = ["QWenLMHeadModel"]
    model.config.to_json_file(target / "config.json")
    tensors = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    figures = {}
    for kind in KINDS:
        tokens, segments = batch(kind, model.config.vocab_size)
        with torch.no_grad():
            figures |= {f"{kind}/tokens": tokens, f"{kind}/segments": segments}
            figures[f"{kind}/logits"] = reference.logits(model, tokens, segments).numpy()
    loss, gradients = reference.loss_and_gradients(model, tokens, segments)
    figures |= {"loss": np.float32(loss)}
    figures |= {f"gradient/{key}": value for name, x in gradients.items() for key, value in as_qwen2(name, x).items()}
    figures |= beyond_training(model)
    np.savez_compressed(target / "figures.npz", **figures)


if __name__ == "__main__":
    main(sys.argv[1])
