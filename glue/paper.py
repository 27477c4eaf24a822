"""The paper's tables and figures on real data, with seeds and intervals, MiniLM as the model.

    python -m glue.paper run [--tasks MRPC RTE] [--variants plain yoco] [--seeds 0 1 2]
    python -m glue.paper table 1|2|3|4|5|ablation|defaults|methods [--tasks MRPC ...]
    python -m glue.paper figure 2|3

A cell is one task, variant and seed. `run` writes each as one small JSON file under glue/results/;
what is there is skipped, and what was interrupted resumes. The same command may run several times
at once, since a cell that another process works on is skipped too. `table` and `figure` (which
needs matplotlib) read those files alone. In a cell, `commit` is that of the process that finished
it, `seconds` are those of its training and of each search, without the time between a stop and
`--resume`, and `passes` are examples times architectures drawn, without the teacher's forward.

What a cell does: the full MiniLM is fine-tuned (`plain`), the start of every variant with its seed;
from it `--steps` steps train a super-BERT; a search on the hold-out finds one sub-BERT with less
than 0.75 and one with less than 0.5 of the *encoder's* parameters (MiniLM's embeddings are half of
it and not elastic, so the paper's ratios of all parameters are out of reach); dev is read once for
each. What a variant needs are flags of `train` and `search`. MiniLM's figures (6 layers x 384) are
not comparable with BERT-base's.
"""

import contextlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import data
import yoco
from model import (Arch, BertConfig, SearchSpace, UserError, arithmetic, count_flops, count_params,
                   extract, load_bert, read_json, save_bert, write_json)

try:
    import fcntl
except ImportError:                                                  # Windows: one process only
    fcntl = None

RESULTS = Path(__file__).parent / "results"
TASKS = ("MRPC", "RTE", "CoLA", "STS-B", "SST-2")
SHARES = (0.75, 0.5)                                # budgets, of the encoder's parameters
PLAIN_EPOCHS = {"SST-2": 1}                         # else 3
HOLDOUT = {"SST-2": 0.02}                           # else 0.1: of SST-2 6,735 sentences
COMMON = ["--lr", "1e-4", "--batch-size", "32"]     # MiniLM wants more than the paper's 2e-5
PRECISION = "fp32"                                  # on every machine: tables compare the cells
SMALL_DELTA = 69 ** -0.5                            # theta of MiniLM has 3 + 6 x 11 dimensions

BEST = "--reorder --distill --depth-keeps even --stages all"

# variant: flags of train | flags of search
ELASTIC = {
    "yoco": ("", ""),
    "exploit only": ("--strategy exploit", ""),
    "explore only": ("--strategy explore", ""),
    "permuted losses": ("--shuffle", ""),
    "HAT": ("--strategy explore --stages all", "--method evolution"),
    "OFA": ("--strategy explore --distill", "--method evolution"),
    "reorder": ("--reorder", ""),
    "distill": ("--distill", ""),
    "even": ("--depth-keeps even", ""),
    "all stages at once": ("--stages all", ""),
    "reorder + distill": ("--reorder --distill", ""),
    "reorder + distill + even": ("--reorder --distill --depth-keeps even", ""),
    "best": (BEST, ""),
    "best, frozen teacher": (f"{BEST} --freeze-teacher", ""),
    "best, frozen teacher, long": (f"{BEST} --freeze-teacher", ""),
    "best, frozen teacher, tenfold": (f"{BEST} --freeze-teacher", ""),
    "best, exploit only": (f"{BEST} --strategy exploit", ""),
    "best, explore only": (f"{BEST} --strategy explore", ""),
    "best, permuted losses": (f"{BEST} --shuffle", ""),
    "small delta": (f"--delta {SMALL_DELTA:.4f}", ""),
    "lambda 4": ("--archs-per-step 4", ""),
    "lambda 4, small delta": (f"--archs-per-step 4 --delta {SMALL_DELTA:.4f}", ""),
}
LENGTH = {"lambda 4": 0.5, "lambda 4, small delta": 0.5,             # of --steps; else 1
          "best, frozen teacher, long": 3, "best, frozen teacher, tenfold": 10}
