"""Compiles what a recipe would run, for chips that are not here: does it fit, what does it move, how fast at best.

    python -m launch.dry_run experiments.sft qwen2 --topology v5p-128 [--mesh fsdp=32,tensor=2] [--price 4.2] [--json]

Everything comes from the recipe's own `build(config, mesh)` with abstract arrays and the chips' real compiler (libtpu,
or jax's plugin for CUDA): pip install -e '.[aot]'. Flags of the recipe follow as in a run (--length 8192). Where the
step does not fit, the three cheapest changes that make it fit are searched and compiled; --search compiles meshes,
remat and microbatches and prints a table of those that fit. Of GPUs memory and communication are the compiler's, the
time is a roofline alone. Times are bounds from below: nothing has run.

Exit status: 0 it fits; 1 it does not; 2 bad input, told in one line.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

FUNCTIONS = ("train_step", "eval_step", "init")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the dry run's own flags; what it does not know are the recipe's."""
    found = argparse.ArgumentParser(
        prog="python -m launch.dry_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    found.add_argument("experiment", help="a module with RECIPES and build: experiments.sft")
    found.add_argument("recipe", help="a name of its RECIPES")
    found.add_argument("--topology", required=True, help="v5p-128, v6e-256, v5p:4x4x4, h100x64, …")
    found.add_argument("--slices", type=int, default=1, help="so many TPU slices, joined by the data-centre network")
    found.add_argument(
        "--mesh", default="", help="axes that are split, such as fsdp=64,tensor=2; the recipe's if empty"
    )
    found.add_argument("--functions", default=",".join(FUNCTIONS), help="of the Program: which to compile")
    found.add_argument("--price", type=float, default=0.0, help="of one chip for one hour; gives the cost of 1B tokens")
    found.add_argument("--search", action="store_true", help="try meshes, remat and microbatches")
    found.add_argument("--tries", type=int, default=12, help="how many variations to compile at most")
    found.add_argument("--json", action="store_true", help="print the report as JSON")
    found.add_argument("--out", type=Path, help="file to write the JSON to, besides")
    found.add_argument("--keep", type=Path, help="folder for what the compiler made: each program's text and memory")
    found.add_argument("--read", type=Path, help="folder that --keep left: report on that, and compile nothing")
    return found


def load(name: str, recipe: str, flags: list[str]):
    """Returns an experiment's module and the config of a recipe with its flags.

    Raises:
      InputError: where there is no such experiment or recipe, it has no `build`, or a flag is unknown.
    """
    from qwen_jax.errors import InputError
    from qwen_jax.training import command

    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(error.name or "?"):
            raise
        raise InputError(f"there is no module {name!r}; expected such as experiments.sft") from None
    if not hasattr(module, "build"):
        raise InputError(f"{name} has no build(config, mesh): it is made of other experiments, which can be dry run")
    return module, command.parse(module.__doc__, module.RECIPES, [recipe, "--workdir", "none", *flags])[2]


def compile_all(module, config, topology, functions, *, keep: Path | None = None, read: Path | None = None) -> dict:
    """Returns the report on one config: see `launch.reports`.

    Raises:
      InputError: where the mesh does not fit the slice, or does not divide the model or the batch.
    """
    from launch import compilers, figures, reports
    from qwen_jax import sharding

    built = module.build(config, sharding.make_mesh(config.mesh, compilers.devices(topology)))
    key = built.state.key
    arguments = {
        "train_step": (built.state, built.batch, *built.frozen),
        "eval_step": (built.state.params, built.batch, *built.frozen),
        "init": (key, *built.frozen),
    }
    chip, found = topology.of_chip, {}
    for name in functions:
        if read:
            found[name] = figures.read(read / name, chip)
        else:
            kept = keep / name if keep else None
            found[name] = figures.compile_function(getattr(built, name), arguments[name], chip, kept)
    return reports.make(config, built, topology, found)


def try_all(module, variations, topology, *, tries: int, enough: int) -> list[dict]:
    """Compiles the train step of variations until `enough` fit or `tries` are used up; returns reports with "flags"."""
    from launch import compilers
    from launch.figures import per_chip
    from qwen_jax import sharding
    from qwen_jax.errors import InputError

    found = []
    for flags, config in variations:
        if tries == 0 or sum(report["fits"] for report in found) == enough:
            break
        try:
            built = module.build(config, sharding.make_mesh(config.mesh, compilers.devices(topology)))
        except InputError:
            continue
        if per_chip(built.state) >= topology.of_chip.capacity:
            continue  # the state alone is too much
        report = compile_all(module, config, topology, ("train_step",)) | {"flags": flags}
        told = f"{report['step seconds']:.3g} s a step" if report["fits"] else "does not fit"
        print(f"[dry run] {flags}: {told}", file=sys.stderr, flush=True)
        tries, found = tries - 1, [*found, report]
    return found


def run(options: argparse.Namespace, flags: list[str]) -> dict:
    """Returns the whole report of a command line."""
    import dataclasses

    from launch import changes, compilers, reports, topologies
    from qwen_jax.errors import InputError

    topology = topologies.parse(options.topology, options.slices)
    functions = options.functions.split(",")
    if unknown := set(functions) - set(FUNCTIONS):
        raise InputError(f"--functions has {', '.join(sorted(unknown))}; expected of {', '.join(FUNCTIONS)}")
    compilers.find(topology)
    module, config = load(options.experiment, options.recipe, flags)
    config = dataclasses.replace(config, mesh=changes.mesh_of(options.mesh, topology, config))
    head = {"experiment": options.experiment, "recipe": options.recipe, "flags": flags} | reports.versions(topology)
    if options.search:
        found = try_all(module, changes.search(config, topology), topology, tries=options.tries, enough=options.tries)
        best = sorted((each for each in found if each["fits"]), key=lambda each: each["step seconds"])
        return reports.priced(
            head | {"fits": bool(best), "search": [*best, *(x for x in found if not x["fits"])]}, options
        )
    report = head | compile_all(module, config, topology, functions, keep=options.keep, read=options.read)
    step = report["functions"].get("train_step")
    if step and not step["fits"]:
        tried = try_all(module, changes.remedies(config), topology, tries=options.tries, enough=3)
        fitting = sorted((each for each in tried if each["fits"]), key=lambda each: each["step seconds"])
        report |= {"changes that make it fit": fitting, "changes tried": len(tried)}
    return reports.priced(report, options)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    options, flags = parser().parse_known_args(argv)
    from qwen_jax.errors import InputError

    try:
        report = run(options, flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from launch import reports

    text = json.dumps(report, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text if options.json else reports.text(report))
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
