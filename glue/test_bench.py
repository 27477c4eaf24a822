"""Tests of glue/bench.py: what it counts by hand, and that every command says its rows."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one
os.environ["OMP_NUM_THREADS"] = "1"

import re
from types import SimpleNamespace

import pytest
import torch

import yoco
from glue import bench
from model import Arch, count_flops

CPU = torch.device("cpu")


def test_flops_are_those_of_the_sliced_computation():
    """count_flops, by hand, counts the last layer in full; what runs computes there the keys and
    values of all tokens, and the rest for [CLS] alone."""
    (train, _), _ = bench.mrpc()
    config = bench.SHAPES["tiny"]
    batch, = bench.spread(train, 8, 1, CPU, CPU, pad=128)
    C, D, T = config.hidden_size, config.head_size, 128
    for arch in (config.arch, Arch((1, 2), (32, 48))):
        h, k = arch.heads[-1], arch.ffn_sizes[-1]
        rest = 2 * (2 * C * h * D + 2 * T * h * D + 2 * C * k)       # of one token
        spared = (T - 1) * rest
        assert bench.forward_flops(config, [batch], [arch]) == (
            8 * (count_flops(config, arch, T) - spared))


def test_batches_are_spread_over_the_lengths():
    (train, dev), source = bench.mrpc()
    assert (len(train), len(dev)) == (3668, 408) and "MRPC" in source
    made = bench.spread(train, 32, 3, CPU, CPU)
    widths = [batch[0].shape[1] for batch in made]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    assert all(batch[0].shape[0] == 32 and batch[0].shape[1] % 8 == 0 for batch in made)
    wide = bench.spread(train, 8, 2, CPU, CPU, pad=128)
    assert all(tensor.shape == (8, 128) for *inputs, _ in wide for tensor in inputs)


def test_contenders_take_turns(monkeypatch):
    """One after the other in every round; the first round does not count; medians."""
    called, clock = [], iter([0, 9, 0, 9, 0, 1, 0, 7, 0, 5, 0, 8, 0, 3, 0, 6])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    jobs = {name: (lambda item, name=name: called.append((name, item)), [1, 2]) for name in "ab"}
    assert bench.take_turns(jobs, 3, CPU) == {"a": 3, "b": 7}
    one_round = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert called == [("a", 2), ("b", 2)] + 3 * one_round
    called.clear()
    monkeypatch.undo()
    monkeypatch.setattr(bench, "wait", lambda device: None)
    bench.take_turns(jobs, 1, SimpleNamespace(type="cuda"))          # every shape is recorded first
    assert called == 2 * one_round


def test_bench_says_its_rows(capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    assert bench.main(["--models", "tiny", "--repeats", "1", "--batches", "1", "--device",
                       "cpu"]) == 0
    out = capsys.readouterr().out
    for row in ("training, uniform architectures, ours at batch 32 / the authors' way at 8",
                "the same, both at batch 8", "nothing shared: ours / the authors' way",
                "FLOPs / the largest: evaluation", "by data.scorer", "training, largest |"):
        assert row in out
    if bench.transformers:
        assert "peak memory of training, ours / Hugging Face" in out
        assert "training, largest: ours / Hugging Face, the same batches of 32" in out
    assert all(float(ratio) > 0 for ratio in re.findall(r"\| (\d+\.\d+) \|", out))


def test_whole_growth_and_search(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "WHOLE_STEPS", 40)
    monkeypatch.setattr(bench, "MEASURED_STEPS", 3)
    monkeypatch.setattr(bench, "GROWTH", (1, 3))
    words = ["--models", "tiny", "--device", "cpu"]
    assert bench.main(["--whole", *words]) == 0
    assert re.search(r"whole training on MRPC: \d+ s, estimated: .* 40 steps of 32 at .* the mean "
                     r"of 3 measured", capsys.readouterr().out)
    assert bench.main(["--growth", "ours", *words]) == 0
    assert re.fullmatch(r"-?\d+\n", capsys.readouterr().out)
    yoco.train(yoco.TrainSettings(out=str(tmp_path / "super"), epochs=0.1, device="cpu",
                                  recipe="best"))
    assert bench.main(["--search", str(tmp_path / "super"), "--evaluations", "6", "--device",
                       "cpu"]) == 0
    assert "with shared prefixes" in capsys.readouterr().out
    assert bench.main(["--search", str(tmp_path / "none")]) == 2
    assert bench.main(["--models", "huge"]) == 2
    assert [line[:12] for line in capsys.readouterr().err.splitlines()] == ["glue.bench: "] * 2


@pytest.mark.skipif(os.environ.get("YOCO_TEST_GPU") != "1", reason="YOCO_TEST_GPU=1 uses a GPU")
def test_bench_on_a_gpu(capsys):
    assert bench.main(["--models", "tiny", "--repeats", "1", "--batches", "2"]) == 0
    assert "training, uniform, 128 |" in capsys.readouterr().out
