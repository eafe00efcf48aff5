"""Ten small repositories, counted by an oracle of the test's own from ``git ls-tree``.

Each holds what goes wrong in real ones. The oracle knows nothing of BIDS: it sorts the paths that
git lists, or that a walk of the folder finds, by regular expressions that are written out for each
repository.
"""

import itertools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

import pytest
from conftest import heads

import tio_openneuro as tno
from tio_openneuro.annex.tree import index_tree
from tio_openneuro.content import TreeFile
from tio_openneuro.loopback.volume import write_content
from tio_openneuro.select.patterns import Label, Scalar
from tio_openneuro.select.selection import Selection, select

KEY = "MD5E-s1000000--0cc175b9c0f1b6a831c399e269772661.nii.gz"
ANNEXED = f"../../.git/annex/objects/xx/yy/{KEY}/{KEY}"
ADVICE = r"on_incomplete='allow'|on_multiple=|Name the images by glob|Check the patterns"
SUBJECT = r"^(?:derivatives/[^/]+/)?(sub-\w+)/"
SESSION = r"^(?:derivatives/[^/]+/)?(sub-\w+)/(ses-\w+)/"
ALL = {"on_multiple": "all", "on_incomplete": "allow"}


def commit(folder: Path, files: Mapping[str, str | bytes]) -> list[str]:
    """Commit a link for each text and a file for each content; return what git lists."""
    stream = b"commit refs/heads/main\ncommitter t <t@t> 1700000000 +0000\ndata 0\n"
    for path, content in files.items():
        mode, data = (
            (b"120000", content.encode()) if isinstance(content, str) else (b"100644", content)
        )
        stream += b"M %b inline %b\ndata %d\n%b\n" % (mode, path.encode(), len(data), data)
    stream += b"commit refs/heads/git-annex\ncommitter t <t@t> 1700000000 +0000\ndata 0\n"
    stream += b"M 100644 inline uuid.log\ndata 0\n\n"
    subprocess.run(["git", "init", "-q", "-b", "main", folder], check=True)
    subprocess.run(["git", "fast-import", "--quiet"], cwd=folder, input=stream, check=True)
    names = ["git", "ls-tree", "-rz", "--name-only", "main"]
    return subprocess.check_output(names, cwd=folder).decode().split("\0")[:-1]


def each(text: str, **values: str) -> list[str]:
    """Fill in every combination of values, each the words of a text."""
    several = itertools.product(*(words.split() for words in values.values()))
    return [text.format(**dict(zip(values, words, strict=True))) for words in several]


@dataclass(frozen=True)
class Case:
    """A repository, what is asked of it, and how the oracle reads its paths.

    Attributes:
        paths: Annexed images.
        images: What is asked for.
        names: The expression of each image's files; None names them by their stems.
        unit: The expression of what names a unit.
        required: Images without which a unit is skipped.
        others: Files that are no annexed images: a link's target, or content.
        useless: The expression of files that match, and hold no image.
        options: Of the selection.
    """

    paths: list[str]
    images: Mapping[str, Scalar | Label] | None
    names: Mapping[str, str] | None
    unit: str = SUBJECT
    required: tuple[str, ...] = ()
    others: Mapping[str, str | bytes] = field(default_factory=dict)
    useless: str = "(?!)"
    options: Mapping[str, str] = field(default_factory=lambda: ALL)

    def image(self, path: str) -> str:
        """Return which image a path is; empty where it is none."""
        if self.names is None:
            found = re.search(r"(?i)([^/]+?)\.nii(\.gz)?$", path)
            return re.sub(r"(sub|ses)-[^_]*_", "", found[1]) if found else ""
        return next((name for name, text in self.names.items() if re.search(text, path)), "")

    def expected(self, listing: list[str]) -> tuple[dict[tuple[str, ...], set[str]], set[str]]:
        """Return the files of each unit, and those that are skipped."""
        units: dict[tuple[str, ...], set[str]] = {}
        wanted: dict[tuple[str, ...], set[str]] = {}
        for path in filter(self.image, listing):
            unit = re.search(self.unit, path)
            useful = not re.search(self.useless, path)
            if unit and useful:
                units.setdefault(unit.groups(), set()).add(path)
            elif unit:
                # An image that is there, and cannot be used, is not one that lacks.
                wanted.setdefault(unit.groups(), set()).add(self.image(path))
        full = {
            unit: paths
            for unit, paths in units.items()
            if {*self.required, *wanted.get(unit, ())} <= {self.image(path) for path in paths}
        }
        return full, {*filter(self.image, listing)}.difference(*full.values())


