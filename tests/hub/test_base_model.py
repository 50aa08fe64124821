"""What a base model says of itself, as cards of the hub, licence files and GGUF fields say it."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from helpers.tiny_gguf import finish

from search_r3_jax.hub import model_names
from search_r3_jax.hub.base_model import PACKAGED_ID, BaseModel, License, base_model, renamed_base

APACHE = "                         Apache License\n                   Version 2.0, January 2004\n"


def card(folder: Path, front: str) -> None:
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("front", "license_"),
    [
        ("license: mit", License(identifier="mit")),
        ("license:\n- apache-2.0", License(identifier="apache-2.0")),
        (
            "license: other\nlicense_name: qwen\nlicense_link: https://example.org/l",
            License(identifier="other", name="qwen", link="https://example.org/l"),
        ),
        ("language: en", None),
        ("license: [mit, gpl]", None),
        ("license: 3", None),
        ("license: {", None),
        ("- a list", None),
    ],
)
def test_the_card_of_a_folder_names_the_licence(tmp_path: Path, front: str, license_: License | None) -> None:
    card(tmp_path, front)
    assert base_model(str(tmp_path)) == BaseModel(name=tmp_path.name, license=license_)


@pytest.mark.parametrize(
    ("text", "identifier", "link"),
    [
        (APACHE, "apache-2.0", None),
        ("MIT License\n\nCopyright", "mit", None),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT", "llama3.2", None),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3", None),
        ("Nobody may do anything.", "other", "LICENSE.txt"),
    ],
)
def test_a_licence_file_is_recognised_where_no_card_names_it(
    tmp_path: Path, text: str, identifier: str, link: str | None
) -> None:
    (tmp_path / "LICENSE.txt").write_text(text)
    found = base_model(str(tmp_path))
    assert found.license == License(identifier=identifier, link=link)
    assert found.license_file == tmp_path / "LICENSE.txt"
    card(tmp_path, "license: cc-by-4.0")
    assert base_model(str(tmp_path)).license == License(identifier="cc-by-4.0")


def test_an_id_of_the_hub_is_kept_and_links_lead_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--Model-1B" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    card(snapshot, "license: other\nlicense_name: own\nlicense_link: TERMS")
    monkeypatch.setattr(model_names, "snapshot_download", lambda *_, **__: str(snapshot))
    for name in ("some/Model-1B", str(snapshot)):
        found = base_model(name)
        assert (found.name, found.hub_id) == ("some/Model-1B", "some/Model-1B")
        assert found.license is not None
        assert found.license.link == "https://huggingface.co/some/Model-1B/blob/main/TERMS"
    (snapshot / "LICENSE").write_text("terms")
    card(snapshot, "license: other\nlicense_name: own\nlicense_link: LICENSE")
    assert base_model(str(snapshot)).license == License(identifier="other", name="own", link="LICENSE")


def test_an_export_of_ours_was_made_of_what_its_card_names(tmp_path: Path) -> None:
    card(tmp_path, "license: mit\nbase_model: some/Base")
    assert base_model(str(tmp_path)).hub_id is None
    (tmp_path / "search_r3.json").write_text("{}")
    assert base_model(str(tmp_path)) == BaseModel(
        name="some/Base", hub_id="some/Base", license=License(identifier="mit")
    )


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, BaseModel(name="model.gguf")),
        (
            {
                "general.license": "apache-2.0",
                "general.base_model.0.repo_url": "https://huggingface.co/some/Base",
            },
            BaseModel(name="some/Base", hub_id="some/Base", license=License(identifier="apache-2.0")),
        ),
        (
            {"general.license": "other", "general.license.name": "own", "general.license.link": "https://l"},
            BaseModel(name="model.gguf", license=License(identifier="other", name="own", link="https://l")),
        ),
        ({"general.base_model.0.repo_url": "https://example.org/a/b/c"}, BaseModel(name="model.gguf")),
    ],
)
def test_a_gguf_file_names_licence_and_base_in_its_fields(
    tmp_path: Path, fields: dict[str, str], found: BaseModel
) -> None:
    # Any: the writer's methods are found by name.
    writer: Any = GGUFWriter(tmp_path / "model.gguf", "llama")
    for key, value in fields.items():
        writer.add_string(key, value)
    finish(writer)
    assert base_model(str(tmp_path / "model.gguf")) == found


def test_the_packaged_model_is_known() -> None:
    assert base_model("smollm2") == BaseModel(
        name=PACKAGED_ID, hub_id=PACKAGED_ID, license=License(identifier="apache-2.0")
    )


def test_a_base_under_another_name_has_the_same_licence(tmp_path: Path) -> None:
    known = BaseModel(name="a.gguf", license=License(identifier="mit"))
    assert renamed_base(known, "some/Model") == BaseModel(
        name="some/Model", hub_id="some/Model", license=License(identifier="mit")
    )
    card(tmp_path, "license: apache-2.0")
    assert renamed_base(known, str(tmp_path)) == base_model(str(tmp_path))
