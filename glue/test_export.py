"""Tests of glue/export.py, against transformers, onnxruntime and torch.export."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from glue import export
from glue.test_predict import (CPU, LABELS, TEXTS, assert_refused, predictions, write_table,
                               write_tiny_bert)
from model import (Arch, BertConfig, ElasticBert, extract, load_bert, save_bert,
                   tokenizer_files)

EXPORT = ["--model", "sub", "--format"]
# The README's example of using an ONNX export. It imports nothing of this project.
README_EXAMPLE = """
import json, onnxruntime, tokenizers
encode = tokenizers.Tokenizer.from_file("export/sub-onnx/tokenizer.json").encode
model = onnxruntime.InferenceSession("export/sub-onnx/model.onnx")
labels = json.load(open("export/sub-onnx/config.json"))["id2label"]
e = encode(*TEXTS)
feed = {"input_ids": [e.ids], "token_type_ids": [e.type_ids], "attention_mask": [e.attention_mask]}
print(labels[str(model.run(None, feed)[0].argmax())])
"""


@pytest.fixture
def sub(tmp_path, monkeypatch):
    """A sub-BERT in the directory `sub`, with layers that differ in heads and FFN size."""
    monkeypatch.chdir(tmp_path)
    write_tiny_bert(tmp_path / "tiny")
    return write_sub(LABELS)


def write_sub(labels, **run):
    """Write a sub-BERT to `sub`, and return it.

    labels: the label names, or () for a regression. run: further fields of run.json.
    """
    config = BertConfig.load("tiny")
    config.id2label = {str(i): name for i, name in enumerate(labels)} or None
    config.problem_type = None if labels else "regression"
    torch.manual_seed(0)
    model = extract(ElasticBert(config, len(labels) or 1).eval(), Arch((1, 3), (20, 5)))
    with torch.no_grad():
        model.classifier.weight *= 3
    save_bert(model, "sub", tokenizer_files("tiny"))
    Path("sub/run.json").write_text(json.dumps(dict(data="gone", max_length=16) | run))
    return model


def random_inputs():
    """Yield int64 inputs of several sizes, with padding."""
    for B, T in ((1, 1), (1, 32), (5, 1), (3, 7), (40, 16)):
        ids, mask = torch.randint(5, 12, (B, T)), (torch.rand(B, T) > 0.3).long()
        mask[:, 0] = 1
        yield ids, ids % 2, mask


def run_isolated(script):
    """Run a script in a process that cannot import this project, and return its output."""
    return subprocess.run([sys.executable, "-I", "-c", script], check=True, text=True,
                          capture_output=True).stdout


def directory_names():
    """Return the names of the files and directories in the working directory."""
    return {path.name for path in Path().iterdir()}


def test_onnx(sub, capsys):
    """onnxruntime computes the same logits, and the README's example gives the same label."""
    pytest.importorskip("onnxscript")
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    assert export.main([*EXPORT, "onnx"]) == 0
    # ONNX Runtime 1.14 knows no newer opset than 18, and no newer IR version than 8.
    proto = onnx.load("export/sub-onnx/model.onnx")
    assert proto.ir_version <= 8
    assert all(opset.version <= 18 for opset in proto.opset_import)
    session = onnxruntime.InferenceSession("export/sub-onnx/model.onnx")
    for inputs in random_inputs():
        feed = {name: x.numpy() for name, x in zip(export.INPUTS, inputs)}
        logits, = session.run(None, feed)
        torch.testing.assert_close(torch.from_numpy(logits), sub(*inputs).detach(), atol=1e-5,
                                   rtol=1e-4)
    # A pair, and a text that is longer than max_length.
    for texts in ((TEXTS[0], "bad"), (TEXTS[-1],)):
        Path("texts").write_text("\t".join(texts) + "\n", "utf-8")
        answer, = predictions(capsys, "texts", "--model", "sub")
        printed = run_isolated(README_EXAMPLE.replace("TEXTS", repr(texts)))
        assert printed == answer["label"] + "\n"


