"""Adversarial training that no toolkit carries yet: train, understand, evaluate and publish robust classifiers.

Submodules load when they are first used, so ``import at_extensions`` costs no more than it must.
"""

from importlib import import_module
from pkgutil import iter_modules

from at_extensions import upstream

__version__ = "0.1.0"

_HOME = {  # public name -> the module it lives in
    "create_model": "models",
    "fresh_like": "models",
    "list_models": "models",
    "load_model": "models",
    "load_weights": "weights",
    "load_dataset": "data",
    "load_test": "data",
    "make_loader": "data",
    "evaluate": "evaluation",
    "RobustnessReport": "evaluation",
    "create_method": "methods",
    "list_methods": "methods",
    "Trainer": "training",
    "train": "commands.train",
    "TrainSettings": "settings",
    "evaluate_run": "commands.evaluate",
    "EvaluateSettings": "settings",
    "RunDirectory": "runs",
    "keep_freed_memory": "memory",
}
_ROOMS = tuple(m.name for m in iter_modules(__path__) if m.name != "cli" and not m.name.startswith("_"))

__all__ = ["__version__", *_HOME, *_ROOMS]

upstream.serve_autoattack()


def __getattr__(name: str):
    if name in _ROOMS:
        return import_module(f"at_extensions.{name}")
    if name in _HOME:
        return getattr(import_module(f"at_extensions.{_HOME[name]}"), name)
    raise AttributeError(f"module 'at_extensions' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
