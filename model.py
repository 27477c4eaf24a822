"""BERT from scratch with an elastic forward pass: one set of weights, any smaller BERT inside.

After Devlin et al. 2019 (the model) and YOCO-BERT, Sec. 3.2 (the elasticity). A *super-BERT* is an
`ElasticBert` called with its largest architecture; a *sub-BERT* is `d` layers of it, the first or
evenly spaced ones (`kept_layers`), in each of them the first `h` heads and the first `k` FFN
neurons. The architecture is an argument of `forward`: nothing is selected beforehand, what is
sliced off is not computed, and hidden states are kept only where the caller passes a dict for them.
Hidden size, embeddings, pooler and classifier are shared by every architecture. `extract` copies a
slice into a stand-alone model of the same class. Unlike the usual implementations the tensors have
short names here and Hugging Face's names on disk; one explicit map stands between them.

Letters: B batch, T tokens, C hidden size, H heads kept, D head size, F FFN neurons kept.
"""

import ctypes
import io
import json
import logging
import os
import platform
import random
import re
import statistics
import sys
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


# --------------------------------------------------------------------------------------------------
# Configuration and search space
# --------------------------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


@dataclass
class BertConfig:
    """The fields of a Hugging Face config.json that shape a BERT; the defaults are BERT-base's.

    Raises UserError where the fields describe no BERT that this file computes.
    """
    vocab_size: int = 30522
    hidden_size: int = 768                     # C
    num_hidden_layers: int = 12
    num_attention_heads: int = 12              # of a full layer: fixes the head size D = C / heads
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    id2label: dict | None = None               # {"0": name, ...}: label names travel with the model
    depth_keeps: str = "first"                 # the layers of a smaller depth, or "even"ly spaced
    layer_heads: list | None = None            # a sub-BERT's heads, one number per layer
    layer_ffn_sizes: list | None = None        # a sub-BERT's FFN sizes, one number per layer

    def __post_init__(self):
        for field in (f for f in fields(self) if f.type in (int, float)):
            value, whole = getattr(self, field.name), field.type is int
            low, high = {"num_hidden_layers": (1, 1000), "initializer_range": (0, 100)}.get(
                field.name, (1, 10**6) if whole else (0, 0.999))
            if type(value) not in (int, field.type) or not low <= value <= high:
                raise UserError(f"config: {field.name} is {value!r}, not a{' whole' * whole} "
                                f"number from {low} to {high}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"config: {self.num_attention_heads} heads do not divide the hidden "
                            f"size {self.hidden_size}")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise UserError(f"config: hidden_act {self.hidden_act!r} is not one of "
                            f"{', '.join(ACTIVATIONS)}")
        if self.depth_keeps not in ("first", "even"):
            raise UserError(f"config: depth_keeps is {self.depth_keeps!r}, not 'first' or 'even'")
        if self.id2label is not None and not (
                isinstance(self.id2label, dict)
                and all(isinstance(v, str) and v.isprintable() for v in self.labels)
                and len(self.labels) == len(self.id2label)):
            raise UserError('config: id2label must be {"0": name, "1": name, ...}')
        for name, largest in (("layer_heads", self.num_attention_heads),
                              ("layer_ffn_sizes", self.intermediate_size)):
            sizes = getattr(self, name)
            if sizes is not None and not (
                    isinstance(sizes, list) and len(sizes) == self.num_hidden_layers
                    and all(type(s) is int and 1 <= s <= largest for s in sizes)):
                raise UserError(f"config: {name} must be {self.num_hidden_layers} whole numbers "
                                f"from 1 to {largest}, one per layer")
        if count_params(self, self.arch) > 10**9:
            raise UserError("config: more than 10^9 parameters")

    @property
    def head_size(self):
        """D: the same in every layer and for every number of heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def arch(self):
        """The largest architecture that a model of this configuration holds."""
        d = self.num_hidden_layers
        return Arch(self.layer_heads or [self.num_attention_heads] * d,
                    self.layer_ffn_sizes or [self.intermediate_size] * d)

    def layers(self, arch):
        """(index, heads, FFN size) of each layer that `arch` runs, a tuple."""
        return tuple(zip(kept_layers(self.depth_keeps, self.num_hidden_layers, arch.depth), *arch))

    @property
    def labels(self):
        """Label names in the order of the logits; () where none are known."""
        names = self.id2label or {}
        return tuple(names[str(i)] for i in range(len(names)) if str(i) in names)

    @classmethod
    def load(cls, directory):
        """Read `directory`/config.json. Fields without a meaning here are ignored; those that would
        change the computation (another model type, relative positions, a decoder) are refused."""
        path = Path(directory) / "config.json"
        found = read_json(path, f"does not exist: {directory} is not a BERT directory")
        for name, only in (("model_type", "bert"), ("position_embedding_type", "absolute"),
                           ("is_decoder", False), ("add_cross_attention", False)):
            if found.get(name, only) != only:
                raise UserError(f"{path}: {name} is {found[name]!r}; only {only!r} is supported")
        try:
            return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def kept_layers(rule, layers, depth):
    """Which of so many layers a sub-BERT of `depth` has, by the rule "first" or "even".

    >>> list(kept_layers("first", 6, 4)), list(kept_layers("even", 6, 4))
    ([0, 1, 2, 3], [0, 2, 3, 5])
    """
    # DIFFERS from Sec. 3.2: "even" keeps them evenly spaced, and the last always.
    return range(depth) if rule == "first" else [(i + 1) * layers // depth - 1
                                                 for i in range(depth)]


class Arch(namedtuple("Arch", "heads ffn_sizes")):
    """A sub-BERT's architecture m: heads and FFN size of each active layer, two tuples.

    >>> print(Arch((12, 4), (3072, 512)))
    2 layers, heads 12 4, FFN 3072 512
    """
    __slots__ = ()

    def __new__(cls, heads, ffn_sizes):
        if len(heads) != len(ffn_sizes) or not heads:
            raise UserError(f"Arch: {len(heads)} heads and {len(ffn_sizes)} FFN sizes; one of each "
                            "per active layer, and at least one layer")
        return super().__new__(cls, tuple(heads), tuple(ffn_sizes))

    @property
    def depth(self):
        """The number of active layers, d."""
        return len(self.heads)

    def __str__(self):
        heads, ffn_sizes = (" ".join(map(str, sizes)) for sizes in self)
        return f"{self.depth} layers, heads {heads}, FFN {ffn_sizes}"


class SearchSpace:
    """The search space M of Sec. 3.2 as categorical variables: one over depth, then one per layer
    over the pair (FFN size, heads): index = FFN index * number of heads choices + heads index.

    A point of it is a list of choices, one category index per variable; a layer that the depth does
    not keep is inactive and has the choice None.

    >>> space = SearchSpace(depths=[1, 2], heads=[1, 2], ffn_sizes=[8, 16, 32])
    >>> space.categories, space.size(), space.choices(Arch((2,), (16,)))
    ((2, 6, 6), 42, [0, 3, None])
    """

    def __init__(self, depths, heads, ffn_sizes, depth_keeps="first"):
        self.depth_keeps = depth_keeps
        self.depths, self.heads, self.ffn_sizes = (
            tuple(sorted(set(sizes))) for sizes in (depths, heads, ffn_sizes))   # ascending
        if not all(sizes and sizes[0] >= 1 for sizes in (self.depths, self.heads, self.ffn_sizes)):
            raise UserError("SearchSpace: depths, heads and ffn_sizes each need a positive number")

    @classmethod
    def for_config(cls, config):
        """BERT-base's choices (Sec. 4, Search Space Setups), as fractions of any BERT's size. For a
        sub-BERT, whose layers differ: the space with just that one architecture."""
        if config.layer_heads or config.layer_ffn_sizes:
            return OneArch(config.arch)

        def part(size, *fractions):
            return [max(1, round(size * f)) for f in fractions]
        return cls(depths=part(config.num_hidden_layers, 1/2, 2/3, 5/6, 1),
                   heads=part(config.num_attention_heads, 1/3, 2/3, 1),
                   ffn_sizes=part(config.intermediate_size, 1/6, 1/4, 1/3, 1),
                   depth_keeps=config.depth_keeps)

    @property
    def categories(self):
        """The number of categories of each variable."""
        return (len(self.depths),) + (len(self.heads) * len(self.ffn_sizes),) * self.depths[-1]

    def largest(self):
        """The largest architecture: the super-BERT itself."""
        return self.arch([n - 1 for n in self.categories])

    def smallest(self):
        """The smallest architecture."""
        return self.arch([0] * len(self.categories))

    def size(self):
        """The number of architectures, inactive layers not counted."""
        return sum((len(self.heads) * len(self.ffn_sizes)) ** depth for depth in self.depths)

    def check(self, arch):
        """Raise UserError, naming the legal values, unless `arch` lies in the space."""
        for name, values, legal in (("depth", [arch.depth], self.depths),
                                    ("heads", arch.heads, self.heads),
                                    ("FFN size", arch.ffn_sizes, self.ffn_sizes)):
            for value in values:
                if value not in legal:
                    raise UserError(f"{name} {value} is not in the search space: one of {legal}")

    def arch(self, choices):
        """Choices -> Arch. What stands at inactive layers is not looked at."""
        active = kept_layers(self.depth_keeps, self.depths[-1], self.depths[choices[0]])
        pairs = [divmod(choices[1 + i], len(self.heads)) for i in active]
        return Arch([self.heads[h] for _, h in pairs], [self.ffn_sizes[f] for f, _ in pairs])

    def choices(self, arch):
        """Arch -> choices, with None for every inactive layer."""
        self.check(arch)
        layers = [None] * self.depths[-1]
        for i, h, k in zip(kept_layers(self.depth_keeps, len(layers), arch.depth), *arch):
            layers[i] = self.ffn_sizes.index(k) * len(self.heads) + self.heads.index(h)
        return [self.depths.index(arch.depth)] + layers


class OneArch(SearchSpace):
    """The space of one architecture, to be fine-tuned as it is: every variable has one category."""

    def __init__(self, only):
        super().__init__([only.depth], [max(only.heads)], [max(only.ffn_sizes)])
        self.only = only

    def arch(self, choices):
        """The one architecture."""
        return self.only

    def check(self, arch):
        """Raise UserError unless `arch` is the one."""
        if arch != self.only:
            raise UserError(f"{arch} is not the only architecture here, {self.only}")

    def choices(self, arch):
        """Its choices, all 0."""
        self.check(arch)
        return [0] * len(self.categories)


def count_params(config, arch):
    """Parameters T(m) of a sub-BERT: embeddings + active layers + pooler, no classifier."""
    C, D = config.hidden_size, config.head_size
    tables = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    embeddings = (tables + 2) * C                                  # three tables and a LayerNorm
    layers = sum((4*C*h*D + 3*h*D + C) + (2*C*k + k + C) + 4*C     # attention, FFN, two LayerNorms
                 for h, k in zip(*arch))
    return embeddings + layers + (C*C + C)


def count_flops(config, arch, seq_len=128):
    """FLOPs of one sequence: 2 per multiply-add of every matrix product of encoder and pooler; by
    convention of the last layer in full, though `forward` computes it for [CLS] alone."""
    C, D, T = config.hidden_size, config.head_size, seq_len
    layers = sum(4*T*C*h*D        # query, key, value and output projections
                 + 2*T*T*h*D      # attention scores and their product with the values
                 + 2*T*C*k        # both FFN matrices
                 for h, k in zip(*arch))
    return 2 * (layers + C*C)


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------

def front_linear(x, linear, n_out=None, n_in=None):
    """x @ W[:n_out, :n_in].T + b[:n_out], the slice being a view. x [..., n_in] -> [..., n_out]."""
    return F.linear(x, linear.weight[:n_out, :n_in], linear.bias[:n_out])


def dropout(x, p):
    """F.dropout, which on a CPU draws one number at a time, a good part of a step; there 64 random
    bits decide about four elements, which rounds `p` to a multiple of 2**-16."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
    keep = bits.view(torch.int16)[:x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def attention(q, k, v, mask, p):
    """softmax(q k' / sqrt(D)) v with dropout `p` of the softmax. q [B, H, Q, D] for Q <= T tokens,
    k and v [B, H, T, D], mask [B, 1, 1, T] bool -> [B, H, Q, D]."""
    if p == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    # The same, since PyTorch has no fused kernel with dropout for CPUs, and its way around is slow.
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)              # [B, H, Q, T]
    weights = weights.masked_fill_(~mask, -torch.inf).softmax(-1)
    return dropout(weights, p) @ v


