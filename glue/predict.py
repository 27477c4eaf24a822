"""What a trained model says of texts; and the files that gluebenchmark.com takes.

    python -m glue.predict --model DIR [FILE]               a line out per line in; no FILE: stdin
    python -m glue.predict --model DIR --glue DATA_DIR      DATA_DIR/test.tsv -> submission/TASK.tsv

A line is one text, or two with a tab between them, as the model was trained. A file that begins
with the header of a format which data.py knows is read by its columns, so that a label is never
taken for a text. What comes out: the label, then each label with its probability; of a regression
the score.
"""

import json
import sys
from pathlib import Path

import data
from glue import run_program
from model import (load_bert, print_line, read_json, select_device_and_precision, UserError,
                   write_file)
from yoco import Parser, read_run

SUBMISSIONS = {"MNLI": {"test_matched.tsv": "MNLI-m.tsv", "test_mismatched.tsv": "MNLI-mm.tsv"}}


def predict(options):
    """Print a line per text, or write the files of a submission."""
    if options.glue and (options.file or options.json):
        raise UserError("--glue reads the test.tsv of its directory: leave out FILE and --json")
    device, autocast = select_device_and_precision(options.device, options.precision)
    model, path = load_bert(options.model).to(device), Path(options.model, "run.json")
    run = read_json(path) if path.exists() else {}
    if "wrote" in run:
        read_run(options.model)                  # refuses what has changed since
    # From a stream each line is answered before the next one comes.
    size = 32 if options.file or options.glue else 1

    def answers(examples):
        """(label, {name: probability}) of every Example of an iterable."""
        return data.predict(model, options.model, examples, autocast, size)
    if options.glue:
        if "task" not in run:
            raise UserError(f"{path} names no task: train or search did not write this model")
        submit(options, run, answers)
        return
    for label, shares in answers(read_texts(options.file, run.get("pairs"))):
        if options.json:
            line = json.dumps({"label": label, "probabilities": shares})
        elif shares:
            line = "\t".join([label, *(f"{name} {share:.4f}" for name, share in shares.items())])
        else:
            line = f"{label:.4f}"
        print(line, flush=True)


def submit(options, run, answers):
    """Write GLUE's file of predictions for a task (MNLI: two files)."""
    out, task, contents = Path(options.out), run["task"], {}
    for test, name in SUBMISSIONS.get(task, {"test.tsv": f"{task}.tsv"}).items():
        if (out / name).exists() and not options.overwrite:
            raise UserError(f"{out / name} exists: choose another --out, or replace it with "
                            "--overwrite")
        examples = read_table(Path(options.glue, test), run.get("pairs"))
        lines = ["index\tprediction"]
        for place, (example, (label, shares)) in enumerate(zip(examples, answers(examples))):
            index = place if example.label is None else example.label
            if task == "STS-B":
                label = min(5.0, max(0.0, label))
            lines.append(f"{index}\t{label}" if shares else f"{index}\t{label:.3f}")
        contents[out / name] = lines
    out.mkdir(parents=True, exist_ok=True)
    for path, lines in contents.items():
        write_file(path, ("\n".join(lines) + "\n").encode())
        print_line(f"wrote {path}: {len(lines) - 1} predictions")


def read_texts(name, pairs):
    """Yield an Example per line of a file, or of standard input where there is no name."""
    if not name and sys.stdin is None:
        raise UserError("standard input is closed: name a FILE")
    with open(name, "rb") if name else sys.stdin.buffer as file:
        name, lines = name or "standard input", iter(lambda: file.readline(10**7), b"")
        for number, line in enumerate(lines, 1):
            where = f"{name}, line {number}"
            if len(line) > data.LONGEST_LINE:
                raise UserError(f"{where}: more than {data.LONGEST_LINE:,} bytes")
            try:
                # The first may begin with a byte-order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8") from None
            columns = text.split("\t")
            if number == 1 and is_table(columns):
                if not Path(name).is_file():
                    raise UserError(f"{where}: the columns of a table: name the file instead")
                yield from read_table(name, pairs)
                return
            if len(columns) > 2:
                raise UserError(f"{where}: {len(columns) - 1} tabs; a line is one text, or two "
                                "with a tab between them")
            yield fitting(where, pairs, *columns)


def is_table(columns):
    """Whether a first line is that of a table: a known header, or CoLA's rows, which have none."""
    known = any({kind.sentence1, kind.sentence2} - {None} <= set(columns) for kind in data.FORMATS)
    return known or len(columns) == 4 and columns[1] in data.COLA.labels


def read_table(path, pairs):
    """An Example per row of a table; its label is the column `index`, or None without one."""
    # Read as a test file, one with labels is read as well, and they are passed over.
    _, rows = data.read_table(Path(path), test=True)
    return [fitting(f"{path}, line {line}", pairs, *row) for line, *row in rows]


def fitting(where, pairs, one, two=None, index=None):
    """An Example; UserError unless it is what the model takes. pairs: whether it was trained on
    pairs, None where nobody knows."""
    if pairs is False and two is not None:
        raise UserError(f"{where}: two texts, but the model was trained on single ones")
    if pairs and two is None:
        raise UserError(f"{where}: one text, but the model was trained on pairs: two, with a tab "
                        "between them")
    return data.Example(one, two, index)


def main(argv=None):
    """Run the program; the exit status, as `glue.run_program` has it."""
    parser = Parser("glue.predict", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="the texts; without it standard input")
    add("--model", required=True, help="directory that train or search wrote")
    add("--json", action="store_true", help="a JSON object per line instead of columns")
    add("--glue", metavar="DATA_DIR", help="write the predictions of its test.tsv for GLUE")
    add("--out", default="submission", help="directory for these (default: submission)")
    add("--overwrite", action="store_true", help="replace them where they are there")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    return run_program(parser, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
