"""One file that holds a unit's prepared arrays: chunked, compressed, read box by box.

Owns the format. Each array is a blosc2 frame, cut into chunks of 64 voxels along each axis and
blocks of 16, so that a box costs the blocks that it touches. A checksum stands for each chunk and
for everything else; what is damaged raises, and is never returned. Whoever opens a file sees to
it that it stays on disk meanwhile.

Rejected, for a 64**3 patch of 192**3 float32, and MiB (2026-11-21; `tests/benchmarks prepared`
measures them side by side; b2nd LZ4 in blocks of 16: 1.4 ms, 21.3): npy through a memory map,
0.7 ms, but 27.0, and 5 times the bytes of a skull-stripped head; zarr 3, 13.9 ms, 22.0; zstd,
5.6 ms, 18.0; bit shuffle, 2.4 ms, 20.9; blocks of 32, 1.5 ms, 21.3.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import numpy.typing as npt

from tio_openneuro.errors import ContentMismatchError

FORMAT = f"1 blosc2 {blosc2.__version__}"
"""What reads and writes alike; part of the name of what is prepared."""

_MAGIC = b"TIOPREP1"
_PREFIX = struct.Struct("<8sIIQ")
_CHUNK = 64
_BLOCK = 16
_DAMAGE = (ValueError, KeyError, TypeError, RuntimeError, struct.error)


class DamagedVolumeError(ContentMismatchError):
    """A prepared volume is not what was written; it must be dropped and made again."""


Array = npt.NDArray[Any]
Box = Sequence[tuple[int, int]]
SoundChunks = dict[str, set[int]]


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of the file after its header, and their checksum."""

    start: int
    stop: int
    checksum: int

    def check(self, body: memoryview) -> None:
        """Raise where the bytes are not those that were written."""
        if zlib.crc32(body[self.start : self.stop]) != self.checksum:
            raise DamagedVolumeError(DAMAGED)


def encode(arrays: Mapping[str, Array], note: bytes) -> bytes:
    """Return a file's bytes.

    Args:
        arrays: By name, each of shape ``(C, I, J, K)``.
        note: Kept beside them, as it is.
    """
    body = bytearray(note)
    header: dict[str, Any] = {"note": [0, len(note), zlib.crc32(note)], "arrays": {}}
    for name, array in arrays.items():
        frame, spans = _encode_array(array)
        shifted = [[start + len(body), stop + len(body), crc] for start, stop, crc in spans]
        header["arrays"][name] = {
            "shape": array.shape,
            "dtype": array.dtype.str,
            "frame": [len(body), len(body) + len(frame)],
            "rest": shifted[:2],
            "chunks": shifted[2:],
        }
        body += frame
    text = json.dumps(header).encode()
    size_bytes = _PREFIX.size + len(text) + len(body)
    return b"".join((_PREFIX.pack(_MAGIC, len(text), zlib.crc32(text), size_bytes), text, body))


