"""Rows of LLaVA's JSON format: read, and checked one by one before anything is trained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dualview.arguments import shown

IMAGE = "<image>"
"""Where an image stands in the text of a row, whatever token the model's processor has for it."""
HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can hold and no tokenizer reads."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Twice(dict[str, Any]):
    """An object of JSON with a key twice, of which Python keeps the last value."""


class RowError(ValueError):
    """A row that cannot be trained on; the message names file and index."""


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: "user", "assistant" or "system".
        text: The text, with ``<image>`` where an image stands.
    """

    role: str
    text: str


class Row(NamedTuple):
    """A row that has passed the checks.

    Attributes:
        place: File and index, for messages.
        images: Paths of its pictures, in the order in which they stand in the text.
        turns: The conversation.
    """

    place: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]

    @property
    def size(self) -> int:
        """Characters of its text."""
        return sum(len(turn.text) for turn in self.turns)


def check_files(file: str | Path, images: str | Path | None, source: str | None) -> tuple[Path, Path]:
    """A file of rows and the folder of its pictures, that of the file where ``images`` is None.

    Raises:
        ValueError: One of them is missing; the message names ``source``.
    """
    file = Path(file)
    folder = file.parent if images is None else Path(images)
    for path, found, kind in ((file, file.is_file(), "file"), (folder, folder.is_dir(), "folder of images")):
        if not found:
            remedy = f"Fetch it from {source}" if source else "Correct `file` or `images` of the stage's data."
            raise ValueError(f"{path}: {f'is no {kind}' if path.exists() else f'no such {kind}'}. {remedy}")
    return file, folder


def read_rows(file: Path) -> list[Any]:
    """The rows of a ``.json`` file (a list) or of a ``.jsonl`` file (one a line), not yet checked.

    Args:
        file: The file.

    Raises:
        ValueError: It is no JSON of this form.
    """
    try:
        with file.open(encoding="utf-8-sig") as opened:
            rows = [_line(line, file, i) for i, line in enumerate(opened) if line.strip()] if _lines(file) else None
            rows = json.load(opened, object_pairs_hook=_object) if rows is None else rows
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}): write a list of rows, or a row a line as .jsonl.") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{file} holds {shown(rows)}: must be a list of at least one row, each with its conversations."
        )
    return rows


def _lines(file: Path) -> bool:
    return file.suffix == ".jsonl"


def _line(line: str, file: Path, index: int) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{file}, line {index + 1} is no JSON: {error}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Twice(found)


def checked_rows(rows: list[Any], file: Path | str, folder: Path, form: str) -> Iterator[Row | RowError]:
    """Every row as `Row`, or as the error that says what is wrong with it.

    Args:
        rows: What `read_rows` gave.
        file: Named in messages.
        folder: Where the pictures lie.
        form: "plain", an image and its caption, or "chat".
    """
    for index, row in enumerate(rows):
        try:
            yield _checked(row, f"{file}, row {index}", folder, form)
        except RowError as error:
            yield error


def _checked(row: Any, place: str, folder: Path, form: str) -> Row:
    if not isinstance(row, Mapping):
        raise RowError(f"{place}: {shown(row)} must be an object with conversations.")
    if isinstance(row, Twice):
        raise RowError(f"{place}: a key of {shown(dict(row))} is written twice; keep one of them.")
    turns = _turns(row.get("conversations"), place)
    images = _images(row, place, folder)
    places = sum(turn.text.count(IMAGE) for turn in turns)
    if places != len(images):
        raise RowError(f"{place}: {places} {IMAGE} in the text, but {len(images)} images; there must be one for each.")
    if any(IMAGE in turn.text for turn in turns if turn.role != "user"):
        raise RowError(f"{place}: {IMAGE} in a turn that is not human; images belong to questions.")
    if form == "plain" and ([turn.role for turn in turns] != ["user", "assistant"] or len(images) != 1):
        raise RowError(
            f"{place}: {len(turns)} turns and {len(images)} images; a caption row has one image, a human turn and a "
            "gpt turn. For conversations use form: chat."
        )
    return Row(place, images, turns)


def _turns(conversations: Any, place: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise RowError(
            f"{place}: conversations={shown(conversations)} must be a list of turns, at least two: "
            "{from: human, value: text} and {from: gpt, value: text}."
        )
    found = []
    for number, turn in enumerate(conversations):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str) or isinstance(turn, Twice):
            raise RowError(
                f"{place}: turn {number} is {shown(turn)}; must be {{from: human or gpt, value: text}}, each key once."
            )
        if HALF.search(text):
            raise RowError(
                f"{place}: turn {number} has half of a surrogate pair, {shown(text)}: write whole characters."
            )
        found.append(Turn(ROLES[role], text))
    spoken = found[1:] if found[0].role == "system" else found
    wanted = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or [turn.role for turn in spoken] != wanted:
        given = [turn["from"] for turn in conversations]
        raise RowError(f"{place}: turns are from {shown(given)}; must be human and gpt in turn, and end with gpt.")
    for number, turn in enumerate(spoken):
        if not turn.text.replace(IMAGE, "").strip() and not (turn.role == "user" and IMAGE in turn.text):
            raise RowError(f"{place}: turn {number} of {turn.role} is empty.")
    return tuple(found)


def _images(row: Mapping[str, Any], place: str, folder: Path) -> tuple[Path, ...]:
    given = [row[name] for name in ("image", "images") if row.get(name) is not None]
    if len(given) > 1:
        raise RowError(f"{place}: image and images are both given; write one of them.")
    names = given[0] if given else []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RowError(f"{place}: image={shown(names)} must be a path, or a list of paths.")
    paths = tuple(folder / name for name in names)
    for path in paths:
        try:
            found = path.is_file()
        except OSError:  # a name that no file can have
            found = False
        if not found:
            raise RowError(f"{place}: image {shown(str(path))}: no such file.")
    return paths
