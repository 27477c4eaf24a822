"""How fast: training, evaluation and search against the authors' way and against Hugging Face.

    python -m glue.bench [--models MiniLM BERT-base] [--repeats 3] [--batches 3]
    python -m glue.bench --search DIR --evaluations 1000      what shared prefixes save in a search
    python -m glue.bench --ways DIR DIR --repeats 20          models in PyTorch, ONNX, torch.export

Shapes with random weights, which change no time, on the lengths of MRPC. *The authors' way* runs on
our own model: fp32, everything padded to 128 tokens, batches of 8, one architecture and one forward
of an idle teacher per step, every architecture of a search evaluated twice. *Hugging Face* is
`BertForSequenceClassification` at its best: the same precision as ours, batches padded to their
longest, fused AdamW, and, in speed, our setting of malloc. All contenders take turns within one
run; figures are medians of `--repeats`: of training over `--batches` batches spread evenly over the
lengths, of evaluation over all of dev (the authors' way: over five such batches). On a CPU nothing
else should run.

A pass is one example through one architecture, forward and backward. FLOPs are those of the matrix
products that are really computed, counted by PyTorch; the peak is the best of a few large products.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import model as model_module
import yoco
from model import (BertConfig, ElasticBert, SearchSpace, arithmetic, count_flops, hardware,
                   load_bert, peak_memory)

try:
    import transformers
except ImportError:
    transformers = None                                              # its rows stay empty

SHAPES = {"BERT-base": BertConfig(),
          "MiniLM": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
          "tiny": BertConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=3,
                             intermediate_size=192)}                 # to try the benchmark itself


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


def spread(encoded, batch_size, count, device, pad=0):
    """`count` of the batches of `batch_size`, evenly over the lengths; `pad`: to so many tokens."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].input_ids))
    cut = [order[i:i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    chosen = [cut[int((i + 0.5) * len(cut) / count)] for i in range(count)]
    made = [data.collate(encoded, indices, device) for indices in chosen]
    return [(*(F.pad(x, (0, max(0, pad - x.shape[1]))) for x in inputs), labels)
            for *inputs, labels in made]


def step(model, optimizer, batch, archs, autocast, teacher=None):
    """One training step of ours; with `teacher` its idle forward as well."""
    if teacher is not None:
        with torch.no_grad():
            teacher(*batch[:3])
    yoco.weight_gradient(model, batch, archs, autocast)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


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


def hf_model(config):
    """Hugging Face's model of the same shape."""
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, num_labels=2,
        intermediate_size=config.intermediate_size))


def take_turns(jobs, repeats, device):
    """Median seconds of each job of {name: (function of one item, items)}, one after the other in
    every repetition; a first call on the last item warms up."""
    seconds = {name: [] for name in jobs}
    for repeat in range(-1, repeats):
        for name, (function, items) in jobs.items():
            start = time.perf_counter()
            for item in items if repeat >= 0 else items[-1:]:
                function(item)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def forward_flops(config, batches, archs):
    """FLOPs of the matrix products of one forward pass per batch and architecture, counted on the
    shapes alone; backward takes twice as many."""
    with torch.device("meta"):
        model = ElasticBert(config, 2)
    with FlopCounterMode(display=False) as counter:
        for batch, arch in zip(batches, archs):
            model(*(tensor.to("meta") for tensor in batch[:3]), arch)
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
                if device.type == "cuda":
                    torch.cuda.synchronize()
                best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def memory(name, who, device, autocast):
    """Print the MiB at the peak of three training steps of 32, over those before; what PyTorch and
    transformers load when they are first used is loaded before, with the tiny shape."""
    (train, _), _ = mrpc()
    for config in (SHAPES["tiny"], SHAPES[name]):
        pages = Path("/proc/self/statm").read_text().split()[1] if device.type == "cpu" else 0
        before = int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20     # resident now
        model = (ElasticBert(config, 2) if who == "ours" else hf_model(config)).to(device).train()
        optimizer = (yoco.new_optimizer(model) if who == "ours"
                     else torch.optim.AdamW(model.parameters(), lr=0.0, fused=True))
        for batch in spread(train, 32, 3, device):
            if who == "ours":
                step(model, optimizer, batch, [config.arch], autocast)
            else:
                hf_step(model, optimizer, batch, autocast)
    print(round(peak_memory(device) - before))


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
    n = options.batches
    drawn, half = draw(config, 2 * n)
    model = ElasticBert(config, 2).to(device).train()
    teacher = ElasticBert(config, 2).to(device).eval()
    adam, fp32, largest = yoco.new_optimizer(model), contextlib.nullcontext, [config.arch]
    by_32, by_8 = spread(train, 32, n, device), spread(train, 8, n, device)
    padded = spread(train, 8, 2 * n, device, pad=128)
    pairs = [drawn[2 * i:2 * i + 2] for i in range(n)]
    # Every job is (function of an item, items, passes of each); the largest batches come first.
    jobs = {
        "uniform": (lambda i: step(model, adam, by_32[i], pairs[i], autocast), range(n), 64),
        "uniform, 8": (lambda i: step(model, adam, by_8[i], pairs[i], autocast), range(n), 16),
        "authors": (lambda i: step(model, adam, padded[i], drawn[i:i + 1], fp32, teacher),
                    range(2 * n), 8),
        "largest": (lambda b: step(model, adam, b, largest, autocast), by_32, 32),
        "half": (lambda b: step(model, adam, b, [half], autocast), by_32, 32)}
    if transformers:
        hf = hf_model(config).to(device).train()
        adamw = torch.optim.AdamW(hf.parameters(), lr=0.0, fused=True)
        jobs["HF"] = lambda b: hf_step(hf, adamw, b, autocast), by_32, 32
    seconds = take_turns({job: (f, items) for job, (f, items, _) in jobs.items()}, options.repeats,
                         device)
    speed = {job: passes * len(items) / seconds[job] for job, (_, items, passes) in jobs.items()}
    ours = 3 * forward_flops(config, [b for b in by_32 for _ in range(2)], drawn)
    theirs = (3 * forward_flops(config, padded, drawn)
              + forward_flops(config, padded, largest * 2 * n))
    used = {"training, uniform": ours / seconds["uniform"], "training, largest":
            3 * forward_flops(config, by_32, largest * n) / seconds["largest"]}
    return speed, used, theirs / ours * 4                            # passes: 16 n against 64 n


