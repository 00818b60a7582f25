"""Dynamic loss scale of float16 training (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from pangu_sigma.config import Config

SMALLEST = 1.0


@dataclass
class LossScale:
    """Factor that the loss is multiplied with before the backward pass, so that small gradients survive float16.

    Divided by `factor` after an overflow, multiplied by it after `window` clean steps; fixed at 1 outside float16.
    """

    value: float
    window: int
    factor: float
    dynamic: bool
    clean_steps: int = 0

    @classmethod
    def from_config(cls, config: Config) -> LossScale:
        """The scale that a new run of this configuration starts with."""
        settings = config.train.loss_scale
        dynamic = config.train.precision == "float16"
        return cls(settings.initial if dynamic else 1.0, settings.window, settings.factor, dynamic)

    @property
    def dynamic_value(self) -> float | None:
        """The value where it changes, None where it is fixed."""
        return self.value if self.dynamic else None

    def record_success(self) -> None:
        """Note a step with finite gradients."""
        self.clean_steps += 1
        if self.dynamic and self.clean_steps >= self.window:
            self.value, self.clean_steps = self.value * self.factor, 0

    def record_overflow(self) -> bool:
        """Note an overflow; True if a smaller scale can help, False if the scale is at its floor or fixed."""
        self.clean_steps = 0
        if not self.dynamic or self.value <= SMALLEST:
            return False
        self.value = max(SMALLEST, self.value / self.factor)
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "clean": self.clean_steps}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from `state()`."""
        self.value, self.clean_steps = float(state["value"]), int(state["clean"])
