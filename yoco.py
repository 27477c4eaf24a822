"""YOCO-BERT: compress BERT once, deploy it everywhere (Zhang et al., arXiv 2106.02435).

We fine-tune one elastic BERT per task, the *super-BERT*. Smaller BERTs, the *sub-BERTs*, are slices
of its weights and need no further training. `search` finds the best sub-BERT for a budget of
parameters, FLOPs or latency.

    python yoco.py train  --data glue/MRPC             -> superbert/MRPC
    python yoco.py search --max-params 60000000        -> subbert/MRPC-60000000
    python yoco.py eval   --model subbert/MRPC-60000000

Symbols of the paper, and their names here:

    m          an architecture: a depth, and heads and FFN size of each layer    arch
    theta      the probabilities of P_theta, a distribution over architectures   P.theta
    pi         the distribution that is uniform over the open choices            P.uniform()
    rho        the entropy of P_theta                                            P.entropy()
    rho_max    the entropy of pi, the largest possible                           rho_max
    K          the controller: rho / rho_max                                     state.K
    lambda     the number of architectures in one step: 2, a better and a worse  archs_per_step
    delta      the length of one step of theta: 1                                delta
    I          the steps between two updates of K: 5% of an epoch                interval
    T, Omega   the cost of an architecture, and the budget                       cost, budget

Algorithm 1 (EE-SNG). `train` carries these line numbers in its right margin.

     1  initialise the weights W and theta
     2  repeat for every step:
   3-5      every I steps, set K = rho / rho_max
     6      take a batch
     7      with probability K exploit (use P_theta), otherwise explore (use pi)
     8      sample lambda architectures from it
     9      compute the loss of each architecture on this batch
    10      update W with Adam, and theta with the natural gradient
    11      at the end of a stage, open more of the search space

Where each equation is, and the test that checks it:

    Eq. 1, 3     the expected loss, minimised        train                test_learning
    Eq. 2        the best m with T(m) < Omega        best_fit             test_best_fit
    Eq. 5        gradient of W, mean over lambda     weight_gradient      test_weight_gradient
    Eq. 5        gradient of theta, mean over lambda natural_gradient     test_expected_gradient
    below Eq. 5  natural gradient of ln P_theta      natural_gradient     test_inverse_fisher
    Eq. 5        a step of theta, of length delta    Categorical.step     test_step_length
    Eq. 6        the controller K                    exploit_probability  test_controller
    Eq. 7        the reward                          reward               test_reward
    Alg. 1       EE-SNG, stage by stage              train, make_stages   test_stages

Eq. 5 estimates the two expectations of Eq. 4 from lambda samples. The length of a step and the
lower bound of theta come from ASNG, to which the paper only refers.

Departures from the paper are tagged `# DIFFERS`, decisions where it is silent `# CHOICE`, and
differences from the authors' code `# AUTHORS`. README.md lists them all.
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
import zlib
from collections import Counter, defaultdict, namedtuple
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

# Keep model first: it sets OMP_WAIT_POLICY, which torch reads when it is imported.
from model import (TOKENIZER_FILES, Arch, BertConfig, ElasticBert, SearchSpace, SingleArch,
                   archs_to_tensor, capture_graph, count_flops, count_params, device_name,
                   escape_control_chars, extract, fingerprint, forward_many, is_size, latency,
                   load_bert, name_unknown_fields, open_closed_streams, peak_memory, print_line,
                   read_json, regular_file, save_bert, select_device_and_precision,
                   sort_by_importance, tokenizer_files, UserError, user_errors_for, weight_files,
                   write_file, write_json)

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data

# The number of processes, and the index of this one. `join_process_group` changes both.
NUM_PROCESSES = 1
PROCESS_INDEX = 0
received_signals = []        # Ctrl-C or SIGTERM. train and search finish the current step and stop.


# ==================================================================================================
# Part I: the method
# ==================================================================================================

# ---- The distribution P_theta and its natural gradient (Sec. 3.3) --------------------------------

class Categorical:
    """P_theta: one categorical distribution for the depth and one for each layer, independent.

    theta[v][c] is the probability of category c of variable v. Training opens categories stage by
    stage. A closed category has probability 0. An open one never falls below a lower bound.
    """

    def __init__(self, sizes):
        # All categories are open. `train` closes all but the largest before its first step.
        self.theta = [np.full(size, 1 / size) for size in sizes]
        # For theta_min: the number of variables with several categories, open or closed.
        self.num_free = sum(size > 1 for size in sizes)

    def uniform(self):
        """Return pi, the uniform distribution over the open categories of every variable."""
        pi = Categorical([len(theta) for theta in self.theta])
        pi.theta = [(theta > 0) / (theta > 0).sum() for theta in self.theta]
        return pi

    def sample(self, rng):
        """Sample one category for every variable, also for layers that the depth leaves out."""
        return [int(rng.choice(len(theta), p=theta)) for theta in self.theta]

    def most_likely(self):
        """Return the most probable category of every variable."""
        return [int(theta.argmax()) for theta in self.theta]

    def entropy(self):
        """Return rho, the entropy in nats: the sum over the variables, which are independent."""
        # AUTHORS: they average theta over the layers first. Layers that have settled on different
        # choices then look undecided.
        return float(-sum((t[t > 0] * np.log(t[t > 0])).sum() for t in self.theta))

    def set_open(self, masks):
        """Open exactly the categories in `masks`, one bool array per variable.

        A category that has just been opened gets the uniform probability, 1 / (number open). The
        categories that were open before share the rest in their old proportions. For example,
        (0.8, 0.2, closed) becomes (0.533, 0.133, 0.333).
        """
        # AUTHORS: they leave some probability on closed categories.
        for theta, is_open in zip(self.theta, masks):
            was_open = is_open & (theta > 0)
            old = theta[was_open]
            theta[:] = is_open / is_open.sum()
            theta[was_open] = old / old.sum() * was_open.sum() / is_open.sum()

    def step(self, samples, losses, delta=1.0, source=None):
        """Move theta one step of length `delta` along the natural gradient (Eq. 5).

        samples: one category per variable, None for a layer that the depth leaves out. losses: one
        number per sample. source: the Categorical that was sampled, by default this one.
        If all losses are equal, theta does not change.
        """
        # DIFFERS from Eq. 5: we use the ranks of the losses, not the losses. Better samples have
        # positive utilities, so this is an ascent, and the scale of the loss does not matter.
        utilities = ranking_utility(losses)
        source = source or self
        gradient = natural_gradient(self.theta, samples, utilities, source.theta)
        length = fisher_norm(self.theta, gradient)
        if length < 1e-8:
            return
        for theta, g in zip(self.theta, gradient):
            is_open = theta > 0
            moved = theta[is_open] + delta / length * g[is_open]                 # Eq. 5
            theta[is_open] = raise_to_minimum(moved, self.num_free)


def natural_gradient(theta, samples, utilities, source=None):
    """Return the mean of utility * (one_hot(m) - theta) over the samples, one array per variable.

    This is the ordinary gradient, multiplied by the inverse of the Fisher matrix on moves that keep
    the sum of theta at 1. No matrix is inverted, because each factor is known:

        gradient of ln P_theta(m)     one_hot(m) / theta
        Fisher matrix                 diag(1 / theta)
        its inverse on these moves    diag(theta) - theta theta^T
        inverse times gradient        one_hot(m) - theta

    Our utilities sum to zero, so theta cancels for every variable that is active in all samples.
    With lambda = 2 the gradient is then (one_hot(best) - one_hot(worst)) / 2.
    source: the probabilities that were sampled, by default theta.

    >>> natural_gradient([np.array([.5, .5])], [[0], [1]], [1, -1])
    [array([ 0.5, -0.5])]
    """
    source = theta if source is None else source
    gradient = [np.zeros_like(t) for t in theta]
    for sample, utility in zip(samples, utilities):
        for g, t, q, choice in zip(gradient, theta, source, sample):
            # CHOICE: if the depth leaves this layer out, we use q, the mean one_hot of the
            # distribution that was sampled. For P_theta, q - theta is 0. Samples of pi that run the
            # layer pull theta toward pi or away from it, even if the layer's choice does not
            # matter. This term cancels the pull on average, because the utilities sum to zero.
            # AUTHORS: they use a random one_hot, which has the same mean and more noise.
            one_hot = q if choice is None else np.eye(len(t))[choice]
            direction = one_hot - t                                              # below Eq. 5
            g += utility * direction / len(samples)                              # Eq. 5
    return gradient


def fisher_norm(theta, gradient):
    """Return the length of a step `gradient` in the Fisher metric of P_theta.

    The length measures how much the distribution changes, not how far the numbers move. Its square
    is g' F g with the Fisher matrix F = diag(1 / theta), so it is the sum of g^2 / theta.
    """
    squares = [(g[t > 0] ** 2 / t[t > 0]).sum() for t, g in zip(theta, gradient)]
    return math.sqrt(sum(squares))


def raise_to_minimum(theta, num_free):
    """Raise the open categories of one variable to theta_min, and keep their sum at 1.

    The bound is from ASNG (Akimoto et al. 2019). It keeps every open category alive, and K above 0.
    """
    num_open = len(theta)
    if num_open == 1:
        return theta
    # CHOICE: ASNG's bound, but at most half of uniform. For one variable of two choices it is 1.
    theta_min = min(1 / (num_free * (num_open - 1)), 1 / (2 * num_open))
    theta = np.maximum(theta, theta_min)
    # The sum may exceed 1 now. Take the excess from each category in proportion to its surplus over
    # theta_min. Dividing by the sum instead would push some categories below theta_min again.
    surplus, excess = theta - theta_min, theta.sum() - 1
    return theta - surplus * excess / surplus.sum()


def ranking_utility(losses):
    """Map losses to utilities: +1/mu for the best mu, -1/mu for the worst mu, 0 in between.

    mu is a quarter of the samples, rounded up. With lambda = 2 the better sample gets +1 and the
    worse one -1. Equal losses get the mean of their utilities. Otherwise the order of sampling
    would decide between them, and theta would take a step of full length for no reason.

    >>> ranking_utility([0.3, 0.1, 0.1, 0.2])
    array([-1. ,  0.5,  0.5,  0. ])
    """
    losses = np.asarray(losses, float)
    mu = math.ceil(len(losses) / 4)
    order = losses.argsort()
    utilities = np.zeros(len(losses))
    utilities[order[:mu]] += 1
    utilities[order[-mu:]] -= 1
    # AUTHORS: they look for ties among positive values only. In a search all values are negative.
    for value in np.unique(losses):
        tied = losses == value
        utilities[tied] = utilities[tied].mean()
    return utilities / mu


def exploit_probability(P):
    """Return K = rho / rho_max, the probability that a step exploits (Eq. 6).

    While theta is undecided, P_theta is nearly uniform, and exploiting it still trains everything.
    Once theta has settled, P_theta would train its favourites only. K is small then, and most steps
    explore. K stays above 0, because theta_min keeps the entropy above 0. If a single architecture
    is open, K is 1.
    """
    rho_max = P.uniform().entropy()
    if rho_max == 0:
        return 1.0
    return P.entropy() / rho_max                                                 # Eq. 6


# ---- Progressive expanding of the training space (Sec. 3.2) --------------------------------------

class Stage(namedtuple("Stage", "name depths heads ffn_sizes first_step num_steps")):
    """Hold a run of steps with the same open sizes, each listed from the largest down."""


def progressive_rows(space, task_name):
    """Return the rows of the progressive schedule: name, open depths, heads, FFN sizes, epochs."""
    epochs_heads, epochs_ffn, epochs_depth = STAGE_EPOCHS.get(task_name, STAGE_EPOCHS["default"])
    depths, heads, ffn_sizes = space.depths[::-1], space.heads[::-1], space.ffn_sizes[::-1]
    # AUTHORS: they have no stage for the largest architecture, though the paper begins with it.
    # CHOICE: it gets as many epochs as the last stage.
    rows = [("largest", depths[:1], heads[:1], ffn_sizes[:1], epochs_depth[-1])]
    for n, epochs in zip(range(2, len(heads) + 1), epochs_heads):
        rows.append(("heads", depths[:1], heads[:n], ffn_sizes[:1], epochs))
    for n, epochs in zip(range(2, len(ffn_sizes) + 1), epochs_ffn):
        rows.append(("FFN", depths[:1], heads, ffn_sizes[:n], epochs))
    for n, epochs in zip(range(2, len(depths) + 1), epochs_depth):
        rows.append(("depth", depths[:n], heads, ffn_sizes, epochs))
    return rows


def make_stages(space, task_name, steps_per_epoch, schedule="progressive", epochs=0.0):
    """Return the stages of a training.

    "progressive" trains the largest architecture, then opens one more size per stage. "all" spends
    half of the epochs on the largest, then opens everything. "largest" is plain fine-tuning.
    epochs: the total over all stages. 0 means the epochs of STAGE_EPOCHS.
    """
    rows = progressive_rows(space, task_name)
    if schedule == "largest":
        rows = rows[:1]
    elif schedule == "all":
        # CHOICE: half of the epochs each, since every sub-BERT inherits from the largest.
        half = sum(row[-1] for row in rows) / 2
        _, depths, heads, ffn_sizes, _ = rows[-1]
        rows = [(*rows[0][:-1], half), ("all", depths, heads, ffn_sizes, half)]
    scale = epochs / sum(row[-1] for row in rows) if epochs else 1.0
    stages, first_step = [], 0
    for *choices, stage_epochs in rows:
        num_steps = max(1, round(stage_epochs * scale * steps_per_epoch))
        stages.append(Stage(*choices, first_step, num_steps))
        first_step += num_steps
    return stages


def open_masks(space, stage):
    """Return which categories are open in a stage: one bool array per variable."""
    depth = np.isin(space.depths, stage.depths)
    layer = np.array([h in stage.heads and k in stage.ffn_sizes for h, k in space.pairs])
    return [depth] + [layer] * space.depths[-1]


# ---- train: Algorithm 1 --------------------------------------------------------------------------

@dataclasses.dataclass
class TrainState:
    """Everything that a training step depends on. A checkpoint holds it, with torch's generator."""
    model: ElasticBert                      # the weights W
    adam: torch.optim.Adam
    P: Categorical                          # theta
    rng: np.random.Generator                # tosses the coin and samples the architectures
    K: float = 1.0                          # the controller
    step: int = 0                           # the number of steps done
    teacher: ElasticBert | None = None      # with --distill: a frozen copy of the largest