RATES = ("2e-4", "2e-5", "2e-6", "2e-7")


def tuned(variant):
    """The variants that fine-tune the sub-BERT that another found, one for each rate."""
    return [f"{variant}, tuned {rate}" for rate in RATES]


BANDS = {"A": (0.18, 0.36), "B": (0.36, 0.55), "C": (0.55, 0.73), "D": (0.73, 0.91)}
METHODS = ("sng", "evolution", "random")
METHOD_EVALUATIONS = 60
# Without elasticity: the first 3 layers, 3 of 6 evenly spaced, fine-tuned as they are. Then what
# needs the super-BERT of a variant: fine-tuning its sub-BERT, Fig. 3's methods, Tab. 1's bands.
OTHERS = (["plain", "first layers", "even layers", "methods", "methods of best", "bands",
           "bands of best"]
          + tuned("yoco") + tuned("best") + tuned("HAT") + tuned("OFA"))


# --------------------------------------------------------------------------------------------------
# Cells
# --------------------------------------------------------------------------------------------------

class Cell:
    """One task, variant and seed: what it needs, its commands, and the facts that it keeps."""

    def __init__(self, task, variant, seed, options):
        self.task, self.variant, self.seed, self.options = task, variant, seed, options
        self.steps = options.steps
        self.name = f"{task}-{variant}-{self.steps}-{seed}".replace(",", "").replace(" ", "_")
        self.data, self.holdout = f"{options.data}/{task}", HOLDOUT.get(task, 0.1)

    @property
    def path(self):
        """The JSON file of the result."""
        return RESULTS / f"paper-{self.name}.json"

    def out(self, kind=""):
        """A directory for a model of this cell."""
        return f"{self.options.work}/{self.name}{kind}"

    def other(self, variant):
        """The cell of another variant, finished first."""
        cell = Cell(self.task, variant, self.seed, self.options)
        cell.ensure(needed=True)
        return cell

    def ensure(self, needed=False):
        """Fill the cell, unless it is filled or another process is at it. needed: wait for that
        process; and fill it anew where its models are no longer there."""
        Path(self.options.work).mkdir(parents=True, exist_ok=True)
        RESULTS.mkdir(exist_ok=True)
        with open(self.out(".lock"), "w") as lock:
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | (0 if needed else fcntl.LOCK_NB))
            except BlockingIOError:
                return
            if self.path.exists() and (not needed or Path(self.out(), "run.json").exists()):
                return
            print(f"--- {self.name}", flush=True)
            self.commit = commit()
            write_json(self.path, **self.fill())

    def fill(self):
        """Do the work; the facts of the cell."""
        if self.variant in ("plain", "first layers", "even layers"):
            return self.plain()
        if self.variant.startswith("methods"):
            return self.methods()
        if self.variant.startswith("bands"):
            return self.bands()
        if ", tuned " in self.variant:
            return self.tuned()
        return self.elastic()

    def train(self, bert, *flags):
        """Run `train`, or take what is there; its run.json."""
        return self.command(self.out(), "train", "--data", self.data, "--bert", bert, *COMMON,
                            "--holdout", str(self.holdout), *flags)

    def search(self, out, model, *flags):
        """Run `search`, likewise."""
        return self.command(out, "search", "--model", model, "--evaluations",
                            str(self.options.evaluations), *flags)

    def command(self, out, *words):
        """Run a command of yoco.py to its end; its run.json."""
        if status := yoco.main([*words, "--seed", str(self.seed), "--precision", PRECISION,
                                "--out", out, "--resume"]):
            sys.exit(status)
        return read_json(Path(out) / "run.json")

    def facts(self, run, **more):
        """What every cell says, from the run.json of its training."""
        kept = {k: v for k, v in run["settings"].items() if k not in ("data", "bert")}   # paths
        drawn = kept["archs_per_step"] if "most likely" in run["holdout"] else 1
        return dict(task=self.task, variant=self.variant, seed=self.seed, steps=run["steps"],
                    passes=run["steps"] * kept["batch_size"] * drawn, commit=self.commit,
                    seconds=run["seconds"], hardware=run["hardware"], precision=run["precision"],
                    versions=run["versions"], settings=kept, **more)

    def plain(self):
        """Fine-tuning without elasticity, of MiniLM or of some of its layers."""
        bert, epochs = self.options.bert, PLAIN_EPOCHS.get(self.task, 3)
        if self.variant != "plain":
            torch.manual_seed(self.seed)                             # the classifier
            full = load_bert(bert, data.load_task(self.data).num_labels)
            full.config.depth_keeps = self.variant.split()[0]
            n, heads = full.config.num_hidden_layers // 2, full.config.num_attention_heads
            cut = extract(full, Arch([heads] * n, [full.config.intermediate_size] * n))
            save_bert(cut, self.out("-cut"), bert)
            bert = self.out("-cut")
        scale = epochs / yoco.EPOCHS.get(self.task, yoco.EPOCHS["default"])[2][-1]
        run = self.train(bert, "--stages", "largest", "--epochs", f"{scale:.6f}")
        config = BertConfig.load(self.out())
        return self.facts(run, scores=[dict(
            budget=1.0 if self.variant == "plain" else 0.5, arch=config.arch._asdict(),
            params=count_params(config, config.arch), flops=count_flops(config, config.arch),
            holdout=run["holdout"]["largest"], dev=scorer(self.out())(config.arch))])

    def elastic(self):
        """Train a super-BERT, search it under both budgets."""
        start, (train, search) = self.other("plain").out(), ELASTIC[self.variant]
        config = BertConfig.load(start)                              # of the same sizes
        kept, _ = data.split_holdout(data.load_task(self.data).train, self.holdout, self.seed)
        per_epoch = math.ceil(len(kept) / self.options.batch_size)
        last = yoco.make_stages(SearchSpace.for_config(config), self.task, per_epoch)[-1]
        scale = self.steps * LENGTH.get(self.variant, 1) / (last.first + last.steps)
        run = self.train(start, "--epochs", f"{scale:.6f}", "--batch-size",
                         str(self.options.batch_size), *train.split())
        scores = [dict(budget=1.0, arch=config.arch._asdict(), holdout=run["holdout"]["largest"],
                       dev=scorer(self.out())(config.arch))]
        for wanted in SHARES:
            found = self.search(self.out(f"-{wanted}"), self.out(), "--max-params",
                                str(budget(config, wanted)), *search.split())
            scores.append(dict(budget=wanted, **self.found(found, config)))
        return self.facts(run, uniform=uniform(self.out(), 20), scores=scores,
                          most_likely=run["holdout"]["most likely"])

    def found(self, run, config):
        """What is kept of a search, from its run.json."""
        arch = Arch(**run["arch"])
        return dict(share=share(config, arch), arch=run["arch"], params=run["params"],
                    flops=run["flops"], holdout={"score": run["selection_score"]}, dev=run["dev"],
                    asked=run["evaluations_asked"], run=run["evaluations_run"],
                    seconds=run["seconds"])

    def tuned(self):
        """Ten more epochs for the sub-BERT that a variant found under the smaller budget."""
        variant, rate = self.variant.split(", tuned ")
        source = self.other(variant).out(f"-{SHARES[-1]}")
        config = BertConfig.load(source)
        scale = 10 / yoco.EPOCHS.get(self.task, yoco.EPOCHS["default"])[2][-1]
        run = self.train(source, "--lr", rate, "--epochs", f"{scale:.6f}")
        return self.facts(run, scores=[dict(
            budget=SHARES[-1], arch=config.arch._asdict(),
            params=count_params(config, config.arch), flops=count_flops(config, config.arch),
            holdout=run["holdout"]["largest"], dev=scorer(self.out())(config.arch))])

    def methods(self):
        """Fig. 3: what three methods find in one super-BERT, by evaluations."""
        model = self.other("best" if "best" in self.variant else "yoco").out()
        config, curves = BertConfig.load(model), {}
        space, limit = SearchSpace.for_config(config), budget(config, SHARES[-1])
        for method in METHODS:
            out = self.out(f"-{method}")
            run = self.search(out, model, "--method", method, "--max-params", str(limit),
                              "--evaluations", str(METHOD_EVALUATIONS))
            known, curve = {}, []                        # [asked, best so far, mean of ten best]
            for asked, scores in yoco.scores_of(out, space):
                known |= {m: s for m, s in scores.items() if count_params(config, m) < limit}
                best = sorted(known.values())[-10:]
                curve.append([asked, best[-1], float(np.mean(best))] if best else [])
            curves[method] = dict(curve=curve, **self.found(run, config))
        return self.facts(read_json(Path(model) / "run.json"), methods=curves)

    def bands(self):
        """Tab. 1 and Fig. 2: the best in every band of sizes, of one super-BERT, one memo."""
        model = self.other("best" if "best" in self.variant else "yoco").out()
        config, memo, scores, seconds = BertConfig.load(model), {}, [], 0
        for band, (_, high) in BANDS.items():
            out = self.out(f"-{band}")
            if not Path(out, "run.json").exists():
                yoco.search(yoco.SearchSettings(
                    model=model, out=out, max_params=str(budget(config, high)), seed=self.seed,
                    evaluations=self.options.evaluations, precision=PRECISION, resume=True), memo)
            seconds += read_json(Path(out) / "run.json")["seconds"]
            memo |= yoco.scores_in(out, SearchSpace.for_config(config))
        dev = scorer(model)
        for band, (low, high) in BANDS.items():
            inside = {m: s for m, s in memo.items() if low <= share(config, m) < high}
            best = yoco.best_fit(inside, lambda m: count_params(config, m), math.inf)
            if best:
                scores.append(dict(band=band, share=share(config, best), arch=best._asdict(),
                                   params=count_params(config, best), dev=dev(best),
                                   flops=count_flops(config, best), holdout={"score": memo[best]}))
        return self.facts(read_json(Path(model) / "run.json"), scores=scores, evaluated=len(memo)
                          ) | dict(seconds=seconds)


