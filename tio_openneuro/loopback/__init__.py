"""A small OpenNeuro on 127.0.0.1, for tests, the demo and benchmarks.

Real git-annex on a real versioned S3 remote with ``publicurl``, git over smart HTTP, a link whose
rate, latency and faults can be set while it runs, and counters of what went over it. Never listens
on another address, and leaves no process behind.
"""

from tio_openneuro.loopback.faults import Fault, FaultKind
from tio_openneuro.loopback.link import PathCount
from tio_openneuro.loopback.local import LoopbackOpenNeuro
from tio_openneuro.loopback.volume import Volume

__all__ = ["Fault", "FaultKind", "LoopbackOpenNeuro", "PathCount", "Volume"]
