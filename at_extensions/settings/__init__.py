"""The settings of every command: the command line, YAML files, presets and Python build the same dataclasses."""

from at_extensions.settings.analysis import (
    CriticalitySettings,
    DispersionSettings,
    InstabilitySettings,
    MeasureSettings,
    NTKSettings,
)
from at_extensions.settings.evaluation import EvaluateSettings, OwnModelSettings
from at_extensions.settings.experiments import (
    DemoSettings,
    InducedDistributionSettings,
    InjectionSettings,
    RandomLabelsSettings,
)
from at_extensions.settings.publishing import (
    LeaderboardSettings,
    Paper,
    PublishSettings,
    ReportSettings,
    VerifySettings,
)
from at_extensions.settings.training import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    OptimSettings,
    TrainSettings,
    differences,
    read_settings,
)

__all__ = [
    "CriticalitySettings",
    "DataSettings",
    "DemoSettings",
    "DispersionSettings",
    "EvaluateSettings",
    "InducedDistributionSettings",
    "InjectionSettings",
    "InstabilitySettings",
    "LeaderboardSettings",
    "MeasureSettings",
    "MethodSettings",
    "ModelSettings",
    "NTKSettings",
    "OptimSettings",
    "OwnModelSettings",
    "Paper",
    "PublishSettings",
    "RandomLabelsSettings",
    "ReportSettings",
    "TrainSettings",
    "VerifySettings",
    "differences",
    "read_settings",
]
