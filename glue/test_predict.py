"""glue.predict against transformers, which reads a super-BERT's directory with its own classes."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one

import json
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import yoco
from glue import predict
from model import BertConfig, ElasticBert, save_bert

ROOT = Path(__file__).resolve().parent.parent
CPU = ["--device", "cpu", "--precision", "fp32"]
TEXTS = ["good film", "", "  Blanks\u00a0 inside ", "Né à Zürich; l'ÉTÉ 東京!", "a\u2028b \u200d",
         "[SEP] [MASK] 'quoted' \"so\"", "very " * 50]
LABELS = ("schlecht", "schön")


def write(path, *rows):
    """A TSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), "utf-8")


def tiny_bert(directory):
    """A BERT directory with a vocabulary of letters, so that all words differ."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad ; 東".split() + list(string.ascii_lowercase)
    words += ["##" + letter for letter in string.ascii_lowercase]
    fields = dict(model_type="bert", vocab_size=len(words), hidden_size=12, num_hidden_layers=2,
                  num_attention_heads=3, intermediate_size=24, max_position_embeddings=32,
                  initializer_range=0.5)
    write(directory / "vocab.txt", *([word] for word in words))
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with two super-BERTs, one of single texts, `texts`, and one of `pairs`."""
    place = tmp_path_factory.mktemp("trained")
    for name, texts in (("texts", ["sentence"]), ("pairs", ["sentence1", "sentence2"])):
        tiny_bert(place / "data" / name)
        for part, n in (("train", 40), ("dev", 10)):
            rows = [[*[f"{word} film" for _ in texts], label] for i in range(n // 2)
                    for word, label in zip((f"bad {i}", f"good {i}"), LABELS)]
            write(place / "data" / name / f"{part}.tsv", [*texts, "label"], *rows)
        assert yoco.main(["train", "--data", str(place / "data" / name), "--out", str(place / name),
                          "--epochs", "0.3", "--max-length", "24", *CPU]) == 0
    return place


def answers(capsys, *words):
    """What the program prints in JSON."""
    capsys.readouterr()
    assert predict.main([*map(str, words), "--json", *CPU]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, program, words, fragment):
    """A program ends with status 2 and one line that contains the fragment."""
    capsys.readouterr()
    assert program.main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program.__name__}: error: ") and error.count("\n") == 1
    assert fragment in error, error


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_transformers(trained, tmp_path, capsys, kind):
    """Labels and probabilities of odd texts are those of transformers' pipeline."""
    transformers = pytest.importorskip("transformers")
    rows = [[text] if kind == "texts" else [text, "so " + TEXTS[-i]] for i, text in
            enumerate(TEXTS)]
    write(tmp_path / "odd", *rows)
    pipeline = transformers.pipeline(
        "text-classification", device="cpu", top_k=None,
        model=transformers.BertForSequenceClassification.from_pretrained(trained / kind),
        tokenizer=transformers.BertTokenizer.from_pretrained(trained / kind))
    found = answers(capsys, tmp_path / "odd", "--model", trained / kind)
    for row, answer in zip(rows, found, strict=True):
        theirs, = pipeline([dict(zip(("text", "text_pair"), row))], truncation=True, max_length=24)
        assert answer["label"] == theirs[0]["label"]
        assert answer["probabilities"] == pytest.approx({x["label"]: x["score"] for x in theirs},
                                                        abs=1e-5)
    assert len({answer["probabilities"]["schön"] for answer in found}) > 4


@pytest.mark.parametrize("kind, columns", [
    ("texts", "sentence label"), ("texts", "index sentence"), ("texts", "sentence"),
    ("texts", "CoLA"), ("pairs", "sentence1 sentence2 label"), ("pairs", "sentence2 sentence1"),
    ("pairs", "Quality #1_ID #2_ID #1_String #2_String"), ("pairs", "index question sentence")])
def test_tables(trained, tmp_path, capsys, kind, columns):
    """Tables, with labels and without, give what their texts alone give."""
    columns = [name.replace("_", " " if name[0] == "#" else "_") for name in columns.split()]
    texts = [["good film", "bad film"], ["x", "good"], ["1", "0"]]
    rows, plain = [columns], []
    for one, two in texts:
        known = {name: one for name in ("sentence", "sentence1", "question", "#1 String")}
        known |= {"sentence2": two, "#2 String": two, "label": "schön", "Quality": "1"}
        if "question" in columns:
            known["sentence"] = two
        rows.append([known.get(name, "7") for name in columns])
        plain.append([one] if kind == "texts" else [one, two])
    if columns == ["CoLA"]:
        rows = [["gj04", "1", "", one] for one, _ in texts]
    write(tmp_path / "table", *rows)
    (tmp_path / "table").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "table").read_bytes())
    write(tmp_path / "plain", *plain)
    found, wanted = (answers(capsys, tmp_path / name, "--model", trained / kind)
                     for name in ("table", "plain"))
    assert found == wanted and len(found) == 3


def test_streams(trained):
    """Standard input is answered line by line; a closed end and an encoding without the labels'
    letters are no errors."""
    command = [sys.executable, "-m", "glue.predict", "--model", str(trained / "texts"), *CPU]
    pipes = dict(cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env={**os.environ, "PYTHONIOENCODING": "ascii"},
                          **pipes) as process:
        for text in (b"good film\n", b"bad"):
            process.stdin.write(text)
            process.stdin.flush()
            if text == b"bad":
                process.stdin.close()
            label, *shares = process.stdout.readline().decode("ascii").rstrip().split("\t")
            assert label in ("schlecht", r"sch\xf6n") and len(shares) == 2
        assert (process.wait(), process.stderr.read()) == (0, b"")
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        process.stdin.write(b"good\n" * 3)
        process.stdin.close()
        assert (process.wait(), process.stderr.read()) == (0, b"")


