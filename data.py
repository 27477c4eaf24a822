"""GLUE TSV files -> examples -> WordPiece ids -> padded batches -> predictions and metrics.

Every official GLUE format is recognised by its header's column names (CoLA, which has no header, by
its shape), and so is a user's own file with the columns `sentence`, `label` or `sentence1`,
`sentence2`, `label` (`score` instead of `label`: regression). The files are read as what they are:
UTF-8 lines split at tabs, no quoting. A row that does not fit is an error with its file and line.
"""

import itertools
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer

from model import BertConfig, UserError, load_bert, read_json, write_file

# sentence2: None without a pair; label: an index into Task.labels, or a float for regression
Example = namedtuple("Example", "sentence1 sentence2 label")
Encoded = namedtuple("Encoded", "input_ids token_type_ids label")   # two lists of equal length
Format = namedtuple("Format", "name sentence1 sentence2 label metric labels")

FORMATS = [  # first match wins; name None: the directory's name; labels None: those found in train
    Format("MRPC", "#1 String", "#2 String", "Quality", "accuracy+f1", ("0", "1")),
    Format("QQP", "question1", "question2", "is_duplicate", "accuracy", ("0", "1")),
    Format("MNLI", "sentence1", "sentence2", "gold_label", "accuracy",
           ("contradiction", "entailment", "neutral")),
    Format("QNLI", "question", "sentence", "label", "accuracy", ("entailment", "not_entailment")),
    Format(None, "sentence1", "sentence2", "score", "pearson+spearman", ()),     # STS-B, own
    Format(None, "sentence1", "sentence2", "label", "accuracy", None),           # RTE, own pairs
    Format(None, "sentence", None, "label", "accuracy", None),                   # SST-2, own
    Format(None, "sentence", None, "score", "pearson+spearman", ()),             # own
]
COLA = Format("CoLA", "sentence", None, "label", "matthews", ("0", "1"))
COLA_COLUMNS = ["source", "label", "mark", "sentence"]
LONGEST_LINE = 10**6
DOWNLOADS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE")


@dataclass
class Task:
    """One data set. An example's label is an index into `labels`; regression has `labels` ()."""
    name: str
    train: list
    dev: list                            # MNLI: matched
    labels: tuple
    metric: str                          # what ACC(m) is: the mean of the metrics joined by "+"
    dev_mismatched: list | None = None   # MNLI only

    @property
    def num_labels(self):
        """The number of logits: one per label, or a single one for regression."""
        return len(self.labels) or 1

    @property
    def devs(self):
        """The dev sets: one, or MNLI's two."""
        return [self.dev] + ([self.dev_mismatched] if self.dev_mismatched else [])


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

def load_task(directory):
    """Read train.tsv and dev.tsv (MNLI: dev_matched.tsv and dev_mismatched.tsv) of `directory`.

    Raises UserError for whatever is missing, malformed, or leaves nothing to learn.
    """
    directory = Path(directory)
    train_format, train, labels = read_examples(directory / "train.tsv")
    if len(set(e.label for e in train)) < 2:
        raise UserError(f"{directory / 'train.tsv'}: only one label; nothing to learn")
    devs = ["dev_matched.tsv", "dev_mismatched.tsv"] if train_format.name == "MNLI" else ["dev.tsv"]
    examples = []
    for name in devs:
        dev_format, dev, _ = read_examples(directory / name, labels)
        if dev_format.label != train_format.label or dev_format.sentence1 != train_format.sentence1:
            raise UserError(f"{directory / name} has other columns than train.tsv")
        examples.append(dev)
    return Task(train_format.name or directory.resolve().name, train, examples[0], labels,
                train_format.metric, *examples[1:])


