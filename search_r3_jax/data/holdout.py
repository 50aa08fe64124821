"""Shares of the queries, held out so that no text and no relevant document is on two sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from search_r3_jax.data.collection import Query
from search_r3_jax.errors import UserError
from search_r3_jax.files import digest_of

REST = "train"


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise UserError unless all shares are between 0 and 1 and leave something over."""
    for split, share in shares.items():
        if not 0 < share < 1:
            raise UserError(f"--split-{split}: {share:g}: give a share between 0 and 1, such as 0.1")
    if sum(shares.values()) >= 1:
        flags = ", ".join(f"--split-{split}" for split in shares)
        raise UserError(f"{flags}: {sum(shares.values()):g} in all leaves nothing to train on; give less")


def hold_out(
    queries: Sequence[Query], bodies: Mapping[str, str], shares: Mapping[str, float], seed: int
) -> dict[str, list[Query]]:
    """Split name → its queries in the given order: one split for each share, and `train`.

    Queries of one text, and queries with a relevant document in common, form a group that stays together;
    texts are compared without case and spaces. The groups are drawn by `seed` and by what they hold, not by
    their order. A split gets its share rounded, at least one query, unless the groups do not add up to it:
    then it gets less. Raises UserError where not even the smallest group fits, or nothing is left.

    Args:
        queries: all of them.
        bodies: document id → the text that is embedded.
        shares: split name → share of the queries, in the order of drawing.
        seed: of the draw.
    """
    waiting = sorted(_groups(queries, bodies), key=lambda group: _lot(seed, [queries[i] for i in group]))
    split_of: dict[int, str] = {}
    for split, share in shares.items():
        wanted = max(1, round(share * len(queries)))
        left, size = [], 0
        for group in waiting:
            if size + len(group) > wanted:
                left.append(group)
                continue
            size += len(group)
            split_of.update(dict.fromkeys(group, split))
        if not size or not left:
            raise UserError(
                f"--split-{split}: {share:g}: cannot be held out of {len(queries)} queries: those of one "
                "text or with a relevant document in common stay together, "
                f"at least {min(map(len, waiting))}; give another share, or more rows"
            )
        waiting = left
    result: dict[str, list[Query]] = {split: [] for split in (*shares, REST)}
    for number, query in enumerate(queries):
        result[split_of.get(number, REST)].append(query)
    return result


def comparable(text: str) -> str:
    """A text without differences of case and spaces: what two sides must not share."""
    return " ".join(text.casefold().split())


def _groups(queries: Sequence[Query], bodies: Mapping[str, str]) -> list[list[int]]:
    """Positions of the queries that have to stay together (union-find)."""
    above = list(range(len(queries)))

    def top(number: int) -> int:
        while above[number] != number:
            above[number] = above[above[number]]
            number = above[number]
        return number

    first_with: dict[tuple[str, str], int] = {}
    for number, query in enumerate(queries):
        texts = [("query", query.text), *(("document", bodies[doc_id]) for doc_id in query.positives)]
        for kind, text in texts:
            other = first_with.setdefault((kind, comparable(text)), number)
            above[top(number)] = top(other)
    groups: dict[int, list[int]] = {}
    for number in range(len(queries)):
        groups.setdefault(top(number), []).append(number)
    return list(groups.values())


def _lot(seed: int, group: Sequence[Query]) -> str:
    # No two groups have a text in common.
    return digest_of([str(seed), min(comparable(query.text) for query in group)])
