import ast
import subprocess
import sys
from pathlib import Path

import pytest

from search_r3_jax.data.collection import Collection
from search_r3_jax.data.python_functions import first_sentence, python_functions
from search_r3_jax.errors import UserError

WORDS = [
    "alpha",
    "bravo",
    "cedar",
    "delta",
    "ember",
    "frost",
    "grape",
    "hazel",
    "ivory",
    "jelly",
    "kayak",
    "lemon",
]


def function(package: int, number: int) -> str:
    one, two, three = (WORDS[(package * 5 + number * step + step) % len(WORDS)] for step in (1, 5, 7))
    return f'''
def join_{one}_{number}({two}, {three}_{package}):
    """Join the {one} of package {package} with {two} number {number}. More words follow.

    Args:
        {two}: anything.
    """
    # a comment that stays {package}
    {one}_{number} = [{two}.{three}(item, {package}) for item in {three}_{package} if item != "{one}{number}"]
    while {one}_{number}.pop({number}) < {package * 100 + number}:

        {one}_{number}.append(len("{three} {one}") * {number * 7 + package})
    return {one}_{number}, {package}, "{two}"
'''


def make_tree(root: Path, packages: int = 24, functions: int = 8) -> Path:
    for package in range(packages):
        folder = root / f"pack{package}"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "code.py").write_text("".join(function(package, number) for number in range(functions)))
    return root


def package_of(doc_id: str) -> str:
    return doc_id.split(":")[0].split(".")[0]


def build(
    root: Path, *, seed: int = 3, train: int = 10, dev: int = 5, test: int = 5
) -> dict[str, Collection]:
    return python_functions(
        seed=seed, train_functions=train, dev_functions=dev, test_functions=test, roots=[root]
    )


def doc_ids(collections: dict[str, Collection]) -> list[str]:
    return [document.doc_id for collection in collections.values() for document in collection.documents]


def test_splits_share_no_package_and_each_function_is_its_own_answer(tmp_path: Path) -> None:
    collections = build(make_tree(tmp_path))
    assert {split: len(collection.queries) for split, collection in collections.items()} == {
        "train": 10,
        "dev": 5,
        "test": 5,
    }
    packages = [{package_of(document.doc_id) for document in each.documents} for each in collections.values()]
    assert sum(map(len, packages)) == len(set.union(*packages))
    for collection in collections.values():
        counts = [
            sum(package_of(each.doc_id) == package for each in collection.documents)
            for package in set.union(*packages)
        ]
        assert max(counts) <= 0.2 * len(collection.documents)
        assert [query.positives for query in collection.queries] == [
            {each.doc_id: 1} for each in collection.documents
        ]


def test_document_is_the_source_without_docstring(tmp_path: Path) -> None:
    for collection in build(make_tree(tmp_path)).values():
        for document, query in zip(collection.documents, collection.queries, strict=True):
            module, qualname = document.doc_id.split(":")
            written = (tmp_path / module.replace(".", "/")).with_suffix(".py").read_text()
            nodes = {node.name: node for node in ast.parse(written).body if isinstance(node, ast.FunctionDef)}
            expected = nodes[qualname]
            expected.body = expected.body[1:]
            assert ast.dump(ast.parse(document.text).body[0]) == ast.dump(expected)
            assert "# a comment that stays" in document.text
            assert query.text.startswith("Join the ")
            assert query.text.split()[-1] == qualname.split("_")[-1]


def test_methods_decorators_and_indented_strings_survive(tmp_path: Path) -> None:
    make_tree(tmp_path, packages=3)
    (tmp_path / "pack0" / "code.py").write_text(
        "class Outer:\n    class Inner:\n        @staticmethod\n        async def run(value):\n"
        '            r"""Run the value through three long steps."""\n\n            first = value + 1\n'
        '            second = """kept\n            text"""\n            return first, second, "some more '
        'characters here"\n'
    )
    collections = python_functions(
        seed=0, train_functions=1, dev_functions=1, test_functions=1, roots=[tmp_path], package_share=1.0
    )
    documents = [document for collection in collections.values() for document in collection.documents]
    (method,) = [document for document in documents if document.doc_id == "pack0.code:Outer.Inner.run"]
    assert method.text.splitlines()[:3] == ["@staticmethod", "async def run(value):", "    first = value + 1"]
    assert '"""kept\n    text"""' in method.text


