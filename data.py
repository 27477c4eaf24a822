"""The task: read a data set, hold out a part of train, make batches, evaluate.

    load_task          train.tsv and dev.tsv -> a Task with lists of Example
    split_holdout      the examples of train -> examples to train on, hold-out set
    encode             [Example] -> [Encoded], which have token ids
    batches, collate   [Encoded] -> padded batches [B, T]
    make_evaluator     a model and [Encoded] -> a function that evaluates one architecture

The official files of every GLUE task load as they are. So does a file of your own with
the columns `sentence`, `label` or `sentence1`, `sentence2`, `label`. For regression the
last column is `score`, not `label`. A file is UTF-8 text with one example per line and
tabs between the columns. Quotes are ordinary characters. A row that does not fit is an
error that names the file and the line.

Letters in shapes: B batch, T tokens, C hidden size.
"""

import itertools
import math
import os
import re
import unicodedata
from array import array
from collections import Counter, namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Import model before torch. It sets OMP_WAIT_POLICY, which torch reads on import.
from model import (archs_to_tensor, BertConfig, capture_graph, forward_many, is_label,
                   load_bert, print_line, read_json, regular_file, user_errors_for,
                   UserError)

import numpy as np
import tokenizers
import torch

# ==================================================================================================
# Part I: the task
# ==================================================================================================

# One row of a file. sentence2 is None if the data has no pairs of texts. label is an
# index into Task.labels, or a float for regression.
Example = namedtuple("Example", "sentence1 sentence2 label")

# An Example after tokenizing. input_ids and token_type_ids are arrays of equal length.
Encoded = namedtuple("Encoded", "input_ids token_type_ids label")

# The format of a file: the task's name, the columns of the two sentences and of the
# label, the metric, and the names of the labels.
Format = namedtuple("Format", "name sentence1 sentence2 label metric labels")

# A file has the first of these formats whose columns are all in its header. If the name
# is None, the task is named after its directory. If the labels are None, they are read
# from train.tsv. They are () for regression. The last four formats are for your files.
# STS-B, RTE and SST-2 also use three of these four.
FORMATS = [
    Format("MRPC", "#1 String", "#2 String", "Quality", "accuracy+f1", ("0", "1")),
    Format("QQP", "question1", "question2", "is_duplicate", "accuracy", ("0", "1")),
    Format("MNLI", "sentence1", "sentence2", "gold_label", "accuracy",
           ("contradiction", "entailment", "neutral")),
    Format("QNLI", "question", "sentence", "label", "accuracy",
           ("entailment", "not_entailment")),
    Format(None, "sentence1", "sentence2", "score", "pearson+spearman", ()),
    Format(None, "sentence1", "sentence2", "label", "accuracy", None),
    Format(None, "sentence", None, "label", "accuracy", None),
    Format(None, "sentence", None, "score", "pearson+spearman", ()),
]

# CoLA has no header, so we name its four columns.
COLA = Format("CoLA", "sentence", None, "label", "matthews", ("0", "1"))
COLA_COLUMNS = ["source", "label", "mark", "sentence"]

# A line with more bytes than this is an error. The file is probably not a TSV file.
LONGEST_LINE = 10**6


@dataclass
class Task:
    """A data set, as `load_task` returns it."""
    name: str
    train: list
    # MNLI has two dev sets. This is the matched one.
    dev: list
    # The names of the labels, or () for regression. Example.label is an index into them.
    labels: tuple
    # ACC(m) is the mean of these metrics. Their names are joined by "+".
    metric: str
    # Only MNLI has a second dev set.
    dev_mismatched: list | None = None

    @property
    def num_labels(self):
        """Return the number of logits: one per label, or just one for regression."""
        return len(self.labels) or 1

    @property
    def pairs(self):
        """Return whether the examples are pairs of texts."""
        return self.train[0].sentence2 is not None

    @property
    def devs(self):
        """Return the list of dev sets, which has two entries for MNLI."""
        return [self.dev] + ([self.dev_mismatched] if self.dev_mismatched else [])


# ---- Files ---------------------------------------------------------------------------------------

def load_task(directory, metric=None):
    """Read the data set in `directory` and return a Task.

    The files are train.tsv and dev.tsv. MNLI has dev_matched.tsv and dev_mismatched.tsv
    instead of dev.tsv. metric: Task.metric, by default that of the format. Raises
    UserError if a file is missing or malformed, or if there is nothing to learn.
    """
    directory = Path(directory)
    train_path = directory / "train.tsv"
    train_format, train, labels = read_examples(train_path)
    if len({example.label for example in train}) < 2:
        raise UserError(f"{train_path} has only one label, so there is nothing to "
                        "learn: add rows with another label")

    def read_dev(name):
        """Read a dev set, which must have the columns of train.tsv."""
        dev_format, examples, _ = read_examples(directory / name, labels)
        if dev_format != train_format:
            raise UserError(f"{directory / name} has other columns than train.tsv: "
                            "give both files the same header")
        return examples

    if train_format.name == "MNLI":
        dev = read_dev("dev_matched.tsv")
        dev_mismatched = read_dev("dev_mismatched.tsv")
    else:
        dev = read_dev("dev.tsv")
        dev_mismatched = None
    return Task(name=train_format.name or os.path.basename(os.path.realpath(directory)),
                train=train, dev=dev, dev_mismatched=dev_mismatched,
                labels=labels, metric=check_metric(metric, labels) or train_format.metric)


def read_examples(path, labels=None):
    """Read one TSV file and return its Format, its examples, and the label names.

    labels: the allowed names. By default they are the format's. If it has none, they are
    all names in the file, sorted. Raises UserError if a label is not allowed.
    """
    file_format, rows = read_table(path)
    warn_of_csv_quotes(path, rows)
    is_regression = file_format.labels == ()
    labels = labels or file_format.labels
    if labels is None:
        labels = tuple(sorted({text for *_, text in rows if is_label(text)}))

    if is_regression:
        legal = "a number such as 4.5 that float32 can hold"
    else:
        legal = f"one of {', '.join(labels)}" if labels else "a printable name"

    examples = []
    for line, sentence1, sentence2, text in rows:
        try:
            label = read_score(text) if is_regression else labels.index(text)
        except ValueError:
            label = math.nan
        if not math.isfinite(label):
            raise UserError(f"{path}, line {line}: label {text[:40]!r} is not {legal}: "
                            "correct or remove this row")
        examples.append(Example(sentence1, sentence2, label))
    return file_format, examples, labels


