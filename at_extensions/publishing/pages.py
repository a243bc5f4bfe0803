"""Rendering of the package's templates; whatever is put into HTML is escaped."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


@functools.cache
def _environment(escape: bool) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("at_extensions.publishing"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda fraction: "–" if fraction is None else f"{100 * fraction:.1f} %"
    environment.filters["svg"] = Markup  # ours, and escaped where it was made
    return environment


def render(template: str, **values: Any) -> str:
    """Fill one of ``templates/``: HTML with autoescaping, anything else as plain text.

    Args:
        template: File name; what it is follows from its ending.
        **values: What the template asks for; a name it lacks raises.
    """
    return _environment(template.endswith(".html")).get_template(template).render(**values)
