"""YOCO-BERT: compress BERT once, deploy it everywhere (Zhang et al., arXiv 2106.02435).

One elastic BERT, the super-BERT, is trained per task; every smaller BERT inside it, a sub-BERT,
then works as it is, and a search finds the best one under a budget: parameters, FLOPs, latency.

    python yoco.py train  --data glue/MRPC             -> superbert/MRPC      (no --data: glue/TOY)
    python yoco.py search --max-params 60000000        -> subbert/MRPC-60000000
    python yoco.py eval   --model subbert/MRPC-60000000

Algorithm 1 (EE-SNG), whose line numbers stand on the right in `train`:

     1  initialise W and theta                      7  with probability K take P_theta, else pi
     2  for t = 1 ... t_max                         8  sample lambda architectures m from it
   3-5    every I steps: K <- rho / rho_max         9  loss L(w, m) of each, on this batch
     6    take a batch                             10  W <- Adam, theta <- natural gradient
                                                   11  stage over: open more of the space

Where each equation lives, and the test that checks it:

    Eq. 1, 3     W, theta minimise the expected loss    train                test_learning
    Eq. 2        best m with T(m) < Omega               best_fit             test_best_fit
    Eq. 4        natural gradient of ln P = 1_m - theta natural_gradient     test_inverse_fisher
    Eq. 5, 1st   gradient of W, mean over lambda        weight_gradient      test_weight_gradient
    Eq. 5, 2nd   gradient of theta, mean over lambda    natural_gradient     test_expected_gradient
                 its step, of Fisher length delta       Categorical.step     test_step_length
    Eq. 6        controller K = rho / rho_max           exploit_probability  test_controller
    Eq. 7        reward                                 reward               test_reward
    Alg. 1       EE-SNG over an expanding space         train, make_stages   test_stages

Symbols: theta `P.theta`; P_theta `P`; pi `P.uniform()`; rho `P.entropy()`; lambda `archs_per_step`;
m `arch`, or its category indices `choices`; Omega `budget`; T `cost`. The paper takes the step of
theta and its floor theta_min from ASNG (Akimoto et al. 2019). `# DIFFERS`, `# CHOICE` and
`# AUTHORS` mark a departure from the paper, a choice where it is silent, and what the authors' code
does instead; README.md lists them.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter, defaultdict, namedtuple
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

# First model, which sets how torch's threads wait before torch is loaded.
from model import (Arch, archs_to_tensor, BertConfig, capture_graph, count_flops, count_params,
                   device_name, ElasticBert, escape_control_chars, extract, fingerprint,
                   forward_many, latency, load_bert, peak_memory, print_line, read_json,
                   regular_file, save_bert, SearchSpace, select_device_and_precision,
                   sort_by_importance, tokenizer_files, user_errors_for, UserError, weight_files,
                   write_file, write_json, TOKENIZER_FILES)

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data

# How many processes torchrun started, and the number of this one among them, from 0.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ["RANK"]) if WORLD_SIZE > 1 else 0
SIGNALS = []        # Ctrl-C and SIGTERM: train and search stop after the step at hand


# ---- The distribution P_theta and its natural gradient (Sec. 3.3) --------------------------------

class Categorical:
    """P_theta(m): independent categorical variables; theta[v][c] is the probability of category c.

    A closed category has theta = 0 and an open one never does, so theta alone tells which is which.
    A sample is a list with one category index per variable. `sample` draws all of them; `step`
    wants None where a variable is inactive, as `SearchSpace.choices` gives it.
    """

    def __init__(self, sizes):
        self.theta = [np.full(size, 1 / size) for size in sizes]     # all open, uniform
        self.n = sum(size > 1 for size in sizes)                     # variables with a choice

    def uniform(self):
        """The exploration distribution pi: uniform over the open categories of each variable."""
        pi = Categorical([len(theta) for theta in self.theta])
        pi.theta = [(theta > 0) / (theta > 0).sum() for theta in self.theta]
        return pi

    def sample(self, rng):
        """One category per variable (also for layers that the sampled depth leaves inactive)."""
        return [int(rng.choice(len(theta), p=theta)) for theta in self.theta]

    def most_likely(self):
        """The mode: the most probable category of each variable."""
        return [int(theta.argmax()) for theta in self.theta]

    def entropy(self):
        """rho in nats, summed over the variables, which are independent."""
        # AUTHORS: average the layers' distributions first; layers that all collapsed, but differ,
        # then read as up to 64% of the maximum.
        return float(-sum((t[t > 0] * np.log(t[t > 0])).sum() for t in self.theta))

    def open(self, masks):
        """Set which categories are open (one bool array per variable): what enters gets the share
        of a uniform choice, what stays keeps its proportions, what closes gets 0."""
        # AUTHORS: keep theta on closed categories, where clipping drains it before any sample.
        for theta, mask in zip(self.theta, masks):
            stay = mask & (theta > 0)
            new = mask / mask.sum()                                  # the uniform choice
            new[stay] = theta[stay] / theta[stay].sum() * stay.sum() / mask.sum()
            theta[:] = new

    def step(self, samples, losses, delta=1.0):
        """One update of theta: a step of Fisher length `delta` along the natural gradient. Nothing
        moves where all losses tie or all samples are the same."""
        # DIFFERS from Eq. 5: ranks stand for losses, positive for the best. So this ascends, and
        # theta does not depend on the losses' scale.
        gradient = natural_gradient(self.theta, samples, ranking_utility(losses))        # Eq. 5
        norm = fisher_norm(self.theta, gradient)
        if norm > 1e-8:
            for theta, g in zip(self.theta, gradient):
                if g.any():                                          # else it stays as it is
                    moved = theta + delta / norm * g                 # of what is closed, still 0
                    theta[theta > 0] = raise_to_minimum(moved[theta > 0], self.n)


def natural_gradient(theta, samples, utilities):
    """(1/lambda) sum_i u_i (one_hot(m_i) - theta), one array per variable (Eq. 4 and 5).

    In expectation parameters the inverse Fisher matrix times the gradient of ln P_theta(m) is just
    one_hot(m) - theta: nothing is inverted. Where utilities sum to zero, theta drops out of every
    variable that is active in all samples: for lambda = 2, (one_hot(best) - one_hot(worst)) / 2.

    >>> natural_gradient([np.array([.5, .5])], [[0], [1]], [1, -1])
    [array([ 0.5, -0.5])]
    """
    gradient = [np.zeros_like(t) for t in theta]
    for sample, utility in zip(samples, utilities):
        for g, t, choice in zip(gradient, theta, sample):
            # CHOICE: None adds nothing. Given the depth, the loss does not depend on an inactive
            # layer, so its term has mean zero, and the mean is what is used.
            # AUTHORS: a random one-hot there, noise without a mean.
            if choice is not None:
                g += utility * (np.eye(len(t))[choice] - t) / len(samples)               # Eq. 4
    return gradient


def fisher_norm(theta, gradient):
    """||g||, the root of sum g^2 / theta: the length of a step in the Fisher metric of P_theta.
    Over all K categories that sum equals g' F g over the K - 1 free ones."""
    return math.sqrt(sum((g[t > 0] ** 2 / t[t > 0]).sum() for t, g in zip(theta, gradient)))


