"""Exponential moving average (EMA) of parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Place = Literal["device", "cpu", "none"]


class EMA:
    """An exponential moving average of named parameters.

    After each step, average <- d average + (1 - d) parameter with d = min(decay, (1 + n) / (10 +
    n)) after n updates, so that the random initial values are forgotten soon (the warm-up of
    TensorFlow's ExponentialMovingAverage). Buffers are not averaged.

    `place` is where the average is kept: beside the parameters, in the CPU's memory, or nowhere.
    With "none", `average` is empty and `applied_to` changes nothing.
    """

    def __init__(self, params: Mapping[str, Tensor], decay: float, place: Place = "device") -> None:
        self.decay = decay
        self.updates = 0
        self._device = torch.device("cpu") if place == "cpu" else None
        self.average = {} if place == "none" else self._copies(params)

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor]) -> None:
        """Updates the average with the parameters' current values."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self.average:
            current = [params[name].detach().to(to.device) for name, to in self.average.items()]
            torch._foreach_lerp_(list(self.average.values()), current, 1.0 - decay)

    @contextmanager
    def applied_to(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the block the parameters hold the average; their own values are restored after."""
        own = self._copies(params) if self.average else {}
        with torch.no_grad():
            for name, average in self.average.items():
                params[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    params[name].copy_(value)

    def _copies(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: param.detach().to(self._device or param.device, copy=True)
            for name, param in params.items()
        }
