"""Tests of glue/toy.py."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one

import doctest
from pathlib import Path

import numpy as np
import pytest

import data
from glue import toy

TOY = Path(__file__).parent / "TOY"


def test_docstring_examples():
    """The examples in the docstrings are right."""
    result = doctest.testmod(toy)
    assert result.failed == 0
    assert result.attempted >= 2


def test_toy_is_reproducible(tmp_path):
    """glue/TOY is what glue/toy.py writes, under 400 KB, balanced, and dev is not in train."""
    toy.main(["--out", str(tmp_path)])
    committed = {path.name: path.read_bytes() for path in TOY.iterdir()}
    assert committed == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sum(map(len, committed.values())) < 400_000
    task = data.load_task(TOY)
    train_sentences = {example.sentence1 for example in task.train}
    assert not train_sentences & {example.sentence1 for example in task.dev}
    for examples in (task.train, task.dev):
        share_of_praise = np.mean([example.label for example in examples])
        assert 0.45 < share_of_praise < 0.55


@pytest.mark.parametrize("name", ["train.tsv", "config.json"])
def test_files_of_others_are_kept(tmp_path, capsys, name):
    """A file with other contents is kept, nothing else is written, and one line names it."""
    mine = tmp_path / name
    mine.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        toy.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == [mine]
    assert mine.read_text() == "mine"
    error = capsys.readouterr().err
    assert str(mine) in error
    assert error.count("\n") == 1


def test_another_seed_is_another_data_set(tmp_path):
    """Another seed changes the sentences and keeps the vocabulary."""
    toy.main(["--out", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "train.tsv").read_bytes() != (TOY / "train.tsv").read_bytes()
    assert (tmp_path / "vocab.txt").read_bytes() == (TOY / "vocab.txt").read_bytes()
