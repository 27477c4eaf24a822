"""The paper's tables on real data, with seeds and intervals, from MiniLM.

    python -m glue.paper run [--tasks MRPC RTE] [--variants core 4] [--seeds 0 1 2]
    python -m glue.paper table choose|core|1|3|4|5|ablation|matters [--tasks MRPC ...]

A cell is one task, variant and seed, and one JSON file under glue/results/. `run` skips what is
there, goes on with what was interrupted, and leaves to another process what that works on: the same
command may run several times at once. `table` reads those files alone. A variant is a name below,
or a table's: all in it. After a name, `lr=5e-5`, `epochs=3` (of plain fine-tuning) or `length=0.5`
(of the authors' epochs) stand instead of what is chosen below.

What a cell does: one `train` from the pretrained BERT; one `search` on the hold-out, which finds a
sub-BERT with less than 0.75 and one with less than 0.5 of the *encoder's* parameters (MiniLM's
embeddings are half of it and not elastic); dev is read once for each. 20 architectures drawn
uniformly tell, on the hold-out, what it is worth without a search. HAT and OFA search by evolution.
"""

import dataclasses
import fcntl
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import yoco
from glue import run_program
from model import (Arch, BertConfig, count_flops, count_params, device_name, extract, load_bert,
                   read_json, save_bert, SearchSpace, select_device_and_precision, tokenizer_files,
                   UserError, write_json)

ROOT = Path(__file__).resolve().parents[1]
TASKS, MEAN = ("MRPC", "RTE", "CoLA", "STS-B", "SST-2"), "mean of tasks"
SHARES = (0.75, 0.5)                                # budgets, of the encoder's parameters
HOLDOUT = {"SST-2": 0.02}                           # else 0.1: of SST-2 1,347 sentences
BATCH, DRAWN = 32, 300                              # examples a step; architectures of `matters`
# The rate, chosen on the hold-out; and how long, in parts of the authors' epochs (else all).
RATE, LENGTHS = 1e-4, {"MRPC": 0.5, "CoLA": 0.25, "STS-B": 0.25, "SST-2": 0.125}
PLAIN_EPOCHS = {"SST-2": 2}                         # else 10
MAJORITY = {"MRPC": 74.8, "RTE": 52.7, "SST-2": 50.9}     # dev, the most frequent answer; else 0

PLAIN = ("plain", "truncated")                      # all layers; the first half of them, alone
ELASTIC = {                                         # flags of train
    "paper": "--recipe paper", "best": "--recipe best",
    "HAT": "--strategy explore --stages all", "OFA": "--strategy explore --distill",
    "best no-reorder": "--recipe best --no-reorder",
    "best no-distill": "--recipe best --no-distill",
    "best first": "--recipe best --keep-layers first",
    "best progressive": "--recipe best --stages progressive"}
STRATEGIES = ("exploit", "explore", "noise")
ELASTIC |= {f"{recipe} {name}": f"--recipe {recipe} --strategy {name}"
            for recipe in ("paper", "best") for name in STRATEGIES}
TUNED = {variant: [f"{variant} tuned {rate}" for rate in ("2e-4", "2e-5", "2e-6", "2e-7")]
         for variant in ("paper", "best", "HAT", "OFA")}             # what they found, fine-tuned
BANDS = {"A": (0.18, 0.36), "B": (0.36, 0.55), "C": (0.55, 0.73), "D": (0.73, 0.91)}
METHODS = ("sng", "evolution", "random")
BANDED, MATTERS = (["bands of paper", "bands of best"], ["matters of paper", "matters of best"])
AROUND = ("lr=2e-5", "lr=5e-5", "length=1", "length=0.5", "length=0.25")     # of the choice
GRID = [[f"plain lr={lr} epochs={n}" for lr in ("2e-5", "5e-5", "1e-4") for n in (3, 10)]]
GRID += [[recipe, *(f"{recipe} {given}" for given in AROUND)] for recipe in ("paper", "best")]


# ---- Statistics, of {seed: value} ----------------------------------------------------------------

