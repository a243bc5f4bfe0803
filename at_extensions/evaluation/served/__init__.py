"""The module that ``import autoattack`` gives where no upstream is installed: its interface to our evaluation."""

from at_extensions.evaluation.served.autoattack import AutoAttack

__all__ = ["AutoAttack"]
