"""Three seeds of MiniLM (6 x 384) on MRPC: the price of elasticity, and what a search finds.

    python -m glue.minilm run --data DIR --bert DIR [--seeds 0 1 2]     train, search, fine-tune
    python -m glue.minilm table                                         print the table
    python -m glue.minilm compute --scale 0.2 ...       a part of the epochs: the score it brings

Each seed trains a super-BERT with a part of the authors' epochs (SCALE), searches it under three
budgets, and fine-tunes the full model without elasticity. Every result is one small JSON file under
glue/results/; what is there is skipped, and what was interrupted resumes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

import yoco

RESULTS = Path(__file__).parent / "results"
SCALE, EVALUATIONS, BUDGETS = "0.1", "60", ("20M", "17.4M", "15M")
COMMON = ["--lr", "1e-4", "--batch-size", "32"]     # MiniLM wants more than the paper's 2e-5


def cells(seed, data, bert, work):
    """(name, directory, command line) of everything that one seed runs, in order."""
    full, plain = f"{work}/superbert/mrpc-{seed}", f"{work}/superbert/plain-{seed}"
    given = ["--data", data, "--bert", bert, "--seed", str(seed), *COMMON]
    yield "largest", full, ["train", *given, "--epochs", SCALE, "--out", full]
    for budget in BUDGETS:
        out = f"{work}/subbert/mrpc-{seed}-{budget}"
        yield f"under {budget}", out, ["search", "--model", full, "--max-params", budget, "--seed",
                                       str(seed), "--evaluations", EVALUATIONS, "--out", out]
    yield "plain", plain, ["train", *given, "--stages", "largest", "--out", plain]


def run(seeds, data, bert, work):
    """Fill the cells of `seeds`, one JSON file each."""
    RESULTS.mkdir(exist_ok=True)
    for seed in seeds:
        for name, out, command in cells(seed, data, bert, work):
            path = RESULTS / f"minilm-mrpc-{name.replace(' ', '-')}-seed{seed}.json"
            if path.exists():
                continue
            if status := yoco.main([*command, "--resume"]):
                sys.exit(status)
            config = yoco.BertConfig.load(out)
            facts = {"params": yoco.count_params(config, config.arch),
                     **yoco.read_json(Path(out) / "run.json")}
            dev = facts.get("dev") or yoco.evaluate(yoco.EvalSettings(model=out, data=data))
            keep = ("params", "arch", "selection_score", "holdout", "evaluations_asked",
                    "evaluations_run", "steps", "lr", "seconds", "hardware", "versions")
            path.write_text(json.dumps(dict(name=name, seed=seed, dev=dev, **{
                k: facts[k] for k in keep if k in facts}), indent=1) + "\n")


def compute(seeds, data, bert, work, scale):
    """Train with `scale` of the authors' epochs; keep the hold-out score of 40 architectures drawn
    uniformly (the same for all), and the processor's seconds, which a pause does not change."""
    for seed in seeds:
        out = f"{work}/superbert/mrpc-{scale}-{seed}"
        path = RESULTS / f"compute-{scale}-seed{seed}.json"
        if path.exists():
            continue
        start = time.process_time()
        if status := yoco.main(["train", "--data", data, "--bert", bert, "--seed", str(seed),
                                *COMMON, "--epochs", scale, "--out", out, "--resume"]):
            sys.exit(status)
        facts, seconds = yoco.read_json(Path(out) / "run.json"), time.process_time() - start
        rng, config = np.random.default_rng(0), yoco.BertConfig.load(out)
        space = yoco.SearchSpace.for_config(config)
        pi = yoco.Categorical(space.categories)
        archs = [space.arch(pi.sample(rng)) for _ in range(40)]
        task = yoco.data.load_task(data)
        _, held = yoco.data.split_holdout(task.train, *facts["held_out"])
        score = yoco.scorer(yoco.load_trained(out, task),
                            [yoco.data.encode(held, out, facts["max_length"])], task.metric,
                            *yoco.arithmetic(yoco.EvalSettings()))
        path.write_text(json.dumps(dict(
            scale=float(scale), seed=seed, steps=facts["steps"], cpu_seconds=round(seconds),
            uniform=float(np.mean([score(arch)["score"] for arch in archs])),
            holdout=facts["holdout"], hardware=facts["hardware"], versions=facts["versions"]),
            indent=1) + "\n")


def spread(values):
    """Mean and sample standard deviation."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def table():
    """Print both tables over the seeds found in glue/results/."""
    print("| sub-BERT | seeds | million parameters | dev accuracy | dev F1 | their mean |")
    print("|---|---|---|---|---|---|")
    for name in ("plain", "largest", *(f"under {budget}" for budget in BUDGETS)):
        found = [json.loads(path.read_text()) for path in
                 sorted(RESULTS.glob(f"minilm-mrpc-{name.replace(' ', '-')}-seed*.json"))]
        if len(found) > 1:
            sizes = ", ".join(f"{f['params'] / 1e6:.1f}" for f in found)
            print(f"| {name} | {len(found)} | {sizes} | " + " | ".join(
                spread([f["dev"][metric] for f in found]) for metric in ("accuracy", "f1", "score"))
                + " |")
    print("\n| epochs | seeds | steps | hold-out: drawn uniformly | largest | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for scale in sorted({path.name.split("-")[1] for path in RESULTS.glob("compute-*.json")}):
        found = [json.loads(path.read_text()) for path in RESULTS.glob(f"compute-{scale}-*.json")]
        if len(found) > 1:
            print(f"| {scale} | {len(found)} | {found[0]['steps']} | "
                  f"{spread([f['uniform'] for f in found])} | "
                  f"{spread([f['holdout']['largest']['score'] for f in found])} | "
                  f"{np.mean([f['cpu_seconds'] for f in found]):.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "table", "compute"))
    parser.add_argument("--data", default="glue/MRPC")
    parser.add_argument("--bert", default="all-MiniLM-L6-v2")
    parser.add_argument("--work", default=".", help="where superbert/ and subbert/ go")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--scale", default=SCALE, help="compute: the part of the authors' epochs")
    options = parser.parse_args()
    if options.command == "run":
        run(options.seeds, options.data, options.bert, options.work)
    elif options.command == "compute":
        compute(options.seeds, options.data, options.bert, options.work, options.scale)
    else:
        table()
