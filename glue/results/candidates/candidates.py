"""Compare changes of `--recipe best`. This file is the record of an experiment.

    python glue/results/candidates/candidates.py run CoLA 0 --data glue --bert BERT --work DIR
    python glue/results/candidates/candidates.py check TOY 0 --data glue --bert glue/TOY --work DIR
    python glue/results/candidates/candidates.py toy 0 --work DIR
    python glue/results/candidates/candidates.py table

The changes are not in the program, because none has been adopted. LOG.md says what came of them.

`run` first fills the cell `best` of glue.paper, for one task and one seed. `best` trains in two
stages. The first stage is the same for all candidates. A candidate therefore starts at the second
stage, with the cell's weights, theta and random generators, and makes one change to that stage.
`check` verifies this. It trains the second stage without a change, and compares the weights with
the cell's, bit for bit. `run` skips candidates that have a result in results.jsonl. `toy` trains
TOY with the paper's recipe and the adaptive step.

The candidates:

    base        no change
    ema 0.98    an exponential moving average of the second stage's weights is evaluated
    ema 0.995   the same, with a decay of 0.995
    cls         a sub-BERT also learns the teacher's pooled [CLS] state
    sandwich    one of the two architectures of a step is the smallest
    adaptive    theta's step adapts its length, as in ASNG (Akimoto et al. 2019)
    single      the second stage trains only the sub-BERT that the cell found. It is no candidate,
                but shows what sharing the weights costs.
    reward      no training: 150 architectures of the cell, ranked by three rewards
"""

import argparse
import contextlib
import copy
import io
import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import data
import yoco
from glue import paper, run_program
from model import Arch, read_json, UserError

STORE = Path(__file__).with_name("results.jsonl")
EMA_DECAYS = (0.98, 0.995)
TRAINED = ("cls", "sandwich", "adaptive", "single")
CANDIDATES = ("base", *(f"ema {decay}" for decay in EMA_DECAYS), *TRAINED, "reward")
FIXED_STEP = yoco.Categorical.step
NUM_DRAWN = 20                      # architectures below half of the encoder, for a candidate
NUM_RANKED = 150                    # architectures of five or six layers, for the rewards
NUM_TRAIN_EXAMPLES = 500            # of train, for the divergence


# ---- The cell, and what is kept of it ------------------------------------------------------------

def fill_cell(options, kept):
    """Fill the cell `best`, and save the start, the averages and the end of its second stage.

    kept: the file to save them in. Observing the training does not change its result.
    """
    averages, observed = {}, {}
    sort_and_copy_teacher, finish_training = yoco.sort_and_copy_teacher, yoco.finish_training

    def observe_start(state, stages, sets, settings, autocast):
        """Keep the state at the start of the second stage, and average the weights from now on."""
        sort_and_copy_teacher(state, stages, sets, settings, autocast)
        if state.step != stages[0].num_steps:
            return
        weights = state.model.state_dict()
        observed["start"] = copy.deepcopy(dict(
            model=weights, theta=state.P.theta, K=state.K, step=state.step,
            rng=state.rng.bit_generator.state, torch_rng=torch.get_rng_state(),
            stage=tuple(stages[1])))
        averages.update({decay: copy.deepcopy(weights) for decay in EMA_DECAYS})
        adam_step = state.adam.step

        def step_and_average():
            """Take Adam's step, then move every average toward the weights."""
            adam_step()
            for decay, average in averages.items():
                for name, tensor in state.model.state_dict().items():
                    average[name].lerp_(tensor, 1 - decay)
        state.adam.step = step_and_average

    def observe_end(run, state, *arguments, **facts):
        """Write the file before the training writes its result."""
        torch.save(dict(**observed, averages=averages, model=state.model.state_dict(),
                        theta=state.P.theta), kept)
        return finish_training(run, state, *arguments, **facts)

    yoco.sort_and_copy_teacher, yoco.finish_training = observe_start, observe_end
    kept.parent.mkdir(parents=True, exist_ok=True)
    status = paper.main(["run", "--tasks", options.task, "--variants", "best", "--seeds",
                         str(options.seed), "--precision", options.precision, "--data",
                         options.data, "--bert", options.bert, "--work", options.work])
    yoco.sort_and_copy_teacher, yoco.finish_training = sort_and_copy_teacher, finish_training
    if status:
        raise SystemExit(status)                # glue.paper has printed the reason
    if not kept.exists():
        raise UserError(f"{kept} is missing: remove the directory {options.work}, and start again, "
                        "because an interrupted training is not observed from its middle")


