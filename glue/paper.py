"""Run the paper's experiments on real data with MiniLM, and print their tables.

    python -m glue.paper run [--tasks MRPC RTE] [--variants core 4] [--seeds 0 1 2]
    python -m glue.paper collect [--cells DIR] [--results DIR]
    python -m glue.paper table choose|core|1|3|4|5|ablation|matters [--tasks MRPC ...]

`run` fills cells. A cell is one task, one variant and one seed. Its result is one JSON
file in a working directory that git ignores, superbert/paper/cells. `run` skips the
cells that have a result there, resumes the ones that were interrupted, and skips a cell
that another process is filling. You can therefore start the same command several times
at once. A cell names the commit of its code. `run` refuses to start while the project's
Python files differ from their commit.

`collect` adds the cells of the working directory to the store, one JSON Lines file for
each task in glue/results/. `table` and `python -m glue.plot results` read the store.

A variant is a way to train or to search. Its name is one of those defined below. The
name of a table means all variants in that table. A variant's name may be followed by
settings that replace the chosen ones: `lr=5e-5`, `epochs=3` (plain fine-tuning only) or
`length=0.5` (the fraction of the authors' epochs, elastic training only). Settings that
equal the chosen ones are dropped from the name. A variant that begins with the model of
another cell takes no settings.

An elastic cell does four things:

1. It trains a super-BERT, starting from the pretrained BERT.
2. It scores 20 uniformly drawn architectures on the hold-out set. Their mean says what the
   super-BERT is worth without a search.
3. It searches with the hold-out set for a sub-BERT below 0.75 and one below 0.5 of the encoder's
   parameters. (MiniLM's embeddings are half of its parameters, and they are not elastic.)
   HAT and OFA search by evolution, the other variants as the paper does.
4. It evaluates each of these sub-BERTs, and the largest architecture, once on dev.
"""

import dataclasses
import fcntl
import functools
import json
import math
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import yoco
from glue import run_program
from model import (Arch, BertConfig, count_flops, count_params, extract, load_bert, read_json,
                   save_bert, SearchSpace, select_device_and_precision, tokenizer_files,
                   user_errors_for, UserError, write_file, write_json)

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("MRPC", "RTE", "CoLA", "STS-B", "SST-2")
MEAN = "mean of tasks"

# The dev score of always giving the most frequent answer. It is 0 for the other tasks.
MAJORITY = {"MRPC": 74.8, "RTE": 52.7, "SST-2": 50.9}

# The budgets of every search, as shares of the encoder's parameters.
SHARES = (0.75, 0.5)
# The hold-out set is a tenth of train, except where this says otherwise. (SST-2: 1,347
# sentences.)
HOLDOUT = {"SST-2": 0.02}
BATCH_SIZE = 32
# The rate and the lengths were chosen on the hold-out set. A length is a fraction of the
# authors' epochs. A task that is not listed has length 1.
RATE = 1e-4
LENGTHS = {"MRPC": 0.5, "CoLA": 0.25, "STS-B": 0.25, "SST-2": 0.125}
# Plain fine-tuning takes 10 epochs, except where this says otherwise.
PLAIN_EPOCHS = {"SST-2": 2}

# A variant may have cells in both precisions. Then the tables show the first of these.
PRECISIONS = ("fp32", "bf16")

# How many architectures a cell of `matters` draws.
NUM_DRAWN = 300

# ---- Variants ------------------------------------------------------------------------------------

# Ordinary fine-tuning: of all layers, or of a BERT that has only the first half of them.
PLAIN = ("plain", "truncated")

# Elastic training, with the flags of `yoco.py train`.
ELASTIC = {
    "paper": "--recipe paper",
    "best": "--recipe best",
    "HAT": "--strategy explore --stages all",
    "OFA": "--strategy explore --distill",
    "best no-reorder": "--recipe best --no-reorder",
    "best no-distill": "--recipe best --no-distill",
    "best first": "--recipe best --keep-layers first",
    "best progressive": "--recipe best --stages progressive",
}
STRATEGIES = ("exploit", "explore", "noise")
ELASTIC |= {f"{recipe} {strategy}": f"--recipe {recipe} --strategy {strategy}"
            for recipe in ("paper", "best") for strategy in STRATEGIES}

# Further fine-tuning of the sub-BERT that a variant found, at several rates.
TUNED = {variant: [f"{variant} tuned {rate}" for rate in ("2e-4", "2e-5", "2e-6", "2e-7")]
         for variant in ("paper", "best", "HAT", "OFA")}

# Searches of a super-BERT that another cell has trained: one for each band of sizes
# (shares of the encoder's parameters), and three by different methods.
BANDED = ["bands of paper", "bands of best"]
BANDS = {"A": (0.18, 0.36), "B": (0.36, 0.55), "C": (0.55, 0.73), "D": (0.73, 0.91)}
MATTERS = ["matters of paper", "matters of best"]
METHODS = ("sng", "evolution", "random")

# The type of a variant says which function fills its cells.
VARIANT_TYPES = {
    **dict.fromkeys(PLAIN, "plain"),
    **dict.fromkeys(ELASTIC, "elastic"),
    **dict.fromkeys(BANDED, "bands"),
    **dict.fromkeys(MATTERS, "matters"),
    **dict.fromkeys(sum(TUNED.values(), []), "tuned"),
}

# The choice of rate and length: a grid for plain fine-tuning, and for each recipe the
# chosen settings with one of them changed.
CHANGES = ("lr=2e-5", "lr=5e-5", "length=1", "length=0.5", "length=0.25")
CHOICE_PLAIN = [f"plain lr={lr} epochs={epochs}"
                for lr in ("2e-5", "5e-5", "1e-4") for epochs in (3, 10)]
CHOICE_PAPER = ["paper", *(f"paper {change}" for change in CHANGES)]
CHOICE_BEST = ["best", *(f"best {change}" for change in CHANGES)]