def write_dev_data(labels, **run):
    """Write a data set to `data`, which the run.json of `sub` names.

    labels: the label names, or () for a regression. Return the dev texts, and for each its label,
    an index or a score.
    """
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc good bad "), 12)) for _ in range(50)]
    scores = np.arange(50) % 2 if labels else np.arange(50) / 10
    shown = [labels[i] for i in scores] if labels else scores
    rows = [["sentence", "label" if labels else "score"], *zip(texts, shown)]
    for name in ("train", "dev"):
        write_table(Path(f"data/{name}.tsv"), *rows)
    write_sub(labels, **{"data": "data", "task": "data", "pairs": False, **run})
    return texts, scores


def test_int8(sub, capsys):
    """Compare an int8 export with its file, and with logits and scores by hand."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    texts, labels = write_dev_data(LABELS)
    capsys.readouterr()
    assert export.main([*EXPORT, "onnx", "--int8"]) == 0
    printed = capsys.readouterr().out
    path = Path("export/sub-onnx-int8/model.onnx")
    # The three embeddings, six matrices in each layer, the pooler and the classifier.
    matrices = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    assert len(matrices) == 3 + 2 * 6 + 2
    integers = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    assert all(tensor.data_type in integers for tensor in matrices)

    _, encode = data.load("sub")
    session = onnxruntime.InferenceSession(path)
    all_inputs = [[tensor.long() for tensor in encode(text)] for text in texts]
    fp32 = np.array([sub(*inputs)[0].tolist() for inputs in all_inputs])
    int8 = []
    for inputs in all_inputs:
        feed = {name: x.numpy() for name, x in zip(export.INPUTS, inputs)}
        int8.append(session.run(None, feed)[0][0])
    int8 = np.array(int8)
    assert 0 < np.abs(int8 - fp32).max() < 0.2 * np.abs(fp32).max()
    lines = {line.split(":")[0]: line for line in printed.splitlines()}
    assert lines["int8"].startswith(f"int8: {path.stat().st_size / 2**20:.1f} MiB, ")
    for precision, logits in (("fp32", fp32), ("int8", int8)):
        printed_score = float(lines[precision].split("dev score ")[1])
        # Batches of several texts share the scales of their activations, so a text may
        # have another answer in int8.
        num_other = 50 * abs(printed_score / 100 - np.mean(logits.argmax(1) == labels))
        assert num_other < (0.01 if precision == "fp32" else 2.01)


@pytest.fixture
def fake_int8(sub, monkeypatch):
    """Replace the exporter and the quantizer. The int8 logits are off by 0.01.

    The real ones take seconds. test_int8 uses them.
    """
    def write_model(model, directory, _):
        (directory / "model.onnx").write_bytes(bytes(2**20))
        return model

    def quantize(path):
        path.write_bytes(bytes(2**19))
        return lambda *inputs: load_bert("sub")(*inputs) + 0.01

    monkeypatch.setattr(export, "write_model", write_model)
    monkeypatch.setattr(export, "quantize", quantize)


def test_int8_regression(fake_int8, capsys):
    """The printed scores of a regression are the correlations of numpy."""
    texts, scores = write_dev_data(())
    assert export.main([*EXPORT, "onnx", "--int8"]) == 0
    model, encode = data.load("sub")
    values = [model(*encode(text)).item() for text in texts]
    ranks = np.argsort(np.argsort(values))
    expected = 50 * (np.corrcoef(values, scores)[0, 1]
                     + np.corrcoef(ranks, np.arange(50))[0, 1])
    printed = capsys.readouterr().out
    assert "differ by at most 1.0e-02\n" in printed
    lines = re.findall(r"^(fp32: 1.0|int8: 0.5) MiB, .* dev score (.*)$", printed, re.M)
    assert [float(score) for _, score in lines] == pytest.approx([expected] * 2, abs=0.01)


@pytest.mark.parametrize("run, reason", [
    pytest.param({"data": "gone"}, "gone/dev.tsv does not exist", id="no-data"),
    pytest.param({"pairs": True}, "the model was trained on pairs", id="other-data"),
])
def test_int8_without_dev_data(fake_int8, capsys, run, reason):
    """Without the data of the training, a line says why there are no scores."""
    write_dev_data(LABELS, **run)
    assert export.main([*EXPORT, "onnx", "--int8"]) == 0
    printed = capsys.readouterr().out
    assert re.search(f"^no dev score: .*{reason}", printed, re.M)
    lines = re.findall(r"^(fp32|int8): .* MiB, .* ms for 16 tokens on the CPU$", printed, re.M)
    assert lines == ["fp32", "int8"]


@pytest.mark.parametrize("broken", [
    pytest.param(lambda logits: logits.flip(1), id="other-logits"),
    pytest.param(lambda logits: 0 * logits, id="zeros"),
    pytest.param(lambda logits: logits * np.nan, id="not-a-number"),
])
def test_broken_int8_is_not_kept(fake_int8, capsys, monkeypatch, sub, broken):
    """An int8 export that says little about the texts is refused, and nothing of it stays."""
    monkeypatch.setattr(export, "quantize", lambda _: lambda *inputs: broken(sub(*inputs)))
    assert_refused(capsys, export, [*EXPORT, "onnx", "--int8", "--out", "new"],
                   "nothing was written. Export without --int8")
    assert directory_names() == {"tiny", "sub"}


def test_torch(sub):
    """torch.export.load gives the same logits, also without this project."""
    assert export.main([*EXPORT, "torch"]) == 0
    exported = torch.export.load("export/sub-torch/model.pt2").module()
    for inputs in random_inputs():
        torch.testing.assert_close(exported(*inputs), sub(*inputs))
    printed = run_isolated("""if True:
        import torch
        model = torch.export.load("export/sub-torch/model.pt2").module()
        print(model(*torch.ones(3, 2, 9, dtype=torch.int64)).tolist())""")
    expected = sub(*torch.ones(3, 2, 9, dtype=torch.int64))
    torch.testing.assert_close(torch.tensor(json.loads(printed)), expected)
    assert BertConfig.load("export/sub-torch").labels == LABELS
    assert data.max_train_length("export/sub-torch") == 16


@pytest.mark.parametrize("labels, cased", [
    pytest.param(LABELS, False, id="two-labels"),
    pytest.param(("a", "b", "c"), True, id="three-labels-cased"),
    pytest.param((), False, id="regression"),
])
def test_hf(sub, capsys, labels, cased):
    """transformers' pipeline, with its defaults, gives the answers of glue.predict.

    glue.predict gives the same answers for the export as for the model.
    """
    transformers = pytest.importorskip("transformers")
    if cased:
        # A capital letter in the vocabulary makes the tokenizer cased.
        vocab = Path("tiny/vocab.txt")
        vocab.write_text(vocab.read_text("utf-8").replace("good", "Good"), "utf-8")
    sub = write_sub(labels)
    assert export.main([*EXPORT, "hf"]) == 0
    hf_model, report = transformers.BertForSequenceClassification.from_pretrained(
        "export/sub-hf", output_loading_info=True)
    assert not any(report.values())
    assert hf_model.config.num_hidden_layers == 2
    # The largest FFN of the two layers. The super-BERT's has 24 neurons.
    assert hf_model.config.intermediate_size == 20
    hf_model.eval()
    for ids, types, mask in random_inputs():
        logits = hf_model(input_ids=ids, token_type_ids=types, attention_mask=mask).logits
        torch.testing.assert_close(logits, sub(ids, types, mask), atol=1e-5, rtol=1e-4)
    pipeline = transformers.pipeline("text-classification", "export/sub-hf", device="cpu",
                                     top_k=None)
    texts = [*TEXTS, "Good", "GOOD film"]
    Path("texts").write_text("".join(text + "\n" for text in texts), "utf-8")
    answers = predictions(capsys, "texts", "--model", "sub")
    export_answers = predictions(capsys, "texts", "--model", "export/sub-hf")
    for text, answer, export_answer in zip(texts, answers, export_answers, strict=True):
        result, = pipeline([text], truncation=True)
        scores = {label["label"]: label["score"] for label in result}
        expected = answer["probabilities"] if labels else {"LABEL_0": answer["label"]}
        assert scores == pytest.approx(expected, abs=1e-5)
        probabilities = pytest.approx(answer["probabilities"], abs=1e-6)
        assert export_answer["probabilities"] == probabilities
        if labels:
            assert export_answer["label"] == answer["label"]
            assert result[0]["label"] == answer["label"]
    assert len({json.dumps(answer) for answer in answers}) > 6


def test_printed_costs(sub, capsys):
    """Compare the printed numbers with the files, with transformers, and with zeros by hand."""
    transformers = pytest.importorskip("transformers")
    capsys.readouterr()
    assert export.main([*EXPORT, "hf", "--out", "new"]) == 0
    printed = capsys.readouterr().out
    texts = re.findall(r"([\d,]+) parameters, [\d.]+ ms", printed)
    before, after = [int(text.replace(",", "")) for text in texts]
    # The classifier does not count. It has two rows of 12, and two biases.
    assert before == sum(weight.numel() for weight in sub.parameters()) - 2 * 12 - 2
    hf_model = transformers.BertModel.from_pretrained("new")
    assert after == sum(weight.numel() for weight in hf_model.parameters())
    # The first layer lacks 2 heads of size 4. The second lacks 15 neurons.
    head_zeros = 3 * 8 * (12 + 1) + 12 * 8
    num_zeros = head_zeros + 15 * (12 + 1) + 12 * 15
    assert after == before + num_zeros
    zeros = f"\n{num_zeros} of these parameters are zeros, {head_zeros} of them for dropped"
    assert zeros in printed


@pytest.mark.parametrize("error", [
    pytest.param(0.01, id="other-logits"),
    pytest.param(np.nan, id="not-a-number"),
])
def test_wrong_export_is_not_kept(sub, capsys, monkeypatch, error):
    """An export with other logits is refused, and nothing of it stays."""
    class WrongBert(ElasticBert):
        """A model whose logits are off by the error."""

        def forward(self, *inputs):
            """Return the sub-BERT's logits plus the error."""
            return sub(*inputs) + error

    exported = WrongBert(sub.config, 2)
    monkeypatch.setattr(export, "write_model", lambda *_: exported)
    assert_refused(capsys, export, [*EXPORT, "torch", "--out", "new"], "nothing was written")
    assert directory_names() == {"tiny", "sub"}


