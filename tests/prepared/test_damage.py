"""What becomes of a prepared volume that somebody damaged, moved or took away.

Each kind of damage is done to a real file; a process of its own watches what the root holds.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torchio as tio
from faulty import LoopbackOpenNeuro
from test_dataset import IMAGES, held_bytes
from truths import told

import tio_openneuro as tno
from tio_openneuro.demo.watch import DiskWatch
from tio_openneuro.prepared import file as prepared_file


def flip(place: float) -> Callable[[Path], None]:
    """Return what changes one byte, that far into a file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(len(data) * place)] ^= 0x55
        path.write_bytes(data)

    return damage


def renote(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Return what changes a note, and makes every checksum right again."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        magic, length, *_ = prepared_file._PREFIX.unpack_from(data)
        begin = prepared_file._PREFIX.size + length
        header = json.loads(data[prepared_file._PREFIX.size : begin])
        start, stop, _ = header["note"]
        old = data[begin + start : begin + stop].decode()
        new = change(old)[: len(old)].ljust(len(old)).encode()
        assert new != old.encode()
        header["note"][2] = zlib.crc32(new)
        text = json.dumps(header).encode()
        size_bytes = len(data) - length + len(text)
        head = prepared_file._PREFIX.pack(magic, len(text), zlib.crc32(text), size_bytes)
        path.write_bytes(head + text + new + data[begin + stop :])

    return damage


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "some").write_bytes(b"thing")


def link_to(target: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return damage


def replace_folder_by_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"a file")


def replace_by_other(path: Path) -> None:
    others = [each for each in path.parents[1].glob("*/*") if each != path]
    path.write_bytes(others[0].read_bytes())


KINDS: dict[str, Callable[[Path], object]] = {
    "header": flip(0.001),
    "first half": flip(0.4),
    "last byte": flip(0.9999),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "another subject's": replace_by_other,
    "class that is gone": renote(lambda note: note.replace("FetchedScalar", "FetchedScaler")),
    "subject's class that is gone": renote(
        lambda note: note.replace("FetchedSubject", "FetchedSubjekt")
    ),
    "value of no kind": renote(lambda note: note.replace('["Same"]', '["Some"]')),
    "another note": renote(lambda _: '["tuple", 1]'),
    "a folder": replace_by_folder,
    "a link that leads nowhere": link_to("nowhere"),
    "a link to a file": link_to("/etc/hostname"),
    "removed": Path.unlink,
    "its folder removed": lambda path: shutil.rmtree(path.parent),
    "a file for its folder": replace_folder_by_file,
    "all removed": lambda path: shutil.rmtree(path.parents[1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_mended(
    kind: str,
    openneuro: LoopbackOpenNeuro,
    root: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The right subject comes, whole and by boxes; the volume is made again once, and charged."""
    with tno.DataladSubjectsDataset(
        "ds900001", IMAGES, disk_budget=120_000, preprocess=tio.CropOrPad((20, 20, 16))
    ) as dataset:
        expected = [told(dataset[n], root) for n in range(2)]
        path = dataset._rows[0].content.prepared.repo.locate(dataset._rows[0].content.prepared.key)
        sound = path.read_bytes()
        with DiskWatch(root, interval_s=0.002) as watch, caplog.at_level(logging.INFO):
            for by_boxes in (False, True):
                KINDS[kind](path)
                if by_boxes:
                    try:
                        with dataset.opened(0) as lazy:
                            if lazy is not None:
                                lazy["t1"].load()
                                lazy["lesion"].load()
                    except prepared_file.DamagedVolumeError:
                        pass
                assert told(dataset[0], root) == expected[0]
                assert path.read_bytes() == sound
                hits = dataset.statistics().hit_files
                assert told(dataset[0], root) == expected[0]
                assert dataset.statistics().hit_files == hits + 1
        assert "Kept PREPARED" in caplog.text
        assert told(dataset[1], root) == expected[1]
        held = [sample.held_bytes for sample in watch.samples()]
        assert 20_000 < max(held) <= 120_000
        files = [each for each in (root / "prepared").glob("*/*") if each.is_file()]
        charged = dataset.statistics().used_bytes
        assert charged == held_bytes(root) + sum(each.stat().st_size for each in files)
        assert dataset.check() == []