# The parts of each table, and the variants (rows) of each part. The first row of a part
# is the one that its other rows are compared with.
TABLES = {
    "choose": [CHOICE_PLAIN, CHOICE_PAPER, CHOICE_BEST],
    "core": [
        ["plain", "plain lr=2e-5", "truncated", "truncated epochs=3", "paper", "best"],
        ["truncated", "truncated epochs=3", "paper", "best"],
        ["paper", "best"]],
    "1": [BANDED],
    "3": [["paper", "HAT", "OFA", *TUNED["HAT"], *TUNED["OFA"]]],
    "4": [[recipe, *(f"{recipe} {strategy}" for strategy in STRATEGIES)]
          for recipe in ("paper", "best")],
    "5": [[recipe, *TUNED[recipe]] for recipe in ("paper", "best")],
    "ablation": [["best", "best no-reorder", "best no-distill", "best first", "best progressive",
                  "paper"]],
    "matters": [MATTERS],
}


# The settings that may follow the name of a variant, by its type.
ALLOWED_SETTINGS = {"plain": ("lr", "epochs"), "elastic": ("lr", "length"), "tuned": (),
                    "bands": (), "matters": ()}


def split_variant(variant):
    """Split a variant into its name and its settings.

    Raises UserError if there is no variant of this name, if it does not take these
    settings, or if the value of a setting is not a positive number.

    >>> split_variant("best lr=5e-5")
    ('best', {'lr': '5e-5'})
    """
    words = variant.split()
    base = " ".join(word for word in words if "=" not in word)
    pairs = [word.split("=", 1) for word in words if "=" in word]
    if base not in VARIANT_TYPES:
        raise UserError(f"no variant {variant!r}: use one of {', '.join(VARIANT_TYPES)}")
    allowed = ALLOWED_SETTINGS[VARIANT_TYPES[base]]
    for name, value in pairs:
        if name not in allowed:
            known = " and ".join(f"{setting}=" for setting in allowed) or "no settings"
            raise UserError(f"variant {variant!r}: {base!r} does not take {name}=, it takes "
                            f"{known}")
        if not is_positive(value):
            raise UserError(f"variant {variant!r}: {name}={value} is not a positive number: "
                            f"write it like {name}=0.5")
    settings = dict(pairs)
    if len(settings) < len(pairs):
        raise UserError(f"variant {variant!r} names a setting twice: leave one out")
    return base, settings


def chosen_settings(task, base):
    """Return the settings that were chosen for a variant and a task, {name: number}."""
    if VARIANT_TYPES[base] == "plain":
        return {"lr": RATE, "epochs": PLAIN_EPOCHS.get(task, 10)}
    if VARIANT_TYPES[base] == "elastic":
        return {"lr": RATE, "length": LENGTHS.get(task, 1)}
    if VARIANT_TYPES[base] == "tuned":
        return {"lr": float(base.split()[-1]), "epochs": 10}
    return {}


def canonical_variant(task, variant):
    """Return the name under which the cells of a variant and a task are stored.

    The settings that equal the chosen ones are dropped. The others get a fixed order and
    number format. Raises UserError like `split_variant`.

    >>> canonical_variant("MRPC", "plain epochs=3.0 lr=0.00002")
    'plain lr=2e-5 epochs=3'
    >>> canonical_variant("MRPC", "plain lr=1e-4 epochs=10")
    'plain'
    """
    base, settings = split_variant(variant)
    words = [base]
    for name, chosen in chosen_settings(task, base).items():
        number = Decimal(settings.get(name, str(chosen))).normalize()
        if number != Decimal(str(chosen)):
            # A rate has an exponent (2e-5), the other settings have none (0.5).
            words.append(f"{name}={number:e}" if name == "lr" else f"{name}={number:f}")
    return " ".join(words)


def is_positive(text):
    """Return whether a text is a positive, finite number.

    >>> [is_positive(text) for text in ("2e-5", "0", "inf", "abc")]
    [True, False, False, False]
    """
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


# ---- Statistics of one score over seeds, {seed: score} -------------------------------------------

# Two-sided 95% quantiles of Student's t for 1 to 9 degrees of freedom. The last serves
# for more.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_and_deviation(scores):
    """Return the mean and the sample standard deviation (None for a single score)."""
    values = list(scores.values())
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), deviation


def paired_difference(scores, reference):
    """Return the mean difference over the common seeds, and half of its 95% interval.

    With no common seed, both are None. With one common seed, only the interval is None.
    """
    differences = {seed: scores[seed] - reference[seed]
                   for seed in scores if seed in reference}
    if not differences:
        return None, None
    mean, deviation = mean_and_deviation(differences)
    if deviation is None:
        return mean, None
    n = len(differences)
    return mean, T95[min(n - 2, 8)] * deviation / math.sqrt(n)


def format_mean(scores, reference=None):
    """Format scores as "mean ± sample standard deviation (seeds)".

    With a reference, the difference follows, and its 95% interval in brackets. Parts
    that the number of seeds does not allow are left out. Without any scores the text is
    empty.

    >>> format_mean({0: 3.0, 1: 5.0, 2: 10.0}, {0: 1.0, 1: 4.0, 2: 7.0})
    '6.0 ± 3.6 (3); +2.0 [-0.5, +4.5]'
    """
    if not scores:
        return ""
    mean, deviation = mean_and_deviation(scores)
    text = f"{mean:.1f}"
    if deviation is not None:
        text += f" ± {deviation:.1f}"
    text += f" ({len(scores)})"
    difference, half_width = paired_difference(scores, reference or {})
    if difference is not None:
        text += f"; {difference:+.1f}"
    if half_width is not None:
        text += f" [{difference - half_width:+.1f}, {difference + half_width:+.1f}]"
    return text


# ---- Budgets, and two searches to compare with the paper's ---------------------------------------

def encoder_budget(config, share):
    """Return the `--max-params` for a share of the encoder's parameters."""
    # 2 * (rest + layer) - (rest + 2 * layer) = rest, the embeddings and the pooler.
    one_layer = count_params(config, Arch([1], [1]))
    two_layers = count_params(config, Arch([1, 1], [1, 1]))
    rest = 2 * one_layer - two_layers
    return round(rest + share * (count_params(config, config.arch) - rest))


