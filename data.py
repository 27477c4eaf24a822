"""GLUE TSV files -> examples -> token ids -> padded batches -> scores and predictions.

Every official GLUE format is recognised by its header's column names (CoLA, which has no header, by
its shape), and so is a user's own file with the columns `sentence`, `label` or `sentence1`,
`sentence2`, `label` (`score` instead of `label`: regression). The files are read as what they are:
UTF-8 lines split at tabs, no quoting. A row that does not fit is an error with its file and line.
"""

import itertools
from collections import Counter, namedtuple
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# First of all model, which says how torch's threads wait.
from model import (BertConfig, UserError, is_label, layer_sizes, load_bert, read_json, record,
                   say)

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
    def pairs(self):
        """Whether its examples are pairs of texts."""
        return self.train[0].sentence2 is not None

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
        for label in labels:
            if not is_label(label):
                raise UserError(f"{path}: the label {label[:40]!r} is empty or has a control "
                                "character")
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


def read_table(path, test=False):
    """The Format of a TSV file and its rows: (line, sentence1, sentence2 or None, label); of a test
    file the column `index` (None without one) stands in the label's place."""
    rows = read_rows(Path(path))
    columns, first = rows[0], 1
    kind = None
    for one in FORMATS:
        needed = [one.sentence1, one.sentence2] + ([] if test else [one.label])
        if kind is None and all(name is None or name in columns for name in needed):
            kind = one
    if kind is None and len(columns) == 4 and columns[1] in COLA.labels and columns[2] in ("", "*"):
        kind, first, columns = COLA, 0, COLA_COLUMNS
    if {"label", "score"} <= set(columns) and not test:
        raise UserError(f"{path} has a column label and a column score: leave one of them out")
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
        say(f"{path}: {short} incomplete row(s) left out")
    if not table:
        raise UserError(f"{path} has no rows")
    return kind, table