# Two-sided 95% quantiles of Student's t for 1 ... 9 degrees of freedom; the last serves for more.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_and_deviation(found):
    """The mean, and the sample standard deviation: None of a single value."""
    x = list(found.values())
    return float(np.mean(x)), float(np.std(x, ddof=1)) if len(x) > 1 else None


def paired_difference(found, reference):
    """The mean difference over common seeds, and half of its 95% interval; None without such a
    seed, and below two."""
    less = {seed: found[seed] - reference[seed] for seed in found if seed in reference}
    mean, deviation = mean_and_deviation(less) if less else (None, None)
    if deviation is None:
        return mean, None
    return mean, T95[min(len(less) - 2, 8)] * deviation / math.sqrt(len(less))


def in_words(found, reference=None):
    """'mean ± sample standard deviation (seeds)', empty where nothing is known; and where there is
    a reference '; difference [its 95% interval]'."""
    if not found:
        return ""
    mean, deviation = mean_and_deviation(found)
    less, half = paired_difference(found, reference or {})
    text = f"{mean:.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")
    text += f" ({len(found)})" + (f"; {less:+.1f}" if less is not None else "")
    return text + (f" [{less - half:+.1f}, {less + half:+.1f}]" if half is not None else "")


# ---- Sizes, and the searches that are not the paper's --------------------------------------------

def budget(config, part):
    """`--max-params` for so much of the encoder."""
    # Embeddings and pooler are what is left of a model of one layer without that layer.
    one, two = (count_params(config, Arch([1] * n, [1] * n)) for n in (1, 2))
    rest = 2 * one - two
    return round(rest + part * (count_params(config, config.arch) - rest))


def first_under(it, limit, draw):
    """The first of the drawn architectures that is under the limit; it: as `opened` makes it."""
    for _ in range(10_000):
        arch = it.space.arch(draw())
        if it.cost(arch) < limit:
            return arch
    return it.space.smallest()


def propose_random(it, limit, rng, *_):
    """An architecture drawn uniformly among those under the limit."""
    pi = yoco.Categorical(it.space.categories)
    return first_under(it, limit, lambda: pi.sample(rng))


