"""What fits: memory and disk of every way to train, from a model's configuration alone, and the command to type.

No weight is loaded here, and no run is started.
"""