def read_rows(path):
    """A TSV file's rows as lists of strings: no quoting, LF or CRLF, byte-order mark or not."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        name, hint = path.parent.name, ""
        if name in DOWNLOADS:
            hint = f"; run: python -m glue.download {name}"
        elif path.parent.is_file():
            hint = f"; {path.parent} is a file: name its directory"
        elif path.with_suffix(".csv").exists():
            hint = "; a .csv does: write it anew with tabs and without quotes"
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
    """Split train into (kept, held out): `fraction` of it, at least one example unless that is 0,
    and of every label, or of every stretch of the scores, its share."""
    rng, held = np.random.default_rng(seed), set()
    total = max(1, round(fraction * len(examples))) if fraction else 0
    labels = [example.label for example in examples]
    if total and isinstance(labels[0], float):
        # Neighbours in score: one of each `total` stretches of equal length.
        for stretch in np.array_split(np.argsort(labels, kind="stable"), total):
            held.add(int(rng.choice(stretch)))
    elif total:
        # Largest remainders: every label its whole share, the rest to the largest fractions.
        exact = {label: total * n / len(labels) for label, n in sorted(Counter(labels).items())}
        sizes = {label: int(share) for label, share in exact.items()}
        by_remainder = sorted(exact, key=lambda label: sizes[label] - exact[label])
        for label in by_remainder[:total - sum(sizes.values())]:
            sizes[label] += 1
        for label, size in sizes.items():
            members = [i for i, other in enumerate(labels) if other == label]
            held.update(rng.permutation(members)[:size].tolist())
    return ([e for i, e in enumerate(examples) if i not in held],
            [e for i, e in enumerate(examples) if i in held])


def describe(task, kept, held, encoded, unk, max_length):
    """Lines that say what was understood of a task, and what looks like a mistake. kept, held: the
    parts of train; encoded: the first; unk: the id of [UNK]."""
    labels, lengths = [e.label for e in task.train], [len(e.input_ids) for e in encoded]
    counts = Counter(labels)
    share = np.mean([i == unk for e in encoded for i in e.input_ids])
    cut = 100 * np.mean(np.array(lengths) >= max_length)
    if task.labels:
        names = [f"{task.labels[label]} {n}" for label, n in counts.most_common(8)]
        kind = f"{len(task.labels)} labels ({', '.join(names)}{', ...' if len(counts) > 8 else ''})"
    else:
        kind = f"scores from {min(labels):g} to {max(labels):g}, mean {np.mean(labels):.3g}"
    pairs = "pairs" if task.pairs else "texts"
    lines = [
        f"{task.name}: {kind}; {len(kept)} {pairs} to train on, {len(held)} held out, "
        f"{sum(map(len, task.devs))} in dev",
        f"tokens: median {np.median(lengths):.0f}, {cut:.1f}% cut to {max_length}; "
        f"{100 * share:.1f}% unknown",
        f"always giving the most frequent answer scores {majority(task):.2f} on dev"]
    texts = [e.sentence1 for e in task.train]
    folded = Counter(" ".join(name.lower().split()) for name in task.labels)
    train, other = {e[:2] for e in kept}, [e[:2] for e in itertools.chain(held, *task.devs)]
    quoted = [i for i, text in enumerate(texts) if len(text) > 1 and text[0] == text[-1] == '"']
    numbers = len(task.labels) > 10 and all(name.replace(".", "", 1).isdecimal()
                                            for name in task.labels)
    for wrong, text in (
            (numbers, f"{len(task.labels)} labels that are numbers: if they are scores, name the "
                      "column score instead of label"),
            (len(folded) < len(task.labels), "some labels differ by blanks or case alone"),
            (not all(text.strip() for text in texts), "some texts are empty"),
            (len(quoted) > len(texts) / 5, "many texts stand in quotation marks, the first in row "
             f"{quoted[0] + 1 if quoted else 0}: a CSV file's quotes are not removed"),
            (share > 0.1, "many tokens are unknown: is this the BERT of this language and casing?"),
            (train & set(other), f"{sum(e in train for e in other)} rows of the hold-out or of dev "
                                 "are in train word for word"),
            (not task.labels and not (np.std(labels) < 10 and abs(np.mean(labels)) < 10),
             "scores far from 0: a regression learns them badly; scale them to about 0 to 5")):
        if wrong:
            lines.append(f"WARNING: {text}")
    return lines


def majority(task):
    """ACC(m) on dev, in %, of a model that always gives train's most frequent label."""
    if not task.labels:
        return 0.0
    logits = np.zeros(len(task.labels))
    logits[Counter(e.label for e in task.train).most_common(1)[0][0]] = 1
    return float(np.mean([scores(task.metric, np.array([e.label for e in dev]),
                                 np.tile(logits, (len(dev), 1)))["score"] for dev in task.devs]))


# --------------------------------------------------------------------------------------------------
# The tokenizer, and batches
# --------------------------------------------------------------------------------------------------

