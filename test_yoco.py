"""Test every claim against a truth that does not come from the code under test.

    pytest -q                          everything that needs no download
    GLUE_DIR=... pytest -q             also the row counts of the real GLUE files
    MINILM_DIR=... pytest -q           also logits and token ids on all-MiniLM-L6-v2
    YOCO_TEST_GPU=1 pytest -q          also what a GPU computes

Part I tests the method in the order of model.py, data.py and yoco.py, and then the three
commands. Part II tests the machinery: files, refusals, resuming, several processes, the GPU.
"""

import os

# Hide the GPUs before torch looks for them.
if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# The models are so small that a second thread would only cost time.
os.environ["OMP_NUM_THREADS"] = "1"

import ast
import contextlib
import copy
import csv
import dataclasses
import doctest
import inspect
import itertools
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import glue
import model as model_module
import yoco
from glue import predict
from model import (Arch, archs_to_tensor, attention, BertConfig, count_flops, count_params,
                   dropout, ElasticBert, extract, latency, load_bert, save_bert, SearchSpace,
                   sort_by_importance, UserError)
from yoco import Categorical

ROOT = Path(__file__).parent
MINILM = Path(os.environ.get("MINILM_DIR", ROOT / "all-MiniLM-L6-v2"))
GLUE = Path(os.environ["GLUE_DIR"]) if "GLUE_DIR" in os.environ else None
GPU = os.environ.get("YOCO_TEST_GPU") == "1"

needs_minilm = pytest.mark.skipif(
    not (MINILM / "model.safetensors").exists(),
    reason="no MiniLM weights: python -m glue.download all-MiniLM-L6-v2, or MINILM_DIR")
needs_glue = pytest.mark.skipif(
    not GLUE, reason="GLUE_DIR does not name the real GLUE files")
needs_gpu = pytest.mark.skipif(
    not GPU, reason="YOCO_TEST_GPU=1 lets the tests use a GPU")

torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C. The tests of signals need Python's handler.
signal.signal(signal.SIGINT, signal.default_int_handler)


# ==================================================================================================
# Part I: the method.
# ==================================================================================================

# ---- model.py: one set of weights, many smaller BERTs --------------------------------------------

NO_AUTOCAST = contextlib.nullcontext
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def small_config(**changes):
    """Return a BERT's configuration: 4 layers, 6 heads of size 4, FFN size 48.

    Its space has the depths {2, 3, 4}, heads {2, 4, 6} and FFN sizes {8, 12, 16, 48}.
    """
    fields = dict(vocab_size=50, hidden_size=24, num_hidden_layers=4,
                  num_attention_heads=6, intermediate_size=48,
                  max_position_embeddings=20, initializer_range=0.2)
    return BertConfig(**fields | changes)


def small_model(num_labels=3, seed=0, **changes):
    """Return an ElasticBert of `small_config` with random weights.

    Biases and LayerNorms are random too, so that a test notices if one is left out.
    """
    torch.manual_seed(seed)
    model = ElasticBert(small_config(**changes), num_labels).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm.weight" in name else 0.0, 0.2)
    return model


def small_batch(B=5, T=11, seed=1):
    """Return random input_ids, token_type_ids and attention_mask, each [B, T].

    Every row has a different length: T, T - 1, T - 2, ...
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (B, T), generator=g)
    token_types = torch.randint(0, 2, (B, T), generator=g)
    lengths = torch.tensor([T - row for row in range(B)])
    mask = torch.arange(T)[None, :] < lengths[:, None]
    return ids, token_types, mask


def some_archs(config, count=4):
    """Return the smallest, the largest, and `count` random architectures."""
    space = SearchSpace.for_config(config)
    uniform = Categorical(space.categories)
    rng = np.random.default_rng(0)
    sampled = [space.arch(uniform.sample(rng)) for _ in range(count)]
    return [space.smallest(), space.largest()] + sampled


def random_archs(config, count, seed):
    """Return `count` architectures of any depth, any heads and any FFN sizes.

    They need not lie in the search space.
    """
    rng = np.random.default_rng(seed)
    largest = config.arch
    depths = rng.integers(1, largest.depth + 1, count)
    return [Arch(rng.integers(1, largest.heads[0] + 1, depth).tolist(),
                 rng.integers(1, largest.ffn_sizes[0] + 1, depth).tolist())
            for depth in depths]


def count_weights(model):
    """Count the parameters of a model, without its classifier."""
    return sum(weight.numel() for name, weight in model.named_parameters()
               if "classifier" not in name)


def assert_close(actual, expected):
    """Assert that two tensors agree to 1e-5 of the largest element."""
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def state_for_torch(layer):
    """Return a layer's weights under the names of torch's TransformerEncoderLayer."""
    qkv = (layer.query, layer.key, layer.value)
    state = {"self_attn.in_proj_weight": torch.cat([linear.weight for linear in qkv]),
             "self_attn.in_proj_bias": torch.cat([linear.bias for linear in qkv])}
    modules = {"self_attn.out_proj": layer.attention_out,
               "linear1": layer.ffn_in,
               "linear2": layer.ffn_out,
               "norm1": layer.attention_norm,
               "norm2": layer.ffn_norm}
    for name, module in modules.items():
        state[f"{name}.weight"] = module.weight
        state[f"{name}.bias"] = module.bias
    return state


def test_initial_weights():
    """A new model has normal weights of the configuration's size, and biases of 0.

    LayerNorms begin as the identity.
    """
    torch.manual_seed(0)
    model = ElasticBert(small_config(initializer_range=0.05), 3)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        elif "norm" in name:
            assert (weight == 1).all()
        else:
            # Five standard deviations of the mean and of the standard deviation.
            tolerance = 5 * 0.05 / weight.numel() ** 0.5
            assert abs(weight.mean()) < tolerance
            assert abs(weight.std() - 0.05) < tolerance


def test_equals_torch_transformer():
    """Compare the full model with torch.nn.TransformerEncoder, given the same weights.

    Both are post-norm and use gelu. The embeddings, the pooler and the classifier are
    written out here.
    """
    model = small_model()
    ids, token_types, mask = small_batch()
    eps = model.config.layer_norm_eps

    encoder_layer = torch.nn.TransformerEncoderLayer(
        24, 6, 48, activation="gelu", batch_first=True, layer_norm_eps=eps)
    encoder = torch.nn.TransformerEncoder(encoder_layer, 4).eval()
    for layer, torch_layer in zip(model.layers, encoder.layers, strict=True):
        torch_layer.load_state_dict(state_for_torch(layer))

    x = (F.embedding(ids, model.word_embeddings.weight)
         + F.embedding(token_types, model.token_type_embeddings.weight)
         + model.position_embeddings.weight[:ids.shape[1]])
    norm = model.embedding_norm
    x = F.layer_norm(x, (24,), norm.weight, norm.bias, eps)
    x = encoder(x, src_key_padding_mask=~mask)
    expected = model.classifier(torch.tanh(model.pooler(x[:, 0])))

    # The mask may be bool or 0/1 integers.
    assert torch.allclose(model(ids, token_types, mask), expected, atol=1e-5)
    assert torch.allclose(model(ids, token_types, mask.long()), expected, atol=1e-5)


# Three texts, and the token ids that transformers 5.23.0 gives with MiniLM's vocabulary.
MINILM_TEXTS = [
    ("The cat sat on the mat .", "A feline rested upon a rug ."),
    ("Prices rose by 3 % in May .", "It rained ."),
    ("No second part here , just one long sentence that goes on .", None),
]
MINILM_IDS = [
    [101, 1996, 4937, 2938, 2006, 1996, 13523, 1012, 102,
     1037, 10768, 4179, 8614, 2588, 1037, 20452, 1012, 102],
    [101, 7597, 3123, 2011, 1017, 1003, 1999, 2089, 1012, 102,
     2009, 28270, 1012, 102],
    [101, 2053, 2117, 2112, 2182, 1010, 2074, 2028, 2146, 6251, 2008, 3632, 2006, 1012,
     102],
]
# The second text of each pair starts here. The third row has no second text.
MINILM_SECOND_TEXT_AT = [9, 10, 15]


def minilm_examples():
    """Return the three stored texts as encoded examples."""
    return [data.Encoded(ids, [0] * split + [1] * (len(ids) - split), 0)
            for ids, split in zip(MINILM_IDS, MINILM_SECOND_TEXT_AT, strict=True)]


@needs_minilm
def test_equals_hugging_face():
    """Compare logits with stored ones of transformers' BertForSequenceClassification.

    They come from transformers 5.23.0. Both use the real MiniLM weights, and a
    classifier whose weights are sines.
    """
    model = load_bert(MINILM, 3)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.sin(torch.arange(3 * 384.)).view(3, 384))
        model.classifier.bias.zero_()
        logits = model(*data.collate(minilm_examples(), range(3))[:3])
    expected = [[0.425027, 0.998575, 1.068916],
                [0.006471, 0.962373, 1.433312],
                [-0.038301, 0.737339, 1.141414]]
    assert torch.allclose(logits, torch.tensor(expected), atol=1e-5)


def test_slice_equals_extracted(tmp_path):
    """Compare slices of the super-BERT with extracted sub-BERTs.

    A sub-BERT is also saved and loaded. All three give the same logits. The sub-BERTs
    have as many parameters as count_params says.
    """
    model = small_model()
    batch = small_batch()
    for arch in some_archs(model.config):
        expected = model(*batch, arch)
        extracted = extract(model, arch)
        save_bert(extracted, tmp_path)
        loaded = load_bert(tmp_path, 3)
        for sub_bert in (extracted, loaded):
            assert torch.allclose(sub_bert(*batch), expected, atol=1e-6)
            assert sub_bert.config.arch == arch
            assert count_weights(sub_bert) == count_params(model.config, arch)
        before, after = extracted.state_dict(), loaded.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_extracted_model_owns_its_memory():
    """An extracted model shares no tensor with the model that it was cut from."""
    model = small_model()
    addresses = {weight.data_ptr() for weight in model.parameters()}
    for arch in some_archs(model.config):
        sub_bert = extract(model, arch)
        assert not addresses & {weight.data_ptr() for weight in sub_bert.parameters()}


@pytest.mark.parametrize("dtype, tolerance", [
    pytest.param(torch.float16, 5e-3, id="half"),
    pytest.param(torch.bfloat16, 5e-2, id="bfloat16"),
    pytest.param(torch.float64, 5e-6, id="double"),
])
def test_other_number_types(dtype, tolerance):
    """Compare the logits of half(), bfloat16() and double() with those in fp32.

    The model trains in these types, too, with dropout.
    """
    model, batch = small_model(), small_batch()
    arch = Arch((2, 6, 4), (8, 48, 12))
    for module, arch in ((extract(model, arch), None), (model, None), (model, arch)):
        expected = module(*batch, arch)
        converted = copy.deepcopy(module).to(dtype)
        logits = converted(*batch, arch)
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)
        converted.train()(*batch, arch).sum().backward()
        assert converted.pooler.weight.grad.any()


@pytest.mark.filterwarnings("ignore")
def test_quantized_sub_bert():
    """Compare the logits of int8 weights with those in fp32. The latency can be measured."""
    sub_bert, batch = extract(small_model(), Arch((2, 6, 4), (8, 48, 12))), small_batch()
    quantized = torch.ao.quantization.quantize_dynamic(sub_bert, {torch.nn.Linear})
    assert not any(type(module) is torch.nn.Linear for module in quantized.modules())
    logits = quantized(*batch)
    assert not torch.equal(logits, sub_bert(*batch))
    torch.testing.assert_close(logits, sub_bert(*batch), atol=0.1, rtol=0)
    assert latency(quantized, 7, NO_AUTOCAST) > 0


def test_hooks_see_every_call():
    """A forward hook sees each linear layer, embedding and LayerNorm once per pass.

    In a super-BERT it sees each once with the largest architecture.
    """
    model = small_model()
    for module in (model, extract(model, Arch((2, 6, 4), (8, 48, 12)))):
        calls = []
        names = [name for name, part in module.named_modules() if hasattr(part, "weight")]
        for name in names:
            module.get_submodule(name).register_forward_hook(
                lambda *_, name=name: calls.append(name))
        module(*small_batch())
        assert sorted(calls) == sorted(names)


class LoRA(torch.nn.Module):
    """Add a trainable matrix of rank 2 to a linear layer, as peft's lora.Linear does."""

    def __init__(self, base_layer, has_attributes):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        n_out, n_in = base_layer.weight.shape
        self.a = torch.nn.Parameter(0.1 * torch.randn(2, n_in))
        self.b = torch.nn.Parameter(0.1 * torch.randn(n_out, 2))
        if has_attributes:
            self.in_features, self.out_features = n_in, n_out
            self.weight, self.bias = base_layer.weight, base_layer.bias

    def forward(self, x):
        """Return the base layer's output plus that of the two thin matrices."""
        return self.base_layer(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("has_attributes", [
    pytest.param(True, id="like-peft"),
    pytest.param(False, id="without-attributes-of-a-linear-layer"),
])
def test_lora(has_attributes):
    """A sub-BERT with LoRA in all linear layers computes what the merged weights compute.

    Every matrix of LoRA gets a gradient.
    """
    sub_bert, batch = extract(small_model(), Arch((2, 6, 4), (8, 48, 12))), small_batch()
    merged = copy.deepcopy(sub_bert)
    wrappers = []
    for name, linear in list(sub_bert.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            wrapper = LoRA(linear, has_attributes)
            parent, _, attribute = name.rpartition(".")
            setattr(sub_bert.get_submodule(parent), attribute, wrapper)
            merged.get_submodule(name).weight.data += wrapper.b.data @ wrapper.a.data
            wrappers.append(wrapper)
    assert len(wrappers) == 3 * 6 + 2
    torch.testing.assert_close(sub_bert(*batch), merged(*batch))
    sub_bert(*batch).pow(2).sum().backward()
    assert all(wrapper.a.grad.any() and wrapper.b.grad.any() for wrapper in wrappers)


@pytest.mark.parametrize("num_layers, depth, evenly_spaced", [
    pytest.param(12, 6, [1, 3, 5, 7, 9, 11], id="6-of-12"),
    pytest.param(6, 3, [1, 3, 5], id="3-of-6"),
    pytest.param(4, 1, [3], id="1-of-4"),
    pytest.param(6, 4, [0, 2, 3, 5], id="4-of-6"),
    pytest.param(6, 5, [0, 1, 2, 3, 5], id="5-of-6"),
    pytest.param(2, 2, [0, 1], id="2-of-2"),
])
def test_kept_layer_indices(num_layers, depth, evenly_spaced):
    """Compare the layers that a smaller depth keeps with lists by hand.

    The last layer is always kept if they are evenly spaced.
    """
    kept = model_module.kept_layer_indices
    assert list(kept("even", num_layers, depth)) == evenly_spaced
    assert list(kept("first", num_layers, depth)) == list(range(depth))


def test_evenly_spaced_depth(tmp_path):
    """Compare evenly spaced layers with a model whose layers were moved by hand.

    A saved copy and an extracted sub-BERT give the same logits.
    """
    model = small_model(keep_layers="even")
    batch = small_batch()
    space = SearchSpace.for_config(model.config)
    arch = Arch((2, 6), (48, 8))
    assert space.choices(arch) == [0, None, 9, None, 2]
    assert space.arch(space.choices(arch)) == arch

    # The same weights, but the second and the fourth layer come first.
    by_hand = small_model()
    by_hand.layers = torch.nn.ModuleList([by_hand.layers[i] for i in (1, 3, 0, 2)])
    expected = by_hand(*batch, arch)
    assert torch.equal(model(*batch, arch), expected)
    assert not torch.allclose(small_model()(*batch, arch), expected)

    save_bert(model, tmp_path)
    assert torch.equal(load_bert(tmp_path, 3)(*batch, arch), expected)
    torch.testing.assert_close(extract(model, arch)(*batch), expected)


@pytest.mark.parametrize("changes", [
    pytest.param({}, id="6-heads-of-size-4"),
    pytest.param(dict(hidden_size=40, num_attention_heads=5), id="5-heads-of-size-8"),
])
def test_flops_counter(changes):
    """Compare count_flops with torch's FlopCounterMode.

    It can count the math attention backend. It also counts the classifier. It does not
    count what the last layer leaves out: everything but the keys and values of the T -
    1 tokens after [CLS].
    """
    config = small_config(**changes)
    B, T = 3, 7
    ids, token_types, mask = small_batch(B, T)
    model = ElasticBert(config, 2).eval()
    for arch in some_archs(config, 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids, token_types, mask, arch)
        C, F_ = config.hidden_size, arch.ffn_sizes[-1]
        HD = arch.heads[-1] * config.head_size
        # Queries and outputs, scores and their product with the values, and the FFN.
        left_out = 2 * (T - 1) * (2 * C * HD + 2 * T * HD + 2 * C * F_)
        classifier = 2 * C * 2
        expected = count_flops(config, arch, seq_len=T) - left_out + classifier
        assert counter.get_total_flops() == B * expected


def test_counts_of_bert_base():
    """Compare BERT-base's space and counts with the constants of the authors' code."""
    base = BertConfig()
    space = SearchSpace.for_config(base)
    assert space.depths == (6, 8, 10, 12)
    assert space.heads == (4, 8, 12)
    assert space.ffn_sizes == (512, 768, 1024, 3072)
    assert space.categories == (4,) + (12,) * 12
    assert space.size() == 12**6 + 12**8 + 12**10 + 12**12
    assert count_params(base, space.largest()) == 109_482_240
    assert count_params(base, Arch((12,) * 6, (3072,) * 6)) == 66_955_008
    assert count_params(base, space.smallest()) == 33_900_288
    assert count_flops(base, space.largest()) == 22_347_251_712 + 2 * 768 * 768
    # The authors' constant for the smallest also counts LayerNorm.
    assert count_flops(base, space.smallest()) < 2_520_321_280


def test_counts_of_minilm():
    """Compare MiniLM's search space and size with the published model."""
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    space = SearchSpace.for_config(minilm)
    assert space.depths == (3, 4, 5, 6)
    assert space.heads == (4, 8, 12)
    assert space.ffn_sizes == (256, 384, 512, 1536)
    assert count_params(minilm, space.largest()) == 22_713_216


def test_search_space_choices():
    """Choices and architectures map to each other, over a whole slice of the space."""
    space = SearchSpace.for_config(small_config())
    assert space.depths == (2, 3, 4)
    assert space.heads == (2, 4, 6)
    assert space.ffn_sizes == (8, 12, 16, 48)

    # Depth and two layers vary. The third and the fourth layer are fixed.
    slice_of_choices = itertools.product(range(3), range(12), range(12), [5], [7])
    archs = {space.arch(choices) for choices in slice_of_choices}
    assert len(archs) == 3 * 144
    for arch in archs:
        choices = space.choices(arch)
        assert space.arch(choices) == arch
        assert choices.count(None) == 4 - arch.depth
        assert hash(arch) == hash(Arch(*arch))
    # The category of a layer is FFN index * number of choices of heads + heads index.
    assert space.choices(Arch((4, 6), (8, 48))) == [0, 1, 11, None, None]
    # An architecture may use every pair of heads and FFN size.
    two_pairs = SearchSpace(depths=[2], heads=[1, 2], ffn_sizes=[8])
    assert two_pairs.choices(Arch((2, 1), (8, 8))) == [0, 1, 0]


@pytest.mark.parametrize("heads, ffn_sizes", [
    pytest.param([], [], id="no-layer"),
    pytest.param([4, 4], [8], id="one-ffn-size-for-two-layers"),
])
def test_an_arch_needs_both_sizes_of_each_layer(heads, ffn_sizes):
    """An Arch without layers, or with lists of unequal length, is refused."""
    with pytest.raises(UserError, match="for each layer"):
        Arch(heads, ffn_sizes)


@pytest.mark.parametrize("sizes", [
    pytest.param(dict(layer_heads=[6, 4, 2, 2]), id="heads"),
    pytest.param(dict(layer_ffn_sizes=[48, 8, 8, 8]), id="ffn-sizes"),
])
def test_a_sub_bert_has_no_search_space(sizes):
    """A configuration with the heads or FFN sizes of each layer has one architecture."""
    with pytest.raises(UserError, match="no search space"):
        SearchSpace.for_config(small_config(**sizes))


@pytest.mark.parametrize("arch", [
    pytest.param(Arch((4,), (8,)), id="one-layer"),
    pytest.param(Arch((5, 4), (8, 8)), id="five-heads"),
    pytest.param(Arch((4, 4), (8, 9)), id="nine-neurons"),
])
def test_architectures_outside_the_space_are_refused(arch):
    """SearchSpace.check refuses sizes that are not among the choices."""
    space = SearchSpace.for_config(small_config())
    with pytest.raises(UserError, match="one of"):
        space.check(arch)


@pytest.mark.parametrize("arch", [
    pytest.param(Arch((6,) * 5, (48,) * 5), id="too-deep"),
    pytest.param(Arch((7,), (48,)), id="too-many-heads"),
    pytest.param(Arch((6,), (49,)), id="too-many-neurons"),
    pytest.param(Arch((0,), (8,)), id="no-heads"),
    pytest.param(Arch((6,), (0,)), id="no-neurons"),
])
def test_architectures_larger_than_the_model_are_refused(arch):
    """forward and extract refuse an architecture that does not fit into the weights."""
    model = small_model()
    with pytest.raises(UserError, match="does not fit"):
        model(*small_batch(), arch)
    with pytest.raises(UserError, match="does not fit"):
        extract(model, arch)


def test_search_space_of_a_minimal_bert():
    """Choices that round to the same size are merged, and no size is below 1."""
    space = SearchSpace.for_config(small_config(
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=4))
    assert space.depths == (1,)
    assert space.heads == (1, 2)
    assert space.ffn_sizes == (1, 4)


def test_number_of_architectures():
    """The number of architectures prints for any depth. The exponent is the digits less one."""
    for num_layers in (1, 12, 280, 300, 3000):
        size = SearchSpace.for_config(small_config(num_hidden_layers=num_layers)).size()
        exponent = re.search(r"(?:e\+|10\^)(\d+)$", yoco.scientific(size))[1]
        assert int(exponent) - (len(str(size)) - 1) in (0, 1)
    assert yoco.scientific(270_000) == "2.7e+05"
    assert yoco.scientific(10**400) == "10^400"


# ---- data.py: from GLUE files to scores ----------------------------------------------------------

HEADER = ["sentence", "label"]


def write_tsv(path, *rows, end="\n", bom=False):
    """Write rows of columns as a TSV file, after a byte-order mark if `bom`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join("\t".join(row) for row in rows) + end
    mark = b"\xef\xbb\xbf" if bom else b""
    path.write_bytes(mark + text.encode())


def write_tiny_bert(directory, **changes):
    """Write a config.json and a vocabulary of 12 words, without weights."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad not very Film the ##s".split()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    fields = dict(vocab_size=12, hidden_size=12, num_hidden_layers=2,
                  num_attention_heads=3, intermediate_size=24,
                  max_position_embeddings=16, model_type="bert")
    (directory / "config.json").write_text(json.dumps(fields | changes))
    return directory


def test_mrpc_quotes_and_byte_order_mark(tmp_path):
    """Read MRPC's format: quotes are text, and a byte-order mark is dropped."""
    directory = tmp_path / "MRPC"
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    for name in ("train", "dev"):
        write_tsv(directory / f"{name}.tsv",
                  header,
                  ["1", "7", "8", 'He said "no', "It's so."],
                  ["0", "9", "10", 'a "b" c', '"'],
                  bom=True)
    task = data.load_task(directory)
    assert task.name == "MRPC"
    assert task.metric == "accuracy+f1"
    assert task.labels == ("0", "1")
    assert task.train == [('He said "no', "It's so.", 1), ('a "b" c', '"', 0)]
    assert task.dev == task.train


def test_cola_without_header(tmp_path):
    """Read CoLA's format: no header, odd characters, and no newline at the end."""
    directory = tmp_path / "x"
    write_tsv(directory / "train.tsv",
              ["gj", "1", "", "One sentence ."],
              ["gj", "0", "*", "Two\u0085 it is ."])
    write_tsv(directory / "dev.tsv", ["gj04", "1", "", "No newline ."], end="")
    task = data.load_task(directory)
    assert task.name == "CoLA"
    assert task.metric == "matthews"
    assert len(task.dev) == 1
    assert task.train[1] == ("Two\u0085 it is .", None, 0)


def test_blanks_at_line_ends(tmp_path):
    """Read SST-2's format: a blank before the tab is text, and \\r at the end is not."""
    directory = tmp_path / "x"
    write_tsv(directory / "train.tsv", HEADER, ["ends in a space ", "0"], ["good ", "1"])
    write_tsv(directory / "dev.tsv", HEADER, ["fine ", "1"], end="\r\n")
    task = data.load_task(directory)
    assert task.name == "x"
    assert task.train[0].sentence1 == "ends in a space "
    assert task.dev[0].label == 1


def test_three_ways_to_write_a_score(tmp_path):
    """Read STS-B's format: scores become numbers, and a regression has one logit."""
    header = ["index", "genre", "sentence1", "sentence2", "score"]
    rows = [["0", "g", "a", "b", score] for score in ("5", "5.00", "2.50")]
    write_tsv(tmp_path / "train.tsv", header, *rows)
    write_tsv(tmp_path / "dev.tsv", header, *rows)
    task = data.load_task(tmp_path)
    assert [example.label for example in task.train] == [5, 5, 2.5]
    assert task.labels == ()
    assert task.num_labels == 1


def test_mnli_other_columns_in_dev(tmp_path):
    """Read MNLI's format: two dev sets, which have more columns than train."""
    header = ["index", "promptID", "sentence1", "sentence2", "gold_label"]
    dev_header = ["index", "promptID", "sentence1", "sentence2", "l1", "gold_label"]
    write_tsv(tmp_path / "train.tsv",
              header,
              ["0", "1", "p", "h", "neutral"],
              ["0", "1", "p", "h", "entailment"])
    write_tsv(tmp_path / "dev_matched.tsv",
              dev_header, ["0", "1", "p", "h", "x", "contradiction"])
    write_tsv(tmp_path / "dev_mismatched.tsv",
              dev_header, ["0", "1", "p", "h", "x", "neutral"])
    task = data.load_task(tmp_path)
    assert task.name == "MNLI"
    assert task.labels == ("contradiction", "entailment", "neutral")
    assert task.train[0].label == 2
    assert task.dev[0].label == 0
    assert task.dev_mismatched[0].label == 2


def test_qqp_incomplete_rows(tmp_path, capsys):
    """Read QQP's format: rows with too few columns are left out, and counted.

    The official file has a few of them.
    """
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    rows = [["1", "2", "3", "a", "b", "0"],
            ["4", "5", "6"],
            ["7", "8", "9", "c", "c", "1"]]
    write_tsv(tmp_path / "train.tsv", header, *rows)
    write_tsv(tmp_path / "dev.tsv", header, *rows)
    assert [example.label for example in data.load_task(tmp_path).train] == [0, 1]
    # One row of train.tsv, and one of dev.tsv.
    assert capsys.readouterr().out.count("ignored 1 incomplete row(s)") == 2


# {task: the header of its official train.tsv}. CoLA has none.
OFFICIAL_HEADERS = {
    "CoLA": None,
    "SST-2": "sentence label",
    "MRPC": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate",
    "MNLI": "index promptID sentence1 sentence2 label1 gold_label",
    "QNLI": "index question sentence label",
    "RTE": "index sentence1 sentence2 label",
}


@pytest.mark.parametrize("task, directory, header, names", [
    pytest.param("CoLA", "cola", "sentence label idx", ["0", "1"], id="CoLA"),
    pytest.param("SST-2", "SST2", "sentence label idx", ["0", "1"], id="SST-2"),
    pytest.param("MRPC", "mrpc", "sentence1 sentence2 label idx", ["0", "1"], id="MRPC"),
    pytest.param("STS-B", "stsb", "sentence1 sentence2 label idx", None, id="STS-B"),
    pytest.param("QQP", "x", "question1 question2 label idx", ["0", "1"], id="QQP"),
    pytest.param("MNLI", "x", "premise hypothesis label idx",
                 ["entailment", "neutral", "contradiction"], id="MNLI"),
    pytest.param("QNLI", "x", "question sentence label idx",
                 ["entailment", "not_entailment"], id="QNLI"),
    pytest.param("RTE", "link", "sentence1 sentence2 label idx",
                 ["entailment", "not_entailment"], id="RTE-by-link"),
])
def test_files_of_the_datasets_library(tmp_path, capsys, task, directory, header, names):
    """A file as the datasets library saves it gives the same Task as the official file.

    names: the label names in the library's order, from the documentation of its GLUE data.
    """
    numbers = list(range(len(names))) if names else [3.799999952316284, 0.0, 5.0]
    labels = names or numbers
    texts = [(f"first {i}", f"second {i}") for i in range(len(numbers))]
    official_header = OFFICIAL_HEADERS[task]
    official = [re.split("[ ,]", official_header)] if official_header else []
    if task == "MRPC":
        official = [official_header.split(",")]
    library = [header.split()]
    for i, (number, (first, second)) in enumerate(zip(numbers, texts)):
        cells = {"sentence1": first, "sentence2": second, "#1 String": first,
                 "#2 String": second, "question1": first, "question2": second,
                 "premise": first, "hypothesis": second, "question": first,
                 "sentence": second if "question" in header else first, "idx": str(i)}
        label = str(labels[i])
        official_cells = dict.fromkeys(
            ["label", "Quality", "score", "is_duplicate", "gold_label"], label) | cells
        official.append([official_cells.get(name, "7") for name in official[0]]
                        if official_header else ["gj04", label, "", first])
        library.append([str((cells | {"label": number})[name]) for name in library[0]])

    for parent, rows in (("official", official), ("library", library)):
        path = tmp_path / parent / (task if parent == "official" else directory)
        for name in ("train", "dev", "dev_matched", "dev_mismatched"):
            write_tsv(path / f"{name}.tsv", *rows)
    if directory == "link":
        path.rename(tmp_path / "rte")
        path.symlink_to(tmp_path / "rte")
    capsys.readouterr()
    assert data.load_task(path) == data.load_task(tmp_path / "official" / task)
    line, = capsys.readouterr().out.splitlines()
    assert f"read as {task} from the datasets library" in line
    if names and names[0] == "entailment":
        assert line.endswith(", ".join(f"{i} is {name}" for i, name in enumerate(names)))


@pytest.mark.parametrize("directory, header, labels", [
    pytest.param("own", "sentence1 sentence2 label idx", "0 1", id="another-name"),
    pytest.param("RTE", "sentence1 sentence2 label", "0 1", id="no-idx"),
    pytest.param("RTE", "sentence1 sentence2 label idx", "no yes", id="words-as-labels"),
    pytest.param("RTE", "sentence label idx", "0 1", id="columns-of-another-task"),
])
def test_files_of_your_own_that_resemble_the_library(tmp_path, capsys, directory, header,
                                                    labels):
    """Without a task's name, an idx and whole numbers, a file is the user's data."""
    rows = [header.split()]
    for label in labels.split():
        cells = dict.fromkeys(["sentence", "sentence1", "sentence2"], "a")
        rows.append([(cells | {"label": label, "idx": "0"})[name] for name in rows[0]])
    for name in ("train", "dev"):
        write_tsv(tmp_path / directory / f"{name}.tsv", *rows)
    task = data.load_task(tmp_path / directory)
    assert (task.name, task.metric) == (directory, "accuracy")
    assert task.labels == tuple(labels.split())
    assert capsys.readouterr().out == ""


def test_test_file_of_the_library_is_not_a_dev_set(tmp_path):
    """The label -1 of the library's test files is refused in dev."""
    header = ["sentence1", "sentence2", "label", "idx"]
    write_tsv(tmp_path / "RTE" / "train.tsv", header, ["a", "b", "0", "0"], ["a", "b", "1", "1"])
    write_tsv(tmp_path / "RTE" / "dev.tsv", header, ["a", "b", "-1", "0"])
    with pytest.raises(UserError, match="dev.tsv, line 2: label '-1' is not one of entail"):
        data.load_task(tmp_path / "RTE")


@pytest.mark.parametrize("texts, line", [
    pytest.param(["a"] * 20 + ['he said "fine" again', "b"], 22, id="doubled-quotes"),
    pytest.param(['say "b" now', "a"], 2, id="first-row"),
    pytest.param(['"', "a"], 2, id="a-single-quote"),
])
@pytest.mark.parametrize("name", ["train", "dev"])
def test_csv_quotes_are_named(tmp_path, capsys, name, texts, line):
    """A file that Python's CSV writer wrote gets one warning, with its line."""
    rows = [(text, str(i % 2)) for i, text in enumerate(texts)]
    write_tsv(tmp_path / "train.tsv", HEADER, ["a", "0"], ["b", "1"])
    write_tsv(tmp_path / "dev.tsv", HEADER, ["a", "0"], ["b", "1"])
    with open(tmp_path / f"{name}.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([HEADER, *rows])
    data.load_task(tmp_path)
    warning, = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"WARNING: {tmp_path / name}.tsv, line {line}: a text has quotes")


@pytest.mark.parametrize("texts, is_named", [
    pytest.param(['"hello, world"', "a", "b"], True, id="spreadsheet"),
    pytest.param(['say ""b"" now', "a"], True, id="outer-quotes-removed"),
    pytest.param(['say "b" now'] * 9 + ['"say ""b"" now"'], True, id="half-a-csv-file"),
    pytest.param(['"a."', 'say "b" now', '6" pipe'], False, id="direct-speech"),
    pytest.param(['"', "it's", "'a'"], False, id="other-quotes"),
])
def test_quotes_of_a_csv_file(tmp_path, capsys, texts, is_named):
    """Quotes around a whole text are named, unless other texts have ordinary quotes."""
    rows = [[text, str(i % 2)] for i, text in enumerate(texts)]
    write_tsv(tmp_path / "train.tsv", HEADER, *rows)
    data.read_examples(tmp_path / "train.tsv")
    assert ("as in a CSV file" in capsys.readouterr().out) == is_named


@needs_glue
@pytest.mark.parametrize("name, train_rows, dev_rows, dev_positives", [
    pytest.param("CoLA", 8551, 1043, 721, id="CoLA"),
    pytest.param("SST-2", 67349, 872, 444, id="SST-2"),
    pytest.param("MRPC", 3668, 408, 279, id="MRPC"),
    pytest.param("RTE", 2490, 277, None, id="RTE"),
    pytest.param("STS-B", 5749, 1500, None, id="STS-B"),
])
def test_real_files(capsys, name, train_rows, dev_rows, dev_positives):
    """Compare the number of rows and labels with the published counts.

    Nothing is printed: no file is taken for a CSV file, although 101 texts of MRPC's
    train.tsv are in quotes, and no task has scarce examples.
    """
    task = data.load_task(GLUE / name)
    assert task.name == name
    assert len(task.train) == train_rows
    assert len(task.dev) == dev_rows
    assert all(example.sentence1 for example in task.train)
    if name not in ("CoLA", "SST-2"):
        assert all(example.sentence2 for example in task.train)
    if dev_positives is not None:
        assert sum(example.label for example in task.dev) == dev_positives
    _, holdout = data.split_holdout(task.train, 0.1, 0)
    assert data.find_scarce_examples(task, holdout) == []
    assert capsys.readouterr().out == ""


@needs_glue
def test_real_labels_of_rte():
    """Compare the number of entailments in RTE's dev set with the published one."""
    task = data.load_task(GLUE / "RTE")
    entailment = task.labels.index("entailment")
    assert sum(example.label == entailment for example in task.dev) == 146


@needs_glue
def test_real_scores_of_stsb():
    """Compare the mean score of STS-B's train set with the published one."""
    task = data.load_task(GLUE / "STS-B")
    assert round(np.mean([example.label for example in task.train]), 3) == 2.701


@needs_minilm
def test_token_ids_equal_hugging_face():
    """Compare the token ids and token types of text pairs with transformers 5.23.0's."""
    examples = [data.Example(first, second, 0) for first, second in MINILM_TEXTS]
    encoded = data.encode(examples, MINILM, 128)
    expected = minilm_examples()
    assert [list(e.input_ids) for e in encoded] == [e.input_ids for e in expected]
    assert [list(e.token_type_ids) for e in encoded] == [e.token_type_ids for e in expected]


@needs_minilm
@pytest.mark.parametrize("text, ids", [
    pytest.param(
        "Crème brûlée, naïve façade — Ångström",
        [13675, 21382, 7987, 9307, 2063, 1010, 15743, 8508, 1517, 17076, 15687],
        id="accents"),
    pytest.param(
        "東京 is 東京 and 한국어",
        [1879, 1755, 2003, 1879, 1755, 1998, 1469, 30006, 30021, 29991, 30014, 30020,
         29999, 30008],
        id="chinese-and-korean"),
    pytest.param(
        "tab\there\0nul\u200bzero\u00a0nbsp\ufffd end\x07",
        [21628, 2182, 11231, 23858, 10624, 1050, 5910, 2361, 2203],
        id="control-characters"),
    pytest.param(
        "a" * 101 + " " + "b" * 100 + " unaffable",
        [100, 22861] + [10322] * 49 + [14477, 20961, 3468],
        id="very-long-words"),
    pytest.param(
        "a [MASK] in [SEP] text [mask]",
        [1037, 103, 1999, 102, 3793, 1031, 7308, 1033],
        id="special-tokens"),
    pytest.param(
        "don't U.S.A. $1,000.50 e-mail@x.org",
        [2123, 1005, 1056, 1057, 1012, 1055, 1012, 1037, 1012, 1002, 1015, 1010, 2199,
         1012, 2753, 1041, 1011, 5653, 1030, 1060, 1012, 8917],
        id="punctuation"),
    pytest.param(
        "  spaces   and \r\n newlines  ",
        [7258, 1998, 2047, 12735],
        id="blanks-and-newlines"),
    pytest.param(
        "Ⅻ ﬁne 😀 ½ İstanbul ß",
        [100, 1984, 2638, 100, 1092, 9960, 1096],
        id="ligatures-and-emoji"),
])
def test_wordpiece_ids(text, ids):
    """Compare token ids with those of BertTokenizer in transformers 5.23.0."""
    encoded, = data.encode([data.Example(text, None, 0)], MINILM, 128)
    assert list(encoded.input_ids) == [101, *ids, 102]


@pytest.mark.parametrize("tokenizer_config, ids", [
    pytest.param(None, [2, 1, 1, 3, 10, 9, 11, 3], id="no-file"),
    pytest.param('{"do_lower_case": true}', [2, 5, 1, 3, 10, 1, 3], id="lower-case"),
    pytest.param('{"do_lower_case": false}', [2, 1, 1, 3, 10, 9, 11, 3], id="keep-case"),
])
def test_casing(tmp_path, tokenizer_config, ids):
    """A vocabulary with capitals is cased, unless its settings ask for lower case."""
    bert = write_tiny_bert(tmp_path)
    if tokenizer_config:
        (bert / "tokenizer_config.json").write_text(tokenizer_config)
    encoded, = data.encode([data.Example("Good films", "the Films", 1)], bert, 16)
    assert list(encoded.input_ids) == ids


def test_token_types_of_a_pair(tmp_path):
    """The first text and its [SEP] have token type 0, the second text has type 1."""
    bert = write_tiny_bert(tmp_path)
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    encoded, = data.encode([data.Example("Good films", "the Films", 1)], bert, 16)
    assert list(encoded.token_type_ids) == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("second_text", [
    pytest.param("the film", id="a-text"),
    pytest.param("", id="an-empty-text"),
])
def test_pairs_need_two_token_types(tmp_path, second_text):
    """A BERT with a single token type refuses a pair of texts."""
    bert = write_tiny_bert(tmp_path, type_vocab_size=1)
    with pytest.raises(UserError, match="only one token type"):
        data.encode([data.Example("good", second_text, 1)], bert, 16)


def test_truncation_shortens_the_longer_text(tmp_path):
    """A pair that is too long loses tokens of its longer text first."""
    bert = write_tiny_bert(tmp_path)
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    pair = data.Example("bad bad bad bad bad bad", "not not", 1)
    encoded, = data.encode([pair], bert, 8)
    assert list(encoded.input_ids) == [2, 6, 6, 6, 3, 7, 7, 3]


@pytest.mark.parametrize("newline, last", [
    pytest.param(b"\n", b"", id="no-last-newline"),
    pytest.param(b"\r\n", b"\r\n", id="crlf"),
    pytest.param(b"\r\n", b"", id="crlf-without-a-last-newline"),
])
def test_line_ends_of_a_vocabulary(tmp_path, newline, last):
    """A vocab.txt with other line ends gives the same tokens and ids."""
    bert = write_tiny_bert(tmp_path)
    expected = data.load_tokenizer(bert).get_vocab()
    assert expected["##s"] == 11
    lines = (bert / "vocab.txt").read_bytes().splitlines()
    (bert / "vocab.txt").write_bytes(newline.join(lines) + last)
    assert data.load_tokenizer(bert).get_vocab() == expected


def test_many_examples_are_tokenized_in_portions(tmp_path, monkeypatch):
    """2,500 examples get the tokens that each of them gets, in arrays of 4-byte numbers.

    At most 1,000 large encodings of the tokenizers library exist together.
    """
    bert = write_tiny_bert(tmp_path)
    load_tokenizer = data.load_tokenizer
    portions = []

    class Tokenizer:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def encode_batch(self, texts):
            portions.append(len(texts))
            return self.tokenizer.encode_batch(texts)

    monkeypatch.setattr(data, "load_tokenizer", lambda path: Tokenizer(load_tokenizer(path)))
    examples = [data.Example("good " * (i % 7), "bad", i) for i in range(2500)]
    encoded = data.encode(examples, bert, 16)
    assert portions == [1000, 1000, 500]
    assert [example.label for example in encoded] == list(range(2500))
    for i in (0, 6, 999, 1000, 2499):
        ids = [2, *[5] * (i % 7), 3, 6, 3]
        assert list(encoded[i].input_ids) == ids
        assert list(encoded[i].token_type_ids) == [0] * (len(ids) - 2) + [1, 1]
        assert encoded[i].input_ids.itemsize == 4


def thousand_examples():
    """Return 1000 encoded examples of 3 to 89 tokens. The label of each is its index."""
    lengths = np.random.default_rng(0).integers(3, 90, 1000)
    return [data.Encoded([1] * n, [0] * n, i) for i, n in enumerate(lengths)]


def take_batches(examples, seed, first, count):
    """Return `count` training batches of 16 examples, from step `first` on."""
    return list(itertools.islice(data.batches(examples, 16, seed, first), count))


def test_batches_visit_each_example_once():
    """Every epoch visits each example once.

    Another epoch or another seed has another order.
    """
    examples = thousand_examples()
    batches = take_batches(examples, 1, 0, 189)
    epochs = [batches[:63], batches[63:126], batches[126:]]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(1000))
    assert epochs[0] != epochs[1]
    assert epochs[0] != take_batches(examples, 2, 0, 63)


@pytest.mark.parametrize("first", [
    pytest.param(1, id="second-batch"),
    pytest.param(62, id="last-batch-of-an-epoch"),
    pytest.param(63, id="first-batch-of-an-epoch"),
    pytest.param(64, id="second-batch-of-an-epoch"),
    pytest.param(130, id="third-epoch"),
])
def test_batches_from_any_step(first):
    """A training that resumes at any step gets the batches that it would have got."""
    examples = thousand_examples()
    batches = take_batches(examples, 1, 0, 189)
    assert take_batches(examples, 1, first, 189 - first) == batches[first:]


def test_batches_need_little_padding():
    """Padding adds less than a tenth, because a batch has similar lengths."""
    examples = thousand_examples()
    lengths = [len(example.input_ids) for example in examples]
    epoch = take_batches(examples, 1, 0, 63)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in epoch)
    assert padded < 1.1 * sum(lengths)


