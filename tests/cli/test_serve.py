"""`headwater serve` before it serves: what it finds to serve, and what it refuses. The rest is in tests/serve."""

from __future__ import annotations

import functools

import pytest
import torch
from cli_support import run_main
from compose.pool_support import make_pool, save_lora

from headwater.cli.serve import KEY_VARIABLE, _key, _routes
from headwater.compose import AdapterPool
from headwater.data.encode import DataSpec


@pytest.fixture
def headwater(capsys):
    return functools.partial(run_main, capsys)


class Letters:
    """An encoder that counts letters."""

    def __init__(self):
        self.prompts = {}

    def state_dict(self):
        return {}

    def encode(self, texts, **_options):
        return torch.tensor([[float(text.count(c)) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts])


def test_auto_mixes_the_adapters_whose_samples_are_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.compose.encoder.load_encoder", lambda name, progress: Letters())
    pool = make_pool(tmp_path)
    routes, _, spec = _routes(str(pool.path), 4, "", 1)
    assert spec == DataSpec()
    assert routes.names == ["auto", *pool.names, "base"]
    assert routes.choose("auto", "patterns text").mixture == {"patterns": 1.0}
    assert routes.choose("auto", "twin text").mixture == {"twin": 1.0}
    mixed = _routes(str(pool.path), 4, "", 2)[0].choose("auto", "plain text").mixture
    assert mixed["plain"] == pytest.approx(0.5)
    assert sum(mixed.values()) == pytest.approx(1)


def test_a_pool_without_samples_has_no_auto(tmp_path):
    pool = make_pool(tmp_path, {})
    pool.add(save_lora(tmp_path / "one", pool.base_model), "one")
    assert _routes(str(AdapterPool(pool.path).path), 4, "", 3)[0].names == ["one", "base"]


def test_what_cannot_be_served(headwater, tmp_path, monkeypatch):
    assert "no such folder" in headwater("serve", tmp_path / "nowhere", "--port", "0").err
    assert "no adapter in this folder" in headwater("serve", tmp_path, "--port", "0").err
    (tmp_path / "empty").write_text("\n")
    for file, message in (("empty", "there is no API key"), ("missing", "cannot be read")):
        done = headwater("serve", tmp_path, "--port", "0", "--api-key-file", tmp_path / file)
        assert done.code == 2
        assert message in done.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'headwater[serve]'" in headwater("serve", tmp_path, "--port", "0").err


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert _key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    assert _key(None) == "from the environment"
    (tmp_path / "key").write_text("from a file\n")
    assert _key(str(tmp_path / "key")) == "from a file"
