"""A trained model as others load it, without this project; checked to compute the same.

    python -m glue.export --model DIR --format onnx      -> export/NAME-onnx/model.onnx
    python -m glue.export --model DIR --format torch     -> export/NAME-torch/model.pt2
    python -m glue.export --model DIR --format hf        -> export/NAME-hf, for transformers

The first two take three int64 tensors [B, T], of any B and T: input_ids, token_type_ids,
attention_mask. A Hugging Face BERT has layers of one size, so hf has the full width, with zeros for
the heads and neurons that a sub-BERT dropped. With each come config.json, which names the labels,
and the tokenizer, whose tokenizer.json also cuts texts to the length of the training.
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

INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
FILES = {"onnx": "model.onnx", "torch": "model.pt2", "hf": "model.safetensors"}
WRITTEN = {"config.json", *TOKENIZER_FILES, *FILES.values()}
SENTENCES = ["One short sentence.", "Yes", "Né à Zürich, 1987: l'été 東京 unbelievably"]


def export(options):
    """Write the model beside --out, read it back, and move it there if it computes the same."""
    here = Path(options.model)
    name = os.path.basename(os.path.realpath(here))
    out = Path(os.path.realpath(options.out or f"export/{name}-{options.format}"))
    run = read_json(here / "run.json") if (here / "run.json").exists() else {}
    if "wrote" in run:
        read_run(here)                           # refuses what has changed since
    if "theta" in run and run["settings"]["stages"] != "largest":
        raise UserError(f"{here} is a super-BERT: search it, and export what is found")
    model, examples = load_bert(here), read_examples(run)
    check_place(out, here, options.overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    # What fails, or is stopped, leaves nothing that the next attempt would have to overwrite.
    with tempfile.TemporaryDirectory(".tmp", f".{out.name}.", out.parent) as aside:
        new = Path(aside, "new")
        new.mkdir()
        for name, content in tokenizer_of(here).items():
            (new / name).write_bytes(content)
        shutil.copyfile(here / "config.json", new / "config.json")
        with warnings.catch_warnings():
            # The exporters warn of names inside PyTorch.
            warnings.simplefilter("ignore")
            exported = write(model, new, options.format)
        difference = compare(model, exported, here, new, examples)
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)
    size = (out / FILES[options.format]).stat().st_size / 2**20
    before = sum(path.stat().st_size for path in weight_files(here)) / 2**20
    print_line(f"wrote {options.out or out}: {size:.1f} MiB ({here}: {before:.1f} MiB); its logits of "
        f"{len(examples)} texts differ by at most {difference:.1e}")


def check_place(out, here, overwrite):
    """UserError unless `out` may be written: nothing is there, or what an export wrote."""
    if out == Path(os.path.realpath(here)):
        raise UserError(f"--out {out} is what the command reads: choose another")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names - WRITTEN:
        raise UserError(f"{out} holds {min(names - WRITTEN)}, which no export wrote: choose "
                        "another --out")
    if names and not overwrite:
        raise UserError(f"{out} holds an export: choose another --out, or replace it with "
                        "--overwrite")


def read_examples(run):
    """Texts to compare logits on: 64 of the dev set, or if that is not here, three sentences."""
    for name in ("dev.tsv", "dev_matched.tsv"):
        path = Path(run.get("data", ""), name)
        if path.exists():
            _, rows = data.read_table(path, test=True)
            return [data.Example(*texts, 0) for _, *texts, _ in rows[:64]]
    second = SENTENCES[0] if run.get("pairs") else None
    return [data.Example(text, second, 0) for text in SENTENCES]


def tokenizer_of(here):
    """{name: bytes} of a model's tokenizer files, with what else its own texts went through: the
    length they are cut to, and the casing."""
    tokenizer, length = data.load_tokenizer(here), data.max_train_length(here)
    tokenizer.enable_truncation(length, strategy="longest_first")
    found = {**tokenizer_files(here), "tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    config = json.loads(found.get("tokenizer_config.json", b"{}"))
    config["model_max_length"], config["model_input_names"] = length, INPUTS
    if "vocab.txt" in found:
        config["tokenizer_class"] = "BertTokenizer"
    # transformers lowercases unless told otherwise, whatever tokenizer.json says.
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    for name, theirs in data.NORMALIZER.items():
        if theirs in normalizer:
            config[name] = normalizer[theirs]
    found["tokenizer_config.json"] = json.dumps(config, indent=2).encode() + b"\n"
    return found


def write(model, directory, form):
    """Write the model; a function of three int64 tensors that computes its logits from what was
    written."""
    path = directory / FILES[form]
    if form == "hf":
        save_bert(widened(model), directory)
        return load_bert(directory)
    if form == "torch":
        # Through memory: on a full disk PyTorch's own writer ends the process.
        content = io.BytesIO()
        torch.export.save(traced(model), content)
        write_file(path, content.getvalue())
        return torch.export.load(path).module()
    try:
        import onnx, onnxruntime, onnxscript                         # noqa: E401, F401
    except ImportError:
        raise UserError("ONNX needs three packages: pip install onnx onnxruntime "
                        "onnxscript") from None
    # It misses torchvision, which nothing here needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(traced(model), dynamo=True, verbose=False, input_names=INPUTS,
                                output_names=["logits"])
    write_file(path, program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def exported(*inputs):
        """Three [B, T] tensors -> logits [B, num_labels]."""
        given = {name: x.numpy() for name, x in zip(INPUTS, inputs)}
        return torch.from_numpy(session.run(["logits"], given)[0])
    return exported


def traced(model):
    """torch.export's program of the whole model, for any number of sequences and tokens."""
    sizes = {0: torch.export.Dim("batch", min=1, max=2**15), 1: torch.export.Dim(
        "tokens", min=1, max=model.config.max_position_embeddings)}
    # Three tensors: one, passed three times, would become a single input.
    inputs = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in INPUTS)
    return torch.export.export(model, inputs, strict=False,
                               dynamic_shapes={name: sizes for name in INPUTS})


