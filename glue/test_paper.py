"""Tests of glue/paper.py: its statistics by hand, and cells of a tiny model from start to end."""

import os

# This must precede the import of torch, which looks for a GPU.
if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["OMP_NUM_THREADS"] = "1"

import doctest
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import yoco
from glue import paper
from model import (Arch, BertConfig, count_params, ElasticBert, load_bert, save_bert, SearchSpace,
                   tokenizer_files, UserError)

ROOT = Path(__file__).resolve().parents[1]


# ---- Statistics ---------------------------------------------------------------------

REFERENCE = {0: 1.0, 1: 4.0, 2: 7.0, 8: 2.0}


@pytest.mark.parametrize("scores, expected", [
    pytest.param({3: 1.0, 4: 3.0}, (2.0, math.sqrt(2)), id="two-seeds"),
    pytest.param({3: 4.0}, (4.0, None), id="one-seed"),
])
def test_mean_and_deviation(scores, expected):
    """The deviation is the sample's, and a single score has none."""
    assert paper.mean_and_deviation(scores) == expected


def test_interval_of_a_paired_difference():
    """Half of the interval is Student's t times the standard error of the differences.

    By hand: the differences 2, 1 and 3 have the mean 2 and the deviation 1. Student's t
    for two degrees of freedom is 4.303, and 4.303 / sqrt(3) is 2.484.
    """
    mean, half_width = paper.paired_difference({0: 3.0, 1: 5.0, 2: 10.0, 7: 1.0}, REFERENCE)
    assert mean == 2.0
    assert half_width == pytest.approx(2.484, abs=1e-3)


@pytest.mark.parametrize("scores, expected", [
    pytest.param({1: 1.0}, (-3.0, None), id="one-common-seed"),
    pytest.param({7: 1.0}, (None, None), id="no-common-seed"),
])
def test_paired_difference_without_interval(scores, expected):
    """One common seed gives a difference without an interval, and no common seed gives neither."""
    assert paper.paired_difference(scores, REFERENCE) == expected


@pytest.mark.parametrize("scores, reference, text", [
    pytest.param({}, None, "", id="no-seed"),
    pytest.param({3: 4.0}, None, "4.0 (1)", id="one-seed"),
    pytest.param({0: 1.0, 1: 3.0}, None, "2.0 ± 1.4 (2)", id="two-seeds"),
    pytest.param({1: 1.0}, REFERENCE, "1.0 (1); -3.0", id="difference"),
    pytest.param({0: 3.0, 1: 5.0, 2: 10.0}, REFERENCE, "6.0 ± 3.6 (3); +2.0 [-0.5, +4.5]",
                 id="difference-with-interval"),
])
def test_format_mean(scores, reference, text):
    """The text has only the parts that the number of seeds allows."""
    assert paper.format_mean(scores, reference) == text


def test_docstring_examples():
    """The examples in the docstrings give the answers printed there."""
    result = doctest.testmod(paper)
    assert result.attempted > 0
    assert result.failed == 0


def make_facts(largest, half):
    """Return the facts of a cell with these dev scores, as the tables see them."""
    scores = [{"budget": 1.0, "dev": {"score": largest}}, {"budget": 0.5, "dev": {"score": half}}]
    return paper.index_scores({"scores": scores})


def make_cell(**changes):
    """Return the facts of a stored cell of one architecture, with some of them changed."""
    score = {"score": 80.0}
    facts = dict(task="TOY", variant="plain", seed=0, commit="1234567", precision="fp32",
                 hardware="a processor", seconds=1.0, evaluations=1, settings={"seed": 0},
                 scores=[dict(budget=1.0, params=9, holdout=score, dev=dict(score))])
    return facts | changes


def write_cells(directory, *cells):
    """Write cells in the form of `run`, and return the directory as a text."""
    for n, facts in enumerate(cells):
        Path(directory, f"paper-{n}.json").write_text(json.dumps(facts))
    return str(directory)


def collect(cells, results, *flags):
    """Run `collect`, and return its exit status."""
    return paper.main(["collect", "--cells", str(cells), "--results", str(results), *flags])