def propose_evolution(it, limit, rng, past, evaluations):
    """HAT's next architecture (Wang et al. 2020): the first generation, 125, is drawn at random;
    the parents of later ones, of 100 each, are the 25 best of all complete generations. past:
    {arch: score} of this search."""
    # CHOICE: the three shrink in proportion where fewer than 1000 evaluations are asked for; a
    # generation counts distinct architectures.
    first, later, best = (max(1, round(n * min(1, evaluations / 1000))) for n in (125, 100, 25))
    if len(past) < first:
        return propose_random(it, limit, rng)
    born = list(past)[:first + (len(past) - first) // later * later]
    parents = sorted(born, key=lambda arch: -past[arch])[:best]
    pi = yoco.Categorical(it.space.categories)

    def child():
        """Half of the time a mutation, every choice drawn anew with p = 0.3, else a crossover."""
        one, two = (it.space.choices(parents[i]) for i in rng.integers(len(parents), size=2))
        drawn, mutates, choices = pi.sample(rng), rng.random() < 0.5, []
        for mine, theirs, new in zip(one, two, drawn):
            if rng.random() < (0.3 if mutates else 0.5):
                mine = new if mutates else theirs
            choices.append(new if mine is None else mine)    # a layer that the parent has not
        return choices
    return first_under(it, limit, child)


def search_by(propose, it, limit, score, memo, evaluations, seed):
    """{arch: score} of the architectures that were asked for. memo: scores known already, which
    grows."""
    rng, past = np.random.default_rng(seed), {}
    for _ in range(evaluations):
        arch = propose(it, limit, rng, past, evaluations)
        if arch not in memo:
            memo[arch] = score(arch)["score"]
        past[arch] = memo[arch]
    return past


# ---- Cells ---------------------------------------------------------------------------------------

def split_variant(variant):
    """'best lr=5e-5' -> ('best', {'lr': '5e-5'}); UserError where there is no such variant."""
    base = " ".join(word for word in variant.split() if "=" not in word)
    given = dict(word.split("=", 1) for word in variant.split() if "=" in word)
    known = [*PLAIN, *ELASTIC, *BANDED, *MATTERS, *sum(TUNED.values(), [])]
    if base not in known or not set(given) <= {"lr", "epochs" if base in PLAIN else "length"}:
        raise UserError(f"no variant {variant!r}; there are {', '.join(known)}")
    return base, given


def opened(directory, options):
    """A trained directory as what is needed to score it and to train it further."""
    run, start, encode = yoco.read_run(directory), time.perf_counter(), data.make_encoder(directory)
    device, autocast = select_device_and_precision(options.device, options.precision)
    task = data.load_task(run["data"])
    kept, held = data.split_holdout(task.train, *run["held_out"])
    model = data.load_trained(directory, task).to(device)
    return SimpleNamespace(
        run=run, start=start, encode=encode, device=device, autocast=autocast, kept=kept,
        metric=task.metric, parts={"holdout": [held], "dev": task.devs}, model=model,
        config=model.config, space=SearchSpace.for_config(model.config),
        cost=functools.partial(count_params, model.config))


def scorers(it):
    """{"holdout", "dev": a function arch -> {metric: %}} of the model of what was opened."""
    return {on: data.make_evaluator(it.model, [it.encode(part) for part in parts], it.metric, it.device,
                            it.autocast) for on, parts in it.parts.items()}


def row(part, config, arch, holdout, score):
    """The facts of one architecture; its dev score is taken here."""
    return dict(budget=part, arch=arch._asdict(), params=count_params(config, arch),
                flops=count_flops(config, arch), holdout=holdout, dev=score["dev"](arch))


class Cell:
    """One task, variant and seed: what it needs, its commands, and the facts that it keeps."""

    def __init__(self, task, variant, seed, options):
        self.task, self.variant, self.seed, self.options = task, variant, seed, options
        self.base, self.given = split_variant(variant)
        self.name = f"{task}-{variant}-{seed}".replace(" ", "_")
        self.path = Path(options.results) / f"paper-{self.name}.json"
        self.out = f"{options.work}/{self.name}"                     # where its models go

    def ensure(self, needed=False):
        """Fill the cell, unless it is filled or another process is at it. needed: wait for that
        process; and fill it anew where its model is no longer there."""
        for path in (Path(self.out), self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out + ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if needed else fcntl.LOCK_NB))
            except BlockingIOError:
                return
            if self.path.exists() and (not needed or Path(self.out, "run.json").exists()):
                return
            print(f"--- {self.name}", flush=True)
            fills = {"plain": self.plain, "truncated": self.plain, "tuned": self.tuned,
                     "bands": self.bands, "matters": self.matters}
            fill = next((fills[w] for w in self.base.split() if w in fills), self.elastic)
            begun = commit()
            write_json(self.path, task=self.task, variant=self.variant, seed=self.seed,
                       commit=begun, **fill())

    def other(self, variant):
        """The cell of another variant, finished first."""
        cell = Cell(self.task, variant, self.seed, self.options)
        cell.ensure(needed=True)
        return cell

    def command(self, *words):
        """Run a command of yoco.py to its end."""
        status = yoco.main([*words, "--seed", str(self.seed), "--device", self.options.device,
                            "--precision", self.options.precision, "--resume"])
        if status:
            raise SystemExit(status)

    def train(self, bert, *flags):
        """Run `train`, or take what is there; what was trained, opened."""
        lr = float(self.given.get("lr", RATE))
        if self.base in PLAIN:
            epochs = float(self.given.get("epochs", PLAIN_EPOCHS.get(self.task, 10)))
        else:
            space = SearchSpace.for_config(BertConfig.load(bert))
            last = yoco.make_stages(space, self.task, 1)[-1]         # a step stands for an epoch
            length = float(self.given.get("length", LENGTHS.get(self.task, 1)))
            epochs = length * (last.first + last.steps)
        self.command("train", "--data", f"{self.options.data}/{self.task}", "--bert", bert,
                     "--out", self.out, "--lr", str(lr), "--epochs", str(epochs), "--batch-size",
                     str(BATCH), "--holdout", str(HOLDOUT.get(self.task, 0.1)), *flags)
        return opened(self.out, self.options)

    def search(self, model, budgets):
        """Run `search` for several budgets; their run.json, and all its {arch: score}."""
        out, memo = self.out + "-found", {}
        self.command("search", "--model", model, "--out", out, "--evaluations",
                     str(self.options.evaluations), "--max-params", *map(str, budgets))
        paths = [Path(out, str(b)) for b in budgets] if len(budgets) > 1 else [Path(out)]
        space = SearchSpace.for_config(BertConfig.load(model))
        for path in paths:
            for line in (path / "log.jsonl").read_text().splitlines()[1:]:
                record = json.loads(line)
                memo[space.arch(record["choices"])] = record["score"]
        return [read_json(path / "run.json") for path in paths], memo

    def facts(self, it, **more):
        """What every cell says: of the training; seconds, with those of a training of its own."""
        settings = {name: value for name, value in it.run["settings"].items()
                    if name not in ("data", "bert")}                 # paths
        seconds = time.perf_counter() - it.start
        if self.base in (*PLAIN, *ELASTIC):
            seconds += it.run["seconds"]
        same = {name: it.run[name] for name in ("steps", "hardware", "precision", "versions")}
        return {**same, "seconds": seconds, "settings": settings,
                "evaluations": self.options.evaluations, **more}

    def regular_file(self):
        """Fine-tuning without elasticity, of the BERT or of the first half of its layers."""
        bert, part = self.options.bert, 1.0
        if self.base == "truncated":
            task = data.load_task(f"{self.options.data}/{self.task}")
            torch.manual_seed(self.seed)                             # the classifier
            model, part = load_bert(bert, task.num_labels, task.labels), SHARES[-1]
            half = model.config.num_hidden_layers // 2
            cut = extract(model, Arch(*(sizes[:half] for sizes in model.config.arch)))
            cut.config = dataclasses.replace(cut.config, layer_heads=None, layer_ffn_sizes=None)
            save_bert(cut, self.out + "-cut", tokenizer_files(bert))
            bert = self.out + "-cut"
        it = self.train(bert, "--stages", "largest")
        return self.facts(it, scores=[row(part, it.config, it.config.arch,
                                          it.run["holdout"]["largest"], scorers(it))])

    def elastic(self):
        """Train a super-BERT, search it under both budgets."""
        it = self.train(self.options.bert, *ELASTIC[self.base].split())
        score, limits = scorers(it), [budget(it.config, part) for part in SHARES]
        pi, rng = yoco.Categorical(it.space.categories), np.random.default_rng(0)
        uniform = [score["holdout"](it.space.arch(pi.sample(rng)))["score"] for _ in range(20)]
        scores = [row(1.0, it.config, it.config.arch, it.run["holdout"]["largest"], score)]
        memo, found = {}, []
        if self.base not in ("HAT", "OFA"):
            for run in self.search(self.out, limits)[0]:
                found.append((Arch(**run["arch"]), run["selection_score"]))
        else:
            for limit in limits:
                past = search_by(propose_evolution, it, limit, score["holdout"], memo,
                                 self.options.evaluations, self.seed)
                best = yoco.best_fit(past, it.cost, limit)
                found.append((best, past[best]))
        for part, (arch, holdout) in zip(SHARES, found):
            scores.append(row(part, it.config, arch, {"score": holdout}, score))
        return self.facts(it, uniform=float(np.mean(uniform)), scores=scores)

    def tuned(self):
        """Ten more epochs for the sub-BERT that a variant found under the smaller budget. What it
        says of settings is what it began from."""
        variant, rate = self.base.split(" tuned ")
        cell = self.other(variant)
        it, arch = opened(cell.out, self.options), read_json(cell.path)["scores"][-1]["arch"]
        it.model = model = extract(it.model, Arch(**arch)).train()
        examples, steps = it.encode(it.kept), 10 * math.ceil(len(it.kept) / BATCH)
        adam, arch = yoco.new_adam(model), model.config.arch
        gradient = yoco.graphed_gradient() if it.device.type == "cuda" else yoco.weight_gradient
        torch.manual_seed(self.seed)                                 # dropout
        for t, indices in zip(range(steps), data.batches(examples, BATCH, self.seed)):
            gradient(model, data.collate(examples, indices, it.device, 128), [arch], it.autocast)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.param_groups[0]["lr"] = float(rate) * (1 - t / steps)
            adam.step()
        score = scorers(it)
        return self.facts(it, steps=steps, hardware=device_name(it.device), scores=[
            row(SHARES[-1], model.config, arch, score["holdout"](arch), score)])

    def bands(self):
        """Tab. 1: the best in every band of sizes, of one super-BERT, one memo."""
        it, scores = opened(self.other(self.base.split()[-1]).out, self.options), []
        score, limits = scorers(it), [budget(it.config, high) for _, high in BANDS.values()]
        _, memo = self.search(self.other(self.base.split()[-1]).out, limits)
        for band, (low, high) in BANDS.items():
            least, limit = budget(it.config, low), budget(it.config, high)
            best = yoco.best_fit({m: s for m, s in memo.items() if it.cost(m) >= least}, it.cost,
                                 limit)
            if best:
                scores.append(row(band, it.config, best, {"score": memo[best]}, score))
        return self.facts(it, evaluated=len(memo), scores=scores)

    def matters(self):
        """Fig. 3, and whether a search matters: what three methods find under the smaller budget;
        and of architectures drawn at random under it depth, hold-out score and dev score."""
        source = self.other(self.base.split()[-1]).out
        it, found, drawn = opened(source, self.options), {}, []
        score, limit = scorers(it), budget(it.config, SHARES[-1])
        rng, asked = np.random.default_rng(self.seed), self.options.evaluations
        for _ in range(DRAWN):
            arch = propose_random(it, limit, rng)
            drawn.append([arch.depth, *(score[on](arch)["score"] for on in ("holdout", "dev"))])
        for method in METHODS:
            if method == "sng":
                past = self.search(source, [limit])[1]
            else:                                   # another seed than that of the drawn ones
                propose = propose_random if method == "random" else propose_evolution
                past = search_by(propose, it, limit, score["holdout"], {}, asked, self.seed + 1000)
            past = {arch: s for arch, s in past.items() if it.cost(arch) < limit}
            best = yoco.best_fit(past, it.cost, limit)
            found[method] = row(method, it.config, best, {"score": past[best]}, score)
        return self.facts(it, drawn=drawn, methods=found, examples={
            on: sum(map(len, parts)) for on, parts in it.parts.items()})