def raise_to_minimum(theta, n):
    """Raise one variable's open categories [size] to theta_min = 1 / (n (size - 1)), at most to
    1 / (2 size). n: the variables with a choice in the whole space, open or not. What this adds is
    taken from each in proportion to what it has above theta_min, so that the sum is 1 again and
    none falls below theta_min (which clipping and dividing would not ensure)."""
    size = len(theta)
    theta_min = 1 / max(n * (size - 1), 2 * size)
    theta = np.maximum(theta, theta_min)
    return theta - (theta.sum() - 1) * (theta - theta_min) / (theta.sum() - size * theta_min)


def ranking_utility(losses):
    """Losses -> utilities: +1/mu for the best mu = ceil(lambda / 4), -1/mu for the worst mu, 0
    between; equal losses share their mean.

    >>> ranking_utility([0.3, 0.1, 0.2, 0.2])
    array([-1.,  1.,  0.,  0.])
    """
    mu = math.ceil(len(losses) / 4)
    order, signs = np.argsort(losses), np.zeros(len(losses))
    signs[order[:mu]] += 1
    signs[order[-mu:]] -= 1
    # AUTHORS: they find ties between positive values only; in search all are negative.
    _, group = np.unique(losses, return_inverse=True)
    return (np.bincount(group, signs) / np.bincount(group))[group] / mu


def exploit_probability(P):
    """K = rho / rho_max over the open space, 1 where that is one architecture (Eq. 6)."""
    rho_max = P.uniform().entropy()
    return P.entropy() / rho_max if rho_max > 0 else 1.0                                 # Eq. 6


# ---- Progressive expanding of the training space (Sec. 3.2) --------------------------------------

# The authors' epochs of the stages that open one more choice: of heads, of FFN sizes, of depth.
EPOCHS = {
    "CoLA": ((4, 4), (4, 4, 4), (4, 4, 4)),
    "MNLI": ((3, 1), (1, 1, 1), (1, 1, 1)),
    "MRPC": ((5, 3), (3, 3, 3), (3, 3, 3)),
    "QNLI": ((10, 5), (5, 5, 5), (1, 1, 1)),
    "QQP": ((1, 1), (1, 1, 1), (1, 1, 3)),
    "RTE": ((3, 1), (1, 1, 1), (1, 1, 2)),
    "SST-2": ((1, 1), (1, 1, 1), (1, 1, 1)),
    "TOY": ((2, 2), (2, 2, 2), (2, 2, 6)),
    "default": ((3, 3), (3, 3, 3), (3, 3, 3)),
}
# AUTHORS: 1e-10 in QNLI's depth stages, which freezes W, and 1e-5 for SST-2; these are the paper's.
# They are BERT-base's: a small BERT wants more, MiniLM --lr 1e-4 (glue/results/README.md).
LEARNING_RATES = {"MNLI": 1e-5, "QNLI": 1e-5, "TOY": 1e-3, "default": 2e-5}

# A stretch of steps with one open space: the open choices of each kind, largest first; its first
# step t, and how many it has.
Stage = namedtuple("Stage", "name depths heads ffn_sizes first steps")


def open_masks(space, stage):
    """The open categories of each variable in a stage, as `Categorical.open` wants them."""
    layer = [h in stage.heads and k in stage.ffn_sizes for h, k in space.pairs]
    return [np.isin(space.depths, stage.depths)] + [np.array(layer)] * space.depths[-1]


def make_stages(space, task, steps_per_epoch, kind="progressive", epochs=0.0):
    """The stages of a training. progressive: the largest alone, then one more choice at a time, of
    heads, of FFN sizes, of depths; all: the largest alone, then all choices at once, half of the
    epochs each; largest: the first stage alone. epochs: in all, 0 for the table's."""
    h_epochs, k_epochs, d_epochs = EPOCHS.get(task, EPOCHS["default"])
    d, h, k = space.depths[::-1], space.heads[::-1], space.ffn_sizes[::-1]
    # A row: name; how many depths, heads and FFN sizes are open, from the largest on; epochs.
    # AUTHORS: no stage for the largest alone. CHOICE: as many epochs as the last stage.
    table = [("largest", 1, 1, 1, d_epochs[-1])]
    table += [("heads", 1, n, 1, e) for n, e in zip(range(2, len(h) + 1), h_epochs)]
    table += [("FFN", 1, len(h), n, e) for n, e in zip(range(2, len(k) + 1), k_epochs)]
    table += [("depth", n, len(h), len(k), e) for n, e in zip(range(2, len(d) + 1), d_epochs)]
    if kind == "all":
        # CHOICE: half each, since all others inherit from the largest and learn from it.
        half = sum(row[-1] for row in table) / 2
        table = [("largest", 1, 1, 1, half), ("all", len(d), len(h), len(k), half)]
    elif kind == "largest":
        table = table[:1]
    scale = epochs / sum(row[-1] for row in table) if epochs else 1.0
    stages, first = [], 0
    for name, n_d, n_h, n_k, stage_epochs in table:
        steps = max(1, round(stage_epochs * scale * steps_per_epoch))
        stages.append(Stage(name, d[:n_d], h[:n_h], k[:n_k], first, steps))
        first += steps
    return stages


# ---- train: Algorithm 1 --------------------------------------------------------------------------

RECIPES = {
    "paper": {"stages": "progressive", "reorder": False, "distill": False, "keep_layers": "first"},
    "best": {"stages": "all", "reorder": True, "distill": True, "keep_layers": "even"}}
CONTROLLERS = {"ee": exploit_probability, "noise": exploit_probability,
               "exploit": lambda P: 1.0, "explore": lambda P: 0.0}


