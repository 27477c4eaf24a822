"""Tests of glue/toy.py."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one

import doctest
from pathlib import Path

import numpy as np

import data
from glue import toy

TOY = Path(__file__).parent / "TOY"


def test_docstring_examples():
    result = doctest.testmod(toy)
    assert result.failed == 0 and result.attempted >= 2


def test_toy_is_reproducible(tmp_path):
    """glue/TOY is what glue/toy.py writes, under 400 KB, and dev is not in train."""
    toy.main(["--out", str(tmp_path)])
    committed = {path.name: path.read_bytes() for path in TOY.iterdir()}
    assert committed == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sum(map(len, committed.values())) < 400_000
    task = data.load_task(TOY)
    assert not {e.sentence1 for e in task.train} & {e.sentence1 for e in task.dev}
    assert all(0.45 < np.mean([e.label for e in part]) < 0.55 for part in (task.train, task.dev))


def test_another_seed_is_another_data_set(tmp_path):
    toy.main(["--out", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "train.tsv").read_bytes() != (TOY / "train.tsv").read_bytes()
    assert (tmp_path / "vocab.txt").read_bytes() == (TOY / "vocab.txt").read_bytes()