class Layer(nn.Module):
    """One post-norm transformer encoder layer with up to `heads` heads and `ffn_size` neurons."""

    def __init__(self, config, heads, ffn_size):
        super().__init__()
        C, self.D = config.hidden_size, config.head_size
        self.query, self.key, self.value = (nn.Linear(C, heads * self.D) for _ in range(3))
        self.attention_out = nn.Linear(heads * self.D, C)
        self.attention_norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.ffn_in = nn.Linear(C, ffn_size)
        self.ffn_out = nn.Linear(ffn_size, C)
        self.ffn_norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob

    def forward(self, x, mask, H, F_, last=False):
        """x [B, T, C], mask [B, 1, 1, T] bool, H heads and F_ neurons of the front -> [B, T, C], or
        [B, 1, C] of the last layer, out of which only [CLS] goes to the pooler."""
        B, T, C = x.shape
        p, p_attention = (self.dropout, self.attention_dropout) if self.training else (0.0, 0.0)

        def split(x, linear):
            return front_linear(x, linear, H * self.D).view(B, -1, H, self.D).transpose(1, 2)
        key, value = split(x, self.key), split(x, self.value)            # [B, H, T, D]
        x = x[:, :1] if last else x                                      # [B, Q, C], Q = 1 or T
        a = attention(split(x, self.query), key, value, mask, p_attention)
        a = a.transpose(1, 2).reshape(B, -1, H * self.D)                 # [B, Q, H*D]
        a = front_linear(a, self.attention_out, n_in=H * self.D)         # [B, Q, C]
        x = self.attention_norm(x + dropout(a, p))
        f = self.activation(front_linear(x, self.ffn_in, F_))            # [B, Q, F]
        f = front_linear(f, self.ffn_out, n_in=F_)                       # [B, Q, C]
        return self.ffn_norm(x + dropout(f, p))