def train(settings):
    """Fine-tune a super-BERT with Algorithm 1. Return the contents of its run.json.

    Find W and theta that minimise the expected loss of a sample of P_theta (Eq. 1, Eq. 3).
    """
    # Set up the data, the weights W, the distribution P_theta, and the stages.
    task = data.load_task(settings.data, settings.metric)
    settings = resolve_defaults(settings, task.name)
    run = RunDirectory(settings, settings.data, settings.bert, task=task.name)
    device, autocast = select_device_and_precision(settings.device, settings.precision)
    torch.manual_seed(settings.seed)
    model = initial_model(settings, task).to(device).train()                     # 1
    space = search_space(model.config)
    P, rng = Categorical(space.categories), np.random.default_rng(settings.seed)     # 1
    state = TrainState(model, new_adam(model), P, rng)
    sets = split_and_tokenize(task, settings, model.config)
    stages = make_stages(space, task.name, sets.steps_per_epoch, settings.stages, settings.epochs)
    num_steps = stages[-1].first_step + stages[-1].num_steps
    interval = max(1, sets.steps_per_epoch // 20)        # I: 5% of an epoch, as the authors
    forward_backward = fastest_gradient(device)          # weight_gradient, or a faster form
    if not start_or_resume(run, state, stages, sets):    # --resume restores `state`
        return read_run(run.path)                        # the run was finished before
    batches = data.batches(sets.train, settings.batch_size, settings.seed, first=state.step)

    # CHOICE: t counts batches. Algorithm 1 says "epoch", but it takes one batch per iteration.
    for t in range(state.step, num_steps):                                       # 2
        stage = stage_at(stages, t)
        if t == stage.first_step:
            # A stage begins. The first opens only the largest architecture, the others more.
            P.set_open(open_masks(space, stage))                                 # 11
            state.adam = new_adam(model)
            sort_and_copy_teacher(state, stages, sets, settings, autocast)   # for --recipe best
        if t == stage.first_step or t % interval == 0:                           # 3
            # K = exploit_probability(P), or a constant under --strategy exploit or explore.
            state.K = controller(P, settings.strategy)                           # 4, 5
        batch = data.collate(sets.train, next(batches), device, sets.max_length)     # 6

        # Exploit or explore? One coin decides for the whole step (N = 1 in Eq. 6).
        source = P if rng.random() < state.K else P.uniform()                    # 7
        archs = [space.arch(source.sample(rng)) for _ in range(settings.archs_per_step)]     # 8

        # Compute the loss of every architecture, and the gradient of W in each parameter's .grad.
        losses = forward_backward(model, batch, archs, autocast, state.teacher)  # 9

        # Clip, turn the losses into floats, and move W. The learning rate falls to 0 in each stage.
        losses = clip_and_check(model, losses, t, stage, settings.lr, archs)
        rest_of_stage = 1 - (t - stage.first_step) / stage.num_steps
        state.adam.param_groups[0]["lr"] = settings.lr * rest_of_stage
        state.adam.step()                                                        # 10

        # Move theta. Samples of pi move it too (Algorithm 1, line 10), although Eq. 5 expects
        # samples of P_theta. No importance weights correct for the difference.
        if settings.strategy == "noise":                 # an ablation: shuffled losses
            losses = rng.permutation(losses)
        if settings.strategy != "explore":
            choices = [space.choices(arch) for arch in archs]    # None for layers left out
            P.step(choices, losses, settings.delta, source)                      # 10
        state.step = t + 1
        log_and_checkpoint(run, state, stage, losses, num_steps, settings.checkpoint_every)
    return finish_training(run, state, task, sets, device, autocast, steps=num_steps)


def weight_gradient(model, batch, archs, autocast, teacher=None):
    """Leave the mean gradient of the loss over `archs` in every .grad (Eq. 5, first line).

    Return the loss of every architecture on the labels, a list of scalars. With a `teacher`, every
    architecture but the largest also learns from the teacher's logits.
    """
    # AUTHORS: they compare losses on two different batches, so the batch decides which is better.
    *inputs, labels = batch
    targets = teacher_targets(teacher, inputs, autocast)     # None without a teacher
    # CHOICE: the gradients are reset to None, not to 0. Adam then skips unused layers.
    model.zero_grad()
    label_losses = {}
    # An architecture that was sampled twice is computed once and counted twice.
    for arch, count in Counter(archs).items():
        with autocast():
            logits = model(*inputs, arch).float()            # [B, num_labels]
        label_losses[arch] = task_loss(logits, labels)
        total_loss = label_losses[arch]
        if teacher and arch != model.config.arch:            # config.arch is the largest
            # CHOICE: the teacher weighs as much as the labels, and the temperature is 1.
            total_loss = (total_loss + task_loss(logits, targets)) / 2
        (total_loss * count / len(archs)).backward()                             # Eq. 5
    return [label_losses[arch].detach() for arch in archs]


def new_adam(model):
    """Return Adam without weight decay (Sec. 4). `train` sets its learning rate in every step."""
    # CHOICE: in a layer that is in use, Adam's momentum also moves the heads and neurons outside
    # the sampled slice.
    return torch.optim.Adam(model.parameters(), lr=0.0, eps=1e-8, fused=True)


# ---- search: the same distribution, moved by a reward (Sec. 3.4) ---------------------------------

def reward(score, cost, budget, full_cost, alpha=2):
    """Return ACC(m), reduced if the sub-BERT exceeds the budget (Eq. 7).

    score: ACC(m) in %. cost: T(m). budget: Omega. full_cost: T(M), the cost of the full model, at
    which the reward is 0. Two edge cases return the score unchanged: a score <= 0, which the factor
    would raise, and a budget of at least full_cost, which no sub-BERT exceeds.

    >>> reward(80, 50, 60, 100), reward(80, 80, 60, 100), reward(80, 100, 60, 100)
    (80, 20.0, 0.0)
    """
    # DIFFERS from Eq. 7: the printed factor, excess ** alpha, is 0 at the budget and grows with
    # the excess. We use (1 - excess) ** alpha.
    # AUTHORS: they do, too, but also scale negative scores (Matthews), which raises them.
    if cost < budget or budget >= full_cost or score <= 0:
        return score
    excess = (cost - budget) / (full_cost - budget)
    return score * max(0.0, 1 - excess) ** alpha                                 # Eq. 7


def search(settings):
    """Find the best sub-BERT for every budget, with W fixed. Return one run.json per budget."""
    setup = open_search(settings)                # the super-BERT, its data, one run per budget
    for run, budget in setup.runs:
        if not run.finished:
            move_toward_reward(setup, run, budget)
    # Choose only now: a sub-BERT that was found for one budget may be the best for another.
    for run, budget in setup.runs:
        if not run.finished:
            write_sub_bert(setup, run, budget, best_within(setup, budget))
    results = [read_run(run.path) for run, _ in setup.runs]
    # Print every result, and a table if there are several budgets.
    print_results(setup, results)
    return results


def move_toward_reward(setup, run, budget):
    """Move P_theta toward sub-BERTs with a high reward. Remember every score in `setup`."""
    settings, space, scores, costs = setup.settings, setup.space, setup.scores, setup.costs
    largest, smallest = space.largest(), space.smallest()
    # The search continues from the theta that the training has learned.
    P, rng = Categorical(space.categories), np.random.default_rng(settings.seed)
    P.theta = [np.array(theta) for theta in setup.superbert_run["theta"]]
    progress = Progress(0, settings.evaluations)
    for num_sampled in range(0, settings.evaluations, settings.archs_per_step):
        count = min(settings.archs_per_step, settings.evaluations - num_sampled)
        archs = [space.arch(P.sample(rng)) for _ in range(count)]
        # Evaluate the new ones, the largest for its cost T(M), and the smallest so that one fits.
        for arch in (largest, smallest, *archs):
            if arch not in scores:
                scores[arch] = setup.evaluate(arch)
                if arch not in costs:
                    costs[arch] = setup.measure(arch)
                run.log(choices=space.choices(arch), score=scores[arch], cost=costs[arch])
        rewards = [reward(scores[m], costs[m], budget, costs[largest]) for m in archs]
        # A high reward is a low loss.
        P.step([space.choices(m) for m in archs], [-r for r in rewards], settings.delta)
        progress.show(num_sampled + count, f"sampled, {len(scores)} evaluated")
        if received_signals:
            raise KeyboardInterrupt(received_signals[0])         # every score is in the log


def best_fit(scores, cost, budget):
    """Return the architecture with the highest score and T(m) < Omega (Eq. 2), or None.

    scores: {architecture: ACC(m)}. cost: a function, T.
    """
    fitting = [arch for arch in scores if cost(arch) < budget]
    # CHOICE: if scores are equal, the cheaper architecture wins.
    return max(fitting, key=lambda arch: (scores[arch], -cost(arch)), default=None)      # Eq. 2


# ==================================================================================================
# Part II: the machinery. You can stop here on a first reading.
# ==================================================================================================

# ---- The authors' schedule -----------------------------------------------------------------------

# The epochs of every stage. The three groups open heads, then FFN sizes, then depths.
# Each number belongs to one stage, which opens one more size.
STAGE_EPOCHS = {
    "CoLA": ((4, 4), (4, 4, 4), (4, 4, 4)),
    "MNLI": ((3, 1), (1, 1, 1), (1, 1, 1)),
    "MRPC": ((5, 3), (3, 3, 3), (3, 3, 3)),
    "QNLI": ((10, 5), (5, 5, 5), (1, 1, 1)),
    "QQP": ((1, 1), (1, 1, 1), (1, 1, 3)),
    "RTE": ((3, 1), (1, 1, 1), (1, 1, 2)),
    "SST-2": ((1, 1), (1, 1, 1), (1, 1, 1)),
    "TOY": ((2, 2), (2, 2, 2), (2, 2, 4)),
    "default": ((3, 3), (3, 3, 3), (3, 3, 3)),
}
# The paper's learning rates, for BERT-base. TOY's rate is for the tiny BERT in glue/TOY.
# CHOICE: a BERT with a hidden size below 512 gets SMALL_BERT_RATE. With 2e-5, a sub-BERT
# with half of MiniLM's encoder scores 16 points less on the hold-out set of CoLA (two seeds,
# glue/results/README.md).
# AUTHORS: they use 1e-5 for SST-2, and 1e-10 in QNLI's depth stages, which freezes W there.
LEARNING_RATES = {"MNLI": 1e-5, "QNLI": 1e-5, "TOY": 1e-3, "default": 2e-5}
SMALL_BERT_RATE = 1e-4

# The settings that a --recipe chooses. A flag on the command line overrides its recipe.
RECIPES = {
    "paper": {
        "stages": "progressive",
        "reorder": False,
        "distill": False,
        "keep_layers": "first",
    },
    "best": {
        "stages": "all",
        "reorder": True,
        "distill": True,
        "keep_layers": "even",
    },
}


def stage_at(stages, t):
    """Return the stage that step `t` belongs to."""
    for stage in reversed(stages):
        if stage.first_step <= t:
            return stage


def controller(P, strategy):
    """Return K under a --strategy: Eq. 6, or a constant for the ablations of Table 4."""
    if strategy == "exploit":
        return 1.0
    if strategy == "explore":
        return 0.0
    return exploit_probability(P)


# ---- Setting up a training -----------------------------------------------------------------------

def resolve_defaults(settings, task_name):
    """Return the settings of `train` with every default filled in.

    Some defaults depend on the task, and some on other settings. The default of --out
    depends on --data, for example. Print the learning rate. Raises UserError if
    --reorder or --distill is combined with --stages largest, or if the learning rate
    depends on the size of a BERT that has no config.json.
    """
    changes = {}
    if not settings.bert:
        data_has_bert = Path(settings.data, "config.json").exists()
        changes["bert"] = settings.data if data_has_bert else "bert-base-uncased"
    rate, reason = settings.lr, ""
    if rate == 0:
        config = BertConfig.load(changes.get("bert", settings.bert))
        rate, reason = default_learning_rate(task_name, config.hidden_size)
        changes["lr"] = rate
    if not settings.out:
        changes["out"] = f"superbert/{os.path.basename(os.path.realpath(settings.data))}"
    for name, value in RECIPES[settings.recipe].items():
        if getattr(settings, name) is None:
            changes[name] = value
    settings = dataclasses.replace(settings, **changes)
    if settings.stages == "largest" and (settings.reorder or settings.distill):
        raise UserError("--stages largest trains a single architecture: leave --reorder "
                        "and --distill out")
    print_line(f"learning rate {rate:g}{reason}")
    return settings


def default_learning_rate(task_name, hidden_size):
    """Return the default learning rate, and a text for the user that gives the reason."""
    if hidden_size < 512 and task_name != "TOY":
        return SMALL_BERT_RATE, ", because the hidden size is below 512 (--lr changes it)"
    rate = LEARNING_RATES.get(task_name, LEARNING_RATES["default"])
    if task_name == "TOY":
        return rate, ", chosen for TOY (--lr changes it)"
    # The paper trains on neither STS-B nor your data, so the reason names BERT-base.
    name = task_name if task_name in STAGE_EPOCHS else "BERT-base"
    return rate, f", the paper's for {name}"


def initial_model(settings, task):
    """Return the pretrained BERT that --bert names, with a classifier for the task.

    A data directory may hold a config.json without weights, as glue/TOY does. Training
    then starts from random weights.
    """
    bert = Path(settings.bert)
    if is_sub_bert(BertConfig.load(bert)) and settings.stages != "largest":
        raise UserError(f"{bert} is a sub-BERT: it has one architecture and no search space. "
                        "To fine-tune it, add --stages largest")
    suffixes = r"\.(safetensors|bin|h5)"
    has_weights = any(re.search(suffixes, path.name) for path in bert.glob("*"))
    if bert == Path(settings.data) and not has_weights:
        print_line(f"{bert} has a config.json but no weights: "
                   "the weights start at random")
        model = ElasticBert(BertConfig.load(bert), task.num_labels)
        name_unknown_fields(bert)
        model.config.name_labels(task.labels)
    else:
        model = load_bert(bert, task.num_labels, task.labels)
    model.config.keep_layers = settings.keep_layers
    return model


def is_sub_bert(config):
    """Return whether a model is a sub-BERT, which has the sizes of each layer."""
    return bool(config.layer_heads or config.layer_ffn_sizes)


def search_space(config):
    """Return the search space of a model, with a single architecture for a sub-BERT."""
    if is_sub_bert(config):
        return SingleArch(config.arch)
    return SearchSpace.for_config(config)


@dataclasses.dataclass
class TrainingSets:
    """The training set and the hold-out set that train.tsv was split into, tokenized."""
    train: list
    holdout: list
    holdout_split: list         # [share, seed], which is enough to repeat the split
    train_file: str             # the fingerprint of train.tsv
    max_length: int             # tokens per example
    steps_per_epoch: int
    tokenizer: dict             # {file name: bytes}, as they were at the start


def split_and_tokenize(task, settings, config):
    """Split train.tsv into a training set and a hold-out set, and tokenize both.

    Print a summary of the task.
    """
    train_file = fingerprint(f"{settings.data}/train.tsv")
    holdout_split = choose_holdout(settings, train_file)
    train_examples, holdout_examples = data.split_holdout(task.train, *holdout_split)
    max_length = min(settings.max_length, config.max_position_embeddings)
    encode = data.make_encoder(settings.bert, max_length)
    sets = TrainingSets(
        train=encode(train_examples),
        holdout=encode(holdout_examples),
        holdout_split=holdout_split,
        train_file=train_file,
        max_length=max_length,
        steps_per_epoch=math.ceil(len(train_examples) / settings.batch_size),
        tokenizer=tokenizer_files(settings.bert))
    summary = data.summarize_task(task, train_examples, holdout_examples, sets.train,
                                  settings.bert, max_length)
    print_line("\n".join(summary))
    return sets


def choose_holdout(settings, train_file):
    """Return the share and the seed of the hold-out set, as [share, seed].

    If the BERT of --bert was fine-tuned on this train.tsv before, we keep the hold-out
    set of that run. A new one would contain examples that the BERT has already been
    trained on, and the search would select on them.
    """
    earlier_run = read_earlier_run(settings.bert)
    if earlier_run.get("train") == train_file:
        return earlier_run["held_out"]
    return [settings.holdout, settings.seed]


def read_earlier_run(bert):
    """Return the run.json of the BERT that a training starts from, or {}.

    The result is {} if there is no run.json, or if another program wrote it.
    """
    path = Path(bert) / "run.json"
    run = read_json(path) if path.exists() else {}
    if not {"train", "held_out"} & set(run):
        return {}
    with user_errors_for(path):
        check_fields(run)
        if not {"train", "held_out"} <= set(run):
            raise ValueError("train or held_out is missing")
    return run


# ---- --recipe best: sort by importance, then distil ----------------------------------------------

def sort_and_copy_teacher(state, stages, sets, settings, autocast):
    """Sort the heads and neurons, and freeze a teacher, if the settings ask for it.

    `train` calls this function at the start of every stage. It acts only at the start
    of the second stage, when the largest architecture has been trained and smaller ones
    open.
    """
    if state.step != stages[0].num_steps:
        return
    if settings.reorder:
        totals = importance(state.model, sets.train, settings, autocast)
        sort_by_importance(state.model, totals)
    if settings.distill:
        state.teacher = copy.deepcopy(state.model).eval()


def importance(model, examples, settings, autocast):
    """Return the importance of the heads [H] and of the neurons [F] of every layer.

    The importance of a head or a neuron is |sum of w * dL/dw| over its output weights
    (Molchanov et al. 2019). We measure it on the largest architecture, and add it up
    over at most 32 batches.
    """
    steps_per_epoch = math.ceil(len(examples) / settings.batch_size)
    batches = data.batches(examples, settings.batch_size, settings.seed)
    device, max_length = model.pooler.weight.device, model.config.max_position_embeddings
    gradient = share_among_processes(weight_gradient)
    totals = [[0, 0] for _ in model.layers]
    # Dropout would only add noise to the gradients.
    model.eval()
    for _ in range(min(steps_per_epoch, 32)):
        batch = data.collate(examples, next(batches), device, max_length)
        gradient(model, batch, [model.config.arch], autocast)
        for layer, total in zip(model.layers, totals):
            w = layer.attention_out.weight                           # [C, H*D]
            per_column = (w * w.grad).detach().sum(0)                # [H*D]
            per_head = per_column.view(-1, model.config.head_size).sum(1)    # [H]
            total[0] = total[0] + per_head.abs()
            w = layer.ffn_out.weight                                 # [C, F]
            per_neuron = (w * w.grad).detach().sum(0)                # [F]
            total[1] = total[1] + per_neuron.abs()
    model.train()
    return totals


def teacher_targets(teacher, inputs, autocast):
    """Return the teacher's soft targets for a batch, or None without a teacher.

    The targets are probabilities [B, num_labels], or logits [B, 1] for a regression.
    """
    if teacher is None:
        return None
    with torch.no_grad(), autocast():
        logits = teacher(*inputs).float()
    return logits.softmax(1) if logits.shape[1] > 1 else logits


def task_loss(logits, targets):
    """Return the cross-entropy, or for a regression the mean squared error.

    logits: [B, num_labels]. targets: labels [B] or probabilities [B, num_labels]. A
    regression has logits [B, 1] and targets [B] or [B, 1].
    """
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], targets.flatten())
    return F.cross_entropy(logits, targets)