def evaluation(config, options, dev, device, autocast):
    """Measure evaluation of all of `dev`: {job: seconds}; {what: FLOP/s of ours}; and the ratio of
    matrix products as above. Ours in batches of so many tokens, Hugging Face's in 32 examples."""
    drawn, half = draw(config, 3)
    model = ElasticBert(config, 2).to(device).eval()
    ours = [data.collate(dev, cut, device)[:3]
            for cut in data.token_batches(dev, data.batch_tokens(device))]
    theirs = [data.collate(dev, range(i, min(i + 32, len(dev))), device)[:3]
              for i in range(0, len(dev), 32)]
    wide = spread(dev, 8, 5, device, pad=128)                        # all alike: five stand for 51

    def job(function, items, context=autocast):
        def call(inputs):
            with context():
                function(inputs)
        return call, items

    def elastic(arch):
        return lambda inputs: model(*inputs[:3], arch)
    jobs = {"largest": job(elastic(config.arch), ours), "half": job(elastic(half), ours)}
    jobs |= {f"search {i}": job(elastic(arch), ours) for i, arch in enumerate(drawn)}
    jobs |= {f"authors {i}": job(elastic(arch), wide, contextlib.nullcontext)
             for i, arch in enumerate(drawn)}
    if transformers:
        hf = hf_model(config).to(device).eval()
        jobs["HF"] = job(lambda inputs: hf_logits(hf, inputs), theirs)
        jobs["HF sorted"] = job(lambda inputs: hf_logits(hf, inputs), ours)
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
    sizes = {who: int(subprocess.run(                                # a process each: a peak stays
        [sys.executable, "-m", "glue.bench", "--memory", who, "--models", name,
         "--device", options.device, "--precision", options.precision], capture_output=True,
        text=True, check=True).stdout) for who in (["ours", "HF"] if transformers else ["ours"])}
    speed, used, train_work = training(config, options, train, device, autocast)
    seconds, used_too, search_work = evaluation(config, options, dev, device, autocast)
    peak = matmul_peak(device, autocast)
    with autocast():
        precision = F.linear(torch.ones(1, 1, device=device), torch.ones(1, 1, device=device)).dtype
    print(f"\n**{name}**, {source}, {precision}, {hardware(device)}, "
          f"torch {torch.__version__}"
          + (f", transformers {transformers.__version__}" if transformers else ""))
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
    print("\n| ours | GFLOP/s | of the matrix product's "
          f"{peak / 1e9:.0f} GFLOP/s |\n|---|---|---|")
    for what, value in (used | used_too).items():
        print(f"| {what} | {value / 1e9:.0f} | {100 * value / peak:.0f}% |")


