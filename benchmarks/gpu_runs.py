"""Items of `benchmarks.gpu` that train or chat: the script itself, speed against others, memory against the plan."""

import gc
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerBase, TrainerCallback

from benchmarks import measure, throughput
from benchmarks.gpu_kernels import Figures
from benchmarks.measure import Given
from benchmarks.throughput import WAYS, make_tokenizer, make_trainer, measure_way, model_flops
from sft.chat.model import ChatModel
from sft.chat.sampling import Sampling
from sft.data.collate import flatten
from sft.data.load import load_examples
from sft.data.packing import PackedSequences
from sft.model import lora, patch
from sft.plan.activations import Load, Strategy
from sft.plan.memory import footprint
from sft.tools.random_model import SHAPES, build_model
from sft.training import resume
from sft.training.arguments import ModelArguments, TrainingArguments
from sft.training.trainer import Trainer

PROJECT = Path(__file__).parent.parent
LORA = ModelArguments("random", lora_r=16)
PROFILED_STEPS = 5


# ---------------------------------------------------------------------------------------------------------- the script


def model_folder(shape: str, given: Given) -> str:
    """Return the folder of a random model in 16 bits with a tokenizer of the rows, made once."""
    folder = given.scratch / shape
    if not folder.exists():
        with given.device:
            model = build_model(shape)
        model.to(torch.float32 if given.is_tiny else torch.bfloat16).save_pretrained(folder)
        tokenizer_for(shape, given).save_pretrained(folder)
    return str(folder)


def tokenizer_for(shape: str, given: Given) -> PreTrainedTokenizerBase:
    """Return a tokenizer of a shape's family, trained on the rows."""
    return make_tokenizer(options_for(shape, given))


def options_for(shape: str, given: Given, **changed: object) -> Namespace:
    """Return what `benchmarks.throughput` is told on its command line."""
    usual = {"max_length": 256 if given.is_tiny else 2048, "warmup": 2, "steps": 2 if given.is_tiny else 8}
    usual |= {"checkpointing": False, "compile_blocks": False, "torch_compile": False}
    usual |= {"vocab_size": None, "tokenizer": None, "rows": 1, "batch": 8}
    return Namespace(shape=shape, data=given.data, **{**usual, **changed})


def run_script(given: Given, shape: str, output: str, *flags: object, launch: tuple = ("train_sft.py",), **more: str):
    """Run train_sft.py on a model of a shape; return its time in seconds and what it has printed.

    Raises RuntimeError with the end of its output if it fails.
    """
    length = 256 if given.is_tiny else 2048
    usual = ["--model_name_or_path", model_folder(shape, given), "--data_path", given.data, "--packing", "True"]
    usual += ["--output_dir", given.scratch / output, "--model_max_length", length, "--logging_steps", 1]
    usual += ["--cache_dir", given.scratch / "cache", "--learning_rate", "1e-5", "--report_to", "none"]
    usual += ["--use_cpu", "True"] if given.device.type == "cpu" else []
    command = [sys.executable, *map(str, (*launch, *usual, *flags))]
    start, environment = time.perf_counter(), {**os.environ, "PYTHONPATH": paths(), **more}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"train_sft.py ended with {done.returncode}: {done.stdout.strip()[-600:]}")
    return time.perf_counter() - start, done.stdout


def paths() -> str:
    """Return where a child process finds this project and what this one has found."""
    return os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])


def train(given: Given) -> Iterator[Figures]:
    """Yield what train_sft.py says of bloom-560m: 20 steps with evaluations and saves, in two starts."""
    [shape], flags = given.shapes("bloom-560m"), ["--eval_fraction", 0.05, "--save_total_limit", 1]
    for steps in (10, 20):
        flags_of_start = ["--max_steps", steps, "--save_steps", 10, "--eval_strategy", "steps", "--eval_steps", 10]
        seconds, printed = run_script(given, shape, "train", *flags, *flags_of_start, "--lr_scheduler_type", "constant")
        found = {"seconds": seconds}
        for name, pattern in {
            "leak": r"in a flat batch as alone, to (\S+)",
            "loss": r"^loss (\S+ -> \S+) in",
            "resumed from": r"resuming from \S*(checkpoint-\d+)",
        }.items():
            if match := re.search(pattern, printed, re.M):
                found[name] = match[1]
        yield f"{shape}, to step {steps}", found
        for line in re.findall(r"^(?:packing|steps|rate|device|memory) .*$", printed, re.M):
            yield f"{shape}, said", {"line": line}
    card = (given.scratch / "train" / "README.md").read_text(encoding="utf-8")
    if match := re.search(r"([\d,]+) tokens/s", card):
        yield f"{shape}, its own card", {"tokens/s": float(match[1].replace(",", ""))}
    state = json.loads((given.scratch / "train" / "trainer_state.json").read_text())
    yield (
        f"{shape}, held out",
        {f"loss at {entry['step']}": entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry},
    )