# ---- Logging, and finishing a training -----------------------------------------------------------

def clip_and_check(model, losses, t, stage, lr, archs):
    """Clip the gradient at norm 1, and return the losses as numbers.

    Raises UserError if a loss or the norm is NaN or infinite. Adam has not used the
    gradient by then, so the weights are still good. The last four arguments are only
    for the message.
    """
    # CHOICE: the gradient is clipped at 1, as in the authors' code. The paper does not
    # mention clipping.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # Fetch all numbers at once, because every fetch waits for the device.
    *losses, norm = torch.stack([*losses, norm]).tolist()
    if not np.isfinite([*losses, norm]).all():
        sampled = ", ".join(f"[{arch}]" for arch in archs)
        raise UserError(f"diverged at step {t + 1} of stage {stage.name}, "
                        f"learning rate {lr:g}: losses {losses}, "
                        f"gradient norm {norm}, architectures {sampled}. "
                        "Try a lower --lr")
    return losses


def log_and_checkpoint(run, state, stage, losses, num_steps, checkpoint_every):
    """Log a step, save a checkpoint if one is due, and stop if a signal has arrived."""
    report(run, state, stage, losses, num_steps)
    signal_number = any_signal()
    is_due = state.step % checkpoint_every == 0 or state.step == num_steps
    if is_due or signal_number:
        save(run, state)
    if signal_number:
        raise KeyboardInterrupt(signal_number)


def report(run, state, stage, losses, num_steps):
    """Log every tenth step and the last one, and show the progress.

    theta is long, so it is logged at most about fifty times.
    """
    print_training_time(run, state, stage, num_steps)
    if state.step % 10 and state.step < num_steps:
        return
    P, config = state.P, state.model.config
    loss = float(np.mean(losses))
    floor = min_exploit_probability(P)
    # A variable with one open category has nothing to decide, so it is left out here.
    top_probabilities = [theta.max() for theta in P.theta if (theta > 0).sum() > 1]
    most_likely = search_space(config).arch(P.most_likely())
    facts = dict(step=state.step, stage=stage.name, loss=loss, K=state.K, floor=floor,
                 entropy=P.entropy(),
                 top_probability=float(np.mean(top_probabilities or [1.0])),
                 most_likely_params=count_params(config, most_likely))
    theta_interval = 10 * math.ceil(num_steps / 500)
    if state.step % theta_interval == 0 or state.step == num_steps:
        facts["theta"] = [theta.round(4).tolist() for theta in P.theta]
    run.log(**facts)
    text = f"stage {stage.name}, loss {loss:.3f}, K {state.K:.2f} (at least {floor:.2f})"
    run.progress.show(state.step, text)


def print_training_time(run, state, stage, num_steps):
    """Print once how long the rest of the training takes, if at least ten seconds.

    The time per step is measured in the first stage that this command runs. We assume
    that the time of a step is proportional to its FLOPs, but never below the measured
    time, because small slices save many FLOPs but little time.
    """
    seconds = run.progress.first_seconds_per_step(state.step)
    if seconds is None:
        return
    config, settings = state.model.config, run.settings
    seconds_left = 0
    flops_now = relative_flops(config, stage, settings)
    for fields in run.header["facts"]["stages"]:
        planned = Stage(**fields)
        end = planned.first_step + planned.num_steps
        steps_left = max(0, end - max(state.step, planned.first_step))
        share = relative_flops(config, planned, settings) / flops_now
        seconds_left += steps_left * seconds * max(1.0, share)
    if seconds_left >= 10:
        print_line(f"{num_steps - state.step:,} steps left, about "
                   f"{format_duration(seconds_left)}")


def relative_flops(config, stage, settings):
    """Return a step's FLOPs in this stage, relative to a step of the largest architecture.

    We assume that the samples differ, and have the mean size of the open choices.
    """
    choices = (stage.depths, stage.heads, stage.ffn_sizes)
    if all(len(sizes) == 1 for sizes in choices):
        return 1.0
    depth, heads, ffn_size = (round(np.mean(sizes)) for sizes in choices)
    mean_arch = Arch((heads,) * depth, (ffn_size,) * depth)
    share = settings.archs_per_step * count_flops(config, mean_arch)
    # A teacher of --distill runs forward only, which is a third of a step.
    return share / count_flops(config, config.arch) + settings.distill / 3


