"""How other people's programs answer with a model folder or a GGUF file: one function for each program.

    python -m benchmarks.client_programs ctranslate2_int8 FOLDER < prompts.json

Each runs in a process of its own, with the packages of its own that benchmarks.clients has installed, and imports
nothing of this project. It prints the greedy continuation of each prompt, as token ids or as text.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

NEW_TOKENS = 40
SECONDS_TO_START = 300


def transformers_alone(folder: str, prompts: list[str]) -> list[list[int]]:
    """Generate with transformers, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    model = model.to(torch.float32)
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def transformers_batch(folder: str, prompts: list[str]) -> list[list[int]]:
    """Generate with transformers, all prompts in one batch, padded as the folder says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.to(torch.float32).generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def transformers_pipeline(folder: str, prompts: list[str]) -> list[str]:
    """Generate with transformers' pipeline."""
    from transformers import pipeline

    generate = pipeline("text-generation", folder, dtype="float32")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    return [generate(prompt, **settings)[0]["generated_text"] for prompt in prompts]


def transformers_serve(folder: str, prompts: list[str]) -> list[str]:
    """Generate by the completions of `transformers serve`."""
    port = "18761"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--port", port, "--dtype", "float32"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            address = f"http://127.0.0.1:{port}/v1/completions"
            asked = {"model": folder, "max_tokens": NEW_TOKENS, "temperature": 0}
            deadline = time.monotonic() + SECONDS_TO_START
            return [_posted(address, {**asked, "prompt": prompt}, deadline) for prompt in prompts]
        finally:
            server.terminate()


def _posted(address: str, body: dict, deadline: float) -> str:
    """Return the text of a completion, from a server that may still be starting."""
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    while True:
        try:
            with urlopen(request, timeout=SECONDS_TO_START) as answer:
                return json.load(answer)["choices"][0]["text"]
        except OSError as error:
            if hasattr(error, "read") or time.monotonic() > deadline:
                raise RuntimeError(error.read() if hasattr(error, "read") else error) from error
            time.sleep(0.5)


def llama_cpp(file: str, prompts: list[str]) -> list[str]:
    """Generate with llama.cpp, in the package xllamacpp, from a text that it splits into tokens itself."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = file, 2048, 1, 0
    server = xllamacpp.Server(parameters)
    asked = {"max_tokens": NEW_TOKENS, "temperature": 0}
    return [server.handle_completions({"prompt": prompt, **asked})["choices"][0]["text"] for prompt in prompts]


def ctranslate2_fp32(folder: str, prompts: list[str]) -> list[list[int]]:
    """Generate with CTranslate2 in fp32."""
    return _ctranslate2(folder, prompts, "float32")


def ctranslate2_int8(folder: str, prompts: list[str]) -> list[list[int]]:
    """Generate with CTranslate2, its weights in 8 bits."""
    return _ctranslate2(folder, prompts, "int8")


def _ctranslate2(folder: str, prompts: list[str], kind: str) -> list[list[int]]:
    import ctranslate2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as made:
        ctranslate2.converters.TransformersConverter(folder).convert(made, quantization=kind, force=True)
        generator = ctranslate2.Generator(made, device="cpu", compute_type=kind)
        ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        settings = {"max_length": NEW_TOKENS, "sampling_topk": 1, "include_prompt_in_result": False}
        settings["end_token"] = tokenizer.eos_token
        return [
            generator.generate_batch([tokenizer.convert_ids_to_tokens(each)], **settings)[0].sequences_ids[0]
            for each in ids
        ]


def vllm(folder: str, prompts: list[str]) -> list[list[int]]:
    """Generate with vLLM on the CPU."""
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype="float32", max_model_len=1024, enforce_eager=True)
    outputs = model.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def lm_eval(folder: str, prompts: list[str]) -> list[str]:
    """Generate with the evaluation harness's model of transformers, through a task of its own."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=4)
    settings = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, dict(settings)), number) for number, prompt in enumerate(prompts)]
    return model.generate_until(asked, disable_tqdm=True)


def llama_cpp_converter(folder: str, prompts: list[str]) -> list[str]:
    """Generate with llama.cpp from the file that its own converter writes; LLAMA_CPP names a checkout of it."""
    import os

    with tempfile.TemporaryDirectory() as made:
        file = str(Path(made, "model.gguf"))
        converter = Path(os.environ["LLAMA_CPP"], "convert_hf_to_gguf.py")
        command = [sys.executable, str(converter), folder, "--outfile", file, "--outtype", "f32"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return llama_cpp(file, prompts)


PROGRAMS: dict[str, Callable[[str, list[str]], list]] = {
    program.__name__: program
    for program in (
        transformers_alone,
        transformers_batch,
        transformers_pipeline,
        transformers_serve,
        llama_cpp,
        llama_cpp_converter,
        ctranslate2_fp32,
        ctranslate2_int8,
        vllm,
        lm_eval,
    )
}

if __name__ == "__main__":
    answers = PROGRAMS[sys.argv[1]](sys.argv[2], json.load(sys.stdin))
    print(f"\nANSWERS {json.dumps(answers)}")
