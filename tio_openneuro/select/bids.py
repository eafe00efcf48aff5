"""BIDS names: a path, as git has it, to its subject, session, run, suffix and entities. Pure.

The vocabulary (entities, datatypes, endings of several dots) is bidsschematools', the schema of
the specification itself, kept by the BIDS maintainers: 6 MB with what it needs, loaded once in
0.05 s (2026-11-20). The splitting of names is done here. bidsschematools' own rules match valid
raw names only, and labels are often just not that (``sub-1_FLAIR_roi``, ``desc-Lesion_1_mask``,
``T1w_label-SC_seg``); bids2table splits leniently as this module does, but needs pyarrow
(48 MB) and does not say in which scope a file lies. Neither the file system nor the network is
touched, and no path is refused: what a name does not say is an empty string.

Source: https://bids-specification.readthedocs.io/en/stable/common-principles.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from bidsschematools.schema import load_schema

# How paths begin that are neither raw data nor derivatives.
OTHER_PREFIXES = ("sourcedata/", "code/", "stimuli/", "tmp/", "tmp_", ".")
# What can be asked for by name beside the entities of a file's name.
FIELDS = ("subject", "session", "suffix", "datatype", "extension", "scope", "pipeline")
# Endings of CIFTI-2 files, which are NIfTI files of grayordinates, and hold no volume.
_CIFTI = re.compile(r"\.[dp]{1,2}(?:conn|tseries|scalar|label|fan)[a-z]*\.nii(?:\.gz)?$")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words of the BIDS schema that splitting a name needs.

    Attributes:
        long_names: Entity by its key in names, ``{"acq": "acquisition"}``.
        datatypes: Names of datatype folders, ``"anat"``.
        suffixes: Last parts of names, ``"T1w"``.
        endings: Extensions with more than one dot, longest first.
    """

    long_names: Mapping[str, str]
    datatypes: frozenset[str]
    suffixes: frozenset[str]
    endings: tuple[str, ...]


@cache
def vocabulary() -> Vocabulary:
    """Return the vocabulary of the BIDS schema that bidsschematools ships."""
    objects = load_schema().objects
    extensions = {str(entry["value"]).rstrip("/") for entry in objects["extensions"].values()}
    endings = {extension for extension in extensions if extension.count(".") > 1}
    return Vocabulary(
        {str(entry["name"]): str(name) for name, entry in objects["entities"].items()},
        frozenset(str(entry["value"]) for entry in objects["datatypes"].values()),
        frozenset(str(entry["value"]) for entry in objects["suffixes"].values()),
        tuple(sorted(endings, key=lambda ending: (-len(ending), ending))),
    )


def entity_name(name: str) -> str:
    """Return the long name of an entity given by either, ``"acq"`` or ``"acquisition"``."""
    return vocabulary().long_names.get(name, name)


@dataclass(frozen=True, slots=True)
class BidsPath:
    """What a path says in BIDS terms; each text is empty where it says nothing.

    Attributes:
        path: The path, posix, from the dataset's root.
        stem: The file's name less its extension.
        extension: With its dot and in small letters, ``".nii.gz"``.
        suffix: Last part of the stem, ``"T1w"``.
        datatype: Nearest datatype folder, ``"anat"``.
        scope: ``"raw"``, ``"derivatives"`` or ``"other"`` (``sourcedata/``, ``tmp_dcm2bids/``).
        pipeline: Folders from ``derivatives/`` to the subject's, ``"fmriprep"``; for ``"other"``
            the top folder.
        subject: With its prefix, ``"sub-01"``, from the name, else from the folder.
        session: With its prefix, ``"ses-1"``, likewise.
        conflict: In words, where name and folder name different subjects or sessions.
        entities: Values by long name, without subject and session; keys that BIDS does not know
            as they are.
    """

    path: str
    stem: str
    extension: str
    suffix: str
    datatype: str
    scope: str
    pipeline: str
    subject: str
    session: str
    conflict: str
    entities: Mapping[str, str]

    @property
    def run(self) -> str:
        """The run with its prefix, ``"run-01"``."""
        value = self.entities.get("run", "")
        return f"run-{value}" if value else ""

    def get(self, name: str) -> str:
        """Return an entity's value by its long or short name, or a field by its own.

        Example:
            >>> parse_path("sub-01/anat/sub-01_acq-iso_T1w.nii.gz").get("acq")
            'iso'
        """
        name = entity_name(name)
        if name in {"subject", "session"}:
            return str(getattr(self, name)).partition("-")[2]
        return str(getattr(self, name)) if name in FIELDS else self.entities.get(name, "")

    def matches(self, name: str, wanted: object) -> bool:
        """Tell whether an entity has the value wanted, or one of several.

        Args:
            name: An entity's long or short name, or a field.
            wanted: A value, with or without its prefix (``"01"``, ``"sub-01"``); a number where
                the value is one, leading zeros aside (``run=1``); None for "is absent"; or a
                list, tuple or set of these.
        """
        if isinstance(wanted, list | tuple | set | frozenset):
            return any(self.matches(name, value) for value in wanted)
        value = self.get(name)
        if wanted is None:
            return not value
        text = str(wanted)
        if name == "scope":
            folders = self.pipeline.split("/")
            return text in {"all", self.scope, self.pipeline, *folders} - {""}
        if name == "extension":
            return value == f".{text.lower().removeprefix('.')}"
        key, _, rest = text.partition("-")
        if rest and entity_name(key) == entity_name(name):
            text = rest
        return value == text or (value.isdecimal() and text.isdecimal() and int(value) == int(text))


