"""Checked JSON fields: what a hostile or damaged manifest may say, and what it may not.

Every refusal is a ValueError that names the field, a wrong type included: one type for callers.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from effx_dist.core.excp.arrays import F32

MAX_TABLE = 256
_MAX_NAME = 32


def float_field(fields: Mapping[str, Any], key: str) -> float:
    """A finite number >= 0."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}: {_short(value)}, must be a number")  # noqa: TRY004
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{key}: {number!r}, must be finite and >= 0")
    return number


def float32_field(fields: Mapping[str, Any], key: str) -> np.float32:
    """A number >= 0 that is finite as a float32."""
    number = float_field(fields, key)
    with np.errstate(over="ignore"):
        value = np.float32(number)
    if not np.isfinite(value):
        raise ValueError(f"{key}: {number!r}, must fit a float32")
    return value


def float32_json(value: np.float32) -> float:
    """The shortest number that float32_field reads back to the same float32."""
    short = float(str(value))
    return short if np.float32(short) == value else float(value)


def int_field(fields: Mapping[str, Any], key: str, low: int, high: int) -> int:
    """An integer in [low, high]."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key}: {_short(value)}, must be an integer in [{low}, {high}]")
    return value


def name_field(fields: Mapping[str, Any], key: str) -> str:
    """A short string."""
    value = fields.get(key)
    if not isinstance(value, str) or len(value) > _MAX_NAME:
        raise ValueError(f"{key}: {_short(value)}, must be a string of at most {_MAX_NAME}")
    return value


def object_field(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A JSON object."""
    value = fields.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key}: {_short(value)}, must be an object")  # noqa: TRY004
    return value


def table_json(table: F32) -> str:
    """A float32 table as base64 of its little-endian bytes."""
    return base64.b64encode(table.astype("<f4").tobytes()).decode("ascii")


def table_field(fields: Mapping[str, Any], key: str, max_length: int = MAX_TABLE) -> F32:
    """Undoes table_json: at most max_length finite values."""
    text = fields.get(key)
    if not isinstance(text, str) or len(text) > 4 * ((4 * max_length + 2) // 3):
        raise ValueError(f"{key}: must be base64 of at most {max_length} float32 values")
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise ValueError(f"{key}: not base64 ({error})") from error
    if len(raw) % 4 or len(raw) > 4 * max_length:
        raise ValueError(f"{key}: {len(raw)} bytes, must be at most {max_length} float32 values")
    table = np.frombuffer(raw, dtype="<f4").astype(np.float32)
    if not np.isfinite(table).all():
        raise ValueError(f"{key}: holds a value that is not finite")
    return table


def ascending(table: F32, key: str) -> F32:
    """The table, checked to be strictly ascending."""
    if np.any(table[1:] <= table[:-1]):
        raise ValueError(f"{key}: must be strictly ascending")
    return table


def _short(value: object) -> str:
    if isinstance(value, str):
        return repr(value[:_MAX_NAME])
    if isinstance(value, int) and value.bit_length() > 64:  # repr of a huge int raises
        return "a huge integer"
    return repr(value) if isinstance(value, int | float) else type(value).__name__