def test_token_batches():
    """Batches for scoring are sorted by length and filled up to a number of tokens."""
    examples = thousand_examples()
    batches = data.token_batches(examples, 600)
    lengths = [len(examples[i].input_ids) for batch in batches for i in batch]
    assert len(lengths) == 1000
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches[:-1]:
        assert 500 < len(batch) * len(examples[batch[0]].input_ids) <= 600
    # An example that is longer than a batch may be gets a batch for itself.
    assert [len(batch) for batch in data.token_batches(examples[:9], 1)] == [1] * 9


def test_collate():
    """A batch is padded to one length, and its mask marks the tokens.

    The length is a multiple of 8, but not above the positions of the model.
    """
    examples = thousand_examples()
    ids, token_types, mask, labels = data.collate(examples, [3, 1])
    longest = int(mask.sum(1).max())
    assert longest % 8
    assert ids.shape == (2, longest + 8 - longest % 8)
    assert data.collate(examples, [3, 1], max_positions=longest)[0].shape == (2, longest)
    assert mask.sum(1).tolist() == [len(examples[i].input_ids) for i in labels.tolist()]
    assert ids.shape == mask.shape
    assert token_types.shape == mask.shape
    assert mask.dtype == torch.bool


def split_and_check(labels, fraction=0.1, seed=0):
    """Split examples with these labels and return the labels of the hold-out set.

    The two parts must make up the whole, the same seed must give the same split, and
    another seed another one.
    """
    examples = [data.Example(str(i), None, label) for i, label in enumerate(labels)]
    train, holdout = data.split_holdout(examples, fraction, seed)
    assert sorted(train + holdout) == sorted(examples)
    assert holdout == data.split_holdout(examples, fraction, seed)[1]
    if holdout and len(examples) >= 3:
        assert holdout != data.split_holdout(examples, fraction, seed + 1)[1]
    return [example.label for example in holdout]


def test_holdout_has_a_tenth_of_each_label():
    """A hold-out set of a tenth has a tenth of the rare label, too."""
    holdout = split_and_check([int(i % 10 == 0) for i in range(1000)])
    assert len(holdout) == 100
    assert sum(holdout) == 10


def test_holdout_of_nothing_and_of_little():
    """The hold-out set is empty only if the fraction is 0.

    Otherwise it has at least one example.
    """
    assert split_and_check([0, 1] * 50, 0) == []
    assert len(split_and_check([0, 1])) == 1
    assert len(split_and_check([0, 1] * 50, 0.001)) == 1


@pytest.mark.parametrize("labels", [
    pytest.param([0, 1], id="2-labels"),
    pytest.param([0, 1, 0, 1], id="4-labels"),
    pytest.param([0.5, 1.5, 2.5], id="3-scores"),
])
def test_holdout_leaves_an_example_to_train_on(labels):
    """A fraction of 0.99 would round to all examples, but one of them is left."""
    examples = [data.Example("a", None, label) for label in labels]
    train, holdout = data.split_holdout(examples, 0.99, 0)
    assert len(train) == 1
    assert len(holdout) == len(labels) - 1


def test_holdout_of_scores():
    """Of ten neighbouring scores one is held out."""
    holdout = split_and_check([float(score) for score in range(1, 601)])
    assert [math.ceil(score / 10) for score in sorted(holdout)] == list(range(1, 61))


@pytest.mark.parametrize("num_examples, num_labels, held_out", [
    pytest.param(200, 40, 20, id="half-an-example-of-each-label"),
    pytest.param(600, 150, 60, id="less-than-half-of-each-label"),
])
def test_holdout_of_many_labels(num_examples, num_labels, held_out):
    """If a tenth of each label is less than an example, some labels get one."""
    holdout = split_and_check([i % num_labels for i in range(num_examples)])
    assert len(holdout) == held_out
    assert len(set(holdout)) == held_out


def test_holdout_by_largest_remainders():
    """Compare an uneven split with one by hand: 2.6, 3.7, 3.7 become 2, 4, 4."""
    holdout = split_and_check([0] * 26 + [1] * 37 + [2] * 37)
    assert [holdout.count(label) for label in range(3)] == [2, 4, 4]


