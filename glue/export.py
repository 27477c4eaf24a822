"""Export a trained model to a format that loads without this project.

    python -m glue.export --model DIR --format onnx      -> export/NAME-onnx/model.onnx
    python -m glue.export --model DIR --format torch     -> export/NAME-torch/model.pt2
    python -m glue.export --model DIR --format hf        -> export/NAME-hf/model.safetensors

hf is for the transformers library. The onnx and torch models take three int64 tensors
[B, T], of any B and T: input_ids, token_type_ids, attention_mask. In a Hugging Face
BERT all layers have the same size. The hf model therefore has the full width, with
zeros for the heads and neurons that a sub-BERT dropped.

Each export also holds config.json, which names the labels, and the tokenizer. Its
tokenizer.json cuts texts to the length that was used in training. Before an export is
kept, its logits are compared with the model's.
"""

import io
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import data
from glue import run_program
from model import (ElasticBert, load_bert, print_line, read_json, save_bert, tokenizer_files,
                   UserError, weight_files, write_file, TOKENIZER_FILES)
from yoco import Parser, read_run

# The three inputs of every export, in this order.
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "hf": "model.safetensors"}
# Every file that an export may write. --overwrite deletes a directory that holds no
# other file.
WRITTEN = {"config.json", *TOKENIZER_FILES, *FILES.values()}
# Texts of several lengths, for a model that has no dev set at hand.
SENTENCES = ["One short sentence.", "Yes", "Né à Zürich, 1987: l'été 東京 unbelievably"]


def export(options):
    """Write the export into a temporary directory, check it, and move it to --out."""
    model_dir = Path(options.model)
    name = os.path.basename(os.path.realpath(model_dir))
    out = Path(os.path.realpath(options.out or f"export/{name}-{options.format}"))
    run = read_json(model_dir / "run.json") if (model_dir / "run.json").exists() else {}
    if "wrote" in run:
        # Refuse a directory whose files have changed since run.json was written.
        read_run(model_dir)
    if "theta" in run and run["settings"]["stages"] != "largest":
        raise UserError(f"{model_dir} is a super-BERT: search it, and export the sub-BERT "
                        "that the search writes")
    model, examples = load_bert(model_dir), read_examples(run)
    check_out(out, model_dir, options.overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    # --out appears when it is complete, so a failed or interrupted export leaves
    # nothing.
    with tempfile.TemporaryDirectory(".tmp", f".{out.name}.", out.parent) as temporary:
        new_dir = Path(temporary, "new")
        new_dir.mkdir()
        for file_name, content in export_tokenizer(model_dir).items():
            (new_dir / file_name).write_bytes(content)
        shutil.copyfile(model_dir / "config.json", new_dir / "config.json")
        with warnings.catch_warnings():
            # The exporters warn about names inside PyTorch.
            warnings.simplefilter("ignore")
            exported = write_model(model, new_dir, options.format)
        difference = max_difference(model, exported, model_dir, new_dir, examples)
        if out.exists():
            shutil.rmtree(out)
        new_dir.rename(out)
    size = (out / FILES[options.format]).stat().st_size / 2**20
    size_before = sum(path.stat().st_size for path in weight_files(model_dir)) / 2**20
    print_line(f"wrote {options.out or out}: {size:.1f} MiB "
               f"({model_dir}: {size_before:.1f} MiB). "
               f"Its logits for {len(examples)} texts differ by at most {difference:.1e}")


def check_out(out, model_dir, overwrite):
    """Check that an export may be written to `out`.

    Raises UserError if `out` is the model itself, if it holds a file that no export
    wrote, or if it holds an export and `overwrite` is false.
    """
    if out == Path(os.path.realpath(model_dir)):
        raise UserError(f"--out {out} is the directory of --model: choose another --out")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names - WRITTEN:
        raise UserError(f"{out} holds {min(names - WRITTEN)}, which no export wrote: choose "
                        "another --out")
    if names and not overwrite:
        raise UserError(f"{out} holds an export: choose another --out, or replace it with "
                        "--overwrite")


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
    program = torch.onnx.export(trace(model), dynamo=True, verbose=False,
                                input_names=INPUTS, output_names=["logits"])
    write_file(path, program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run_onnx(*inputs):
        """Compute the logits [B, num_labels] of three [B, T] tensors."""
        feed = {name: x.numpy() for name, x in zip(INPUTS, inputs)}
        return torch.from_numpy(session.run(["logits"], feed)[0])

    return run_onnx


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
    """Return a BERT with layers of full width that computes the same logits.

    The heads and neurons that a sub-BERT dropped are zeros. The layers that it dropped
    stay out.
    """
    wide_config = replace(model.config, layer_heads=None, layer_ffn_sizes=None)
    wide = ElasticBert(wide_config, model.num_labels)
    weights = model.state_dict()
    for name, tensor in wide.state_dict().items():
        front = tuple(slice(size) for size in weights[name].shape)
        tensor.zero_()[front] = weights[name]
    return wide.eval()


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
    differences = []
    with torch.inference_mode():
        for indices in data.token_batches(encoded, 1000):
            batch = data.collate(encoded, indices, "cpu", max_positions)
            inputs = [tensor.long() for tensor in batch[:3]]
            differences.append((exported(*inputs) - model(*inputs)).abs().max())
    # The maximum of tensors is NaN if one of them is. Python's max would lose a NaN.
    difference = torch.stack(differences).max().item()
    if not difference < 1e-3:
        raise UserError("the logits of the export differ from the model's by "
                        f"{difference:.1e}: nothing was written")
    return difference


def main(argv=None):
    """Run the program and return its exit status (see `glue.run_program`)."""
    parser = Parser("glue.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True,
        help="a directory that search wrote, or train --stages largest")
    add("--format", required=True, choices=tuple(FILES), help="the format to write")
    add("--out", help="the directory to write (default: export/NAME-FORMAT)")
    add("--overwrite", action="store_true", help="replace an earlier export")
    return run_program(parser, export, argv)


if __name__ == "__main__":
    sys.exit(main())