def draw_below(ctx, limit, draw_choices):
    """Return the first drawn architecture that costs less than the limit.

    `draw_choices` draws the choices of one architecture. After 10,000 failures the
    smallest architecture is returned. `ctx` is made by `load_run`.
    """
    for _ in range(10_000):
        arch = ctx.space.arch(draw_choices())
        if ctx.cost(arch) < limit:
            return arch
    return ctx.space.smallest()


def propose_random(ctx, limit, rng, *_):
    """Return an architecture below the limit, drawn uniformly."""
    pi = yoco.Categorical(ctx.space.categories)
    return draw_below(ctx, limit, lambda: pi.sample(rng))


def propose_evolution(ctx, limit, rng, scores, evaluations):
    """Return the next architecture of HAT's evolutionary search (Wang et al. 2020).

    The first generation is 125 random architectures. Every later generation is 100
    children of the 25 best architectures of all complete generations. `scores` is
    {arch: score} of this search, in the order of evaluation.
    """
    # CHOICE: the three numbers shrink in proportion if the search has fewer than 1000
    # evaluations. A generation counts distinct architectures.
    scale = min(1, evaluations / 1000)
    first_size = max(1, round(125 * scale))
    later_size = max(1, round(100 * scale))
    num_parents = max(1, round(25 * scale))
    if len(scores) < first_size:
        return propose_random(ctx, limit, rng)

    num_later = (len(scores) - first_size) // later_size
    complete = list(scores)[:first_size + num_later * later_size]
    parents = sorted(complete, key=lambda arch: -scores[arch])[:num_parents]
    pi = yoco.Categorical(ctx.space.categories)

    def draw_child():
        """Draw the choices of a child, half of the time by mutation, otherwise by crossover.

        A mutation redraws each choice of one parent with probability 0.3. A crossover
        takes each choice from either of two parents.
        """
        first, second = (ctx.space.choices(parents[i])
                         for i in rng.integers(len(parents), size=2))
        random_choices = pi.sample(rng)
        mutates = rng.random() < 0.5
        if mutates:
            alternatives, probability = random_choices, 0.3
        else:
            alternatives, probability = second, 0.5
        child = []
        for choice, alternative, random_choice in zip(first, alternatives, random_choices):
            if rng.random() < probability:
                choice = alternative
            # A parent has no choice (None) for a layer that it lacks. The child may
            # have the layer.
            child.append(random_choice if choice is None else choice)
        return child

    return draw_below(ctx, limit, draw_child)


def search_by(propose, ctx, limit, evaluate, cache, evaluations, seed):
    """Search with a `propose` function, and return {arch: score} of all proposals.

    `evaluate` returns {metric: %} of an architecture. `cache` is {arch: score} of
    architectures that need no evaluation. The new scores are added to it.
    """
    rng = np.random.default_rng(seed)
    scores = {}
    for _ in range(evaluations):
        arch = propose(ctx, limit, rng, scores, evaluations)
        if arch not in cache:
            cache[arch] = evaluate(arch)["score"]
        scores[arch] = cache[arch]
    return scores


# ---- Cells ---------------------------------------------------------------------------------------

def load_run(directory, options):
    """Load a model that `train` wrote, with everything that scoring needs.

    Raises UserError if there is no finished run, or if its files have changed.

    Returns a namespace:
        run         the contents of run.json
        start       the time when loading began
        model       the model, on `device`
        config, space       its BertConfig and its SearchSpace
        device, autocast    where it computes, and in which precision
        cost        a function from an architecture to its number of parameters
        encode      a function that tokenizes examples
        splits      {"holdout": [examples], "dev": [examples] or for MNLI two lists}
        metric      the task's metric
    """
    run = yoco.read_run(directory)
    start = time.perf_counter()
    encode = data.make_encoder(directory)
    device, autocast = select_device_and_precision(options.device, options.precision)
    task = data.load_task(run["data"])
    _, holdout_set = data.split_holdout(task.train, *run["held_out"])
    model = data.load_trained(directory, task).to(device)
    return SimpleNamespace(
        run=run, start=start, model=model, config=model.config, device=device, autocast=autocast,
        space=yoco.search_space(model.config),
        cost=functools.partial(count_params, model.config), encode=encode,
        splits={"holdout": [holdout_set], "dev": task.devs}, metric=task.metric)


def make_evaluators(ctx):
    """Return {"holdout": evaluator, "dev": evaluator}.

    An evaluator is a function from an architecture to {metric: %}.
    """
    evaluators = {}
    for split, parts in ctx.splits.items():
        encoded = [ctx.encode(part) for part in parts]
        evaluators[split] = data.make_evaluator(ctx.model, encoded, ctx.metric, ctx.device,
                                                ctx.autocast)
    return evaluators


def arch_facts(budget, config, arch, holdout, evaluators):
    """Return the facts of one architecture, after evaluating it on dev."""
    return dict(budget=budget, arch=arch._asdict(), params=count_params(config, arch),
                flops=count_flops(config, arch), holdout=holdout, dev=evaluators["dev"](arch))


def committed_code():
    """Return the commit of the project's Python files.

    Raises UserError if one of them differs from the commit, or if git knows no commit.
    A cell could then not say by which code it was made.
    """
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True,
                              check=True).stdout

    try:
        commit = git("rev-parse", "--short", "HEAD").strip()
        # Untracked files count too, because the program may import them.
        changed = git("status", "--porcelain", "--untracked-files=all", "--", ":(glob)*.py",
                      ":(glob)glue/*.py")
    except (OSError, subprocess.CalledProcessError):
        raise UserError("a cell names the commit of its code, and git finds none: run this "
                        "program in a clone made by git") from None
    if changed:
        # A line of git holds two letters, a blank and the name.
        names = ", ".join(line[3:] for line in changed.splitlines())
        raise UserError(f"a cell names the commit of its code, and these files differ from "
                        f"{commit}: {names}: commit them first")
    return commit


def cells_directory(options):
    """Return the working directory into which `run` writes, and which `collect` reads."""
    return Path(options.cells or f"{options.work}/cells")


