"""What a file costs over HTTP and through git-annex: processor time, its children's included.

Each case is a process of its own, which fetches files of one size through ``AnnexRepo`` with so
many in flight, from the loopback OpenNeuro behind TLS under a local authority (or plain). It says
what its first file took beyond imports, and what each later one took. The same files are fetched
by a plain fetcher too, which keeps its connections, writes and checks, for the time that it takes.
Last, an epoch of a loader and one of a queue, at a disk budget of half the dataset, both ways.
"""

import hashlib
import http.client
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

from faulty import LoopbackOpenNeuro
from heads import write_heads
from measure import interleaved, median
from rich.console import Console
from rich.table import Table
from web import Authority, set_public_url, tls_front

from tio_openneuro.annex.branch import PublicUrls
from tio_openneuro.annex.repo import AnnexRepo
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.sources.install import install

RUNS = 5
SIZES = {"0.3 MB": 300_000, "7 MB": 7_000_000, "70 MB": 70_000_000}
FILES = {"0.3 MB": 33, "7 MB": 17, "70 MB": 17}
IN_FLIGHT = (1, 4, 8)
CONNECTION_BYTES_PER_S = 20e6
LATENCY_S = 0.1
JOBS = 8
EPOCH_SHAPES = [(128, 128, 128)] * 16
EPOCH_ACCESSION = "ds900184"
WANTED_MS = {"7 MB": 20.0, "first": 60.0}
WANTED_RATIO = 0.97


def measure(runs: int, folder: Path, console: Console) -> dict[str, object]:
    """Run it, print its tables and return its figures."""
    figures: dict[str, object] = {"runs": runs, "wanted_ms": WANTED_MS}
    with ExitStack() as stack:
        server = stack.enter_context(LoopbackOpenNeuro(folder / "openneuro"))
        authority = Authority.make(folder / "authority")
        front = stack.enter_context(tls_front(authority, server.port))
        os.environ["GIT_SSL_CAINFO"] = str(authority.certificate)
        clones: dict[str, Path] = {}
        for number, (size, size_bytes) in enumerate(SIZES.items(), start=1):
            accession = f"ds90018{number}"
            files = {f"sub-{n:02}.nii.gz": os.urandom(size_bytes) for n in range(FILES[size])}
            server.publish(accession, files)
            clones[size] = install(accession, folder / "root").path
        for scheme, url in (
            ("TLS", f"https://127.0.0.1:{front}/openneuro.org"),
            ("plain", f"http://127.0.0.1:{server.port}/openneuro.org"),
        ):
            for clone in clones.values():
                set_public_url(clone, url)
            figures[scheme] = _cost(scheme, clones, runs, console)
        figures["epochs"] = _epochs(server, folder, runs, console)
        server.set_connection_rate(CONNECTION_BYTES_PER_S)
        server.set_latency(LATENCY_S)
        figures["throughput"] = _throughput(clones["7 MB"], runs, console)
    return figures


def _cost(
    scheme: str, clones: dict[str, Path], runs: int, console: Console
) -> dict[str, dict[str, float]]:
    """Return the processor milliseconds of a first and of a later file, medians of the runs."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(runs):
        for size, clone in clones.items():
            for in_flight in IN_FLIGHT:
                for way in ("http", "git-annex")[:: 1 if number % 2 else -1]:
                    said = _child(way, clone, str(in_flight))
                    case = found.setdefault(f"{size}, {in_flight} in flight, {way}", {})
                    for name, value in said.items():
                        case.setdefault(name, []).append(value)
        console.print(f"{scheme}: run {number + 1} of {runs}")
    medians = {case: {n: median(v) for n, v in each.items()} for case, each in found.items()}
    table = Table(title=f"Over {scheme}: processor ms a file, children included, medians of {runs}")
    for name in ("", "first file", "each later one", "children"):
        table.add_column(name, justify="right" if name else "left")
    for case, each in medians.items():
        shown = (f"{each[name]:.1f}" for name in ("first", "later", "children"))
        table.add_row(case, *shown)
    console.print(table)
    return medians


def _epochs(
    server: LoopbackOpenNeuro, folder: Path, runs: int, console: Console
) -> dict[str, dict[str, float]]:
    """Return what an epoch at half the budget takes, medians of the runs."""
    heads = write_heads(folder / "heads", EPOCH_SHAPES)
    paths = [path for path in heads.rglob("*") if path.is_file()]
    files = {str(path.relative_to(heads)): path.read_bytes() for path in paths}
    server.publish(EPOCH_ACCESSION, files)
    install(EPOCH_ACCESSION, folder / "root")
    budget_bytes = sum(map(len, files.values())) // 2
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(runs):
        for kind in ("loader", "queue"):
            for way in ("http", "git-annex")[:: 1 if number % 2 else -1]:
                said = _child(way, folder / "root", f"{kind} {budget_bytes}")
                case = found.setdefault(f"{kind}, {way}", {})
                for name, value in said.items():
                    case.setdefault(name, []).append(value)
    medians = {case: {n: median(v) for n, v in each.items()} for case, each in found.items()}
    names = ("processor s", "children", "their PSS in MiB")
    table = Table(title=f"An epoch of {len(EPOCH_SHAPES)} heads of 128³, medians of {runs}")
    for name in ("", *names):
        table.add_column(name, justify="right" if name else "left")
    for case, each in medians.items():
        table.add_row(case, *(f"{each[name]:.1f}" for name in names))
    console.print(table)
    return medians


def train(root: Path, kind: str, budget_bytes: int) -> dict[str, float]:
    """Run an epoch, evict all, and return what it took and the most children at once."""
    import psutil
    import torchio as tio
    from heads import open_heads

    import tio_openneuro as tno

    most = {"children": 0.0, "their PSS in MiB": 0.0}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.2):
            pss = []
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    pss.append(child.memory_full_info().pss / 2**20)
            most["children"] = max(most["children"], len(pss))
            most["their PSS in MiB"] = max(most["their PSS in MiB"], sum(pss))

    sampler = threading.Thread(target=sample)
    with open_heads(EPOCH_ACCESSION, root, budget_bytes) as dataset:
        began_s = _processor_s()
        sampler.start()
        if kind == "queue":
            with tno.BudgetedQueue(dataset, None, 4, tio.UniformSampler(64)) as queue:
                given = sum(1 for _ in tio.SubjectsLoader(queue, batch_size=4))
        else:
            given = sum(1 for _ in tio.SubjectsLoader(dataset, batch_size=1))
        assert given == len(EPOCH_SHAPES)
        ended.set()
        sampler.join()
        used_s = _processor_s() + _living_s() - began_s
        dataset.evict()
    return {"processor s": used_s, **most}


def _child(way: str, folder: Path, what: str) -> dict[str, float]:
    said = subprocess.run(
        [sys.executable, __file__, str(folder), *what.split()],
        env={**os.environ, "TIO_OPENNEURO_FETCH": way, "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    figures: dict[str, float] = json.loads(said.stdout)
    return figures


def _processor_s() -> float:
    """Return the processor seconds of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def fetch_all(clone: Path, in_flight: int) -> dict[str, float]:
    """Fetch all files of a clone in this process, and drop them; return what one cost in ms."""
    # What every training has imported before it fetches, and what the first fetch imports.
    import torchio  # noqa: F401

    import tio_openneuro.annex.download  # noqa: F401

    repo = AnnexRepo(clone)
    files = index_tree(clone, "refs/tags/1.0.0")
    first, *others = [file.key for file in files if file.key is not None]
    began_s = _processor_s()
    repo.get(first)
    children = len(repo._by_process[os.getpid()]._transfers)
    repo.close()
    first_s = _processor_s() - began_s
    with ThreadPoolExecutor(in_flight) as pool:
        # Each line of the pool is warm before it is measured: a child, or a connection.
        warm = [pool.submit(repo.get, key) for key in others[:in_flight]]
        for each in warm:
            each.result()
        spent_s = _processor_s() + _living_s()
        for _ in pool.map(repo.get, others[in_flight:]):
            pass
        later_s = _processor_s() + _living_s() - spent_s
    children = max(children, len(repo._by_process[os.getpid()]._transfers))
    for key in (first, *others):
        repo.drop(key)
    repo.close()
    return {
        "first": first_s * 1000,
        "later": later_s * 1000 / len(others[in_flight:]),
        "children": children,
    }


