"""The report of a run: its figures, what it says of datasets, and how a browser shows it.

Real: a queue over a loopback OpenNeuro, headless Chromium where there is one.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from html import unescape
from pathlib import Path

import pytest
import torch
import torchio as tio
from conftest import SHARED, heads
from faulty import LoopbackOpenNeuro

import tio_openneuro as tno
from tio_openneuro.sizes import format_size
from tio_openneuro.sources import open_catalog
from tio_openneuro.watch.citing import describe

ACCESSION = "ds900170"
DATA = Path(os.environ.get("TIO_OPENNEURO_TEST_DATA", SHARED))
BUNDLES = sorted((DATA / "openneuro").glob("*.bundle"))
DESCRIPTION = {
    "Name": "Heads & <b>tails</b>",
    "License": "CC0",
    "Authors": ["Ada Lovelace", "Grace Hopper"],
    "DatasetDOI": "doi:10.18112/openneuro.ds900170.v1.0.0",
    "HowToAcknowledge": "<script>document.title = 'mine'</script><img src=https://example.org/x>",
    "ReferencesAndLinks": ["n/a", {"no": "text"}, None, "A paper."],
}
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


@pytest.fixture(scope="session")
def _heads(_published: LoopbackOpenNeuro) -> None:
    files = {**heads(6, shape=(40, 36, 32)), "dataset_description.json": json.dumps(DESCRIPTION)}
    del files["sub-03/anat/sub-03_T1w.nii.gz"]
    _published.publish(ACCESSION, files)


@pytest.fixture
def queue(_heads: None, openneuro: LoopbackOpenNeuro) -> Iterator[tno.BudgetedQueue]:
    """Return a queue that gave two epochs and a half, half of the dataset on disk at a time."""
    images = {
        "t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz"),
        "lesion": tno.Label("sub-*/anat/*_label-lesion_mask.nii.gz"),
    }
    transform = tio.Compose([tio.ZNormalization(), tio.RandomFlip()])
    with (
        tno.DataladSubjectsDataset(
            ACCESSION, images, disk_budget="150 kB", transform=transform
        ) as dataset,
        tno.BudgetedQueue(dataset, 8, 4, tio.UniformSampler(8), num_workers=2, seed=0) as queue,
    ):
        for _ in range(2):
            assert sum(1 for _ in queue) == 20
        for index in range(10):
            assert queue[index]
        yield queue
    del openneuro


def figures_of(page: str) -> dict[str, str]:
    """Return the figures that a report has, by whose they are and their names."""
    return dict(re.findall(r'<span data-figure="([\w.]+)">([^<]*)</span>', page))


def rows_of(page: str, title: str) -> list[list[str]]:
    """Return the cells of the table under a heading."""
    section = page.split(f"<h2>{title}</h2>")[1].split("<h2>", maxsplit=1)[0]
    found = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]
    return [row for row in found if row]


def test_every_figure_is_one_that_statistics_tells(
    queue: tno.BudgetedQueue, tmp_path: Path
) -> None:
    """All of them, of the queue and of the dataset; also in the cards, for people."""
    dataset = queue.subjects_dataset
    queue.close()
    dataset.close()
    page = tno.report(queue, tmp_path / "new" / "run.html").read_text("utf-8")
    told = {"queue": queue.statistics(), "dataset": dataset.statistics()}
    assert figures_of(page) == {
        f"{of}.{name}": str(value)
        for of, statistics in told.items()
        for name, value in asdict(statistics).items()
    }
    assert told["queue"].patches == 50
    assert told["dataset"].evicted_files > 0
    assert min(told["dataset"].fetch_s, told["queue"].decode_s, told["queue"].transform_s) > 0
    cards = page.split('<div class="cards">')[1].split("<p>")[0]
    for size_bytes in (told["dataset"].fetched_bytes, told["queue"].ram_peak_bytes):
        assert f"<b>{format_size(size_bytes)}</b>" in cards
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["run.html"]


def test_epochs_add_up_and_keep_above_the_floor(queue: tno.BudgetedQueue, tmp_path: Path) -> None:
    """The first fetches everything, later ones what does not fit; the last is under way."""
    dataset = queue.subjects_dataset
    begins = [reading.disk.fetched_bytes for reading in queue.record.epochs.readings()]
    rows = rows_of(tno.report(queue, tmp_path / "run.html").read_text("utf-8"), "Bytes per epoch")
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert [row[1] for row in rows[:2]] == [
        format_size(begins[1]),
        format_size(begins[2] - begins[1]),
    ]
    assert begins[2] >= 2 * dataset.nbytes - dataset.statistics().budget_bytes
    later = format_size(dataset.nbytes - dataset.statistics().budget_bytes)
    assert [row[2] for row in rows] == [format_size(dataset.nbytes), later, later]


def test_what_a_dataset_says_is_shown_and_not_believed(
    queue: tno.BudgetedQueue, tmp_path: Path
) -> None:
    """Licence, citation, commit and who is skipped why; markup of theirs stays text."""
    page = tno.report(queue, tmp_path / "run.html").read_text("utf-8")
    text = unescape(re.sub(r"<[^>]+>", "\n", page))
    assert "<script" not in page
    assert "<img" not in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert f"{ACCESSION}: Heads & <b>tails</b>" in text
    assert f"1.0.0, commit {queue.subjects_dataset.version}" in text
    cited = "Ada Lovelace; Grace Hopper. Heads & <b>tails</b>. OpenNeuro, ds900170 1.0.0 [dataset]"
    assert f"{cited}. doi:10.18112/openneuro.ds900170.v1.0.0" in text
    assert {"CC0", DESCRIPTION["HowToAcknowledge"], "A paper."} <= set(text.split("\n"))
    assert rows_of(page, "Skipped subjects") == [["no file for &#x27;t1&#x27;", "1", "sub-03"]]


def test_a_queue_over_subjects_in_ram_has_a_report_too(tmp_path: Path) -> None:
    """Nothing is fetched there: no disk, no epochs' bytes, no dataset; before any patch, too."""
    image = tio.ScalarImage(tensor=torch.zeros(1, 16, 16, 16))
    dataset = tio.SubjectsDataset([tio.Subject(t1=image)])
    with tno.BudgetedQueue(dataset, 4, 4, tio.UniformSampler(8), start_background=False) as queue:
        before = tno.report(queue, tmp_path / "run.html").read_text("utf-8")
        assert "SubjectsDataset: 0 patches of 1 subjects" in before
        assert sum(1 for _ in queue) == 4
        page = tno.report(queue, str(tmp_path / "run.html")).read_text("utf-8")
    assert "SubjectsDataset: 4 patches of 1 subjects" in page
    assert figures_of(page)["queue.patches"] == "4"
    assert 'aria-label="Disk held"' not in page
    assert 'aria-label="RAM held"' in page
    assert rows_of(page, "Bytes per epoch") == []


