"""What the user asks for, :class:`Scalar` and :class:`Label`, and the files that it matches.

Pure: works on paths and sizes as the index gives them, touches no file. A glob is matched from
the dataset's root: ``*`` and ``?`` stay inside one folder, ``**`` crosses folders, brackets hold
a set of characters. It becomes one regular expression, after a cut by its literal beginning: here,
since wcmatch, pathspec and Python's ``glob.translate`` make none that says what each wildcard
stands for, by which the images of layouts other than BIDS are joined.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from typing import Literal

from tio_openneuro.content import TreeFile
from tio_openneuro.errors import SelectionError
from tio_openneuro.select.bids import (
    FIELDS,
    BidsPath,
    entity_name,
    parse_path,
    split_extension,
    vocabulary,
)

NIFTI_EXTENSIONS = (".nii.gz", ".nii")
# Neither surfaces nor pictures, of which reports on each image are full.
IMAGE_EXTENSIONS = (*NIFTI_EXTENSIONS, ".mgz", ".mgh", ".nrrd", ".mha")

# A header and its magic take 352 bytes. Compressed, one voxel of zeros by nibabel takes 60.
_SMALLEST_BYTES = {".nii": 352, ".nii.gz": 50}
_SHOWN = 5
# Options that are mistaken for an entity where they do not belong, and whose they are.
_OPTIONS_OF = {"volumes": "Scalar", "combine": "Label", "when_missing": "Label"}
_OPTIONS_OF |= dict.fromkeys(("unit", "on_missing", "on_multiple", "on_incomplete"), "the dataset")

VolumeChoice = int | slice | Literal["mean"] | None


@dataclass(frozen=True, init=False, repr=False)
class ImagePattern:
    """Say which file of a unit is meant, by glob, by BIDS entities, or by both.

    Attributes:
        glob: Pattern from the dataset's root, or None.
        required: Whether a unit that lacks the image is skipped.
        entities: Entities wanted and their values, sorted by name.
    """

    glob: str | None
    required: bool
    entities: tuple[tuple[str, object], ...]

    def _set(self, glob: str | None, entities: Mapping[str, object], **options: object) -> None:
        """Set all fields, the options by their names."""
        name = type(self).__name__
        if glob is not None and not (isinstance(glob, str) and glob.strip()):
            raise SelectionError(
                f"{name} cannot select by an empty pattern, nor by what is no text: {glob!r}."
                " Give a glob from the dataset's root, 'sub-*/anat/*_T1w.nii.gz'."
            )
        if glob is None and not entities:
            raise SelectionError(
                f"{name}() says nothing about the file. Give a glob from the dataset's root,"
                f" {name}('sub-*/anat/*_T1w.nii.gz'), or BIDS entities, {name}(suffix='T1w')."
            )
        check_option("required", options["required"], (True, False))
        for option in entities.keys() & _OPTIONS_OF.keys():
            given, owner = f"{option}={entities[option]!r}", _OPTIONS_OF[option]
            raise SelectionError(f"{name} cannot take {given}: it is an option of {owner}.")
        frozen = ((entity_name(name), _frozen(value)) for name, value in entities.items())
        options |= {"entities": tuple(sorted(frozen, key=lambda item: item[0]))}
        for name, value in {"glob": glob, **options}.items():
            object.__setattr__(self, name, value)

    @property
    def optional(self) -> bool:
        """Whether a unit may lack the image."""
        return not self.required

    def __repr__(self) -> str:
        """Return the call that makes an equal object."""
        parts = [] if self.glob is None else [repr(self.glob)]
        parts += [] if self.required else ["required=False"]
        options = [(each.name, getattr(self, each.name)) for each in fields(self)[3:]]
        given = [option for option in options if option[1] is not None]
        parts += [f"{name}={value!r}" for name, value in (*given, *self.entities)]
        return f"{type(self).__name__}({', '.join(parts)})"


def _frozen(value: object) -> object:
    """Return a list or set as a tuple, anything else as it is."""
    if isinstance(value, set | frozenset):
        return tuple(sorted(value, key=str))
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, init=False, repr=False)
class Scalar(ImagePattern):
    """Select an intensity image.

    Attributes:
        volumes: What to take from a 4D file: an index, a slice, ``"mean"``, or None for all.

    Example:
        >>> import tio_openneuro as tno
        >>> tno.Scalar("sub-*/anat/*_T1w.nii.gz")
        Scalar('sub-*/anat/*_T1w.nii.gz')
        >>> tno.Scalar(suffix="FLAIR", acq="T2sel")
        Scalar(acquisition='T2sel', suffix='FLAIR')
    """

    volumes: VolumeChoice = field(hash=False)

    def __init__(
        self,
        glob: str | None = None,
        *,
        required: bool = True,
        volumes: VolumeChoice = None,
        **entities: object,
    ) -> None:
        """Keep what is asked for.

        Args:
            glob: Pattern from the dataset's root.
            required: Whether a unit that lacks the image is skipped (or raises).
            volumes: What to take from a 4D file.
            **entities: BIDS entities by long or short name, ``suffix``, ``datatype``,
                ``extension``, or ``scope`` (``"raw"``, ``"derivatives"``, a pipeline's name or
                ``"all"``; by default raw files, and derivatives only where no raw file
                matches). A list gives alternatives; None wants the entity absent.

        Raises:
            SelectionError: Neither glob nor entities, or ``volumes`` is not understood.
        """
        self._set(glob, entities, required=required, volumes=volumes)
        known = volumes is None or volumes == "mean" or isinstance(volumes, int | slice)
        if not known or isinstance(volumes, bool):
            raise SelectionError(f"volumes must be an int, a slice or 'mean', not {volumes!r}.")


@dataclass(frozen=True, init=False, repr=False)
class Label(ImagePattern):
    """Select a label map.

    Attributes:
        combine: ``"union"`` merges several files of one image; None expects one file.
        when_missing: ``"zeros"`` gives an empty map to a unit without the label.

    Example:
        >>> import tio_openneuro as tno
        >>> tno.Label("derivatives/masks/sub-*/*_desc-Lesion_*.nii.gz", combine="union")
        Label('derivatives/masks/sub-*/*_desc-Lesion_*.nii.gz', combine='union')
    """

    combine: Literal["union"] | None
    when_missing: Literal["zeros"] | None

    def __init__(
        self,
        glob: str | None = None,
        *,
        required: bool = True,
        combine: Literal["union"] | None = None,
        when_missing: Literal["zeros"] | None = None,
        **entities: object,
    ) -> None:
        """Keep what is asked for.

        Args:
            glob: Pattern from the dataset's root.
            required: Whether a unit that lacks the label is skipped (or raises).
            combine: How to merge several files of one image.
            when_missing: What a unit without the label gets; it is then never skipped for it.
            **entities: As for :class:`Scalar`.

        Raises:
            SelectionError: Neither glob nor entities, or an option is not understood.
        """
        self._set(glob, entities, required=required, combine=combine, when_missing=when_missing)
        check_option("combine", combine, (None, "union"))
        check_option("when_missing", when_missing, (None, "zeros"))

    @property
    def optional(self) -> bool:
        """Whether a unit may lack the label."""
        return not self.required or self.when_missing is not None


def check_option(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse an option that has no such value."""
    if value not in known:
        raise SelectionError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}.")


