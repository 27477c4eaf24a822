"""BERT from scratch with an elastic forward pass: one set of weights, any smaller BERT inside.

After Devlin et al. 2019 (the model) and YOCO-BERT, Sec. 3.2 (the elasticity). A *super-BERT* is an
`ElasticBert` called with its largest architecture. A *sub-BERT* is `d` layers of it, the first or
evenly spaced ones, and in each of them the first `h` heads and the first `k` FFN neurons. The
architecture is an argument of `forward`: nothing is selected beforehand, and what is sliced off is
not computed. Hidden size, embeddings, pooler and classifier are shared by every architecture.

Letters: B batch, T tokens, C hidden size, L layers, H heads kept, D head size, F FFN neurons kept
(F_ in code, where F is torch.nn.functional).
"""

import ctypes
import hashlib
import json
import os
import platform
import re
import statistics
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# Threads that wait for work must not keep busy a core that others want: read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


# ---- Configuration -------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": nn.GELU(), "gelu_python": nn.GELU(), "gelu_new": nn.GELU("tanh"),
               "gelu_pytorch_tanh": nn.GELU("tanh"), "relu": nn.ReLU()}
# What is computed of the fields that have few values.
CHOICES = {"model_type": ["bert"], "position_embedding_type": ["absolute"], "is_decoder": [False],
           "is_encoder_decoder": [False], "add_cross_attention": [False], "pruned_heads": [{}],
           "hidden_act": list(ACTIVATIONS), "keep_layers": ["first", "even"],
           "problem_type": ["regression", "single_label_classification"],
           "tokenizer_class": ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"]}
# Fields that change no logit; those in the last three lines are for generating text.
HARMLESS = re.compile(r"""
    architectures|transformers_version|\w*name_or_path|model_name|language|(torch_)?dtype|use_cache
    |use_bfloat16|finetuning_task|task_specific_params|label2id|_?num_labels
    |output_\w+|return_dict|torchscript|tf_legacy_loss|xla_device|gradient_checkpointing|tie_\w+
    |chunk_size_feed_forward|_?attn_implementation\w*|directionality|pooler_\w+|\w+_token_ids?
    |(max|min)_length|do_sample|early_stopping|num_beam\w+|num_return_sequences|temperature|top_[kp]
    |typical_p|\w+_penalty|\w*no_repeat_ngram_size|\w*suppress_tokens|bad_words_ids|prefix
    |remove_invalid_values|return_dict_in_generate|cross_attention_hidden_size""", re.VERBOSE)


def is_label(name):
    """Whether a text can name a label: not empty, and no character that breaks or steers a line."""
    # Those are controls, separators of lines, and halves of characters.
    steering = r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return isinstance(name, str) and name != "" and not re.search(steering, name)


@dataclass
class BertConfig:
    """The fields of a Hugging Face config.json that shape a BERT; the defaults are BERT-base's.
    ValueError for a value that no BERT has."""
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
    classifier_dropout: float = None           # None: as hidden_dropout_prob
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    problem_type: str = None                   # "regression": the one logit is the answer
    id2label: dict = None                      # {"0": name, ...}: label names travel with the model
    keep_layers: str = "first"                 # the layers of a smaller depth, or "even"ly spaced
    layer_heads: list = None                   # a sub-BERT's heads, one number per layer
    layer_ffn_sizes: list = None               # a sub-BERT's FFN sizes, one number per layer

    def __post_init__(self):
        for field in fields(self):
            value, legal = getattr(self, field.name), None
            if value is None and field.default is None:
                continue
            if field.type is int and not (type(value) is int and 1 <= value <= 10**6):
                legal = "a whole number from 1 to 1000000"
            if field.type is float and not (type(value) in (int, float) and 0 <= value < 1):
                legal = "a number from 0 to less than 1"
            if field.type is dict and not (
                    isinstance(value, dict) and all(map(is_label, value.values()))
                    and set(value) == {str(i) for i in range(len(set(value.values())))}):
                legal = '{"0": name, ...}, different printable names'
            if field.type is list and not (
                    isinstance(value, list) and len(value) == self.num_hidden_layers
                    and all(type(size) is int and size > 0 for size in value)):
                legal = "a whole number for each layer"
            if legal:
                raise ValueError(f"{field.name} is {value!r:.30}, not {legal}")
        heads, C = self.num_attention_heads, self.hidden_size
        if C % heads:
            raise ValueError(f"{heads} heads do not divide the hidden size {C}")
        self.head_size = C // heads                                      # D, of every layer
        # The largest architecture that a model of this configuration holds.
        self.arch = Arch(self.layer_heads or [heads] * self.num_hidden_layers,
                         self.layer_ffn_sizes or [self.intermediate_size] * self.num_hidden_layers)

    @property
    def labels(self):
        """Label names in the order of the logits; () where none are known."""
        return tuple(self.id2label[str(i)] for i in range(len(self.id2label or {})))

    def name_labels(self, labels):
        """Take over a task's label names, () for regression."""
        self.id2label = {str(i): name for i, name in enumerate(labels)} or None
        self.problem_type = None if labels else "regression"

    def layers(self, arch):
        """(index, heads, FFN size) of each layer that `arch` runs, a tuple."""
        return tuple(zip(kept_layer_indices(self.keep_layers, self.num_hidden_layers, arch.depth), *arch))

    @classmethod
    def load(cls, directory):
        """Read `directory`/config.json. A field that changes what is computed is computed here or
        refused by name, and so is one that nobody here knows; null stands for its default."""
        path = Path(directory) / "config.json"
        own = {field.name for field in fields(cls)}
        found = read_json(path, f"does not exist: {directory} is no BERT's directory; one to "
                                "fetch: python -m glue.download bert-base-uncased")
        if path.with_name("log.jsonl").exists() and not path.with_name("run.json").exists():
            raise UserError(f"{directory} is unfinished: go on with --resume")
        found = {name: value for name, value in found.items() if value is not None}
        for name, value in found.items():
            if value not in CHOICES.get(name, [value]):
                raise UserError(f"{path}: {name} is {value!r}, not one of {CHOICES[name]}")
            if name not in own and name not in CHOICES and not HARMLESS.fullmatch(name):
                raise UserError(f"{path}: unknown field {name!r}: remove it if it changes no logit")
        with user_errors_for(path, "does not describe a BERT"):
            return cls(**{name: value for name, value in found.items() if name in own})


# ---- Architectures and the search space ----------------------------------------------------------

def kept_layer_indices(rule, layers, depth):
    """Which of so many layers a sub-BERT of `depth` has, by the rule "first" or "even".

    >>> list(kept_layer_indices("first", 6, 4)), list(kept_layer_indices("even", 6, 4))
    ([0, 1, 2, 3], [0, 2, 3, 5])
    """
    if rule == "first":
        return range(depth)
    # DIFFERS from Sec. 3.2: "even" keeps them evenly spaced, and the last always.
    return [(i + 1) * layers // depth - 1 for i in range(depth)]


class Arch(namedtuple("Arch", "heads ffn_sizes")):
    """A sub-BERT's architecture m: heads and FFN size of each active layer, two tuples.

    >>> print(Arch((12, 4), (3072, 512)))
    2 layers, heads 12 4, FFN 3072 512
    """
    def __new__(cls, heads, ffn_sizes):
        if not heads or len(heads) != len(ffn_sizes):
            raise UserError("an Arch takes a number of heads and an FFN size for each layer")
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
    over the pair (FFN size, heads): index = FFN index * number of choices of heads + heads index.

    A point of it is a list of choices, one category index per variable; a layer that the depth does
    not keep is inactive and has the choice None. `categories` counts those of each variable.

    >>> space = SearchSpace(depths=[1, 2], heads=[1, 2], ffn_sizes=[8, 16, 32])
    >>> space.categories, space.size(), space.choices(Arch((2,), (16,)))
    ((2, 6, 6), 42, [0, 3, None])
    """

    def __init__(self, depths, heads, ffn_sizes, keep_layers="first"):
        self.keep_layers = keep_layers
        self.depths, self.heads, self.ffn_sizes = (
            tuple(sorted(set(sizes))) for sizes in (depths, heads, ffn_sizes))   # ascending
        self.pairs = [(h, k) for k in self.ffn_sizes for h in self.heads]
        self.categories = (len(self.depths),) + (len(self.pairs),) * self.depths[-1]

    @classmethod
    def for_config(cls, config):
        """BERT-base's choices (Sec. 4, Search Space Setups), as fractions of any BERT's size."""
        if config.layer_heads or config.layer_ffn_sizes:
            raise UserError("a sub-BERT is one architecture: there is nothing smaller inside it")

        def part(size, *fractions):
            return [max(1, round(size * f)) for f in fractions]
        return cls(depths=part(config.num_hidden_layers, 1/2, 2/3, 5/6, 1),
                   heads=part(config.num_attention_heads, 1/3, 2/3, 1),
                   ffn_sizes=part(config.intermediate_size, 1/6, 1/4, 1/3, 1),
                   keep_layers=config.keep_layers)

    def largest(self):
        """The largest architecture: the super-BERT itself."""
        return self.arch([n - 1 for n in self.categories])

    def smallest(self):
        """The smallest architecture."""
        return self.arch([0] * len(self.categories))

    def size(self):
        """The number of architectures, inactive layers not counted."""
        return sum(self.categories[1] ** depth for depth in self.depths)

    def check(self, arch):
        """Raise UserError, naming the legal values, unless `arch` lies in the space."""
        if arch.depth not in self.depths or not set(zip(*arch)) <= set(self.pairs):
            raise UserError(f"[{arch}] is not in the search space: depth one of {self.depths}, "
                            f"heads of {self.heads}, FFN sizes of {self.ffn_sizes}")

    def arch(self, choices):
        """Choices -> Arch. What stands at inactive layers is not looked at."""
        active = kept_layer_indices(self.keep_layers, self.depths[-1], self.depths[choices[0]])
        heads, ffn_sizes = zip(*(self.pairs[choices[1 + i]] for i in active))
        return Arch(heads, ffn_sizes)

    def choices(self, arch):
        """Arch -> choices, with None for every inactive layer."""
        self.check(arch)
        layers = [None] * self.depths[-1]
        for i, h, k in zip(kept_layer_indices(self.keep_layers, len(layers), arch.depth), *arch):
            layers[i] = self.pairs.index((h, k))
        return [self.depths.index(arch.depth)] + layers


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


# ---- The model -----------------------------------------------------------------------------------

def sliced_linear(x, linear, n_out=None, n_in=None):
    """x @ W[:n_out, :n_in].T + b[:n_out], the slice being a view. x [..., n_in] -> [..., n_out]."""
    return F.linear(x, linear.weight[:n_out, :n_in], linear.bias[:n_out])


def dropout(x, p):
    """F.dropout, always active: `p` is 0 outside of training. On a CPU that draws one number at a
    time, a good part of a step; here 64 random bits decide about four elements, which rounds `p` to
    a multiple of 2**-16."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
    # Four int16 of each int64, uniform from -2**15 on: a share p of them lies below this threshold.
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

    def forward(self, x, mask, H, F_, cls_only=False, masks=None):
        """x [B, T, C], mask [B, 1, 1, T] bool, H heads and F_ neurons of the front -> [B, T, C], or
        [B, 1, C] of the last layer, out of which only [CLS] goes to the pooler. keep: of each
        example, which of those heads [B, H] and neurons [B, F] count; the others become zero."""
        B, T, C = x.shape
        p, p_attention = (self.dropout, self.attention_dropout) if self.training else (0.0, 0.0)

        def split(x, linear):
            return sliced_linear(x, linear, H * self.D).view(B, -1, H, self.D).transpose(1, 2)
        key, value = split(x, self.key), split(x, self.value)            # [B, H, T, D]
        x = x[:, :1] if cls_only else x                                      # [B, Q, C], Q = 1 or T
        a = attention(split(x, self.query), key, value, mask, p_attention)   # [B, H, Q, D]
        if masks:
            a = a * masks[0][:, :, None, None]
        a = a.transpose(1, 2).reshape(B, -1, H * self.D)                 # [B, Q, H*D]
        a = sliced_linear(a, self.attention_out, n_in=H * self.D)         # [B, Q, C]
        x = self.attention_norm(x + dropout(a, p))
        f = self.activation(sliced_linear(x, self.ffn_in, F_))            # [B, Q, F]
        if masks:
            f = f * masks[1][:, None, :]
        f = sliced_linear(f, self.ffn_out, n_in=F_)                       # [B, Q, C]
        return self.ffn_norm(x + dropout(f, p))


class ElasticBert(nn.Module):
    """BERT with a pooler and a linear classifier; `forward` uses a part of the full weights."""

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
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def check(self, arch):
        """Raise UserError unless every size of `arch` is from 1 to what the model has."""
        own = self.config.arch
        fits = arch.depth <= own.depth and all(
            1 <= heads <= own.heads[i] and 1 <= neurons <= own.ffn_sizes[i]
            for i, heads, neurons in self.config.layers(arch))
        if not fits:
            raise UserError(f"architecture [{arch}] does not fit into the model's [{own}]")

    def forward(self, input_ids, token_type_ids, attention_mask, arch=None):
        """Three [B, T] tensors, the mask bool or 0/1 integers (1 = a token, 0 = padding) -> logits
        [B, num_labels] of the sub-BERT `arch` (None: of the whole model).
        UserError where `arch` or T exceeds what the model has."""
        arch = arch or self.config.arch
        self.check(arch)
        x = self.embed(input_ids, token_type_ids)                        # [B, T, C]
        mask = attention_mask.bool()[:, None, None, :]                   # [B, 1, 1, T]
        for n, (i, H, F_) in enumerate(self.config.layers(arch), 1):
            x = self.layers[i](x, mask, H, F_, cls_only=n == arch.depth)
        return self.head(x)                                              # [B, num_labels]

    def embed(self, input_ids, token_type_ids):
        """Two [B, T] tensors -> the hidden states before the first layer, [B, T, C]."""
        T, most = input_ids.shape[1], self.config.max_position_embeddings
        if T > most:
            raise UserError(f"{T} tokens; the model has {most} positions")
        x = (self.word_embeddings(input_ids) + self.position_embeddings.weight[:T]
             + self.token_type_embeddings(token_type_ids))
        return dropout(self.embedding_norm(x), self.config.hidden_dropout_prob * self.training)

    def head(self, x):
        """Hidden states after the last layer, [B, 1 or T, C] -> logits [B, num_labels]."""
        p = self.config.classifier_dropout
        p = self.config.hidden_dropout_prob if p is None else p
        pooled = torch.tanh(self.pooler(x[:, 0]))                        # [B, C] from [CLS]
        pooled = dropout(pooled, p * self.training)
        # In fp32 whatever the precision: bf16 would round a regression's answers.
        with torch.autocast(x.device.type, enabled=False):
            return self.classifier(pooled.float())


def forward_many(model, input_ids, token_type_ids, attention_mask, sizes):
    """What `forward` gives for several architectures, in one pass of fixed shapes, which suits
    a GPU. Every example is there once per architecture. Heads and neurons that this one lacks
    are multiplied by 0, a layer that it lacks passes its input on: slicing is masking with the
    zeros not computed. Three [B, T] tensors as above, and sizes [lambda, L, 2] of `archs_to_tensor`
    -> [lambda, B, num_labels]."""
    n, B = len(sizes), len(input_ids)
    x = model.embed(input_ids.repeat(n, 1), token_type_ids.repeat(n, 1))      # [n*B, T, C]
    mask = attention_mask.bool().repeat(n, 1)[:, None, None, :]      # [n*B, 1, 1, T]
    sizes = sizes.repeat_interleave(B, 0)                            # [n*B, L, 2]
    for i, (layer, H, F_) in enumerate(zip(model.layers, *model.config.arch)):
        h, k = sizes[:, i, :1], sizes[:, i, 1:]                      # [n*B, 1] each
        keep = (torch.arange(H, device=h.device) < h,                # [n*B, H]
                torch.arange(F_, device=k.device) < k)               # [n*B, F]
        y = layer(x, mask, H, F_, cls_only=i + 1 == len(model.layers), masks=keep)
        x = torch.where(h[:, :, None] > 0, y, x[:, :y.shape[1]])     # missing: its input
    return model.head(x).view(n, B, -1)                               # [n, B, num_labels]


def archs_to_tensor(config, archs, device=None):
    """Architectures as one tensor for `masked`, int64 [len(archs), L, 2]: heads and FFN size of
    each layer of the model, 0 and 0 where an architecture does not have it."""
    sizes = torch.zeros(len(archs), config.num_hidden_layers, 2, dtype=torch.int64)
    for row, arch in zip(sizes, archs):
        for i, *pair in config.layers(arch):
            row[i] = torch.tensor(pair)
    return sizes.to(device)


def extract(model, arch):
    """A stand-alone ElasticBert with the weights of `arch`: the same logits, nothing shared.
    UserError where `arch` exceeds `model`."""
    model.check(arch)
    config = replace(model.config, num_hidden_layers=arch.depth, keep_layers="first",
                     layer_heads=list(arch.heads), layer_ffn_sizes=list(arch.ffn_sizes))
    with torch.device("meta"):                                           # shapes without memory
        sub = ElasticBert(config, model.num_labels)
    # The layers that stay are numbered anew, and stand over the full model's first ones.
    active = nn.ModuleList(model.layers[i] for i, *_ in model.config.layers(arch))
    full = {**model.state_dict(), **active.state_dict(prefix="layers.")}
    state = {}
    for name, tensor in sub.state_dict().items():
        front = tuple(slice(n) for n in tensor.shape)                    # [:n] in every dimension
        state[name] = full[name][front].clone()
    sub.load_state_dict(state, assign=True)
    return sub.train(model.training)


@torch.no_grad()
def sort_by_importance(model, importance):
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


# ---- Weights and tokenizer on disk, under Hugging Face's names -----------------------------------

HF_NAMES = {"word_embeddings": "bert.embeddings.word_embeddings",
            "position_embeddings": "bert.embeddings.position_embeddings",
            "token_type_embeddings": "bert.embeddings.token_type_embeddings",
            "embedding_norm": "bert.embeddings.LayerNorm",
            "query": "attention.self.query", "key": "attention.self.key",
            "value": "attention.self.value", "attention_out": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm", "ffn_in": "intermediate.dense",
            "ffn_out": "output.dense", "ffn_norm": "output.LayerNorm",
            "pooler": "bert.pooler.dense", "classifier": "classifier"}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "added_tokens.json",
                   "special_tokens_map.json")


def hf_name(name):
    """Our tensor name, such as layers.3.ffn_in.weight, -> Hugging Face's."""
    *layer, module, kind = name.split(".")
    prefix = f"bert.encoder.layer.{layer[1]}." if layer else ""
    return f"{prefix}{HF_NAMES[module]}.{kind}"


def load_bert(directory, num_labels=None, labels=None):
    """ElasticBert from the config.json and model.safetensors of Hugging Face or `save_bert`, with
    `num_labels` labels (None: as many as the classifier in the file has).

    labels: the names to train on, () for regression; see `fit_classifier`. Where there is no
    classifier, a new one is initialised at random, with a line that says so, and so is the pooler
    that a model of masked words lacks. All other tensors must have exactly the names and shapes of
    the model's; UserError names the first at fault.
    """
    config, tensors = BertConfig.load(directory), read_tensors(directory)
    kinds = read_json(Path(directory) / "config.json").get("architectures")
    if kinds not in (None, ["BertForSequenceClassification"]):
        # A classifier of tokens or of choices does not classify texts.
        tensors = {name: t for name, t in tensors.items() if not name.startswith("classifier.")}
    if labels is not None:
        fit_classifier(tensors, config, labels, directory)
    if num_labels is None:
        if "classifier.weight" not in tensors:
            raise UserError(f"{directory} has no classifier: it was not fine-tuned")
        num_labels = len(torch.atleast_1d(tensors["classifier.weight"]))
    one_answer = config.problem_type == "regression"
    if one_answer != (num_labels == 1) or (config.labels and len(config.labels) != num_labels):
        raise UserError(f"{directory}: {num_labels} logits contradict its config.json: one alone "
                        'needs "problem_type": "regression"; "id2label", if any, names each')
    with torch.device("meta"):                    # no memory before the shapes are checked
        model = ElasticBert(config, num_labels)
    for name in ("classifier", "pooler"):
        if hf_name(f"{name}.weight") in tensors:
            break                                 # no new pooler under an old classifier
        n_out, n_in = getattr(model, name).weight.shape
        print_line(f"{directory}: a new {name} is initialised, {n_in} -> {n_out}")
        weight = torch.empty(n_out, n_in).normal_(std=config.initializer_range)
        tensors[hf_name(f"{name}.weight")] = weight
        tensors[hf_name(f"{name}.bias")] = torch.zeros(n_out)
    state = {}
    for name, like in model.state_dict().items():
        title = f"{directory}: tensor {hf_name(name)}"
        tensor = tensors.pop(hf_name(name), None)
        if tensor is None:
            raise UserError(f"{title} is missing")
        if tensor.shape != like.shape:
            raise UserError(f"{title} has shape {[*tensor.shape]}, expected {[*like.shape]}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise UserError(f"{title} is not all finite numbers")
        state[name] = tensor.to(torch.float32, copy=True)                # not the file, mapped
    if tensors:
        raise UserError(f"{directory}: unknown tensor {min(tensors)}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def fit_classifier(tensors, config, labels, directory):
    """Fit the classifier among `tensors` to label names, () for regression: one of the same names
    in another order is permuted; one of other names is removed, but for regression one of a single
    row is kept. `config` takes the names over."""
    known, own = config.labels, [name for name in tensors if name.startswith("classifier.")]
    rows = {tensors[name].shape[:1] for name in own}
    config.name_labels(labels)
    if rows == {(len(labels),)} and sorted(labels) == sorted(known):
        order = [known.index(name) for name in labels]
        tensors.update({name: tensors[name][order] for name in own})
    elif own and (labels or rows != {(1,)}):
        print_line(f"{directory}: its classifier, of {', '.join(known) or 'unnamed labels'}, is not used")
        for name in own:
            del tensors[name]


def weight_files(directory):
    """The safetensors files of a BERT directory: one, or those that an index names."""
    names, index = ["model.safetensors"], Path(directory, "model.safetensors.index.json")
    if index.exists() and not Path(directory, "model.safetensors").exists():
        with user_errors_for(index):
            names = sorted(set(map(str, read_json(index)["weight_map"].values())))
    return [Path(directory, name) for name in names]


def read_tensors(directory):
    """{name: tensor} of a directory's weights: without the prefixes of wrappers, the pre-training
    heads, a head for answers and the buffer `position_ids`; under today's names for old ones."""
    tensors = {}
    for path in weight_files(directory):
        if not regular_file(path).exists():
            raise UserError(f"{path} does not exist (a pytorch_model.bin becomes one by "
                            "transformers' from_pretrained(...).save_pretrained(...))")
        with user_errors_for(path, "is not a complete safetensors file"):
            found = safetensors.torch.load_file(path)
        for name, tensor in found.items():
            name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
            name = re.sub(r"^(embeddings|encoder|pooler)\.", r"bert.\1.", name)
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            if name in tensors:
                raise UserError(f"{path} has two tensors {name}, or another file has it, too")
            if not re.match(r"cls\.|qa_outputs\.|.*embeddings\.position_ids$", name):
                tensors[name] = tensor
    return tensors


def tokenizer_files(directory):
    """{name: bytes} of a BERT directory's tokenizer, to be written beside another model."""
    paths = [Path(directory) / name for name in TOKENIZER_FILES]
    return {path.name: regular_file(path).read_bytes() for path in paths if path.exists()}


def save_bert(model, directory, tokenizer=None):
    """Write config.json and model.safetensors, which `load_bert` reads back bit for bit; and, so
    that the directory stands alone, a tokenizer's files, {name: bytes}."""
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert",
              **{k: v for k, v in asdict(model.config).items() if v is not None}}
    if model.config.id2label:
        config["label2id"] = {name: i for i, name in enumerate(model.config.labels)}
    else:
        config["num_labels"] = model.num_labels   # for others, who would take two for granted
    tensors = {hf_name(n): t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    files = {"config.json": json.dumps(config, indent=2).encode() + b"\n",
             "model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"})}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in {**files, **(tokenizer or {})}.items():
        write_file(Path(directory) / name, content)


# ---- Where it computes, and how long that takes --------------------------------------------------

def select_device_and_precision(device="auto", precision="auto"):
    """(torch.device, maker of autocast contexts); "auto": the fastest device there is, and bf16
    where its hardware has units for it, else fp32. UserError where the device is missing."""
    keep_memory()                                 # here, since every program begins with this
    here = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    name = here[0] if device == "auto" else device
    if name not in here:
        raise UserError(f"--device {name}: this machine has none")
    bf16 = precision == "bf16"
    if precision == "auto" and name == "cuda":
        bf16 = torch.cuda.get_device_capability() >= (8, 0)                  # from Ampere on
    elif precision == "auto" and name == "cpu":
        units = torch.cpu.get_capabilities()
        bf16 = bool(units.get("amx_bf16") or units.get("avx512_bf16"))
    return torch.device(name), lambda: torch.autocast(name, torch.bfloat16, enabled=bf16)


def keep_memory():
    """Let malloc keep what is freed. glibc's gives the memory of every large tensor back to the
    kernel, which maps and zeroes it anew for the next."""
    with suppress(OSError, AttributeError):                              # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)                                              # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)                                      # M_TRIM_THRESHOLD


def device_name(device):
    """The GPU's name, or the processor's and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"


def peak_memory(device):
    """The most memory used so far, in MiB: the GPU's, or this process's (0 where not on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    return 0


def capture_graph(compute, pool=None):
    """(CUDA graph, result) of a function without arguments that computes on tensors which stay
    where they are: `graph.replay()` computes the result anew, without launching every kernel."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    # Twice beforehand, since what libraries load at their first use cannot be recorded.
    with torch.cuda.stream(aside):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = compute()
    return graph, result


def latency(model, T, autocast):
    """Milliseconds that one sequence of T tokens takes: the median of 20, after 3 to warm up."""
    mask = torch.ones(1, T, dtype=torch.int64, device=model.pooler.weight.device)
    ids = types = torch.zeros_like(mask)                                 # any tokens will do
    times = []
    with torch.inference_mode(), autocast():
        for _ in range(23):
            start = time.perf_counter()
            model(ids, types, mask)[0, 0].item()                         # waits for the device
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])


# ---- Files, and what is said ---------------------------------------------------------------------

@contextmanager
def user_errors_for(path, fault="is damaged, or not what it seems"):
    """Whatever is wrong with what a file says ends in a UserError that names file and fault."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:                    # tokenizers has no other class
        raise UserError(f"{path} {fault}: {str(error)[:100]}") from None


def regular_file(path):
    """The path; UserError where it is something else than a file: a pipe might never end."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a file")
    return Path(path)


def escape_control_chars(text):
    """A text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def read_json(path, otherwise="does not exist"):
    """A JSON object from a file; UserError `path otherwise` where there is none."""
    path = regular_file(path)
    if not path.exists():
        raise UserError(f"{path} {otherwise}")
    with user_errors_for(path, "is not a JSON object"):
        return {**json.loads(path.read_bytes())}  # a list or a number cannot be unpacked


def write_file(path, data):
    """Write bytes so that `path` holds the old content or the new one, never a part."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)                # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, **fields):
    """Write a JSON object, one field per line."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    write_file(path, f"{{\n{rows}\n}}\n".encode())


def fingerprint(*paths):
    """One sha256 of the names and contents of those `paths` that exist."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        if path.exists():
            with open(regular_file(path), "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def print_line(text):
    """Print a line. Where nobody reads any more, the work goes on in silence."""
    try:
        print(escape_control_chars(text), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
    except OSError as error:
        error.filename = "standard output"        # a full disk does not say where
        raise