def _living_s() -> float:
    """Return the processor seconds of git-annex children that have not ended, and of theirs."""
    import psutil

    total_s = 0.0
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


def _throughput(clone: Path, runs: int, console: Console) -> dict[str, object]:
    """Fetch the files of 7 MB from new processes' first one on, beside a plain fetcher."""
    public = PublicUrls(clone, {})
    files = index_tree(clone, "refs/tags/1.0.0")
    keys = [file.key for file in files if file.key is not None]
    urls = [public.of(key, "s3-PUBLIC")[0] for key in keys]

    def plain() -> float:
        folder = clone.parent / "plain"
        folder.mkdir()
        began_s = time.perf_counter()
        with ThreadPoolExecutor(JOBS) as pool:
            lines = [pool.submit(_download, urls[n::JOBS], folder) for n in range(JOBS)]
            digests = {digest for line in lines for digest in line.result()}
        took_s = time.perf_counter() - began_s
        assert digests == {key.checksum[1] for key in keys if key.checksum}
        shutil.rmtree(folder)
        return took_s

    def ours(way: str) -> float:
        os.environ["TIO_OPENNEURO_FETCH"] = way
        repo = AnnexRepo(clone)
        began_s = time.perf_counter()
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(repo.get, keys))
        took_s = time.perf_counter() - began_s
        for key in keys:
            repo.drop(key)
        repo.close()
        return took_s

    cases = {
        "plain": plain,
        "http": lambda: ours("http"),
        "git-annex": lambda: ours("git-annex"),
    }
    seconds = interleaved(cases, runs, console.print)
    ratio = {name: median(seconds["plain"]) / median(values) for name, values in seconds.items()}
    table = Table(title=f"{len(keys)} files of 7 MB, {JOBS} at once, from a repository's first on")
    for name in ("", "s", "plain's time / its time"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in seconds.items():
        table.add_row(name, f"{median(values):.2f}", f"{ratio[name]:.2f}")
    console.print(table)
    return {"seconds": seconds, "ratio": ratio, "wanted_ratio": WANTED_RATIO}


def _download(urls: list[str], folder: Path) -> list[str]:
    """Fetch over one kept connection, write and check; return the digests."""
    digests = []
    address = urlsplit(urls[0])
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    for url in urls:
        parts = urlsplit(url)
        connection.request("GET", f"{parts.path}?{parts.query}")
        response = connection.getresponse()
        digest = hashlib.sha256()
        with (folder / hashlib.md5(url.encode(), usedforsecurity=False).hexdigest()).open(
            "wb"
        ) as file:
            while block := response.read(1 << 18):
                file.write(block)
                digest.update(block)
        digests.append(digest.hexdigest())
    connection.close()
    return digests


if __name__ == "__main__":
    folder, *what = sys.argv[1:]
    if len(what) > 1:
        said = train(Path(folder), what[0], int(what[1]))
    else:
        said = fetch_all(Path(folder), int(what[0]))
    json.dump(said, sys.stdout)
