"""GLUE TSV files -> examples -> token ids -> padded batches -> scores and predictions.

Every official GLUE format is recognised by its header's column names (CoLA, which has no header, by
its shape), and so is a user's own file with the columns `sentence`, `label` or `sentence1`,
`sentence2`, `label` (`score` instead of `label`: regression). The files are read as what they are:
UTF-8 lines split at tabs, no quoting. A row that does not fit is an error with its file and line.
"""

import itertools
import math
import os
import re
import unicodedata
from collections import Counter, namedtuple
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# First model, which sets how torch's threads wait before torch is loaded.
from model import (archs_to_tensor, BertConfig, capture_graph, forward_many, is_label, load_bert,
                   print_line, read_json, regular_file, user_errors_for, UserError)

import numpy as np
import tokenizers
import torch
from torch import nn

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
LONGEST_LINE = 10**6
NUMBER = re.compile(r"[-+]?\d*[.,]?\d+(e[-+]?\d+)?%?", re.IGNORECASE)


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
    def pairs(self):
        """Whether its examples are pairs of texts."""
        return self.train[0].sentence2 is not None

    @property
    def devs(self):
        """The dev sets: one, or MNLI's two."""
        return [self.dev] + ([self.dev_mismatched] if self.dev_mismatched else [])


# ---- Files ---------------------------------------------------------------------------------------

def load_task(directory):
    """Read train.tsv and dev.tsv (MNLI: dev_matched.tsv and dev_mismatched.tsv) of `directory`.
    UserError for whatever is missing, malformed, or leaves nothing to learn."""
    directory = Path(directory)
    kind, train, labels = read_examples(directory / "train.tsv")
    if len({example.label for example in train}) < 2:
        raise UserError(f"{directory / 'train.tsv'}: only one label; nothing to learn")
    names = ["dev_matched.tsv", "dev_mismatched.tsv"] if kind.name == "MNLI" else ["dev.tsv"]
    devs = []
    for name in names:
        dev_kind, dev, _ = read_examples(directory / name, labels)
        if dev_kind != kind:
            raise UserError(f"{directory / name} has other columns than train.tsv")
        devs.append(dev)
    name = kind.name or os.path.basename(os.path.realpath(directory))
    return Task(name, train, devs[0], labels, kind.metric, *devs[1:])


def read_examples(path, labels=None):
    """Read one TSV file: (its Format, [Example], label names). `labels`: the only ones allowed."""
    kind, table = read_table(path)
    labels, examples = labels or kind.labels, []
    if labels is None:
        labels = tuple(sorted({label for *_, label in table if is_label(label)}))
    is_regression = kind.labels == ()
    legal = f"one of {', '.join(labels)}" if labels else "a name"
    if is_regression:
        legal = "a number"
    for line, one, two, label in table:
        try:
            value = float(label) if is_regression else labels.index(label)
        except ValueError:
            value = np.nan                                           # refused below
        if not np.isfinite(value):
            raise UserError(f"{path}, line {line}: label {label[:40]!r} is not {legal}")
        examples.append(Example(one, two, value))
    return kind, examples, labels


def read_table(path, test=False):
    """The Format of a TSV file and its rows: (line, sentence1, sentence2 or None, label); of a test
    file the column `index` (None without one) stands in the label's place."""
    rows, table = read_rows(Path(path)), []
    columns, first = rows[0], 1
    # CoLA has no header: its rows are known by their shape.
    if len(columns) == 4 and columns[1] in COLA.labels and columns[2] in ("", "*"):
        kind, columns, first = COLA, ["source", "label", "mark", "sentence"], 0
    else:
        kind = find_format(path, columns, test)
    wanted = [kind.sentence1, kind.sentence2, "index" if test else kind.label]
    for line, row in enumerate(rows[first:], 1 + first):
        if len(row) == len(columns):
            cells = dict(zip(columns, row))
            table.append((line, *(cells.get(name) for name in wanted)))
        # The official train of QQP has a few incomplete rows.
        elif kind.name != "QQP" or len(row) > len(columns) or test:
            raise UserError(f"{path}, line {line}: {len(row)} columns, expected {len(columns)}")
    if not table:
        raise UserError(f"{path} has no rows")
    if len(table) < len(rows) - first:
        print_line(f"{path}: {len(rows) - first - len(table)} incomplete row(s) left out")
    return kind, table


