"""What the tests of training compare with: a loop over stock transformers, one example at a time, LoRA by hand."""

import copy
import json
import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)

HEAD = "Below is an instruction that describes a task"
FIXED = ["--save_strategy", "no", "--train_sampling_strategy", "sequential", "--logging_steps", "1"]
# With Adam's usual 1e-8, rounding grows a hundredfold within twenty steps: a gradient that is zero but for it moves its
# weight by the whole learning rate.
FIXED += ["--adam_epsilon", "1e-3"]


def logged(output: Path, name: str = "loss") -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def replies_of(row: dict) -> list[dict]:
    """Return a task for each reply of a row, which may be a conversation as multiturn_chat_0.8M writes it."""
    if not row["instruction"].startswith("Human:"):
        return [row]
    texts = [*re.split(r"(?:^|\n)(?:Human|Assistant):", row["instruction"])[1:-1], row["output"]]
    tasks, history = [], ""
    for question, reply in zip(texts[::2], texts[1::2], strict=True):
        instruction = f"{history}Human:{question}\nAssistant:" if history else question
        tasks.append({"instruction": instruction, "input": "", "output": reply})
        history += f"Human:{question}\nAssistant:{reply}\n"
    return tasks


def tensors_of(row: dict, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    context = ", paired with an input that provides further context" if row["input"] else ""
    body = f"{row['instruction']}\n\n### Input:\n{row['input']}" if row["input"] else row["instruction"]
    prompt = tokenizer(
        f"{HEAD}{context}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{body}\n\n### Response:"
    ).input_ids
    answer = [*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id]
    return torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])


def add_plain_lora(model: PreTrainedModel, rank: int, scale: float) -> list[torch.Tensor]:
    """Freeze a stock model and add LoRA to its linear layers by hooks, with the first matrices that peft makes."""
    set_seed(42)  # the Trainer's default
    first = get_peft_model(copy.deepcopy(model), LoraConfig(r=rank, target_modules="all-linear")).state_dict()
    model.requires_grad_(False)
    matrices = []
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        down = torch.nn.Parameter(first[f"base_model.model.{name}.lora_A.default.weight"].clone())
        up = torch.nn.Parameter(torch.zeros(layer.out_features, rank))
        layer.register_forward_hook(
            lambda module, inputs, output, down=down, up=up: output + scale * (inputs[0] @ down.T @ up.T)
        )
        matrices += [down, up]
    return matrices


def plain_losses(folder: Path, steps: list[list[dict]], lora_rank: int = 0) -> list[float]:
    """The original's recipe over stock transformers: one example a forward, the mean over a step's labels."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trained = add_plain_lora(model, lora_rank, scale=2.0) if lora_rank else list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(steps))
    losses = []
    for rows in steps:
        batch = [tensors_of(task, tokenizer) for row in rows for task in replies_of(row)]
        num_labels = sum((labels != -100).sum() for _, labels in batch)
        loss = 0.0
        for input_ids, labels in batch:
            logits = model(input_ids).logits[0, :-1]
            share = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / num_labels
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(loss)
    return losses
