"""Plain values, as YAML and JSON have them: read from a file, and checked one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualview.arguments import check_number, check_path, shown


def read_yaml(file: str | Path) -> Any:
    """What a YAML file holds.

    Args:
        file: Its path.

    Raises:
        ValueError: There is no such file, or it is no YAML, or a key is written twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML itself would keep the last value of a key that is written twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in getattr(node, "value", ()) if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.YAMLError(f"{shown(twice[0])} is written twice, {node.start_mark}; keep one of them.")
            return super().construct_mapping(node, deep)

    file = Path(check_path(file, "file"))
    if not file.is_file():
        raise ValueError(f"{file}: {'is no file' if file.exists() else 'no such file'}: give a YAML file.")
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error


def check_text(value: Any, name: str, *, optional: bool = False) -> None:
    """Raise a ValueError for what is no text, or an empty one; None is taken where it is ``optional``."""
    if not (isinstance(value, str) and value) and not (optional and value is None):
        raise ValueError(f"{name}={shown(value)}: must be a text that is not empty.")


def check_share(value: Any, name: str) -> None:
    """Raise a ValueError for what is no part of a whole."""
    if not 0 <= check_number(value, name) < 1:
        raise ValueError(f"{name}={shown(value)}: must be at least 0 and below 1.")


def check_names(given: Mapping[str, Any], known: Any, prefix: str) -> None:
    """Raise a ValueError for the first field that is not known."""
    for name in given:
        if name not in known:
            raise ValueError(f"{prefix}{name}={shown(given[name])}: is no field; there are {', '.join(known)}.")


def checked_mapping(value: Any, name: str) -> Mapping[str, Any]:
    """``value`` if it is fields with their values.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}={shown(value)}: must be fields with their values.")
    return value


def plain_mapping(value: Any, name: str) -> dict[str, Any]:
    """A mapping of what JSON has, so that the record of a run can hold it."""
    made: dict[str, Any] = plain_value(checked_mapping(value, name))
    _check_plain(made, name)
    return made


def _check_plain(value: Any, name: str) -> None:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        for key, each in value.items():
            _check_plain(each, f"{name}.{key}")
    elif isinstance(value, list):
        for each in value:
            _check_plain(each, name)
    elif not (value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(
            f"{name}={shown(value)}: must be a text, a finite number, true, false, or a list or fields of these."
        )


def plain_value(value: Any) -> Any:
    """Mappings as dicts, and sequences as lists."""
    if isinstance(value, Mapping):
        return {key: plain_value(each) for key, each in value.items()}
    return [plain_value(each) for each in value] if isinstance(value, (list, tuple)) else value


def number_of_text(value: Any) -> Any:
    """YAML takes 1e-3, without a point, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