def commit():
    """The commit of this code; "+" where a file in the repository differs from it."""
    git = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


# ---- Tables, from the JSON files alone -----------------------------------------------------------

def load(options):
    """{(task, variant): {seed: facts}} of all cells, or of the tasks and seeds named. UserError
    where seeds were not run alike."""
    cells = {}
    for path in sorted(Path(options.results).glob("paper-*.json")):
        facts = read_json(path)
        task, variant, seed = facts["task"], facts["variant"], facts["seed"]
        if seed not in (options.seeds or [seed]) or task not in (options.tasks or [task]):
            continue
        facts["alike"] = facts["settings"] | {"seed": 0, "device": ""} | {
            name: facts[name] for name in ("evaluations", "precision")}
        cell = cells.setdefault((task, variant), {})
        for other in cell.values():
            if other["alike"] != facts["alike"]:
                raise UserError(f"{path}: other settings than seed {other['seed']}'s: remove one")
        cell[seed] = named(facts)
    return cells


def named(facts):
    """The facts of a cell with its scores under the names that the tables' fields have for them."""
    scores = {found["budget"]: found for found in facts.get("scores", [])}
    # The smallest comes last: half of the encoder, of plain fine-tuning all.
    last = {"deployed": facts["scores"][-1]} if scores else {}
    return facts | scores | last | ({"told": of_drawn(facts)} if "drawn" in facts else {})


