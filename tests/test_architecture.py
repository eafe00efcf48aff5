"""The house rules that a reader relies on, read from the source with ``ast``."""

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest
from torchio_names import ROOTS, private_names

PACKAGE = Path(__file__).parent.parent / "tio_openneuro"
# Bottom to top: a room imports only from lines above its own, and only what their doors list.
ROOMS = [
    "bounds closing content display errors forks recording roots sizes",
    "annex",
    "sources",
    "ledger",
    "disk",
    "select",
    "volumes",
    "ram",
    "torchio_seams",
    "prepared",
    "dataset",
    "queue",
    "watch",
    "plan",
    "loopback",
    "demo",
    "cli",
]
LEVEL = {name: level for level, line in enumerate(ROOMS) for name in line.split()}
MODULES = sorted(PACKAGE.rglob("*.py"), key=str)
MOST_MODULES, MOST_LINES = 9, 300
# Rooms of more modules, and modules of more lines, each with its reason.
LARGER: dict[str, str] = {
    "disk/store.py": "whose a file is decides what is fetched, counted and dropped: one story",
}


def room_of(path: Path) -> str:
    """Return the room, or the leaf, that a module belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> list[tuple[str, str]]:
    """Return module and name of each import, type-checking blocks included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def door_of(room: str) -> set[str]:
    """Return the names that a room's ``__init__.py`` lists in ``__all__``."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    listed = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(ast.literal_eval(next(listed)))


def lines_of_code(path: Path) -> int:
    """Return the lines that are neither blank, comment nor docstring."""
    text = path.read_text()
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(
        1
        for number, line in lines
        if line.strip() and not line.lstrip().startswith("#") and number not in documented
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_to_its_room(path: Path) -> None:
    """Imports go down and through doors, each tool has one user, no pickle is read, 300 lines."""
    room, imports = room_of(path), imports_of(path)
    for module, name in imports:
        top, _, rest = module.partition(".")
        if top != "tio_openneuro" or room == "__init__" or not rest:
            continue
        other, _, inner = rest.partition(".")
        assert LEVEL[other] <= LEVEL[room], f"{room} imports upwards: {module}"
        if other != room and (PACKAGE / other).is_dir():
            assert not inner, f"{room} enters {module} beside its door"
            assert name in door_of(other), f"{other} has no {name} at its door"
    tops = {module.split(".")[0] for module, _ in imports}
    assert "subprocess" not in tops or room == "annex"
    assert "sqlite3" not in tops or room == "ledger"
    assert not tops & {"torch", "torchio"} or LEVEL[room] > LEVEL["select"]
    assert not tops & {"shelve", "marshal", "joblib", "dill", "cloudpickle"}
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    assert not called & {"pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "np.load"}
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or room == "cli"
    assert lines_of_code(path) <= MOST_LINES or str(path.relative_to(PACKAGE)) in LARGER


def is_torchios(cls: type) -> bool:
    """Return whether a class, or one that it is mixed into, is a child of one of TorchIO's."""
    waiting = list(ROOTS)
    while waiting:
        found = waiting.pop()
        if found.__module__.startswith("tio_openneuro.") and cls in found.__mro__:
            return True
        waiting += found.__subclasses__()
    return False


def private_accesses(path: Path) -> set[str]:
    """Return the private names that a module touches, but for a class's own ``self``."""
    module = importlib.import_module(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    )
    tree = ast.parse(path.read_text())
    own: set[ast.AST] = set()
    touched: set[str] = set()
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        if is_torchios(getattr(module, cls.name)):
            touched |= {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
            continue
        for node in ast.walk(cls):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                own |= {node} if node.value.id == "self" else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in own:
            touched.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            touched.add(node.value)
    return touched


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if room_of(path) != "torchio_seams"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_torchios_private_names_stay_in_the_seams(path: Path) -> None:
    """No other room touches or defines one, also by text; other classes' own ``self`` aside."""
    importlib.import_module("tio_openneuro.cli")
    assert private_accesses(path) & private_names() == set()


def test_rooms_are_small() -> None:
    """A room has nine modules at most, and a door that says what it owns."""
    rooms = Counter(room_of(path) for path in MODULES if path.name != "__init__.py")
    large = {room for room, count in rooms.items() if count > MOST_MODULES}
    assert large - LARGER.keys() == set()
    for room in rooms:
        if (PACKAGE / room).is_dir():
            said = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
            assert said is not None
            assert said.count("\n") >= 3


def test_a_door_lists_only_what_is_used() -> None:
    """Each name at a door is imported by another room, or is the public one of the package."""
    used = {
        (module.partition(".")[2], name)
        for path in MODULES
        for module, name in imports_of(path)
        if module.startswith("tio_openneuro.")
    }
    public = {name for _, name in imports_of(PACKAGE / "__init__.py")} | {"main"}
    rooms = {room_of(path) for path in MODULES if (PACKAGE / room_of(path)).is_dir()}
    for room in sorted(rooms):
        idle = {name for name in door_of(room) if (room, name) not in used} - public
        assert not idle, f"{room}'s door lists what no room uses: {idle}"
