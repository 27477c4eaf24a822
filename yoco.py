"""YOCO-BERT: compress BERT once, deploy it everywhere (Zhang et al., NeurIPS 2021).

One elastic BERT, the super-BERT, is trained per task; every smaller BERT inside it, a sub-BERT, then
works as it is, and a search picks the best one that fits a budget.

    python yoco.py train  --data glue/MRPC             -> superbert/MRPC      (no --data: glue/TOY)
    python yoco.py search --max-params 60000000        -> subbert/MRPC-60000000
    python yoco.py eval   --model subbert/MRPC-60000000

Algorithm 1 (EE-SNG), line by line in `train`:

     1  initialise W, theta                         7  P_theta with probability K, else uniform pi
     2  for t = 1 ... t_max                         8  sample lambda architectures m from it
   3-5    every I steps: K <- rho / rho_max         9  loss L(w, m) of each on the batch
     6    take a batch                             10  W <- Adam, theta <- natural gradient
                                                   11  now and then: open more of the space

Where each equation lives; `# DIFFERS`, `# CHOICE` and `# AUTHORS` mark departures from the paper,
free choices, and where the authors' code does otherwise.

    Eq.       what                                    code                     test
    1, 3      W, theta minimise the expected loss     train                    test_train_search_eval
    2         best m with T(m) < Omega                search, best_fit         test_search_finds_optimum
    4         natural gradient of ln P: 1_m - theta   natural_gradient         test_natural_gradient_fisher
    5, 1st    mean gradient of W over lambda          train (backward)         test_weight_gradient_is_mean
    5, 2nd    mean natural gradient, its step         Categorical.step         test_expected_gradient
    6         K = rho / rho_max                       exploit_probability      test_controller
    7         reward                                  reward                   test_reward
    Alg. 1    EE-SNG                                  train                    test_stages_open_in_order

Symbols: theta P.theta, P_theta P, pi P.uniform(), K exploit_probability, rho P.entropy(), lambda
archs_per_step, delta delta, Omega budget, T cost, alpha alpha, m arch or its choices (`sample`).
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

import data
from model import (BertConfig, ElasticBert, SearchSpace, UserError, count_flops, count_params, extract,
                   load_bert, save_bert, write_file)


# ---------------------------------------------------------------------------------------------------
# The distribution P_theta and its natural gradient (Sec. 3.3)
# ---------------------------------------------------------------------------------------------------

class Categorical:
    """P_theta(m): independent categorical variables; theta[v][c] is the probability of category c.

    A closed category has theta = 0 and an open one never does, so theta alone tells which is which.
    A sample is a list with one category index per variable, or None where the variable is inactive.
    """

    def __init__(self, sizes):
        self.theta = [np.full(size, 1 / size) for size in sizes]   # all open, uniform
        self.n = sum(size > 1 for size in sizes)                   # of the whole space, for theta_min

    def uniform(self):
        """The exploration distribution pi: uniform over the open categories of each variable."""
        pi = Categorical([len(theta) for theta in self.theta])
        pi.theta = [(theta > 0) / (theta > 0).sum() for theta in self.theta]
        return pi

    def sample(self, rng):
        """One category per variable (also for layers that the sampled depth makes inactive)."""
        return [int(rng.choice(len(theta), p=theta)) for theta in self.theta]

    def most_likely(self):
        """The mode: the most probable category of each variable."""
        return [int(theta.argmax()) for theta in self.theta]

    def entropy(self):
        """rho, in nats: the sum over the variables, which are independent.
        # AUTHORS: the entropy of the mean of the layers' distributions, blind to layers that differ."""
        return float(-sum((t[t > 0] * np.log(t[t > 0])).sum() for t in self.theta))

    def open(self, masks):
        """Set the open categories (bool arrays). What enters gets the share of a uniform choice, what
        stays keeps its proportions, what closes gets 0.
        # AUTHORS: clip closed categories too, which drains them before they are ever sampled."""
        for theta, mask in zip(self.theta, masks):
            stay = mask & (theta > 0)
            kept = theta[stay] / theta[stay].sum() * stay.sum() if stay.any() else 0
            theta[:] = mask                                        # in units of 1/K_open
            theta[stay] = kept
            theta /= mask.sum()

    def step(self, samples, losses, delta=1.0):
        """One update of theta: a step of Fisher length `delta` down the natural gradient of the loss
        (Eq. 5, 2nd line), with ranks for losses, then every open theta is lifted to theta_min.
        Nothing moves where all losses tie or all samples are the same."""
        gradient = natural_gradient(self.theta, samples, ranking_utility(losses))
        norm = fisher_norm(self.theta, gradient)
        if norm < 1e-8:
            return
        for theta, g in zip(self.theta, gradient):
            if g.any():                                            # an inactive variable stays put
                theta += delta / norm * g
                lift(theta, self.n)


def lift(theta, n):
    """Raise one variable's open categories to theta_min = 1/(n (K-1)), at most 1/(2K), in place.

    The excess is taken from each in proportion to what it has above theta_min, so that the sum is 1
    again and none falls below (clip and divide would break that). n: variables with a choice.
    """
    is_open = theta != 0
    K = is_open.sum()
    theta_min = min(1 / (n * (K - 1)), 1 / (2 * K))
    t = np.maximum(theta[is_open], theta_min)
    theta[is_open] = t - (t.sum() - 1) * (t - theta_min) / (t.sum() - K * theta_min)


