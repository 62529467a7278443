"""One measured figure, and how the sides' figures are compared: round by round, medians.

Must not know what was measured.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass
class Line:
    """One measured figure: the median over rounds, all rounds, and how it stands to the ceiling and to the peer."""

    what: str
    side: str
    unit: str
    rounds: list[float]
    of_ceiling: float | None = None
    """Median over rounds of the share of that round's ceiling."""
    ratio: float | None = None
    """Median over rounds of the ratio to the peer; above 1 is better, whatever the unit."""

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.rounds)


def compare(lines: list[Line]) -> None:
    """Set each figure's ratio to the peer's figure of the same name; above 1 is better, whatever the unit."""
    peers = {line.what: line for line in lines if not line.side.startswith("ours")}
    for line in lines:
        if line.what in peers:
            pair = (line.rounds, peers[line.what].rounds)
            line.ratio = median_ratio(*(reversed(pair) if line.unit in ("s", "ms", "GB") else pair))


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median of a / b, round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))