class ElasticBert(nn.Module):
    """BERT with a pooler and a linear classifier. It holds the full weights; `forward` uses a part.
    """

    def __init__(self, config, num_labels):
        super().__init__()
        C = config.hidden_size
        self.config, self.num_labels = config, num_labels
        self.word_embeddings = nn.Embedding(config.vocab_size, C)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, C)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, C)
        self.embedding_norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config, h, k) for h, k in zip(*config.arch))
        self.pooler = nn.Linear(C, C)
        self.classifier = nn.Linear(C, num_labels)
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def check(self, arch):
        """Raise UserError unless `arch` has whole numbers from 1 to what the model has."""
        own = self.config.arch
        if arch.depth > own.depth or not all(
                type(n) is int and 1 <= n <= most for i, *wanted in self.config.layers(arch)
                for n, most in zip(wanted, (own.heads[i], own.ffn_sizes[i]))):
            raise UserError(f"architecture [{arch}] does not fit into the model's [{own}]")

    def forward(self, input_ids, token_type_ids, attention_mask, arch=None, kept=None):
        """Logits of the sub-BERT `arch` (None: the whole model).

        Args: three [B, T] tensors, the mask bool or 0/1 integers (1 = a token, 0 = padding);
            `kept`, a dict in which the call leaves the hidden states before each layer: a later
            call with the same batch and dict (in eval mode, with the same weights) starts at the
            first layer that differs.
        Returns: [B, num_labels]. Raises UserError where `arch` or T exceeds what the model has.
        """
        config, arch = self.config, arch or self.config.arch
        T = input_ids.shape[1]
        if T > config.max_position_embeddings:
            raise UserError(f"{T} tokens; the model has {config.max_position_embeddings} positions")
        self.check(arch)
        p = config.hidden_dropout_prob if self.training else 0.0
        mask = attention_mask.bool()[:, None, None, :]                   # [B, 1, 1, T]
        layers = config.layers(arch)                                     # (index, H, F) of each
        start = max((i for i in range(arch.depth) if kept and layers[:i] in kept), default=0)
        x = kept.get(layers[:start]) if kept else None                   # [B, T, C]
        if x is None:
            x = (self.word_embeddings(input_ids) + self.position_embeddings.weight[:T]
                 + self.token_type_embeddings(token_type_ids))
            x = dropout(self.embedding_norm(x), p)
        for i in range(start, arch.depth):
            index, H, F_ = layers[i]
            if kept is not None:
                kept[layers[:i]] = x
            x = self.layers[index](x, mask, H, F_, last=i + 1 == arch.depth)
        pooled = torch.tanh(self.pooler(x[:, 0]))                        # [B, C] from [CLS]
        return self.classifier(dropout(pooled, p))                       # [B, num_labels]