def format_duration(seconds):
    """Return a rough duration in words: 40 seconds, 2 minutes or 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 180 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def min_exploit_probability(P):
    """Return the smallest K that theta_min allows.

    K is smallest when every variable has settled on one category. The other open
    categories are then at theta_min.
    """
    collapsed = P.uniform()
    for theta in collapsed.theta:
        num_open = (theta > 0).sum()
        theta[theta > 0] = raise_to_minimum(np.eye(num_open)[0], P.num_free)
    return exploit_probability(collapsed)


def finish_training(run, state, task, sets, device, autocast, **facts):
    """Evaluate the reference architectures on the hold-out set, and write the super-BERT.

    Process 0 returns the contents of run.json, and every other process returns None.
    facts: further fields of run.json.
    """
    if PROCESS_INDEX > 0:
        return None
    model = state.model
    theta = [variable.tolist() for variable in state.P.theta]
    archs = reference_archs(search_space(model.config), theta)
    shares_of = full_sizes(model.config, read_earlier_run(run.settings.bert))
    scores = {}
    if sets.holdout:
        evaluate_arch = data.make_evaluator(model, [sets.holdout], task.metric, device,
                                            autocast)
        scores = {name: evaluate_arch(arch) for name, arch in archs.items()}
    save_bert(model, run.path, sets.tokenizer)
    result = run.write_result(
        device, autocast, task=task.name, metric=task.metric, pairs=task.pairs,
        most_frequent=data.most_frequent_label(task),
        data=run.settings.data, train=sets.train_file, held_out=sets.holdout_split,
        lr=run.settings.lr, max_length=sets.max_length, theta=theta, holdout=scores,
        full_params=shares_of[0], full_flops=shares_of[1], **facts)
    for name, score in scores.items():
        text = format_scores(model.config, archs[name], score, shares_of)
        print_line(f"hold-out, {name}: {text}")
    if scores:
        best = max(score["score"] for score in scores.values())
        baseline = data.majority_baseline(task, [sets.holdout])
        if is_no_better(best, baseline):
            print_line(f"WARNING: none of these is better than always giving "
                       f"{constant_answer(model.config)}, which scores {baseline:.2f} on "
                       "the hold-out set: try a higher or another --lr, or more --epochs")
    return result


def is_no_better(score, baseline):
    """Return whether a model scores no more than `baseline`, a constant answer's score.

    It is False if the constant answer scores 100, because no model can score more.
    """
    return score <= baseline < 100


def constant_answer(config):
    """Return a phrase that names the constant answer of `data.majority_baseline`."""
    if config.problem_type == "regression":
        return "the mean"
    return "the most frequent answer"


class Progress:
    """Print a progress line to stderr at most every ten seconds, and one at the end."""

    def __init__(self, done, total):
        self.done, self.total = done, total
        self.last_shown = time.perf_counter()
        # `first_seconds_per_step` starts to measure at this (time, number of steps done).
        self.measured_from = None

    def first_seconds_per_step(self, done):
        """Return the seconds per step once, as soon as they are known, otherwise None.

        They are known after at least three steps and three seconds. The first step is
        left out, because it is slower than the others.
        """
        now = time.perf_counter()
        if self.measured_from is None:
            self.measured_from = now, done
        start, first_done = self.measured_from
        if done < first_done + 3 or now < start + 3:
            return None
        # Infinity is never reached, so that no later call returns a number.
        self.measured_from = math.inf, done
        return (now - start) / (done - first_done)

    def show(self, done, text):
        """Print how many steps are done, `text`, and the time, if a line is due.

        The time per step is the mean since the last line.
        """
        seconds = time.perf_counter() - self.last_shown
        if seconds > 10 or done == self.total:
            ms = 1000 * seconds / max(1, done - self.done)
            minutes_left = (self.total - done) * ms / 60_000
            print_progress(f"{done}/{self.total}  {text}, {ms:.0f} ms/step, "
                           f"{minutes_left:.1f} min left")
            self.done, self.last_shown = done, time.perf_counter()


def print_progress(text):
    """Print a line to stderr.

    Ignore failures (a closed pipe, a full disk): a progress line is not worth losing a
    run.
    """
    # Python raises RuntimeError if a signal handler prints during another print.
    with contextlib.suppress(OSError, RuntimeError):
        print(escape_control_chars(text), file=sys.stderr, flush=True)


# ---- Setting up a search, and writing its results ------------------------------------------------

# The run.json of a sub-BERT repeats these fields from the run.json of its super-BERT.
INHERITED_FACTS = ("task", "metric", "pairs", "most_frequent", "data", "train", "held_out",
                   "max_length")


@dataclasses.dataclass
class SearchSetup:
    """A super-BERT to be searched, its data, and all scores and costs known so far."""
    settings: "SearchSettings"
    superbert: str              # its directory
    superbert_run: dict         # its run.json
    tokenizer: dict             # its tokenizer, {file name: bytes}
    model: ElasticBert
    space: SearchSpace
    evaluate: object            # architecture -> ACC(m) on the data that selects, in %
    evaluate_on_dev: object     # architecture -> every metric on dev, in %
    dev_baseline: float         # the score of a constant answer on dev, in %
    measure: object             # architecture -> T(m)
    unit: str                   # the unit of T(m)
    runs: list                  # [(RunDirectory, Omega)], one pair per budget
    scores: dict                # {architecture: ACC(m)}
    costs: dict                 # {architecture: T(m)}
    device: torch.device
    autocast: object


def open_search(settings):
    """Read the super-BERT and its data, and open one run directory per budget."""
    device, autocast = select_device_and_precision(settings.device, settings.precision)
    superbert = settings.model or latest_superbert()
    superbert_run, task = read_superbert(superbert, settings.data)
    # Do not log --data, because the data may move before a --resume. The log and run.json
    # hold a fingerprint of the data instead.
    settings = dataclasses.replace(settings, data=None)
    model = data.load_trained(superbert, task).to(device)
    space = SearchSpace.for_config(model.config)

    # Make two evaluators. The search selects with one and reports with the other.
    encode = data.make_encoder(superbert)
    _, holdout = data.split_holdout(task.train, *superbert_run["held_out"])
    dev_sets = [encode(examples) for examples in task.devs]
    selection_sets = dev_sets
    if settings.select_on == "holdout":
        if not holdout:
            raise UserError(f"{superbert} was trained without a hold-out set: "
                            "use --select-on dev")
        selection_sets = [encode(holdout)]
    select = data.make_evaluator(model, selection_sets, task.metric, device, autocast)
    evaluate_on_dev = data.make_evaluator(model, dev_sets, task.metric, device, autocast)

    # Open one run per budget. Read back the scores and costs that an interrupted search
    # has logged.
    kind, settings_per_budget = budgets_from_settings(settings, superbert)
    # A --resume compares the facts. The path of the data is left out, because it may change.
    facts = {name: superbert_run.get(name) for name in (*INHERITED_FACTS, "theta")
             if name != "data"}
    runs = [RunDirectory(run_settings, superbert_run["data"], superbert, **facts)
            for run_settings in settings_per_budget.values()]
    for run in runs:
        # --resume reads the list of all budgets from any of the logs.
        run.header["budgets"] = list(settings_per_budget)
    measure = cost_function(kind, model, autocast)
    scores, logged_costs = read_logged_scores(runs, space)
    largest, smallest = space.largest(), space.smallest()
    costs = {largest: measure(largest), smallest: measure(smallest)} | logged_costs
    budgets = [parse_budget(text, costs[smallest], costs[largest], UNITS[kind])
               for text in settings_per_budget]
    # Lock every directory before the first one is cleared.
    for run in runs:
        run.lock()
    for run in runs:
        run.begin()
    return SearchSetup(
        settings=settings, superbert=superbert, superbert_run=superbert_run,
        tokenizer=tokenizer_files(superbert), model=model, space=space,
        evaluate=print_search_time(lambda arch: select(arch)["score"], settings, runs),
        evaluate_on_dev=evaluate_on_dev, dev_baseline=data.majority_baseline(task),
        measure=measure, unit=UNITS[kind], runs=list(zip(runs, budgets)), scores=scores,
        costs=costs, device=device, autocast=autocast)


def print_search_time(evaluate, settings, runs):
    """Return a function like `evaluate` that prints once how long the search takes.

    It prints after its first call, if the search takes at least ten seconds. A new search
    evaluates the largest architecture first, so no later evaluation should take longer.
    """
    first_call = True

    def timed_evaluate(arch):
        """Evaluate an architecture, and print the time of the search at the first call."""
        nonlocal first_call
        start = time.perf_counter()
        score = evaluate(arch)
        if first_call:
            first_call = False
            text = search_time(time.perf_counter() - start, settings, runs)
            if text:
                print_line(text)
        return score

    return timed_evaluate


def search_time(seconds, settings, runs):
    """Return a line about the time of a search, or "" if it takes less than ten seconds.

    seconds: the time of one evaluation. The line proposes fewer evaluations if the search
    is new and takes more than five minutes. It does not count the latency measurements,
    which take about a second each.
    """
    unfinished = [run for run in runs if not run.finished]
    num_left = settings.evaluations * len(unfinished)
    is_resumed = any(run.resumed for run in unfinished)
    for run in unfinished:
        # The first line of a log is its header. A new log has no other line.
        num_left -= len(read_log(run.path)) - 1
    most, each = max(1, num_left) * seconds, f"{seconds:.2g} s"
    if most < 10:
        return ""
    if is_resumed:
        return f"{num_left:,} evaluations left, about {each} each: up to {format_duration(most)}"
    text = f"{num_left:,} evaluations, at most {each} each: up to {format_duration(most)}"
    if most > 300 and settings.evaluations > 60:
        fewer = format_duration(most * 60 / settings.evaluations)
        text += f" (--evaluations 60: {fewer})"
    return text


def best_within(setup, budget):
    """Return the best sub-BERT that fits the budget, among all that were evaluated.

    Raises UserError if none fits when it is measured a second time.
    """
    while True:
        best = best_fit(setup.scores, setup.costs.get, budget)
        if best is None:
            raise UserError(f"no sub-BERT met the budget of "
                            f"{format_cost(budget, setup.unit)} {setup.unit} "
                            "when it was measured a second time: choose a larger budget")
        # Latency is noisy, so measure the winner once more. If it no longer fits, its
        # new cost rules it out, and the loop takes the next best.
        setup.costs[best] = max(setup.costs[best], setup.measure(best))
        if setup.costs[best] < budget:
            return best


def write_sub_bert(setup, run, budget, best):
    """Extract the sub-BERT `best`, evaluate it on dev, and write its directory."""
    trained, config = setup.superbert_run, setup.model.config
    dev = setup.evaluate_on_dev(best)
    save_bert(extract(setup.model, best), run.path, setup.tokenizer)
    # The first line of the log is its header. Every other line is an evaluation.
    evaluations_run = len(read_log(run.path)) - 1
    full_params, full_flops = full_sizes(config)
    run.write_result(
        setup.device, setup.autocast, **{name: trained.get(name) for name in INHERITED_FACTS},
        superbert=setup.superbert, unit=setup.unit, budget=budget,
        cost=setup.costs[best], full_cost=setup.costs[setup.space.largest()],
        arch=best._asdict(), selected_on=setup.settings.select_on,
        params=count_params(config, best), flops=count_flops(config, best),
        full_params=full_params, full_flops=full_flops,
        selection_score=setup.scores[best], dev=dev, dev_baseline=setup.dev_baseline,
        evaluations_asked=setup.settings.evaluations, evaluations_run=evaluations_run)


def read_logged_scores(runs, space):
    """Return the scores and the costs that resumed searches have logged.

    Both are dicts: {architecture: ACC(m)} and {architecture: T(m)}.
    """
    scores, costs = {}, {}
    for run in runs:
        if not run.resumed:
            continue
        with user_errors_for(run.log_path):
            # The first line is the header.
            for line in read_log(run.path)[1:]:
                arch = space.arch(line["choices"])
                if space.choices(arch) != line["choices"]:
                    raise ValueError(f"no search logs the choices {line['choices']}")
                scores[arch], costs[arch] = float(line["score"]), line["cost"]
    return scores, costs


# ---- Budgets, costs, and eval --------------------------------------------------------------------

UNITS = {"params": "parameters", "flops": "FLOPs", "latency": "ms"}


def budgets_from_settings(settings, superbert):
    """Return the kind of budget, and the settings of one search per budget.

    The settings are a dict. Its keys are the budgets as typed, but in lower case. The
    settings of each search name the directory that it writes.
    """
    kinds = [kind for kind in UNITS if getattr(settings, f"max_{kind}")]
    if len(kinds) != 1:
        raise UserError("name one kind of budget: "
                        "--max-params, --max-flops or --max-latency")
    kind = kinds[0]
    name = os.path.basename(os.path.realpath(superbert))
    texts = [text.lower() for text in getattr(settings, f"max_{kind}")]
    settings_per_budget = {}
    for text in texts:
        split_budget(text, UNITS[kind])          # refuses a typing error at once
        suffix = text if kind == "params" else f"{text}-{kind}"
        out = f"subbert/{name}-{suffix}"
        if settings.out:
            out = f"{settings.out}/{suffix}" if len(set(texts)) > 1 else settings.out
        settings_per_budget[text] = dataclasses.replace(
            settings, model=superbert, out=out, **{f"max_{kind}": [text]})
    return kind, settings_per_budget


def split_budget(text, unit):
    """Split a budget as typed into a number and a suffix: '60m' into 60.0 and 'm'.

    '50%' becomes 0.5 and 'x'. Raises UserError if the text is not a budget in this unit.
    """
    suffixes = ("", "k", "m", "g", "b", "x", "%")
    example = "6e7, 60m, 0.5x or 50%"
    if unit == "ms":
        suffixes = ("", "ms", "x", "%")
        example = "12, 12ms, 0.5x or 50%"
    # Few digits, because float() turns a number of 400 digits into infinity.
    digits = r"(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})"
    match = re.fullmatch(rf"({digits}(?:e\+?\d{{1,2}})?)([a-z%]*)", text)
    if not match or match[2] not in suffixes or float(match[1]) == 0:
        raise UserError(f"{text!r} is not a positive budget in {unit}: write it like "
                        f"{example}, without blanks")
    if match[2] == "%":
        return float(match[1]) / 100, "x"
    return float(match[1]), match[2]


def parse_budget(text, smallest_cost, full_cost, unit):
    """Return Omega for a budget as typed: '60000000', '60e6', '60m' or '0.5x'.

    '0.5x' and '50%' are half of the full model's cost. A latency may also be '12ms'. Raises
    UserError if no sub-BERT fits the budget.
    """
    number, suffix = split_budget(text, unit)
    scales = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "ms": 1, "x": full_cost}
    budget = number * scales[suffix]
    if smallest_cost >= budget:
        share = smallest_cost / full_cost
        hint = f". Did you mean {text}x?" if suffix == "" and number <= 1 else ""
        raise UserError(f"no sub-BERT fits the budget of {format_cost(budget, unit)} {unit}: "
                        f"the smallest has {format_cost(smallest_cost, unit)} {unit} "
                        f"({share:.3f}x){hint}")
    if budget > full_cost:
        print_line(f"warning: the budget of {format_cost(budget, unit)} {unit} exceeds the "
                   f"full model's {format_cost(full_cost, unit)}, so every sub-BERT fits")
    return budget


def format_cost(cost, unit):
    """Return the number of a cost or of a budget: 13,254,912 (parameters) or 10.62 (ms)."""
    if cost < 1:
        return f"{cost:.3g}"
    return f"{cost:,.2f}" if unit == "ms" else f"{cost:,.0f}"


def cost_function(kind, model, autocast):
    """Return T, the function that maps an architecture to its cost.

    kind: params, flops or latency. The latency is the time that the extracted model
    takes for one sequence. Every call measures it again.
    """
    config = model.config
    if kind == "params":
        return lambda arch: count_params(config, arch)
    if kind == "flops":
        return lambda arch: count_flops(config, arch)
    n_tokens = min(128, config.max_position_embeddings)
    return lambda arch: latency(extract(model, arch), n_tokens, autocast)


def evaluate(settings):
    """Print the size, the latency and the dev scores of a trained model.

    For a super-BERT, print them for each of the reference architectures.
    """
    if not settings.model:
        raise UserError("name a model with --model, for example subbert/MRPC-60000000")
    device, autocast = select_device_and_precision(settings.device, settings.precision)
    run = read_run(settings.model)
    check_data_exists(run["data"], settings.data)
    task = data.load_dev(settings.data or run["data"], settings.model)
    model = load_bert(settings.model).to(device)
    dev_sets = [data.encode(examples, settings.model) for examples in task.devs]
    evaluate_arch = data.make_evaluator(model, dev_sets, task.metric, device, autocast)
    measure = cost_function("latency", model, autocast)
    archs = {"sub-BERT": model.config.arch}
    # Older runs of search do not name the sizes of their super-BERT.
    shares_of = run.get("full_params"), run.get("full_flops")
    if "theta" in run and not is_sub_bert(model.config):
        archs = reference_archs(SearchSpace.for_config(model.config), run["theta"])
        shares_of = full_sizes(model.config)
    for name, arch in archs.items():
        scores = format_scores(model.config, arch, evaluate_arch(arch), shares_of)
        print_line(f"{name}: {arch}\n"
                   f"  {scores}\n"
                   f"  latency {measure(arch):.2f} ms for one sequence of at most "
                   f"128 tokens on {device_name(device)}")
    baseline = ""
    # An older run.json of train does not name the most frequent label.
    if not task.labels or run.get("most_frequent"):
        score = data.majority_baseline(task, name=run.get("most_frequent"))
        baseline = f". Always giving {constant_answer(model.config)} scores {score:.2f}"
    print_line(f"on dev of {settings.data or task.name}{baseline}")


def reference_archs(space, theta):
    """Return the architectures that train and eval report, as {name: architecture}.

    There are three, but only one after plain fine-tuning (--stages largest).
    """
    if isinstance(space, SingleArch):
        return {"sub-BERT": space.only_arch}
    if all(max(variable) == 1 for variable in theta):
        return {"largest": space.largest()}          # no other choice was ever open
    return {
        "largest": space.largest(),
        "most likely": space.arch([int(np.argmax(variable)) for variable in theta]),
        "smallest": space.smallest(),
    }


def full_sizes(config, earlier_run=None):
    """Return the parameters and the FLOPs of the largest architecture of a model.

    earlier_run: the run.json of the BERT that the model was trained from. If that BERT
    was a sub-BERT, return the sizes of its super-BERT, which this file holds.
    """
    earlier_run = earlier_run or {}
    params = earlier_run.get("full_params", count_params(config, config.arch))
    flops = earlier_run.get("full_flops", count_flops(config, config.arch))
    return params, flops


def format_scores(config, arch, scores, shares_of):
    """Return one line with the parameters, the FLOPs and the scores of a sub-BERT.

    scores: {metric: %}. shares_of: the parameters and the FLOPs of the super-BERT. The
    line gives both sizes as shares of these numbers, unless they are None.
    """
    sizes = count_params(config, arch), count_flops(config, arch)
    texts = []
    for size, unit, full_size in zip(sizes, ("parameters", "FLOPs"), shares_of):
        share = f" ({size / full_size:.3f}x)" if full_size else ""
        texts.append(f"{format_cost(size, unit)} {unit}{share}")
    for name, value in scores.items():
        # compute_metrics computes the F1 of the second label.
        label = f" (of {config.labels[1][:40]})" if name == "f1" else ""
        texts.append(f"{name}{label} {value:.2f}")
    return "  ".join(texts)


def print_results(setup, results):
    """Print the sub-BERT of every budget, and a table if there are several budgets.

    results: the contents of one run.json per budget.
    """
    config = setup.model.config
    for (run, _), result in zip(setup.runs, results):
        print_line(format_result(config, run.path, result))
    if len(results) == 1:
        return
    latency_ms = cost_function("latency", setup.model, setup.autocast)
    kind = next(kind for kind, unit in UNITS.items() if unit == setup.unit)
    names, milliseconds = defaultdict(list), {}
    header = ["budget", "parameters", "FLOPs", "ms here", "dev", "directory"]
    rows = [header]
    for (run, _), result in zip(setup.runs, results):
        arch = Arch(**result["arch"])
        name = getattr(run.settings, f"max_{kind}")[0]
        names[arch].append(name)
        if arch not in milliseconds:
            milliseconds[arch] = latency_ms(arch)
        rows.append([name, f"{count_params(config, arch):,}", f"{count_flops(config, arch):,}",
                     f"{milliseconds[arch]:.2f}", f"{result['dev']['score']:.2f}",
                     str(run.path)])
        if result["selected_on"] == "holdout":
            rows[-1].insert(4, f"{result['selection_score']:.2f}")
    if setup.settings.select_on == "holdout":
        header.insert(4, "hold-out")
    print_line("\n".join(align_columns(rows)))
    for same in names.values():
        if len(same) > 1:
            *first, last = same
            print_line(f"{', '.join(first)} and {last} found the same sub-BERT")


def align_columns(rows):
    """Return one line per row, with right-aligned numbers.

    The first and the last column hold text and are left-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append("  ".join(cells))
    return lines