@pytest.mark.usefixtures("_heads", "openneuro")
def test_each_of_several_datasets_is_cited(tmp_path: Path) -> None:
    """A concatenation names both, each with its own commit, licence or the lack of one."""
    images = {"t1": tno.Scalar("sub-*/anat/*_T1w.nii.gz")}
    with (
        tno.DataladSubjectsDataset("ds900001", images, disk_budget="1 GB") as one,
        tno.DataladSubjectsDataset(ACCESSION, images, disk_budget="1 GB") as other,
        tno.BudgetedQueue(
            tno.concat([one, other]), 4, 1, tio.UniformSampler(8), num_workers=0
        ) as queue,
    ):
        page = tno.report(queue, tmp_path / "run.html").read_text("utf-8")
    for dataset in (one, other):
        assert f"commit {dataset.version}" in page
    assert "not stated: ask its authors" in page
    assert "<dd>CC0</dd>" in page


@pytest.mark.skipif(not BUNDLES, reason=f"NOT TESTED ON REAL DATA: no bundles in {DATA}")
@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.stem)
def test_real_datasets_tell_licence_and_citation(bundle: Path, tmp_path: Path) -> None:
    """Each of the bundled OpenNeuro datasets has a licence, a title and a way to be cited."""
    told = dict(describe(open_catalog(str(bundle), tmp_path / "root")))
    assert told["licence"] in {"CC0", "PDDL"}
    assert "without a title" not in told["dataset"]
    assert re.search(
        r"\. OpenNeuro, .*\[dataset\]\. (doi:10\.18112/|commit [0-9a-f]{40})", told["cite"]
    )


def browser() -> str | None:
    """Return a browser's path, where one is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(browser() is None, reason=f"NOT TESTED IN A BROWSER: none of {BROWSERS}")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 375])
def test_a_browser_shows_it_without_network_or_complaint(
    queue: tno.BudgetedQueue, tmp_path: Path, scheme: str, width: int
) -> None:
    """Console empty, nothing asked for, no sideways scrolling, readable text in either scheme."""
    playwright = pytest.importorskip("playwright.sync_api", reason="NOT TESTED IN A BROWSER")
    path = tno.report(queue, tmp_path / "run.html")
    queue.close()
    said: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        told = page.evaluate(_LOOK)
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        opened.close()
    assert said == []
    assert asked == [path.as_uri()]
    assert told["title"].startswith(ACCESSION)
    assert told["sideways"] <= 0
    assert told["contrast"] >= 4.5  # WCAG 2.2, 1.4.3.
    assert told["dark"] == (scheme == "dark")
    assert told["smallest"] >= 12
    assert told["drawn"] == 7


_LOOK = """() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(
      v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    const colour = getComputedStyle(node).backgroundColor;
    return /, 0\\)$/.test(colour) && node.parentElement ? ground(node.parentElement) : colour;
  };
  const texts = [...document.querySelectorAll("body *")].filter(
    node => [...node.childNodes].some(one => one.nodeType == 3 && one.data.trim()));
  const contrast = node => {
    const two = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a);
    return (two[0] + 0.05) / (two[1] + 0.05);
  };
  const root = document.documentElement;
  return {
    title: document.title,
    sideways: root.scrollWidth - root.clientWidth,
    contrast: Math.min(...texts.map(contrast)),
    smallest: Math.min(...texts.map(node => parseFloat(getComputedStyle(node).fontSize))),
    dark: light(ground(document.body)) < 0.2,
    drawn: [...document.querySelectorAll("svg .area")].filter(
      area => area.getBoundingClientRect().width > 0.9 * area.parentElement.clientWidth).length,
  };
}"""
