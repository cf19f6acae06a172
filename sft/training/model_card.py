"""The README.md of a fine-tuned folder: what it is, how it was made, how well it did, and who may use it."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard
from yaml import YAMLError

from sft.data.report import NOTES, DataReport
from sft.data.streaming import StreamedSequences
from sft.training.summary import device_line, losses, steps_line

if TYPE_CHECKING:
    from sft.training.trainer import Trainer

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets")
BASE_LICENCES = {
    "bloom": "BLOOM is under the BigScience RAIL licence 1.0, whose restrictions of use pass on to this model.",
    "falcon": "Falcon-7b and -40b are under Apache-2.0; see the base model's own card for other sizes.",
}
CARD = """---
library_name: transformers
pipeline_tag: text-generation
language: [zh]
{metadata}---

# {name}

{base} fine-tuned on Chinese instructions ({trained}), with the loss on the answers only.
The prompt is in the tokenizer's chat template.

## Data

{data}. `{notes}` lists which rows were refused, cut or dropped as duplicates, with file, line and reason.

## Run

- {steps}
- {settings}
- hardware: {hardware}
- {speed}
- {versions}

## Result

{results}

All that was measured on the way is in [trainer_state.json](trainer_state.json).

![loss curve](loss_curve.png)

## Licences

{licence}
The data has a licence of its own, which may also apply to models trained on it. BelleGroup's sets are for
research only.
"""


def model_card(base: str, data: str, report: DataReport | StreamedSequences, trainer: "Trainer") -> str:
    """Return the card of a run's result; losses are in nats per trained token, tokens per second count steps only."""
    args, settings = trainer.args, trainer.settings
    lora = f"LoRA of rank {settings.lora_r}, {settings.num_trained:,} parameters"
    metadata, licence = base_licence(base, trainer.model.config.model_type)
    speed = trainer.watch.tokens_per_second
    return CARD.format(
        metadata=metadata,
        name=Path(args.output_dir).name,
        base=Path(base).name,
        trained=lora if settings.is_lora else f"all {settings.num_parameters:,} weights",
        data=f"{data}: {report.line()}",
        notes=NOTES,
        steps=steps_line(args, trainer.train_dataset),
        settings=f"length {args.model_max_length}, seed {args.seed}",
        hardware=device_line(args, settings.is_lora),
        speed=f"{speed:,.0f} tokens/s in the steps since the last start" if speed else "no steps since the last start",
        versions=", ".join(f"{library} {version(library)}" for library in LIBRARIES),
        results="\n".join(result_lines(trainer.state.log_history)),
        licence=licence,
    )


def result_lines(log_history: list[dict]) -> list[str]:
    """Return the first and last training loss, and the held-out loss before and after, as they were logged."""
    named = (("training loss", "loss"), ("held-out loss", "eval_loss"))
    points = {name: found for name, key in named if (found := losses(log_history, key))}
    return [
        f"- {name}: {found[0][1]:.4f} {'before the first step' if not found[0][0] else f'at step {found[0][0]:,}'}, "
        f"{found[-1][1]:.4f} at step {found[-1][0]:,}"
        for name, found in points.items()
    ] or ["- nothing was logged"]


def base_licence(base: str, model_type: str) -> tuple[str, str]:
    """Return the card's metadata lines on the base model, and the sentence on its licence.

    A base folder's own card says its licence; without one the family does.
    """
    card, folder = Path(base, "README.md"), Path(base)
    metadata = "" if folder.exists() else f"base_model: {base}\n"
    try:
        own = ModelCard.load(card).data.to_dict().get("license") if card.is_file() else None
    except (ValueError, OSError, YAMLError):  # a README.md that is no card
        own = None
    if own:
        return f"{metadata}license: {own}\n", f"{folder.name} is under the licence `{own}`, as its own card says."
    return metadata, BASE_LICENCES.get(model_type, "See the base model's own card.")
