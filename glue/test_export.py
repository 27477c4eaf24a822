"""glue.export against what loads its files: transformers, onnxruntime and torch.export."""

import os

if os.environ.get("YOCO_TEST_GPU") != "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")   # before torch looks for one

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from glue import export, predict
from glue.test_predict import CPU, LABELS, TEXTS, refused, tiny_bert
from model import Arch, BertConfig, ElasticBert, extract, save_bert, tokenizer_files

HERE = ["--model", "sub", "--format"]
# What the README shows, with nothing of this project.
SIX_LINES = """
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
    """A directory `sub` with a sub-BERT whose layers differ in heads and FFN size."""
    monkeypatch.chdir(tmp_path)
    tiny_bert(tmp_path / "tiny")
    return make_sub(LABELS)


def make_sub(labels, **run):
    """Write it; labels: () for a regression."""
    config = BertConfig.load("tiny")
    config.id2label = {str(i): name for i, name in enumerate(labels)} or None
    config.problem_type = None if labels else "regression"
    torch.manual_seed(0)
    model = extract(ElasticBert(config, len(labels) or 1).eval(), Arch((1, 3), (24, 5)))
    with torch.no_grad():
        model.classifier.weight *= 3
    save_bert(model, "sub", tokenizer_files("tiny"))
    Path("sub/run.json").write_text(json.dumps(dict(data="gone", max_length=16, **run)))
    return model


def shapes():
    """Inputs of several sizes, int64, with padding."""
    for B, T in ((1, 1), (1, 32), (5, 1), (3, 7), (40, 16)):
        ids, mask = torch.randint(5, 12, (B, T)), (torch.rand(B, T) > 0.3).long()
        mask[:, 0] = 1
        yield ids, ids % 2, mask


def isolated(script):
    """What a process prints that finds nothing of this project."""
    return subprocess.run([sys.executable, "-I", "-c", script], check=True, text=True,
                          capture_output=True).stdout


def test_onnx(sub, capsys):
    """onnxruntime computes the same logits for any batch and length; and alone the same label."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export.main([*HERE, "onnx"]) == 0
    session = onnxruntime.InferenceSession("export/sub-onnx/model.onnx")
    for inputs in shapes():
        logits, = session.run(None, {n: x.numpy() for n, x in zip(export.INPUTS, inputs)})
        torch.testing.assert_close(torch.from_numpy(logits), sub(*inputs).detach(), atol=1e-5,
                                   rtol=1e-4)
    for texts in (TEXTS[0], "bad"), (TEXTS[-1],):       # -1 is longer than max_length
        Path("texts").write_text("\t".join(texts) + "\n", "utf-8")
        capsys.readouterr()
        assert predict.main(["texts", "--model", "sub", "--json", *CPU]) == 0
        label = json.loads(capsys.readouterr().out)["label"]
        assert isolated(SIX_LINES.replace("TEXTS", repr(texts))) == label + "\n"


def test_torch(sub):
    """A process that knows nothing of this project loads it: the same logits."""
    assert export.main([*HERE, "torch"]) == 0
    exported = torch.export.load("export/sub-torch/model.pt2").module()
    for inputs in shapes():
        torch.testing.assert_close(exported(*inputs), sub(*inputs))
    printed = isolated("""if True:
        import torch
        model = torch.export.load("export/sub-torch/model.pt2").module()
        print(model(*torch.ones(3, 2, 9, dtype=torch.int64)).tolist())""")
    wanted = sub(*torch.ones(3, 2, 9, dtype=torch.int64))
    torch.testing.assert_close(torch.tensor(json.loads(printed)), wanted)
    assert BertConfig.load("export/sub-torch").labels == LABELS
    assert data.max_train_length("export/sub-torch") == 16


@pytest.mark.parametrize("labels, cased", [(LABELS, False), (("a", "b", "c"), True), ((), False)])
def test_hf(sub, capsys, labels, cased):
    """transformers' pipeline, told nothing else, gives the labels and probabilities of predict, of
    odd texts and a long one; and predict gives the same on what was exported."""
    transformers = pytest.importorskip("transformers")
    if cased:                                           # a capital in the vocabulary says so
        vocab = Path("tiny/vocab.txt")
        vocab.write_text(vocab.read_text("utf-8").replace("good", "Good"), "utf-8")
    sub = make_sub(labels)
    assert export.main([*HERE, "hf"]) == 0
    theirs, report = transformers.BertForSequenceClassification.from_pretrained(
        "export/sub-hf", output_loading_info=True)
    assert not any(report.values()) and theirs.config.num_hidden_layers == 2
    for ids, types, mask in shapes():
        logits = theirs.eval()(input_ids=ids, token_type_ids=types, attention_mask=mask).logits
        torch.testing.assert_close(logits, sub(ids, types, mask), atol=1e-5, rtol=1e-4)
    pipeline = transformers.pipeline("text-classification", "export/sub-hf", device="cpu",
                                     top_k=None)
    texts = [*TEXTS, "Good", "GOOD film"]
    Path("texts").write_text("".join(text + "\n" for text in texts), "utf-8")
    found = []
    for directory in ("sub", "export/sub-hf"):
        capsys.readouterr()
        assert predict.main(["texts", "--model", directory, "--json", *CPU]) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for text, ours, again in zip(texts, *found, strict=True):
        result, = pipeline([text], truncation=True)
        scores = {x["label"]: x["score"] for x in result}
        wanted = {"LABEL_0": ours["label"]} if not labels else ours["probabilities"]
        assert scores == pytest.approx(wanted, abs=1e-5)
        assert again["probabilities"] == pytest.approx(ours["probabilities"], abs=1e-6)
        assert not labels or again["label"] == ours["label"] == result[0]["label"]
    assert len({json.dumps(answer) for answer in found[0]}) > 6