class Cell:
    """One task, one variant and one seed, with the code that fills its result file."""

    def __init__(self, task, variant, seed, options):
        self.task, self.seed, self.options = task, seed, options
        self.variant = canonical_variant(task, variant)
        self.base, changed_settings = split_variant(self.variant)
        self.settings = chosen_settings(task, self.base) | changed_settings
        self.name = f"{task}-{self.variant}-{seed}".replace(" ", "_")
        self.path = cells_directory(options) / f"paper-{self.name}.json"
        self.model_dir = f"{options.work}/{self.name}"

    def ensure(self, needed=False):
        """Fill the cell, unless it has a result or another process is filling it.

        Set `needed` if another cell needs the model of this one. The call then waits for
        the other process, and fills the cell again if its model is gone.
        """
        for path in (Path(self.model_dir), self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.model_dir + ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if needed else fcntl.LOCK_NB))
            except BlockingIOError:
                return
            has_model = Path(self.model_dir, "run.json").exists()
            if self.path.exists() and (has_model or not needed):
                return
            print(f"--- {self.name}", flush=True)
            fill_functions = {
                "plain": self.fine_tune,
                "elastic": self.train_and_search,
                "tuned": self.tune_further,
                "bands": self.search_bands,
                "matters": self.compare_searches,
            }
            facts = fill_functions[VARIANT_TYPES[self.base]]()
            write_json(self.path, task=self.task, variant=self.variant, seed=self.seed,
                       commit=self.options.commit, **facts)

    def require(self, variant):
        """Return the filled cell of another variant, with the same task and seed."""
        cell = Cell(self.task, variant, self.seed, self.options)
        cell.ensure(needed=True)
        return cell

    def run_yoco(self, *words):
        """Run a command of yoco.py, and raise SystemExit if it fails."""
        status = yoco.main([*words, "--seed", str(self.seed), "--device", self.options.device,
                            "--precision", self.options.precision, "--resume"])
        if status:
            raise SystemExit(status)

    def epochs(self, pretrained):
        """Return for how many epochs this cell trains."""
        if "epochs" in self.settings:
            return float(self.settings["epochs"])
        # We ask for one step per epoch, so the number of steps is the authors' number of
        # epochs.
        space = SearchSpace.for_config(BertConfig.load(pretrained))
        last_stage = yoco.make_stages(space, self.task, 1)[-1]
        return float(self.settings["length"]) * (last_stage.first_step + last_stage.num_steps)

    def train(self, pretrained, *flags):
        """Run `train`, which resumes an earlier training, and load the result."""
        self.run_yoco(
            "train", "--data", f"{self.options.data}/{self.task}", "--bert", pretrained,
            "--out", self.model_dir, "--lr", str(float(self.settings["lr"])),
            "--epochs", str(self.epochs(pretrained)), "--batch-size", str(BATCH_SIZE),
            "--holdout", str(HOLDOUT.get(self.task, 0.1)), *flags)
        return load_run(self.model_dir, self.options)

    def search(self, superbert, budgets):
        """Run `search` for all budgets. Return each run.json, and {arch: score} of all."""
        out = self.model_dir + "-found"
        self.run_yoco("search", "--model", superbert, "--out", out, "--evaluations",
                      str(self.options.evaluations), "--max-params", *map(str, budgets))
        # With several budgets, `search` writes one directory for each.
        paths = [Path(out)]
        if len(budgets) > 1:
            paths = [Path(out, str(budget)) for budget in budgets]
        space = SearchSpace.for_config(BertConfig.load(superbert))
        scores = {}
        for path in paths:
            # The first line of a log is its header.
            for line in (path / "log.jsonl").read_text().splitlines()[1:]:
                record = json.loads(line)
                scores[space.arch(record["choices"])] = record["score"]
        return [read_json(path / "run.json") for path in paths], scores

    def facts(self, ctx, **results):
        """Return the facts that every cell records, followed by this cell's results.

        The steps, hardware, precision, versions and settings are those of the training.
        The seconds include the training if this cell did it.
        """
        # The two settings that are left out are paths on this machine.
        settings = {name: value for name, value in ctx.run["settings"].items()
                    if name not in ("data", "bert")}
        seconds = time.perf_counter() - ctx.start
        if VARIANT_TYPES[self.base] in ("plain", "elastic", "tuned"):
            seconds += ctx.run["seconds"]
        names = ("steps", "hardware", "precision", "versions")
        of_training = {name: ctx.run[name] for name in names}
        return {**of_training, "seconds": seconds, "settings": settings,
                "evaluations": self.options.evaluations, **results}

    def truncate(self):
        """Write a BERT with the first half of the layers, and return its directory."""
        task = data.load_task(f"{self.options.data}/{self.task}")
        # The seed decides the initial weights of the classifier.
        torch.manual_seed(self.seed)
        model = load_bert(self.options.bert, task.num_labels, task.labels)
        half = model.config.num_hidden_layers // 2
        truncated = extract(model, Arch(*(sizes[:half] for sizes in model.config.arch)))
        # `extract` lists the sizes of every layer. All layers are full here, so drop the
        # lists and save an ordinary, smaller BERT.
        truncated.config = dataclasses.replace(truncated.config, layer_heads=None,
                                               layer_ffn_sizes=None)
        directory = self.model_dir + "-cut"
        save_bert(truncated, directory, tokenizer_files(self.options.bert))
        return directory

    def fine_tune(self):
        """Fine-tune without elasticity: the whole BERT, or the first half of its layers."""
        pretrained, share = self.options.bert, 1.0
        if self.base == "truncated":
            pretrained, share = self.truncate(), SHARES[-1]
        return self.score_largest(self.train(pretrained, "--stages", "largest"), share)

    def score_largest(self, ctx, share):
        """Return the facts of a BERT that is not elastic.

        share: its budget, the largest share of the encoder's parameters that it may have.
        """
        evaluators, arch = make_evaluators(ctx), ctx.config.arch
        scores = [arch_facts(share, ctx.config, arch, evaluators["holdout"](arch), evaluators)]
        return self.facts(ctx, scores=scores)

    def train_and_search(self):
        """Train a super-BERT, and search it under both budgets."""
        ctx = self.train(self.options.bert, *ELASTIC[self.base].split())
        evaluators = make_evaluators(ctx)
        limits = [encoder_budget(ctx.config, share) for share in SHARES]

        # The mean score of 20 architectures on the hold-out set, drawn uniformly.
        pi, rng = yoco.Categorical(ctx.space.categories), np.random.default_rng(0)
        uniform = [evaluators["holdout"](ctx.space.arch(pi.sample(rng)))["score"]
                   for _ in range(20)]

        scores = [arch_facts(1.0, ctx.config, ctx.config.arch, ctx.run["holdout"]["largest"],
                             evaluators)]
        winners = []
        if self.base in ("HAT", "OFA"):
            cache = {}
            for limit in limits:
                found = search_by(propose_evolution, ctx, limit, evaluators["holdout"], cache,
                                  self.options.evaluations, self.seed)
                arch = yoco.best_fit(found, ctx.cost, limit)
                winners.append((arch, found[arch]))
        else:
            for result in self.search(self.model_dir, limits)[0]:
                winners.append((Arch(**result["arch"]), result["selection_score"]))
        for share, (arch, score) in zip(SHARES, winners):
            scores.append(arch_facts(share, ctx.config, arch, {"score": score}, evaluators))
        return self.facts(ctx, uniform=float(np.mean(uniform)), scores=scores)

    def tune_further(self):
        """Fine-tune the smallest sub-BERT that a variant found for ten more epochs."""
        variant, _ = self.base.split(" tuned ")
        cell = self.require(variant)
        ctx = load_run(cell.model_dir, self.options)
        winner = Arch(**read_json(cell.path)["scores"][-1]["arch"])
        directory = self.model_dir + "-cut"
        save_bert(extract(ctx.model, winner), directory, tokenizer_files(cell.model_dir))
        return self.score_largest(self.train(directory, "--stages", "largest"), SHARES[-1])

    def search_bands(self):
        """Find the best sub-BERT in every band of sizes of one super-BERT (Tab. 1).

        Each band has one search, with the band's upper end as its budget. A band takes its
        best sub-BERT from the scores of all searches.
        """
        superbert = self.require(self.base.split()[-1]).model_dir
        ctx = load_run(superbert, self.options)
        evaluators = make_evaluators(ctx)
        limits = [encoder_budget(ctx.config, high) for _, high in BANDS.values()]
        _, found = self.search(superbert, limits)
        scores = []
        for band, (low, high) in BANDS.items():
            min_params = encoder_budget(ctx.config, low)
            in_band = {arch: score for arch, score in found.items()
                       if ctx.cost(arch) >= min_params}
            arch = yoco.best_fit(in_band, ctx.cost, encoder_budget(ctx.config, high))
            if arch:
                scores.append(arch_facts(band, ctx.config, arch, {"score": found[arch]},
                                         evaluators))
        return self.facts(ctx, evaluated=len(found), scores=scores)

    def compare_searches(self):
        """Compare three search methods with randomly drawn architectures (Fig. 3).

        All of them are below the smaller budget. The facts hold the sub-BERT that each
        method found, and the depth, hold-out score and dev score of each drawn
        architecture.
        """
        superbert = self.require(self.base.split()[-1]).model_dir
        ctx = load_run(superbert, self.options)
        evaluators = make_evaluators(ctx)
        limit = encoder_budget(ctx.config, SHARES[-1])

        rng = np.random.default_rng(self.seed)
        drawn = []
        for _ in range(NUM_DRAWN):
            arch = propose_random(ctx, limit, rng)
            holdout_score = evaluators["holdout"](arch)["score"]
            drawn.append([arch.depth, holdout_score, evaluators["dev"](arch)["score"]])

        methods = {}
        for method in METHODS:
            if method == "sng":
                found = self.search(superbert, [limit])[1]
            else:
                propose = propose_random if method == "random" else propose_evolution
                # With the seed used above, the search would draw the same architectures
                # again.
                found = search_by(propose, ctx, limit, evaluators["holdout"], {},
                                  self.options.evaluations, self.seed + 1000)
            arch = yoco.best_fit(found, ctx.cost, limit)
            methods[method] = arch_facts(method, ctx.config, arch, {"score": found[arch]},
                                         evaluators)
        num_examples = {split: sum(map(len, parts)) for split, parts in ctx.splits.items()}
        return self.facts(ctx, drawn=drawn, methods=methods, examples=num_examples)