def extract(model, arch):
    """A stand-alone ElasticBert with the weights of `arch`: the same logits, nothing shared.

    Raises UserError where `arch` exceeds `model`.
    """
    model.check(arch)
    config = replace(model.config, num_hidden_layers=arch.depth, depth_keeps="first",
                     layer_heads=list(arch.heads), layer_ffn_sizes=list(arch.ffn_sizes))
    with torch.device("meta"):                                           # shapes without memory
        sub = ElasticBert(config, model.num_labels)
    full, state, active = model.state_dict(), {}, model.config.layers(arch)
    for name, tensor in sub.state_dict().items():
        there = name.split(".")
        if there[0] == "layers":                                         # their places differ
            there[1] = str(active[int(there[1])][0])
        corner = tuple(slice(n) for n in tensor.shape)                   # the front in every sense
        state[name] = full[".".join(there)][corner].clone()
    sub.load_state_dict(state, assign=True)
    return sub.train(model.training)


@torch.no_grad()
def reorder(model, importance):
    """Sort the heads and FFN neurons of every layer in place, most important first; the function
    that the largest computes stays the same. importance: per layer two tensors, [H] and [F]."""
    for layer, (heads, neurons) in zip(model.layers, importance):
        order = heads.argsort(descending=True, stable=True).cpu()        # [H]
        rows = torch.arange(len(heads) * layer.D).view(-1, layer.D)[order].flatten()     # [H*D]
        neurons = neurons.argsort(descending=True, stable=True)          # [F]
        for linear, order in ((layer.query, rows), (layer.key, rows), (layer.value, rows),
                              (layer.ffn_in, neurons)):
            linear.weight.copy_(linear.weight[order])
            linear.bias.copy_(linear.bias[order])
        for linear, order in ((layer.attention_out, rows), (layer.ffn_out, neurons)):
            linear.weight.copy_(linear.weight[:, order])


