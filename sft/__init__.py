"""The library behind the scripts: seven rooms over a ground floor, imports running one way.

    program  prompts  machine  network          the ground floor: how programs end, the prompt's text, hardware, the hub
    data     model                              from files to token ids; from token ids to loss and gradients
    training chat                               a run from its flags to its result; a checkpoint that answers
    plan     web     tools                      what fits which card; the chat page; commands on model folders

A room may import those above it in this list, never one beside it.
"""

import os

# Threads that wait for work spin 300,000 times by default, and on a busy machine keep the cores from those that they
# wait for. So few cost a quiet machine 1 % of its speed. GNU OpenMP reads this once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

IGNORE_INDEX = -100  # the label of a token that is not trained; PyTorch's and transformers' own
