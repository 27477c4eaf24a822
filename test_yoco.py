"""The tests: every claim against a truth that does not come from the code that makes it.

    pytest -q                          everything that needs no download
    GLUE_DIR=... pytest -q             also the row counts of the real GLUE files
    MINILM_DIR=... pytest -q           also logits and token ids on all-MiniLM-L6-v2
    YOCO_TEST_GPU=1 pytest -q          also what a GPU computes
"""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one
os.environ["OMP_NUM_THREADS"] = "1"                     # the models are tiny

import ast
import contextlib
import dataclasses
import doctest
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
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model as model_module
import yoco
from model import (Arch, archs_to_tensor, attention, BertConfig, count_flops, count_params,
                   dropout, ElasticBert, extract, latency, load_bert, save_bert, SearchSpace,
                   sort_by_importance, UserError)
from yoco import Categorical

ROOT = Path(__file__).parent
MINILM = Path(os.environ.get("MINILM_DIR", ROOT / "all-MiniLM-L6-v2"))
GLUE = Path(os.environ["GLUE_DIR"]) if "GLUE_DIR" in os.environ else None
GPU = os.environ.get("YOCO_TEST_GPU") == "1"
needs_minilm = pytest.mark.skipif(not (MINILM / "model.safetensors").exists(), reason=(
    "no MiniLM weights: python -m glue.download all-MiniLM-L6-v2, or MINILM_DIR"))
needs_glue = pytest.mark.skipif(not GLUE, reason="GLUE_DIR does not name the real GLUE files")
needs_gpu = pytest.mark.skipif(not GPU, reason="YOCO_TEST_GPU=1 lets the tests use a GPU")
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored in a shell's background job


# ---- model.py ------------------------------------------------------------------------------------

