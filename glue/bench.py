"""How fast: training, evaluation and search against the authors' way and against Hugging Face.

    python -m glue.bench [--models MiniLM BERT-base] [--repeats 3] [--batches 3]
    python -m glue.bench --whole --models BERT-base           seconds of a whole training on MRPC

Shapes with random weights, which change no time, on lengths like MRPC's. *The authors' way* runs on
our own model: fp32, everything padded to 128 tokens, batches of 8, one architecture and one forward
of an idle teacher per step, every architecture of a search evaluated twice. *Hugging Face* is
`BertForSequenceClassification` at its best: our precision or, on a GPU, fp32 where that is faster;
padding to at most 8 tokens beyond the longest; fused AdamW; our setting of malloc (not where memory
is measured). Ours is what `train` does. The contenders of a row take turns; figures are medians of
`--repeats`: of training over `--batches` batches spread evenly over the lengths, of evaluation over
all of dev (the authors' way: five such batches). On a CPU nothing else should run.

A pass is one example through one architecture, forward and backward. The share is that of the best
of a few large matrix products; what masks waste on a GPU does not count for it.
"""

import os
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import model as model_module
import yoco
from glue import run_program
from model import (BertConfig, count_flops, device_name, ElasticBert, peak_memory, print_line,
                   SearchSpace, select_device_and_precision)

try:
    import transformers
except ImportError:
    transformers = None                                              # its rows stay empty

SHAPES = {"BERT-base": BertConfig(),
          "MiniLM": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
          "tiny": BertConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=3,
                             intermediate_size=192)}                 # to try the benchmark itself
WHOLE_STEPS, MEASURED_STEPS = 3016, 200             # 29 epochs of 3,301 examples, 32 a step
SEARCHED = 5                                        # evaluations a repetition


def mrpc():
    """Two lists of encoded examples with random ids, in number and lengths like MRPC's train and
    dev: of the same mean, deviation and extremes."""
    rng, parts = np.random.default_rng(0), []
    for count in (3668, 408):
        lengths = rng.normal(53, 13, count).clip(16, 103).astype(int)
        parts.append([data.Encoded(rng.integers(1000, 30000, n).tolist(), [0] * n, i % 2)
                      for i, n in enumerate(lengths)])
    return parts


def spread(encoded, batch_size, count, device, padding, pad=0):
    """`count` of the batches of `batch_size`, evenly over the lengths, the longest first. padding:
    the device whose padding they get; pad: at least so many tokens."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))
    cut = [order[i:i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    made = []
    for i in range(count):
        *inputs, labels = data.collate(encoded, cut[int((i + 0.5) * len(cut) / count)], padding)
        padded = [F.pad(x, (0, max(0, pad - x.shape[1]))) for x in inputs]
        made.append([x.to(device) for x in (*padded, labels)])
    return made


def draw(config, count):
    """`count` architectures, drawn uniformly."""
    space, rng = SearchSpace.for_config(config), np.random.default_rng(0)
    pi = yoco.Categorical(space.categories)
    return [space.arch(pi.sample(rng)) for _ in range(count)]


def our_steps(config, device, autocast, gradient=None):
    """A function (batch, architectures): a training step of a new model of ours; the losses.
    gradient: what computes it; without it what `train` does there."""
    model = ElasticBert(config, 2).to(device).train()
    adam = yoco.new_adam(model)
    if gradient is None:
        gradient = yoco.graphed_gradient() if device.type == "cuda" else yoco.weight_gradient

    def step(batch, archs):
        losses = gradient(model, batch, archs, autocast)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return losses
    return step


def hf_model(config, device):
    """Hugging Face's model of the same shape."""
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_labels=2,
        intermediate_size=config.intermediate_size)).to(device)


def hf_logits(model, batch, autocast):
    """Logits of Hugging Face's model."""
    ids, types, mask = batch[:3]
    with autocast():
        return model(input_ids=ids, token_type_ids=types, attention_mask=mask.long()).logits