def test_means_over_tasks():
    """A mean leaves out a seed that one task lacks, and a score of 0 counts as a score."""
    cells = {("MRPC", "best"): {"fp32": {0: make_facts(90, 80), 1: make_facts(70, 0)}},
             ("CoLA", "best"): {"fp32": {0: make_facts(50, 40)}}}
    assert paper.field_values(cells, paper.MEAN, "best", (1.0, "dev", "score")) == {0: 70.0}
    assert paper.field_values(cells, "MRPC", "best", paper.SMALLEST) == {0: 80, 1: 0}
    assert paper.field_values(cells, "MRPC", "best", (0.75, "dev", "score")) == {}


def test_precisions_do_not_mix():
    """A row in both precisions is shown in fp32, and compared with another row in its own."""
    cells = {("MRPC", "best"): {"bf16": {0: make_facts(90, 80)}, "fp32": {0: make_facts(70, 60)}},
             ("MRPC", "best noise"): {"bf16": {0: make_facts(50, 40)}}}

    def half(variant, beside=None):
        return paper.field_values(cells, "MRPC", variant, paper.SMALLEST, beside)

    assert half("best") == half("best", "best") == half("best", "plain") == {0: 60}
    assert half("best", "best noise") == {0: 80}
    assert half("best noise", "best") == {0: 40}


def test_leads(capsys):
    """The leads of EE-SNG count the pairs of the same recipe, task and seed."""
    cells = {("CoLA", "best"): {"bf16": {0: make_facts(0, 5), 1: make_facts(0, 4)}},
             ("CoLA", "best noise"): {"bf16": {0: make_facts(0, 2), 1: make_facts(0, 5),
                                               2: make_facts(0, 9)}},
             ("MRPC", "paper"): {"bf16": {0: make_facts(0, 7)}},
             ("MRPC", "paper noise"): {"bf16": {0: make_facts(0, 3)}}}
    paper.print_leads(cells, ["MRPC", "CoLA"])
    assert capsys.readouterr().out == ("EE-SNG is ahead of noise, and its mean lead: "
                                       "dev, 0.5x: 2 of 3, +2.0\n")


def test_sampling_stats(tmp_path):
    """All statistics of four drawn architectures and one search agree with those found by hand.

    The means over all four are 72.5 and 62. The two deep ones have the means 80 and 65.
    """
    methods = {"sng": dict(budget="sng", params=9, holdout={"score": 85}, dev={"score": 62})}
    facts = make_cell(task="MRPC", variant="matters of best",
                      examples={"holdout": 300, "dev": 75}, methods=methods,
                      drawn=[[2, 55, 56], [4, 75, 62], [5, 75, 62], [6, 85, 68]])
    del facts["scores"]
    assert collect(write_cells(tmp_path, facts), tmp_path) == 0
    cells = paper.load_cells(SimpleNamespace(results=tmp_path, seeds=None, tasks=None,
                                             variants=None, precision="auto"))
    stats = cells["MRPC", "matters of best"]["fp32"][0]["sampling_stats"]
    by_depth = [56, 62, 62, 68]
    of_all = [100, 10.9, 2.6, 12.5, 87.5, 4.2, 5.6, 0, 50]
    of_deep = [100, 5, 2.3, 5, 75, 3, 5.5, -3, 25]
    assert [round(value, 1) for value in stats.values()] == by_depth + of_all + of_deep


# ---- Budgets and searches -----------------------------------------------------------

@pytest.mark.parametrize("share, num_layers_removed", [
    pytest.param(0, 6, id="no-layer"),
    pytest.param(0.5, 3, id="half"),
])
def test_budgets_are_of_the_encoder(share, num_layers_removed):
    """A budget is a share of the layers' parameters, and the rest of the model comes on top."""
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    attention = 4 * (384**2 + 384)
    ffn = 2 * 384 * 1536 + 1536 + 384
    layer_norms = 4 * 384
    layer = attention + ffn + layer_norms
    assert paper.encoder_budget(minilm, share) == 22_713_216 - num_layers_removed * layer


