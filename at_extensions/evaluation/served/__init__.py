"""What ``import autoattack`` gets where no upstream is installed: its interface, over our driver."""

from at_extensions.evaluation.served.autoattack import AutoAttack

__all__ = ["AutoAttack"]
