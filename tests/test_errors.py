"""The errors: caught as what callers already catch, and whole after a trip between processes."""

from __future__ import annotations

import pickle

import pytest

from effx_dist import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("LayoutMismatchError", ValueError),
        ("CorruptCheckpointError", RuntimeError),
        ("CheckpointNotFoundError", FileNotFoundError),
        ("RankFailedError", RuntimeError),
        ("MissingEngineError", ImportError),
    ],
)
def test_each_error_is_an_effx_error_and_the_builtin_one(name: str, builtin: type) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.EffxError)
    assert issubclass(error, builtin)
    assert error.__doc__


def test_rank_failed_error_names_every_rank_in_order_and_survives_pickling() -> None:
    failures = {11: "OSError: disk full", 2: "died"}
    error = errors.RankFailedError(failures)
    failures.clear()
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert list(copy.failures) == [2, 11]
        assert str(copy) == "ranks 2, 11 failed (rank 2: died; rank 11: OSError: disk full)"