@torch.no_grad()
def widened(model):
    """The same function at full width, as stock BERTs have it: the heads and neurons that a
    sub-BERT dropped are there as zeros; its dropped layers are not."""
    full = ElasticBert(replace(model.config, layer_heads=None, layer_ffn_sizes=None),
                       model.num_labels)
    own = model.state_dict()
    for name, tensor in full.state_dict().items():
        tensor.zero_()[tuple(slice(n) for n in own[name].shape)] = own[name]
    return full.eval()


def compare(model, exported, here, new, examples):
    """The greatest difference of the logits; UserError where it is too large, or where the
    tokenizer in `new` does not give the tokens of that in `here`."""
    encoded, differences = data.encode(examples, here), []
    if data.encode(examples, new) != encoded:
        raise UserError(f"the export does not keep the tokenizer of {here}: nothing was written")
    with torch.inference_mode():
        for indices in data.token_batches(encoded, 1000):
            batch = data.collate(encoded, indices, most=model.config.max_position_embeddings)
            inputs = [tensor.long() for tensor in batch[:3]]
            differences.append((exported(*inputs) - model(*inputs)).abs().max())
    # A maximum of tensors, of which one that is not a number stays so.
    difference = torch.stack(differences).max().item()
    if not difference < 1e-3:
        raise UserError("the export does not compute what the model does: its logits differ by "
                        f"{difference:.1e}; nothing was written")
    return difference


def main(argv=None):
    """Run the program; the exit status, as `glue.run_program` has it."""
    parser = Parser("glue.export", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="directory that search wrote, or train --stages largest")
    add("--format", required=True, choices=tuple(FILES), help="what will load it")
    add("--out", help="directory to write (default: export/NAME-FORMAT)")
    add("--overwrite", action="store_true", help="replace an export that is there")
    return run_program(parser, export, argv)


if __name__ == "__main__":
    sys.exit(main())
