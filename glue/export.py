"""Export a trained model to a format that loads without this project.

    python -m glue.export --model DIR --format onnx         -> export/NAME-onnx/model.onnx
    python -m glue.export --model DIR --format onnx --int8  -> export/NAME-onnx-int8/model.onnx
    python -m glue.export --model DIR --format torch        -> export/NAME-torch/model.pt2
    python -m glue.export --model DIR --format hf           -> export/NAME-hf/model.safetensors

hf is for the transformers library. The onnx and torch models take three int64 tensors
[B, T], of any B and T: input_ids, token_type_ids, attention_mask. In a Hugging Face
BERT all layers have the same size. The hf model therefore has all heads in every layer,
and as many FFN neurons as the largest FFN of the sub-BERT. Zeros fill the places of the
heads and neurons that were dropped, so the hf model is larger and slower.

ONNX Runtime 1.14 and later load the onnx models. With --int8 all weights but biases and
LayerNorms are 8-bit integers. Then the size, the time and the dev score are printed for
int8 and for fp32.

Each export also holds config.json, which names the labels, and the tokenizer. Its
tokenizer.json cuts texts to the length that was used in training. Before an export is
kept, its logits are compared with the model's.

export.json marks a directory as an export. --overwrite replaces a directory only if it has
this file and has not changed since the export. Exports of earlier versions lack the file
and cannot be replaced, so choose another --out.
"""

import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
from glue import run_program
from model import (Arch, BertConfig, count_params, ElasticBert, fingerprint, latency, load_bert,
                   print_line, read_json, save_bert, tokenizer_files, UserError, weight_files,
                   write_file, write_json)
from yoco import Parser, read_run

# The three inputs of every export, in this order.
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "hf": "model.safetensors"}
# The mark of an export. It holds the fingerprint of all other files.
MARK = "export.json"
# Texts of several lengths, for a model that has no dev set at hand.
SENTENCES = ["One short sentence.", "Yes", "Né à Zürich, 1987: l'été 東京 unbelievably"]