def find_format(path, columns, test):
    """The first Format whose columns are all there; of a test file the label's need not be."""
    for one, other in (("label", "score"), ("sentence", "sentence1")):
        if {one, other} <= set(columns) and not test:
            raise UserError(f"{path} has a column {one} and a column {other}: leave one out")
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: the header {columns[:8]} has two columns of one name")
    for kind in FORMATS:
        needed = {kind.sentence1, kind.sentence2, None if test else kind.label}
        if needed - {None} <= set(columns):
            return kind
    raise UserError(f"{path}: the header {columns[:8]} fits no GLUE format; a file of your own "
                    "needs sentence, label or sentence1, sentence2, label (or score)")


def read_rows(path):
    """A TSV file's rows as lists of strings: no quoting, LF or CRLF, byte-order mark or not."""
    if not path.exists():
        name = os.path.basename(os.path.realpath(path.parent))
        hint = f"if it is one of GLUE's, run: python -m glue.download {name}"
        if path.parent.is_file():
            hint = f"{path.parent} is a file: name its directory"
        elif path.with_suffix(".csv").exists():
            hint = "a .csv does: write it anew with tabs and without quotes"
        raise UserError(f"{path} does not exist; {hint}")
    content = regular_file(path).read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    if not content:
        raise UserError(f"{path} is empty")
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if b"\0" in line or len(line) > LONGEST_LINE:
            raise UserError(f"{path}, line {number}: a NUL (is it UTF-16?), or more than "
                            f"{LONGEST_LINE:,} bytes")
        try:
            rows.append(line.decode().removesuffix("\r").split("\t"))
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8") from None
    return rows


def split_holdout(examples, fraction, seed):
    """Split train into (kept, held out): `fraction` of it, at least one example unless that is 0,
    and of every label, or of every stretch of the scores, its share."""
    rng = np.random.default_rng(seed)
    labels = np.array([e.label for e in examples])
    held = np.zeros(len(examples), bool)
    total = min(len(examples) - 1, max(1, round(fraction * len(examples)))) if fraction else 0
    if total and labels.dtype == np.float64:
        # Neighbours in score: one of each `total` stretches of equal length.
        for stretch in np.array_split(labels.argsort(kind="stable"), total):
            held[rng.choice(stretch)] = True
    elif total:
        # Largest remainders: every label its whole share, the rest to the largest fractions.
        exact = total * np.bincount(labels) / len(labels)
        sizes = exact.astype(int)
        by_remainder = (sizes - exact).argsort(kind="stable")
        sizes[by_remainder[:total - sizes.sum()]] += 1
        for label, size in enumerate(sizes):
            members = np.flatnonzero(labels == label)
            held[rng.permutation(members)[:size]] = True
    return list(itertools.compress(examples, ~held)), list(itertools.compress(examples, held))


def summarize_task(task, kept, held, encoded, bert, max_length):
    """Lines that say what was understood of a task, and what looks like a mistake. kept, held: the
    parts of train; encoded: the first, by the tokenizer in `bert`, cut to `max_length` tokens."""
    labels = [e.label for e in task.train]
    dev = [e for part in task.devs for e in part]
    texts = [text for e in task.train + dev for text in e[:2] if text is not None]
    if task.labels:
        counts = [f"{task.labels[label]} {n}" for label, n in Counter(labels).most_common(8)]
        kind = f"{len(task.labels)} labels ({', '.join(counts)})"
    else:
        kind = f"scores from {min(labels):g} to {max(labels):g}, mean {np.mean(labels):.3g}"
    lengths = np.array([len(e.input_ids) for e in encoded])
    unk = load_tokenizer(bert).token_to_id("[UNK]")
    unknown = np.mean([i == unk for e in encoded for i in e.input_ids])
    quoted = [row for row, e in enumerate(task.train, 2)             # line 1 is the header
              if any(text and text[0] == text[-1] == '"' for text in e[:2])]
    trained = {e[:2] for e in kept}
    seen = sum(e[:2] in trained for e in held + dev)
    warnings = {
        "the labels are numbers: if they are scores, name their column score, not label":
            len(task.labels) > 10 and all(map(NUMBER.fullmatch, task.labels)),
        "some labels differ by blanks or case alone":
            len({" ".join(unicodedata.normalize("NFKC", name).casefold().split())
                 for name in task.labels}) < len(task.labels),
        "some texts are empty": not all(text.strip() for text in texts),
        f"many texts stand in a CSV file's quotes, which are not removed: lines {quoted[:3]} ...":
            len(quoted) > len(task.train) / 5,
        "many tokens are unknown: is this the BERT of this language and casing?": unknown > 0.1,
        f"{seen} rows of the hold-out or of dev are in train word for word": seen > 0,
        "scores far from 0: a regression learns them badly; scale them to about 0 to 5":
            not task.labels and not (abs(np.mean(labels)) < 10 and 0.05 < np.std(labels) < 10)}
    return [f"{task.name}: {kind}; {len(kept)} {'pairs' if task.pairs else 'texts'} to train on, "
            f"{len(held)} held out, {len(dev)} in dev",
            f"tokens: median {np.median(lengths):.0f}, {np.mean(lengths >= max_length):.1%} cut to "
            f"{max_length}; {unknown:.1%} unknown",
            f"always giving {'the most frequent answer' if task.labels else 'the mean'} scores "
            f"{majority(task):.2f} on dev",
            *(f"WARNING: {text}" for text, applies in warnings.items() if applies)]


