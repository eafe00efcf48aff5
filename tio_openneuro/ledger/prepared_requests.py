"""Who gets room for prepared volumes: decisions of the ledger that only ever try.

Owns no state. See :mod:`~tio_openneuro.ledger.requests`.
"""

from __future__ import annotations

from tio_openneuro.ledger.eviction import ContentId, choose_victims
from tio_openneuro.ledger.requests import Decision
from tio_openneuro.ledger.schema import PENDING, ContentState, Outcome, Want


class KeepingDecision(Decision):
    """One owner's decisions about prepared volumes within one write transaction."""

    def request_keep(
        self,
        want: Want,
        instead: frozenset[ContentId],
        *,
        steps: int | None,
        spare_bytes: int | None,
    ) -> Outcome:
        """Reserve room for a prepared volume, in room that nobody needs sooner.

        Args:
            want: The volume.
            instead: The files that it stands for, which are not needed once it is there.
            steps: How many steps ahead it is used: only later content, and ``instead``, gives
                way. None: nothing does.
            spare_bytes: Free bytes of the disk above its floor, or None where none is kept.

        Returns:
            Not granted and without victims where there is no such room now.
        """
        if self._db.execute("SELECT 1 FROM ticket LIMIT 1").fetchone():
            return Outcome(why="queue")
        if self.rows([want.content]):
            return Outcome(why="somebody else keeps it")
        short_bytes = want.size_bytes - self._room(spare_bytes)
        if short_bytes > 0:
            short_bytes -= int(self._db.execute(PENDING).fetchone()[0])
            resident, next_use = self._evictable({want.content}, idle=True)
            if steps is None:
                return Outcome(why="room")
            for content in instead:
                next_use.pop(content, None)
            later = [r for r in resident if next_use.get(r.content, steps + 1) > steps]
            victims = choose_victims(later, short_bytes, next_use)
            if sum(victim.size_bytes for victim in victims) < short_bytes:
                return Outcome(why="room")
            self._mark([victim.content for victim in victims], ContentState.DROPPING)
            return Outcome(victims=tuple(v.content for v in victims), why="drop")
        self._reserve([want], prefetch=False)
        return Outcome(granted=True, fetch=frozenset({want.content}))

    def try_lease(self, unit: str, content: ContentId) -> int:
        """Lease content that is present, and return the lease; zero where it is not."""
        row = self.rows([content]).get(content)
        if row is None or row.state is not ContentState.PRESENT:
            return 0
        return self._lease(unit, [Want(content, row.size_bytes, located=True)])
