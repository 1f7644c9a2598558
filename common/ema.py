"""Exponential moving average (EMA) of parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """An exponential moving average of named parameters.

    After each step, average <- d average + (1 - d) parameter with d = min(decay, (1 + n) / (10 +
    n)) after n updates, so that the random initial values are forgotten soon (the warm-up of
    TensorFlow's ExponentialMovingAverage). Buffers are not averaged.
    """

    def __init__(self, params: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: param.detach().clone() for name, param in params.items()}

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor]) -> None:
        """Updates the average with the parameters' current values."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = [params[name].detach() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), current, 1.0 - decay)

    @contextmanager
    def applied_to(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the parameters hold the average; their own values are restored after."""
        own = {name: param.detach().clone() for name, param in params.items()}
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, param in params.items():
                    param.copy_(own[name])