STRUCTURES = ("BA1", "BA2", "BA44", "MT", "V1", "V2")
CASES = {
    "optional images in any order": Case(
        [
            *each("sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_T1w.nii.gz", n="01 02 03", s="a b"),
            *each("sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_FLAIR.nii.gz", n="01 03", s="b c"),
            *each("sub-{n}/ses-{s}/func/sub-{n}_ses-{s}_bold.nii.gz", n="02", s="b c d"),
        ],
        {name: Scalar(suffix=name, required=False) for name in ("T1w", "FLAIR", "bold")},
        {name: rf"_{name}\.nii\.gz$" for name in ("T1w", "FLAIR", "bold")},
        SESSION,
    ),
    "image without its label in another session": Case(
        [
            *each("sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_T1w.nii.gz", n="1 2 3", s="pre post"),
            *each("derivatives/m/sub-{n}/ses-{s}/sub-{n}_ses-{s}_mask.nii.gz", n="1 2", s="pre"),
            "derivatives/m/sub-2/ses-post/sub-2_ses-post_mask.nii.gz",
        ],
        {"t1": Scalar(suffix="T1w"), "mask": Label(suffix="mask")},
        {"t1": "_T1w", "mask": "_mask"},
        SESSION,
        required=("t1", "mask"),
    ),
    "every image and every combination": Case(
        [
            *each("sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_T1w.nii.gz", n="x1 x2 x3 x4", s="1 2"),
            *each("sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_T2w.nii.gz", n="x2 x5", s="2 3"),
            *each(
                "sub-{n}/ses-{s}/func/sub-{n}_ses-{s}_task-{t}_bold.nii.gz",
                n="x3",
                s="2 3",
                t="rest nback",
            ),
        ],
        None,
        None,
        SESSION,
    ),
    "label names made by hand": Case(
        [
            *each("sub-{n}/anat/sub-{n}_{w}.nii.gz", n="1 2", w="T1w T2w acq-manual_FLAIR"),
            *each(
                "derivatives/manual/sub-{n}/anat/sub-{n}_{w}.nii.gz",
                n="1 2",
                w="T2w_seg-manual T2w_labels-disc-manual T2w_spinalcordmask T1w_defacemask"
                " HIP_manual lesion aseg tumor_segmentation",
            ),
        ],
        None,
        None,
    ),
    "grayordinates, surfaces and pictures": Case(
        [
            *each("sub-{n}/dwi/sub-{n}_dwi.nii.gz", n="1 2 3"),
            *each("sub-{n}/func/sub-{n}_task-x_bold.nii.gz", n="1 3"),
            *each(
                "sub-{n}/func/sub-{n}_task-x_bold.{w}.nii",
                n="1 2",
                w="dtseries dscalar dlabel ptseries",
            ),
            *each("sub-{n}/dwi/sub-{n}_dwi.{w}", n="1 2 3", w="png svg jpg tif"),
            *each("sub-{n}/anat/sub-{n}_hemi-{h}_dwi.{w}.gii", n="2", h="L R", w="surf shape"),
        ],
        {"dwi": Scalar(suffix="dwi"), "bold": Scalar(suffix="bold", required=False)},
        {"dwi": r"_dwi\.nii\.gz$", "bold": r"_bold\.nii\.gz$"},
    ),
    "structures in the name of a subject": Case(
        [
            *each("sub-{n}/anat/sub-{n}_T1w.nii.gz", n="01 02"),
            *each(
                "derivatives/fs/sub-{n}/label/sub-{n}.{w}_exvivo.nii.gz",
                n="01 02",
                w="BA1 BA2 BA44 MT V1 V2",
            ),
            *each("derivatives/fs/sub-{n}.{w}_exvivo.thresh/lh.nii.gz", n="01 02", w="BA1 V1"),
        ],
        {
            "t1": Scalar("sub-*/anat/*_T1w.nii.gz"),
            **{
                w.lower(): Scalar(f"derivatives/**/*.{w}_exvivo.nii.gz", required=False)
                for w in STRUCTURES
            },
            "thresh": Scalar("derivatives/**/lh.nii.gz", required=False),
        },
        {
            "t1": r"_T1w\.nii\.gz$",
            "thresh": r"/lh\.nii\.gz$",
            **{w.lower(): rf"\.{w}_exvivo\.nii\.gz$" for w in STRUCTURES},
        },
        r"(sub-\d+)/",
        required=("t1",),
    ),
    "notes of macOS, capitals and links": Case(
        [
            *each("sub-{n}/anat/sub-{n}_T1w.{w}", n="1", w="NII.GZ"),
            *each("sub-{n}/anat/sub-{n}_T1w.{w}", n="2", w="NII"),
            *each("sub-{n}/anat/sub-{n}_T1w.{w}", n="3", w="nii"),
            *each("sub-{n}/anat/._sub-{n}_T1w.{w}", n="1 2 6", w="NII nii.gz"),
        ],
        {"t1": Scalar(suffix="T1w")},
        {"t1": r"(?i)_T1w\.nii(\.gz)?$"},
        others={
            "sub-4/anat/sub-4_T1w.nii.gz": "../../sub-1/anat/sub-1_T1w.NII.GZ",
            "sub-5/sub-5_T1w.nii": b"cut",
        },
        useless=r"/\._|sub-5_",
    ),
}