def of_drawn(facts):
    """What a cell of `matters` tells, {title: value}: of all that were drawn, and of the deep ones,
    which have more than two thirds of the layers."""
    depths, *scores = np.array(facts["drawn"]).T                     # hold-out, dev: [DRAWN] each
    told = {f"those of {d:.0f} layers: mean on dev": scores[1][depths == d].mean()
            for d in np.unique(depths)}
    for kind, part in (("all", depths > 0), ("deep", 3 * depths > 2 * depths.max())):
        told[f"{kind}: Spearman of both x 100"] = 100 * data.spearman(*(x[part] for x in scores))
        for (on, n), x in zip(facts["examples"].items(), scores):
            p = x[part].mean() / 100
            told[f"{kind}: standard deviation, {on}"] = x[part].std()
            told[f"{kind}: sqrt(p (1 - p) / n), {on}"] = 100 * math.sqrt(max(0, p * (1 - p)) / n)
            for method, found in facts["methods"].items():
                above = found[on]["score"] - x[part]                 # ties are halved below
                told[f"{kind}: {method} above their mean, {on}"] = above.mean()
                told[f"{kind}: % of them below {method}, {on}"] = 50 * (np.sign(above) + 1).mean()
    return told


# {title: where it stands in the facts of a cell}; a table shows those that its cells have.
HOLDOUTS = {"hold-out, largest": (1.0, "holdout", "score"),
            "hold-out, found at 0.5x": (0.5, "holdout", "score"),
            "hold-out, uniform": ("uniform",)}