# ---- The store: one JSON Lines file per task -----------------------------------------------------

def cell_key(facts):
    """Return the fields that identify a stored cell, in the order of the store."""
    return facts["task"], facts["variant"], facts["precision"], facts["seed"]


def read_store(directory):
    """Return all cells of a directory, {cell_key: facts}.

    Raises UserError, with the file and the line, if a line is damaged.
    """
    store = {}
    for path in sorted(Path(directory).glob("*.jsonl")):
        headers = {}                                # {(variant, precision): header}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            with user_errors_for(f"{path}, line {number},", "is not a line of `collect`"):
                record = {**json.loads(line)}
                group = record["variant"], record["precision"]
                if "seed" not in record:
                    headers[group] = {**record, "settings": {**record["settings"]}}
                    continue
                header = headers[group]
                # The stored settings lack the seed. Put the cell's seed back.
                settings = {**header["settings"], **record.get("settings", {}),
                            "seed": record["seed"]}
                facts = {**header, **record, "settings": settings}
                check_cell(facts)
                if cell_key(facts) in store:
                    raise ValueError("it is stored twice")
                store[cell_key(facts)] = facts
    return store


def store_lines(cells):
    """Return the lines of one task's file.

    Before the cells of a variant and precision, in the order of their seeds, there is a
    header with the settings that they share.
    """
    groups = {}                                     # {header's key: cells}
    for facts in sorted(cells, key=cell_key):
        groups.setdefault(cell_key(facts)[:3], []).append(facts)
    lines = []
    for (task, variant, precision), members in groups.items():
        shared = {name: value for name, value in sorted(members[0]["settings"].items())
                  if name != "seed"
                  and all(facts["settings"].get(name) == value for facts in members)}
        lines.append(dict(task=task, variant=variant, precision=precision, settings=shared))
        for facts in members:
            record = {name: facts[name] for name in ("variant", "precision", "seed", "commit",
                                                     "hardware")}
            own = {name: value for name, value in sorted(facts["settings"].items())
                   if name != "seed" and name not in shared}
            for name in sorted(set(facts) - set(record) - {"task", "settings"}):
                record[name] = facts[name]
            lines.append(record | ({"settings": own} if own else {}))
    return [json.dumps(line) + "\n" for line in lines]