def _encode_array(array: Array) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Return a frame, and the spans in it: what surrounds the chunks, then each chunk."""
    edges = [min(size, _CHUNK) for size in array.shape[1:]]
    packed = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=(1, *edges),
        blocks=(1, *(min(edge, _BLOCK) for edge in edges)),
        cparams=blosc2.CParams(
            codec=blosc2.Codec.LZ4, clevel=1, filters=[blosc2.Filter.SHUFFLE], nthreads=1
        ),
    )
    frame = packed.to_cframe()
    chunks: list[tuple[int, int]] = []
    last = 0
    for number in range(packed.schunk.nchunks):
        chunk = packed.schunk.get_chunk(number)
        start = frame.find(chunk, last)
        last = start + len(chunk) if start >= 0 else last
        # A chunk of one value alone is not stored: the frame's index says which value it is.
        chunks.append((start, start + len(chunk)) if start >= 0 else (0, 0))
    stored = [span for span in chunks if span[1]]
    first = min((start for start, _ in stored), default=len(frame))
    spans = [(0, first), (last or first, len(frame)), *chunks]
    return frame, [(start, stop, zlib.crc32(frame[start:stop])) for start, stop in spans]


class PreparedArray:
    """One array of an open file; not safe to share by threads."""

    def __init__(self, body: memoryview, facts: Mapping[str, Any], sound: set[int]) -> None:
        """Read nothing but the frame's index.

        Args:
            body: The file after its header.
            facts: What the header has of the array.
            sound: Numbers of the chunks that need no check; those that were found sound come in.

        Raises:
            DamagedVolumeError: The index is damaged.
        """
        self.shape: tuple[int, ...] = tuple(facts["shape"])
        self.dtype = np.dtype(facts["dtype"])
        self._body = body
        self._chunks = [_Span(*span) for span in facts["chunks"]]
        self._sound = sound
        for span in facts["rest"]:
            _Span(*span).check(body)
        start, stop = facts["frame"]
        self._array = blosc2.ndarray_from_cframe(body[start:stop], copy=False)
        # Without the interpreter's lock only the library's own threads could run beside us; they
        # gained nothing: 0.56 ms a patch with one, 0.64 with two (2026-11-21).
        self._array.schunk.dparams = blosc2.DParams(nthreads=1)
        self._edges = self._array.chunks

    def read(self, box: Box | None = None) -> Array:
        """Return a box of the array, or all of it.

        Args:
            box: Begin and end along each axis.

        Raises:
            DamagedVolumeError: A chunk that is needed is damaged.
        """
        box = tuple((0, size) for size in self.shape) if box is None else tuple(box)
        for number in self._touched(box):
            if number not in self._sound:
                self._chunks[number].check(self._body)
                self._sound.add(number)
        out = np.empty([stop - start for start, stop in box], self.dtype)
        if out.size:
            self._array.get_slice_numpy(out, tuple(zip(*box, strict=True)))
        return out

    def _touched(self, box: Box) -> Iterator[int]:
        """Yield the numbers of the chunks that a box touches."""
        numbers = [0]
        for (start, stop), size, edge in zip(box, self.shape, self._edges, strict=True):
            along = range(start // edge, -(-stop // edge))
            count = -(-size // edge)
            numbers = [number * count + step for number in numbers for step in along]
        return iter(numbers)


class PreparedFile:
    """An open file: its note, and its arrays by name."""

    def __init__(self, view: memoryview, sound: SoundChunks) -> None:
        """Read the header.

        Raises:
            DamagedVolumeError: It is damaged, or no file of this format.
        """
        try:
            magic, length, checksum, size_bytes = _PREFIX.unpack_from(view)
            text = bytes(view[_PREFIX.size : _PREFIX.size + length])
            if (magic, checksum, size_bytes) != (_MAGIC, zlib.crc32(text), len(view)):
                raise DamagedVolumeError(DAMAGED)
            self._header = json.loads(text)
        except _DAMAGE as error:
            raise DamagedVolumeError(DAMAGED) from error
        self._sound = sound
        self._body = view[_PREFIX.size + length :]

    @property
    def note(self) -> bytes:
        """What was kept beside the arrays."""
        span = _Span(*self._header["note"])
        span.check(self._body)
        return bytes(self._body[span.start : span.stop])

    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return the shape of each array, and its bytes for each voxel."""
        return {
            name: (tuple(facts["shape"]), np.dtype(facts["dtype"]).itemsize)
            for name, facts in self._header["arrays"].items()
        }

    def array(self, name: str) -> PreparedArray:
        """Return one array, unread."""
        sound = self._sound.setdefault(name, set())
        return PreparedArray(self._body, self._header["arrays"][name], sound)


@contextmanager
def opened(path: Path, sound: SoundChunks | None = None) -> Iterator[PreparedFile]:
    """Open a file while the block runs; what was read from it is a copy.

    Args:
        path: The file.
        sound: Chunks of each array that were found sound, in this file as it is; added to.

    Raises:
        DamagedVolumeError: It is damaged, or there is none.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DamagedVolumeError(DAMAGED) from error
    # Not closed here: an array that somebody kept would read from nowhere. The last one does.
    yield PreparedFile(memoryview(mapped), {} if sound is None else sound)


DAMAGED = (
    "Cannot use a prepared volume: its file is damaged, as its checksum tells. It is dropped, and "
    "prepared again."
)
