"""Tests of glue/bench.py: what it counts by hand, and that every command says its rows."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one
os.environ["OMP_NUM_THREADS"] = "1"

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glue import bench
from model import Arch, ElasticBert

CPU = torch.device("cpu")


def test_flops_are_those_of_the_sliced_computation():
    """As PyTorch counts what the model computes, but for the classifier."""
    train, _ = bench.mrpc()
    config = bench.SHAPES["tiny"]
    model = ElasticBert(config, 2).train()
    batch, = bench.spread(train, 8, 1, CPU, CPU, pad=128)
    for arch in (config.arch, Arch((1, 2), (32, 48))):
        with FlopCounterMode(display=False) as counter:
            model(*batch[:3], arch)
        classifier = 8 * 2 * 2 * config.hidden_size
        assert bench.forward_flops(config, [(batch, arch)]) == (
            counter.get_total_flops() - classifier)


def test_batches_are_spread_over_the_lengths():
    train, dev = bench.mrpc()
    assert (len(train), len(dev)) == (3668, 408)
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
    jobs = [(lambda item, name=name: called.append((name, item)), [(1,), (2,)]) for name in "ab"]
    assert bench.take_turns(jobs, 3, CPU) == [3, 7]
    one_round = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert called == [("a", 2), ("b", 2)] + 3 * one_round
    called.clear()
    monkeypatch.undo()
    monkeypatch.setattr(bench, "wait", lambda device: None)
    bench.take_turns(jobs, 1, SimpleNamespace(type="cuda"))          # every shape is recorded first
    assert called == 2 * one_round


def test_bench_says_its_rows(capsys, monkeypatch):
    """Each as soon as it is measured: a run that is cut off at its end has shown the rows before.
    """
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    words = ["--models", "tiny", "--repeats", "1", "--batches", "1", "--device", "cpu"]
    assert bench.main(words) == 0
    out = capsys.readouterr().out
    rows = ["training, uniform architectures, ours at batch 32 / the authors' way at 8",
            "the same, both at batch 8", "training, largest: ours / Hugging Face, the same batches",
            "evaluation, largest: ours / Hugging Face in batches of 32",
            "search, architectures of 408 examples: ours / the authors' way",
            "1000 evaluations of a search"]
    for row in rows + ["peak memory of training"] * bool(bench.transformers):
        assert row in out
    ratios = re.findall(r"\| (\d+\.\d+) \|", out)
    assert len(ratios) == (8 if bench.transformers else 3) and all(float(x) > 0 for x in ratios)
    assert len(re.findall(r"\| [\d.e-]+% \|", out)) == 6             # of the matrix product

    def cut(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(bench, "evaluation", cut)
    assert bench.main(words) == 130
    out = capsys.readouterr().out
    assert rows[1] in out and rows[-1] not in out


def test_whole(capsys, monkeypatch):
    monkeypatch.setattr(bench, "WHOLE_STEPS", 40)
    monkeypatch.setattr(bench, "MEASURED_STEPS", 3)
    assert bench.main(["--whole", "--models", "tiny", "--device", "cpu"]) == 0
    assert re.search(r"whole training on MRPC: \d+ s, estimated: .* 40 steps of 32 at .* the mean "
                     r"of 3 measured", capsys.readouterr().out)
    assert bench.main(["--models", "huge"]) == 2
    assert re.fullmatch("glue.bench: error: .*huge.*\n", capsys.readouterr().err)


@pytest.mark.skipif(os.environ.get("YOCO_TEST_GPU") != "1", reason="YOCO_TEST_GPU=1 uses a GPU")
def test_bench_on_a_gpu(capsys):
    assert bench.main(["--models", "tiny", "--repeats", "1", "--batches", "2"]) == 0
    assert "largest, batches of 128 |" in capsys.readouterr().out