@pytest.fixture
def quick(sub, monkeypatch):
    """Leave out the comparison of logits and costs, which other tests check."""
    monkeypatch.setattr(export, "max_difference", lambda *_: 0.0)
    monkeypatch.setattr(export, "compare_costs", lambda *_: None)


def test_overwrite(quick, capsys):
    """--overwrite replaces an earlier export and no other directory."""
    new = [*EXPORT, "hf", "--out", "new"]
    assert export.main(new) == 0
    assert directory_names() == {"tiny", "sub", "new"}
    assert_refused(capsys, export, new, "--overwrite")
    assert export.main([*new, "--overwrite"]) == 0
    assert_refused(capsys, export, [*EXPORT, "hf", "--out", ".", "--overwrite"],
                   "no export.json")
    assert_refused(capsys, export, [*EXPORT, "hf", "--out", "sub", "--overwrite"],
                   "the directory of --model")


def save_with_transformers(path):
    """Save a BERT with other weights into a directory, as a training with transformers does."""
    transformers = pytest.importorskip("transformers")
    transformers.BertForSequenceClassification.from_pretrained(path).save_pretrained(path)


@pytest.mark.parametrize("change, fragment", [
    pytest.param(
        lambda path: (path / "export.json").unlink(), "no export.json",
        id="no-mark"),
    pytest.param(
        lambda path: (path / "notes.txt").write_text("mine"), "has changed",
        id="another-file"),
    pytest.param(
        lambda path: (path / "checkpoint-500").mkdir(), "has changed",
        id="a-subdirectory"),
    pytest.param(
        lambda path: (path / "vocab.txt").unlink(), "has changed",
        id="a-file-less"),
    pytest.param(
        lambda path: (path / "config.json").write_text("{}"), "has changed",
        id="another-config"),
    pytest.param(
        save_with_transformers, "has changed",
        id="saved-by-transformers"),
    pytest.param(
        lambda path: (path / "export.json").write_text("{}"), "has changed",
        id="empty-mark"),
    pytest.param(
        lambda path: (path / "export.json").write_text("no"), "not a JSON object",
        id="mark-is-no-json"),
])
def test_changed_export_is_kept(quick, capsys, change, fragment):
    """A directory that holds more or other than an export wrote is refused, and stays."""
    new = [*EXPORT, "hf", "--out", "new", "--overwrite"]
    assert export.main(new) == 0
    change(Path("new"))
    before = read_files("new")
    assert_refused(capsys, export, new, fragment)
    assert read_files("new") == before


