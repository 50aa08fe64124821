"""The pages: links, the README's length, the map of the package, snippets.

`python tests/test_pages.py --write-map` rewrites the map in `search_r3_jax/README.md` from the docstrings;
without the flag it prints the map.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import PAGES, ROOT, fenced, name_of, prose_of

PACKAGE = ROOT / "search_r3_jax"
ARCHITECTURE = PACKAGE / "README.md"
MAP = re.compile(r"(?<=## Map\n\n```\n).*?(?=```)", re.DOTALL)
README_LINES = 200


# Links


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    counts: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        number = counts.get(slug, 0)
        counts[slug] = number + 1
        anchors.add(f"{slug}-{number}" if number else slug)
    return anchors


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and anchor not in anchors_of(goal)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_all_pages_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)\s#:]+)[^)\s:]*\)", prose_of(page))
        waiting += [(page.parent / target).resolve() for target in targets]
    assert [name_of(page) for page in PAGES if page not in reached] == []


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


# The map


def first_sentence(file: Path) -> str:
    """Of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    text = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"\.(?=\s|$)", text, maxsplit=1)[0]


def package_map() -> str:
    """A line for every file of the package: its path, and the first sentence of its docstring."""
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    # Files of a folder before its folders.
    files.sort(key=lambda file: (file.parent.relative_to(PACKAGE).parts, file.name))
    paths = [str(file.relative_to(PACKAGE)) for file in files]
    width = max(len(path) for path in paths)
    return "".join(
        f"{path:{width}}  {first_sentence(file)}\n" for path, file in zip(paths, files, strict=True)
    )


def test_the_map_is_that_of_the_files() -> None:
    found = MAP.search(ARCHITECTURE.read_text(encoding="utf-8"))
    assert found is not None, "search_r3_jax/README.md: no fenced block under the heading Map"
    expected = package_map()
    if found.group() != expected:
        shown, wanted = found.group().splitlines(), expected.splitlines()
        gone, new = [x for x in shown if x not in wanted], [x for x in wanted if x not in shown]
        lines = [*(f"- {line}" for line in gone), *(f"+ {line}" for line in new)]
        pytest.fail(
            "the map differs; `python tests/test_pages.py --write-map` writes it:\n"
            + "\n".join(lines or ["order"]),
            pytrace=False,
        )


def test_every_file_says_what_it_is_for() -> None:
    assert [str(file) for file in PACKAGE.rglob("*.py") if not first_sentence(file)] == []


# Snippets

SNIPPETS = [(page, number, code) for page in PAGES for number, code in enumerate(fenced(page, "python"))]


def is_training(code: str) -> bool:
    return "import train_" in code


@pytest.fixture
def place(tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the paths of snippets are a tiny model and a tiny data set; experiments are tiny too."""
    from helpers.tiny_models import word_collection

    from search_r3_jax import configs
    from search_r3_jax.config import (
        IndexConfig,
        LoraConfig,
        RlConfig,
        RunConfig,
        SamplerConfig,
        SftConfig,
        TextConfig,
    )
    from search_r3_jax.data.dataset import build_dataset

    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/mine").mkdir()
    for folder in ("runs/quickstart/export", "runs/mine/export"):
        (tmp_path / folder).symlink_to(tiny_folders["llama"])
    words = {
        split: word_collection(documents=20, queries=queries, seed=seed, split=split)
        for split, queries, seed in (("train", 12, 0), ("dev", 4, 1), ("test", 4, 2))
    }
    build_dataset(words, tmp_path / "DATA/strategyqa", name="words", source={"kind": "test"})
    tiny = RunConfig(
        model=str(tiny_folders["llama"]),
        compute_dtype="float32",
        text=TextConfig(max_query_tokens=16, max_document_tokens=32, max_thought_tokens=8),
        lora=LoraConfig(rank=4),
        sft=SftConfig(steps=2, global_batch=4, eval_every=2),
        rl=RlConfig(
            steps=1, global_queries=2, group_size=2, min_swaps=0, sampler=SamplerConfig(max_think_tokens=12)
        ),
        index=IndexConfig(kind="exact", candidates=6, refresh_budget=4, nice=0),
    )
    monkeypatch.setattr(configs, "load_config", lambda name: tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_snippet(code: str) -> dict[str, object]:
    scope: dict[str, object] = {"__name__": "snippet"}
    exec(compile(code, "snippet", "exec"), scope)
    return scope


@pytest.mark.parametrize(
    ("page", "number", "code"),
    [
        pytest.param(
            *snippet,
            marks=pytest.mark.slow if is_training(snippet[2]) else (),
            id=f"{name_of(snippet[0])}-{snippet[1]}",
        )
        for snippet in SNIPPETS
    ],
)
def test_snippets_run_as_they_are_printed(
    page: Path, number: int, code: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "import mteb" in code:
        stand_in_for_mteb(monkeypatch)
    scope = run_snippet(code)
    for line in code.splitlines():
        # A comment at the end of a line may begin with the shape of what it assigns.
        shape = re.match(r"(\w+) = .*  # \[([\d,]+)\] float32", line)
        if shape:
            sizes = [int(size) for size in shape[2].split(",")]
            # The tiny model has fewer dimensions than what the page shows.
            vectors: Any = scope[shape[1]]
            assert list(vectors.shape[:-1]) == sizes[:-1]
            assert vectors.shape[-1] == 64


def test_the_readmes_first_snippet_is_found() -> None:
    assert any(page == ROOT / "README.md" and "Embedder.load" in code for page, _, code in SNIPPETS)


def stand_in_for_mteb(monkeypatch: pytest.MonkeyPatch) -> None:
    """MTEB's tasks come from the hub: a made-up collection takes the place of each."""
    import mteb
    from helpers.tiny_models import word_collection

    from search_r3_jax.evaluation.mteb_run import collection_task

    words = word_collection(documents=12, queries=4, split="test")
    monkeypatch.setattr(mteb, "get_task", lambda name: collection_task(words))


def write_map() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    ARCHITECTURE.write_text(MAP.sub(lambda _: package_map(), text), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write-map"]:
        write_map()
    else:
        print(package_map(), end="")
