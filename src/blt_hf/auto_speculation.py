"""Self-speculation that chooses its own window (`self_speculation_window="auto"`)."""

import time
from weakref import WeakKeyDictionary

import torch

from .model.cache_blt import BltCache
from .model.generation_blt import Drafts, RaggedText, SelfSpeculation
from .model.step_blt import StepRunner


class AutoSpeculation(SelfSpeculation):
    """Drafts with a window that follows the cost of drafts here and how many are accepted; 0 where they do not pay.

    A round with window `w` writes `1 + a + ... + a^w` bytes if each draft is accepted with probability `a`. Its time is
    measured in the first rounds of a process, for each model, kind of step and window, and the window with the most bytes
    a second is taken. `a` is that of the last rounds, over all rows. A window of 0 is left for one round in 64, to ask
    again.

    Args:
        runner, num_rows, do_sample: as in [`SelfSpeculation`].
    """

    _costs: "WeakKeyDictionary[torch.nn.Module, dict[tuple, dict[int, float]]]" = WeakKeyDictionary()
    _TIMES = 2  # that rounds of each window are timed
    _PROBE = 64

    def __init__(self, runner: StepRunner, num_rows: int, do_sample: bool):
        super().__init__(runner, num_rows, 0, is_adaptive=False, do_sample=do_sample)
        kind = (num_rows, runner.compiles, runner.graphs is None, runner.packed is None, torch.get_num_threads())
        self.costs = self._costs.setdefault(runner.model, {}).setdefault(kind, {})
        # Steps of other lengths would be compiled as well.
        self.candidates = (0, 3, 7) if runner.compiles else (0, 3, 7, 15)
        self.pending = [w for w in self.candidates if w not in self.costs for _ in range(self._TIMES)]
        self.accepted, self.tried, self.idle = 0.9, 1.0, 0
        self.window, self.started = 0, 0.0

    def propose(self, text: RaggedText, cache: BltCache, limits: list[int]) -> Drafts:
        self.window = self.pending[0] if self.pending else self.best_window()
        if self.window == 0 and not self.pending:
            self.idle += 1
            if self.idle % self._PROBE == 0:
                self.window = 3
        self.windows = [self.window] * len(limits)
        self.started = time.perf_counter()
        return super().propose(text, cache, limits)

    def update(self, drafted: list[int], accepted: list[int]) -> None:
        elapsed = time.perf_counter() - self.started
        if max(drafted, default=0) == self.window and self.pending and self.pending[0] == self.window:
            # The least, as the first rounds also compile, and other programs take their share of any.
            self.costs[self.window] = min(elapsed, self.costs.get(self.window, elapsed))
            self.pending.pop(0)
        if any(drafted):
            forget = 0.9
            self.accepted = forget * self.accepted + sum(accepted)
            self.tried = forget * self.tried + sum(a + (a < d) for a, d in zip(accepted, drafted))

    def best_window(self) -> int:
        """Finds the window with the most bytes a second."""
        rate = min(self.accepted / self.tried, 0.995)

        def bytes_per_second(window: int) -> float:
            return (1 - rate ** (window + 1)) / (1 - rate) / max(self.costs[window], 1e-9)

        return max(self.candidates, key=bytes_per_second)


__all__ = ["AutoSpeculation"]