def train(settings):
    """Train a super-BERT as TrainSettings say; return its run.json. On the right: Algorithm 1."""
    settings = resolve_defaults(settings)
    run = Run(settings, settings.data, settings.bert)                # refuses an --out in use
    train_file = fingerprint(f"{settings.data}/train.tsv")
    device, autocast = select_device_and_precision(settings.device, settings.precision)
    task = data.load_task(settings.data)
    tokenizer = tokenizer_files(settings.bert)
    torch.manual_seed(settings.seed)                                 # a new classifier, dropout
    model = initial_model(settings, task).to(device).train()                             # 1
    space = SearchSpace.for_config(model.config)
    split = holdout_split(settings, train_file)
    kept, held = data.split_holdout(task.train, *split)
    max_length = min(settings.max_length, model.config.max_position_embeddings)
    encode = data.make_encoder(settings.bert, max_length)
    examples = encode(kept)
    per_epoch = math.ceil(len(kept) / settings.batch_size)
    stages = make_stages(space, task.name, per_epoch, settings.stages, settings.epochs)
    steps = stages[-1].first + stages[-1].steps
    interval = max(1, per_epoch // 20)                               # I: 5% of it, as the authors'
    lr = settings.lr or LEARNING_RATES.get(task.name, LEARNING_RATES["default"])
    P, rng = Categorical(space.categories), np.random.default_rng(settings.seed)         # 1
    # Two ways to the same losses and gradients; on a GPU masks are faster than slices.
    gradient = graphed_gradient() if device.type == "cuda" else weight_gradient
    first, K, adam, teacher = 0, 1.0, new_adam(model), None          # of a run that is new

    run.open()
    if run.finished:
        return read_run(run.path)
    if run.resumed:
        first, K, teacher = restore(run, model, adam, P, rng)
    order = data.batches(examples, settings.batch_size, settings.seed, first)
    print_line("\n".join(data.summarize_task(task, kept, held, examples, settings.bert, max_length)))
    print_line(f"{steps} steps, {steps / per_epoch:.3g} epochs; {space.size():.1e} architectures")
    progress = Progress(first, steps)
    # CHOICE: t counts batches, as Alg. 1's loop takes one each, though it calls them epochs.
    for t in range(first, steps):                                                        # 2
        stage = [begun for begun in stages if begun.first <= t][-1]
        if t == stage.first:
            P.open(open_masks(space, stage))                                             # 11
            adam = new_adam(model)
        if len(stages) > 1 and t == stages[1].first:                 # the largest was alone so far
            if settings.reorder:
                sort_by_importance(model, importance(model, examples, settings, autocast))
            if settings.distill:
                teacher = copy.deepcopy(model).eval()
        if t == stage.first or t % interval == 0:                                        # 3
            K = CONTROLLERS[settings.strategy](P)                                        # 4, 5
        mine, share = shard_batch(next(order))                         # the whole, of one process
        batch = data.collate(examples, mine, device, max_length)                         # 6
        source = P if rng.random() < K else P.uniform()                                  # 7
        archs = [space.arch(source.sample(rng)) for _ in range(settings.archs_per_step)]   # 8
        # The losses; Eq. 5's gradient of W is then in every .grad.
        losses = gradient(model, batch, archs, autocast, teacher)                        # 9
        losses, stop = all_reduce_gradients(model, losses, share)              # sums; the signal heard, or 0
        # CHOICE: clipped, as by the authors, where the paper says nothing.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses = check_finite_losses(losses, norm, t, stage, lr, archs)       # or stops before W is spoilt
        for group in adam.param_groups:                              # linear to 0 in every stage
            group["lr"] = lr * (1 - (t - stage.first) / stage.steps)
        adam.step()                                                                      # 10
        ranked = rng.permutation(losses) if settings.strategy == "noise" else losses
        # As in Alg. 1, also samples of pi move theta. `choices` has None for what is not active.
        if settings.strategy != "explore":
            P.step([space.choices(arch) for arch in archs], ranked, settings.delta)      # 10
        report(run, progress, t + 1, stage, losses, K, P, space, model.config)
        if stop or (t + 1) % settings.checkpoint_every == 0 or t + 1 == steps:
            save(run, t + 1, K, model, adam, P, rng, teacher)
            if stop:
                raise KeyboardInterrupt(stop)

    if RANK > 0:
        return None
    theta = [variable.tolist() for variable in P.theta]
    named = reference_archs(space, theta)
    scores = {}
    if held:
        score = data.make_evaluator(model, [encode(held)], task.metric, device, autocast)
        scores = {name: score(arch) for name, arch in named.items()}
    save_bert(model, run.path, tokenizer)                            # before anything is printed
    result = run.finish(device, autocast, task=task.name, metric=task.metric, pairs=task.pairs,
                        data=settings.data, train=train_file, held_out=split, lr=lr, steps=steps,
                        max_length=max_length, theta=theta, holdout=scores)
    for name, found in scores.items():
        print_line(f"hold-out, {name}: {in_words(model.config, named[name], found)}")
    return result


def weight_gradient(model, batch, archs, autocast, teacher=None):
    """Leave in every .grad the mean over `archs` of the gradient of the loss on one batch (Eq. 5,
    first line); return the losses on the labels alone, which rank the architectures, a scalar for
    each. With a `teacher` all but the largest also learn from its logits."""
    # AUTHORS: the losses that are ranked come from two batches, so the batch decides which is best.
    # CHOICE: gradients start as None, so that Adam passes over a layer that no architecture has;
    # and an architecture drawn twice is computed once and weighs double.
    model.zero_grad()
    *inputs, labels = batch
    wanted = teacher_targets(teacher, inputs, autocast)
    losses = {}                                                      # on the labels alone
    for arch, count in Counter(archs).items():
        with autocast():
            logits = model(*inputs, arch).float()                    # [B, num_labels]
        losses[arch] = objective = task_loss(logits, labels)
        if teacher and arch != model.config.arch:
            # CHOICE: as much weight for the teacher as for the labels, temperature 1.
            objective = (objective + task_loss(logits, wanted)) / 2
        (objective * count / len(archs)).backward()                                      # Eq. 5
    return [losses[arch].detach() for arch in archs]


def teacher_targets(teacher, inputs, autocast):
    """What a teacher wants on a batch: probabilities [B, num_labels], or the one logit [B, 1]."""
    if teacher is None:
        return None
    with torch.no_grad(), autocast():
        logits = teacher(*inputs).float()
    return logits.softmax(1) if logits.shape[1] > 1 else logits


def task_loss(logits, wanted):
    """Cross-entropy of logits [B, num_labels] with labels [B] or probabilities [B, num_labels]; of
    a single logit, [B, 1], the mean squared distance from numbers, [B] or [B, 1]."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], wanted.flatten())
    return F.cross_entropy(logits, wanted)


def new_adam(model):
    """Adam without weight decay (Sec. 4), a new one in every stage; `train` sets its rate."""
    # CHOICE: inside a layer that is used, Adam's momentum also moves the slices that are not.
    return torch.optim.Adam(model.parameters(), lr=0.0, eps=1e-8, fused=True)


def importance(model, examples, settings, autocast):
    """The importance of every head [H] and neuron [F] of each layer, for `reorder`: |sum w dL/dw|
    over its output weights, of the largest, over 32 batches at most (Molchanov et al. 2019)."""
    totals = [[0, 0] for _ in model.layers]
    device = model.pooler.weight.device
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    order = data.batches(examples, settings.batch_size, settings.seed)
    model.eval()                                                     # no dropout
    for _ in range(min(per_epoch, 32)):
        mine, share = shard_batch(next(order))
        batch = data.collate(examples, mine, device, model.config.max_position_embeddings)
        losses = weight_gradient(model, batch, [model.config.arch], autocast)
        all_reduce_gradients(model, losses, share)                             # .grad is the whole batch's
        for layer, total in zip(model.layers, totals):
            outs = (layer.attention_out.weight, layer.D), (layer.ffn_out.weight, 1)
            for i, (w, size) in enumerate(outs):
                part = (w * w.grad).detach().sum(0)                  # per input column
                total[i] = total[i] + part.view(-1, size).sum(1).abs()
    model.train()
    return totals


# ---- search: the same distribution, moved by a reward (Sec. 3.4) ---------------------------------

def reward(score, cost, budget, full_cost, alpha=2):
    """ACC(m) where the sub-BERT fits; beyond the budget less and less, down to 0 at T(M) (Eq. 7).

    score: ACC(m) in %; cost: T(m); budget: Omega; full_cost: T(M); the last three in one unit. A
    score <= 0, which the factor would raise, stays, and so does any where budget >= T(M).

    >>> reward(80, 50, 60, 100), reward(80, 80, 60, 100), reward(80, 100, 60, 100)
    (80, 20.0, 0.0)
    """
    # DIFFERS from Eq. 7: its printed factor is excess / largest excess: 0 at Omega, and growing.
    # AUTHORS: one minus that, as here, but on negative scores (Matthews) too, which it raises.
    if cost < budget or budget >= full_cost or score <= 0:
        return score
    return score * max(0.0, 1 - (cost - budget) / (full_cost - budget)) ** alpha         # Eq. 7


def search(settings):
    """Move P_theta toward the highest reward with W fixed, and write the best sub-BERT that fits,
    one for each budget. Returns their run.json, one for each."""
    device, autocast = select_device_and_precision(settings.device, settings.precision)
    superbert = settings.model or latest_superbert()
    trained, task = read_superbert(superbert)
    model = data.load_trained(superbert, task).to(device)
    tokenizer = tokenizer_files(superbert)
    space = SearchSpace.for_config(model.config)
    encode = data.make_encoder(superbert)
    _, held = data.split_holdout(task.train, *trained["held_out"])
    if settings.select_on == "holdout" and not held:
        raise UserError("the super-BERT was trained without a hold-out: use --select-on dev")
    devs = [encode(part) for part in task.devs]
    selects = devs if settings.select_on == "dev" else [encode(held)]
    score = data.make_evaluator(model, selects, task.metric, device, autocast)
    on_dev = data.make_evaluator(model, devs, task.metric, device, autocast)
    largest, smallest = space.largest(), space.smallest()
    kind, searches = budgets_from_settings(settings, superbert)         # {budget as typed: its own settings}
    runs = [Run(own, trained["data"], superbert) for own in searches.values()]
    measure = cost_of(kind, model, autocast)
    memo, known = read_logged_scores(runs, space)                  # arch -> ACC(m) in %; arch -> T(m)
    cost = {arch: measure(arch) for arch in (largest, smallest)} | known
    budgets = [parse_budget(text, cost[smallest], cost[largest], UNITS[kind]) for text in searches]
    for run in runs:
        run.open()

    for run, budget in zip(runs, budgets):
        if run.finished:                                 # its log has filled the memo
            continue
        P, rng = Categorical(space.categories), np.random.default_rng(settings.seed)
        P.theta = [np.array(theta) for theta in trained["theta"]]
        progress = Progress(0, settings.evaluations)
        for asked in range(0, settings.evaluations, settings.archs_per_step):
            n = min(settings.archs_per_step, settings.evaluations - asked)
            archs = [space.arch(P.sample(rng)) for _ in range(n)]
            for arch in (largest, smallest, *archs):     # the ends always, so that something fits
                if arch not in memo:
                    memo[arch] = score(arch)["score"]
                    if arch not in cost:
                        cost[arch] = measure(arch)
                    run.log(choices=space.choices(arch), score=memo[arch], cost=cost[arch])
            rewards = [reward(memo[m], cost[m], budget, cost[largest]) for m in archs]
            P.step([space.choices(m) for m in archs], [-r for r in rewards], settings.delta)
            progress.show(asked + n, f"asked, {len(memo)} known")
            if SIGNALS:
                raise KeyboardInterrupt(SIGNALS[0])      # all is in the log
        # A latency must fit when it is measured again, too; else the next best is taken.
        while best := best_fit(memo, cost.get, budget):
            cost[best] = max(cost[best], measure(best))
            if cost[best] < budget:
                break
        if best is None:
            raise UserError(f"nothing kept {budget:.4g} {UNITS[kind]} when it was measured again")
        dev = on_dev(best)
        save_bert(extract(model, best), run.path, tokenizer)
        inherited = ("task", "metric", "pairs", "data", "train", "held_out", "max_length")
        run.finish(device, autocast, **{name: trained[name] for name in inherited},
                   superbert=superbert, unit=UNITS[kind], budget=budget, cost=cost[best],
                   full_cost=cost[largest], arch=best._asdict(), selected_on=settings.select_on,
                   params=count_params(model.config, best), flops=count_flops(model.config, best),
                   selection_score=memo[best], dev=dev, evaluations_asked=settings.evaluations,
                   evaluations_run=len(read_log(run.path)) - 1)
    results = [read_run(run.path) for run in runs]
    for run, found in zip(runs, results):
        print_line(format_result(model.config, run.path, found))
    return results


def best_fit(memo, cost, budget):
    """The architecture of the highest score with T(m) < Omega (Eq. 2), or None."""
    fitting = [arch for arch in memo if cost(arch) < budget]
    # CHOICE: at a tie the cheaper one.
    return max(fitting, key=lambda arch: (memo[arch], -cost(arch)), default=None)        # Eq. 2


# ---- eval; budgets and costs ---------------------------------------------------------------------

def evaluate(settings):
    """Print architecture, parameters, FLOPs, latency and dev metrics."""
    if not settings.model:
        raise UserError("name a model with --model, such as subbert/MRPC-60000000")
    device, autocast = select_device_and_precision(settings.device, settings.precision)
    run = read_run(settings.model)
    task = data.load_task(settings.data or run["data"])
    model = data.load_trained(settings.model, task).to(device)
    devs = [data.encode(part, settings.model) for part in task.devs]
    score = data.make_evaluator(model, devs, task.metric, device, autocast)
    measure = cost_of("latency", model, autocast)
    named = {"sub-BERT": model.config.arch}
    if "theta" in run:
        named = reference_archs(SearchSpace.for_config(model.config), run["theta"])
    for name, arch in named.items():
        print_line(f"{name}: {arch}\n  {in_words(model.config, arch, score(arch))}\n  latency "
            f"{measure(arch):.2f} ms: one sequence of at most 128 tokens, {hardware(device)}")
    print_line(f"on dev of {task.name}; always the most frequent answer: {data.majority(task):.2f}")


UNITS = {"params": "parameters", "flops": "FLOPs", "latency": "ms"}


def budgets_from_settings(settings, superbert):
    """The kind of budget that is asked for; and {budget: settings of the search for it alone, with
    the directory that it writes}, each budget as typed, in small letters."""
    kinds = [kind for kind in UNITS if getattr(settings, f"max_{kind}")]
    if len(kinds) != 1:
        raise UserError("name one kind of budget: --max-params, --max-flops or --max-latency")
    kind = kinds[0]
    typed = " ".join(getattr(settings, f"max_{kind}")).lower()
    # A blank may stand before a unit: "60 M".
    wishes = re.sub(r"(?<=[\d.])\s+(?=[a-z])", "", typed).split() or [""]    # blank: refused later
    searches = {}
    for wish in wishes:
        ending = wish if kind == "params" else f"{wish}-{kind}"
        out = f"subbert/{os.path.basename(os.path.realpath(superbert))}-{ending}"
        if settings.out:
            out = settings.out if len(set(wishes)) == 1 else f"{settings.out}/{ending}"
        searches[wish] = dataclasses.replace(settings, model=superbert, out=out,
                                             **{f"max_{kind}": [wish]})
    return kind, searches


def parse_budget(text, least, full, unit):
    """'60000000', '60e6', '60m', '0.5x' (of T(M)), or of milliseconds '12' or '12ms' -> Omega.
    least, full: T(m) of the smallest and of the largest. UserError where nothing fits."""
    scales, such = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "x": full}, "6e7, 60M or 0.5x"
    if unit == "ms":
        scales, such = {"": 1, "ms": 1, "x": full}, "12, 12ms or 0.5x"
    match = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:e\+?\d{1,2})?)([a-z]*)", text)
    budget = float(match[1]) * scales.get(match[2], 0) if match else 0
    if budget <= 0:
        raise UserError(f"{text!r} is not a positive budget in {unit}, such as {such}")
    if least >= budget:
        raise UserError(f"no sub-BERT has T(m) < {budget:,.12g} {unit}: the smallest has "
                        f"{least:,.12g} ({least / full:.3f}x)")
    if budget > full:
        print_line(f"the budget {budget:,.12g} bounds nothing: the full model has {full:,.12g} {unit}")
    return budget


def cost_of(kind, model, autocast):
    """T(m) as a function of an architecture: its parameters, its FLOPs, or the milliseconds that
    one sequence takes the extracted model, measured anew in every call."""
    T = min(128, model.config.max_position_embeddings)
    return {"params": lambda arch: count_params(model.config, arch),
            "flops": lambda arch: count_flops(model.config, arch),
            "latency": lambda arch: latency(extract(model, arch), T, autocast)}[kind]


def reference_archs(space, theta):
    """The architectures by which a super-BERT is judged."""
    likely = space.arch([int(np.argmax(variable)) for variable in theta])
    return {"largest": space.largest(), "most likely": likely, "smallest": space.smallest()}


def format_scores(config, arch, result):
    """Parameters, FLOPs and {metric: %} in one line; shares are of the largest of `config`."""
    params, flops = count_params(config, arch), count_flops(config, arch)
    part = params / count_params(config, config.arch), flops / count_flops(config, config.arch)
    return (f"{params:,} parameters ({part[0]:.3f}x)  {flops / 1e9:.3g} GFLOPs ({part[1]:.3f}x)  "
            + "  ".join(f"{name} {value:.2f}" for name, value in result.items()))


def format_result(config, path, found):
    """What a search found, in two lines, from its run.json."""
    arch = Arch(**found["arch"])
    dev = "dev (optimistic: it selected)" if found["selected_on"] == "dev" else "dev"
    return (f"found: {arch}, {found['cost']:,.6g} of {found['budget']:,.6g} {found['unit']}, in "
            f"{path}; score {found['selection_score']:.2f} on {found['selected_on']}, which "
            f"selects; evaluations: {found['evaluations_asked']} asked, {found['evaluations_run']} "
            f"run\n  {dev}: {in_words(config, arch, found['dev'])}")


# ---- What a training begins with, and what it reports --------------------------------------------

def resolve_defaults(settings):
    """Settings of train with nothing left open: the recipe's, and the directories by default."""
    own = Path(settings.data, "config.json").exists()
    bert = settings.bert or (settings.data if own else "bert-base-uncased")
    out = settings.out or f"superbert/{os.path.basename(os.path.realpath(settings.data))}"
    recipe = {name: value for name, value in RECIPES[settings.recipe].items()
              if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, bert=bert, out=out, **recipe)
    if settings.stages == "largest" and (settings.reorder or settings.distill):
        raise UserError("--stages largest trains one architecture: no --reorder and no --distill")
    return settings


def fingerprint_directories(*directories):
    """The fingerprint of the data, weights and tokenizer files in some directories."""
    names = ("train.tsv", "dev.tsv", "dev_matched.tsv", "dev_mismatched.tsv", "config.json",
             *TOKENIZER_FILES)
    paths = []
    for directory in directories:
        paths += [Path(directory, name) for name in names] + weight_files(directory)
    return fingerprint(*paths)


def initial_model(settings, task):
    """The pretrained BERT; or one from random weights, where the data directory has a config.json
    of its own without weights."""
    bert = Path(settings.bert)
    weights = [path for path in bert.glob("*") if re.search(r"\.(safetensors|bin|h5)", path.name)]
    if bert == Path(settings.data) and not weights:
        print_line(f"{bert} has a config.json and no weights: they start at random")
        model = ElasticBert(BertConfig.load(bert), task.num_labels)
        model.config.name_labels(task.labels)
    else:
        model = load_bert(bert, task.num_labels, task.labels)
    model.config.keep_layers = settings.keep_layers
    return model


def holdout_split(settings, train_file):
    """[share, seed] of the hold-out. What --bert has learned from must not select: where it was
    trained on the same train.tsv, which has the fingerprint train_file, its hold-out stays."""
    path = Path(settings.bert) / "run.json"
    before = read_json(path) if path.exists() else {}
    same = before.get("train") == train_file
    return before["held_out"] if same else [settings.holdout, settings.seed]


def check_finite_losses(losses, norm, t, stage, lr, archs):
    """The losses as numbers (which waits for the device, once); UserError where one of them, or the
    norm of their gradient, is not finite."""
    *losses, norm = torch.stack([*losses, norm]).tolist()
    if not np.isfinite([*losses, norm]).all():
        raise UserError(f"diverged: losses {losses}, norm of the gradient {norm}; step {t + 1}, "
                        f"stage {stage.name}, learning rate {lr:g}; {'; '.join(map(str, archs))}")
    return losses


def min_exploit_probability(P):
    """The K that theta_min still leaves when every variable of P has collapsed."""
    collapsed = P.uniform()
    for theta in collapsed.theta:
        theta[theta > 0] = raise_to_minimum(np.eye((theta > 0).sum())[0], P.n)
    return exploit_probability(collapsed)


def report(run, progress, done, stage, losses, K, P, space, config):
    """Log every tenth step, and theta at most about fifty times; show where the training is."""
    if done % 10 and done < progress.total:
        return
    loss = float(np.mean(losses))
    floor = min_exploit_probability(P)
    tops = [theta.max() for theta in P.theta if (theta > 0).sum() > 1] or [1.0]
    facts = dict(step=done, stage=stage.name, loss=loss, K=K, floor=floor, entropy=P.entropy(),
                 top_probability=float(np.mean(tops)),
                 most_likely_params=count_params(config, space.arch(P.most_likely())))
    if done % (10 * math.ceil(progress.total / 500)) == 0 or done == progress.total:
        facts["theta"] = [theta.round(4).tolist() for theta in P.theta]
    run.log(**facts)
    progress.show(done, f"stage {stage.name}  loss {loss:.3f}  K {K:.2f} (floor {floor:.2f})")


class Progress:
    """Where the work stands: a line every ten seconds, and one at the end."""

    def __init__(self, done, total):
        self.done, self.total, self.shown = done, total, time.perf_counter()

    def show(self, done, text):
        """Say that `done` of the steps are done, and how long those since the last line took."""
        seconds = time.perf_counter() - self.shown
        if seconds > 10 or done == self.total:
            ms = 1000 * seconds / max(1, done - self.done)
            print_progress(f"{done}/{self.total}  {text}  {ms:.0f} ms/step  "
                 f"{(self.total - done) * ms / 60_000:.1f} min left")
            self.done, self.shown = done, time.perf_counter()


def print_progress(text):
    """Print to stderr. What nobody hears, or a full disk does not take, must not cost a run."""
    with contextlib.suppress(OSError, RuntimeError):     # RuntimeError: a signal while printing
        print(escape_control_chars(text), file=sys.stderr, flush=True)


# ---- The directory of a run: log, checkpoint, resuming -------------------------------------------

class Run:
    """The directory that a command writes. Its log grows by whole lines, its checkpoint is replaced
    as a whole, and run.json comes last: where that is, the run is finished. Rank 0 alone writes."""

    def __init__(self, settings, *reads):
        """UserError where the directory holds what must not be replaced, or what the command would
        not go on with. reads: the directories that the command reads."""
        self.path, self.started = Path(settings.out), time.perf_counter()
        self.log_path = self.path / "log.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.finished = (self.path / "run.json").exists() and not settings.overwrite
        before = read_log(self.path) if settings.resume else []
        self.resumed = bool(before)
        own = {name: value for name, value in dataclasses.asdict(settings).items()
               if name not in ("out", "overwrite", "resume")}
        self.begun = dict(settings=own, inputs=fingerprint_directories(*reads), world_size=WORLD_SIZE)
        # Not Path.resolve, which raises where links form a loop.
        if os.path.realpath(self.path) in map(os.path.realpath, reads):
            raise UserError(f"--out {self.path} is what the command reads: choose another")
        if settings.resume and settings.overwrite:
            raise UserError("--resume goes on, --overwrite begins anew: leave one of them out")
        may_hold = settings.overwrite or (settings.resume and self.log_path.exists())
        for name, holds in (("run.json", "a finished result"), ("log.jsonl", "an unfinished run"),
                            ("config.json", "another model")):
            if (self.path / name).exists() and not may_hold:
                raise UserError(f"{self.path} holds {holds}: choose another --out, replace it with "
                                "--overwrite, or go on with --resume if it is unfinished")
        if settings.resume and not before and (self.finished or self.checkpoint.exists()):
            raise UserError(f"{self.log_path} is damaged: begin anew with --overwrite")
        if self.resumed:
            with user_errors_for(self.log_path):
                then = before[0] | before[0]["settings"]
            now = self.begun | own
            if then.get("inputs") != now["inputs"]:
                raise UserError(f"the files in {' or '.join(reads)} have changed since {self.path} "
                                "was started: put them back, or begin anew with --overwrite")
            for name in now:
                if name != "settings" and then.get(name) != now[name]:
                    raise UserError(f"{self.path} was started with {name} = {then.get(name)!r}, "
                                    f"not {now[name]!r}: say so, or begin anew with --overwrite")
        if WORLD_SIZE > 1:
            dist.barrier()                                           # all have looked

    def open(self):
        """Lock the directory, and clear it unless the run goes on. The log's first line says what
        the run began with."""
        if RANK > 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that a full disk is noticed here, not when Python exits.
        self.log_file = open(self.log_path, "ab", buffering=0)
        try:
            import fcntl                                             # not on Windows
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # until the process ends
        except BlockingIOError:
            raise UserError(f"another run is writing {self.path}: wait for its end, or choose "
                            "another --out") from None
        except (ImportError, OSError):                               # as on some network's disks
            pass
        for path in self.path.glob(".*.tmp"):                        # of a run that was killed
            path.unlink()
        if self.resumed:
            # A crash may have left a part of a line.
            self.log_file.truncate(self.log_path.read_bytes().rindex(b"\n") + 1)
        else:
            # Old results go before a new run begins.
            for name in ("run.json", "checkpoint.safetensors", "config.json", "model.safetensors",
                         "model.safetensors.index.json", *TOKENIZER_FILES):
                (self.path / name).unlink(missing_ok=True)
            self.log_file.truncate(0)
            self.log(**self.begun)
        if self.finished:
            print_line(f"{self.path} is finished")
            self.checkpoint.unlink(missing_ok=True)                  # if it was killed before that

    def log(self, **facts):
        """Append one line to log.jsonl, written at once."""
        line = json.dumps(facts).encode() + b"\n"
        try:
            while line and RANK == 0:
                written = self.log_file.write(line)                  # a full disk takes a part
                line = line[written:]
        except OSError as error:
            error.filename = str(self.log_path)
            raise

    def finish(self, device, autocast, **facts):
        """Write run.json, which makes the result final, and drop the checkpoint."""
        with autocast():
            bf16 = torch.is_autocast_enabled(device.type)            # what "auto" has chosen
        facts |= dict(**self.begun, seconds=round(time.perf_counter() - self.started, 1),
                      peak_memory_mib=round(peak_memory(device)), hardware=device_name(device),
                      precision="bf16" if bf16 else "fp32", wrote=fingerprint_directories(self.path),
                      versions={name: metadata.version(name) for name in (
                          "torch", "numpy", "tokenizers", "safetensors")},
                      finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        write_json(self.path / "run.json", **facts)
        self.checkpoint.unlink(missing_ok=True)
        print_line(f"wrote {self.path}; {facts['seconds']:.0f} s, {facts['peak_memory_mib']} MiB at most")
        return facts


def read_log(directory):
    """The whole lines of a run's log; none where there is no log."""
    path = Path(directory, "log.jsonl")
    with user_errors_for(path):
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]


def read_logged_scores(runs, space):
    """What the logs of interrupted searches hold: {arch: ACC(m) in %}, {arch: T(m)}."""
    memo, spent = {}, {}
    for run in runs:
        with user_errors_for(run.log_path):
            lines = read_log(run.path)[1:] if run.resumed else []
            for line in lines:
                arch = space.arch(line["choices"])
                memo[arch], spent[arch] = float(line["score"]), line["cost"]
    return memo, spent


def save(run, t, K, model, adam, P, rng, teacher):
    """Write everything that step t depends on, as the checkpoint; `restore` reads it back."""
    if RANK > 0:
        return
    parts = {"model": model.state_dict(), "teacher": teacher.state_dict() if teacher else {},
             "rng": {"cpu": torch.get_rng_state()}}  # of rank 0: after a resumption all have it
    parts |= {f"adam {i}": moments for i, moments in adam.state_dict()["state"].items()}
    if torch.cuda.is_available():
        parts["rng"]["cuda"] = torch.cuda.get_rng_state()
    tensors = {f"{part}/{name}": tensor.cpu()
               for part, found in parts.items() for name, tensor in found.items()}
    os.fsync(run.log_file.fileno())                  # the log that belongs to it is there before it
    state = dict(t=t, K=K, theta=[theta.tolist() for theta in P.theta], rng=rng.bit_generator.state,
                 log_bytes=run.log_path.stat().st_size, seconds=time.perf_counter() - run.started)
    write_file(run.checkpoint, safetensors.torch.save(tensors, {"state": json.dumps(state)}))


def restore(run, model, adam, P, rng):
    """The inverse of `save`: sets model, adam, P and rng, and cuts the log; returns t, K and the
    teacher. Without a checkpoint, what a new run begins with."""
    state = dict(t=0, K=1.0, log_bytes=run.log_path.read_bytes().index(b"\n") + 1)
    teacher, parts = None, defaultdict(dict)
    with user_errors_for(run.checkpoint):
        if run.checkpoint.exists():
            with safetensors.safe_open(regular_file(run.checkpoint), "pt") as file:
                state = json.loads(file.metadata()["state"])
                for key in file.keys():
                    part, name = key.split("/")
                    parts[part][name] = file.get_tensor(key)
            model.load_state_dict(parts["model"])
            moments = {i: parts[f"adam {i}"] for i, _ in enumerate(model.parameters())
                       if f"adam {i}" in parts}      # else it was never moved
            for i, w in enumerate(model.parameters()):
                if any(m.dim() and m.shape != w.shape for m in moments.get(i, {}).values()):
                    raise ValueError(f"the moments of weight {i} have another shape")
            adam.load_state_dict(adam.state_dict() | {"state": moments})
            P.theta = [np.array(theta) for theta in state["theta"]]
            rng.bit_generator.state = state["rng"]
            torch.set_rng_state(parts["rng"]["cpu"])
            if torch.cuda.is_available() and "cuda" in parts["rng"]:
                torch.cuda.set_rng_state(parts["rng"]["cuda"])
            if parts["teacher"]:
                teacher = copy.deepcopy(model).eval()
                teacher.load_state_dict(parts["teacher"])
            run.started -= state["seconds"]
            if run.log_path.stat().st_size < state["log_bytes"]:
                raise ValueError("the log is shorter than when it was written")
    if RANK == 0:
        run.log_file.truncate(state["log_bytes"])
    return state["t"], state["K"], teacher


def read_run(directory):
    """The run.json of a finished train or search, unless what it wrote has changed since."""
    path = Path(directory) / "run.json"
    run = read_json(path, "does not exist: no finished train or search")
    if not {"data", "max_length", "held_out", "wrote", "train", "settings"} <= set(run):
        raise UserError(f"{path} was not written by train or search of this version")
    if run["wrote"] != fingerprint_directories(directory):
        raise UserError(f"{directory} is not what its run.json tells of: make it again")
    return run


def read_superbert(directory):
    """(run.json, task) of a super-BERT that can be searched."""
    run = read_run(directory)
    if run["settings"].get("stages", "largest") == "largest":
        raise UserError(f"{directory} is one architecture: there is nothing to search")
    task = data.load_task(run["data"])                               # says so where it is gone
    if run["train"] != fingerprint(f"{run['data']}/train.tsv"):
        raise UserError(f"{run['data']}/train.tsv has changed since the training of {directory}: "
                        "its hold-out is lost, so train again")
    return run, task


def latest_superbert():
    """The super-BERT in superbert/ that was finished last; plain fine-tuning makes none."""
    runs = {str(path.parent): read_json(path) for path in Path("superbert").glob("*/run.json")}
    found = [(run["finished"], directory) for directory, run in runs.items()
             if run.get("settings", {}).get("stages", "largest") != "largest"]
    if not found:
        raise UserError("no finished super-BERT in superbert/: train one, or name one with --model")
    print_line(f"using {max(found)[1]}, the super-BERT finished last")
    return max(found)[1]


# ---- Many at once: a GPU's graphs, and ranks -----------------------------------------------------

def masked_gradient(model, batch, sizes, autocast, teacher=None):
    """What `weight_gradient` does, for a GPU, in one pass of shapes that no architecture changes.
    sizes: what `archs_to_tensor` makes of the architectures, [lambda, L, 2]. Returns the losses,
    [lambda]."""
    *inputs, labels = batch
    wanted = teacher_targets(teacher, inputs, autocast)
    with autocast():
        logits = forward_many(model, *inputs, sizes).float()                # [lambda, B, num_labels]
    losses = totals = torch.stack([task_loss(one, labels) for one in logits])
    if teacher:
        # Compared with numbers: a graph that is being recorded takes no new tensor from the host.
        heads, ffn_size = model.config.num_attention_heads, model.config.intermediate_size
        is_full = (sizes[..., 0] == heads) & (sizes[..., 1] == ffn_size)     # [lambda, L]
        distilled = torch.stack([task_loss(one, wanted) for one in logits])
        totals = torch.where(is_full.all(1), losses, (losses + distilled) / 2)
    totals.mean().backward()                                                             # Eq. 5
    return losses.detach()


def graphed_gradient():
    """A function like `weight_gradient` for a GPU: `masked_gradient`, recorded once for each shape
    as a CUDA graph and replayed, since launching its kernels takes longer than computing them."""
    graphs = {}                                                      # shape -> what was recorded

    def gradient(model, batch, archs, autocast, teacher=None):
        """Leave the gradient in every .grad; return the losses."""
        alike = len(set(archs)) == 1                                 # then once is enough
        sizes = archs_to_tensor(model.config, archs[:1] if alike else archs, batch[0].device)
        key = batch[0].shape, len(sizes), teacher is not None
        if key not in graphs:
            fixed = [tensor.clone() for tensor in (*batch, sizes)]   # a graph's inputs stay put

            def compute():
                """Fresh gradients; the losses [lambda]."""
                model.zero_grad()
                return masked_gradient(model, fixed[:-1], fixed[-1], autocast, teacher)
            graph, losses = capture_graph(compute)
            graphs[key] = fixed, graph, losses, [w.grad for w in model.parameters()]
        fixed, graph, losses, grads = graphs[key]
        for mine, new in zip(fixed, (*batch, sizes)):
            mine.copy_(new)
        graph.replay()
        for w, grad in zip(model.parameters(), grads):
            w.grad = grad
        used = {i for arch in archs for i, *_ in model.config.layers(arch)}
        for i, layer in enumerate(model.layers):
            if i not in used:                                        # rests, as without a GPU
                layer.zero_grad()
        return list(losses) * len(archs) if alike else list(losses)
    return gradient


def shard_batch(indices):
    """This rank's part of a batch, and its share. Where a small batch leaves none, any example: its
    gradient counts 0, but is there."""
    mine = indices[RANK::WORLD_SIZE]                                 # of all lengths
    return (mine or indices[:1]), len(mine) / len(indices)


def all_reduce_gradients(model, losses, share):
    """Replace every .grad by its sum over the ranks, each weighted with its share of the batch;
    return the losses' sums, and the signal that any of them has heard, 0 without one."""
    # CHOICE: all ranks train the same architectures: theta needs the losses of all on one batch,
    # and a layer that no architecture has is without gradient everywhere.
    if WORLD_SIZE == 1:
        return losses, max(SIGNALS, default=0)
    losses = torch.stack(losses)
    heard = torch.tensor(max(SIGNALS, default=0), device=losses.device)
    for part in [w.grad for w in model.parameters() if w.grad is not None] + [losses]:
        dist.all_reduce(part.mul_(share))                            # the sum over ranks
    dist.all_reduce(heard, dist.ReduceOp.MAX)
    return list(losses), int(heard)


def join_ranks():
    """Meet the other processes, where torchrun started several. Rank 0 alone is heard."""
    if WORLD_SIZE > 1:
        # Adam imports this anyway. Imported once the group is made, it keeps the group alive, and
        # a thread of the group that still has a tensor when Python ends aborts the process.
        import torch._dynamo                                         # noqa: F401
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if RANK > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")


# ---- The command line, and its settings ----------------------------------------------------------

def setting(default, text, low=None, high=2**32):
    """A field of a command's settings: its default, --help text and, of a number, legal range."""
    return dataclasses.field(default=default, metadata=dict(help=text, low=low, high=high))


@dataclasses.dataclass
class Settings:
    """What all commands share."""
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to compute")
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "bf16: autocast over fp32 weights; auto: bf16 where the hardware has it, else fp32")