FIELDS = {"dev, largest": (1.0, "dev", "score"), "dev, 0.75x": (0.75, "dev", "score"),
          "dev, 0.5x": (0.5, "dev", "score"), "hold-out, 0.5x": (0.5, "holdout", "score"),
          "hold-out, uniform": ("uniform",)}
for band, (low, high) in BANDS.items():
    FIELDS[f"dev, {low} to {high} of the encoder"] = (band, "dev", "score")
DEPLOYED = {"dev: plain whole, others half": ("deployed", "dev", "score")}
# table: its parts, the variants of each; all others are compared with the first one.
TABLES = {
    "choose": GRID,
    "core": [["plain", "plain lr=2e-5", "truncated", "truncated epochs=3", "paper", "best"],
             ["truncated", "truncated epochs=3", "paper", "best"], ["paper", "best"]],
    "1": [BANDED],
    "3": [["paper", "HAT", "OFA", *TUNED["HAT"], *TUNED["OFA"]]],
    "4": [[recipe, *(f"{recipe} {name}" for name in STRATEGIES)] for recipe in ("paper", "best")],
    "5": [[recipe, *TUNED[recipe]] for recipe in ("paper", "best")],
    "ablation": [["best", "best no-reorder", "best no-distill", "best first", "best progressive",
                  "paper"]],
    "matters": [MATTERS],
}


def variants_of(name):
    """All that stand in a table; else the variant itself."""
    return list(dict.fromkeys(sum(TABLES.get(name, [[name]]), [])))


def tasks_of(cells):
    """The tasks of some cells, in the order of TASKS, others after them by name."""
    return sorted({task for task, _ in cells}, key=lambda task: ((*TASKS, task).index(task), task))


def values(cells, task, variant, place):
    """{seed: value} of one field of the table; of MEAN the mean over all tasks that the cells have,
    for seeds that all of them have."""
    if task == MEAN:
        of_tasks = [values(cells, each, variant, place) for each in tasks_of(cells)]
        shared = set.intersection(*map(set, of_tasks))
        return {seed: float(np.mean([of[seed] for of in of_tasks])) for seed in shared}
    found = {}
    for seed, value in cells.get((task, variant), {}).items():
        for key in place:
            value = value.get(key, {})
        if value != {}:
            found[seed] = value
    return found


def compare(corner, rows, columns, found, paired=True):
    """Print a table of found(row, column), {seed: value} each, `paired` with the difference from
    the first row; but no row and no column of which nothing is known."""
    known = {column: [found(row, column) for row in rows] for column in columns}
    known, lines = {column: of for column, of in known.items() if any(of)}, []
    for n, row in enumerate(rows):
        texts = [in_words(of[n], of[0] if n and paired else None) for of in known.values()]
        if any(texts):
            lines.append(f"| {row} | {' | '.join(texts)} |")
    if lines:
        print(f"| {corner} | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|", *lines, "",
              sep="\n")