def test_refusals(trained, tmp_path, capsys, monkeypatch):
    """One line for what a user can do wrong."""
    monkeypatch.chdir(tmp_path)
    for name, content in (("one", "good\n"), ("two", "good\tbad\n"), ("three", "good\na\tb\tc\n")):
        Path(name).write_text(content)
    Path("latin").write_bytes(b"caf\xe9\n")
    Path("long").write_bytes(b"x" * 10**6 + b"xx\n")
    texts, pairs = (["--model", trained / name] for name in ("texts", "pairs"))
    for words, fragment in (
            (["two", *texts], "two, line 1: two texts, but the model was trained on single"),
            (["one", *pairs], "one, line 1: one text, but the model was trained on pairs"),
            ([trained / "data/pairs/dev.tsv", *texts], "dev.tsv, line 2: two texts"),
            ([trained / "data/texts/dev.tsv", *pairs], "dev.tsv, line 2: one text"),
            (["three", *texts], "three, line 2: 2 tabs"), (["latin", *texts], "not UTF-8"),
            (["long", *texts], "1,000,000"), (["nowhere", *texts], "nowhere"), ([".", *texts], "."),
            (["one"], "--model"), (["one", "--model", "nowhere"], "nowhere/config.json"),
            (["one", "--model", trained / "data/texts"], "does not exist"),
            (["one", *texts, "--x"], "--x"), (["one", *texts, "--glue", "."], "leave out"),
            ([*texts, "--glue", "."], "test.tsv does not exist")):
        refused(capsys, predict, words, fragment)
    monkeypatch.setattr(sys, "stdin", open(trained / "data/texts/dev.tsv"))
    refused(capsys, predict, texts, "standard input, line 1: the columns of a table")
    # Where run.json does not say which, both are answered.
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        Path(name).write_bytes((trained / "texts" / name).read_bytes())
    assert len(answers(capsys, "one", "--model", ".") + answers(capsys, "two", "--model", ".")) == 2
    refused(capsys, predict, ["--model", ".", "--glue", "."], "run.json names no task")


@pytest.mark.parametrize("task, header, column", [
    ("MRPC", "index\t#1 ID\t#2 ID\t#1 String\t#2 String", 3), ("CoLA", "index\tsentence", 1),
    ("SST-2", "index\tsentence", 1), ("QQP", "id\tquestion1\tquestion2", 1),
    ("QNLI", "index\tquestion\tsentence", 1), ("RTE", "index\tsentence1\tsentence2", 1),
    ("MNLI", "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence2_parse\tsentence1\t"
             "sentence2", 6), ("own", "sentence", 0),
    ("STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
     7)])
def test_submission(tmp_path, capsys, monkeypatch, task, header, column):
    """GLUE's files: its names, header, labels; of STS-B alone scores cut to 0 to 5; the index from
    the test file. A score of one's own data stays as it is."""
    monkeypatch.chdir(tmp_path)
    labels = {"RTE": ("entailment", "not_entailment"), "QNLI": ("entailment", "not_entailment"),
              "MNLI": ("contradiction", "entailment", "neutral"), "STS-B": (), "own": ()}.get(
                  task, ("0", "1"))
    tiny_bert(tmp_path / "tiny")
    config = BertConfig.load("tiny")
    config.id2label = {str(i): name for i, name in enumerate(labels)} or None
    config.problem_type = None if labels else "regression"
    torch.manual_seed(0)
    model = ElasticBert(config, len(labels) or 1).eval()
    ids = torch.randint(5, 35, (99, 14))
    with torch.no_grad():                               # all labels, and scores beyond 0 and 5
        model.classifier.weight *= 5
        model.classifier.bias -= model(ids, 0 * ids, 0 * ids + 1).mean(0)
    save_bert(model, "model", {"vocab.txt": Path("tiny/vocab.txt").read_bytes()})
    columns, n, rng = header.split("\t"), 60, np.random.default_rng(0)
    Path("model/run.json").write_text(json.dumps(dict(
        task=task, max_length=16, pairs=len(columns) > column + 1)))
    for part in ["_matched", "_mismatched"] if task == "MNLI" else [""]:
        rows = [[7 * i] + ["x"] * (column - 1) for i in range(n)] if column else [[]] * n
        rows = [row + [" ".join(rng.choice(list("abcdefgh"), 5)) for _ in columns[column:]]
                for row in rows]
        write(Path(task, f"test{part}.tsv"), columns, *rows)
    words = ["--model", "model", "--glue", task]
    assert predict.main([*words, *CPU]) == 0
    names = ["MNLI-m.tsv", "MNLI-mm.tsv"] if task == "MNLI" else [f"{task}.tsv"]
    assert sorted(path.name for path in Path("submission").iterdir()) == names
    step = 7 if columns[0] == "index" else 1            # otherwise the place in the file
    for name in names:
        lines = [line.split("\t") for line in Path("submission", name).read_text().splitlines()]
        assert lines[0] == ["index", "prediction"]
        assert [i for i, _ in lines[1:]] == [str(step * i) for i in range(n)]
        found = {value for _, value in lines[1:]}
        if task == "STS-B":
            assert {"0.000", "5.000"} < found and all(0 <= float(v) <= 5 for v in found)
        elif task == "own":
            assert min(map(float, found)) < 0 and max(map(float, found)) > 5
        else:
            assert found <= set(labels) and len(found) > 1
    refused(capsys, predict, words, "exists")
    assert predict.main([*words, *CPU, "--overwrite"]) == 0