# --------------------------------------------------------------------------------------------------
# Weights on disk, under Hugging Face's names
# --------------------------------------------------------------------------------------------------

HF_NAMES = {"word_embeddings": "bert.embeddings.word_embeddings",
            "position_embeddings": "bert.embeddings.position_embeddings",
            "token_type_embeddings": "bert.embeddings.token_type_embeddings",
            "embedding_norm": "bert.embeddings.LayerNorm",
            "pooler": "bert.pooler.dense",
            "classifier": "classifier"}
HF_LAYER_NAMES = {"query": "attention.self.query", "key": "attention.self.key",
                  "value": "attention.self.value", "attention_out": "attention.output.dense",
                  "attention_norm": "attention.output.LayerNorm", "ffn_in": "intermediate.dense",
                  "ffn_out": "output.dense", "ffn_norm": "output.LayerNorm"}


def hf_name(name):
    """Our tensor name -> Hugging Face's.

    >>> hf_name("layers.3.ffn_in.weight")
    'bert.encoder.layer.3.intermediate.dense.weight'
    """
    *path, kind = name.split(".")
    if path[0] == "layers":
        return f"bert.encoder.layer.{path[1]}.{HF_LAYER_NAMES[path[2]]}.{kind}"
    return f"{HF_NAMES[path[0]]}.{kind}"