# ---- The candidates ------------------------------------------------------------------------------

def pooled_and_logits(model, inputs, arch):
    """Return the pooled [CLS] state [B, C] before dropout, and the logits [B, num_labels]."""
    pooled = []
    handle = model.pooler.register_forward_hook(lambda *call: pooled.append(torch.tanh(call[2])))
    logits = model(*inputs, arch)
    handle.remove()
    return pooled[0].float(), logits.float()


def gradient_with_cls(model, batch, archs, autocast, teacher):
    """Do what `yoco.weight_gradient` does, with one more loss for every sub-BERT.

    The loss is the mean squared distance to the teacher's pooled [CLS] state, with weight 1.
    """
    *inputs, labels = batch
    targets = yoco.teacher_targets(teacher, inputs, autocast)
    with torch.no_grad(), autocast():
        teacher_pooled, _ = pooled_and_logits(teacher, inputs, teacher.config.arch)
    model.zero_grad()
    label_losses = {}
    for arch, count in Counter(archs).items():
        with autocast():
            pooled, logits = pooled_and_logits(model, inputs, arch)
        label_losses[arch] = yoco.task_loss(logits, labels)
        total_loss = label_losses[arch]
        if arch != model.config.arch:
            total_loss = (total_loss + yoco.task_loss(logits, targets)) / 2
            total_loss = total_loss + F.mse_loss(pooled, teacher_pooled)
        (total_loss * count / len(archs)).backward()
    return [label_losses[arch].detach() for arch in archs]


class AdaptiveStep:
    """Adapt the length of theta's step as ASNG does, with its defaults (alpha is 1.5).

    `path` accumulates the directions of the steps. It is long if they agree, and the step then
    becomes longer. On noise, the step becomes shorter.
    """

    def __init__(self, P):
        self.num_dimensions = sum((theta > 0).sum() - 1 for theta in P.theta)
        self.path, self.gamma, self.delta = 0.0, 0.0, 1.0

    def step(self, P, samples, losses, source):
        """Move theta by one step, and adapt the length of the next one."""
        utilities = yoco.ranking_utility(losses)
        gradient = yoco.natural_gradient(P.theta, samples, utilities, source.theta)
        length = yoco.fisher_norm(P.theta, gradient)
        if length < 1e-8:
            return
        scaled = [g[t > 0] / np.sqrt(t[t > 0]) for g, t in zip(gradient, P.theta)]
        direction = np.concatenate(scaled) / length
        FIXED_STEP(P, samples, losses, self.delta, source)
        beta = min(1.0, self.delta / math.sqrt(self.num_dimensions))
        self.path = (1 - beta) * self.path + math.sqrt(beta * (2 - beta)) * direction
        self.gamma = (1 - beta) ** 2 * self.gamma + beta * (2 - beta)
        self.delta *= math.exp(beta * (self.path @ self.path / 1.5 - self.gamma))