def zero(given: Given) -> Iterator[Figures]:
    """Yield whether ZeRO-2 and ZeRO-3 run with each offload on one rank, and ZeRO-2 on all with and without overlap."""
    configs = [(f"ZeRO-{stage}", f"ds_zero{stage}_config.json", "none", 1) for stage in (2, 3)]
    if given.device.type != "cpu":
        configs += [
            (f"ZeRO-{stage}, offload {offload}", f"ds_zero{stage}_config.json", offload, 1)
            for stage, offload in ((2, "optimizer"), (3, "optimizer"), (3, "all"))
        ]
    if (ranks := torch.cuda.device_count()) > 1:
        for overlaps in (False, True):
            config = json.loads((PROJECT / "ds_zero2_config.json").read_text())
            config["zero_optimization"]["overlap_comm"] = overlaps
            path = given.scratch / f"overlap_{overlaps}.json"
            path.write_text(json.dumps(config))
            configs.append((f"ZeRO-2 on {ranks} GPUs, overlap_comm {overlaps}", path, "none", ranks))
    [shape] = given.shapes("bloom-154m")
    for title, config, offload, ranks in configs:
        yield f"{shape}, {title}", zero_run(given, shape, config, offload, ranks)


def zero_run(given: Given, shape: str, config: object, offload: str, ranks: int) -> dict:
    """Return the seconds, tokens/s and loss of ten steps under DeepSpeed, or why they failed."""
    on_cpu = given.device.type == "cpu"
    launch = ("-m", "sft.training.launch", "--ranks", str(ranks), *(["--cpu"] if on_cpu else []), "train_sft.py")
    environment = {"DS_ACCELERATOR": "cpu"} if on_cpu else {}
    flags = ["--deepspeed", config, "--offload", offload, "--max_steps", 10, "--save_strategy", "no"]
    output = f"zero_{Path(config).stem}_{offload}_{ranks}"
    try:
        seconds, printed = run_script(given, shape, output, *flags, launch=launch, **environment)
    except RuntimeError as error:
        return {"failed": str(error)[-300:]}
    card = (given.scratch / output / "README.md").read_text(encoding="utf-8")
    rate = float(re.search(r"([\d,]+) tokens/s", card)[1].replace(",", ""))
    return {"seconds": seconds, "tokens/s": rate, "loss": re.search(r"^loss (.*) in", printed, re.M)[1]}


def qlora(given: Given) -> Iterator[Figures]:
    """Yield whether 4-bit weights and an 8-bit optimizer train."""
    if not find_spec("bitsandbytes"):
        yield "bitsandbytes is not installed", {}
        return
    [shape] = given.shapes("bloom-560m")
    for name, flags in (
        ("QLoRA", ["--lora_r", 16, "--load_in_4bit", "True", "--merge_lora", "False"]),
        ("8-bit AdamW", ["--optim", "adamw_bnb_8bit"]),
    ):
        seconds, printed = run_script(given, shape, name, *flags, "--max_steps", 5, "--save_strategy", "no")
        yield f"{shape}, {name}", {"seconds": seconds, "loss": re.search(r"^loss (.*) in", printed, re.M)[1]}


# --------------------------------------------------------------------------------------------------------------- speed


def speed(given: Given) -> Iterator[Figures]:
    """Yield tokens/s and the share of peak FLOP/s of the plain recipe, TRL and this project, by tokens a step."""
    peak = measure.peak_flops()
    for shape in given.shapes("bloom-560m", "bloom-1b7"):
        plain = None
        for title, way, changed in ways_to_train(shape):
            clean()
            try:
                result = measure_way(way, options_for(shape, given, **changed))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                yield f"{shape}, {title}", {"failed": str(error)[:200]}
                continue
            rate = result["tokens"] / result["seconds"]
            plain = plain or rate
            figures = {"tokens/s": rate, "times plain": rate / plain, "GiB": result["peak_bytes"] / measure.GIB}
            if peak:
                figures["MFU %"] = 100 * model_flops(shape, result) / result["seconds"] / peak
            figures |= {"last loss": result["losses"][-1], "leak": result["leak"]}
            yield f"{shape}, {title}", figures