def read_files(directory):
    """Return the contents of all files in a directory as {name: bytes}."""
    paths = [path for path in Path(directory).iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in paths}


class Killed(BaseException):
    """Represent the end of the process."""


def kill_at_call(monkeypatch, number):
    """Let the process die at its nth change of a directory, before the change is made.

    A dead process changes nothing more, so all later changes fail, too. Return a list with
    an entry for each change before.
    """
    calls = []

    def replacement(function, *args, **kwargs):
        if len(calls) >= number:
            raise Killed
        calls.append(function.__name__)
        return function(*args, **kwargs)

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, functools.partial(replacement, getattr(os, name)))
    return calls


def test_killed_export(quick, monkeypatch):
    """An export that is killed at any moment loses nothing, and the next one cleans up.

    --out holds the old or the new export, complete. If it is killed between the two
    renames, --out is not there, and the next start brings the old one back.
    """
    def write_model(model, directory, _):
        (directory / "model.safetensors").write_text(str(model))

    # Only the moves of files and directories matter here, so the model is just a text.
    monkeypatch.setattr(export, "write_model", write_model)
    monkeypatch.setattr(export, "load_bert", BertConfig.load)
    new = [*EXPORT, "hf", "--out", "new"]
    # Another directory that only looks like a temporary one of --out.
    Path(".new.x.abcdefgh.tmp").mkdir()
    assert export.main(new) == 0
    old_files = read_files("new")
    write_sub(("a", "b"))
    num_absent = number = 0
    while True:
        with monkeypatch.context() as patch:
            calls = kill_at_call(patch, number)
            try:
                assert export.main([*new, "--overwrite"]) == 0
            except Killed:
                pass
        if len(calls) < number:
            break
        num_absent += not Path("new").exists()
        # The next start refuses to overwrite, but cleans up first.
        assert export.main(new) == 2
        assert directory_names() == {"tiny", "sub", "new", ".new.x.abcdefgh.tmp"}
        is_new = BertConfig.load("new").labels == ("a", "b")
        assert export.is_export(Path("new"))
        assert is_new or read_files("new") == old_files
        if is_new:
            shutil.rmtree("new")
            write_sub(LABELS)
            assert export.main(new) == 0
            write_sub(("a", "b"))
        number += 1
    assert number > 10
    assert num_absent == 1


