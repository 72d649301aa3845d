"""Makes the golden files of this folder with transformers; run where torch is, once for each change of what is checked.

python -m tests.golden.hf.make

For each shape of tests/parity/reference.py: the folder transformers saved (bfloat16), and figures.npz with, for each
kind of batch, tokens, segments and the float32 logits of those weights; loss and gradients for the packed batch.
"""

import copy
import pathlib

import numpy as np
import torch

from tests.parity import reference
from tests.parity.batches import KINDS, batch

HERE = pathlib.Path(__file__).parent
NAMES = ("qwen2-tied", "qwen2-14-heads", "qwen3", "qwen3-tied-14-heads", "qwen2_moe", "qwen3_moe-some-dense")


def main() -> None:
    for name in NAMES:
        model = reference.make(name)
        with torch.no_grad():
            for parameter in model.parameters():  # not model.bfloat16(): that would round its table of frequencies too
                parameter.copy_(parameter.bfloat16().float())
        copy.deepcopy(model).bfloat16().save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        figures = {}
        for kind in KINDS:
            tokens, segments = batch(kind, model.config.vocab_size)
            with torch.no_grad():
                figures |= {f"{kind}/tokens": tokens, f"{kind}/segments": segments}
                figures[f"{kind}/logits"] = reference.logits(model, tokens, segments).numpy()
        loss, gradients = reference.loss_and_gradients(model, tokens, segments)
        figures |= {"loss": np.float32(loss)} | {f"gradient/{key}": value for key, value in gradients.items()}
        np.savez_compressed(HERE / name / "figures.npz", **figures)


if __name__ == "__main__":
    main()