def check_same_settings(store):
    """Raise UserError if two seeds of a variant and precision have different settings."""
    first_cells = {}
    for key, facts in sorted(store.items()):
        first = first_cells.setdefault(key[:3], facts)
        if comparable_settings(first) != comparable_settings(facts):
            raise UserError(f"seed {facts['seed']} of {facts['variant']} on {facts['task']} has "
                            f"other settings than seed {first['seed']}: collect cells of "
                            "the same settings, or use another --results")


def is_chosen(options, facts):
    """Return whether the command line asks for the task, variant, precision and seed of a cell."""
    task, variant, precision, seed = cell_key(facts)
    if options.variants:
        names = sum(map(variants_of, options.variants), [])
        if variant not in [canonical_variant(task, name) for name in names]:
            return False
    return (task in (options.tasks or [task]) and seed in (options.seeds or [seed])
            and options.precision in ("auto", precision))


def collect_cells(options):
    """Add the cells of the working directory to the store.

    Raises UserError, and changes no file, if a cell is in the store with other contents
    and --overwrite was not given.
    """
    directory = cells_directory(options)
    store = read_store(options.results)
    collected = {}                                  # {cell_key: path}
    for path in sorted(directory.glob("paper-*.json")):
        facts = read_json(path)
        with user_errors_for(path, "is not a cell of `run`"):
            check_cell(facts)
            facts["variant"] = canonical_variant(facts["task"], facts["variant"])
        if not is_chosen(options, facts):
            continue
        key = cell_key(facts)
        if store.get(key, facts) != facts:
            if key in collected:
                raise UserError(f"{path} and {collected[key]} are different results of the "
                                "same cell: remove one of them")
            if not options.overwrite:
                raise UserError(f"{path} is in {options.results} with other contents: pass "
                                "--overwrite to replace it")
        store[key] = facts
        collected[key] = path
    if not collected:
        raise UserError(f"{directory} holds none of these cells: fill them with python -m "
                        "glue.paper run, or name their directory with --cells")
    check_same_settings(store)
    Path(options.results).mkdir(parents=True, exist_ok=True)
    for task in sorted({key[0] for key in collected}):
        cells = [facts for key, facts in store.items() if key[0] == task]
        path = Path(options.results, f"{task}.jsonl")
        write_file(path, "".join(store_lines(cells)).encode())
        print(f"{path}: {len(cells)} cells")


# ---- Tables, from the store ----------------------------------------------------------------------

def load_cells(options):
    """Load the chosen cells, {(task, variant): {precision: {seed: facts}}}.

    Raises UserError if the seeds of a variant were run with different settings.
    """
    store = read_store(options.results)
    check_same_settings(store)
    cells = {}
    for (task, variant, precision, seed), facts in sorted(store.items()):
        if is_chosen(options, facts):
            by_precision = cells.setdefault((task, variant), {})
            by_precision.setdefault(precision, {})[seed] = index_scores(facts)
    return cells


def check_cell(facts):
    """Raise ValueError or KeyError if a cell lacks a field that the tables read.

    The same is true of a field with a value that `run` never writes.
    """
    names = ("task", "variant", "commit", "hardware", "precision")
    numbers = [facts["seed"], facts["seconds"], facts["evaluations"], facts.get("uniform", 0)]
    results = facts.get("scores", []) + list(facts.get("methods", {}).values())
    for result in results:
        numbers += [result["params"], result["holdout"]["score"], result["dev"]["score"]]
    for drawn in facts.get("drawn", []):
        depth, holdout_score, dev_score = drawn
        numbers += [depth, holdout_score, dev_score]
    if "drawn" in facts:
        numbers += [facts["examples"]["holdout"], facts["examples"]["dev"]]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError("a score, a time or a seed is not a number")
    if not all(type(facts[name]) is str for name in names) or not results:
        raise ValueError("a name or the scores are missing")
    if facts["precision"] not in PRECISIONS:
        raise ValueError("the precision is neither fp32 nor bf16")
    # The name of a task becomes the name of its file.
    if not facts["task"] or Path(facts["task"]).name != facts["task"]:
        raise ValueError("the task is not a name")
    for result in results:
        if not isinstance(result["budget"], str | float | int):
            raise ValueError("a budget is neither a number nor a name")
    if not isinstance(facts["settings"], dict):
        raise ValueError("the settings are not an object")


def comparable_settings(facts):
    """Return the settings of a cell that must be the same for all seeds."""
    settings = {name: value for name, value in facts["settings"].items()
                if name not in ("seed", "device")}
    return settings | {name: facts[name] for name in ("evaluations", "precision")}


def index_scores(facts):
    """Return the facts of a cell with more keys, by which the tables find a score.

    An architecture's facts are added under its budget, and the last one's also under
    "smallest". That is the sub-BERT at half of the encoder, and for plain fine-tuning
    the whole model.
    """
    indexed = dict(facts)
    for scores in facts.get("scores", []):
        indexed[scores["budget"]] = indexed["smallest"] = scores
    if "drawn" in facts:
        indexed["sampling_stats"] = sampling_stats(facts)
    return indexed