def compare(case: Case, listing: list[str], selection: Selection) -> None:
    """Compare a selection with the oracle's."""
    units, out = case.expected(listing)
    rows = [{f.path for several in row.images.values() for f in several} for row in selection.rows]
    assert sorted(map(sorted, rows)) == sorted(map(sorted, units.values()))
    found = Counter(dict.fromkeys(selection.images, 0))
    for row in selection.rows:
        for name, several in row.images.items():
            assert all(case.image(file.path) == name for file in several)
            found[name] += len(several)
    assert +found == Counter(case.image(path) for paths in units.values() for path in paths)
    skipped = {entry.unit for entry in selection.skipped}
    whole = skipped - out
    assert not whole & set(listing)
    for path in out - skipped:
        # Not itself, but its unit: that of the folders which it lies in.
        own = re.search(case.unit, path)
        assert own is not None, path
        assert whole & {"_".join(own.groups()), own[1]}, path
    for name in whole:
        assert not any(name in {"_".join(unit), unit[0]} for unit in units), name
    assert all(entry.reason for entry in selection.skipped)


@pytest.mark.parametrize("name", CASES)
def test_repository_is_selected_as_git_lists_it(name: str, tmp_path: Path) -> None:
    """Units, files of each image and what is skipped, in any order of files and images."""
    case = CASES[name]
    listing = commit(tmp_path / "repo", {**dict.fromkeys(case.paths, ANNEXED), **case.others})
    files = index_tree(tmp_path / "repo", "main")
    orders = itertools.permutations(case.images) if len(case.images or "123456") < 6 else [None]
    for order in orders:
        asked = {n: case.images[n] for n in order} if order and case.images else case.images
        compare(case, listing, select(files, asked, **case.options))
        compare(case, listing, select(files[::-1], asked, **case.options))
    said = everything(files)
    assert not said or re.search(ADVICE, said)
    complete = select(files, None, **ALL)
    manual = {n for n, pattern in complete.images.items() if isinstance(pattern, Label)}
    assert manual == {
        re.sub(r".*/sub-\d_|\.nii\.gz", "", p)
        for p in listing
        if re.search("derivatives/(manual|m)/", p)
        for p in [re.sub(r"ses-[^_/]+_", "", p)]
    }


