"""An extension of griffe (mkdocs.yml): docstrings as Markdown and its Google style want them."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Markdown(griffe.Extension):
    """Roles, which only Sphinx reads, become code; the section of one example is one of examples."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of an object that was found."""
        if obj.docstring is not None:
            text = re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