def search(options):
    """Run a search with and without shared prefixes, on the same architectures; print the ratio."""
    found = []
    for memory in (data.PREFIX_MEMORY, 0):
        data.PREFIX_MEMORY = memory
        with tempfile.TemporaryDirectory() as out:
            found.append(yoco.search(yoco.SearchSettings(
                model=options.search, out=f"{out}/sub", max_params=options.max_params,
                evaluations=options.evaluations, device=options.device,
                precision=options.precision)))
    shared, alone = found
    assert all(shared[name] == alone[name] for name in ("arch", "evaluations_run"))
    print(f"{shared['evaluations_run']} evaluations: {shared['seconds']:.0f} s with shared "
          f"prefixes, {alone['seconds']:.0f} s without: ratio "
          f"{alone['seconds'] / shared['seconds']:.2f}")


def ways(directories, repeats):
    """Print how fast each way runs each model, at batch 1 and 32, its size on disk, and its score
    on dev. Threads are PyTorch's everywhere."""
    cpu, jobs, rows = torch.device("cpu"), {}, []
    for directory in directories:
        model, run = load_bert(directory), yoco.read_run(directory)
        task = data.load_task(run["data"])
        encoded = data.encode(task.dev, directory)
        batches = [data.collate(encoded, cut) for cut in data.token_batches(encoded, 2**11)]
        labels = torch.cat([labels for *_, labels in batches]).numpy()
        full = [torch.ones(B, min(128, model.config.max_position_embeddings), dtype=torch.int64)
                for B in (1, 32)]
        with tempfile.TemporaryDirectory() as out:
            for way, (function, size) in forms(model, directory, out).items():
                with torch.inference_mode():
                    logits = torch.cat([function(*inputs).float() for *inputs, _ in batches])
                score = data.scores(task.metric, labels, logits.numpy())["score"]
                rows.append((directory, way, size / 2**20, score))
                for ids in full:
                    jobs[directory, way, len(ids)] = (lambda x, f=function: f(x, 0 * x, x)), [ids]
    with torch.inference_mode():
        seconds = take_turns(jobs, repeats, cpu)
    print(f"\n{hardware(cpu)}, 128 tokens (or as many as a model has positions)\n")
    print("| model | way | ms at batch 1 | at batch 32 | MiB on disk | dev |")
    print("|---|---|---|---|---|---|")
    for directory, way, size, score in rows:
        ms = [1000 * seconds[directory, way, B] for B in (1, 32)]
        print(f"| {Path(directory).name} | {way} | {ms[0]:.1f} | {ms[1]:.0f} | {size:.1f} | "
              f"{score:.2f} |")


def forms(model, directory, out):
    """{way: (function of three [B, T] tensors -> logits, bytes on disk)} of one model."""
    import onnxruntime
    import onnxruntime.quantization

    def session(path):
        """A function of an ONNX file, with as many threads as PyTorch has."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")     # when idle
        run = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]).run
        return lambda *inputs: torch.from_numpy(run(None, dict(zip(
            model_module.INPUTS, (x.long().numpy() for x in inputs))))[0])

    def bf16(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs)
    own = (Path(directory) / "model.safetensors").stat().st_size
    model_module.write_export(model, Path(out), "onnx")
    exported = model_module.write_export(model, Path(out), "torch")
    onnxruntime.quantization.quantize_dynamic(f"{out}/model.onnx", f"{out}/int8.onnx")
    size = {name: (Path(out) / name).stat().st_size for name in ("model.onnx", "int8.onnx",
                                                                 "model.pt2")}
    return {"PyTorch fp32": (model, own), "PyTorch bf16": (bf16, own),
            "torch.export fp32": (exported, size["model.pt2"]),
            "ONNX fp32": (session(f"{out}/model.onnx"), size["model.onnx"]),
            "ONNX dynamic int8": (session(f"{out}/int8.onnx"), size["int8.onnx"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["MiniLM", "BERT-base"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--memory", choices=("ours", "HF"), help=argparse.SUPPRESS)
    parser.add_argument("--search", help="a super-BERT: run a search with and without sharing")
    parser.add_argument("--ways", nargs="+", help="directories of models: ways to run them")
    parser.add_argument("--max-params", default="0.7x", help="its budget")
    parser.add_argument("--evaluations", type=int, default=1000, help="its length")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.memory == "HF":
        model_module.keep_memory = lambda: None                      # as its users have it
    where = arithmetic(options.device, options.precision)
    if options.search:
        search(options)
    elif options.ways:
        ways(options.ways, options.repeats)
    elif options.memory:
        memory(options.models[0], options.memory, *where)
    else:
        for model_name in options.models:
            bench(model_name, options, *where)
