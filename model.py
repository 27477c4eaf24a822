"""BERT from scratch, with a forward pass that can run on a slice of the weights.

The model is BERT (Devlin et al. 2019). It is made elastic as in YOCO-BERT, Sec. 3.2.
There is one set of weights, the *super-BERT*. A *sub-BERT* is a slice of it. It keeps
some of the layers, and in each of them the first heads and the first FFN neurons.

Below, `#` is kept and `.` is sliced off, which means that it is not computed. On the
left, 2 of 4 layers are kept. On the right are the weights of one kept layer, with 2 of
3 heads and 3 of 5 FFN neurons. A weight of nn.Linear is [n_out, n_in].

    layers           query, key, value   attention_out   ffn_in              ffn_out
    first    even    [3*D, C]            [C, 3*D]        [5, C]              [C, 5]

    3  .     3  #    head 0  # # # #     # # # # . .     neuron 0  # # # #   # # # . .
    2  .     2  .            # # # #     # # # # . .     neuron 1  # # # #   # # # . .
    1  #     1  #    head 1  # # # #     # # # # . .     neuron 2  # # # #   # # # . .
    0  #     0  .            # # # #     # # # # . .     neuron 3  . . . .   # # # . .
                     head 2  . . . .     ^   ^   ^       neuron 4  . . . .   ^ ^ ^ ^ ^
                             . . . .     0   1   2                           0 1 2 3 4
                                         head                                neuron

The hidden size, the embeddings, the pooler and the classifier are never sliced. All
sub-BERTs share them. `ElasticBert.forward` takes the architecture as an argument and
computes with views of the weights. `extract` copies those slices into a smaller model.

Letters in the shape comments:

    B  batch         T  tokens        C  hidden size
    H  heads kept    D  head size     F  FFN neurons kept (in code, torch.nn.functional)
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

# Threads that wait for work should sleep, not spin. torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn


# ==================================================================================================
# Part I: the elastic BERT
# ==================================================================================================

class UserError(ValueError):
    """Raise this for a mistake that the user can fix. The message is one line."""


@dataclass
class BertConfig:
    """Hold the fields of a Hugging Face config.json that shape a BERT.

    The defaults are those of BERT-base. Two attributes follow from the fields: `head_size`,
    and `arch`, the largest architecture that the model holds. Raises ValueError if a field
    has a value that no BERT can have.
    """
    vocab_size: int = 30522
    hidden_size: int = 768                  # C
    num_hidden_layers: int = 12
    num_attention_heads: int = 12           # of a full layer
    intermediate_size: int = 3072           # FFN neurons of a full layer
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float = None        # None: the same as hidden_dropout_prob
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    problem_type: str = None                # "regression": one logit, the prediction
    id2label: dict = None                   # {"0": name, ...}: the names of the labels
    keep_layers: str = "first"              # the layers of a sub-BERT: "first" or "even"
    layer_heads: list = None                # only in a sub-BERT: heads of each layer
    layer_ffn_sizes: list = None            # only in a sub-BERT: FFN size of each layer

    def __post_init__(self):
        check_config(self)                                   # Part II: checks the values
        self.head_size = self.hidden_size // self.num_attention_heads            # D
        heads = self.layer_heads or [self.num_attention_heads] * self.num_hidden_layers
        ffn_sizes = self.layer_ffn_sizes or [self.intermediate_size] * self.num_hidden_layers
        self.arch = Arch(heads, ffn_sizes)

    @property
    def labels(self):
        """Return the label names in the order of the logits, or () if there are none."""
        return tuple(self.id2label[str(i)] for i in range(len(self.id2label or {})))

    def name_labels(self, labels):
        """Set the label names to `labels`, the names of a task, or () for regression."""
        self.id2label = {str(i): name for i, name in enumerate(labels)} or None
        self.problem_type = None if labels else "regression"

    def layers(self, arch):
        """Return a tuple of (layer index, heads, FFN size) for each layer of `arch`."""
        kept = kept_layer_indices(self.keep_layers, self.num_hidden_layers, arch.depth)
        return tuple(zip(kept, arch.heads, arch.ffn_sizes))

    @classmethod
    def load(cls, directory):
        """Read the config.json of a directory.

        Unknown fields are ignored. Raises UserError if the file is missing, or if a field
        asks for a model that this class does not describe.
        """
        path = Path(directory) / "config.json"
        values = read_config(path)                # Part II: refuses unsupported values
        names = {field.name for field in fields(cls)}
        values = {name: value for name, value in values.items() if name in names}
        with user_errors_for(path, "does not describe a BERT"):
            return cls(**values)


# ---- Architectures and the search space ----------------------------------------------------------

def kept_layer_indices(rule, num_layers, depth):
    """Return the indices of the layers that a sub-BERT of this depth keeps.

    The rule is "first", as in the paper, or "even": evenly spaced layers up to the last.

    >>> list(kept_layer_indices("first", 6, 4)), list(kept_layer_indices("even", 6, 4))
    ([0, 1, 2, 3], [0, 2, 3, 5])
    """
    if rule == "first":
        return range(depth)
    # DIFFERS from Sec. 3.2: "even" keeps evenly spaced layers instead of the first ones.
    return [(i + 1) * num_layers // depth - 1 for i in range(depth)]


class Arch(namedtuple("Arch", "heads ffn_sizes")):
    """Describe a sub-BERT (the paper's m) by the heads and FFN size of each kept layer.

    Both fields are tuples. `kept_layer_indices` says which layers of the super-BERT they
    describe.

    >>> print(Arch((12, 4), (3072, 512)))
    2 layers, heads 12 4, FFN 3072 512
    """

    def __new__(cls, heads, ffn_sizes):
        if not heads or len(heads) != len(ffn_sizes):
            raise UserError("an Arch needs a number of heads and an FFN size for each layer")
        return super().__new__(cls, tuple(heads), tuple(ffn_sizes))

    @property
    def depth(self):
        """Return the number of layers that are kept."""
        return len(self.heads)

    def __str__(self):
        heads = " ".join(map(str, self.heads))
        ffn_sizes = " ".join(map(str, self.ffn_sizes))
        return f"{self.depth} layers, heads {heads}, FFN {ffn_sizes}"


class SearchSpace:
    """Write the search space of Sec. 3.2 as categorical variables that can be sampled.

    The first variable is the depth. Then there is one variable for each layer of the
    super-BERT. It chooses a pair: the number of heads and the FFN size of that layer.
    The pairs are numbered row by row. For the example at the end:

                     1 head   2 heads
        FFN size  8     0        1
        FFN size 16     2        3
        FFN size 32     4        5

    So a pair's index is FFN index * number of head choices + heads index.
    `choices` is a list with one category index per variable. `arch(choices)` turns it
    into an Arch, and `choices(arch)` turns an Arch into a list. In the example, [0, 3, 5]
    means depth 1, and in the first layer pair 3, which is 2 heads and 16 neurons.

    A sample has an index for every layer, but its depth keeps only some of the layers, by
    default the first ones. The other layers are *inactive*, like the second in [0, 3, 5].
    An Arch does not contain them, so `choices(arch)` has None in their place. The update
    of theta must know this, because the loss says nothing about a layer that was not run.

    >>> space = SearchSpace(depths=[1, 2], heads=[1, 2], ffn_sizes=[8, 16, 32])
    >>> space.arch([0, 3, 5])
    Arch(heads=(2,), ffn_sizes=(16,))
    >>> space.choices(space.arch([0, 3, 5]))
    [0, 3, None]
    """

    def __init__(self, depths, heads, ffn_sizes, keep_layers="first"):
        # All choices are in ascending order.
        self.depths = tuple(sorted(set(depths)))
        self.heads = tuple(sorted(set(heads)))
        self.ffn_sizes = tuple(sorted(set(ffn_sizes)))
        self.keep_layers = keep_layers
        self.pairs = [(n_heads, size) for size in self.ffn_sizes for n_heads in self.heads]
        # The number of categories of each variable.
        self.categories = (len(self.depths),) + (len(self.pairs),) * self.depths[-1]

    @classmethod
    def for_config(cls, config):
        """Return the paper's search space (Sec. 4), scaled to the size of this BERT.

        For BERT-base: depths 6, 8, 10, 12, heads 4, 8, 12, FFN sizes 512, 768, 1024, 3072.
        """
        if config.layer_heads or config.layer_ffn_sizes:
            raise UserError("this is a sub-BERT: it has one architecture and no search space")

        def fractions_of(size, *fractions):
            return [max(1, round(size * fraction)) for fraction in fractions]

        return cls(depths=fractions_of(config.num_hidden_layers, 1/2, 2/3, 5/6, 1),
                   heads=fractions_of(config.num_attention_heads, 1/3, 2/3, 1),
                   ffn_sizes=fractions_of(config.intermediate_size, 1/6, 1/4, 1/3, 1),
                   keep_layers=config.keep_layers)

    def largest(self):
        """Return the largest architecture, which is the super-BERT itself."""
        return self.arch([n - 1 for n in self.categories])

    def smallest(self):
        """Return the smallest architecture."""
        return self.arch([0] * len(self.categories))

    def size(self):
        """Return the number of architectures. Inactive layers do not count."""
        return sum(len(self.pairs) ** depth for depth in self.depths)

    def check(self, arch):
        """Raise UserError, with the legal values, if `arch` is not in the space."""
        if arch.depth not in self.depths or not set(zip(*arch)) <= set(self.pairs):
            raise UserError(f"[{arch}] is not in the search space: the depth is one of "
                            f"{self.depths}, the heads are one of {self.heads} and the FFN "
                            f"sizes are one of {self.ffn_sizes}")

    def arch(self, choices):
        """Turn a list of choices into an Arch. Choices of inactive layers are not read."""
        depth = self.depths[choices[0]]
        kept = kept_layer_indices(self.keep_layers, self.depths[-1], depth)
        pairs = [self.pairs[choices[1 + i]] for i in kept]          # choices[0] is the depth
        return Arch([n_heads for n_heads, _ in pairs], [size for _, size in pairs])

    def choices(self, arch):
        """Turn an Arch into a list of choices, with None for each inactive layer."""
        self.check(arch)
        layers = [None] * self.depths[-1]
        kept = kept_layer_indices(self.keep_layers, self.depths[-1], arch.depth)
        for i, n_heads, ffn_size in zip(kept, arch.heads, arch.ffn_sizes):
            layers[i] = self.pairs.index((n_heads, ffn_size))
        return [self.depths.index(arch.depth)] + layers


def count_params(config, arch):
    """Return the number of parameters of a sub-BERT.

    By convention these are the embeddings, the kept layers and the pooler, without the
    classifier.
    """
    C, D = config.hidden_size, config.head_size
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    total = (rows + 2) * C                                      # three tables and a LayerNorm
    for n_heads, ffn_size in zip(arch.heads, arch.ffn_sizes):
        HD = n_heads * D
        total += 3 * (HD * C + HD)                              # query, key, value
        total += C * HD + C                                     # attention_out
        total += ffn_size * C + ffn_size                        # ffn_in
        total += C * ffn_size + C                               # ffn_out
        total += 2 * (C + C)                                    # two LayerNorms
    return total + C * C + C                                    # the pooler


def count_flops(config, arch, seq_len=128):
    """Return the FLOPs of one sequence: 2 per multiply-add of every matrix product.

    By convention this is the encoder and the pooler. The last layer counts in full, though
    `forward` computes most of it only for [CLS].
    """
    C, D = config.hidden_size, config.head_size
    multiply_adds = C * C                                   # the pooler
    for n_heads, ffn_size in zip(arch.heads, arch.ffn_sizes):
        HD = n_heads * D
        multiply_adds += 4 * seq_len * C * HD               # query, key, value, attention_out
        multiply_adds += 2 * seq_len * seq_len * HD         # q k', then softmax times v
        multiply_adds += 2 * seq_len * C * ffn_size         # ffn_in, ffn_out
    return 2 * multiply_adds


# ---- The model -----------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": nn.GELU(), "gelu_python": nn.GELU(), "relu": nn.ReLU(),
               "gelu_new": nn.GELU("tanh"), "gelu_pytorch_tanh": nn.GELU("tanh")}


def sliced_linear(x, linear, n_out=None, n_in=None):
    """Apply the first n_out rows and n_in columns of a linear layer. None means all.

    x [..., n_in] -> [..., n_out]. The slices are views. Nothing is copied.
    """
    if n_out is None and n_in is None:
        # Call the module itself. It may have hooks, or be a wrapper, for example LoRA's.
        return linear(x)
    return F.linear(x, linear.weight[:n_out, :n_in], linear.bias[:n_out])


def dropout(x, p):
    """Apply dropout with probability p. The caller passes p = 0 outside of training."""
    if p > 0 and x.device.type == "cpu":
        return fast_cpu_dropout(x, p)               # Part II: same distribution, faster
    return F.dropout(x, p)


def attention(q, k, v, mask, p):
    """Return softmax(q k' / sqrt(D)) v, with dropout of the softmax.

    q [B, H, T, D], or [B, H, 1, D] for [CLS]. k, v [B, H, T, D]. mask [B, 1, 1, T] bool.
    """
    if p > 0 and q.device.type == "cpu":
        return fast_cpu_attention(q, k, v, mask, p)     # Part II: same formula, faster
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


class Layer(nn.Module):
    """Run a post-norm transformer encoder layer with some or all of its heads and neurons."""

    def __init__(self, config, n_heads, ffn_size):
        super().__init__()
        C, D = config.hidden_size, config.head_size
        self.head_size, self.n_heads, self.ffn_size = D, n_heads, ffn_size
        self.query, self.key, self.value = (nn.Linear(C, n_heads * D) for _ in range(3))
        self.attention_out = nn.Linear(n_heads * D, C)
        self.attention_norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.ffn_in = nn.Linear(C, ffn_size)
        self.ffn_out = nn.Linear(ffn_size, C)
        self.ffn_norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob

    def forward(self, x, mask, n_heads, ffn_size, cls_only=False, size_masks=None):
        """Run the layer with its first n_heads heads and its first ffn_size FFN neurons.

        x           [B, T, C] -> [B, T, C]
        mask        [B, 1, 1, T] bool, False for padding
        cls_only    return only [CLS], [B, 1, C], since the pooler reads nothing else
        size_masks  (head_mask [B, H], ffn_mask [B, F]), only from forward_many in Part II
        """
        p = self.dropout if self.training else 0.0
        p_attention = self.attention_dropout if self.training else 0.0
        # The sizes of the slices. None means all.
        HD = n_heads * self.head_size if n_heads < self.n_heads else None
        n_neurons = ffn_size if ffn_size < self.ffn_size else None

        key = self.project(x, self.key, HD)                              # [B, H, T, D]
        value = self.project(x, self.value, HD)                          # [B, H, T, D]
        if cls_only:
            # [CLS] still attends to every token. From here on, T is 1 in the comments.
            x = x[:, :1]                                                 # [B, 1, C]
        query = self.project(x, self.query, HD)                          # [B, H, T, D]
        a = attention(query, key, value, mask, p_attention)              # [B, H, T, D]
        if size_masks:
            a = a * size_masks[0][:, :, None, None]
        a = a.transpose(1, 2).flatten(2)                                 # [B, T, H*D]
        a = sliced_linear(a, self.attention_out, n_in=HD)                # [B, T, C]
        x = self.attention_norm(x + dropout(a, p))

        f = sliced_linear(x, self.ffn_in, n_out=n_neurons)               # [B, T, F]
        f = self.activation(f)
        if size_masks:
            f = f * size_masks[1][:, None, :]
        f = sliced_linear(f, self.ffn_out, n_in=n_neurons)               # [B, T, C]
        return self.ffn_norm(x + dropout(f, p))

    def project(self, x, linear, HD):
        """Return the queries, keys or values of H heads. [B, T, C] -> [B, H, T, D]."""
        y = sliced_linear(x, linear, n_out=HD)                           # [B, T, H*D]
        return y.unflatten(2, (-1, self.head_size)).transpose(1, 2)


class ElasticBert(nn.Module):
    """Run a BERT with a pooler and a linear classifier, or any sub-BERT of it."""

    def __init__(self, config, num_labels):
        super().__init__()
        C = config.hidden_size
        self.config, self.num_labels = config, num_labels
        self.word_embeddings = nn.Embedding(config.vocab_size, C)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, C)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, C)
        self.embedding_norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, n_heads, ffn_size) for n_heads, ffn_size in zip(*config.arch))
        self.pooler = nn.Linear(C, C)
        self.classifier = nn.Linear(C, num_labels)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, input_ids, token_type_ids, attention_mask, arch=None):
        """Return the logits of the sub-BERT `arch`, or of the whole model if it is None.

        Three [B, T] tensors -> [B, num_labels]. The mask is bool or integer, with 1 for a
        token and 0 for padding. Raises UserError if `arch` or T exceeds the model.
        """
        arch = arch or self.config.arch
        self.check(arch)
        x = self.embed(input_ids, token_type_ids)                        # [B, T, C]
        mask = attention_mask.bool()[:, None, None, :]                   # [B, 1, 1, T]
        for n, (i, n_heads, ffn_size) in enumerate(self.config.layers(arch)):
            is_last = n == arch.depth - 1
            x = self.layers[i](x, mask, n_heads, ffn_size, cls_only=is_last)     # [B, T or 1, C]
        return self.head(x)                                              # [B, num_labels]

    def embed(self, input_ids, token_type_ids):
        """Return the hidden states before the first layer. Two [B, T] -> [B, T, C]."""
        n_tokens = input_ids.shape[1]
        n_positions = self.config.max_position_embeddings
        if n_tokens > n_positions:
            raise UserError(f"{n_tokens} tokens are too many: the model has only "
                            f"{n_positions} positions")
        positions = torch.arange(n_tokens, device=input_ids.device)      # [T]
        x = (self.word_embeddings(input_ids) + self.position_embeddings(positions)
             + self.token_type_embeddings(token_type_ids))
        return dropout(self.embedding_norm(x), self.config.hidden_dropout_prob * self.training)

    def head(self, x):
        """Return the logits, given the output of the last layer.

        [B, T, C], or [B, 1, C] for just [CLS] -> [B, num_labels].
        """
        p = self.config.classifier_dropout
        if p is None:
            p = self.config.hidden_dropout_prob
        pooled = torch.tanh(self.pooler(x[:, 0]))                        # [B, C] from [CLS]
        pooled = dropout(pooled, p * self.training)
        # Autocast must not touch the logits, since bf16 would round the predictions of a
        # regression. The logits have the dtype of the weights, fp32 unless you change it.
        with torch.autocast(x.device.type, enabled=False):
            return self.classifier(pooled.to(self.embedding_norm.weight.dtype))

    def check(self, arch):
        """Raise UserError if `arch` has more layers, heads or neurons than the model."""
        largest = self.config.arch
        fits = arch.depth <= largest.depth and all(
            1 <= n_heads <= largest.heads[i] and 1 <= ffn_size <= largest.ffn_sizes[i]
            for i, n_heads, ffn_size in self.config.layers(arch))
        if not fits:
            raise UserError(f"architecture [{arch}] does not fit into the model, "
                            f"which has at most [{largest}]")


def extract(model, arch):
    """Return a smaller ElasticBert that holds a copy of the weights of a sub-BERT.

    It gives the same logits as `model` does with `arch`. Raises UserError if `arch` does
    not fit into `model`.
    """
    model.check(arch)
    config = replace(model.config, num_hidden_layers=arch.depth, keep_layers="first",
                     layer_heads=list(arch.heads), layer_ffn_sizes=list(arch.ffn_sizes))
    # On the "meta" device a tensor has a shape, but no memory.
    with torch.device("meta"):
        sub = ElasticBert(config, model.num_labels)
    # A sub-BERT numbers its layers from 0. Store the kept layers under these numbers.
    kept = nn.ModuleList(model.layers[i] for i, *_ in model.config.layers(arch))
    full = {**model.state_dict(), **kept.state_dict(prefix="layers.")}
    state = {}
    for name, tensor in sub.state_dict().items():
        # Take the front of the full tensor in each of its dimensions.
        front = tuple(slice(n) for n in tensor.shape)
        state[name] = full[name][front].clone()
    sub.load_state_dict(state, assign=True)
    return sub.train(model.training)


# ==================================================================================================
# Part II: the machinery. You can stop here on a first reading.
# ==================================================================================================

# ---- The search space of a sub-BERT --------------------------------------------------------------

class SingleArch(SearchSpace):
    """Describe a sub-BERT as a search space of one architecture, for fine-tuning.

    Every variable has a single category. Unlike in a SearchSpace, that category can mean
    different heads and FFN sizes in different layers.
    """

    def __init__(self, arch):
        super().__init__([arch.depth], [max(arch.heads)], [max(arch.ffn_sizes)])
        self.only_arch = arch

    def check(self, arch):
        """Raise UserError if `arch` is not the only architecture."""
        if arch != self.only_arch:
            raise UserError(f"[{arch}] is not the sub-BERT, which is [{self.only_arch}]")

    def arch(self, choices):
        """Return the only architecture."""
        return self.only_arch

    def choices(self, arch):
        """Return category 0 for every variable."""
        self.check(arch)
        return [0] * len(self.categories)


# ---- Checking a configuration --------------------------------------------------------------------

# These fields of a config.json change the result. Other values of them are refused.
SUPPORTED_VALUES = {
    "model_type": ["bert"],
    "position_embedding_type": ["absolute"],
    "is_decoder": [False],
    "is_encoder_decoder": [False],
    "add_cross_attention": [False],
    "pruned_heads": [{}],
    "hidden_act": list(ACTIVATIONS),
    "problem_type": ["regression", "single_label_classification"],
    "tokenizer_class": ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"],
    "keep_layers": ["first", "even"],
    # An old spelling of keep_layers.
    "depth_keeps": ["first"],
}
# transformers writes these fields into ordinary BERT configurations. They do not change
# the logits, so name_unknown_fields leaves them out. Only load_bert reads one of them: it
# keeps a classifier only if `architectures` is BertForSequenceClassification.
HARMLESS_FIELDS = (
    "_name_or_path", "_num_labels", "architectures", "bos_token_id", "directionality",
    "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing", "label2id",
    "language", "num_labels", "output_attentions", "output_hidden_states", "output_past",
    "pad_token_id", "pooler_fc_size", "pooler_num_attention_heads",
    "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "tie_word_embeddings",
    "torch_dtype", "torchscript", "transformers_version", "use_cache")


def read_config(path):
    """Return the fields of a config.json as a dict, without those that are null.

    Raises UserError if the file is missing, if the directory holds an unfinished run, or if
    a field has an unsupported value.
    """
    directory = path.parent
    values = read_json(path, f"does not exist: {directory} is not the directory of a BERT. "
                             "To fetch one: python -m glue.download bert-base-uncased")
    if (directory / "log.jsonl").exists() and not (directory / "run.json").exists():
        raise UserError(f"{directory} holds an unfinished run: continue it with --resume")
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in values.items():
        supported = SUPPORTED_VALUES.get(name, [value])
        if value not in supported:
            raise UserError(f"{path}: {name} is {value!r}, not one of {supported}")
    if isinstance(values.get("id2label"), dict):
        # transformers also takes whole numbers as names.
        values["id2label"] = {i: str(name) if type(name) is int else name
                              for i, name in values["id2label"].items()}
    return values


def name_unknown_fields(directory):
    """Print one line to stderr that names the unknown fields of a config.json, if any.

    The line must not go to stdout, where `glue.predict` prints its answers.
    """
    path = Path(directory) / "config.json"
    known = {field.name for field in fields(BertConfig)} | set(SUPPORTED_VALUES)
    unknown = sorted(set(read_config(path)) - known - set(HARMLESS_FIELDS))
    if unknown:
        text = f"{path}: ignored fields that this project does not know: {', '.join(unknown)}"
        print(escape_control_chars(text), file=sys.stderr, flush=True)


def check_config(config):
    """Raise ValueError if a field of a BertConfig has a value that is not possible."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type not in LEGAL_VALUES or (value is None and field.default is None):
            continue
        is_legal, description = LEGAL_VALUES[field.type]
        if not is_legal(value):
            raise ValueError(f"{field.name} is {value!r:.30}, not {description}")
    for name in ("layer_heads", "layer_ffn_sizes"):
        sizes, num_layers = getattr(config, name), config.num_hidden_layers
        if sizes is not None and len(sizes) != num_layers:
            raise ValueError(f"{name} is {sizes!r:.30}, not a whole number for each layer")
    n_heads, hidden_size = config.num_attention_heads, config.hidden_size
    if hidden_size % n_heads:
        raise ValueError(f"{n_heads} heads do not divide the hidden size {hidden_size}")


def is_size(value):
    """Return whether a value can be the size of a tensor."""
    return type(value) is int and 1 <= value <= 10**6


def is_fraction(value):
    """Return whether a value is a number from 0 to less than 1."""
    return type(value) in (int, float) and 0 <= value < 1


def is_id2label(value):
    """Return whether a value maps "0", "1", ... to different label names."""
    if not isinstance(value, dict) or not all(map(is_label, value.values())):
        return False
    num_names = len(set(value.values()))
    return set(value) == {str(i) for i in range(num_names)}


def is_list_of_sizes(value):
    """Return whether a value is a list of positive whole numbers."""
    if not isinstance(value, list):
        return False
    return all(map(is_size, value))


def is_label(name):
    """Return whether a value can name a label: a text that prints as one line."""
    # Control characters, line separators and halves of surrogate pairs would break it.
    unprintable = r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return isinstance(name, str) and name != "" and not re.search(unprintable, name)


# For each type of a BertConfig field: a function that checks a value, and a description of
# the legal values. Fields of type str are not here, because read_config compares them with
# SUPPORTED_VALUES.
LEGAL_VALUES = {
    int: (is_size, "a whole number from 1 to 1000000"),
    float: (is_fraction, "a number from 0 to less than 1"),
    dict: (is_id2label, '{"0": name, ...}, different printable names'),
    list: (is_list_of_sizes, "a whole number for each layer"),
}


# ---- Sorting by importance -----------------------------------------------------------------------

@torch.no_grad()
def sort_by_importance(model, importance):
    """Sort the heads and FFN neurons of every layer in place, most important first.

    importance: for each layer, a tensor with one number per head, and a tensor with one
    number per FFN neuron. The largest architecture still computes the same function.
    """
    for layer, (head_importance, neuron_importance) in zip(model.layers, importance):
        heads = head_importance.argsort(descending=True, stable=True).cpu()
        neurons = neuron_importance.argsort(descending=True, stable=True)
        # The rows of a head are adjacent: rows[h] holds the row numbers of head h.
        rows = torch.arange(len(heads) * layer.head_size).view(-1, layer.head_size)
        rows = rows[heads].flatten()
        for linear in (layer.query, layer.key, layer.value):
            sort_outputs(linear, rows)
        sort_inputs(layer.attention_out, rows)
        sort_outputs(layer.ffn_in, neurons)
        sort_inputs(layer.ffn_out, neurons)


def sort_outputs(linear, order):
    """Reorder the outputs of a linear layer in place."""
    linear.weight.copy_(linear.weight[order])
    linear.bias.copy_(linear.bias[order])


def sort_inputs(linear, order):
    """Reorder the inputs of a linear layer in place."""
    linear.weight.copy_(linear.weight[:, order])


# ---- Weights and tokenizer files on disk, with the names of Hugging Face -------------------------

HF_NAMES = {
    "word_embeddings": "bert.embeddings.word_embeddings",
    "position_embeddings": "bert.embeddings.position_embeddings",
    "token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json",
                   "added_tokens.json", "special_tokens_map.json")


def hf_name(name):
    """Translate our tensor name, like layers.3.ffn_in.weight, to Hugging Face's name."""
    *layer, module, parameter = name.split(".")
    prefix = f"bert.encoder.layer.{layer[1]}." if layer else ""
    return f"{prefix}{HF_NAMES[module]}.{parameter}"


def load_bert(directory, num_labels=None, labels=None):
    """Load an ElasticBert from the config.json and model.safetensors in a directory.

    num_labels: the number of logits, by default as many as the classifier in the file has.
    labels: the names of the labels to train on, () for regression. If they are given, the
    classifier is fitted to them (see fit_classifier), and a printed line says how.

    If the file has no classifier, the model gets a random one, and also a random pooler if
    there is none. All other tensors must be in the file, with the names and shapes of the
    model. Raises UserError if a tensor is missing, unknown or of the wrong shape.
    """
    config, tensors = BertConfig.load(directory), read_tensors(directory)
    name_unknown_fields(directory)
    values = read_config(Path(directory) / "config.json")
    if values.get("architectures") not in (None, ["BertForSequenceClassification"]):
        # The classifier of another architecture does not classify texts.
        tensors = {n: t for n, t in tensors.items() if not n.startswith("classifier.")}
    if labels is not None:
        print_line(f"{directory}: classifier {fit_classifier(tensors, config, labels)}")
    if num_labels is None:
        if "classifier.weight" not in tensors:
            raise UserError(f"{directory} has no classifier: it was not fine-tuned")
        num_labels = len(torch.atleast_1d(tensors["classifier.weight"]))
    check_num_labels(config, num_labels, directory)
    check_num_layers(config, tensors, directory)
    # On the "meta" device the model takes no memory until its shapes have been checked.
    with torch.device("meta"):
        model = ElasticBert(config, num_labels)
    new_heads = missing_heads(tensors)
    state = move_to_state(tensors, model, new_heads, directory)
    for name in new_heads:
        weight = torch.empty(getattr(model, name).weight.shape)
        state[f"{name}.weight"] = weight.normal_(std=config.initializer_range)
        state[f"{name}.bias"] = torch.zeros(len(weight))
    if "pooler" in new_heads:
        print_line(f"{directory}: pooler new")
    model.load_state_dict(state, assign=True)
    return model.eval()


def fit_classifier(tensors, config, labels):
    """Fit the classifier in `tensors` to the label names of a task, () for regression.

    If it has the same names in another order, its rows are permuted. If it has other
    names, it is removed. LABEL_i, the default name in transformers, is label i of a task
    with the labels 0, 1, 2, ... For a regression, a classifier with a single row is kept.
    The names in `config` become those of the task. Return a text that says what was done.
    """
    old_labels = config.labels
    config.name_labels(labels)
    names = [name for name in tensors if name.startswith("classifier.")]
    if not names:
        return "new"
    num_rows = {len(torch.atleast_1d(tensors[name])) for name in names}
    indices = range(max(num_rows))
    default_labels = tuple(f"LABEL_{i}" for i in indices)
    numbers = tuple(map(str, indices))
    # transformers does not write the names of two labels if they are the default names.
    old_labels = old_labels or default_labels
    is_default, hint = old_labels == default_labels, ""
    if is_default and sorted(labels) == sorted(numbers):
        old_labels, hint = numbers, " (LABEL_i is i)"
    if num_rows == {1} and not labels:
        return "kept: one score"
    if num_rows == {len(labels)} and sorted(labels) == sorted(old_labels):
        order = [old_labels.index(label) for label in labels]
        for name in names:
            tensors[name] = tensors[name][order]
        verb = "kept" if order == sorted(order) else "permuted"
        return f"{verb}: {list_names(labels)}{hint}"
    for name in names:
        del tensors[name]
    if num_rows == {1}:
        return "new: the checkpoint predicted a score"
    if is_default and num_rows == {len(labels)}:
        hint = ". To keep their weights, name them in id2label of its config.json"
    return f"new: the checkpoint's labels were {list_names(old_labels)}{hint}"


def list_names(names):
    """Return the first ten names in one text, and three dots if there are more."""
    shown = list(names[:10])
    if len(names) > 10:
        shown.append("...")
    return ", ".join(shown)


def check_num_labels(config, num_labels, directory):
    """Raise UserError if config.json contradicts the number of logits."""
    is_regression = config.problem_type == "regression"
    is_named = not config.labels or len(config.labels) == num_labels
    if is_regression != (num_labels == 1) or not is_named:
        raise UserError(f"{directory}: config.json does not fit {num_labels} logits. Set "
                        '"problem_type" to "regression" for a single logit, and only then. '
                        'Let "id2label" name every logit, or remove it')


def check_num_layers(config, tensors, directory):
    """Raise UserError if config.json has more or fewer layers than the weights.

    Building thousands of layers takes minutes, even on the "meta" device. So load_bert
    compares this number first.
    """
    layers = {name.split(".")[3] for name in tensors if name.startswith("bert.encoder.layer.")}
    if len(layers) != config.num_hidden_layers:
        raise UserError(f"{directory}: num_hidden_layers in config.json is "
                        f"{config.num_hidden_layers}, but the weights have {len(layers)} layers")


def missing_heads(tensors):
    """Return which of "classifier" and "pooler" load_bert must initialise at random."""
    if hf_name("classifier.weight") in tensors:
        # A trained classifier needs the pooler that it was trained with. So a missing pooler
        # is an error, which move_to_state raises.
        return []
    if hf_name("pooler.weight") in tensors:
        return ["classifier"]
    return ["classifier", "pooler"]


def move_to_state(tensors, model, new_heads, directory):
    """Move `tensors` into a state dict of the model without `new_heads`, and return it.

    Each tensor leaves `tensors` when it is copied, so that nothing is in memory twice.
    Raises UserError if a tensor is missing, unknown, of the wrong shape or not finite.
    """
    state = {}
    for name, parameter in model.state_dict().items():
        if name.split(".")[0] in new_heads:
            continue
        title = f"{directory}: tensor {hf_name(name)}"
        tensor = tensors.pop(hf_name(name), None)
        if tensor is None:
            raise UserError(f"{title} is missing")
        if tensor.shape != parameter.shape:
            expected = [*parameter.shape]
            raise UserError(f"{title} has shape {[*tensor.shape]}, expected {expected}")
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise UserError(f"{title} is not all finite numbers")
        # Copy the tensor, because the loaded one is a view of the mapped file.
        state[name] = tensor.to(torch.float32, copy=True)
    if tensors:
        raise UserError(f"{directory}: unknown tensor {min(tensors)}")
    return state


def weight_files(directory):
    """Return the paths of the safetensors files: one, or those that an index names."""
    single = Path(directory) / "model.safetensors"
    index = Path(directory) / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    with user_errors_for(index):
        names = sorted(set(map(str, read_json(index)["weight_map"].values())))
    return [Path(directory) / name for name in names]


def read_tensors(directory):
    """Read the weights of a directory and return {Hugging Face name: tensor}.

    Old names are replaced with new ones, and the prefixes of wrappers are removed. Some
    tensors are left out: heads for pre-training or for question answering, and the buffer
    `position_ids`.
    """
    tensors = {}
    for path in weight_files(directory):
        if not regular_file(path).exists():
            raise UserError(f"{path} does not exist. To make it from pytorch_model.bin, use "
                            "transformers: from_pretrained(...).save_pretrained(...)")
        with user_errors_for(path, "is not a complete safetensors file"):
            tensors_of_file = safetensors.torch.load_file(path)
        for name, tensor in tensors_of_file.items():
            name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
            name = re.sub(r"^(embeddings|encoder|pooler)\.", r"bert.\1.", name)
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            if name in tensors:
                raise UserError(f"{path} has two tensors {name}, or another file has it too")
            if not re.match(r"cls\.|qa_outputs\.|.*embeddings\.position_ids$", name):
                tensors[name] = tensor
    return tensors


def tokenizer_files(directory):
    """Return the files of a BERT's tokenizer as {name: bytes}, for save_bert."""
    paths = [Path(directory) / name for name in TOKENIZER_FILES]
    existing = [regular_file(path) for path in paths if path.exists()]
    return {path.name: path.read_bytes() for path in existing}


def save_bert(model, directory, tokenizer=None):
    """Write config.json and model.safetensors, which load_bert reads back bit for bit.

    tokenizer: {name: bytes}, the files of a tokenizer, which are written too.
    """
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    for name, value in asdict(model.config).items():
        if value is not None:
            config[name] = value
    if model.config.id2label:
        config["label2id"] = {name: i for i, name in enumerate(model.config.labels)}
    else:
        # transformers assumes two labels if it finds no number.
        config["num_labels"] = model.num_labels
    tensors = {hf_name(name): tensor.detach().cpu().contiguous()
               for name, tensor in model.state_dict().items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    files = {"config.json": json.dumps(config, indent=2).encode() + b"\n",
             "model.safetensors": weights, **(tokenizer or {})}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(Path(directory) / name, content)


# ---- Faster, same results ------------------------------------------------------------------------

def fast_cpu_dropout(x, p):
    """Apply dropout with 16 random bits per element.

    F.dropout on a CPU draws one random number per element, which takes a good part of a
    training step. Here one draw of 64 bits serves four elements. This rounds p to a
    multiple of 2**-16.
    """
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None)
    # As int16, these are uniform from -2**15 to 2**15 - 1, one number per element. A share
    # p of them is below the threshold.
    uniform = bits.view(torch.int16)[:x.numel()].view(x.shape)
    keep = uniform >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def fast_cpu_attention(q, k, v, mask, p):
    """Compute the same formula as `attention`, for training on a CPU.

    PyTorch has no fused attention with dropout for CPUs, and its fallback is slow.
    """
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)              # [B, H, T, T]
    weights = weights.masked_fill_(~mask, -torch.inf).softmax(-1)
    return dropout(weights, p) @ v                                       # [B, H, T, D]


def forward_many(model, input_ids, token_type_ids, attention_mask, sizes):
    """Return the logits of several architectures in one pass, [n_archs, B, num_labels].

    The logits of each architecture equal those of `forward`. The batch is repeated once
    per architecture. The outputs of heads and neurons that an architecture drops are
    multiplied by 0. A dropped layer returns its input. Slicing computes less. But in this
    pass no shape depends on the architectures, so a GPU can replay it as a CUDA graph.

    Takes three [B, T] tensors as `forward` does, and sizes [n_archs, num_layers, 2] from
    archs_to_tensor.
    """
    n_archs, B = len(sizes), len(input_ids)
    # N in the comments is n_archs * B.
    x = model.embed(input_ids.repeat(n_archs, 1), token_type_ids.repeat(n_archs, 1))
    mask = attention_mask.bool().repeat(n_archs, 1)[:, None, None, :]    # [N, 1, 1, T]
    sizes = sizes.repeat_interleave(B, 0)                                # [N, layers, 2]
    largest = model.config.arch
    for i, (n_heads, ffn_size) in enumerate(zip(largest.heads, largest.ffn_sizes)):
        heads_kept, neurons_kept = sizes[:, i, :1], sizes[:, i, 1:]      # [N, 1] each
        head_mask = torch.arange(n_heads, device=sizes.device) < heads_kept      # [N, H]
        ffn_mask = torch.arange(ffn_size, device=sizes.device) < neurons_kept    # [N, F]
        is_last = i == largest.depth - 1
        y = model.layers[i](x, mask, n_heads, ffn_size, cls_only=is_last,
                            size_masks=(head_mask, ffn_mask))            # [N, T or 1, C]
        is_kept = heads_kept[:, :, None] > 0                             # [N, 1, 1]
        x = torch.where(is_kept, y, x[:, :y.shape[1]])
    return model.head(x).view(n_archs, B, -1)


def archs_to_tensor(config, archs, device=None):
    """Turn architectures into one tensor for forward_many.

    int64 [n_archs, num_layers, 2]: the heads and the FFN size of each layer, or 0 and 0 if
    the layer is not kept.
    """
    sizes = torch.zeros(len(archs), config.num_hidden_layers, 2, dtype=torch.int64)
    for arch_sizes, arch in zip(sizes, archs):
        for i, n_heads, ffn_size in config.layers(arch):
            arch_sizes[i] = torch.tensor([n_heads, ffn_size])
    return sizes.to(device)


def capture_graph(compute, pool=None):
    """Record a function as a CUDA graph. Return the graph and the result of the function.

    The function takes no arguments and reads tensors that stay where they are in memory.
    `graph.replay()` then computes the result again without launching every kernel.
    """
    # Run the function twice first, since libraries load things at their first use, and
    # that cannot be recorded.
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = compute()
    return graph, result


def keep_memory():
    """Stop glibc from returning the memory of freed tensors to the kernel.

    Otherwise every large tensor costs page faults: the kernel maps and zeroes new pages.
    """
    # Another C library does not have this setting.
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)                          # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)                  # M_TRIM_THRESHOLD


