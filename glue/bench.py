"""How fast: training, evaluation and search against the authors' way and against Hugging Face.

    python -m glue.bench [--models MiniLM BERT-base] [--repeats 3] [--batches 3]
    python -m glue.bench --whole --models BERT-base           seconds of a whole training on MRPC
    python -m glue.bench --growth --models MiniLM             resident memory, step 40 to step 200
    python -m glue.bench --search DIR --evaluations 1000      what shared prefixes save in a search

Shapes with random weights, which change no time, on the lengths of MRPC. *The authors' way* runs on
our own model: fp32, everything padded to 128 tokens, batches of 8, one architecture and one forward
of an idle teacher per step, every architecture of a search evaluated twice. *Hugging Face* is
`BertForSequenceClassification` at its best: in the precision of ours (bf16 by autocast) and, on a
GPU, in fp32 as well, the faster of which counts; batches padded to 8 tokens beyond their longest at
most; fused AdamW; in speed, our setting of malloc. Ours is what `train` does: on a GPU replayed
graphs. All contenders take turns within one run; figures are medians of `--repeats`: of training
over `--batches` batches spread evenly over the lengths, of evaluation over all of dev (the authors'
way: over five such batches). On a CPU nothing else should run.

A pass is one example through one architecture, forward and backward. FLOPs are those of the matrix
products of the sliced computation, counted by PyTorch, also where a GPU computes all and masks; the
peak is the best of a few large products.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import model as model_module
import yoco
from model import (BertConfig, ElasticBert, SearchSpace, UserError, arithmetic, count_flops,
                   hardware, peak_memory)

try:
    import transformers
except ImportError:
    transformers = None                                              # its rows stay empty

SHAPES = {"BERT-base": BertConfig(),
          "MiniLM": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
          "tiny": BertConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=3,
                             intermediate_size=192)}                 # to try the benchmark itself
WHOLE_STEPS, MEASURED_STEPS = 3016, 200             # 29 epochs of 3,301 examples, 32 a step
GROWTH = 40, 200                                    # steps between which memory should not grow


def mrpc():
    """MRPC's train and dev as encoded examples with random ids; where their lengths are from."""
    where = Path(os.environ.get("GLUE_DIR", "glue"), "MRPC")
    bert = Path(os.environ.get("MINILM_DIR", "all-MiniLM-L6-v2"))
    rng = np.random.default_rng(0)
    if (where / "train.tsv").exists() and (bert / "vocab.txt").exists():
        task, source = data.load_task(where), "MRPC's lengths"
        parts = [[len(e.input_ids) for e in data.encode(part, bert, 128)]
                 for part in (task.train, task.dev)]
    else:                                                            # its mean, deviation, extremes
        source = "lengths drawn like MRPC's: normal, 53 +- 13, cut to 16 ... 103"
        parts = [rng.normal(53, 13, n).clip(16, 103).astype(int) for n in (3668, 408)]
    return [[data.Encoded(rng.integers(1000, 30000, n).tolist(), [0] * n, i % 2)
             for i, n in enumerate(lengths)] for lengths in parts], source