def everything(files: list[TreeFile]) -> str:
    """Return what images=None says where it cannot construct, in under 500 characters."""
    said = ""
    try:
        select(files, None)
    except tno.SelectionError as error:
        said = str(error)
    assert len(said) < 500
    return said


@pytest.mark.parametrize("option", [{"when_missing": "zeros"}, {"required": False}, {}])
def test_labels_in_folders_of_no_subject_are_counted(
    option: dict[str, object], tmp_path: Path
) -> None:
    """The error says how many there are, as git does, and what their folders are."""
    images = each("sub-C{n}/anat/sub-C{n}_T1w.nii.gz", n="1 2 3 4")
    labels = each("derivatives/lesions/subject_C{n}/lesion.nii.gz", n="1 2 3 4")
    listing = commit(tmp_path / "repo", dict.fromkeys([*images, *labels], ANNEXED))
    files = index_tree(tmp_path / "repo", "main")
    asked = {"t1": Scalar(suffix="T1w"), "lesion": Label("derivatives/**/lesion.nii.gz", **option)}
    count = len([path for path in listing if re.search(r"/lesion\.nii\.gz$", path)])
    with pytest.raises(tno.SelectionError, match=rf"\b{count} files.*folder is subject_C1"):
        select(files, asked, on_incomplete="allow")
    assert not everything(files)


