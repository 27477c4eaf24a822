"""Write the made-up task glue/TOY and a tiny untrained BERT for it: `python -m glue.toy`.

The task is the sentiment of invented film reviews, in SST-2's format: does the writer recommend it?
Its sentences look like English, but their label follows from one rule, `label`, that leaves no
doubt and that no list of good and bad words can apply: the words' order decides. So a small BERT
learns it from random weights in a minute, and the smallest sub-BERTs do visibly worse.

Only `random.Random.random` is drawn from, whose sequence Python guarantees: a seed gives the same
bytes on every machine. Standard library only.
"""

import argparse
import json
import random
from pathlib import Path

# Every word that can occur. Their order in these lists is part of what a seed stands for.
THINGS = "plot cast acting music script ending dialogue story pacing humor".split()
GOOD = "good great brilliant funny moving clever charming fresh".split()
BAD = "bad awful dull boring weak stale clumsy tedious".split()
LIKE = "love enjoy admire like".split()
HATE = "hate dislike loathe regret".split()
PAST = {verb: verb + ("ted" if verb == "regret" else "d" if verb[-1] == "e" else "ed")
        for verb in LIKE + HATE}
STRONG = "very truly really extremely".split()               # verbs take the two in the middle
NOT = "not never hardly".split()
POSITIVE = {*GOOD, *LIKE, *(PAST[verb] for verb in LIKE)}
NEGATIVE = {*BAD, *HATE, *(PAST[verb] for verb in HATE)}
OTHERS = "the was , i doubt that we did but although and".split()
SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
SIZES = {"train": 3000, "dev": 800, "test": 400}                   # sentences; no two are the same
CONFIG = {  # five layers, so that BERT-base's fractions give four depths; about 150,000 parameters
    "architectures": ["BertForSequenceClassification"], "model_type": "bert",
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 192,
    "max_position_embeddings": 32, "type_vocab_size": 2, "hidden_act": "gelu",
    # The rule has no noise to overfit. Post-norm layers learn fastest from a start a bit above the
    # usual 0.02 here, while from 0.1 they do not learn at all.
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.03,
    "layer_norm_eps": 1e-12, "pad_token_id": 0}


def value(clause):
    """A clause's sentiment: +1 or -1 for its one word of praise or blame, doubled by an intensifier
    and turned round by every "not", "never", "hardly" and "doubt".

    >>> value("the plot was not very good"), value("i doubt that we never loved the plot")
    (-2, 1)
    """
    words = clause.split()
    polarity = 1 if POSITIVE & set(words) else -1
    strength = 2 if set(STRONG) & set(words) else 1
    return polarity * strength * (-1) ** sum(word in NOT + ["doubt"] for word in words)


def label(sentence):
    """The rule: 1 for praise, 0 for blame, None where the two balance (no such sentence is used).

    What "although" introduces does not count, nor does what stands before "but"; clauses joined by
    "and" add up, so that the stronger one decides where they disagree.

    >>> label("although the plot was not very good , we loved the cast")           # the cast counts
    1
    >>> label("the plot was really bad and the cast was good")                     # -2 + 1
    0
    """
    if sentence.startswith("although "):
        total = value(sentence.split(" , ")[1])
    elif " but " in sentence:
        total = value(sentence.split(" but ")[1])
    else:                                                          # "A although B", "A and B", "A"
        total = sum(value(clause) for clause in sentence.split(" although ")[0].split(" and "))
    return None if total == 0 else int(total > 0)


def random_clause(rng):
    """One clause: "the plot was not very good", "i doubt that we really enjoyed the music"."""
    def pick(words):
        return words[int(rng.random() * len(words))]
    praise, turned, strong = rng.random() < 0.5, rng.random() < 0.3, rng.random() < 0.4
    if rng.random() < 0.35:
        verb = pick(LIKE if praise else HATE)
        words = ["we"] + ["did", "not"] * turned + [pick(STRONG[1:3])] * strong
        words += [verb if turned else PAST[verb], "the", pick(THINGS)]
    else:
        words = ["the", pick(THINGS), "was"] + [pick(NOT)] * turned + [pick(STRONG)] * strong
        words += [pick(GOOD if praise else BAD)]
    return " ".join(["i", "doubt", "that"] * (rng.random() < 0.1) + words)


def random_sentence(rng):
    """One clause, or two joined in one of four ways."""
    forms = ["{0}"] * 2 + ["{0} , but {1}", "although {0} , {1}", "{0} although {1}"] * 2
    forms += ["{0} and {1}"] * 3
    return forms[int(rng.random() * len(forms))].format(random_clause(rng), random_clause(rng))


def make(seed):
    """The data set's files, {name: text}."""
    rng, seen, tables = random.Random(seed), set(), {}
    for split, size in SIZES.items():
        rows, left = [], {None: 0, 0: size // 2, 1: size // 2}     # as much praise as blame
        while len(rows) < size:
            sentence = random_sentence(rng)
            if sentence not in seen and left[answer := label(sentence)]:
                seen.add(sentence)
                left[answer] -= 1
                rows.append((sentence, answer))
        tables[split] = [("sentence", "label"), *rows]
    tables["test"] = [("index", "sentence"), *enumerate(row[0] for row in tables["test"][1:])]
    words = SPECIAL + sorted({*OTHERS, *THINGS, *POSITIVE, *NEGATIVE, *STRONG, *NOT})
    return {"vocab.txt": "".join(word + "\n" for word in words),
            "config.json": json.dumps({**CONFIG, "vocab_size": len(words)}, indent=2) + "\n",
            **{f"{split}.tsv": "".join(f"{a}\t{b}\n" for a, b in table)
               for split, table in tables.items()}}


def main(argv=None):
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "TOY")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in make(options.seed).items():
        (options.out / name).write_bytes(text.encode())


if __name__ == "__main__":
    main()