def read_examples(path, labels=None):
    """Read one TSV file: (its Format, [Example], label names). `labels`: the only ones allowed."""
    kind, table = read_table(path)
    labels = labels if labels is not None else kind.labels
    if labels is None:
        labels = tuple(sorted({label for *_, label in table}))
    examples = []
    for line, one, two, label in table:
        try:
            value = labels.index(label) if labels else float(label)
            if not np.isfinite(value):
                raise ValueError
        except ValueError:
            raise UserError(f"{path}, line {line}: label {label[:40]!r} is not "
                            + (f"one of {', '.join(labels)}" if labels else "a number")) from None
        examples.append(Example(one, two, value))
    return kind, examples, labels


def read_test(path):
    """Read an official test file, which has no labels: [Example], each with its `index` column (or
    its place in the file) as the label."""
    kind, table = read_table(path, test=True)
    return [Example(one, two, index or str(i)) for i, (_, one, two, index) in enumerate(table)]


def read_table(path, test=False):
    """The Format of a TSV file and its rows: (line, sentence1, sentence2 or None, label); of a test
    file the column `index` (None without one) stands in the label's place."""
    path, rows = Path(path), read_rows(path)
    columns, first = rows[0], 1
    kind = next((f for f in FORMATS if {f.sentence1, f.sentence2, f.label if not test else None}
                 - {None} <= set(columns)), None)
    if kind is None and len(columns) == 4 and columns[1] in COLA.labels:
        kind, first, columns = COLA, 0, COLA_COLUMNS
    if kind is None:
        raise UserError(f"{path}: the header {columns[:8]} fits no GLUE format; a file of your own "
                        "needs sentence, label or sentence1, sentence2, label (or score)")
    last = kind.label if not test else "index" if "index" in columns else None
    at = [columns.index(c) if c else None for c in (kind.sentence1, kind.sentence2, last)]

    table, short = [], 0
    for line, row in enumerate(rows[first:], 1 + first):
        if len(row) == len(columns):
            table.append((line, *(row[i] if i is not None else None for i in at)))
        elif kind.name == "QQP" and len(row) < len(columns) and not test:    # a few in train
            short += 1
        else:
            raise UserError(f"{path}, line {line}: {len(row)} columns, expected {len(columns)}")
    if short:
        print(f"{path}: {short} incomplete row(s) left out", file=sys.stderr)
    if not table:
        raise UserError(f"{path} has no rows")
    return kind, table


