"""Imports only go down: each room may import itself and the rooms below it."""

import ast
from pathlib import Path

import search_r3_jax

PACKAGE = Path(search_r3_jax.__file__).parent

# From the top down; rooms on one line do not know each other.
ORDER = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"quickstart", "planning"},
    {"training"},
    {"evaluation"},
    {"retrieval"},
    {"data"},
    {"embedder"},
    {"rollout"},
    {"hub"},
    {"text"},
    {"models"},
    {"objectives"},
    {"configs"},
    {"mesh", "distributed", "compiler"},
    {"config", "chips"},
    {"cluster", "console", "files", "quiet"},
    {"errors"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imported_rooms(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {room_of(module) for module in modules if module.startswith("search_r3_jax.")}


def files_of_rooms() -> list[tuple[str, Path]]:
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    return [(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file) for file in files]


def test_every_room_has_a_place():
    assert {room for room, _ in files_of_rooms()} == set(LEVEL)


def test_imports_only_go_down():
    upward = [
        f"{file.relative_to(PACKAGE)} imports {room}"
        for own, file in files_of_rooms()
        for room in imported_rooms(file)
        if room != own and LEVEL[room] <= LEVEL[own]
    ]
    assert upward == []


def test_objectives_know_no_model_and_config_knows_no_jax():
    for _, file in ((room, file) for room, file in files_of_rooms() if room == "objectives"):
        assert imported_rooms(file) <= {"objectives"}
    for file in (PACKAGE / "config.py", PACKAGE / "cluster.py", PACKAGE / "errors.py", PACKAGE / "files.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any(name.split(".")[0] in {"jax", "flax", "optax"} for name in names)
