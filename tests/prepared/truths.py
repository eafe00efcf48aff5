"""A dataset with shared files and three snapshots, steps of a preprocess, and all of a subject."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torchio as tio
from faulty import LoopbackOpenNeuro

import tio_openneuro as tno
from tio_openneuro.loopback.volume import Volume

IMAGES = {
    "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
    "t2": tno.Scalar("sub-*/anat/*_T2w.nii.gz"),
    "lesion": tno.Label("sub-*/anat/*_mask.nii.gz"),
}
SHAPE = (14, 12, 10)
Files = dict[str, Volume | bytes]


def files_of(seed: int, count: int = 3) -> Files:
    """Return a small dataset; its first two participants share their T1w, all share a T2w."""
    rng = np.random.default_rng(seed)
    affine = np.diag([1.0, 1.2, 1.5, 1.0])
    names = [f"sub-{number}" for number in range(1, count + 1)]
    images = [rng.integers(0, 900, SHAPE).astype(np.int16) for _ in range(count)]
    shared = Volume(rng.integers(0, 900, SHAPE).astype(np.int16), affine)
    files: Files = {
        "dataset_description.json": b'{"Name": "Truths", "BIDSVersion": "1.10.0"}',
        "participants.tsv": table(names, rng.integers(20, 80, count).tolist()),
        "T2w.json": b'{"RepetitionTime": 2.5}',
    }
    for number, name in enumerate(names):
        stem = f"{name}/anat/{name}"
        label = np.zeros(SHAPE, np.uint8)
        label[3 + number : 8, 3:8, 2:7] = 1
        files[f"{stem}_T1w.nii.gz"] = Volume(images[max(number - 1, 0)], affine)
        files[f"{stem}_T1w.json"] = b'{"EchoTime": 0.0%d}' % (number + 1)
        files[f"{stem}_T2w.nii.gz"] = shared
        files[f"{stem}_mask.nii.gz"] = Volume(label, affine)
    return files


def table(names: list[str], ages: list[float], more: str = "") -> bytes:
    """Return participants.tsv, with a column of this name too where one is given."""
    lines = ["\t".join(["participant_id", "age", *filter(None, [more])])]
    for number, (name, age) in enumerate(zip(names, ages, strict=True)):
        lines.append("\t".join([name, str(age), *([f"m{number}"] if more else [])]))
    return ("\n".join(lines) + "\n").encode()


def changed(files: Files, kind: str) -> Files:
    """Return what a snapshot that follows changes, and nothing else."""
    names = sorted({path.partition("/")[0] for path in files if path.startswith("sub-")})
    first, last = (f"{name}/anat/{name}" for name in (names[0], names[-1]))
    if kind == "ages":
        return {"participants.tsv": table(names, [90.0 - n for n in range(len(names))])}
    if kind == "column":
        return {"participants.tsv": table(names, [30.0] * len(names), "site")}
    if kind == "sidecar":
        return {f"{first}_T1w.json": b'{"EchoTime": 0.5, "Note": "new"}'}
    return {f"{first}_T1w.nii.gz": files[f"{last}_T1w.nii.gz"]}


CHANGES = ["ages", "column", "sidecar", "files"]


def publish_truths(server: LoopbackOpenNeuro, accession: str, seed: int) -> None:
    """Publish a dataset, and a snapshot for each kind of change, one upon another."""
    files = files_of(seed)
    server.publish(accession, files, tag="1.0.0")
    for number, kind in enumerate(CHANGES):
        server.publish(accession, changed(files, kind), tag=f"1.0.{number + 1}")


# -- steps of a preprocess -----------------------------------------------------------------------


class Step(tio.Transform):
    """One thing that a custom transform may do to a subject."""

    def __init__(self, word: str, **options: Any) -> None:
        super().__init__(**options)
        self.word = word
        self.args_names = ["word"]

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """Do it, and return the subject, or another one."""
        return STEPS[self.word](subject) or subject


def _scale(subject: tio.Subject, factor: float) -> None:
    image = subject.get_images()[0]
    image.set_data(image.data * factor)


def _put_back(subject: tio.Subject) -> None:
    name = next(iter(subject.get_images_dict(intensity_only=False)))
    image = subject[name]
    subject.remove_image(name)
    subject.add_image(image, name)


def _rename(subject: tio.Subject) -> None:
    if "t2" in subject:
        image = subject["t2"]
        subject.remove_image("t2")
        subject.add_image(image, "second")


def _remove(subject: tio.Subject) -> None:
    if "t2" in subject and len(subject.get_images()) > 1:
        subject.remove_image("t2")


def _forget(subject: tio.Subject) -> None:
    for name in ("age", "site"):
        if name in subject:
            del subject[name]
            vars(subject).pop(name, None)


def _reverse(subject: tio.Subject) -> None:
    items = list(subject.items())[::-1]
    subject.clear()
    subject.update(items)


def _plain(subject: tio.Subject) -> tio.Subject:
    twin = tio.Subject(dict(subject))
    twin.applied_transforms = subject.applied_transforms
    return twin


def _new_image(subject: tio.Subject) -> None:
    image = subject.get_images()[0]
    twin = type(image)(tensor=image.data.float() + 1, affine=image.affine, note="made")
    subject.add_image(twin, "made")


def _new_label(subject: tio.Subject) -> None:
    image = subject.get_images()[0]
    subject["above"] = tio.LabelMap(tensor=image.data > 0, affine=image.affine)
    subject.update_attributes()


def _own_values(subject: tio.Subject) -> None:
    subject["values"] = [1, (2.5, "a"), {"b": None}]
    subject["array"] = np.arange(4, dtype=np.float32)
    subject.tensor = torch.ones(2)


def _image_items(subject: tio.Subject) -> None:
    image = subject.get_images()[0]
    image["mean"] = float(image.data.float().mean())
    image.own = "attribute"
    metadata = image.pop("metadata", None)
    if metadata is not None:
        image["metadata"] = metadata


def _swap(subject: tio.Subject) -> None:
    if {"t1", "t2"} <= set(subject):
        subject["t1"], subject["t2"] = subject["t2"], subject["t1"]
        subject.update_attributes()


STEPS: dict[str, Any] = {
    "age": lambda s: _scale(s, 1 / s["age"]) if "age" in s else None,
    "age, as attribute": lambda s: _scale(s, 1 / vars(s)["age"]) if "age" in vars(s) else None,
    "echo": lambda s: _scale(s, dict(s.get_images()[0].get("metadata", {})).get("EchoTime", 2.0)),
    "id": lambda s: _scale(s, 1 + int(s["subject_id"].partition("-")[2]) / 7),
    "stem": lambda s: _scale(s, 1 + len(s.get_images()[0]["stem"]) / 9),
    "other image": lambda s: _scale(s, 1 + float(s.get_images()[-1].data.float().mean())),
    "number of items": lambda s: _scale(s, len(list(s.keys()))),
    "item": lambda s: s.__setitem__("x", 3),
    "attribute": lambda s: setattr(s, "y", 4),
    "item and attribute": lambda s: (s.__setitem__("z", "a"), s.update_attributes())[:0],
    "values": _own_values,
    "put back": _put_back,
    "rename": _rename,
    "remove": _remove,
    "forget columns": _forget,
    "reverse": _reverse,
    "plain": _plain,
    "new image": _new_image,
    "new label": _new_label,
    "image's items": _image_items,
    "swap": _swap,
    "no history": lambda s: s.clear_history(),
}

TORCHIO: list[Any] = [
    tio.ToCanonical,
    tio.ZNormalization,
    lambda: tio.Clamp(-100, 500),
    lambda: tio.RescaleIntensity((0, 1)),
    lambda: tio.CropOrPad((12, 12, 12)),
    lambda: tio.Crop((1, 0, 0, 1, 0, 0)),
    lambda: tio.Pad(1),
    lambda: tio.Resample((1.1, 1.1, 1.4)),
    lambda: tio.To(torch.float64),
    lambda: tio.Mask("lesion"),
    lambda: tio.Clamp(0, 300, keep={"lesion": "kept"}),
    tio.OneHot,
]


# -- all of a subject ----------------------------------------------------------------------------


def told(subject: tio.Subject, root: object) -> list[object]:
    """Return all that a subject is, so that two can be compared, from whichever root."""
    items = [(name, _value(value, str(root))) for name, value in subject.items()]
    attributes = [
        (name, "item" if subject.get(name, subject) is value else _value(value, str(root)))
        for name, value in vars(subject).items()
    ]
    return [type(subject), items, attributes, repr(subject.applied_transforms)]


def _value(value: object, root: str) -> object:
    if not isinstance(value, tio.Image):
        return repr(value).replace(root, "")
    data = value.data
    source = getattr(value, "source", None)
    return [
        type(value),
        [(key, None if key == "data" else _value(value[key], root)) for key in value],
        [data.dtype, tuple(data.shape), data.is_contiguous()],
        hashlib.sha256(data.numpy().tobytes()).hexdigest(),
        hashlib.sha256(np.asarray(value.affine).tobytes()).hexdigest(),
        source and [file.blob for file in source.files],
        sorted(
            (key, _value(each, root))
            for key, each in vars(value).items()
            if key not in {"source", "_array", "reader"}
        ),
    ]


def digest(
    dataset: tio.SubjectsDataset, root: object, sampler: Any, count: int = 3, **options: Any
) -> Iterator[object]:
    """Yield all of each patch of one epoch."""
    with tno.BudgetedQueue(
        dataset, 4, count, sampler, num_workers=0, seed=5, ram_budget="4 GB", **options
    ) as queue:
        for patch in queue:
            yield told(patch, root)