def scorer(directory, on="dev"):
    """A function arch -> {metric: %} of a model that `train` or `search` wrote, on "dev" or on the
    "holdout" of its training."""
    run = yoco.read_run(directory)
    task = data.load_task(run["data"])
    parts = task.devs if on == "dev" else [data.split_holdout(task.train, *run["held_out"])[1]]
    parts = [data.encode(part, directory) for part in parts]
    device, autocast = arithmetic("auto", PRECISION)
    model = data.load_trained(directory, task).to(device)
    return data.scorer(model, parts, task.metric, device, autocast)


def uniform(directory, count):
    """The mean hold-out score of so many architectures drawn uniformly, always the same ones."""
    space, rng = SearchSpace.for_config(BertConfig.load(directory)), np.random.default_rng(0)
    pi, score = yoco.Categorical(space.categories), scorer(directory, "holdout")
    return float(np.mean([score(space.arch(pi.sample(rng)))["score"] for _ in range(count)]))


def fixed(config):
    """Parameters of embeddings and pooler: what a layer costs, taken off a model of one layer."""
    one, two = (count_params(config, Arch([1] * n, [1] * n)) for n in (1, 2))
    return 2 * one - two


def share(config, arch):
    """The part of the encoder's parameters that `arch` has."""
    rest = fixed(config)
    return (count_params(config, arch) - rest) / (count_params(config, config.arch) - rest)


