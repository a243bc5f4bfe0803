"""Rendering of the package's templates, in which HTML escapes whatever is put in, and of configurations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

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
        template: File name; the ending decides about escaping.
        **values: Values of the template's names; a missing one raises.
    """
    return _environment(template.endswith(".html")).get_template(template).render(**values)


class _Compact(yaml.SafeDumper):
    """YAML with lists on one line."""


_Compact.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


def compact_yaml(data: Mapping[str, Any]) -> str:
    """Return a configuration as YAML in its own order, lists on one line."""
    return yaml.dump(data, Dumper=_Compact, sort_keys=False, width=100, allow_unicode=True)
