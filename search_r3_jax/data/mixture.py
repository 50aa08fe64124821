"""Order of the training pairs over several data sets: a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import grain.python as grain

from search_r3_jax.data.collection import Collection
from search_r3_jax.errors import UserError

# More groups of pairs than any run takes, and few enough for their sum over all sets.
ENDLESS = 1 << 48


class Pair(NamedTuple):
    """One training pair: number of the data set, row of the query, row of its positive document.

    `place` is the position in the sequence of pairs.
    """

    set: int
    query: int
    document: int
    place: int


def shuffled(size: int, seed: int, start: int, count: int) -> list[int]:
    """Items `start` to `start + count` of an endless sequence of seeded shuffles of 0..size−1."""
    order = grain.MapDataset.range(size).shuffle(seed=seed).repeat()
    items = [order[start + i] for i in range(count)]
    return [item for item in items if item is not None]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """An endless, globally shuffled sequence of pairs from several collections.

    `weights` are shares of the pairs, by default those of the sets' sizes. `together` consecutive pairs are
    always of the same collection. Raises UserError when a set has no pairs, or when the weights do not fit
    the sets.
    """

    collections: tuple[Collection, ...]
    weights: tuple[float, ...] = ()
    together: int = 1
    seed: int

    def __post_init__(self) -> None:
        if self.weights and (len(self.weights) != len(self.collections) or min(self.weights) <= 0):
            raise UserError(
                f"data.weights: {self.weights}: give one positive weight for each of the "
                f"{len(self.collections)} data sets"
            )
        for collection, pairs in zip(self.collections, self._pairs, strict=True):
            if not pairs:
                raise UserError(
                    f"data: {collection.name}, split {collection.split!r}: no query has a relevant document "
                    "to train on"
                )

    @cached_property
    def _pairs(self) -> list[list[tuple[int, int]]]:
        return [
            [
                (row, collection.row_of[doc_id])
                for row, query in enumerate(collection.queries)
                for doc_id in sorted(query.positives)
            ]
            for collection in self.collections
        ]

    @cached_property
    def _items(self) -> list[grain.MapDataset[int]]:
        """Each set's pairs, reshuffled every epoch."""
        sizes = map(len, self._pairs)
        return [
            grain.MapDataset.range(size).shuffle(seed=self.seed + number).repeat()
            for number, size in enumerate(sizes)
        ]

    @cached_property
    def _order(self) -> grain.MapDataset[tuple[int, int]]:
        """For each group of `together` pairs: the number of its set and its number within the set."""

        def numbered(number: int) -> grain.MapDataset[tuple[int, int]]:
            return grain.MapDataset.range(ENDLESS).map(lambda group: (number, group))

        groups = [numbered(number) for number in range(len(self._pairs))]
        if len(groups) == 1:
            return groups[0]
        return grain.MapDataset.mix(
            groups, weights=list(self.weights) or [len(pairs) for pairs in self._pairs]
        )

    def size(self) -> int:
        """Number of pairs in all sets."""
        return sum(map(len, self._pairs))

    def pairs(self, items: Sequence[int]) -> list[Pair]:
        """The pairs at these positions of the sequence."""
        pairs = []
        for item in items:
            group, place = divmod(item, self.together)
            set_and_group = self._order[group]
            at = (
                None
                if set_and_group is None
                else self._items[set_and_group[0]][set_and_group[1] * self.together + place]
            )
            if set_and_group is None or at is None:
                raise ValueError(f"item {item} of an endless sequence is missing")
            number = set_and_group[0]
            query, document = self._pairs[number][at]
            pairs.append(Pair(number, query, document, item))
        return pairs
