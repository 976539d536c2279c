"""The kept copy of the default model: made once, mapped after, and never in the way."""

from __future__ import annotations

import os

import pytest

from sterna.core.errors import ConfigError
from sterna.engine import build
from sterna.engine.config import EngineConfig
from sterna.quant import cache
from sterna.quant.file import FILE_NAME
from sterna.quant.linear import describe_weights


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("STERNA_HOME", str(tmp_path / "home"))


def test_it_is_made_once(plain_folder):
    folder = cache.cached_folder(plain_folder, "fp6")
    made = (folder / FILE_NAME).stat().st_mtime_ns
    assert cache.cached_folder(plain_folder, "fp6") == folder
    assert (folder / FILE_NAME).stat().st_mtime_ns == made


def test_a_damaged_copy_is_made_again(plain_folder, caplog):
    folder = cache.cached_folder(plain_folder, "fp6")
    whole = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(whole[:-1])
    assert cache.cached_folder(plain_folder, "fp6") == folder
    assert (folder / FILE_NAME).read_bytes() == whole
    (folder / "config.json").unlink()
    assert cache.cached_folder(plain_folder, "fp6") == folder
    assert (folder / "config.json").exists()


def test_a_changed_model_gets_another_copy_and_the_old_one_goes(plain_folder):
    first = cache.cached_folder(plain_folder, "fp6")
    os.utime(plain_folder, (1, 1))
    second = cache.cached_folder(plain_folder, "fp6")
    assert first != second
    assert [p.name for p in second.parent.iterdir()] == [second.name]


def test_without_room_the_engine_rounds_in_memory(plain_folder, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file where the folder should be")
    assert cache.cached_folder(plain_folder, "fp6") is None
    decoder = build.load_weights("", plain_folder, EngineConfig(weights="fp6"))
    assert "10 weights quantised to 6 bits" in describe_weights(decoder)


def test_the_default_model_follows_the_constant_and_others_do_not(plain_folder, monkeypatch):
    monkeypatch.setattr(build, "DEFAULT_MODEL_WEIGHTS", "fp6")
    config = EngineConfig()
    assert "6 bits" in describe_weights(build.load_weights("", plain_folder, config))
    assert describe_weights(build.load_weights("x", plain_folder, config)) == ""
    plain = EngineConfig(weights="bf16")
    assert describe_weights(build.load_weights("", plain_folder, plain)) == ""
    assert build.weights_of("", EngineConfig(device="cuda")) == "auto"


def test_an_unknown_format_is_refused(plain_folder):
    with pytest.raises(ConfigError, match="unknown format 'fp66'"):
        build.load_weights("", plain_folder, EngineConfig(weights="fp66"))
