"""What is said of the public names: an example of each that runs, and pages that can be built."""

import doctest
import html
import re
from pathlib import Path

import pages
import pytest

import tio_openneuro as tno


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", tno.__all__)
def test_public_name_has_an_example_that_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in the docstring, is whole, and prints what it says."""
    monkeypatch.chdir(tmp_path)
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(tno, name), name, globs={})
    assert "tio_openneuro as tno" in found.examples[0].source
    assert not any(doctest.SKIP in each.options for each in found.examples)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=said.append)
    assert not said, "".join(said)


def test_the_pages_show_every_public_name(tmp_path: Path) -> None:
    """Pdoc makes them without a warning; each name has its anchor and its example there."""
    page = html.unescape(pages.build(tmp_path).read_text())
    for name in tno.__all__:
        assert f'<section id="{name}">' in page
    text = re.sub(r"<[^>]+>", "", page)
    assert text.count("import tio_openneuro as tno") >= len(tno.__all__)