def read_table(path, test=False):
    """Return the Format of a TSV file, and a list of (line, sentence1, sentence2, label).

    line is the line's number in the file. sentence2 is None if the format has no pairs.
    In a test file, label is the value of the column `index`, `id` or `idx`, or None if
    there is no column of that name. Raises UserError if a row has too few or too many
    columns, or is a second header.
    """
    rows = read_rows(Path(path))
    # CoLA has no header, so we recognise it by the shape of its first row.
    if len(rows[0]) == 4 and rows[0][1] in COLA.labels and rows[0][2] in ("", "*"):
        file_format, columns, first = COLA, COLA_COLUMNS, 0
    else:
        columns, first = rows[0], 1
        # Part II recognises the files of the datasets library, and names their labels.
        file_format = (find_library_format(path, rows, test)
                       or find_format(path, columns, test))

    last_column = index_column(columns) if test else file_format.label
    table = []
    n_incomplete = 0
    for line, row in enumerate(rows[first:], first + 1):
        if is_header(row, columns):
            raise UserError(f"{path}, line {line}: a second header: remove this row")
        if len(row) == len(columns):
            cells = dict(zip(columns, row))
            table.append((line, cells[file_format.sentence1],
                          cells.get(file_format.sentence2), cells.get(last_column)))
        elif file_format.name == "QQP" and len(row) < len(columns) and not test:
            # The official train.tsv of QQP has a few incomplete rows.
            n_incomplete += 1
        else:
            raise UserError(f"{path}, line {line}: {len(row)} columns, expected "
                            f"{len(columns)}: separate the columns by tabs")
    if not table:
        raise UserError(f"{path} has no rows: add examples below the header")
    if n_incomplete:
        print_line(f"{path}: ignored {n_incomplete} incomplete row(s)")
    return file_format, table


def find_format(path, columns, test):
    """Return the first Format whose columns are all in a file's header.

    A test file needs no column for the label. Raises UserError if the header fits no
    format, or if it is ambiguous.
    """
    for name1, name2 in (("label", "score"), ("sentence", "sentence1")):
        if name1 in columns and name2 in columns and not test:
            raise UserError(f"{path} has a column {name1} and a column {name2}: "
                            "leave one out")
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: the header {columns[:8]} has two columns of one "
                        "name: rename one of them")
    for file_format in FORMATS:
        needed = {file_format.sentence1, file_format.sentence2} - {None}
        if not test:
            needed.add(file_format.label)
        if needed <= set(columns):
            return file_format
    raise UserError(f"{path}: the header {columns[:8]} fits no GLUE format: name the "
                    "columns of your own file sentence, label or sentence1, sentence2, "
                    "label (score instead of label for regression)")