def hf_steps(config, device):
    """A function (batch, autocast): a training step of a new model of Hugging Face's."""
    model = hf_model(config, device).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(batch, autocast):
        adamw.zero_grad()
        F.cross_entropy(hf_logits(model, batch, autocast).float(), batch[3]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
    return step


def forward_flops(config, pairs):
    """FLOPs of the matrix products of a forward pass of every (batch, architecture), without the
    classifier; backward takes twice as many."""
    C, D, total = config.hidden_size, config.head_size, 0
    for (ids, *_), arch in pairs:
        (B, T), h, k = ids.shape, arch.heads[-1], arch.ffn_sizes[-1]
        # `count_flops` has the last layer in full, of which `forward` computes the keys and values
        # of all tokens, and the rest for [CLS] alone.
        spared = (T - 1) * 2 * (2*C*h*D + 2*T*h*D + 2*C*k)
        total += B * (count_flops(config, arch, T) - spared)
    return total


def wait(device):
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(jobs, repeats, device):
    """Median seconds of each of some jobs, (function, its arguments for every call), one after the
    other in every repetition. The first, which warms up, does not count: on a CPU of one call, on a
    GPU of all, each shape of which is recorded."""
    seconds = [[] for _ in jobs]
    for repeat in range(-1, repeats):
        for (function, calls), times in zip(jobs, seconds):
            start = time.perf_counter()
            for arguments in calls[-1:] if repeat < 0 and device.type == "cpu" else calls:
                function(*arguments)
            wait(device)
            times.append(time.perf_counter() - start)
    return [float(np.median(times[1:])) for times in seconds]


def matmul_peak(device, autocast):
    """FLOP/s of the best of a few large matrix products."""
    best = 0
    for n in (2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        x, w = torch.randn(2, n, n, device=device).unbind()
        with torch.inference_mode(), autocast():
            for _ in range(8):
                start = time.perf_counter()
                F.linear(x, w)
                wait(device)
                best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def resident():
    """MiB of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(name, who, device, autocast):
    """Print the MiB at the peak of three training steps of 32, over those before; what PyTorch and
    transformers load when they are first used is loaded before, with the tiny shape."""
    train, _ = mrpc()
    for config in (SHAPES["tiny"], SHAPES[name]):
        before = resident() if device.type == "cpu" else 0
        if who == "HF":
            steps, more = hf_steps(config, device), autocast
        else:
            steps, more = our_steps(config, device, autocast), [config.arch]
        for batch in spread(train, 32, 3, device, device):
            steps(batch, more)
    print(round(peak_memory(device) - before))


def memory_of(who, name, options):
    """What `memory` prints in a process of its own."""
    return int(subprocess.run(
        [sys.executable, "-m", "glue.bench", "--memory", who, "--models", name, "--device",
         options.device, "--precision", options.precision], capture_output=True, text=True,
        check=True).stdout)


def introduce(name, device, autocast):
    """Print what is measured on what."""
    with autocast():
        precision = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
    hugging_face = f", transformers {transformers.__version__}" if transformers else ""
    print_line(f"\n**{name}**, lengths like MRPC's, {precision}, {hardware(device)}, "
        f"torch {torch.__version__}{hugging_face}")


def row(what, unit, ours, other=None, share=""):
    """Print a row of the table."""
    ratio, theirs = ("", "") if other is None else (f"{ours / other:.2f}", f"{other:.2f} {unit}")
    print_line(f"| {what} | {ratio} | {ours:.2f} {unit} | {theirs} | {share} |")


def bench(name, options, device, autocast):
    """Measure one shape and print its table, each row as soon as it is measured."""
    train, dev = mrpc()
    introduce(name, device, autocast)
    peak = matmul_peak(device, autocast)
    print_line("\n| what | ratio | ours | the other | ours, of the matrix product's "
        f"{peak / 1e9:.0f} GFLOP/s |\n|---|---|---|---|---|")

    def compare(what, unit, ours, others=(), flops=0):
        """Let ours and the others take turns, the fastest of which counts, and print the row; units
        of ours a second. Each is (function, its calls, units in all of them); flops: those of all
        calls of ours."""
        jobs = [ours, *others]
        seconds = take_turns([job[:2] for job in jobs], options.repeats, device)
        mine, *theirs = [job[2] / each for job, each in zip(jobs, seconds)]
        share = f"{100 * flops / seconds[0] / peak:.2g}%" if flops else ""
        row(what, unit, mine, max(theirs, default=None), share)
        return mine
    training(compare, SHAPES[name], options.batches, train, device, autocast)
    with torch.inference_mode():
        evaluation(compare, SHAPES[name], options.repeats, dev, device, autocast)
    if transformers:
        row("peak memory of training, ours / Hugging Face", "MiB",
            *(memory_of(who, name, options) for who in ("ours", "HF")))


def training(compare, config, n, train, device, autocast):
    """The rows of training, of n batches each."""
    steps = our_steps(config, device, autocast)
    theirs = our_steps(config, device, nullcontext, yoco.weight_gradient)
    teacher = ElasticBert(config, 2).to(device).eval()
    drawn, largest = draw(config, 2 * n), [[config.arch]] * n
    pairs = [drawn[i:i + 2] for i in range(0, 2 * n, 2)]

    def authors(batch, archs):
        """A step in the authors' way."""
        with torch.no_grad():
            teacher(*batch[:3])
        theirs(batch, archs)

    def compare_steps(what, archs, B, others):
        """Compare n steps of B examples; archs: those of each step."""
        calls = list(zip(spread(train, B, n, device, device), archs))
        passes = [(batch, arch) for batch, archs in calls for arch in archs]
        compare(what, "passes/s", (steps, calls, B * len(passes)), others,
                3 * forward_flops(config, passes))
    padded = spread(train, 8, 2 * n, device, device, pad=128)
    others = [(authors, [(batch, [arch]) for batch, arch in zip(padded, drawn)], 8 * 2 * n)]
    compare_steps("training, uniform architectures, ours at batch 32 / the authors' way at 8",
                  pairs, 32, others)
    compare_steps("the same, both at batch 8", pairs, 8, others)
    hf = hf_steps(config, device) if transformers else None
    for B in (32, 128) if device.type == "cuda" else (32,):
        batches, others = spread(train, B, n, device, "cpu"), []
        for context in (autocast, nullcontext) if device.type == "cuda" else (autocast,):
            if transformers:
                others.append((hf, [(batch, context) for batch in batches], B * n))
        compare_steps(f"training, largest: ours / Hugging Face, the same batches of {B}", largest,
                      B, others)
        compare_steps("training, uniform architectures: ours / Hugging Face, the largest, batches "
                      f"of {B}", pairs, B, others)


def evaluation(compare, config, repeats, dev, device, autocast):
    """The rows of evaluation, all of dev: of the largest, and of a search's architectures."""
    model = ElasticBert(config, 2).to(device).eval()
    score = data.make_evaluator(model, [dev], "accuracy", device, autocast)
    cut = data.token_batches(dev, 2**11 if device.type == "cpu" else 2**15)      # as the scorer's
    ours = [data.collate(dev, indices, device) for indices in cut]
    theirs = [[x.to(device) for x in data.collate(dev, range(i, min(i + 32, len(dev))))]
              for i in range(0, len(dev), 32)]
    wide = spread(dev, 8, 5, device, device, pad=128)                # all alike: five stand for 51
    # What was scored is kept, so every call takes new architectures, the same for both.
    drawn = draw(config, SEARCHED * (repeats + 1))
    to_score, to_pad = iter(drawn), iter(drawn)

    def forward(batch):
        """The whole model."""
        with autocast():
            model(*batch[:3])

    def authors():
        """Part of an evaluation in the authors' way."""
        arch = next(to_pad)
        for batch in wide:
            model(*batch[:3], arch)
    # On a GPU the scorer's replayed graphs, as in a search, which keep nothing.
    whole = (forward, [(batch,) for batch in ours], len(dev))
    if device.type == "cuda":
        whole = (score, [(config.arch,)], len(dev))
    flops = forward_flops(config, [(batch, config.arch) for batch in ours])
    hf = hf_model(config, device).eval() if transformers else None
    for what, batches in (("evaluation, largest: ours / Hugging Face in batches of 32", theirs),
                          ("the same, Hugging Face in our batches", ours)):
        others = [(partial(hf_logits, hf), [(batch, autocast) for batch in batches], len(dev))]
        compare(what, "examples/s", whole, others if transformers else [], flops)
    part = 8 * len(wide) / len(dev) / 2                              # all of dev, twice
    rate = compare(f"search, architectures of {len(dev)} examples: ours / the authors' way",
                   "a second", (lambda: score(next(to_score)), [()] * SEARCHED, SEARCHED),
                   [(authors, [()] * SEARCHED, SEARCHED * part)])
    print_line(f"| 1000 evaluations of a search | | {1000 / rate:.0f} s | | |")


def whole(name, device, autocast):
    """Print the seconds of a whole training on MRPC, estimated from MEASURED_STEPS steps with two
    uniform architectures, after every shape was there once."""
    introduce(name, device, autocast)
    config, train = SHAPES[name], mrpc()[0][:3301]                   # a tenth is held out
    space, rng = SearchSpace.for_config(config), np.random.default_rng(0)
    P, steps = yoco.Categorical(space.categories), our_steps(config, device, autocast)

    def seconds(batches):
        """All that `train` does in some steps, timed."""
        start = time.perf_counter()
        for indices in batches:
            archs = [space.arch(P.uniform().sample(rng)) for _ in range(2)]
            losses = torch.stack(steps(data.collate(train, indices, device), archs)).tolist()
            P.step([space.choices(arch) for arch in archs], losses)
        return time.perf_counter() - start
    order = list(islice(data.batches(train, 32, 0), WHOLE_STEPS))
    shapes = {data.collate(train, indices, device)[0].shape: indices for indices in order}
    first = seconds(shapes.values())
    print_line(f"{first:.1f} s until all {len(shapes)} shapes of batches were there once")
    each = seconds(order[:MEASURED_STEPS]) / MEASURED_STEPS
    print_line(f"a whole training on MRPC: {first + WHOLE_STEPS * each:.0f} s, estimated: these, then "
        f"{WHOLE_STEPS} steps of 32 at {1000 * each:.1f} ms, the mean of {MEASURED_STEPS} measured "
        f"ones ({64 / each:.0f} passes/s); {peak_memory(device):.0f} MiB at the peak")


def measure(options):
    """Measure what was asked for."""
    torch.manual_seed(0)
    if options.memory == "HF":
        model_module.keep_memory = lambda: None                      # as its users have it
    where = select_device_and_precision(options.device, options.precision)
    for name in options.models:
        if options.memory:
            memory(name, options.memory, *where)
        elif options.whole:
            whole(name, *where)
        else:
            bench(name, options, *where)


def main(argv=None):
    """Run the program; the exit status, as `glue.run_program` has it."""
    parser = yoco.Parser("glue.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["MiniLM", "BERT-base"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--memory", choices=("ours", "HF"), help="print that row's figure alone")
    parser.add_argument("--whole", action="store_true", help="estimate a whole training on MRPC")
    return run_program(parser, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