def majority_baseline(task):
    """ACC(m) on dev, in %, of a model that always gives train's most frequent label."""
    if not task.labels:
        return 0.0
    answer = Counter(e.label for e in task.train).most_common(1)[0][0]
    logits = np.eye(len(task.labels))[[answer]]                      # [1, num_labels]
    return float(np.mean([compute_metrics(task.metric, np.array([e.label for e in dev]),
                                 logits.repeat(len(dev), 0))["score"] for dev in task.devs]))


# ---- The tokenizer, and batches ------------------------------------------------------------------

# Classes that give both texts of a pair the token type 0, unless model_input_names asks for types.
ONE_TYPE = ["DistilBertTokenizer", "DistilBertTokenizerFast", "TokenizersBackend"]
# What is supported of the fields of tokenizer_config.json that have few values; and those of the
# normalizer, under the names that the library has for them.
SUPPORTED = {
    "tokenizer_class": ["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", *ONE_TYPE],
    "word_tokenizer_type": ["basic"], "subword_tokenizer_type": ["wordpiece"],
    "do_lower_case": [True, False], "strip_accents": [True, False],
    "tokenize_chinese_chars": [True, False], "do_basic_tokenize": [True],
    "split_special_tokens": [False], "truncation_side": ["right"], "unk_token": ["[UNK]"],
    "cls_token": ["[CLS]"], "sep_token": ["[SEP]"]}
NORMALIZER = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
              "tokenize_chinese_chars": "handle_chinese_chars"}


def load_tokenizer(directory):
    """The tokenizer of a BERT directory: its tokenizer.json, or its vocab.txt with the casing and
    the added tokens that the files beside it name. UserError where its ids are not the model's."""
    here = Path(directory)
    path = here / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    for name, values in SUPPORTED.items():
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value not in [*values, None]:
            raise UserError(f"{path}: {name} is {value!r}, not one of {values}")
    casing = {theirs: config[name] for name, theirs in NORMALIZER.items()
              if config.get(name) is not None}
    has_json = (here / "tokenizer.json").exists()
    path = here / ("tokenizer.json" if has_json else "vocab.txt")
    with user_errors_for(path):
        if has_json:
            tokenizer = tokenizers.Tokenizer.from_file(str(regular_file(path)))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            for name, value in casing.items():
                if getattr(tokenizer.normalizer, name, value) != value:
                    raise UserError(f"{path} contradicts tokenizer_config.json: {name} {value}")
        else:
            tokenizer = word_pieces(regular_file(path), casing)
        add_tokens(tokenizer, here, known=has_json)
        words = tokenizer.get_vocab()
        for token in ("[UNK]", "[CLS]", "[SEP]"):
            if token not in words:
                raise UserError(f"{path} has no {token}: it is not the vocabulary of a BERT")
        inputs = config.get("model_input_names") or []
        if "token_type_ids" not in inputs and (inputs or config.get("tokenizer_class") in ONE_TYPE):
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:0 [SEP]:0",
                special_tokens=[(token, words[token]) for token in ("[CLS]", "[SEP]")])
        # A character that none knows: this raises where the tokenizer's own [UNK] does not work.
        pair = tokenizer.encode("\U00012345", "a")
        if pair.tokens[0] != "[CLS]" or pair.tokens[-1] != "[SEP]" or max(pair.type_ids) > 1:
            raise UserError(f"{path} does not give [CLS] text [SEP] text [SEP], as a BERT reads it")
    # SentencePiece marks where a word begins with this; WordPiece marks how one goes on, with ##.
    if sum(word.startswith("\u2581") for word in words) > len(words) / 10:
        raise UserError(f"{path} is not the vocabulary of a BERT's WordPiece")
    most, size = max(words.values()), BertConfig.load(directory).vocab_size
    if most >= size:
        raise UserError(f"{path} has the id {most}, but config.json's vocab_size is {size}")
    return tokenizer