def sampling_stats(facts):
    """Return {title: value}, statistics of the architectures that a cell drew.

    Most are given twice: for all architectures, and for the deep ones, which have more
    than two thirds of the layers.
    """
    depths, holdout, dev = np.array(facts["drawn"]).T                # [NUM_DRAWN] each
    stats = {}
    for depth in np.unique(depths):
        stats[f"those of {depth:.0f} layers: mean on dev"] = dev[depths == depth].mean()

    groups = {"all": depths > 0, "deep": 3 * depths > 2 * depths.max()}
    for group, members in groups.items():
        correlation = data.spearman(holdout[members], dev[members])
        stats[f"{group}: Spearman of both x 100"] = 100 * correlation
        for split, scores in (("holdout", holdout[members]), ("dev", dev[members])):
            p, n = scores.mean() / 100, facts["examples"][split]
            error = 100 * math.sqrt(max(0, p * (1 - p)) / n)
            stats[f"{group}: standard deviation, {split}"] = scores.std()
            stats[f"{group}: sqrt(p (1 - p) / n), {split}"] = error
            for method, winner in facts["methods"].items():
                lead = winner[split]["score"] - scores
                stats[f"{group}: {method} above their mean, {split}"] = lead.mean()
                # A tie counts one half.
                percent_below = 50 * (np.sign(lead) + 1).mean()
                stats[f"{group}: % of them below {method}, {split}"] = percent_below
    return stats


# The fields of the tables: {title: the keys that lead to the score in a cell's facts}.
# A table shows the fields that its cells have.
FIELDS = {
    "dev, largest": (1.0, "dev", "score"),
    "dev, 0.75x": (0.75, "dev", "score"),
    "dev, 0.5x": (0.5, "dev", "score"),
    "hold-out, 0.5x": (0.5, "holdout", "score"),
    "hold-out, uniform": ("uniform",),
    **{f"dev, {low} to {high} of the encoder": (band, "dev", "score")
       for band, (low, high) in BANDS.items()},
}
# The choice of rate and length may only look at the hold-out set.
HOLDOUT_FIELDS = {
    "hold-out, largest": (1.0, "holdout", "score"),
    "hold-out, found at 0.5x": (0.5, "holdout", "score"),
    "hold-out, uniform": ("uniform",),
}
SMALLEST = ("smallest", "dev", "score")
SMALLEST_FIELD = {"dev: plain whole, others half": SMALLEST}


def variants_of(name):
    """Return all variants of a table, or the name itself if it is not a table's."""
    if name not in TABLES:
        return [name]
    return list(dict.fromkeys(sum(TABLES[name], [])))


def facts_of(cells):
    """Return the facts of all cells in one list."""
    return [facts for by_precision in cells.values() for by_seed in by_precision.values()
            for facts in by_seed.values()]


def tasks_of(cells):
    """Return the tasks of some cells in the order of TASKS, then other tasks by name."""
    tasks = {task for task, _ in cells}
    known_tasks = [task for task in TASKS if task in tasks]
    return known_tasks + sorted(tasks - set(TASKS))


def precisions_of(cells, task, variant):
    """Return the precisions of a variant's cells, in the order that tables prefer."""
    by_precision = cells.get((task, canonical_variant(task, variant)), {})
    return [precision for precision in PRECISIONS if precision in by_precision]


def field_values(cells, task, variant, keys, beside=None):
    """Return {seed: value} of one field.

    `beside` is a variant to compare the values with. If possible, the values are then in
    the precision that the tables show for `beside`.
    If the task is MEAN, the value is the mean over all tasks of the cells, and only
    seeds that all tasks have are included.
    """
    if task == MEAN:
        by_task = [field_values(cells, each, variant, keys, beside) for each in tasks_of(cells)]
        common_seeds = set.intersection(*map(set, by_task))
        return {seed: float(np.mean([values[seed] for values in by_task]))
                for seed in common_seeds}
    precisions = precisions_of(cells, task, variant)
    for precision in precisions_of(cells, task, beside or variant)[:1]:
        if precision in precisions:
            precisions = [precision]
    values = {}
    for precision in precisions[:1]:
        by_seed = cells[task, canonical_variant(task, variant)][precision]
        for seed, value in by_seed.items():
            for key in keys:
                value = value.get(key, {})
            if value != {}:
                values[seed] = value
    return values


def print_table(corner, rows, columns, values_of, paired=True):
    """Print a Markdown table without empty rows and columns.

    `values_of(row, column, beside)` returns the {seed: value} of a cell of the table,
    for a comparison with the row `beside`. With `paired`, a cell also shows the
    difference from the first row.
    """
    values_by_column = {}
    for column in columns:
        values = [values_of(row, column, row) for row in rows]
        if any(values):
            values_by_column[column] = values
    lines = []
    for n, row in enumerate(rows):
        texts = []
        for column, values in values_by_column.items():
            reference = values_of(rows[0], column, row) if n > 0 and paired else None
            texts.append(format_mean(values[n], reference))
        if any(texts):
            lines.append(f"| {row} | {' | '.join(texts)} |")
    if lines:
        print(f"| {corner} | {' | '.join(values_by_column)} |")
        print("|---" * (len(values_by_column) + 1) + "|")
        print(*lines, "", sep="\n")


def print_core(variants, cells, tasks):
    """Print a part of the core table: one table per field, with a column per task."""
    # The part that compares with plain fine-tuning shows all fields. The others show
    # half of the encoder only.
    fields = SMALLEST_FIELD
    if variants[0] == "plain":
        fields = SMALLEST_FIELD | FIELDS
    for title, keys in fields.items():
        print_table(title, variants, [*tasks, MEAN],
                    lambda variant, task, beside: field_values(cells, task, variant, keys,
                                                               beside))


def print_matters(variants, cells, tasks):
    """Print the table of `matters`, with a row per statistic and a column per cell."""
    columns = {f"{variant}, {task}": (task, variant)
               for task in tasks for variant in variants}
    titles = facts_of(cells)[0]["sampling_stats"]
    print_table("", titles, columns, lambda title, column, _: field_values(
        cells, *columns[column], ("sampling_stats", title)), paired=False)


