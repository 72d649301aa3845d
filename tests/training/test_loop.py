"""The loop: what it writes, when it gives up, what it never touches."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pretrain import language_model_loss
from qwen_jax import sharding
from qwen_jax.batches import LMBatch
from qwen_jax.config import get
from qwen_jax.errors import InputError
from qwen_jax.sharding import Layout, MeshConfig
from qwen_jax.training import accounts, loop, metrics, report, samples, throughput, workdir
from qwen_jax.training.checkpoint import Checkpoints
from qwen_jax.training.loop import LoopConfig
from qwen_jax.training.optimizer import OptimizerConfig
from tests.training import lm


class Numbered:
    """Batch n is made from seed n."""

    def __init__(self):
        self.next = 0

    def __next__(self):
        self.next += 1
        return lm.batch(seed=self.next - 1)

    def get_state(self):
        return {"next_index": self.next}

    def set_state(self, state):
        self.next = state["next_index"]


def fit(built, folder, *, sample=None, sample_every=0, batches=None, lengths=(), **config):
    folder.mkdir(exist_ok=True)
    return loop.fit(
        built,
        batches or Numbered(),
        config=LoopConfig(**{**dict(steps=4, log_every=2, eval_every=2, checkpoint_every=2), **config}),
        workdir=folder,
        initial=lambda: built.init(jax.random.key(0)),
        validation={"a": lambda: [lm.batch(seed=100)], "b": lambda: [lm.batch(seed=101), lm.batch(seed=102)]},
        sample=sample,
        sample_every=sample_every,
        lengths=lengths,
        flops_per_token=1e6,
        label="test",
    )


def one_device(**options):
    return lm.build(sharding.make_mesh(MeshConfig(), jax.devices()[:1]), **options)


def test_it_writes_figures_and_tells_of_compilation(tmp_path, capsys):
    built = one_device()
    state = fit(built, tmp_path)
    rows = metrics.read(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    logged = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "model_flops_utilisation"}
    assert [row["step"] for row in rows if "validation/loss" in row] == [0, 2, 4]
    assert logged <= rows[1].keys()
    assert rows[1]["tokens_per_second"] == pytest.approx(8 * 16 / rows[1]["step_seconds"])
    out = capsys.readouterr().out
    assert "compiling the train step" in out and "compiling the evaluation" in out and out.count("compiled in") == 2
    assert "making the parameters of step 0" in out and "step 0: evaluating" in out and "step 2/4" in out
    assert list(tmp_path.glob("events.out.tfevents.*"))
    # Validation is the mean over all targets of all batches, not a mean of the batches' means, nor of the domains'.
    sums = [
        language_model_loss(state.params, lm.batch(seed=s), None, model=lm.MODEL, layout=Layout())
        for s in (100, 101, 102)
    ]
    mean = lambda some: float(sum(s.total for s in some)) / float(sum(s.weight for s in some))
    for name, some in (("validation", sums), ("validation/a", sums[:1]), ("validation/b", sums[1:])):
        assert rows[-1][f"{name}/loss"] == pytest.approx(mean(some), rel=1e-5)
        assert rows[-1][f"{name}/perplexity"] == pytest.approx(np.exp(mean(some)), rel=1e-4)
    assert f"validation loss {mean(sums):.4f}, a {mean(sums[:1]):.4f}, b {mean(sums[1:]):.4f}" in out


def test_samples_are_taken_before_and_after_training_and_every_so_many_steps(tmp_path):
    asked = []

    def sample(params):
        asked.append(float(params["final_norm"]["scale"][0]))
        return [{"completion": f"answer {len(asked)}"}]

    built = one_device()
    fit(built, tmp_path, sample=sample, sample_every=3)
    kept = samples.read(tmp_path)
    assert kept == {
        step: [{"step": step, "completion": f"answer {place}"}] for place, step in enumerate((0, 3, 4), start=1)
    }
    assert len(set(asked)) == 3 and asked[0] == 1.0  # of the parameters at that step: norms begin at 1
    fit(built, tmp_path / "other", steps=2, sample=sample)
    assert list(samples.read(tmp_path / "other")) == [0, 2]


def test_rows_of_several_lengths_take_the_steps_of_one_program_each(tmp_path, capsys):
    """Batches of 8 x 16 and 16 x 8 in turn, against `train_step` on each as it comes."""

    class Mixed(Numbered):
        def __next__(self):
            whole = super().__next__()
            fold = lambda x: x.reshape(16, 8)
            return whole if self.next % 2 else LMBatch(*map(fold, whole))._replace(positions=fold(whole.positions) % 8)

    built = one_device()
    state = fit(built, tmp_path, batches=Mixed(), lengths=(16, 8))
    expected, drawn = built.init(jax.random.key(0)), Mixed()
    for _ in range(4):
        expected, _ = built.train_step(expected, next(drawn))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected.params)
    out = capsys.readouterr().out
    assert "the train step on rows of 16" in out and "the train step on rows of 8" in out
    with pytest.raises(InputError, match="rows of 5 tokens do not divide 16"):
        built.batches([5])


def test_accounts_add_up_over_the_starts_of_a_run(tmp_path):
    """Two starts of 2 steps each: steps and weights of all 4, and the wall time of both."""
    built, begin = one_device(), time.perf_counter()
    fit(built, tmp_path, steps=2)
    fit(built, tmp_path)
    passed = time.perf_counter() - begin
    books = accounts.read(tmp_path)
    assert (books.starts, books.steps) == (2, 4)
    assert books.weight == sum(lm.batch(seed=n).loss_mask.sum() for n in range(4))
    assert {"compile", "data", "step", "evaluation", "checkpoint"} == books.seconds.keys()
    assert 0 < sum(books.seconds.values()) < passed and books.flops_per_token == 1e6
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((built.state, built.batch)))
    assert books.memory["arguments"] == pytest.approx(whole, rel=0.01) and books.memory["host_peak"] > 1e8
    before = (tmp_path / accounts.FILE).read_text()
    fit(built, tmp_path)  # nothing to train
    assert (tmp_path / accounts.FILE).read_text() == before


def test_too_many_steps_that_are_not_finite_end_the_run_and_spare_the_checkpoint(tmp_path):
    def not_finite(params, batch, key):
        loss = language_model_loss(params, batch, key, model=lm.MODEL, layout=Layout())
        return loss._replace(total=loss.total * jnp.nan)

    built = one_device()
    fit(built, tmp_path, steps=2)
    poisoned = one_device(loss_fn=not_finite)
    with pytest.raises(InputError, match="the last 3 steps to step 5 had a loss or gradient that is not finite"):
        fit(poisoned, tmp_path, steps=9, checkpoint_every=10, max_skipped=3)
    checkpoints = Checkpoints(tmp_path)
    restored, data, _ = checkpoints.restore(built.state)
    checkpoints.close()
    assert int(restored.step) == 2 and data["next_index"] == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))


def test_lines_of_a_lost_run_and_a_line_cut_short_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]
    metrics.MetricsWriter(tmp_path, start=1).close()
    assert file.read_text() == '{"step": 1, "loss": 3}\n'
    file.write_text('{"step": 1\n{"step": 2, "loss": 2}\n')
    with pytest.raises(InputError, match="metrics.jsonl:1 is not JSON"):
        metrics.read(tmp_path)


def test_a_run_killed_before_its_first_checkpoint_begins_its_figures_anew(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "validation/loss": 3}\n{"step": 1, "loss": 2}\n')
    metrics.MetricsWriter(tmp_path, start=0).close()
    assert file.read_text() == ""


def test_a_run_without_a_finite_figure_still_gets_its_report(tmp_path):
    workdir.prepare(tmp_path, OptimizerConfig(), experiment="sft", recipe="a")
    writer = metrics.MetricsWriter(tmp_path, start=0)
    writer.write(1, {"loss": float("nan"), "step_seconds": 0.5, "tokens_per_second": 2, "model_flops_utilisation": 0.1})
    writer.close()
    report.write(tmp_path, title="sft a")
    text = (tmp_path / "report.md").read_text()
    assert "Last training loss: none was finite." in text and "Median step: 0.500 s" in text


def test_flops_of_a_token_are_six_per_matmul_parameter_and_causal_attention():
    """Qwen2.5-7B at length 4096, the figure of a published comparison: 184 TFLOP for one row."""
    assert throughput.train_flops_per_token(get("qwen2.5-7b"), 4096) * 4096 == pytest.approx(184e12, rel=0.01)


@pytest.mark.parametrize("name", ["steps", "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped"])
def test_a_loop_that_cannot_be_is_refused(name):
    with pytest.raises(InputError, match=f"loop.{name} is 0; expected at least 1"):
        LoopConfig(**{name: 0})


def test_checkpoints_that_no_evaluation_ranks_are_refused():
    with pytest.raises(InputError, match="loop.checkpoint_every is 3; expected a multiple of loop.eval_every 2"):
        LoopConfig(eval_every=2, checkpoint_every=3)
    with pytest.raises(InputError, match="loop.eval_every is -1; expected 0"):
        LoopConfig(eval_every=-1)
    assert LoopConfig(eval_every=0, checkpoint_every=3).checkpoint_every == 3