def word_pieces(path, casing):
    """The WordPiece tokenizer of a vocab.txt; casing: what tokenizer_config.json says about it."""
    if not path.exists():
        raise UserError(f"{path} does not exist, nor a tokenizer.json beside it")
    words = path.read_text("utf-8-sig").rstrip("\n").split("\n")
    # Where nobody says so, a vocabulary with words in capitals is a cased one.
    capitals = sum(word != word.lower() for word in words if word[:1] not in ("[", "<"))
    casing = {"lowercase": capitals < len(words) / 100, **casing}
    return tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(words)}, **casing)


def add_tokens(tokenizer, directory, known):
    """Add the tokens that the files beside a vocabulary name, in the order of their ids; `known`:
    they are there already. UserError where one has another id."""
    tokens, ids = {}, {}
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        path = directory / name
        with user_errors_for(path):
            fields = read_json(path) if path.exists() else {}
            for i, token in fields.get("added_tokens_decoder", {}).items():
                tokens[token["content"]] = tokenizers.AddedToken(**token)
                ids[token["content"]] = int(i)
            for token in (fields.get("additional_special_tokens") or []) + (
                    fields.get("extra_special_tokens") or []):
                token = token if isinstance(token, str) else token["content"]
                tokens.setdefault(token, tokenizers.AddedToken(token, special=True))
            if name == "added_tokens.json":
                for token, i in fields.items():
                    tokens.setdefault(token, tokenizers.AddedToken(token))
                    ids[token] = int(i)
    for token in sorted(tokens, key=lambda token: ids.get(token, 10**9)):
        if not known:
            tokenizer.add_tokens([tokens[token]])
        found = tokenizer.token_to_id(token)
        if found is None or found != ids.get(token, found):
            raise UserError(f"{directory}: the added token {token!r} has the id {found}, not the "
                            f"one that its files name, {ids.get(token)}")


def make_encoder(directory, max_length=None):
    """A function [Example] -> [Encoded] with the tokenizer of the BERT directory `directory`:
    [CLS] sentence1 [SEP] or [CLS] sentence1 [SEP] sentence2 [SEP] (token types 0 and 1), cut to
    `max_length` tokens (None: as many as in the model's training), the longer sentence first."""
    tokenizer, config = load_tokenizer(directory), BertConfig.load(directory)
    tokenizer.enable_truncation(max_length or max_train_length(directory), strategy="longest_first")

    def encode_examples(examples):
        """[Example] -> [Encoded]; UserError for pairs where the BERT has one token type."""
        texts = [e.sentence1 if e.sentence2 is None else e[:2] for e in examples]
        if config.type_vocab_size < 2 and any(e.sentence2 is not None for e in examples):
            raise UserError(f"{directory}: the data has pairs, the BERT only one token type")
        return [Encoded(t.ids, t.type_ids, e.label)
                for t, e in zip(tokenizer.encode_batch(texts), examples)]
    return encode_examples


def encode(examples, directory, max_length=None):
    """What `encoder` does, once: [Example] -> [Encoded]."""
    return make_encoder(directory, max_length)(examples)


def max_train_length(directory):
    """Tokens per example that a model was trained with: run.json says so, or in an exported model
    the tokenizer; else its positions."""
    most = BertConfig.load(directory).max_position_embeddings
    for name, field in (("run.json", "max_length"), ("tokenizer_config.json", "model_max_length")):
        path = Path(directory) / name
        length = read_json(path).get(field) if path.exists() else None
        if type(length) in (int, float) and length >= 3:             # transformers may write 1e30
            return int(min(length, most))
    return most


def batches(encoded, batch_size, seed, first=0):
    """Yield the batches of training for ever, from that of step `first` on: index lists. An epoch
    names each example once; its order follows from seed and epoch alone. Examples are shuffled and
    sorted by length within buckets of 50 batches, so that a batch has little padding; then the
    batches are shuffled."""
    bucket = 50 * batch_size
    start, skip = divmod(first, math.ceil(len(encoded) / batch_size))
    for epoch in itertools.count(start):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(encoded)).tolist()
        cut = []
        for a in range(0, len(order), bucket):
            chunk = sorted(order[a:a + bucket], key=lambda i: -len(encoded[i].input_ids))
            cut += [chunk[b:b + batch_size] for b in range(0, len(chunk), batch_size)]
        for n in rng.permutation(len(cut))[skip:]:
            yield cut[n]
        skip = 0                                                     # of the first epoch alone