def read_rows(path):
    """A TSV file's rows as lists of strings: no quoting, LF or CRLF, byte-order mark or not."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        name = path.parent.name
        hint = f"; run: python -m glue.download {name}" if name in DOWNLOADS else ""
        raise UserError(f"{path} does not exist{hint}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8") from None
    lines = text.rstrip("\r\n").split("\n")
    if lines == [""]:
        raise UserError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(f"{path}, line {number}: a NUL byte: this is no text file")
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}, line {number}: more than {LONGEST_LINE:,} characters")
    return [line.removesuffix("\r").split("\t") for line in lines]


def split_holdout(examples, fraction, seed):
    """Split train into (kept, held out), stratified by label (or rounded score)."""
    rng, held = np.random.default_rng(seed), set()
    strata = {}
    for i, example in enumerate(examples):
        strata.setdefault(round(example.label), []).append(i)
    for _, members in sorted(strata.items()):
        held.update(rng.permutation(members)[:round(fraction * len(members))].tolist())
    return ([e for i, e in enumerate(examples) if i not in held],
            [e for i, e in enumerate(examples) if i in held])


# --------------------------------------------------------------------------------------------------
# WordPiece and batches
# --------------------------------------------------------------------------------------------------

def load_tokenizer(directory):
    """The WordPiece tokenizer of a BERT directory: its vocab.txt, and the casing that its
    tokenizer_config.json asks for (uncased where there is none)."""
    path, settings = Path(directory) / "vocab.txt", Path(directory) / "tokenizer_config.json"
    try:
        words = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8") from None
    found = read_json(settings) if settings.exists() else {}
    options = dict(do_lower_case=True, strip_accents=None, tokenize_chinese_chars=True)
    options |= {name: found[name] for name in options if found.get(name) is not None}
    if not all(isinstance(value, bool | None) for value in options.values()):
        raise UserError(f"{settings}: {', '.join(options)} must be true or false")
    vocab = {word.removesuffix("\r"): i for i, word in enumerate(words)}
    for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
        if token not in vocab:
            raise UserError(f"{path} has no {token}: it is not the vocabulary of a BERT")
    size = BertConfig.load(directory).vocab_size
    if len(words) != size:
        raise UserError(f"{path} has {len(words)} entries, but config.json's vocab_size is {size}")
    return BertWordPieceTokenizer(vocab, lowercase=options["do_lower_case"],
                                  strip_accents=options["strip_accents"],
                                  handle_chinese_chars=options["tokenize_chinese_chars"])


def encoder(directory, max_length=None):
    """A function [Example] -> [Encoded] with the tokenizer of the BERT directory `directory`.

    [CLS] sentence1 [SEP] or [CLS] sentence1 [SEP] sentence2 [SEP] (token types 0 and 1), cut to
    `max_length` tokens (None: as many as in the model's training), the longer sentence first.
    """
    max_length = max_length or trained_length(directory)
    tokenizer, types = load_tokenizer(directory), BertConfig.load(directory).type_vocab_size
    tokenizer.enable_truncation(max_length, strategy="longest_first")

    def encode_examples(examples):
        """[Example] -> [Encoded]; UserError for pairs where the BERT has one token type."""
        if types < 2 and any(e.sentence2 is not None for e in examples):
            raise UserError(f"{directory}: the data has sentence pairs, the BERT only one token "
                            "type")
        texts = [e.sentence1 if e.sentence2 is None else (e.sentence1, e.sentence2)
                 for e in examples]
        return [Encoded(t.ids, t.type_ids, e.label)
                for t, e in zip(tokenizer.encode_batch(texts), examples)]
    return encode_examples


def encode(examples, directory, max_length=None):
    """What `encoder` does, once: [Example] -> [Encoded]."""
    return encoder(directory, max_length)(examples)


def batches(encoded, batch_size, rng):
    """Cut `encoded` into batches for training: index lists that name each example once. Examples
    are shuffled with `rng` (a numpy Generator) and sorted by length within buckets of 50 batches,
    so that a batch has little padding; then the batches are shuffled."""
    order, bucket, cut = rng.permutation(len(encoded)).tolist(), 50 * batch_size, []
    for start in range(0, len(order), bucket):
        chunk = sorted(order[start:start + bucket], key=lambda i: -len(encoded[i].input_ids))
        cut += [chunk[i:i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def token_batches(encoded, tokens):
    """Cut `encoded` into batches for evaluation: index lists, longest first, each of as many
    examples as make at most `tokens` tokens when padded to the longest (but at least one)."""
    order, cut = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids)), []
    while order:
        size = max(1, tokens // len(encoded[order[0]].input_ids))
        cut, order = cut + [order[:size]], order[size:]
    return cut


def collate(encoded, indices, device="cpu"):
    """One batch, padded to its longest member: input_ids, token_type_ids (int64) and attention_mask
    (bool), each [B, T], and labels [B] (int64, or float32 for regression)."""
    rows = [encoded[i] for i in indices]
    T = max(len(row.input_ids) for row in rows)
    ids, types = np.zeros((2, len(rows), T), np.int64)              # padding is masked
    mask = np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        n = len(row.input_ids)
        ids[b, :n], types[b, :n], mask[b, :n] = row.input_ids, row.token_type_ids, True
    labels = torch.tensor([row.label for row in rows])              # int64 or float32
    return tuple(t.to(device) for t in (*map(torch.from_numpy, (ids, types, mask)), labels))


# --------------------------------------------------------------------------------------------------
# Using a model
# --------------------------------------------------------------------------------------------------

def load(directory):
    """A model that `train` or `search` wrote, and its encoder: encode(text), encode(text, pair), or
    both with lists of B texts, gives the three [B, T] tensors that the model takes."""
    encode_examples = encoder(directory)

    def encode_texts(texts, pairs=None):
        """One text or a list, and as many second texts -> three [B, T] tensors."""
        if isinstance(texts, str):
            texts, pairs = [texts], [pairs]
        pairs = pairs or [None] * len(texts)
        examples = [Example(*both, 0) for both in zip(texts, pairs, strict=True)]
        return collate(encode_examples(examples), range(len(examples)))[:3]
    return load_bert(directory), encode_texts


PREFIX_MEMORY = 2**30    # bytes of hidden states that a scorer keeps for architectures to come


def batch_tokens(device):
    """Tokens of a batch in evaluation: a CPU's caches like small ones."""
    return 2**11 if device.type == "cpu" else 2**15


def scorer(model, parts, metric, device, autocast):
    """A function arch -> {metric: %} over lists of encoded examples. Of several parts (MNLI's dev
    has two) "score" is the mean.

    The batches are made once and stay on the device. Architectures whose first layers are the same
    compute them once: `kept` holds, per batch, the hidden states before each layer, as many as
    PREFIX_MEMORY allows; those used longest ago go first. The result is the same to the bit.
    """
    made = [[collate(part, indices, device)
             for indices in token_batches(part, batch_tokens(device))] for part in parts]
    tokens = sum(inputs[0].numel() for part in made for inputs in part)
    most = PREFIX_MEMORY // (4 * tokens * model.config.hidden_size)
    kept = [[{} for _ in part] for part in made]

    def logits(inputs, arch, kept):
        """Logits of one batch, as float32; keeps its hidden states and forgets the oldest."""
        result = model(*inputs, arch, kept).float()
        layers = model.config.layers(arch)
        for prefix in [layers[:i] for i in range(arch.depth) if layers[:i] in kept]:
            kept[prefix] = kept.pop(prefix)                          # the last in a dict's order
        for prefix in list(kept)[:max(0, len(kept) - most)]:
            del kept[prefix]
        return result

    def score(arch):
        """{metric: %} of one architecture."""
        results = []
        model.eval()
        with torch.inference_mode(), autocast():
            for part, keep in zip(made, kept):
                found = [logits(inputs, arch, k) for (*inputs, _), k in zip(part, keep)]
                labels = torch.cat([labels for *_, labels in part])
                results.append(scores(metric, labels.cpu().numpy(),
                                      torch.cat(found).cpu().numpy()))
        named = {k + "_mismatched" * i: v for i, r in enumerate(results) for k, v in r.items()}
        return named | {"score": float(np.mean([r["score"] for r in results]))}
    return score


def load_trained(directory, task):
    """A model that train or search wrote; refused where its labels are not those of the data."""
    labels = BertConfig.load(directory).labels
    if labels != task.labels:
        raise UserError(f"{directory} knows the labels {labels}, but the data has {task.labels}")
    return load_bert(directory, task.num_labels)


def trained_length(directory):
    """Tokens per example that a model was trained with, from its run.json; else its positions."""
    path, most = Path(directory) / "run.json", BertConfig.load(directory).max_position_embeddings
    length = read_json(path).get("max_length") if path.exists() else most
    if type(length) is not int or length < 3:
        raise UserError(f"{path} was not written by train or search: it has no valid max_length")
    return min(length, most)


def predict(model, directory, examples, autocast, batch_size):
    """For every Example of an iterable, as soon as its batch is computed, yield the label's name
    and {name: probability}; of a regression, the score and {}."""
    device, names = model.classifier.weight.device, model.config.labels
    names = names or tuple(map(str, range(model.num_labels)))
    if len(names) != model.num_labels:
        raise UserError(f"{directory} names {len(names)} labels, but has {model.num_labels} logits")
    encode_examples, examples = encoder(directory), iter(examples)
    while batch := list(itertools.islice(examples, batch_size)):
        encoded = encode_examples([example._replace(label=0) for example in batch])
        *inputs, _ = collate(encoded, range(len(batch)), device)
        with torch.inference_mode(), autocast():
            logits = model(*inputs).float().cpu()                   # [B, num_labels]
        for row in logits:
            if model.num_labels == 1:
                yield row.item(), {}
            else:
                yield names[row.argmax()], dict(zip(names, row.softmax(0).tolist()))


def read_texts(file, name):
    """Yield an Example per line of a binary file: one text, or two with a tab between them."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 2), b""), 1):
        where = f"{name}, line {number}"
        if len(line.rstrip(b"\r\n")) > LONGEST_LINE:
            raise UserError(f"{where}: more than {LONGEST_LINE:,} bytes")
        try:
            one, *two = line.decode().rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8") from None
        if len(two) > 1:
            raise UserError(f"{where}: {len(two)} tabs; a line is one text, or two with a tab "
                            "between them")
        yield Example(one, *(two or [None]), 0)


def submit(model, directory, task, source, out, overwrite, autocast):
    """Write the files that gluebenchmark.com takes for a task (MNLI: two) into `out`, from the
    test.tsv in `source`; `model` is that of `directory`."""
    names = {"MNLI": {"test_matched.tsv": "MNLI-m.tsv", "test_mismatched.tsv": "MNLI-mm.tsv"}}
    files = {Path(out) / name: read_test(Path(source) / test)
             for test, name in names.get(task, {"test.tsv": f"{task}.tsv"}).items()}
    if there := [path for path in files if path.exists() and not overwrite]:
        raise UserError(f"{there[0]} exists: choose another --out, or replace it with --overwrite")
    for path, examples in files.items():
        found = predict(model, directory, examples, autocast, 32)
        rows = ["index\tprediction"] + [
            f"{example.label}\t" + (label if shares else f"{min(5, max(0, label)):.3f}")
            for example, (label, shares) in zip(examples, found)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, ("\n".join(rows) + "\n").encode())
        print(f"wrote {path}: {len(examples)} predictions")


# --------------------------------------------------------------------------------------------------
# Metrics, on two sequences of n labels and n predictions; as fractions
# --------------------------------------------------------------------------------------------------

def accuracy(labels, predictions):
    """The share of predictions that equal their label."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def f1(labels, predictions):
    """The harmonic mean of precision and recall of label 1; 0 where nothing is or is called 1."""
    labels, predictions = np.asarray(labels) == 1, np.asarray(predictions) == 1
    positives = labels.sum() + predictions.sum()
    return float(2 * (labels & predictions).sum() / positives) if positives else 0.0


def matthews_corrcoef(labels, predictions):
    """The correlation of two binary sequences, in [-1, 1]; 0 where one of them is constant."""
    return pearson(np.asarray(labels) == 1, np.asarray(predictions) == 1)


def pearson(labels, predictions):
    """The linear correlation, in [-1, 1]; 0 where one side is constant."""
    x, y = (np.asarray(v, np.float64) for v in (labels, predictions))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(labels, predictions):
    """The linear correlation of the ranks; ties share their mean rank."""
    def ranks(values):
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[group]
    return pearson(ranks(labels), ranks(predictions))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews_corrcoef,
           "pearson": pearson, "spearman": spearman}


def scores(metric, labels, logits):
    """Every metric of a task in %, and ACC(m) of Eq. 7 as "score": the mean of those in `metric`.

    labels [n], logits [n, num_labels] (numpy). F1 and Matthews are given for two labels.
    """
    if "pearson" in metric:
        names, predictions = ["pearson", "spearman"], logits[:, 0]
    else:
        names, predictions = ["accuracy"], logits.argmax(1)
        names += ["f1", "matthews"] if logits.shape[1] == 2 else []
    values = {name: 100 * METRICS[name](labels, predictions) for name in names}
    return {"score": float(np.mean([values[name] for name in metric.split("+")])), **values}
