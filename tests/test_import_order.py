"""Imports only go down: each room may import itself and the rooms below it; no file is in a circle."""

import ast
from pathlib import Path

import search_r3_jax

PACKAGE = Path(search_r3_jax.__file__).parent
ROOT = "search_r3_jax"

# From the top down; rooms on one line do not know each other.
ORDER = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"quickstart", "planning"},
    {"training"},
    {"evaluation"},
    {"retrieval.environment", "retrieval.indexer", "retrieval.mining"},
    {"retrieval.store"},
    {"retrieval.index"},
    {"data"},
    {"embedder"},
    {"rollout"},
    {"hub"},
    {"text"},
    {"models"},
    {"objectives"},
    {"configs", "distributed.lockstep"},
    {"mesh", "distributed.runtime", "compiler", "compile_cache", "compile_time", "profiling"},
    {"distributed.peers"},
    {"config", "chips", "vectors", "precision"},
    {"outputs"},
    {"lease"},
    {"distributed.spec", "console", "files", "lines", "runtime_env", "extras"},
    {"errors", "pace"},
    # The package itself: its version.
    {""},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def module_of(file: Path) -> str:
    """`search_r3_jax.models.decoder` for models/decoder.py; a package for its `__init__.py`."""
    parts = [*file.relative_to(PACKAGE.parent).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of `ORDER` that a module is in."""
    path = module.removeprefix(ROOT).removeprefix(".")
    while path and path not in LEVEL:
        path = path.rpartition(".")[0]
    return path


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(file: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, `from search_r3_jax import …` included."""
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == ROOT}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in FILES else str(node.module))
    return found


def test_every_file_has_a_room() -> None:
    # `retrieval` and `distributed` are made of rooms; nothing of them is outside.
    homeless = [
        module for module, file in FILES.items() if not room_of(module) and file.name != "__init__.py"
    ]
    assert homeless == []
    assert {room_of(module) for module in FILES} == set(LEVEL)


def test_imports_only_go_down() -> None:
    # The package hands its two classes of the embedder on.
    upward = [
        f"{module} imports {imported}"
        for module, file in FILES.items()
        if module != ROOT
        for imported in imports_of(file)
        if room_of(imported) != room_of(module) and LEVEL[room_of(imported)] <= LEVEL[room_of(module)]
    ]
    assert upward == []


def test_no_file_is_in_a_circle() -> None:
    graph = {module: imports_of(file) & FILES.keys() for module, file in FILES.items() if module != ROOT}
    # Take away what imports nothing that is left, again and again: what stays is a circle.
    while True:
        free = {module for module, imported in graph.items() if not imported & graph.keys() - {module}}
        if not free:
            break
        graph = {module: imported for module, imported in graph.items() if module not in free}
    assert sorted(graph) == []


def test_objectives_know_no_model_and_config_knows_no_jax() -> None:
    for module, file in FILES.items():
        if room_of(module) == "objectives":
            assert {room_of(imported) for imported in imports_of(file)} <= {"objectives", "vectors"}
        if room_of(module) in ("config", "distributed.spec", "errors", "files"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            names = {
                alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
            }
            names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not any(name.split(".")[0] in {"jax", "flax", "optax"} for name in names)
