"""Write a plain model folder, or a GGUF file, from any checkpoint, also one that DeepSpeed has split over its ranks.

    python -m sft.tools.export output_dir/bloom-7b1 exported                      the newest complete checkpoint
    python -m sft.tools.export output_dir/bloom-7b1/checkpoint-500 exported --dtype bfloat16
    python -m sft.tools.export output_dir/bloom-7b1 mine.gguf --dtype q4_k_m      for llama.cpp, Ollama, LM Studio
    ollama create mine -f mine.Modelfile

Weights come from the optimizer's fp32 master copies if DeepSpeed has kept them, through DeepSpeed's own converter;
otherwise from the checkpoint's safetensors files.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sft.chat.sampling import Sampling
from sft.model import gguf_file, quantized
from sft.model.folder import longest_context
from sft.model.load import load_adapter, load_config, load_model, load_tokenizer
from sft.program import ArgumentParser, UserError, one_line, run_program
from sft.prompts import STOP_MARKERS, ollama_template
from sft.training import checkpoints
from sft.training.disk import new_model_file, new_model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF = ".gguf"
OLLAMA_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repeat_penalty": "repetition_penalty",
}


def choose(path: str) -> Path:
    """Return the checkpoint at `path`, or the newest complete one of the run that has `path` as its output folder.

    Raises UserError if there is none.
    """
    folder = Path(path)
    if checkpoints.folders_in(path):
        newest = checkpoints.newest(path)
        if newest is None:
            checkpoints.complete_steps(path, tell=True)
            raise UserError(f"{path} has no complete checkpoint; give another folder")
        return newest
    if not folder.is_dir():
        raise UserError(f"{path} is not a folder; give a checkpoint, or the --output_dir of a run")
    is_checkpoint = folder.name.startswith("checkpoint-")
    if fault := checkpoints.fault_of(folder) if is_checkpoint else checkpoints.fault_of_weights(folder):
        raise UserError(f"{path} cannot be exported: {fault}; give another checkpoint")
    return folder


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a checkpoint in fp32, an adapter's with its base model, and the tokenizer.

    Raises UserError if DeepSpeed's files cannot be merged, or a base model is not found.
    """
    if (adapter := load_adapter(str(folder), torch.float32)) is not None:
        return adapter
    tokenizer = load_tokenizer(str(folder))
    quantized.check_whole(str(folder), load_config(str(folder)), "which cannot be exported in another dtype")
    if not (folder / "latest").exists():
        return load_model(str(folder), torch.float32), tokenizer
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    except Exception as error:  # it raises bare ones
        raise UserError(f"DeepSpeed's files in {folder} cannot be merged: {one_line(error)}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(str(folder)), dtype=torch.float32)
    found = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = set(found.missing_keys) - set(model.all_tied_weights_keys)
    assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, tokenizer


def export(path: str, output: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a plain model folder with its tokenizer to `output`, new or empty; return the checkpoint used.

    Raises UserError if there is no complete checkpoint at `path`, or `output` is not empty.
    """
    with new_model_folder(output) as unfinished:
        folder = choose(path)
        model, tokenizer = load(folder)
        model.to(dtype).config.dtype = dtype
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


def export_gguf(path: str, output: str, kind: str = "f16") -> Path:
    """Write a GGUF file, a kind of `gguf_file.KINDS`, and a Modelfile beside it; return the checkpoint used.

    Raises UserError as `export` does, and if llama.cpp cannot compute the model.
    """
    with new_model_file(output) as unfinished:
        folder = choose(path)
        config, tokenizer, weights = parts_of(folder)
        gguf_file.write(unfinished, config, tokenizer, weights, kind, Path(output).stem)
    length = longest_context(config.to_dict(), tokenizer.model_max_length)
    modelfile_of(output).write_text(modelfile(Path(output).name, length), encoding="utf-8")
    return folder


def parts_of(folder: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, Mapping[str, torch.Tensor]]:
    """Return a checkpoint's configuration, tokenizer and tensors by name; those of plain files stay on the disk."""
    is_plain = not any((folder / name).exists() for name in ("adapter_config.json", "latest"))
    if is_plain:
        config = load_config(str(folder))
        quantized.check_whole(str(folder), config, "which cannot be exported in another dtype")
        return config, load_tokenizer(str(folder)), gguf_file.weights_in(folder)
    model, tokenizer = load(folder)
    return model.config, tokenizer, model.state_dict()


def modelfile_of(output: str) -> Path:
    """Return where the Modelfile of a GGUF file goes."""
    return Path(output).with_suffix(".Modelfile")


def modelfile(name: str, context_length: int) -> str:
    """Return what Ollama needs beside a GGUF file: the prompt, where a reply ends, and the chat's own sampling."""
    numbers = [f"PARAMETER {theirs} {getattr(Sampling, ours)}" for theirs, ours in OLLAMA_NAMES.items()]
    stops = [f'PARAMETER stop """{marker}"""' for marker in STOP_MARKERS]
    template = f'TEMPLATE """{ollama_template()}"""'
    return "\n".join([f"FROM ./{name}", template, f"PARAMETER num_ctx {context_length}", *numbers, *stops, ""])


def main() -> None:
    """Export as the command line says."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a checkpoint, or a run's --output_dir for its newest complete one")
    parser.add_argument("output", help=f"the model folder to write, or a file that ends in {GGUF}")
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, *gguf_file.KINDS],
        help=f"of the weights: {', '.join(DTYPES)} for a folder (default float32), {', '.join(gguf_file.KINDS)} for "
        f"a {GGUF} file (default f16)",
    )
    given = parser.parse_args()
    is_file = given.output.endswith(GGUF)
    dtype = given.dtype or ("f16" if is_file else "float32")
    if dtype not in (known := gguf_file.KINDS if is_file else DTYPES):
        what = f"a {GGUF} file" if is_file else f"a folder; for {dtype} give a file that ends in {GGUF}"
        raise UserError(f"--dtype {dtype} is none of {', '.join(known)}, and {given.output} is {what}")
    if is_file:
        folder = export_gguf(given.checkpoint, given.output, dtype)
        print(f"{folder} -> {given.output} in {dtype}")
        print(f"Ollama: ollama create {Path(given.output).stem} -f {modelfile_of(given.output)}")
        return
    folder = export(given.checkpoint, given.output, DTYPES[dtype])
    print(f"{folder} -> {given.output}, a model folder in {dtype}")


if __name__ == "__main__":
    run_program(main)