def format_result(config, path, result):
    """Return two lines about the sub-BERT that a search has found.

    A third line is a warning, if the sub-BERT is no better than a constant answer.
    result: the contents of its run.json.
    """
    arch, selected_on = Arch(**result["arch"]), result["selected_on"]
    cost, budget = (format_cost(result[name], result["unit"]) for name in ("cost", "budget"))
    dev = "dev"
    if selected_on == "dev":
        dev = "dev (optimistic, because the search selected on it)"
    text = (f"found: {arch}, {cost} of {budget} {result['unit']}, in {path} "
            f"({selected_on} score {result['selection_score']:.2f}, "
            f"{result['evaluations_asked']} sampled, "
            f"{result['evaluations_run']} evaluated)\n"
            f"  {dev}: {format_scores(config, arch, result['dev'], full_sizes(config))}")
    # An older run.json has no baseline, and gets no warning.
    baseline = result.get("dev_baseline", -math.inf)
    if is_no_better(result["dev"]["score"], baseline):
        text += (f"\nWARNING: this sub-BERT is no better than always giving "
                 f"{constant_answer(config)}, which scores {baseline:.2f} on dev: choose a "
                 "larger budget, or train again with another --lr or more --epochs")
    return text


# ---- The run directory: log, checkpoint, resuming ------------------------------------------------

# The files that a run writes beside its log. A run replaces and removes no other files.
RUN_FILES = ("run.json", "checkpoint.safetensors", "config.json", "model.safetensors",
             *TOKENIZER_FILES)
# The first bytes of every log. They distinguish our logs from those of other programs.
LOG_BEGINNING = b'{"settings": {'
# The form of the time in run.json.
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


class RunDirectory:
    """The directory that a command writes.

    The log grows by whole lines, the checkpoint is replaced as a whole, and run.json
    comes last. A directory with a run.json is finished. With several processes, only
    process 0 writes.
    """

    def __init__(self, settings, *inputs, **facts):
        """Check that the command may write the directory settings.out.

        inputs: the directories that the command reads. facts: values that change the
        result (see `check_facts`). Raises UserError if settings.out holds files that must
        not be overwritten, or a run that cannot be resumed with these settings.
        """
        self.settings = settings
        self.path = Path(settings.out)
        self.started = time.perf_counter()
        self.log_path = self.path / "log.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.checked_files = self.list_files()
        self.finished = (self.path / "run.json").exists() and not settings.overwrite
        self.header = dict(settings=dataclasses.asdict(settings),
                           inputs=fingerprint_directories(*inputs),
                           num_processes=NUM_PROCESSES, facts={})
        # These three flags do not change the results, so a resumed run may change them.
        for name in ("out", "overwrite", "resume"):
            del self.header["settings"][name]
        self.check_can_write(inputs)
        old_log = read_log(self.path) if settings.resume else []
        self.resumed = bool(old_log)
        if self.resumed:
            self.old_header = old_log[0]
            self.check_facts(facts)
            self.check_can_resume(inputs)
        elif settings.resume and (self.finished or self.checkpoint.exists()):
            raise UserError(f"{self.log_path} is damaged: choose another --out")
        self.header["facts"] |= facts
        if NUM_PROCESSES > 1:
            # Process 0 writes next. Wait until every process has checked the directory.
            dist.barrier()

    def list_files(self):
        """Return {name: (time of the last change, size)} of the files of a run.

        An empty log is left out, because `lock` makes one.
        """
        files = {}
        for name in (*RUN_FILES, "log.jsonl"):
            path = self.path / name
            if os.path.lexists(path):
                # A link to a file that does not exist counts as a file, too.
                status = path.stat(follow_symlinks=path.exists())
                if status.st_size or name != "log.jsonl":
                    files[name] = status.st_mtime_ns, status.st_size
        return files

    def check_can_write(self, inputs):
        """Raise UserError if the command must not write this directory."""
        settings = self.settings
        if os.path.realpath(self.path) in map(os.path.realpath, inputs):
            raise UserError(f"--out {self.path} is a directory that the command reads: "
                            "choose another --out")
        if settings.resume and settings.overwrite:
            raise UserError("--resume and --overwrite are mutually exclusive: "
                            "leave one out")
        self.refuse_foreign_files()
        if settings.overwrite or (settings.resume and self.log_path.exists()):
            return
        if self.finished:
            raise UserError(f"{self.path} holds a finished result: choose another --out, "
                            "or replace it with --overwrite")
        if os.path.lexists(self.log_path):
            raise UserError(f"{self.path} holds an unfinished run: choose another --out, "
                            "replace it with --overwrite, or continue it with --resume")

    def refuse_foreign_files(self):
        """Raise UserError if this run would replace a file that no earlier run wrote."""
        beginning, fault = b"", "does not exist"
        if regular_file(self.log_path).exists():
            fault = "is damaged or not the log of a run"
            with open(self.log_path, "rb") as log_file:
                beginning = log_file.read(len(LOG_BEGINNING))
        if beginning == LOG_BEGINNING:
            return
        foreign = set(self.checked_files)
        if self.log_path.exists() and LOG_BEGINNING.startswith(beginning):
            # A run that was killed at its start may have written only some of these bytes,
            # and no other file.
            foreign -= {"log.jsonl"}
        if foreign:
            raise UserError(f"{self.path} holds {min(foreign)}, but {self.log_path} {fault}: "
                            "choose another --out")

    def check_can_resume(self, inputs):
        """Raise UserError if the run was started with other files or settings."""
        with user_errors_for(self.log_path):
            old_settings = {**self.old_header["settings"]}
            same_inputs = self.old_header["inputs"] == self.header["inputs"]
            old_num_processes = self.old_header.get("num_processes", 1)
            if not same_inputs:
                raise UserError(f"the files in {' or '.join(inputs)} have changed since "
                                f"{self.path} was started: put them back, or start over "
                                "with --overwrite")
            if old_num_processes != NUM_PROCESSES:
                raise UserError(f"{self.path} was started with {old_num_processes} "
                                f"processes, but now there are {NUM_PROCESSES}: start as "
                                "many, or start over with --overwrite")
            for name, value in self.header["settings"].items():
                old_value = old_settings.get(name)
                if old_value != value:
                    raise UserError(f"{self.path} was started with "
                                    f"{as_typed(name, old_value)}, but you gave "
                                    f"{as_typed(name, value)}: pass "
                                    f"{as_typed(name, old_value)}, or start over with "
                                    "--overwrite")

    def check_facts(self, facts):
        """Raise UserError if a resumed run was started with other facts.

        Facts are values that follow from the settings and the data, or that come from
        another run's run.json. For example, the number of epochs may depend on the name
        of the data directory.
        """
        # JSON turns tuples into lists, so compare the facts in the form that the log holds.
        facts = json.loads(json.dumps(facts))
        with user_errors_for(self.log_path):
            # An older version has logged no facts.
            old_facts = {**self.old_header.get("facts", facts)}
            for name, value in facts.items():
                if old_facts.get(name) != value:
                    old_text, text = json.dumps(old_facts.get(name)), json.dumps(value)
                    raise UserError(
                        f"{self.path} was started with another {name}. It was "
                        f"{old_text:.60}, and now it is {text:.60}. Was the data directory "
                        "renamed, or a run.json changed? Undo that, or start over with "
                        "--overwrite")

    def add_facts(self, **facts):
        """Add facts to the header of the log. Raises UserError as `check_facts` does."""
        if self.resumed:
            self.check_facts(facts)
        self.header["facts"] |= facts

    def lock(self):
        """Lock the directory until the process ends.

        Raises UserError if another run holds the lock, or if the files have changed since
        `__init__` checked them.
        """
        if PROCESS_INDEX > 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        # Write without a buffer. Otherwise a full disk would be noticed only when Python
        # exits.
        self.log_file = open(self.log_path, "ab", buffering=0)
        try:
            # Windows has no fcntl. The lock holds until the process ends.
            import fcntl
            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {self.path}: wait until it ends, "
                            "or choose another --out") from None
        except (ImportError, OSError):
            # Windows and some network disks have no flock. Continue without a lock.
            pass
        if self.list_files() != self.checked_files:
            raise UserError(f"the files in {self.path} have changed since this command "
                            "began: run it again when no other run is writing there")

    def begin(self):
        """Clear the locked directory, and begin the log, unless a run is resumed."""
        if PROCESS_INDEX > 0:
            return
        # A run that was killed may have left temporary files of `write_file`.
        names = "|".join(map(re.escape, RUN_FILES))
        for path in self.path.glob(".*.tmp"):
            is_ours = re.fullmatch(rf"\.({names})\.\d+\.tmp", path.name)
            if is_ours and "log.jsonl" in self.checked_files:
                path.unlink()
        if self.resumed:
            # A crash may have left half a line.
            self.log_file.truncate(self.log_path.read_bytes().rindex(b"\n") + 1)
        else:
            for name in RUN_FILES:
                (self.path / name).unlink(missing_ok=True)
            self.log_file.truncate(0)
            self.log(**self.header)
        if self.finished:
            print_line(f"{self.path} is finished")
            # The run may have been killed before it could remove its checkpoint.
            self.checkpoint.unlink(missing_ok=True)

    def log(self, **facts):
        """Append one line to log.jsonl at once."""
        line = json.dumps(facts).encode() + b"\n"
        try:
            while line and PROCESS_INDEX == 0:
                # A nearly full disk may take only the beginning of the line.
                written = self.log_file.write(line)
                line = line[written:]
        except OSError as error:
            # The error does not know the name of the file, and the message needs it.
            error.filename = str(self.log_path)
            raise

    def write_result(self, device, autocast, **facts):
        """Write run.json, which makes the result final, and remove the checkpoint."""
        # --precision auto does not say which precision was used, so ask torch.
        with autocast():
            is_bf16 = torch.is_autocast_enabled(device.type)
        packages = ("torch", "numpy", "tokenizers", "safetensors")
        facts |= dict(
            **self.header,
            seconds=round(time.perf_counter() - self.started, 1),
            peak_memory_mib=round(peak_memory(device)),
            hardware=device_name(device),
            precision="bf16" if is_bf16 else "fp32",
            wrote=fingerprint_directories(self.path),
            versions={name: metadata.version(name) for name in packages},
            finished=time.strftime(TIME_FORMAT, time.gmtime()))
        write_json(self.path / "run.json", **facts)
        self.checkpoint.unlink(missing_ok=True)
        print_line(f"wrote {self.path} ({facts['seconds']:.0f} s, peak memory "
                   f"{facts['peak_memory_mib']} MiB)")
        return facts


