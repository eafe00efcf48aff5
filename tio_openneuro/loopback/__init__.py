"""A small OpenNeuro on 127.0.0.1, for the demo, and under the tests' faults and benchmarks.

Real git-annex on a real versioned S3 remote with ``publicurl``, git over smart HTTP, a link with
a rate and a latency. Never listens on another address, and leaves no process behind. What spoils
its answers and counts them by path stands in the tests.
"""

from tio_openneuro.loopback.local import LoopbackOpenNeuro
from tio_openneuro.loopback.volume import Volume

__all__ = ["LoopbackOpenNeuro", "Volume"]