def budget(config, part):
    """`--max-params` for so much of the encoder."""
    rest = fixed(config)
    return round(rest + part * (count_params(config, config.arch) - rest))


def commit():
    """The commit of this code, "+" where files other than results differ from it; "" outside a
    repository."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=RESULTS.parents[1], capture_output=True,
                              text=True, check=True).stdout.strip()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        differs = git("status", "--porcelain", "--untracked-files=no", "--", ":!glue/results")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(differs)
    return ""


# --------------------------------------------------------------------------------------------------
# Tables and figures, from the JSON files alone
# --------------------------------------------------------------------------------------------------

# Two-sided 95% quantiles of Student's t for 1 ... 9 degrees of freedom; the last serves for more.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def load(steps, tasks=None, variants=None, seeds=None):
    """{(task, variant): {seed: facts}} of the cells with so many steps, all or those named;
    UserError where they were not all run with one batch size and one number of evaluations."""
    cells, kinds = {}, set()
    for path in sorted(RESULTS.glob(f"paper-*-{steps}-*.json")):
        facts = read_json(path)
        wanted = all(not some or facts[name] in some for name, some in (
            ("task", tasks), ("variant", variants), ("seed", seeds)))
        if wanted and path.stem.split("-")[-2] == str(steps):
            cells.setdefault((facts["task"], facts["variant"]), {})[facts["seed"]] = facts
            if facts["variant"] in ELASTIC:
                kinds |= {(facts["settings"]["batch_size"], s.get("asked", 0))
                          for s in facts["scores"][1:]}
    if len(kinds) > 1:
        raise UserError(f"cells of {steps} steps mix (batch size, evaluations): {sorted(kinds)}; "
                        f"remove from {RESULTS} what does not belong")
    return cells


def at(part, on="dev"):
    """A getter of the score, on "dev" or "holdout", under a budget or in a band; None where a cell
    has none."""
    return lambda facts: next((s[on]["score"] for s in facts["scores"]
                               if s.get("budget", s.get("band")) == part), None)


def values(cells, task, variant, getter):
    """{seed: value} of one field of the table."""
    found = {seed: getter(facts) for seed, facts in cells.get((task, variant), {}).items()}
    return {seed: value for seed, value in found.items() if value is not None}


def spread(found):
    """'mean ± sample standard deviation (n)' of {seed: value}; empty where nothing is known."""
    if not found:
        return ""
    x = list(found.values())
    deviation = f" ± {np.std(x, ddof=1):.1f}" if len(x) > 1 else ""
    return f"{np.mean(x):.1f}{deviation} ({len(x)})"


def difference(found, reference):
    """The mean paired difference over common seeds, with its 95% interval."""
    x = [found[seed] - reference[seed] for seed in found if seed in reference]
    if len(x) < 2:
        return ""
    half = T95[min(len(x) - 2, 8)] * np.std(x, ddof=1) / math.sqrt(len(x))
    return f"{np.mean(x):+.1f} [{np.mean(x) - half:+.1f}, {np.mean(x) + half:+.1f}]"


def compare(cells, variants, fields):
    """Print a row per variant, and for every task and field, {name: getter}, a column, those that
    are empty left out. Each also has the paired difference from the first variant."""
    found = {(task, name): [values(cells, task, variant, getter) for variant in variants]
             for task in (*TASKS, "mean of all,") for name, getter in fields.items()}
    found = {column: rows for column, rows in found.items() if any(rows)}
    if not found:
        return
    print("| | " + " | ".join(map(" ".join, found)) + " |\n|---" + "|---" * len(found) + "|")
    for i, variant in enumerate(variants):
        less = [difference(rows[i], rows[0]) if i else "" for rows in found.values()]
        row = [spread(rows[i]) + ("; " + d if d else "") for rows, d in zip(found.values(), less)]
        if any(row):
            print(f"| {variant} | " + " | ".join(row) + " |")
    print()


QUOTED = """| *quoted from the paper's Tab. 2: BERT-base, its own row selected on dev* | | | | | |
| BERT-base, 110 M | 89.5 | 71.1 | 54.3 | | 92.7 |
| LayerDrop, 67 M | 85.9 | 65.2 | 45.4 | | 90.7 |
| DistilBERT, 67 M | 87.5 | 59.9 | 51.3 | | 91.3 |
| BERT-PKD, 67 M | 85.7 | 66.5 | 45.5 | | 91.3 |
| PD-BERT, 67 M | 87.2 | 66.7 | | | 91.1 |
| BERT-of-Theseus, 67 M | 89.0 | 68.2 | 51.1 | | 91.5 |
| MINILM, 67 M | 88.4 | 71.5 | 49.2 | | 92.0 |
| YOCO-BERT, 59 to 67 M | 90.3 | 72.9 | 59.8 | | 92.8 |"""


UNDER = {f"{part}x": at(part) for part in SHARES}
UNIFORM = {"drawn uniformly, hold-out": lambda facts: facts.get("uniform")}
FIELDS = {"largest": at(1.0), **UNDER, **UNIFORM}
OURS = ["best", *(f"best, frozen teacher{length}" for length in ("", ", long", ", tenfold"))]

# table: its parts; of each the rows, whose first is what the others are compared with, and fields
COMPARISONS = {
    "3": [(["yoco", "HAT", "OFA", *tuned("HAT"), *tuned("OFA")], UNDER)],
    "4": [(["yoco", "exploit only", "explore only", "permuted losses"], UNDER),
          (["best", "best, exploit only", "best, explore only", "best, permuted losses"], UNDER)],
    "5": [([variant, *tuned(variant)], {"0.5x": at(0.5)}) for variant in ("yoco", "best")],
    "ablation": [(["yoco", "reorder", "distill", "even", "all stages at once", "reorder + distill",
                   "reorder + distill + even", "best", "plain", "first layers", "even layers"],
                  FIELDS), (OURS, FIELDS)],
    "defaults": [(["yoco", "small delta", "lambda 4", "lambda 4, small delta"],
                  {"largest, hold-out": at(1.0, "holdout"),
                   "found at 0.5x, hold-out": at(0.5, "holdout"), **UNIFORM})],
}


def table(number, steps, cells, variants=None):
    """Print one table over the cells, which have so many steps; of `variants`, where given, one row
    each, compared with the first of them."""
    print(f"MiniLM (6 x 384; not comparable with BERT-base), {steps} steps of elastic training "
          "from plain fine-tuning.\nDev scores in % (MRPC: mean of accuracy and F1; CoLA: "
          "Matthews; STS-B: mean of Pearson and Spearman),\nwhere a column does not say hold-out: "
          "mean ± sample standard deviation (seeds); then, from\nthe second row on, the paired "
          "difference from the first row [95% interval].\n")
    if number in COMPARISONS:
        means = {("mean of all,", v): mean_of_tasks(cells, v) for v in ELASTIC}
        parts = COMPARISONS[number]
        for rows, fields in [(variants, parts[0][1])] if variants else parts:
            compare(cells | means, rows, fields)
    else:
        {"1": table_1, "2": table_2, "methods": table_methods}[number](cells)
    spent = [f for of_seed in cells.values() for f in of_seed.values()]
    hours = sum(part.get("seconds", 0) for f in spent for part in (       # else yoco's or best's
        f["methods"].values() if "methods" in f else (f, *f["scores"]))) / 3600
    print(f"\n{len(spent)} cells with {steps} steps: {hours:.1f} hours of one process each, on "
          f"{', '.join(sorted({f['hardware'] for f in spent}))}; "
          f"{sum(f['precision'] == 'bf16' for f in spent)} of them in bf16, the others in fp32.")


def heading(title):
    """Print the first two lines of a table with a column per task."""
    print(f"| {title} | " + " | ".join(TASKS) + " |\n" + "|---" * (1 + len(TASKS)) + "|")


def table_1(cells):
    """Bands of sizes."""
    for variant in ("bands", "bands of best"):
        heading(f"{variant}: part of the encoder")
        for band, (low, high) in BANDS.items():
            print(f"| {band}: {low} to {high} | " + " | ".join(
                spread(values(cells, task, variant, at(band))) for task in TASKS) + " |")
        print()


def table_2(cells):
    """Half of the encoder against all of it, the paper's rows, and what is kept over all tasks."""
    heading("")
    elastic = ["yoco", "reorder", *OURS]
    for variant in ("plain", "first layers", "even layers", *elastic):
        part = 1.0 if variant == "plain" else 0.5
        print(f"| {variant}, {part}x | " + " | ".join(
            spread(values(cells, task, variant, at(part))) for task in TASKS) + " |")
    for variant in elastic:
        print(f"| {variant}, less plain | " + " | ".join(difference(
            values(cells, task, variant, at(0.5)), values(cells, task, "plain", at(1.0)))
            for task in TASKS) + " |")
    print(QUOTED)
    longest = OURS[2:0:-1], OURS[:0:-1]                              # with long; with tenfold
    for variants in (*([v] for v in elastic[:4]), *longest):
        tasks, kept = kept_by_seed(cells, variants)
        if kept:
            print(f"\n{'; else '.join(variants)}, at half of the encoder keeps, in % of plain "
                  f"fine-tuning's mean over {', '.join(tasks)}, by seed: {spread(kept)}; less the "
                  f"aim, 99: {difference(kept, dict.fromkeys(kept, 99))}")


