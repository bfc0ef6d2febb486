"""Imports go one way between folders, and encoding never meets training: read from the syntax."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIRECTION = (  # a folder imports only from folders in lines above its own
    {"models"},
    {"base"},
    {"spec", "storage", "report", "scenes"},
    {"store"},
    {"corpus", "read"},
    {"decode", "upkeep", "runs"},
    {"stage", "evaluate", "convert"},
    {"encode"},
    {"ingest", "train", "segment"},
    {"sweep", "plan", "pretrain", "bench"},
    {"demo"},
    {"jobs"},
)
# The wall: neither side reaches the other. A head is trained without anything that encodes.
ENCODING = {"corpus", "decode", "stage", "encode", "ingest"}
TRAINING = {"read", "runs", "evaluate", "train", "sweep"}
BOTH = {"segment", "plan", "pretrain", "bench", "demo", "jobs"}
WITH_RAY = {
    f"pipeline.{name}"
    for name in (
        *("base.ray_cluster", "encode.actor_pool", "encode.hash_tars", "encode.metrics"),
        *("train.workers", "evaluate.workers", "sweep.run"),
    )
}
WITHOUT_ENGINES = {
    "ray",
    "zarr",
    "numcodecs",
    "pyarrow",
    "fsspec",
    "obstore",
    "webdataset",
    "typer",
}


def name_module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    name_module(path): ast.parse(path.read_text(encoding="utf-8"))
    for package in ("models", "pipeline", "jobs")
    for path in sorted((ROOT / package).rglob("*.py"))
}
FOLDERS = [path.parent for p in ("models", "pipeline", "jobs") for path in (ROOT / p).rglob("*.py")]


def list_imports(tree):
    """Every module imported anywhere in a tree, in functions too; ``from a import b`` as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {module: list_imports(tree) for module, tree in TREES.items()}


def find_room(module):
    """The folder of pipeline that a module is in, or its file there; else its package."""
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "pipeline" and rest else package


ROOMS = {find_room(module) for module in TREES} - {"pipeline"}


def list_floors(module):
    return [floor for floor, rooms in enumerate(DIRECTION) if find_room(module) in rooms]


@cache
def reach(module):
    """The modules of ours that importing ``module`` brings in, however far."""
    found, todo = set(), [module]
    while todo:
        new = (IMPORTS[todo.pop()] & TREES.keys()) - found
        found |= new
        todo += new
    return found


def test_every_folder_has_one_place():
    assert sorted(ROOMS) == sorted(room for rooms in DIRECTION for room in rooms)
    assert ENCODING | TRAINING | BOTH <= ROOMS
    assert set(TREES) >= WITH_RAY


@pytest.mark.parametrize("module", sorted(set(TREES) - {"pipeline"}))
def test_imports_go_down_only(module):
    (floor,) = list_floors(module)
    for name in IMPORTS[module]:
        if name.split(".")[0] == "tests":
            raise AssertionError(f"{module} imports {name}")
        if name in TREES and name != "pipeline" and find_room(name) != find_room(module):
            assert list_floors(name)[0] < floor, f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(m for m in TREES if m.startswith("models")))
def test_models_know_no_engine_and_no_store(module):
    assert not {name.split(".")[0] for name in IMPORTS[module]} & WITHOUT_ENGINES


def test_ray_is_named_in_few_modules():
    found = {m for m, names in IMPORTS.items() if "ray" in {n.split(".")[0] for n in names}}
    assert found == WITH_RAY


@pytest.mark.parametrize(("side", "other"), [(ENCODING, TRAINING), (TRAINING, ENCODING)])
def test_the_wall_between_encoding_and_training(side, other):
    for module in (m for m in TREES if find_room(m) in side):
        assert not {find_room(name) for name in reach(module)} & other, module


def test_only_what_meets_live_sees_both_sides():
    for module in TREES:
        rooms = {find_room(name) for name in reach(module)}
        assert find_room(module) in BOTH or not (rooms & ENCODING and rooms & TRAINING), module


@pytest.mark.parametrize("folder", sorted({str(f.relative_to(ROOT)) for f in FOLDERS}))
def test_a_folders_init_is_a_docstring(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_no_module_has_its_imports_in_a_ring():
    assert not [module for module in TREES if module in reach(module)]
