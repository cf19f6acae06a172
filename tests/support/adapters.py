"""A LoRA adapter that changes its base model, and the same merged into it."""

import shutil
from pathlib import Path


def save_adapter_and_merged(base: Path, folder: Path) -> None:
    """Write an adapter of a base model's folder to `folder`/adapter, and the merged model to `folder`/merged."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=4, init_lora_weights=False, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder / "merged")