_WILDCARDS = re.compile(r"(\*\*/|\*+|\?|\[[!^]?\]?[^]/]*\])")
_EXPRESSIONS = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}


def compile_glob(glob: str) -> tuple[str, re.Pattern[str]]:
    """Return the literal text that a glob begins with, and the expression for whole paths.

    Each wildcard is a group, so that a match says what the wildcards stand for.

    Example:
        >>> compile_glob("a/*/b.nii")[1].fullmatch("a/x/b.nii").groups()
        ('x',)
    """
    # In turn a literal text and a wildcard.
    pieces = _WILDCARDS.split(glob.removeprefix("./").lstrip("/"))
    parts = (_expression(p) if n % 2 else re.escape(p) for n, p in enumerate(pieces))
    return pieces[0], re.compile("".join(parts), re.DOTALL)


def _expression(wildcard: str) -> str:
    """Return one wildcard as a group of a regular expression."""
    if not wildcard.startswith("["):
        return _EXPRESSIONS.get(wildcard, "(.*)")
    content = wildcard[1:-1].replace("\\", r"\\").replace("[", r"\[")
    if content[0] in "!^":
        return f"((?!/)[^{_escape_first(content[1:])}])"
    return f"([{_escape_first(content)}])"


def _escape_first(content: str) -> str:
    """Escape what means something at the beginning of a set only."""
    return "\\" + content if content[:1] in {"]", "^"} else content