def ways_to_train(shape: str) -> Iterator[tuple[str, str, dict]]:
    """Yield a title, the way's name in `benchmarks.throughput`, and its options."""
    yield "plain recipe, 8 accumulated", "plain", {}
    yield "packed, 1 sequence per step", "ours-packed", {}
    yield "packed, 8 sequences per step", "ours-packed", {"rows": 8}
    if find_spec("trl"):
        yield "TRL, padded to batches of 8", "trl-padded", {}
    yield "packed, 8 sequences, compiled blocks", "ours-packed", {"rows": 8, "compile_blocks": True}
    yield "packed, 4 sequences per step", "ours-packed", {"rows": 4}
    yield "8 examples per step, not packed", "ours", {}
    yield "packed, 8 sequences, nothing shared", "ours-packed-apart", {"rows": 8}
    if shape != "bloom-1b7":  # once is enough for what compiles for a minute
        yield "packed, 8 sequences, --torch_compile", "ours-packed", {"rows": 8, "torch_compile": True}


def profiled(given: Given) -> Iterator[Figures]:
    """Yield of five steps how long the GPU is busy, how many kernels are launched, and how often the host waits."""
    [shape] = given.shapes("bloom-560m")
    for title, changed in (("eager", {}), ("compiled blocks", {"compile_blocks": True})):
        clean()
        options = options_for(shape, given, rows=8, steps=2, **changed)
        with given.device:
            model = build_model(shape)
        trainer = make_trainer(WAYS["ours-packed"], model, tokenizer_for(shape, given), options)
        watch = Profile(options.warmup)
        trainer.add_callback(watch)
        trainer.train()
        yield f"{shape}, {title}", watch.figures()


class Profile(TrainerCallback):
    """Profiles a few steps after those that compile."""

    def __init__(self, warmup: int):
        self.warmup, self.num_compilations, self.first_step = warmup, 0, None
        self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_step_end(self, args, state, control, **unused) -> None:
        """Start when no step compiles any more, and stop some steps later."""
        compiled = measure.num_compilations()
        if self.first_step is None and state.global_step >= self.warmup and compiled == self.num_compilations:
            measure.wait_for_gpu()
            self.first_step, self.start = state.global_step, time.perf_counter()
            self.profile.__enter__()
        elif self.first_step is not None and state.global_step == self.first_step + PROFILED_STEPS:
            measure.wait_for_gpu()
            self.seconds = time.perf_counter() - self.start
            self.profile.__exit__(None, None, None)
            control.should_training_stop = True
        self.num_compilations = compiled

    def figures(self) -> dict:
        """Return what was seen, by step."""
        events = self.profile.key_averages()
        busy = sum(event.self_device_time_total for event in events) / 1e6
        counts = {
            "launches a step": ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx"),
            "waits a step": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        }
        found = {"ms a step": 1000 * self.seconds / PROFILED_STEPS, "busy %": 100 * busy / self.seconds}
        for name, keys in counts.items():
            found[name] = sum(event.count for event in events if event.key in keys) / PROFILED_STEPS
        largest = sorted(events, key=lambda event: -event.self_device_time_total)[:8]
        if busy:
            found["most"] = "; ".join(
                f"{event.key[:48]} {event.self_device_time_total / 1e4 / busy:.0f} %" for event in largest
            )
        return found


# -------------------------------------------------------------------------------------------------------------- memory


