"""The settings of experiments that train models by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from at_extensions.configuration import Settings, option


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Demonstration."""

    out: str = option("runs/demo", "Folder for the two runs and the report.")
    epochs: int = option(60, "Passes over the training data of each run.", at_least=1)
    seed: int = option(0, "Seed of initial weights, order, augmentation and attacks.", at_least=0)
    progress: bool = option(True, "Show progress: bars on a terminal, else lines.")