def test_classification_metrics():
    """Compare the metrics with formulas by hand: TP = 3, FP = 1, FN = 2, TN = 4."""
    labels = [1] * 5 + [0] * 5
    predictions = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    matthews = (3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5
    assert data.accuracy(labels, predictions) == 0.7
    assert np.isclose(data.f1(labels, predictions), 2 * 3 / (2 * 3 + 1 + 2))
    assert np.isclose(data.matthews_corrcoef(labels, predictions), matthews)
    # Both are 0, not NaN, if their formula divides by zero.
    assert data.f1([0, 0], [0, 0]) == 0
    assert data.matthews_corrcoef([1, 0], [1, 1]) == 0


def test_correlations():
    """Compare Pearson and Spearman correlations with values by hand."""
    assert np.isclose(data.pearson([1, 2, 3], [2, 4, 7]), 5 / (2 * 38 / 3) ** 0.5)
    assert np.isclose(data.pearson([1, 2, 3], [3, 2, 1]), -1)
    assert data.pearson([1, 2], [0.1, 0.1]) == 0
    # Rounding lifts no correlation above 1.
    for x in np.random.default_rng(0).normal(size=(200, 7)):
        assert -1 <= data.pearson(x, -3 * x) < data.pearson(x, 3 * x) <= 1
    assert np.isclose(data.spearman([1, 2, 3, 4], [1, 100, 1000, 5000]), 1)
    # The ranks of 1 2 2 3 are 1 2.5 2.5 4.
    expected = 4.5 / (5 * 4.5) ** 0.5
    assert np.isclose(data.spearman([1, 2, 3, 4], [1, 2, 2, 3]), expected)


def test_compute_metrics():
    """The score of a task is the mean of its metrics, in percent."""
    logits = np.array([[0., 1], [1, 0], [0, 1], [1, 0]])
    assert data.compute_metrics("accuracy+f1", np.array([1, 0, 0, 0]), logits) == {
        "score": pytest.approx((75 + 200 / 3) / 2),
        "accuracy": 75,
        "f1": pytest.approx(200 / 3),
        "matthews": pytest.approx(100 * 2 / 12 ** 0.5)}
    scores = data.compute_metrics("pearson+spearman", np.array([1., 2]), logits[:2, :1])
    assert set(scores) == {"score", "pearson", "spearman"}


@pytest.mark.parametrize("num_labels, fitting", [
    pytest.param(0, ["pearson", "spearman"], id="regression"),
    pytest.param(2, ["accuracy", "f1", "matthews"], id="two-labels"),
    pytest.param(3, ["accuracy"], id="three-labels"),
])
def test_metrics_that_fit(num_labels, fitting):
    """A sum of metrics is accepted if compute_metrics can compute it, and else refused.

    The score is the mean of its parts. The message lists the metrics that fit.
    """
    label_names = ("no", "yes", "maybe")[:num_labels]
    logits = np.array([[1.0, 0, 0], [0, 2, 1], [3, 1, 2], [0, 1, 2]])[:, :num_labels or 1]
    for count in (1, 2):
        for names in itertools.combinations(
                ["accuracy", "f1", "matthews", "pearson", "spearman"], count):
            metric = "+".join(names)
            if set(names) <= set(fitting):
                assert data.check_metric(metric, label_names) == metric
                values = data.compute_metrics(metric, np.array([0, 1, 1, 0]), logits)
                mean = sum(values[name] for name in names) / count
                assert values["score"] == pytest.approx(mean)
            else:
                with pytest.raises(UserError, match=", ".join(fitting)):
                    data.check_metric(metric, label_names)
    for metric in ("", "acc", fitting[0] + "+"):
        with pytest.raises(UserError, match="does not fit"):
            data.check_metric(metric, label_names)


@pytest.mark.parametrize("value", [
    pytest.param(np.nan, id="nan"),
    pytest.param(np.inf, id="infinity"),
])
def test_a_score_is_never_nan(value):
    """A label that is not finite ends an evaluation."""
    labels, logits = np.array([1, value, 3]), np.array([[1.0], [2.0], [3.0]])
    with np.errstate(invalid="ignore"), pytest.raises(UserError, match="spearman is nan"):
        data.compute_metrics("pearson+spearman", labels, logits)


def test_metrics_use_the_scores_as_read():
    """Compare the correlations of large scores with those of NumPy in float64.

    float32 would round all of these scores to four different values.
    """
    model = small_model(num_labels=1)
    scores = 1e8 + np.arange(20.0)
    rng = np.random.default_rng(0)
    encoded = [data.Encoded(rng.integers(5, 50, 3 + i % 9).tolist(), [0] * (3 + i % 9), score)
               for i, score in enumerate(scores)]
    evaluate_arch = data.make_evaluator(model, [encoded], "pearson+spearman",
                                        torch.device("cpu"), NO_AUTOCAST)
    logits = []
    for i in range(20):
        *inputs, _ = data.collate(encoded, [i])
        with torch.no_grad():
            logits.append(model(*inputs).item())
    ranks = np.argsort(np.argsort(logits))
    values = evaluate_arch(model.config.arch)
    expected = 100 * np.corrcoef(scores - 1e8, logits)[0, 1]
    assert values["pearson"] == pytest.approx(expected, abs=1e-3)
    expected = 100 * np.corrcoef(np.arange(20), ranks)[0, 1]
    assert values["spearman"] == pytest.approx(expected, abs=1e-6)


def scarce_examples(counts, num_held_out):
    """Return the warnings for data with the labels and counts in a dict."""
    train = []
    for label, count in enumerate(counts.values()):
        train += [data.Example(f"{label} {i}", None, label) for i in range(count)]
    task = data.Task("x", train, train[:1], tuple(counts), "accuracy")
    return data.find_scarce_examples(task, train[:num_held_out])


@pytest.mark.parametrize("counts, num_held_out, warnings", [
    pytest.param({"a": 50, "b": 50}, 50, [], id="enough"),
    pytest.param({"a": 5, "b": 5}, 0, [], id="no-holdout-set"),
    pytest.param({"a": 50, "b": 50}, 49, ["(49 of 100), so a search selects by chance"],
                 id="small-holdout-set"),
    pytest.param({"good": 9, "biling": 1}, 0, ["label biling has 1 example: "], id="one-example"),
    pytest.param(
        {"a": 9, "b": 4, "c": 3, "d": 2, "e": 1, "f": 0}, 0,
        ["b has 4 examples, label c has 3 examples, label d has 2 examples, and 2 more"],
        id="many-rare-labels"),
    pytest.param({"ham": 90, "spam": 10}, 0, [], id="nine-tenths"),
    pytest.param({"ham": 91, "spam": 9}, 0, ["91.0% of train has the label ham"],
                 id="above-nine-tenths"),
])
def test_scarce_examples_are_named(counts, num_held_out, warnings):
    """A rare label, a label of nearly all examples, and a small hold-out set are named."""
    found = scarce_examples(counts, num_held_out)
    assert len(found) == len(warnings)
    for warning, fragment in zip(found, warnings):
        assert fragment in warning


# ---- yoco.py: the distribution P_theta and its natural gradient ----------------------------------

# The categories of BERT-base's variables: one for the depth, then one per layer.
SIZES = (4,) + (12,) * 12


def fisher_matrix(theta):
    """Return a categorical variable's Fisher matrix in its K - 1 free probabilities."""
    return np.diag(1 / theta[:-1]) + 1 / theta[-1]


def test_inverse_fisher():
    """Compare one_hot - theta with F^-1 grad ln P, for a Fisher matrix F written out.

    The Fisher norm is compared with the quadratic form of the same matrix.
    """
    rng = np.random.default_rng(0)
    for K in (2, 3, 12):
        theta = rng.dirichlet(np.full(K, 2.0))
        matrix = fisher_matrix(theta)
        for choice in range(K):
            # The derivatives of ln P with respect to the K - 1 free probabilities.
            score = np.where(np.arange(K - 1) == choice, 1 / theta[:-1], 0)
            if choice == K - 1:
                score = np.full(K - 1, -1 / theta[-1])
            gradient = yoco.natural_gradient([theta], [[choice]], [1.0])[0]
            assert np.allclose(gradient[:-1], np.linalg.solve(matrix, score))
            assert abs(gradient.sum()) < 1e-12
            quadratic_form = gradient[:-1] @ matrix @ gradient[:-1]
            assert np.isclose(yoco.fisher_norm([theta], [gradient]) ** 2, quadratic_form)


def test_expected_gradient():
    """Compare the expected natural gradient with the one that autograd gives.

    The expectation is taken twice: over all 24 samples, and as a Monte Carlo mean.
    """
    rng = np.random.default_rng(1)
    sizes = (2, 3, 4)
    theta = [rng.dirichlet(np.full(n, 2.0)) for n in sizes]
    loss = rng.normal(size=sizes)

    # The truth: autograd in the free probabilities, times the inverse Fisher matrix.
    free = [torch.tensor(t[:-1], requires_grad=True) for t in theta]
    full = [torch.cat([f, 1 - f.sum(0, keepdim=True)]) for f in free]
    torch.einsum("abc,a,b,c->", torch.tensor(loss), *full).backward()
    expected = [np.linalg.solve(fisher_matrix(t), f.grad.numpy())
                for t, f in zip(theta, free)]

    # All samples, each weighted with its probability. natural_gradient takes the mean,
    # so we multiply by their number.
    samples = list(np.ndindex(*sizes))
    utilities = []
    for sample in samples:
        probability = np.prod([t[choice] for t, choice in zip(theta, sample)])
        utilities.append(probability * loss[sample] * len(samples))
    enumerated = yoco.natural_gradient(theta, samples, utilities)

    P = Categorical(sizes)
    P.theta = theta
    drawn = [P.sample(rng) for _ in range(20000)]
    drawn_losses = [loss[tuple(sample)] for sample in drawn]
    sampled = yoco.natural_gradient(theta, drawn, drawn_losses)

    # At least five standard deviations of a mean over 20000 samples.
    tolerance = 5 * np.abs(loss).max() / 20000 ** 0.5
    for exact, monte_carlo, truth in zip(enumerated, sampled, expected):
        assert np.allclose(exact[:-1], truth)
        assert np.allclose(monte_carlo[:-1], truth, atol=tolerance)


@pytest.mark.parametrize("losses, utilities", [
    pytest.param([3.0], [0], id="1-sample"),
    pytest.param([1, 2], [1, -1], id="2-samples"),
    pytest.param([2, 2], [0, 0], id="2-tied"),
    pytest.param([-2, -2], [0, 0], id="2-tied-negative"),
    pytest.param([-3, -1], [1, -1], id="2-negative"),
    pytest.param([4, 1, 3, 2], [-1, 1, 0, 0], id="4-samples"),
    pytest.param([1, 1, 3, 2], [.5, .5, -1, 0], id="4-best-tied"),
    pytest.param([-1, -1, -1, -5], [-1/3] * 3 + [1], id="4-worst-tied-negative"),
    pytest.param([1, 2, 3, 4, 5], [.5, .5, 0, -.5, -.5], id="5-samples"),
    pytest.param([1, 2, 3, 4, 5, 6], [.5, .5, 0, 0, -.5, -.5], id="6-samples"),
    pytest.param([1, 2, 2, 4, 5, 6], [.5, .25, .25, 0, -.5, -.5], id="6-tied"),
    pytest.param([0.0, -0.0], [0, 0], id="2-zeros-of-both-signs"),
    pytest.param([7] * 12, [0] * 12, id="12-tied"),
    pytest.param(range(12), [1/3] * 3 + [0] * 6 + [-1/3] * 3, id="12-samples"),
])
def test_utilities(losses, utilities):
    """Compare the utilities with values by hand, with ties and with negative losses."""
    assert np.allclose(yoco.ranking_utility(losses), utilities, atol=0)


@pytest.mark.parametrize("deeper_is_better", [
    pytest.param(True, id="deeper-is-better"),
    pytest.param(False, id="deeper-is-worse"),
])
@pytest.mark.parametrize("sample_pi", [
    pytest.param(True, id="samples-of-pi"),
    pytest.param(False, id="samples-of-P_theta"),
])
def test_inactive_layer_is_unbiased(sample_pi, deeper_is_better):
    """Enumerate all pairs of samples: a layer that does not matter gets no mean gradient.

    Only the deeper depth has the layer, and its choice changes no loss. So theta of the
    layer must not move on average, whichever distribution was sampled.
    """
    P = Categorical([2, 2])
    P.theta = [np.array([0.4, 0.6]), np.array([0.9, 0.1])]
    source = P.uniform() if sample_pi else P
    depth_probability, layer_probability = source.theta
    outcomes = []                       # (sample, its probability)
    for depth, choice in itertools.product((0, 1), (0, 1)):
        sample = [depth, choice if depth == 1 else None]
        outcomes.append((sample, depth_probability[depth] * layer_probability[choice]))

    mean = np.zeros(2)
    for (one, p_one), (two, p_two) in itertools.product(outcomes, outcomes):
        losses = [-sample[0] if deeper_is_better else sample[0] for sample in (one, two)]
        utilities = yoco.ranking_utility(losses)
        gradient = yoco.natural_gradient(P.theta, [one, two], utilities, source.theta)
        mean += p_one * p_two * gradient[1]
    assert np.abs(mean).max() < 1e-12


def test_step_uses_the_distribution_that_was_sampled():
    """A step on samples of pi follows the term of an inactive layer, utility * (pi - theta).

    By hand: the better sample leaves the layer out, and its term is 1 * (1/2 - 7/10). The
    worse one has choice 0, and its term is -1 * (1 - 7/10). Half of the sum is -1/4.
    """
    P = Categorical([2, 2])
    P.theta = [np.array([0.5, 0.5]), np.array([0.7, 0.3])]
    samples, losses = [[0, None], [1, 0]], [0.1, 0.2]
    gradient = yoco.natural_gradient(P.theta, samples, [1, -1], P.uniform().theta)
    assert np.allclose(gradient[1], [-1/4, 1/4])
    # The depth contributes 1 to the squared Fisher length. The layer contributes
    # (1/4)^2 * (10/7 + 10/3) = 25/84.
    length = math.sqrt(1 + 25 / 84)
    P.step(samples, losses, delta=0.1, source=P.uniform())
    assert np.allclose(P.theta[1], [0.7 - 0.1 / length / 4, 0.3 + 0.1 / length / 4])


def test_step_length():
    """Compare the length of a step with the Fisher matrix of the point where it starts.

    Far from theta_min the length is delta, and the step goes from the worse sample to
    the better.
    """
    rng = np.random.default_rng(3)
    P = Categorical((3, 4))
    P.theta = [rng.dirichlet(np.full(n, 2.0)) for n in (3, 4)]
    P.theta = [(theta + 1) / (theta + 1).sum() for theta in P.theta]
    before = [theta.copy() for theta in P.theta]
    P.step([[0, 1], [2, 3]], [5.0, -1.0], delta=0.01)

    moves = [new - old for new, old in zip(P.theta, before)]
    squared_length = sum(move[:-1] @ fisher_matrix(old) @ move[:-1]
                         for move, old in zip(moves, before))
    assert np.isclose(squared_length ** 0.5, 0.01)
    assert np.allclose(moves[0] / moves[0][2], [-1, 0, 1])
    assert np.allclose(moves[1] / moves[1][3], [0, -1, 0, 1])


def test_theta_stays_a_distribution():
    """theta keeps its invariants over 2000 random steps.

    It sums to 1, open categories stay above theta_min, closed ones stay at 0, and
    inactive variables do not move. Tied losses and identical samples move nothing.
    """
    rng = np.random.default_rng(2)
    P = Categorical(SIZES)
    is_open = [np.arange(size) < 3 for size in SIZES]
    P.set_open(is_open)
    # ASNG's bound for 13 variables with 3 open categories each.
    theta_min = 1 / (13 * 2)
    for _ in range(2000):
        samples = [[int(rng.integers(3)) for _ in SIZES] for _ in range(2)]
        for sample in samples:
            sample[5:] = [None] * 8
        before = [theta.copy() for theta in P.theta]
        P.step(samples, rng.normal(size=2), delta=rng.choice([0.1, 1, 5]))
        for theta, mask in zip(P.theta, is_open):
            assert abs(theta.sum() - 1) < 1e-9
            assert not theta[~mask].any()
            assert theta[mask].min() >= theta_min - 1e-9
        assert all(np.array_equal(new, old) for new, old in zip(P.theta[5:], before[5:]))

    before = [theta.copy() for theta in P.theta]
    tied_losses = [-0.7, -0.7]
    P.step([[0] * 13, [1] * 13], tied_losses)
    identical_samples = [[2] * 13, [2] * 13]
    P.step(identical_samples, [0.1, 0.9])
    assert all(np.array_equal(new, old) for new, old in zip(P.theta, before))


def test_longest_step():
    """With the largest --delta, theta stays a distribution that numpy can sample from."""
    field, = (field for field in dataclasses.fields(yoco.TrainSettings) if field.name == "delta")
    P, rng = Categorical([4, 12, 12]), np.random.default_rng(0)
    for _ in range(300):
        P.step([P.sample(rng), P.sample(rng)], rng.random(2), field.metadata["high"])
        assert all(abs(theta.sum() - 1) < 1e-9 for theta in P.theta)


def test_theta_min_of_two_categories():
    """theta_min is at most half of the uniform probability: 1/4 for two categories."""
    P = Categorical([2])
    for _ in range(50):
        P.step([[0], [1]], [0, 1])
    assert np.allclose(P.theta[0], [0.75, 0.25])


def test_theta_min_counts_the_free_variables():
    """A variable with one category does not count: theta_min is 1 / (5 * 3) here."""
    P = Categorical([1, 4, 4, 4, 4, 4])
    for _ in range(200):
        P.step([[0] * 6, [0] + [1] * 5], [0, 1])
    for theta in P.theta[1:]:
        assert np.isclose(theta[1], 1 / 15)


def test_open_categories():
    """Compare theta with values by hand after categories were opened and closed.

    A newly opened category gets the uniform probability. The open ones share the rest
    in their old proportions. A closed one gets 0 and is never sampled.
    """
    P = Categorical([4])
    P.set_open([np.array([False, False, True, True])])
    P.theta[0][:] = [0, 0, 0.2, 0.8]
    P.set_open([np.array([False, True, True, True])])
    assert np.allclose(P.theta[0], [0, 1 / 3, 0.2 * 2 / 3, 0.8 * 2 / 3])
    P.set_open([np.array([True, True, False, False])])
    assert np.allclose(P.theta[0], [1 / 2, 1 / 2, 0, 0])
    sampled = {P.sample(np.random.default_rng(i))[0] for i in range(200)}
    assert sampled == {0, 1}


def test_controller():
    """Compare K with values by hand: 1 if P is uniform, and 0.19 if it has collapsed.

    P is that of BERT-base. The layers collapse to different categories here, which must
    not raise K.
    """
    P = Categorical(SIZES)
    assert yoco.exploit_probability(P) == 1
    for i, (theta, size) in enumerate(zip(P.theta, SIZES)):
        theta[:] = 1 / (13 * (size - 1))
        theta[i % size] = 12 / 13
    rho = -(13 * 12 / 13 * np.log(12 / 13)      # the favourite of each of 13 variables
            + 1 / 13 * np.log(1 / 39)           # the other 3 depths
            + 12 / 13 * np.log(1 / 143))        # the other 11 choices of 12 layers
    K = rho / (np.log(4) + 12 * np.log(12))
    assert round(K, 2) == 0.19
    assert np.isclose(yoco.exploit_probability(P), K)
    assert np.isclose(yoco.min_exploit_probability(P), K)
    assert np.isclose(yoco.min_exploit_probability(Categorical(SIZES)), K)


def test_controller_with_one_architecture_open():
    """K is 1, and a step moves nothing, if only one architecture is open."""
    P = Categorical(SIZES)
    P.set_open([np.arange(size) == size - 1 for size in SIZES])
    before = [theta.copy() for theta in P.theta]
    P.step([[3] + [11] * 12] * 2, [1, 2])
    assert yoco.exploit_probability(P) == 1
    assert yoco.min_exploit_probability(P) == 1
    assert all(map(np.array_equal, P.theta, before))


def test_worked_example():
    """Compare one step with README's "One step by hand", in fractions.

    README prints the same numbers. The example has two layers and lambda = 2.
    """
    P = Categorical([2, 4, 4])
    samples = [[1, 3, 0], [0, 1, None]]
    losses = [0.4, 0.7]
    root = math.sqrt(15)

    # One half of (best - worst). Layer 2 is inactive in the worse sample, so its
    # gradient is (one_hot(0) - 1/4) / 2.
    gradient = [[-1/2, 1/2], [0, -1/2, 0, 1/2], [3/8, -1/8, -1/8, -1/8]]
    # Squares over theta: (1/4 + 1/4) * 2 + (1/4 + 1/4) * 4 + (9 + 3)/64 * 4 = 15/4.
    norm = root / 2
    # The depth: 1/2 - 1/root = 0.242 is raised to theta_min = 1/4, half of uniform.
    depth = [1/4, 3/4]
    # Layer 1: 1/4 - 1/root < 0 is raised to theta_min = 1 / (3 * 3). The other three
    # share the remaining 5/9 in proportion to their surplus over 1/9: 5/36, 5/36 and
    # 5/36 + 1/root.
    surplus = [5/36, 0, 5/36, 5/36 + 1/root]
    layer_1 = [1/9 + 5/9 * s / sum(surplus) for s in surplus]
    # Layer 2 stays above 1/9.
    layer_2 = [1/4 + 3/(4*root)] + [1/4 - 1/(4*root)] * 3
    after = [depth, layer_1, layer_2]
    entropy = -sum(p * math.log(p) for theta in after for p in theta)
    max_entropy = 5 * math.log(2)
    K = entropy / max_entropy

    assert [theta.tolist() for theta in P.theta] == [[1/2] * 2, [1/4] * 4, [1/4] * 4]
    assert yoco.exploit_probability(P) == 1
    computed = yoco.natural_gradient(P.theta, samples, yoco.ranking_utility(losses))
    assert [g.tolist() for g in computed] == gradient
    assert np.isclose(yoco.fisher_norm(P.theta, computed), norm)
    P.step(samples, losses, delta=1.0)
    assert all(np.allclose(theta, a) for theta, a in zip(P.theta, after, strict=True))
    assert np.isclose(yoco.exploit_probability(P), K)

    readme = (ROOT / "README.md").read_text()
    sections = re.split(r"^#+ .*One step by hand.*$", readme, flags=re.M)
    assert len(sections) == 2, "README has no section One step by hand"
    section = re.split(r"^#+ ", sections[1], flags=re.M)[0].replace("\u2212", "-")
    printed = set(re.findall(r"-?\d+\.\d{3}(?!\d)", section))
    moved = [1/2 - 1/root, 1/2 + 1/root, 1/4, 1/4 - 1/root, 1/4 + 1/root, *layer_2]
    # The payment in layer 1: the cost of the raise, the surplus of the others, their sum.
    payment = [1/9 - (1/4 - 1/root), *surplus[2:], sum(surplus)]
    values = [1/2, 1/4, *losses, 1, -1, *sum(gradient, []), 2, 3/4, norm, *moved, 1/9,
              *sum(after, []), *payment, max_entropy, entropy, K]
    assert {f"{value:.3f}" for value in values} == printed


def count_updates(target, num_samples, delta, sigma, seed, limit=3000):
    """Count the updates of P until the mode of every variable is the target's.

    The loss of a sample is the number of mismatches plus sigma * noise.
    """
    rng = np.random.default_rng(seed)
    P = Categorical(SIZES)
    for step in range(1, limit + 1):
        samples = [P.sample(rng) for _ in range(num_samples)]
        losses = []
        for sample in samples:
            mismatches = sum(a != b for a, b in zip(sample, target))
            losses.append(mismatches + sigma * rng.normal())
        P.step(samples, losses, delta)
        if P.most_likely() == target:
            return step
    return limit


@pytest.mark.parametrize("num_samples, delta, sigma, published", [
    pytest.param(2, 1, 0, 255, id="lambda-2"),
    pytest.param(6, 1, 0, 42, id="lambda-6"),
    pytest.param(6, 1, 1, 109, id="lambda-6-noisy"),
    pytest.param(2, 135 ** -0.5, 0, 186, id="lambda-2-short-steps"),
])
def test_optimizer_finds_thirteen_targets(num_samples, delta, sigma, published):
    """Compare the number of updates with the number measured for the authors' code.

    The median of ten seeds scatters, so a factor of two is allowed.
    """
    rng = np.random.default_rng(7)
    updates = []
    for seed in range(10):
        target = [int(rng.integers(n)) for n in SIZES]
        updates.append(count_updates(target, num_samples, delta, sigma, seed))
    assert published / 2 < np.median(updates) < published * 2


def test_noise_teaches_nothing():
    """Compare the modes that random losses lead to with chance.

    By chance, 1/4 + 12 * 1/12 of the 13 variables hit a fixed target. The target may be
    the first category of every variable, the last, or one in the middle.
    """
    modes = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        P = Categorical(SIZES)
        for _ in range(150):
            P.step([P.sample(rng) for _ in range(2)], rng.normal(size=2))
        modes.append(P.most_likely())
        # theta did move.
        assert np.mean([theta.max() for theta in P.theta[1:]]) > 2 / 12

    chance = 1 / 4 + 12 * 1 / 12
    variance = 3 / 16 + 12 * 11 / 144
    for target in ([0] * 13, [n - 1 for n in SIZES], [n // 2 for n in SIZES]):
        hits = np.mean([sum(a == b for a, b in zip(mode, target)) for mode in modes])
        assert abs(hits - chance) < 4 * (variance / 40) ** 0.5


# ---- yoco.py: stages, and the gradient of the weights --------------------------------------------

def test_stages():
    """Compare BERT-base's nine stages with the paper's, and epochs with the authors'."""
    space = SearchSpace.for_config(BertConfig())
    stages = yoco.make_stages(space, "MRPC", 100)
    rows = [(s.depths, s.heads, s.ffn_sizes, s.num_steps // 100) for s in stages]
    assert rows == [
        ((12,), (12,), (3072,), 3),
        ((12,), (12, 8), (3072,), 5),
        ((12,), (12, 8, 4), (3072,), 3),
        ((12,), (12, 8, 4), (3072, 1024), 3),
        ((12,), (12, 8, 4), (3072, 1024, 768), 3),
        ((12,), (12, 8, 4), (3072, 1024, 768, 512), 3),
        ((12, 10), (12, 8, 4), (3072, 1024, 768, 512), 3),
        ((12, 10, 8), (12, 8, 4), (3072, 1024, 768, 512), 3),
        ((12, 10, 8, 6), (12, 8, 4), (3072, 1024, 768, 512), 3),
    ]
    assert [s.first_step for s in stages] == [0, 300, 800, 1100, 1400, 1700, 2000, 2300, 2600]


@pytest.mark.parametrize("task, epochs", [
    pytest.param("CoLA", 32, id="CoLA"),
    pytest.param("MNLI", 10, id="MNLI"),
    pytest.param("MRPC", 26, id="MRPC"),
    pytest.param("QNLI", 33, id="QNLI"),
    pytest.param("QQP", 10, id="QQP"),
    pytest.param("RTE", 11, id="RTE"),
    pytest.param("SST-2", 8, id="SST-2"),
])
def test_epochs_of_the_authors(task, epochs):
    """Compare the epochs of a task with the sum over the authors' eight stages.

    The authors have no stage that trains the largest architecture only.
    """
    space = SearchSpace.for_config(BertConfig())
    stages = yoco.make_stages(space, task, 10)
    assert sum(s.num_steps for s in stages[1:]) == 10 * epochs
    # The stage of the largest architecture is as long as the last one.
    assert stages[0].num_steps == stages[-1].num_steps


def test_samples_lie_in_the_open_space():
    """Samples of a stage take every open choice, and no other."""
    space = SearchSpace.for_config(BertConfig())
    P = Categorical(space.categories)
    rng = np.random.default_rng(0)
    for stage in yoco.make_stages(space, "MRPC", 100):
        P.set_open(yoco.open_masks(space, stage))
        archs = [space.arch(P.sample(rng)) for _ in range(300)]
        heads = {h for arch in archs for h in arch.heads}
        ffn_sizes = {k for arch in archs for k in arch.ffn_sizes}
        assert {arch.depth for arch in archs} == set(stage.depths)
        assert heads == set(stage.heads)
        assert ffn_sizes == set(stage.ffn_sizes)


@pytest.mark.parametrize("kind, epochs, steps", [
    pytest.param("progressive", 58, [600, 1000] + [600] * 7, id="twice-the-table"),
    pytest.param("all", 0.0, [1450, 1450], id="all"),
    pytest.param("all", 14.5, [725, 725], id="all-14.5-epochs"),
    pytest.param("largest", 0.0, [300], id="largest"),
    pytest.param("largest", 4, [400], id="largest-4-epochs"),
])
def test_steps_of_each_schedule(kind, epochs, steps):
    """Compare the steps of each stage with values by hand, for 100 steps per epoch.

    The table has 29 epochs for MRPC. --epochs keeps its proportions.
    """
    space = SearchSpace.for_config(BertConfig())
    stages = yoco.make_stages(space, "MRPC", 100, kind, epochs)
    assert [s.num_steps for s in stages] == steps


def test_few_epochs_are_shared_out():
    """Nine stages share four epochs: 400 steps, up to a step of rounding each.

    Every stage has at least one step.
    """
    space = SearchSpace.for_config(BertConfig())
    stages = yoco.make_stages(space, "MRPC", 100, "progressive", 4)
    assert abs(sum(s.num_steps for s in stages) - 400) <= 9
    stages = yoco.make_stages(space, "MRPC", 100, "progressive", 0.01)
    assert [s.num_steps for s in stages] == [1] * 9


def test_stages_of_a_minimal_bert():
    """Every stage opens one more choice, so a space with few choices has few stages."""
    space = SearchSpace(depths=[1], heads=[1, 2], ffn_sizes=[1, 4])
    stages = yoco.make_stages(space, "MRPC", 100)
    assert [(s.depths, s.heads, s.ffn_sizes) for s in stages] == [
        ((1,), (2,), (4,)), ((1,), (2, 1), (4,)), ((1,), (2, 1), (4, 1))]


def test_stages_of_schedule_all():
    """The schedule `all` trains the largest architecture, and then opens everything."""
    space = SearchSpace.for_config(BertConfig())
    first, second = yoco.make_stages(space, "MRPC", 100, "all")
    assert first.depths == (12,)
    assert first.heads == (12,)
    assert first.ffn_sizes == (3072,)
    assert second.depths == (12, 10, 8, 6)
    assert second.heads == (12, 8, 4)
    assert second.first_step == 1450


LABELS = torch.tensor([0, 1, 2, 1, 0])


def test_first_step_of_adam():
    """Compare Adam's first step with its formula: weight - lr * g / (|g| + eps)."""
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.data.fill_(5.0)
    adam = yoco.new_adam(model)
    adam.param_groups[0]["lr"] = 0.1
    model.weight.grad = torch.tensor([[2.0, -1e-8, 0.0]])
    adam.step()
    # eps is 1e-8, and there is no weight decay.
    assert torch.allclose(model.weight, torch.tensor([[5 - 0.1, 5 + 0.1 / 2, 5.0]]))


def losses_and_gradient_by_hand(model, inputs, labels, archs, loss_function):
    """Return each architecture's loss, and the mean gradient over extracted sub-BERTs.

    The gradient of each extracted weight is added to the corner of the full weight that
    it was cut from. loss_function(logits, labels, arch) returns the loss on the labels
    and the total loss.
    """
    gradient = {name: torch.zeros_like(w) for name, w in model.named_parameters()}
    losses = []
    for arch in archs:
        sub_bert = extract(model, arch)
        label_loss, total_loss = loss_function(sub_bert(*inputs), labels, arch)
        total_loss.backward()
        losses.append(label_loss.item())
        layer_indices = [i for i, *_ in model.config.layers(arch)]
        for name, weight in sub_bert.named_parameters():
            path = name.split(".")
            if path[0] == "layers":
                path[1] = str(layer_indices[int(path[1])])
            corner = tuple(slice(n) for n in weight.shape)
            gradient[".".join(path)][corner] += weight.grad / len(archs)
    return losses, gradient


def assert_losses_and_gradient(model, losses, expected):
    """Assert that these losses and the model's .grad are what was computed by hand."""
    expected_losses, expected_gradient = expected
    assert np.allclose([float(loss) for loss in losses], expected_losses, atol=1e-5)
    for name, weight in model.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert_close(gradient, expected_gradient[name])


def cross_entropy_by_hand(logits, labels):
    """Return the mean negative log-probability of the labels."""
    return -logits.log_softmax(1)[torch.arange(5), labels].mean()


@pytest.mark.parametrize("keep_layers", ["first", "even"])
def test_weight_gradient(keep_layers):
    """Compare the gradient of W with the mean over extracted sub-BERTs.

    An architecture that was sampled twice counts twice. A layer that no architecture
    has gets no gradient. Slicing and masking are both compared.
    """
    model = small_model(keep_layers=keep_layers, **NO_DROPOUT).train()
    inputs = small_batch()
    batch = (*inputs, LABELS)
    a = Arch((4, 2), (12, 48))
    b = Arch((6, 2), (8, 16))

    def loss_function(logits, labels, arch):
        loss = cross_entropy_by_hand(logits, labels)
        return loss, loss

    for archs in ([a, b, a], [a], [model.config.arch, b]):
        expected = losses_and_gradient_by_hand(
            model, inputs, LABELS, archs, loss_function)
        losses = yoco.weight_gradient(model, batch, archs, NO_AUTOCAST)
        assert_losses_and_gradient(model, losses, expected)
        used = {i for arch in archs for i, *_ in model.config.layers(arch)}
        has_gradient = [layer.query.weight.grad is not None for layer in model.layers]
        assert has_gradient == [i in used for i in range(4)]

        model.zero_grad()
        sizes = archs_to_tensor(model.config, archs)
        losses = yoco.masked_gradient(model, batch, sizes, NO_AUTOCAST)
        assert_losses_and_gradient(model, losses, expected)


@pytest.mark.parametrize("num_labels", [
    pytest.param(3, id="classification"),
    pytest.param(1, id="regression"),
])
def test_distillation(num_labels):
    """Compare the gradient with that of two losses by hand, on labels and on a teacher.

    Their mean counts. The largest architecture has no teacher when it is sampled.
    Slicing and masking are both compared.
    """
    model = small_model(num_labels, **NO_DROPOUT).train()
    teacher = small_model(num_labels, seed=5, **NO_DROPOUT)
    inputs = small_batch()
    labels = LABELS if num_labels > 1 else LABELS.float()
    batch = (*inputs, labels)
    targets = teacher(*inputs).detach()
    largest = model.config.arch
    small, medium = Arch((2, 4), (8, 48)), Arch((6, 6, 6, 6), (48, 48, 48, 16))

    def loss_function(logits, labels, arch):
        if num_labels == 1:
            label_loss = ((logits[:, 0] - labels) ** 2).mean()
            teacher_loss = ((logits - targets) ** 2).mean()
        else:
            label_loss = cross_entropy_by_hand(logits, labels)
            teacher_loss = -(targets.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        if arch == largest:
            return label_loss, label_loss
        return label_loss, (label_loss + teacher_loss) / 2

    for archs in ([small], [largest], [small, largest, medium, small]):
        expected = losses_and_gradient_by_hand(
            model, inputs, labels, archs, loss_function)
        losses = yoco.weight_gradient(model, batch, archs, NO_AUTOCAST, teacher)
        assert_losses_and_gradient(model, losses, expected)

        model.zero_grad()
        sizes = archs_to_tensor(model.config, archs)
        losses = yoco.masked_gradient(model, batch, sizes, NO_AUTOCAST, teacher)
        assert_losses_and_gradient(model, losses, expected)
    assert model.training
    assert all(weight.grad is None for weight in teacher.parameters())


def random_example(rng, num_tokens):
    """Return an encoded example of random tokens with one of three labels."""
    ids = rng.integers(5, 50, num_tokens).tolist()
    return data.Encoded(ids, [0] * num_tokens, int(rng.integers(3)))


def model_and_examples_for_importance():
    """Return a model, six encoded examples, and settings that make one batch of them."""
    model = small_model(**NO_DROPOUT, max_position_embeddings=24)
    rng = np.random.default_rng(0)
    examples = [random_example(rng, n) for n in (3, 5, 8, 8, 11, 17)]
    return model, examples, yoco.TrainSettings(batch_size=6)


HEADS, NEURONS = 0, 1       # the order in which `importance` returns them


@pytest.mark.parametrize("layer, kind, unit", [
    pytest.param(0, HEADS, 3, id="layer-0-head-3"),
    pytest.param(2, HEADS, 5, id="layer-2-head-5"),
    pytest.param(3, HEADS, 0, id="layer-3-head-0"),
    pytest.param(0, NEURONS, 7, id="layer-0-neuron-7"),
    pytest.param(3, NEURONS, 47, id="layer-3-neuron-47"),
])
def test_importance(layer, kind, unit):
    """Compare the importance with how the loss changes, by finite differences.

    The output of a head or neuron is scaled through its columns of the output weights.
    """
    model, examples, settings = model_and_examples_for_importance()
    *batch, labels = data.collate(examples, range(6))
    importance = yoco.importance(model, examples, settings, NO_AUTOCAST)
    model.eval()

    if kind == HEADS:
        columns = slice(4 * unit, 4 * unit + 4)
        weight = model.layers[layer].attention_out.weight.data[:, columns]
    else:
        weight = model.layers[layer].ffn_out.weight.data[:, unit:unit + 1]
    before = weight.clone()
    losses = []
    for scale in (1.05, 0.95):
        weight.copy_(before * scale)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(*batch).double(), labels).item())
    expected = abs(losses[0] - losses[1]) / 0.1
    assert np.isclose(importance[layer][kind][unit], expected, rtol=0.02, atol=1e-5)


def test_sort_by_importance():
    """Sorted heads and neurons compute the same, and the most important come first."""
    model, examples, settings = model_and_examples_for_importance()
    *batch, _ = data.collate(examples, range(6))
    importance = yoco.importance(model, examples, settings, NO_AUTOCAST)
    model.eval()
    logits = model(*batch)
    weights = model.layers[1].ffn_in.weight.clone()

    sort_by_importance(model, importance)
    torch.testing.assert_close(model(*batch), logits)
    best = importance[1][NEURONS].argmax()
    assert torch.equal(model.layers[1].ffn_in.weight[0], weights[best])
    for heads, neurons in yoco.importance(model, examples, settings, NO_AUTOCAST):
        assert (heads.diff() <= 1e-6).all()
        assert (neurons.diff() <= 1e-6).all()


# ---- yoco.py: reward, choice of the best, and budgets --------------------------------------------

def test_reward():
    """Compare the reward with Eq. 7 by hand: the budget is 60, the full model 100."""
    def reward(score, cost):
        return yoco.reward(score, cost, 60, 100)

    # It is continuous at the budget, where the factor is 1, and 0 at the full model.
    assert reward(80, 59) == 80
    assert reward(80, 60) == 80
    assert abs(reward(80, 60 + 1e-9) - 80) < 1e-6
    assert reward(80, 100) == 0
    # The factor is (1 - 10/40)^2.
    assert reward(80, 70) == 80 * 0.5625
    # The further over the budget, the lower the reward.
    assert reward(80, 70) > reward(80, 90)
    assert reward(79, 65) > reward(80, 95)
    # A negative score is never raised.
    assert reward(-20, 99) == -20
    # A budget of the full model or more changes no score.
    assert yoco.reward(80, 100, 100, 100) == 80
    assert yoco.reward(80, 90, 200, 100) == 80
    assert yoco.reward(80, 80, 60, 100, alpha=1) == 40


def test_best_fit():
    """Compare the best architecture under a budget with a choice by hand.

    Its cost is strictly below the budget, and the cheaper one wins a tie.
    """
    a, b, c, d = (Arch((heads,), (8,)) for heads in (1, 2, 3, 4))
    cost = {a: 10, b: 20, c: 30, d: 40}.get
    assert yoco.best_fit({a: 1.0, b: 3.0, c: 3.0, d: 9.0}, cost, 40) == b
    assert yoco.best_fit({a: 1.0, d: 9.0}, cost, 41) == d
    assert yoco.best_fit({d: 9.0}, cost, 40) is None


@pytest.mark.parametrize("text, values", [
    pytest.param("60000000", [6e7], id="digits"),
    pytest.param("60e6", [6e7], id="exponent"),
    pytest.param("60M", [6e7], id="millions"),
    pytest.param("0.5x", [5e7], id="share"),
    pytest.param(".5X", [5e7], id="share-without-zero"),
    pytest.param("50%", [5e7], id="percent"),
    pytest.param("7% 0.07x", [0.07 * 1e8, 0.07 * 1e8], id="percent-equals-share"),
    pytest.param("22G", [22e9], id="billions"),
    pytest.param("1.5k", [1500], id="thousands"),
    pytest.param("60m 0.5X 70", [6e7, 5e7, 70], id="several"),
    pytest.param("30M 30m", [3e7], id="the-same-twice"),
])
def test_budgets(text, values, capsys):
    """Compare parsed budgets with numbers by hand."""
    settings = yoco.SearchSettings(max_params=text.split())
    kind, budgets = yoco.budgets_from_settings(settings, "superbert")
    assert kind == "params"
    parsed = [yoco.parse_budget(budget, 10, 10**8, "parameters") for budget in budgets]
    assert parsed == values
    warned = "exceeds the full model" in capsys.readouterr().out
    assert warned == any(value > 10**8 for value in values)


@pytest.mark.parametrize("text, milliseconds", [
    pytest.param("12", 12, id="digits"),
    pytest.param("12ms", 12, id="unit"),
    pytest.param("12MS", 12, id="capitals"),
    pytest.param("0.5x", 20, id="share"),
    pytest.param("50%", 20, id="percent"),
])
def test_latency_budgets(text, milliseconds):
    """Compare parsed latency budgets with numbers by hand."""
    settings = yoco.SearchSettings(max_latency=text.split())
    kind, (budget,) = yoco.budgets_from_settings(settings, "superbert")
    assert kind == "latency"
    assert yoco.parse_budget(budget, 1, 40, "ms") == milliseconds


@pytest.mark.parametrize("text, smallest, full, unit, message", [
    pytest.param(
        "1m", 13254912, 22713216, "parameters",
        "the budget of 1,000,000 parameters: the smallest has 13,254,912 parameters (0.584x)",
        id="parameters"),
    pytest.param(
        "0.1x", 1430000000, 2860000000, "FLOPs",
        "the budget of 286,000,000 FLOPs: the smallest has 1,430,000,000 FLOPs (0.500x)",
        id="flops"),
    pytest.param(
        "0.01", 10.6175139999, 9.6, "ms",
        "the budget of 0.01 ms: the smallest has 10.62 ms (1.106x). Did you mean 0.01x?",
        id="latency"),
    pytest.param(
        "0.5", 10, 20, "parameters",
        "the budget of 0.5 parameters: the smallest has 10 parameters (0.500x). "
        "Did you mean 0.5x?",
        id="share-without-x"),
    pytest.param(
        "1", 10, 20, "parameters",
        "the budget of 1 parameters: the smallest has 10 parameters (0.500x). Did you mean 1x?",
        id="one"),
])
def test_sizes_in_messages(text, smallest, full, unit, message):
    """Compare the refusal of a budget with the sentence that a person would write."""
    with pytest.raises(UserError) as refusal:
        yoco.parse_budget(text, smallest, full, unit)
    assert str(refusal.value) == f"no sub-BERT fits {message}"


# ---- The commands: train, search, eval -----------------------------------------------------------

CPU = ["--device", "cpu", "--precision", "fp32"]
TRAIN = ["train", "--data", "tiny", "--epochs", "4", "--lr", "1e-3", "--batch-size", "8",
         *CPU]
SEARCH = ["search", "--max-params", "0.9x", "--evaluations", "12", *CPU]


def film_reviews(rng, count):
    """Return a header and `count` random rows whose label a word and a `not` decide."""
    rows = [HEADER]
    for _ in range(count):
        word = rng.choice(["good", "bad"])
        negated = rng.random() < 0.5
        text = f"the film is not very {word}" if negated else f"the film is very {word}"
        label = int((word == "good") != negated)
        rows.append([text, str(label)])
    return rows


@pytest.fixture(scope="session")
def trained_project(tmp_path_factory):
    """Make a directory with data in `tiny`, a super-BERT trained on it, and a sub-BERT.

    No test works there: the fixtures below copy it.
    """
    directory = tmp_path_factory.mktemp("trained_project")
    rng = np.random.default_rng(0)
    write_tiny_bert(directory / "tiny")
    write_tsv(directory / "tiny" / "train.tsv", *film_reviews(rng, 60))
    write_tsv(directory / "tiny" / "dev.tsv", *film_reviews(rng, 20))
    with contextlib.chdir(directory):
        assert yoco.main(TRAIN) == 0
        assert yoco.main(SEARCH) == 0
    return directory


@pytest.fixture
def in_data_dir(trained_project, tmp_path, monkeypatch):
    """Change into a new directory that holds only the data, in `tiny`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_project / "tiny", "tiny")
    return tmp_path


@pytest.fixture
def in_trained_dir(trained_project, in_data_dir):
    """Change into a new directory with the data and the super-BERT."""
    shutil.copytree(trained_project / "superbert", "superbert")
    return in_data_dir


SUB_BERT = "subbert/tiny-0.9x"


@pytest.fixture
def in_sub_bert_dir(trained_project, in_data_dir):
    """Change into a new directory with the data and the sub-BERT, but no super-BERT."""
    shutil.copytree(trained_project / "subbert", "subbert")
    return in_data_dir


def read_results(directory):
    """Return the bytes of the weights and of the config.json in a directory."""
    return [(Path(directory) / name).read_bytes()
            for name in ("model.safetensors", "config.json")]


def read_log_lines(directory):
    """Return the lines of a run's log, without times and without the header."""
    text = (Path(directory) / "log.jsonl").read_text()
    header, *lines = [json.loads(line) for line in text.splitlines()]
    assert "settings" in header
    for line in lines:
        line.pop("ms", None)
    return lines


def read_facts(directory):
    """Return a finished run's run.json without times and memory."""
    facts = json.loads((Path(directory) / "run.json").read_text())
    measured = ("seconds", "finished", "peak_memory_mib")
    return {name: value for name, value in facts.items() if name not in measured}


def assert_refused(capsys, words, *parts):
    """Assert that a command ends with status 2, and one line that has all `parts`."""
    capsys.readouterr()
    assert yoco.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("yoco.py: error: "), lines
    for part in parts:
        assert part in lines[0]


def run_program(*words):
    """Run yoco.py as a user does, and return what it printed."""
    program = subprocess.run([sys.executable, ROOT / "yoco.py", *words],
                             capture_output=True, text=True)
    assert program.returncode == 0, program.stderr
    return program.stdout


def test_command_line(in_data_dir):
    """Run train, search and eval as a user does.

    eval needs the directory of the sub-BERT, and no super-BERT.
    """
    train_output = run_program(*TRAIN)
    config = BertConfig.load("tiny")
    space = SearchSpace.for_config(config)
    for name, arch in (("largest", space.largest()), ("smallest", space.smallest())):
        num_params = f"{count_params(config, arch):,}"
        assert re.search(rf"{name}\W.*\b{num_params} parameters", train_output)
    assert {path.name for path in Path("superbert/tiny").iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", "run.json", "log.jsonl"}

    search_output = run_program(*SEARCH)
    assert "superbert/tiny, the super-BERT finished last" in search_output
    assert "12 sampled" in search_output

    shutil.rmtree("superbert")
    eval_output = run_program("eval", "--model", SUB_BERT)
    assert f"score {read_facts(SUB_BERT)['dev']['score']:.2f}" in eval_output


def test_sub_bert_keeps_its_budget(in_sub_bert_dir):
    """Compare run.json with the sub-BERT that was written, and with its budget."""
    facts = read_facts(SUB_BERT)
    model, _ = data.load(SUB_BERT)
    config = BertConfig.load("tiny")
    full = count_params(config, SearchSpace.for_config(config).largest())
    assert model.config.labels == ("0", "1")
    assert model.config.arch == Arch(**facts["arch"])
    assert facts["full_cost"] == full
    assert facts["budget"] == 0.9 * full
    assert facts["params"] < 0.9 * full
    assert count_weights(model) == facts["params"]


def test_eval_gives_shares_of_the_super_bert(in_sub_bert_dir, capsys):
    """eval of a sub-BERT gives the shares that search has printed.

    Without the sizes of the super-BERT, in an older run.json, it gives no shares.
    """
    facts = read_facts(SUB_BERT)
    config = BertConfig.load("tiny")
    sizes = ""
    for name, count, unit in (("params", count_params, "parameters"),
                              ("flops", count_flops, "FLOPs")):
        share = facts[name] / count(config, config.arch)
        assert share < 1
        sizes += f"  {facts[name]:,} {unit} ({share:.3f}x)"
    assert yoco.main(["eval", "--model", SUB_BERT, *CPU]) == 0
    assert sizes in capsys.readouterr().out

    del facts["full_params"], facts["full_flops"]
    Path(SUB_BERT, "run.json").write_text(json.dumps(facts))
    assert yoco.main(["eval", "--model", SUB_BERT, *CPU]) == 0
    printed = capsys.readouterr().out
    assert f"{facts['params']:,} parameters  {facts['flops']:,} FLOPs  " in printed
    assert "x)" not in printed


def test_data_that_has_moved(in_trained_dir, monkeypatch, capsys):
    """A search with --data gives the winner that a search in the old place gives.

    It can be resumed after a second move. Its sub-BERT finds the data in the new place.
    """
    assert yoco.main([*SEARCH, "--out", "old"]) == 0
    os.rename("tiny", "second")
    send_signal_in_step(monkeypatch, 3)
    new = [*SEARCH, "--model", "superbert/tiny", "--out", "new"]
    assert yoco.main([*new, "--data", "second"]) == 128 + signal.SIGTERM
    os.rename("second", "third")
    assert yoco.main([*new, "--data", "third", "--resume"]) == 0
    assert read_results("new") == read_results("old")
    assert read_log_lines("new") == read_log_lines("old")
    facts = read_facts("new")
    assert facts.pop("data") == "third"
    assert facts.items() <= read_facts("old").items()
    capsys.readouterr()
    assert yoco.main(["eval", "--model", "new", *CPU]) == 0
    assert f"score {facts['dev']['score']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("cola", [
    pytest.param(False, id="plain-format"),
    pytest.param(True, id="format-of-cola"),
])
def test_eval_needs_only_dev(in_sub_bert_dir, capsys, cola):
    """Compare eval on a directory with only dev.tsv with the search's result.

    The metric is that of the model, in the format of CoLA, too. The baseline comes from
    the training. Without it, in an older run.json, the output does not mention it.
    """
    facts = read_facts(SUB_BERT)
    header, *rows = [line.split("\t")
                     for line in Path("tiny/dev.tsv").read_text().splitlines()]
    train_labels = [line[-1] for line in Path("tiny/train.tsv").read_text().splitlines()[1:]]
    answer = max("01", key=train_labels.count)
    baseline = 100 * sum(label == answer for _, label in rows) / len(rows)
    shutil.rmtree("tiny")
    if cola:
        write_tsv(Path("other/dev.tsv"), *[["g", label, "", text] for text, label in rows])
    else:
        write_tsv(Path("other/dev.tsv"), header, *rows)
    words = ["eval", "--model", SUB_BERT, "--data", "other", *CPU]
    assert yoco.main(words) == 0
    printed = capsys.readouterr().out
    accuracy = facts["dev"]["accuracy"]
    assert f"  score {accuracy:.2f}  accuracy {accuracy:.2f}  f1 (of 1) " in printed
    assert (f"on dev of other. Always giving the most frequent answer scores {baseline:.2f}\n"
            in printed)

    del facts["most_frequent"]
    Path(SUB_BERT, "run.json").write_text(json.dumps(facts))
    assert yoco.main(words) == 0
    assert capsys.readouterr().out.endswith("\non dev of other\n")


def test_use_in_python(in_sub_bert_dir):
    """Compare the accuracy of the model in Python with the one in run.json."""
    model, encode = data.load(SUB_BERT)
    dev = data.load_task("tiny").dev
    logits = model(*encode([example.sentence1 for example in dev]))
    labels = torch.tensor([example.label for example in dev])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert abs(100 * accuracy - read_facts(SUB_BERT)["dev"]["accuracy"]) < 1e-3


def test_use_in_python_refuses_unequal_lists(in_sub_bert_dir):
    """Two first texts and a string of two letters are not two pairs of texts."""
    _, encode = data.load(SUB_BERT)
    with pytest.raises(UserError, match="as many second texts"):
        encode(["good", "bad"], "ab")


class Series:
    """A sequence like a pandas Series: it has a length, and its truth value is an error."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return iter(self.values)

    def __bool__(self):
        raise ValueError("the truth value of a Series is ambiguous")


@pytest.mark.parametrize("sequence", [
    pytest.param(tuple, id="tuple"),
    pytest.param(np.array, id="array"),
    pytest.param(lambda texts: np.array(texts, object), id="array-of-objects"),
    pytest.param(Series, id="series"),
])
def test_use_in_python_of_any_sequence(in_sub_bert_dir, sequence):
    """A sequence of first or second texts gives the tensors of a list.

    A text of NumPy is a single text. Sequences of unequal length and empty ones are refused.
    """
    _, encode = data.load(SUB_BERT)
    first, second = ["good film", "bad"], ["not", "very bad film"]
    for texts in ([first], [first, second]):
        expected = encode(*texts)
        assert expected[0].shape[0] == 2
        for actual, tensor in zip(encode(*map(sequence, texts)), expected, strict=True):
            assert torch.equal(actual, tensor)
    for actual, tensor in zip(encode(np.str_("good"), np.str_("bad")), encode("good", "bad")):
        assert torch.equal(actual, tensor)
    for texts in ([first, second[:1]], [[]]):
        with pytest.raises(UserError, match="as many second texts"):
            encode(*map(sequence, texts))


def test_use_in_python_of_a_missing_directory(tmp_path):
    """The message names the kind of directory that is needed, not a download."""
    with pytest.raises(UserError, match="nope/config.json does not exist: name a directory "
                                        "that train or search wrote$"):
        data.load(tmp_path / "nope")


@pytest.mark.parametrize("found, message", [
    pytest.param(dict(pairs=True, task="RTE", labels=("a", "b")), None, id="same"),
    pytest.param(dict(pairs=True, task="own"), None, id="own-data"),
    pytest.param(dict(pairs=True, task="rte"), None, id="another-spelling"),
    pytest.param(dict(pairs=False), "one text", id="single-texts"),
    pytest.param(dict(pairs=True, task="MRPC"), "the task is MRPC", id="another-task"),
    pytest.param(dict(pairs=True, labels=("b", "a")), "the labels are", id="another-order"),
    pytest.param(dict(pairs=True, labels=()), "the labels are", id="regression"),
])
def test_data_must_fit_the_model(found, message):
    """Data with other texts, labels or task than the training's is refused."""
    training = dict(pairs=True, task="RTE", labels=("a", "b"))
    if message is None:
        data.check_fit("here", training, **found)
        return
    with pytest.raises(UserError, match=f"^here: {message}"):
        data.check_fit("here", training, **found)


def test_predict(in_sub_bert_dir):
    """Compare predicted labels with the largest logits and probabilities."""
    model, encode = data.load(SUB_BERT)
    dev = data.load_task("tiny").dev
    logits = model(*encode([example.sentence1 for example in dev]))
    predictions = list(data.predict(model, SUB_BERT, dev, NO_AUTOCAST))
    labels = [label for label, _ in predictions]
    assert labels == [model.config.labels[i] for i in logits.argmax(1)]
    for label, probabilities in predictions:
        assert abs(sum(probabilities.values()) - 1) < 1e-5
        assert max(probabilities, key=probabilities.get) == label


@pytest.mark.filterwarnings("ignore")
def test_predict_in_int8(in_sub_bert_dir):
    """data.predict takes a quantized module, and gives the labels of its logits."""
    model, encode = data.load(SUB_BERT)
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    dev = data.load_task("tiny").dev
    predictions = list(data.predict(model, SUB_BERT, dev, NO_AUTOCAST, batch_size=1))
    for example, (label, _) in zip(dev, predictions, strict=True):
        assert label == model.config.labels[model(*encode(example.sentence1)).argmax()]


def test_learning(in_data_dir):
    """On labels that one word decides, sub-BERTs of every size learn.

    The expected loss falls, and the largest, the most likely and the smallest
    architecture answer the whole hold-out set right.
    """
    rows = [[f"the film is very {word}", str(int(word == "good"))]
            for word in ("good", "bad")]
    write_tsv(in_data_dir / "tiny" / "train.tsv", HEADER, *rows * 40)
    assert yoco.main(TRAIN + ["--epochs", "42", "--lr", "1e-2"]) == 0
    losses = [line["loss"] for line in read_log_lines("superbert/tiny")]
    assert losses[0] > 0.5
    assert np.mean(losses[-8:]) < 0.2
    scores = read_facts("superbert/tiny")["holdout"]
    assert {name: score["accuracy"] for name, score in scores.items()} == {
        "largest": 100, "most likely": 100, "smallest": 100}


@pytest.mark.parametrize("num_texts, batch_size, epochs, interval", [
    # A tenth of the texts is held out, so an epoch has 400 steps, or 7.
    pytest.param(444, "1", "0.1575", 20, id="5%-of-an-epoch"),
    pytest.param(60, "8", "9", 1, id="at-least-a-step"),
])
def test_schedule_of_a_training(in_data_dir, monkeypatch, num_texts, batch_size, epochs,
                                interval):
    """Compare what each step of a training does with Algorithm 1.

    There are 63 steps, 9 for each of the 7 stages. K is updated when a stage begins, and
    every `interval` steps. `interval` is I, 5% of an epoch, but at least 1.
    """
    rows = film_reviews(np.random.default_rng(0), num_texts)
    write_tsv(in_data_dir / "tiny" / "train.tsv", *rows)
    step, log_and_checkpoint = Categorical.step, yoco.log_and_checkpoint
    rhos = []                           # rho / rho_max when a step begins
    steps, saved = [], []

    def record_rho(self, *args):
        rhos.append(yoco.exploit_probability(self))
        step(self, *args)

    def record_step(run, state, *args):
        open_choices = [int((theta > 0).sum()) for theta in state.P.theta]
        adam_steps = state.adam.state[state.model.pooler.weight]["step"].item()
        rate = state.adam.param_groups[0]["lr"]
        steps.append((state.step, state.K, open_choices, adam_steps, rate))
        log_and_checkpoint(run, state, *args)

    monkeypatch.setattr(Categorical, "step", record_rho)
    monkeypatch.setattr(yoco, "log_and_checkpoint", record_step)
    monkeypatch.setattr(yoco, "save", lambda run, state: saved.append(state.step))
    words = ["--epochs", epochs, "--batch-size", batch_size, "--checkpoint-every", "30"]
    assert yoco.main(TRAIN + words) == 0

    # The open choices of the depth, and of each of the two layers.
    opened = [[1, 1, 1], [1, 2, 2], [1, 3, 3], [1, 6, 6], [1, 9, 9], [1, 12, 12],
              [2, 12, 12]]
    assert len(steps) == len(rhos) == 63
    K = None
    for t, (rho, facts) in enumerate(zip(rhos, steps)):
        stage, t_in_stage = divmod(t, 9)
        if t_in_stage == 0 or t % interval == 0:
            K = rho
        # Every stage has a new Adam, and a learning rate that falls to 0.
        rate = 1e-3 * (1 - t_in_stage / 9)
        assert facts == (t + 1, K, opened[stage], t_in_stage + 1, pytest.approx(rate))
    num_stale = sum(K != rho for rho, (_, K, *_) in zip(rhos, steps))
    assert num_stale >= 10 if interval > 1 else num_stale == 0
    assert saved == [30, 60, 63]


@pytest.mark.parametrize("strategy", ["ee", "noise"])
def test_theta_gets_the_losses(in_data_dir, monkeypatch, strategy):
    """theta gets the losses that were computed, in their order unless they are noise."""
    weight_gradient, step = yoco.weight_gradient, Categorical.step
    computed, used = [], []

    def record_computed(*args):
        losses = weight_gradient(*args)
        computed.append([loss.item() for loss in losses])
        return losses

    def record_used(self, samples, losses, *args):
        used.append(list(losses))
        step(self, samples, losses, *args)

    monkeypatch.setattr(yoco, "weight_gradient", record_computed)
    monkeypatch.setattr(Categorical, "step", record_used)
    assert yoco.main(TRAIN + ["--strategy", strategy]) == 0
    assert len(used) > 20
    assert [sorted(losses) for losses in used] == [sorted(losses) for losses in computed]
    assert (used == computed) == (strategy == "ee")


def test_theta_follows_the_distribution_that_was_sampled(in_data_dir, monkeypatch):
    """`train` tells the step of theta which distribution has sampled the architectures."""
    sample, step = Categorical.sample, Categorical.step
    samplers, sources = [], []

    def recording_sample(self, rng):
        samplers.append(self)
        return sample(self, rng)

    def recording_step(self, samples, losses, delta=1.0, source=None):
        sources.append(source)
        return step(self, samples, losses, delta, source)

    monkeypatch.setattr(Categorical, "sample", recording_sample)
    monkeypatch.setattr(Categorical, "step", recording_step)
    assert yoco.main(TRAIN) == 0
    # Two architectures are sampled in every step.
    assert len(sources) > 20
    assert all(source is sampler for source, sampler in zip(sources, samplers[::2]))
    assert all(source is sampler for source, sampler in zip(sources, samplers[1::2]))
    # P_theta is one object, and pi is a new one in every step. Both have been sampled.
    assert 2 < len({id(source) for source in sources}) < len(sources)


def test_one_seed_one_result(trained_project, in_data_dir):
    """The same seed gives the same bytes.

    Another seed gives other weights and another theta.
    """
    assert yoco.main(TRAIN) == 0
    assert yoco.main(SEARCH) == 0
    assert yoco.main(TRAIN + ["--out", "other", "--seed", "4"]) == 0

    for directory in ("superbert/tiny", SUB_BERT):
        assert read_results(directory) == read_results(trained_project / directory)
    assert read_results("other") != read_results("superbert/tiny")

    theta = read_facts("superbert/tiny")["theta"]
    assert theta == read_facts(trained_project / "superbert/tiny")["theta"]
    assert theta != read_facts("other")["theta"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo here")
@pytest.mark.parametrize("precision", ["bf16", "fp32", "auto"])
def test_precision_is_recorded(in_data_dir, precision):
    """Compare run.json with the precision asked for, or `auto` with the CPU's flags."""
    expected = precision
    if precision == "auto":
        flags = set(Path("/proc/cpuinfo").read_text().split())
        expected = "bf16" if flags & {"amx_bf16", "avx512_bf16"} else "fp32"
    assert yoco.main(TRAIN + ["--precision", precision]) == 0
    assert read_facts("superbert/tiny")["precision"] == expected


@pytest.mark.parametrize("options, theta_moves", [
    pytest.param(["--strategy", "explore"], False, id="explore"),
    pytest.param(["--strategy", "exploit"], True, id="exploit"),
    pytest.param(["--strategy", "noise"], True, id="noise"),
    pytest.param(["--stages", "all"], True, id="all-stages-at-once"),
    pytest.param(["--recipe", "best"], True, id="best-recipe"),
    pytest.param(["--keep-layers", "even"], True, id="evenly-spaced-layers"),
    pytest.param(["--holdout", "0"], True, id="no-hold-out"),
])
def test_options_change_the_training(trained_project, in_data_dir, options, theta_moves):
    """Compare the training with the default one: each option gives other weights.

    theta stays uniform only if the strategy is to explore.
    """
    assert yoco.main(TRAIN + options) == 0
    default_results = read_results(trained_project / "superbert/tiny")
    assert read_results("superbert/tiny") != default_results
    theta = read_facts("superbert/tiny")["theta"]
    # 1 for a variable that is uniform.
    relative_maxima = [max(variable) * len(variable) for variable in theta]
    if theta_moves:
        assert max(relative_maxima) > 1.01
    else:
        assert np.allclose(relative_maxima, 1)


@pytest.mark.parametrize("strategy, K", [
    pytest.param("explore", 0.0, id="explore"),
    pytest.param("exploit", 1.0, id="exploit"),
])
def test_strategies_with_constant_controller(in_data_dir, monkeypatch, strategy, K):
    """K is always 0 if the strategy is to explore, and always 1 if it is to exploit.

    Only P_theta is sampled if K is 1. Otherwise every step samples a new pi.
    """
    sample, samplers = Categorical.sample, []

    def record_and_sample(self, rng):
        samplers.append(self)
        return sample(self, rng)

    monkeypatch.setattr(Categorical, "sample", record_and_sample)
    assert yoco.main(TRAIN + ["--strategy", strategy]) == 0
    assert {line["K"] for line in read_log_lines("superbert/tiny")} == {K}
    # Two architectures are sampled in every step.
    num_distributions = len({id(sampler) for sampler in samplers})
    assert num_distributions == (1 if K == 1 else len(samplers) / 2)


def test_best_recipe(in_data_dir):
    """The recipe `best` sets four other options."""
    assert yoco.main(TRAIN + ["--recipe", "best"]) == 0
    settings = read_facts("superbert/tiny")["settings"]
    assert settings["stages"] == "all"
    assert settings["reorder"] is True
    assert settings["distill"] is True
    assert settings["keep_layers"] == "even"
    assert BertConfig.load("superbert/tiny").keep_layers == "even"


@pytest.mark.parametrize("name, hidden_size, typed, line", [
    pytest.param("MRPC", 768, [], "learning rate 2e-05, the paper's for MRPC", id="paper"),
    pytest.param("MNLI", 768, [], "learning rate 1e-05, the paper's for MNLI", id="paper-mnli"),
    pytest.param("my", 512, [], "learning rate 2e-05, the paper's for BERT-base", id="own-data"),
    pytest.param(
        "MRPC", 384, [],
        "learning rate 0.0001, because the hidden size is below 512 (--lr changes it)",
        id="small-bert"),
    pytest.param(
        "TOY", 48, [], "learning rate 0.001, chosen for TOY (--lr changes it)", id="toy"),
    pytest.param("MRPC", 384, ["--lr", "3e-5"], "learning rate 3e-05", id="typed"),
])
def test_default_learning_rate(tmp_path, capsys, name, hidden_size, typed, line):
    """The learning rate follows the task and the size of the BERT, and the reason is printed."""
    bert = write_tiny_bert(tmp_path / "bert", hidden_size=hidden_size, num_attention_heads=4)
    settings, _ = yoco.parse(["train", "--data", name, "--bert", str(bert), *typed])
    resolved = yoco.resolve_defaults(settings, name)
    assert capsys.readouterr().out == line + "\n"
    assert resolved.lr == float(line.split()[2].rstrip(","))


def test_search_without_holdout(in_data_dir, capsys):
    """Without a hold-out set, search needs --select-on dev."""
    assert yoco.main(TRAIN + ["--holdout", "0"]) == 0
    assert_refused(capsys, ["search", "--max-params", "0.9x"], "--select-on dev")
    assert yoco.main(SEARCH + ["--select-on", "dev"]) == 0
    assert "optimistic" in capsys.readouterr().out


def test_plain_fine_tuning(in_data_dir, capsys):
    """--stages largest is plain fine-tuning: one stage, K = 1, and nothing to search."""
    words = TRAIN + ["--stages", "largest"]
    assert_refused(capsys, words + ["--distill"], "a single architecture")
    assert yoco.main(words) == 0
    printed = capsys.readouterr().out
    assert "epochs, one architecture\n" in printed
    # The other architectures were not trained, so no command reports them.
    assert yoco.main(["eval", "--model", "superbert/tiny"]) == 0
    for text in (printed, capsys.readouterr().out):
        assert "largest: " in text
        assert "smallest" not in text and "most likely" not in text
    logged = {(line["stage"], line["K"]) for line in read_log_lines("superbert/tiny")}
    assert logged == {("largest", 1.0)}
    assert_refused(capsys, SEARCH + ["--model", "superbert/tiny"], "nothing to search")
    assert_refused(capsys, SEARCH, "no finished super-BERT")


FINE_TUNE = ["train", "--data", "tiny", "--bert", SUB_BERT, "--stages", "largest", "--out",
             "tuned", "--epochs", "2", "--lr", "1e-3", "--batch-size", "8", "--seed", "5",
             *CPU]


def remove_dropout(directory):
    """Write a model's config.json again, without dropout."""
    path = Path(directory, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | NO_DROPOUT))


def test_fine_tuned_sub_bert_equals_plain_pytorch(in_sub_bert_dir):
    """Compare a fine-tuned sub-BERT with a loop of plain PyTorch over the same batches."""
    remove_dropout(SUB_BERT)
    sub_bert = load_bert(SUB_BERT)
    assert yoco.main(FINE_TUNE) == 0
    tuned = load_bert("tuned")
    assert tuned.config.arch == sub_bert.config.arch == Arch(**read_facts(SUB_BERT)["arch"])

    # The hold-out set is the one of the super-BERT's training, which had seed 0.
    examples, _ = data.split_holdout(data.load_task("tiny").train, 0.1, 0)
    encoded = data.encode(examples, SUB_BERT)
    num_steps = 2 * math.ceil(len(examples) / 8)
    batches = data.batches(encoded, 8, seed=5)
    adam = torch.optim.Adam(sub_bert.parameters())
    for step in range(num_steps):
        *inputs, labels = data.collate(encoded, next(batches))
        adam.zero_grad()
        F.cross_entropy(sub_bert(*inputs), labels).backward()
        torch.nn.utils.clip_grad_norm_(sub_bert.parameters(), 1.0)
        adam.param_groups[0]["lr"] = 1e-3 * (1 - step / num_steps)
        adam.step()
    expected, before = sub_bert.state_dict(), load_bert(SUB_BERT).state_dict()
    for name, weight in tuned.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)
    moved = max((weight - before[name]).abs().max() for name, weight in expected.items())
    assert moved > 1e-3


def test_fine_tuned_sub_bert_is_an_ordinary_run(in_sub_bert_dir, capsys):
    """eval and predict read a fine-tuned sub-BERT, and search refuses it.

    The classifier and the hold-out set are kept. Sizes are shares of the super-BERT.
    """
    assert yoco.main(FINE_TUNE) == 0
    printed = capsys.readouterr().out
    assert f"{SUB_BERT}: classifier kept: 0, 1\n" in printed
    assert "epochs, one architecture\n" in printed
    found, facts = read_facts(SUB_BERT), read_facts("tuned")
    assert facts["held_out"] == found["held_out"] == [0.1, 0]
    config = BertConfig.load("tiny")
    share = found["params"] / count_params(config, config.arch)
    sizes = f"{found['params']:,} parameters ({share:.3f}x)"
    assert f"hold-out, sub-BERT: {sizes}" in printed
    assert list(facts["holdout"]) == ["sub-BERT"]

    assert yoco.main(["eval", "--model", "tuned", *CPU]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"sub-BERT: {Arch(**found['arch'])}\n  {sizes}")
    assert printed.count("latency") == 1
    model, encode = data.load("tuned")
    dev = data.load_task("tiny").dev
    labels = [label for label, _ in data.predict(model, "tuned", dev, NO_AUTOCAST)]
    logits = model(*encode([example.sentence1 for example in dev]))
    assert labels == [model.config.labels[i] for i in logits.argmax(1)]
    assert_refused(capsys, SEARCH + ["--model", "tuned"], "tuned is a single architecture")

    # A second fine-tuning still knows the super-BERT.
    again = FINE_TUNE[:4] + ["tuned", *FINE_TUNE[5:], "--out", "again"]
    assert yoco.main(again) == 0
    assert f"hold-out, sub-BERT: {sizes}" in capsys.readouterr().out


def test_interrupted_fine_tuning_equals_whole(in_sub_bert_dir, monkeypatch):
    """Compare a fine-tuning that was stopped and resumed with one that nobody stopped."""
    assert yoco.main(FINE_TUNE + ["--out", "whole"]) == 0
    send_signal_in_step(monkeypatch, 5)
    assert yoco.main(FINE_TUNE) == 128 + signal.SIGTERM
    assert yoco.main(FINE_TUNE + ["--resume"]) == 0
    assert read_results("tuned") == read_results("whole")
    assert read_facts("tuned") == read_facts("whole")


def test_fine_tuned_sub_bert_of_an_older_search(in_sub_bert_dir, capsys):
    """Without the sizes of the super-BERT, sizes are shares of the sub-BERT."""
    facts = read_facts(SUB_BERT)
    del facts["full_params"], facts["full_flops"]
    Path(SUB_BERT, "run.json").write_text(json.dumps(facts))
    assert yoco.main(FINE_TUNE) == 0
    assert f"hold-out, sub-BERT: {facts['params']:,} parameters (1.000x)" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("options", [
    pytest.param([], id="progressive"),
    pytest.param(["--recipe", "best"], id="best"),
])
def test_sub_bert_has_nothing_to_search(in_sub_bert_dir, capsys, options):
    """A sub-BERT can be fine-tuned only with --stages largest, which the message says."""
    words = ["train", "--data", "tiny", "--bert", SUB_BERT, *CPU, *options]
    assert_refused(capsys, words, f"{SUB_BERT} is a sub-BERT", "add --stages largest")
    assert not Path("superbert").exists()


def test_single_arch():
    """The space of a sub-BERT holds its architecture, and refuses another."""
    arch = Arch((4, 1, 6), (8, 48, 12))
    space = model_module.SingleArch(arch)
    assert space.size() == 1
    assert space.largest() == space.smallest() == arch
    assert space.choices(arch) == [0, 0, 0, 0]
    with pytest.raises(UserError, match="is not the sub-BERT"):
        space.choices(Arch((4,), (8,)))


def test_second_training_keeps_the_holdout(in_data_dir):
    """A second training on the same train.tsv keeps the hold-out set of the first.

    Otherwise it would select on examples that the first has been trained on. With other
    data it makes a split of its own.
    """
    assert yoco.main(TRAIN + ["--stages", "largest"]) == 0
    again = TRAIN + ["--bert", "superbert/tiny", "--seed", "5"]
    assert yoco.main(again + ["--out", "second"]) == 0
    with open("tiny/train.tsv", "a") as file:
        file.write("the film\t1\n")
    assert yoco.main(again + ["--out", "third"]) == 0
    # The fraction and the seed of the split.
    assert read_facts("superbert/tiny")["held_out"] == [0.1, 0]
    assert read_facts("second")["held_out"] == [0.1, 0]
    assert read_facts("third")["held_out"] == [0.1, 5]


@pytest.mark.parametrize("options", [
    pytest.param([], id="progressive"),
    pytest.param(["--stages", "all", "--reorder"], id="all-stages-at-once-and-sorted"),
])
def test_frozen_teacher(in_data_dir, monkeypatch, options):
    """The teacher is the largest architecture as it was when smaller sub-BERTs opened.

    The model moves on, and the teacher's logits stay the same.
    """
    weight_gradient = yoco.weight_gradient
    ids, token_types, mask = small_batch()
    logits = []                         # of the model and of the teacher, in every step

    def spy(model, batch, archs, autocast, teacher=None):
        if teacher:
            inputs = (ids % model.config.vocab_size, token_types, mask)
            with torch.no_grad():
                logits.append([model.eval()(*inputs), teacher.eval()(*inputs)])
            model.train()
        return weight_gradient(model, batch, archs, autocast, teacher)

    monkeypatch.setattr(yoco, "weight_gradient", spy)
    assert yoco.main(TRAIN + ["--distill", *options]) == 0
    assert len(logits) > 4
    first_model, first_teacher = logits[0]
    last_model, last_teacher = logits[-1]
    assert all(torch.equal(teacher, first_teacher) for _, teacher in logits)
    assert torch.equal(first_model, first_teacher)
    assert not torch.allclose(last_model, last_teacher)


def test_many_budgets(in_data_dir, monkeypatch, capsys):
    """Compare each budget's winner with the best that fits among all logged evaluations.

    Winners are chosen after all searches, so that no winner is worse than a cheaper one.
    No architecture is evaluated twice, and the logs hold every evaluation.
    """
    write_tiny_bert(in_data_dir / "tiny", num_hidden_layers=4, num_attention_heads=6)
    assert yoco.main(TRAIN) == 0
    make_evaluator = data.make_evaluator
    evaluated = []                      # (number of examples, architecture)

    def make_recording_evaluator(model, parts, *args):
        evaluate = make_evaluator(model, parts, *args)

        def record_and_evaluate(arch):
            evaluated.append((len(parts[0]), arch))
            return evaluate(arch)

        return record_and_evaluate

    monkeypatch.setattr(data, "make_evaluator", make_recording_evaluator)
    words = ["search", "--evaluations", "20", *CPU]
    assert yoco.main([*words, "--max-params", "0.9x", "0.6X", "0.7x"]) == 0

    # The hold-out set has 6 examples. The other three evaluations are those of the
    # winners on dev.
    on_holdout = [arch for num_examples, arch in evaluated if num_examples == 6]
    assert len(evaluated) == len(on_holdout) + 3
    assert len(set(on_holdout)) == len(on_holdout)

    config = BertConfig.load("tiny")
    space = SearchSpace.for_config(config)
    full = count_params(config, config.arch)
    printed = capsys.readouterr().out
    directories = {share: f"subbert/tiny-{share}x" for share in (0.9, 0.6, 0.7)}
    logged = {}                         # architecture -> (score, -cost)
    for directory in directories.values():
        for line in read_log_lines(directory):
            logged[space.arch(line["choices"])] = (line["score"], -line["cost"])
    for share, directory in directories.items():
        fitting = {arch: rank for arch, rank in logged.items()
                   if -rank[1] < share * full}
        facts = read_facts(directory)
        assert (facts["selection_score"], -facts["params"]) == max(fitting.values())
        assert Arch(**facts["arch"]) in fitting
        assert directory in printed
        assert facts["evaluations_run"] == len(read_log_lines(directory))
        assert facts["evaluations_asked"] == 20
    assert set(logged) == set(on_holdout)


@pytest.fixture
def search_by_score(in_data_dir, monkeypatch):
    """Return a function that searches a BERT of six layers by a made-up score.

    search(score, budget) samples 500 architectures, and returns the lines of the log. The
    space has three million architectures, and theta is uniform when the search begins.
    """
    write_tiny_bert(in_data_dir / "tiny", num_hidden_layers=6, num_attention_heads=6)
    assert yoco.main(TRAIN + ["--epochs", "0.1", "--strategy", "explore"]) == 0
    assert SearchSpace.for_config(BertConfig.load("tiny")).size() > 3_000_000
    words = ["search", "--evaluations", "500", "--archs-per-step", "6", *CPU]

    def search(score, budget):
        monkeypatch.setattr(
            data, "make_evaluator", lambda *_: lambda arch: {"score": float(score(arch))})
        assert yoco.main([*words, "--max-params", budget]) == 0
        return read_log_lines(f"subbert/tiny-{budget}")

    return search


def test_search_finds_the_best(search_by_score, capsys):
    """The search finds the one best architecture of three million with 500 samples.

    The score counts the layers that have the heads and the FFN size of a target. It does
    so because theta moves: late samples score much higher than early ones.
    """
    target = Arch((4, 2, 6, 2, 4), (6, 24, 4, 8, 6))

    def score(arch):
        num_equal = sum(a == b for a, b in zip(zip(*arch), zip(*target)))
        return 10 * num_equal + 50 * (arch == target)

    scores = [line["score"] for line in search_by_score(score, "0.9x")]
    assert Arch(**read_facts("subbert/tiny-0.9x")["arch"]) == target
    assert max(scores) == 100
    assert np.mean(scores[-50:]) > 2 * np.mean(scores[:50])
    # The last step samples two architectures, not six.
    assert "500/500  sampled" in capsys.readouterr().err


def test_search_begins_with_the_learned_theta(in_trained_dir):
    """If theta in run.json has settled on one sub-BERT, search samples no other."""
    path = Path("superbert/tiny/run.json")
    facts = json.loads(path.read_text())
    space = SearchSpace.for_config(BertConfig.load("superbert/tiny"))
    settled_on = [1, 3, 7]
    facts["theta"] = [np.eye(size)[choice].tolist()
                      for size, choice in zip(space.categories, settled_on, strict=True)]
    path.write_text(json.dumps(facts))
    assert yoco.main(SEARCH) == 0
    # The largest and the smallest are always evaluated.
    choices = [line["choices"] for line in read_log_lines(SUB_BERT)]
    assert choices == [[1, 11, 11], [0, 0, None], settled_on]


def test_search_moves_toward_the_budget(search_by_score):
    """Compare the late samples of two searches that differ only in their budgets.

    The larger an architecture, the higher its score. So without the reward of Eq. 7 both
    searches would end near the full model.
    """
    config = BertConfig.load("tiny")
    full = count_params(config, config.arch)

    def score(arch):
        return 50 + 50 * count_params(config, arch) / full

    late_costs = {}                     # relative to the full model
    for budget in ("0.4x", "0.85x"):
        lines = search_by_score(score, budget)
        late_costs[budget] = np.mean([line["cost"] for line in lines[-50:]]) / full
    assert late_costs["0.4x"] < 0.55
    assert late_costs["0.85x"] > 0.65


def test_table_of_budgets(in_trained_dir, monkeypatch, capsys):
    """Compare the table after a search for several budgets with run.json.

    The milliseconds are measured once per sub-BERT. With one budget there is no table.
    """
    timed = []

    def measure(model, *_):
        timed.append(model.config.arch)
        return 12.345 + len(timed)

    # Better sub-BERTs have more heads, so the budgets have different winners.
    monkeypatch.setattr(data, "make_evaluator",
                        lambda *_: lambda arch: {"score": float(sum(arch.heads))})
    monkeypatch.setattr(yoco, "latency", measure)
    assert yoco.main([*SEARCH, "--max-params", "0.9x"]) == 0
    assert "directory" not in capsys.readouterr().out
    assert yoco.main([*SEARCH, "--max-params", "90%", "0.5x", "0.9X", "--out", "sub"]) == 0
    *_, header, first, second, third, same = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "budget", "parameters", "FLOPs", "ms", "here", "hold-out", "dev", "directory"]
    milliseconds = ["13.35", "14.35", "13.35"]
    for line, budget, ms in zip((first, second, third), ("90%", "0.5x", "0.9x"), milliseconds):
        facts = read_facts(f"sub/{budget}")
        assert line.split() == [
            budget, f"{facts['params']:,}", f"{facts['flops']:,}", ms,
            f"{facts['selection_score']:.2f}", f"{facts['dev']['score']:.2f}", f"sub/{budget}"]
        assert line.index("sub/") == header.index("directory")
    assert same == "90% and 0.9x found the same sub-BERT"
    assert len(timed) == len(set(timed)) == 2


def test_search_by_latency(in_trained_dir, monkeypatch):
    """Search times every architecture once, and the winner twice: it must fit twice.

    The clock here is slow the second time, except for an architecture with the fewest
    heads. So search must go down its list until only that one is left.
    """
    timed = []

    def slow_clock(model, num_tokens, autocast):
        arch = model.config.arch
        timed.append(arch)
        assert num_tokens == 16
        is_slow = timed.count(arch) > 1 and sum(arch.heads) > 2
        return sum(arch.heads) + 100 * is_slow

    def make_evaluator(*_):
        return lambda arch: {"score": float(sum(arch.heads))}

    monkeypatch.setattr(yoco, "latency", slow_clock)
    monkeypatch.setattr(data, "make_evaluator", make_evaluator)
    words = ["search", "--evaluations", "40", *CPU]
    assert yoco.main([*words, "--max-latency", "4.5MS"]) == 0

    facts = read_facts("subbert/tiny-4.5ms-latency")
    assert sum(facts["arch"]["heads"]) == 2
    assert facts["cost"] == 2
    assert facts["unit"] == "ms"
    assert facts["full_cost"] == 6
    # All that fitted at first, but for the fewest heads, were timed again.
    better = {arch for arch in timed if 2 < sum(arch.heads) <= 4}
    assert better
    assert {arch for arch in timed if timed.count(arch) > 1} >= better


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock of yoco.py by one that only tests move. Return [seconds]."""
    now = [0.0]
    fake = SimpleNamespace(perf_counter=lambda: now[0], strftime=time.strftime,
                           gmtime=time.gmtime, strptime=time.strptime)
    monkeypatch.setattr(yoco, "time", fake)
    return now


@pytest.mark.parametrize("stages, seconds_per_step, whole, rest", [
    pytest.param("largest", 4, ["24 steps left, about 2 minutes"],
                 ["14 steps left, about 56 seconds"], id="minutes"),
    pytest.param("largest", 600, ["24 steps left, about 4.0 hours"],
                 ["14 steps left, about 140 minutes"], id="hours"),
    pytest.param("largest", 0.1, [], [], id="too-short"),
    # With one architecture per step, later stages have fewer FLOPs. They do not count as faster.
    pytest.param("all", 4, ["24 steps left, about 2 minutes"],
                 ["14 steps left, about 56 seconds"], id="smaller-architectures"),
])
def test_time_of_a_training(in_data_dir, monkeypatch, capsys, clock, stages, seconds_per_step,
                            whole, rest):
    """A training prints once how long it takes, and again after --resume.

    The first step is slower, and does not count.
    """
    clip_and_check = yoco.clip_and_check

    def take_time(model, losses, t, *args):
        clock[0] += 1000 if t == 0 else seconds_per_step
        return clip_and_check(model, losses, t, *args)

    monkeypatch.setattr(yoco, "clip_and_check", take_time)
    # 54 examples are 7 batches of 8, so this training has 28 steps.
    words = [*TRAIN, "--stages", stages, "--archs-per-step", "1"]
    assert yoco.main(words) == 0
    assert re.findall(r"\d+ steps left.*", capsys.readouterr().out) == whole
    send_signal_in_step(monkeypatch, 10)
    assert yoco.main([*words, "--out", "part"]) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert yoco.main([*words, "--out", "part", "--resume"]) == 0
    assert re.findall(r"\d+ steps left.*", capsys.readouterr().out) == rest


@pytest.mark.parametrize("num_archs", [1, 2])
def test_relative_flops(num_archs):
    """Compare the assumed FLOPs of a step in each stage with samples, to 15%."""
    config = BertConfig(vocab_size=50, hidden_size=384, num_hidden_layers=6,
                        num_attention_heads=12, intermediate_size=1536)
    space = SearchSpace.for_config(config)
    P, rng = Categorical(space.categories), np.random.default_rng(0)
    settings = SimpleNamespace(archs_per_step=num_archs, distill=False)
    first, *stages = yoco.make_stages(space, "MRPC", 10)
    assert yoco.relative_flops(config, first, settings) == 1
    full = count_flops(config, space.largest())
    for stage in stages:
        P.set_open(yoco.open_masks(space, stage))
        sampled = [count_flops(config, space.arch(P.sample(rng))) for _ in range(200)]
        expected = num_archs * np.mean(sampled) / full
        assert abs(yoco.relative_flops(config, stage, settings) / expected - 1) < 0.15
        with_teacher = SimpleNamespace(archs_per_step=num_archs, distill=True)
        assert yoco.relative_flops(config, stage, with_teacher) > expected


@pytest.mark.parametrize("seconds, words, line", [
    pytest.param(
        9, ["--evaluations", "1000"],
        "1,000 evaluations, at most 9 s each: up to 150 minutes (--evaluations 60: 9 minutes)",
        id="long"),
    pytest.param(
        9, ["--max-params", "0.9x", "0.7x"],
        "24 evaluations, at most 9 s each: up to 4 minutes", id="two-budgets"),
    pytest.param(0.5, [], None, id="too-short"),
])
def test_time_of_a_search(in_trained_dir, monkeypatch, capsys, clock, seconds, words, line):
    """A search prints once how long it takes, and again after --resume.

    Its first evaluation is that of the largest architecture, which takes longest.
    """
    largest = BertConfig.load("tiny").arch

    def make_evaluator(*_):
        def take_time(arch):
            clock[0] += seconds if arch == largest else seconds / 2
            return {"score": float(sum(arch.heads))}
        return take_time

    monkeypatch.setattr(data, "make_evaluator", make_evaluator)
    search = [*SEARCH, *words, "--out", "sub"]
    send_signal_in_step(monkeypatch, 2)
    assert yoco.main(search) == 128 + signal.SIGTERM
    expected = [line] if line else []
    assert re.findall(r"[\d,]+ evaluations.*", capsys.readouterr().out) == expected
    assert yoco.main(["search", "--resume", "--out", "sub"]) == 0
    again = re.findall(r"([\d,]+) evaluations left, about 4.5 s each: up to .*",
                       capsys.readouterr().out)
    assert len(again) == len(expected)
    if line:
        num_evaluations = int(line.split()[0].replace(",", ""))
        left = int(again[0].replace(",", ""))
        assert num_evaluations - 6 <= left < num_evaluations


def write_regression_data(directory, num_train=40):
    """Write a data set in STS-B's format: pairs of texts with scores from 0 to 5."""
    rng = np.random.default_rng(0)
    for name, count in (("train", num_train), ("dev", 12)):
        rows = []
        for _ in range(count):
            second_text = rng.choice(["good", "bad", "not"])
            rows.append(["good film", second_text, f"{rng.uniform(0, 5):.3f}"])
        write_tsv(directory / f"{name}.tsv", ["sentence1", "sentence2", "score"], *rows)


@pytest.mark.parametrize("labels, score, warned", [
    pytest.param("classes", 75.0, True, id="as-good"),
    pytest.param("classes", 60.0, True, id="worse"),
    pytest.param("classes", 75.1, False, id="better"),
    pytest.param("one class on dev", 100.0, False, id="nothing-can-be-better"),
    pytest.param("scores", 0.0, True, id="regression"),
    pytest.param("scores", 0.1, False, id="regression-better"),
])
def test_nothing_was_learned(in_data_dir, monkeypatch, capsys, labels, score, warned):
    """train and search warn if the model is no better than a constant answer.

    Three of four labels are 1, in the hold-out set and in dev. The correlation with the
    mean is 0.
    """
    rows = [[f"the film {i}", "1" if i % 4 else "0"] for i in range(80)]
    write_tsv(in_data_dir / "tiny" / "train.tsv", HEADER, *rows)
    dev_rows = [row for row in rows[:20] if labels == "classes" or row[1] == "1"]
    write_tsv(in_data_dir / "tiny" / "dev.tsv", HEADER, *dev_rows)
    answer = "the most frequent answer, which scores 75.00"
    if labels == "scores":
        write_regression_data(in_data_dir / "tiny")
        answer = "the mean, which scores 0.00"
    monkeypatch.setattr(data, "make_evaluator", lambda *_: lambda arch: {"score": score})
    warnings = {}
    for name, words in (("train", TRAIN + ["--epochs", "1"]), ("search", SEARCH)):
        assert yoco.main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        warnings[name] = [line for line in lines
                          if line.startswith("WARNING") and "no" in line and "better" in line]
    if not warned:
        assert warnings == {"train": [], "search": []}
        return
    (in_train,), (in_search,) = warnings.values()
    assert f"{answer} on the hold-out set: try a higher or another --lr" in in_train
    assert f"{answer} on dev: choose a larger budget, or train again" in in_search


def test_regression(in_data_dir, capsys):
    """Train and search on STS-B's format, and compare a prediction with the logit."""
    write_regression_data(in_data_dir / "tiny")
    assert yoco.main(TRAIN) == 0
    assert yoco.main(SEARCH) == 0
    assert set(read_facts(SUB_BERT)["dev"]) == {"score", "pearson", "spearman"}
    assert yoco.main(["eval", "--model", SUB_BERT, *CPU]) == 0
    assert "Always giving the mean scores 0.00" in capsys.readouterr().out
    model, encode = data.load(SUB_BERT)
    pair = data.Example("good film", "bad", 0)
    prediction, = data.predict(model, SUB_BERT, [pair], NO_AUTOCAST)
    logit = model(*encode("good film", "bad")).item()
    assert prediction == (pytest.approx(logit, abs=1e-6), {})


@pytest.mark.parametrize("metric, parts", [
    pytest.param("f1", ["f1"], id="f1"),
    pytest.param("accuracy+matthews", ["accuracy", "matthews"], id="sum"),
])
def test_metric_of_your_own(in_data_dir, capsys, metric, parts):
    """train, search and eval use --metric as the score. The output names the class of F1.

    F1 is that of `yes`, the second label in sorted order.
    """
    for name in ("train", "dev"):
        path = Path("tiny", f"{name}.tsv")
        text = path.read_text().replace("\t1\n", "\tyes\n").replace("\t0\n", "\tno\n")
        path.write_text(text)
    assert yoco.main([*TRAIN, "--metric", metric]) == 0
    assert yoco.main(SEARCH) == 0
    trained, found = read_facts("superbert/tiny"), read_facts(SUB_BERT)
    assert trained["metric"] == found["metric"] == metric
    for values in (trained["holdout"]["largest"], trained["holdout"]["smallest"], found["dev"]):
        mean = sum(values[part] for part in parts) / len(parts)
        assert values["score"] == pytest.approx(mean)
    capsys.readouterr()
    assert yoco.main(["eval", "--model", SUB_BERT, *CPU]) == 0
    printed = capsys.readouterr().out
    assert f"  score {found['dev']['score']:.2f}  accuracy" in printed

    # The F1 of `yes`, from the predictions.
    model, encode = data.load(SUB_BERT)
    rows = [line.split("\t") for line in Path("tiny/dev.tsv").read_text().splitlines()[1:]]
    indices = model(*encode([text for text, _ in rows])).argmax(1).tolist()
    predicted = [("no", "yes")[i] for i in indices]
    hits = sum(label == name == "yes" for (_, label), name in zip(rows, predicted))
    total = predicted.count("yes") + sum(label == "yes" for _, label in rows)
    assert f"  f1 (of yes) {200 * hits / total:.2f}  " in printed


def test_mnli_and_flops(in_data_dir, capsys):
    """Train and search on MNLI's two dev sets: the score is their mean.

    The budget in FLOPs is kept. eval needs only the two dev files.
    """
    rng = np.random.default_rng(0)
    for name in ("train", "dev_matched", "dev_mismatched"):
        rows = []
        for _ in range(40):
            text = rng.choice(["good", "bad"])
            rows.append([text, "film", rng.choice(["entailment", "neutral"])])
        write_tsv(in_data_dir / "tiny" / f"{name}.tsv",
                  ["sentence1", "sentence2", "gold_label"], *rows)
    assert yoco.main(TRAIN) == 0
    assert yoco.main(["search", "--max-flops", "0.5x", "--evaluations", "20"] + CPU) == 0
    facts = read_facts("subbert/tiny-0.5x-flops")
    dev = facts["dev"]
    config = BertConfig.load("tiny")
    assert np.isclose(dev["score"], (dev["accuracy"] + dev["accuracy_mismatched"]) / 2)
    assert facts["flops"] < count_flops(config, config.arch) / 2
    Path("tiny/train.tsv").unlink()
    assert yoco.main(["eval", "--model", "subbert/tiny-0.5x-flops", *CPU]) == 0
    assert (f"accuracy_mismatched {dev['accuracy_mismatched']:.2f}"
            in capsys.readouterr().out)


def test_texts_as_long_as_the_positions(in_data_dir):
    """A BERT of 13 positions takes texts of 13 tokens, despite padding to multiples."""
    write_tiny_bert(in_data_dir / "tiny", max_position_embeddings=13)
    rows = [["good " * 20, "1"], ["bad " * 20, "0"]]
    write_tsv(in_data_dir / "tiny" / "train.tsv", HEADER, *rows * 20)
    assert yoco.main(TRAIN) == 0
    assert yoco.main(SEARCH) == 0


# ==================================================================================================
# Part II: the machinery. You can stop here on a first reading.
# ==================================================================================================

# ---- Weights on disk -----------------------------------------------------------------------------

def test_old_tensor_names(tmp_path, capsys):
    """Load weights under the names that old versions of transformers gave them.

    Old files say gamma and beta, have no `bert.`, have prefixes of wrappers,
    pre-training heads and a position_ids buffer. Here they have neither classifier nor
    pooler, and come in two files.
    """
    model = small_model()
    save_bert(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "bert.encoder.layer.3.attention.self.query.weight" in tensors
    (tmp_path / "model.safetensors").unlink()

    old_tensors = {"cls.predictions.bias": torch.zeros(50),
                   "embeddings.position_ids": torch.arange(20)[None]}
    for name, tensor in tensors.items():
        if "classifier" in name or "pooler" in name:
            continue
        old_name = name.removeprefix("bert.")
        old_name = old_name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old_name = old_name.replace("LayerNorm.bias", "LayerNorm.beta")
        old_tensors["module._orig_mod." + old_name] = tensor

    names = list(old_tensors)
    weight_map = {}
    for file, names_in_file in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: old_tensors[name] for name in names_in_file}, tmp_path / file)
        weight_map |= dict.fromkeys(names_in_file, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    # Fields that transformers 2 wrote.
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"eos_token_ids": 0, "length_penalty": 1.0, "pruned_heads": {},
               "hidden_act": None}
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded = load_bert(tmp_path, 7, tuple("abcdefg"))
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path}: classifier new\n{tmp_path}: pooler new\n"
    assert loaded.classifier.weight.shape == (7, 24)
    assert loaded.pooler.weight.any()
    for name, tensor in model.state_dict().items():
        if "classifier" not in name and "pooler" not in name:
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_unknown_config_fields_are_named_in_one_line(tmp_path, capsys):
    """An unknown field of config.json changes nothing, and load_bert names it on stderr."""
    model, batch = small_model(), small_batch()
    save_bert(model, tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    # The last two are in the config.json of nearly every BERT, and are not worth a line.
    fields |= {"rope_theta": 1e4, "my_field": 1, "use_cache": True, "transformers_version": "5"}
    path.write_text(json.dumps(fields))
    capsys.readouterr()
    loaded = load_bert(tmp_path)
    assert torch.equal(loaded(*batch), model(*batch))
    printed = capsys.readouterr()
    assert not printed.out
    line, = printed.err.strip().split("\n")
    assert line.startswith(f"{path}: ignored")
    assert line.endswith("my_field, rope_theta")


def test_unknown_config_fields_of_random_weights_are_named(in_data_dir, capsys):
    """A typing error in a data directory's config.json is named, too."""
    write_tiny_bert(in_data_dir / "tiny", num_hidden_layer=9)
    assert yoco.main(TRAIN) == 0
    assert "tiny/config.json: ignored fields" in capsys.readouterr().err


def test_tokenizer_is_the_one_of_the_start(in_data_dir, monkeypatch):
    """train and search write the tokenizer, even if their input vanishes meanwhile."""
    vocab = Path("tiny/vocab.txt").read_bytes()
    monkeypatch.setattr(yoco, "report", lambda *_: Path("tiny/vocab.txt").unlink(missing_ok=True))
    assert yoco.main(TRAIN) == 0
    assert Path("superbert/tiny/vocab.txt").read_bytes() == vocab

    def move(setup, run, budget):
        move_toward_reward(setup, run, budget)
        Path("superbert/tiny/vocab.txt").unlink()

    move_toward_reward = yoco.move_toward_reward
    monkeypatch.setattr(yoco, "move_toward_reward", move)
    assert yoco.main(SEARCH) == 0
    assert Path("subbert/tiny-0.9x/vocab.txt").read_bytes() == vocab


def test_classifier_follows_label_names(tmp_path):
    """Labels in another order permute the classifier, other labels get a new one."""
    model = small_model(3, id2label={"0": "no", "1": "yes", "2": "so"})
    batch = small_batch()
    save_bert(model, tmp_path)
    permuted = load_bert(tmp_path, 3, ("so", "no", "yes"))
    assert torch.allclose(permuted(*batch), model(*batch)[:, [2, 0, 1]], atol=1e-6)
    renamed = load_bert(tmp_path, 3, ("a", "b", "c"))
    assert not torch.isclose(renamed.classifier.weight, model.classifier.weight).any()


NUMBERS = tuple("0123456789") + ("10", "11")
DEFAULT_NAMES = ["LABEL_" + number for number in NUMBERS]


@pytest.mark.parametrize("names, num_rows, labels, rows, text", [
    pytest.param(
        ["a", "b", "c"], 3, "abc", [0, 1, 2],
        "kept: a, b, c",
        id="same-names"),
    pytest.param(
        ["c", "a", "b"], 3, "abc", [1, 2, 0],
        "permuted: a, b, c",
        id="other-order"),
    pytest.param(
        [0, 1, 2], 3, "012", [0, 1, 2],
        "kept: 0, 1, 2",
        id="names-are-integers"),
    pytest.param(
        ["2", "0", "1"], 3, "012", [1, 2, 0],
        "permuted: 0, 1, 2",
        id="numbers-in-another-order"),
    pytest.param(
        DEFAULT_NAMES[:3], 3, "012", [0, 1, 2],
        "kept: 0, 1, 2 (LABEL_i is i)",
        id="default-names"),
    pytest.param(
        None, 2, "01", [0, 1],
        "kept: 0, 1 (LABEL_i is i)",
        id="two-default-names-which-transformers-does-not-write"),
    pytest.param(
        None, 2, ["LABEL_0", "LABEL_1"], [0, 1],
        "kept: LABEL_0, LABEL_1",
        id="default-names-in-the-data"),
    pytest.param(
        DEFAULT_NAMES, 12, sorted(NUMBERS), [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9],
        "permuted: 0, 1, 10, 11, 2, 3, 4, 5, 6, 7, ... (LABEL_i is i)",
        id="twelve-numbers-sorted-as-texts"),
    pytest.param(
        DEFAULT_NAMES[:3], 3, "abc", None,
        "new: the checkpoint's labels were LABEL_0, LABEL_1, LABEL_2. To keep their weights, "
        "name them in id2label of its config.json",
        id="default-names-but-names-in-the-data"),
    pytest.param(
        DEFAULT_NAMES[:3], 3, "123", None,
        "new: the checkpoint's labels were LABEL_0, LABEL_1, LABEL_2. To keep their weights, "
        "name them in id2label of its config.json",
        id="numbers-from-1"),
    pytest.param(
        DEFAULT_NAMES[:3], 3, "01", None,
        "new: the checkpoint's labels were LABEL_0, LABEL_1, LABEL_2",
        id="fewer-numbers"),
    pytest.param(
        ["a", "b", "c"], 3, "abd", None,
        "new: the checkpoint's labels were a, b, c",
        id="other-names"),
    pytest.param(
        ["LABEL_1", "LABEL_0"], 2, "01", None,
        "new: the checkpoint's labels were LABEL_1, LABEL_0",
        id="default-names-in-another-order"),
    pytest.param(
        ["LABEL_0"], 1, "", [0],
        "kept: one score",
        id="regression"),
    pytest.param(
        ["LABEL_0"], 1, "01", None,
        "new: the checkpoint predicted a score",
        id="labels-after-regression"),
    pytest.param(
        ["a", "b"], 2, "", None,
        "new: the checkpoint's labels were a, b",
        id="regression-after-labels"),
    pytest.param(
        None, 0, "01", None,
        "new",
        id="pretrained"),
])
def test_classifier_of_a_checkpoint(tmp_path, capsys, names, num_rows, labels, rows, text):
    """The rows of the classifier go to the labels of the data, and one line says so."""
    model = small_model(num_rows or 1)
    save_bert(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if names:
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
    if not num_rows:
        replace_tensor(tmp_path, "classifier.weight", None)
        replace_tensor(tmp_path, "classifier.bias", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    loaded = load_bert(tmp_path, len(labels) or 1, tuple(labels))
    assert capsys.readouterr().out == f"{tmp_path}: classifier {text}\n"
    assert loaded.config.labels == tuple(labels)
    if rows:
        expected = model(*small_batch())[:, rows]
        assert torch.allclose(loaded(*small_batch()), expected, atol=1e-6)
    else:
        assert loaded.classifier.weight.shape == (len(labels) or 1, 24)
        assert not torch.isin(loaded.classifier.weight, model.classifier.weight).any()


@pytest.mark.parametrize("num_labels, changes", [
    pytest.param(
        1, {},
        id="one-logit-but-no-regression"),
    pytest.param(
        2, {"problem_type": "regression"},
        id="two-logits-of-a-regression"),
    pytest.param(
        4, {"id2label": {"0": "no", "1": "yes", "2": "so"}},
        id="four-logits-three-names"),
])
def test_logits_must_agree_with_the_config(tmp_path, num_labels, changes):
    """Logits that contradict config.json are refused, unless new labels replace them."""
    save_bert(small_model(num_labels, **changes), tmp_path)
    with pytest.raises(UserError, match="problem_type"):
        load_bert(tmp_path)
    assert load_bert(tmp_path, 3, ("so", "no", "yes")).classifier.weight.shape == (3, 24)


# ---- Refusals: bad data, bad weights, bad commands, damaged files --------------------------------

@pytest.mark.parametrize("files, parts", [
    pytest.param(
        {},
        ["train.tsv does not exist"],
        id="no-train"),
    pytest.param(
        {"train": b""},
        ["train.tsv is empty"],
        id="empty-train"),
    pytest.param(
        {"train": b"sentence\tlabel\n"},
        ["no rows"],
        id="header-only"),
    pytest.param(
        {"train": b"sentence\tlabel\na\t1\nb\n"},
        ["train.tsv, line 3: 1 columns, expected 2"],
        id="missing-column-in-a-row"),
    pytest.param(
        {"train": b"sentence\tlabel\n" + b"good " * 200_001},
        ["line 2", "more than 1,000,000"],
        id="endless-line"),
    pytest.param(
        {"train": b"sentence\tlabel\ngo\0od\t1"},
        ["train.tsv, line 2: a NUL"],
        id="nul-character"),
    pytest.param(
        {"train": b"sentence\tlabel\n\xff\xfe\t1\n"},
        ["line 2: not UTF-8"],
        id="not-utf-8"),
    pytest.param(
        {"train": b"sentence\tlabel\tlabel\na\t1\t0\n"},
        ["two columns of one name"],
        id="column-twice"),
    pytest.param(
        {"train": b"sentence\tsentence1\tlabel\na\tb\t0\n"},
        ["column sentence1: leave one out"],
        id="sentence-and-sentence1"),
    pytest.param(
        {"train": b"premise\thypothesis\tlabel\tlabel\tidx\na\tb\t0\t0\t0\n"},
        ["two columns of one name"],
        id="column-twice-in-a-file-of-the-library"),
    pytest.param(
        {"train": b"sentence\tlabel\na\t1\nb\t1\n"},
        ["only one label"],
        id="only-one-label"),
    pytest.param(
        {"train": b"sentence\tlabel\na\t1\nb\t0\n",
         "dev": b"sentence\tlabel\na\t2\n"},
        ["dev.tsv, line 2", "'2'", "0, 1"],
        id="unknown-label-in-dev"),
    pytest.param(
        {"train": b"sentence\tlabel\na\t1\nb\t0\n",
         "dev": b"sentence1\tsentence2\tlabel\nq\ta\t1\n"},
        ["dev.tsv has other columns"],
        id="other-columns-in-dev"),
    pytest.param(
        {"train": b"Quality\t#1 String\t#2 String\n1\ta\tb\n2\ta\tb\n"},
        ["line 3: label '2'"],
        id="unknown-label-in-mrpc"),
    pytest.param(
        {"train": b"sentence1\tsentence2\tscore\na\tb\t1\na\tb\tnan\n"},
        ["line 3: label 'nan' is not a number"],
        id="score-is-nan"),
    *[pytest.param(
        {"train": f"sentence\tscore\na\t1\nb\t{score}\n".encode()},
        ["train.tsv, line 3", "is not a number such as 4.5"],
        id=f"score-is-{name}")
      for name, score in [("4_5", "4_5"), ("infinity", "infinity"), ("empty", ""),
                          ("arabic", "\u0664"), ("full-width", "\uff14"), ("1e39", "1e39"),
                          ("1e-50", "1e-50"), ("comma", "1,5"), ("after-nbsp", "\u00a04")]],
    pytest.param(
        {"train": b"sentence\tscore\na\t1\nb\t 2.5 \n",
         "dev": b"sentence\tscore\na\t-1e39\n"},
        ["dev.tsv, line 2: label '-1e39' is not a number"],
        id="large-score-in-dev"),
    pytest.param(
        {"train": b"sentence\tlabel\na\t1\nb\t0\nsentence\tlabel\nc\t1\n"},
        ["train.tsv, line 4: a second header"],
        id="second-header"),
    pytest.param(
        {"train": b"sentence\tlabel\r\na\t1\r\n\xef\xbb\xbfLabel\tSentence\r\nc\t0\r\n"},
        ["train.tsv, line 3: a second header"],
        id="second-header-after-a-byte-order-mark"),
    pytest.param(
        {"train": b"sentence\tlabel\na\t1\nb\t0\n",
         "dev": b"sentence\tlabel\na\t1\nsentence\tlabel\n"},
        ["dev.tsv, line 3: a second header"],
        id="second-header-in-dev"),
    pytest.param(
        {"train": b"sentence\tlabel\na\t1\nb\t0\n"},
        ["d/dev.tsv does not exist: a directory of data needs train.tsv and dev.tsv"],
        id="no-dev"),
])
def test_bad_data_is_refused(tmp_path, monkeypatch, capsys, files, parts):
    """Bad data is refused in one line with its place, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    write_tiny_bert(tmp_path / "d")
    for name, content in files.items():
        (tmp_path / "d" / f"{name}.tsv").write_bytes(content)
    assert_refused(capsys, ["train", "--data", "d"], *parts)
    assert not Path("superbert").exists()


def write_bert_with_weights(directory):
    """Write a tiny BERT with weights and a classifier of the labels 0 and 1."""
    bert = write_tiny_bert(directory)
    model = ElasticBert(BertConfig.load(bert), 2)
    model.config.id2label = {"0": "0", "1": "1"}
    save_bert(model, bert)
    return bert


def replace_tensor(directory, name, tensor):
    """Replace or add one tensor of a weights file, or remove it if `tensor` is None."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path)


def split_weights(directory):
    """Split a weights file into two, with an index, as large checkpoints have them."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    files = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in names if files[name] == file},
                  directory / file)
    path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": files}))
    path.unlink()


def remove_heads(directory):
    """Remove the pooler and the classifier from a weights file."""
    for name in ("bert.pooler.dense", "classifier"):
        replace_tensor(directory, f"{name}.weight", None)
        replace_tensor(directory, f"{name}.bias", None)


def append_line(path, line):
    """Append a line to a text file."""
    path.write_text(path.read_text() + line + "\n")


POOLER_BIAS = "bert.pooler.dense.bias"


@pytest.mark.parametrize("damage, parts", [
    pytest.param(
        lambda d: (d / "config.json").unlink(),
        ["config.json does not exist"],
        id="no-config"),
    pytest.param(
        lambda d: (d / "config.json").write_text("{"),
        ["config.json is not a JSON object"],
        id="config-is-no-json"),
    pytest.param(
        lambda d: write_tiny_bert(d, num_attention_heads=5),
        ["5 heads do not divide the hidden size 12"],
        id="heads-do-not-divide"),
    pytest.param(
        lambda d: write_tiny_bert(d, hidden_size="12"),
        ["hidden_size is '12', not a whole number"],
        id="size-is-a-string"),
    pytest.param(
        lambda d: write_tiny_bert(d, model_type="roberta"),
        ["model_type is 'roberta'"],
        id="roberta"),
    pytest.param(
        lambda d: write_tiny_bert(d, problem_type="multi_label_classification"),
        ["problem_type is"],
        id="multi-label"),
    pytest.param(
        lambda d: write_tiny_bert(d, depth_keeps="even"),
        ["depth_keeps is 'even'"],
        id="old-spelling-of-keep-layers"),
    pytest.param(
        lambda d: write_tiny_bert(d, id2label={"1": "a"}),
        ["id2label is {'1': 'a'}, not"],
        id="labels-do-not-start-at-0"),
    pytest.param(
        lambda d: write_tiny_bert(d, position_embedding_type="relative_key"),
        ["position_embedding_type"],
        id="relative-positions"),
    pytest.param(
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        ["save_pretrained"],
        id="weights-are-a-pickle"),
    pytest.param(
        lambda d: os.truncate(d / "model.safetensors", 99),
        ["not a complete safetensors file"],
        id="truncated-weights"),
    pytest.param(
        lambda d: replace_tensor(d, "classifier.bias", None),
        ["classifier.bias is missing"],
        id="no-classifier-bias"),
    pytest.param(
        lambda d: replace_tensor(d, POOLER_BIAS, None),
        ["bert.pooler.dense.bias is missing"],
        id="no-pooler-bias"),
    pytest.param(
        lambda d: replace_tensor(d, "bert.extra.weight", torch.ones(1)),
        ["unknown tensor bert.extra.weight"],
        id="unknown-tensor"),
    pytest.param(
        lambda d: replace_tensor(d, POOLER_BIAS, torch.ones(13)),
        ["shape [13], expected [12]"],
        id="wrong-shape"),
    pytest.param(
        lambda d: replace_tensor(d, POOLER_BIAS, torch.full((12,), np.nan)),
        ["finite"],
        id="weights-are-nan"),
    pytest.param(
        lambda d: replace_tensor(d, "pooler.dense.bias", torch.ones(12)),
        ["two tensors bert.pooler.dense.b"],
        id="tensor-twice"),
    pytest.param(
        lambda d: write_tiny_bert(d, num_hidden_layers=10_000),
        ["num_hidden_layers in config.json is 10000, but the weights have"],
        id="ten-thousand-layers"),
    pytest.param(
        lambda d: (split_weights(d), write_tiny_bert(d, num_hidden_layers=10_000)),
        ["num_hidden_layers in config.json is 10000, but the weights have"],
        id="ten-thousand-layers-two-files"),
    pytest.param(
        lambda d: write_tiny_bert(d, num_hidden_layers=1),
        ["num_hidden_layers in config.json is 1, but the weights have"],
        id="one-layer"),
    pytest.param(
        # The random heads would take 4 TB.
        lambda d: (remove_heads(d), write_tiny_bert(d, hidden_size=999_996)),
        ["expected [12, 999996]"],
        id="huge-hidden-size"),
    pytest.param(
        lambda d: (remove_heads(d), write_tiny_bert(d, vocab_size=10**6)),
        ["expected [1000000, 12]"],
        id="huge-vocabulary"),
    pytest.param(
        lambda d: write_tiny_bert(d, layer_ffn_sizes=[10**12, 10**12]),
        ["layer_ffn_sizes is"],
        id="huge-ffn-of-a-sub-bert"),
    pytest.param(
        lambda d: write_tiny_bert(d, tokenizer_class="BertJapaneseTokenizer"),
        ["'BertJapaneseTokenizer'"],
        id="japanese-tokenizer"),
    pytest.param(
        lambda d: (d / "vocab.txt").write_text("[CLS]\n[UNK]\n"),
        ["vocab.txt is", "sep_token"],
        id="vocabulary-without-sep"),
    pytest.param(
        lambda d: (d / "vocab.txt").unlink(),
        ["vocab.txt does not exist"],
        id="no-vocabulary"),
    pytest.param(
        lambda d: (d / "vocab.txt").write_text("[CLS]\n[SEP]\n"),
        ["vocab.txt has no [UNK]"],
        id="vocabulary-without-unk"),
    pytest.param(
        lambda d: append_line(d / "vocab.txt", "more"),
        ["the id 12", "vocab_size is 12"],
        id="vocabulary-too-large"),
])
def test_bad_weights_are_refused(in_data_dir, capsys, damage, parts):
    """A bad BERT directory is refused in one line, and nothing is written."""
    bert = write_bert_with_weights(in_data_dir / "bert")
    damage(bert)
    assert_refused(capsys, ["train", "--data", "tiny", "--bert", "bert"], *parts)
    assert not Path("superbert").exists()


@pytest.mark.parametrize("name, text", [
    pytest.param(
        "tokenizer_config.json", '{"do_lower_case": "false"}',
        id="casing-is-a-string"),
    pytest.param(
        "tokenizer_config.json", '{"truncation_side": "left"}',
        id="truncation-on-the-left"),
    pytest.param(
        "tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}',
        id="t5-tokenizer"),
    pytest.param(
        "tokenizer_config.json", '{"cls_token": {"content": "<s>"}}',
        id="unknown-cls-token"),
    pytest.param(
        "tokenizer_config.json", '{"added_tokens_decoder": {"12": 5}}',
        id="added-token-is-a-number"),
    pytest.param(
        "special_tokens_map.json", '{"additional_special_tokens": "<e>"}',
        id="special-tokens-are-a-string"),
    pytest.param(
        "added_tokens.json", '{"<e>": [12]}',
        id="added-id-is-a-list"),
    pytest.param(
        "tokenizer.json", '{"model": 5}',
        id="tokenizer-model-is-a-number"),
])
def test_bad_tokenizers_are_refused(in_data_dir, capsys, name, text):
    """A bad tokenizer file is refused in one line with its name."""
    bert = write_bert_with_weights(in_data_dir / "bert")
    (bert / name).write_text(text)
    assert_refused(capsys, ["train", "--data", "tiny", "--bert", "bert"], name)
    assert not Path("superbert").exists()


TRAIN_TINY = ["train", "--data", "tiny"]
SEARCH_PARAMS = ["search", "--max-params"]


@pytest.mark.parametrize("words, parts", [
    pytest.param([], ["required"], id="no-command"),
    pytest.param(["fit"], ["invalid choice"], id="unknown-command"),

    # train
    pytest.param(["train", "--epoch", "1"], ["unknown", "--epochs"], id="misspelt-flag"),
    pytest.param(
        ["train", "--depth-keeps", "even"],
        ["--depth-keeps is called --keep-layers now"],
        id="old-name-of-a-flag"),
    pytest.param(
        ["train", "--learning_rate", "1"], ["Did you mean --lr?"], id="flag-of-a-library"),
    pytest.param(
        ["train", "--batch_size=1"], ["Did you mean --batch-size?"], id="underscore"),
    pytest.param(
        ["train", "--output_dir", "x"], ["Did you mean --out?"], id="output-dir"),
    pytest.param(
        ["train", "--model_name_or_path", "x"], ["Did you mean --bert?"], id="train-name-or-path"),
    pytest.param(
        ["eval", "--model_name_or_path", "x"], ["Did you mean --model?"], id="eval-name-or-path"),
    pytest.param(["train", "--model", "x"], ["Did you mean --bert?"], id="train-model"),
    pytest.param(["search", "--bert", "x"], ["Did you mean --model?"], id="search-bert"),
    pytest.param(
        ["train", "--warmup", "1"], ["unknown: --warmup 1 (see --help)"], id="nothing-similar"),
    pytest.param(["train", "MRPC"], ["unknown: MRPC (see --help)"], id="not-a-flag"),
    pytest.param(
        ["predict", "--model", "x"], ["type python -m glue.predict"], id="other-program"),
    pytest.param(["train", "--delta", "1e9"], ["at most 1000"], id="delta-too-long"),
    pytest.param(["train", "--batch-size", "0"], ["at least 1"], id="batch-size-0"),
    pytest.param(["train", "--batch-size", "1.5"], ["int"], id="fractional-batch-size"),
    pytest.param(["train", "--epochs", "nan"], ["--epochs"], id="epochs-nan"),
    pytest.param(["train", "--epochs", "-1"], ["--epochs"], id="negative-epochs"),
    pytest.param(["train", "--lr", "inf"], ["--lr"], id="infinite-rate"),
    pytest.param(["train", "--holdout", "1"], ["--holdout"], id="everything-held-out"),
    pytest.param(
        [*TRAIN_TINY, "--metric", "pearson", "--out", "new"],
        ["--metric pearson does not fit data with 2 labels: choose one of accuracy, f1, "
         "matthews, or a sum with +"],
        id="metric-of-a-regression"),
    pytest.param(
        ["train", "--strategy", "greedy"],
        ["'ee', 'exploit', 'explore', 'noise'"],
        id="unknown-strategy"),
    pytest.param(
        ["train", "--data", "glue/MRPC"],
        ["python -m glue.download MRPC"],
        id="data-not-downloaded"),
    pytest.param(
        [*TRAIN_TINY, "--bert", "bert-base-uncased", "--out", "new"],
        ["python -m glue.download bert-base-uncased"],
        id="bert-not-downloaded"),
    pytest.param(
        [*TRAIN_TINY, "--bert", "subbert/tiny-0.9x", "--out", "new"],
        ["sub-BERT"],
        id="train-a-sub-bert"),
    pytest.param(
        TRAIN_TINY,
        ["holds a finished result", "--overwrite"],
        id="train-into-a-finished-result"),
    pytest.param(
        [*TRAIN, "--resume", "--seed", "5"],
        ["started with --seed 0, but you gave --seed 5", "pass --seed 0"],
        id="resume-with-another-seed"),
    pytest.param(
        ["train", "--resume", "--out", "superbert/tiny", "--seed", "5"],
        ["started with --seed 0, but you gave --seed 5"],
        id="resume-by-out-with-another-seed"),
    pytest.param(
        ["train", "--resume", "--out", "superbert/tni"],
        ["superbert/tni holds no run to continue"],
        id="resume-by-a-wrong-out"),
    pytest.param(
        ["train", "--resume", "--out", "subbert/tiny-0.9x"],
        ["log.jsonl is not the log of a train"],
        id="resume-a-search-as-a-training"),
    pytest.param(
        ["search", "--resume", "--out", "subbert/tiny-0.9x", "--max-params", "0.8x"],
        ["started with --max-params 0.9x, but you gave --max-params 0.8x"],
        id="resume-by-out-with-another-budget"),
    pytest.param(
        ["search", "--resume", "--out", "subbert"],
        ["--max-params, --max-flops"],
        id="resume-the-parent-of-a-search"),
    pytest.param(
        [*TRAIN_TINY, "--out", "tiny"],
        ["is a directory that the command reads"],
        id="train-into-the-data"),
    pytest.param(
        [*TRAIN, "--bert", "superbert/tiny", "--out", "superbert/tiny", "--overwrite"],
        ["reads"],
        id="train-into-the-bert"),
    pytest.param([*TRAIN, "--out", "/proc/x"], ["/proc/x"], id="out-cannot-be-made"),
    pytest.param([*TRAIN, "--out", "tiny/dev.tsv"], ["dev.tsv"], id="out-is-a-file"),
    pytest.param([*TRAIN, "--out", "loop"], ["loop"], id="out-is-a-loop-of-links"),

    # search
    pytest.param(["search"], ["--max-params, --max-flops"], id="no-budget"),
    pytest.param(
        [*SEARCH_PARAMS, "1M", "--method", "evolution"],
        ["unknown"],
        id="unknown-search-flag"),
    pytest.param(
        [*SEARCH_PARAMS, "0.9x", "9", "--out", "sub"],
        ["smallest has"],
        id="second-budget-below-the-smallest"),
    pytest.param([*SEARCH_PARAMS, "0"], ["budget"], id="budget-0"),
    pytest.param([*SEARCH_PARAMS, "0x"], ["budget"], id="budget-0x"),
    pytest.param([*SEARCH_PARAMS, "many"], ["budget"], id="budget-is-a-word"),
    pytest.param([*SEARCH_PARAMS, "nan"], ["budget"], id="budget-nan"),
    pytest.param([*SEARCH_PARAMS, "inf"], ["budget"], id="budget-inf"),
    pytest.param([*SEARCH_PARAMS, "1e999"], ["budget"], id="budget-overflows"),
    pytest.param(
        [*SEARCH_PARAMS, "9" * 400], ["is not a positive budget"], id="budget-of-400-digits"),
    pytest.param(
        ["search", "--max-latency", "9" * 400 + "ms"],
        ["is not a positive budget"],
        id="latency-of-400-digits"),
    pytest.param([*SEARCH_PARAMS, "12ms"], ["budget"], id="parameters-in-milliseconds"),
    pytest.param([*SEARCH_PARAMS, ""], ["budget"], id="empty-budget"),
    pytest.param([*SEARCH_PARAMS, "-5"], ["budget"], id="negative-budget"),
    pytest.param([*SEARCH_PARAMS, "50 %"], ["without blanks"], id="blank-before-percent"),
    pytest.param([*SEARCH_PARAMS, "0%"], ["'0%' is not a positive"], id="budget-0-percent"),
    pytest.param([*SEARCH_PARAMS, "5%%"], ["'5%%' is not a positive"], id="two-percent-signs"),
    pytest.param([*SEARCH_PARAMS, "60 M"], ["budget"], id="blank-before-unit"),
    pytest.param(
        [*SEARCH_PARAMS, "60", "M"], ["'m' is not a", "without blanks"], id="unit-without-number"),
    pytest.param(
        ["search", "--max-latency", "60M"],
        ["'60m' is not a positive"],
        id="latency-in-millions"),
    pytest.param(
        [*SEARCH_PARAMS, "0.5x", "--model", "tiny"],
        ["run.json does not exist"],
        id="search-an-untrained-model"),
    pytest.param(
        [*SEARCH_PARAMS, "0.5x", "--model", "moved"],
        ["gone does not exist: if the data has moved, name its directory with --data"],
        id="search-without-its-data"),
    pytest.param(
        [*SEARCH_PARAMS, "0.5x", "--model", "moved", "--data", "names"],
        ["names/train.tsv is not the file that moved was trained on"],
        id="search-with-other-data"),
    pytest.param(
        [*SEARCH_PARAMS, "0.5x", "--model", "moved", "--data", "lost"],
        ["lost/train.tsv does not exist"],
        id="search-with-a-misspelt-directory"),
    pytest.param(
        [*SEARCH_PARAMS, "0.5x", "--model", "subbert/tiny-0.9x"],
        ["nothing to search"],
        id="search-a-sub-bert"),
    pytest.param(
        [*SEARCH_PARAMS, "0.9x", "--out", "superbert/tiny", "--overwrite"],
        ["is a directory that the command reads"],
        id="search-into-the-super-bert"),
    pytest.param(
        [*SEARCH_PARAMS, "0.9x"],
        ["holds a finished result"],
        id="search-into-a-finished-result"),

    # eval
    pytest.param(["eval"], ["name a model with --model"], id="eval-nothing"),
    pytest.param(
        ["eval", "--model", "tiny"],
        ["run.json does not exist"],
        id="eval-an-untrained-model"),
    pytest.param(
        ["eval", "--model", "superbert/tiny", "--data", "names"],
        ["names/dev.tsv, line 2: label 'yes' is not one of 0, 1"],
        id="eval-on-other-labels"),
    pytest.param(
        ["eval", "--model", "superbert/tiny", "--data", "scores"],
        ["scores/dev.tsv does not fit superbert/tiny: the labels are (), but", "('0', '1')"],
        id="eval-on-scores"),
    pytest.param(
        ["eval", "--model", "superbert/tiny", "--data", "pairs"],
        ["pairs/dev.tsv does not fit superbert/tiny: two texts", "single texts"],
        id="eval-on-pairs"),
    pytest.param(
        ["eval", "--model", "moved"],
        ["gone does not exist: if the data has moved, name its directory with --data"],
        id="eval-without-its-data"),
])
def test_bad_commands_are_refused(trained_project, in_trained_dir, capsys, words, parts):
    """A bad command is refused in one line, changes no file, and starts no run."""
    shutil.copytree(trained_project / "subbert", "subbert")
    # A super-BERT whose data is not where run.json says.
    run_json = Path(shutil.copytree("superbert/tiny", "moved"), "run.json")
    run_json.write_text(run_json.read_text().replace('"data": "tiny"', '"data": "gone"'))
    os.symlink("loop", "loop")
    names = in_trained_dir / "names"
    write_tsv(names / "train.tsv", HEADER, ["good", "yes"], ["bad", "no"])
    write_tsv(names / "dev.tsv", HEADER, ["good", "yes"])
    write_tsv(in_trained_dir / "scores" / "dev.tsv", ["sentence", "score"], ["good", "1"])
    for name in ("train", "dev"):
        write_tsv(in_trained_dir / "pairs" / f"{name}.tsv", ["sentence1", "sentence2", "label"],
                  ["good", "good", "1"], ["good", "bad", "0"])

    before = read_all_files()
    assert_refused(capsys, words, *parts)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not Path("sub").exists()


def read_all_files():
    """Return {path: bytes} of every file under the current directory."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


RESUME = TRAIN + ["--checkpoint-every", "2", "--out", "part", "--resume"]


@pytest.mark.parametrize("name, damage, words, message", [
    pytest.param(
        "part/checkpoint.safetensors", lambda content: content[:-1],
        RESUME, "checkpoint.safetensors is damag",
        id="truncated-checkpoint"),
    pytest.param(
        "part/checkpoint.safetensors",
        lambda content: content.replace(b"theta", b"thetb"),
        RESUME, "damaged",
        id="checkpoint-without-theta"),
    pytest.param(
        "part/log.jsonl", lambda content: b"{}\n" + content,
        RESUME, "log.jsonl",
        id="log-with-another-header"),
    pytest.param(
        "part/log.jsonl",
        lambda content: re.sub(rb'"settings": {.*?}', b'"settings": 5', content, count=1),
        RESUME, "log.jsonl is damaged",
        id="log-with-damaged-settings"),
    pytest.param(
        "part/log.jsonl", lambda content: b"\0\n" + content,
        RESUME, "log.jsonl is damaged",
        id="log-is-no-json"),
    pytest.param(
        "part/log.jsonl", lambda content: b"",
        RESUME, "log.jsonl is damaged",
        id="empty-log"),
    pytest.param(
        "part/log.jsonl", lambda content: content[:content.index(b"\n") + 1],
        RESUME, "the log is shorter",
        id="log-with-header-only"),
    pytest.param(
        "sub/log.jsonl",
        lambda content: content + b'{"choices": [9, 9, 9], "score": 1, "cost": 1}\n',
        [*SEARCH, "--out", "sub", "--resume"], "log.jsonl is damaged",
        id="log-of-search-with-unknown-choices"),
    pytest.param(
        "superbert/tiny/run.json", lambda content: b"{",
        SEARCH, "run.json is not a JSON object",
        id="run-json-is-no-json"),
    pytest.param(
        "superbert/tiny/run.json", lambda content: b"{}",
        [*SEARCH, "--model", "superbert/tiny"], "was not written by train",
        id="empty-run-json"),
    pytest.param(
        "tiny/train.tsv", lambda content: content + b"the film\t1\n",
        RESUME, "changed since part was started",
        id="resume-on-other-data"),
    pytest.param(
        "tiny/train.tsv", lambda content: content + b"the film\t1\n",
        SEARCH, "train.tsv has changed",
        id="search-on-other-data"),
    pytest.param(
        "superbert/tiny/model.safetensors", lambda content: content[:-1] + b"\1",
        SEARCH, "have changed since run.json was written",
        id="changed-weights"),
])
def test_damaged_files_are_refused(in_trained_dir, capsys, monkeypatch,
                                   name, damage, words, message):
    """Damaged or exchanged files of a run are refused.

    With the right file the command ends well.
    """
    send_signal_in_step(monkeypatch, 12)
    assert yoco.main(RESUME[:-1]) == 128 + signal.SIGTERM
    send_signal_in_step(monkeypatch, 3)
    assert yoco.main([*SEARCH, "--out", "sub"]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.chdir(in_trained_dir)

    path = Path(name)
    before = read_all_files()
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(capsys, words, message)
    path.write_bytes(before[path])

    # To open a pipe would wait for ever, so a pipe is refused, too.
    if hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
        assert_refused(capsys, words, f"{path} is not a file")
        path.unlink()
        path.write_bytes(before[path])

    # The refused run may have cut its log to the length in the checkpoint.
    for log in (Path("part/log.jsonl"), Path("sub/log.jsonl")):
        assert before[log].startswith(log.read_bytes())
        log.write_bytes(before[log])

    if "--out" not in words:
        words = [*words, "--out", "new"]
    assert yoco.main(words) == 0


@pytest.mark.parametrize("name, value", [
    pytest.param("theta", [[2.0, -1.0]] + 2 * [[1 / 9] * 9], id="theta-of-minus-one"),
    pytest.param("theta", 3 * [[0.5, 0.5]], id="theta-of-another-space"),
    pytest.param("theta", "0.5", id="theta-is-a-text"),
    pytest.param("theta", float("nan"), id="theta-is-nan"),
    pytest.param("theta", None, id="theta-is-missing"),
    pytest.param("held_out", [0.1], id="hold-out-without-seed"),
    pytest.param("held_out", [7, 0], id="hold-out-of-seven"),
    pytest.param("max_length", "16", id="length-is-a-text"),
    pytest.param("data", ["tiny"], id="data-is-a-list"),
    pytest.param("settings", [], id="settings-are-a-list"),
    pytest.param("pairs", "no", id="pairs-is-a-text"),
])
def test_values_of_run_json(in_trained_dir, capsys, name, value):
    """A run.json with a value that no run writes is refused by name.

    No value (None) means that the field is removed.
    """
    path = Path("superbert/tiny/run.json")
    run = json.loads(path.read_text())
    del run[name]
    if value is not None:
        run[name] = value
    path.write_text(json.dumps(run))
    assert_refused(capsys, ["eval", "--model", "superbert/tiny"], str(path), name)


@pytest.mark.parametrize("values", [
    pytest.param(dict(choices=[0, -1, None]), id="negative-choice"),
    pytest.param(dict(choices="01"), id="choices-are-a-text"),
    pytest.param(dict(score="high"), id="score-is-a-text"),
    pytest.param(dict(score=float("nan")), id="score-is-nan"),
    pytest.param(dict(cost=-5), id="negative-cost"),
    pytest.param(dict(cost=10**400), id="huge-cost"),
    pytest.param(dict(theta=[[0.5, 0.4]]), id="theta-of-another-sum"),
    pytest.param(dict(loss=[]), id="loss-is-a-list"),
])
def test_values_of_logs(tmp_path, values):
    """A log with a value that no run logs is refused."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"settings": {}}\n' + json.dumps(values) + "\n")
    with pytest.raises(UserError, match="log.jsonl is damaged"):
        yoco.read_log(tmp_path)


def test_changed_checkpoints_are_refused(in_data_dir, capsys, monkeypatch):
    """A checkpoint is refused if a bit, a tensor or a number of it has changed.

    It is also refused if the log has changed, up to the line that was saved last.
    """
    send_signal_in_step(monkeypatch, 12)
    assert yoco.main(RESUME[:-1]) == 128 + signal.SIGTERM
    path, log = Path("part/checkpoint.safetensors"), Path("part/log.jsonl")
    content, log_content = path.read_bytes(), log.read_bytes()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    for name in ("model/pooler.weight", "adam 5/step", "rng/cpu"):
        changed = tensors | {name: tensors[name].clone()}
        changed[name].view(-1).view(torch.uint8)[-1] ^= 1
        save_file(changed, path, metadata)
        assert_refused(capsys, RESUME, f"{path} is damaged", "checksum")
    fewer = {key: tensor for key, tensor in tensors.items() if key != "adam 5/exp_avg"}
    save_file(fewer, path, metadata)
    assert_refused(capsys, RESUME, f"{path} is damaged", "checksum")

    state = json.loads(metadata["state"])
    state["theta"][0] = [0.4, 0.4]
    save_file(tensors, path, metadata | {"state": json.dumps(state)})
    assert_refused(capsys, RESUME, f"{path} is damaged", "checksum")

    path.write_bytes(content)
    log.write_bytes(log_content.replace(b'"loss": 0', b'"loss": 1'))
    assert_refused(capsys, RESUME, f"{path} is damaged", "checksum")


@pytest.mark.parametrize("name", [
    "model.safetensors", "checkpoint.safetensors", "run.json", "config.json",
    "log.jsonl", "vocab.txt", "tokenizer.json",
])
def test_foreign_files_are_kept(in_data_dir, capsys, name):
    """A directory with a file that no run of ours wrote is refused, with any option."""
    Path("foreign").mkdir()
    Path("foreign", name).write_bytes(b"mine")
    for options in ([], ["--overwrite"], ["--resume"]):
        assert_refused(capsys, [*TRAIN, "--out", "foreign", *options],
                       f"foreign holds {name}", "choose another --out")
    # A link to a file that does not exist is a file, too.
    Path("foreign", name).unlink()
    os.symlink("gone", Path("foreign", name))
    for options in ([], ["--overwrite"], ["--resume"]):
        assert_refused(capsys, [*TRAIN, "--out", "foreign", *options],
                       f"foreign holds {name}", "choose another --out")
    assert os.listdir("foreign") == [name]


def test_overwrite_replaces_the_files_of_a_run(in_trained_dir, capsys):
    """--overwrite replaces a finished run, and removes no temporary file of others."""
    capsys.readouterr()
    assert yoco.main(TRAIN) == 2
    message = capsys.readouterr().err
    assert "--overwrite" in message
    assert "--resume" not in message
    out = Path("superbert/tiny")
    ours = {".run.json.123.tmp", ".model.safetensors.4.tmp"}
    others = {".notes.tmp", ".run.json.tmp", ".run.json.a1.tmp", ".notes.5.tmp", "notes.txt",
              "model.safetensors.index.json"}
    before = {path.name for path in out.iterdir()}
    for name in ours | others:
        (out / name).write_bytes(b"{}")
    assert yoco.main([*TRAIN, "--epochs", "0.5", "--overwrite"]) == 0
    assert {path.name for path in out.iterdir()} == before | others


@pytest.mark.parametrize("options", [
    pytest.param([], id="new"),
    pytest.param(["--overwrite"], id="overwrite"),
    pytest.param(["--resume"], id="resume"),
])
def test_a_run_that_ends_before_the_lock(in_trained_dir, capsys, monkeypatch, options):
    """A run that ends between the check and the lock of a second run keeps its result."""
    if options:
        Path("out").mkdir()
        log = Path("superbert/tiny/log.jsonl").read_text()
        # The first run has only begun when the second one checks the directory.
        Path("out/log.jsonl").write_text(log.splitlines(keepends=True)[0])
    initial_model = yoco.initial_model

    def finish_first_run(*args):
        shutil.copytree("superbert/tiny", "out", dirs_exist_ok=True)
        return initial_model(*args)

    monkeypatch.setattr(yoco, "initial_model", finish_first_run)
    assert_refused(capsys, [*TRAIN, "--out", "out", *options], "out have changed")
    for path in Path("superbert/tiny").iterdir():
        assert Path("out", path.name).read_bytes() == path.read_bytes()


def test_search_clears_nothing_before_it_has_every_lock(in_trained_dir, capsys, monkeypatch):
    """If the last of three directories cannot be taken, the first ones keep their results."""
    words = ["search", "--max-params", "0.9x", "0.8x", "0.7x", "--evaluations", "2",
             "--out", "sub", *CPU]
    assert yoco.main(words) == 0
    before = read_all_files()
    cost_function = yoco.cost_function

    def touch_last_log(*args):
        os.utime("sub/0.7x/log.jsonl")
        return cost_function(*args)

    monkeypatch.setattr(yoco, "cost_function", touch_last_log)
    assert_refused(capsys, [*words, "--overwrite"], "sub/0.7x have changed")
    assert read_all_files() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on Windows")
def test_two_runs_one_directory(in_data_dir, capsys):
    """A second run in one directory is refused, with any option, and changes nothing."""
    words = TRAIN + ["--out", "out"]
    settings, _ = yoco.parse(words)
    first = yoco.RunDirectory(yoco.resolve_defaults(settings, "tiny"), "tiny", "tiny",
                              task="tiny")
    first.lock()
    first.begin()
    first.log(step=1)
    assert_refused(capsys, words, "holds an unfinished run")
    assert_refused(capsys, words + ["--overwrite"], "another run is writing out")
    assert_refused(capsys, words + ["--resume"], "another run is writing out")
    assert read_log_lines("out")[-1] == {"step": 1}


# ---- Interrupting and resuming -------------------------------------------------------------------

def send_signal_in_step(monkeypatch, step, number=signal.SIGTERM):
    """Let the next train or search send itself a signal in one of its steps, once."""
    steps = itertools.count(1)
    report, show = yoco.report, yoco.Progress.show

    def report_and_signal(*args):
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return report(*args)

    def show_and_signal(self, done, text):
        # Only search shows a text that begins like this.
        if text.startswith("sampled") and next(steps) == step:
            os.kill(os.getpid(), number)
        return show(self, done, text)

    monkeypatch.setattr(yoco, "report", report_and_signal)
    monkeypatch.setattr(yoco.Progress, "show", show_and_signal)


def start_in_subprocess(words, patch="", **environment):
    """Start a command in a new process, after the code `patch`, and return its Popen."""
    code = f"""
import itertools, json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import yoco
torch.set_num_threads(1)
{patch}
sys.exit(yoco.main({list(map(str, words))!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code],
                            env={**os.environ, **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def signal_at_call(function, call, number="SIGKILL"):
    """Return code that sends the process a signal right before one call of a function.

    SIGKILL leaves the process no chance to clean up.
    """
    return f"""
original, calls = {function}, itertools.count(1)

def replacement(*args, **kwargs):
    if next(calls) == {call}:
        os.kill(os.getpid(), signal.{number})
    return original(*args, **kwargs)

{function} = replacement
"""


# Kills the process when half of its third checkpoint is written to the temporary file.
KILL_IN_CHECKPOINT = """
original, calls = yoco.write_file, itertools.count(1)

def write_half(path, content):
    if next(calls) == 3:
        temporary = path.with_name(f".{path.name}.9.tmp")
        temporary.write_bytes(content[:len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, content)

yoco.write_file = write_half
"""

# Kills the process when a part of the fourth evaluation is written to the log.
KILL_IN_LOG_LINE = """
original, calls = yoco.RunDirectory.log, itertools.count(1)

def log_half(self, **record):
    is_evaluation = len(record) > 2
    if is_evaluation and next(calls) == 4:
        self.log_file.write(json.dumps(record).encode()[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, **record)

yoco.RunDirectory.log = log_half
"""

TRAIN_OFTEN_SAVED = TRAIN + ["--checkpoint-every", "2"]
TRAIN_BEST = TRAIN_OFTEN_SAVED + [
    "--recipe", "best", "--delta", "0.5", "--archs-per-step", "3"]
SEARCH_TINY = SEARCH + ["--model", "superbert/tiny"]
SEARCH_TWO_BUDGETS = SEARCH_TINY + ["--max-params", "0.9x", "0.5x"]


@pytest.mark.parametrize("words, stop", [
    pytest.param(
        TRAIN_OFTEN_SAVED, signal_at_call("yoco.report", 1),
        id="train-killed-before-the-first-checkpoint"),
    pytest.param(
        TRAIN_BEST, signal_at_call("yoco.report", 12),
        id="train-killed-in-the-second-stage"),
    pytest.param(
        TRAIN_OFTEN_SAVED, KILL_IN_CHECKPOINT,
        id="train-killed-while-a-checkpoint-is-written"),
    pytest.param(
        TRAIN_BEST, signal_at_call("yoco.save_bert", 1),
        id="train-killed-before-the-weights-are-written"),
    pytest.param(
        TRAIN_OFTEN_SAVED, signal_at_call("yoco.write_json", 1),
        id="train-killed-before-run-json-is-written"),
    pytest.param(
        TRAIN_OFTEN_SAVED + ["--strategy", "noise"], (signal.SIGINT, 3),
        id="train-stopped-by-ctrl-c"),
    pytest.param(
        TRAIN_BEST, (signal.SIGTERM, 14),
        id="train-stopped-by-sigterm"),
    pytest.param(
        TRAIN_OFTEN_SAVED + ["--stages", "all", "--distill"], (signal.SIGINT, 9),
        id="distillation-stopped-by-ctrl-c"),
    pytest.param(
        SEARCH_TINY, signal_at_call("yoco.RunDirectory.log", 1),
        id="search-killed-before-the-log-has-a-line"),
    pytest.param(
        SEARCH_TINY, KILL_IN_LOG_LINE,
        id="search-killed-while-a-line-is-logged"),
    pytest.param(
        SEARCH_TWO_BUDGETS, signal_at_call("yoco.save_bert", 2),
        id="search-killed-before-the-second-result"),
    pytest.param(
        SEARCH_TINY, signal_at_call("yoco.write_json", 1),
        id="search-killed-before-run-json-is-written"),
    pytest.param(
        SEARCH_TINY, (signal.SIGINT, 3),
        id="search-stopped-by-ctrl-c"),
    pytest.param(
        SEARCH_TWO_BUDGETS, (signal.SIGTERM, 8),
        id="search-stopped-in-the-second-budget"),
])
def test_interrupted_equals_whole(in_trained_dir, monkeypatch, capsys, words, stop):
    """Compare a run that was stopped and resumed with a run that nobody stopped.

    They have the same bytes, the same facts, and the same log but for times. `stop` is
    code that kills the process, or a signal (Ctrl-C: status 130, SIGTERM: 143) and the
    step that it hits.
    """
    assert yoco.main(words + ["--out", "whole"]) == 0
    part = words + ["--out", "part"]
    if isinstance(stop, str):
        process = start_in_subprocess(part, stop)
        output = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, output
    else:
        number, step = stop
        send_signal_in_step(monkeypatch, step, number)
        assert yoco.main(part) == 128 + number
        assert "run python yoco.py" in capsys.readouterr().err.splitlines()[-1]

    outs = ["0.9x", "0.5x"] if words == SEARCH_TWO_BUDGETS else ["."]
    log = Path("part", outs[-1], "log.jsonl")
    if log.exists() and log.read_bytes():
        # A run that has begun is not overwritten by accident.
        assert_refused(capsys, part, "part", "holds")
    assert yoco.main(part + ["--resume"]) == 0
    for out in outs:
        whole, resumed = Path("whole", out), Path("part", out)
        assert read_results(resumed) == read_results(whole)
        assert read_log_lines(resumed) == read_log_lines(whole)
        assert read_facts(resumed) == read_facts(whole)
        file_names = {path.name for path in resumed.iterdir()}
        assert file_names == {path.name for path in whole.iterdir()}

    # A finished run has nothing to resume, which is no error.
    assert yoco.main(part + ["--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("words, outs, step", [
    pytest.param(
        TRAIN_BEST + ["--keep-layers", "first", "--seed", "3"], ["."], 9, id="train"),
    pytest.param(
        SEARCH_TINY + ["--seed", "3", "--select-on", "dev"], ["."], 3, id="search"),
    # In this order, the logs are those of 0.9x, 50% and 0.7x.
    pytest.param(
        SEARCH_TINY + ["--max-flops", "0.9X", "50%", "0.7x"],
        ["0.9x-flops", "50%-flops", "0.7x-flops"], 8, id="search-with-several-budgets"),
])
def test_resume_needs_only_the_directory(in_trained_dir, monkeypatch, capsys, words, outs, step):
    """Compare a run that --resume --out continues with a run that nobody stopped.

    The other settings come from the log. The message after Ctrl-C gives the command.
    """
    if "--max-flops" in words:
        at = words.index("--max-params")
        words = words[:at] + words[at + 2:]
    assert yoco.main([*words, "--out", "whole"]) == 0
    send_signal_in_step(monkeypatch, step)
    assert yoco.main([*words, "--out", "a part"]) == 128 + signal.SIGTERM
    hint = capsys.readouterr().err.splitlines()[-1]
    resume = [words[0], "--resume", "--out", "a part"]
    assert hint.endswith(f'run python yoco.py {words[0]} --resume --out "a part"')
    assert_refused(capsys, [*resume, "--seed", "9"], "but you gave --seed 9")
    assert yoco.main(resume) == 0
    for out in outs:
        whole, resumed = Path("whole", out), Path("a part", out)
        assert read_results(resumed) == read_results(whole)
        assert read_log_lines(resumed) == read_log_lines(whole)
        assert read_facts(resumed) == read_facts(whole)
    assert yoco.main(resume) == 0


@pytest.mark.parametrize("name, value", [
    pytest.param("lr", "fast", id="rate-is-a-word"),
    pytest.param("lr", -1, id="negative-rate"),
    pytest.param("batch_size", 2.5, id="fractional-batch-size"),
    pytest.param("bert", "a\0b", id="null-character"),
    pytest.param("recipe", [], id="empty-list"),
    pytest.param("reorder", "yes", id="flag-is-a-word"),
])
def test_resume_with_damaged_settings(in_trained_dir, capsys, name, value):
    """A log with a setting that nobody can type is refused, with the name of the log."""
    log = Path("superbert/tiny/log.jsonl")
    header, rest = log.read_text().split("\n", 1)
    header = json.loads(header)
    header["settings"][name] = value
    log.write_text(json.dumps(header) + "\n" + rest)
    assert_refused(capsys, ["train", "--resume", "--out", "superbert/tiny"],
                   "superbert/tiny", "damaged")


def test_resume_needs_the_name_of_the_data(in_data_dir, capsys, monkeypatch):
    """A run whose data directory was renamed, and linked back, is not resumed.

    The name decides the learning rate and the epochs, if no flag does. The log records
    both, and they may not change in another way either.
    """
    words = ["train", "--data", "tiny", "--out", "part", *CPU]
    send_signal_in_step(monkeypatch, 3)
    assert yoco.main(words) == 128 + signal.SIGTERM
    with open("part/log.jsonl") as log:
        header = json.loads(log.readline())
    # 54 examples are two batches. This BERT has seven stages of three epochs.
    assert header["settings"]["lr"] == 1e-4
    assert header["facts"]["epochs"] == 21
    assert header["facts"]["stages"][1]["first_step"] == 6

    os.rename("tiny", "TOY")
    os.symlink("TOY", "tiny")
    before = read_all_files()
    assert_refused(capsys, [*words, "--resume"], 'another task. It was "tiny"', '"TOY"')
    os.unlink("tiny")
    os.rename("TOY", "tiny")
    monkeypatch.setitem(yoco.STAGE_EPOCHS, "default", yoco.STAGE_EPOCHS["RTE"])
    assert_refused(capsys, [*words, "--resume"], "another epochs", "21.0")
    assert all(before[path] == path.read_bytes() for path in Path("part").iterdir())


def test_resume_needs_the_run_json_of_its_inputs(in_trained_dir, capsys, monkeypatch):
    """A run is not resumed if a fact in another run's run.json has changed.

    A search reads several facts of its super-BERT, and a training the hold-out set of its
    BERT. Times and the like may change.
    """
    search = [*SEARCH_TINY, "--out", "sub"]
    train = [*TRAIN, "--bert", "superbert/tiny", "--out", "part"]
    send_signal_in_step(monkeypatch, 3)
    assert yoco.main(search) == 128 + signal.SIGTERM
    send_signal_in_step(monkeypatch, 3)
    assert yoco.main(train) == 128 + signal.SIGTERM
    path = Path("superbert/tiny/run.json")
    run = json.loads(path.read_text())
    changes = {"theta": [theta[::-1] for theta in run["theta"]], "held_out": [0.1, 1],
               "max_length": 8}
    for name, value in changes.items():
        path.write_text(json.dumps(run | {name: value}))
        assert_refused(capsys, [*search, "--resume"], f"another {name}")
    path.write_text(json.dumps(run | {"held_out": [0.1, 1]}))
    assert_refused(capsys, [*train, "--resume"], "another held_out", "[0.1, 0]", "[0.1, 1]")

    path.write_text(json.dumps(run | {"seconds": 0, "hardware": "another"}))
    assert yoco.main([*search, "--resume"]) == 0


def test_second_signal_stops_at_once(in_data_dir, monkeypatch):
    """A second Ctrl-C does not wait for the end of the step, so there is no checkpoint.

    A process that ignores Ctrl-C, as a background job does, goes on ignoring it.
    """
    weight_gradient = yoco.weight_gradient

    def interrupted_twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return weight_gradient(*args)

    monkeypatch.setattr(yoco, "weight_gradient", interrupted_twice)
    assert yoco.main(TRAIN) == 130
    assert not list(Path("superbert/tiny").glob("checkpoint*"))

    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert yoco.main(TRAIN + ["--resume"]) == 0
    signal.signal(signal.SIGINT, handler)


def start_and_wait_for_log(words):
    """Start a training, and return its Popen as soon as its log has a step."""
    process = subprocess.Popen([sys.executable, *map(str, words)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = Path("superbert/tiny/log.jsonl")
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") > 1:
            break
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("output_is_read", [
    pytest.param(True, id="output-is-read"),
    pytest.param(False, id="output-is-closed"),
])
def test_signal_to_a_process(in_data_dir, output_is_read):
    """SIGTERM from outside stops a training with a checkpoint and status 143.

    It does so even if nobody reads its output. For example, Ctrl-C ends the tee of
    `2>&1 | tee log`.
    """
    process = start_and_wait_for_log([ROOT / "yoco.py", *TRAIN, "--epochs", "9999"])
    if not output_is_read:
        process.stdout.close()
        process.stderr.close()
    process.terminate()
    errors = process.communicate()[1] if output_is_read else ""
    assert process.wait() == 143, errors
    assert Path("superbert/tiny/checkpoint.safetensors").exists(), errors
    if output_is_read:
        assert "--resume to continue" in errors
        assert "Traceback" not in errors


CLOSE_STREAMS = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh"]


@pytest.mark.skipif(sys.platform == "win32", reason="no sh on Windows")
def test_closed_streams(in_data_dir):
    """With standard streams closed, no text goes into the log or among the answers."""
    # Libraries write to the descriptors 1 and 2, not to sys.stdout and sys.stderr.
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import yoco
original = yoco.report

def report_and_write(*args):
    os.write(1, b"text of a library")
    os.write(2, b"text of a library")
    original(*args)

yoco.report = report_and_write
sys.exit(yoco.main({[*TRAIN, "--epochs", "1"]!r}))
"""
    assert subprocess.run([*CLOSE_STREAMS, sys.executable, "-c", code]).returncode == 0
    assert read_log_lines("superbert/tiny")[-1]["stage"] == "depth"


@pytest.mark.parametrize("main, words", [
    pytest.param(yoco.main, ["eval", "--model", "gone"], id="yoco"),
    pytest.param(predict.main, ["--model", "gone"], id="glue"),
])
def test_errors_do_not_go_to_stdout(tmp_path, capsys, monkeypatch, main, words):
    """Without a stderr, an error leaves stdout empty. Python has None for a closed stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(words) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("room", [
    pytest.param(1, id="no-room-for-a-log-line"),
    pytest.param(2000, id="no-room-for-a-checkpoint"),
])
def test_full_disk(in_data_dir, room):
    """A full disk ends a training with one line, and leaves the last checkpoint.

    No file may grow beyond `room` bytes more than the log has. With room again, the
    resumed run equals one that had room all the time.
    """
    pytest.importorskip("resource", reason="no limits of files on Windows")
    words = TRAIN + ["--checkpoint-every", "2"]
    assert yoco.main(words + ["--out", "whole"]) == 0
    process = start_in_subprocess(words + ["--out", "part"], f"""
import resource
original, calls = yoco.report, itertools.count(1)

def report_and_limit(*args):
    if next(calls) == 7:
        limit = os.path.getsize("part/log.jsonl") + {room}
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    original(*args)

yoco.report = report_and_limit
""")
    error = process.communicate(timeout=60)[1].strip()
    assert process.returncode == 2, error
    assert re.fullmatch("yoco.py: error: part/.*File too large", error), error
    with safe_open("part/checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 6
    assert not list(Path("part").glob(".*.tmp"))

    assert yoco.main(words + ["--out", "part", "--resume"]) == 0
    assert read_results("part") == read_results("whole")
    assert read_log_lines("part") == read_log_lines("whole")


@pytest.mark.parametrize("diverged", ["loss", "gradient"])
def test_divergence(in_data_dir, capsys, monkeypatch, diverged):
    """A loss or gradient that is not finite ends the run before a checkpoint has it."""
    weight_gradient = yoco.weight_gradient
    steps = itertools.count(1)

    def diverge_in_step_6(model, *args):
        losses = weight_gradient(model, *args)
        if next(steps) == 6:
            tensor = losses[1] if diverged == "loss" else model.pooler.bias.grad[:1]
            tensor.fill_(np.nan)
        return losses

    monkeypatch.setattr(yoco, "weight_gradient", diverge_in_step_6)
    words = TRAIN + ["--checkpoint-every", "2", "--out", "out"]
    assert_refused(capsys, words, "diverged", "step 6", "stage ", "learning rate 0.001",
                   "layers, heads")
    checkpoint = load_file("out/checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in checkpoint.values())
    # The resumed run counts on, so it does not diverge again.
    assert yoco.main(words + ["--resume"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc to read the size from")
def test_memory_does_not_grow(in_data_dir, monkeypatch):
    """After 1000 steps the process is hardly larger than after 300."""
    report = yoco.report
    mebibytes = {}                      # after each step

    def report_and_measure(run, state, *args):
        status = Path("/proc/self/status").read_text()
        mebibytes[state.step] = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
        report(run, state, *args)

    monkeypatch.setattr(yoco, "report", report_and_measure)
    assert yoco.main(TRAIN + ["--epochs", "145"]) == 0
    assert max(mebibytes) >= 1000
    assert mebibytes[1000] - mebibytes[300] < 20, (mebibytes[300], mebibytes[1000])


# ---- Several processes (torchrun) ----------------------------------------------------------------

def run_two_processes(words, patches=("", ""), **environment):
    """Run a command in two processes, with the environment that torchrun gives them.

    Each runs the code of its patch first. environment: further variables. Returns (exit
    status, output) of both. The status of a process that a signal ended is minus the
    signal.
    """
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    processes = []
    for rank, patch in enumerate(patches):
        processes.append(start_in_subprocess(
            words, patch, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **environment))
    outputs = ["".join(process.communicate(timeout=120)) for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs)]


# Lets a process exit with 9 if a thread of the process group is alive at its end. Python
# may abort a process that still has one.
EXIT_9_IF_A_THREAD_IS_LEFT = """
import atexit, pathlib

def look_for_threads():
    for name in pathlib.Path("/proc/self/task").glob("*/comm"):
        if "gloo" in name.read_text():
            os._exit(9)

atexit.register(look_for_threads)
"""


@pytest.mark.parametrize("regression, options", [
    pytest.param(
        False, ["--distill", "--reorder", "--archs-per-step", "3"],
        id="classification-progressive"),
    pytest.param(
        True, ["--distill", "--stages", "all"],
        id="regression-all-stages-at-once"),
])
def test_processes_equal_one_process(in_data_dir, regression, options):
    """Compare a training in two processes with the same training in one.

    Weights and losses agree to 1e-5, and theta to the bit. There is no dropout, because
    its random numbers differ. The initial weights are so large that no two losses
    differ only by rounding.

    Batches of 7 are uneven, and the last one of an epoch is a single example, which
    leaves the second process none.
    """
    write_tiny_bert(in_data_dir / "tiny", **NO_DROPOUT, initializer_range=0.3)
    if regression:
        write_regression_data(in_data_dir / "tiny", 57)
    else:
        write_tsv(in_data_dir / "tiny" / "train.tsv",
                  *film_reviews(np.random.default_rng(0), 57))
    words = TRAIN + ["--holdout", "0", "--lr", "3e-4", "--batch-size", "7"] + options
    assert yoco.main(words + ["--out", "one"]) == 0
    patches = (EXIT_9_IF_A_THREAD_IS_LEFT, EXIT_9_IF_A_THREAD_IS_LEFT)
    results = run_two_processes(words + ["--out", "two"], patches)
    assert [status for status, _ in results] == [0, 0], results

    one = load_file("one/model.safetensors")
    two = load_file("two/model.safetensors")
    for name in one:
        # The biases of the keys cancel in a softmax. Their gradients are rounding
        # errors, which Adam scales up to full steps.
        if not name.endswith("key.bias"):
            assert (two[name] - one[name]).abs().max() < 1e-5, name
    assert read_facts("one")["theta"] == read_facts("two")["theta"]
    log_of_one, log_of_two = read_log_lines("one"), read_log_lines("two")
    for line_of_one, line_of_two in zip(log_of_one, log_of_two, strict=True):
        assert abs(line_of_one.pop("loss") - line_of_two.pop("loss")) < 1e-5
        assert line_of_one == line_of_two


def test_processes_stop_together_and_resume(in_data_dir, capsys):
    """A signal to one of two processes stops both after the same step, and both resume.

    The resumed run equals one that nobody stopped. It needs two processes again.
    """
    words = TRAIN + ["--epochs", "2"]
    (status, _), _ = run_two_processes(words + ["--out", "whole"])
    assert status == 0

    part = words + ["--out", "part"]
    patches = ("", signal_at_call("yoco.report", 9, "SIGTERM"))
    results = run_two_processes(part, patches)
    assert [status for status, _ in results] == [143, 143], results
    assert "--resume to continue" in results[0][1].splitlines()[-1]
    # Only the first process prints.
    assert not results[1][1]

    assert_refused(capsys, part + ["--resume"], "was started with 2 processes, but now there are 1")
    results = run_two_processes(part + ["--resume"])
    assert [status for status, _ in results] == [0, 0], results
    assert read_results("part") == read_results("whole")
    assert read_log_lines("part") == read_log_lines("whole")


@pytest.mark.parametrize("words, message", [
    pytest.param(SEARCH, "only train can use several processes", id="search"),
    pytest.param([*TRAIN, "--epoch", "1"], "Did you mean --epochs?", id="misspelt-flag"),
    pytest.param(
        [*TRAIN, "--out", "out", "--overwrite"], "another run is writing out",
        id="error-of-one-process"),
])
def test_several_processes_print_one_error(in_data_dir, words, message):
    """Two processes of torchrun print one line together, and both end with status 2.

    Only train shares its work between processes, and search says so. Only process 0
    locks the directory, and the other process must not outlive it.
    """
    settings, _ = yoco.parse([*TRAIN, "--out", "out"])
    run = yoco.RunDirectory(yoco.resolve_defaults(settings, "tiny"), "tiny", "tiny")
    run.lock()
    results = run_two_processes(words, TORCHELASTIC_RUN_ID="1")
    assert [status for status, _ in results] == [2, 2], results
    # Process 0 may have printed a summary of the task before its error.
    lines = "".join(output for _, output in results).splitlines()
    error, = [line for line in lines if line.startswith("yoco.py: ")]
    assert message in error
    assert "Traceback" not in lines


@pytest.mark.parametrize("variables", [
    pytest.param("WORLD_SIZE=2", id="incomplete"),
    pytest.param("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost", id="no-port"),
    pytest.param("WORLD_SIZE=2 RANK=2 MASTER_ADDR=localhost MASTER_PORT=1", id="large-rank"),
    pytest.param("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=99999", id="large-port"),
    pytest.param("WORLD_SIZE=two RANK=0 MASTER_ADDR=localhost MASTER_PORT=1", id="word"),
    pytest.param("WORLD_SIZE=0 RANK=0 MASTER_ADDR=localhost MASTER_PORT=1", id="none"),
    pytest.param(
        "WORLD_SIZE=2 RANK=0 LOCAL_RANK=x MASTER_ADDR=localhost MASTER_PORT=1", id="local-rank"),
])
def test_bad_environment(in_trained_dir, capsys, monkeypatch, variables):
    """Variables that describe no process are one line for train. eval ignores them."""
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    assert_refused(capsys, TRAIN + ["--out", "new"], variables.split()[0], "unset WORLD_SIZE")
    assert not Path("new").exists()
    assert_refused(capsys, ["eval", "--model", "tiny"], "run.json does not exist")


@pytest.mark.parametrize("variables", [
    pytest.param("WORLD_SIZE=1", id="world-size-1"),
    pytest.param("WORLD_SIZE= RANK= MASTER_ADDR= MASTER_PORT=", id="empty"),
    pytest.param("RANK=3 MASTER_ADDR=localhost MASTER_PORT=1 SLURM_NTASKS=4", id="leftovers"),
])
def test_environment_of_a_single_process(in_data_dir, monkeypatch, variables):
    """Without a WORLD_SIZE above 1, train is an ordinary single run."""
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    assert yoco.main(TRAIN + ["--epochs", "1"]) == 0
    assert read_facts("superbert/tiny")["num_processes"] == 1


def test_only_train_reads_the_environment(in_data_dir, monkeypatch):
    """--help does not wait for other processes, and the programs of glue/ train in one."""
    for name, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT="9").items():
        monkeypatch.setenv(name, value)
    process = start_in_subprocess(["train", "--help"])
    assert "usage: yoco.py" in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    parser = yoco.Parser("program")
    assert glue.run_program(parser, lambda _: yoco.main(TRAIN + ["--epochs", "1"]), []) == 0


def test_torchrun(in_data_dir):
    """SIGTERM to the real torchrun stops both processes after a step."""
    process = start_and_wait_for_log([
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        ROOT / "yoco.py", *TRAIN, "--epochs", "9999"])
    # torchrun passes the signal on, and kills processes that are still alive after 30 s.
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert output.count("texts to train on") == 1, errors
    assert errors.count("stopping after this step") == 1, errors
    assert errors.count("--resume to continue") == 1, errors
    assert Path("superbert/tiny/checkpoint.safetensors").exists()


# ---- The GPU: YOCO_TEST_GPU=1 --------------------------------------------------------------------

@needs_gpu
@pytest.mark.parametrize("keep_layers", ["first", "even"])
def test_gpu_masks_equal_slices(keep_layers):
    """Compare the gradient that a CUDA graph replays with that of slices.

    A layer that no architecture has gets no gradient. The same graph serves other
    architectures and other batches.
    """
    model = small_model(keep_layers=keep_layers, **NO_DROPOUT).cuda().train()
    teacher = small_model(keep_layers=keep_layers, seed=5, **NO_DROPOUT).cuda()
    graphed_gradient = yoco.graphed_gradient()

    def losses_and_gradients(function, *args):
        losses = function(model, *args)
        gradients = [None if weight.grad is None else weight.grad.clone()
                     for weight in model.parameters()]
        return torch.stack(list(losses)).cpu(), gradients

    for seed in range(4):
        batch = [tensor.cuda() for tensor in (*small_batch(seed=seed), LABELS)]
        archs = random_archs(model.config, 3, seed)
        for teacher_or_none in (None, teacher):
            args = (batch, archs, NO_AUTOCAST, teacher_or_none)
            sliced_losses, sliced = losses_and_gradients(yoco.weight_gradient, *args)
            graphed_losses, graphed = losses_and_gradients(graphed_gradient, *args)
            assert_close(sliced_losses, graphed_losses)
            for a, b in zip(sliced, graphed, strict=True):
                if a is None or b is None:
                    assert a is None
                    assert b is None
                else:
                    assert (a - b).abs().max() < 1e-4


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpu_commands(in_data_dir, precision):
    """Run train, search and eval on a GPU, and resume a training that was killed.

    It is compared with a training that nobody killed. Their scores and losses agree
    within rounding.
    """
    words = [word.replace("cpu", "cuda") for word in TRAIN]
    words += ["--precision", precision, "--checkpoint-every", "2", "--distill"]
    assert yoco.main(words + ["--out", "whole"]) == 0
    kill_in_step_15 = signal_at_call("yoco.report", 15)
    process = start_in_subprocess(words + ["--out", "part"], kill_in_step_15)
    output = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert yoco.main(words + ["--out", "part", "--resume"]) == 0

    whole, part = read_facts("whole"), read_facts("part")
    assert whole["precision"] == precision
    assert part["precision"] == precision
    for name in ("largest", "smallest"):
        # One of the six examples may lie on the edge between two labels.
        difference = whole["holdout"][name]["score"] - part["holdout"][name]["score"]
        assert abs(difference) < 17
    whole_losses = [line["loss"] for line in read_log_lines("whole")]
    part_losses = [line["loss"] for line in read_log_lines("part")]
    assert np.allclose(whole_losses, part_losses, rtol=1e-2, atol=1e-2)

    assert yoco.main([
        "search", "--model", "whole", "--max-params", "0.9x", "--evaluations", "12",
        "--device", "cuda", "--precision", precision]) == 0
    sub_bert = "subbert/whole-0.9x"
    assert yoco.main(["eval", "--model", sub_bert, "--device", "cuda"]) == 0
    assert yoco.main(["eval", "--model", sub_bert, "--device", "cpu"]) == 0


# ---- Latency -------------------------------------------------------------------------------------

def test_latency(monkeypatch):
    """Compare the latency with a clock that moves a millisecond for each head that runs.

    The latency is a median, and the first rounds, which warm up, do not count.
    """
    now = [0.0]                         # in seconds
    layer_calls = itertools.count()
    forward = model_module.Layer.forward

    def forward_and_tick(self, x, mask, H, *args, **kwargs):
        # The first four rounds of two layers each take a second longer for each layer.
        is_slow = next(layer_calls) < 8
        now[0] += H / 1e3 + is_slow
        return forward(self, x, mask, H, *args, **kwargs)

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(model_module.Layer, "forward", forward_and_tick)
    monkeypatch.setattr(model_module, "time", clock)
    sub_bert = extract(small_model(), Arch((2, 6), (8, 8)))
    assert np.isclose(latency(sub_bert, 7, NO_AUTOCAST), 2 + 6)


# ---- Faster, same results: masks, dropout and attention on a CPU, the prefix cache ---------------

@pytest.mark.parametrize("keep_layers, num_labels, num_types", [
    pytest.param("first", 3, 2, id="first-layers"),
    pytest.param("even", 3, 2, id="evenly-spaced-layers"),
    pytest.param("first", 1, 2, id="one-logit"),
    pytest.param("even", 2, 1, id="one-token-type"),
])
def test_masks_equal_slices(keep_layers, num_labels, num_types):
    """Compare the logits and gradients of the masked pass with those of `forward`.

    The gradients are those of a random function of the logits. The batch has padding,
    and some layers belong to no architecture.
    """
    model = small_model(num_labels, keep_layers=keep_layers, type_vocab_size=num_types,
                        **NO_DROPOUT)
    ids, token_types, mask = small_batch()
    inputs = (ids, token_types % num_types, mask)
    largest = model.config.arch
    forty_archs = random_archs(model.config, 40, 7)
    one_layer = [arch for arch in forty_archs if arch.depth == 1][:3]

    def masked(archs):
        sizes = archs_to_tensor(model.config, archs)
        return model_module.forward_many(model, *inputs, sizes)

    def sliced(archs):
        return torch.stack([model(*inputs, arch) for arch in archs])

    def logits_and_gradients(forward, archs, weights):
        model.zero_grad()
        logits = forward(archs)
        (logits * weights).sum().backward()
        gradients = {}
        for name, weight in model.named_parameters():
            if weight.grad is None:
                gradients[name] = torch.zeros_like(weight)
            else:
                gradients[name] = weight.grad.clone()
        return logits, gradients

    groups = [random_archs(model.config, 4, 0),
              random_archs(model.config, 1, 1),
              [largest, largest, *random_archs(model.config, 2, 2)],
              one_layer]
    for seed, archs in enumerate(groups):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(len(archs), 5, num_labels, generator=generator)
        masked_logits, masked_gradients = logits_and_gradients(masked, archs, weights)
        sliced_logits, sliced_gradients = logits_and_gradients(sliced, archs, weights)
        assert masked_logits.shape == (len(archs), 5, num_labels)
        assert_close(masked_logits, sliced_logits)
        for name, gradient in sliced_gradients.items():
            assert_close(masked_gradients[name], gradient)

    # In the last group only one layer is in use, and only that one has a gradient.
    used = model_module.kept_layer_indices(keep_layers, 4, 1)[0]
    for i in range(4):
        has_gradient = any(gradient.any() for name, gradient in masked_gradients.items()
                           if f"layers.{i}." in name)
        assert has_gradient == (i == used)


def test_dropout():
    """Compare dropout with its definition: elements are kept with 1 - p, and scaled.

    Neighbours are independent, and the gradient is scaled as the output is.
    """
    torch.manual_seed(0)
    x = torch.ones(999, 1001, requires_grad=True)
    y = dropout(x, 0.1)
    y.sum().backward()
    assert set(y.unique().tolist()) == {0.0, y.max().item()}
    assert abs(y.max() - 1 / 0.9) < 1e-6
    # The standard deviation of this mean is 0.0003.
    assert abs(y.mean() - 1) < 0.002
    assert torch.equal(x.grad, y)

    kept = (y > 0).float()
    assert (abs(kept.mean(0) - 0.9) < 0.06).all()
    assert (abs(kept.mean(1) - 0.9) < 0.06).all()
    both_neighbours_kept = (kept[:, 1:] * kept[:, :-1]).mean()
    assert abs(both_neighbours_kept - 0.9 * 0.9) < 0.003

    assert torch.equal(dropout(x, 0.0), x)
    assert dropout(x.bfloat16(), 0.5).dtype == torch.bfloat16


def test_attention_with_dropout(monkeypatch):
    """Compare attention with torch's, which has no dropout.

    With dropout, the mean over many calls agrees. If nothing is dropped, one call does.
    """
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    mean = sum(attention(q, k, v, mask, 0.2) for _ in range(4000)) / 4000
    assert (mean - expected).abs().max() < 0.06
    monkeypatch.setattr("model.dropout", lambda x, p: x)
    torch.testing.assert_close(attention(q, k, v, mask, 0.2), expected)


def test_fast_functions_are_used_only_to_drop(monkeypatch):
    """A CPU takes the fast functions if there is dropout, and torch's if there is none."""
    calls = []
    for name in ("fast_cpu_dropout", "fast_cpu_attention"):
        def record_and_call(*args, name=name, original=getattr(model_module, name)):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(model_module, name, record_and_call)
    model = small_model()
    model(*small_batch())
    assert not calls
    model.train()(*small_batch())
    # Three times in each of the four layers, after the embeddings, and after the pooler.
    assert calls.count("fast_cpu_dropout") == 3 * 4 + 2
    assert calls.count("fast_cpu_attention") == 4


def test_batches_of_an_evaluation_are_small_on_a_cpu(monkeypatch):
    """A CPU evaluates at most 2048 tokens at once, and not many fewer."""
    collate = data.collate
    num_tokens = []

    def record_and_collate(*args):
        batch = collate(*args)
        num_tokens.append(batch[0].numel())
        return batch

    monkeypatch.setattr(data, "collate", record_and_collate)
    examples = [random_example(np.random.default_rng(0), 16)] * 300
    data.make_evaluator(
        small_model(), [examples], "accuracy", torch.device("cpu"), NO_AUTOCAST)
    # 300 texts of 16 tokens.
    assert num_tokens == [2048, 2048, 704]


@pytest.mark.parametrize("memory", [
    pytest.param(0, id="no-cache"),
    pytest.param(3000, id="small-cache"),
    pytest.param(2**30, id="large-cache"),
])
def test_evaluator_with_prefix_cache(monkeypatch, memory):
    """Compare the evaluator's accuracy with that of `forward`, whatever is in its cache.

    With room, architectures that share their first layers compute them once.
    """
    model = small_model(max_position_embeddings=24)
    rng = np.random.default_rng(0)
    examples = [random_example(rng, n) for n in rng.integers(3, 20, 60)]
    *inputs, labels = data.collate(examples, range(60))
    monkeypatch.setattr(data, "PREFIX_MEMORY", memory)
    evaluate = data.make_evaluator(
        model, [examples], "accuracy", torch.device("cpu"), NO_AUTOCAST)
    layer_calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: layer_calls.append(1))

    # The second architecture shares its first two layers with the first, and has four.
    archs = [Arch((1, 4, 6), (8, 16, 48)), Arch((1, 4, 2, 6), (8, 16, 8, 48))]
    num_calls = []
    for arch in archs + some_archs(model.config, 8) * 2:
        layer_calls.clear()
        accuracy = evaluate(arch)["accuracy"]
        num_calls.append(len(layer_calls))
        expected = (model(*inputs, arch).argmax(1) == labels).float().mean().item()
        assert abs(accuracy - 100 * expected) < 1e-3
    if memory == 2**30:
        assert num_calls[:2] == [3, 2]


# ---- --help --------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", ["train", "search", "eval"])
def test_help_explains_every_setting(capsys, command):
    """--help lists every setting of a command, with a sentence on each.

    The settings that most users need come first, and a sentence on the time before them.
    """
    with pytest.raises(SystemExit) as stop:
        yoco.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--[a-z-]+)(.*(?:\n {20,}.*)*)", text, re.M)
    settings, _ = yoco.COMMANDS[command]
    assert len(flags) == len(dataclasses.fields(settings))
    for name, explanation in flags:
        assert re.search(r"[a-z]{2,} [a-z]", explanation), name
    usual = {
        "train": "--data --bert --recipe --metric --epochs --lr --out --resume --overwrite",
        "search": "--model --data --max-params --max-flops --max-latency --evaluations --out "
                  "--resume --overwrite",
        "eval": "--model --data",
    }
    description, usual_text, research_text = re.split("usual:|research:", text)
    assert re.findall(r"^  (--[a-z-]+)", usual_text, re.M) == usual[command].split()
    assert "--device" in research_text
    if command != "eval":
        assert "two" in description and "CPU cores" in " ".join(description.split())


# ---- The project itself --------------------------------------------------------------------------

@pytest.mark.parametrize("module, num_examples", [
    pytest.param(model_module, 4, id="model"),
    pytest.param(data, 0, id="data"),
    pytest.param(yoco, 3, id="yoco"),
])
def test_docstring_examples(module, num_examples):
    """Compare the examples in the docstrings with the output that is printed there."""
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted >= num_examples


def tags_in_code():
    """Return {(function, tag)} of the DIFFERS, CHOICE and AUTHORS comments."""
    found = set()
    for path in (ROOT / name for name in ("yoco.py", "model.py", "data.py")):
        text = path.read_text()
        scopes = [n for n in ast.walk(ast.parse(text))
                  if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        for number, line in enumerate(text.split("\n"), 1):
            comment = line.partition("#")[2]
            for tag in re.findall(r"\b(DIFFERS from (?:Eq|Sec)\. [\d.]+|DIFFERS|CHOICE|AUTHORS):",
                                  comment):
                inside = [s for s in scopes if s.lineno <= number <= s.end_lineno]
                name = max(inside, key=lambda s: s.lineno).name if inside else "module"
                found.add((name, tag))
    return found


def test_readme_lists_every_departure():
    """Compare README's list of differences with the tags in the code, by function."""
    section = (ROOT / "README.md").read_text().split("## Differences")[1].split("\n## ")[0]
    listed = {(name, tag) for name, tags in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.M)
              for tag in tags.strip().split(", ")}
    assert listed == tags_in_code()


def named_object(name):
    """Return the function, class or method of yoco.py by its name, for example Categorical.step."""
    found = yoco
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_equation_ledger():
    """The ledger in yoco.py's docstring and the `# Eq.` tags in its code agree, both ways.

    The functions and tests that the ledger names exist. A function carries the equations
    that the ledger gives it. Every tag is in a function that the ledger names for it.
    """
    ledger = yoco.__doc__.split("the test that checks it:")[1].split("Eq. 5 estimates")[0]
    row = r"^    ((?:below )?Eq\. [\d, ]*\d|Alg\. 1)  .*?([\w.]+(?:, \w+)?) +(test_\w+)$"
    rows = re.findall(row, ledger, re.M)
    assert len(rows) == len(ledger.strip().split("\n")) == 9
    expected = set()
    for equation, names, test in rows:
        assert test in globals()
        prefix = equation.rstrip("0123456789, ")             # "Eq." or "below Eq." or "Alg."
        for name in names.split(", "):
            source = inspect.getsource(named_object(name))
            for number in re.findall(r"\d", equation):
                expected.add((f"{prefix} {number}", name.split(".")[-1]))
                if prefix != "Alg.":
                    assert f"{prefix} {number}" in source, (equation, name)

    text = (ROOT / "yoco.py").read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    tags = set()
    for number, line in enumerate(text.split("\n"), 1):
        tag = re.search(r"# ((?:below )?Eq\. \d)$", line)
        if tag:
            inside = [f for f in functions if f.lineno <= number <= f.end_lineno]
            tags.add((tag[1], max(inside, key=lambda f: f.lineno).name))
    assert tags <= expected
    assert len(tags) >= 7


def test_lines_of_algorithm_1():
    """`train` carries the line numbers of Algorithm 1 in its right margin."""
    numbers = re.findall(r"# (\d+)(?:, (\d+))?$", inspect.getsource(yoco.train), re.M)
    assert {int(number) for pair in numbers for number in pair if number} == set(range(1, 12))


def test_reading_order():
    """README's "Read the code" gives the lines where the named functions begin and end."""
    section = (ROOT / "README.md").read_text().split("## Read the code")[1].split("\n## ")[0]
    row = r"\| `(\w+\.py)` (\d+)–(\d+) \| ((?:the [a-z ]+)?)(`\w+`)?(?: to (`\w+`))? \|"
    rows = re.findall(row, section)
    assert len(rows) == 8
    for file, first, last, docstring, start, end in rows:
        text = (ROOT / file).read_text()
        nodes = {f"`{node.name}`": node for node in ast.parse(text).body if hasattr(node, "name")}
        if docstring == "the top of the docstring":
            # It ends with Algorithm 1, before the ledger and a blank line.
            lines = text[:text.index("Where each equation is")].count("\n")
            expected = (1, lines - 1)
        elif docstring:
            node = nodes[start].body[0]
            expected = (node.lineno, node.end_lineno)
        else:
            decorators = [node.lineno for node in nodes[start].decorator_list]
            expected = (min([nodes[start].lineno] + decorators),
                        nodes[end or start].end_lineno)
        assert (int(first), int(last)) == expected, (file, start)
