"""Tests of glue/paper.py: its statistics by hand, and cells of a tiny model from start to end."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import json
import math
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


def test_statistics():
    """By hand: the differences 2, 1, 3 have the mean 2, the deviation 1, and Student's t of two
    degrees of freedom, 4.303, makes 4.303 / sqrt(3) = 2.484 of it."""
    found, reference = {0: 3.0, 1: 5.0, 2: 10.0, 7: 1.0}, {0: 1.0, 1: 4.0, 2: 7.0, 8: 2.0}
    assert paper.mean_and_deviation({3: 1.0, 4: 3.0}) == (2.0, math.sqrt(2))
    assert paper.mean_and_deviation({3: 4.0}) == (4.0, None)
    mean, half = paper.paired_difference(found, reference)
    assert mean == 2.0 and half == pytest.approx(2.484, abs=1e-3)
    assert paper.paired_difference({1: 1.0}, reference) == (-3.0, None)
    assert paper.paired_difference({7: 1.0}, reference) == (None, None)
    assert paper.in_words({1: 1.0}, reference) == "1.0 (1); -3.0"
    assert paper.in_words({}) == "" and paper.in_words({3: 4.0}) == "4.0 (1)"
    assert paper.in_words({0: 1.0, 1: 3.0}) == "2.0 ± 1.4 (2)"
    assert paper.in_words({0: 3.0, 1: 5.0, 2: 10.0}, reference) == (
        "6.0 ± 3.6 (3); +2.0 [-0.5, +4.5]")


def test_means_over_tasks():
    """A seed that one task lacks is left out; a score of 0 at half is a score."""
    def cell(full, half):
        return paper.named({"scores": [{"budget": 1.0, "dev": {"score": full}},
                                       {"budget": 0.5, "dev": {"score": half}}]})
    cells = {("MRPC", "best"): {0: cell(90, 80), 1: cell(70, 0)},
             ("CoLA", "best"): {0: cell(50, 40)}}
    assert paper.values(cells, paper.MEAN, "best", (1.0, "dev", "score")) == {0: 70.0}
    assert paper.values(cells, "MRPC", "best", ("deployed", "dev", "score")) == {0: 80, 1: 0}
    assert paper.values(cells, "MRPC", "best", (0.75, "dev", "score")) == {}


def test_what_a_search_is_worth(tmp_path):
    """By hand: the drawn ones' means are 72.5 and 62; those of the deep ones 80 and 65."""
    facts = dict(task="MRPC", variant="matters of best", seed=0, settings={}, evaluations=1,
                 precision="fp32", examples={"holdout": 300, "dev": 75},
                 drawn=[[2, 55, 56], [4, 75, 62], [5, 75, 62], [6, 85, 68]],
                 methods={"sng": {"holdout": {"score": 85}, "dev": {"score": 62}}})
    (tmp_path / "paper-MRPC-matters_of_best-0.json").write_text(json.dumps(facts))
    cells = paper.load(SimpleNamespace(results=tmp_path, seeds=None, tasks=None))
    told = cells["MRPC", "matters of best"][0]["told"]
    assert [round(value, 1) for value in told.values()] == [
        56, 62, 62, 68, 100, 10.9, 2.6, 12.5, 87.5, 4.2, 5.6, 0, 50, 100, 5, 2.3, 5, 75, 3, 5.5,
        -3, 25]


