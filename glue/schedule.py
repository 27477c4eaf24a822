"""Is half of the schedule enough? lambda = 2 architectures a step cost two passes, twice the
authors' compute per epoch. MiniLM (6 x 384) on MRPC, trained with a part of the authors' epochs.

    python -m glue.schedule run --scale 0.2 [--data glue/MRPC] [--bert DIR] [--seeds 0 1 2]
    python -m glue.schedule table

Every training is one small JSON file under glue/results/: the hold-out score of 40 architectures
drawn uniformly (the same for all) and of the largest, and the processor's seconds of the process
that finished it. What is there is skipped, and what was interrupted resumes.
"""

import argparse
import sys
import time

import numpy as np

import yoco
from glue.paper import RESULTS, uniform
from model import read_json, write_json


def run(options):
    """Train the seeds at one scale, and keep what the table needs."""
    for seed in options.seeds:
        out = f"{options.work}/mrpc-{options.scale}-{seed}"
        path = RESULTS / f"compute-{options.scale}-seed{seed}.json"
        if path.exists():
            continue
        start = time.process_time()
        # MiniLM wants a larger learning rate than the paper's 2e-5.
        if status := yoco.main(["train", "--data", options.data, "--bert", options.bert, "--seed",
                                str(seed), "--lr", "1e-4", "--epochs", options.scale, "--out", out,
                                "--resume"]):
            sys.exit(status)
        facts, seconds = yoco.read_run(out), time.process_time() - start
        write_json(path, scale=float(options.scale), seed=seed, steps=facts["steps"],
                   cpu_seconds=round(seconds), uniform=uniform(out, 40), holdout=facts["holdout"],
                   hardware=facts["hardware"], versions=facts["versions"])


def table():
    """Print the table over the seeds found in glue/results/: mean ± sample standard deviation."""
    print("| part of the epochs | seeds | steps | hold-out: drawn uniformly | largest | "
          "CPU seconds |")
    print("|---|---|---|---|---|---|")
    for scale in sorted({path.name.split("-")[1] for path in RESULTS.glob("compute-*.json")}):
        found = [read_json(path) for path in RESULTS.glob(f"compute-{scale}-*.json")]
        if len(found) > 1:
            scores = [[f["uniform"] for f in found],
                      [f["holdout"]["largest"]["score"] for f in found]]
            print(f"| {scale} | {len(found)} | {found[0]['steps']} | " + " | ".join(
                f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f}" for x in scores)
                + f" | {np.mean([f['cpu_seconds'] for f in found]):.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", default="glue/MRPC")
    parser.add_argument("--bert", default="all-MiniLM-L6-v2")
    parser.add_argument("--work", default="superbert", help="where the super-BERTs go")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--scale", default="0.1", help="the part of the authors' epochs")
    given = parser.parse_args()
    if given.command == "run":
        run(given)
    else:
        table()