def test_duplicates_and_near_duplicates_are_removed_across_packages(tmp_path: Path) -> None:
    make_tree(tmp_path, packages=5)
    code = [(tmp_path / f"pack{package}" / "code.py").read_text() for package in range(5)]
    # pack1: pack0's code under new names and queries; pack3: other code under pack2's queries.
    (tmp_path / "pack1" / "code.py").write_text(
        code[0].replace("def join", "def unite").replace("Join the", "Bring together the")
    )
    functions = [part.split('"""') for part in code[3].split("\ndef ")[1:]]
    docstrings = [part.split('"""')[1] for part in code[2].split("\ndef ")[1:]]
    renamed = [
        f'{head}"""{docstring}"""{body}'
        for (head, _, body), docstring in zip(functions, docstrings, strict=True)
    ]
    (tmp_path / "pack3" / "code.py").write_text("".join(f"\ndef {part}" for part in renamed))
    for seed in range(6):
        collections = python_functions(
            seed=seed,
            train_functions=8,
            dev_functions=8,
            test_functions=8,
            roots=[tmp_path],
            package_share=1.0,
        )
        present = {package_of(doc_id) for doc_id in doc_ids(collections)}
        assert len(present) == 3
        assert not {"pack0", "pack1"} <= present
        assert not {"pack2", "pack3"} <= present


def count_of_each_split(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        python_functions(
            seed=0, train_functions=99, dev_functions=99, test_functions=99, roots=[root], package_share=1.0
        )
    return str(caught.value)


def test_tests_vendored_generated_and_broken_files_are_skipped(tmp_path: Path) -> None:
    make_tree(tmp_path, packages=3)
    for number, name in enumerate(["tests/a.py", "_vendor/b.py", "vendored/c.py", "test_d.py", "e_pb2.py"]):
        file = tmp_path / "pack0" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(function(70 + number, 1))
    content = function(77, 1)
    (tmp_path / "pack0" / "made.py").write_text("# Automatically generated, do not edit\n" + content)
    (tmp_path / "pack0" / "broken.py").write_text(content + "\ndef broken(:\n")
    (tmp_path / "pack0" / "latin.py").write_bytes(content.encode() + b"# \xe9\n")
    (tmp_path / "search_r3_jax").mkdir()
    (tmp_path / "search_r3_jax" / "own.py").write_text(content)
    assert "found 8 of 99 for train, 8 of 99 for dev, 8 of 99 for test in 3 packages" in count_of_each_split(
        tmp_path
    )
    for package in range(3):
        (tmp_path / f"pack{package}" / "good.py").write_text(function(80 + package, 1))
    assert "found 9 of 99 for train, 9 of 99 for dev, 9 of 99 for test in 3 packages" in count_of_each_split(
        tmp_path
    )


def test_same_files_and_seed_give_the_same_collections_in_another_process(tmp_path: Path) -> None:
    make_tree(tmp_path)
    program = (
        "import sys; from pathlib import Path; from search_r3_jax.data.python_functions import "
        "python_functions as f;"
        "c = f(seed=3, train_functions=10, dev_functions=5, test_functions=5, roots=[Path(sys.argv[1])]);"
        "print(*[x.corpus_hash() for x in c.values()])"
    )
    repository = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, str(tmp_path)]
    other = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository).stdout.split()
    assert [collection.corpus_hash() for collection in build(tmp_path).values()] == other
    assert [collection.corpus_hash() for collection in build(tmp_path, seed=4).values()] != other


def test_too_few_functions_and_unknown_packages_are_user_errors(tmp_path: Path) -> None:
    make_tree(tmp_path, packages=3)
    with pytest.raises(UserError, match=r"found \d+ of 500 for train, .* in 3 packages"):
        build(tmp_path, train=500)
    with pytest.raises(UserError, match="no Python source found for absent"):
        python_functions(
            seed=0,
            train_functions=1,
            dev_functions=1,
            test_functions=1,
            roots=[tmp_path],
            packages=["pack0", "absent"],
        )


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of all values.\n\nMore.", "Return the sum of all values"),
        (
            "\n    Load a file, e.g. a table,\n    into memory. Then stop.\n    ",
            "Load a file, e.g. a table, into memory",
        ),
        ("Call :func:`~pkg.mod.run` on ``every`` *given* item.", "Call run on every given item"),
        ("Split the text at commas. Args:\n    text: it", "Split the text at commas"),
        ("Sum of the values\n:param values: them", "Sum of the values"),
        ("Too short here.", None),
        ("add(a, b)\n\nAdds two numbers with great care.", None),
        (">>> one + two + three + four", None),
        ("返回 所有 值的 总和 并 且 很 好 的 函数 for us all here", None),
        ("word " * 41, None),
    ],
)
def test_first_sentence(docstring: str, expected: str | None) -> None:
    assert first_sentence(docstring) == expected