def fingerprint_directories(*directories):
    """Return one fingerprint of the data, weights and tokenizers in `directories`."""
    names = ("train.tsv", "dev.tsv", "dev_matched.tsv", "dev_mismatched.tsv",
             "config.json", *TOKENIZER_FILES)
    paths = []
    for directory in directories:
        paths += [Path(directory, name) for name in names] + weight_files(directory)
    return fingerprint(*paths)


def read_log(directory):
    """Return the complete lines of a run's log as dicts, or [] if there is no log.

    Raises UserError if a field has a value that no run logs.
    """
    path = regular_file(Path(directory, "log.jsonl"))
    with user_errors_for(path):
        if not path.exists():
            return []
        # A crash may have left half a line after the last newline.
        lines = path.read_bytes().split(b"\n")[:-1]
        records = [{**json.loads(line)} for line in lines]
        for record in records:
            check_fields(record)
        shapes = {tuple(map(len, record["theta"])) for record in records if "theta" in record}
        if len(shapes) > 1:
            raise ValueError("theta does not always have the same shape")
        return records


def scientific(number):
    """Return a positive whole number like 2.7e+05, or like 10^323 if a float overflows."""
    try:
        return f"{number:.1e}"
    except OverflowError:
        return f"10^{math.log10(number):.0f}"


def start_or_resume(run, state, stages, sets):
    """Open the run directory, and restore `state` if a run is resumed.

    Return False if the run was finished before, and True otherwise.
    """
    num_steps = stages[-1].first_step + stages[-1].num_steps
    num_epochs = num_steps / sets.steps_per_epoch
    run.lock()
    run.add_facts(epochs=num_epochs, held_out=sets.holdout_split,
                  stages=[stage._asdict() for stage in stages])
    run.begin()
    if run.finished:
        return False
    if run.resumed:
        restore(run, state)
    run.progress = Progress(state.step, num_steps)
    num_archs = search_space(state.model.config).size()
    archs = f"{scientific(num_archs)} architectures"
    if run.settings.stages == "largest":
        archs = "one architecture"
    print_line(f"{num_steps} steps, {num_epochs:.3g} epochs, {archs}")
    return True


def save(run, state):
    """Write `state` to the checkpoint, from which `restore` reads it back."""
    if PROCESS_INDEX > 0:
        return
    groups = {"model": state.model.state_dict(), "rng": {"cpu": torch.get_rng_state()}}
    if state.teacher:
        groups["teacher"] = state.teacher.state_dict()
    for i, moments in state.adam.state_dict()["state"].items():
        groups[f"adam {i}"] = moments
    if torch.cuda.is_available():
        groups["rng"]["cuda"] = torch.cuda.get_rng_state()
    tensors = {}
    for group, members in groups.items():
        for name, tensor in members.items():
            tensors[f"{group}/{name}"] = tensor.cpu()
    # The checkpoint contains the length of the log, so the log must be on disk first.
    os.fsync(run.log_file.fileno())
    numbers = dict(
        step=state.step,
        K=state.K,
        theta=[theta.tolist() for theta in state.P.theta],
        rng=state.rng.bit_generator.state,
        log_bytes=run.log_path.stat().st_size,
        seconds=time.perf_counter() - run.started)
    text = json.dumps(numbers)
    checksum = checkpoint_checksum(tensors, text, run.log_path.read_bytes())
    content = safetensors.torch.save(tensors, {"state": text, "checksum": checksum})
    write_file(run.checkpoint, content)


def checkpoint_checksum(tensors, text, log):
    """Return a checksum of the tensors and the text of a checkpoint, and of the log."""
    checksum = zlib.crc32(text.encode() + log)
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), checksum)
        checksum = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), checksum)
    return str(checksum)


def restore(run, state):
    """Read the checkpoint into `state`, and remove the lines that were logged after it.

    Without a checkpoint, `state` does not change, and the log keeps only its header.
    """
    log_bytes = run.log_path.read_bytes().index(b"\n") + 1
    with user_errors_for(run.checkpoint):
        if run.checkpoint.exists():
            with safetensors.safe_open(regular_file(run.checkpoint), "pt") as file:
                texts = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            numbers = json.loads(texts["state"])
            log_bytes = numbers["log_bytes"]
            if run.log_path.stat().st_size < log_bytes:
                raise ValueError("the log is shorter than when it was written")
            log = run.log_path.read_bytes()[:log_bytes]
            checksum = checkpoint_checksum(tensors, texts["state"], log)
            if texts["checksum"] != checksum:
                raise ValueError("the checksum of its content and of the log is wrong")
            groups = defaultdict(dict)
            for key, tensor in tensors.items():
                group, name = key.split("/")
                groups[group][name] = tensor
            restore_tensors(groups, state)
            state.step, state.K = numbers["step"], numbers["K"]
            state.P.theta = [np.array(theta) for theta in numbers["theta"]]
            state.rng.bit_generator.state = numbers["rng"]
            run.started -= numbers["seconds"]
    if PROCESS_INDEX == 0:
        run.log_file.truncate(log_bytes)


def restore_tensors(groups, state):
    """Put the tensors of a checkpoint, {group: {name: tensor}}, back into `state`."""
    state.model.load_state_dict(groups["model"])
    moments = {}
    for i, weight in enumerate(state.model.parameters()):
        if f"adam {i}" not in groups:
            # Adam has never moved this weight, so it has no moments.
            continue
        moments[i] = groups[f"adam {i}"]
        # Adam's step count is a scalar. Both moments have the shape of the weight.
        if any(m.dim() and m.shape != weight.shape for m in moments[i].values()):
            raise ValueError(f"Adam's moments of weight {i} have another shape")
    state.adam.load_state_dict(state.adam.state_dict() | {"state": moments})
    torch.set_rng_state(groups["rng"]["cpu"])
    if torch.cuda.is_available() and "cuda" in groups["rng"]:
        torch.cuda.set_rng_state(groups["rng"]["cuda"])
    if groups["teacher"]:
        state.teacher = copy.deepcopy(state.model).eval()
        state.teacher.load_state_dict(groups["teacher"])


def read_run(directory):
    """Return the run.json of a finished train or search.

    Raises UserError if there is none, or if the files beside it have changed since it
    was written.
    """
    path = Path(directory) / "run.json"
    run = read_json(path, "does not exist: name a directory that train or search has "
                          "finished")
    if not {"data", "max_length", "held_out", "wrote", "train", "settings", "task",
            "metric", "pairs"} <= set(run):
        raise UserError(f"{path} was not written by train or search of this version: "
                        "run the command again")
    if run["wrote"] != fingerprint_directories(directory):
        raise UserError(f"files in {directory} have changed since run.json was written: "
                        "run the command again")
    with user_errors_for(path):
        check_fields(run)
        check_result(run, BertConfig.load(directory))
    return run


def check_result(run, config):
    """Raise an exception if a run.json does not fit the config.json beside it.

    The caller has already checked the fields of run.json with `check_fields`.
    """
    settings = {**run["settings"]}
    if "stages" in settings:
        # Only train has the setting `stages`, so train wrote this run.json.
        sizes = tuple(map(len, run["theta"]))
        if settings["stages"] not in get_args(TrainSettings.__annotations__["stages"]):
            raise ValueError(f"unknown stages {settings['stages']}")
        if sizes != search_space(config).categories:
            raise ValueError("theta has another number of categories than the model")
        # The log rounds theta, but here it is exact.
        if not all(abs(sum(theta) - 1) < 1e-9 for theta in run["theta"]):
            raise ValueError("theta does not sum to 1")
        return
    if run["arch"] != {name: list(sizes) for name, sizes in config.arch._asdict().items()}:
        raise ValueError("arch is not the architecture of the model")
    for kind, unit in UNITS.items():
        budgets = settings[f"max_{kind}"]
        if unit == run["unit"] and not " ".join(budgets).isascii():
            raise ValueError(f"the budget is {budgets!r:.50}")
        if unit != run["unit"] and budgets is not None:
            raise ValueError(f"unit is {run['unit']}, but there is a budget in {unit}")
    for name in ("superbert", "budget", "cost", "full_cost", "params", "flops", "dev",
                 "selected_on", "selection_score", "evaluations_asked", "evaluations_run"):
        if name not in run:
            raise ValueError(f"{name} is missing")


def is_text(value):
    """Return whether a value is a text that could name a file."""
    with contextlib.suppress(ValueError):
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    return False


def is_number(value):
    """Return whether a value is a finite number that fits into 64 bits."""
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float and math.isfinite(value)


def is_positive(value):
    """Return whether a value is a number above 0."""
    return is_number(value) and value > 0


def is_count(value):
    """Return whether a value is a whole number from 0."""
    return type(value) is int and 0 <= value < 2**63


def is_list_of_choices(value):
    """Return whether a value is a list of categories, with None for layers left out."""
    return isinstance(value, list) and all(c is None or is_count(c) for c in value)


def is_theta(value):
    """Return whether a value is a list of distributions, each summing to 1 within 1e-3."""
    if not isinstance(value, list) or not value:
        return False
    for theta in value:
        if not isinstance(theta, list) or not all(is_number(p) and p >= 0 for p in theta):
            return False
        if abs(sum(theta) - 1) > 1e-3:
            return False
    return True


