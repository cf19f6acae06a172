"""A run, from its flags to its result: arguments, Trainer, checkpoints, resuming, DeepSpeed, what a run says of itself.

How data are read and how a model computes is not decided here, and whether it fits is the plan's to say.
"""
