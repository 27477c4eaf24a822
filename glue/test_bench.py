"""Tests of glue/bench.py: its counts against PyTorch's, and the rows that every command prints."""

import os

# This must precede the import of torch, which looks for a GPU.
if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["OMP_NUM_THREADS"] = "1"

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glue import bench
from model import Arch, ElasticBert

CPU = torch.device("cpu")
TINY = bench.SHAPES["tiny"]


@pytest.mark.parametrize("arch", [
    pytest.param(TINY.arch, id="largest"),
    pytest.param(Arch((1, 2), (32, 48)), id="sliced"),
])
def test_forward_flops(arch):
    """The FLOPs are those that PyTorch counts in a forward pass, less the classifier's."""
    train, _ = bench.mrpc_like_examples()
    model = ElasticBert(TINY, 2).train()
    batch, = bench.spread_batches(train, 8, 1, CPU, CPU, min_tokens=128)
    with FlopCounterMode(display=False) as counter:
        model(*batch[:3], arch)
    classifier = 8 * 2 * 2 * TINY.hidden_size
    expected = counter.get_total_flops() - classifier
    assert bench.forward_flops(TINY, [(batch, arch)]) == expected


def test_batches_are_spread_over_the_lengths():
    """The batches get shorter, and have the asked number of examples and of tokens."""
    train, dev = bench.mrpc_like_examples()
    assert (len(train), len(dev)) == (3668, 408)

    batches = bench.spread_batches(train, 32, 3, CPU, CPU)
    widths = [batch[0].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    assert all(batch[0].shape[0] == 32 for batch in batches)
    assert all(width % 8 == 0 for width in widths)

    padded = bench.spread_batches(train, 8, 2, CPU, CPU, min_tokens=128)
    assert all(tensor.shape == (8, 128) for *inputs, _ in padded for tensor in inputs)


def make_recording_jobs(called):
    """Return two jobs, "a" and "b", that append (name, argument) to `called`."""
    def job(name):
        return bench.Job(lambda item: called.append((name, item)), [(1,), (2,)], 2)

    return [job("a"), job("b")]


ONE_REPETITION = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_contenders_take_turns(monkeypatch):
    """The jobs alternate, the warm-up is one call each, and the medians leave it out."""
    called = []
    clock = iter([0, 9, 0, 9, 0, 1, 0, 7, 0, 5, 0, 8, 0, 3, 0, 6])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.take_turns(make_recording_jobs(called), 3, CPU) == [3, 7]
    assert called == [("a", 2), ("b", 2)] + 3 * ONE_REPETITION


def test_warm_up_on_a_gpu_makes_all_calls(monkeypatch):
    """On a GPU the warm-up records every shape, so it is a whole repetition."""
    called = []
    monkeypatch.setattr(bench, "synchronize", lambda device: None)
    bench.take_turns(make_recording_jobs(called), 1, SimpleNamespace(type="cuda"))
    assert called == 2 * ONE_REPETITION


ROWS = [
    "training, uniform architectures, ours at batch 32 / the authors' way at 8",
    "the same, both at batch 8",
    "training, largest: ours / Hugging Face, the same batches",
    "evaluation, largest: ours / Hugging Face in batches of 32",
    "search, architectures of 408 examples: ours / the authors' way",
    "1000 evaluations of a search",
]
TINY_TABLE = ["--models", "tiny", "--repeats", "1", "--batches", "1", "--device", "cpu"]


def test_table_has_every_row(capsys, monkeypatch):
    """The table of the tiny shape has all rows, positive ratios and shares of the peak."""
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    assert bench.main(TINY_TABLE) == 0
    out = capsys.readouterr().out
    for row in ROWS:
        assert row in out
    ratios = [float(ratio) for ratio in re.findall(r"\| (\d+\.\d+) \|", out)]
    assert all(ratio > 0 for ratio in ratios)
    if bench.transformers:
        assert "peak memory of training" in out
        assert len(ratios) == 8
    else:
        assert len(ratios) == 3
    shares = re.findall(r"\| [\d.e-]+% \|", out)
    assert len(shares) == 6


def test_rows_are_printed_as_soon_as_measured(capsys, monkeypatch):
    """A run that is interrupted late has printed the rows before."""
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(bench, "bench_evaluation", interrupt)
    assert bench.main(TINY_TABLE) == 130
    out = capsys.readouterr().out
    assert ROWS[1] in out
    assert ROWS[-1] not in out


def test_whole_training(capsys, monkeypatch):
    """`--whole` extrapolates from the measured steps to all of them."""
    monkeypatch.setattr(bench, "WHOLE_STEPS", 40)
    monkeypatch.setattr(bench, "MEASURED_STEPS", 3)
    assert bench.main(["--whole", "--models", "tiny", "--device", "cpu"]) == 0
    assert re.search(r"whole training on MRPC: \d+ s, estimated: .* 40 steps of 32 at .* the mean "
                     r"of 3 measured", capsys.readouterr().out)


def test_unknown_model_is_one_line(capsys):
    """A shape that does not exist ends in status 2 and a one-line message."""
    assert bench.main(["--models", "huge"]) == 2
    assert re.fullmatch("glue.bench: error: .*huge.*\n", capsys.readouterr().err)


@pytest.mark.skipif(os.environ.get("YOCO_TEST_GPU") != "1", reason="YOCO_TEST_GPU=1 uses a GPU")
def test_bench_on_a_gpu(capsys):
    """On a GPU the table also has the rows with batches of 128."""
    assert bench.main(["--models", "tiny", "--repeats", "1", "--batches", "2"]) == 0
    assert "largest, batches of 128 |" in capsys.readouterr().out