# ---- Device, precision, latency, memory ----------------------------------------------------------

def select_device_and_precision(device="auto", precision="auto"):
    """Return a torch.device and a function that makes autocast contexts.

    The device "auto" is the first of cuda, mps and cpu that this machine has. The
    precision "auto" is bf16 if the device has hardware for it, else fp32. Raises
    UserError if the device is missing.
    """
    # train, search, eval and predict all call this function, so it also sets up malloc.
    keep_memory()
    gpus = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    available = gpus + ["cpu"]
    name = available[0] if device == "auto" else device
    if name not in available:
        raise UserError(f"--device {name}: this machine has none. Use --device auto")
    bf16 = precision == "bf16"
    if precision == "auto" and name == "cuda":
        bf16 = torch.cuda.get_device_capability() >= (8, 0)          # Ampere and later
    elif precision == "auto" and name == "cpu":
        features = torch.cpu.get_capabilities()
        bf16 = bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    return torch.device(name), lambda: torch.autocast(name, torch.bfloat16, enabled=bf16)


def device_name(device):
    """Return the name of the GPU, or the processor's name and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search("model name.*: (.*)", cpuinfo.read_text())
        processor = match[1] if match else processor
    return f"{processor}, {torch.get_num_threads()} threads"


def latency(model, n_tokens, autocast, device=None):
    """Return the milliseconds for one sequence of n_tokens tokens: the median of 20 runs.

    device: needed only if `model` is not an ElasticBert but some other function.
    """
    warm_up, repeats = 3, 20
    device = device or model.embedding_norm.weight.device
    mask = torch.ones(1, n_tokens, dtype=torch.int64, device=device)
    # The time does not depend on which tokens these are.
    ids = types = torch.zeros_like(mask)
    times = []
    with torch.inference_mode(), autocast():
        for _ in range(warm_up + repeats):
            start = time.perf_counter()
            # .item() waits until the device has finished.
            model(ids, types, mask)[0, 0].item()
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[warm_up:])


def peak_memory(device):
    """Return the peak memory of the GPU or of this process in MiB, or 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux only.
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10
    return 0