def table_methods(cells):
    """What three ways of searching one super-BERT find."""
    for variant, start in (("methods", ""), ("methods of best", "best: ")):
        rows = [start + method for method in METHODS]
        found = {(task, row): {seed: facts["methods"][method] for seed, facts in cells.get(
            (task, variant), {}).items()} for task in TASKS for row, method in zip(rows, METHODS)}
        compare(found, rows, {"hold-out, best": lambda f: f["curve"][-1][1],
                              "hold-out, mean of the ten best": lambda f: f["curve"][-1][2],
                              "dev of the best": lambda f: f["dev"]["score"]})


def mean_of_tasks(cells, variant):
    """{seed: the means over all tasks, as one cell}; only seeds that all tasks have."""
    found = [cells.get((task, variant), {}) for task in TASKS]
    means = {}
    for seed in set.intersection(*map(set, found)):
        def mean(getter):
            return float(np.mean([getter(facts[seed]) for facts in found]))
        means[seed] = dict(uniform=mean(lambda facts: facts["uniform"]), scores=[
            {on: {"score": mean(at(part, on))} for on in ("dev", "holdout")} | {"budget": part}
            for part in (1.0, *SHARES)])
    return means


def kept_by_seed(cells, variants):
    """The tasks that have one of the variants, and {seed: their mean dev score at half of the
    encoder, each of the first variant that it has, in % of the mean of `plain`}; only seeds that
    have all."""
    pairs = {}
    for task in TASKS:
        for variant in variants[::-1]:                               # the first one stays
            if half := values(cells, task, variant, at(0.5)):
                pairs[task] = half, values(cells, task, "plain", at(1.0))
    seeds = set.intersection(*(set(a) & set(b) for a, b in pairs.values())) if pairs else ()
    return list(pairs), {seed: 100 * sum(half[seed] for half, _ in pairs.values())
                         / sum(full[seed] for _, full in pairs.values()) for seed in sorted(seeds)}


