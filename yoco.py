"""YOCO-BERT: compress BERT once, deploy it everywhere (Zhang et al., arXiv 2106.02435).

One elastic BERT, the super-BERT, is trained per task; every smaller BERT inside it, a sub-BERT,
then works as it is, and a search finds the best one under a budget: parameters, FLOPs, latency.

    python yoco.py train  --data glue/MRPC             -> superbert/MRPC      (no --data: glue/TOY)
    python yoco.py search --max-params 60000000        -> subbert/MRPC-60000000
    python yoco.py eval|predict|export --model subbert/MRPC-60000000

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
m `arch`, or its category indices `choices`; Omega `budget`; T `cost`. `# DIFFERS`, `# CHOICE` and
`# AUTHORS` mark a departure from the paper, a choice where it is silent, and what the authors' code
does instead; README.md lists them.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError

import data
from model import (BertConfig, ElasticBert, LatencyTable, OneArch, SearchSpace, UserError,
                   arithmetic, count_flops, count_params, export_bert, extract, hardware, latency,
                   load_bert, peak_memory, read_json, reorder, save_bert, write_file, write_json)

try:
    import fcntl
except ImportError:                                                  # Windows: no lock there
    fcntl = None


# --------------------------------------------------------------------------------------------------
# The distribution P_theta and its natural gradient (Sec. 3.3)
# --------------------------------------------------------------------------------------------------

class Categorical:
    """P_theta(m): independent categorical variables; theta[v][c] is the probability of category c.

    A closed category has theta = 0 and an open one never does, so theta alone tells which is which.
    A sample is a list with one category index per variable, or None where the variable is inactive.
    """

    def __init__(self, sizes):
        self.theta = [np.full(size, 1 / size) for size in sizes]     # all open, uniform
        self.n = sum(size > 1 for size in sizes)                     # for theta_min

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

    def tolist(self):
        """theta as lists, for JSON."""
        return [theta.tolist() for theta in self.theta]

    def load(self, lists):
        """The inverse of `tolist`; ValueError unless these are distributions of the same sizes."""
        theta = [np.array(t, np.float64) for t in lists]
        if [t.shape for t in theta] != [t.shape for t in self.theta] or not all(
                np.isfinite(t).all() and (t >= 0).all() and abs(t.sum() - 1) < 1e-9 for t in theta):
            raise ValueError
        self.theta = theta

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
            stay, new = mask & (theta > 0), mask / mask.sum()
            if stay.any():
                new[stay] = theta[stay] / theta[stay].sum() * stay.sum() / mask.sum()
            theta[:] = new

    def step(self, samples, losses, delta=1.0):
        """One update of theta: a step of Fisher length `delta` along the natural gradient. Nothing
        moves where all losses tie or all samples are the same."""
        # DIFFERS from Eq. 5: ranks stand for losses, so that theta does not depend on their scale.
        gradient = natural_gradient(self.theta, samples, ranking_utility(losses))        # Eq. 5
        norm = fisher_norm(self.theta, gradient)
        if norm > 1e-8:
            for theta, g in zip(self.theta, gradient):
                if g.any():                                          # inactive: stays put
                    is_open = theta > 0
                    theta[is_open] = lift((theta + delta / norm * g)[is_open], self.n)


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


def lift(theta, n):
    """Raise one variable's open categories [K] to theta_min = 1 / (n (K - 1)), at most 1 / 2K.

    n: the variables with a choice. What this adds is taken from each in proportion to what it has
    above theta_min, so that the sum is 1 again and none falls below theta_min (which clipping and
    dividing would not ensure).
    """
    K = len(theta)
    theta_min = 1 / max(n * (K - 1), 2 * K)
    theta = np.maximum(theta, theta_min)
    return theta - (theta.sum() - 1) * (theta - theta_min) / (theta.sum() - K * theta_min)


def ranking_utility(losses):
    """Losses -> utilities: +1/mu for the best mu = ceil(lambda / 4), -1/mu for the worst mu, 0
    between; equal losses share their mean.

    >>> ranking_utility([0.3, 0.1, 0.2, 0.2])
    array([-1.,  1.,  0.,  0.])
    """
    mu = math.ceil(len(losses) / 4)
    by_rank, signs = np.zeros(len(losses)), np.empty(len(losses))
    by_rank[:mu] += 1
    by_rank[-mu:] -= 1
    signs[np.argsort(losses, kind="stable")] = by_rank
    # AUTHORS: see ties between positive values only, and in search the values are negated.
    _, group = np.unique(losses, return_inverse=True)
    return (np.bincount(group, signs) / np.bincount(group))[group] / mu


def exploit_probability(P):
    """K = rho / rho_max over the open space, 1 where nothing is open (Eq. 6)."""
    rho_max = P.uniform().entropy()
    return P.entropy() / rho_max if rho_max > 0 else 1.0                                 # Eq. 6


def exploit_floor(P):
    """The K that theta_min still leaves when every variable of P has collapsed."""
    collapsed = P.uniform()
    for theta in collapsed.theta:
        theta[theta > 0] = lift(np.eye((theta > 0).sum())[0], P.n)
    return exploit_probability(collapsed)


# --------------------------------------------------------------------------------------------------
# Progressive expanding of the training space (Sec. 3.2)
# --------------------------------------------------------------------------------------------------

EPOCHS = {  # heads | FFN | depth: the epochs of every stage that opens one more choice
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
LEARNING_RATES = {"MNLI": 1e-5, "QNLI": 1e-5, "TOY": 1e-3, "default": 2e-5}


@dataclasses.dataclass
class Stage:
    """A stretch of steps with one open space: the open choices of each kind, largest first."""
    name: str
    depths: tuple
    heads: tuple
    ffn_sizes: tuple
    first: int                                                       # its first step t
    steps: int

    def masks(self, space):
        """The open categories of each variable, as `Categorical.open` wants them."""
        layer = [k in self.ffn_sizes and h in self.heads
                 for k in space.ffn_sizes for h in space.heads]
        return [np.isin(space.depths, self.depths)] + [np.array(layer)] * space.depths[-1]


def make_stages(space, task, steps_per_epoch, scale=1.0):
    """The largest alone, then one more choice at a time: of heads, of FFN sizes, of depths."""
    h_epochs, k_epochs, d_epochs = EPOCHS.get(task, EPOCHS["default"])
    d, h, k = space.depths[::-1], space.heads[::-1], space.ffn_sizes[::-1]
    # AUTHORS: no stage for the largest alone. CHOICE: as many epochs as the last stage.
    table = [("largest", 1, 1, 1, d_epochs[-1])]
    table += [("heads", 1, n, 1, e) for n, e in zip(range(2, len(h) + 1), h_epochs)]
    table += [("FFN", 1, len(h), n, e) for n, e in zip(range(2, len(k) + 1), k_epochs)]
    table += [("depth", n, len(h), len(k), e) for n, e in zip(range(2, len(d) + 1), d_epochs)]
    stages, first = [], 0
    for name, n_d, n_h, n_k, epochs in table:
        steps = max(1, round(epochs * scale * steps_per_epoch))
        stages.append(Stage(name, d[:n_d], h[:n_h], k[:n_k], first, steps))
        first += steps
    return stages


# --------------------------------------------------------------------------------------------------
# train: Algorithm 1
# --------------------------------------------------------------------------------------------------

def setting(default, text, low=None, high=2**32, choices=None, nargs=None):
    """A field of a command's settings: its default (None: it must be given), --help text and legal
    values. nargs: "?", given without a flag; "+", several values, kept as a string with spaces."""
    return dataclasses.field(default=default, metadata=dict(
        help=text, low=low, high=high, choices=choices, nargs=nargs))


@dataclasses.dataclass
class Arithmetic:
    """Settings of every command but export: where and how to compute."""
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "bf16: autocast over fp32 weights; auto: bf16 where the "
                                     "hardware has it, else fp32", choices=("auto", "fp32", "bf16"))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), *map(field.metadata.get, ("low", "high"))
            if low is not None and not low <= value <= high:
                raise UserError(f"--{field.name.replace('_', '-')} {value}: it must be at least "
                                f"{low} and at most {high}")


@dataclasses.dataclass
class TrainSettings(Arithmetic):
    """Train a super-BERT on a data directory."""
    data: str = setting("glue/TOY", "directory with train.tsv and dev.tsv")
    bert: str = setting("", "directory of the pretrained BERT; without it the data directory where "
                            "that has a config.json, else bert-base-uncased")
    out: str = setting("", "directory to write; without it superbert/<name of the data directory>")
    overwrite: bool = setting(False, "replace what --out holds")
    resume: bool = setting(False, "continue an interrupted run from its last checkpoint")
    strategy: str = setting("ee", "ee: the controller decides; exploit: always P_theta; explore: "
                                  "always pi, theta fixed", choices=("ee", "exploit", "explore"))
    stages: str = setting("progressive", "progressive: open the space step by step; all: the whole "
                                         "space from the start, as many steps; largest: the first "
                                         "stage alone, which is plain fine-tuning",
                          choices=("progressive", "all", "largest"))
    depth_keeps: str = setting("first", "the layers of a smaller depth: the first ones (paper), or "
                                        "evenly spaced ones and always the last",
                               choices=("first", "even"))
    distill: bool = setting(False, "learn from the labels and from the largest sub-BERT's logits")
    freeze_teacher: bool = setting(False, "with --distill: those of the largest as it was when "
                                          "smaller sub-BERTs opened")
    reorder: bool = setting(False, "before smaller sub-BERTs open, sort heads and neurons, the "
                                   "most important first")
    shuffle: bool = setting(False, "a control: permute the losses of a step before they rank")
    epochs: float = setting(1.0, "scale of the table of epochs per stage", low=1e-6)
    lr: float = setting(0.0, "learning rate at the start of each stage; 0: the paper's", low=0)
    # CHOICE: 32; the paper prints none.  AUTHORS: 8
    batch_size: int = setting(32, "examples per step, of all ranks together", low=1)
    max_length: int = setting(128, "tokens per example; the rest is cut off", low=8)
    archs_per_step: int = setting(2, "lambda: architectures sampled per step", low=1)
    delta: float = setting(1.0, "length of a step of theta in the Fisher norm", low=0)
    controller_interval: int = setting(0, "steps between updates of K; 0: 20 an epoch", low=0)
    holdout: float = setting(0.1, "share of train held out for selection", low=0, high=0.9)
    checkpoint_every: int = setting(500, "steps between checkpoints", low=1)
    seed: int = setting(0, "seed of everything random", low=0)


def train(settings):
    """Train a super-BERT. Returns what its run.json says. On the right: the lines of Algorithm 1;
    everything about files, logging and resuming is in `Training`."""
    run = Training(settings)
    model, space, P, rng = run.model, run.space, run.P, run.rng                          # 1
    for t in range(run.t, run.steps):                                                    # 2
        stage = next(s for s in reversed(run.stages) if s.first <= t)
        if t == stage.first:
            P.open(stage.masks(space))                                                   # 11
            run.optimizer = new_optimizer(model)
            if stage is run.first_elastic:
                run.prepare()
        if t == stage.first or t % run.interval == 0:                                    # 3
            run.K = {"ee": exploit_probability(P), "exploit": 1.0,                       # 4
                     "explore": 0.0}[settings.strategy]                                  # 5
        batch = run.batch(stage, t - stage.first)                                        # 6
        source = P if rng.random() < run.K else P.uniform()                              # 7
        archs = [space.arch(source.sample(rng)) for _ in range(settings.archs_per_step)]   # 8
        losses = weight_gradient(model, batch, archs, run.autocast, run.teacher)         # 9
        losses = average(run, losses)                                # over ranks, where several
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        *losses, norm = torch.stack([*losses, norm]).tolist()        # waits for the device, once
        if not np.isfinite([*losses, norm]).all():                   # before it can spoil W
            raise UserError(f"diverged: the loss is {losses}, the norm of its gradient {norm} at "
                            f"step {t + 1}, stage {stage.name}, learning rate {run.lr:g}, "
                            f"architectures {'; '.join(map(str, archs))}")
        for group in run.optimizer.param_groups:                     # linear to 0 in every stage
            group["lr"] = run.lr * (1 - (t - stage.first) / stage.steps)
        run.optimizer.step()                                                             # 10
        if settings.strategy != "explore":
            ranked = rng.permutation(losses) if settings.shuffle else losses
            P.step([space.choices(arch) for arch in archs], ranked, settings.delta)      # 10
        run.after_step(t + 1, stage, losses)
    return run.finish()


def weight_gradient(model, batch, archs, autocast, teacher=None):
    """Leave in every .grad the mean over `archs` of the gradient of the loss on one batch (Eq. 5,
    first line); return the losses, one tensor () per architecture. With a `teacher`, the model
    itself or a copy, all but the largest also learn from the logits of its largest; the losses
    returned are those of the labels."""
    # AUTHORS: the losses that are ranked come from two batches, so the batch decides which is best.
    # CHOICE: gradients start as None, so that a layer which no architecture has rests; and an
    # architecture drawn twice is computed once and weighs double.
    model.zero_grad()
    *inputs, labels = batch
    loss = {}
    largest = model.config.arch
    if teacher and set(archs) != {largest}:
        with torch.no_grad(), autocast():
            wanted = teacher.eval()(*inputs).float()                 # without dropout
        wanted = wanted.softmax(1) if wanted.shape[1] > 1 else wanted
        model.train()
    for arch, count in Counter(archs).items():
        with autocast():
            logits = model(*inputs, arch).float()                    # [B, num_labels]
        loss[arch] = total = task_loss(logits, labels)
        if teacher and arch != largest:
            # CHOICE: as much weight for the teacher as for the labels, temperature 1.
            total = (total + task_loss(logits, wanted)) / 2
        (total * count / len(archs)).backward()                                          # Eq. 5
    return [loss[arch].detach() for arch in archs]


def task_loss(logits, wanted):
    """Cross-entropy of logits [B, num_labels] with labels [B] or probabilities [B, num_labels]; of
    a single logit, [B, 1], the mean squared distance from numbers, [B] or [B, 1]."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], wanted.flatten())
    return F.cross_entropy(logits, wanted)


