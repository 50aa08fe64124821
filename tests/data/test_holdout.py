"""Held-out shares: nothing on two sides, the sizes asked for, the same draw whatever the order."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3_jax.data.collection import Query
from search_r3_jax.data.holdout import comparable, hold_out
from search_r3_jax.errors import UserError

# The first are pairs that differ in case and spaces alone.
BODIES = {f"d{n}": ("text {}", " TEXT  {}")[n % 2].format(n // 2 if n < 8 else n) for n in range(60)}
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(["how so", "How so", " how  so", "why", *(f"what {n}" for n in range(12))]),
        st.lists(st.sampled_from(list(BODIES)), min_size=1, max_size=2, unique=True),
    ),
    min_size=1,
    max_size=40,
).map(
    lambda drawn: [
        Query(query_id=f"q{number}", text=text, positives=dict.fromkeys(documents, 1))
        for number, (text, documents) in enumerate(drawn)
    ]
)


def leak(one: Query, other: Query) -> bool:
    """Whether two queries must not be on two sides, by the definition."""
    bodies = [{comparable(BODIES[doc_id]) for doc_id in query.positives} for query in (one, other)]
    return comparable(one.text) == comparable(other.text) or not bodies[0].isdisjoint(bodies[1])


def group_sizes(queries: list[Query]) -> list[int]:
    """Sizes of the groups that stay together, by growing each until nothing joins it."""
    left, sizes = list(queries), []
    while left:
        group, grew = [left.pop()], True
        while grew:
            joined = [query for query in left if any(leak(query, member) for member in group)]
            left = [query for query in left if query not in joined]
            group, grew = [*group, *joined], bool(joined)
        sizes.append(len(group))
    return sorted(sizes)


@settings(max_examples=300, deadline=None)
@given(
    queries=QUERIES,
    test=st.sampled_from([0.05, 0.1, 0.3, 0.5]),
    dev=st.sampled_from([None, 0.1, 0.3]),
    seed=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
)
def test_splits_of_any_queries(
    queries: list[Query], test: float, dev: float | None, seed: int, order: random.Random
) -> None:
    shares = {"test": test} | ({} if dev is None else {"dev": dev})
    sizes = group_sizes(queries)
    try:
        splits = hold_out(queries, BODIES, shares, seed)
    except UserError:
        # Not even the smallest group fits, or one query is all there is.
        if dev is None:
            assert sizes[0] > max(1, round(test * len(queries))) or len(queries) == 1
        return
    assert sorted(splits) == sorted([*shares, "train"])
    assert all(splits.values())
    # Disjoint, complete, in the given order.
    assert (
        sorted(
            (query for split in splits.values() for query in split), key=lambda query: int(query.query_id[1:])
        )
        == queries
    )
    for split in splits.values():
        assert split == [query for query in queries if query in split]
    for one, other in itertools.combinations(splits.values(), 2):
        assert not any(leak(a, b) for a in one for b in other)
    # As many as asked for, but for less than a group.
    for split, share in shares.items():
        wanted = max(1, round(share * len(queries)))
        assert wanted - max(sizes) < len(splits[split]) <= wanted
        if max(sizes) == 1:
            assert len(splits[split]) == wanted
    # Deterministic, and not by the order of the rows.
    assert hold_out(queries, BODIES, shares, seed) == splits
    mixed = list(queries)
    order.shuffle(mixed)
    again = hold_out(mixed, BODIES, shares, seed)
    for split in splits:
        assert {query.query_id for query in again[split]} == {query.query_id for query in splits[split]}


def test_the_seed_draws() -> None:
    queries = [Query(query_id=f"q{n}", text=f"what {n}", positives={f"d{n + 10}": 1}) for n in range(40)]
    drawn = {
        frozenset(query.query_id for query in hold_out(queries, BODIES, {"test": 0.25}, seed)["test"])
        for seed in range(5)
    }
    assert {len(each) for each in drawn} == {10}
    assert len(drawn) == 5
    # A development split leaves the test split as it was.
    both = hold_out(queries, BODIES, {"test": 0.25, "dev": 0.1}, 0)
    assert both["test"] == hold_out(queries, BODIES, {"test": 0.25}, 0)["test"]
    assert len(both["dev"]) == 4


def test_what_hangs_together_cannot_be_held_out() -> None:
    queries = [Query(query_id=f"q{n}", text=f"what {n}", positives={"d9": 1}) for n in range(20)]
    with pytest.raises(UserError, match=r"--split-test: 0\.1: cannot be held out of 20 .* at least 20"):
        hold_out(queries, BODIES, {"test": 0.1}, 0)
