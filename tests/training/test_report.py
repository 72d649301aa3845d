"""report.md and report.html: figures of a run whose files were written by hand, markup that stays text."""

import base64
import html.parser
import re

import pytest

from qwen_jax.errors import InputError
from qwen_jax.training import metrics, page, report, samples, workdir
from qwen_jax.training.accounts import Accounts
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.page import Table, Text

EVIL = "a|b <b>`*_x_*`</b>\n<script>alert(1)</script> [x](y)"


@pytest.fixture
def run(tmp_path):
    """30 steps, evaluated at every one, in two domains; the best at step 17."""
    recipes = {"a": lambda: OptimizerConfig(peak_lr=1e-3, warmup_steps=5)}
    workdir.prepare(
        tmp_path, OptimizerConfig(peak_lr=2e-5, warmup_steps=5), experiment="sft", recipe="a", recipes=recipes
    )
    writer = metrics.MetricsWriter(tmp_path, start=0)
    for step in range(31):
        loss = 2 + abs(step - 17) / 100
        scores = {"loss": loss, "perplexity": 9.0, "code/loss": loss + 1, "chat/loss": loss - 1}
        writer.write(step, {f"validation/{name}": value for name, value in scores.items()})
        figures = {"step_seconds": 0.1 * (step + 1), "tokens_per_second": 100.0, "model_flops_utilisation": 0.25}
        writer.write(step, {"loss": 1.5, **figures})
    writer.close()
    books = Accounts(
        starts=2, seconds={"step": 30.0, "compile": 10.0}, steps=30, weight=1200.0, flops_per_token=6e9,
        peak_flops=1e12, peak_source="measured", memory=dict(arguments=4e9, outputs=3e9, aliased=2e9, temporaries=5e9),
    )  # fmt: skip
    books.save(tmp_path)
    for step, said in ((0, EVIL), (20, "between"), (30, "after " * 200)):
        samples.write(tmp_path, step, [{"domain": "code", "prompt": "?", "reference": "!", "completion": said}])
    budget = report.Budget(rows=60, length=40, padding=0.25, epochs=[1.5, 0.125])
    report.write(tmp_path, title="sft a", budget=budget)
    return tmp_path


def cells(text: str, first: str) -> list[str]:
    """The row of a Markdown table that begins with a cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    assert len(lines) == 1, (first, lines)
    return [cell.strip() for cell in lines[0].strip("|").split(" | ")]


def test_it_says_what_the_run_says(run):
    text = (run / "report.md").read_text()
    assert cells(text, "--peak-lr") == ["--peak-lr", "0.001", "2e-05"] and "--warmup-steps" not in text
    assert "in 2 starts" in text and "![loss](plots/loss.png)" in text
    assert "2.1700 at step 0, 2.1300 at step 30, lowest 2.0000 at step 17." in text
    assert cells(text, "17") == ["17", "2.0000", "9.0000", "3.0000", "1.0000"]  # the best is shown, if not every one is
    assert len(re.findall(r"^\| \d+ \| \d\.\d{4} \|", text, re.MULTILINE)) <= report.MOST_ROWS + 2
    assert "Median step: 1.600 s, 100 tokens/s, 25.0% of peak." in text
    assert "6e+09 FLOPs per token" in text and "peak 1e+12 FLOP/s (measured)" in text
    assert cells(text, "places")[1] == "2,400" and cells(text, "tokens read")[1] == "1,800"
    assert cells(text, r"learned tokens (targets in the loss)")[1] == "1,200, 50.0% of places"
    assert cells(text, "epochs")[1] == "1.50, 0.12"
    assert "| step | 30.0 | 75.0% |" in text and cells(text, "compile")[1:] == ["10.0", "25.0%"]
    assert cells(text, "the train step, each device (arguments + outputs - aliased + temporaries)")[1] == "10.000"
    assert "between" not in text and "after after" in text and "after " * 100 not in text
    assert "jax" in text and "python" in text


def test_the_html_needs_no_other_file_and_holds_texts_as_texts(run):
    found = {"tags": set(), "cells": [], "sources": []}

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            found["tags"].add(tag)
            found["sources"] += [value for name, value in attrs if name in ("src", "href")]

        def handle_data(self, data):
            found["cells"].append(data)

    Reader().feed((run / "report.html").read_text())
    assert "script" not in found["tags"] and "b" not in found["tags"] and EVIL in found["cells"]
    (source,) = found["sources"]
    picture = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert picture == (run / "plots" / "loss.png").read_bytes() and picture[:4] == b"\x89PNG"


def test_a_report_that_cannot_be_written_is_one_line(run):
    (run / "plots" / "loss.png").unlink()
    (run / "plots").rmdir()
    (run / "plots").write_text("a file in its place")
    with pytest.raises(InputError, match="the report in .* cannot be written: File exists"):
        report.write(run, title="sft a")


def test_cells_of_a_markdown_table_are_text(tmp_path):
    page.write(tmp_path, "p", [Text("t", 1), Table(["x", "y"], [[EVIL, "1"], ["\\|", "2"]])])
    lines = (tmp_path / "p.md").read_text().splitlines()
    assert lines == [
        "# t", "", "| x | y |", "| --- | --- |",
        r"| a\|b \<b>\`\*\_x\_\*\`\</b>⏎\<script>alert(1)\</script> \[x](y) | 1 |", r"| \\\| | 2 |",
    ]  # fmt: skip


def test_what_differs_is_told_only_of_a_recipe_that_is_known(tmp_path):
    same = OptimizerConfig()
    for name, recipes, expected in (
        ("one", {"a": OptimizerConfig}, "Nothing: this is 'a' as it stands."),
        ("two", {"b": OptimizerConfig}, "Nothing is known: 'a' is a recipe of another experiment."),
    ):
        workdir.prepare(tmp_path / name, same, experiment="x", recipe="a", recipes=recipes)
        assert report.differences(workdir.read(tmp_path / name))[1].text == expected


def test_differences_of_configs_name_inner_fields_and_both_values():
    old = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": 0, "gone": 3}
    new = {"a": 1, "b": {"c": [1], "d": {"e": 5}}, "f": 9, "new": 4}
    found = dict(workdir.differences(old, new, ignoring={"f"}))
    assert found == {"b.c": ([1, 2], [1]), "b.d.e": (None, 5), "gone": (3, None), "new": (None, 4)}
