"""What `import qwen_jax` costs beside importing jax and flax. Prints JSON; ratio must stay under 1.5.

python benchmarks/import_time.py [--runs 7]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

OURS = "import qwen_jax; from qwen_jax import config, models, objectives"
THEIRS = "import jax, flax.linen"


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter that runs this code."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def main() -> None:
    """Runs both in turn and prints medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    pairs = [(seconds(OURS), seconds(THEIRS)) for _ in range(runs + 1)][1:]  # the first fills the caches
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(json.dumps({"ours_seconds": round(ours, 3), "jax_flax_seconds": round(theirs, 3), "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