# ---- Files and messages --------------------------------------------------------------------------

def open_closed_streams():
    """Connect each standard stream that is closed to the null device.

    Otherwise the next file that a program opens would take the place of the stream, and
    messages would go into the file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # os.open takes the lowest descriptor that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
    # If sys.stderr were None, print would write errors to stdout, among the answers.
    sys.stderr = sys.stderr or open(os.devnull, "w")


@contextmanager
def user_errors_for(path, fault="is damaged or in an unexpected format"):
    """Turn any error while parsing a file into a UserError that names the file."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    # The tokenizers library raises plain Exceptions.
    except Exception as error:
        raise UserError(f"{path} {fault}: {str(error)[:100]}") from None


def regular_file(path):
    """Return the path, or raise UserError if it exists but is not a regular file.

    Reading a pipe, for example, could hang.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a file")
    return Path(path)


def escape_control_chars(text):
    """Escape characters that could control a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def read_json(path, otherwise="does not exist"):
    """Read a JSON object from a file.

    Raises UserError with the text `path otherwise` if the file does not exist.
    """
    path = regular_file(path)
    if not path.exists():
        raise UserError(f"{path} {otherwise}")
    with user_errors_for(path, "is not a JSON object"):
        # Unpacking raises if the JSON value is a list or a number.
        return {**json.loads(path.read_bytes())}


def write_file(path, data):
    """Write bytes so that the file holds the old or the new content, never a part."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The error of a full disk does not name the file.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, **values):
    """Write a JSON object with one field per line."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}"
                       for name, value in values.items())
    write_file(path, f"{{\n{lines}\n}}\n".encode())


def fingerprint(*paths):
    """Return one sha256 of the names and contents of all files that exist."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        if path.exists():
            with open(regular_file(path), "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            digest.update(path.name.encode() + content)
    return digest.hexdigest()


def print_line(text):
    """Print a line. If nobody reads the output any more, continue without printing."""
    try:
        print(escape_control_chars(text), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
    except OSError as error:
        # The error of a full disk does not name the file.
        error.filename = "standard output"
        raise