TOKENIZERS = {None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer",
              "DistilBertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}


def load_tokenizer(directory):
    """The tokenizer of a BERT directory: its tokenizer.json, or its vocab.txt with the casing and
    the added tokens that the files beside it name. UserError where its ids are not the model's."""
    directory, known = Path(directory), {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        known[name] = read_json(directory / name) if (directory / name).exists() else {}
    config = known["tokenizer_config.json"]
    if config.get("tokenizer_class") not in TOKENIZERS or not config.get("do_basic_tokenize", True):
        raise UserError(f"{directory}/tokenizer_config.json: tokenizer_class "
                        f"{config.get('tokenizer_class')!r} is not BERT's WordPiece")
    if (directory / "tokenizer.json").exists():
        path = directory / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:                                   # of no narrower class
            raise UserError(f"{path} is not a tokenizer ({error})") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
    else:
        path = directory / "vocab.txt"
        tokenizer = word_pieces(path, known)
    for token in ("[UNK]", "[CLS]", "[SEP]"):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path} has no {token}: it is not the vocabulary of a BERT")
    most, size = max(tokenizer.get_vocab().values()), BertConfig.load(directory).vocab_size
    if most >= size:
        raise UserError(f"{path} has the id {most}, but config.json's vocab_size is {size}")
    return tokenizer


def word_pieces(path, known):
    """The WordPiece tokenizer of a vocab.txt; `known`: the JSON files beside it, {name: dict}."""
    try:
        words = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, nor a tokenizer.json beside it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8") from None
    vocab = {word.removesuffix("\r"): i for i, word in enumerate(words)}
    for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
        if token not in vocab:
            raise UserError(f"{path} has no {token}: it is not the vocabulary of a BERT")
    if sum(word.startswith("\u2581") for word in vocab) > len(vocab) / 10:
        raise UserError(f"{path} is not the vocabulary of a BERT's WordPiece")
    config = known["tokenizer_config.json"]
    # Where nobody says so, a vocabulary with capitals is a cased one.
    cased = any(word != word.lower() for word in vocab if not word.startswith("["))
    options = {"do_lower_case": not cased, "strip_accents": None, "tokenize_chinese_chars": True}
    options |= {name: config[name] for name in options if config.get(name) is not None}
    if not all(isinstance(value, bool | None) for value in options.values()):
        raise UserError(f"{path}: {', '.join(options)} must be true or false")
    tokenizer = tokenizers.BertWordPieceTokenizer(
        vocab, lowercase=options["do_lower_case"], strip_accents=options["strip_accents"],
        handle_chinese_chars=options["tokenize_chinese_chars"])
    added = {token: i for token, i in known["added_tokens.json"].items()}
    added |= {d["content"]: int(i) for i, d in config.get("added_tokens_decoder", {}).items()}
    extra = known["special_tokens_map.json"].get("additional_special_tokens", [])
    extra = extra + (config.get("additional_special_tokens") or [])
    tokenizer.add_special_tokens(sorted(added, key=added.get) + [
        token if isinstance(token, str) else token["content"] for token in extra])
    for token, i in added.items():
        if tokenizer.token_to_id(token) != i:
            raise UserError(f"{path}: the added token {token!r} should have the id {i}")
    return tokenizer


def encoder(directory, max_length=None):
    """A function [Example] -> [Encoded] with the tokenizer of the BERT directory `directory`.

    [CLS] sentence1 [SEP] or [CLS] sentence1 [SEP] sentence2 [SEP] (token types 0 and 1), cut to
    `max_length` tokens (None: as many as in the model's training), the longer sentence first.
    """
    tokenizer, config = load_tokenizer(directory), BertConfig.load(directory)
    tokenizer.enable_truncation(max_length or trained_length(directory), strategy="longest_first")

    def encode_examples(examples):
        """[Example] -> [Encoded]; UserError for pairs where the BERT has one token type."""
        if config.type_vocab_size < 2 and any(e.sentence2 is not None for e in examples):
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


def trained_length(directory):
    """Tokens per example that a model was trained with: run.json says so, or in an exported model
    the tokenizer; else its positions."""
    most, directory = BertConfig.load(directory).max_position_embeddings, Path(directory)
    for name, field in (("run.json", "max_length"), ("tokenizer_config.json", "model_max_length")):
        length = read_json(directory / name).get(field) if (directory / name).exists() else None
        if type(length) in (int, float) and length >= 3:             # transformers may write 1e30
            return int(min(length, most))
    return most


def batches(encoded, batch_size, seed, first=0):
    """Yield the batches of training for ever, from that of step `first` on: index lists. An epoch
    names each example once; its order follows from seed and epoch alone. Examples are shuffled and
    sorted by length within buckets of 50 batches, so that a batch has little padding; then the
    batches are shuffled."""
    start, skip = divmod(first, -(-len(encoded) // batch_size))
    for epoch in itertools.count(start):
        rng = np.random.default_rng([seed, epoch])
        order, bucket, cut = rng.permutation(len(encoded)).tolist(), 50 * batch_size, []
        for i in range(0, len(order), bucket):
            chunk = sorted(order[i:i + bucket], key=lambda i: -len(encoded[i].input_ids))
            cut += [chunk[i:i + batch_size] for i in range(0, len(chunk), batch_size)]
        for i in rng.permutation(len(cut))[skip if epoch == start else 0:]:
            yield cut[i]


def token_batches(encoded, tokens):
    """Cut `encoded` into batches for evaluation: index lists, longest first, each of as many
    examples as make at most `tokens` tokens when padded to the longest (but at least one)."""
    order, cut = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids)), []
    while order:
        size = max(1, tokens // len(encoded[order[0]].input_ids))
        cut, order = cut + [order[:size]], order[size:]
    return cut


def collate(encoded, indices, device="cpu", most=10**6):
    """One batch, padded to its longest member and on to a multiple of 8 tokens, on a GPU of 32 (few
    shapes: a CPU keeps kernels for each, a GPU a graph), but not beyond the model's `most`
    positions: input_ids, token_type_ids (int64) and attention_mask (bool), each [B, T], and labels
    [B] (int64, or float32 for regression)."""
    rows, step = [encoded[i] for i in indices], 8 if torch.device(device).type == "cpu" else 32
    longest = max(len(row.input_ids) for row in rows)
    T = max(longest, min(most, -(-longest // step) * step))
    ids, types = np.zeros((2, len(rows), T), np.int64)               # padding is masked
    mask = np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        n = len(row.input_ids)
        ids[b, :n], types[b, :n], mask[b, :n] = row.input_ids, row.token_type_ids, True
    labels = torch.tensor([row.label for row in rows])               # int64 or float32
    return tuple(t.to(device) for t in (*map(torch.from_numpy, (ids, types, mask)), labels))


# --------------------------------------------------------------------------------------------------
# Using a model
# --------------------------------------------------------------------------------------------------

def load(directory):
    """A model that `train` or `search` wrote, and its encoder: encode(text), encode(text, pair), or
    both with lists of B texts, gives the three [B, T] tensors that the model takes."""
    model, encode_examples = load_bert(directory), encoder(directory)
    most = model.config.max_position_embeddings

    def encode_texts(texts, pairs=None):
        """One text or a list, and as many second texts -> three [B, T] tensors."""
        if isinstance(texts, str):
            texts, pairs = [texts], [pairs]
        if not len(texts):
            raise UserError("no texts to encode")
        pairs = pairs or [None] * len(texts)
        examples = [Example(*both, 0) for both in zip(texts, pairs, strict=True)]
        return collate(encode_examples(examples), range(len(examples)), most=most)[:3]
    return model, encode_texts


def predict(model, directory, examples, autocast, batch_size=32):
    """For every Example of an iterable, as soon as its batch is computed, yield the label's name
    and {name: probability}; of a regression, the score and {}."""
    device, names = model.classifier.weight.device, model.config.labels
    names = names or tuple(map(str, range(model.num_labels)))
    encode_examples, examples = encoder(directory), iter(examples)
    while batch := list(itertools.islice(examples, batch_size)):
        encoded = encode_examples([example._replace(label=0) for example in batch])
        *inputs, _ = collate(encoded, range(len(batch)), device,
                             model.config.max_position_embeddings)
        with torch.inference_mode(), autocast():
            logits = finite(model(*inputs).float().cpu())            # [B, num_labels]
        for row in logits:
            if model.config.problem_type == "regression":
                yield row.item(), {}
            else:
                yield names[row.argmax()], dict(zip(names, row.softmax(0).tolist()))


PREFIX_MEMORY = 2**30    # bytes of hidden states that a scorer keeps for architectures to come


def scorer(model, parts, metric, device, autocast):
    """A function arch -> {metric: %} over lists of encoded examples. Of several parts (MNLI's dev
    has two) "score" is the mean.

    The batches are made once and stay on the device. Architectures whose first layers are the same
    compute them once: `kept` holds, per batch, the hidden states before each layer, as many as
    PREFIX_MEMORY allows; those used longest ago go first. The result is the same to the bit.
    """
    tokens = 2**11 if device.type == "cpu" else 2**15                # a CPU's caches like few
    most = model.config.max_position_embeddings
    made = [[collate(part, indices, device, most) for indices in token_batches(part, tokens)]
            for part in parts]
    held = sum(inputs[0].numel() for part in made for inputs in part)
    prefixes = PREFIX_MEMORY // (4 * held * model.config.hidden_size)
    kept = [[{} for _ in part] for part in made]
    model = cast_once(model, device, autocast).eval()

    def sliced(p, b, arch):
        """Logits [B, num_labels] of batch b of part p, as `model.forward` computes them, from the
        longest prefix of layers that is kept on; keeps the new ones and forgets the oldest."""
        ids, types, mask, _ = made[p][b]
        layers, keep = model.config.layers(arch), kept[p][b]
        start = max((i for i in range(arch.depth) if layers[:i] in keep), default=0)
        x = keep[layers[:start]] if layers[:start] in keep else model.embed(ids, types)
        for n, (i, H, F_) in enumerate(layers[start:], start):
            keep[layers[:n]] = x = keep.pop(layers[:n], x)           # the youngest of the dict
            x = model.layers[i](x, mask[:, None, None, :], H, F_, last=n + 1 == arch.depth)
        for prefix in list(keep)[:max(0, len(keep) - prefixes)]:
            del keep[prefix]
        return model.head(x)

    forward = replayed(model, made, autocast) if device.type == "cuda" else sliced

    def score(arch):
        """{metric: %} of one architecture."""
        results = []
        model.check(arch)
        with torch.inference_mode(), autocast():
            for p, part in enumerate(made):
                found = [forward(p, b, arch).float() for b in range(len(part))]
                labels = torch.cat([labels for *_, labels in part])
                results.append(scores(metric, labels.cpu().numpy(),
                                      finite(torch.cat(found).cpu()).numpy()))
        named = {k + "_mismatched" * i: v for i, r in enumerate(results) for k, v in r.items()}
        return named | {"score": float(np.mean([r["score"] for r in results]))}
    return score


def replayed(model, made, autocast):
    """A function (part, batch, arch) -> logits for a GPU: the masked pass over each batch, recorded
    once as a CUDA graph and replayed. The logits are those of the slices but for rounding."""
    sizes = layer_sizes(model.config, [model.config.arch], made[0][0][0].device)    # [1, L, 2]
    pool, graphs = torch.cuda.graph_pool_handle(), []
    with torch.inference_mode(), autocast():
        for part in made:
            graphs.append([record(partial(model.masked, *inputs, sizes), pool)
                           for *inputs, _ in part])

    def forward(p, b, arch):
        """Logits [B, num_labels] of batch b of part p; the next call may overwrite them."""
        sizes.copy_(layer_sizes(model.config, [arch]))
        graph, logits = graphs[p][b]
        graph.replay()
        return logits[0].clone()
    return forward


def cast_once(model, device, autocast):
    """The model itself, or where autocast would cast its weights to bf16 in every call, a copy that
    has them in bf16: the same logits. The classifier stays in fp32."""
    with autocast():
        if not torch.is_autocast_enabled(device.type):
            return model
    model = deepcopy(model)
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    model.pooler.bfloat16()
    return model


def finite(logits):
    """The logits, unless they are not numbers: UserError."""
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite: its weights overflow in this precision")
    return logits


def load_trained(directory, task):
    """A model that train or search wrote; refused where its labels are not those of the data."""
    labels = BertConfig.load(directory).labels
    if labels != task.labels:
        raise UserError(f"{directory} knows the labels {labels}, but the data has {task.labels}")
    return load_bert(directory, task.num_labels)


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
