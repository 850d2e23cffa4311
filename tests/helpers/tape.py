"""A CPU that plays the GPU that captures steps: what it records are the operations, not the kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blt_hf import cuda_graphs
from blt_hf.model import step_blt


class Tape(TorchDispatchMode):
    """Every operation below it, to be run again in the same memory, as a CUDA graph runs its kernels."""

    def __init__(self):
        super().__init__()
        self.steps, self.made, self.before, self.replays = [], set(), {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("what is recorded asked for a value")
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.made:
                    storage = tensor.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = function(*args, **kwargs)
        if not function._schema.is_mutable and not function.is_view:
            self.made |= {t.untyped_storage().data_ptr() for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        self.steps.append((function, args, kwargs, result))
        return result

    def take_back(self):
        """A GPU records and does not run."""
        for storage, values in self.before.values():
            storage.copy_(values)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.steps:
            new = function(*args, **kwargs)
            for old, value in zip(tree_leaves(result), tree_leaves(new)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


@contextmanager
def record_on_tapes() -> Iterator[list[Tape]]:
    """Steps on a CPU are captured as on a GPU; a list of what was recorded."""
    made: list[Tape] = []

    def capture(function, device):
        tape = Tape()
        try:
            with tape:
                result = function()
        finally:
            tape.take_back()
        made.append(tape)
        return result, tape.replay

    with patch.object(cuda_graphs, "capture", capture), patch.object(step_blt, "can_capture", lambda device: True):
        yield made
