"""From a flat batch to its loss: models and tokenizers loaded, attention, loss, LoRA, 8-bit weights.

Nothing here knows files of records, a training loop or a command-line flag.
"""
