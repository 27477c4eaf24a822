"""Tests of glue/plot.py, with the logs of a real training and a real search on TOY."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one

import doctest
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import yoco
from glue import paper, plot
from glue.test_predict import CPU, assert_refused

TOY = str(Path(__file__).parent / "TOY")


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """A directory with a super-BERT `super` and sub-BERTs `sub/0.4x` and `sub/0.7x`."""
    runs_dir = tmp_path_factory.mktemp("plot")
    assert yoco.main(["train", "--data", TOY, "--out", f"{runs_dir}/super", "--epochs", "0.5",
                      *CPU]) == 0
    assert yoco.main(["search", "--model", f"{runs_dir}/super", "--out", f"{runs_dir}/sub",
                      "--max-params", "0.4x", "0.7x", "--evaluations", "20", *CPU]) == 0
    return runs_dir


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Record the calls of matplotlib, {method: [arguments and label]}, and work in tmp_path."""
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    monkeypatch.chdir(tmp_path)
    drawn = {"scatter": [], "pcolormesh": [], "axvline": [], "annotate": [], "plot": []}

    def watch(name, method):
        """Make a method of Axes record its arguments."""
        def watched(self, *args, **kwargs):
            # A color bar is a mesh, too, but it is not rasterized.
            if name != "pcolormesh" or kwargs.get("rasterized"):
                drawn[name].append((*args, kwargs.get("label")))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Axes, name, watched)

    for name in drawn:
        watch(name, getattr(Axes, name))
    return drawn


def draw(directories, out):
    """Draw a picture and return its bytes."""
    assert plot.main([*map(str, directories), "--out", out]) == 0
    return Path(out).read_bytes()


def search_records(runs_dir):
    """Return the records of all searches."""
    return [json.loads(line) for path in sorted(runs_dir.glob("sub/*/log.jsonl"))
            for line in path.read_text().splitlines()[1:]]


def test_same_directories_same_bytes(runs_dir, drawn):
    """A picture depends only on the directories, and is named after the super-BERT."""
    subberts = [runs_dir / "sub/0.4x", runs_dir / "sub/0.7x"]
    for directories, name in (([runs_dir / "super"], "super.svg"),
                              (subberts, "super-search.svg")):
        assert plot.main([*map(str, directories)]) == 0
        picture = Path(name).read_bytes()
        assert picture == draw(directories, "again.svg")
        assert b"<dc:date>" not in picture


def test_search_picture(runs_dir, drawn):
    """The points are those of the logs, and winners and budgets those of run.json."""
    directories = [runs_dir / "sub/0.4x", runs_dir / "sub/0.7x"]
    draw(directories, "search.svg")
    runs = [yoco.read_run(directory) for directory in directories]
    records = search_records(runs_dir)
    (costs, scores, _), = drawn["scatter"]
    assert sorted(zip(costs, scores)) == sorted((r["cost"], r["score"]) for r in records)
    by_label = {args[-1]: args[:-1] for args in drawn["plot"]}
    costs, scores, _ = by_label["chosen by the search"]
    winners = {(run["cost"], run["selection_score"]) for run in runs}
    assert set(zip(costs, scores)) == winners
    assert len(costs) == len({str(run["arch"]) for run in runs})
    cost, score, _ = by_label["the full model"]
    assert cost == runs[0]["full_cost"]
    assert [score] == [r["score"] for r in records if r["cost"] == cost]
    full_cost = runs[0]["full_cost"]
    assert [args[0] for args in drawn["axvline"]] == [*(run["budget"] for run in runs), full_cost]
    # A name above each line, and at each star its budget as it was typed.
    labels = {(text, position) for text, position, *_ in drawn["annotate"]}
    stars = {}
    for run, typed in zip(runs, ("0.4x", "0.7x")):
        assert (typed, (run["budget"], 1)) in labels
        stars.setdefault((run["cost"], run["selection_score"]), []).append(typed)
    for position, typed in stars.items():
        assert (", ".join(typed), position) in labels
    assert ("full model", (full_cost, 1)) in labels
    assert len(labels) == len(runs) + len(stars) + 1


