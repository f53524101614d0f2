"""Prompt files: one prompt per line or row, with optional columns.

    .txt             one prompt per line; empty lines are skipped
    .csv .tsv        a header, and a column ``prompt`` (or ``caption`` or ``text``)
    .jsonl .ndjson   an object, or a plain string, per line
    .parquet         a column as in csv; read with pyarrow, or pandas where that is installed

Optional columns are ``negative_prompt``, ``image`` (a path, relative to the file) and ``weight`` (how often the prompt
is drawn relative to the others; 1 where a row has none).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TEXT_COLUMNS", "Prompt", "check_characters", "read_prompts"]

#: names of the column with the prompt, in the order in which they are looked for
TEXT_COLUMNS = ("prompt", "caption", "text")
_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt file.

    Attributes:
        text: the prompt, not empty.
        negative: negative prompt, None where the row has none.
        image: picture that belongs to the prompt, None where the row has none.
        weight: relative frequency, finite and >= 0.
    """

    text: str
    negative: str | None = None
    image: Path | None = None
    weight: float = 1.0


def read_prompts(path: str | Path, column: str | None = None) -> list[Prompt]:
    """All prompts of a file in their order.

    Args:
        path: a file in one of the formats above, UTF-8.
        column: name of the column with the prompt; None takes the first of ``prompt``, ``caption`` and ``text``.

    Raises:
        FileNotFoundError: there is no such file, or a picture that a row names is missing.
        RuntimeError: a parquet file, and neither pyarrow nor pandas is installed.
        ValueError: unknown format, no such column, a row without a prompt, half a character, a bad weight, or no
            prompt at all.
    """
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"the prompt file {path} does not exist; give a file of {', '.join(_SUFFIXES)}.")
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path}: prompts are read from {', '.join(_SUFFIXES)}; rename or convert the file.")
    if suffix == ".parquet":
        rows: Iterable[tuple[str, Row | str]] = _parquet_rows(path)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
        if suffix == ".txt":
            rows = ((f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        elif suffix in (".csv", ".tsv"):
            rows = _csv_rows(path, text, "\t" if suffix == ".tsv" else ",")
        else:
            rows = _json_rows(path, text)
    prompts = [_prompt(path, where, row, column) for where, row in rows]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one per line or row.")
    if sum(p.weight for p in prompts) == 0:
        raise ValueError(f"{path}: every weight is 0, so no prompt can be drawn; give one of them a positive weight.")
    return prompts


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: there are more fields than columns in the header; put prompts "
                    "that hold the delimiter into double quotes."
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is no valid csv ({error}); check its quotes.") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Row | str]]:
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {n} is no JSON ({error}); write one object per line.") from None
        if not isinstance(row, (dict, str)):
            raise ValueError(f"{path}, line {n} holds a {type(row).__name__}; write an object or a string per line.")
        yield f"line {n}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        parquet = None
    try:
        if parquet is not None:
            rows = parquet.read_table(path).to_pylist()
        else:
            import pandas

            rows = pandas.read_parquet(path).to_dict("records")
    except ImportError:
        raise RuntimeError(
            f"{path}: parquet files need pyarrow; install it with pip install 'lightning-distill[data]', or convert "
            "the file to jsonl."
        ) from None
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a readable parquet file ({reason}); write it again.") from None
    for n, row in enumerate(rows, 1):
        yield f"row {n}", row


def _prompt(path: Path, where: str, row: Row | str, column: str | None) -> Prompt:
    if isinstance(row, str):
        row = {column or "prompt": row.strip()}
    name = column or next((c for c in TEXT_COLUMNS if c in row), None)
    if name is None or name not in row:
        wanted = repr(column) if column else "prompt (nor caption nor text)"
        raise ValueError(
            f"{path}, {where}: there is no column {wanted}, only {', '.join(map(str, row)) or 'none'}; rename one of "
            "them, or say which one holds the prompts."
        )
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{path}, {where}: the prompt in column {name!r} is {text!r}; write a text or remove the row.")
    negative = _optional(row.get("negative_prompt"))
    for given in (text, negative or ""):
        check_characters(given, f"{path}, {where}")
    image = _optional(row.get("image"))
    file = None if image is None else (path.parent / image).expanduser()
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"{path}, {where}: the picture {file} does not exist; correct the column 'image'.")
    return Prompt(text.strip(), negative, file, _weight(path, where, row.get("weight")))


def check_characters(text: str, where: str) -> None:
    """Refuse half characters (lone surrogates, as JSON holds them where an emoji was cut), which no tokenizer takes.

    Args:
        text: prompt or caption.
        where: file and line, for the message.

    Raises:
        ValueError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 40) : error.end]
        raise ValueError(f"{where}: half of a character ends {near!r}; write all of it, or remove it.") from None


def _optional(value: Any) -> str | None:
    """None for what csv and parquet files have where nothing was written."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value)


def _weight(path: Path, where: str, value: Any) -> float:
    if _optional(value) is None:
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{path}, {where}: the weight is {value!r}; write a number of at least 0.")
    return weight