def test_evolution_and_random_search():
    """Both searches keep the budget, begin alike, and evolution ends with a better score."""
    config = BertConfig(hidden_size=24, num_attention_heads=6, intermediate_size=48, vocab_size=9)
    space, limit = SearchSpace.for_config(config), paper.encoder_budget(config, 0.5)
    ctx = SimpleNamespace(space=space, cost=functools.partial(count_params, config))

    def evaluate(arch):
        """Score an architecture higher for more heads and for fewer layers."""
        return {"score": sum(arch.heads) / arch.depth ** 2}

    by_random = paper.search_by(paper.propose_random, ctx, limit, evaluate, {}, 400, seed=1)
    by_evolution = paper.search_by(paper.propose_evolution, ctx, limit, evaluate, {}, 400, seed=1)
    for scores in (by_random, by_evolution):
        assert all(count_params(config, arch) < limit for arch in scores)
    # Evolution's first generation is random.
    first_archs = list(by_random)[:50]
    assert list(by_evolution)[:50] == first_archs
    assert max(by_evolution.values()) > max(by_random.values())

    # A search evaluates nothing that the cache holds. Here, it could not: it has no
    # evaluator.
    cache = {arch: -1.0 for arch in first_archs}
    assert paper.search_by(paper.propose_random, ctx, limit, None, cache, 50, 1) == cache


# ---- Cells, from the command line ---------------------------------------------------

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Return a directory with a tiny BERT and a part of TOY, and the flags that name them."""
    root = tmp_path_factory.mktemp("paper")
    toy = root / "data/TOY"
    toy.mkdir(parents=True)
    for name, num_lines in (("train.tsv", 81), ("dev.tsv", 41)):
        lines = (ROOT / "glue/TOY" / name).read_text().splitlines(keepends=True)
        (toy / name).write_text("".join(lines[:num_lines]))
    torch.manual_seed(0)
    config = BertConfig.load(ROOT / "glue/TOY")
    save_bert(ElasticBert(config, 2), root / "bert", tokenizer_files(ROOT / "glue/TOY"))
    flags = ["--tasks", "TOY", "--data", root / "data", "--bert", root / "bert",
             "--work", root / "work", "--cells", root / "cells", "--evaluations", "8",
             "--device", "cpu", "--precision", "fp32"]
    return SimpleNamespace(root=root, flags=[str(flag) for flag in flags])


def read_cells(work):
    """Return {file name: facts} of all cells."""
    return {path.name: json.loads(path.read_text())
            for path in sorted((work.root / "cells").glob("*.json"))}


@pytest.fixture
def any_commit(monkeypatch):
    """Let `run` fill cells although the project's files may differ from their commit."""
    monkeypatch.setattr(paper, "committed_code", lambda: "1234567")