def natural_gradient(theta, samples, utilities):
    """(1/lambda) sum_i u_i (one_hot(m_i) - theta), per variable.                            Eq. 4, 5

    For expectation parameters the inverse Fisher matrix times the gradient of ln P_theta(m) is just
    one_hot(m) - theta: nothing is inverted. With utilities that sum to zero theta drops out where a
    variable is active in all samples: for lambda = 2 what is left is (best - worst) / 2 in one-hots.
    An inactive variable (None) adds nothing: given the depth the loss does not depend on it, so its
    term has mean zero, and the mean is what is used.   # AUTHORS: a random one-hot there, pure noise

    >>> natural_gradient([np.array([.5, .5])], [[0], [1]], [1, -1])
    [array([ 0.5, -0.5])]
    """
    gradient = [np.zeros_like(t) for t in theta]
    for sample, utility in zip(samples, utilities):
        for g, t, choice in zip(gradient, theta, sample):
            if choice is not None:
                g += utility * (np.eye(len(t))[choice] - t) / len(samples)
    return gradient


def fisher_norm(theta, gradient):
    """||g||, the length of a step in the Fisher metric of P_theta: the root of sum g^2 / theta.

    Over all K categories this equals g' F g for the K - 1 free ones.
    """
    return math.sqrt(sum((g[t > 0] ** 2 / t[t > 0]).sum() for t, g in zip(theta, gradient)))


def ranking_utility(losses):
    """Losses -> utilities: the best quarter (rounded up) +1/mu, the worst -1/mu, the others 0; ties
    share their mean.    # DIFFERS from Eq. 5: ranks, so that theta does not depend on the loss's scale

    >>> ranking_utility([0.3, 0.1, 0.2, 0.2])
    array([-1.,  1.,  0.,  0.])
    """
    mu = math.ceil(len(losses) / 4)
    by_rank = np.zeros(len(losses))
    by_rank[:mu] += 1
    by_rank[-mu:] -= 1
    signs = np.empty(len(losses))
    signs[np.argsort(losses, kind="stable")] = by_rank
    _, group = np.unique(losses, return_inverse=True)              # equal losses, whatever their sign
    return (np.bincount(group, signs) / np.bincount(group))[group] / mu


def exploit_probability(P):
    """K = rho / rho_max over the open space; 1 where nothing is open.                          Eq. 6"""
    rho_max = P.uniform().entropy()
    return P.entropy() / rho_max if rho_max > 0 else 1.0


def exploit_floor(P):
    """The smallest K that theta_min allows with P's open categories: every variable collapsed."""
    collapsed = P.uniform()
    for theta in collapsed.theta:
        if (theta > 0).sum() > 1:
            theta[theta > 0] = 1e-9                                # open, but with next to nothing
            theta[theta.argmax()] = 1
            lift(theta, P.n)
    return exploit_probability(collapsed)


# ---------------------------------------------------------------------------------------------------
# Progressive expanding of the training space (Sec. 3.2)
# ---------------------------------------------------------------------------------------------------

EPOCHS = {  # heads | FFN | depth: epochs of each stage that opens one more choice (authors' code)
    "CoLA": ((4, 4), (4, 4, 4), (4, 4, 4)),
    "MNLI": ((3, 1), (1, 1, 1), (1, 1, 1)),
    "MRPC": ((5, 3), (3, 3, 3), (3, 3, 3)),
    "QNLI": ((10, 5), (5, 5, 5), (1, 1, 1)),
    "QQP": ((1, 1), (1, 1, 1), (1, 1, 3)),
    "RTE": ((3, 1), (1, 1, 1), (1, 1, 2)),
    "SST-2": ((1, 1), (1, 1, 1), (1, 1, 1)),
    "default": ((3, 3), (3, 3, 3), (3, 3, 3)),
}
# AUTHORS: 1e-10 in QNLI's depth stages, which freezes W, and 1e-5 for SST-2; here the paper's rates.
LEARNING_RATES = {"MNLI": 1e-5, "QNLI": 1e-5, "TOY": 1e-3, "default": 2e-5}


@dataclasses.dataclass
class Stage:
    """A stretch of training with one open space: the choices of each kind, largest first."""
    name: str
    depths: tuple
    heads: tuple
    ffn_sizes: tuple
    epochs: float
    first: int = 0      # the step t at which it begins
    steps: int = 0

    def masks(self, space):
        """The open categories of every variable of `space`, as bool arrays."""
        layer = [k in self.ffn_sizes and h in self.heads for k in space.ffn_sizes for h in space.heads]
        return [np.isin(space.depths, self.depths)] + [np.array(layer)] * space.depths[-1]


def make_stages(space, task_name, steps_per_epoch, scale=1.0):
    """Largest only, then one more choice at a time: of heads, then of FFN sizes, then of depths.

    # DIFFERS from the authors' code, not the paper: the largest alone comes first, for as many epochs
    # as the last stage has.
    """
    epochs = EPOCHS.get(task_name, EPOCHS["default"])
    d, h, k = space.depths[::-1], space.heads[::-1], space.ffn_sizes[::-1]
    rows = [("largest", 1, 1, 1, epochs[2][-1])]
    rows += [("heads", 1, n, 1, e) for n, e in zip(range(2, len(h) + 1), epochs[0])]
    rows += [("FFN", 1, len(h), n, e) for n, e in zip(range(2, len(k) + 1), epochs[1])]
    rows += [("depth", n, len(h), len(k), e) for n, e in zip(range(2, len(d) + 1), epochs[2])]
    stages, first = [], 0
    for name, n_d, n_h, n_k, e in rows:
        steps = max(1, round(e * scale * steps_per_epoch))
        stages.append(Stage(name, d[:n_d], h[:n_h], k[:n_k], e * scale, first, steps))
        first += steps
    return stages


