"""All tests of model/ that take a device, on a GPU: the same functions, with the `device` of this folder."""

import inspect

from model import test_attention, test_loss, test_loss_gradients, test_patch

for module in (test_attention, test_loss, test_loss_gradients, test_patch):
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_") and "device" in inspect.signature(test).parameters:
            globals()[name.replace("test_", f"{module.__name__.split('.')[-1]}_", 1)] = test
