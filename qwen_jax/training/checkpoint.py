"""Checkpoints by orbax: saved in the background, the newest few and the best one kept, restored on any mesh."""

import contextlib
import os
import pathlib
import re
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from qwen_jax.config import QwenConfig
from qwen_jax.errors import InputError
from qwen_jax.training import workdir as workdirs
from qwen_jax.training.state import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run: its train state, the position in its data, the metric that ranks them.

    A save is written beside the others and becomes visible when it is whole, so that a run killed at any moment leaves
    the checkpoints before it as they were.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2, best_metric: str = "validation/loss"):
        """Opens (or makes) workdir/checkpoints.

        Args:
          workdir: the run's folder.
          keep: how many of the newest to keep, besides the one with the lowest best_metric.
          best_metric: a name among the metrics given to `save`.
        """
        self.folder = pathlib.Path(workdir).absolute() / FOLDER
        metric = lambda metrics: metrics[best_metric]
        best = preservation_policy.BestN(
            get_metric_fn=metric, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )  # orbax ranks upwards; reverse: lowest is best
        options = ocp.CheckpointManagerOptions(
            best_fn=metric,
            best_mode="min",
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best]),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Returns the steps there are checkpoints of, ascending."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the step with the lowest metric, None before the first evaluation."""
        return self._manager.best_step()

    def save(self, state: TrainState, data_state: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts a save and returns as soon as the state may be donated; `data_state` is JSON.

        Raises:
          InputError: where this save, or the one before it, could not be written.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state))
        with self._writing():
            saved = self._manager.save(int(state.step), args=items, metrics=metrics)
        if not saved:
            raise RuntimeError(f"orbax did not save step {int(state.step)} in {self.folder}, which has {self.steps()}")

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict, list[str]] | None:
        """Returns the newest checkpoint that can be read, on the mesh that `abstract` names.

        Newer ones that cannot be read are renamed to damaged-STEP-TIME: they would stand where the steps that are
        trained again have to be saved. Where none can be read, all are left as they are.

        Returns:
          (state, data_state, complaints): one complaint for each newer checkpoint that could not be read; None where
          there is no checkpoint at all.

        Raises:
          InputError: where there are checkpoints and none can be read.
        """
        complaints = []
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        for step in reversed(self.steps()):
            try:
                restored = self._manager.restore(step, args=items)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                complaints.append(f"checkpoint {self.folder / str(step)} cannot be read: {_first_line(error)}")
                continue
            self._set_aside([newer for newer in self.steps() if newer > step])
            return restored["state"], restored["data"], complaints
        if complaints:
            raise InputError("; ".join(complaints))
        return None

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps if jax.process_index() == 0 else []:
            (self.folder / str(step)).rename(self.folder / f"damaged-{step}-{time.time_ns()}")
        if steps:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          InputError: where it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and lets go of the folder.

        Raises:
          InputError: where that save could not be written.
        """
        with self._writing():
            try:
                self._manager.wait_until_finished()
            finally:  # or its threads would speak up after all has been said
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        """Turns a full disk, a lost folder and their like into one line."""
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds
            kept = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())
            raise InputError(
                f"a checkpoint could not be written to {self.folder}: {_first_line(error)}; whole: {kept or 'none'}"
            ) from error


def _first_line(error: Exception) -> str:
    """Returns what went wrong in one short line; the system's own reason, which tensorstore buries, goes first."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    code = re.search(r"os_error_code='(\d+)'", line)
    return f"{os.strerror(int(code[1]))}: {line[:160]}" if code else line[:200]


def load_params(
    workdir: str | os.PathLike, *, step: int | None = None, shardings: Any = None
) -> tuple[QwenConfig, dict]:
    """Reads what a run trains, without its optimizer: its model, or the adapters of LoRA (see pretrained).

    Args:
      workdir: the run's folder.
      step: which checkpoint; the newest if None.
      shardings: tree of shardings to read straight onto a mesh, or one for all; on the first device if None. Of a tree,
        what it does not name (of the first level) is not read.

    Returns:
      The model's config and its parameters.

    Raises:
      InputError: where there is no such run or checkpoint, or it cannot be read.
    """
    config = workdirs.model_config(workdir)
    folder = pathlib.Path(workdir).absolute() / FOLDER
    found = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    if not found or (step is not None and step not in found):
        wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise InputError(f"{folder} lacks {wanted}; it has {found or 'none'}")
    path = folder / str(found[-1] if step is None else step) / "state"
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            described = reader.metadata(path).item_metadata
            if described is None:
                raise ValueError("its list of arrays is missing or damaged")
            shapes = described.tree["params"]
            one = first if shardings is None else shardings
            places = one
            if isinstance(one, jax.sharding.Sharding):
                places = jax.tree.map(lambda _: one, shapes)
            else:  # what has no place is not read
                shapes = {name: shapes[name] for name in places if name in shapes}
                places = {name: places[name] for name in shapes}
            structs = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
            )
            args = ocp.args.PyTreeRestore(
                {"params": structs},
                restore_args=ocp.checkpoint_utils.construct_restore_args({"params": structs}),
                partial_restore=True,
            )
            return config, reader.restore(path, args=args)["params"]
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"checkpoint {path.parent} cannot be read: {_first_line(error)}") from None