def train_second_stage(study, candidate):
    """Train the cell's second stage again, with the change of one candidate.

    The candidate "none" changes nothing. The trained weights end up in `study.model`. Returns
    theta, and {"K": every tenth value, "delta": every fiftieth value}.
    """
    start, settings, sets, space = study.kept["start"], study.settings, study.sets, study.space
    model = study.model
    model.load_state_dict(start["model"])
    teacher = copy.deepcopy(model).eval()
    model.train()
    P, rng, K = yoco.Categorical(space.categories), np.random.default_rng(), start["K"]
    P.theta = [theta.copy() for theta in start["theta"]]
    rng.bit_generator.state = start["rng"]
    torch.set_rng_state(start["torch_rng"])
    adam, adaptive = yoco.new_adam(model), AdaptiveStep(P)
    gradient = gradient_with_cls if candidate == "cls" else yoco.weight_gradient
    stage = yoco.Stage(*start["stage"])
    batches = data.batches(sets.train, settings.batch_size, settings.seed, first=stage.first_step)
    all_K, all_deltas = [], []
    for t in range(stage.first_step, stage.first_step + stage.num_steps):
        if t == stage.first_step or t % max(1, sets.steps_per_epoch // 20) == 0:
            K = yoco.controller(P, settings.strategy)
            all_K.append(round(K, 3))
        batch = data.collate(sets.train, next(batches), study.device, sets.max_length)
        source = P if rng.random() < K else P.uniform()
        archs = [space.arch(source.sample(rng)) for _ in range(settings.archs_per_step)]
        if candidate == "sandwich":
            archs[-1] = space.smallest()
        if candidate == "single":
            archs = [study.found] * len(archs)
        losses = gradient(model, batch, archs, study.autocast, teacher)
        losses = yoco.clip_and_check(model, losses, t, stage, settings.lr, archs)
        rest_of_stage = 1 - (t - stage.first_step) / stage.num_steps
        adam.param_groups[0]["lr"] = settings.lr * rest_of_stage
        adam.step()
        choices = [space.choices(arch) for arch in archs]
        if candidate == "adaptive":
            adaptive.step(P, choices, losses, source)
            all_deltas.append(round(float(adaptive.delta), 4))
        else:
            P.step(choices, losses, settings.delta, source)
    return P.theta, {"K": all_K[::10], "delta": all_deltas[::50]}


# ---- Measurements --------------------------------------------------------------------------------

def draw_archs(study, count, seed, min_depth=0):
    """Draw different architectures below half of the encoder."""
    rng, archs = np.random.default_rng(seed), []
    while len(archs) < count:
        arch = paper.propose_random(study, study.limit, rng)
        if arch not in archs and arch.depth >= min_depth:
            archs.append(arch)
    return archs


def measure(study, theta):
    """Score drawn architectures and the one that a search of 200 evaluations finds."""
    evaluators = paper.make_evaluators(study)
    archs = draw_archs(study, NUM_DRAWN, seed=1)
    facts = {"depths": [arch.depth for arch in archs]}
    for split, evaluate in evaluators.items():
        facts[f"{split}_largest"] = evaluate(study.config.arch)["score"]
        facts[f"{split}_drawn"] = [evaluate(arch)["score"] for arch in archs]
    setup = SimpleNamespace(
        settings=SimpleNamespace(seed=study.settings.seed, evaluations=200, archs_per_step=2,
                                 delta=1.0),
        space=study.space, scores={}, costs={}, superbert_run={"theta": theta},
        evaluate=lambda arch: evaluators["holdout"](arch)["score"], measure=study.cost)
    yoco.move_toward_reward(setup, SimpleNamespace(log=lambda **_: None), study.limit)
    found = yoco.best_fit(setup.scores, study.cost, study.limit)
    return facts | measure_found(found, evaluators)


def measure_found(arch, evaluators):
    """Return the architecture that was found, and its scores."""
    scores = {f"{split}_found": evaluate(arch)["score"] for split, evaluate in evaluators.items()}
    return {"found": str(arch), **scores}


def measure_rewards(study):
    """Score architectures of five and six layers by three rewards, and on dev.

    The rewards are the score and the loss on the hold-out set, and the divergence from the
    super-BERT's answers on the hold-out set and a part of train. The divergence is KL(super-BERT
    || sub-BERT), or the mean squared difference for a regression.
    """
    task = data.load_task(study.run["data"])
    train_set, holdout_set = data.split_holdout(task.train, *study.run["held_out"])
    rng = np.random.default_rng(2)
    chosen = rng.choice(len(train_set), min(NUM_TRAIN_EXAMPLES, len(train_set)), replace=False)
    sets = {"holdout": holdout_set, "train": [train_set[i] for i in chosen], "dev": task.devs[0]}
    encoded = {name: study.encode(examples) for name, examples in sets.items()}
    labels = {name: torch.tensor([example.label for example in examples])
              for name, examples in encoded.items()}

    def answers(arch):
        """Return {set: logits} of an architecture, in the order of the examples."""
        logits = {}
        for name, examples in encoded.items():
            rows = torch.zeros(len(examples), study.model.num_labels)
            for indices in data.token_batches(examples, 2**11):
                *inputs, _ = data.collate(examples, indices, study.device)
                with torch.inference_mode(), study.autocast():
                    rows[indices] = study.model(*inputs, arch).float()
            logits[name] = rows
        return logits

    def score_and_loss(logits, name):
        """Return the task's score on a set, and the mean loss on the labels."""
        values = data.compute_metrics(study.metric, labels[name].numpy(), logits[name].numpy())
        targets = labels[name].float() if logits[name].shape[1] == 1 else labels[name].long()
        return values["score"], float(yoco.task_loss(logits[name], targets))

    study.model.eval()
    teacher = answers(study.config.arch)
    teacher = torch.cat([teacher["holdout"], teacher["train"]])
    rows = []
    min_depth = 2 * study.config.num_hidden_layers // 3 + 1
    for arch in draw_archs(study, NUM_RANKED, seed=2, min_depth=min_depth):
        logits = answers(arch)
        both = torch.cat([logits["holdout"], logits["train"]])
        if both.shape[1] == 1:
            divergence = F.mse_loss(both, teacher)
        else:
            divergence = F.kl_div(both.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        score, loss = score_and_loss(logits, "holdout")
        dev_score, _ = score_and_loss(logits, "dev")
        rows.append([arch.depth, score, loss, float(divergence), dev_score])
    return {"rows": rows}


# ---- Running, and the table ----------------------------------------------------------------------

def load_study(options):
    """Load the cell's run with `paper.load_run`, and add everything a candidate needs."""
    kept = Path(options.work, "kept", f"{options.task}-{options.seed}.pt")
    fill_cell(options, kept)
    name = f"{options.task}-best-{options.seed}"
    options.device = "cpu"
    study = paper.load_run(f"{options.work}/{name}", options)
    study.kept = torch.load(kept, weights_only=False)
    study.settings = SimpleNamespace(**{**study.run["settings"], "bert": options.bert})
    with contextlib.redirect_stdout(io.StringIO()):
        study.sets = yoco.split_and_tokenize(data.load_task(study.run["data"]), study.settings,
                                             study.config)
    study.limit = paper.encoder_budget(study.config, 0.5)
    study.cell = read_json(f"{options.work}/cells/paper-{name}.json")
    study.found = Arch(**study.cell["scores"][-1]["arch"])
    return study


def examine(study, candidate):
    """Return the facts of a candidate."""
    if candidate in TRAINED:
        theta, facts = train_second_stage(study, candidate)
    else:
        theta, facts = study.kept["theta"], {}
        averages = {f"ema {decay}": study.kept["averages"][decay] for decay in EMA_DECAYS}
        study.model.load_state_dict(averages.get(candidate, study.kept["model"]))
    study.model.eval()
    if candidate == "reward":
        return measure_rewards(study)
    if candidate == "single":
        found = study.cell["scores"][-1]
        of_cell = {f"{split}_shared": found[split]["score"] for split in ("holdout", "dev")}
        return measure_found(study.found, paper.make_evaluators(study)) | of_cell
    return {**measure(study, theta), **facts, "theta": [t.round(3).tolist() for t in theta]}


def read_store():
    """Return {(candidate, task, seed): facts} of results.jsonl."""
    lines = STORE.read_text().splitlines() if STORE.exists() else []
    records = [json.loads(line) for line in lines]
    return {(facts["candidate"], facts["task"], facts["seed"]): facts for facts in records}


def run(options):
    """Examine the candidates of one task and one seed, and add them to results.jsonl."""
    study = load_study(options)
    for candidate in options.candidates:
        if (candidate, options.task, options.seed) in read_store():
            continue
        facts = dict(candidate=candidate, task=options.task, seed=options.seed,
                     commit=study.cell["commit"], hardware=study.run["hardware"],
                     precision=options.precision, **examine(study, candidate))
        with open(STORE, "a") as file:
            file.write(json.dumps(facts) + "\n")
        print(f"{options.task} {options.seed} {candidate}", flush=True)


def check(options):
    """Verify that `train_second_stage` without a change gives the weights of the cell."""
    study = load_study(options)
    theta, _ = train_second_stage(study, "none")
    pairs = [*zip(study.model.state_dict().values(), study.kept["model"].values()),
             *zip(map(torch.from_numpy, theta), map(torch.from_numpy, study.kept["theta"]))]
    if not all(torch.equal(ours, the_cells) for ours, the_cells in pairs):
        raise UserError("the second stage without a change ends with other weights than the cell")
    print(f"{len(pairs)} tensors are equal, bit for bit")


def toy(options):
    """Train TOY with one seed, and with the adaptive step in the place of the fixed one."""
    steps = {}

    def step(P, samples, losses, delta=1.0, source=None):
        """Take an adaptive step. Every stage begins with a new one."""
        stage = tuple((theta > 0).sum() for theta in P.theta)
        steps.setdefault(stage, AdaptiveStep(P)).step(P, samples, losses, source or P)

    yoco.Categorical.step = step
    return yoco.main(["train", "--seed", str(options.seed), "--precision", options.precision,
                      "--out", f"{options.work}/toy-{options.seed}"])


def split_by_depth(facts, split):
    """Return the mean score of all drawn architectures, and of those with 3 to 6 layers."""
    scores, depths = np.array(facts[f"{split}_drawn"]), np.array(facts["depths"])
    return [scores.mean(), *(scores[depths == depth].mean() for depth in np.unique(depths))]


def table(options):
    """Print the gain of every candidate over `base`, and the rank correlations of the rewards."""
    store = read_store()
    for split, title in (("holdout", "hold-out"), ("dev", "dev")):
        print(f"| gain on {title} | pairs | 20 drawn | 3 layers | 4 | 5 | 6 | found |")
        print("|---|---|---|---|---|---|---|---|")
        for candidate in CANDIDATES[1:-2]:
            gains = []
            for (name, task, seed), facts in store.items():
                if name == candidate and "depths" in facts:
                    base = store["base", task, seed]
                    gains.append(np.subtract(
                        [*split_by_depth(facts, split), facts[f"{split}_found"]],
                        [*split_by_depth(base, split), base[f"{split}_found"]]))
            texts = [mean_and_error(column) for column in np.transpose(gains)]
            print(f"| {candidate} | {len(gains)} | {' | '.join(texts)} |")
        print()
    print("| found sub-BERT | hold-out, shared | hold-out, single | dev, shared | dev, single |")
    print("|---|---|---|---|---|")
    for (candidate, task, seed), facts in sorted(store.items()):
        if candidate == "single":
            scores = [facts[f"{split}_{kind}"] for split in ("holdout", "dev")
                      for kind in ("shared", "found")]
            print(f"| {task}, seed {seed} | {' | '.join(f'{score:.2f}' for score in scores)} |")
    print("\n| reward: rank correlation with dev | score | loss | divergence |")
    print("|---|---|---|---|")
    for (candidate, task, seed), facts in sorted(store.items()):
        if candidate == "reward":
            print(f"| {task}, seed {seed} | {' | '.join(correlations(facts['rows']))} |")
    print("\n| reward: dev score of the best 1, the best 10, all | score | loss | divergence |")
    print("|---|---|---|---|")
    for (candidate, task, seed), facts in sorted(store.items()):
        if candidate == "reward":
            print(f"| {task}, seed {seed} | {' | '.join(choices_of_rewards(facts['rows']))} |")


def mean_and_error(gains):
    """Return a text with the mean gain and its standard error over the pairs of task and seed."""
    text = f"{np.mean(gains):+.2f}"
    if len(gains) > 1:
        text += f" ± {np.std(gains, ddof=1) / math.sqrt(len(gains)):.2f}"
    return text


def choices_of_rewards(rows):
    """Return the dev scores of the architectures that each reward puts first, as texts."""
    rows = np.array(rows)
    texts = []
    for reward in rewards_of(rows):
        ranked = rows[np.argsort(-reward), 4]
        texts.append(f"{ranked[0]:.2f}, {ranked[:10].mean():.2f}, {ranked.mean():.2f}")
    return texts


def rewards_of(rows):
    """Return the three rewards of all rows. A low loss and a low divergence are good."""
    return [rows[:, 1], -rows[:, 2], -rows[:, 3]]


def correlations(rows):
    """Return the rank correlation of each reward with dev, with its 95% bootstrap interval."""
    rows, rng, texts = np.array(rows), np.random.default_rng(0), []
    for reward in rewards_of(rows):
        samples = rng.integers(len(rows), size=(2000, len(rows)))
        values = [data.spearman(reward[sample], rows[sample, 4]) for sample in samples]
        low, high = np.percentile(values, [2.5, 97.5])
        texts.append(f"{data.spearman(reward, rows[:, 4]):.2f} [{low:.2f}, {high:.2f}]")
    return texts


def main(argv=None):
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for command in (run, check, toy):
        sub = commands.add_parser(command.__name__, help=command.__doc__.splitlines()[0])
        if command is not toy:
            sub.add_argument("task")
        sub.add_argument("seed", type=int)
        sub.add_argument("--data", default="glue", help="the directory of the tasks")
        sub.add_argument("--bert", default="all-MiniLM-L6-v2")
        sub.add_argument("--work", default="superbert/candidates")
        sub.add_argument("--precision", default="fp32")
        sub.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES)
        sub.set_defaults(command=command)
    sub = commands.add_parser("table", help=table.__doc__.splitlines()[0])
    sub.set_defaults(command=table)
    return run_program(parser, lambda options: options.command(options), argv)


if __name__ == "__main__":
    sys.exit(main())
