"""Compare our speed with the authors' way of computing and with Hugging Face.

    python -m glue.bench [--models MiniLM BERT-base] [--repeats 3] [--batches 3]
    python -m glue.bench --whole --models BERT-base   # seconds of a whole training

Training, evaluation and search are measured. The models have random weights and the
examples random tokens, because neither changes the time. The lengths of the examples are
like MRPC's.

*The authors' way* runs on our own model. It computes in fp32 and pads everything to 128
tokens. A step has a batch of 8, one architecture and one forward pass of an unused
teacher. A search evaluates every architecture twice.

*Hugging Face* is `BertForSequenceClassification` at its best. It runs in our precision.
On a GPU it also trains in fp32, and the faster of the two counts. It pads to the longest
example, rounded up to a multiple of 8 tokens. It uses fused AdamW, and our setting of
malloc except where memory is measured.

*Ours* is the code of this project. The contenders of a row of the table take turns. A
figure is the median of `--repeats` repetitions. Training is measured on `--batches`
batches, spread evenly over the lengths. Evaluation is measured on all of dev. A search in
the authors' way is measured on five batches of dev. On a CPU, run nothing else at the
same time.

A pass is one example through one architecture, forward and backward. The share is our
FLOP/s divided by the FLOP/s of the fastest of a few large matrix products. It does not
count the operations that masking wastes on a GPU.
"""

import os
import subprocess
import sys
import time
from collections import namedtuple
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
    # The rows that compare with Hugging Face then show only our figures.
    transformers = None

SHAPES = {
    "BERT-base": BertConfig(),
    "MiniLM": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    # This one is for trying out the benchmark.
    "tiny": BertConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=3,
                       intermediate_size=192),
}
# A whole training on MRPC is 29 epochs of 3,301 examples, 32 per step.
WHOLE_STEPS = 3016
MEASURED_STEPS = 200
# The evaluations of a search in one repetition.
SEARCH_EVALUATIONS = 5

# A function to measure, the arguments of its calls in one repetition, and the number of
# units (passes, examples or evaluations) that these calls do together.
Job = namedtuple("Job", "function calls units")


# ---- Examples, batches and architectures ---------------------------------------------------------

def mrpc_like_examples():
    """Return two lists of random encoded examples, as many as MRPC's train and dev have.

    Their lengths have the mean, the deviation and the extremes of MRPC's.
    """
    rng = np.random.default_rng(0)
    splits = []
    for count in (3668, 408):
        lengths = rng.normal(53, 13, count).clip(16, 103).astype(int)
        examples = []
        for i, n in enumerate(lengths):
            token_ids = rng.integers(1000, 30000, n).tolist()
            examples.append(data.Encoded(token_ids, [0] * n, i % 2))
        splits.append(examples)
    return splits


def spread_batches(encoded, batch_size, count, device, padding, min_tokens=0):
    """Return `count` batches, spread evenly over the lengths, the longest first.

    The batches are on `device`, and `padding` is the device for which they are padded.
    Every batch has at least `min_tokens` tokens.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))
    groups = [order[i:i + batch_size]
              for i in range(0, len(order) - batch_size + 1, batch_size)]
    batches = []
    for i in range(count):
        indices = groups[int((i + 0.5) * len(groups) / count)]
        *inputs, labels = data.collate(encoded, indices, padding)
        padded = [F.pad(x, (0, max(0, min_tokens - x.shape[1]))) for x in inputs]
        batches.append([x.to(device) for x in (*padded, labels)])
    return batches


def draw_archs(config, count):
    """Return `count` architectures, drawn uniformly."""
    space = SearchSpace.for_config(config)
    rng = np.random.default_rng(0)
    pi = yoco.Categorical(space.categories)
    return [space.arch(pi.sample(rng)) for _ in range(count)]


# ---- The contenders ------------------------------------------------------------------------------

def make_our_step(config, device, autocast, gradient=None):
    """Return a function (batch, archs) that does a training step and returns the losses.

    It trains a new model of ours. `gradient` computes the gradients. Its default is the
    function that `train` uses on this device.
    """
    model = ElasticBert(config, 2).to(device).train()
    adam = yoco.new_adam(model)
    if gradient is None:
        gradient = yoco.weight_gradient
        if device.type == "cuda":
            gradient = yoco.graphed_gradient()

    def step(batch, archs):
        losses = gradient(model, batch, archs, autocast)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return losses

    return step


def make_hf_model(config, device):
    """Return Hugging Face's model of the same shape."""
    hf_config = transformers.BertConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_labels=2,
        intermediate_size=config.intermediate_size)
    return transformers.BertForSequenceClassification(hf_config).to(device)


