"""Lets the reference show `Example:` sections of docstrings as code, which griffe does for `Examples:` alone."""

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the section while the sources are read."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Called with every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
