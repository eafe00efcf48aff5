"""One peer, in an interpreter that has it: ``python peer.py NAME SOURCE WORK OPTIONS``.

Knows nothing of this project but the folder of heads. Each peer gets what its own documentation
recommends: nnU-Net its block sizes and its background processes, MosaicML Streaming and litData
one shard a subject, the smallest that they can hold, and the cache limit as a limit.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch.utils.data import DataLoader


def say(record: dict) -> None:
    """Print one record as a line of JSON."""
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def subjects(source: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield name, image (int16) and label (uint8) of each subject, ``(I, J, K)``."""
    for path in sorted(source.glob("sub-*/anat/*_FLAIR.nii*")):
        label = path.with_name(path.name.replace("FLAIR", "FLAIR_roi"))
        arrays = (np.asarray(nibabel.load(file).dataobj) for file in (path, label))
        yield path.name.split("_")[0], *map(np.ascontiguousarray, arrays)


def standardised(image: np.ndarray) -> np.ndarray:
    """Return float32 of mean 0 and deviation 1."""
    values = image.astype(np.float32)
    return (values - values.mean()) / values.std()


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def nnunet(source: Path, work: Path, options: dict) -> dict:
    """Preprocess all into blosc2 files, and draw batches of crops."""
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import (
        NonDetMultiThreadedAugmenter,
    )
    from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
    from batchgenerators.utilities.file_and_folder_operations import write_pickle
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import (
        comp_blosc2_params,
        nnUNetDatasetBlosc2,
    )
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    patch = (options["patch"],) * 3
    began_s = time.perf_counter()
    if not work.exists():
        work.mkdir(parents=True)
        for name, image, label in subjects(source):
            data, seg = standardised(image)[None], label.astype(np.int8)[None]
            blocks, chunks = comp_blosc2_params(data.shape, patch, 4)
            seg_blocks, seg_chunks = comp_blosc2_params(seg.shape, patch, 1)
            places = np.argwhere(seg == 1)
            nnUNetDatasetBlosc2.save_case(
                data, seg, {"class_locations": {1: places}}, str(work / name),
                chunks=chunks, blocks=blocks, chunks_seg=seg_chunks, blocks_seg=seg_blocks,
            )  # fmt: skip
            write_pickle({"class_locations": {1: places}}, str(work / f"{name}.pkl"))
    converted_s = time.perf_counter() - began_s
    labels = LabelManager({"background": 0, "lesion": 1}, None)
    dataset = nnUNetDatasetBlosc2(str(work))
    loader = nnUNetDataLoader(dataset, options["batch"], patch, patch, labels)
    if options["workers"]:
        source_of = NonDetMultiThreadedAugmenter(loader, None, options["workers"], 6)
    else:
        source_of = SingleThreadedAugmenter(loader, None)
    for _ in range(options["warm_up"]):
        next(source_of)
    began_s = time.perf_counter()
    patches = 0
    for _ in range(options["batches"]):
        patches += len(next(source_of)["data"])
    took_s = time.perf_counter() - began_s
    if options["workers"]:
        source_of._finish()
    return {
        "patches_per_s": patches / took_s,
        "converted_s": converted_s,
        "charged_bytes": folder_bytes(work),
    }


def crops(image: np.ndarray, label: np.ndarray, options: dict) -> torch.Tensor:
    """Return crops of image and label, ``(N, 2, I, J, K)``."""
    image = standardised(image)
    size = options["patch"]
    found = []
    for _ in range(options["samples"]):
        at = [int(torch.randint(side - size + 1, ())) for side in image.shape]
        box = tuple(slice(start, start + size) for start in at)
        found.append(np.stack([image[box], label[box].astype(np.float32)]))
    return torch.from_numpy(np.stack(found))


def _epochs(loader: DataLoader, options: dict) -> dict:
    """Take some epochs; say how far it came, so that a hang can be told from an end."""
    for epoch in range(options["epochs"]):
        began_s = time.perf_counter()
        delivered = 0
        for batch in loader:
            delivered += len(batch)
            took_s = time.perf_counter() - began_s
            say({"epoch": epoch, "delivered": delivered, "took_s": took_s})
    return {}


def _allow_torchvision() -> torch.library.Library:
    """Let Streaming import PyPI's torchvision, built for CUDA, beside a torch without; unused."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library


def mosaic_convert(source: Path, work: Path, _: dict) -> dict:
    """Write one MDS shard a subject."""
    _kept = _allow_torchvision()
    from streaming import MDSWriter

    columns = {"name": "str", "image": "ndarray", "label": "ndarray"}
    began_s = time.perf_counter()
    with MDSWriter(out=str(work), columns=columns, size_limit=1) as writer:
        for name, image, label in subjects(source):
            writer.write({"name": name, "image": image, "label": label})
    return {"converted_s": time.perf_counter() - began_s, "charged_bytes": folder_bytes(work)}


def mosaic(source: Path, work: Path, options: dict) -> dict:
    """Stream the shards under a cache limit."""
    _kept = _allow_torchvision()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Crops(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return crops(sample["image"], sample["label"], options)

    clean_stale_shared_memory()
    dataset = Crops(
        remote=str(source), local=str(work), shuffle=True, batch_size=1,
        cache_limit=options["limit"], predownload=2,
    )  # fmt: skip
    loader = DataLoader(dataset, batch_size=1, num_workers=options["workers"])
    return _epochs(loader, options)


def litdata_convert(source: Path, work: Path, _: dict) -> dict:
    """Write one chunk a subject."""
    from litdata.streaming.writer import BinaryWriter

    began_s = time.perf_counter()
    work.mkdir(parents=True)
    writer = BinaryWriter(str(work), chunk_size=1)
    for index, (name, image, label) in enumerate(subjects(source)):
        writer[index] = {"name": name, "image": image, "label": label}
    writer.done()
    writer.merge(1)
    return {"converted_s": time.perf_counter() - began_s, "charged_bytes": folder_bytes(work)}


def litdata(source: Path, work: Path, options: dict) -> dict:
    """Stream the chunks under a cache limit."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.resolver import Dir

    class Crops(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return crops(np.asarray(sample["image"]), np.asarray(sample["label"]), options)

    dataset = Crops(
        Dir(path=str(work), url=f"local:{source}"), shuffle=True, max_cache_size=options["limit"]
    )
    loader = StreamingDataLoader(dataset, batch_size=1, num_workers=options["workers"])
    return _epochs(loader, options)


def main(name: str, source: str, work: str, options: str) -> None:
    """Run one peer and print its figures as the last line."""
    function = globals()[name]
    say(function(Path(source), Path(work), json.loads(options)))


if __name__ == "__main__":
    main(*sys.argv[1:])