def test_same_winner_gets_one_star(runs_dir, drawn):
    """Two directories with the same sub-BERT draw one star, and every point once."""
    shutil.copytree(runs_dir / "sub/0.4x", "copy")
    draw([runs_dir / "sub/0.4x", "copy"], "twice.svg")
    by_label = {args[-1]: args[:-1] for args in drawn["plot"]}
    star_costs, _, _ = by_label["chosen by the search"]
    assert len(star_costs) == 1
    (costs, _, _), = drawn["scatter"]
    path = runs_dir / "sub/0.4x/log.jsonl"
    assert len(costs) == len(path.read_text().splitlines()) - 1


def test_shared_star_names_both_budgets(runs_dir, drawn):
    """A sub-BERT that two searches chose has one star, with both budgets as they were typed."""
    shutil.copytree(runs_dir / "sub/0.4x", "copy")
    run = json.loads(Path("copy/run.json").read_text())
    run["settings"]["max_params"] = ["45000"]
    Path("copy/run.json").write_text(json.dumps(run))
    draw([runs_dir / "sub/0.4x", "copy"], "twice.svg")
    star = (run["cost"], run["selection_score"])
    assert [args[0] for args in drawn["annotate"] if args[1] == star] == ["0.4x, 45,000"]


@pytest.mark.parametrize("params, tick", [
    pytest.param(60e6, "60M", id="millions"),
    pytest.param(60e3, "60k", id="thousands"),
])
def test_large_numbers_have_a_letter(drawn, params, tick):
    """The axis of the parameters says M for millions."""
    records = [dict(choices=[n], cost=params * (n + 1), score=50 + n) for n in range(3)]
    run = dict(unit="parameters", metric="accuracy", selected_on="holdout", superbert="s",
               task="TOY", budget=2 * params, cost=params, full_cost=4 * params, arch={},
               selection_score=50, settings={"max_params": ["0.5x"]})
    figure = plot.draw_searches({"s": records}, {"s": run})
    assert figure.axes[0].xaxis.get_major_formatter()(params) == tick


def test_dollar_in_a_name(runs_dir, drawn):
    """A `$` in the name of a directory is drawn as it stands, and is no mathematics."""
    shutil.copytree(runs_dir / "super", "a$x^2$b")
    shutil.copytree(runs_dir / "super", "a$x^{$b")
    assert draw(["a$x^2$b"], "dollar.svg") and draw(["a$x^{$b"], "broken.svg")
    command = ["search", "--model", "a$x^{$b", "--out", "sub", "--max-params", "0.5x",
               "--evaluations", "5", *CPU]
    assert yoco.main(command) == 0
    assert draw(["sub"], "search.svg")


def test_training_picture(runs_dir, drawn):
    """Theta is drawn as it was logged, and each stage of the log has a line and a name."""
    draw([runs_dir / "super"], "training.svg")
    theta = yoco.read_run(runs_dir / "super")["theta"]
    assert len(drawn["pcolormesh"]) == len(theta)
    for (edges, _, values, _), last in zip(drawn["pcolormesh"], theta):
        assert len(edges) == values.shape[1] + 1
        assert np.allclose(values[:, -1], last, atol=1e-4)
    log = (runs_dir / "super/log.jsonl").read_text().splitlines()[1:]
    stages = list(dict.fromkeys(json.loads(line)["stage"] for line in log))
    assert len(stages) > 1
    assert [args[0] for args in drawn["annotate"]] == stages * 2
    # A line where a stage begins, in three curves and in the map of each variable.
    assert len(drawn["axvline"]) == (len(stages) - 1) * (3 + len(theta))


def test_training_log_alone(runs_dir, drawn):
    """The picture of a training needs its log.jsonl and no other file."""
    Path("committed").mkdir()
    shutil.copy(runs_dir / "super/log.jsonl", "committed")
    assert draw(["committed"], "log.svg") == draw([runs_dir / "super"], "all.svg")


# ---- The pictures of the results page -----------------------------------------------

