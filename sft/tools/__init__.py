"""Commands on model folders: a random model, a plain folder out of a checkpoint, a smaller vocabulary.

Each module is one command, python -m sft.tools.NAME; what two of them need belongs to a room below.
"""