# ---------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------

def setting(default, text, low=None, high=None, choices=None):
    """A field of a command's settings, with its help text and what values it may have."""
    return dataclasses.field(default=default, metadata=dict(help=text, low=low, high=high,
                                                            choices=choices))


@dataclasses.dataclass
class TrainSettings:
    """Train a super-BERT: Algorithm 1 over progressively opened stages."""
    data: str = setting("glue/TOY", "directory with train.tsv and dev.tsv")
    bert: str = setting("", "directory of the pretrained BERT (default: the data directory if it has "
                            "a config.json, else bert-base-uncased)")
    out: str = setting("", "directory to write (default: superbert/<name of the data directory>)")
    overwrite: bool = setting(False, "replace what --out holds")
    resume: bool = setting(False, "continue an interrupted run from its last checkpoint")
    strategy: str = setting("ee", "ee: the controller decides; exploit: always P_theta; explore: "
                                  "always uniform, theta fixed", choices=("ee", "exploit", "explore"))
    stages: str = setting("progressive", "progressive: open the space step by step; largest: only the "
                          "first stage, which is plain fine-tuning", choices=("progressive", "largest"))
    epochs: float = setting(1.0, "scale of the authors' table of epochs per stage", low=1e-9)
    lr: float = setting(0.0, "peak learning rate of every stage (default: the paper's for the task)",
                        low=0)
    # CHOICE: 32 (the paper prints none).  # AUTHORS: 8
    batch_size: int = setting(32, "examples per step", low=1)
    max_length: int = setting(128, "tokens per example, the rest is cut off", low=8)
    archs_per_step: int = setting(2, "lambda: architectures sampled per step", low=1)
    delta: float = setting(1.0, "length of a step of theta in the Fisher norm", low=0)
    controller_interval: int = setting(0, "steps between updates of K (0: 5%% of an epoch)", low=0)
    holdout: float = setting(0.1, "share of train held out for selection", low=0, high=0.9)
    checkpoint_every: int = setting(500, "steps between checkpoints", low=1)
    log_every: int = setting(10, "steps between lines of log.jsonl", low=1)
    seed: int = setting(0, "seed of everything random", low=0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "bf16: autocast over fp32 weights; auto: bf16 where the hardware "
                                     "has it", choices=("auto", "fp32", "bf16"))


def train(settings):
    """Train a super-BERT (Alg. 1) and return what run.json says of it. The numbers on the right are
    the algorithm's lines; everything about files and resuming is in `Training`."""
    run = Training(settings)
    model, space, P, rng, lam = run.model, run.space, run.P, run.rng, settings.archs_per_step     # 1
    for t in range(run.t, run.stages[-1].first + run.stages[-1].steps):                           # 2
        stage = next(s for s in reversed(run.stages) if s.first <= t)
        if t == stage.first:
            P.open(stage.masks(space))                                                            # 11
            run.optimizer = new_optimizer(model)       # AUTHORS: a new one, and a new decay, per stage
        if t == stage.first or t % run.interval == 0:
            run.K = {"ee": exploit_probability(P), "exploit": 1.0, "explore": 0.0}[settings.strategy]  # 3-5
        *inputs, labels = run.batch(stage, t - stage.first)                                       # 6
        source = P if rng.random() < run.K else P.uniform()                                       # 7
        archs = [space.arch(source.sample(rng)) for _ in range(lam)]                              # 8

        loss = {}
        run.optimizer.zero_grad()     # CHOICE: to None, so that a layer that no architecture has rests
        for arch, count in Counter(archs).items():     # CHOICE: drawn twice = computed once, twice the weight
            with run.autocast():
                logits = model(*inputs, arch)
            loss[arch] = task_loss(logits.float(), labels)                                        # 9
            (loss[arch] * count / lam).backward()                               # Eq. 5, first line
        losses = torch.stack([loss[arch].detach() for arch in archs]).tolist()
        if not np.isfinite(losses).all():
            raise UserError(f"the loss is {losses} at step {t}, stage {stage.name}, learning rate "
                            f"{run.lr:g}, architectures {'; '.join(map(str, archs))}: lower --lr")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in run.optimizer.param_groups:
            group["lr"] = run.lr * (1 - (t - stage.first) / stage.steps)        # linear to 0
        run.optimizer.step()                                                                      # 10
        if settings.strategy != "explore":
            P.step([space.choices(arch) for arch in archs], losses, settings.delta)   # Eq. 5, second line
        run.after_step(t, stage, losses)
    return run.finish()


def new_optimizer(model):
    """Adam as in Sec. 4: no weight decay, eps 1e-8. The learning rate is set at every step.
    CHOICE: a slice that the sampled architectures leave out still moves by Adam's momentum."""
    return torch.optim.Adam(model.parameters(), lr=0.0, eps=1e-8, fused=True)


