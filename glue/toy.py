"""Write the made-up task glue/TOY and a tiny untrained BERT for it.

    python -m glue.toy

The task is the sentiment of invented film reviews, in SST-2's format: does the writer
recommend the film? The sentences look like English, but a fixed rule (see `label`)
decides each label. The order of the words matters, so no list of good and bad words
solves the task. A small BERT learns the rule from random weights in about a minute,
and the smallest sub-BERTs usually score lower.

A seed gives the same bytes on every machine, because the only random source is
`random.Random.random`, whose sequence Python guarantees. Only the standard library is
needed.
"""

import argparse
import json
import random
from pathlib import Path

# All words of the task. A word is drawn by its position in a list, so another order of
# the words would change the data of every seed.
THINGS = "plot cast music script dialogue story".split()
GOOD = "good great brilliant funny clever".split()
BAD = "bad awful dull boring weak".split()
LIKE = "love enjoy admire".split()
HATE = "hate dislike loathe".split()
PAST = {"love": "loved", "enjoy": "enjoyed", "admire": "admired",
        "hate": "hated", "dislike": "disliked", "loathe": "loathed"}
# The intensifiers. Only the middle two go with a verb.
STRONG = "very truly really extremely".split()
NOT = "not never hardly".split()
POSITIVE = {*GOOD, *LIKE, *(PAST[verb] for verb in LIKE)}
NEGATIVE = {*BAD, *HATE, *(PAST[verb] for verb in HATE)}
FUNCTION_WORDS = "the was , we did but although and".split()
SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
# The number of sentences. No sentence occurs twice.
SIZES = {"train": 3000, "dev": 800, "test": 400}
# About 150,000 parameters. With five layers, the fractions that give BERT-base its
# four depths give four depths here, too.
CONFIG = {
    "architectures": ["BertForSequenceClassification"], "model_type": "bert",
    "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3,
    "intermediate_size": 192, "max_position_embeddings": 32, "type_vocab_size": 2,
    "hidden_act": "gelu",
    # No dropout, because the rule has no noise to overfit. BERT usually starts from
    # weights with a standard deviation of 0.02. These layers learn faster from 0.03,
    # and from 0.1 not at all.
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.03, "layer_norm_eps": 1e-12, "pad_token_id": 0}


def value(clause):
    """Return the sentiment of a clause: 1 or -1, or 2 or -2 with an intensifier.

    A clause has exactly one word of praise or blame. A "not", "never" or "hardly"
    reverses the sign.

    >>> value("the plot was not very good"), value("we loved the plot")
    (-2, 1)
    """
    words = clause.split()
    polarity = 1 if POSITIVE & set(words) else -1
    strength = 2 if set(STRONG) & set(words) else 1
    sign = -1 if set(NOT) & set(words) else 1
    return sign * polarity * strength


def label(sentence):
    """Return 1 for praise, 0 for blame, and None if the two balance.

    A clause after "although" does not count, and neither does a clause before "but".
    The values of clauses joined by "and" are added, so the stronger clause decides if
    they disagree. A sentence whose label would be None is not used.

    >>> label("although the plot was not very good , we loved the cast")   # the cast counts
    1
    >>> label("the plot was really bad and the cast was good")                     # -2 + 1
    0
    """
    if sentence.startswith("although "):
        total = value(sentence.split(" , ")[1])
    elif " but " in sentence:
        total = value(sentence.split(" but ")[1])
    else:
        # The forms "A although B", "A and B" and "A".
        main_clauses = sentence.split(" although ")[0].split(" and ")
        total = sum(value(clause) for clause in main_clauses)
    return None if total == 0 else int(total > 0)


def random_clause(rng):
    """Draw one clause.

    Examples: "the plot was not very good", "we really loved the music".
    """
    def pick(words):
        """Draw one word of a list."""
        return words[int(rng.random() * len(words))]

    is_praise = rng.random() < 0.5
    is_negated = rng.random() < 0.3
    is_strong = rng.random() < 0.4
    # The intensifier and the negation are drawn even if they are not used. With a verb,
    # the negation is always "did not" and is not drawn.
    if rng.random() < 0.35:
        verb = pick(LIKE if is_praise else HATE)
        intensifier = pick(STRONG[1:3])
        words = ["we"]
        if is_negated:
            words += ["did", "not"]
        if is_strong:
            words += [intensifier]
        words += [verb if is_negated else PAST[verb], "the", pick(THINGS)]
    else:
        thing, negation, intensifier = pick(THINGS), pick(NOT), pick(STRONG)
        words = ["the", thing, "was"]
        if is_negated:
            words += [negation]
        if is_strong:
            words += [intensifier]
        words += [pick(GOOD if is_praise else BAD)]
    return " ".join(words)


def random_sentence(rng):
    """Draw one clause, or two clauses joined in one of four ways."""
    forms = ["{0}"] * 2 + ["{0} , but {1}", "although {0} , {1}", "{0} although {1}"] * 2
    forms += ["{0} and {1}"] * 3
    form = forms[int(rng.random() * len(forms))]
    return form.format(random_clause(rng), random_clause(rng))


def make(seed):
    """Return the files of the task and of its BERT, {name: text}."""
    rng, seen, tables = random.Random(seed), set(), {}
    for split, size in SIZES.items():
        # Half of the sentences are praise and half are blame. Sentences with the label
        # None are not used.
        rows, num_left = [], {None: 0, 0: size // 2, 1: size // 2}
        while len(rows) < size:
            sentence = random_sentence(rng)
            answer = label(sentence)
            if sentence not in seen and num_left[answer]:
                seen.add(sentence)
                num_left[answer] -= 1
                rows.append((sentence, answer))
        tables[split] = [("sentence", "label"), *rows]
    # As in SST-2, the test file has row numbers instead of labels.
    sentences = [sentence for sentence, _ in tables["test"][1:]]
    tables["test"] = [("index", "sentence"), *enumerate(sentences)]
    words = {*FUNCTION_WORDS, *THINGS, *POSITIVE, *NEGATIVE, *STRONG, *NOT}
    vocabulary = SPECIAL + sorted(words)
    config = {**CONFIG, "vocab_size": len(vocabulary)}
    files = {"vocab.txt": "".join(word + "\n" for word in vocabulary),
             "config.json": json.dumps(config, indent=2) + "\n"}
    for split, table in tables.items():
        files[f"{split}.tsv"] = "".join(f"{first}\t{second}\n" for first, second in table)
    return files


def main(argv=None):
    """Write the files to --out, and refuse to replace a file that has other contents."""
    parser = argparse.ArgumentParser("glue.toy", description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path,
                        default=Path(__file__).parent / "TOY",
                        help="the directory to write to (default: glue/TOY)")
    parser.add_argument("--seed", type=int, default=0,
                        help="the seed of the sentences (default: 0, as for glue/TOY)")
    options = parser.parse_args(argv)
    contents = {options.out / name: text.encode() for name, text in make(options.seed).items()}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            if path.exists() and path.read_bytes() != content:
                parser.exit(2, f"glue.toy: error: {path} has other contents: choose another "
                               "--out, or remove it\n")
        for path, content in contents.items():
            path.write_bytes(content)
    except OSError as error:
        parser.exit(2, f"glue.toy: error: {error}\n")


if __name__ == "__main__":
    main()