def is_holdout_split(value):
    """Return whether a value is [share, seed]."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    share, seed = value
    return is_number(share) and 0 <= share <= 0.9 and is_count(seed)


def is_scores(value):
    """Return whether a value is {metric: %}."""
    return isinstance(value, dict) and value != {} and all(map(is_number, value.values()))


# The check of every field of a run.json or a log.jsonl that a program reads.
LEGAL_FIELDS = {
    # in both files
    "settings": lambda value: isinstance(value, dict) and is_text(value.get("data") or ""),
    "theta": is_theta,
    "cost": is_positive,
    "budgets": lambda value: isinstance(value, list) and all(map(is_text, value)),
    # in a log
    "choices": is_list_of_choices,
    "score": is_number,
    "step": is_count,
    "stage": is_text,
    "loss": is_number,
    "K": is_number,
    "floor": is_number,
    "most_likely_params": is_count,
    # in a run.json
    "task": is_text,
    "metric": is_text,
    "pairs": lambda value: type(value) is bool,
    "data": is_text,
    "train": is_text,
    "held_out": is_holdout_split,
    "max_length": is_size,
    "most_frequent": lambda value: value is None or is_text(value),
    # in the run.json of a sub-BERT
    "superbert": is_text,
    "unit": lambda value: value in UNITS.values(),
    "budget": is_positive,
    "full_cost": is_positive,
    "full_params": is_count,
    "full_flops": is_count,
    "params": is_count,
    "flops": is_count,
    "selected_on": lambda value: value in ("holdout", "dev"),
    "selection_score": is_number,
    "dev": is_scores,
    "evaluations_asked": is_count,
    "evaluations_run": is_count,
}


def check_fields(record):
    """Raise ValueError if a field of a run.json or of a log line has an illegal value."""
    for name, value in record.items():
        if name in LEGAL_FIELDS and not LEGAL_FIELDS[name](value):
            raise ValueError(f"{name} is {value!r:.50}")


def read_superbert(directory, data_dir=None):
    """Return the run.json and the task of a super-BERT that can be searched.

    data_dir: the directory of its data, if the data has moved. It becomes run["data"].
    Raises UserError if the model is a single architecture, or if train.tsv is not the
    file that it was trained on.
    """
    run = read_run(directory)
    if run["settings"].get("stages", "largest") == "largest":
        raise UserError(f"{directory} is a single architecture, so there is nothing to "
                        "search: name a super-BERT")
    check_data_exists(run["data"], data_dir)
    run["data"] = data_dir or run["data"]
    train_path = Path(run["data"], "train.tsv")
    if train_path.exists() and run["train"] != fingerprint(train_path):
        if data_dir:
            raise UserError(f"{train_path} is not the file that {directory} was trained "
                            "on: name the directory of that file with --data")
        raise UserError(f"{train_path} has changed since {directory} was trained, so its "
                        "hold-out set is lost: train again")
    task = data.load_task(run["data"], run["metric"])
    if run["pairs"] != task.pairs:
        raise UserError(f"{directory}/run.json is damaged: pairs is {run['pairs']}, but its "
                        f"data has pairs: {task.pairs}")
    return run, task


def check_data_exists(trained_on, data_dir):
    """Raise UserError if the data has moved and --data does not name its new directory.

    trained_on: the directory in run.json. data_dir: the directory that --data names, if any.
    """
    if not data_dir and not Path(trained_on).exists():
        raise UserError(f"{trained_on} does not exist: if the data has moved, name its "
                        "directory with --data")


def latest_superbert():
    """Return the super-BERT in superbert/ that was finished last, and print its name."""
    finished = []
    for path in Path("superbert").glob("*/run.json"):
        run = read_json(path)
        with user_errors_for(path):
            # Plain fine-tuning (--stages largest) makes no super-BERT.
            if run.get("settings", {}).get("stages", "largest") != "largest":
                finished_at = time.strptime(run["finished"], TIME_FORMAT)
                finished.append((finished_at, str(path.parent)))
    if not finished:
        raise UserError("no finished super-BERT in superbert/: train one, or name one "
                        "with --model")
    directory = max(finished)[1]
    print_line(f"using {directory}, the super-BERT finished last")
    return directory


# ---- Several processes, started by torchrun ------------------------------------------------------

def share_among_processes(gradient):
    """Return a function like `gradient` that splits each batch among the processes."""
    if NUM_PROCESSES == 1:
        return gradient

    def shared_gradient(model, batch, archs, autocast, teacher=None):
        """Compute the gradient on this process's examples, and sum over all processes."""
        # CHOICE: every process trains the same architectures, because theta needs the
        # loss of each architecture on the whole batch. A layer that no architecture uses
        # then has no gradient in any process, so every all-reduce has the same tensors.
        local_batch = [tensor[PROCESS_INDEX::NUM_PROCESSES] for tensor in batch]
        fraction = len(local_batch[0]) / len(batch[0])
        if fraction == 0:
            # There are fewer examples than processes. Compute any example with weight
            # 0, because every process must take part in the all-reduce.
            local_batch = [tensor[:1] for tensor in batch]
        losses = gradient(model, local_batch, archs, autocast, teacher)
        return all_reduce_gradients(model, losses, fraction)

    return shared_gradient


def all_reduce_gradients(model, losses, fraction):
    """Replace every .grad by its weighted sum over the processes.

    Return the weighted sums of the losses. fraction: the weight of this process, which
    is the share of the batch that it has computed.
    """
    losses = torch.stack(losses)
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    for tensor in gradients + [losses]:
        dist.all_reduce(tensor.mul_(fraction))
    return list(losses)


def any_signal():
    """Return the number of a signal that any process has received, or 0."""
    number = max(received_signals, default=0)
    if NUM_PROCESSES == 1:
        return number
    # All processes must stop after the same step, so they share the number.
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


# Process 0 or torchrun holds this store. All processes count their failures in it.
shared_store = None


def processes_from_environment():
    """Return WORLD_SIZE, RANK and LOCAL_RANK, which torchrun sets.

    These are the number of processes, the index of this process, and its index on this
    machine. Clusters export such variables, too. If WORLD_SIZE is 1, empty or not set,
    this is an ordinary single process, and the other variables are not read. Raises
    UserError if they are incomplete or malformed.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ.get(name, "") for name in names]
    size, index, local_index, address, port = values
    if size in ("", "1"):
        return 1, 0, 0
    # Launchers other than torchrun may leave LOCAL_RANK out.
    local_index = local_index or index
    numbers = (size, index, local_index, port)
    if not (all(re.fullmatch("[0-9]{1,9}", number) for number in numbers)
            and int(index) < int(size) and int(port) < 2**16 and address):
        given = " ".join(f"{name}={value}" for name, value in zip(names, values))
        raise UserError("the environment does not describe one of several processes "
                        f"({given}): start them with torchrun, or unset WORLD_SIZE "
                        "to train in a single process")
    return int(size), int(index), int(local_index)


def join_process_group():
    """Join the process group if the environment describes several processes.

    Afterwards only process 0 prints. The exception is an error, which the first process
    that fails prints.
    """
    global NUM_PROCESSES, PROCESS_INDEX, shared_store
    size, index, local_index = processes_from_environment()
    if size == 1:
        return
    # Import torch._dynamo before the group is made. If Adam imported it later, the module
    # would keep the group alive. If a thread of the group then still held a tensor when
    # Python ends, the process would abort.
    import torch._dynamo                                     # noqa: F401
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_index % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        shared_store, *_ = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=dist.PrefixStore("group", shared_store),
                                rank=index, world_size=size)
    except RuntimeError as error:
        raise UserError(f"process {index} of {size} cannot join the others: {error}") from None
    NUM_PROCESSES, PROCESS_INDEX = size, index
    if PROCESS_INDEX > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def leave_process_group():
    """Leave the process group, if this process has joined one."""
    global NUM_PROCESSES, PROCESS_INDEX
    if dist.is_initialized():
        dist.destroy_process_group()
    NUM_PROCESSES, PROCESS_INDEX = 1, 0


def print_error(error):
    """Print one line about an error, unless another process has failed before.

    Most errors happen in every process, but one line is enough.
    """
    if NUM_PROCESSES > 1:
        # Without torchrun, process 0 holds the store. If the store is gone, process 0 has
        # already printed its error.
        num_failed = 2
        with contextlib.suppress(RuntimeError):
            num_failed = shared_store.add("failed", 1)
        if num_failed > 1:
            return
        sys.stderr = sys.__stderr__
    print_progress(f"yoco.py: error: {error_line(error)}")


# ---- Faster, same results: one masked pass and CUDA graphs ---------------------------------------

def fastest_gradient(device):
    """Return the fastest function that computes what `weight_gradient` computes."""
    gradient = weight_gradient
    if device.type == "cuda":
        gradient = graphed_gradient()
    return share_among_processes(gradient)


def masked_gradient(model, batch, sizes, autocast, teacher=None):
    """Compute the same as `weight_gradient`, in one pass with fixed tensor shapes.

    The shapes do not depend on the architectures, so a GPU can record this pass as a
    CUDA graph. sizes: the architectures as `archs_to_tensor` gives them,
    [lambda, L, 2]. Return the losses on the labels, [lambda].
    """
    *inputs, labels = batch
    targets = teacher_targets(teacher, inputs, autocast)
    with autocast():
        logits = forward_many(model, *inputs, sizes).float()   # [lambda, B, num_labels]
    label_losses = torch.stack([task_loss(arch_logits, labels)
                                for arch_logits in logits])
    total_losses = label_losses
    if teacher:
        # Compare with Python numbers. A graph that is being recorded cannot take a new
        # tensor from the host.
        config = model.config
        has_all_heads = sizes[..., 0] == config.num_attention_heads      # [lambda, L]
        has_full_ffn = sizes[..., 1] == config.intermediate_size         # [lambda, L]
        is_largest = (has_all_heads & has_full_ffn).all(1)               # [lambda]
        teacher_losses = torch.stack([task_loss(arch_logits, targets)
                                      for arch_logits in logits])
        mean_losses = (label_losses + teacher_losses) / 2
        total_losses = torch.where(is_largest, label_losses, mean_losses)
    total_losses.mean().backward()
    return label_losses.detach()


def graphed_gradient():
    """Return a function like `weight_gradient` that replays CUDA graphs.

    Launching the kernels of `masked_gradient` takes longer than a GPU needs to compute
    them. We record one graph for every shape of a batch, and replay it when that shape
    comes again.
    """
    # The key of a graph is the shape of the batch, the number of architectures, and
    # whether there is a teacher. The value is what `record` returns.
    graphs = {}

    def record(model, batch, sizes, autocast, teacher):
        """Record a graph, and return its inputs, the graph, its losses and gradients."""
        static_inputs = [tensor.clone() for tensor in (*batch, sizes)]
        *static_batch, static_sizes = static_inputs

        def compute():
            model.zero_grad()
            return masked_gradient(model, static_batch, static_sizes, autocast, teacher)

        graph, losses = capture_graph(compute)
        return static_inputs, graph, losses, [w.grad for w in model.parameters()]

    def gradient(model, batch, archs, autocast, teacher=None):
        """Leave the gradient in every .grad, and return the losses."""
        # If all samples are the same architecture, compute it only once.
        all_equal = len(set(archs)) == 1
        archs_to_compute = archs[:1] if all_equal else archs
        sizes = archs_to_tensor(model.config, archs_to_compute, batch[0].device)
        key = batch[0].shape, len(sizes), teacher is not None
        if key not in graphs:
            graphs[key] = record(model, batch, sizes, autocast, teacher)
        static_inputs, graph, losses, gradients = graphs[key]
        for static_input, tensor in zip(static_inputs, (*batch, sizes)):
            static_input.copy_(tensor)
        graph.replay()
        for w, w_gradient in zip(model.parameters(), gradients):
            w.grad = w_gradient
        # Reset the gradients of unused layers to None, as in `weight_gradient`. Adam
        # then skips these layers.
        used = {i for arch in archs for i, *_ in model.config.layers(arch)}
        for i, layer in enumerate(model.layers):
            if i not in used:
                layer.zero_grad()
        if all_equal:
            return list(losses) * len(archs)
        return list(losses)

    return gradient


# ---- The command line ----------------------------------------------------------------------------

def setting(default, text, low=None, high=2**32):
    """Return a dataclass field that describes one setting of a command.

    text: the --help text. low, high: the legal range of a number.
    """
    metadata = dict(help=text, low=low, high=high)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    """The settings that every command has."""
    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "The device to compute on. auto takes the fastest one.")
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "The number format of the computation. bf16 is faster and less exact, and "
                "the weights stay in fp32. auto takes bf16 if the hardware has units for "
                "it, otherwise fp32.")


@dataclasses.dataclass
class RunSettings(Settings):
    """The settings that train and search share."""
    overwrite: bool = setting(False, "Replace an earlier run in --out.")
    resume: bool = setting(
        False, "Continue an interrupted run. With --out, every other setting comes from "
               "the run's log.")
    archs_per_step: int = setting(
        2, "The number of sub-BERTs that are sampled and compared in one step (lambda). "
           "With 1 nothing is compared, and the distribution over sub-BERTs never "
           "changes.", 1)
    # A step longer than 1000 would push theta to its bounds, and rounding errors would
    # move the sum of theta away from 1.
    delta: float = setting(
        1.0, "How far one comparison moves the distribution over sub-BERTs (delta).",
        0, 1000)
    seed: int = setting(0, "The seed of all random numbers.", 0)


# The docstrings of the next three classes are also the --help texts of their commands.

@dataclasses.dataclass
class TrainSettings(RunSettings):
    """Fine-tune a BERT, so that smaller BERTs can be cut out of it (a super-BERT).

    With the small BERT MiniLM, --recipe best trains on 600 short texts in six minutes on
    two slow CPU cores. BERT-base is much slower on a CPU, and takes 58 s for all of MRPC
    on an H100 GPU. The time is printed after the first steps.
    """
    data: str = setting("glue/TOY", "The directory with train.tsv and dev.tsv.")
    metric: str = setting(
        None, "The metric that search maximises. A sum such as accuracy+f1 means the "
              "mean. accuracy is for labels. f1 and matthews are for two labels, and f1 "
              "is that of the second label in sorted order. pearson and spearman are for "
              "scores. Default: the metric of the task.")
    bert: str = setting(
        "", "The directory of the BERT to start from. Default: the data directory if it "
            "has a config.json, otherwise bert-base-uncased.")
    out: str = setting(
        "", "The directory to write. Default: superbert/<name of the data directory>.")
    recipe: Literal["paper", "best"] = setting(
        "paper", "How to train. paper follows the paper. best gave better sub-BERTs in our "
                 "experiments, and means --stages all --reorder --distill --keep-layers "
                 "even.")
    strategy: Literal["ee", "exploit", "explore", "noise"] = setting(
        "ee", "How a step samples sub-BERTs. exploit: always from the learned distribution "
              "(P_theta). explore: always uniformly (pi), and nothing is learned about "
              "them. ee: a coin decides between the two, and exploiting has the probability "
              "K. noise: like ee, but the losses are shuffled, as a control.")
    stages: Literal["progressive", "all", "largest"] = setting(
        None, "When smaller BERTs are trained, too. progressive: the full BERT first, then "
              "smaller ones step by step. all: the full BERT for half of the epochs, then "
              "all sizes. largest: never, which is plain fine-tuning, also of a sub-BERT. "
              "Default: progressive, or all with --recipe best.")
    reorder: bool = setting(
        None, "Move the important heads and neurons to the front after the first stage, so "
              "that sub-BERTs keep them. Default: only with --recipe best.")
    distill: bool = setting(
        None, "Let the smaller BERTs also learn from the answers of the full BERT, as it is "
              "after the first stage. Default: only with --recipe best.")
    keep_layers: Literal["first", "even"] = setting(
        None, "The layers that a sub-BERT keeps: the first ones, or evenly spaced ones up "
              "to the last. Default: first, or even with --recipe best.")
    epochs: float = setting(
        0.0, "How often to go through the training data, over all stages together. "
             "Default: the authors' number for a GLUE task.", 0)
    lr: float = setting(
        0.0, "The learning rate at the start of each stage. Default: the paper's for a "
             "large BERT (BERT-base), and 1e-4 for a small BERT (MiniLM).", 0)
    # CHOICE: 32, because the paper does not print the batch size.
    # AUTHORS: 8.
    batch_size: int = setting(
        32, "The number of examples per step, over all processes together.", 1)
    max_length: int = setting(
        128, "The number of tokens at which longer texts are cut.", 8)
    holdout: float = setting(
        0.1, "The share of train.tsv that is not trained on, so that search can choose on "
             "it.", 0, 0.9)
    checkpoint_every: int = setting(
        500, "The number of steps between two checkpoints, from which --resume continues.", 1)


@dataclasses.dataclass
class SearchSettings(RunSettings):
    """Find the best sub-BERT for a budget, and write it as a model that needs nothing else.

    Most of the time goes into evaluating sub-BERTs on the hold-out set. On two CPU cores,
    1000 evaluations of MiniLM on 408 examples take 391 s, and BERT-base takes longer. The
    time is printed after the first evaluation.
    """
    model: str = setting(
        "", "The super-BERT's directory. Default: the one in superbert/ that was "
            "finished last.")
    data: str = setting(
        None, "The directory of the super-BERT's data, if it has moved since the training.")
    out: str = setting(
        "", "The directory to write. With several budgets, each gets a directory in it. "
            "Default: subbert/<name>-<budget>.")
    max_params: list = setting(
        None, "One or more budgets in parameters of embeddings, encoder and pooler: "
              "60000000, 60e6, 60M, or 0.5x or 50% for half of the full model.")
    max_flops: list = setting(
        None, "One or more budgets in FLOPs, the arithmetic of encoder and pooler for 128 "
              "tokens: 10e9, 10G, 0.5x or 50%.")
    max_latency: list = setting(
        None, "One or more budgets in milliseconds for one sequence of 128 tokens on "
              "this machine: 12, 12ms, 0.5x or 50%.")
    evaluations: int = setting(
        1000, "The number of sub-BERTs to try per budget. Fewer are faster.", 1)
    select_on: Literal["holdout", "dev"] = setting(
        "holdout", "The data that selects the winner. dev follows the paper, but makes "
                   "the reported dev score optimistic.")


@dataclasses.dataclass
class EvalSettings(Settings):
    """Evaluate a trained model on a dev set.

    Of a super-BERT, evaluate the largest, the most likely and the smallest
    architecture.
    """
    model: str = setting("", "The directory that train or search wrote.")
    data: str = setting(
        "", "The directory with dev.tsv. Default: the one that the model was trained on.")


COMMANDS = {"train": (TrainSettings, train), "search": (SearchSettings, search),
            "eval": (EvalSettings, evaluate)}
RENAMED_FLAGS = {"--depth-keeps": "--keep-layers"}
# Flags of other commands and libraries, each with the flags that the user may have meant.
OTHER_NAMES = {
    "--bert": ["--model"],
    "--model": ["--bert"],
    "--model-name": ["--bert", "--model"],
    "--model-name-or-path": ["--bert", "--model"],
    "--learning-rate": ["--lr"],
    "--num-epochs": ["--epochs"],
    "--num-train-epochs": ["--epochs"],
    "--train-batch-size": ["--batch-size"],
    "--per-device-train-batch-size": ["--batch-size"],
    "--max-seq-length": ["--max-length"],
    "--max-len": ["--max-length"],
    "--data-dir": ["--data"],
    "--dataset": ["--data"],
    "--task": ["--data"],
    "--task-name": ["--data"],
    "--output": ["--out"],
    "--output-dir": ["--out"],
    "--save-steps": ["--checkpoint-every"],
    "--fp16": ["--precision"],
    "--bf16": ["--precision"],
}
# --help lists these settings first, in this order, and the other ones under "research".
USUAL_SETTINGS = ("model", "data", "bert", "recipe", "metric", "epochs", "lr", "max_params",
                  "max_flops", "max_latency", "evaluations", "out", "resume", "overwrite")
# These are started with python -m glue.NAME.
GLUE_PROGRAMS = ("bench", "download", "export", "paper", "plot", "predict", "toy")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message):
        """Raise UserError instead of printing the usage."""
        raise UserError(message + " (see --help)")


def flag_of(name):
    """Return the flag of a setting: --keep-layers for keep_layers."""
    return "--" + name.replace("_", "-")


def as_typed(name, value):
    """Return a setting as a user types it: --seed 5, --distill or --no-distill."""
    flag = flag_of(name)
    if value is None:
        return f"no {flag}"
    if value is True:
        return flag
    if value is False:
        return "--no-" + flag.removeprefix("--")
    if isinstance(value, list):
        value = " ".join(value)
    return f"{flag} {value}"


def add_flag(parser, field):
    """Add the flag of one field of the settings to a parser."""
    options = dict(type=field.type)
    if field.type is bool:
        options = dict(action=argparse.BooleanOptionalAction)
    elif field.type is list:
        options = dict(nargs="+")
    elif get_args(field.type):
        options = dict(choices=get_args(field.type))
    text = field.metadata["help"]
    if field.default:
        text += f" Default: {field.default}."
    # argparse formats the text with the % operator, so every % must be doubled.
    text = text.replace("%", "%%")
    parser.add_argument(flag_of(field.name), help=text, default=field.default, **options)


def make_parser():
    """Return the parser of the command line."""
    parser = Parser("yoco.py", description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (settings_class, _) in COMMANDS.items():
        description = settings_class.__doc__
        command = commands.add_parser(name, help=description.split("\n")[0],
                                      description=description, allow_abbrev=False)
        fields = {field.name: field for field in dataclasses.fields(settings_class)}
        usual = command.add_argument_group("usual")
        research = command.add_argument_group("research")
        for field_name in USUAL_SETTINGS:
            if field_name in fields:
                add_flag(usual, fields.pop(field_name))
        for field in fields.values():
            add_flag(research, field)
    return parser


def parse(argv):
    """Return the settings on the command line, and the function of the command.

    With --resume and --out, a setting that is not typed comes from the log in --out.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in GLUE_PROGRAMS:
        raise UserError(f"{argv[0]} is another program: type python -m glue.{argv[0]}")
    parser = make_parser()
    options = parse_words(parser, argv)
    if options.get("resume") and options["out"]:
        logged_words = words_from_log(options, argv)
        try:
            # If a flag is in both, the typed one counts, because it comes last.
            options = parse_words(parser, [argv[0], *logged_words, *argv[1:]])
        except UserError as error:
            raise UserError(f"the log in {options['out']} is damaged: {error}") from None
    settings_class, function = COMMANDS[options.pop("command")]
    return settings_class(**options), function