def export(options):
    """Write the export into a temporary directory, check it, and move it to --out."""
    model_dir = Path(options.model)
    if options.int8 and options.format != "onnx":
        raise UserError(f"--int8 does not go with --format {options.format}: use --format onnx")
    name = f"{os.path.basename(os.path.realpath(model_dir))}-{options.format}"
    if options.int8:
        name += "-int8"
    out = Path(os.path.realpath(options.out or f"export/{name}"))
    run = read_json(model_dir / "run.json") if (model_dir / "run.json").exists() else {}
    if "wrote" in run:
        # Refuse a directory whose files have changed since run.json was written.
        read_run(model_dir)
    if "theta" in run and run["settings"]["stages"] != "largest":
        raise UserError(f"{model_dir} is a super-BERT: search it, and export the sub-BERT "
                        "that the search writes")
    model, examples = load_bert(data.existing_model(model_dir)), read_examples(run)
    for leftover in temporary_directories(out):
        remove_temporary(leftover, out)
    check_out(out, model_dir, options.overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Write to a temporary directory, and rename it when the export is complete. A failed
    # or interrupted export leaves --out as it was.
    temporary = Path(tempfile.mkdtemp(".tmp", f".{out.name}.", out.parent))
    try:
        new_dir = temporary / "new"
        new_dir.mkdir()
        for file_name, content in export_tokenizer(model_dir).items():
            (new_dir / file_name).write_bytes(content)
        shutil.copyfile(model_dir / "config.json", new_dir / "config.json")
        with warnings.catch_warnings():
            # The exporters warn about names inside PyTorch.
            warnings.simplefilter("ignore")
            exported = write_model(model, new_dir, options.format)
        difference = max_difference(model, exported, model_dir, new_dir, examples)
        if options.int8:
            fp32, fp32_size = exported, file_size(new_dir / FILES["onnx"])
            exported = quantize(new_dir / FILES["onnx"])
            difference = int8_difference(model, exported, model_dir, examples)
        write_json(new_dir / MARK, wrote=fingerprint(*sorted(new_dir.iterdir())))
        if out.exists():
            out.rename(temporary / "old")
        new_dir.rename(out)
    finally:
        remove_temporary(temporary, out)
    print_line(f"wrote {options.out or out}. Its logits for {len(examples)} texts differ by "
               f"at most {difference:.1e}")
    if options.int8:
        exports = {"fp32": (fp32, fp32_size),
                   "int8": (exported, file_size(out / FILES["onnx"]))}
        compare_precisions(model, model_dir, exports)
    else:
        compare_costs(model, model_dir, exported, out)


def check_out(out, model_dir, overwrite):
    """Check that an export may be written to `out`.

    Raises UserError if `out` is the model itself, if it holds a file that no export
    wrote, or if it holds an export and `overwrite` is false.
    """
    if out == Path(os.path.realpath(model_dir)):
        raise UserError(f"--out {out} is the directory of --model: choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / MARK).exists():
        raise UserError(f"{out} has no {MARK}, so it may hold files that no export wrote: "
                        "choose another --out")
    if not is_export(out):
        raise UserError(f"{out} has changed since an export wrote it: choose another --out")
    if not overwrite:
        raise UserError(f"{out} holds an export: choose another --out, or replace it with "
                        "--overwrite")


def is_export(directory):
    """Return whether a directory holds exactly the files that an export wrote."""
    if not (directory / MARK).is_file():
        return False
    paths = sorted(set(directory.iterdir()) - {directory / MARK})
    is_flat = all(path.is_file() for path in paths)
    return is_flat and read_json(directory / MARK).get("wrote") == fingerprint(*paths)


def temporary_directories(out):
    """Return the temporary directories that killed exports to `out` have left behind."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.\w{{8}}\.tmp")
    paths = out.parent.iterdir() if out.parent.exists() else []
    return [path for path in paths if pattern.fullmatch(path.name) and path.is_dir()]


def remove_temporary(temporary, out):
    """Remove a temporary directory, unless it holds the only copy of `out`.

    An export moves the old `out` there before the new one takes its place. If it stopped
    in between, the old one is moved back.
    """
    if not out.exists() and is_export(temporary / "old"):
        (temporary / "old").rename(out)
    shutil.rmtree(temporary, ignore_errors=True)


def compare_costs(model, model_dir, exported, out):
    """Print the size, the parameters and the latency of a model and of its export."""
    n_tokens = min(128, data.max_train_length(model_dir))
    rows = [(model_dir, model, weight_files(model_dir)),
            (out, exported, [out / name for name in FILES.values() if (out / name).exists()])]
    for directory, forward, files in rows:
        config = BertConfig.load(directory)
        size = sum(path.stat().st_size for path in files) / 2**20
        ms = latency(forward, n_tokens, nullcontext, "cpu")
        print_line(f"{directory}: {size:.1f} MiB, {count_params(config, config.arch):,} "
                   f"parameters, {ms:.1f} ms for {n_tokens} tokens on the CPU")
    num_zeros = count_params(config, config.arch) - count_params(config, model.config.arch)
    if num_zeros:
        # The same model, but with the zeros of neurons and without those of heads.
        arch = Arch(model.config.arch.heads, config.arch.ffn_sizes)
        head_zeros = count_params(config, config.arch) - count_params(config, arch)
        print_line(f"{num_zeros:,} of these parameters are zeros, {head_zeros:,} of them for "
                   f"dropped heads: in Hugging Face's BERT every layer has "
                   f"{config.num_attention_heads} heads and the same FFN size")


def file_size(path):
    """Return the size of a file in MiB."""
    return path.stat().st_size / 2**20


def compare_precisions(model, model_dir, exports):
    """Print the size, the latency and the dev score of the same model in fp32 and in int8.

    exports: {precision: (function of an export, MiB)}. Without the data that the model was
    trained on there are no scores, and a line says so.
    """
    n_tokens = min(128, data.max_train_length(model_dir))
    try:
        task = dev_task(model_dir)
    except UserError as error:
        task = None
        print_line(f"no dev score: {error}")
    for precision, (forward, size) in exports.items():
        ms = latency(forward, n_tokens, nullcontext, "cpu")
        text = f"{precision}: {size:.1f} MiB, {ms:.1f} ms for {n_tokens} tokens on the CPU"
        if task:
            text += f", dev score {dev_score(forward, model, model_dir, task):.2f}"
        print_line(text)


def dev_task(model_dir):
    """Return the Task that a model was trained on, with its dev set only.

    Raises UserError if no run.json names its data, or if the data is gone or is another.
    """
    training = data.training_of(model_dir)
    if "data" not in training:
        raise UserError(f"no run.json in {model_dir} names the data")
    return data.load_dev(training["data"], model_dir)


def dev_score(forward, model, model_dir, task):
    """Return ACC(m) on dev, in %, of a function that computes logits."""
    scores = []
    for examples in task.devs:
        encoded = data.encode(examples, model_dir)
        logits = compute_logits(forward, encoded, model.config.max_position_embeddings)
        labels = np.array([example.label for example in encoded])
        scores.append(data.compute_metrics(task.metric, labels, logits.numpy())["score"])
    return sum(scores) / len(scores)


def read_examples(run):
    """Return the Examples on which the logits are compared.

    These are the first 64 rows of the dev set, or three sentences if the dev set is
    not there.
    """
    for name in ("dev.tsv", "dev_matched.tsv"):
        path = Path(run.get("data", ""), name)
        if path.exists():
            _, rows = data.read_table(path, test=True)
            return [data.Example(*texts, 0) for _, *texts, _ in rows[:64]]
    second = SENTENCES[0] if run.get("pairs") else None
    return [data.Example(text, second, 0) for text in SENTENCES]


def export_tokenizer(model_dir):
    """Return the tokenizer files of an export, {name: bytes}.

    They also hold the length to which texts are cut, and the casing. transformers needs
    both to compute the same tokens.
    """
    max_length = data.max_train_length(model_dir)
    tokenizer = data.load_tokenizer(model_dir)
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    files = tokenizer_files(model_dir)
    files = {**files, "tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    config["model_max_length"], config["model_input_names"] = max_length, INPUTS
    if "vocab.txt" in files:
        config["tokenizer_class"] = "BertTokenizer"
    # transformers lowercases by default, whatever tokenizer.json says.
    # tokenizer_config.json decides, so it gets the settings of the normalizer.
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    for config_name, normalizer_name in data.NORMALIZER.items():
        if normalizer_name in normalizer:
            config[config_name] = normalizer[normalizer_name]
    files["tokenizer_config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    return files


def write_model(model, directory, format_name):
    """Write the model's file, load it again, and return it as a function.

    The function takes three int64 tensors [B, T] and returns the logits [B, num_labels].
    """
    path = directory / FILES[format_name]
    if format_name == "hf":
        save_bert(widen(model), directory)
        return load_bert(directory)
    if format_name == "torch":
        # Save to memory first. PyTorch's file writer ends the process on a full disk.
        content = io.BytesIO()
        torch.export.save(trace(model), content)
        write_file(path, content.getvalue())
        return torch.export.load(path).module()
    try:
        import onnx, onnxruntime, onnxscript                         # noqa: E401, F401
    except ImportError:
        raise UserError("ONNX needs three packages: pip install onnx onnxruntime "
                        "onnxscript") from None
    # The exporter logs that torchvision is missing. Nothing here needs torchvision.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # ONNX Runtime 1.14 is the first release with opset 18, which is the oldest that PyTorch
    # exports without a conversion. Nothing in the file needs an IR version above 8.
    program = torch.onnx.export(trace(model), dynamo=True, verbose=False, opset_version=18,
                                input_names=INPUTS, output_names=["logits"])
    proto = program.model_proto
    proto.ir_version = 8
    write_file(path, proto.SerializeToString())
    return load_onnx(path)


def load_onnx(path):
    """Load an ONNX file and return it as a function, like write_model."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def run_onnx(*inputs):
        """Compute the logits [B, num_labels] of three [B, T] tensors."""
        feed = {name: x.numpy() for name, x in zip(INPUTS, inputs)}
        return torch.from_numpy(session.run(["logits"], feed)[0])

    return run_onnx


def quantize(path):
    """Replace the weights of an ONNX file by int8, and return the model as a function.

    ONNX Runtime computes the scales of the activations for each input (dynamic
    quantization).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    # The quantizer logs the advice to optimize the graph first. ONNX Runtime does that
    # when it loads the file.
    logging.getLogger().setLevel(logging.ERROR)
    # Without VNNI, an x86 processor adds two products in 16 bits, which 8-bit weights may
    # overflow. 7-bit weights (reduce_range) never do. One scale per column (per_channel)
    # makes up for the lost bit. On 800 dev texts of a MiniLM, these settings gave the
    # smallest mean error of the logits. The scores of all settings were within 0.7.
    quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True,
                     reduce_range=True)
    return load_onnx(path)


def trace(model):
    """Trace the model with torch.export, for any number of sequences and tokens."""
    batch = torch.export.Dim("batch", min=1, max=2**15)
    tokens = torch.export.Dim("tokens", min=1, max=model.config.max_position_embeddings)
    # Make three tensors. One tensor, passed three times, would become a single input.
    inputs = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in INPUTS)
    shapes = {name: {0: batch, 1: tokens} for name in INPUTS}
    return torch.export.export(model, inputs, strict=False, dynamic_shapes=shapes)


@torch.no_grad()
def widen(model):
    """Return a BERT with layers of equal size that computes the same logits.

    Every layer has all heads, because Hugging Face computes the head size as hidden size /
    heads. Every layer has the largest FFN size of the sub-BERT. Zeros fill the places of
    dropped heads and neurons. Dropped layers are not restored.
    """
    wide_config = replace(model.config, layer_heads=None, layer_ffn_sizes=None,
                          intermediate_size=max(model.config.arch.ffn_sizes))
    wide = ElasticBert(wide_config, model.num_labels)
    weights = model.state_dict()
    for name, tensor in wide.state_dict().items():
        front = tuple(slice(size) for size in weights[name].shape)
        tensor.zero_()[front] = weights[name]
    return wide.eval()


def compute_logits(forward, encoded, max_positions):
    """Return the logits [n, num_labels] of a function for encoded examples, in their order."""
    logits = [None] * len(encoded)
    with torch.inference_mode():
        for indices in data.token_batches(encoded, 1000):
            batch = data.collate(encoded, indices, "cpu", max_positions)
            inputs = [tensor.long() for tensor in batch[:3]]
            for i, row in zip(indices, forward(*inputs)):
                logits[i] = row
    return torch.stack(logits)


def max_difference(model, exported, model_dir, new_dir, examples):
    """Return the largest difference between the logits of the model and of its export.

    Raises UserError if it is 1e-3 or more, or if the tokenizers of the two directories
    differ.
    """
    encoded = data.encode(examples, model_dir)
    if data.encode(examples, new_dir) != encoded:
        raise UserError("the exported tokenizer gives other tokens than the one of "
                        f"{model_dir}: nothing was written")
    max_positions = model.config.max_position_embeddings
    expected = compute_logits(model, encoded, max_positions)
    difference = (compute_logits(exported, encoded, max_positions) - expected).abs().max().item()
    if not difference < 1e-3:
        raise UserError("the logits of the export differ from the model's by "
                        f"{difference:.1e}: nothing was written")
    return difference


def int8_difference(model, quantized, model_dir, examples):
    """Return the largest difference between the logits of the model and of its int8 export.

    Raises UserError if the root mean square of the differences is half of the standard
    deviation of the model's logits between texts, or more. The file is broken then.
    """
    encoded = data.encode(examples, model_dir)
    max_positions = model.config.max_position_embeddings
    expected = compute_logits(model, encoded, max_positions)             # [n, num_labels]
    difference = compute_logits(quantized, encoded, max_positions) - expected
    deviation = expected - expected.mean(0)
    share = (difference.norm() / deviation.norm()).item()
    if not share < 0.5:
        raise UserError(f"the logits in int8 differ from the model's by {share:.2f} of their "
                        "standard deviation: nothing was written. Export without --int8")
    return difference.abs().max().item()


def main(argv=None):
    """Run the program and return its exit status (see `glue.run_program`)."""
    parser = Parser("glue.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True,
        help="a directory that search wrote, or train --stages largest")
    add("--format", required=True, choices=tuple(FILES), help="the format to write")
    add("--int8", action="store_true",
        help="quantize the weights of an ONNX model to 8-bit integers")
    add("--out", help="the directory to write (default: export/NAME-FORMAT, or with --int8 "
                      "export/NAME-onnx-int8)")
    add("--overwrite", action="store_true", help="replace an earlier export")
    return run_program(parser, export, argv)


if __name__ == "__main__":
    sys.exit(main())
