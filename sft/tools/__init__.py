"""Commands on model folders: a random model, a plain folder or a GGUF file, a smaller vocabulary, answers side by side.

Each module is one command, python -m sft.tools.NAME; what two of them need belongs to a room below.
"""
