"""Tests of glue/predict.py, against transformers, which loads a super-BERT directly."""

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

import data
import yoco
from glue import predict
from model import BertConfig, ElasticBert, save_bert

ROOT = Path(__file__).resolve().parent.parent
CPU = ["--device", "cpu", "--precision", "fp32"]
TEXTS = ["good film", "", "  Blanks\u00a0 inside ", "Né à Zürich; l'ÉTÉ 東京!", "a\u2028b \u200d",
         "[SEP] [MASK] 'quoted' \"so\"", "very " * 50]
LABELS = ("schlecht", "schön")
PIPES = dict(cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def write_table(path, *rows):
    """Write a TSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), "utf-8")


def write_tiny_bert(directory):
    """Write a BERT directory with a vocabulary of letters, so that no two words are equal."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad ; 東".split() + list(string.ascii_lowercase)
    words += ["##" + letter for letter in string.ascii_lowercase]
    fields = dict(model_type="bert", vocab_size=len(words), hidden_size=12, num_hidden_layers=2,
                  num_attention_heads=3, intermediate_size=24, max_position_embeddings=32,
                  initializer_range=0.5)
    write_table(directory / "vocab.txt", *([word] for word in words))
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory):
    """A directory with a super-BERT `texts`, trained on single texts, and another, `pairs`."""
    trained_dir = tmp_path_factory.mktemp("trained")
    for name, columns in (("texts", ["sentence"]), ("pairs", ["sentence1", "sentence2"])):
        data_dir = trained_dir / "data" / name
        write_tiny_bert(data_dir)
        for split, size in (("train", 40), ("dev", 10)):
            rows = []
            for i in range(size // 2):
                for word, label in zip((f"bad {i}", f"good {i}"), LABELS):
                    rows.append([f"{word} film"] * len(columns) + [label])
            write_table(data_dir / f"{split}.tsv", [*columns, "label"], *rows)
        assert yoco.main(["train", "--data", str(data_dir), "--out", str(trained_dir / name),
                          "--epochs", "0.3", "--max-length", "24", *CPU]) == 0
    return trained_dir


def predictions(capsys, *words):
    """Run glue.predict and return its answers, as it prints them in JSON."""
    capsys.readouterr()
    assert predict.main([*map(str, words), "--json", *CPU]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def assert_refused(capsys, program, words, fragment):
    """Check that a program ends with status 2 and one line that contains the fragment."""
    capsys.readouterr()
    assert program.main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program.__name__}: error: ")
    assert error.count("\n") == 1
    assert fragment in error, error


@pytest.mark.parametrize("name", ["texts", "pairs"])
def test_transformers(trained_dir, tmp_path, capsys, name):
    """Labels and probabilities of odd texts are those of transformers' pipeline."""
    transformers = pytest.importorskip("transformers")
    rows = [[text] for text in TEXTS]
    if name == "pairs":
        rows = [[text, "so " + TEXTS[-i]] for i, text in enumerate(TEXTS)]
    write_table(tmp_path / "odd", *rows)
    pipeline = transformers.pipeline(
        "text-classification", device="cpu", top_k=None,
        model=transformers.BertForSequenceClassification.from_pretrained(trained_dir / name),
        tokenizer=transformers.BertTokenizer.from_pretrained(trained_dir / name))
    answers = predictions(capsys, tmp_path / "odd", "--model", trained_dir / name)
    for row, answer in zip(rows, answers, strict=True):
        inputs = dict(zip(("text", "text_pair"), row))
        expected, = pipeline([inputs], truncation=True, max_length=24)
        assert answer["label"] == expected[0]["label"]
        probabilities = {label["label"]: label["score"] for label in expected}
        assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    assert len({answer["probabilities"]["schön"] for answer in answers}) > 4


@pytest.mark.parametrize("name, columns", [
    pytest.param("texts", "sentence label", id="SST-2-train"),
    pytest.param("texts", "index sentence", id="SST-2-test"),
    pytest.param("texts", "sentence", id="sentence-only"),
    pytest.param("texts", "CoLA", id="CoLA-train"),
    pytest.param("pairs", "sentence1 sentence2 label", id="pairs-with-label"),
    pytest.param("pairs", "sentence2 sentence1", id="pairs-in-another-order"),
    pytest.param("pairs", "Quality #1_ID #2_ID #1_String #2_String", id="MRPC-train"),
    pytest.param("pairs", "index question sentence", id="QNLI-test"),
])
def test_tables(trained_dir, tmp_path, capsys, name, columns):
    """A table, with or without labels, gives the same predictions as its plain texts."""
    columns = [column.replace("_", " " if column[0] == "#" else "_")
               for column in columns.split()]
    texts = [["good film", "bad film"], ["x", "good"], ["1", "0"]]
    rows, plain = [columns], []
    for first, second in texts:
        cells = {column: first for column in ("sentence", "sentence1", "question", "#1 String")}
        cells |= {"sentence2": second, "#2 String": second, "label": "schön", "Quality": "1"}
        if "question" in columns:
            cells["sentence"] = second
        rows.append([cells.get(column, "7") for column in columns])
        plain.append([first] if name == "texts" else [first, second])
    if columns == ["CoLA"]:
        rows = [["gj04", "1", "", first] for first, _ in texts]
    write_table(tmp_path / "table", *rows)
    (tmp_path / "table").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "table").read_bytes())
    write_table(tmp_path / "plain", *plain)
    from_table = predictions(capsys, tmp_path / "table", "--model", trained_dir / name)
    from_plain = predictions(capsys, tmp_path / "plain", "--model", trained_dir / name)
    assert from_table == from_plain
    assert len(from_table) == 3