def split_extension(name: str) -> tuple[str, str]:
    """Return a file name's stem and its extension in small letters, ``.nii.gz`` being one.

    Example:
        >>> split_extension("sub-01_res-0.5_T1w.nii.gz")
        ('sub-01_res-0.5_T1w', '.nii.gz')
    """
    lowered = name.lower()
    cifti = _CIFTI.search(lowered)
    for ending in (cifti[0] if cifti else ".nii.gz", *vocabulary().endings):
        if lowered.endswith(ending):
            return name[: -len(ending)], ending
    stem, dot, ending = name.rpartition(".")
    return (stem, dot + ending.lower()) if stem else (name, "")


def parse_path(path: str) -> BidsPath:
    """Split a path into what its name and folders say.

    Args:
        path: Posix, from the dataset's root.

    Returns:
        The parts. Of several values of one entity the first counts. A last part with a hyphen is
        an entity where BIDS knows its key (``label-tumor``), else the suffix (``T1w-chi``).
    """
    *folders, name = path.split("/")
    stem, extension = split_extension(name)
    long_names = vocabulary().long_names
    entities: dict[str, str] = {}
    suffix = ""
    tokens = stem.split("_")
    last = len(tokens) - 1
    for position, token in enumerate(tokens):
        key, hyphen, value = token.partition("-")
        if hyphen and key and value and (position < last or key in long_names):
            entities.setdefault(long_names.get(key, key), value)
        elif position == last:
            suffix = token
    datatypes = vocabulary().datatypes
    datatype = next((folder for folder in reversed(folders) if folder in datatypes), "")
    where, whose = _scope(folders), _take_ids(folders, entities)
    return BidsPath(path, stem, extension, suffix, datatype, *where, *whose, entities)


def _take_ids(folders: list[str], entities: dict[str, str]) -> tuple[str, str, str]:
    """Take subject and session out of the entities; say where the folders' names differ."""
    found: list[str] = []
    conflicts: list[str] = []
    for entity, prefix in (("subject", "sub-"), ("session", "ses-")):
        value = entities.pop(entity, "")
        named = prefix + value if value else ""
        folder = next((f for f in folders if f.startswith(prefix) and "_" not in f), "")
        if named and folder and named != folder and not named.startswith(f"{folder}."):
            conflicts.append(f"its name says {named}, its folder {folder}")
        # A structure's file in a subject's folder: ``sub-01.BA1_exvivo.mgz``.
        found.append(folder if folder and named.startswith(f"{folder}.") else named or folder)
    return found[0], found[1], "; ".join(conflicts)


def _scope(folders: list[str]) -> tuple[str, str]:
    """Return the scope of files in these folders, and the pipeline's name."""
    above = folders[: next((n for n, f in enumerate(folders) if f.startswith("sub-")), None)]
    if "derivatives" in above:
        return "derivatives", "/".join(above[above.index("derivatives") + 1 :])
    if above and f"{above[0]}/".startswith(OTHER_PREFIXES):
        return "other", above[0]
    return "raw", ""


class Sidecars:
    """Find the files that apply to an image by BIDS inheritance, by name alone.

    A sidecar applies when it lies in the image's folder or above, has the suffix asked for, and
    every entity in its name has the same value in the image's.

    Source: BIDS 1.10, "The Inheritance Principle".
    """

    def __init__(self, paths: Iterable[str], extension: str = ".json") -> None:
        """Index the paths of that extension by folder and suffix."""
        self._by_folder: dict[tuple[str, str], list[BidsPath]] = {}
        for path in paths:
            if path.endswith(extension):
                parsed = parse_path(path)
                folder = path.rpartition("/")[0]
                self._by_folder.setdefault((folder, parsed.suffix), []).append(parsed)

    def find(self, image_path: str, suffix: str | None = None) -> tuple[str, ...]:
        """Return the paths that apply, the most general first: later ones override.

        Args:
            image_path: The image's path.
            suffix: The sidecars' suffix where it is not the image's, such as ``"events"``.
        """
        image = parse_path(image_path)
        folders = image_path.split("/")[:-1]
        found: list[str] = []
        for depth in range(len(folders) + 1):
            there = ("/".join(folders[:depth]), image.suffix if suffix is None else suffix)
            applying = [c for c in self._by_folder.get(there, ()) if _applies(c, image)]
            applying.sort(key=lambda c: (len(c.entities), c.path))
            found += [candidate.path for candidate in applying]
        return tuple(found)


def _applies(sidecar: BidsPath, image: BidsPath) -> bool:
    """Tell whether nothing in the sidecar's name contradicts the image's."""
    return (
        sidecar.subject in {"", image.subject}
        and sidecar.session in {"", image.session}
        and all(image.entities.get(name) == value for name, value in sidecar.entities.items())
    )
