"""Predict the labels of texts, or write the prediction files that gluebenchmark.com takes.

    python -m glue.predict --model DIR [FILE]            FILE or stdin, one line out per line
    python -m glue.predict --model DIR --glue DATA_DIR   test.tsv -> submission/TASK.tsv

A line holds one text, or two with a tab between them, as in the training data. If a
file begins with a table header that data.py knows, its texts are found by the header's
column names, so a label is never mistaken for a text. Each line of output holds the
predicted label, then every label with its probability. For a regression it holds the
score.
"""

import json
import os
import sys
from pathlib import Path

import data
from glue import run_program
from model import (load_bert, print_line, select_device_and_precision, UserError,
                   write_file)
from yoco import Parser, read_run

# The file that GLUE expects for each test file of a task. A task that is not listed has
# one test.tsv, for which GLUE expects TASK.tsv.
SUBMISSIONS = {"MNLI": {"test_matched.tsv": "MNLI-m.tsv",
                        "test_mismatched.tsv": "MNLI-mm.tsv"}}


def predict(options):
    """Print one line per text, or write the files of a submission."""
    if options.glue and (options.file or options.json):
        raise UserError("--glue reads the test.tsv of its directory: leave out FILE and --json")
    if options.file is not None and not os.path.exists(options.file):
        raise UserError(f"FILE {options.file[:60]!r} does not exist. Texts go to standard "
                        f'input: echo "a text" | python -m glue.predict --model {options.model}')
    device, autocast = select_device_and_precision(options.device, options.precision)
    model = load_bert(data.existing_model(options.model)).to(device)
    training = data.training_of(options.model)
    if "wrote" in training:
        # Refuse a directory whose files have changed since run.json was written.
        read_run(options.model)
    # Answer each line of standard input before the next one arrives.
    batch_size = 32 if options.file or options.glue else 1

    def predict_examples(examples):
        """Yield (label, {name: probability}) for every Example."""
        return data.predict(model, options.model, examples, autocast, batch_size)

    if options.glue:
        if "task" not in training:
            raise UserError(f"{options.model}/run.json names no task: name a --model that "
                            "train or search wrote")
        write_submission(options, training, predict_examples)
        return
    for label, probabilities in predict_examples(read_texts(options.file, training)):
        if options.json:
            line = json.dumps({"label": label, "probabilities": probabilities})
        elif probabilities:
            columns = [f"{name} {share:.4f}" for name, share in probabilities.items()]
            line = "\t".join([label, *columns])
        else:
            line = f"{label:.4f}"
        print(line, flush=True)


def write_submission(options, training, predict_examples):
    """Write GLUE's file of predictions for a task, or its two files for MNLI.

    training: what the model was trained on (see `data.training_of`). Raises UserError if a
    test file is of another task, if it numbers no rows, or if a file exists and --overwrite
    is not given.
    """
    out, task = Path(options.out), training["task"]
    contents = {}                                                    # {path: lines}
    for test, name in SUBMISSIONS.get(task, {"test.tsv": f"{task}.tsv"}).items():
        if (out / name).exists() and not options.overwrite:
            raise UserError(f"{out / name} exists: choose another --out, or replace it with "
                            "--overwrite")
        path = Path(options.glue, test)
        file_format, rows = data.read_table(path, test=True)
        check_task(path, file_format, training)
        examples = make_examples(path, rows, training)
        if examples[0].label is None:
            raise UserError(f"{path} has no column index, id or idx: add one, because a "
                            "submission names each row by it")
        predictions = predict_examples(examples)
        lines = ["index\tprediction"]
        for example, (label, probabilities) in zip(examples, predictions):
            # read_table has put the number of the row in the place of the label.
            index = example.label
            if task == "STS-B":
                label = min(5.0, max(0.0, label))
            if probabilities:
                lines.append(f"{index}\t{label}")
            else:
                lines.append(f"{index}\t{label:.3f}")
        contents[out / name] = lines
    out.mkdir(parents=True, exist_ok=True)
    for path, lines in contents.items():
        write_file(path, ("\n".join(lines) + "\n").encode())
        print_line(f"wrote {path}: {len(lines) - 1} predictions")


