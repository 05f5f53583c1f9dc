"""Numbers as people read them. Each function takes None as well, for "was not measured"."""

from __future__ import annotations

import math
from collections.abc import Sequence

ABSENT = "–"  # noqa: RUF001  (an en dash is what a table shows for "nothing here")


def count_text(value: float | None) -> str:
    """Whole numbers with thousands separated: 12,345."""
    return ABSENT if value is None else f"{value:,.0f}" if math.isfinite(value) else str(value)


def number_text(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits: 3.142, 1.2e-05."""
    return ABSENT if value is None else f"{value:.{digits}g}"


def bytes_text(value: float | None) -> str:
    """Decimal units, as disks are sold: 999 B, 1.23 kB, 45.6 MB."""
    if value is None or not math.isfinite(value):
        return ABSENT
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:#.3g} {units[0]}".replace(". ", " ")


def ratio_text(value: float | None) -> str:
    """A compression ratio: 71.3x."""
    return ABSENT if value is None else f"{value:.3g}x" if abs(value) < 1000 else f"{value:,.0f}x"


def percent_text(fraction: float | None) -> str:
    """A fraction of 1 as a percentage: 28.3 %."""
    return ABSENT if fraction is None else f"{100 * fraction:.3g} %"


def seconds_text(value: float | None) -> str:
    """A duration in the unit that suits it: 85 ms, 4.2 s, 12 min 3 s, 5 h 2 min."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    if abs(value) < 60:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def plural(count: int, noun: str) -> str:
    """`3 saves`, `1 save`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shape_text(sizes: Sequence[int]) -> str:
    """`64 x 48`; a scalar's is `()`."""
    return " x ".join(map(str, sizes)) or "()"