def task_loss(logits, labels):
    """Cross-entropy, or the squared error for regression. logits [B, num_labels], labels [B]."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)


class Training:
    """What `train` works on: the data, the model, P, and the files that carry them over a crash."""

    def __init__(self, settings):
        self.settings = settings
        settings.out = settings.out or f"superbert/{Path(settings.data).resolve().name}"
        self.output = Output(settings)
        self.device, self.autocast = arithmetic(settings)
        self.task = data.load_task(settings.data)
        own = (Path(settings.data) / "config.json").exists()
        self.bert = settings.bert or (settings.data if own else "bert-base-uncased")
        torch.manual_seed(settings.seed)               # classifier and dropout
        self.model = self.initial_model()
        self.space = SearchSpace.for_config(self.model.config)
        kept, self.held = data.split_holdout(self.task.train, settings.holdout, settings.seed)
        self.max_length = min(settings.max_length, self.model.config.max_position_embeddings)
        self.encoded = data.encode(kept, self.bert, self.max_length)
        per_epoch = -(-len(self.encoded) // settings.batch_size)
        self.stages = make_stages(self.space, self.task.name, per_epoch, settings.epochs)
        if settings.stages == "largest":
            self.stages = self.stages[:1]
        self.lr = settings.lr or LEARNING_RATES.get(self.task.name, LEARNING_RATES["default"])
        self.interval = settings.controller_interval or max(1, per_epoch // 20)
        self.P = Categorical(self.space.categories)
        self.rng = np.random.default_rng(settings.seed)
        self.K, self.t, self.passes, self.order = 1.0, 0, 0, None
        self.optimizer = new_optimizer(self.model)
        if state := self.output.begin():
            self.restore(*state)
        steps = self.stages[-1].first + self.stages[-1].steps
        self.progress = Progress(self.t, steps)
        print(f"{self.task.name}: {len(kept)} examples to train on, {len(self.held)} held out; "
              f"{count_params(self.model.config, self.space.largest()):,} parameters, "
              f"{self.space.size():.1e} architectures; {steps} steps")

    def initial_model(self):
        """The pretrained BERT, or one from random weights where the directory has a configuration only."""
        if not Path(self.bert, "config.json").exists() and self.bert == "bert-base-uncased":
            raise UserError("no directory bert-base-uncased; run: python -m glue.download "
                            "bert-base-uncased (or name another BERT with --bert)")
        if own_config := Path(self.bert, "model.safetensors").exists():
            model = load_bert(self.bert, self.task.num_labels)
        else:
            if self.bert != self.settings.data:
                raise UserError(f"{self.bert} has no model.safetensors")
            model = ElasticBert(BertConfig.load(self.bert), self.task.num_labels)
        if model.config.layer_heads:
            raise UserError(f"{self.bert} is a sub-BERT; a super-BERT starts from a full one")
        model.config.id2label = dict(zip(map(str, range(99999)), self.task.labels)) or None
        return model.to(self.device).train()

    def batch(self, stage, step):
        """The batch at a step of a stage. The order of an epoch follows from seed, stage and epoch, so
        it needs no state of its own."""
        per_epoch = -(-len(self.encoded) // self.settings.batch_size)
        epoch, i = divmod(step, per_epoch)
        if self.order is None or i == 0:
            rng = np.random.default_rng([self.settings.seed, stage.first, epoch])
            self.order = data.batches(self.encoded, self.settings.batch_size, rng)
        return data.collate(self.encoded, self.order[i], self.device)

    def after_step(self, t, stage, losses):
        """Log, show and save, each at its interval."""
        self.passes += len(losses)
        last = t + 1 == self.progress.total
        if (t + 1) % self.settings.log_every == 0 or last:
            modes = self.space.arch(self.P.most_likely())
            tops = [theta.max() for theta in self.P.theta if (theta > 0).sum() > 1]
            self.output.log(step=t + 1, stage=stage.name, loss=float(np.mean(losses)), K=self.K,
                            floor=exploit_floor(self.P), top=float(np.mean(tops or [1.0])),
                            mode_params=count_params(self.model.config, modes),
                            ms=self.progress.ms())
            self.progress.show(t + 1, f"{stage.name} {self.stages.index(stage) + 1}/"
                               f"{len(self.stages)}  loss {np.mean(losses):.3f}  K {self.K:.2f} "
                               f"(floor {exploit_floor(self.P):.2f})")
        if (t + 1) % self.settings.checkpoint_every == 0 and not last:
            self.save(t + 1)

    def save(self, t):
        """One file holds everything that the next step depends on."""
        tensors = {f"model.{name}": w for name, w in self.model.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": m for name, m in moments.items()}
        tensors["rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["cuda_rng"] = torch.cuda.get_rng_state()
        self.output.save(tensors, dict(t=t, K=self.K, passes=self.passes, rng=self.rng.bit_generator.state,
                                       theta=[theta.tolist() for theta in self.P.theta]))

    def restore(self, tensors, state):
        """The inverse of `save`."""
        self.t, self.K, self.passes = state["t"], state["K"], state["passes"]
        self.P.theta = [np.array(theta) for theta in state["theta"]]
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(tensors.pop("rng"))
        if "cuda_rng" in tensors:
            torch.cuda.set_rng_state(tensors.pop("cuda_rng"))
        self.model.load_state_dict({name.removeprefix("model."): w for name, w in tensors.items()
                                    if name.startswith("model.")})
        moments = {}
        for name, m in tensors.items():
            if name.startswith("adam."):
                _, i, kind = name.split(".")
                moments.setdefault(int(i), {})[kind] = m
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def finish(self):
        """Score three sub-BERTs on the hold-out and write the super-BERT."""
        archs = {"largest": self.space.largest(), "smallest": self.space.smallest(),
                 "most likely": self.space.arch(self.P.most_likely())}
        results = {}
        if self.held:
            score = scorer(self.model, [data.encode(self.held, self.bert, self.max_length)],
                           self.task.metric, self.device, self.autocast)
            print("hold-out scores of sub-BERTs, weights as they are:")
            for name in ("largest", "most likely", "smallest"):
                results[name] = score(archs[name])
                print(f"  {name:12}{count_params(self.model.config, archs[name]):>13,} parameters  "
                      f"{in_words(results[name])}")
        write_model(self.model, self.bert, self.output.directory)
        write_json(self.output.directory / "theta.json", dict(
            depths=self.space.depths, heads=self.space.heads, ffn_sizes=self.space.ffn_sizes,
            theta=[theta.tolist() for theta in self.P.theta]))
        return self.output.finish(task=self.task.name, metric=self.task.metric, lr=self.lr,
                                  steps=self.progress.total, passes=self.passes, holdout=results,
                                  device=str(self.device), max_length=self.max_length)


# ---------------------------------------------------------------------------------------------------
# search (Sec. 3.4)
# ---------------------------------------------------------------------------------------------------

def reward(score, cost, budget, full_cost, alpha=2):
    """ACC(m) where the sub-BERT fits, less the further it goes over the budget: 0 at T(M).     Eq. 7

    score: ACC(m) in %; cost: T(m); budget: Omega; full_cost: T(M), all in one unit.
    # DIFFERS from Eq. 7: as printed its factor grows with the excess and starts at 0. Here it is
    # (1 - excess / largest excess)^alpha, what the authors' code computes: 1 at Omega, 0 at T(M).
    # AUTHORS: the factor raises a negative score (Matthews); here it applies to positive ones only.

    >>> reward(80, 50, 60, 100), reward(80, 80, 60, 100), reward(80, 100, 60, 100)
    (80, 20.0, 0.0)
    """
    if cost < budget or budget >= full_cost or score <= 0:
        return score
    return score * max(0.0, 1 - (cost - budget) / (full_cost - budget)) ** alpha


@dataclasses.dataclass
class SearchSettings:
    """Find the best sub-BERT under a budget and write it as a model of its own."""
    model: str = setting("", "super-BERT directory (default: the one in superbert/ finished last)")
    out: str = setting("", "directory to write (default: subbert/<name>-<budget>)")
    overwrite: bool = setting(False, "replace what --out holds")
    resume: bool = setting(False, "continue an interrupted search")
    max_params: str = setting("", "budget: embeddings + encoder + pooler parameters, as 60000000, "
                                  "60e6, 60M or 0.5x (of the full model)")
    max_flops: str = setting("", "budget: FLOPs of encoder + pooler for 128 tokens, written likewise")
    evaluations: int = setting(1000, "architectures to ask for", low=1)
    archs_per_step: int = setting(2, "lambda: architectures sampled per step", low=1)
    delta: float = setting(1.0, "length of a step of theta in the Fisher norm", low=0)
    select_on: str = setting("holdout", "the data that selects; dev is the paper's protocol, and makes "
                                        "the dev score optimistic", choices=("holdout", "dev"))
    checkpoint_every: int = setting(50, "steps between checkpoints", low=1)
    seed: int = setting(0, "seed of the sampling", low=0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "as in train", choices=("auto", "fp32", "bf16"))


def search(settings):
    """Move P_theta toward the architecture with the highest reward, W fixed, and write the best that
    fits. Returns what run.json says of it."""
    run = Searching(settings)
    space, P, rng, memo = run.space, run.P, run.rng, run.memo
    while run.asked < settings.evaluations:
        n = min(settings.archs_per_step, settings.evaluations - run.asked)
        archs = [space.arch(P.sample(rng)) for _ in range(n)]
        for arch in archs:
            if arch not in memo:
                memo[arch] = run.score(arch)["score"]                  # inherited weights, no training
        rewards = [reward(memo[m], run.cost(m), run.budget, run.full_cost) for m in archs]     # Eq. 7
        P.step([space.choices(m) for m in archs], [-r for r in rewards], settings.delta)       # Eq. 5
        run.after_step(n)
    return run.finish(best_fit(memo, run.cost, run.budget))


def best_fit(memo, cost, budget):
    """The highest score with T(m) < Omega (Eq. 2), the cheaper at a tie; None where nothing fits."""
    fitting = [arch for arch in memo if cost(arch) < budget]
    return max(fitting, key=lambda arch: (memo[arch], -cost(arch)), default=None)


class Searching:
    """What `search` works on: the super-BERT, P, T(m), and the data that selects."""

    def __init__(self, settings):
        self.settings = settings
        self.device, self.autocast = arithmetic(settings)
        self.directory = Path(settings.model or latest_superbert())
        wish = settings.max_params or settings.max_flops + "-flops"
        settings.out = settings.out or f"subbert/{self.directory.resolve().name}-{wish}"
        self.output = Output(settings)
        self.trained = read_json(self.directory / "run.json", "is not a finished super-BERT: train first")
        train_settings = TrainSettings(**self.trained["settings"])
        self.task = data.load_task(train_settings.data)
        self.model = load_trained(self.directory, self.task).to(self.device)
        config = self.model.config
        self.space = SearchSpace.for_config(config)
        self.P = load_theta(self.directory / "theta.json", self.space)

        kind = "flops" if settings.max_flops else "params"
        count = {"flops": count_flops, "params": count_params}[kind]
        self.cost = lambda arch: count(config, arch)
        self.full_cost, least = self.cost(self.space.largest()), self.cost(self.space.smallest())
        self.budget = parse_budget(settings.max_params, settings.max_flops, self.full_cost)
        if least >= self.budget:
            raise UserError(f"no sub-BERT has fewer than {self.budget:,.0f} {kind}: the smallest has "
                            f"{least:,} ({least / self.full_cost:.3f}x), so ask for more than that")

        _, held = data.split_holdout(self.task.train, train_settings.holdout, train_settings.seed)
        if settings.select_on == "holdout" and not held:
            raise UserError("the super-BERT was trained without a hold-out: use --select-on dev")
        self.dev = [self.encode(part) for part in (self.task.dev, self.task.dev_mismatched) if part]
        selection = [self.encode(held)] if settings.select_on == "holdout" else self.dev
        self.score = self.scorer(selection)
        self.rng = np.random.default_rng(settings.seed)
        self.memo, self.asked = {}, 0
        if state := self.output.begin():
            self.restore(state[1])
        self.progress = Progress(self.asked, settings.evaluations)
        print(f"searching {self.directory} for T(m) < {self.budget:,.0f} {kind} "
              f"({self.budget / self.full_cost:.3f}x), selecting on {settings.select_on}")

    def encode(self, examples):
        return data.encode(examples, self.directory, self.trained["max_length"])

    def scorer(self, parts):
        return scorer(self.model, parts, self.task.metric, self.device, self.autocast)

    def after_step(self, n):
        """Log, show and save."""
        self.asked += n
        best = best_fit(self.memo, self.cost, self.budget)
        best_score = self.memo[best] if best else None
        self.output.log(asked=self.asked, run=len(self.memo), best=best_score)
        self.progress.show(self.asked, f"{len(self.memo)} run  best {best_score or math.nan:.2f}")
        if self.asked % (self.settings.checkpoint_every * n) == 0:
            self.output.save({}, dict(asked=self.asked, rng=self.rng.bit_generator.state,
                                      theta=[theta.tolist() for theta in self.P.theta],
                                      memo=[[self.space.choices(m), s] for m, s in self.memo.items()]))

    def restore(self, state):
        """The inverse of the save above."""
        self.asked, self.rng.bit_generator.state = state["asked"], state["rng"]
        self.P.theta = [np.array(theta) for theta in state["theta"]]
        self.memo.update((self.space.arch(choices), score) for choices, score in state["memo"])

    def finish(self, arch):
        """Read dev once, for the architecture found, and write it as a model that stands alone."""
        config, where = self.model.config, self.settings.select_on
        if arch is None:
            print("no architecture that fits was sampled: this is the smallest")
            arch = self.space.smallest()
            self.memo[arch] = self.score(arch)["score"]
        largest, dev = self.space.largest(), self.scorer(self.dev)(arch)
        write_model(extract(self.model, arch), self.directory, self.output.directory)
        result = self.output.finish(
            task=self.task.name, metric=self.task.metric, superbert=str(self.directory),
            data=self.trained["settings"]["data"], max_length=self.trained["max_length"],
            budget=self.budget, arch=arch._asdict(), params=count_params(config, arch),
            flops=count_flops(config, arch), selected_on=where, selection_score=self.memo[arch], dev=dev,
            evaluations_asked=self.asked, evaluations_run=len(self.memo))
        print(f"found: {arch}\n  {costs_in_words(config, arch, largest)}\n"
              f"  selected on {where}: score {self.memo[arch]:.2f}\n  dev: {in_words(dev)}"
              + ("  (optimistic: dev selected it)" if where == "dev" else "")
              + f"\n  {self.asked} evaluations asked, {len(self.memo)} run")
        return result


def parse_budget(max_params, max_flops, full):
    """'60000000', '60e6', '60M' or '0.5x' -> Omega, in the unit of `full` = T(M)."""
    if bool(max_params) == bool(max_flops):
        raise UserError("name one budget: --max-params or --max-flops")
    text = max_params or max_flops
    match = re.fullmatch(r"(\d+\.?\d*(?:e\d{1,2})?|\.\d+)([kmgbx]?)", text.strip().lower())
    units = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "x": full}
    budget = float(match[1]) * units[match[2]] if match else 0.0
    if budget <= 0:
        raise UserError(f"budget {text!r} is not a positive number such as 60000000, 60e6, 60M or 0.5x")
    return budget


def latest_superbert():
    """The directory in superbert/ whose training finished last."""
    runs = [(read_json(path)["finished"], str(path.parent)) for path in Path("superbert").glob("*/run.json")]
    if not runs:
        raise UserError("there is no finished super-BERT in superbert/: run `python yoco.py train` first, "
                        "or name one with --model")
    print(f"using {max(runs)[1]}, the super-BERT finished last")
    return max(runs)[1]


def load_theta(path, space):
    """P_theta from theta.json. Raises UserError unless it is a distribution over `space`."""
    stored = read_json(path, "is missing: the directory is not a super-BERT")
    P = Categorical(space.categories)
    try:
        theta = [np.array(t, np.float64) for t in stored["theta"]]
        shape = tuple(map(tuple, (stored["depths"], stored["heads"], stored["ffn_sizes"])))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a theta.json") from None
    if shape != (space.depths, space.heads, space.ffn_sizes):
        raise UserError(f"{path} belongs to another search space than the model beside it")
    if [t.shape for t in theta] != [t.shape for t in P.theta] or not all(
            np.isfinite(t).all() and (t >= 0).all() and abs(t.sum() - 1) < 1e-6 for t in theta):
        raise UserError(f"{path} holds no probability distribution over the search space")
    P.theta = theta
    return P


# ---------------------------------------------------------------------------------------------------
# eval
# ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class EvalSettings:
    """Score a super-BERT (its largest architecture) or a sub-BERT on the dev set of a data directory."""
    model: str = setting("", "directory that train or search wrote")
    data: str = setting("", "data directory (default: the one it was trained on)")
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "as in train", choices=("auto", "fp32", "bf16"))


def evaluate(settings):
    """Print parameters, FLOPs, latency and every dev metric of a model; returns the metrics."""
    if not settings.model:
        raise UserError("name the model with --model")
    device, autocast = arithmetic(settings)
    run = read_json(Path(settings.model) / "run.json", "is missing: not a directory of train or search")
    task = data.load_task(settings.data or run.get("data") or run["settings"]["data"])
    model = load_trained(settings.model, task).to(device)
    parts = [data.encode(part, settings.model, run["max_length"])
             for part in (task.dev, task.dev_mismatched) if part]
    result = scorer(model, parts, task.metric, device, autocast)(None)
    length = min(128, model.config.max_position_embeddings)
    one = [torch.ones(1, length, dtype=torch.int64, device=device) for _ in range(3)]
    one[1].zero_()
    seconds = []
    with torch.inference_mode(), autocast():
        for _ in range(25):
            start = time.perf_counter()
            model(*one).cpu()
            seconds.append(time.perf_counter() - start)
    print(f"{settings.model}: {model.config.arch}\n  {costs_in_words(model.config, model.config.arch)}\n"
          f"  latency {1000 * np.median(seconds[5:]):.1f} ms (one sequence of {length} tokens, median of 20; "
          f"{hardware(device)})\n  dev of {task.name}: {in_words(result)}")
    return result


# ---------------------------------------------------------------------------------------------------
# Plumbing: scores, devices, files, progress, the command line
# ---------------------------------------------------------------------------------------------------

def scorer(model, parts, metric, device, autocast, batch_size=32):
    """A function arch -> {metric: %} over encoded `parts` (MNLI's dev has two; "score" is their mean).
    Batches are made once and stay on the device."""
    made = [[data.collate(part, indices, device) for indices in data.batches(part, batch_size)]
            for part in parts]

    def score(arch):
        training, results = model.training, []
        model.eval()
        with torch.inference_mode(), autocast():
            for batches in made:
                logits = torch.cat([model(*inputs, arch).float() for *inputs, _ in batches])
                labels = torch.cat([labels for *_, labels in batches])
                results.append(data.scores(metric, labels.cpu().numpy(), logits.cpu().numpy()))
        model.train(training)
        merged = {name + "_mismatched" * i: v for i, r in enumerate(results) for name, v in r.items()}
        return merged | {"score": float(np.mean([r["score"] for r in results]))}
    return score


def arithmetic(settings):
    """(device, autocast context maker) for the settings `device` and `precision`."""
    name = settings.device
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if (name == "cuda" and not torch.cuda.is_available()
            or name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: there is none here")
    if name == "cuda":
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)          # from Ampere on
    else:
        has_bf16 = name == "cpu" and any(torch.cpu.get_capabilities().get(flag)
                                         for flag in ("amx_bf16", "avx512_bf16"))
    bf16 = settings.precision == "bf16" or settings.precision == "auto" and has_bf16
    return torch.device(name), lambda: torch.autocast(name, torch.bfloat16, enabled=bf16)


def hardware(device):
    """The processor's name and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def load_trained(directory, task):
    """A model that train or search wrote, refused where its labels are not the data's."""
    labels = BertConfig.load(directory).labels
    if labels != task.labels:
        raise UserError(f"{directory} was trained on the labels {labels}, the data has {task.labels}")
    return load_bert(directory, task.num_labels)


def write_model(model, tokenizer_directory, directory):
    """config.json, model.safetensors and the tokenizer's files: a directory that stands alone."""
    save_bert(model, directory)
    for name in ("vocab.txt", "tokenizer_config.json"):
        if (source := Path(tokenizer_directory) / name).exists():
            write_file(Path(directory) / name, source.read_bytes())


def in_words(result):
    """{metric: %} in one line."""
    return "  ".join(f"{name} {value:.2f}" for name, value in result.items())


def costs_in_words(config, arch, full=None):
    """Parameters and FLOPs in one line, with their share of the architecture `full`."""
    def part(count):
        share = f" ({100 * count(config, arch) / count(config, full):.1f}% of the full model)" if full else ""
        return f"{count(config, arch):,}{share}"
    return (f"parameters {part(count_params)}, embeddings + encoder + pooler; "
            f"FLOPs {part(count_flops)}, 128 tokens")


def read_json(path, otherwise="does not exist"):
    """A JSON object from a file; UserError `path otherwise` where there is none."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} {otherwise}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def write_json(path, content):
    """Write JSON atomically, one field per line."""
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in content.items())
    write_file(path, f"{{\n{rows}\n}}\n".encode())


class Finished(Exception):
    """--resume met a run that has nothing left to do."""


class Output:
    """The directory a command writes: finished once run.json is there, which is written last;
    resumable while checkpoint.safetensors is, one file that is replaced as a whole."""

    def __init__(self, settings):
        self.settings, self.directory = settings, Path(settings.out)
        self.checkpoint, self.started = self.directory / "checkpoint.safetensors", time.perf_counter()
        if settings.resume and settings.overwrite:
            raise UserError("--resume and --overwrite contradict each other")
        if not settings.overwrite:
            if (self.directory / "run.json").exists():
                if settings.resume:
                    raise Finished(f"{self.directory} is finished: nothing to resume")
                raise UserError(f"{self.directory} holds a finished result: choose another --out, or "
                                "replace it with --overwrite")
            if self.checkpoint.exists() and not settings.resume:
                raise UserError(f"{self.directory} holds an unfinished run: continue it with --resume, "
                                "or replace it with --overwrite")
    def kept_settings(self):
        """The settings that a result depends on."""
        return {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in ("overwrite", "resume")}

    def log(self, **record):
        """Append one line to log.jsonl."""
        self.log_file.write(json.dumps(record).encode() + b"\n")

    def save(self, tensors, state):
        """Replace the checkpoint; the log is on disk before it."""
        self.log_file.flush()
        os.fsync(self.log_file.fileno())
        state |= dict(settings=self.kept_settings(), log_bytes=self.log_file.tell(),
                      seconds=time.perf_counter() - self.started)
        tensors = {name: t.cpu() for name, t in tensors.items()}
        write_file(self.checkpoint, safetensors.torch.save(tensors, {"state": json.dumps(state)}))

    def begin(self):
        """Open the directory; (tensors, state) of the checkpoint to resume from, or None."""
        self.directory.mkdir(parents=True, exist_ok=True)
        resume = self.settings.resume and self.checkpoint.exists()
        if self.settings.resume and not resume:
            print(f"{self.directory}: nothing to resume, starting afresh")
        self.log_file = open(self.directory / "log.jsonl", "ab" if resume else "wb")
        if not resume:
            (self.directory / "run.json").unlink(missing_ok=True)
            self.checkpoint.unlink(missing_ok=True)
            return None
        with safetensors.safe_open(self.checkpoint, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            state = json.loads(file.metadata()["state"])
        for name, value in self.kept_settings().items():
            if state["settings"].get(name) != value:
                raise UserError(f"{self.directory} was started with {name} = {state['settings'].get(name)!r}, "
                                f"not {value!r}: resume with the same settings")
        self.log_file.truncate(state["log_bytes"])
        self.started -= state["seconds"]
        return tensors, state

    def finish(self, **facts):
        """Write run.json, which makes the result final, and drop the checkpoint."""
        seconds = time.perf_counter() - self.started
        facts = dict(command=type(self.settings).__name__.removesuffix("Settings").lower(),
                     settings=self.kept_settings(), **facts, seconds=round(seconds, 1),
                     hardware=hardware(torch.device(facts.get("device", "cpu"))),
                     versions={"python": platform.python_version(), "torch": torch.__version__,
                               "numpy": np.__version__},
                     finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        self.log_file.close()
        write_json(self.directory / "run.json", facts)
        self.checkpoint.unlink(missing_ok=True)
        print(f"wrote {self.directory} in {seconds:.0f} s")
        return facts


class Progress:
    """Where the work stands: one updating line on a terminal, elsewhere a line every 30 seconds."""

    def __init__(self, done, total):
        self.first, self.done, self.total = done, done, total
        self.start = self.shown = time.perf_counter()

    def ms(self):
        """Milliseconds per step, over this run of the program."""
        return 1000 * (time.perf_counter() - self.start) / max(1, self.done - self.first)

    def show(self, done, text):
        """Say that `done` steps of the total are done."""
        self.done, now, terminal = done, time.perf_counter(), sys.stderr.isatty()
        if not terminal and now - self.shown < 30 and done < self.total:
            return
        self.shown, left = now, (self.total - done) * self.ms() / 1000
        line = f"{done}/{self.total}  {text}  {self.ms():.0f} ms/step  {left // 60:.0f}:{left % 60:02.0f} left"
        end = "\n" if not terminal or done == self.total else ""
        print(("\r\033[K" if terminal else "") + line, end=end, file=sys.stderr, flush=True)


COMMANDS = {"train": (TrainSettings, train), "search": (SearchSettings, search),
            "eval": (EvalSettings, evaluate)}


def parse(argv):
    """Command-line words -> (settings, function). One flag per field, whose help is the field's."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            if "unrecognized" in message:
                message += "; allowed: " + " ".join(sorted(self._option_string_actions))
            raise UserError(f"{message} (see --help)")
    parser = Parser("yoco.py", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (kind, _) in COMMANDS.items():
        sub = commands.add_parser(name, help=kind.__doc__, description=kind.__doc__, allow_abbrev=False)
        for f in dataclasses.fields(kind):
            flag = "--" + f.name.replace("_", "-")
            if f.type is bool:
                sub.add_argument(flag, action="store_true", help=f.metadata["help"])
            else:
                shown = f" (default: {f.default})" if f.default else ""
                sub.add_argument(flag, type=f.type, default=f.default, choices=f.metadata["choices"],
                                 metavar=f.name.upper(), help=f.metadata["help"] + shown)
    options = vars(parser.parse_args(argv))
    kind, function = COMMANDS[options.pop("command")]
    for f in dataclasses.fields(kind):
        low, high, value = f.metadata["low"], f.metadata["high"], options[f.name]
        if low is not None and not (value >= low and (high is None or value <= high)):
            raise UserError(f"--{f.name.replace('_', '-')} {value} is out of range: at least {low}"
                            + (f", at most {high}" if high is not None else ""))
    return kind(**options), function


def main(argv=None):
    """Run a command; the exit status: 0, 2 after an error that one line explains, 130 after Ctrl-C."""
    try:
        settings, function = parse(argv)
        function(settings)
        return 0
    except UserError as error:
        print(f"yoco.py: error: {error}", file=sys.stderr)
    except Finished as fact:
        print(fact)
        return 0
    except OSError as error:
        print(f"yoco.py: error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nyoco.py: interrupted; continue with --resume", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