@dataclasses.dataclass
class RunSettings(Settings):
    """What train and search share."""
    overwrite: bool = setting(False, "replace what --out holds")
    resume: bool = setting(False, "continue an interrupted run")
    archs_per_step: int = setting(2, "lambda: architectures sampled per step; 1: theta rests", 1)
    delta: float = setting(1.0, "length of a step of theta in the Fisher norm", 0)
    seed: int = setting(0, "seed of everything random", 0)


@dataclasses.dataclass
class TrainSettings(RunSettings):
    """Train a super-BERT on a data directory."""
    data: str = setting("glue/TOY", "directory with train.tsv and dev.tsv")
    bert: str = setting("", "directory of the pretrained BERT; without it the data directory where "
                            "that has a config.json, else bert-base-uncased")
    out: str = setting("", "directory to write; without it superbert/<name of the data directory>")
    recipe: Literal["paper", "best"] = setting(
        "paper", "best: --stages all --reorder --distill --keep-layers even")
    strategy: Literal["ee", "exploit", "explore", "noise"] = setting(
        "ee", "ee: the controller decides; exploit: always P_theta; explore: always pi, theta "
              "fixed; noise: ee with permuted losses, a control")
    stages: Literal["progressive", "all", "largest"] = setting(
        None, "progressive: open the space step by step; all: the largest alone for half of the "
              "epochs, then everything; largest: the largest alone, which is plain fine-tuning")
    reorder: bool = setting(None, "when smaller ones open, sort heads and neurons by importance")
    distill: bool = setting(None, "learn also from the largest as it was when smaller ones opened")
    keep_layers: Literal["first", "even"] = setting(
        None, "the layers of a smaller depth: the first, or evenly spaced ones and the last")
    epochs: float = setting(0.0, "in all, shared out over the stages; 0: the table's", 0)
    lr: float = setting(0.0, "learning rate at the start of each stage; 0: the paper's", 0)
    # CHOICE: 32; the paper prints none.  AUTHORS: 8
    batch_size: int = setting(32, "examples per step, of all ranks together", 1)
    max_length: int = setting(128, "tokens per example; the rest is cut off", 8)
    holdout: float = setting(0.1, "share of train held out for selection", 0, 0.9)
    checkpoint_every: int = setting(500, "steps between checkpoints", 1)


