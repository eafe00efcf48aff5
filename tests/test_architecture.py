"""The house rules that a reader relies on, read from the source with ``ast``."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tio_openneuro"
# Bottom to top: a module imports only from lines above its own, or from its own line.
LAYERS = [
    "errors sizes keys statistics positions progress environment",
    "eviction",
    "processes",
    "content",
    "annex_branch annex_index annex_messages annex_transfer annex_pool annex",
    "openneuro_remotes openneuro_clone openneuro",
    "root owners ledger_schema ledger_db ledger_requests ledger_keeping ledger",
    "bids participants patterns joining grouping selection splits split_files",
    "prepared_file prepared_repo",
    "flights store prefetch runtime bulk keeping audit engine",
    "catalog summary",
    "machine memory allocator headers reader in_place image randomness sampler_maps",
    "pinning prepared_images prepared",
    "subjects",
    "batching dividing",
    "dataset",
    "concatenation",
    "shuffle identity subject_order schedule passes queue_state",
    "costs cropping production workers buffer filling queue_checks queue_view queue",
    "plan",
    "loopback",
    "__init__",
    "demo",
    "cli",
]
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
MODULES = sorted(PACKAGE.rglob("*.py"), key=str)


def part_of(path: Path) -> str:
    """Return the module or subpackage that stands in ``LAYERS``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a module imports, type-checking blocks included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_to_its_place(path: Path) -> None:
    """Each module has a layer, imports go down, each tool has one user, 400 lines at most."""
    part, names = part_of(path), imports_of(path)
    ours = {name.split(".")[1] for name in names if name.startswith("tio_openneuro.")}
    upwards = {name for name in ours if LEVEL.get(name, 0) > LEVEL[part]}
    assert not upwards, f"{part} imports upwards: {upwards}"
    tops = {name.split(".")[0] for name in names}
    assert "subprocess" not in tops or part == "processes"
    assert "sqlite3" not in tops or part.startswith("ledger")
    assert not tops & {"torch", "torchio"} or LEVEL[part] >= LEVEL["image"]
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or path.name.startswith("cli")
    assert len(path.read_text().splitlines()) <= 400
