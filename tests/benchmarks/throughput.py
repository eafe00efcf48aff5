"""The engine against plain parallel HTTP fetching of the same URLs, side by side.

Both fetch 24 files of 7 MB over the loopback's link, 8 at once, write them to the same disk and
check their SHA-256. The plain fetcher is what speed is possible: keep-alive, no ledger, no annex.
"""

import hashlib
import http.client
import os
import queue
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from faulty import LoopbackOpenNeuro
from measure import interleaved, median
from rich.console import Console
from rich.table import Table

from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import ContentFile, ContentUnit
from tio_openneuro.disk.engine import Engine
from tio_openneuro.sources.install import install

RUNS = 5
FILES = 24
FILE_BYTES = 7_000_000
CONNECTION_BYTES_PER_S = 20e6
LATENCY_S = 0.1
JOBS = 8
WANTED = 0.95
_ACCESSION = "ds900024"
_CHUNK_BYTES = 1 << 18


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its table and return its figures."""
    with ExitStack() as stack:
        server = stack.enter_context(LoopbackOpenNeuro(folder / "openneuro"))
        paths = [f"sub-{n:02}/anat/sub-{n:02}_T1w.nii.gz" for n in range(1, FILES + 1)]
        server.publish(_ACCESSION, {path: os.urandom(FILE_BYTES) for path in paths})
        bench = _Bench(server, folder, paths)
        server.set_connection_rate(CONNECTION_BYTES_PER_S)
        server.set_latency(LATENCY_S)
        cases = {
            "HTTP": bench.plain,
            "Engine.fetch": bench.fetch,
            "lease + prefetch": bench.lease,
            "Engine.fetch, children running": bench.fetch_again,
        }
        seconds = interleaved(cases, runs, console.print)
    plain_s = median(seconds["HTTP"])
    table = Table(title=f"{FILES} files of 7 MB, {JOBS} at once, median of {runs}")
    for name in ("", "s", "min", "max", "MB/s", "HTTP time / its time"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in seconds.items():
        took_s = median(values)
        rate = FILES * FILE_BYTES / took_s / 1e6
        shown = [took_s, min(values), max(values)]
        figures = [f"{value:.2f}" for value in shown]
        table.add_row(name, *figures, f"{rate:.0f}", f"{plain_s / took_s:.2f}")
    console.print(table)
    return {
        "runs": runs,
        "seconds": seconds,
        "ratio": {name: plain_s / median(values) for name, values in seconds.items()},
        "wanted_ratio": WANTED,
    }


class _Bench:
    """One dataset, its addresses, and ways to fetch it."""

    def __init__(self, server: LoopbackOpenNeuro, folder: Path, paths: list[str]) -> None:
        self._root = folder / "root"
        self._plain = folder / "plain"
        dataset = install(_ACCESSION, self._root)
        repo = AnnexRepo(dataset.path, remotes=dataset.remotes)
        self._files = {
            file.path: ContentFile(repo, file.key, file.path)
            for file in index_tree(dataset.path, dataset.commit)
            if file.key is not None
        }
        self._units = [ContentUnit(path, (self._files[path],)) for path in paths]
        self._urls = {path: server.object_url(_ACCESSION, path) for path in paths}

    def _engine(self) -> Engine:
        return Engine(self._root, disk_budget="1 GB", jobs=JOBS)

    def plain(self) -> float:
        """Fetch over kept connections, one for each thread; return seconds."""
        self._plain.mkdir()
        left: queue.SimpleQueue[str] = queue.SimpleQueue()
        for path in self._urls:
            left.put(path)
        good: list[str] = []
        began_s = time.perf_counter()
        threads = [threading.Thread(target=self._download, args=(left, good)) for _ in range(JOBS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s = time.perf_counter() - began_s
        assert sorted(good) == sorted(self._urls)
        shutil.rmtree(self._plain)
        return took_s

    def _download(self, left: "queue.SimpleQueue[str]", good: list[str]) -> None:
        address = urlsplit(next(iter(self._urls.values())))
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        while True:
            try:
                path = left.get_nowait()
            except queue.Empty:
                break
            connection.request("GET", urlsplit(self._urls[path]).path)
            response = connection.getresponse()
            digest = hashlib.sha256()
            with (self._plain / path.replace("/", "_")).open("wb") as file:
                while chunk := response.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() in self._files[path].key.name:
                good.append(path)
        connection.close()

    def fetch(self) -> float:
        """Fetch all with an engine that begins without a child; return seconds."""
        with self._engine() as engine:
            return self._timed_fetch(engine)

    def fetch_again(self) -> float:
        """Fetch all with an engine that fetched and evicted all before; return seconds."""
        with self._engine() as engine:
            self._timed_fetch(engine)
            return self._timed_fetch(engine)

    def _timed_fetch(self, engine: Engine) -> float:
        began_s = time.perf_counter()
        assert engine.fetch(self._units) == FILES * FILE_BYTES
        took_s = time.perf_counter() - began_s
        assert engine.evict(self._units) == FILES * FILE_BYTES
        return took_s

    def lease(self) -> float:
        """Lease one after the other along a known order; return seconds."""
        with self._engine() as engine:
            began_s = time.perf_counter()
            engine.prefetch(self._units)
            for unit in self._units:
                with engine.lease(unit) as paths:
                    assert len(paths) == 1
            took_s = time.perf_counter() - began_s
            assert engine.evict(self._units) == FILES * FILE_BYTES
            return took_s
