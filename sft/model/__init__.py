"""From a flat batch to its loss, and to files: models and tokenizers loaded, attention, loss, LoRA, GGUF.

Nothing here knows files of records, a training loop or a command-line flag.
"""