def test_refusals(sub, capsys, monkeypatch):
    """Super-BERTs, what others wrote, missing packages; and what fails leaves nothing."""
    for error in (0.01, np.nan):
        class Wrong(ElasticBert):
            def forward(self, *inputs):
                return sub(*inputs) + error
        exported = Wrong(sub.config, 2)
        with monkeypatch.context() as patch:
            patch.setattr(export, "write", lambda *_: exported)
            refused(capsys, export, [*HERE, "torch", "--out", "new"], "nothing was written")
        assert {path.name for path in Path().iterdir()} == {"tiny", "sub"}
    assert export.main([*HERE, "hf", "--out", "new"]) == 0
    assert {path.name for path in Path().iterdir()} == {"tiny", "sub", "new"}
    refused(capsys, export, [*HERE, "hf", "--out", "new"], "--overwrite")
    assert export.main([*HERE, "hf", "--out", "new", "--overwrite"]) == 0
    refused(capsys, export, [*HERE, "hf", "--out", ".", "--overwrite"], "which no export wrote")
    refused(capsys, export, [*HERE, "hf", "--out", "sub", "--overwrite"], "what the command reads")
    refused(capsys, export, ["--model", "nowhere", "--format", "hf"], "nowhere")
    refused(capsys, export, ["--model", "sub", "--format", "pt"], "--format")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        refused(capsys, export, [*HERE, "onnx"], "pip install onnx onnxruntime onnxscript")
    make_sub(LABELS, theta=[], settings={"stages": "all"})
    refused(capsys, export, [*HERE, "hf"], "is a super-BERT")
    make_sub(LABELS, theta=[], settings={"stages": "largest"})
    assert export.main([*HERE, "hf"]) == 0


def test_ids_are_those_of_transformers(tmp_path):
    """Directories as transformers 5 writes them, with tokenizer.json and no vocab.txt, and as 4
    did, with vocab.txt and added tokens of all kinds, give its ids and token types: on 500 odd
    texts and pairs, uncased, cased, and of a class without token types."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    minilm = Path(__file__).parents[1] / "all-MiniLM-L6-v2"
    vocab = Path(os.environ.get("MINILM_DIR", minilm), "vocab.txt")
    if not vocab.exists():
        pytest.skip("no MiniLM vocabulary: python -m glue.download all-MiniLM-L6-v2")
    rng = np.random.default_rng(0)
    parts = ["the film ", "Zürich ", "İstanbul ", "你好", "日本", "می‌رود ", "\u200d", "\u00a0", "😀",
             "ﬁ", "½", "don't ", "(", "…", "[MASK]", "[SEP]", "##ing", "▁x", "\u2028", "<e> ", "\t",
             "COVID ", "covids ", "Covid", "<E>"]
    texts = ["".join(rng.choice(parts, rng.integers(1, 20))) for _ in range(100)]
    token = {"content": "covid", "lstrip": False, "rstrip": True, "normalized": True,
             "single_word": True, "special": False}
    old = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "added_tokens_decoder": {
        "30522": token, "30523": token | {"content": "<e>", "normalized": False, "special": True}}}
    for options in ({}, {"do_lower_case": False}, {"additional_special_tokens": ["<e>"]}, old,
                    {"model_input_names": ["input_ids", "attention_mask"]}):
        here = tmp_path / str(len(list(tmp_path.iterdir())))
        here.mkdir()
        if options is old:
            shutil.copy(vocab, here)
            (here / "tokenizer_config.json").write_text(json.dumps(old))
        else:
            theirs = transformers.BertTokenizer.from_pretrained(vocab.parent, **options)
            theirs.save_pretrained(here)
            assert (here / "tokenizer.json").exists() and not (here / "vocab.txt").exists()
        transformers.BertConfig(vocab_size=30522 + 2).save_pretrained(here)
        theirs = transformers.AutoTokenizer.from_pretrained(here)
        for one, two in zip(texts, [None, *texts[:-1]] * 2):
            example = data.Example(one, two if rng.random() < 0.5 else None, 0)
            pair = [text for text in example[:2] if text is not None]
            expected = theirs(*pair, truncation=True, max_length=40)
            ours = data.encode([example], here, 40)[0]
            assert ours.input_ids == expected["input_ids"], (options, example)
            assert ours.token_type_ids == expected.get("token_type_ids", [0] * len(ours.input_ids))