def spread(encoded, batch_size, count, device, padding, pad=0):
    """`count` of the batches of `batch_size`, evenly over the lengths. padding: the device whose
    padding they get; pad: at least so many tokens."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))
    cut = [order[i:i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    made = []
    for i in range(count):
        *inputs, labels = data.collate(encoded, cut[int((i + 0.5) * len(cut) / count)], padding)
        padded = [F.pad(x, (0, max(0, pad - x.shape[1]))) for x in inputs]
        made.append([x.to(device) for x in (*padded, labels)])
    return made


def new_gradient(device):
    """What `train` computes gradients with there."""
    return yoco.graphed_gradient() if device.type == "cuda" else yoco.weight_gradient


def step(gradient, model, optimizer, batch, archs, autocast):
    """One training step of ours; the losses."""
    losses = gradient(model, batch, archs, autocast)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses


def hf_step(model, optimizer, batch, autocast):
    """One training step of Hugging Face's model."""
    *inputs, labels = batch
    optimizer.zero_grad()
    with autocast():
        logits = hf_logits(model, inputs)
    F.cross_entropy(logits.float(), labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def hf_logits(model, inputs):
    """Logits of Hugging Face's model."""
    ids, types, mask = inputs
    return model(input_ids=ids, token_type_ids=types, attention_mask=mask.long()).logits


def hf_model(config, device):
    """Hugging Face's model of the same shape, and its optimizer."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_labels=2,
        intermediate_size=config.intermediate_size)).to(device).train()
    return model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


def wait(device):
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(jobs, repeats, device):
    """Median seconds of each job of {name: (function of one item, items)}, one after the other in
    every repetition. The first, which warms up, does not count: on a CPU of one item, on a GPU of
    all, each shape of which is recorded."""
    seconds = {name: [] for name in jobs}
    for repeat in range(-1, repeats):
        for name, (function, items) in jobs.items():
            start = time.perf_counter()
            for item in items[-1:] if repeat < 0 and device.type == "cpu" else items:
                function(item)
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def forward_flops(config, batches, archs):
    """FLOPs of the matrix products of one forward pass per batch and architecture, counted on the
    shapes alone; backward takes twice as many."""
    with torch.device("meta"):
        model = ElasticBert(config, 2)
    with FlopCounterMode(display=False) as counter:
        for batch, arch in zip(batches, archs):                      # as `forward`
            ids, types, mask = (tensor.to("meta") for tensor in batch[:3])
            x, mask = model.embed(ids, types), mask[:, None, None, :]
            for n, (i, heads, ffn_size) in enumerate(config.layers(arch), 1):
                x = model.layers[i](x, mask, heads, ffn_size, last=n == arch.depth)
            model.pooler(x[:, 0])
    return counter.get_total_flops()


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
    (train, _), _ = mrpc()
    for config in (SHAPES["tiny"], SHAPES[name]):
        before = resident() if device.type == "cpu" else 0
        one_step = stepper(config, who, device, autocast)
        for batch in spread(train, 32, 3, device, device):
            one_step(batch)
    print(round(peak_memory(device) - before))


def growth(name, who, device, autocast):
    """Print the MiB by which training grows from step 40 to step 200, on batches in its order."""
    (train, _), _ = mrpc()
    one_step, before = stepper(SHAPES[name], who, device, autocast), 0
    for t, indices in zip(range(GROWTH[1]), data.batches(train, 32, 0)):
        if t == GROWTH[0]:
            before = resident()
        one_step(data.collate(train, indices, device))
    print(round(resident() - before))


def stepper(config, who, device, autocast):
    """A function of a batch: a training step of the largest, of ours or Hugging Face's."""
    if who == "HF":
        model, adamw = hf_model(config, device)
        return lambda batch: hf_step(model, adamw, batch, autocast)
    model, gradient = ElasticBert(config, 2).to(device).train(), new_gradient(device)
    adam = yoco.new_adam(model)
    return lambda batch: step(gradient, model, adam, batch, [config.arch], autocast)


def in_processes(option, name, options):
    """What `--memory` or `--growth` prints for ours and Hugging Face's, a process each."""
    return {who: int(subprocess.run(
        [sys.executable, "-m", "glue.bench", option, who, "--models", name, "--device",
         options.device, "--precision", options.precision], capture_output=True, text=True,
        check=True).stdout) for who in (["ours", "HF"] if transformers else ["ours"])}


def draw(config, count):
    """`count` architectures drawn uniformly, and one with half of the FLOPs of the largest."""
    space, rng = SearchSpace.for_config(config), np.random.default_rng(0)
    pi = yoco.Categorical(space.categories)
    drawn = [space.arch(pi.sample(rng)) for _ in range(max(1000, count))]
    wanted = count_flops(config, space.largest()) / 2
    return drawn[:count], min(drawn, key=lambda arch: abs(count_flops(config, arch) - wanted))


def training(config, options, train, device, autocast):
    """Measure training: {job: passes per second}; {what: FLOP/s of ours}; and how many times the
    matrix products of ours the authors' way computes per pass."""
    n, cuda = options.batches, device.type == "cuda"
    drawn, half = draw(config, 2 * n)
    model = ElasticBert(config, 2).to(device).train()
    teacher, adam = ElasticBert(config, 2).to(device).eval(), yoco.new_adam(model)
    largest, pairs = [config.arch], [drawn[2 * i:2 * i + 2] for i in range(n)]
    padded = spread(train, 8, 2 * n, device, device, pad=128)
    two, one, jobs = new_gradient(device), new_gradient(device), {}

    def authors(i):
        """A step in the authors' way."""
        with torch.no_grad():
            teacher(*padded[i][:3])
        step(yoco.weight_gradient, model, adam, padded[i], drawn[i:i + 1], nullcontext)
    if transformers:
        hf, adamw = hf_model(config, device)
    # Every job is (function of an item, items, passes of each); the largest batches come first.
    sizes = (128, 32) if cuda else (32,)
    made = {B: spread(train, B, n, device, device) for B in (*sizes, 8)}
    for B in sizes:
        tag = "" if B == 32 else f", {B}"
        jobs["uniform" + tag] = uniform(two, model, adam, made[B], pairs, autocast), range(n), 2 * B
        jobs["largest" + tag] = (lambda batch: step(one, model, adam, batch, largest, autocast),
                                 made[B], B)
        if transformers:
            theirs = spread(train, B, n, device, "cpu")
            jobs["HF" + tag] = lambda batch: hf_step(hf, adamw, batch, autocast), theirs, B
            if cuda:
                jobs["HF fp32" + tag] = lambda b: hf_step(hf, adamw, b, nullcontext), theirs, B
    jobs["half"] = lambda b: step(one, model, adam, b, [half], autocast), made[32], 32
    jobs["uniform, 8"] = uniform(two, model, adam, made[8], pairs, autocast), range(n), 16
    jobs["authors"] = authors, range(2 * n), 8
    seconds = take_turns({job: (f, items) for job, (f, items, _) in jobs.items()}, options.repeats,
                         device)
    speed = {job: passes * len(items) / seconds[job] for job, (_, items, passes) in jobs.items()}
    used = {}
    for B in sizes:
        tag = "" if B == 32 else f", {B}"
        twice = [batch for batch in made[B] for _ in range(2)]
        used["training, uniform" + tag] = (3 * forward_flops(config, twice, drawn)
                                           / seconds["uniform" + tag])
        used["training, largest" + tag] = (3 * forward_flops(config, made[B], largest * n)
                                           / seconds["largest" + tag])
        if cuda and transformers:
            speed["HF" + tag] = max(speed["HF" + tag], speed["HF fp32" + tag])
    theirs = (3 * forward_flops(config, padded, drawn)
              + forward_flops(config, padded, largest * 2 * n))
    ours = used["training, uniform"] * seconds["uniform"]
    return speed, used, theirs / ours * 4                            # passes: 16 n against 64 n


def uniform(gradient, model, adam, batches, pairs, autocast):
    """A function of i: a step on batch i with two architectures."""
    return lambda i: step(gradient, model, adam, batches[i], pairs[i], autocast)


def evaluation(config, options, dev, device, autocast):
    """Measure evaluation of all of `dev`: {job: seconds}; {what: FLOP/s of ours}; and the ratio of
    matrix products as above. Ours in batches of so many tokens, Hugging Face's in 32 examples."""
    drawn, half = draw(config, 3)
    model = ElasticBert(config, 2).to(device).eval()
    score = data.scorer(model, [dev], "accuracy", device, autocast)
    fresh = iter(draw(config, 20 * (options.repeats + 1))[0])        # what was scored is kept
    cut = data.token_batches(dev, 2**11 if device.type == "cpu" else 2**15)      # as the scorer's
    ours = [data.collate(dev, indices, device)[:3] for indices in cut]
    theirs = [[x.to(device) for x in data.collate(dev, range(i, min(i + 32, len(dev))))[:3]]
              for i in range(0, len(dev), 32)]
    wide = spread(dev, 8, 5, device, device, pad=128)                # all alike: five stand for 51

    def elastic(arch, context=autocast):
        """A function of inputs: the logits."""
        def call(inputs):
            with context():
                model(*inputs[:3], arch)
        return call

    def whole_dev(arch):
        """The job of all of dev: on a GPU the scorer's replayed graphs, as in a search."""
        if device.type == "cuda":
            return lambda _: score(arch), [None]
        return elastic(arch), ours

    def hugging_face(inputs):
        with autocast():
            hf_logits(hf, inputs)
    jobs = {"largest": whole_dev(config.arch), "half": whole_dev(half),
            "scorer": (lambda _: score(next(fresh)), range(20))}
    for i, arch in enumerate(drawn):
        jobs[f"search {i}"] = whole_dev(arch)
        jobs[f"authors {i}"] = elastic(arch, nullcontext), wide
    if transformers:
        hf = hf_model(config, device)[0].eval()
        jobs |= {"HF": (hugging_face, theirs), "HF sorted": (hugging_face, ours)}
    with torch.inference_mode():
        seconds = take_turns(jobs, options.repeats, device)
    twice = 2 * len(dev) / (8 * len(wide))                           # twice; all of dev
    seconds["search"] = np.mean([seconds[f"search {i}"] for i in range(3)])
    seconds["authors"] = np.mean([seconds[f"authors {i}"] for i in range(3)]) * twice
    used = {"evaluation, largest":
            forward_flops(config, ours, [config.arch] * len(ours)) / seconds["largest"]}
    work = [sum(forward_flops(config, batches, [arch] * len(batches)) for arch in drawn)
            for batches in (wide, ours)]
    return seconds, used, twice * work[0] / work[1]


def bench(name, options, device, autocast):
    """Measure one shape and print its table."""
    config = SHAPES[name]
    (train, dev), source = mrpc()
    sizes = in_processes("--memory", name, options)
    speed, used, train_work = training(config, options, train, device, autocast)
    seconds, used_too, search_work = evaluation(config, options, dev, device, autocast)
    peak = matmul_peak(device, autocast)
    introduce(name, source, device, autocast)
    print("\n| what | ratio | ours | the other |\n|---|---|---|---|")

    def row(what, ours, other, unit):
        print(f"| {what} | {ours / other:.2f} | {ours:.2f} {unit} | {other:.2f} {unit} |")
    row("training, uniform architectures, ours at batch 32 / the authors' way at 8",
        speed["uniform"], speed["authors"], "passes/s")
    row("the same, both at batch 8", speed["uniform, 8"], speed["authors"], "passes/s")
    print(f"| the same, in matrix products alone, at batch 32 | {train_work:.2f} | | |")
    row(f"search, architectures of {len(dev)} examples, nothing shared: ours / the authors' way",
        1 / seconds["search"], 1 / seconds["authors"], "a second")
    print(f"| the same, in matrix products alone | {search_work:.2f} | | |")
    if transformers:
        row("training, largest: ours / Hugging Face, the same batches of 32",
            speed["largest"], speed["HF"], "passes/s")
        row("training, uniform architectures: ours / Hugging Face, the largest, batches of 32",
            speed["uniform"], speed["HF"], "passes/s")
        for what in ("largest", "uniform") if "HF, 128" in speed else ():
            row(f"training, {what}: ours / Hugging Face, the largest, batches of 128",
                speed[what + ", 128"], speed["HF, 128"], "passes/s")
        row("evaluation, largest: ours / Hugging Face in batches of 32",
            len(dev) / seconds["largest"], len(dev) / seconds["HF"], "examples/s")
        row("the same, Hugging Face in our batches",
            len(dev) / seconds["largest"], len(dev) / seconds["HF sorted"], "examples/s")
        row("peak memory of training, ours / Hugging Face", sizes["ours"], sizes["HF"], "MiB")
    _, half = draw(config, 0)
    part = count_flops(config, half) / count_flops(config, config.arch)
    row(f"a sub-BERT with {part:.2f} of the FLOPs / the largest: evaluation",
        seconds["half"], seconds["largest"], "s")
    row("the same: a training step", 32 / speed["half"], 32 / speed["largest"], "s")
    print(f"| a search's evaluation of {len(dev)} examples by data.scorer | | "
          f"{1000 * seconds['scorer'] / 20:.1f} ms | |")
    print("\n| ours | GFLOP/s | of the matrix product's "
          f"{peak / 1e9:.0f} GFLOP/s |\n|---|---|---|")
    for what, value in (used | used_too).items():
        print(f"| {what} | {value / 1e9:.0f} | {100 * value / peak:.2g}% |")


def introduce(name, source, device, autocast):
    """Print what was measured on what."""
    with autocast():
        precision = F.linear(torch.ones(1, 1, device=device), torch.ones(1, 1, device=device)).dtype
    hugging_face = f", transformers {transformers.__version__}" if transformers else ""
    print(f"\n**{name}**, {source}, {precision}, {hardware(device)}, torch {torch.__version__}"
          f"{hugging_face}")


def whole(name, device, autocast):
    """Print the seconds of a whole training on MRPC, estimated from MEASURED_STEPS steps with two
    uniform architectures, after every shape was there once."""
    (train, _), source = mrpc()
    config, pi_rng, shapes = SHAPES[name], np.random.default_rng(0), set()
    space, train = SearchSpace.for_config(config), train[:3301]      # a tenth is held out
    P, model = yoco.Categorical(space.categories), ElasticBert(config, 2).to(device).train()
    adam, gradient, start = yoco.new_adam(model), new_gradient(device), time.perf_counter()

    def one_step(batch):
        """All that a step of `train` does on the device."""
        archs = [space.arch(P.uniform().sample(pi_rng)) for _ in range(2)]
        losses = torch.stack(step(gradient, model, adam, batch, archs, autocast)).tolist()
        P.step([space.choices(arch) for arch in archs], losses)
    for _, indices in zip(range(WHOLE_STEPS), data.batches(train, 32, 0)):
        batch = data.collate(train, indices, device)
        if batch[0].shape not in shapes:
            shapes.add(batch[0].shape)
            one_step(batch)
    wait(device)
    recorded, start = time.perf_counter() - start, time.perf_counter()
    for _, indices in zip(range(MEASURED_STEPS), data.batches(train, 32, 0)):
        one_step(data.collate(train, indices, device))
    wait(device)
    each = (time.perf_counter() - start) / MEASURED_STEPS
    introduce(name, source, device, autocast)
    print(f"a whole training on MRPC: {recorded + WHOLE_STEPS * each:.0f} s, estimated: "
          f"{recorded:.1f} s until all {len(shapes)} shapes of batches were there once, then "
          f"{WHOLE_STEPS} steps of 32 at {1000 * each:.1f} ms, the mean of {MEASURED_STEPS} "
          f"measured ones ({64 / each:.0f} passes/s); {peak_memory(device):.0f} MiB at the peak")


def search(options):
    """Run a search with and without shared prefixes, on the same architectures; print the ratio."""
    found = []
    for memory in (data.PREFIX_MEMORY, 0):
        data.PREFIX_MEMORY = memory
        with tempfile.TemporaryDirectory() as out:
            found += yoco.search(yoco.SearchSettings(
                model=options.search, out=f"{out}/sub", max_params=[options.max_params],
                evaluations=options.evaluations, device=options.device,
                precision=options.precision))
    shared, alone = found
    if any(shared[name] != alone[name] for name in ("arch", "evaluations_run")):
        raise UserError("shared prefixes have changed what was found")
    print(f"{shared['evaluations_run']} evaluations: {shared['seconds']:.0f} s with shared "
          f"prefixes, {alone['seconds']:.0f} s without: ratio "
          f"{alone['seconds'] / shared['seconds']:.2f}")


def main(argv=None):
    """Measure what was asked for; the exit status: 0, or 2 after an error told in one line."""
    parser = yoco.Parser("glue.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["MiniLM", "BERT-base"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--memory", choices=("ours", "HF"), help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help="estimate a whole training on MRPC")
    parser.add_argument("--growth", nargs="?", choices=("ours", "HF", "both"), const="both",
                        help="resident memory from step 40 to step 200, on a CPU")
    parser.add_argument("--search", help="a super-BERT: run a search with and without sharing")
    parser.add_argument("--max-params", default="0.7x", help="its budget")
    parser.add_argument("--evaluations", type=int, default=1000, help="its length")
    try:
        options = parser.parse_args(argv)
        torch.manual_seed(0)
        if "HF" in (options.memory, options.growth):
            model_module.keep_memory = lambda: None                  # as its users have it
        where = arithmetic(options.device, options.precision)
        if options.search:
            search(options)
        elif options.memory:
            memory(options.models[0], options.memory, *where)
        elif options.growth in ("ours", "HF"):
            growth(options.models[0], options.growth, *where)
        else:
            for name in options.models:
                if options.whole:
                    whole(name, *where)
                elif options.growth:
                    for who, grown in in_processes("--growth", name, options).items():
                        print(f"{name}, {who}: {grown:+d} MiB resident from step 40 to step 200")
                else:
                    bench(name, options, *where)
    except (UserError, OSError) as error:
        print(f"glue.bench: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