def test_budgets_are_of_the_encoder():
    """A MiniLM layer: 4 (384^2 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384 parameters."""
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    layer = 4 * (384**2 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
    assert paper.budget(minilm, 0) == 22_713_216 - 6 * layer
    assert paper.budget(minilm, 0.5) == 22_713_216 - 3 * layer


def test_evolution_and_random_search():
    """Both keep the budget; evolution's first generation is random, then it climbs higher."""
    config = BertConfig(hidden_size=24, num_attention_heads=6, intermediate_size=48, vocab_size=9)
    space, limit = SearchSpace.for_config(config), paper.budget(config, 0.5)
    it = SimpleNamespace(space=space, cost=functools.partial(count_params, config))

    def score(arch):
        """The more heads the better, and the fewer layers."""
        return {"score": sum(arch.heads) / arch.depth ** 2}
    best = []
    for propose in (paper.propose_random, paper.propose_evolution):
        past = paper.search_by(propose, it, limit, score, {}, 400, seed=1)
        assert all(count_params(config, arch) < limit for arch in past)
        best.append((list(past)[:50], max(past.values())))
    assert best[0][0] == best[1][0] and best[1][1] > best[0][1]
    memo = {arch: -1.0 for arch in best[0][0]}
    assert paper.search_by(paper.propose_random, it, limit, None, memo, 50, 1) == memo


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a tiny BERT and a part of TOY, and the words that name them."""
    root = tmp_path_factory.mktemp("paper")
    toy = root / "data/TOY"
    toy.mkdir(parents=True)
    for name, rows in (("train.tsv", 81), ("dev.tsv", 41)):
        lines = (ROOT / "glue/TOY" / name).read_text().splitlines(keepends=True)
        (toy / name).write_text("".join(lines[:rows]))
    torch.manual_seed(0)
    config = BertConfig.load(ROOT / "glue/TOY")
    save_bert(ElasticBert(config, 2), root / "bert", tokenizer_files(ROOT / "glue/TOY"))
    words = ["--tasks", "TOY", "--data", root / "data", "--bert", root / "bert", "--work",
             root / "work", "--results", root / "results", "--evaluations", "8", "--device", "cpu",
             "--precision", "fp32"]
    return SimpleNamespace(root=root, words=[str(word) for word in words])


def cells(work):
    """{file name: facts} of what is there."""
    return {path.name: json.loads(path.read_text())
            for path in sorted((work.root / "results").glob("*.json"))}


def test_two_processes_share_the_cells(work):
    command = [sys.executable, "-m", "glue.paper", "run", *work.words, "--variants", "core",
               "--seeds", "0", "1"]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
               for _ in range(2)]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    names = [f"TOY-{variant}-{seed}" for variant in (
        "best", "paper", "plain", "plain_lr=2e-5", "truncated", "truncated_epochs=3")
        for seed in (0, 1)]
    assert [f"paper-{name}.json" for name in names] == list(cells(work))
    begun = [line[4:] for text in said for line in text.splitlines() if line.startswith("--- ")]
    assert sorted(begun) == names                       # each once, by one of the two


def test_cells_and_tables(work, capsys, monkeypatch):
    """What other cells need is filled before; tables of all that is there."""
    monkeypatch.setattr(paper, "DRAWN", 12)
    more = ["best lr=2e-3 length=0.02", "HAT", "HAT tuned 2e-5", "bands of best", "matters of best",
            "plain lr=2e-5 epochs=3"]
    assert paper.main(["run", *work.words, "--seeds", "0", "--variants", "core", *more]) == 0
    found = cells(work)
    assert {f"paper-TOY-{v}-0.json".replace(" ", "_") for v in more} <= set(found)
    tuned, best = found["paper-TOY-HAT_tuned_2e-5-0.json"], found["paper-TOY-best-0.json"]
    assert tuned["steps"] == 30                         # ten epochs of 72 examples, 32 a step
    assert best["settings"]["epochs"] == 26 and best["settings"]["reorder"] is True
    given = found["paper-TOY-best_lr=2e-3_length=0.02-0.json"]["settings"]
    assert given["lr"] == 2e-3 and given["epochs"] == pytest.approx(0.02 * 26)
    config = load_bert(work.root / "bert", 2).config
    for facts in (best, found["paper-TOY-HAT-0.json"]):
        assert [s["budget"] for s in facts["scores"]] == [1.0, 0.75, 0.5]
        for scores in facts["scores"][1:]:
            assert scores["params"] == count_params(config, Arch(**scores["arch"])) < (
                paper.budget(config, scores["budget"]))
    truncated = found["paper-TOY-truncated-0.json"]
    assert truncated["scores"][0]["arch"]["heads"] == [3, 3]
    matters = found["paper-TOY-matters_of_best-0.json"]
    assert len(matters["drawn"]) == 12 and list(matters["methods"]) == list(paper.METHODS)
    assert {depth for depth, *_ in matters["drawn"]} <= {2, 3, 4, 5}
    capsys.readouterr()
    assert paper.main(["run", *work.words, "--seeds", "0", "--variants", "core", *more]) == 0
    assert capsys.readouterr().out == ""                # nothing is done twice
    for name in paper.TABLES:
        assert paper.main(["table", name, "--results", str(work.root / "results")]) == 0
        out = capsys.readouterr().out
        assert "TOY |" in out and "(fp32)" in out
        assert ("dev" not in out.split("interval")[1]) == (name == "choose")


def test_mistakes_are_one_line(work, capsys, tmp_path):
    for words, message in ((["run", *work.words, "--variants", "bast"], "no variant 'bast'"),
                           (["table", "9"], "table knows choose"),
                           (["table", "core", "--results", str(tmp_path)], "no cells of table"),
                           (["run", *work.words, "--data", "nowhere"], "nowhere/TOY")):
        assert paper.main([*words, "--seeds", "7"]) == 2
        assert message in capsys.readouterr().err
    for seed, epochs in ((0, 1.0), (1, 2.0)):
        facts = dict(task="TOY", variant="plain", seed=seed, settings={"epochs": epochs},
                     evaluations=1, precision="fp32")
        (tmp_path / f"paper-TOY-plain-{seed}.json").write_text(json.dumps(facts))
    assert paper.main(["table", "core", "--results", str(tmp_path)]) == 2
    assert "other settings than seed 0" in capsys.readouterr().err


def test_a_cell_whose_training_fails_leaves_the_others(work, tmp_path, capsys):
    """A rate that diverges ends in status 2, after the other cells."""
    words = [*work.words, "--work", str(tmp_path), "--results", str(tmp_path), "--seeds", "0"]
    assert paper.main(["run", *words, "--variants", "plain lr=1e30 epochs=1", "plain"]) == 2
    assert [path.name for path in tmp_path.glob("*.json")] == ["paper-TOY-plain-0.json"]
    with pytest.raises(UserError):
        paper.split_variant("plain rate=1")
    assert yoco.SIGNALS == []