def test_failed_rename(quick, capsys, monkeypatch):
    """If the new export cannot take its place, the old one returns at once."""
    new = [*EXPORT, "hf", "--out", "new", "--overwrite"]
    assert export.main(new) == 0
    before = read_files("new")
    rename = os.rename

    def rename_old_only(source, target):
        if Path(source).name == "new" and Path(source).parent.name.endswith(".tmp"):
            raise PermissionError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_old_only)
    assert_refused(capsys, export, new, "no")
    assert read_files("new") == before
    assert directory_names() == {"tiny", "sub", "new"}


def test_refusals(sub, capsys, monkeypatch):
    """A missing model, an unknown format, and a missing package end in one line."""
    assert_refused(capsys, export, ["--model", "nowhere", "--format", "hf"],
                   "nowhere/config.json does not exist: name a directory")
    assert_refused(capsys, export, ["--model", "sub", "--format", "pt"], "--format")
    assert_refused(capsys, export, [*EXPORT, "hf", "--int8"], "use --format onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_refused(capsys, export, [*EXPORT, "onnx"], "pip install onnx onnxruntime onnxscript")


def test_superbert(sub, capsys):
    """A super-BERT is refused, unless only its largest architecture was trained."""
    write_sub(LABELS, theta=[], settings={"stages": "all"})
    assert_refused(capsys, export, [*EXPORT, "hf"], "is a super-BERT")
    write_sub(LABELS, theta=[], settings={"stages": "largest"})
    assert export.main([*EXPORT, "hf"]) == 0


# Tokenizer settings of transformers 5, which writes tokenizer.json and no vocab.txt.
TRANSFORMERS_5 = [
    pytest.param({}, id="uncased"),
    pytest.param({"do_lower_case": False}, id="cased"),
    pytest.param({"additional_special_tokens": ["<e>"]}, id="special-token"),
    pytest.param({"model_input_names": ["input_ids", "attention_mask"]}, id="no-token-types"),
]


def odd_texts(rng):
    """Return a hundred texts that are hard to tokenize."""
    parts = ["the film ", "Zürich ", "İstanbul ", "你好", "日本", "می‌رود ", "\u200d", "\u00a0",
             "😀", "ﬁ", "½", "don't ", "(", "…", "[MASK]", "[SEP]", "##ing", "▁x", "\u2028",
             "<e> ", "\t", "COVID ", "covids ", "Covid", "<E>"]
    return ["".join(rng.choice(parts, rng.integers(1, 20))) for _ in range(100)]


def assert_same_ids(transformers, bert_dir):
    """Check that token ids and token types of odd texts and pairs are those of transformers."""
    transformers.BertConfig(vocab_size=30522 + 2).save_pretrained(bert_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert_dir)
    rng = np.random.default_rng(0)
    texts = odd_texts(rng)
    for first, second in zip(texts, [None, *texts[:-1]]):
        example = data.Example(first, second if rng.random() < 0.5 else None, 0)
        inputs = [text for text in example[:2] if text is not None]
        expected = tokenizer(*inputs, truncation=True, max_length=40)
        encoded = data.encode([example], bert_dir, 40)[0]
        no_types = [0] * len(encoded.input_ids)
        assert list(encoded.input_ids) == expected["input_ids"], example
        types = expected.get("token_type_ids", no_types)
        assert list(encoded.token_type_ids) == types


@pytest.fixture
def vocab():
    """The path of all-MiniLM-L6-v2's vocab.txt."""
    minilm = Path(__file__).parents[1] / "all-MiniLM-L6-v2"
    vocab = Path(os.environ.get("MINILM_DIR", minilm), "vocab.txt")
    if not vocab.exists():
        pytest.skip("no MiniLM vocabulary: python -m glue.download all-MiniLM-L6-v2")
    return vocab


@pytest.mark.parametrize("options", TRANSFORMERS_5)
def test_ids_are_those_of_transformers_5(tmp_path, vocab, options):
    """A directory as transformers 5 writes it gives the same token ids and types."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.BertTokenizer.from_pretrained(vocab.parent, **options)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert not (tmp_path / "vocab.txt").exists()
    assert_same_ids(transformers, tmp_path)


def test_ids_are_those_of_transformers_4(tmp_path, vocab):
    """A directory as transformers 4 wrote it, with added tokens, gives the same ids and types."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    token = {"content": "covid", "lstrip": False, "rstrip": True, "normalized": True,
             "single_word": True, "special": False}
    special_token = token | {"content": "<e>", "normalized": False, "special": True}
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True,
              "added_tokens_decoder": {"30522": token, "30523": special_token}}
    shutil.copy(vocab, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert_same_ids(transformers, tmp_path)