def print_by_task(variants, cells, tasks, fields):
    """Print a part of any other table: one table per task, with a column per field."""
    for task in tasks:
        # Two variants may be the same row, because the settings chosen for the task are
        # dropped from the name.
        rows = list(dict.fromkeys(canonical_variant(task, variant) for variant in variants))
        print_table(task, rows, fields, lambda variant, title, beside: field_values(
            cells, task, variant, fields[title], beside))


def print_shares_kept(cells, tasks):
    """Print how much of plain fine-tuning's mean score half of the encoder keeps."""
    majority = np.mean([MAJORITY.get(task, 0) for task in tasks])
    baselines = {"": 0, " above the most frequent answer's": majority}
    for reference in ("plain", "plain lr=2e-5"):
        for variant in ("truncated", "paper", "best"):
            full = field_values(cells, MEAN, reference, SMALLEST, variant)
            half = field_values(cells, MEAN, variant, SMALLEST)
            for text, baseline in baselines.items():
                kept = {}
                for seed in half:
                    if full.get(seed, baseline) > baseline:
                        kept[seed] = 100 * (half[seed] - baseline) / (full[seed] - baseline)
                if kept:
                    print(f"{variant} at half keeps, in % of {reference}'s mean{text}: "
                          f"{format_mean(kept)}")


def print_leads(cells, tasks):
    """Print in how many pairs of the same recipe, task and seed EE-SNG leads, and by how much."""
    for strategy in STRATEGIES:
        texts = []
        for title in ("dev, 0.5x", "hold-out, 0.5x", "hold-out, uniform"):
            leads = []
            for task in tasks:
                for recipe in ("paper", "best"):
                    other = f"{recipe} {strategy}"
                    scores = field_values(cells, task, recipe, FIELDS[title], other)
                    for seed, score in field_values(cells, task, other, FIELDS[title]).items():
                        if seed in scores:
                            leads.append(scores[seed] - score)
            if leads:
                num_ahead = sum(lead > 0 for lead in leads)
                texts.append(f"{title}: {num_ahead} of {len(leads)}, {np.mean(leads):+.1f}")
        if texts:
            print(f"EE-SNG is ahead of {strategy}, and its mean lead: {'. '.join(texts)}")


def print_named_table(name, cells):
    """Print the table of a name, followed by the time and the machines of its cells.

    Raises UserError if the table has no cells yet.
    """
    print("MiniLM (6 x 384, not comparable with BERT-base). Scores in %: mean ± sample "
          "standard deviation (seeds),\nthen the paired difference from the first row, in "
          "the same precision [95% interval].\n")
    cells = {(task, variant): by_precision for (task, variant), by_precision in cells.items()
             if variant in [canonical_variant(task, each) for each in variants_of(name)]}
    if not cells:
        raise UserError(f"table {name} has no cells yet: run python -m glue.paper run "
                        f"--variants {name}")
    tasks = tasks_of(cells)
    for part in TABLES[name]:
        if name == "core":
            print_core(part, cells, tasks)
        elif name == "matters":
            print_matters(part, cells, tasks)
        else:
            fields = HOLDOUT_FIELDS if name == "choose" else FIELDS
            print_by_task(part, cells, tasks, fields)
    if name == "core":
        print_shares_kept(cells, tasks)
    if name == "4":
        print_leads(cells, tasks)
    all_facts = facts_of(cells)
    hours = sum(facts["seconds"] for facts in all_facts) / 3600
    machines = sorted({f"{facts['hardware']} ({facts['precision']})" for facts in all_facts})
    print(f"{len(all_facts)} cells: {hours:.1f} hours of one process each, on "
          f"{', '.join(machines)}")


# ---- Commands ------------------------------------------------------------------------------------

def run_cells(options):
    """Fill the chosen cells. Return the exit status of the last failure, or 0."""
    options.commit = committed_code()
    variants = dict.fromkeys(sum(map(variants_of, options.variants or ["core"]), []))
    # Make all cells first, so that a mistyped variant is refused before the first
    # training.
    cells = [Cell(task, variant, seed, options)
             for variant in variants
             for seed in options.seeds or range(3)
             for task in options.tasks or TASKS[:2]]
    status = 0
    for cell in cells:
        try:
            cell.ensure()
        except SystemExit as failure:
            # The command has printed why. The other cells may succeed, so go on, unless
            # the status says that a signal stopped the command.
            status = failure.code
            if status > 2:
                break
    return status


def run_command(options):
    """Run or collect cells or print a table, and return the exit status."""
    if options.command == "run":
        return run_cells(options)
    if options.command == "collect":
        return collect_cells(options)
    if options.name not in TABLES:
        raise UserError(f"give table one of these names: {', '.join(TABLES)}")
    print_named_table(options.name, load_cells(options))
    return 0


def main(argv=None):
    """Run the program, and return the exit status that `glue.run_program` describes."""
    parser = yoco.Parser("glue.paper", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("command", choices=("run", "collect", "table"))
    add("name", nargs="?", help=f"the table to print: {', '.join(TABLES)}")
    add("--tasks", nargs="+",
        help="the tasks to run (default: MRPC RTE), to collect or to print (default: all)")
    add("--variants", nargs="+",
        help="the variants, or tables with all their variants, to run (default: core), to "
             "collect or to print (default: all)")
    add("--seeds", type=int, nargs="+",
        help="the seeds to run (default: 0 1 2), to collect or to print (default: all)")
    add("--evaluations", type=int, default=200,
        help="the evaluations of each search and budget (default: 200)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"),
        help="run in this precision (default: auto), or collect or print only its cells")
    add("--data", default="glue", help="the parent of the tasks' directories (default: glue)")
    add("--bert", default="all-MiniLM-L6-v2",
        help="the directory of the pretrained BERT (default: all-MiniLM-L6-v2)")
    add("--work", default="superbert/paper",
        help="the directory for the models (default: superbert/paper)")
    add("--cells", help="the directory of the cells that were run (default: cells in --work)")
    add("--results", default=str(ROOT / "glue/results"),
        help="the directory of the collected cells (default: glue/results)")
    add("--overwrite", action="store_true",
        help="collect cells that were collected before with other contents")
    return run_program(parser, run_command, argv)


if __name__ == "__main__":
    sys.exit(main())
