"""Update groups: which coordinates are updated by one call, where a rule treats all elements alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from zotune.subspaces.coordinate import Coordinate, Joint

#: What is updated at once: a coordinate, or several as one.
UpdateGroup = Coordinate | Joint


def together(coordinates: Sequence[Coordinate]) -> Iterator[UpdateGroup]:
    """The same coordinates, those whose neighbors, or whose fleet, are all among them as one."""
    companies = [c.fleet or (c.neighbors if c.neighbors and c.neighbors.stored else None) for c in coordinates]
    here = Counter(id(company) for company in companies)
    seen: set[int] = set()
    for coordinate, company in zip(coordinates, companies, strict=True):
        if company is None or here[id(company)] < len(company.members):
            yield coordinate
        elif id(company) not in seen:
            seen.add(id(company))
            yield company
