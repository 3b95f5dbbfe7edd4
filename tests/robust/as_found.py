"""The points of "as found": everything about a model, and around it, that attaching and editing must leave alone.

    with unchanged(model, ids):          # raises AssertionError that lists every difference
        attach_saes(model, sae)
        ...
        detach_saes(model)
"""

import contextlib
import copy
import os
import random

import numpy
import torch
from torch.nn.modules import module as torch_module

HOOK_TABLES = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
GLOBAL_TABLES = (
    "_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
    "_global_forward_hooks_with_kwargs", "_global_forward_hooks_always_called")


def snapshot(model, probe=None):
    """Everything that must stay, as {point: value}; probe (batch, tokens), token ids, gives the logits to compare."""
    state = {
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "parameters": {name: facts(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: facts(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "state dict": {name: t.data_ptr() for name, t in model.state_dict().items()},
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "default dtype": torch.get_default_dtype(),
        "torch's random state": torch.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "NumPy's random state": [part.tolist() if hasattr(part, "tolist") else part
                                 for part in numpy.random.get_state()],
        "files in the working directory": files(),
        "global hooks": {name: hooks(getattr(torch_module, name)) for name in GLOBAL_TABLES},
    }
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        state[name] = None if config is None else copy.deepcopy(config.to_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"hooks of {name or 'the model'}"] = {table: hooks(getattr(module, table)) for table in HOOK_TABLES}
        state[f"training of {name or 'the model'}"] = module.training
        state[f"attributes of {name or 'the model'}"] = attributes(module)
    if probe is not None:
        with torch.no_grad():
            state["logits"] = model(probe).logits.clone()
    return state


def facts(tensor):
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.requires_grad, tuple(tensor.shape), tensor._version


def hooks(table):
    return [(key, id(value)) for key, value in table.items()]


def attributes(module):
    """Names in the instance's __dict__ with the identity of what is callable there (`forward`, `generate`)."""
    return {name: id(value) if callable(value) else None for name, value in module.__dict__.items()}


def files():
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(".") for name in names)


def differences(before, after):
    """Points that are not as they were, readable."""
    return [f"{point}: {shown(before.get(point))} became {shown(after.get(point))}"
            for point in {**before, **after} if not same(before.get(point), after.get(point))]


def same(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def shown(value):
    text = repr(value)
    return text if len(text) < 200 else text[:200] + "..."


@contextlib.contextmanager
def unchanged(model, probe=None):
    """Hold that the block leaves everything as it found it, also when it raises."""
    before = snapshot(model, probe)
    try:
        yield
    finally:
        changed = differences(before, snapshot(model, probe))
        assert not changed, "not as found:\n" + "\n".join(changed)
