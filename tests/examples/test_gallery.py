"""Every example of the gallery runs as it stands, offline, and its page shows what it prints."""

import ast
import re
from pathlib import Path

import gallery
import pytest
from conftest import SHARED
from faulty import LoopbackOpenNeuro
from gallery import EXAMPLES, GALLERY, Example, run, run_notebook, shown_last, words_of

PAGE = (EXAMPLES / "README.md").read_text()
SCRIPTS = sorted(EXAMPLES.glob("[0-9]*.py"))
MOST_LINES = 120
HEADS = SHARED / "heads"
HEADS_IMAGE = "sub-*/anat/*_T1w.nii.gz"
HEADS_LABEL = "derivatives/labels/sub-*/anat/*_dseg.nii.gz"


def shown(example: str) -> str:
    """Return what the page says that an example prints."""
    section = rf"\n## {example[:2]} [^#]*\({example}\.(?:py|ipynb)\)[^#]*?```text\n(.*?)```"
    block = re.search(section, PAGE, re.DOTALL)
    assert block is not None, f"examples/README.md shows nothing of {example}"
    return block[1]


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("example", GALLERY, ids=lambda example: example.name[:2])
def test_example_prints_what_its_page_shows(example: Example, tmp_path: Path) -> None:
    """It ends by asserting its claim; the page shows the same lines, their numbers aside."""
    for module in ("lightning", "monai"):
        if module in example.name:
            pytest.importorskip(module)
    printed = run(example.command("--root", tmp_path / "r"), tmp_path)
    last, promised = words_of(printed)[-1], words_of(shown(example.name))
    assert last == promised[-1]
    # Lightning draws its bars as the terminal is wide, and ranks speak when they get to it.
    if example.name[:2] not in {"03", "04", "09"}:
        assert words_of(printed) == promised


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem[:2])
def test_example_is_short_and_whole(script: Path) -> None:
    """It stands alone: at most 120 lines, the public door, a last assertion, ``--dataset``."""
    text = script.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert f"({script.name})" in PAGE
    tree = ast.parse(text)
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name and name.startswith("tio_openneuro")
    }
    assert imported == {"tio_openneuro"}
    (main,) = [each for each in tree.body if getattr(each, "name", "") == "main"]
    assert any(isinstance(node, ast.Assert) for node in ast.walk(main))
    assert '"--dataset"' in text
    assert text.index("Shows:") < text.index("Fetches:") < text.index("Takes:")


@pytest.mark.usefixtures("stand_ins")
def test_the_unit_without_a_lesion_is_named(tmp_path: Path) -> None:
    """The first example says whom it leaves out, and why."""
    options = ("--disk-budget", "2 MB", "--patch-size", "16", "--epochs", "1", "--patches", "1")
    printed = run(Example(GALLERY[0].name, options).command("--root", tmp_path / "r"), tmp_path)
    assert f"unit='{gallery.WITHOUT_LESION}'" in printed
    assert "no file for 'label'" in printed


@pytest.mark.skipif(not HEADS.is_dir(), reason=f"NOT TESTED ON REAL HEADS: no {HEADS}")
def test_example_trains_on_the_seven_heads(openneuro: LoopbackOpenNeuro, tmp_path: Path) -> None:
    """sub-04 has no T1w and is named with its reason; the six others are used."""
    openneuro.publish_folder("ds900007", HEADS)
    own = ("--dataset", openneuro.url("ds900007"), "--image", HEADS_IMAGE, "--label", HEADS_LABEL)
    small = ("--spacing", "4", "--disk-budget", "20 MB", "--epochs", "1", "--patches", "2")
    example = Example(GALLERY[0].name, (*own, *small, "--patch-size", "16"))
    printed = run(example.command("--root", tmp_path / "r"), tmp_path)
    assert "Skipped(unit='sub-04', reason=\"no file for 'image'" in printed
    assert printed.splitlines()[-1].endswith("6 subjects used.")


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_the_notebook_runs_and_its_line_is_renewed(tmp_path: Path) -> None:
    """Every cell runs in a real kernel; one subject is drawn, the board ends at the last patch."""
    pytest.importorskip("nbclient")
    outputs = run_notebook(tmp_path)
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    told = shown_last(outputs)
    assert re.search(r"epoch 1 .* 22 of 22 patches", told)
    first_words = [
        [line.split()[0] for line in text.splitlines()] for text in (told, shown("12_notebook"))
    ]
    assert first_words[0][:-1] == first_words[1][:-1]
    assert "<html" in (tmp_path / "run.html").read_text()