def figure(number, cells):
    """Draw one figure of the cells to glue/results/figureN.svg."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "yoco"                     # the same file every time
    import matplotlib.pyplot as plt
    (figure_2 if number == "2" else figure_3)(plt, cells)
    plt.tight_layout()
    plt.savefig(RESULTS / f"figure{number}.svg", metadata={"Date": None})
    print(f"wrote {RESULTS / f'figure{number}.svg'}")


def figure_2(plt, cells):
    """Parameters and FLOPs against the dev score: a mark per seed, the means joined."""
    tasks = [t for t in TASKS if any((t, v) in cells for v in ("bands", "bands of best"))]
    if not tasks:
        raise UserError("no cells of the variant bands yet: python -m glue.paper run")
    _, axes = plt.subplots(len(tasks), 2, figsize=(8, 3.2 * len(tasks)), squeeze=False)
    for row, task in zip(axes, tasks):
        for axis, unit, name in zip(row, ("params", "flops"), ("million parameters",
                                                               "GFLOPs at 128 tokens")):
            for variant in ("bands", "bands of best", "plain", "first layers", "even layers"):
                rows = [s for f in cells.get((task, variant), {}).values() for s in f["scores"]]
                if rows:
                    x = np.array([s[unit] for s in rows]) / (1e6 if unit == "params" else 1e9)
                    y = np.array([s["dev"]["score"] for s in rows])
                    dots = axis.plot(x, y, "o", ms=3, alpha=0.5)[0]
                    groups = sorted({s.get("band", "") for s in rows})
                    inside = [[s.get("band", "") == g for s in rows] for g in groups]
                    axis.plot([x[i].mean() for i in inside], [y[i].mean() for i in inside], "o-",
                              color=dots.get_color(), label=variant)
            axis.set(xlabel=name, ylabel=f"{task} dev score")
        row[0].legend(fontsize=7)


def figure_3(plt, cells):
    """Best so far and the mean of the ten best on the hold-out, against evaluations: the mean over
    the seeds and their standard deviation."""
    rows = [(t, v) for t in TASKS for v in ("methods", "methods of best") if (t, v) in cells]
    if not rows:
        raise UserError("no cells of the variant methods yet: python -m glue.paper run")
    _, axes = plt.subplots(len(rows), 2, figsize=(8, 3.2 * len(rows)), squeeze=False)
    for row, (task, variant) in zip(axes, rows):
        of_seeds = cells[task, variant].values()
        for i, (axis, what) in enumerate(zip(row, ("best so far", "mean of the ten best"))):
            for method in METHODS:
                curves = [{p[0]: p[1 + i] for p in f["methods"][method]["curve"] if p}
                          for f in of_seeds]
                asked = sorted(set.intersection(*map(set, curves)))  # all seeds have found some
                means, spreads = (np.array([f([c[x] for c in curves]) for x in asked])
                                  for f in (np.mean, np.std))
                line, = axis.plot(asked, means, label=method)
                axis.fill_between(asked, means - spreads, means + spreads, alpha=0.15,
                                  color=line.get_color(), lw=0)
            axis.set(xlabel="evaluations", ylabel=f"{task} hold-out score")
            axis.set_title(what + ", in the super-BERT of best" * ("best" in variant), fontsize=9)
        row[0].legend(fontsize=7)


def main(argv=None):
    """Run one command; the exit status: 0; 2 after an error told in one line; 130 after Ctrl-C."""
    parser = yoco.Parser("glue.paper", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "table", "figure"))
    parser.add_argument("number", nargs="?", help="of the table (1 to 5, ablation, defaults, "
                                                  "methods) or figure (2, 3)")
    parser.add_argument("--tasks", nargs="+", help="to run: without it MRPC RTE; of a table or "
                                                   "figure: all")
    parser.add_argument("--variants", nargs="+", choices=[*ELASTIC, *OTHERS], metavar="VARIANT",
                        help="likewise: without it all; differences are then from the first")
    parser.add_argument("--seeds", type=int, nargs="+", help="likewise: without it 0 1 2, or all")
    parser.add_argument("--steps", type=int, default=300, help="of elastic training")
    parser.add_argument("--batch-size", type=int, default=16, help="of elastic training")
    parser.add_argument("--evaluations", type=int, default=40, help="of each search")
    parser.add_argument("--data", default="glue", help="where the tasks' directories are")
    parser.add_argument("--bert", default="all-MiniLM-L6-v2")
    parser.add_argument("--work", default="superbert/paper", help="where models go")
    known = dict(run=[None], table=["1", "2", *COMPARISONS, "methods"], figure=["2", "3"])
    try:
        options = parser.parse_args(argv)
        if options.number not in known[options.command]:
            parser.error(f"{options.command} knows {', '.join(map(str, known[options.command]))}")
        if options.batch_size < 1 or options.steps < 1:
            parser.error("--batch-size and --steps are at least 1")
        if options.command == "run":
            for task in options.tasks or TASKS[:2]:
                for variant in options.variants or ["plain", *ELASTIC, *OTHERS[1:]]:
                    for seed in options.seeds or range(3):
                        Cell(task, variant, seed, options).ensure()
            return 0
        cells = load(options.steps, options.tasks, options.variants, options.seeds)
        if options.command == "table":
            table(options.number, options.steps, cells, options.variants)
        else:
            figure(options.number, cells)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"glue.paper: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