def is_volume(path: str, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> bool:
    """Tell whether a path bears the name of an image of voxels: no CIFTI, surface or picture."""
    lowered = path.lower()
    return lowered.endswith(endings) and split_extension(lowered)[1] in endings


@dataclass(frozen=True)
class Hit:
    """One file that a pattern matches.

    Attributes:
        file: The file.
        captures: What the glob's wildcards stand for, repetitions left out.
    """

    file: TreeFile
    captures: tuple[str, ...] = ()

    @cached_property
    def parsed(self) -> BidsPath:
        """The file's path in BIDS terms."""
        return parse_path(self.file.path)

    @property
    def run(self) -> str:
        """The run's value without leading zeros, so that run 01 is run 1."""
        value = self.parsed.entities.get("run", "")
        return value.lstrip("0") or value

    @property
    def unusable(self) -> str:
        """Why the file cannot be an image, in words; empty where nothing speaks against it."""
        if self.parsed.conflict:
            return f"{self.file.path}: {self.parsed.conflict}"
        size = self.file.size_bytes
        if self.parsed.stem.startswith("._"):
            return f"{self.file.path} is a note of macOS about a file, and no image"
        if size is None and self.file.key is None:
            return f"{self.file.path} is a link to no file of the dataset"
        smallest = _SMALLEST_BYTES.get(self.parsed.extension, 1)
        if size is not None and size < smallest:
            return f"{self.file.path} holds {size} bytes, too few for an image"
        return ""


def find_hits(name: str, pattern: ImagePattern, files: Sequence[TreeFile]) -> list[Hit]:
    """Return the image files that a pattern matches, in the order of the files.

    Args:
        name: The image's name, for messages.
        pattern: What is asked for.
        files: The dataset's tree.

    Raises:
        SelectionError: Nothing matches; the message names what comes nearest.
    """
    matched = _match_glob(pattern.glob, files)
    images = [hit for hit in matched if is_volume(hit.file.path)]
    hits = _match_entities(dict(pattern.entities), images, by_glob=pattern.glob is not None)
    if hits:
        return hits
    message = f"No image file matches {name!r} = {pattern!r} among {len(files)} files."
    raise SelectionError(f"{message} {_nearest(pattern, files, matched, images)}")


def _match_glob(glob: str | None, files: Sequence[TreeFile]) -> list[Hit]:
    """Return the files that a glob matches, and what its wildcards stand for."""
    if glob is None:
        return [Hit(file) for file in files]
    prefix, expression = compile_glob(glob)
    found: list[Hit] = []
    for file in files:
        match = expression.fullmatch(file.path) if file.path.startswith(prefix) else None
        if match:
            captures = (text.strip("/") for text in match.groups())
            found.append(Hit(file, tuple(dict.fromkeys(text for text in captures if text))))
    return found


def _match_entities(wanted: Mapping[str, object], images: list[Hit], *, by_glob: bool) -> list[Hit]:
    """Return the images with these entities; without a scope the raw ones, if there are any."""
    # A value stands in the path as it is, unless its zeros may differ: no need to parse the rest.
    given = [v for name, v in wanted.items() if isinstance(v, str) and name != "scope"]
    texts = [text for text in given if not text.rpartition("-")[2].isdecimal()]
    hits = [
        hit
        for hit in images
        if all(text in hit.file.path for text in texts)
        and all(hit.parsed.matches(name, value) for name, value in wanted.items())
    ]
    if by_glob or "scope" in wanted:
        return hits
    raw = [hit for hit in hits if hit.parsed.scope == "raw"]
    return raw or [hit for hit in hits if hit.parsed.scope == "derivatives"]


def _nearest(
    pattern: ImagePattern, files: Sequence[TreeFile], matched: list[Hit], images: list[Hit]
) -> str:
    """Say what exists that comes nearest to a pattern without a match."""
    if matched and not images:
        endings = Counter(hit.parsed.extension for hit in matched)
        return f"It hits {len(matched)} files that are no images ({listed(endings)}); try .nii.gz."
    if pattern.glob is not None and not images:
        paths = (file.path for file in files if is_volume(file.path))
        shapes = Counter(map(_shape_of, paths))
        near = Counter({shape: shapes[shape] for shape in _alike(pattern.glob, shapes)})
        which = "The nearest" if near else "Images"
        return f"{which} that exist: {listed(near or shapes)}." if shapes else "It holds no images."
    return _nearest_entities(dict(pattern.entities), [hit.parsed for hit in images])


def _alike(glob: str, shapes: Iterable[str]) -> list[str]:
    """Return the shapes that a glob means in another case, place or spelling, the surest alone."""
    glob = _shape_of(re.sub(r"^\w+=|\.(?=\*)", "", glob.replace("\\", "/").strip(" /")))
    within = re.sub(r"^.*?(?=sub-|derivatives/)", "", glob)
    for kind in ("{0}", "{1}", "{1}*", "**/{0}", "**/*{0}", "{0}/**", "**/{0}/**", "**/*{0}*"):
        expression = re.compile(f"(?is){compile_glob(kind.format(glob, within))[1].pattern}")
        if found := [shape for shape in shapes if expression.fullmatch(shape)]:
            return found
    return get_close_matches(glob, list(shapes)[:2000], cutoff=0.3)


def _meant(name: str, wanted: object, parsed: list[BidsPath]) -> list[str]:
    """Return what may be meant by an entity that no image has, by its value, then by spelling."""
    text = str(wanted)
    parts = {part.lower() for part in re.findall(r"[^\W_]*[^\W\d_][^\W_]*", text)}
    every = {
        f"{other}={path.get(other)!r}": path.get(other).lower()
        for path in parsed
        for other in (name, "suffix", "datatype", "pipeline", *path.entities)
        if path.get(other)
    }
    # What BIDS knows is no misspelling, nor is a number.
    guess = parts and text not in vocabulary().suffixes
    near = get_close_matches(f"{name}={text!r}", every, cutoff=0.8) if guess else []
    return [each for each, value in every.items() if value in parts] + near


def _nearest_entities(wanted: dict[str, object], parsed: list[BidsPath]) -> str:
    """Say which of the entities wanted excludes the last images, and which values exist."""
    if not parsed:
        return "It holds no images."
    for name, value in wanted.items():
        left = [path for path in parsed if path.matches(name, value)]
        if left:
            parsed = left
            continue
        by_scope = name == "scope"
        values = Counter(
            path.pipeline or path.scope if by_scope else path.get(name) for path in parsed
        )
        present = Counter({text: count for text, count in values.items() if text})
        hint = "".join(f" Did you mean {m}?" for m in _meant(name, value, parsed)[:1])
        if present:
            return f"Values of {name!r} that exist there: {listed(present)}.{hint}"
        known = Counter(key for p in parsed for key in (*p.entities, *FIELDS[:4]) if p.get(key))
        return f"No image there has the entity {name!r}; they have {listed(known)}.{hint}"
    return "Those that match lie outside raw and derivatives; give scope='all' to take them."


def _shape_of(path: str) -> str:
    """Return a path with subject and session made general, ``sub-*/anat/sub-*_T1w.nii.gz``."""
    return re.sub(r"\b(sub|ses)-[^/_]+", r"\1-*", path)


def listed(counts: Counter[str]) -> str:
    """Return the commonest entries and their counts in words."""
    return first_few([f"{text} ({count})" for text, count in counts.most_common()])


def first_few(texts: Sequence[str], separator: str = ", ", shown: int = _SHOWN) -> str:
    """Return the first of the texts, and how many more there are."""
    more = [f"and {len(texts) - shown} more"] if len(texts) > shown else []
    return separator.join([*texts[:shown], *more])