def load_bert(directory, num_labels=None):
    """ElasticBert from the config.json and model.safetensors of Hugging Face or `save_bert`, with
    `num_labels` labels (None: as many as the classifier in the file has).

    Strict: the names and shapes must be exactly those of the model. Only the pre-training heads
    `cls.*` and the buffer `position_ids` are ignored, `bert.` may be missing, and a classifier that
    the file does not have is initialised at random, with a line that says so.
    Raises UserError that names the first tensor at fault.
    """
    config, path = BertConfig.load(directory), Path(directory) / "model.safetensors"
    try:
        raw = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error})") from None
    tensors = {}
    for name, tensor in raw.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith("cls.") and not name.endswith("embeddings.position_ids"):
            bare = name.startswith(("embeddings.", "encoder.", "pooler."))
            tensors["bert." + name if bare else name] = tensor

    if num_labels is None:
        classifier = tensors.get("classifier.bias")
        if classifier is None or classifier.dim() != 1 or not len(classifier):
            raise UserError(f"{path} has no classifier: it was not fine-tuned")
        num_labels = len(classifier)
    with torch.device("meta"):                    # no memory before the shapes are checked
        model = ElasticBert(config, num_labels)
    if not any(name.startswith("classifier.") for name in tensors):
        print(f"{path} has no classifier: a new one for {num_labels} label(s) is initialised")
        new = torch.empty(num_labels, config.hidden_size).normal_(std=config.initializer_range)
        tensors |= {"classifier.weight": new, "classifier.bias": torch.zeros(num_labels)}
    state = {}
    for name, like in model.state_dict().items():
        tensor = tensors.pop(hf_name(name), None)
        if tensor is None:
            raise UserError(f"{path}: tensor {hf_name(name)} is missing")
        if tensor.shape != like.shape:
            raise UserError(f"{path}: tensor {hf_name(name)} has shape {list(tensor.shape)}, "
                            f"expected {list(like.shape)}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path}: tensor {hf_name(name)} is not all finite numbers")
        state[name] = tensor.to(torch.float32, copy=True)     # not a map of the file
    if tensors:
        raise UserError(f"{path}: unknown tensor {min(tensors)}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_bert(model, directory, tokenizer=None):
    """Write config.json and model.safetensors, which `load_bert` reads back bit for bit; and, so
    that the directory stands alone, the tokenizer of another BERT directory."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert",
              **{k: v for k, v in asdict(model.config).items() if v is not None}}
    if not model.config.id2label:
        config["num_labels"] = model.num_labels   # for others, who would take two for granted
    if model.num_labels == 1:
        config["problem_type"] = "regression"
    write_file(Path(directory) / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    tensors = {hf_name(n): t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    write_file(Path(directory) / "model.safetensors",
               safetensors.torch.save(tensors, metadata={"format": "pt"}))
    if tokenizer is not None:
        copy_tokenizer(tokenizer, directory)


def copy_tokenizer(source, directory):
    """Copy the tokenizer of one BERT directory to another."""
    for name in ("vocab.txt", "tokenizer_config.json"):
        if Path(source, name).exists():
            write_file(Path(directory, name), Path(source, name).read_bytes())
        else:                                     # of a result that is being replaced
            Path(directory, name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Where it computes
# --------------------------------------------------------------------------------------------------

def arithmetic(device="auto", precision="auto"):
    """(torch.device, maker of autocast contexts); "auto": the fastest device there is, and bf16
    where its hardware has units for it, else fp32. UserError where the device is missing. Also
    calls `keep_memory`."""
    keep_memory()
    mps = torch.backends.mps.is_available() and not dist.is_initialized()    # gloo has none
    here = dict(cuda=torch.cuda.is_available(), mps=mps, cpu=True)
    name = next(n for n in here if here[n]) if device == "auto" else device
    if not here[name]:
        raise UserError(f"--device {name}: this machine has none")
    if name == "cuda":
        hardware_bf16 = torch.cuda.get_device_capability() >= (8, 0)         # from Ampere on
    else:
        hardware_bf16 = name == "cpu" and any(torch.cpu.get_capabilities().get(unit)
                                              for unit in ("amx_bf16", "avx512_bf16"))
    bf16 = hardware_bf16 if precision == "auto" else precision == "bf16"
    return torch.device(name), lambda: torch.autocast(name, torch.bfloat16, enabled=bf16)


def keep_memory():
    """Let malloc keep what is freed. glibc's gives the memory of every large tensor back to the
    kernel, which maps and zeroes it anew for the next."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):                      # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)                                      # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)                              # M_TRIM_THRESHOLD


def hardware(device):
    """The GPU's name, or the processor's and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"


def peak_memory(device):
    """The most memory used so far, in MiB: the GPU's, or this process's (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():                                              # Linux
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**10
    try:
        import resource
    except ImportError:                                              # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --------------------------------------------------------------------------------------------------
# Latency
# --------------------------------------------------------------------------------------------------

def milliseconds(jobs, autocast):
    """Median milliseconds of functions that return a tensor: 20 rounds after 3 to warm up, in each
    of which all take their turn, so that a disturbance meets all of them."""
    times = [[] for _ in jobs]
    with torch.inference_mode(), autocast():
        for _ in range(23):
            for job, seconds in zip(jobs, times):
                start = time.perf_counter()
                job().flatten()[0].item()                                # waits for the device
                seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds[3:]) for seconds in times]