def hf_logits(model, batch, autocast):
    """Return the logits of Hugging Face's model."""
    ids, types, mask = batch[:3]
    with autocast():
        return model(input_ids=ids, token_type_ids=types, attention_mask=mask.long()).logits


def make_hf_step(config, device):
    """Return a function (batch, autocast) that trains a new model of Hugging Face."""
    model = make_hf_model(config, device).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(batch, autocast):
        adamw.zero_grad()
        F.cross_entropy(hf_logits(model, batch, autocast).float(), batch[3]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()

    return step


# ---- Measuring -----------------------------------------------------------------------------------

def forward_flops(config, pairs):
    """Return the FLOPs of the matrix products in a forward pass of every (batch, arch).

    The classifier is not counted. A backward pass takes twice as many.
    """
    C, D = config.hidden_size, config.head_size
    total = 0
    for (ids, *_), arch in pairs:
        B, T = ids.shape
        h, k = arch.heads[-1], arch.ffn_sizes[-1]
        # `count_flops` counts the last layer in full. `forward` needs only its [CLS]
        # token. It computes keys and values for all tokens, and the rest of that layer
        # for [CLS] only.
        saved = (T - 1) * 2 * (2*C*h*D + 2*T*h*D + 2*C*k)
        total += B * (count_flops(config, arch, T) - saved)
    return total


def synchronize(device):
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(jobs, repeats, device):
    """Run all jobs in turn in every repetition, and return the median seconds of each.

    A first repetition, the warm-up, does not count. On a CPU it makes one call of each
    job. On a GPU it makes all calls, because every shape of a batch is recorded as a
    graph.
    """
    seconds = [[] for _ in jobs]
    for repeat in range(-1, repeats):
        for job, times in zip(jobs, seconds):
            calls = job.calls
            if repeat < 0 and device.type == "cpu":
                calls = calls[-1:]
            start = time.perf_counter()
            for arguments in calls:
                job.function(*arguments)
            synchronize(device)
            times.append(time.perf_counter() - start)
    return [float(np.median(times[1:])) for times in seconds]


def matmul_peak(device, autocast):
    """Return the FLOP/s of the fastest of a few large matrix products."""
    best = 0
    for n in (2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        x, w = torch.randn(2, n, n, device=device).unbind()
        with torch.inference_mode(), autocast():
            for _ in range(8):
                start = time.perf_counter()
                F.linear(x, w)
                synchronize(device)
                best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def resident_memory():
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def print_step_memory(name, contender, device, autocast):
    """Print the MiB that three training steps with batches of 32 need at their peak.

    The memory that was in use before them is subtracted.
    """
    train, _ = mrpc_like_examples()
    # PyTorch and transformers load libraries when they are first used. The tiny shape
    # makes them do so before the memory is read.
    for config in (SHAPES["tiny"], SHAPES[name]):
        before = resident_memory() if device.type == "cpu" else 0
        if contender == "HF":
            step, argument = make_hf_step(config, device), autocast
        else:
            step, argument = make_our_step(config, device, autocast), [config.arch]
        for batch in spread_batches(train, 32, 3, device, device):
            step(batch, argument)
    print(round(peak_memory(device) - before))


def step_memory(contender, name, options):
    """Return the figure of `print_step_memory`, measured in a new process."""
    process = subprocess.run(
        [sys.executable, "-m", "glue.bench", "--memory", contender, "--models", name,
         "--device", options.device, "--precision", options.precision],
        capture_output=True, text=True, check=True)
    return int(process.stdout)


# ---- The table -----------------------------------------------------------------------------------

def print_heading(name, device, autocast):
    """Print the shape, the precision, the hardware and the versions."""
    with autocast():
        precision = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
    hugging_face = ""
    if transformers:
        hugging_face = f", transformers {transformers.__version__}"
    print_line(f"\n**{name}**, lengths like MRPC's, {precision}, {device_name(device)}, "
               f"torch {torch.__version__}{hugging_face}")


def print_row(title, unit, ours, other=None, share=""):
    """Print one row of the table."""
    ratio = other_text = ""
    if other is not None:
        ratio, other_text = f"{ours / other:.2f}", f"{other:.2f} {unit}"
    print_line(f"| {title} | {ratio} | {ours:.2f} {unit} | {other_text} | {share} |")


def bench_shape(name, options, device, autocast):
    """Measure one shape and print its table, each row as soon as it is measured."""
    train, dev = mrpc_like_examples()
    print_heading(name, device, autocast)
    peak = matmul_peak(device, autocast)
    print_line("\n| what | ratio | ours | the other | ours, of the matrix product's "
               f"{peak / 1e9:.0f} GFLOP/s |\n|---|---|---|---|---|")

    def compare(title, unit, ours, others=(), flops=0):
        """Measure the jobs, print the row, and return our units per second.

        The row compares ours with the fastest of the others. `flops` counts all our calls.
        """
        jobs = [ours, *others]
        seconds = take_turns(jobs, options.repeats, device)
        our_rate, *other_rates = [job.units / t for job, t in zip(jobs, seconds)]
        share = ""
        if flops:
            share = f"{100 * flops / seconds[0] / peak:.2g}%"
        print_row(title, unit, our_rate, max(other_rates, default=None), share)
        return our_rate

    bench_training(compare, SHAPES[name], options.batches, train, device, autocast)
    with torch.inference_mode():
        bench_evaluation(compare, SHAPES[name], options.repeats, dev, device, autocast)
    if transformers:
        print_row("peak memory of training, ours / Hugging Face", "MiB",
                  step_memory("ours", name, options), step_memory("HF", name, options))


def bench_training(compare, config, n, train, device, autocast):
    """Print the rows of training, each measured on n batches."""
    our_step = make_our_step(config, device, autocast)
    plain_step = make_our_step(config, device, nullcontext, yoco.weight_gradient)
    teacher = ElasticBert(config, 2).to(device).eval()
    drawn = draw_archs(config, 2 * n)
    largest = [[config.arch]] * n
    pairs = [drawn[i:i + 2] for i in range(0, 2 * n, 2)]

    def authors_step(batch, archs):
        """Do a training step in the authors' way."""
        with torch.no_grad():
            teacher(*batch[:3])
        plain_step(batch, archs)

    def compare_steps(title, archs, B, others):
        """Print the row of n steps, with B examples and the given archs for each."""
        calls = list(zip(spread_batches(train, B, n, device, device), archs))
        passes = [(batch, arch) for batch, step_archs in calls for arch in step_archs]
        ours = Job(our_step, calls, B * len(passes))
        compare(title, "passes/s", ours, others, 3 * forward_flops(config, passes))

    padded = spread_batches(train, 8, 2 * n, device, device, min_tokens=128)
    authors_calls = [(batch, [arch]) for batch, arch in zip(padded, drawn)]
    authors = [Job(authors_step, authors_calls, 8 * 2 * n)]
    compare_steps("training, uniform architectures, ours at batch 32 / the authors' way at 8",
                  pairs, 32, authors)
    compare_steps("the same, both at batch 8", pairs, 8, authors)

    # On a GPU Hugging Face runs in both precisions, and the faster one counts.
    contexts, sizes = [autocast], [32]
    if device.type == "cuda":
        contexts, sizes = [autocast, nullcontext], [32, 128]
    hf_step = make_hf_step(config, device) if transformers else None
    for B in sizes:
        batches = spread_batches(train, B, n, device, "cpu")
        others = []
        for context in contexts:
            if transformers:
                calls = [(batch, context) for batch in batches]
                others.append(Job(hf_step, calls, B * n))
        compare_steps(f"training, largest: ours / Hugging Face, the same batches of {B}",
                      largest, B, others)
        compare_steps("training, uniform architectures: ours / Hugging Face, the largest, "
                      f"batches of {B}", pairs, B, others)


def bench_evaluation(compare, config, repeats, dev, device, autocast):
    """Print the rows of evaluation on all of dev, and those of a search."""
    model = ElasticBert(config, 2).to(device).eval()
    evaluate = data.make_evaluator(model, [dev], "accuracy", device, autocast)

    def forward(batch):
        """Do a forward pass of the largest architecture."""
        with autocast():
            model(*batch[:3])

    # These are the batches of the evaluator.
    indices = data.token_batches(dev, 2**11 if device.type == "cpu" else 2**15)
    batches = [data.collate(dev, i, device) for i in indices]
    ours = Job(forward, [(batch,) for batch in batches], len(dev))
    if device.type == "cuda":
        # The evaluator replays graphs, as in a search. On a GPU it does not cache
        # anything.
        ours = Job(evaluate, [(config.arch,)], len(dev))
    flops = forward_flops(config, [(batch, config.arch) for batch in batches])

    batches_of_32 = [data.collate(dev, range(i, min(i + 32, len(dev))))
                     for i in range(0, len(dev), 32)]
    batches_of_32 = [[x.to(device) for x in batch] for batch in batches_of_32]
    hf = make_hf_model(config, device).eval() if transformers else None
    rows = {
        "evaluation, largest: ours / Hugging Face in batches of 32": batches_of_32,
        "the same, Hugging Face in our batches": batches,
    }
    for title, hf_batches in rows.items():
        others = []
        if transformers:
            calls = [(batch, autocast) for batch in hf_batches]
            others = [Job(partial(hf_logits, hf), calls, len(dev))]
        compare(title, "examples/s", ours, others, flops)
    bench_search(compare, config, repeats, dev, device, model, evaluate)


def bench_search(compare, config, repeats, dev, device, model, evaluate):
    """Print the rows of a search, ours and the authors' way."""
    # The evaluator caches hidden states, so every call must evaluate a new architecture.
    # Both contenders get the same ones. The `+ 1` is the warm-up.
    drawn = draw_archs(config, SEARCH_EVALUATIONS * (repeats + 1))
    our_archs, authors_archs = iter(drawn), iter(drawn)
    # All batches have the same shape when they are padded to 128 tokens, so five of the
    # 51 represent all of them.
    padded = spread_batches(dev, 8, 5, device, device, min_tokens=128)

    def evaluate_next():
        """Evaluate the next architecture in our way."""
        evaluate(next(our_archs))

    def authors_evaluate_next():
        """Do a part of an evaluation of the next architecture in the authors' way."""
        arch = next(authors_archs)
        for batch in padded:
            model(*batch[:3], arch)

    # The authors evaluate all of dev twice. `part` is the share of that work that one
    # call above does.
    part = 8 * len(padded) / len(dev) / 2
    calls = [()] * SEARCH_EVALUATIONS
    ours = Job(evaluate_next, calls, SEARCH_EVALUATIONS)
    authors = Job(authors_evaluate_next, calls, SEARCH_EVALUATIONS * part)
    rate = compare(f"search, architectures of {len(dev)} examples: ours / the authors' way",
                   "a second", ours, [authors])
    print_line(f"| 1000 evaluations of a search | | {1000 / rate:.0f} s | | |")


def bench_whole_training(name, device, autocast):
    """Print an estimate of the seconds of a whole training on MRPC.

    First comes one step for every batch shape. The time of the whole training is then
    extrapolated from MEASURED_STEPS steps with two uniform architectures each.
    """
    print_heading(name, device, autocast)
    config = SHAPES[name]
    # A tenth of train is the hold-out set.
    train = mrpc_like_examples()[0][:3301]
    space = SearchSpace.for_config(config)
    rng = np.random.default_rng(0)
    P = yoco.Categorical(space.categories)
    step = make_our_step(config, device, autocast)

    def time_steps(batches):
        """Do all that `train` does in a step for every batch, and return the seconds."""
        start = time.perf_counter()
        for indices in batches:
            archs = [space.arch(P.uniform().sample(rng)) for _ in range(2)]
            losses = torch.stack(step(data.collate(train, indices, device), archs)).tolist()
            P.step([space.choices(arch) for arch in archs], losses)
        return time.perf_counter() - start

    batches = list(islice(data.batches(train, 32, 0), WHOLE_STEPS))
    # Take one batch of every shape. The first step with a shape is slow. On a GPU it
    # records a graph.
    by_shape = {data.collate(train, indices, device)[0].shape: indices for indices in batches}
    first = time_steps(by_shape.values())
    print_line(f"{first:.1f} s for the first step with each of the {len(by_shape)} batch shapes")
    per_step = time_steps(batches[:MEASURED_STEPS]) / MEASURED_STEPS
    print_line(f"a whole training on MRPC: {first + WHOLE_STEPS * per_step:.0f} s, estimated: "
               f"these, then {WHOLE_STEPS} steps of 32 at {1000 * per_step:.1f} ms, the mean of "
               f"{MEASURED_STEPS} measured ones ({64 / per_step:.0f} passes/s). "
               f"Peak memory: {peak_memory(device):.0f} MiB")


# ---- The command ---------------------------------------------------------------------------------

def measure(options):
    """Measure what the options ask for."""
    torch.manual_seed(0)
    if options.memory == "HF":
        # Users of Hugging Face do not have our setting of malloc.
        model_module.keep_memory = lambda: None
    device, autocast = select_device_and_precision(options.device, options.precision)
    for name in options.models:
        if options.memory:
            print_step_memory(name, options.memory, device, autocast)
        elif options.whole:
            bench_whole_training(name, device, autocast)
        else:
            bench_shape(name, options, device, autocast)


def main(argv=None):
    """Run the program, and return the exit status that `glue.run_program` describes."""
    parser = yoco.Parser("glue.bench", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=SHAPES, default=["MiniLM", "BERT-base"],
        help="the shapes to measure (default: MiniLM BERT-base)")
    add("--repeats", type=int, default=3, help="the repetitions of each row (default: 3)")
    add("--batches", type=int, default=3, help="the batches of each training row (default: 3)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--precision", default="auto", help="auto, fp32 or bf16 (default: auto)")
    add("--memory", choices=("ours", "HF"), help="only print the peak memory of this contender")
    add("--whole", action="store_true", help="only estimate the time of a whole training on MRPC")
    return run_program(parser, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
