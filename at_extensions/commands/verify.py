"""The verification of a folder that ``publish`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from at_extensions.checks import check_device
from at_extensions.publishing import Verification, verify
from at_extensions.settings import VerifySettings


def verify_folder(folder: str | Path, settings: VerifySettings | None = None, **options: Any) -> Verification:
    """Check a published folder: hashes, schema, clean accuracy, and AutoAttack on some images (``publishing.verify``).

    Args:
        folder: The folder.
        settings: The settings; their defaults if None.
        **options: Single settings by name (see ``VerifySettings``).
    """
    settings = VerifySettings.of(settings, options)
    if settings.device is not None:
        check_device(settings.device)
    return verify(folder, **settings.to_dict())