def token_batches(encoded, tokens):
    """Cut `encoded` into batches for evaluation: index lists, longest first, each of as many
    examples as make at most `tokens` tokens when padded to the longest (but at least one)."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))
    cut = []
    while order:
        size = max(1, tokens // len(encoded[order[0]].input_ids))
        cut.append(order[:size])
        order = order[size:]
    return cut


def collate(encoded, indices, device="cpu", most=10**6):
    """One batch, padded to its longest member and on to a multiple of 8 tokens, on a GPU of 32 (few
    shapes: a CPU keeps kernels for each, a GPU a graph), but not beyond the model's `most`
    positions: input_ids, token_type_ids (int64) and attention_mask (bool), each [B, T], and labels
    [B] (int64, or float32 for regression)."""
    rows = [encoded[i] for i in indices]
    step = 8 if torch.device(device).type == "cpu" else 32
    longest = max(len(row.input_ids) for row in rows)
    T = max(longest, min(most, -(-longest // step) * step))
    ids, types = np.zeros((2, len(rows), T), np.int64)               # padding is masked
    mask = np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        n = len(row.input_ids)
        ids[b, :n], types[b, :n], mask[b, :n] = row.input_ids, row.token_type_ids, True
    labels = [row.label for row in rows]                             # become int64 or float32
    return tuple(torch.as_tensor(x, device=device) for x in (ids, types, mask, labels))


# ---- Using a model -------------------------------------------------------------------------------

def load(directory):
    """A model that `train` or `search` wrote, and its encoder: encode(text), encode(text, pair), or
    both with lists of B texts, gives the three [B, T] tensors that the model takes."""
    model, encode_examples = load_bert(directory), make_encoder(directory)
    most = model.config.max_position_embeddings

    def encode_texts(texts, pairs=None):
        """One text or a list, and as many second texts -> three [B, T] tensors."""
        if isinstance(texts, str):
            texts, pairs = [texts], [pairs]
        pairs = [None] * len(texts) if pairs is None else pairs
        if not texts or isinstance(pairs, str) or len(pairs) != len(texts):
            raise UserError("encode takes at least one text, and as many second texts or none")
        examples = [Example(one, two, 0) for one, two in zip(texts, pairs)]
        return collate(encode_examples(examples), range(len(examples)), most=most)[:3]
    return model, encode_texts


def predict(model, directory, examples, autocast, batch_size=32):
    """For every Example of an iterable, as soon as its batch is computed, yield the label's name
    and {name: probability}; of a regression, the score and {}."""
    device, most = model.classifier.weight.device, model.config.max_position_embeddings
    names = model.config.labels or [str(i) for i in range(model.num_labels)]
    encode_examples, examples = make_encoder(directory), iter(examples)
    while batch := list(itertools.islice(examples, batch_size)):
        encoded = encode_examples([example._replace(label=0) for example in batch])
        *inputs, _ = collate(encoded, range(len(batch)), device, most)
        with torch.inference_mode(), autocast():
            logits = check_finite(model(*inputs).float().cpu())            # [B, num_labels]
        for row in logits:
            if model.config.problem_type == "regression":
                yield row.item(), {}
            else:
                yield names[row.argmax()], dict(zip(names, row.softmax(0).tolist()))


PREFIX_MEMORY = 2**30    # bytes of hidden states that a scorer keeps for architectures to come


def make_evaluator(model, parts, metric, device, autocast):
    """A function arch -> {metric: %} over lists of encoded examples, in batches that are made once
    and stay on the device. Of two parts (MNLI's dev) "score" is the mean."""
    tokens = 2**11 if device.type == "cpu" else 2**15                # a CPU's caches like few
    most, lengths = model.config.max_position_embeddings, [len(part) for part in parts]
    batches = [collate(part, indices, device, most)
               for part in parts for indices in token_batches(part, tokens)]
    labels = torch.cat([labels for *_, labels in batches]).cpu().split(lengths)
    model = cast_linears_to_bf16(model, device, autocast).eval()
    if device.type == "cuda":
        forward = with_cuda_graphs(model, batches, autocast)
    else:
        forward = with_prefix_cache(model, batches)

    def score(arch):
        """{metric: %} of one architecture."""
        model.check(arch)
        with torch.inference_mode(), autocast():
            logits = torch.cat([forward(b, arch).float() for b in range(len(batches))])
        found, *others = [compute_metrics(metric, right.numpy(), given.numpy())
                          for right, given in zip(labels, check_finite(logits.cpu()).split(lengths))]
        for other in others:
            found |= {f"{name}_mismatched": value for name, value in other.items()}
            found["score"] = (found["score"] + other["score"]) / 2
        return found
    return score


def with_prefix_cache(model, batches):
    """A function (index of a batch, arch) -> its logits [B, num_labels], those of `model.forward`
    to the bit. Architectures whose first layers are the same compute them once: each batch keeps
    the hidden states [B, T, C] before its layers, the youngest that PREFIX_MEMORY has room for."""
    kept = [{} for _ in batches]                                     # {the layers before: states}
    tokens = sum(ids.numel() for ids, *_ in batches)
    # How many such states each batch may keep.
    room = PREFIX_MEMORY // (4 * tokens * model.config.hidden_size)

    def forward(b, arch):
        """Logits [B, num_labels] of batch b, from the longest prefix of layers that is kept."""
        ids, types, mask, _ = batches[b]
        layers, states = model.config.layers(arch), kept[b]
        start = max((n for n in range(arch.depth) if layers[:n] in states), default=0)
        # What is taken out here and put back below becomes the youngest of the dict.
        x = states.pop(layers[:start], None)
        if x is None:
            x = model.embed(ids, types)
        for n, (i, H, F_) in enumerate(layers[start:], start):
            states[layers[:n]] = x
            x = model.layers[i](x, mask[:, None, None, :], H, F_, cls_only=n + 1 == arch.depth)
        while len(states) > room:
            del states[next(iter(states))]
        return model.head(x)
    return forward


def with_cuda_graphs(model, batches, autocast):
    """The same for a GPU: the masked pass over each batch, recorded once as a CUDA graph and
    replayed. The logits are those of `model.forward` but for rounding."""
    sizes = archs_to_tensor(model.config, [model.config.arch], batches[0][0].device)    # [1, L, 2]
    pool = torch.cuda.graph_pool_handle()
    with torch.inference_mode(), autocast():
        graphs = [capture_graph(partial(forward_many, model, *inputs, sizes), pool) for *inputs, _ in batches]

    def forward(b, arch):
        """Logits [B, num_labels] of batch b."""
        sizes.copy_(archs_to_tensor(model.config, [arch]))
        graph, logits = graphs[b]
        graph.replay()
        return logits[0].clone()
    return forward


def cast_linears_to_bf16(model, device, autocast):
    """The model itself, or where autocast would cast its weights to bf16 in every call, a copy that
    has them in bf16: the same logits. The classifier stays in fp32."""
    with autocast():
        if torch.is_autocast_enabled(device.type):
            model = deepcopy(model)
            for module in [*model.layers.modules(), model.pooler]:
                if isinstance(module, nn.Linear):
                    module.bfloat16()
    return model


def check_finite(logits):
    """The logits, unless they are not numbers: UserError."""
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its weights overflow in this precision")
    return logits


def load_trained(directory, task):
    """A model that train or search wrote; refused where its labels are not those of the data."""
    labels = BertConfig.load(directory).labels
    if labels != task.labels:
        raise UserError(f"{directory} knows the labels {labels}, but the data has {task.labels}")
    return load_bert(directory)                  # refuses where the classifier is missing


# ---- Metrics, on two sequences of n labels and n predictions; as fractions -----------------------

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


def compute_metrics(metric, labels, logits):
    """Every metric of a task in %, and ACC(m) of Eq. 7 as "score": the mean of those in `metric`.
    labels [n], logits [n, num_labels] (numpy). F1 and Matthews are given for two labels."""
    if "pearson" in metric:
        functions, predictions = {"pearson": pearson, "spearman": spearman}, logits[:, 0]
    else:
        functions, predictions = {"accuracy": accuracy}, logits.argmax(1)
        if logits.shape[1] == 2:
            functions |= {"f1": f1, "matthews": matthews_corrcoef}
    values = {name: 100 * function(labels, predictions) for name, function in functions.items()}
    return {"score": float(np.mean([values[name] for name in metric.split("+")])), **values}
