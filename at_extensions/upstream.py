"""Serve a module called ``autoattack`` where none is installed, so that robustbench imports as it is."""


def serve_autoattack() -> None:
    """Append the finder that serves ``autoattack``; does nothing if it is there already."""