def test_standard_input(trained_dir):
    """Each line of standard input is answered before the next one is written."""
    command = [sys.executable, "-m", "glue.predict", "--model", str(trained_dir / "texts"), *CPU]
    # An encoding without the letters of the labels is no error.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, env=environment, **PIPES) as process:
        for text in (b"good film\n", b"bad"):
            process.stdin.write(text)
            process.stdin.flush()
            if text == b"bad":
                process.stdin.close()
            answer = process.stdout.readline().decode("ascii")
            label, *probabilities = answer.rstrip().split("\t")
            assert label in ("schlecht", r"sch\xf6n")
            assert len(probabilities) == 2
        assert (process.wait(), process.stderr.read()) == (0, b"")


def test_closed_output(trained_dir):
    """A reader that closes the pipe ends the program without an error."""
    command = [sys.executable, "-m", "glue.predict", "--model", str(trained_dir / "texts"), *CPU]
    with subprocess.Popen(command, **PIPES) as process:
        process.stdout.close()
        process.stdin.write(b"good\n" * 3)
        process.stdin.close()
        assert (process.wait(), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize("content, name, texts", [
    pytest.param(b"a\n\n\n", "texts", ["a", "", ""], id="empty-lines-at-the-end"),
    pytest.param(b"a\n\nb", "texts", ["a", "", "b"], id="no-newline-at-the-end"),
    pytest.param(b"\n", "texts", [""], id="one-empty-line"),
    pytest.param(b"", "texts", [], id="empty-file"),
    pytest.param(b"a\r\n\r\n\r\n", "texts", ["a", "", ""], id="crlf"),
    pytest.param(b"a\tb\n\t\n\t", "pairs", ["a|b", "|", "|"], id="pairs"),
    pytest.param(b"sentence\na\n\n\n", "texts", ["a", "", ""], id="table"),
    pytest.param(b"sentence\r\na\r\n\r\n\r\n", "texts", ["a", "", ""], id="table-crlf"),
    pytest.param(b"sentence\n\n\nb", "texts", ["", "", "b"], id="table-without-last-newline"),
    pytest.param(b"sentence\n\n", "texts", [""], id="table-of-one-empty-text"),
    pytest.param(b"sentence\nsentence\n", "texts", ["sentence"], id="text-like-the-header"),
    pytest.param(b"index\tsentence\n0\ta\n1\t\n2\t", "texts", ["a", "", ""],
                 id="table-with-index"),
    pytest.param(b"sentence1\tsentence2\na\tb\n\t\n\t\n", "pairs", ["a|b", "|", "|"],
                 id="table-of-pairs"),
])
def test_every_row_gets_an_answer(trained_dir, tmp_path, capsys, monkeypatch, content, name,
                                  texts):
    """Every row has its answer, as a file and on standard input, in JSON and in plain lines.

    texts: the texts of the rows, counted by hand. A | joins the two texts of a pair.
    """
    model = trained_dir / name
    network, encode = data.load(model)
    expected = []
    for text in texts:
        logits = network(*encode(*text.split("|")))
        expected.append(LABELS[logits.argmax()])
    (tmp_path / "file").write_bytes(content)
    answers = predictions(capsys, tmp_path / "file", "--model", model)
    assert [answer["label"] for answer in answers] == expected
    if not content.startswith((b"sentence", b"index")):
        monkeypatch.setattr(sys, "stdin", open(tmp_path / "file"))
        assert predict.main(["--model", str(model), *CPU]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("\t")[0] for line in lines] == expected


# In a command line, TEXTS and PAIRS stand for the two super-BERTs, and DATA for the data sets.
@pytest.mark.parametrize("words, fragment", [
    pytest.param("two --model TEXTS",
                 "two, line 1: two texts, but the model was trained on single", id="pair"),
    pytest.param("one --model PAIRS",
                 "one, line 1: one text, but the model was trained on pairs", id="single-text"),
    pytest.param("DATA/pairs/dev.tsv --model TEXTS", "dev.tsv, line 2: two texts",
                 id="table-of-pairs"),
    pytest.param("DATA/texts/dev.tsv --model PAIRS", "dev.tsv, line 2: one text",
                 id="table-of-texts"),
    pytest.param("three --model TEXTS", "three, line 2: 2 tabs", id="two-tabs"),
    pytest.param("latin --model TEXTS", "not UTF-8", id="latin-1"),
    pytest.param("long --model TEXTS", "1,000,000", id="long-line"),
    pytest.param("nowhere --model TEXTS", "nowhere", id="missing-file"),
    pytest.param("good_film --model M",
                 'FILE \'good film\' does not exist. Texts go to standard input: '
                 'echo "a text" | python -m glue.predict --model M', id="text-as-file"),
    pytest.param("LONG --model M", "Texts go to standard input", id="long-text-as-file"),
    pytest.param("EMPTY --model M", "FILE '' does not exist", id="empty-text-as-file"),
    pytest.param(". --model TEXTS", ".", id="directory-as-file"),
    pytest.param("one", "--model", id="no-model"),
    pytest.param("one --model nowhere", "nowhere/config.json does not exist: name a "
                 "directory that train or search wrote", id="missing-model"),
    pytest.param("one --model DATA/texts", "does not exist", id="model-without-weights"),
    pytest.param("one --model TEXTS --x", "--x", id="unknown-flag"),
    pytest.param("one --model TEXTS --glue .", "leave out", id="file-and-glue"),
    pytest.param("--model TEXTS --glue .", "test.tsv does not exist", id="no-test-file"),
])
def test_refusals(trained_dir, tmp_path, capsys, monkeypatch, words, fragment):
    """A file or a command line that cannot be used ends in one line."""
    monkeypatch.chdir(tmp_path)
    Path("one").write_text("good\n")
    Path("two").write_text("good\tbad\n")
    Path("three").write_text("good\na\tb\tc\n")
    Path("latin").write_bytes(b"caf\xe9\n")
    Path("long").write_bytes(b"x" * 10**6 + b"xx\n")
    for name, path in (("TEXTS", "texts"), ("PAIRS", "pairs"), ("DATA", "data")):
        words = words.replace(name, str(trained_dir / path))
    texts = {"good_film": "good film", "LONG": "very " * 9999, "EMPTY": ""}
    assert_refused(capsys, predict, [texts.get(w, w) for w in words.split()], fragment)


def test_table_on_standard_input(trained_dir, capsys, monkeypatch):
    """The header of a table is refused on standard input."""
    monkeypatch.setattr(sys, "stdin", open(trained_dir / "data/texts/dev.tsv"))
    assert_refused(capsys, predict, ["--model", trained_dir / "texts"],
                   "standard input, line 1: the header of a table")


def test_model_without_run_json(trained_dir, tmp_path, capsys, monkeypatch):
    """Without run.json a model answers texts and pairs, but it has no task for --glue."""
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        Path(name).write_bytes((trained_dir / "texts" / name).read_bytes())
    Path("one").write_text("good\n")
    Path("two").write_text("good\tbad\n")
    assert len(predictions(capsys, "one", "--model", ".")) == 1
    assert len(predictions(capsys, "two", "--model", ".")) == 1
    assert_refused(capsys, predict, ["--model", ".", "--glue", "."], "run.json names no task")


# column: the number of the first column with a text.
@pytest.mark.parametrize("task, header, column", [
    pytest.param("MRPC", "index\t#1 ID\t#2 ID\t#1 String\t#2 String", 3, id="MRPC"),
    pytest.param("CoLA", "index\tsentence", 1, id="CoLA"),
    pytest.param("SST-2", "index\tsentence", 1, id="SST-2"),
    pytest.param("QQP", "id\tquestion1\tquestion2", 1, id="QQP"),
    pytest.param("QNLI", "index\tquestion\tsentence", 1, id="QNLI"),
    pytest.param("RTE", "index\tsentence1\tsentence2", 1, id="RTE"),
    pytest.param("MNLI", "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence2_parse\t"
                         "sentence1\tsentence2", 6, id="MNLI"),
    pytest.param("own", "idx\tsentence", 1, id="own-regression"),
    pytest.param("STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\t"
                          "sentence1\tsentence2", 7, id="STS-B"),
    pytest.param("MRPC", "idx\tsentence1\tsentence2", 1, id="MRPC-of-the-library"),
    pytest.param("QNLI", "idx\tquestion\tsentence", 1, id="QNLI-of-the-library"),
    pytest.param("MNLI", "idx\tpremise\thypothesis", 1, id="MNLI-of-the-library"),
])
def test_submission(tmp_path, capsys, monkeypatch, task, header, column):
    """A submission has GLUE's file names, header, labels, and the indices of the test file.

    The scores of STS-B are cut to 0 to 5. The scores of a regression on other data are not.
    """
    monkeypatch.chdir(tmp_path)
    entailment = ("entailment", "not_entailment")
    labels = {"RTE": entailment, "QNLI": entailment, "STS-B": (), "own": (),
              "MNLI": ("contradiction", "entailment", "neutral")}.get(task, ("0", "1"))
    write_model_for_submission(labels)
    columns, num_rows, rng = header.split("\t"), 60, np.random.default_rng(0)
    Path("model/run.json").write_text(json.dumps(dict(
        task=task, max_length=16, pairs=len(columns) > column + 1)))
    for part in ["_matched", "_mismatched"] if task == "MNLI" else [""]:
        rows = []
        for i in range(num_rows):
            row = [7 * i] + ["x"] * (column - 1) if column else []
            rows.append(row + [" ".join(rng.choice(list("abcdefgh"), 5))
                               for _ in columns[column:]])
        write_table(Path(task, f"test{part}.tsv"), columns, *rows)
    words = ["--model", "model", "--glue", task]
    assert predict.main([*words, *CPU]) == 0
    names = ["MNLI-m.tsv", "MNLI-mm.tsv"] if task == "MNLI" else [f"{task}.tsv"]
    assert sorted(path.name for path in Path("submission").iterdir()) == names
    for name in names:
        text = Path("submission", name).read_text()
        lines = [line.split("\t") for line in text.splitlines()]
        assert lines[0] == ["index", "prediction"]
        assert [index for index, _ in lines[1:]] == [str(7 * i) for i in range(num_rows)]
        values = {value for _, value in lines[1:]}
        if task == "STS-B":
            assert {"0.000", "5.000"} < values
            assert all(0 <= float(value) <= 5 for value in values)
        elif task == "own":
            assert min(map(float, values)) < 0
            assert max(map(float, values)) > 5
        else:
            assert values <= set(labels)
            assert len(values) > 1
    assert_refused(capsys, predict, words, "exists")
    assert predict.main([*words, *CPU, "--overwrite"]) == 0


@pytest.mark.parametrize("task, labels, directory, header, fragment", [
    pytest.param("RTE", "entailment not_entailment", "x", "index #1_String #2_String",
                 "the columns of another task", id="columns-of-MRPC"),
    pytest.param("RTE", "entailment not_entailment", "MRPC", "index sentence1 sentence2",
                 "the task is MRPC", id="name-of-MRPC"),
    pytest.param("own", "0 1", "x", "index #1_String #2_String",
                 "the columns of another task", id="own-model-on-MRPC"),
    pytest.param("MRPC", "0 1", "x", "index question1 question2",
                 "the columns of another task", id="MRPC-on-QQP"),
    pytest.param("RTE", "entailment not_entailment", "x", "index sentence",
                 "one text, but the model was trained on pairs", id="single-texts"),
    pytest.param("RTE", "0 1", "RTE", "index sentence1 sentence2",
                 "GLUE's RTE has ('entailment', 'not_entailment')", id="labels-of-the-model"),
    pytest.param("RTE", "entailment not_entailment", "RTE", "sentence1 sentence2",
                 "no column index, id or idx", id="no-index"),
    pytest.param("RTE", "entailment not_entailment", "x", "index sentence1 sentence2",
                 None, id="own-data-with-the-same-columns"),
    pytest.param("RTE", "entailment not_entailment", "rte", "sentence1 sentence2 label idx",
                 None, id="library"),
])
def test_submission_for_another_task(tmp_path, capsys, monkeypatch, task, labels, directory,
                                     header, fragment):
    """A test file of another task is refused, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    write_model_for_submission(tuple(labels.split()))
    Path("model/run.json").write_text(json.dumps(dict(task=task, max_length=16, pairs=True)))
    columns = [name.replace("_", " ") for name in header.split()]
    write_table(Path(directory, "test.tsv"), columns, ["-1"] * len(columns))
    words = ["--model", "model", "--glue", directory]
    if fragment is None:
        assert predict.main([*words, *CPU]) == 0
        index, label = Path("submission", f"{task}.tsv").read_text().split()[2:]
        assert index == "-1"
        assert label in labels.split()
    else:
        assert_refused(capsys, predict, words, fragment)
        assert not Path("submission").exists()


def write_model_for_submission(labels):
    """Write a model to `model` that gives every label, or scores below 0 and above 5.

    labels: the label names, or () for a regression.
    """
    write_tiny_bert(Path("tiny"))
    config = BertConfig.load("tiny")
    config.id2label = {str(i): name for i, name in enumerate(labels)} or None
    config.problem_type = None if labels else "regression"
    torch.manual_seed(0)
    model = ElasticBert(config, len(labels) or 1).eval()
    ids = torch.randint(5, 35, (99, 14))
    with torch.no_grad():
        model.classifier.weight *= 5
        model.classifier.bias -= model(ids, 0 * ids, 0 * ids + 1).mean(0)
    save_bert(model, "model", {"vocab.txt": Path("tiny/vocab.txt").read_bytes()})