@dataclasses.dataclass
class SearchSettings(RunSettings):
    """Find the best sub-BERT under a budget, and write it as a model of its own."""
    model: str = setting("", "super-BERT directory; without it the one in superbert/ finished last")
    out: str = setting("", "directory to write, of several budgets the one for all of theirs; "
                           "without it subbert/<name>-<budget>")
    max_params: list = setting(None, "budgets: parameters of embeddings, encoder and pooler, as "
                                     "60000000, 60e6, 60M or 0.5x (of the full model)")
    max_flops: list = setting(None, "budgets: FLOPs of encoder and pooler at 128 tokens, likewise")
    max_latency: list = setting(None, "budgets: milliseconds for one sequence of 128 tokens on "
                                      "this machine, as 12, 12ms or 0.5x")
    evaluations: int = setting(1000, "architectures to ask for, for each budget", 1)
    select_on: Literal["holdout", "dev"] = setting(
        "holdout", "what selects; dev, as in the paper, makes the dev score optimistic")


@dataclasses.dataclass
class EvalSettings(Settings):
    """Score a sub-BERT, or a super-BERT's largest, most likely and smallest, on a dev set."""
    model: str = setting("", "directory that train or search wrote")
    data: str = setting("", "data directory; without it the one the model was trained on")


COMMANDS = {"train": (TrainSettings, train), "search": (SearchSettings, search),
            "eval": (EvalSettings, evaluate)}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        """Raise instead of printing the usage."""
        raise UserError(message + " (see --help)")


