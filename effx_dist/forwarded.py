"""Attributes that are those of an object inside."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Forwarded(Generic[T]):
    """Reads, and sets, what lies at a dotted path below its owner: ``epoch = Forwarded[int]("inner.epoch")``."""

    def __init__(self, path: str) -> None:
        self._read = attrgetter(path)
        self._holder, _, self._name = path.rpartition(".")

    def __get__(self, owner: Any, _kind: type | None = None) -> T:
        found: Any = self if owner is None else self._read(owner)
        return cast(T, found)

    def __set__(self, owner: Any, value: T) -> None:
        setattr(attrgetter(self._holder)(owner), self._name, value)
