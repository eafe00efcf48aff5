"""Content on disk within a budget: reserve, fetch, verify, lease, evict.

Owns the engine and its threads. Promises that what is held stays within the budget at every
instant, and that leased content stays. Knows nothing of images or of torch. The way of one key,
each module calling only those that come after it:

1. ``engine``: ``lease(unit)`` goes to this process's ``leases``, made anew after a fork.
2. ``leases``: asks the ledger, in one transaction, for room and lease of all files, or none.
3. ``look_ahead``: where room lacks, has the chosen content dropped, and asks again.
4. ``leases``: hands what was reserved to ``fetching``; what another process fetches is awaited.
5. ``fetching``: a thread takes it, leased content first, and has the store carry it out.
6. ``store``: the clone fetches and checks it; its size is looked at; the ledger is told.
7. ``leases``: yields the files; when the block ends the lease does, and the content stays.
8. ``look_ahead``: the use is struck from the known order, so another unit may come ahead.
9. ``store``: once room is needed, the clone drops it first, and the ledger forgets it second.
10. If the process dies anywhere, what was reserved stays charged until somebody clears it away.
"""

from tio_openneuro.disk.engine import Engine
from tio_openneuro.disk.look_ahead import EXPECTED
from tio_openneuro.disk.prepared_volumes import PreparedRepo
from tio_openneuro.disk.statistics import DiskStatistics

__all__ = ["EXPECTED", "DiskStatistics", "Engine", "PreparedRepo"]