def parse(argv):
    """Command-line words -> (settings, function): one flag for every field of the settings."""
    parser = Parser("yoco.py", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (kind, _) in COMMANDS.items():
        sub = commands.add_parser(name, help=kind.__doc__, description=kind.__doc__,
                                  allow_abbrev=False)
        for field in dataclasses.fields(kind):
            form = dict(type=field.type)
            if field.type is bool:
                form = dict(action=argparse.BooleanOptionalAction)
            elif field.type is list:
                form = dict(nargs="+")
            elif get_args(field.type):
                form = dict(choices=get_args(field.type))
            shown = f" (default: {field.default})" if field.default else ""
            sub.add_argument(flag(field), help=field.metadata["help"] + shown,
                             default=field.default, **form)
    options, unknown = parser.parse_known_args(argv)
    options = vars(options)
    kind, function = COMMANDS[options.pop("command")]
    if unknown:
        known = [flag(field) for field in dataclasses.fields(kind)]
        near = difflib.get_close_matches(unknown[0], known, 1) or known
        parser.error(f"unknown: {' '.join(unknown)}; did you mean {' '.join(near)}?")
    for field in dataclasses.fields(kind):
        value = options[field.name]
        low, high = field.metadata["low"], field.metadata["high"]
        if low is not None and not low <= value <= high:
            parser.error(f"{flag(field)} {value}: it must be at least {low} and at most {high}")
    return kind(**options), function


def flag(field):
    """A field of the settings as it is typed."""
    return "--" + field.name.replace("_", "-")


def on_signal(number, _):
    """Note the first Ctrl-C or SIGTERM; the second stops at once."""
    SIGNALS.append(number)
    if len(SIGNALS) > 1 and WORLD_SIZE == 1:
        raise KeyboardInterrupt(number)
    print_progress("\nstopping after this step" + ("; once more stops at once" if WORLD_SIZE == 1 else ""))


def main(argv=None):
    """Run one command; the exit status: 0; 2 after an error told in one line; 130 after Ctrl-C and
    143 after SIGTERM."""
    if hasattr(sys.stdout, "reconfigure"):                           # it is None where closed
        sys.stdout.reconfigure(errors="backslashreplace")            # as stderr has it anyway
    SIGNALS.clear()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        join_ranks()
        settings, function = parse(argv)
        if function is not train and WORLD_SIZE > 1:
            raise UserError("only train shares its work: start without torchrun")
        for number, handler in before.items():
            if function is not evaluate and handler != signal.SIG_IGN:       # else as with nohup
                signal.signal(number, on_signal)
        function(settings)
    except KeyboardInterrupt as stop:
        print_progress("\nstopped" + ("; the same command with --resume goes on" if stop.args else ""))
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, OSError):
            text = (f"{error.filename}: " if error.filename else "") + (error.strerror or text)
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
            text = "out of memory (a training needs less with a smaller --batch-size)"
        elif not isinstance(error, UserError):
            raise
        print_progress(f"yoco.py: error: {' '.join(text.split())[:1000]}")
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
