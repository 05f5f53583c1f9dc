"""Two nodes, as two network namespaces joined by a cable that is pulled in the middle of a save."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fault_checks as checks
from tests.fault_injection import Operation
from tests.fault_target import STOPPED, Ranks, Setup, running

pytestmark = pytest.mark.ranks
TIMEOUT_S = 3.0


class Cable:
    """Two network namespaces and the link between them."""

    def __init__(self, name: str) -> None:
        self.ends = [(f"{name}{rank}", f"{name}v{rank}") for rank in (0, 1)]
        self.addresses = ["10.213.77.1", "10.213.77.2"]

    def lay(self) -> None:
        """Make all of it. Raises CalledProcessError where that is not permitted."""
        for namespace, _ in self.ends:
            ip("netns", "add", namespace)
        (first, one), (second, other) = self.ends
        ip("link", "add", one, "netns", first, "type", "veth", "peer", other, "netns", second)
        for (namespace, device), address in zip(self.ends, self.addresses, strict=True):
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", device)
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "link", "set", device, "up")

    def plug(self, state: str) -> None:
        """Set rank 1's end "up" or "down"."""
        namespace, device = self.ends[1]
        ip("-n", namespace, "link", "set", device, state)

    def remove(self) -> None:
        for namespace, _ in self.ends:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    made = Cable(f"fx{os.getpid() % 100000}")
    try:
        made.lay()
    except FileNotFoundError:
        pytest.skip("needs iproute2 (ip)")
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"may not make network namespaces: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.remove()


def cut_in_mid_save(ranks: Ranks, cable: Cable, step: int) -> list[dict[int, str]]:
    """Both ranks save; the cable is pulled while rank 1 writes. What they say."""
    ranks.ask(step)
    assert ranks.hear(1) == STOPPED
    cable.plug("down")
    ranks.go_on(1)
    said = ranks.hear_all()
    assert all(isinstance(failures, dict) for failures in said), said
    return said


def test_the_cable_between_two_nodes_is_pulled(cable: Cable, tmp_path: Path) -> None:
    """Rank 0 misses rank 1, rank 1 misses rank 0's store; with the cable in, both save again."""
    folder = tmp_path / "run"
    setup = Setup(
        folder,
        tmp_path / "store",
        timeout_s=TIMEOUT_S,
        stop_at={1: Operation("create", "writing-*-step-2/rank-00001.effx.*.part", 0)},
        namespaces=tuple(cable.ends),
        address=cable.addresses[0],
    )
    with running(setup) as ranks:
        ranks.ask(1)
        assert ranks.hear_all() == [None, None]
        before = checks.contents(folder)
        said = cut_in_mid_save(ranks, cable, 2)
        assert [list(failures) for failures in said] == [[1], [0]]
        assert "did not answer within 3 s" in said[0][1]
        assert "its store" in said[1][0]
        assert checks.check_survival(folder, before) == 1
        cable.plug("up")
        ranks.ask(3)
        assert ranks.hear_all() == [None, None]
        assert ranks.close() == [0, 0]
    assert checks.check_survival(folder, before) == 3
    checks.check_next_start(folder)