def clean() -> None:
    """Let go of what earlier runs held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def short_run(shape: str, strategy: Strategy, rows: int, given: Given) -> dict:
    """Train some steps of one process by this project's own Trainer; return speed, and peak memory beside the plan."""
    clean()
    options = options_for(shape, given)
    tokenizer = make_tokenizer(options)
    args = TrainingArguments(
        output_dir=str(given.scratch / "short"),
        per_device_train_batch_size=rows,
        max_steps=options.warmup + options.steps + throughput.MOST_WARMUP,
        optim=strategy.optim,
        activation_checkpointing=strategy.checkpointing,
        learning_rate=1e-5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=given.device.type == "cpu",
    )
    with given.device:
        model = build_model(shape).to(args.compute_dtype if strategy.is_lora else torch.float32)
    patch.install(model)
    model_args = LORA if strategy.is_lora else ModelArguments("random")
    if strategy.is_lora:
        model = lora.add(model, LORA.lora_config, "", 0)
    packed = PackedSequences(load_examples(given.data, tokenizer)[0], options.max_length, shares_prefixes=True)
    collate = partial(flatten, share_prefixes=True)
    keywords = {"args": args, "data_collator": collate, "train_dataset": packed, "processing_class": tokenizer}
    num_steps = args.schedule(packed.num_sequences).num_steps
    settings = resume.settings_of(model_args, args, packed, SHAPES[shape], num_steps)
    trainer = Trainer(model=model, settings=settings, shares_batches=True, **keywords)
    counts = throughput.metered(trainer, options)
    is_gpu = given.device.type != "cpu"
    load = Load(SHAPES[shape], LORA.lora_config, False, args.compute_dtype, is_gpu)
    planned, peak = footprint(strategy, load, rows * options.max_length, 1).device, counts["peak_bytes"]
    figures = {"tokens/s": counts["tokens"] / counts["seconds"], "planned GiB": planned / measure.GIB}
    figures |= {"peak GiB": peak / measure.GIB, "planned by peak": planned / peak}
    if torch.cuda.is_available():
        figures["reserved GiB"] = torch.cuda.max_memory_reserved() / measure.GIB
    if (flops := measure.peak_flops()) and strategy.method == "full":
        figures["MFU %"] = 100 * model_flops(shape, counts) / counts["seconds"] / flops
    return figures


def runs(given: Given, planned: list[tuple[str, Strategy, int]]) -> Iterator[Figures]:
    """Yield the figures of short runs, and what fails."""
    for name, strategy, rows in planned:
        [shape] = given.shapes(name)
        checkpointed = ", checkpointed" if strategy.checkpointing else ""
        title = f"{shape}, {strategy.method}{checkpointed}, {strategy.optim}, {rows} rows"
        try:
            yield title, short_run(shape, strategy, rows, given)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            yield title, {"failed": str(error)[:200]}


def memory(given: Given) -> Iterator[Figures]:
    """Yield the peak of one process beside the plan's, for what trains small models."""
    eight_bit = [Strategy("full", optim="adamw_bnb_8bit")] if find_spec("bitsandbytes") else []
    ways = [Strategy("full"), Strategy("full", checkpointing=True), Strategy("LoRA"), *eight_bit]
    sizes = [("bloom-560m", 1), ("bloom-560m", 8), ("bloom-1b7", 8)]
    return runs(given, [(name, way, rows) for name, rows in sizes[: 1 if given.is_tiny else 3] for way in ways])


def large(given: Given) -> Iterator[Figures]:
    """Yield speed and peak of models of seven billion weights: LoRA, and all weights where they fit."""
    full = [Strategy("full", optim="adafactor", checkpointing=True)]
    full += [Strategy("full", optim="adamw_bnb_8bit", checkpointing=True)] if find_spec("bitsandbytes") else []
    if given.device.type == "cuda" and torch.cuda.get_device_properties(0).total_memory > 120 * measure.GIB:
        full.append(Strategy("full", checkpointing=True))
    ways = [(Strategy("LoRA"), 1), (Strategy("LoRA", checkpointing=True), 8), *((way, 4) for way in full)]
    return runs(given, [(name, way, rows) for name in ("bloom-7b1", "falcon-7b") for way, rows in ways])


# ---------------------------------------------------------------------------------------------------------------- chat


def chat(given: Given) -> Iterator[Figures]:
    """Yield tokens/s of one greedy reply, in the dtype that the chat chooses."""
    num_tokens = 16 if given.is_tiny else 128
    for shape in given.shapes("bloom-560m", "bloom-7b1", "falcon-7b"):
        clean()
        with given.device:
            model = build_model(shape).to(torch.float32 if given.is_tiny else torch.bfloat16)
        talker = ChatModel(model, tokenizer_for(shape, given))
        seconds = []
        for longest in (1, num_tokens):  # the first also warms up
            start = time.perf_counter()
            made = talker.generate([list(range(5, 65))], Sampling(max_new_tokens=longest, temperature=0.0))
            measure.wait_for_gpu()
            seconds.append(time.perf_counter() - start)
        yield f"{shape}, {talker.weights}", {"tokens": made.shape[1], "tokens/s": made.shape[1] / seconds[1]}
