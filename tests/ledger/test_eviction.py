"""Which content gives way."""

from hypothesis import given
from hypothesis import strategies as st

from tio_openneuro.content import ContentId
from tio_openneuro.ledger.eviction import Resident, choose_victims


def resident(name: str, size_bytes: int = 1, last_use: int = 0) -> Resident:
    """Return content of that name."""
    return Resident(ContentId("/clone", name), size_bytes, last_use)


def names(victims: list[Resident]) -> list[str]:
    """Return what the victims are called."""
    return [victim.content.key for victim in victims]


def steps(**known: int) -> dict[ContentId, int]:
    """Return next uses by name."""
    return {ContentId("/clone", name): use for name, use in known.items()}


def test_nothing_is_needed() -> None:
    """Nothing gives way where no bytes are lacking."""
    assert choose_victims([resident("a")], 0, {}) == []
    assert choose_victims([resident("a")], -5, {}) == []


def test_farthest_use_first() -> None:
    """Content gives way in the order of its next use, the farthest first."""
    held = [resident("soon"), resident("late"), resident("later")]
    victims = choose_victims(held, 2, steps(soon=1, late=5, later=9))
    assert names(victims) == ["later", "late"]


def test_unknown_use_is_farthest() -> None:
    """Content whose next use is unknown goes before any other, the longest unused first."""
    held = [resident("known"), resident("recent", last_use=7), resident("old", last_use=2)]
    assert names(choose_victims(held, 3, steps(known=10**9))) == ["old", "recent", "known"]


def test_what_a_large_victim_makes_needless_is_spared() -> None:
    """A small victim stays after all where a larger one, chosen later, frees enough alone."""
    held = [resident("small", 2), resident("large", 10)]
    assert names(choose_victims(held, 5, steps(small=9, large=8))) == ["large"]


def test_all_where_even_all_is_not_enough() -> None:
    """Everything is returned where even that frees too little."""
    assert len(choose_victims([resident("a", 2), resident("b", 3)], 6, {})) == 2


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5), st.integers(-1, 9)), max_size=12),
    st.integers(-3, 120),
)
def test_enough_and_no_victim_too_many(
    items: list[tuple[int, int, int]], needed_bytes: int
) -> None:
    """Victims free enough whenever that is possible, and none of them could be spared."""
    held = [resident(str(n), size, last) for n, (size, last, _) in enumerate(items)]
    uses = {r.content: use for r, (_, _, use) in zip(held, items, strict=True) if use >= 0}
    victims = choose_victims(held, needed_bytes, uses)
    freed_bytes = sum(victim.size_bytes for victim in victims)
    assert len({victim.content for victim in victims}) == len(victims)
    assert freed_bytes >= min(needed_bytes, sum(each.size_bytes for each in held))
    if freed_bytes >= needed_bytes:
        assert all(freed_bytes - victim.size_bytes < needed_bytes for victim in victims)
