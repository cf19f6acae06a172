"""Write a plain model folder from any checkpoint, also one that DeepSpeed has split over its ranks.

    python -m sft.tools.export output_dir/bloom-7b1 exported                      the newest complete checkpoint
    python -m sft.tools.export output_dir/bloom-7b1/checkpoint-500 exported --dtype bfloat16

Weights come from the optimizer's fp32 master copies if DeepSpeed has kept them, through DeepSpeed's own converter;
otherwise from the checkpoint's safetensors files.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sft.model import quantized
from sft.model.load import load_adapter, load_config, load_model, load_tokenizer
from sft.program import ArgumentParser, UserError, one_line, run_program
from sft.training import checkpoints
from sft.training.disk import new_model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def load(folder: Path) -> PreTrainedModel:
    """Return the model of a checkpoint in fp32, an adapter's with its base model.

    Raises UserError if DeepSpeed's files cannot be merged, or a base model is not found.
    """
    if (adapter := load_adapter(str(folder), torch.float32)) is not None:
        return adapter[0]
    quantized.check_whole(str(folder), load_config(str(folder)), "which cannot be exported in another dtype")
    if not (folder / "latest").exists():
        return load_model(str(folder), torch.float32)
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
    return model


def export(path: str, output: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a plain model folder with its tokenizer to `output`, new or empty; return the checkpoint used.

    Raises UserError if there is no complete checkpoint at `path`, or `output` is not empty.
    """
    with new_model_folder(output) as unfinished:
        folder = choose(path)
        model = load(folder).to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(unfinished)
        load_tokenizer(str(folder)).save_pretrained(unfinished)
    return folder


def main() -> None:
    """Export as the command line says."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a checkpoint, or a run's --output_dir for its newest complete one")
    parser.add_argument("output", help="the model folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights, by default float32")
    given = parser.parse_args()
    folder = export(given.checkpoint, given.output, DTYPES[given.dtype])
    print(f"{folder} -> {given.output}, a model folder in {given.dtype}")


if __name__ == "__main__":
    run_program(main)