def parse_words(parser, words):
    """Return the options in the words of a command line, as a dict.

    Raises UserError if a flag is unknown, or if a number is out of its range.
    """
    options, unknown = parser.parse_known_args(words)
    options = vars(options)
    fields = dataclasses.fields(COMMANDS[options["command"]][0])
    if unknown:
        refuse_unknown_flags(parser, unknown, [flag_of(field.name) for field in fields])
    for field in fields:
        value = options[field.name]
        low, high = field.metadata["low"], field.metadata["high"]
        if low is not None and not low <= value <= high:
            parser.error(f"{flag_of(field.name)} {value}: it must be at least {low} and at "
                         f"most {high}")
    return options


def words_from_log(options, argv):
    """Return the settings that a run has logged in --out, as words of the command line.

    A typed budget replaces the logged ones. Without a log, return no words. A training
    without a log must name --data. Raises UserError if it does not, because after a
    mistyped --out it would train on TOY.
    """
    command, out = options["command"], options["out"]
    path, logged = logged_settings(command, out)
    if logged is None:
        is_data_typed = any(word.partition("=")[0] == "--data" for word in argv)
        if command == "train" and not is_data_typed:
            raise UserError(f"{out} holds no run to continue: name another --out, or "
                            "start a training with --data")
        return []
    if ("stages" in logged) != (command == "train"):
        raise UserError(f"{path} is not the log of a {command}: choose another --out")
    is_budget_typed = any(options.get(f"max_{kind}") for kind in UNITS)
    words = []
    for field in dataclasses.fields(COMMANDS[command][0]):
        value, flag = logged.get(field.name), flag_of(field.name)
        with user_errors_for(path):
            if not is_text(str(value)):
                raise ValueError(f"{field.name} is {value!r:.50}")
        if isinstance(value, bool):
            words.append(as_typed(field.name, value))
        elif isinstance(value, list):
            words += [] if is_budget_typed else [flag, *map(str, value)]
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


def logged_settings(command, out):
    """Return the path of the log in `out` and the settings in its header, or (None, None).

    A search with several budgets has no log in `out`. Each budget then has a log in a
    subdirectory, and the headers of these logs list all budgets.
    """
    paths = [Path(out, "log.jsonl")]
    if command == "search":
        paths += sorted(Path(out).glob("*/log.jsonl"))
    for path in paths:
        header = (read_log(path.parent) or [{}])[0]
        with user_errors_for(path):
            settings = {**header.get("settings", {})}
            if settings and path == paths[0]:
                return path, settings
            budgets, name = header.get("budgets", []), path.parent.name
            if len(budgets) > 1 and {name, name.rpartition("-")[0]} & set(budgets):
                return path, {name: budgets if isinstance(value, list) else value
                              for name, value in settings.items()}
    return None, None


def refuse_unknown_flags(parser, unknown, flags):
    """Raise UserError with the unknown flags and the flag that may be meant."""
    first = unknown[0].partition("=")[0]
    if first in RENAMED_FLAGS:
        parser.error(f"{first} is called {RENAMED_FLAGS[first]} now")
    name = flag_of(first.lower().lstrip("-"))
    similar = [flag for flag in OTHER_NAMES.get(name, []) if flag in flags]
    if not similar and first.startswith("-"):
        similar = difflib.get_close_matches(name, flags, 1)
    hint = f". Did you mean {similar[0]}?" if similar else ""
    parser.error(f"unknown: {' '.join(unknown)}{hint}")


def parse_and_join(argv):
    """Parse the command line, and let `train` join the other processes, if there are any.

    Other commands refuse to run in several processes of torchrun, because every process
    would do the same work and write the same files. Without torchrun, they ignore the
    variables that a cluster exports.
    """
    is_torchrun = dist.is_torchelastic_launched()
    try:
        settings, function = parse(argv)
    except UserError:
        # Join, so that only one process of torchrun prints the error.
        if is_torchrun:
            join_process_group()
        raise
    if function is train or is_torchrun:
        join_process_group()
    if function is not train and NUM_PROCESSES > 1:
        raise UserError("only train can use several processes: "
                        "start this without torchrun")
    return settings, function


def on_signal(number, _):
    """Remember a Ctrl-C or SIGTERM. `train` and `search` stop after the current step."""
    received_signals.append(number)
    print_progress("\nstopping after this step")
    # A single process stops at once if the same signal comes again. A process of torchrun
    # does not, because torchrun passes a Ctrl-C on, and it may arrive twice.
    if NUM_PROCESSES == 1:
        signal.signal(number, signal.default_int_handler)


def main(argv=None):
    """Run one command, and return the exit status.

    The status is 0 if the command succeeds, 2 after an error, 130 after Ctrl-C, and 143
    after SIGTERM. If the same signal comes twice, the status is 130.
    """
    open_closed_streams()
    # Escape a character that the terminal cannot show, as stderr does by default.
    # stdout is None if it was closed.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    received_signals.clear()
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        settings, function = parse_and_join(argv)
        for number, handler in handlers.items():
            # A signal that is ignored already stays ignored, for example in a job that
            # a shell script has started in the background.
            if function is not evaluate and handler != signal.SIG_IGN:
                signal.signal(number, on_signal)
        function(settings)
    except KeyboardInterrupt as stop:
        hint, signal_number = "", signal.SIGINT
        if stop.args:
            # `train` or `search` has stopped after a step, and its work is saved.
            hint = ": run the same command with --resume to continue"
            if settings.out and NUM_PROCESSES == 1:
                # Less to type: the log knows the other settings.
                name = "train" if function is train else "search"
                out = f'"{settings.out}"' if " " in settings.out else settings.out
                hint = f": to continue, run python yoco.py {name} --resume --out {out}"
            signal_number = stop.args[0]
        print_progress(f"\nstopped{hint}")
        return 128 + signal_number
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if NUM_PROCESSES > 1:
            # torchrun sends SIGTERM to the other processes as soon as one has failed.
            # This process has failed, too, so ignore the signal and end with status 2.
            handlers[signal.SIGTERM] = signal.SIG_IGN
        print_error(error)
        return 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        leave_process_group()
    return 0


def error_line(error):
    """Return one line about an error that the user can mend.

    Any other error is raised again.
    """
    text = str(error)
    is_memory_error = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if isinstance(error, OSError):
        text = error.strerror or text
        if error.filename:
            text = f"{error.filename}: {text}"
    elif is_memory_error or "allocate memory" in text:
        text = "out of memory: a training needs less with a smaller --batch-size"
    elif not isinstance(error, UserError):
        raise error
    return " ".join(text.split())[:1000]


if __name__ == "__main__":
    sys.exit(main())