def new_optimizer(model):
    """Adam without weight decay (Sec. 4), a new one in every stage."""
    # CHOICE: inside a layer that is used, Adam's momentum also moves the slices that are not.
    return torch.optim.Adam(model.parameters(), lr=0.0, eps=1e-8, fused=True)


IMPORTANCE_BATCHES = 32     # of train, over which --reorder sums the importance


class Training:
    """What `train` works on: the data, the model, P, and the files that carry them over a crash."""

    def __init__(self, settings):
        self.settings = settings
        settings.out = settings.out or f"superbert/{Path(settings.data).resolve().name}"
        own = Path(settings.data, "config.json").exists()
        self.bert = settings.bert or (settings.data if own else "bert-base-uncased")
        self.output = Output(settings, settings.data, self.bert)
        self.device, self.autocast = arithmetic(settings.device, settings.precision)
        self.task = data.load_task(settings.data)
        torch.manual_seed(settings.seed)                             # the classifier, dropout
        self.model = self.initial_model().to(self.device).train()
        if rank() > 0:                                               # a dropout of its own
            torch.manual_seed(int(np.random.default_rng([settings.seed, rank()]).integers(2**63)))
        self.config = self.model.config
        self.space = (OneArch(self.config.arch) if settings.stages == "largest"
                      else SearchSpace.for_config(self.config))
        sha256 = fingerprint(settings.data)
        before = read_run(self.bert) if Path(self.bert, "run.json").exists() else {}
        # What --bert has learned from must not select: on the same train.tsv its hold-out stays.
        same = before.get("train_sha256") == sha256
        self.split = before["held_out"] if same else [settings.holdout, settings.seed]
        kept, self.held = data.split_holdout(self.task.train, *self.split)
        if not kept:
            raise UserError(f"--holdout {settings.holdout} leaves nothing to train on")
        self.max_length = min(settings.max_length, self.config.max_position_embeddings)
        self.encoded = data.encode(kept, self.bert, self.max_length)
        self.per_epoch = math.ceil(len(kept) / settings.batch_size)
        self.interval = settings.controller_interval or max(1, self.per_epoch // 20)
        self.stages = make_stages(self.space, self.task.name, self.per_epoch, settings.epochs)
        self.steps = self.stages[-1].first + self.stages[-1].steps
        if settings.stages == "all":                                 # in as many steps
            self.stages = [dataclasses.replace(self.stages[-1], first=0, steps=self.steps)]
        self.first_elastic = self.stages[:2][-1]                     # after the largest alone
        if self.space.size() == 1 and (settings.reorder or settings.distill):
            raise UserError("only one architecture is trained here: --reorder and --distill are "
                            "for those smaller than the largest")
        if settings.freeze_teacher and not settings.distill:
            raise UserError("--freeze-teacher needs --distill")
        if settings.freeze_teacher and settings.stages == "all" and not before:
            raise UserError("--freeze-teacher with --stages all freezes what training starts with: "
                            "fine-tune first (--stages largest), and name that with --bert")
        self.lr = settings.lr or LEARNING_RATES.get(self.task.name, LEARNING_RATES["default"])
        self.P, self.rng = Categorical(self.space.categories), np.random.default_rng(settings.seed)
        self.teacher = self.model if settings.distill else None
        self.nets = torch.nn.ModuleDict({"model": self.model})       # what a checkpoint holds
        self.optimizer, self.K, self.t, self.order = new_optimizer(self.model), 1.0, 0, None
        self.output.begin(self.restore, train_sha256=sha256)
        self.progress = Progress(self.t, self.steps)
        weights = sum(w.numel() for w in self.model.parameters())
        print(f"{self.task.name}: {len(kept)} examples to train on, {len(self.held)} held out; "
              f"{count_params(self.config, self.space.largest()):,} parameters, "
              f"{self.space.size():.1e} architectures; {self.steps} steps; a checkpoint takes "
              f"{(12 + 4 * settings.freeze_teacher) * weights / 1e6:,.1f} MB"
              + ("" if self.held else "; without a hold-out, search will need --select-on dev"))

    def initial_model(self):
        """The pretrained BERT; or one from random weights, where the data directory has a
        config.json of its own without weights."""
        name = Path(self.bert).name
        if name in ("bert-base-uncased", "all-MiniLM-L6-v2") and not Path(self.bert).exists():
            raise UserError(f"there is no directory {self.bert}; run: python -m glue.download "
                            f"{name} (or name another BERT with --bert)")
        if self.bert == self.settings.data and not Path(self.bert, "model.safetensors").exists():
            model = ElasticBert(BertConfig.load(self.bert), self.task.num_labels)
        else:
            model = load_bert(self.bert, self.task.num_labels)
        model.config.depth_keeps = self.settings.depth_keeps
        model.config.id2label = {str(i): name for i, name in enumerate(self.task.labels)} or None
        return model

    def batch(self, stage, step):
        """This rank's examples in the batch of a stage's step; `share` is their part of it. The
        order of an epoch follows from seed, stage and epoch: where in the data needs no state."""
        epoch, i = divmod(step, self.per_epoch)
        if self.order is None or i == 0:
            rng = np.random.default_rng([self.settings.seed, stage.first, epoch])
            self.order = data.batches(self.encoded, self.settings.batch_size, rng)
        indices = self.order[i]
        mine = indices[rank()::world_size()]                         # of all lengths
        self.share = len(mine) / len(indices)
        # Where a small batch leaves none, any example: its gradient counts 0, but is there.
        return data.collate(self.encoded, mine or indices[:1], self.device)

    def prepare(self):
        """What happens once, when the largest is no longer alone."""
        if self.settings.reorder:
            reorder(self.model, self.importance())
        if self.settings.freeze_teacher:
            self.nets["teacher"] = self.teacher = copy.deepcopy(self.model)

    def importance(self):
        """The importance of every head and neuron, for `reorder`: |sum of w dL/dw| over its output
        weights, of the largest, summed over batches (Molchanov et al. 2019)."""
        totals = [[0, 0] for _ in self.model.layers]                 # per layer: heads, neurons
        self.model.eval()                                            # no dropout
        for i in range(min(self.per_epoch, IMPORTANCE_BATCHES)):
            batch = self.batch(self.stages[0], i)
            average(self, weight_gradient(self.model, batch, [self.space.largest()], self.autocast))
            for layer, total in zip(self.model.layers, totals):
                outs = (layer.attention_out.weight, layer.D), (layer.ffn_out.weight, 1)
                for j, (w, size) in enumerate(outs):
                    part = (w * w.grad).detach().sum(0)              # per input column
                    total[j] = total[j] + part.view(-1, size).sum(1).abs()
        self.model.train()
        return totals

    def after_step(self, done, stage, losses):
        """Log and show every tenth step; save a checkpoint at its interval."""
        if done % 10 == 0 or done == self.steps:
            tops = [theta.max() for theta in self.P.theta if (theta > 0).sum() > 1] or [1.0]
            mode, floor = self.space.arch(self.P.most_likely()), exploit_floor(self.P)
            self.output.log(step=done, stage=stage.name, loss=np.mean(losses), K=self.K,
                            floor=floor, top_probability=np.mean(tops), ms=self.progress.ms(done),
                            most_likely_params=count_params(self.config, mode))
            number = f"{self.stages.index(stage) + 1}/{len(self.stages)}"
            self.progress.show(done, f"stage {number} ({stage.name})  loss {np.mean(losses):.3f}  "
                                     f"K {self.K:.2f} (floor {floor:.2f})")
        if (SIGNALS or done % self.settings.checkpoint_every == 0) and done < self.steps:
            self.save(done)

    def save(self, done):
        """One file with everything that the next step depends on; `restore` reads it back."""
        tensors = self.nets.state_dict()                             # model.*, teacher.*
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": moment for name, moment in moments.items()}
        own = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state()
        for i, states in enumerate(all_gather(own)):                 # rng, rng1, rng2, ...
            tensors |= {f"{name}{i or ''}": value for name, value in states.items()}
        self.output.save(tensors, t=done, K=self.K, rng=self.rng.bit_generator.state,
                         theta=self.P.tolist())

    def restore(self, tensors, state):
        """The inverse of `save`; ValueError where the state is none of this run."""
        if not (type(state["t"]) is int and 0 <= state["t"] < self.steps
                and type(state["K"]) is float and 0 <= state["K"] <= 1):
            raise ValueError
        self.t, self.K, self.rng.bit_generator.state = state["t"], state["K"], state["rng"]
        self.P.load(state["theta"])
        states = {name: tensors.pop(name) for name in list(tensors) if "rng" in name}
        torch.set_rng_state(states[f"rng{rank() or ''}"])
        if "cuda_rng" in states:
            torch.cuda.set_rng_state(states[f"cuda_rng{rank() or ''}"])
        moments = {}
        for name in [name for name in tensors if name.startswith("adam.")]:
            _, i, moment = name.split(".")
            moments.setdefault(int(i), {})[moment] = tensors.pop(name)
        if any(name.startswith("teacher.") for name in tensors):     # was frozen before
            self.nets["teacher"] = self.teacher = copy.deepcopy(self.model)
        self.nets.load_state_dict(tensors)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def finish(self):
        """Score the `landmarks` on the hold-out, and write the super-BERT: rank 0 does."""
        if rank() > 0:
            return None
        holdout = {}
        if self.held:
            held = [data.encode(self.held, self.bert, self.max_length)]
            score = data.scorer(self.model, held, self.task.metric, self.device, self.autocast)
            print("scores on the hold-out, weights as they are:")
            for name, arch in landmarks(self.space, self.P).items():
                holdout[name] = score(arch)
                print(f"  {name:12}{count_params(self.config, arch):>13,} parameters  "
                      f"{in_words(holdout[name])}")
        save_bert(self.model, self.output.directory, self.bert)
        if self.space.size() > 1:                                    # there is something to search
            write_json(self.output.directory / "theta.json", depths=self.space.depths,
                       heads=self.space.heads, ffn_sizes=self.space.ffn_sizes,
                       theta=self.P.tolist())
        return self.output.finish(self.device, self.autocast, task=self.task.name,
                                  metric=self.task.metric,
                                  data=self.settings.data, max_length=self.max_length, lr=self.lr,
                                  held_out=self.split, steps=self.steps, holdout=holdout)


# --------------------------------------------------------------------------------------------------
# search: the same distribution, moved by a reward (Sec. 3.4)
# --------------------------------------------------------------------------------------------------

def reward(score, cost, budget, full_cost, alpha=2):
    """ACC(m) where the sub-BERT fits; beyond the budget less and less, down to 0 at T(M) (Eq. 7).

    score: ACC(m) in %; cost: T(m); budget: Omega; full_cost: T(M); the last three in one unit.

    >>> reward(80, 50, 60, 100), reward(80, 80, 60, 100), reward(80, 100, 60, 100)
    (80, 20.0, 0.0)
    """
    # DIFFERS from Eq. 7: its printed factor is excess / largest excess: 0 at Omega, and growing.
    # AUTHORS: one minus that, as here, but on negative scores (Matthews) too, which it raises.
    if cost < budget or budget >= full_cost or score <= 0:
        return score
    return score * max(0.0, 1 - (cost - budget) / (full_cost - budget)) ** alpha         # Eq. 7


@dataclasses.dataclass
class SearchSettings(Arithmetic):
    """Find the best sub-BERT under a budget, and write it as a model of its own."""
    model: str = setting("", "super-BERT directory; without it the one in superbert/ finished last")
    out: str = setting("", "directory to write; without it subbert/<name>-<budget>")
    overwrite: bool = setting(False, "replace what --out holds")
    resume: bool = setting(False, "continue an interrupted search")
    max_params: str = setting("", "budget: parameters of embeddings, encoder and pooler, written "
                                  "as 60000000, 60e6, 60M or 0.5x (of the full model); of several, "
                                  "each is searched, with one memo of scores", nargs="+")
    max_flops: str = setting("", "budget: FLOPs of encoder and pooler at 128 tokens, likewise",
                             nargs="+")
    max_latency: str = setting("", "budget: milliseconds on this machine, likewise", nargs="+")
    latency_batch: int = setting(1, "sequences that are timed together", low=1)
    latency_length: int = setting(128, "their tokens", low=1)
    pareto: int = setting(0, "so many budgets, spread over the space, and the front of all that "
                             "was scored", low=0, high=1000)
    pareto_of: str = setting("params", "what those budgets bound", choices=("params", "flops",
                                                                            "latency"))
    evaluations: int = setting(1000, "architectures to ask for", low=1)
    archs_per_step: int = setting(2, "lambda: architectures sampled per step", low=1)
    delta: float = setting(1.0, "length of a step of theta in the Fisher norm", low=0)
    method: str = setting("sng", "sng: P_theta and its natural gradient; evolution: as HAT; "
                                 "random: uniform (the last two try only what fits the budget)",
                          choices=("sng", "evolution", "random"))
    select_on: str = setting("holdout", "the data that selects; dev, as in the paper, makes the "
                                        "dev score optimistic", choices=("holdout", "dev"))
    checkpoint_every: int = setting(50, "steps between checkpoints", low=1)
    seed: int = setting(0, "seed of the sampling", low=0)


def search(settings, memo=None, cost=None):
    """Move P_theta toward the highest reward with W fixed, and write the best sub-BERT that fits.
    Returns what its run.json says; of several budgets, a list. memo: {arch: score in %} of earlier
    searches of the same super-BERT on the same data; new scores are added. cost: T, where it is
    measured already."""
    memo = {} if memo is None else memo                              # arch -> ACC(m) in %
    kind, texts = wishes(settings)
    settings.model = settings.model or latest_superbert()
    if len(texts) != 1:
        return search_all(settings, kind, texts, memo)
    settings.out = settings.out or place(settings, kind, *texts)
    run = Searching(settings, memo, cost)
    space, P = run.space, run.P
    while not run.done():
        n = min(settings.archs_per_step, run.until - run.asked)
        archs = [run.propose() for _ in range(n)]
        memo.update(run.scores([m for m in dict.fromkeys(archs) if m not in memo]))
        full_cost = run.cost(space.largest())                        # T(M): a latency may be mended
        rewards = [reward(memo[m], run.cost(m), run.budget, full_cost) for m in archs]
        if settings.method == "sng":
            P.step([space.choices(m) for m in archs], [-r for r in rewards], settings.delta)
        run.after_step(archs)
    return run.finish(best_fit(memo, run.cost, run.budget))


def best_fit(memo, cost, budget):
    """The architecture of the highest score with T(m) < Omega (Eq. 2), or None."""
    fitting = [arch for arch in memo if cost(arch) < budget]
    # CHOICE: at a tie the cheaper one.
    return max(fitting, key=lambda arch: (memo[arch], -cost(arch)), default=None)        # Eq. 2


class Searching:
    """What `search` works on: the super-BERT, P, T(m), the data that selects, and its files."""

    def __init__(self, settings, memo, cost):
        self.settings, self.directory = settings, Path(settings.model)
        self.output = Output(settings, settings.model)
        self.device, self.autocast = arithmetic(settings.device, settings.precision)
        self.trained = read_run(self.directory)
        task, config = data.load_task(self.trained["data"]), BertConfig.load(self.directory)
        self.task, self.space = task, SearchSpace.for_config(config)
        self.P = load_theta(self.directory / "theta.json", self.space)
        sha256 = fingerprint(self.trained["data"])
        if self.trained.get("train_sha256") != sha256:
            raise UserError(f"{self.trained['data']}/train.tsv has changed since the training of "
                            f"{self.directory}: its hold-out is lost, so train again")
        self.model = data.load_trained(self.directory, task).to(self.device)
        kind, (wish,) = wishes(settings)
        self.cost = cost or measure(kind, settings, self.model, self.autocast)           # T(m)
        self.table = self.cost if isinstance(self.cost, LatencyTable) else None
        self.budget = parse_budget(wish, self.cost, self.space)
        _, held = data.split_holdout(task.train, *self.trained["held_out"])
        if settings.select_on == "holdout" and not held:
            raise UserError("the super-BERT was trained without a hold-out: use --select-on dev")
        self.score = self.scorer([held] if settings.select_on == "holdout" else task.devs)
        self.rng, self.memo, self.asked = np.random.default_rng(settings.seed), memo, 0
        self.known, self.until, self.measured = len(memo), settings.evaluations, None
        self.output.begin(self.restore, train_sha256=sha256, trained=self.trained["finished"])
        self.progress = Progress(self.asked, self.until)
        print(f"searching {self.directory} for T(m) < {self.budget:,.12g} {UNITS[kind]} "
              f"({self.budget / self.cost(self.space.largest()):.3f}x), selecting on "
              f"{settings.select_on}")

    def scorer(self, parts):
        """`data.scorer` over lists of examples."""
        parts = [data.encode(part, self.directory) for part in parts]
        return data.scorer(self.model, parts, self.task.metric, self.device, self.autocast)

    def scores(self, archs):
        """[(arch, ACC(m) in %)], with inherited weights. The ranks share them out; more ranks than
        --archs-per-step, 2 by default, stand idle."""
        found = all_gather([self.score(arch)["score"] for arch in archs[rank()::world_size()]])
        return [(arch, found[i % len(found)][i // len(found)]) for i, arch in enumerate(archs)]

    def propose(self):
        """One architecture to evaluate, by --method."""
        if self.settings.method == "sng":
            return self.space.arch(self.P.sample(self.rng))
        parents = self.parents() if self.settings.method == "evolution" else []
        pi = self.P.uniform()
        for _ in range(10_000):
            choices = pi.sample(self.rng)
            if parents:
                # Of two parents: half of the time a mutation, every choice drawn anew with p = 0.3,
                # else a crossover. Where a parent has no layer, what was drawn stays.
                one, two = (parents[i] for i in self.rng.integers(len(parents), size=2))
                share, other = (0.3, choices) if self.rng.random() < 0.5 else (0.5, two)
                child = [b if self.rng.random() < share else a for a, b in zip(one, other)]
                choices = [c if a is None else a for a, c in zip(child, choices)]
            if self.cost(arch := self.space.arch(choices)) < self.budget:
                return arch
        return self.space.smallest()

    def parents(self):
        """The 25 best of all complete generations, as choices; the first generation, 125 drawn at
        random, has no parents; later ones have 100 (Wang et al. 2020, HAT)."""
        # CHOICE: all three shrink in proportion where fewer than 1000 evaluations are asked for; a
        # generation counts distinct architectures.
        size = min(1, self.settings.evaluations / 1000)
        first, later, best = (max(1, round(n * size)) for n in (125, 100, 25))
        asked = list(self.memo)[self.known:]
        born = first + (len(asked) - first) // later * later
        past = asked[:born] if born >= first else []
        past = [m for m in past if self.cost(m) < self.budget]
        return [self.space.choices(m) for m in sorted(past, key=lambda m: -self.memo[m])[:best]]

    def after_step(self, archs):
        """Log, show, and save a checkpoint at its interval."""
        self.asked += len(archs)
        best = best_fit(self.memo, self.cost, self.budget)
        self.output.log(asked=self.asked, run=len(self.memo) - self.known,
                        best=self.memo.get(best),
                        scores=[[self.space.choices(m), self.memo[m]] for m in archs])
        step = self.asked // self.settings.archs_per_step
        if SIGNALS or step % self.settings.checkpoint_every == 0:
            timed = self.table and dict(table=self.table.ms, checked=self.table.checked,
                                        budget=self.budget)
            self.output.save({}, asked=self.asked, until=self.until, known=self.known,
                             latency=timed, rng=self.rng.bit_generator.state,
                             theta=self.P.tolist(),
                             memo=[[self.space.choices(m), s] for m, s in self.memo.items()])
        self.progress.show(self.asked, f"asked, {len(self.memo) - self.known} run  best score "
                                       f"{self.memo.get(best, math.nan):.2f}")

    def done(self):
        """Whether the search is over: all was asked for, and where the budget is a latency, the
        best was measured whole and keeps it. If it misses, T is scaled up, and the search goes on.
        """
        if self.asked < self.until:
            return False
        best = best_fit(self.memo, self.cost, self.budget)
        if best is None or not self.table:
            return True
        predicted, self.measured = self.cost(best), *on_rank_0(lambda: self.table.whole([best]))
        print(f"{best}: {predicted:.2f} ms predicted, {self.measured:.2f} ms measured")
        if self.measured >= self.budget:
            self.table.ms["scale"][0] *= self.measured / predicted
            self.until += max(self.settings.archs_per_step, self.settings.evaluations // 10)
            self.progress.total = self.until
        return self.measured < self.budget

    def restore(self, _, state):
        """The inverse of the save above; ValueError where the state is none of this run."""
        if not (type(state["asked"]) is type(state["until"]) is type(state["known"]) is int
                and 0 <= state["asked"] <= state["until"] and 0 <= state["known"]
                and all(type(score) is float for _, score in state["memo"])):
            raise ValueError
        self.asked, self.until, self.known, self.rng.bit_generator.state = (
            state["asked"], state["until"], state["known"], state["rng"])
        if self.table:                                               # as it was when it began
            timed = state["latency"]
            self.table.ms = {name: [float(ms) for ms in timed["table"][name]]
                             for name in self.table.ms}
            self.table.checked = timed["checked"]
            self.budget = float(timed["budget"])
        self.P.load(state["theta"])
        self.memo.update((self.space.arch(choices), score) for choices, score in state["memo"])

    def finish(self, arch):
        """Read dev once, for the architecture found, and write that as a model of its own: rank 0
        does."""
        if arch is None:
            print("no architecture under the budget was sampled; this is the smallest of the space")
            arch = self.space.smallest()
            if self.table:
                self.measured, = on_rank_0(lambda: self.table.whole([arch]))
                if self.measured >= self.budget:
                    raise UserError(f"no sub-BERT keeps {self.budget:.4g} ms: the smallest takes "
                                    f"{self.measured:.2f} ms")
            self.memo.update(self.scores([m for m in [arch] if m not in self.memo]))
            self.output.log(asked=self.asked, run=len(self.memo) - self.known, best=None,
                            scores=[[self.space.choices(arch), self.memo[arch]]])
        if rank() > 0:
            return None
        config, where = self.model.config, self.settings.select_on
        dev, facts = self.scorer(self.task.devs)(arch), {}
        if self.table:
            facts = dict(latency=dict(
                batch=self.table.B, length=self.table.T, predicted=self.table(arch),
                measured=self.measured, operations=self.table.operations, table=self.table.ms,
                **self.table.checked))
        print(f"found: {arch}\n  {costs_in_words(config, arch, self.space.largest())}\n"
              f"  score {self.memo[arch]:.2f} on {where}, which selects\n  dev: {in_words(dev)}"
              + ("  (optimistic: dev selected it)" if where == "dev" else "")
              + f"\n  evaluations: {self.asked} asked, {len(self.memo) - self.known} run")
        save_bert(extract(self.model, arch), self.output.directory, self.directory)
        return self.output.finish(
            self.device, self.autocast, task=self.task.name, metric=self.task.metric,
            data=self.trained["data"],
            superbert=str(self.directory), max_length=self.trained["max_length"],
            held_out=self.trained["held_out"],
            budget=self.budget, arch=arch._asdict(), params=count_params(config, arch),
            flops=count_flops(config, arch), selected_on=where, dev=dev,
            selection_score=self.memo[arch], evaluations_asked=self.asked,
            evaluations_run=len(self.memo) - self.known, **facts)


UNITS = {"params": "parameters", "flops": "FLOPs", "latency": "ms"}


def wishes(settings):
    """The kind of budget that is asked for, and the budgets as typed: none of --pareto, which
    computes them later."""
    given = [(kind, list(dict.fromkeys(getattr(settings, f"max_{kind}").split())))
             for kind in UNITS if getattr(settings, f"max_{kind}").strip()]
    if len(given) + bool(settings.pareto) != 1:
        raise UserError("name one kind of budget: --max-params, --max-flops, --max-latency or "
                        "--pareto")
    return given[0] if given else (settings.pareto_of, [])


def place(settings, kind, text):
    """The directory of the sub-BERT for one budget: in --out, where that is given."""
    name = Path(settings.model).resolve().name
    start = f"{settings.out}/" if settings.out else f"subbert/{name}-"
    return start + text + f"-{kind}" * (kind != "params")


def search_all(settings, kind, texts, memo):
    """One search per budget, from the same theta, with one memo and one T. Prints a table, and with
    --pareto writes and draws the front. Returns the list of what their run.json say."""
    device, autocast = arithmetic(settings.device, settings.precision)
    trained, model = read_run(settings.model), load_bert(settings.model).to(device)
    space, runs = SearchSpace.for_config(model.config), []
    load_theta(Path(settings.model) / "theta.json", space)           # refused before it is timed
    cost = measure(kind, settings, model, autocast)
    if settings.pareto:
        settings.out = settings.out or place(settings, kind, "pareto")
        texts = pareto_budgets(settings, cost, space)
    for text in texts:                                               # refuse all before the first
        parse_budget(text, cost, space)
    parts = [dataclasses.replace(settings, pareto=0, out=place(settings, kind, text),
                                 **{f"max_{kind}": text}) for text in texts]
    for part in parts:
        try:
            runs.append(search(part, memo, cost))
        except Finished as fact:                                     # with --resume
            print(fact)
            run, known = on_rank_0(lambda out=part.out: (read_run(out), scores_in(out, space)))
            if run.get("trained") != trained["finished"]:
                raise UserError(f"{part.out} was found in an earlier {settings.model}: begin anew "
                                "with --overwrite") from None
            runs.append(run)
            memo |= known
    if rank() > 0:
        return None
    alone = sum(len(scores_in(part.out, space)) for part in parts)
    print(f"\n{len(memo)} evaluations for {len(parts)} budgets ({alone} if each were searched "
          f"alone)\n{'T(m) <':>14}{'parameters':>14}{'FLOPs':>18}{'selection':>11}{'dev':>8}"
          "  directory")
    for run, part in zip(runs, parts):
        print(f"{run['budget']:>14,.6g}{run['params']:>14,}{run['flops']:>18,}"
              f"{run['selection_score']:>11.2f}{run['dev']['score']:>8.2f}  {part.out}")
    if settings.pareto:
        write_front(settings, memo, cost, runs)
    return runs


def pareto_budgets(settings, cost, space):
    """`--pareto N`: N budgets, evenly from a little above the smallest T(m) to above T(M). They are
    written down: measured again after --resume, latencies would be others."""
    path = Path(settings.out) / "budgets.json"

    def there():
        """The budgets of a run to resume, if there is one."""
        if path.exists() and not (settings.overwrite or settings.resume):
            raise UserError(f"{settings.out} holds a front: go on with --resume, replace it with "
                            "--overwrite, or choose another --out")
        texts = read_json(path).get("budgets") if settings.resume and path.exists() else None
        if texts is not None and not (
                isinstance(texts, list) and 0 < len(texts) <= settings.pareto and all(
                    isinstance(t, str) and re.fullmatch(r"[01]\.\d{4}x", t) for t in texts)):
            raise UserError(f"{path} is damaged: begin anew with --overwrite")
        return texts
    if texts := on_rank_0(there):
        return texts
    least = cost(space.smallest()) / cost(space.largest())
    shares = [least + (1 - least) * (i + 1) / settings.pareto for i in range(settings.pareto)]
    texts = list(dict.fromkeys(f"{share + 1e-4:.4f}x" for share in shares))
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, budgets=texts)
    return texts


def write_front(settings, memo, cost, runs):
    """Write and draw what no other architecture beats in both T(m) and score: front.json, on the
    terminal, and, where matplotlib is installed, front.svg."""
    out, kind = Path(settings.out), settings.pareto_of
    config = BertConfig.load(settings.model)
    front, best = [], -math.inf
    for arch in sorted(memo, key=lambda m: (cost(m), -memo[m])):
        if memo[arch] > best:
            best = memo[arch]
            front.append(dict(cost=cost(arch), score=best, params=count_params(config, arch),
                              flops=count_flops(config, arch), **arch._asdict()))
    write_json(out / "front.json", of=UNITS[kind], front=front, evaluations=len(memo), runs=[
        {name: run[name] for name in ("budget", "params", "flops", "selection_score", "dev")}
        for run in runs])
    print(text_plot([(cost(m), score) for m, score in memo.items()],
                    [(point["cost"], point["score"]) for point in front], UNITS[kind]))
    print(f"wrote {out}/front.json: {len(front)} of {len(memo)} architectures")
    with contextlib.suppress(ImportError):
        import matplotlib.figure
        axis = (figure := matplotlib.figure.Figure()).add_subplot()
        axis.plot([cost(m) for m in memo], list(memo.values()), ".", alpha=0.4)
        axis.step([p["cost"] for p in front], [p["score"] for p in front], "o-", where="post")
        axis.set(xlabel=UNITS[kind], ylabel="selection score in %")
        figure.savefig(out / "front.svg")


def text_plot(points, front, unit, width=70, height=16):
    """Points (x, y) as dots, those of the front as #, on a grid of characters."""
    xs, ys = zip(*points)
    grid = [[" "] * width for _ in range(height)]
    for marked, sign in ((points, "."), (front, "#")):
        for x, y in marked:
            column = (x - min(xs)) / (max(xs) - min(xs) or 1) * (width - 1)
            row = (max(ys) - y) / (max(ys) - min(ys) or 1) * (height - 1)
            grid[round(row)][round(column)] = sign
    ends = (f"{max(ys):7.2f} ", *[" " * 8] * (height - 2), f"{min(ys):7.2f} ")
    return "\n".join([end + "|" + "".join(row) for end, row in zip(ends, grid)]
                     + [" " * 8 + "+" + "-" * width,
                        f"{'':9}{min(xs):<{width // 2},.6g}{max(xs):>{width - width // 2},.6g}"
                        f"  {unit}"])


def scores_of(directory, space):
    """Per step of a search: (evaluations asked so far, {arch: score}), from its log."""
    path = Path(directory) / "log.jsonl"
    try:
        for record in map(json.loads, path.read_bytes().splitlines()):
            yield record["asked"], {space.arch(choices): float(score)
                                    for choices, score in record["scores"]}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: search again with --overwrite") from None


def scores_in(directory, space):
    """{arch: score} of all that a search asked for, from its log."""
    return {m: score for _, scores in scores_of(directory, space) for m, score in scores.items()}


def parse_budget(text, cost, space):
    """'60000000', '60e6', '60M' or '0.5x' (of T(M)) -> Omega, in the unit of `cost` = T; UserError
    where not even the smallest architecture of the space fits."""
    least, full = cost(space.smallest()), cost(space.largest())
    match = re.fullmatch(r"((?:\d+\.?\d*|\.\d+)(?:e\+?\d{1,2})?)([kmgbx]?)", text.strip().lower())
    unit = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "x": full}
    budget = float(match[1]) * unit[match[2]] if match else 0
    if budget <= 0:
        raise UserError(f"{text!r} is not a positive budget such as 60000000, 60e6, 60M or 0.5x")
    if least >= budget:
        raise UserError(f"no sub-BERT has T(m) < {budget:,.12g}: the smallest has {least:,.12g} "
                        f"({least / full:.3f}x)")
    return budget


def latest_superbert():
    """The directory in superbert/ whose training finished last."""
    runs = [(read_run(path.parent)["finished"], str(path.parent))
            for path in Path("superbert").glob("*/run.json")
            if path.with_name("theta.json").exists()]                # else nothing to search
    if not runs:
        raise UserError("there is no finished super-BERT in superbert/: run `python yoco.py train` "
                        "first, or name one with --model")
    print(f"using {max(runs)[1]}, the super-BERT finished last")
    return max(runs)[1]


def read_run(directory):
    """The run.json of a finished train or search; UserError where it lacks what others read."""
    path = Path(directory) / "run.json"
    run = read_json(path, "does not exist: no finished train or search")
    held_out = run.setdefault("held_out", [0, 0])                    # share, seed
    share, seed = held_out if type(held_out) is list and len(held_out) == 2 else ("", "")
    for name, valid in (
            ("data", isinstance(run.get("data"), str) and "\0" not in run["data"]),
            ("max_length", type(run.get("max_length")) is int and 3 <= run["max_length"] <= 10**6),
            ("held_out", type(share) in (int, float) and 0 <= share <= 0.9
             and type(seed) is int and 0 <= seed <= 2**32),
            ("finished", isinstance(run.get("finished"), str))):
        if not valid:
            raise UserError(f"{path} was not written by train or search: it has no valid {name}")
    return run


def fingerprint(directory):
    """The sha256 of a data directory's train.tsv: the hold-out is a part of exactly that file."""
    return hashlib.sha256((Path(directory) / "train.tsv").read_bytes()).hexdigest()


def load_theta(path, space):
    """P_theta from theta.json; UserError unless it is a distribution over `space`."""
    stored = read_json(path, "does not exist: no super-BERT, or of one architecture alone, "
                             "and nothing to search")
    P = Categorical(space.categories)
    try:
        found = [tuple(stored[name]) for name in ("depths", "heads", "ffn_sizes")]
        P.load(stored["theta"])
    except (LookupError, OverflowError, TypeError, ValueError):
        raise UserError(f"{path} holds no probability distribution over the search space") from None
    if found != [space.depths, space.heads, space.ffn_sizes]:
        raise UserError(f"{path} belongs to another search space than the model beside it")
    return P


# --------------------------------------------------------------------------------------------------
# eval
# --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class EvalSettings(Arithmetic):
    """Score a sub-BERT, or a super-BERT's largest, most likely and smallest, on a dev set."""
    model: str = setting(None, "directory that train or search wrote")
    data: str = setting("", "data directory; without it the one the model was trained on")


def evaluate(settings):
    """Print architecture, parameters, FLOPs, latency and dev metrics. Returns the metrics in %, of
    a super-BERT those of the largest."""
    device, autocast = arithmetic(settings.device, settings.precision)
    run = read_run(settings.model)
    task = data.load_task(settings.data or run["data"])
    model = data.load_trained(settings.model, task).to(device)
    config, archs = model.config, {"": model.config.arch}
    if (theta := Path(settings.model) / "theta.json").exists():
        space = SearchSpace.for_config(config)
        archs = landmarks(space, load_theta(theta, space))
    parts = [data.encode(part, settings.model) for part in task.devs]
    score = data.scorer(model, parts, task.metric, device, autocast)
    results, T = [], min(128, config.max_position_embeddings)
    for name, arch in archs.items():
        results.append(score(arch))
        ms, = latency([extract(model, arch)], 1, T, autocast)
        full = config.arch if name else None                         # a sub-BERT knows no full one
        print(f"{name and name + ': '}{arch}\n  {costs_in_words(config, arch, full)}\n"
              f"  latency {ms:.2f} ms: one sequence of {T} tokens, {hardware(device)}\n"
              f"  dev of {task.name}: {in_words(results[-1])}")
    return results[0]


def measure(kind, settings, model, autocast):
    """T: a function arch -> parameters, FLOPs, or milliseconds on this machine."""
    if kind == "latency":
        cost = LatencyTable(model, settings.latency_batch, settings.latency_length, autocast)

        def measured():                                              # on one rank, for all
            cost.measure()
            return cost.ms, *cost.check(seed=1)
        cost.ms, predicted, true = on_rank_0(measured)
        cost.checked = dict(spearman=data.spearman(true, predicted), worst_error=max(
            abs(p / t - 1) for p, t in zip(predicted, true)))
        print(f"latency of {cost.B} x {cost.T} tokens, predicted against measured whole, "
              f"{len(true)} architectures: rank correlation {cost.checked['spearman']:.3f}, worst "
              f"error {100 * cost.checked['worst_error']:.0f}%")
        return cost
    count = dict(params=count_params, flops=count_flops)[kind]
    return lambda arch: count(model.config, arch)


# --------------------------------------------------------------------------------------------------
# predict
# --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class PredictSettings(Arithmetic):
    """Print label and probabilities of texts: one per line, or two with a tab between them."""
    file: str = setting("-", "the texts; - is standard input", nargs="?")
    model: str = setting(None, "directory that train or search wrote")
    json: bool = setting(False, "a JSON object per line instead of columns")
    glue: str = setting("", "data directory with test.tsv: write GLUE's submission file instead")
    out: str = setting("submission", "directory of that file")
    overwrite: bool = setting(False, "replace that file")


def predict(settings):
    """Print a line per line of the file, at once where that is standard input; or `data.submit`."""
    device, autocast = arithmetic(settings.device, settings.precision)
    model = load_bert(settings.model).to(device)
    if settings.glue and settings.file != "-":
        raise UserError(f"--glue reads {settings.glue}/test.tsv, not {settings.file}: name one")
    if settings.glue:
        task = read_run(settings.model).get("task")
        if not isinstance(task, str) or not re.fullmatch(r"[\w.-]+", task):
            raise UserError(f"{settings.model}/run.json names no task")
        return data.submit(model, settings.model, task, settings.glue, settings.out,
                           settings.overwrite, autocast)
    interactive = settings.file == "-"
    with (contextlib.suppress(BrokenPipeError),                      # the reader has had enough
          sys.stdin.buffer if interactive else open(settings.file, "rb") as lines):
        texts = data.read_texts(lines, settings.file)
        for label, probabilities in data.predict(model, settings.model, texts, autocast,
                                                 1 if interactive else 32):
            shares = [f"{name} {share:.4f}" for name, share in probabilities.items()]
            columns = "\t".join([label if shares else f"{label:.4f}", *shares])
            record = json.dumps({"label": label, "probabilities": probabilities})
            print(record if settings.json else columns, flush=True)


# --------------------------------------------------------------------------------------------------
# export
# --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class ExportSettings:
    """Write a model as others load it, and check that it computes the same."""
    model: str = setting(None, "directory that search wrote, or train with --stages largest")
    format: str = setting("onnx", "onnx; hf: a Hugging Face directory of full width; torch: a "
                                  "torch.export file", choices=("onnx", "hf", "torch"))
    out: str = setting("", "directory to write; without it export/<name of the model>-<format>")
    overwrite: bool = setting(False, "replace what --out holds")


def export(settings):
    """Write the model and its tokenizer; print its size and the greatest difference of the logits
    on real text, computed by the other's loader. Returns that difference."""
    here = Path(settings.model)
    out = Path(settings.out or f"export/{here.resolve().name}-{settings.format}")
    if (here / "theta.json").exists():
        raise UserError(f"{here} is a super-BERT: search it, and export what is found")
    if out.resolve() == here.resolve():
        raise UserError(f"--out {out} is what the command reads: choose another")
    if out.exists() and any(out.iterdir()) and not settings.overwrite:
        raise UserError(f"{out} holds something: choose another --out, or replace it with "
                        "--overwrite")
    try:
        examples = data.load_task(read_run(here)["data"]).dev[:64]
    except UserError:                                                # the data is not here
        examples = [data.Example("one short sentence", None, 0), data.Example("yes", None, 0)]
    encoded = data.encode(examples, here)
    batches = [data.collate(encoded, indices)[:3]                    # of several shapes
               for indices in data.token_batches(encoded, 1000)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # the exporters', about names
        difference = export_bert(load_bert(here), out, settings.format, here, batches)
    sizes = [sum(path.stat().st_size for path in directory.iterdir() if path.name.endswith(
        (".safetensors", ".onnx", ".pt2"))) / 2**20 for directory in (out, here)]
    print(f"wrote {out}: {sizes[0]:.1f} MiB ({here}: {sizes[1]:.1f} MiB); its logits of "
          f"{len(examples)} texts differ by at most {difference:.1e}")
    return difference


# --------------------------------------------------------------------------------------------------
# Plumbing: words, files, progress
# --------------------------------------------------------------------------------------------------

def landmarks(space, P):
    """The architectures by which a super-BERT is judged; where it has but one, that one."""
    if space.size() == 1:
        return {"largest": space.largest()}
    return {"largest": space.largest(), "most likely": space.arch(P.most_likely()),
            "smallest": space.smallest()}


def in_words(result):
    """{metric: %} in one line."""
    return "  ".join(f"{name} {value:.2f}" for name, value in result.items())


def costs_in_words(config, arch, full=None):
    """Parameters and FLOPs in one line, with their shares of the architecture `full`."""
    def part(count):
        share = f" ({100 * count(config, arch) / count(config, full):.1f}%)" if full else ""
        return f"{count(config, arch):,}{share}"
    return (f"parameters {part(count_params)}, without the classifier; "
            f"FLOPs {part(count_flops)}, at 128 tokens")


def checksum(tensors, text):
    """The CRC-32 of a checkpoint's content, as a string: what the disk damaged is not resumed."""
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return str(crc)


class Finished(Exception):
    """--resume met a run with nothing left to do."""


class Output:
    """The directory that a command writes. run.json comes last: where it is, the run is finished.
    Where checkpoint.safetensors is, it can be resumed; that file is always replaced as a whole."""

    def __init__(self, settings, *inputs):
        self.settings, self.directory = settings, Path(settings.out)
        self.checkpoint = self.directory / "checkpoint.safetensors"
        self.started = time.perf_counter()
        for source in map(Path, inputs):
            if source.resolve() == self.directory.resolve():
                raise UserError(f"--out {self.directory} is what the command reads: choose another")
        on_rank_0(self.refuse)

    def refuse(self):
        """Raise UserError (or Finished) where the directory holds what must not be replaced."""
        settings, there = self.settings, lambda name: (self.directory / name).exists()
        finished, unfinished = there("run.json"), self.checkpoint.exists()
        foreign = (there("config.json") or there("model.safetensors")) and not there("log.jsonl")
        if settings.resume and settings.overwrite:
            raise UserError("--resume and --overwrite contradict each other")
        if settings.resume and finished:
            before = read_json(self.directory / "run.json").get("settings")
            if not isinstance(before, dict):
                raise UserError(f"{self.directory}/run.json is damaged: begin anew with "
                                "--overwrite")
            self.compare(before, self.kept_settings())
            self.checkpoint.unlink(missing_ok=True)                  # if killed before that
            raise Finished(f"{self.directory} is finished: nothing to resume")
        what = ("a finished result: choose another --out" if finished else
                "an unfinished run: go on with --resume" if unfinished else
                "another model: choose another --out" if foreign else "")
        if what and not (settings.overwrite or settings.resume and unfinished):
            raise UserError(f"{self.directory} holds {what}, or replace it with --overwrite")

    def begin(self, restore, **inputs):
        """Open the directory; hand (tensors, state) of a checkpoint to resume from to `restore`.
        `inputs` tell what the run works on; like the settings, they must not have changed."""
        self.inputs = inputs | {"world_size": world_size()}
        now = self.kept_settings() | self.inputs
        if not all(theirs == now for theirs in all_gather(now)):     # which also waits until all
            raise UserError("the ranks' settings or data differ")    # are ready
        if not on_rank_0(self.open):
            return
        try:
            tensors, state = on_rank_0(self.read)
            self.compare(state["run"], now)
            restore(tensors, state)
            if rank() == 0:
                end = self.log_file.seek(0, os.SEEK_END)
                self.log_file.truncate(min(state["log_bytes"], end))
            self.started -= state["seconds"]
        except UserError:
            raise
        except (SafetensorError, ArithmeticError, AttributeError, LookupError, RuntimeError,
                TypeError, ValueError):
            raise UserError(f"{self.checkpoint} is damaged: begin anew with --overwrite") from None

    def open(self):
        """Open, lock and clear the directory. Returns whether there is something to resume."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that a full disk is noticed here, not when Python exits.
        self.log_file = open(self.directory / "log.jsonl", "ab", buffering=0)
        try:
            if fcntl:                                                # free again when the run ends
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {self.directory}: wait for its end, or choose "
                            "another --out") from None
        except OSError as error:                                     # some network file systems
            tell(f"{self.directory}: no protection against a second run ({error.strerror})")
        self.refuse()                                                # again, now that it is ours
        for name in ("checkpoint.safetensors", "model.safetensors", "config.json", "vocab.txt",
                     "tokenizer_config.json", "theta.json", "run.json"):
            (self.directory / f".{name}.tmp").unlink(missing_ok=True)    # of a run that was killed
        resumed = self.settings.resume and self.checkpoint.exists()
        if not resumed:
            if self.settings.resume:
                print(f"{self.directory}: nothing to resume, starting afresh")
            for name in ("run.json", "theta.json", "checkpoint.safetensors"):
                (self.directory / name).unlink(missing_ok=True)
            self.log_file.truncate(0)
        return resumed

    def read(self):
        """(tensors, state) of the checkpoint; ValueError where the disk has damaged it."""
        with safetensors.safe_open(self.checkpoint, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            text, sealed = file.metadata()["state"], file.metadata()["crc32"]
        if sealed != checksum(tensors, text):
            raise ValueError
        return tensors, json.loads(text)

    def compare(self, before, now):
        """Raise UserError that names the first setting or input that is not as it was; a setting
        newer than the run had its default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self.settings)}
        before = {"world_size": 1} | defaults | before
        for name, value in now.items():
            if before.get(name) != value:
                raise UserError(f"{self.directory} was started with {name} = {before.get(name)!r}, "
                                f"not {value!r}")

    def kept_settings(self):
        """The settings that the result depends on."""
        return {name: value for name, value in dataclasses.asdict(self.settings).items()
                if name not in ("out", "overwrite", "resume")}

    def log(self, **record):
        """Append one line to log.jsonl, written at once."""
        if rank() > 0:
            return
        line = json.dumps(record).encode() + b"\n"
        while line:                                                  # a full disk takes a part,
            line = line[self.log_file.write(line):]                  # then none

    def save(self, tensors, **state):
        """Replace the checkpoint, all of it at once. The log that it belongs to is on the disk
        before it. If a signal asked the run to stop, this is where it does."""
        if rank() == 0:
            os.fsync(self.log_file.fileno())
            state |= dict(run=self.kept_settings() | self.inputs,
                          log_bytes=os.fstat(self.log_file.fileno()).st_size,
                          seconds=time.perf_counter() - self.started)
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            text = json.dumps(state)
            write_file(self.checkpoint, safetensors.torch.save(
                tensors, {"state": text, "crc32": checksum(tensors, text)}))
        if SIGNALS:
            on_rank_0(lambda: None)                                  # rank 0 has written it
            raise KeyboardInterrupt

    def finish(self, device, autocast, **facts):
        """Write run.json, which makes the result final, and drop the checkpoint."""
        with autocast():
            bf16 = torch.is_autocast_enabled(device.type)            # what "auto" has chosen
        seconds, memory = round(time.perf_counter() - self.started, 1), round(peak_memory(device))
        facts |= dict(**self.inputs, settings=self.kept_settings(), seconds=seconds,
                      peak_memory_mib=memory, hardware=hardware(device),
                      precision="bf16" if bf16 else "fp32", versions=dict(
                          python=platform.python_version(), torch=torch.__version__,
                          numpy=np.__version__, tokenizers=tokenizers.__version__),
                      finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        write_json(self.directory / "run.json", **facts)
        self.checkpoint.unlink(missing_ok=True)
        self.log_file.close()                                        # and frees the lock
        print(f"wrote {self.directory}; {seconds:.0f} s, {memory} MiB at the peak")
        return facts


def tell(text, **how):
    """Print to stderr, if anybody still reads it: a dead pipe must not cost a checkpoint."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True, **how)


class Progress:
    """Where the work stands: one updating line on a terminal, elsewhere a line every 30 seconds."""

    def __init__(self, done, total):
        self.first, self.total = done, total
        self.start = self.shown = time.perf_counter()

    def ms(self, done):
        """Milliseconds per step since this run, or its resumption, began."""
        return 1000 * (time.perf_counter() - self.start) / max(1, done - self.first)

    def show(self, done, text):
        """Say that `done` of the steps are done."""
        terminal, now = sys.stderr.isatty(), time.perf_counter()
        if terminal or done == self.total or now - self.shown > 30:
            self.shown, left = now, round((self.total - done) * self.ms(done) / 1000)
            line = f"{done}/{self.total}  {text}  {self.ms(done):.0f} ms/step"
            tell("\r\033[K" * terminal + line + f"  {left // 60}:{left % 60:02} left",
                 end="" if terminal and done < self.total else "\n")


# --------------------------------------------------------------------------------------------------
# Ranks: the processes that `torchrun --nproc_per_node=N yoco.py train` starts; else one, rank 0
# --------------------------------------------------------------------------------------------------

# Every rank holds all of the state (W, Adam's moments, theta, numpy's generator) and decides alike;
# shared out are only the examples of a batch and the evaluations of a search. Rank 0 alone writes,
# prints and knows what is in --out.
PATIENCE = datetime.timedelta(minutes=30)    # of ranks for each other: a long evaluation takes less
SIGNALS = []    # where any, train and search stop after the step at hand; the same on all ranks
HEARD = []      # those that reached this rank; the next all_gather makes them every rank's SIGNALS
STOPS = (signal.SIGINT, signal.SIGTERM)


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined():
    """Meet the other ranks, where the environment is torchrun's. Only rank 0 prints. Of
    ranks that fail, only the first says why: the others mostly fail because of it."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    cuda, stderr = torch.cuda.is_available(), sys.stderr
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    store, number, size = reach(lambda: next(dist.rendezvous("env://", timeout=PATIENCE)))
    reach(dist.init_process_group, "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
          rank=number, world_size=size, timeout=PATIENCE)
    if number > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield
        dist.destroy_process_group()
    except Exception:
        # Without torchrun the store ends with rank 0: then each rank that fails is heard.
        lasts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        alone = not lasts or store.add("failed", 1) == 1
        sys.stderr = stderr if alone else open(os.devnull, "w")
        raise


def reach(collective, *args, **kwargs):
    """Call a collective operation; UserError where another rank is gone."""
    try:
        return collective(*args, **kwargs)
    except (RuntimeError, ValueError) as error:                      # as gloo and torchrun raise
        text = re.sub(r"^\[\S*\] |\. .*", "", " ".join(str(error).split()))
        raise UserError("another rank has ended or cannot be reached; what was saved goes on with "
                        f"--resume ({text})") from None


def average(run, losses):
    """Replace every .grad by its mean over the global batch, of which each rank had `run.share`;
    return the losses' means. One all_reduce for everything, signals included."""
    # CHOICE: all ranks train the same architectures. Theta needs the losses of all on one batch;
    # and a layer that no architecture has is without gradient everywhere, so that no rank waits for
    # a part that another does not send. Tried: lambda of its own for each rank, ranked together. On
    # TOY a step took a fifth longer, and the scores were not told apart over three seeds.
    if world_size() == 1:
        return losses
    parts = [w.grad for w in run.model.parameters() if w.grad is not None] + [torch.stack(losses)]
    heard = parts[0].new_tensor([number in HEARD for number in STOPS])
    flat = torch.cat([*(run.share * part.flatten() for part in parts), heard])
    reach(dist.all_reduce, flat)                                     # the sum over ranks
    *means, heard = flat.split([part.numel() for part in parts] + [len(STOPS)])
    for part, mean in zip(parts, means):
        part.copy_(mean.view_as(part))
    SIGNALS[:] = [number for number, count in zip(STOPS, heard.tolist()) if count]
    return list(parts[-1])


def all_gather(value):
    """[rank 0's value, rank 1's, ...], on every rank."""
    if world_size() == 1:
        return [value]
    found = [None] * world_size()
    reach(dist.all_gather_object, found, (value, HEARD))
    SIGNALS[:] = [number for _, heard in found for number in heard]
    return [value for value, _ in found]


def on_rank_0(function):
    """Call `function` on rank 0 only; every rank returns its result, or raises its exception."""
    if world_size() == 1:
        return function()
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
    reach(dist.broadcast_object_list, box)
    if box[1]:
        raise box[1]
    return box[0]


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

COMMANDS = {"train": (TrainSettings, train), "search": (SearchSettings, search),
            "eval": (EvalSettings, evaluate), "predict": (PredictSettings, predict),
            "export": (ExportSettings, export)}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        """Raise instead of printing the usage."""
        raise UserError(message + " (see --help)")


def parse(argv):
    """Command-line words -> (settings, function): one flag for every field of the settings."""
    parser = Parser("yoco.py", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (kind, _) in COMMANDS.items():
        sub = commands.add_parser(name, help=kind.__doc__, description=kind.__doc__,
                                  allow_abbrev=False)
        for field in dataclasses.fields(kind):
            text, choices, nargs = map(field.metadata.get, ("help", "choices", "nargs"))
            form = dict(action="store_true") if field.type is bool else dict(
                type=field.type, default=field.default, choices=choices, nargs=nargs,
                metavar=None if choices or nargs == "?" else field.type.__name__.upper())
            if field.default is None:
                form["required"] = True
            shown = f" (default: {field.default})" if field.default else ""
            flag = field.name if nargs == "?" else "--" + field.name.replace("_", "-")
            sub.add_argument(flag, help=text + shown, **form)
    options, unknown = parser.parse_known_args(argv)
    options = vars(options)
    if unknown:
        known = " ".join("--" + field.name.replace("_", "-") for field in dataclasses.fields(
            COMMANDS[options["command"]][0]) if field.metadata["nargs"] != "?")
        parser.error(f"unknown: {' '.join(unknown)}; {options['command']} knows {known}")
    kind, function = COMMANDS[options.pop("command")]
    return kind(**{name: " ".join(value) if isinstance(value, list) else value
                   for name, value in options.items()}), function


@contextlib.contextmanager
def deferred_signals(defer):
    """Note the first Ctrl-C or SIGTERM in SIGNALS instead of stopping at once; the second, or
    without `defer` the first, is a KeyboardInterrupt."""
    def note(number, _):
        """Remember the signal; the second one stops at once."""
        if HEARD and world_size() > 1 and time.monotonic() < repeats[0]:
            return                            # torchrun passes on what the rank has heard itself
        repeats[0] = time.monotonic() + 5
        HEARD.append(number)
        if world_size() == 1:
            SIGNALS.append(number)
        if not defer or len(HEARD) > 1:
            raise KeyboardInterrupt
        tell("\nstopping after this step; once more stops at once")
    before, repeats = {}, [0.0]
    with contextlib.suppress(ValueError):                            # not in the main thread
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:           # as of a job in the background
                before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def way_on(argv, settings):
    """The command line that resumes `argv`, with the --model and --out chosen by default."""
    words = [word for word in argv if word not in ("--resume", "--overwrite")]
    given = {word.split("=")[0] for word in words}
    for name in ("model", "out"):
        if getattr(settings, name, "") and f"--{name}" not in given:
            words += [f"--{name}", getattr(settings, name)]
    n = world_size()
    start = ["torchrun", f"--nproc_per_node={n}"] if n > 1 else ["python"]
    return shlex.join([*start, "yoco.py", *words, "--resume"])


def main(argv=None):
    """Run one command; the exit status: 0; 2 after an error told in one line; 130 after Ctrl-C and
    143 after SIGTERM."""
    argv, settings, function = sys.argv[1:] if argv is None else argv, None, None
    try:
        with joined():
            settings, function = parse(argv)
            if world_size() > 1 and function not in (train, search):
                raise UserError("only train and search share their work: start without torchrun")
            with deferred_signals(function in (train, search)):
                function(settings)
    except Finished as fact:
        print(fact)
    except KeyboardInterrupt:
        out = getattr(settings, "out", "")
        several = SIGNALS and function is search and len(wishes(settings)[1]) != 1
        saved = several or out and Path(out, "checkpoint.safetensors").exists()
        tell("\nstopped" + (f"; go on with: {way_on(argv, settings)}" if saved else ""))
        return 128 + (SIGNALS or HEARD or [signal.SIGINT])[0]
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, OSError):
            text = (f"{error.filename}: " if error.filename else "") + (error.strerror or text)
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
            text = "out of memory" + ": try a smaller --batch-size" * (function is train)
        elif not isinstance(error, UserError):
            raise
        tell(f"yoco.py: error: {' '.join(text.split())[:1000]}")
        return 2
    finally:
        SIGNALS[:] = HEARD[:] = []
    return 0


if __name__ == "__main__":
    status = main()
    try:
        sys.stdout.flush()
    except OSError:                                                  # nobody reads: no second error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