def test_plain_folder_with_links_is_selected_as_it_is_walked(tmp_path: Path) -> None:
    """Folders behind links are read, circles and links to nothing are not."""
    folder, elsewhere = tmp_path / "plain", tmp_path / "elsewhere"
    names = [
        *each("sub-{n}/anat/sub-{n}_{w}.nii.gz", n="1 2 3 4", w="T1w"),
        *each("sub-{n}/anat/sub-{n}_{w}.nii.gz", n="1 3", w="FLAIR"),
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_content(heads(1)["sub-01/anat/sub-01_T1w.nii.gz"], folder / name)
    (folder / "dataset_description.json").write_text('{"Name": "Plain", "BIDSVersion": "1.10.0"}')
    elsewhere.mkdir()
    for linked in ("sub-2", "sub-3/anat"):
        target = elsewhere / linked.replace("/", "_")
        (folder / linked).rename(target)
        (folder / linked).symlink_to(target)
    (folder / "sub-1/again").symlink_to(folder)
    for broken in ("sub-5/anat/sub-5_T1w.nii.gz", "sub-4/anat/sub-4_FLAIR.nii.gz"):
        (folder / broken).parent.mkdir(parents=True, exist_ok=True)
        (folder / broken).symlink_to(tmp_path / "nowhere.nii.gz")
    case = Case(
        [],
        None,
        {"t1": r"_T1w\.", "flair": r"_FLAIR\."},
        r"^(sub-\d)/",
        required=("t1",),
        useless=r"sub-5|sub-4.*FLAIR",
    )
    walked: list[str] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [each for each in folders if each != "again"]
        walked += [Path(parent, file).relative_to(folder).as_posix() for file in files]
    units, out = case.expected(walked)
    assert len(units) == 3
    images = {"t1": tno.Scalar(suffix="T1w"), "flair": tno.Scalar(suffix="FLAIR", required=False)}
    with tno.DataladSubjectsDataset(folder, images, on_incomplete="allow") as dataset:
        found = Counter(name for s in dataset.dry_iter() for name in s.get_images_dict(False))
        expected = Counter(case.image(path) for paths in units.values() for path in paths)
        assert found == expected
        assert [s.subject_id for s in dataset.dry_iter()] == sorted(unit[0] for unit in units)
        assert {s.unit for s in dataset.skipped} == {"sub-4", "sub-5"}
        assert all(any(s.unit in path for path in out) for s in dataset.skipped)
    with tno.DataladSubjectsDataset(folder, on_incomplete="allow") as dataset:
        assert len(dataset) == 3
    with pytest.raises(tno.SelectionError, match="on_incomplete='allow'") as error:
        tno.DataladSubjectsDataset(folder)
    assert len(str(error.value)) < 500


PARTICIPANTS = """participant_id \tage  \tname\thistory\tt1\tparticipant_t1\tsite.name\tsubject_id
sub-01\t31\tAnna\tnone known\tyes\tmaybe\tZ\t7
sub-02\t32\tBo\tn/a\tno\tnever\tB\t8
sub-3.5\t33\tCy\tlong\tyes\tsometimes\tB\t9
"""
SESSIONS = """session_id\tsubject_id \tscore  \tage
ses-a\tX{0}\t{0}1\t4{0}
ses-b\tX{0}\t{0}2\t5{0}
"""


def cells(text: str) -> list[dict[str, str]]:
    """Return a table's rows, as the oracle reads them."""
    header, *rows = [[cell.strip() for cell in line.split("\t")] for line in text.splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_tables_of_a_repository_keep_every_value(tmp_path: Path) -> None:
    """Ids inside a session's table, spaces, dots, names that are reserved, and those of images."""
    paths = [
        *each("sub-{n}/ses-{s}/anat/sub-{n}_ses-{s}_T1w.nii.gz", n="01 02", s="a b"),
        "sub-3.5/ses-a/anat/sub-3.5_ses-a_T1w.nii.gz",
    ]
    volume = tmp_path / "head.nii.gz"
    write_content(heads(1)["sub-01/anat/sub-01_T1w.nii.gz"], volume)
    tables = {f"sub-0{n}/sub-0{n}_sessions.tsv": SESSIONS.format(n) for n in (1, 2)}
    tables["participants.tsv"] = PARTICIPANTS
    listing = commit(
        tmp_path / "repo",
        {**dict.fromkeys(paths, volume.read_bytes()), **{k: v.encode() for k, v in tables.items()}},
    )
    units = {m.groups() for path in listing if (m := re.match("(sub-[^/]+)/(ses-[^/]+)/", path))}
    main = {row["participant_id"]: row for row in cells(PARTICIPANTS)}
    own = {
        (path.partition("/")[0], row["session_id"]): row
        for path, text in tables.items()
        if path != "participants.tsv"
        for row in cells(text)
    }
    images = {"t1": tno.Scalar(suffix="T1w")}
    with pytest.warns(UserWarning, match=r"participants\.tsv"):
        dataset = tno.DataladSubjectsDataset(tmp_path / "repo", images, unit="session")
    with dataset:
        subjects = {(s.subject_id, s.session_id): s for s in dataset.dry_iter()}
        assert subjects.keys() == units
        for (subject, session), found in subjects.items():
            held = Counter(
                str(int(v)) if isinstance(v, float) else v
                for v in found.values()
                if isinstance(v, str) or (isinstance(v, float) and not isnan(v))
            )
            row, more = main[subject], own.get((subject, session), {})
            given = [v for k, v in row.items() if v != "n/a" and k != "participant_id"]
            given += [v for k, v in more.items() if k != "session_id"]
            assert not Counter(given) - held
            assert found["score"] == int(more["score"]) if more else isnan(found["score"])
            assert found["age"] == int(more.get("age", row["age"]))
            assert found["site.name"] == row["site.name"]
    everything(index_tree(tmp_path / "repo", "main"))
    with pytest.warns(UserWarning, match=r"participants\.tsv"):
        tno.DataladSubjectsDataset(tmp_path / "repo", unit="session").close()


def test_guessed_image_without_a_subject_is_nobodys() -> None:
    """One subject's label does not become everybody's for want of a name."""
    paths = [*each("sub-{n}/anat/sub-{n}_T1w.nii.gz", n="C1 C2")]
    labels = [*each("derivatives/lesions/subject_{n}/lesion.nii.gz", n="C1 C2")]
    files = [TreeFile(path, "", None, 10**6) for path in (*paths, *labels)]
    selection = select(files, None)
    used = [file.path for row in selection.rows for found in row.images.values() for file in found]
    assert used == paths
    assert sorted(entry.unit for entry in selection.skipped) == labels
