"""`headwater serve` before it serves: what it finds to serve, and what it refuses. The rest is in tests/serve."""

from __future__ import annotations

import contextlib
import functools
import threading

import pytest
import torch
from cli_support import run_main
from compose.pool_support import make_pool, save_lora
from tiny_models import make_tiny_llama

from headwater.cli.serve import KEY_VARIABLE, _key, _routes
from headwater.compose import PooledModel
from headwater.compose.arrow import Arrow, ArrowSpec
from headwater.compose.flow import FlowGate
from headwater.compose.hub import HubResult, compose
from headwater.data.encode import DataSpec
from headwater.errors import HeadwaterError
from headwater.serve import Engine, Piece, Sampling


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


def routes_of(pool, *, top=None, way=None, held=None):
    return _routes(str(pool.path), 4, "", top, way, held or contextlib.ExitStack())


def test_auto_mixes_the_adapters_whose_samples_are_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.compose.encoder.load_encoder", lambda name, progress: Letters())
    pool = make_pool(tmp_path)
    routes, _, spec = routes_of(pool, top=1)
    assert spec == DataSpec()
    assert routes.names == ["auto", *pool.names, "base"]
    assert routes.choose("auto", "patterns text").mixture == {"patterns": 1.0}
    assert routes.choose("auto", "twin text").mixture == {"twin": 1.0}
    mixed = routes_of(pool, top=2)[0].choose("auto", "plain text").mixture
    assert mixed["plain"] == pytest.approx(0.5)
    assert sum(mixed.values()) == pytest.approx(1)


def test_a_pool_without_samples_has_no_auto(tmp_path):
    pool = make_pool(tmp_path, {})
    pool.add(save_lora(tmp_path / "one", pool.base_model), "one")
    assert routes_of(pool)[0].names == ["one", "base"]


def fitted(pool, folder):
    """Folder -> what `headwater pool` would have written there, and a context in which it is on the model."""
    pooled = PooledModel(make_tiny_llama(), pool.load)
    gates = {}
    for name, granularity in (("gates", "layer"), ("of modules", "module")):
        gates[name] = gate = FlowGate(pooled, ["plain", "twin"], None, granularity=granularity)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.normal_(generator=generator)
        gate.save(folder / name, pool)
    mixed = Arrow(pooled, pool, ["plain", "twin"], ArrowSpec(2, combine="factors"), ["rs"])
    mixed.save(folder / "of factors")
    Arrow(pooled, pool, ["rs", "patterns"], ArrowSpec(1)).save(folder / "routing")
    adapter = compose([pool.load("plain"), pool.load("twin")], [0.5, -1.0])
    weights = {"plain": 0.5, "twin": -1.0}
    HubResult(weights, adapter, 0.0, "by hand", []).save(folder / "composed", pool)
    return {
        **{name: gate.on for name, gate in gates.items()},
        "of factors": mixed.on,
        "routing": Arrow(pooled, pool, ["rs", "patterns"], ArrowSpec(1)).on,
        "composed": lambda: pooled.all_rows(adapter),
        "arrow": Arrow(pooled, pool).on,
    }, pooled


def test_what_was_fitted_on_a_pool_answers_every_request(tmp_path):
    pool = make_pool(tmp_path)
    ways, pooled = fitted(pool, tmp_path)
    prompts = [[72, 105], [1, 2, 3, 4, 5, 6], [200]]
    answers = {}
    for way, on in ways.items():
        with contextlib.ExitStack() as held:
            routes, tokenizer, _ = routes_of(pool, way=way if way == "arrow" else str(tmp_path / way), held=held)
            assert routes.names == [way]
            engine = Engine(routes, tokenizer)
            asked = [routes.choose(way, "")] * len(prompts)
            pieces = engine.generate(prompts, asked, [Sampling(max_tokens=5, temperature=0.0)] * len(prompts))
            watched: list[Piece] = []
            last = threading.Event()

            def see(piece, watched=watched, last=last):
                watched.append(piece)
                if piece.finish:
                    last.set()

            engine.submit(prompts[0], asked[0], Sampling(max_tokens=2, temperature=0.0), see, gates=True)
            assert last.wait(60)
            engine.close()
        gates = [piece.gates for piece in watched if piece.token is not None]
        assert [gate and len(gate) for gate in gates] == [{"composed": None, "arrow": 4}.get(way, 2)] * 2
        answers[way] = [[piece.token for piece in part if piece.token is not None] for part in pieces]
        for prompt, got in zip(prompts, answers[way], strict=True):
            ids = list(prompt)
            with torch.no_grad(), on():
                for _ in got:
                    ids.append(int(pooled.model(torch.tensor([ids])).logits[0, -1].argmax()))
            assert got == ids[len(prompt) :]
    assert len({str(found) for found in answers.values()}) == 6


def test_ways_that_cannot_be_served(headwater, tmp_path):
    pool = make_pool(tmp_path)
    assert "needs a pool" in headwater("serve", pool.folder("plain"), "--port", "0", "--way", "arrow").err
    assert "nothing fitted on a pool" in headwater("serve", pool.path, "--port", "0", "--way", tmp_path).err


def test_options_about_retrieval_are_refused_where_nothing_is_retrieved(headwater, tmp_path):
    pool = make_pool(tmp_path)
    about = ["--encoder", "mine", "--top", 3]
    for served in ([pool.folder("plain")], [pool.path, "--way", "arrow"]):
        done = headwater("serve", *served, "--port", "0", *about)
        assert done.code == 2
        for option in ("--encoder", "--top"):
            assert f"error: {option}: adapters are retrieved for `auto` alone" in done.err
    done = headwater("serve", pool.folder("plain"), "--port", "0", "--way", "arrow", "--top", 1)
    assert ("--way: a way" in done.err, "--top: adapters" in done.err, "--encoder" in done.err) == (True, True, False)


def test_what_cannot_be_served(headwater, tmp_path, monkeypatch):
    assert "no such folder" in headwater("serve", tmp_path / "nowhere", "--port", "0").err
    assert "no adapter in this folder" in headwater("serve", tmp_path, "--port", "0").err
    (tmp_path / "empty").write_text("\n")
    for file, message in (("empty", "there is no API key"), ("missing", "cannot be read")):
        done = headwater("serve", tmp_path, "--port", "0", "--api-key-file", tmp_path / file)
        assert done.code == 2
        assert message in done.err
    done = headwater("serve", tmp_path / "nowhere", "--port", "0", "--timeout", "inf")
    assert (done.code, "--timeout: this is no length of time" in done.err) == (2, True), done.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'headwater[serve]'" in headwater("serve", tmp_path, "--port", "0").err


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert _key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    assert _key(None) == "from the environment"
    monkeypatch.setenv(KEY_VARIABLE, " padded\r\n")
    assert _key(None) == "padded"
    monkeypatch.setenv(KEY_VARIABLE, " \n")  # no key by mistake must not be a server without one
    with pytest.raises(HeadwaterError, match=f"no API key in {KEY_VARIABLE}"):
        _key(None)
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert _key(None) is None
    (tmp_path / "key").write_text("from a file\n")
    assert _key(str(tmp_path / "key")) == "from a file"