def table(name, cells):
    """Print one table: the core table a field at a time, with a column per task; every other one a
    task at a time, with a column per field; but that of `matters` with a row per field."""
    print("MiniLM (6 x 384; not comparable with BERT-base), scores in %: mean ± sample standard "
          "deviation (seeds);\nthen the paired difference from the first row [95% interval].\n")
    cells = {key: of for key, of in cells.items() if key[1] in variants_of(name)}
    if not cells:
        raise UserError(f"no cells of table {name} yet: python -m glue.paper run --variants {name}")
    tasks = tasks_of(cells)
    for variants in TABLES[name]:
        if name == "core":
            # Beside plain fine-tuning stands all; beside another the half of the encoder is enough.
            fields = DEPLOYED | FIELDS if variants[0] == "plain" else DEPLOYED
            for title, place in fields.items():
                compare(title, variants, [*tasks, MEAN],
                        lambda variant, task: values(cells, task, variant, place))
        elif name == "matters":
            columns = {f"{one}, {task}": (task, one) for task in tasks for one in variants}
            titles = next(facts["told"] for of in cells.values() for facts in of.values())
            compare("", titles, columns, lambda title, column: values(
                cells, *columns[column], ("told", title)), paired=False)
        else:
            fields = HOLDOUTS if name == "choose" else FIELDS
            for task in tasks:
                compare(task, variants, fields,
                        lambda variant, title: values(cells, task, variant, fields[title]))
    majority = np.mean([MAJORITY.get(task, 0) for task in tasks])
    for mark in ("plain", "plain lr=2e-5") if name == "core" else ():
        for variant in ("truncated", "paper", "best"):
            half, full = (values(cells, MEAN, v, *DEPLOYED.values()) for v in (variant, mark))
            for what, least in (("", 0), (" above the most frequent answer's", majority)):
                kept = {seed: 100 * (half[seed] - least) / (full[seed] - least)
                        for seed in half if full.get(seed, least) > least}
                print(f"{variant} at half keeps, in % of {mark}'s mean{what}: {in_words(kept)}")
    spent = [facts for cell in cells.values() for facts in cell.values()]
    where = sorted({f"{facts['hardware']} ({facts['precision']})" for facts in spent})
    print(f"{len(spent)} cells: {sum(facts['seconds'] for facts in spent) / 3600:.1f} hours of one "
          f"process each, on {', '.join(where)}")


def work(options):
    """Run cells or print a table; the exit status, of cells that of the last that failed."""
    if options.command == "table":
        if options.name not in TABLES:
            raise UserError(f"table knows {', '.join(TABLES)}")
        table(options.name, load(options))
        return 0
    status, variants = 0, dict.fromkeys(sum(map(variants_of, options.variants), []))
    for cell in [Cell(task, variant, seed, options) for variant in variants
                 for seed in options.seeds or range(3) for task in options.tasks or TASKS[:2]]:
        try:
            cell.ensure()
        except SystemExit as failed:                                 # has told why
            status = failed.code
            if status > 2:                                           # a signal
                break
    return status


def main(argv=None):
    """Run the program; the exit status, as `glue.run_program` has it."""
    parser = yoco.Parser("glue.paper", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("command", choices=("run", "table"))
    add("name", nargs="?", help=f"of the table: {', '.join(TABLES)}")
    add("--tasks", nargs="+", help="to run: without it MRPC RTE; of a table: all")
    add("--variants", nargs="+", default=["core"], help="or tables: all that stand in them")
    add("--seeds", type=int, nargs="+", help="to run: without it 0 1 2")
    add("--evaluations", type=int, default=200, help="of each search and budget")
    add("--device", default="auto")
    add("--precision", default="auto")
    add("--data", default="glue", help="where the tasks' directories are")
    add("--bert", default="all-MiniLM-L6-v2")
    add("--work", default="superbert/paper", help="where models go")
    add("--results", default=str(ROOT / "glue/results"), help="where cells go")
    return run_program(parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())
