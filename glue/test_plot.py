"""glue.plot on what a real train and search of glue/TOY logged."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one

import doctest
import json
from pathlib import Path

import numpy as np
import pytest

import yoco
from glue import plot
from glue.test_predict import CPU, refused

TOY = str(Path(__file__).parent / "TOY")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a super-BERT `super` and sub-BERTs `sub/0.4x` and `sub/0.7x`."""
    place = tmp_path_factory.mktemp("plot")
    assert yoco.main(["train", "--data", TOY, "--out", f"{place}/super", "--epochs", "0.5",
                      *CPU]) == 0
    assert yoco.main(["search", "--model", f"{place}/super", "--out", f"{place}/sub",
                      "--max-params", "0.4x", "0.7x", "--evaluations", "20", *CPU]) == 0
    return place


def test_pictures(place, tmp_path, monkeypatch):
    """The same bytes each time; as many points as architectures were scored, and theta as logged.
    """
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    monkeypatch.chdir(tmp_path)
    drawn = {"scatter": [], "pcolormesh": []}

    def watch(name, method):
        def watched(self, *args, **kwargs):
            if kwargs.get("rasterized"):                # not the color bar
                drawn[name].append(args)
            return method(self, *args, **kwargs)
        monkeypatch.setattr(Axes, name, watched)
    watch("scatter", Axes.scatter)
    watch("pcolormesh", Axes.pcolormesh)
    for directories in ([place / "super"], [place / "sub/0.4x", place / "sub/0.7x"]):
        words = [*map(str, directories)]
        assert plot.main(words) == 0 and plot.main([*words, "--out", "again.svg"]) == 0
        picture = Path(f"{directories[0].name}.svg").read_bytes()
        assert picture == Path("again.svg").read_bytes() and b"<dc:date>" not in picture
    lines = [line for path in place.glob("sub/*/log.jsonl")
             for line in path.read_text().splitlines()[1:]]
    costs, scores = drawn["scatter"][0]
    assert sorted(zip(costs, scores)) == sorted(
        (json.loads(line)["cost"], json.loads(line)["score"]) for line in lines)
    theta = yoco.read_run(place / "super")["theta"]
    assert len(drawn["pcolormesh"]) == 2 * len(theta)
    for (edges, _, values), last in zip(drawn["pcolormesh"], theta):
        assert len(edges) == values.shape[1] + 1 and np.allclose(values[:, -1], last, atol=1e-4)


def test_front():
    assert doctest.testmod(plot).failed == 0


def test_refusals(place, tmp_path, capsys, monkeypatch):
    """One line for what cannot be drawn."""
    with monkeypatch.context() as patch:
        patch.setattr(plot, "matplotlib", None)
        refused(capsys, plot, [place / "super"], "pip install matplotlib")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    refused(capsys, plot, [], "DIR")
    refused(capsys, plot, [place], "log.jsonl does not exist")
    refused(capsys, plot, [place / "super", place / "sub/0.4x"], "sub-BERTs, or one super-BERT")
    refused(capsys, plot, [place / "super", "--out", "a.png"], ".svg")
    refused(capsys, plot, [place / "super", "--out", "no/a.svg"], "no")
    Path("log.jsonl").write_text('{"settings": {}}\n{"step": 10, "stage"')
    refused(capsys, plot, ["."], "no finished train or search")   # an unfinished line is no line
    Path("log.jsonl").write_text('{"settings": {}}\n{"step": 10}\n')
    refused(capsys, plot, ["."], "lines of neither")