OFF = contextlib.nullcontext      # no autocast
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


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
    """The full model against torch.nn.TransformerEncoder: post-norm, gelu, same weights."""
    model, (ids, types, mask) = small_model(), small_batch()
    c, norm = model.config, model.embedding_norm
    x = (F.embedding(ids, model.word_embeddings.weight)
         + F.embedding(types, model.token_type_embeddings.weight)
         + model.position_embeddings.weight[:ids.shape[1]])
    x = F.layer_norm(x, (24,), norm.weight, norm.bias, c.layer_norm_eps)
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(
        24, 6, 48, activation="gelu", batch_first=True, layer_norm_eps=c.layer_norm_eps), 4).eval()
    for ours, layer in zip(model.layers, theirs.layers):
        qkv = (ours.query, ours.key, ours.value)
        parts = {"self_attn.out_proj": ours.attention_out, "linear1": ours.ffn_in,
                 "linear2": ours.ffn_out, "norm1": ours.attention_norm, "norm2": ours.ffn_norm}
        layer.load_state_dict({
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
    sub-BERT of them stands alone."""
    for layers, depth, kept in ((12, 6, [1, 3, 5, 7, 9, 11]), (6, 3, [1, 3, 5]), (4, 1, [3]),
                                (6, 4, [0, 2, 3, 5]), (6, 5, [0, 1, 2, 3, 5]), (2, 2, [0, 1])):
        assert list(model_module.kept_layer_indices("even", layers, depth)) == kept
        assert list(model_module.kept_layer_indices("first", layers, depth)) == list(range(depth))
    model, batch = small_model(keep_layers="even"), small_batch()
    space, arch = SearchSpace.for_config(model.config), Arch((2, 6), (48, 8))
    assert space.choices(arch) == [0, None, 9, None, 2]
    assert space.arch(space.choices(arch)) == arch
    by_hand = small_model()                             # the same weights; layers 2 and 4 first
    by_hand.layers = torch.nn.ModuleList([by_hand.layers[i] for i in (1, 3, 0, 2)])
    expected = by_hand(*batch, arch)
    assert torch.equal(model(*batch, arch), expected)
    assert not torch.allclose(small_model()(*batch, arch), expected)
    save_bert(model, tmp_path)
    assert torch.equal(load_bert(tmp_path, 3)(*batch, arch), expected)
    torch.testing.assert_close(extract(model, arch)(*batch), expected)


def random_archs(config, count, seed):
    """Architectures of any depth, heads and FFN sizes, not of the search space alone."""
    rng, most = np.random.default_rng(seed), config.arch
    depths = rng.integers(1, most.depth + 1, count)
    return [Arch(rng.integers(1, most.heads[0] + 1, d).tolist(),
                 rng.integers(1, most.ffn_sizes[0] + 1, d).tolist()) for d in depths]


def close(found, expected):
    """Equal but for the order of sums: to 1e-5 of the largest."""
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("keeps, num_labels, types_", [
    ("first", 3, 2), ("even", 3, 2), ("first", 1, 2), ("even", 2, 1)])
def test_masks_equal_slices(keeps, num_labels, types_):
    """`masked` gives for each of several architectures the logits of `forward`, and of any function
    of them the gradients: with padding, one logit, token types or none, and layers that no
    architecture has."""
    model = small_model(num_labels, keep_layers=keeps, type_vocab_size=types_, **NO_DROPOUT)
    ids, types, mask = small_batch()
    types, full = types % types_, model.config.arch
    few = [a for a in random_archs(model.config, 40, 7) if a.depth == 1][:3]
    for n, archs in enumerate([random_archs(model.config, 4, 0), random_archs(model.config, 1, 1),
                               [full, full, *random_archs(model.config, 2, 2)], few]):
        weights = torch.randn(len(archs), 5, num_labels, generator=torch.Generator().manual_seed(n))
        gradients, logits = [], []
        for way in ("masked", "sliced"):
            model.zero_grad()
            if way == "masked":
                logits.append(model_module.forward_many(model, ids, types, mask, archs_to_tensor(model.config, archs)))
            else:
                logits.append(torch.stack([model(ids, types, mask, arch) for arch in archs]))
            (logits[-1] * weights).sum().backward()
            gradients.append({name: 0 * w if w.grad is None else w.grad.clone()
                              for name, w in model.named_parameters()})
        assert logits[0].shape == (len(archs), 5, num_labels)
        close(*logits)
        for name, gradient in gradients[1].items():
            close(gradients[0][name], gradient)
    used = model_module.kept_layer_indices(keeps, 4, 1)[0]     # by the last of them, `few`
    assert all(any(g.any() for name, g in gradients[0].items() if f"layers.{i}." in name)
               == (i == used) for i in range(4))


@pytest.mark.parametrize("changes", [{}, dict(hidden_size=40, num_attention_heads=5)])
def test_flops_counter(changes):
    """count_flops against torch's counter, on the math attention backend, which it can count, and
    less what the last layer does not compute: everything but keys and values of T - 1 tokens."""
    config, (ids, types, mask) = small_config(**changes), small_batch(B=3, T=7)
    model = ElasticBert(config, 2).eval()
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
    assert torch.equal(dropout(x, 0.0), x) and dropout(x.bfloat16(), 0.5).dtype == torch.bfloat16
    q, k, v = torch.randn(3, 2, 3, 5, 4).unbind()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    mean = sum(attention(q, k, v, mask, 0.2) for _ in range(4000)) / 4000
    assert (mean - expected).abs().max() < 0.06
    monkeypatch.setattr("model.dropout", lambda x, p: x)
    torch.testing.assert_close(attention(q, k, v, mask, 0.2), expected)


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
    for bad in (Arch((6,) * 5, (48,) * 5), Arch((7,), (48,)), Arch((6,), (49,)), Arch((0,), (8,))):
        with pytest.raises(UserError, match="does not fit"):
            small_model()(*small_batch(), bad)
    tiny = SearchSpace.for_config(small_config(num_hidden_layers=1, num_attention_heads=2,
                                               intermediate_size=4))
    assert (tiny.depths, tiny.heads, tiny.ffn_sizes) == ((1,), (1, 2), (1, 4))
    assert hash(arch) == hash(Arch(*arch))


def test_old_tensor_names(tmp_path, capsys):
    """gamma and beta, no `bert.`, prefixes of wrappers, pre-training heads, a position_ids buffer,
    neither classifier nor pooler, two files with an index; fields of transformers 2."""
    model = small_model()
    save_bert(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "bert.encoder.layer.3.attention.self.query.weight" in tensors
    old = {"module._orig_mod." + n.removeprefix("bert.").replace("LayerNorm.weight",
           "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items() if "classifier" not in n and "pooler" not in n}
    old |= {"cls.predictions.bias": torch.zeros(50),
            "embeddings.position_ids": torch.arange(20)[None]}
    (tmp_path / "model.safetensors").unlink()
    for n, part in enumerate("ab"):
        save_file(dict(list(old.items())[n::2]), tmp_path / part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: "ab"[n % 2] for n, name in enumerate(old)}}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {
        "eos_token_ids": 0, "length_penalty": 1.0, "pruned_heads": {}, "hidden_act": None}))
    loaded, said = load_bert(tmp_path, 7), capsys.readouterr().out
    assert "a new classifier is initialised, 24 -> 7" in said and "a new pooler" in said
    assert loaded.classifier.weight.shape == (7, 24) and loaded.pooler.weight.any()
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items()
               if "classifier" not in n and "pooler" not in n)


def test_label_names_decide(tmp_path):
    """A classifier of the same names in another order is permuted; of other names, a new one; and
    logits that the configuration contradicts are refused."""
    model, batch = small_model(3, id2label={"0": "no", "1": "yes", "2": "so"}), small_batch()
    save_bert(model, tmp_path)
    permuted, other = (load_bert(tmp_path, 3, names) for names in (("so", "no", "yes"), "abc"))
    assert torch.allclose(permuted(*batch), model(*batch)[:, [2, 0, 1]], atol=1e-6)
    assert not torch.isclose(other.classifier.weight, model.classifier.weight).any()
    for bad in (small_model(1), small_model(2, problem_type="regression"),
                small_model(4, id2label={"0": "no", "1": "yes", "2": "so"})):
        save_bert(bad, tmp_path)
        with pytest.raises(UserError, match="problem_type"):
            load_bert(tmp_path)
        assert load_bert(tmp_path, 3, ("so", "no", "yes")).classifier.weight.shape == (3, 24)


def test_latency(monkeypatch):
    """With a clock that every layer moves: the sum of its heads, and of 20 times the median."""
    clock, rounds, original = [0.0], itertools.count(), model_module.Layer.forward

    def forward(self, x, mask, H, *more, **last):
        clock[0] += H / 1e3 + (next(rounds) < 8)        # the first rounds warm up
        return original(self, x, mask, H, *more, **last)
    monkeypatch.setattr(model_module.Layer, "forward", forward)
    monkeypatch.setattr(model_module, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    assert np.isclose(latency(extract(small_model(), Arch((2, 6), (8, 8))), 7, OFF), 8)


# ---- data.py -------------------------------------------------------------------------------------

HEAD = ["sentence", "label"]


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
    write(d / "train.tsv", ["gj", "1", "", "One sentence ."], ["gj", "0", "*", "Two\u0085 it is ."])
    write(d / "dev.tsv", ["gj04", "1", "", "No newline ."], end="")
    task = data.load_task(d)
    assert (task.name, task.metric, len(task.dev)) == ("CoLA", "matthews", 1)
    assert task.train[1] == ("Two\u0085 it is .", None, 0)
    write(d / "train.tsv", HEAD, ["ends in a space ", "0"], ["good ", "1"])
    write(d / "dev.tsv", HEAD, ["fine ", "1"], end="\r\n")
    task = data.load_task(d)
    assert (task.name, task.train[0].sentence1, task.dev[0].label) == ("x", "ends in a space ", 1)
    header = ["index", "genre", "sentence1", "sentence2", "score"]
    for name in ("train", "dev"):
        write(d / f"{name}.tsv", header, *[["0", "g", "a", "b", s] for s in ("5", "5.00", "2.50")])
    task = data.load_task(d)
    assert [e.label for e in task.train] == [5, 5, 2.5] and task.num_labels == 1 + len(task.labels)
    header = ["index", "promptID", "sentence1", "sentence2", "gold_label"]
    write(d / "train.tsv", header, *[["0", "1", "p", "h", s] for s in ("neutral", "entailment")])
    for name, label in (("dev_matched", "contradiction"), ("dev_mismatched", "neutral")):
        write(d / f"{name}.tsv", header[:4] + ["l1", "gold_label"], [*"01phx", label])
    task = data.load_task(d)
    assert (task.name, task.labels) == ("MNLI", ("contradiction", "entailment", "neutral"))
    assert [part[0].label for part in (task.dev, task.dev_mismatched, task.train)] == [0, 2, 2]
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    for name in ("train", "dev"):
        write(d / f"{name}.tsv", header, [*"123ab0"], [*"456"], [*"789cc1"])
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


@needs_minilm
@pytest.mark.parametrize("text, ids", [("Crème brûlée, naïve façade — Ångström",
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
    assert data.encode([data.Example(text, None, 0)], MINILM, 128)[0].input_ids == [101, *ids, 102]


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
    """A vocabulary with capitals is cased, unless tokenizer_config.json says otherwise."""
    d, casing = tiny_bert(tmp_path), tmp_path / "tokenizer_config.json"
    pair = [data.Example("Good films", "the Films", 1)]
    assert data.encode(pair, d, 16)[0].input_ids == [2, 1, 1, 3, 10, 9, 11, 3]
    casing.write_text('{"do_lower_case": true}')
    e, = data.encode(pair, d, 16)
    assert (e.input_ids, e.token_type_ids) == ([2, 5, 1, 3, 10, 1, 3], [0, 0, 0, 0, 1, 1, 1])
    casing.write_text('{"do_lower_case": false}')
    assert data.encode(pair, d, 16)[0].input_ids == [2, 1, 1, 3, 10, 9, 11, 3]
    single = tiny_bert(tmp_path / "single", type_vocab_size=1)
    for second in ("the film", ""):
        with pytest.raises(UserError, match="only one token type"):
            data.encode([data.Example("good", second, 1)], single, 16)
    e, = data.encode([data.Example("bad bad bad bad bad bad", "not not", 1)], d, 8)
    assert e.input_ids == [2, 6, 6, 6, 3, 7, 7, 3]      # longest first


def test_batches():
    """Every example once an epoch, lengths in a batch close; from any step on the same batches;
    another seed or epoch, another order."""
    rng = np.random.default_rng(0)
    encoded = [data.Encoded([1] * n, [0] * n, i) for i, n in enumerate(rng.integers(3, 90, 1000))]

    def cut(seed, first, count):
        return list(itertools.islice(data.batches(encoded, 16, seed, first), count))
    every = cut(1, 0, 189)                              # 3 epochs of 63 batches
    for epoch in (every[:63], every[63:126], every[126:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(1000))
    assert every[:63] != every[63:126] and every[:63] != cut(2, 0, 63)
    for first in (1, 62, 63, 64, 130):
        assert cut(1, first, 189 - first) == every[first:]
    real = sum(len(e.input_ids) for e in encoded)
    padded = sum(len(b) * max(len(encoded[i].input_ids) for i in b) for b in every[:63])
    assert padded < 1.1 * real
    parts = data.token_batches(encoded, 600)
    lengths = [len(encoded[i].input_ids) for b in parts for i in b]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 1000
    assert all(500 < len(b) * len(encoded[b[0]].input_ids) <= 600 for b in parts[:-1])
    assert [len(b) for b in data.token_batches(encoded[:9], 1)] == [1] * 9
    ids, types, mask, labels = data.collate(encoded, [3, 1])
    assert mask.sum(1).tolist() == [len(encoded[i].input_ids) for i in labels.tolist()]
    assert ids.shape == types.shape == mask.shape and mask.dtype == torch.bool


def holdout(labels, share=0.1, seed=0):
    """The labels that are held out, after a check that the two parts are the whole."""
    examples = [data.Example(str(i), None, label) for i, label in enumerate(labels)]
    kept, held = data.split_holdout(examples, share, seed)
    assert sorted(kept + held) == sorted(examples)
    assert held == data.split_holdout(examples, share, seed)[1]
    assert not held or len(examples) < 3 or held != data.split_holdout(examples, share, seed + 1)[1]
    return [e.label for e in held]


def test_holdout():
    """A tenth of everything, of each label its share by largest remainders, of scores one in every
    ten neighbours: never silently nothing."""
    held = holdout([int(i % 10 == 0) for i in range(1000)])
    assert len(held) == 100 and sum(held) == 10
    assert not holdout([0, 1] * 50, 0) and len(holdout([0, 1])) == 1    # of little at least one
    scores = holdout([float(i) for i in range(1, 601)])
    assert [math.ceil(score / 10) for score in sorted(scores)] == list(range(1, 61))
    few = holdout([i % 40 for i in range(200)])         # 0.5 of each of 40: half of them get one
    assert len(few) == 20 == len(set(few))
    many = holdout([i % 150 for i in range(600)])       # 0.4 of each of 150
    assert len(many) == 60 == len(set(many))
    uneven = holdout([0] * 26 + [1] * 37 + [2] * 37)    # 2.6, 3.7, 3.7 of 10: 2 + 4 + 4
    assert [uneven.count(label) for label in range(3)] == [2, 4, 4]


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
    assert data.compute_metrics("accuracy+f1", np.array([1, 0, 0, 0]), logits) == {
        "score": pytest.approx((75 + 200 / 3) / 2), "accuracy": 75, "f1": pytest.approx(200 / 3),
        "matthews": pytest.approx(100 * 2 / 12 ** 0.5)}
    assert set(data.compute_metrics("pearson+spearman", np.array([1., 2]), logits[:2, :1])) == {
        "score", "pearson", "spearman"}


@pytest.mark.parametrize("memory", [0, 3000, 2**30])
def test_scorer(monkeypatch, memory):
    """The scorer's accuracy is that of `forward`, in any order of architectures, whatever is kept;
    with room, those that share their first layers compute them once."""
    model, calls, rng = small_model(max_position_embeddings=24), [], np.random.default_rng(0)
    encoded = [data.Encoded(rng.integers(5, 50, n).tolist(), [0] * n, int(rng.integers(3)))
               for n in rng.integers(3, 20, 60)]
    *inputs, labels = data.collate(encoded, range(60))
    monkeypatch.setattr(data, "PREFIX_MEMORY", memory)
    score = data.make_evaluator(model, [encoded], "accuracy", torch.device("cpu"), OFF)
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    archs = [Arch((1, 4, 6), (8, 16, 48)), Arch((1, 4, 2, 6), (8, 16, 8, 48))]
    for n, arch in enumerate(archs + some_archs(model.config, 8) * 2):
        calls.clear()
        found = score(arch)["accuracy"]
        assert memory != 2**30 or n > 1 or len(calls) == (3, 2)[n]
        right = (model(*inputs, arch).argmax(1) == labels).float().mean().item()
        assert abs(found - 100 * right) < 1e-3


# ---- yoco.py: the method -------------------------------------------------------------------------

SIZES = (4,) + (12,) * 12         # of BERT-base's variables: depth, then one per layer


def fisher(theta):
    """The Fisher matrix of a categorical variable in its K - 1 free probabilities, written out."""
    return np.diag(1 / theta[:-1]) + 1 / theta[-1]


def test_inverse_fisher():
    """one_hot - theta = F^-1 grad ln P, and the Fisher norm is the dense quadratic form."""
    rng = np.random.default_rng(0)
    for K in (2, 3, 12):
        theta = rng.dirichlet(np.full(K, 2.0))
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
    theta, loss = [rng.dirichlet(np.full(n, 2.0)) for n in sizes], rng.normal(size=sizes)
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
    P.theta = [rng.dirichlet(np.full(n, 2.0)) for n in (3, 4)]
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
    two = Categorical([2])                              # 1 / 2K is the most that theta_min can be
    for _ in range(50):
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
    assert np.isclose(yoco.min_exploit_probability(P), by_hand)
    assert np.isclose(yoco.min_exploit_probability(Categorical(SIZES)), by_hand)
    P.open([np.arange(size) == size - 1 for size in SIZES])
    before = [t.copy() for t in P.theta]
    P.step([[3] + [11] * 12] * 2, [1, 2])
    assert yoco.exploit_probability(P) == yoco.min_exploit_probability(P) == 1
    assert all(map(np.array_equal, P.theta, before))


def test_worked_example():
    """README's "One step by hand": two layers, lambda = 2, with fractions; README prints them."""
    P, samples = Categorical([2, 4, 4]), [[1, 3, 0], [0, 1, None]]
    root = math.sqrt(15)
    # One half of (best - worst); layer 2 is inactive in the worse sample: (one_hot(0) - 1/4) / 2.
    gradient = [[-1/2, 1/2], [0, -1/2, 0, 1/2], [3/8, -1/8, -1/8, -1/8]]
    # Squares over theta: (1/4 + 1/4) * 2 + (1/4 + 1/4) * 4 + (9 + 3)/64 * 4 = 15/4.
    norm = root / 2
    # Depth: 1/2 - 1/root = 0.242 is lifted to theta_min = 1 / 2K = 1/4. Layer 1: 1/4 - 1/root < 0
    # is lifted to 1 / (3 * 3), and the other three share the rest, 5/9, like their distances from
    # 1/9: 5/36, 5/36 and 5/36 + 1/root. Layer 2 is above 1/9.
    apart = [5/36, 0, 5/36, 5/36 + 1/root]
    after = [[1/4, 3/4], [1/9 + 5/9 * a / sum(apart) for a in apart],
             [1/4 + 3/(4*root)] + [1/4 - 1/(4*root)] * 3]
    K = -sum(p * math.log(p) for theta in after for p in theta) / (5 * math.log(2))

    assert [t.tolist() for t in P.theta] == [[1/2] * 2, [1/4] * 4, [1/4] * 4]
    assert yoco.exploit_probability(P) == 1
    found = yoco.natural_gradient(P.theta, samples, yoco.ranking_utility([0.4, 0.7]))
    assert [g.tolist() for g in found] == gradient
    assert np.isclose(yoco.fisher_norm(P.theta, found), norm)
    P.step(samples, [0.4, 0.7], delta=1.0)
    assert all(np.allclose(t, a) for t, a in zip(P.theta, after, strict=True))
    assert np.isclose(yoco.exploit_probability(P), K)

    section = re.split(r"^#+ .*One step by hand.*$", (ROOT / "README.md").read_text(), flags=re.M)
    assert len(section) == 2, "README has no section One step by hand"
    section = re.split(r"^#+ ", section[1], flags=re.M)[0].replace("\u2212", "-")
    printed = set(re.findall(r"-?\d+\.\d{3}(?!\d)", section))
    wanted = [1/2, 1/4, 0.4, 0.7, 1, *sum(gradient, []), norm, *sum(after, []), K]
    assert {f"{value:.3f}" for value in wanted} <= printed


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
             for seed in range(10)]
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


def test_stages():
    """BERT-base's nine stages as the paper lists them, the epochs as in the authors' table;
    --epochs counts epochs, in its proportions; `all` has two stages, equal, `largest` one."""
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
        P.open(yoco.open_masks(space, stage))
        archs = [space.arch(P.sample(rng)) for _ in range(300)]
        seen.append([tuple(sorted(set(v), reverse=True)) for v in (
            [a.depth for a in archs], [h for a in archs for h in a.heads],
            [k for a in archs for k in a.ffn_sizes])])
    assert [tuple(s) for s in seen] == [row[:3] for row in rows]

    def steps(kind, epochs=0.0):
        return [s.steps for s in yoco.make_stages(space, "MRPC", 100, kind, epochs)]
    assert steps("progressive", 58) == [600, 1000] + [600] * 7      # twice the table's 29
    assert abs(sum(steps("progressive", 4)) - 400) <= 9
    assert steps("all") == [1450, 1450] and steps("all", 14.5) == [725, 725]
    assert steps("largest") == [300] and steps("largest", 4) == [400]
    largest, both = yoco.make_stages(space, "MRPC", 100, "all")
    assert (largest.depths, largest.heads, largest.ffn_sizes) == ((12,), (12,), (3072,))
    assert (both.depths, both.heads) == ((12, 10, 8, 6), (12, 8, 4)) and both.first == 1450


def summed_by_hand(model, inputs, labels, archs, loss_of):
    """The losses, and the mean gradient over extracted sub-BERTs, each laid into its corner."""
    expected = {name: torch.zeros_like(w) for name, w in model.named_parameters()}
    losses = []
    for arch in archs:
        sub = extract(model, arch)
        loss, total = loss_of(sub(*inputs), labels, arch)
        total.backward()
        losses.append(loss.item())
        index = [i for i, *_ in model.config.layers(arch)]
        for name, w in sub.named_parameters():
            there = name.split(".")
            if there[0] == "layers":
                there[1] = str(index[int(there[1])])
            expected[".".join(there)][tuple(slice(n) for n in w.shape)] += w.grad / len(archs)
    return losses, expected


def check_gradient(model, losses, expected):
    """Both ways of computing it are compared with what is expected."""
    wanted, gradient = expected
    assert np.allclose([float(loss) for loss in losses], wanted, atol=1e-5)
    for name, w in model.named_parameters():
        close(gradient[name] * 0 if w.grad is None else w.grad, gradient[name])


LABELS = torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("keeps", ["first", "even"])
def test_weight_gradient(keeps):
    """The mean over the architectures of each extracted sub-BERT's own gradient, laid into its
    corner; one drawn twice weighs double; a layer that none has is not touched. By slices and by
    masks."""
    model, inputs = small_model(keep_layers=keeps, **NO_DROPOUT).train(), small_batch()
    a, b = Arch((4, 2), (12, 48)), Arch((6, 2), (8, 16))

    def cross_entropy(logits, labels, _):
        loss = -logits.log_softmax(1)[torch.arange(5), labels].mean()
        return loss, loss
    for archs in ([a, b, a], [a], [model.config.arch, b]):
        expected = summed_by_hand(model, inputs, LABELS, archs, cross_entropy)
        losses = yoco.weight_gradient(model, (*inputs, LABELS), archs, OFF)
        check_gradient(model, losses, expected)
        used = {i for arch in archs for i, *_ in model.config.layers(arch)}
        assert [layer.query.weight.grad is not None for layer in model.layers] == [
            i in used for i in range(4)]
        model.zero_grad()
        sizes = archs_to_tensor(model.config, archs)
        check_gradient(model, yoco.masked_gradient(model, (*inputs, LABELS), sizes, OFF), expected)


@pytest.mark.parametrize("num_labels", [3, 1])
def test_distillation(num_labels):
    """The gradient is that of the mean of both losses, of labels and of the teacher, a model of its
    own; the largest, when it is drawn itself, has no teacher. By slices and by masks."""
    model, inputs = small_model(num_labels, **NO_DROPOUT).train(), small_batch()
    teacher, full = small_model(num_labels, seed=5, **NO_DROPOUT), model.config.arch
    labels = LABELS if num_labels > 1 else LABELS.float()
    wanted = teacher(*inputs).detach()

    def both(logits, labels, arch):
        if num_labels == 1:
            loss = ((logits[:, 0] - labels) ** 2).mean()
            soft = ((logits - wanted) ** 2).mean()
        else:
            loss = -logits.log_softmax(1)[torch.arange(5), labels].mean()
            soft = -(wanted.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        return loss, loss if arch == full else (loss + soft) / 2
    small, middle = Arch((2, 4), (8, 48)), Arch((6, 6, 6, 6), (48, 48, 48, 16))
    for archs in ([small], [full], [small, full, middle, small]):
        expected = summed_by_hand(model, inputs, labels, archs, both)
        batch = (*inputs, labels)
        check_gradient(model, yoco.weight_gradient(model, batch, archs, OFF, teacher), expected)
        model.zero_grad()
        check_gradient(model, yoco.masked_gradient(model, batch, archs_to_tensor(model.config, archs),
                                                   OFF, teacher), expected)
    assert model.training and all(w.grad is None for w in teacher.parameters())


def test_reorder():
    """Permuted heads and neurons compute the same; the front is the most important part; the
    importance is the change of the loss when a head's output is scaled, by finite differences."""
    model, rng = small_model(**NO_DROPOUT, max_position_embeddings=24), np.random.default_rng(0)
    examples = [data.Encoded(rng.integers(5, 50, n).tolist(), [0] * n, int(rng.integers(3)))
                for n in (3, 5, 8, 8, 11, 17)]
    *batch, labels = data.collate(examples, range(6))
    settings = yoco.TrainSettings(batch_size=6)         # one batch
    importance = yoco.importance(model, examples, settings, OFF)
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
    sort_by_importance(model, importance)
    torch.testing.assert_close(model(*batch), logits)
    best = importance[1][1].argmax()
    assert torch.equal(model.layers[1].ffn_in.weight[0], weights[best])
    for heads, neurons in yoco.importance(model, examples, settings, OFF):
        assert (heads.diff() <= 1e-6).all() and (neurons.diff() <= 1e-6).all()


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


@pytest.mark.parametrize("words, values", [
    ("60000000", [6e7]), ("60e6", [6e7]), ("60M", [6e7]), ("0.5x", [5e7]), (".5X", [5e7]),
    ("22G", [22e9]), ("1.5k", [1500]), ("60 M", [6e7]), ("60 m 0.5 X 70", [6e7, 5e7, 70]),
    ("30M 30m", [3e7])])
def test_budgets(words, values, capsys):
    """As words of the command line, in either case, with blanks or without, one or several."""
    for typed in (words.split(), [words]):
        kind, wishes = yoco.budgets_from_settings(yoco.SearchSettings(max_params=typed), "superbert")
        assert kind == "params"
        assert [yoco.parse_budget(wish, 10, 10**8, "parameters") for wish in wishes] == values
    said = "bounds nothing" in capsys.readouterr().out
    assert said == any(value > 10**8 for value in values)
    for text, value in (("12", 12), ("12ms", 12), ("12 MS", 12), ("0.5x", 20)):
        kind, (wish,) = yoco.budgets_from_settings(yoco.SearchSettings(max_latency=text.split()), "superbert")
        assert kind == "latency" and yoco.parse_budget(wish, 1, 40, "ms") == value


# ---- yoco.py: the commands -----------------------------------------------------------------------

CPU = ["--device", "cpu", "--precision", "fp32"]
TRAIN = ["train", "--data", "tiny", "--epochs", "4", "--lr", "1e-3", "--batch-size", "8", *CPU]
SEARCH = ["search", "--max-params", "0.9x", "--evaluations", "12", *CPU]


def sentences(rng, count):
    rows = [HEAD]
    for _ in range(count):
        word, negated = rng.choice(["good", "bad"]), rng.random() < 0.5
        label = int((word == "good") != negated)
        rows.append([f"the film is {'not ' if negated else ''}very {word}", str(label)])
    return rows


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A directory with a data set `tiny` that has its own BERT, a super-BERT trained on it, and a
    sub-BERT of that. Nobody writes there: the fixtures below copy it."""
    directory, rng, before = tmp_path_factory.mktemp("made"), np.random.default_rng(0), os.getcwd()
    write(tiny_bert(directory / "tiny") / "train.tsv", *sentences(rng, 60))
    write(directory / "tiny" / "dev.tsv", *sentences(rng, 20))
    os.chdir(directory)
    assert yoco.main(TRAIN) == yoco.main(SEARCH) == 0
    os.chdir(before)
    return directory


@pytest.fixture
def tiny(made, tmp_path, monkeypatch):
    """A directory to work in, with the data set alone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "tiny", "tiny")
    return tmp_path


@pytest.fixture
def trained(made, tiny):
    """The same with the super-BERT in superbert/tiny."""
    shutil.copytree(made / "superbert", "superbert")
    return tiny


def result_bytes(*directories):
    return [(Path(d) / name).read_bytes() for d in directories
            for name in ("model.safetensors", "config.json")]


def log_of(out):
    """The lines of a run's log, without times; the first has the settings."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    assert "settings" in lines[0]
    return [{k: v for k, v in line.items() if k != "ms"} for line in lines[1:]]


def facts_of(out):
    """What a finished run says of itself, without times."""
    facts = json.loads((Path(out) / "run.json").read_text())
    return {k: v for k, v in facts.items() if k not in ("seconds", "finished", "peak_memory_mib")}


def refused(capsys, words, *parts):
    """The command ends with status 2 and one line on stderr that has all `parts`."""
    capsys.readouterr()
    assert yoco.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("yoco.py: error: "), lines
    assert all(part in lines[0] for part in parts), (lines[0], parts)


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
        assert re.search(rf"{name}\W.*\b{count_params(config, arch):,} parameters", trained)
    assert {p.name for p in Path("superbert/tiny").iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", "run.json", "log.jsonl"}
    found = run(*SEARCH)
    assert "superbert/tiny, the super-BERT finished last" in found and "12 asked" in found
    out = Path("subbert/tiny-0.9x")
    result = json.loads((out / "run.json").read_text())
    shutil.rmtree("superbert")                          # the sub-BERT does not need it
    assert f"score {result['dev']['score']:.2f}" in run("eval", "--model", str(out))
    model, encode = data.load(out)                      # the two lines of use in Python
    assert model.config.labels == ("0", "1") and model.config.arch == Arch(**result["arch"])
    own = sum(w.numel() for n, w in model.named_parameters() if "classifier" not in n)
    full = count_params(config, space.largest())
    assert own == result["params"] < 0.9 * full == result["budget"] and result["full_cost"] == full
    dev = data.load_task("tiny").dev
    logits = model(*encode([e.sentence1 for e in dev]))
    with pytest.raises(UserError, match="as many second texts"):
        encode(["good", "bad"], "ab")                   # not a text and its letter
    right = (logits.argmax(1) == torch.tensor([e.label for e in dev])).float().mean().item()
    assert abs(100 * right - result["dev"]["accuracy"]) < 1e-3
    named = list(data.predict(model, out, dev, OFF))
    assert [name for name, _ in named] == [model.config.labels[i] for i in logits.argmax(1)]
    assert all(abs(sum(p.values()) - 1) < 1e-5 and max(p, key=p.get) == name for name, p in named)


def test_learning(tiny):
    """On labels that a word decides, every size learns: the expected loss falls, and the largest,
    the most likely and the smallest are right on what was held out."""
    rows = [[f"the film is very {word}", str(int(word == "good"))] for word in ("good", "bad")] * 40
    write(tiny / "tiny" / "train.tsv", HEAD, *rows)
    assert yoco.main(TRAIN + ["--epochs", "42", "--lr", "1e-2"]) == 0
    losses = [row["loss"] for row in log_of("superbert/tiny")]
    assert np.mean(losses[-8:]) < 0.2 < 0.5 < losses[0]
    holdout = facts_of("superbert/tiny")["holdout"]
    assert {name: score["accuracy"] for name, score in holdout.items()} == {
        "largest": 100, "most likely": 100, "smallest": 100}


def test_one_seed_one_result(made, tiny):
    """The same seed gives the same bytes, another seed other weights and another theta."""
    assert yoco.main(TRAIN) == yoco.main(SEARCH) == 0
    assert yoco.main(TRAIN + ["--out", "other", "--seed", "4"]) == 0
    outs = ("superbert/tiny", "subbert/tiny-0.9x")
    assert result_bytes(*outs) == result_bytes(*[made / out for out in outs])
    thetas = [facts_of(out)["theta"] for out in (outs[0], made / outs[0], "other")]
    assert thetas[0] == thetas[1] != thetas[2] and result_bytes("other") != result_bytes(outs[0])


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_precision_is_recorded(tiny):
    """run.json says in what was computed, also where `auto` decided: by the processor's flags."""
    units = {"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    for asked, used in (("bf16", "bf16"), ("fp32", "fp32"), ("auto", "bf16" if units else "fp32")):
        assert yoco.main(TRAIN + ["--precision", asked, "--out", asked]) == 0
        assert facts_of(asked)["precision"] == used


@pytest.mark.parametrize("extra", [
    "--strategy explore", "--strategy exploit", "--strategy noise", "--stages all",
    "--recipe best", "--keep-layers even", "--holdout 0"])
def test_variants(made, tiny, capsys, extra):
    """explore leaves theta uniform, the others move it; each is another result than the default."""
    assert yoco.main(TRAIN + extra.split()) == 0
    facts = facts_of("superbert/tiny")
    tops = [max(t) * len(t) for t in facts["theta"]]
    assert np.allclose(tops, 1) if "explore" in extra else max(tops) > 1.01
    always = {"--strategy explore": 0.0, "--strategy exploit": 1.0}.get(extra)
    assert always is None or {row["K"] for row in log_of("superbert/tiny")} == {always}
    assert result_bytes("superbert/tiny") != result_bytes(made / "superbert/tiny")
    if extra == "--recipe best":
        assert dict(stages="all", reorder=True, distill=True, keep_layers="even").items() <= facts[
            "settings"].items() and BertConfig.load("superbert/tiny").keep_layers == "even"
    if extra == "--holdout 0":
        refused(capsys, ["search", "--max-params", "0.9x"], "--select-on dev")
        assert yoco.main(SEARCH + ["--select-on", "dev"]) == 0
        assert "optimistic" in capsys.readouterr().out


def test_largest_alone(tiny, capsys):
    """--stages largest is plain fine-tuning: one stage, K = 1, nothing to search; another training
    on the same train.tsv keeps its hold-out, so that nothing selects on what was trained on."""
    words = TRAIN + ["--stages", "largest"]
    refused(capsys, words + ["--distill"], "one architecture")
    assert yoco.main(words) == 0
    assert {(row["stage"], row["K"]) for row in log_of("superbert/tiny")} == {("largest", 1.0)}
    refused(capsys, SEARCH + ["--model", "superbert/tiny"], "nothing to search")
    refused(capsys, SEARCH, "no finished super-BERT")
    again = TRAIN + ["--bert", "superbert/tiny", "--seed", "5"]
    assert yoco.main(again + ["--out", "second"]) == 0
    with open("tiny/train.tsv", "a") as file:           # other data, another split
        file.write("the film\t1\n")
    assert yoco.main(again + ["--out", "third"]) == 0
    assert [facts_of(d)["held_out"] for d in ("superbert/tiny", "second", "third")] == [
        [0.1, 0], [0.1, 0], [0.1, 5]]


@pytest.mark.parametrize("extra", [[], ["--stages", "all", "--reorder"]])
def test_frozen_teacher(tiny, monkeypatch, extra):
    """The teacher says what the largest said when smaller sub-BERTs opened, while that moves on."""
    original, said, (ids, types_, mask) = yoco.weight_gradient, [], small_batch()

    def spy(model, batch, archs, autocast, teacher=None):
        if teacher:
            with torch.no_grad():
                said.append([m.eval()(ids % model.config.vocab_size, types_, mask)
                             for m in (model, teacher)])
            model.train()
        return original(model, batch, archs, autocast, teacher)
    monkeypatch.setattr(yoco, "weight_gradient", spy)
    assert yoco.main(TRAIN + ["--distill", *extra]) == 0
    assert len(said) > 4 and all(torch.equal(teacher, said[0][1]) for _, teacher in said)
    assert torch.equal(*said[0]) and not torch.allclose(*said[-1])


def test_many_budgets(tiny, monkeypatch, capsys):
    """One sub-BERT per budget, each fitting and the best that is known; no architecture is scored
    twice, and the logs tell all that were."""
    tiny_bert(tiny / "tiny", num_hidden_layers=4, num_attention_heads=6)
    assert yoco.main(TRAIN) == 0
    scored, original = [], data.make_evaluator

    def make_evaluator(model, parts, *args):
        score = original(model, parts, *args)
        return lambda arch: scored.append((len(parts[0]), arch)) or score(arch)
    monkeypatch.setattr(data, "make_evaluator", scorer)
    words = ["search", "--evaluations", "20", *CPU]
    assert yoco.main([*words, "--max-params", "0.9x", "0.6", "X", "0.7x"]) == 0
    held = [arch for n, arch in scored if n == 6]       # the others are the three of dev
    assert len(scored) == len(held) + 3 and len(set(held)) == len(held)
    names, shares = [f"subbert/tiny-{share}x" for share in (0.9, 0.6, 0.7)], (0.9, 0.6, 0.7)
    config, known = BertConfig.load("tiny"), {}
    space, printed = SearchSpace.for_config(config), capsys.readouterr().out
    for name, share in zip(names, shares):
        known |= {space.arch(row["choices"]): (row["score"], -row["cost"]) for row in log_of(name)}
        fitting = {m: rank for m, rank in known.items()
                   if -rank[1] < share * count_params(config, config.arch)}
        facts = facts_of(name)
        assert (facts["selection_score"], -facts["params"]) == max(fitting.values())
        assert Arch(**facts["arch"]) in fitting and name in printed
        assert facts["evaluations_run"] == len(log_of(name)) and facts["evaluations_asked"] == 20
    assert set(known) == set(held)


def test_search_by_latency(trained, monkeypatch, capsys):
    """Every new architecture is timed once, the winner again: down the list until one keeps the
    budget twice. A clock that is slow the second time for all but the fewest heads decides."""
    asked = []

    def clock(model, T, autocast):
        m = model.config.arch
        asked.append(m)
        assert T == 16
        return sum(m.heads) + 100 * (asked.count(m) > 1 and sum(m.heads) > 2)
    monkeypatch.setattr(yoco, "latency", clock)
    monkeypatch.setattr(data, "make_evaluator", lambda *_: lambda m: {"score": float(sum(m.heads))})
    words = ["search", "--evaluations", "40", *CPU]
    assert yoco.main([*words, "--max-latency", "4.5 MS"]) == 0
    found = facts_of("subbert/tiny-4.5ms-latency")
    assert sum(found["arch"]["heads"]) == 2 == found["cost"] and found["unit"] == "ms"
    known = [Arch(*archs) for archs in {(m.heads, m.ffn_sizes) for m in asked}]
    again = {m for m in known if 2 < sum(m.heads) <= 4}
    assert {m for m in known if asked.count(m) > 1} >= again and again
    assert facts_of("subbert/tiny-4.5ms-latency")["full_cost"] == 6


def make_regression(directory, train=40):
    """A data set in STS-B's format."""
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("dev", 12)):
        rows = [["good film", rng.choice(["good", "bad", "not"]), f"{rng.uniform(0, 5):.3f}"]
                for _ in range(count)]
        write(directory / f"{name}.tsv", ["sentence1", "sentence2", "score"], *rows)


def test_regression(tiny):
    """STS-B's format from train to search: one logit, no labels, correlations, scores."""
    make_regression(tiny / "tiny")
    assert yoco.main(TRAIN) == 0 and yoco.main(SEARCH) == 0
    assert set(facts_of("subbert/tiny-0.9x")["dev"]) == {"score", "pearson", "spearman"}
    model, encode = data.load("subbert/tiny-0.9x")
    found, = data.predict(model, "subbert/tiny-0.9x", [data.Example("good film", "bad", 0)], OFF)
    assert found == (pytest.approx(model(*encode("good film", "bad")).item(), abs=1e-6), {})


def test_mnli_and_flops(tiny):
    """Two dev sets from train to search: the score is the mean of both; a FLOPs budget binds."""
    rng = np.random.default_rng(0)
    for name in ("train", "dev_matched", "dev_mismatched"):
        rows = [[rng.choice(["good", "bad"]), "film", rng.choice(["entailment", "neutral"])]
                for _ in range(40)]
        write(tiny / "tiny" / f"{name}.tsv", ["sentence1", "sentence2", "gold_label"], *rows)
    assert yoco.main(TRAIN) == 0
    assert yoco.main(["search", "--max-flops", "0.5x", "--evaluations", "20"] + CPU) == 0
    result = facts_of("subbert/tiny-0.5x-flops")
    dev, config = result["dev"], BertConfig.load("tiny")
    assert np.isclose(dev["score"], (dev["accuracy"] + dev["accuracy_mismatched"]) / 2)
    assert result["flops"] < count_flops(config, config.arch) / 2


def test_positions_that_padding_exceeds(tiny):
    """A BERT of 13 positions takes texts of 13 tokens, though batches are padded to multiples."""
    tiny_bert(tiny / "tiny", max_position_embeddings=13)
    write(tiny / "tiny" / "train.tsv", HEAD, *[["good " * 20, "1"], ["bad " * 20, "0"]] * 20)
    assert yoco.main(TRAIN) == 0 and yoco.main(SEARCH) == 0


@pytest.mark.parametrize("files, parts", [
    ({}, ["train.tsv does not exist"]), ({"train": b""}, ["train.tsv is empty"]),
    ({"train": b"sentence\tlabel\n"}, ["no rows"]),
    ({"train": b"sentence\tlabel\na\t1\nb\n"}, ["train.tsv, line 3: 1 columns, expected 2"]),
    ({"train": b"sentence\tlabel\n" + b"good " * 200_001}, ["line 2", "more than 1,000,000"]),
    ({"train": b"sentence\tlabel\ngo\0od\t1"}, ["train.tsv, line 2: a NUL"]),
    ({"train": b"sentence\tlabel\n\xff\xfe\t1\n"}, ["line 2: not UTF-8"]),
    ({"train": b"sentence\tlabel\tlabel\na\t1\t0\n"}, ["two columns of one name"]),
    ({"train": b"sentence\tsentence1\tlabel\na\tb\t0\n"}, ["column sentence1: leave one out"]),
    ({"train": b"sentence\tlabel\na\t1\nb\t1\n"}, ["only one label"]),
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


def change(directory, name, tensor):
    """Replace, add or (None) remove one tensor of a weights file."""
    tensors = load_file(directory / "model.safetensors") | {name: tensor}
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors")


@pytest.mark.parametrize("spoil, parts", [
    (lambda d: (d / "config.json").unlink(), ["config.json does not exist"]),
    (lambda d: (d / "config.json").write_text("{"), ["config.json is not a JSON object"]),
    (lambda d: tiny_bert(d, num_attention_heads=5), ["5 heads do not divide the hidden size 12"]),
    (lambda d: tiny_bert(d, hidden_size="12"), ["hidden_size is '12', not a whole number"]),
    (lambda d: tiny_bert(d, model_type="roberta"), ["model_type is 'roberta'"]),
    (lambda d: tiny_bert(d, problem_type="multi_label_classification"), ["problem_type is"]),
    (lambda d: tiny_bert(d, rope_theta=1e4), ["unknown field 'rope_theta'"]),
    (lambda d: tiny_bert(d, id2label={"1": "a"}), ["id2label is {'1': 'a'}, not"]),
    (lambda d: tiny_bert(d, position_embedding_type="relative_key"), ["position_embedding_type"]),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), ["save_pretrained"]),
    (lambda d: os.truncate(d / "model.safetensors", 99), ["not a complete safetensors file"]),
    (lambda d: change(d, "classifier.bias", None), ["classifier.bias is missing"]),
    (lambda d: change(d, "bert.pooler.dense.bias", None), ["bert.pooler.dense.bias is missing"]),
    (lambda d: change(d, "bert.extra.weight", torch.ones(1)), ["unknown tensor bert.extra.weight"]),
    (lambda d: change(d, "bert.pooler.dense.bias", torch.ones(13)), ["shape [13], expected [12]"]),
    (lambda d: change(d, "bert.pooler.dense.bias", torch.full((12,), np.nan)), ["finite"]),
    (lambda d: change(d, "pooler.dense.bias", torch.ones(12)), ["two tensors bert.pooler.dense.b"]),
    (lambda d: tiny_bert(d, tokenizer_class="BertJapaneseTokenizer"), ["'BertJapaneseTokenizer'"]),
    (lambda d: (d / "vocab.txt").write_text("[CLS]\n[UNK]\n"), ["vocab.txt is", "sep_token"]),
    (lambda d: (d / "vocab.txt").unlink(), ["vocab.txt does not exist"]),
    (lambda d: (d / "vocab.txt").write_text("[CLS]\n[SEP]\n"), ["vocab.txt has no [UNK]"]),
    (lambda d: (d / "vocab.txt").write_bytes((d / "vocab.txt").read_bytes() + b"more\n"),
     ["the id 12", "vocab_size is 12"]),
    *[(lambda d, name=name, text=text: (d / name).write_text(text), [name]) for name, text in (
        ("tokenizer_config.json", '{"do_lower_case": "false"}'),
        ("tokenizer_config.json", '{"truncation_side": "left"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}'),
        ("tokenizer_config.json", '{"cls_token": {"content": "<s>"}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"12": 5}}'),
        ("special_tokens_map.json", '{"additional_special_tokens": "<e>"}'),
        ("added_tokens.json", '{"<e>": [12]}'), ("tokenizer.json", '{"model": 5}'))]])
def test_bad_weights_are_refused(tiny, capsys, spoil, parts):
    bert = tiny_bert(tiny / "bert")
    model = ElasticBert(BertConfig.load(bert), 2)
    model.config.id2label = {"0": "0", "1": "1"}
    save_bert(model, bert)
    spoil(bert)
    refused(capsys, ["train", "--data", "tiny", "--bert", "bert"], *parts)
    assert not Path("superbert").exists()


S = ["search", "--max-params"]


@pytest.mark.parametrize("words, parts", [([], ["required"]), (["fit"], ["invalid choice"]),
    (["train", "--epoch", "1"], ["unknown", "--epochs"]),
    (["train", "--batch-size", "0"], ["at least 1"]), (["train", "--batch-size", "1.5"], ["int"]),
    (["train", "--epochs", "nan"], ["--epochs"]), (["train", "--epochs", "-1"], ["--epochs"]),
    (["train", "--lr", "inf"], ["--lr"]), (["train", "--holdout", "1"], ["--holdout"]),
    (["train", "--strategy", "greedy"], ["'ee', 'exploit', 'explore', 'noise'"]),
    (["train", "--data", "glue/MRPC"], ["python -m glue.download MRPC"]),
    (["train", "--data", "tiny", "--bert", "bert-base-uncased", "--out", "new"],
     ["python -m glue.download bert-base-uncased"]),
    (["train", "--data", "tiny", "--bert", "subbert/tiny-0.9x", "--out", "new"], ["sub-BERT"]),
    (["train", "--data", "tiny"], ["holds a finished result", "--overwrite"]),
    ([*TRAIN, "--resume", "--seed", "5"], ["started with seed = 0, not 5"]),
    (["train", "--data", "tiny", "--out", "tiny"], ["is what the command reads"]),
    ([*TRAIN, "--bert", "superbert/tiny", "--out", "superbert/tiny", "--overwrite"], ["reads"]),
    ([*TRAIN, "--out", "/proc/x"], ["/proc/x"]), ([*TRAIN, "--out", "tiny/dev.tsv"], ["dev.tsv"]),
    (["search"], ["--max-params, --max-flops"]), ([*S, "1M", "--method", "evolution"], ["unknown"]),
    ([*S, "0.9x", "9", "--out", "sub"], ["smallest has"]), ([*TRAIN, "--out", "loop"], ["loop"]),
    *[([*S, budget], ["budget"]) for budget in (
        "0", "0x", "many", "nan", "inf", "1e999", "12ms", "", "-5", "M 60")],
    (["search", "--max-latency", "60M"], ["'60m' is not a positive"]),
    ([*S, "0.5x", "--model", "tiny"], ["run.json does not exist"]),
    ([*S, "0.5x", "--model", "moved"], ["gone/train.tsv does not exist"]),
    ([*S, "0.5x", "--model", "subbert/tiny-0.9x"], ["nothing to search"]),
    ([*S, "0.9x", "--out", "superbert/tiny", "--overwrite"], ["is what the command reads"]),
    ([*S, "0.9x"], ["holds a finished result"]), (["eval"], ["name a model with --model"]),
    (["eval", "--model", "tiny"], ["run.json does not exist"]),
    (["eval", "--model", "superbert/tiny", "--data", "names"], ["('0', '1')", "('no', 'yes')"])])
def test_bad_commands_are_refused(made, trained, capsys, words, parts):
    shutil.copytree(made / "subbert", "subbert")
    run = Path(shutil.copytree("superbert/tiny", "moved"), "run.json")      # but not its data
    run.write_text(run.read_text().replace('"data": "tiny"', '"data": "gone"'))
    os.symlink("loop", "loop")
    write(trained / "names" / "train.tsv", HEAD, ["good", "yes"], ["bad", "no"])
    write(trained / "names" / "dev.tsv", HEAD, ["good", "yes"])
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    refused(capsys, words, *parts)
    assert all(p.read_bytes() == content for p, content in before.items())
    assert not Path("sub").exists()                     # no unfinished run to stand in the way


RESUME = TRAIN + ["--checkpoint-every", "2", "--out", "part", "--resume"]
SUPER = "superbert/tiny/run.json"


@pytest.mark.parametrize("name, spoil, words, parts", [
    ("part/checkpoint.safetensors", lambda b: b[:-1], RESUME, ["checkpoint.safetensors is damag"]),
    ("part/checkpoint.safetensors", lambda b: b.replace(b'theta', b'thetb'), RESUME, ["damaged"]),
    ("part/log.jsonl", lambda b: b"{}\n" + b, RESUME, ["log.jsonl"]),
    ("part/log.jsonl", lambda b: b"\0\n" + b, RESUME, ["log.jsonl is damaged"]),
    ("part/log.jsonl", lambda b: b"", RESUME, ["log.jsonl is damaged"]),
    ("part/log.jsonl", lambda b: b[:b.index(b"\n") + 1], RESUME, ["the log is shorter"]),
    ("sub/log.jsonl", lambda b: b + b'{"choices": [9, 9, 9], "score": 1, "cost": 1}\n',
     [*SEARCH, "--out", "sub", "--resume"], ["log.jsonl is damaged"]),
    (SUPER, lambda b: b"{", [*SEARCH], ["run.json is not a JSON object"]),
    (SUPER, lambda b: b"{}", [*SEARCH, "--model", "superbert/tiny"], ["was not written by train"]),
    ("tiny/train.tsv", lambda b: b + b"the film\t1\n", RESUME, ["changed since part was started"]),
    ("tiny/train.tsv", lambda b: b + b"the film\t1\n", SEARCH, ["train.tsv has changed"]),
    ("superbert/tiny/model.safetensors", lambda b: b[:-1] + b"\1", SEARCH, ["is not what its"])])
def test_damaged_files_are_refused(trained, capsys, monkeypatch, name, spoil, words, parts):
    """A run's own files, damaged or exchanged; with the file as it was, the command ends well."""
    stop_after(monkeypatch, 12)
    assert yoco.main(RESUME[:-1]) == 128 + signal.SIGTERM
    stop_after(monkeypatch, 3)
    assert yoco.main([*SEARCH, "--out", "sub"]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.chdir(trained)
    path = Path(name)
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    path.write_bytes(spoil(path.read_bytes()))
    refused(capsys, words, *parts)
    path.write_bytes(before[path])
    if hasattr(os, "mkfifo") and path.suffix != ".jsonl":
        path.unlink()
        os.mkfifo(path)                                 # whoever opens it waits for ever
        refused(capsys, words, f"{path} is not a file")
        path.unlink()
        path.write_bytes(before[path])
    for log in ("part/log.jsonl", "sub/log.jsonl"):     # cut to the checkpoint before it was read
        assert before[Path(log)].startswith(Path(log).read_bytes())
        Path(log).write_bytes(before[Path(log)])
    words = [word for word in words if words[0] != "eval"] or SEARCH
    assert yoco.main(words if "--out" in words else [*words, "--out", "new"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on Windows")
def test_two_runs_one_directory(tiny, capsys):
    """The second run refuses, whatever it was told, and spoils nothing."""
    first = yoco.Run(yoco.resolve_defaults(yoco.parse(TRAIN + ["--out", "out"])[0]), "tiny", "tiny")
    first.open()
    first.log(step=1)
    refused(capsys, TRAIN + ["--out", "out"], "holds an unfinished run")
    for word in ("--overwrite", "--resume"):
        refused(capsys, TRAIN + ["--out", "out", word], "another run is writing out")
    assert log_of("out")[-1] == {"step": 1}


# ---- Interruptions, after which a run ends as if nobody had interrupted it, and ranks ------------

def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """Send this process a signal in step `steps` of the next command, once."""
    count, report, show = itertools.count(1), yoco.report, yoco.Progress.show

    def train_step(*args):
        if next(count) == steps:
            os.kill(os.getpid(), number)
        return report(*args)

    def search_step(self, done, text):
        if text.startswith("asked") and next(count) == steps:
            os.kill(os.getpid(), number)
        return show(self, done, text)
    monkeypatch.setattr(yoco, "report", train_step)
    monkeypatch.setattr(yoco.Progress, "show", search_step)


def start(words, patch="", **environment):
    """A command in a process of its own, as python runs it, with a few lines of code before."""
    script = (f"import itertools, os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n"
              f"import torch, yoco; torch.set_num_threads(1)\n{patch}\n"
              f"sys.exit(yoco.main({list(map(str, words))!r}))")
    return subprocess.Popen([sys.executable, "-c", script], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, **environment})


# Kills the process itself, with no chance to clean up, at call number {1} of {0}: before it, or
# (True) after half of what it should write.
KILL = """
original, calls = {0}, itertools.count(1)
def replaced(*args, **more):
    if next(calls) == {1}:
        if {2}:
            where, what = args
            where = getattr(where, "log_file", None) or open(os.path.join(os.path.dirname(where),
                "." + os.path.basename(where) + ".9.tmp"), "wb", buffering=0)
            where.write(bytes(what[:len(what) // 2]))
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **more)
{0} = replaced
"""
HALF_A_LINE = """
def log(self, **record):
    import json
    if len(record) > 2 and next(calls) == 4:
        self.log_file.write(json.dumps(record).encode()[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, **record)
original, calls, yoco.Run.log = yoco.Run.log, itertools.count(1), log
"""
BEST = ["--recipe", "best", "--delta", "0.5", "--archs-per-step", "3"]
SEVERAL = ["--max-params", "0.9x", "0.5x"]


@pytest.mark.parametrize("command, extra, way, moment", [
    ("train", [], "kill", ("yoco.report", 1, False)),          # before the first checkpoint
    ("train", BEST, "kill", ("yoco.report", 12, False)),       # in the second stage
    ("train", [], "kill", ("yoco.write_file", 3, True)),       # while a checkpoint is written
    ("train", BEST, "kill", ("yoco.save_bert", 1, False)),
    ("train", [], "kill", ("yoco.write_json", 1, False)),      # before run.json
    ("train", ["--strategy", "noise"], signal.SIGINT, 3),
    ("train", BEST, signal.SIGTERM, 14),
    ("train", ["--stages", "all", "--distill"], signal.SIGINT, 9),
    ("search", [], "kill", ("yoco.Run.log", 1, False)),        # before the log has a line
    ("search", [], "kill", "half a line"),
    ("search", SEVERAL, "kill", ("yoco.save_bert", 2, False)),
    ("search", [], "kill", ("yoco.write_json", 1, False)),
    ("search", [], signal.SIGINT, 3),
    ("search", SEVERAL, signal.SIGTERM, 8),                    # in the second budget
])
def test_interrupted_equals_whole(trained, monkeypatch, capsys, command, extra, way, moment):
    """Killed, or stopped by Ctrl-C (130) or SIGTERM (143), and resumed: the same bytes, the same
    log apart from times, and the same facts as of the run that nobody interrupted."""
    words = {"train": TRAIN + ["--checkpoint-every", "2"],
             "search": SEARCH + ["--model", "superbert/tiny"]}[command] + extra
    outs = ["0.9x", "0.5x"] if extra == SEVERAL else ["."]
    assert yoco.main(words + ["--out", "whole"]) == 0
    part = words + ["--out", "part"]
    if way == "kill":
        patch = HALF_A_LINE if moment == "half a line" else KILL.format(*moment)
        process = start(part, patch)
        printed = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, printed
    else:
        stop_after(monkeypatch, moment, way)
        assert yoco.main(part) == 128 + way
        assert "--resume goes on" in capsys.readouterr().err.splitlines()[-1]
    if Path("part", outs[-1], "log.jsonl").exists() and moment != ("yoco.Run.log", 1, False):
        refused(capsys, part, "part", "holds")          # not overwritten by accident
    assert yoco.main(part + ["--resume"]) == 0
    for out in outs:
        whole, again = Path("whole", out), Path("part", out)
        assert result_bytes(whole) == result_bytes(again) and log_of(whole) == log_of(again)
        assert facts_of(whole) == facts_of(again)
        assert {p.name for p in whole.iterdir()} == {p.name for p in again.iterdir()}
    assert yoco.main(part + ["--resume"]) == 0          # finished: nothing to do, no error
    assert "is finished" in capsys.readouterr().out


def test_second_signal_stops_at_once(tiny, monkeypatch):
    """The second does not wait for the step's end; an ignored one, of a background job, is none."""
    original, kill = yoco.weight_gradient, lambda: os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(yoco, "weight_gradient", lambda *args: kill() or kill() or original(*args))
    assert yoco.main(TRAIN) == 130 and not list(Path("superbert/tiny").glob("checkpoint*"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert yoco.main(TRAIN + ["--resume"]) == 0
    signal.signal(signal.SIGINT, before)


def begun(words):
    """A command in a process of its own, and its log has begun."""
    run = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    log, deadline = Path("superbert/tiny/log.jsonl"), time.monotonic() + 90
    while run.poll() is None and time.monotonic() < deadline and not (
            log.exists() and log.read_bytes().count(b"\n") > 1):
        time.sleep(0.05)
    return run


@pytest.mark.parametrize("deaf", [False, True])
def test_signal_to_a_process(tiny, deaf):
    """The same from outside, to a process of its own, also when nobody reads what it prints (as
    after Ctrl-C with `2>&1 | tee log`, which ends tee)."""
    run = begun([ROOT / "yoco.py", *TRAIN, "--epochs", "9999"])
    if deaf:
        run.stdout.close()
        run.stderr.close()
    run.terminate()
    told = "" if deaf else run.communicate()[1]
    assert run.wait() == 143 and Path("superbert/tiny/checkpoint.safetensors").exists(), told
    assert deaf or "--resume goes on" in told and "Traceback" not in told


@pytest.mark.parametrize("room", [1, 2000])
def test_full_disk(tiny, room):
    """No file may grow beyond `room` bytes more than the log has: one line, status 2, the last good
    checkpoint is still there, and with room again the run ends as if nothing had been."""
    pytest.importorskip("resource", reason="no limits of files on Windows")
    words = TRAIN + ["--checkpoint-every", "2", "--out", "part"]
    assert yoco.main(words[:-1] + ["whole"]) == 0
    process = start(words, f"""
import resource
original, calls = yoco.report, itertools.count(1)
def report(*args):
    if next(calls) == 7:
        limit = os.path.getsize("part/log.jsonl") + {room}
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    original(*args)
yoco.report = report""")
    error = process.communicate(timeout=60)[1].strip()
    assert process.returncode == 2 and re.fullmatch(
        "yoco.py: error: part/.*File too large", error), error
    with safe_open("part/checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["state"])["t"] == 6
    assert not list(Path("part").glob(".*.tmp"))
    assert yoco.main(words + ["--resume"]) == 0
    assert result_bytes("part") == result_bytes("whole") and log_of("part") == log_of("whole")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence(tiny, capsys, monkeypatch, what):
    """A loss or a gradient that is not finite ends the run; the checkpoint is from before."""
    original, count = yoco.weight_gradient, itertools.count(1)

    def spoilt(model, *args):
        losses = original(model, *args)
        if next(count) == 6:
            (losses[1] if what == "loss" else model.pooler.bias.grad[:1]).fill_(np.nan)
        return losses
    monkeypatch.setattr(yoco, "weight_gradient", spoilt)
    words = TRAIN + ["--checkpoint-every", "2", "--out", "out"]
    refused(capsys, words, "diverged", "step 6", "stage ", "learning rate 0.001", "layers, heads")
    assert all(w.isfinite().all() for w in load_file("out/checkpoint.safetensors").values())
    assert yoco.main(words + ["--resume"]) == 0         # it happens once


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc to read the size from")
def test_memory_does_not_grow(tiny, monkeypatch):
    """1,000 steps: the process after the last is hardly larger than after the 300th."""
    sizes, original = {}, yoco.report

    def report(run, progress, done, *args):
        status = Path("/proc/self/status").read_text()
        sizes[done] = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
        original(run, progress, done, *args)
    monkeypatch.setattr(yoco, "report", report)
    assert yoco.main(TRAIN + ["--epochs", "145"]) == 0
    assert max(sizes) >= 1000 and sizes[1000] - sizes[300] < 20, (sizes[300], sizes[1000])


def on_ranks(words, patches=("", "")):
    """A command in two processes with the environment that torchrun gives, and before it a few
    lines of code in each. [(exit status, or minus the signal, and what it printed)] of both."""
    with socket.socket() as found:                      # a port that is free
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [start(words, patch, **environment, RANK=str(rank), LOCAL_RANK=str(rank))
             for rank, patch in enumerate(patches)]
    printed = ["".join(rank.communicate(timeout=120)) for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, printed)]


@pytest.mark.parametrize("regression, extra", [
    (False, ["--distill", "--reorder", "--archs-per-step", "3"]),
    (True, ["--distill", "--stages", "all"])])
def test_ranks_equal_one_process(tiny, regression, extra):
    """Two ranks train what one process trains on the same batches: weights and losses to 1e-5,
    theta to the bit. Without dropout, whose random numbers differ, and from weights so large that
    no two losses differ by rounding alone. The batches of 7 are uneven, and the last of an epoch, a
    single example, leaves rank 1 none. (Keys' biases cancel in a softmax: their gradients are
    rounding errors, which Adam blows up to full steps.)"""
    tiny_bert(tiny / "tiny", **NO_DROPOUT, initializer_range=0.3)
    write(tiny / "tiny" / "train.tsv", *sentences(np.random.default_rng(0), 57))
    if regression:
        make_regression(tiny / "tiny", 57)
    words = TRAIN + ["--holdout", "0", "--lr", "3e-4", "--batch-size", "7"] + extra
    assert yoco.main(words + ["--out", "one"]) == 0
    # A thread of the group that outlives it may abort the process at its end.
    left = ("import atexit, pathlib; atexit.register(lambda: [os._exit(9) for name in pathlib.Path("
            "'/proc/self/task').glob('*/comm') if 'gloo' in name.read_text()])")
    ranks = on_ranks(words + ["--out", "two"], (left, left))
    assert [status for status, _ in ranks] == [0, 0], ranks
    one, two = (load_file(f"{out}/model.safetensors") for out in ("one", "two"))
    for name in [name for name in one if not name.endswith("key.bias")]:
        assert (two[name] - one[name]).abs().max() < 1e-5, name
    assert facts_of("one")["theta"] == facts_of("two")["theta"]
    for alone, shared in zip(log_of("one"), log_of("two"), strict=True):
        assert abs(alone.pop("loss") - shared.pop("loss")) < 1e-5 and alone == shared


def test_ranks_stop_together_and_resume(tiny, capsys):
    """A signal that reaches one rank alone stops both after the same step; with as many ranks, not
    with another number, --resume gives the bytes and the log of the run that nobody stopped."""
    words = TRAIN + ["--epochs", "2"]
    assert on_ranks(words + ["--out", "whole"])[0][0] == 0
    part = words + ["--out", "part"]
    signalled = KILL.format("yoco.report", 9, False).replace("SIGKILL", "SIGTERM")
    ranks = on_ranks(part, ("", signalled))
    assert [status for status, _ in ranks] == [143, 143], ranks
    assert "--resume goes on" in ranks[0][1].splitlines()[-1] and not ranks[1][1]
    refused(capsys, part + ["--resume"], "was started with world_size = 2, not 1")
    assert [status for status, _ in on_ranks(part + ["--resume"])] == [0, 0]
    assert result_bytes("part") == result_bytes("whole") and log_of("part") == log_of("whole")
    (status, told), (other, silent) = on_ranks(SEARCH)  # which shares nothing
    assert status == other == 2 and not silent and len(told.splitlines()) == 1
    assert "only train shares its work" in told


def test_torchrun(tiny):
    """The real torchrun: SIGTERM to it stops the ranks after a step, with a checkpoint."""
    run = begun(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                 ROOT / "yoco.py", *TRAIN, "--epochs", "9999"])
    run.terminate()                                     # it ends its ranks, after 30 s by force
    printed, told = run.communicate(timeout=60)
    assert [printed.count("texts to train on"), told.count("stopping after this step"),
            told.count("--resume goes on")] == [1, 1, 1], told
    assert Path("superbert/tiny/checkpoint.safetensors").exists()


# ---- A GPU: YOCO_TEST_GPU=1 ----------------------------------------------------------------------

@needs_gpu
@pytest.mark.parametrize("keeps", ["first", "even"])
def test_gpu_masks_equal_slices(keeps):
    """Graphs, masks and slices: one gradient, in which layers that no architecture has rest; the
    same graph serves other architectures and batches."""
    model = small_model(keep_layers=keeps, **NO_DROPOUT).cuda().train()
    teacher = small_model(keep_layers=keeps, seed=5, **NO_DROPOUT).cuda()
    graphed = yoco.graphed_gradient()
    for seed in range(4):
        batch = [t.cuda() for t in (*small_batch(seed=seed), LABELS)]
        archs = random_archs(model.config, 3, seed)
        for taught in (None, teacher):
            losses, grads = [], []
            for function in (yoco.weight_gradient, graphed):
                losses.append(torch.stack(list(function(model, batch, archs, OFF, taught))).cpu())
                grads.append([None if w.grad is None else w.grad.clone()
                              for w in model.parameters()])
            close(*losses)
            for one, two in zip(*grads):
                assert one is two is None or (one - two).abs().max() < 1e-4


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpu_commands(tiny, precision):
    """train, search and eval; killed with -9 and resumed: the same scores within rounding."""
    words = [word.replace("cpu", "cuda") for word in TRAIN] + [
        "--precision", precision, "--checkpoint-every", "2", "--distill"]
    assert yoco.main(words + ["--out", "whole"]) == 0
    process = start(words + ["--out", "part"], KILL.format("yoco.report", 15, False))
    printed = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, printed
    assert yoco.main(words + ["--out", "part", "--resume"]) == 0
    whole, part = (facts_of(out) for out in ("whole", "part"))
    assert whole["precision"] == part["precision"] == precision
    for name in ("largest", "smallest"):                # of six examples one may lie on the edge
        assert abs(whole["holdout"][name]["score"] - part["holdout"][name]["score"]) < 17
    losses = [[row["loss"] for row in log_of(out)] for out in ("whole", "part")]
    assert np.allclose(*losses, rtol=1e-2, atol=1e-2)
    search = ["search", "--model", "whole", "--max-params", "0.9x", "--evaluations", "12",
              "--device", "cuda", "--precision", precision]
    assert yoco.main(search) == 0
    for device in ("cuda", "cpu"):
        assert yoco.main(["eval", "--model", "subbert/whole-0.9x", "--device", device]) == 0


# ---- The project itself --------------------------------------------------------------------------

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


@pytest.mark.parametrize("module, examples", [(model_module, 4), (data, 0), (yoco, 3)])
def test_docstring_examples(module, examples):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= examples


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
    assert set(re.findall(r"# (?:\d+, )*(\d+)$", body, re.M)) >= {
        "1", "2", "3", "5", "6", "7", "8", "9", "10", "11"}