def read_rows(path):
    """Return the rows of a TSV file as lists of strings.

    Lines end in LF or CRLF. A byte-order mark is ignored. Empty lines at the end are
    ignored, unless the file has only one column. Raises UserError if the file is missing,
    empty, or not a text file.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: {hint_for_missing_file(path)}")
    byte_order_mark = b"\xef\xbb\xbf"
    content = regular_file(path).read_bytes().removeprefix(byte_order_mark)
    # In a file with one column, an empty line is a row with an empty text.
    has_one_column = b"\t" not in content.partition(b"\n")[0]
    content = content.removesuffix(b"\n") if has_one_column else content.rstrip(b"\r\n")
    if not content.strip(b"\r\n"):
        raise UserError(f"{path} is empty: write a header and examples into it")
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        if b"\0" in line:
            raise UserError(f"{where}: a NUL byte: save the file as UTF-8 text")
        if len(line) > LONGEST_LINE:
            raise UserError(f"{where}: more than {LONGEST_LINE:,} bytes: "
                            "write one example per line")
        try:
            rows.append(line.decode().removesuffix("\r").split("\t"))
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8: save the file as UTF-8 text") from None
    return rows


# ---- The hold-out set ----------------------------------------------------------------------------

def split_holdout(examples, fraction, seed):
    """Split the examples of train into (training set, hold-out set), both in their old order.

    `fraction` of the examples are held out, at least one unless `fraction` is 0. Labels
    and scores have nearly the same distribution in both parts. The same seed always gives
    the same split.
    """
    size = 0
    if fraction:
        size = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    rng = np.random.default_rng(seed)
    labels = np.array([example.label for example in examples])
    if size == 0:
        chosen = set()
    elif labels.dtype == np.float64:
        chosen = set(sample_by_score(labels, size, rng))
    else:
        chosen = set(sample_by_label(labels, size, rng))
    train_set = [example for i, example in enumerate(examples) if i not in chosen]
    holdout_set = [example for i, example in enumerate(examples) if i in chosen]
    return train_set, holdout_set


def sample_by_label(labels, size, rng):
    """Sample `size` indices in which every label has its share.

    The shares are rounded to whole numbers by the method of largest remainders.
    """
    exact = size * np.bincount(labels) / len(labels)
    # First round down. Then add one to the labels that lost most, until the sum is `size`.
    counts = exact.astype(int)
    by_remainder = (counts - exact).argsort(kind="stable")
    counts[by_remainder[:size - counts.sum()]] += 1
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        chosen.extend(rng.permutation(members)[:count].tolist())
    return chosen


def sample_by_score(scores, size, rng):
    """Sample `size` indices, one from each of `size` groups of similar scores."""
    groups = np.array_split(scores.argsort(kind="stable"), size)
    return [int(rng.choice(group)) for group in groups]


# ---- Tokenizing ----------------------------------------------------------------------------------

def make_encoder(directory, max_length=None):
    """Return a function [Example] -> [Encoded] with the tokenizer of a BERT directory.

    An example becomes [CLS] sentence1 [SEP], or [CLS] sentence1 [SEP] sentence2 [SEP]
    with token type 1 for sentence2 and its [SEP]. Long examples are cut to `max_length`
    tokens, the longer sentence first. The default is the model's limit in training.
    """
    # Part II loads the tokenizer, and the limit that the model was trained with.
    tokenizer = load_tokenizer(directory)
    config = BertConfig.load(directory)
    max_length = max_length or max_train_length(directory)
    tokenizer.enable_truncation(max_length, strategy="longest_first")

    def encode_examples(examples):
        """Encode a list of examples."""
        texts = []
        for example in examples:
            if example.sentence2 is None:
                texts.append(example.sentence1)
            elif config.type_vocab_size < 2:
                raise UserError(f"{directory}: the data has pairs of texts, but this "
                                "BERT has only one token type: use a BERT with two")
            else:
                texts.append((example.sentence1, example.sentence2))
        # Part II tokenizes in portions. Arrays of 4-byte numbers need less memory than lists.
        return [Encoded(array("i", encoding.ids), array("i", encoding.type_ids), example.label)
                for encoding, example in zip(tokenize(tokenizer, texts), examples)]

    return encode_examples


def encode(examples, directory, max_length=None):
    """Encode a list of examples with the encoder that `make_encoder` returns."""
    return make_encoder(directory, max_length)(examples)


# ---- Batches -------------------------------------------------------------------------------------

def batches(encoded, batch_size, seed, first=0):
    """Yield the batches of training endlessly, as lists of indices, from step `first`.

    Every epoch visits each example once. Its order depends only on the seed and on the
    epoch's number. So a run that resumes at step `first` gets the batches that it would
    have got without the interruption.
    """
    bucket_size = 50 * batch_size
    first_epoch, n_skipped = divmod(first, math.ceil(len(encoded) / batch_size))
    for epoch in itertools.count(first_epoch):
        rng = np.random.default_rng([seed, epoch])

        # Shuffle the examples. Then sort them by length within buckets of 50 batches,
        # so that the examples of a batch have similar lengths and need little padding.
        order = rng.permutation(len(encoded)).tolist()
        epoch_batches = []
        for start in range(0, len(order), bucket_size):
            bucket = order[start:start + bucket_size]
            bucket.sort(key=lambda i: -len(encoded[i].input_ids))
            for i in range(0, len(bucket), batch_size):
                epoch_batches.append(bucket[i:i + batch_size])

        # Shuffle the batches, or an epoch would begin with the longest examples.
        for n in rng.permutation(len(epoch_batches))[n_skipped:]:
            yield epoch_batches[n]
        # Only the first epoch can begin in the middle.
        n_skipped = 0


def token_batches(encoded, max_tokens):
    """Return the batches of an evaluation as lists of indices, longest examples first.

    A batch has at most `max_tokens` tokens after it is padded to its longest example. An
    example with more tokens than that is a batch by itself.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))
    index_lists = []
    start = 0
    while start < len(order):
        longest = len(encoded[order[start]].input_ids)
        size = max(1, max_tokens // longest)
        index_lists.append(order[start:start + size])
        start += size
    return index_lists


def collate(encoded, indices, device="cpu", max_positions=10**6):
    """Return one padded batch: input_ids, token_type_ids, attention_mask and labels.

    The first two are int64 [B, T], the mask is bool [B, T], and the labels are int64 [B],
    or float32 for regression.

    T is the longest length, rounded up to a multiple of 8 (32 on a GPU), but at most
    `max_positions`, the positions of the model. Rounding gives few different shapes. That
    saves time, because CPU kernels and GPU graphs are cached by shape.
    """
    rows = [encoded[i] for i in indices]
    longest = max(len(row.input_ids) for row in rows)
    multiple = 8 if torch.device(device).type == "cpu" else 32
    padded = math.ceil(longest / multiple) * multiple
    n_tokens = max(longest, min(max_positions, padded))

    # The mask is False on padding, so the ids there do not matter.
    shape = (len(rows), n_tokens)                                        # [B, T]
    input_ids = np.zeros(shape, np.int64)
    token_type_ids = np.zeros(shape, np.int64)
    attention_mask = np.zeros(shape, bool)
    for b, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[b, :length] = row.input_ids
        token_type_ids[b, :length] = row.token_type_ids
        attention_mask[b, :length] = True
    labels = [row.label for row in rows]                                 # [B]
    return tuple(torch.as_tensor(values, device=device)
                 for values in (input_ids, token_type_ids, attention_mask, labels))


# ---- Evaluating an architecture ------------------------------------------------------------------

def make_evaluator(model, parts, metric, device, autocast):
    """Return a function evaluate_arch(arch) -> {metric: %}.

    parts: the data sets to evaluate on, each a list of Encoded. MNLI has two dev sets. The
    metric names of the second end in "_mismatched". "score" is ACC(m), the mean over the
    data sets. Raises UserError if a logit is NaN or infinite.
    """
    # Small batches stay in a CPU's caches. A GPU needs large ones to be busy.
    max_tokens = 2**11 if device.type == "cpu" else 2**15
    max_positions = model.config.max_position_embeddings

    # The batches are made once and stay on the device.
    dev_sets = []
    all_batches = []
    for suffix, encoded in zip(("", "_mismatched"), parts):
        index_lists = token_batches(encoded, max_tokens)
        set_batches = [collate(encoded, indices, device, max_positions)
                       for indices in index_lists]
        # collate rounds regression scores to float32, so the metrics use the exact ones.
        labels = np.array([encoded[i].label for i in itertools.chain(*index_lists)])
        dev_sets.append((suffix, set_batches, labels))
        all_batches += set_batches

    # The plain form of this line is `forward = model.eval()`. Part II gives us a function
    # that returns the same logits faster.
    forward = faster_forward(model, all_batches, device, autocast)

    def evaluate_arch(arch):
        """Return {metric: %} of one architecture."""
        results = {}
        scores = []
        for suffix, set_batches, labels in dev_sets:
            with torch.inference_mode(), autocast():
                logits = [forward(*inputs, arch).float() for *inputs, _ in set_batches]
            logits = check_finite(torch.cat(logits).cpu())               # [n, num_labels]
            values = compute_metrics(metric, labels, logits.numpy())
            scores.append(values["score"])
            for name, value in values.items():
                results[name + suffix] = value
        results["score"] = sum(scores) / len(scores)
        return results

    return evaluate_arch


# ---- Metrics -------------------------------------------------------------------------------------
# The first five functions compare n labels with n predictions. The best is 1, not 100%.

def accuracy(labels, predictions):
    """Return the share of predictions that equal their label."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def f1(labels, predictions):
    """Return the harmonic mean of precision and recall of label 1.

    It is 0 if neither a label nor a prediction is 1.

    >>> f1([1, 1, 0, 0], [1, 0, 1, 0])      # precision 1/2, recall 1/2
    0.5
    """
    labels = np.asarray(labels) == 1
    predictions = np.asarray(predictions) == 1
    n_positive = labels.sum() + predictions.sum()
    return float(2 * (labels & predictions).sum() / n_positive) if n_positive else 0.0


def matthews_corrcoef(labels, predictions):
    """Return the correlation of binary sequences, in [-1, 1], or 0 if one is constant."""
    return pearson(np.asarray(labels) == 1, np.asarray(predictions) == 1)


def pearson(labels, predictions):
    """Return the linear correlation, in [-1, 1], or 0 if one side is constant."""
    x = np.asarray(labels, np.float64)
    y = np.asarray(predictions, np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(labels, predictions):
    """Return the linear correlation of the ranks. Equal values share their mean rank.

    >>> spearman([1, 2, 3, 4], [1, 10, 1000, 1001])
    1.0
    """
    def ranks(values):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        # Equal values take consecutive ranks. Their mean is the last minus half the range.
        last_ranks = np.cumsum(counts)
        return (last_ranks - (counts - 1) / 2)[group]

    return pearson(ranks(labels), ranks(predictions))


def compute_metrics(metric, labels, logits):
    """Return every metric of a task in %, and ACC(m) of Eq. 7 as "score".

    metric: names joined by "+", for example "accuracy+f1". ACC(m) is the mean of these
    metrics. labels [n] and logits [n, num_labels] are numpy arrays. F1 and Matthews are
    computed only for two labels. Raises UserError if the score is NaN.
    """
    if logits.shape[1] == 1:
        predictions = logits[:, 0]                                       # [n]
        functions = {"pearson": pearson, "spearman": spearman}
    else:
        predictions = logits.argmax(1)                                   # [n]
        functions = {"accuracy": accuracy}
        if logits.shape[1] == 2:
            functions |= {"f1": f1, "matthews": matthews_corrcoef}
    values = {}
    for name, function in functions.items():
        values[name] = 100 * function(labels, predictions)
    score = np.mean([values[name] for name in metric.split("+")])
    if not np.isfinite(score):
        raise UserError(f"{metric} is {score}: correct the labels that are not finite")
    return {"score": float(score), **values}


# ==================================================================================================
# Part II: the machinery. You can stop here on a first reading.
# ==================================================================================================

# ---- Variants of the tokenizer -------------------------------------------------------------------

# These classes give token type 0 to both texts, unless model_input_names asks for types.
ONE_TYPE = ["DistilBertTokenizer", "DistilBertTokenizerFast", "TokenizersBackend"]

# If tokenizer_config.json has one of these fields, its value must be in the list.
SUPPORTED = {
    "tokenizer_class": ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast",
                        *ONE_TYPE],
    "word_tokenizer_type": ["basic"],
    "subword_tokenizer_type": ["wordpiece"],
    "do_lower_case": [True, False],
    "strip_accents": [True, False],
    "tokenize_chinese_chars": [True, False],
    "do_basic_tokenize": [True],
    "split_special_tokens": [False],
    "truncation_side": ["right"],
    "unk_token": ["[UNK]"],
    "cls_token": ["[CLS]"],
    "sep_token": ["[SEP]"],
}

# Fields of tokenizer_config.json, and their names in the normalizer of tokenizers.
NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def load_tokenizer(directory):
    """Load the tokenizer of a BERT directory.

    It is read from tokenizer.json. Without that file it is made from vocab.txt, with the
    casing and the added tokens that the files beside it name. Raises UserError if a file
    is damaged, if a variant is not supported, or if the ids do not fit the model.
    """
    directory = Path(directory)
    config = read_tokenizer_config(directory)
    casing = {library_name: config[name] for name, library_name in NORMALIZER.items()
              if config.get(name) is not None}
    has_json = (directory / "tokenizer.json").exists()
    path = directory / ("tokenizer.json" if has_json else "vocab.txt")
    with user_errors_for(path):
        if has_json:
            tokenizer = read_tokenizer_json(regular_file(path), casing)
        else:
            tokenizer = word_pieces(regular_file(path), casing)
        add_tokens(tokenizer, directory, only_check=has_json)
        vocabulary = tokenizer.get_vocab()
        for token in ("[UNK]", "[CLS]", "[SEP]"):
            if token not in vocabulary:
                raise UserError(f"{path} has no {token}, so it is not the vocabulary of a "
                                "BERT: use another model")
        inputs = config.get("model_input_names") or []
        has_one_type = inputs or config.get("tokenizer_class") in ONE_TYPE
        if "token_type_ids" not in inputs and has_one_type:
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:0 [SEP]:0",
                special_tokens=[("[CLS]", vocabulary["[CLS]"]),
                                ("[SEP]", vocabulary["[SEP]"])])
        # Try a character that no vocabulary has. This fails if [UNK] does not work.
        pair = tokenizer.encode("\U00012345", "a")
        has_both_ends = pair.tokens[0] == "[CLS]" and pair.tokens[-1] == "[SEP]"
        if not has_both_ends or max(pair.type_ids) > 1:
            raise UserError(f"{path} does not give [CLS] text [SEP] text [SEP], as a BERT "
                            "needs it: use another model")
    # SentencePiece puts this character at the beginning of a word. WordPiece does not.
    n_marked = sum(word.startswith("\u2581") for word in vocabulary)
    if n_marked > len(vocabulary) / 10:
        raise UserError(f"{path} is not the vocabulary of a BERT's WordPiece: use another "
                        "model")
    max_id = max(vocabulary.values())
    vocab_size = BertConfig.load(directory).vocab_size
    if max_id >= vocab_size:
        raise UserError(f"{path} has the id {max_id}, but config.json's vocab_size is "
                        f"{vocab_size}: take both files from the same model")
    return tokenizer


def read_tokenizer_config(directory):
    """Return the fields of tokenizer_config.json, or {} without that file.

    Raises UserError if a field has a value that is not supported.
    """
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    for name, supported in SUPPORTED.items():
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value not in [*supported, None]:
            raise UserError(f"{path}: {name} is {value!r}, but must be one of {supported}")
    return config


def read_tokenizer_json(path, casing):
    """Read a tokenizer.json.

    casing: the options of the normalizer that tokenizer_config.json sets.
    Raises UserError if they contradict tokenizer.json.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for name, value in casing.items():
        actual = getattr(tokenizer.normalizer, name, value)
        if actual != value:
            raise UserError(f"{path} has {name} {actual}, but tokenizer_config.json has "
                            f"{value}: take both files from the same model")
    return tokenizer


def word_pieces(path, casing):
    """Return the WordPiece tokenizer of a vocab.txt.

    casing: the options of the normalizer that tokenizer_config.json sets.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist, and there is no tokenizer.json: "
                        "copy one of them from the model")
    words = path.read_text("utf-8-sig").rstrip("\n").split("\n")
    # By default a vocabulary with capitals is a cased one. [CLS] and <s> do not count.
    ordinary_words = [word for word in words if word[:1] not in ("[", "<")]
    n_capitals = sum(word != word.lower() for word in ordinary_words)
    casing = {"lowercase": n_capitals < len(words) / 100, **casing}
    ids = {word: i for i, word in enumerate(words)}
    return tokenizers.BertWordPieceTokenizer(ids, **casing)


def add_tokens(tokenizer, directory, only_check):
    """Add the tokens that the files beside a vocabulary name, in the order of ids.

    only_check: the tokenizer already has the tokens, so only check their ids.
    Raises UserError if a token does not have the id that its file names.
    """
    tokens, ids = read_added_tokens(directory)
    # The tokens without an id come last.
    for content in sorted(tokens, key=lambda content: ids.get(content, 10**9)):
        if not only_check:
            tokenizer.add_tokens([tokens[content]])
        actual = tokenizer.token_to_id(content)
        expected = ids.get(content, actual)
        if actual is None or actual != expected:
            raise UserError(f"{directory}: the added token {content!r} has the id {actual}, "
                            f"but the files name {expected}: take all files from one model")


def read_added_tokens(directory):
    """Return {content: AddedToken} and {content: id} of the tokens that files add.

    Not every file names ids, so the second dict can have fewer entries.
    """
    names = ["tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"]
    tokens, ids = {}, {}
    for name in names:
        path = directory / name
        with user_errors_for(path):
            fields = read_json(path) if path.exists() else {}
            for i, token in fields.get("added_tokens_decoder", {}).items():
                tokens[token["content"]] = tokenizers.AddedToken(**token)
                ids[token["content"]] = int(i)
            special_tokens = (fields.get("additional_special_tokens") or []) + (
                fields.get("extra_special_tokens") or [])
            for token in special_tokens:
                content = token if isinstance(token, str) else token["content"]
                tokens.setdefault(content, tokenizers.AddedToken(content, special=True))
            # This file has no other fields than tokens and their ids.
            if name == "added_tokens.json":
                for content, i in fields.items():
                    tokens.setdefault(content, tokenizers.AddedToken(content))
                    ids[content] = int(i)
    return tokens, ids


def tokenize(tokenizer, texts):
    """Yield the encoding of every text or pair of texts, as the tokenizers library gives it.

    An encoding takes some kilobytes, so only a thousand of them are in memory together.
    """
    for start in range(0, len(texts), 1000):
        yield from tokenizer.encode_batch(texts[start:start + 1000])


def max_train_length(directory):
    """Return the limit on tokens per example that a model was trained with.

    It is in run.json, or for an exported model in tokenizer_config.json. For any other
    model the limit is the number of positions.
    """
    max_positions = BertConfig.load(directory).max_position_embeddings
    fields = {"run.json": "max_length", "tokenizer_config.json": "model_max_length"}
    for name, field in fields.items():
        path = Path(directory) / name
        length = read_json(path).get(field) if path.exists() else None
        if type(length) in (int, float) and length >= 3:
            # transformers may write 1e30 for "no limit".
            return int(min(length, max_positions))
    return max_positions


# ---- GLUE's tasks in the files of the datasets library -------------------------------------------

# The datasets library saves GLUE's tasks with these columns, and a column `idx`. The columns
# of the first three tasks are unique. The name of the directory identifies the other five.
LIBRARY_FORMATS = [
    Format("QQP", "question1", "question2", "label", "accuracy", ("0", "1")),
    Format("MNLI", "premise", "hypothesis", "label", "accuracy",
           ("contradiction", "entailment", "neutral")),
    Format("QNLI", "question", "sentence", "label", "accuracy",
           ("entailment", "not_entailment")),
    COLA,
    Format("SST-2", "sentence", None, "label", "accuracy", ("0", "1")),
    Format("MRPC", "sentence1", "sentence2", "label", "accuracy+f1", ("0", "1")),
    Format("RTE", "sentence1", "sentence2", "label", "accuracy",
           ("entailment", "not_entailment")),
    Format("STS-B", "sentence1", "sentence2", "label", "pearson+spearman", ()),
]

# The datasets library writes a label as a number. For these tasks the number is a position
# in the tuple. For the other tasks it is the label's name.
LIBRARY_LABELS = {
    "MNLI": ("entailment", "neutral", "contradiction"),
    "QNLI": ("entailment", "not_entailment"),
    "RTE": ("entailment", "not_entailment"),
}


def find_library_format(path, rows, test):
    """Return the Format of a file of the datasets library, or None for any other file.

    rows: the rows of the file. The labels in them are replaced by their names. A test file
    needs no column for the label.
    """
    path, columns = Path(path), rows[0]
    first_row = rows[1] if len(rows) > 1 else []
    if len(set(columns)) < len(columns) or {"sentence", "sentence1"} <= set(columns):
        # find_format refuses this header.
        return None
    for library_format in LIBRARY_FORMATS:
        name, sentence1, sentence2, *_ = library_format
        needed = {sentence1, sentence2, "idx", None if test else "label"} - {None}
        if not needed <= set(columns):
            continue
        if sentence1 in ("sentence", "sentence1"):
            # Other data may have these columns, so we look at the name and at a label.
            label = dict(zip(columns, first_row)).get("label", "")
            number = SCORE if name == "STS-B" else re.compile("-?[0-9]+")
            if glue_task_of(path.parent) != name or not (test or number.fullmatch(label)):
                continue
        names = LIBRARY_LABELS.get(name, ())
        if "label" in columns:
            name_labels(rows, columns.index("label"), names)
        # One line is enough for the two or three files of a data set.
        if path.name == "train.tsv" and not test:
            meanings = ", ".join(f"{i} is {label}" for i, label in enumerate(names))
            print_line(f"{path}: read as {name} from the datasets library"
                       + (f": {meanings}" if names else ""))
        return library_format
    return None


def name_labels(rows, column, names):
    """Replace the number of a label by its name, in one column of all rows."""
    names_by_number = {str(i): name for i, name in enumerate(names)}
    for row in rows[1:]:
        if column < len(row):
            row[column] = names_by_number.get(row[column], row[column])


def glue_task_of(directory):
    """Return the name of the GLUE task that a directory is named after, or None.

    Case and hyphens do not matter, because the datasets library writes sst2 and stsb. If
    the directory is a link, its target's name comes first.
    """
    for path in (os.path.realpath(directory), os.path.abspath(directory)):
        name = glue_task(os.path.basename(path))
        if name:
            return name
    return None


def glue_task(name):
    """Return the name of a task as GLUE spells it, or None if it is not a task of GLUE."""
    for library_format in LIBRARY_FORMATS:
        spelling = library_format.name
        if name.lower().replace("-", "") == spelling.lower().replace("-", ""):
            return spelling
    return None


def index_column(columns):
    """Return the column of a test file that numbers its rows, or None."""
    for name in ("index", "id", "idx"):
        if name in columns:
            return name
    return None


# ---- Rows, numbers and quotes that are mistakes --------------------------------------------------

# A score in ASCII digits. Python's float would also take 4_5, infinity and other digits.
SCORE = re.compile(r" *[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)? *")

# A text as a CSV writer quotes it: quotes around it, and every quote in it doubled.
CSV_TEXT = re.compile(r'"([^"]|"")*"')


def is_header(row, columns):
    """Return whether a row repeats the names of the columns, in any order or case."""
    names = {column.casefold() for column in columns}
    # A file that was appended to another may begin with a byte-order mark.
    is_name = (cell.strip("\ufeff ").casefold() in names for cell in row)
    return len(columns) > 1 and all(is_name) and len(set(row)) == len(columns)


def read_score(text):
    """Return a score as a float.

    Raises ValueError if the text is not a number, or if float32 cannot hold it.
    """
    if not SCORE.fullmatch(text):
        raise ValueError(text)
    score = float(text)
    # The training computes in float32, where 1e39 is infinite and 1e-50 is 0.
    limits = np.finfo(np.float32)
    if score and not float(limits.tiny) <= abs(score) <= float(limits.max):
        raise ValueError(text)
    return score


def warn_of_csv_quotes(path, rows):
    """Print a warning if a CSV writer has put the texts of a file in quotes.

    rows: the rows of the file, as `read_table` returns them. In GLUE a few texts are in
    quotes, too. So we warn only if a text in quotes has doubled quotes inside, or if most of
    the texts that contain a quote look like CSV. The warning names the first line.
    """
    n_quoted = 0
    in_csv_form = []
    with_doubled_quotes = []
    for line, *texts, _ in rows:
        for text in texts:
            if not text or '"' not in text:
                continue
            n_quoted += 1
            is_enclosed = CSV_TEXT.fullmatch(text)
            if is_enclosed or '""' in text:
                in_csv_form.append(line)
            if is_enclosed and '""' in text[1:-1]:
                with_doubled_quotes.append(line)
    if with_doubled_quotes or len(in_csv_form) > n_quoted / 2:
        line = (with_doubled_quotes or in_csv_form)[0]
        print_line(f"WARNING: {path}, line {line}: a text has quotes as in a CSV file: save "
                   "the file without quoting, because quotes are ordinary characters here")


# ---- The summary of a data set, and likely mistakes in it ----------------------------------------

# A label that is probably a score.
NUMBER = re.compile(r"[-+]?\d*[.,]?\d+(e[-+]?\d+)?%?", re.IGNORECASE)


def summarize_task(task, train_set, holdout_set, encoded, bert, max_length):
    """Return lines that summarize a data set and warn of likely mistakes.

    train_set, holdout_set: the two parts of train. encoded: `train_set` after tokenizing
    with the tokenizer of the directory `bert`, cut to `max_length` tokens.
    """
    labels = [example.label for example in task.train]
    if task.labels:
        counts = []
        for label, count in Counter(labels).most_common(8):
            counts.append(f"{task.labels[label]} {count}")
        label_summary = f"{len(task.labels)} labels ({', '.join(counts)})"
        constant_answer = "the most frequent answer"
    else:
        label_summary = (f"scores from {min(labels):g} to {max(labels):g}, "
                         f"mean {np.mean(labels):.3g}")
        constant_answer = "the mean"
    n_dev = sum(len(dev) for dev in task.devs)
    unit = "pairs" if task.pairs else "texts"

    lengths = np.array([len(example.input_ids) for example in encoded])
    unk_id = load_tokenizer(bert).token_to_id("[UNK]")
    share_unknown = sum(example.input_ids.count(unk_id) for example in encoded) / lengths.sum()
    share_cut = np.mean(lengths >= max_length)
    baseline = majority_baseline(task)
    lines = [f"{task.name}: {label_summary}. {len(train_set)} {unit} to train on, "
             f"{len(holdout_set)} held out, {n_dev} in dev",
             f"tokens: median {np.median(lengths):.0f}, {share_cut:.1%} cut to "
             f"{max_length}, {share_unknown:.1%} unknown",
             f"always giving {constant_answer} scores {baseline:.2f} on dev"]
    for warning in find_likely_mistakes(task, train_set, holdout_set, share_unknown):
        lines.append(f"WARNING: {warning}")
    return lines


def find_likely_mistakes(task, train_set, holdout_set, share_unknown):
    """Return a warning for each property of a data set that looks like a mistake.

    share_unknown: the share of [UNK] among the tokens.
    """
    dev = [example for examples in task.devs for example in examples]
    warnings = []

    if len(task.labels) > 10 and all(NUMBER.fullmatch(name) for name in task.labels):
        warnings.append("the labels are numbers: if they are scores, name their column "
                        "score instead of label")

    plain_names = set()
    for name in task.labels:
        plain = unicodedata.normalize("NFKC", name).casefold()
        plain_names.add(" ".join(plain.split()))
    if len(plain_names) < len(task.labels):
        warnings.append("some labels differ only by blanks or case: write them in one way")

    texts = [text for example in task.train + dev for text in example[:2]]
    if any(text is not None and not text.strip() for text in texts):
        warnings.append("some texts are empty: check their rows")

    warnings += find_scarce_examples(task, holdout_set)

    if share_unknown > 0.1:
        warnings.append("many tokens are unknown: check that the BERT has the language "
                        "and the casing of the data")

    train_texts = {example[:2] for example in train_set}
    n_seen = sum(example[:2] in train_texts for example in holdout_set + dev)
    if n_seen:
        warnings.append(f"{n_seen} rows of the hold-out set or of dev are in train word "
                        "for word: remove duplicates from train.tsv")

    if not task.labels:
        scores = [example.label for example in task.train]
        if not (abs(np.mean(scores)) < 10 and 0.05 < np.std(scores) < 10):
            warnings.append("the scores are far from 0 or vary too much or too little to "
                            "be learned well: scale them to about 0 to 5")
    return warnings


def find_scarce_examples(task, holdout_set):
    """Return warnings about rare labels, a dominant label and a small hold-out set."""
    warnings = []
    counts = Counter(example.label for example in task.train)
    rare, n_more = [], 0
    for label, name in enumerate(task.labels):
        if counts[label] < 5 and len(rare) < 3:
            plural = "" if counts[label] == 1 else "s"
            rare.append(f"label {name[:40]} has {counts[label]} example{plural}")
        elif counts[label] < 5:
            n_more += 1
        if counts[label] > 0.9 * len(task.train):
            warnings.append(f"{counts[label] / len(task.train):.1%} of train has the label "
                            f"{name[:40]}, so a high accuracy says little: compare it with "
                            "always giving this label")
    if rare:
        more = f", and {n_more} more labels have fewer than 5" if n_more else ""
        warnings.append(f"{', '.join(rare)}{more}: add examples, or correct the labels")
    if 0 < len(holdout_set) < 50:
        warnings.append(f"the hold-out set is small ({len(holdout_set)} of "
                        f"{len(task.train)}), so a search selects by chance: add data, or "
                        "hold out a larger share with --holdout")
    return warnings


def hint_for_missing_file(path):
    """Return what to do if a file of a data set does not exist."""
    if path.parent.is_file():
        return f"{path.parent} is a file, name its directory instead"
    if path.with_suffix(".csv").exists():
        return "convert the .csv beside it to tabs without quotes"
    name = glue_task_of(path.parent)
    if name:
        return f"to download the task, type: python -m glue.download {name}"
    return ("a directory of data needs train.tsv and dev.tsv (MNLI: dev_matched.tsv and "
            "dev_mismatched.tsv), and for predictions with --glue test.tsv")


def check_metric(metric, labels):
    """Check the value of --metric, which may be None, and return it.

    labels: the names of the labels, () for regression. Raises UserError if a part of the
    metric does not fit them.
    """
    fitting = ["accuracy"]
    if not labels:
        fitting = ["pearson", "spearman"]
    elif len(labels) == 2:
        fitting = ["accuracy", "f1", "matthews"]
    if metric is not None and not set(metric.split("+")) <= set(fitting):
        kind = f"data with {len(labels)} labels" if labels else "scores"
        names = ", ".join(fitting)
        choice = f"one of {names}, or a sum with +" if len(fitting) > 1 else names
        raise UserError(f"--metric {metric} does not fit {kind}: choose {choice}")
    return metric


def most_frequent_label(task):
    """Return the name of the most frequent label of train, or None for regression."""
    if not task.labels:
        return None
    label = Counter(example.label for example in task.train).most_common(1)[0][0]
    return task.labels[label]


def majority_baseline(task, parts=None, name=None):
    """Return ACC(m), in %, of always giving the most frequent label of train.

    parts: the lists of examples to evaluate on, by default dev. With two lists this is the
    mean of both. name: the name of the label, for a Task without train. For regression the
    baseline is 0, because a constant answer has no correlation with the scores.
    """
    if not task.labels:
        return 0.0
    label = task.labels.index(name or most_frequent_label(task))
    scores = []
    for examples in parts or task.devs:
        labels = np.array([example.label for example in examples])       # [n]
        logits = np.zeros((len(examples), len(task.labels)))             # [n, num_labels]
        logits[:, label] = 1
        scores.append(compute_metrics(task.metric, labels, logits)["score"])
    return float(np.mean(scores))


# ---- Faster, same results ------------------------------------------------------------------------

# An evaluator caches at most this many bytes of hidden states.
PREFIX_MEMORY = 2**30


def faster_forward(model, batches, device, autocast):
    """Return a function that gives the same logits as `model.eval()`, in less time.

    Its arguments are those of the model, (input_ids, token_type_ids, attention_mask, arch),
    and the logits are [B, num_labels]. On a GPU they are the same up to rounding. The three
    inputs must be the tensors of one of the `batches`, not copies of them, because the
    function keeps a cache or a graph for each batch.
    """
    model.eval()
    if device.type == "cuda":
        return with_cuda_graphs(model, batches, autocast)
    return PrefixCache(model, batches).forward


class PrefixCache:
    """Keep hidden states, so that architectures with equal first layers compute them once.

    For each batch the cache maps a prefix of layers to the hidden states [B, T, C] after
    these layers. It holds at most PREFIX_MEMORY bytes. When it is full, it drops the states
    that were least recently used.
    """

    def __init__(self, model, batches):
        self.model = model
        # Tensors hash by identity, so input_ids can be the key of a batch.
        self.states = {input_ids: {} for input_ids, *_ in batches}
        n_tokens = sum(input_ids.numel() for input_ids in self.states)
        # There is room for this many prefixes in every batch. A number takes 4 bytes.
        self.max_prefixes = PREFIX_MEMORY // (4 * n_tokens * model.config.hidden_size)

    def forward(self, input_ids, token_type_ids, attention_mask, arch):
        """Return the logits [B, num_labels] of one batch, bit for bit those of the model."""
        self.model.check(arch)
        layers = self.model.config.layers(arch)
        states = self.states[input_ids]

        # Start after the longest prefix in the cache. The empty prefix is the embeddings.
        start = max((n for n in range(arch.depth) if layers[:n] in states), default=0)
        # We remove the states from the dict and insert them again below. That moves them to
        # its end, so the least recently used states are always in front.
        x = states.pop(layers[:start], None)
        if x is None:
            x = self.model.embed(input_ids, token_type_ids)              # [B, T, C]

        mask = attention_mask[:, None, None, :]                          # [B, 1, 1, T]
        for n in range(start, arch.depth):
            states[layers[:n]] = x
            i, n_heads, n_neurons = layers[n]
            is_last = n + 1 == arch.depth
            x = self.model.layers[i](x, mask, n_heads, n_neurons, cls_only=is_last)

        while len(states) > self.max_prefixes:
            least_recent = next(iter(states))
            del states[least_recent]
        return self.model.head(x)                                        # [B, num_labels]


def with_cuda_graphs(model, batches, autocast):
    """Return a forward function that replays a CUDA graph, recorded once for each batch.

    A replay saves the time to launch every single kernel. The graph holds the masked pass,
    `forward_many`, because there the tensors have the same shapes for all architectures.
    """
    device = model.embedding_norm.weight.device
    # Every graph reads the architecture from this tensor. We write it before each replay.
    sizes = archs_to_tensor(model.config, [model.config.arch], device)   # [1, L, 2]
    pool = torch.cuda.graph_pool_handle()
    # As in PrefixCache, input_ids is the key of a batch.
    graphs = {}

    def compute(inputs):
        """Run the masked pass under autocast."""
        # Autocast is entered here, and not around all graphs, so that every graph casts the
        # weights itself. Otherwise it would read casts that autocast has freed since.
        with autocast():
            return forward_many(model, *inputs, sizes)

    with torch.inference_mode():
        for *inputs, _ in batches:
            graphs[inputs[0]] = capture_graph(partial(compute, inputs), pool)

    def forward(input_ids, token_type_ids, attention_mask, arch):
        """Return the logits [B, num_labels] of one batch."""
        model.check(arch)
        sizes.copy_(archs_to_tensor(model.config, [arch]))
        graph, logits = graphs[input_ids]
        graph.replay()
        # The next replay overwrites the logits [1, B, num_labels], so we copy them.
        return logits[0].clone()

    return forward


# ---- Using a trained model -----------------------------------------------------------------------

def load(directory):
    """Return a model that `train` or `search` wrote, and its encoder.

    encode(text) or encode(text, second_text) returns the three [1, T] tensors that the
    model takes. With B texts in a list, an array or a pandas Series they are [B, T].
    """
    model = load_bert(existing_model(directory))
    encode_examples = make_encoder(directory)
    max_positions = model.config.max_position_embeddings

    def encode_texts(texts, pairs=None):
        """Encode one text or a sequence of texts, with as many second texts or none."""
        if isinstance(texts, str):
            texts, pairs = [texts], [pairs]
        # Make a list, because `not texts` fails for an array.
        texts = list(texts)
        pairs = [None] * len(texts) if pairs is None else pairs
        if not texts or isinstance(pairs, str) or len(pairs) != len(texts):
            raise UserError("encode takes at least one text, and as many second texts or "
                            "none: give it two lists of the same length")
        examples = [Example(text, second, 0) for text, second in zip(texts, pairs)]
        encoded = encode_examples(examples)
        *inputs, _ = collate(encoded, range(len(encoded)), max_positions=max_positions)
        return tuple(inputs)

    return model, encode_texts


def predict(model, directory, examples, autocast, batch_size=32):
    """Yield (label name, {name: probability}) for every Example of an iterable.

    For regression yield (score, {}). The iterable can be a stream, because a batch is
    computed as soon as its examples are there.
    """
    device = model.embedding_norm.weight.device
    max_positions = model.config.max_position_embeddings
    names = model.config.labels or [str(i) for i in range(model.num_labels)]
    encode_examples = make_encoder(directory)
    examples = iter(examples)
    while batch := list(itertools.islice(examples, batch_size)):
        encoded = encode_examples([example._replace(label=0) for example in batch])
        *inputs, _ = collate(encoded, range(len(batch)), device, max_positions)
        with torch.inference_mode(), autocast():
            logits = check_finite(model(*inputs).float().cpu())          # [B, num_labels]
        for row in logits:
            if model.config.problem_type == "regression":
                yield row.item(), {}
            else:
                yield names[row.argmax()], dict(zip(names, row.softmax(0).tolist()))


def load_trained(directory, task):
    """Load a model that `train` or `search` wrote, to evaluate it on `task`.

    Raises UserError if the data does not fit the model, or the model has no classifier.
    """
    check_fit(f"the data of {task.name} does not fit {directory}", training_of(directory),
              task.pairs, task.name, task.labels)
    return load_bert(directory)


def load_dev(directory, model_dir):
    """Read the dev set in `directory`, or MNLI's two, to evaluate a trained model on it.

    Return a Task without examples in `train`. Its name, labels and metric are those of
    the model in `model_dir`. Raises UserError if a file is missing or malformed, or if the
    data does not fit the model.
    """
    training = training_of(model_dir)
    labels = training["labels"]
    directory = Path(directory)
    names = ["dev.tsv"]
    mnli_names = ["dev_matched.tsv", "dev_mismatched.tsv"]
    # MNLI has no dev.tsv, but a user may have put one beside its two files.
    is_mnli = training.get("task") == "MNLI" or not (directory / "dev.tsv").exists()
    if is_mnli and (directory / mnli_names[0]).exists():
        names = mnli_names

    devs = []
    for name in names:
        dev_format, examples, found = read_examples(directory / name, labels)
        if dev_format.labels == ():
            found = ()
        check_fit(f"{directory / name} does not fit {model_dir}", training,
                  examples[0].sentence2 is not None,
                  dev_format.name or os.path.basename(os.path.realpath(directory)), found)
        devs.append(examples)
    return Task(name=training.get("task"), train=[], dev=devs[0], labels=labels,
                dev_mismatched=devs[1] if names == mnli_names else None,
                metric=training.get("metric", dev_format.metric))


def existing_model(directory):
    """Return the directory of a model. Raises UserError if it has no config.json."""
    path = Path(directory, "config.json")
    if not path.exists():
        raise UserError(f"{path} does not exist: name a directory that train or search "
                        "wrote")
    return directory


def training_of(directory):
    """Return the fields of a model's run.json, with its label names as "labels".

    Without a run.json, the only field is "labels".
    """
    path = Path(directory, "run.json")
    run = read_json(path) if path.exists() else {}
    return {**run, "labels": BertConfig.load(directory).labels}


def check_fit(where, training, pairs, task=None, labels=None):
    """Raise UserError if data is not of the kind that a model was trained on.

    where: the beginning of the message. training: the result of `training_of`. pairs:
    whether the data has pairs of texts. task, labels: the name of its task and the names of
    its labels, or None if they are unknown or do not matter.
    """
    if pairs and training.get("pairs") is False:
        raise UserError(f"{where}: two texts, but the model was trained on single texts")
    if training.get("pairs") and not pairs:
        raise UserError(f"{where}: one text, but the model was trained on pairs. Write two, "
                        "with a tab between them")
    glue_names = {glue_task(name or "") for name in (task, training.get("task"))}
    # Refuse only two different tasks of GLUE. Data with any other name may fit the model.
    if len(glue_names - {None}) == 2:
        raise UserError(f"{where}: the task is {task}, but the model was trained on "
                        f"{training['task']}: use data of {training['task']}")
    if labels not in (None, training["labels"]):
        raise UserError(f"{where}: the labels are {labels}, but the model was trained on "
                        f"{training['labels']}: use data with the same labels")


def check_finite(logits):
    """Return the logits. Raises UserError if any of them is NaN or infinite."""
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite, because its weights overflow "
                        "in this precision: try --precision fp32")
    return logits
