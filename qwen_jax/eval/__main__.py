"""Evaluates a model on tasks of lm-evaluation-harness: python -m qwen_jax.eval --checkpoint DIR --tasks hellaswag,gsm8k

DIR is a Hugging Face folder or the workdir of a run of ours. A task of your own is a YAML file in a folder given with
--include. The table of results is printed; --output keeps them as JSON.
"""

import dataclasses
import json
import logging
import pathlib
import sys
from dataclasses import dataclass

from qwen_jax import chat, sharding
from qwen_jax.errors import InputError, boxes_as_lines
from qwen_jax.eval.harness import HarnessModel
from qwen_jax.files import write_whole
from qwen_jax.sharding import Layout, MeshConfig


@dataclass(frozen=True)
class Eval:
    """The flags."""

    checkpoint: str  # a Hugging Face folder, or the workdir of a run
    tasks: str  # names, separated by commas
    adapter: str = ""  # folder of a peft LoRA adapter to add to the model
    include: str = ""  # folder of task files besides the harness's own
    num_fewshot: int | None = None  # examples before each question; None: as the task says
    limit: int | None = None  # only the first documents of each task: to try it
    chat_template: bool = False  # ask in the model's chat format
    system: str | None = None  # the system message of that; None leaves it to the template
    generation: str = "auto"  # whose chat template; auto goes by the tokenizer
    batch_size: int = 8  # requests answered at once; does not change the answers
    max_new_tokens: int = 256  # of an answer whose task does not say
    output: str = ""  # JSON file of the results
    dtype: str = "auto"  # float32 or bfloat16; auto: float32 on a CPU, where bfloat16 is slower
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def run(flags: Eval) -> dict:
    """Evaluates, prints the table, and returns what the harness found.

    Raises:
      InputError: no harness, an unknown task, a folder that is no model.
    """
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError(f"lm_eval is missing ({error}); expected: pip install 'qwen_jax[eval]'") from None

    class QwenJax(HarnessModel, LM):
        def __init__(self, *model, **options):
            LM.__init__(self)
            HarnessModel.__init__(self, *model, **options)

    tasks = TaskManager(include_path=flags.include or None)
    names = [name for name in flags.tasks.split(",") if name]
    if unknown := [name for name in names if name not in tasks.all_tasks]:
        raise InputError(f"no task is called {unknown[0]!r}; the harness lists its own with `lm_eval ls tasks`")
    layout = Layout(sharding.make_mesh(flags.mesh))
    config, params, tok = chat.load_model(flags.checkpoint, adapter=flags.adapter, dtype=flags.dtype, layout=layout)
    model = QwenJax(
        config, params, tok, layout=layout, batch_size=flags.batch_size, max_new_tokens=flags.max_new_tokens,
        generation=chat.generation_of(tok) if flags.generation == "auto" else flags.generation, seed=flags.seed,
    )  # fmt: skip
    found = lm_eval.simple_evaluate(
        model, tasks=names, num_fewshot=flags.num_fewshot, limit=flags.limit, task_manager=tasks,
        apply_chat_template=flags.chat_template, system_instruction=flags.system, random_seed=flags.seed,
        numpy_random_seed=flags.seed, fewshot_random_seed=flags.seed, torch_random_seed=None, log_samples=False,
    )  # fmt: skip
    print(make_table(found))
    if flags.output:
        kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples") if name in found}
        record = {"flags": dataclasses.asdict(flags), "lm_eval": lm_eval.__version__, **kept}
        write_whole(pathlib.Path(flags.output), json.dumps(record, indent=2, default=str))
    return found


def main(argv: list[str] | None = None) -> None:
    """The command. Exit status 2: bad input, told in one line."""
    import tyro

    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of each of its steps
    try:
        with boxes_as_lines():
            flags = tyro.cli(Eval, args=argv, prog="python -m qwen_jax.eval", description=__doc__)
        run(flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