def latency(models, B, T, autocast):
    """Milliseconds that B sequences of T tokens take each of some models."""
    ids = torch.ones(B, T, dtype=torch.int64, device=models[0].pooler.weight.device)
    return milliseconds([lambda m=m: m(ids, ids - 1, ids) for m in models], autocast)


class LatencyTable:
    """Predicts T(m), the milliseconds that B sequences of T tokens take, as a sum: embeddings and
    head, plus for each layer the time of its operation (heads, FFN size). The last layer, which
    computes [CLS] alone, has times of its own. The sum is scaled to fit 20 whole architectures.
    ms: these times, set by `measure` or taken from another rank or run."""

    def __init__(self, model, B, T, autocast):
        if T > model.config.max_position_embeddings:
            raise UserError(f"{T} tokens to time; the model has "
                            f"{model.config.max_position_embeddings} positions: give "
                            "--latency-length")
        self.model, self.B, self.T, self.autocast = model.eval(), B, T, autocast
        self.space = SearchSpace.for_config(model.config)
        self.operations = [(h, k) for k in self.space.ffn_sizes for h in self.space.heads]

    def measure(self):
        """Set `ms`: layer, one for each operation; last, the same for the last layer; rest; scale.
        """
        model, B, T = self.model, self.B, self.T
        device, n = model.pooler.weight.device, len(self.operations)
        x = torch.randn(B, T, model.config.hidden_size, device=device)   # [B, T, C]
        mask = torch.ones(B, 1, 1, T, dtype=torch.bool, device=device)
        ids = torch.ones(B, T, dtype=torch.int64, device=device)
        single = [extract(model, Arch([h], [k])) for h, k in self.operations]
        jobs = [lambda s=s, h=h, k=k, last=last: s.layers[0](x, mask, h, k, last)
                for last in (False, True) for s, (h, k) in zip(single, self.operations)]
        *ms, whole = milliseconds([*jobs, lambda: single[0](ids, ids - 1, ids)], self.autocast)
        self.ms = dict(layer=ms[:n], last=ms[n:], rest=[max(0.0, whole - ms[n])], scale=[1.0])
        predicted, measured = self.check(seed=0)
        self.ms["scale"] = [statistics.median(m / p for m, p in zip(measured, predicted))]

    def __call__(self, arch):
        """T(m), predicted."""
        *layers, last = [self.operations.index(pair) for pair in zip(*arch)]
        ms = self.ms["rest"][0] + sum(self.ms["layer"][i] for i in layers) + self.ms["last"][last]
        return self.ms["scale"][0] * ms

    def whole(self, archs):
        """T(m) of several, each extracted and measured whole."""
        models = [extract(self.model, arch) for arch in archs]
        for model in models:                                             # large, and read alike
            model.word_embeddings = self.model.word_embeddings
        return latency(models, self.B, self.T, self.autocast)

    def check(self, seed):
        """Predicted and measured T(m) of 20 architectures of the space, two lists."""
        rng = random.Random(seed)
        archs = [self.space.arch([rng.randrange(n) for n in self.space.categories])
                 for _ in range(20)]
        return [self(arch) for arch in archs], self.whole(archs)