@pytest.fixture
def clone(tmp_path):
    """Return a directory with the project's Python files, committed with git."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    directory = tmp_path / "clone"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("glue/*.py")]:
        copy = directory / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (directory / "notes.txt").write_text("one")
    git(directory, "init", "-q")
    git(directory, "add", ".")
    git(directory, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "All files")
    return directory


def git(directory, *words):
    """Run git in a directory and return what it prints."""
    return subprocess.run(["git", *words], cwd=directory, check=True, capture_output=True,
                          text=True).stdout


def test_two_processes_share_the_cells(work, clone):
    """Two processes with the same command fill all cells, and each cell is filled once."""
    command = [sys.executable, "-m", "glue.paper", "run", *work.flags, "--variants", "core",
               "--seeds", "0", "1"]
    processes = [subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, text=True)
                 for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    variants = ("best", "paper", "plain", "plain_lr=2e-5", "truncated", "truncated_epochs=3")
    names = [f"TOY-{variant}-{seed}" for variant in variants for seed in (0, 1)]
    assert list(read_cells(work)) == [f"paper-{name}.json" for name in names]
    started = []
    for output in outputs:
        started += [line[4:] for line in output.splitlines() if line.startswith("--- ")]
    assert sorted(started) == names
    commit = git(clone, "rev-parse", "HEAD")
    for facts in read_cells(work).values():
        assert len(facts["commit"]) >= 7 and commit.startswith(facts["commit"])
        assert facts["hardware"] and facts["precision"] == "fp32"


@pytest.mark.parametrize("name, is_staged, is_refused", [
    pytest.param("yoco.py", False, True, id="changed"),
    pytest.param("glue/paper.py", True, True, id="staged"),
    pytest.param("glue/new.py", False, True, id="untracked"),
    pytest.param("notes.txt", True, False, id="no-python-file"),
    pytest.param("venv/lib/other.py", False, False, id="not-of-the-project"),
])
def test_changed_python_files_are_refused(work, clone, monkeypatch, capsys, name, is_staged,
                                          is_refused):
    """`run` fills no cell while a Python file of the project differs from its commit."""
    (clone / name).parent.mkdir(parents=True, exist_ok=True)
    with open(clone / name, "a") as file:
        file.write("# changed\n")
    if is_staged:
        git(clone, "add", name)
    monkeypatch.setattr(paper, "ROOT", clone)
    if not is_refused:
        assert git(clone, "rev-parse", "HEAD").startswith(paper.committed_code())
        return
    assert paper.main(["run", *work.flags, "--cells", str(clone / "cells")]) == 2
    error = capsys.readouterr().err
    assert f"{name}: commit them first" in error and error.count("\n") == 1
    assert not (clone / "cells").exists()


def test_no_commit_is_refused(clone, monkeypatch, capsys):
    """`run` needs a clone, because a cell names its commit."""
    shutil.rmtree(clone / ".git")
    monkeypatch.setattr(paper, "ROOT", clone)
    # Without this, git would look for a repository in the directories above.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(clone.parent))
    assert paper.main(["run"]) == 2
    assert "run this program in a clone" in capsys.readouterr().err


MORE_VARIANTS = ["best lr=2e-3 length=0.02", "HAT", "HAT tuned 2e-5", "bands of best",
                 "matters of best", "plain lr=2e-5 epochs=3"]


def assert_scores_keep_the_budgets(facts, config):
    """Check that a cell has the largest architecture and one sub-BERT below each budget."""
    assert [scores["budget"] for scores in facts["scores"]] == [1.0, 0.75, 0.5]
    for scores in facts["scores"][1:]:
        assert scores["params"] == count_params(config, Arch(**scores["arch"]))
        assert scores["params"] < paper.encoder_budget(config, scores["budget"])


def test_cells_and_tables(work, capsys, monkeypatch, any_commit):
    """Every type of variant fills its cell once, and every table can be printed from them."""
    monkeypatch.setattr(paper, "NUM_DRAWN", 12)
    command = ["run", *work.flags, "--seeds", "0", "--variants", "core", *MORE_VARIANTS]
    assert paper.main(command) == 0
    cells = read_cells(work)
    assert {f"paper-TOY-{v}-0.json".replace(" ", "_") for v in MORE_VARIANTS} <= set(cells)

    # Ten epochs of 72 examples, 32 per step.
    assert cells["paper-TOY-HAT_tuned_2e-5-0.json"]["steps"] == 30
    best = cells["paper-TOY-best-0.json"]
    assert best["settings"]["epochs"] == 22
    assert best["settings"]["reorder"] is True
    changed = cells["paper-TOY-best_lr=2e-3_length=0.02-0.json"]["settings"]
    assert changed["lr"] == 2e-3
    assert changed["epochs"] == pytest.approx(0.02 * 22)

    config = load_bert(work.root / "bert", 2).config
    assert_scores_keep_the_budgets(best, config)
    assert_scores_keep_the_budgets(cells["paper-TOY-HAT-0.json"], config)
    truncated = cells["paper-TOY-truncated-0.json"]
    assert truncated["scores"][0]["arch"]["heads"] == [3, 3]
    matters = cells["paper-TOY-matters_of_best-0.json"]
    assert len(matters["drawn"]) == 12
    assert list(matters["methods"]) == list(paper.METHODS)
    assert {depth for depth, *_ in matters["drawn"]} <= {2, 3, 4, 5}

    # The same command finds nothing left to do.
    capsys.readouterr()
    assert paper.main(command) == 0
    assert capsys.readouterr().out == ""
    results = work.root / "results"
    assert collect(work.root / "cells", results) == 0
    store = paper.read_store(results)
    assert len(store) == len(read_cells(work))
    for facts in read_cells(work).values():
        assert store[paper.cell_key(facts)] == facts
    capsys.readouterr()
    for name in paper.TABLES:
        assert paper.main(["table", name, "--results", str(results)]) == 0
        out = capsys.readouterr().out
        assert "TOY |" in out
        assert "(fp32)" in out
        # The choice of rate and length must not look at dev.
        shows_dev = "dev" in out.split("interval")[1]
        assert shows_dev == (name != "choose")


@pytest.mark.parametrize("words, message", [
    pytest.param(["run", "--variants", "bast"], "no variant 'bast'", id="unknown-variant"),
    pytest.param(["table", "9"], "one of these names: choose", id="unknown-table"),
    pytest.param(["table"], "one of these names: choose", id="no-table"),
    pytest.param(["table", "core", "--results", "."], "table core has no cells", id="no-cells"),
    pytest.param(["collect", "--cells", "no"], "no holds none of these cells", id="no-cells-run"),
    pytest.param(["run", "--data", "nowhere"], "nowhere/TOY", id="no-data"),
])
def test_mistakes_are_one_line(work, capsys, tmp_path, monkeypatch, any_commit, words, message):
    """A mistake on the command line ends in status 2 and a message that names it."""
    monkeypatch.chdir(tmp_path)
    flags = work.flags if words[0] == "run" else []
    # The last one of two equal flags counts.
    assert paper.main([words[0], *flags, *words[1:], "--seeds", "7"]) == 2
    assert message in capsys.readouterr().err


def test_seeds_with_other_settings_are_refused(tmp_path, capsys):
    """A table refuses a variant whose seeds were run with different settings."""
    cells = [make_cell(seed=seed, settings={"seed": seed, "epochs": epochs})
             for seed, epochs in ((0, 1.0), (1, 2.0))]
    assert collect(write_cells(tmp_path, *cells), tmp_path) == 2
    assert "other settings than seed 0" in capsys.readouterr().err
    (tmp_path / "TOY.jsonl").write_text("".join(paper.store_lines(cells)))
    assert paper.main(["table", "core", "--results", str(tmp_path)]) == 2
    assert "other settings than seed 0" in capsys.readouterr().err


def test_failed_training_does_not_stop_other_cells(work, tmp_path, any_commit):
    """A training that diverges sets status 2, and the other cells are still filled."""
    flags = [*work.flags, "--work", str(tmp_path), "--cells", str(tmp_path), "--seeds", "0"]
    assert paper.main(["run", *flags, "--variants", "plain lr=1e30 epochs=1", "plain"]) == 2
    assert [path.name for path in tmp_path.glob("*.json")] == ["paper-TOY-plain-0.json"]
    assert yoco.received_signals == []


@pytest.mark.parametrize("variant", [
    pytest.param("plain rate=1", id="unknown-setting"),
    pytest.param("best epochs=3", id="setting-of-plain-fine-tuning"),
    pytest.param("plain length=0.5", id="setting-of-elastic-training"),
    pytest.param("best tuned 2e-4 length=0.01", id="length-of-further-fine-tuning"),
    pytest.param("best tuned 2e-4 lr=1e-3", id="rate-of-further-fine-tuning"),
    pytest.param("bands of best length=0.5", id="setting-of-bands"),
    pytest.param("matters of paper lr=1e-3", id="setting-of-matters"),
    pytest.param("plain lr=abc", id="no-number"),
    pytest.param("plain lr=", id="no-value"),
    pytest.param("plain lr=-1", id="negative"),
    pytest.param("best length=0", id="zero"),
    pytest.param("best length=inf", id="infinite"),
    pytest.param("plain epochs=nan", id="nan"),
    pytest.param("plain lr=1e-4 lr=2e-4", id="named-twice"),
])
def test_settings_that_a_variant_does_not_take(variant):
    """A variant refuses settings that do not apply to it, and values that are no numbers."""
    with pytest.raises(UserError):
        paper.split_variant(variant)


@pytest.mark.parametrize("task, variant, name", [
    pytest.param("MRPC", "plain lr=1e-4 epochs=10", "plain", id="chosen-settings"),
    pytest.param("SST-2", "plain epochs=10", "plain epochs=10", id="chosen-for-another-task"),
    pytest.param("SST-2", "plain epochs=2.0", "plain", id="chosen-for-this-task"),
    pytest.param("CoLA", "plain epochs=3 lr=0.00002", "plain lr=2e-5 epochs=3", id="order"),
    pytest.param("CoLA", "lr=5E-05 best", "best lr=5e-5", id="number"),
    pytest.param("CoLA", "best length=.25 lr=.001", "best lr=1e-3", id="one-of-two"),
    pytest.param("RTE", "paper length=10e-2", "paper length=0.1", id="exponent"),
    pytest.param("RTE", "best tuned 2e-4", "best tuned 2e-4", id="no-setting"),
])
def test_canonical_variant(task, variant, name):
    """Every variant has one name, whatever the order and format of its settings."""
    assert paper.canonical_variant(task, variant) == name
    assert paper.canonical_variant(task, name) == name


# ---- The store ----------------------------------------------------------------------


def read_lines(results):
    """Return {file name: lines} of a store."""
    return {path.name: path.read_text().splitlines() for path in Path(results).glob("*.jsonl")}


def test_collect_merges_and_repeats(tmp_path):
    """Collecting twice or in parts gives the same bytes, and settings are stored once."""
    cells = [make_cell(seed=seed, settings={"seed": seed, "lr": 1e-4, "device": device},
                       precision=precision, variant=variant)
             for variant in ("plain lr=1e-4 epochs=10", "truncated")
             for precision in ("fp32", "bf16")
             for seed, device in ((0, "cpu"), (10, "cuda"), (2, "cpu"))]
    cells.append(make_cell(task="MRPC"))
    for part, members in (("a", cells[:5]), ("b", cells[5:])):
        (tmp_path / part).mkdir()
        write_cells(tmp_path / part, *members)
    assert collect(tmp_path / "a", tmp_path / "x") == 0
    assert collect(tmp_path / "b", tmp_path / "x") == 0
    for part in ("b", "a", "b"):
        assert collect(tmp_path / part, tmp_path / "y") == 0
    lines = read_lines(tmp_path / "x")
    assert lines == read_lines(tmp_path / "y")
    assert {name: len(text) for name, text in lines.items()} == {"TOY.jsonl": 16, "MRPC.jsonl": 2}
    records = [json.loads(line) for line in lines["TOY.jsonl"]]
    assert records[0] == dict(task="TOY", variant="plain", precision="bf16",
                              settings={"lr": 1e-4})
    assert [record.get("seed") for record in records] == [None, 0, 2, 10] * 4
    expected = [facts | {"variant": facts["variant"].split()[0]} for facts in cells]
    store = paper.read_store(tmp_path / "x")
    assert len(store) == len(cells)
    assert all(store[paper.cell_key(facts)] == facts for facts in expected)


def test_collect_replaces_only_when_asked(tmp_path, capsys):
    """A stored cell with other contents is kept, unless --overwrite is given."""
    for directory, commit in (("old", "1111111"), ("new", "2222222")):
        (tmp_path / directory).mkdir()
        write_cells(tmp_path / directory, make_cell(commit=commit), make_cell(seed=1))
    results = tmp_path / "results"
    assert collect(tmp_path / "old", results) == 0
    before = read_lines(results)
    assert collect(tmp_path / "new", results) == 2
    error = capsys.readouterr().err
    assert "paper-0.json" in error and "--overwrite" in error and error.count("\n") == 1
    assert read_lines(results) == before
    assert collect(tmp_path / "new", results, "--overwrite") == 0
    assert paper.read_store(results)["TOY", "plain", "fp32", 0]["commit"] == "2222222"
    # Two different results of one cell in the same directory: nothing says which is right.
    write_cells(tmp_path / "old", make_cell(commit="3333333"),
                make_cell(variant="plain lr=0.0001"))
    assert collect(tmp_path / "old", results, "--overwrite") == 2
    assert "different results of the same cell" in capsys.readouterr().err


def test_the_stored_cells_can_be_read():
    """Each cell of glue/results has its one name, and collecting would not change its file."""
    results = ROOT / "glue/results"
    store = paper.read_store(results)
    paper.check_same_settings(store)
    for task in paper.TASKS:
        cells = [facts for key, facts in store.items() if key[0] == task]
        lines = "".join(paper.store_lines(cells))
        assert lines == (results / f"{task}.jsonl").read_text()
        for facts in cells:
            assert paper.canonical_variant(task, facts["variant"]) == facts["variant"]


def damage(facts, path, value):
    """Replace the value at a path of keys, or remove it if the value is None."""
    *parents, last = path
    for key in parents:
        facts = facts[key]
    if value is None:
        del facts[last]
    else:
        facts[last] = value


@pytest.mark.parametrize("path, value", [
    pytest.param(["task"], None, id="no-task"),
    pytest.param(["task"], "../TOY", id="task-path"),
    pytest.param(["commit"], None, id="no-commit"),
    pytest.param(["variant"], 5, id="variant-5"),
    pytest.param(["seed"], [0], id="seed-list"),
    pytest.param(["seconds"], "long", id="seconds-word"),
    pytest.param(["evaluations"], None, id="no-evaluations"),
    pytest.param(["settings"], [], id="settings-list"),
    pytest.param(["precision"], None, id="no-precision"),
    pytest.param(["precision"], "fp8", id="unknown-precision"),
    pytest.param(["scores"], {}, id="scores-object"),
    pytest.param(["scores"], [], id="scores-empty"),
    pytest.param(["scores", 0, "budget"], [1], id="budget-list"),
    pytest.param(["scores", 0, "params"], None, id="no-params"),
    pytest.param(["scores", 0, "dev"], 80.0, id="dev-number"),
    pytest.param(["scores", 0, "dev", "score"], "80", id="score-string"),
    pytest.param(["scores", 0, "holdout", "score"], math.nan, id="score-nan"),
])
def test_damaged_cells_are_refused(tmp_path, capsys, path, value):
    """A cell with a missing field or a strange value ends in one line that names the file."""
    facts = make_cell()
    cell = tmp_path / "paper-0.json"
    assert collect(write_cells(tmp_path, facts), tmp_path) == 0
    damage(facts, path, value)
    assert collect(write_cells(tmp_path, facts), tmp_path, "--overwrite") == 2
    error = capsys.readouterr().err
    assert str(cell) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("old, new", [
    pytest.param('"seed": 1, ', '"seed": "1", ', id="strange-value"),
    pytest.param('"seed": 1, ', '"seed": 0, ', id="stored-twice"),
    pytest.param('"variant": "plain", "precision": "fp32", "seed": 1',
                 '"variant": "best", "precision": "fp32", "seed": 1', id="no-header"),
    pytest.param('"seed": 1, ', '"seed": 1 ', id="no-json"),
    pytest.param('"seed": 1, ', '', id="no-seed"),
    pytest.param('"dev": ', '"dve": ', id="no-dev"),
])
def test_damaged_lines_are_refused(tmp_path, capsys, old, new):
    """A damaged line of the store ends in one line that names the file and the line."""
    assert collect(write_cells(tmp_path, make_cell(), make_cell(seed=1), make_cell(seed=2)),
                   tmp_path) == 0
    path = tmp_path / "TOY.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[2]
    lines[2] = lines[2].replace(old, new)
    path.write_text("".join(lines))
    assert paper.main(["table", "core", "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 3, is not a line of `collect`" in error
    assert error.count("\n") == 1