def check_task(path, file_format, training):
    """Check that a test file has the format of the model's task.

    Raises UserError if it does not, or if the model has other labels than GLUE's task.
    """
    task = training["task"]
    data.check_fit(path, training, file_format.sentence2 is not None,
                   data.glue_task_of(path.parent))
    formats = []
    for table_format in data.FORMATS + data.LIBRARY_FORMATS:
        if table_format.name == data.glue_task(task):
            formats.append(table_format)
    # For a task outside of GLUE, `formats` now holds the formats without a name.
    texts = [(table_format.sentence1, table_format.sentence2) for table_format in formats]
    if (file_format.sentence1, file_format.sentence2) not in texts:
        raise UserError(f"{path} has the columns of another task, but the model was trained "
                        f"on {task}: name a directory with the columns of {task}")
    labels = formats[-1].labels
    if data.glue_task(task) and sorted(labels) != sorted(training["labels"]):
        raise UserError(f"the labels of the model are {training['labels']}, but GLUE's {task} "
                        f"has {labels}: train on GLUE's data")


def read_texts(name, training):
    """Yield one Example per line of the file `name`, or of standard input if `name` is None.

    training: what the model was trained on (see `data.training_of`).
    Raises UserError if a line cannot be read, or if it does not fit the model.
    """
    if not name and sys.stdin is None:
        raise UserError("standard input is closed: name a FILE")
    with open(name, "rb") if name else sys.stdin.buffer as file:
        name = name or "standard input"
        lines = iter(lambda: file.readline(10**7), b"")
        for number, line in enumerate(lines, 1):
            where = f"{name}, line {number}"
            if len(line) > data.LONGEST_LINE:
                raise UserError(f"{where}: more than {data.LONGEST_LINE:,} bytes")
            try:
                # The first line may begin with a byte-order mark.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8") from None
            columns = text.split("\t")
            if number == 1 and is_table(columns):
                if not Path(name).is_file():
                    raise UserError(f"{where}: the header of a table. A table must be a file: "
                                    "name it as FILE")
                # Read as a test file, a table may have labels or not. They are ignored.
                _, rows = data.read_table(name, test=True)
                yield from make_examples(name, rows, training)
                return
            if len(columns) > 2:
                raise UserError(f"{where}: {len(columns) - 1} tabs. A line holds one text, or "
                                "two with a tab between them")
            yield make_example(where, training, *columns)


def is_table(columns):
    """Return whether the first line of a file begins a table.

    It does if it is a known header, or a row of CoLA, whose files have no header.
    """
    for table_format in data.FORMATS + data.LIBRARY_FORMATS:
        text_columns = {table_format.sentence1, table_format.sentence2} - {None}
        if text_columns <= set(columns):
            return True
    return len(columns) == 4 and columns[1] in data.COLA.labels


def make_examples(path, rows, training):
    """Return one Example per row of a table.

    rows: what `data.read_table` returns for a test file. Each label is the number of the
    row in the table, or None.
    """
    return [make_example(f"{path}, line {line}", training, *row) for line, *row in rows]


def make_example(where, training, text, second_text=None, index=None):
    """Return an Example, with the number of its row in the place of its label.

    where: the file and the line, for messages. training: what the model was trained on.
    Raises UserError if the model was trained on pairs and there is one text, or on single
    texts and there are two.
    """
    data.check_fit(where, training, second_text is not None)
    return data.Example(text, second_text, index)


def main(argv=None):
    """Run the program and return its exit status (see `glue.run_program`)."""
    parser = Parser("glue.predict", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="the texts (default: standard input)")
    add("--model", required=True, help="a directory that train or search wrote")
    add("--json", action="store_true", help="print a JSON object per line")
    add("--glue", metavar="DATA_DIR",
        help="predict DATA_DIR/test.tsv, and write the file that GLUE takes")
    add("--out", default="submission",
        help="the directory to which --glue writes (default: submission)")
    add("--overwrite", action="store_true", help="replace earlier files of --glue")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    return run_program(parser, predict, argv)


if __name__ == "__main__":
    sys.exit(main())