# --------------------------------------------------------------------------------------------------
# Export: the model as others load it
# --------------------------------------------------------------------------------------------------

def export_bert(model, directory, form, tokenizer, batches):
    """Write `model` into `directory` as others load it, without this file, and the tokenizer of the
    BERT directory `tokenizer`. Returns the greatest difference between its logits and those of what
    was written, read back, over `batches` of three [B, T] tensors each.

    form "hf": a Hugging Face directory; "onnx": model.onnx; "torch": model.pt2, of torch.export.
    The last two take int64 tensors of any B and T. Raises UserError where a package is missing, or
    where the logits differ by 1e-3: then the model is not kept.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    exported = write_export(model, directory, form)
    copy_tokenizer(tokenizer, directory)
    with torch.inference_mode():
        difference = torch.stack([(exported(*inputs) - model(*inputs)).abs().max()
                                  for inputs in batches]).max().item()   # not a number stays so
    if not difference < 1e-3:
        for path in directory.glob("model.*"):
            path.unlink()
        raise UserError(f"the export does not compute what the model does: its logits differ by "
                        f"{difference:.1e}; it is not kept")
    return difference


def write_export(model, directory, form):
    """Write the model; a function that computes its logits from what was written."""
    if form == "hf":
        save_bert(widened(model), directory)
        return load_bert(directory)
    path = directory / ("model.onnx" if form == "onnx" else "model.pt2")
    if form == "onnx":
        try:
            import onnx, onnxruntime, onnxscript                     # noqa: E401, F401
        except ImportError:
            raise UserError("ONNX needs three packages: pip install onnx onnxruntime "
                            "onnxscript") from None
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)     # it misses torchvision
        program = torch.onnx.export(traced(model), dynamo=True, verbose=False,
                                    input_names=INPUTS, output_names=["logits"])
        write_file(path, program.model_proto.SerializeToString())
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda *inputs: torch.from_numpy(session.run(["logits"], dict(zip(
            INPUTS, (x.long().numpy() for x in inputs))))[0])
    torch.export.save(traced(model), buffer := io.BytesIO())
    write_file(path, buffer.getvalue())
    loaded = torch.export.load(path).module()
    return lambda *inputs: loaded(*(x.long() for x in inputs))


INPUTS = ["input_ids", "token_type_ids", "attention_mask"]


def traced(model):
    """torch.export's program of the whole model, for any number of sequences and tokens."""
    sizes = {0: torch.export.Dim("batch", min=1, max=2**15), 1: torch.export.Dim(
        "tokens", min=1, max=model.config.max_position_embeddings)}
    # Three tensors: one, passed three times, would become a single input.
    inputs = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in INPUTS)
    return torch.export.export(model.eval(), inputs, strict=False,
                               dynamic_shapes={name: sizes for name in INPUTS})


def widened(model):
    """The same function at full width, as stock BERTs have it: the heads and neurons that a
    sub-BERT dropped are there as zeros; its dropped layers are not."""
    full = ElasticBert(replace(model.config, layer_heads=None, layer_ffn_sizes=None),
                       model.num_labels)
    own = model.state_dict()
    for name, tensor in full.state_dict().items():                       # into the front corners
        tensor.zero_()[tuple(slice(n) for n in own[name].shape)] = own[name]
    return full.eval()


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

def read_json(path, otherwise="does not exist"):
    """A JSON object from a file; UserError `path otherwise` where there is none."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} {otherwise}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def write_file(path, data):
    """Write bytes so that `path` holds the old content or the new one, also after a power cut."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):                   # the new name, too, has to reach the disk,
            directory = os.open(temporary.parent, os.O_RDONLY)    # where directories have fsync
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, **fields):
    """Write a JSON object, one field per line."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    write_file(path, f"{{\n{rows}\n}}\n".encode())