RESULTS = Path(__file__).parent / "results"
PICTURES = ("core", "depth", "ablation", "strategies", "tuning", "sizes", "choice", "speed")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A directory with the pictures of the results page, drawn from the stored cells."""
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("pictures")
    assert plot.main(["results", "--out", str(directory)]) == 0
    return directory


def test_results_page_shows_each_picture(pictures):
    """`results` draws the pictures of the page and no others."""
    names = [f"{name}.svg" for name in PICTURES]
    assert sorted(path.name for path in pictures.iterdir()) == sorted(names)
    page = (RESULTS / "README.md").read_text()
    assert re.findall(r"\]\((\w+\.svg)\)", page) == names
    assert all((RESULTS / name).exists() for name in names)


@pytest.mark.parametrize("name", ["ablation", "sizes"])
def test_same_cells_same_bytes(pictures, tmp_path, monkeypatch, name):
    """A picture depends only on the cells, not on their order or on matplotlib's settings."""
    store = list(paper.read_store(RESULTS).items())
    monkeypatch.setattr(paper, "read_store", lambda directory: dict(reversed(store)))
    for other in set(PICTURES) - {name, "speed"}:
        monkeypatch.setattr(plot, f"draw_{other}", lambda figure, cells: False)
    plot.matplotlib.rcParams["lines.linewidth"] = 5
    try:
        assert plot.main(["results", "--out", str(tmp_path)]) == 0
    finally:
        plot.matplotlib.rcdefaults()
    assert (tmp_path / f"{name}.svg").read_bytes() == (pictures / f"{name}.svg").read_bytes()


def test_differences_are_those_of_the_table(drawn, capsys):
    """The picture of the ablation shows the differences and intervals that `table` prints."""
    figure = plot.Figure(layout="constrained")
    options = SimpleNamespace(results=RESULTS, tasks=None, variants=None, seeds=None,
                              precision="auto")
    assert plot.draw_ablation(figure, paper.load_cells(options))
    means = [f"{args[0]:+.1f}" for args in drawn["plot"] if np.ndim(args[0]) == 0
             and args[2] not in "<>"]
    intervals = [f"[{args[0][0]:+.1f}, {args[0][1]:+.1f}]" for args in drawn["plot"]
                 if np.ndim(args[0]) == 1]
    assert paper.main(["table", "ablation"]) == 0
    table = capsys.readouterr().out
    assert len(means) == 2 * 3 * 5 and intervals
    assert all(f"; {mean}" in table for mean in means)
    assert all(interval in table for interval in intervals)


def test_directory_named_results(runs_dir, drawn):
    """The word `results` means the results page, and ./results a directory of that name."""
    shutil.copytree(runs_dir / "super", "results")
    assert draw(["./results"], "results.svg")
    assert len(drawn["pcolormesh"]) == len(yoco.read_run("results")["theta"])


def test_results_without_cells(tmp_path, capsys):
    """A directory without cells, or with a damaged one, ends in one line."""
    pytest.importorskip("matplotlib")
    assert_refused(capsys, plot, ["results", "--results", tmp_path], "holds no cells")
    (tmp_path / "TOY.jsonl").write_text("{}\n")
    assert_refused(capsys, plot, ["results", "--results", tmp_path], "TOY.jsonl, line 1,")


def test_docstring_examples():
    """The examples in the docstrings are right."""
    assert doctest.testmod(plot).failed == 0


def test_refusals(runs_dir, tmp_path, capsys, monkeypatch):
    """A directory or a command that cannot be drawn ends in one line."""
    with monkeypatch.context() as patch:
        patch.setattr(plot, "matplotlib", None)
        assert_refused(capsys, plot, [runs_dir / "super"], "pip install matplotlib")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    superbert, subbert = runs_dir / "super", runs_dir / "sub/0.4x"
    assert_refused(capsys, plot, [], "DIR")
    assert_refused(capsys, plot, [runs_dir], "log.jsonl does not exist")
    # An empty log: all evaluations are in the log of another budget of the same search.
    shutil.copytree(subbert, "empty")
    log = Path("empty/log.jsonl")
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    assert_refused(capsys, plot, ["empty"], "empty holds no scores")
    assert_refused(capsys, plot, [superbert, subbert], "several sub-BERTs, or one super-BERT")
    assert_refused(capsys, plot, [superbert, "--out", "a.png"], ".svg")
    assert_refused(capsys, plot, [superbert, "--out", "no/a.svg"], "no")
    # The last line is not finished, so it does not count.
    Path("log.jsonl").write_text('{"settings": {}}\n{"step": 10, "stage"')
    assert_refused(capsys, plot, ["."], "train or search has finished")
    Path("log.jsonl").write_text('{"settings": {}}\n{"step": 10}\n')
    assert_refused(capsys, plot, ["."], "lines that neither train nor search wrote")
