"""Lets the site show the examples in docstrings as code: `Example:` is what we write."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames `Example:` to `Examples:`, the section that the Google parser knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section in the docstring of one object, once it is loaded."""
        if obj.docstring is not None:
            renamed = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = renamed
