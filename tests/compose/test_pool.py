"""The pool folder: what it takes, what it refuses, and what it notices afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from pool_support import PLANS, make_pool, save_base
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama

import headwater
from headwater.compose import AdapterPool
from headwater.compose.adapter import read_adapter, write_adapter
from headwater.compose.base import BaseFingerprint
from headwater.compose.scoring import WAYS
from headwater.errors import HeadwaterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool with all plans, and the folder of one adapter."""
    folder = tmp_path_factory.mktemp("made")
    return make_pool(folder), folder


@pytest.fixture
def pool(made, tmp_path):
    shutil.copytree(made[0].path, tmp_path / "pool")
    return AdapterPool(tmp_path / "pool")


@pytest.fixture
def lora(made, tmp_path):
    shutil.copytree(made[1] / "plain", tmp_path / "lora")
    return tmp_path / "lora"


def edit(folder, **fields):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(pool, folder, name="new", **options) -> str:
    with pytest.raises(HeadwaterError) as caught:
        pool.add(folder, name, **options)
    assert name not in AdapterPool(pool.path)
    assert sorted(p.name for p in (pool.path / "adapters").iterdir()) == sorted(pool.names)
    return str(caught.value)


def test_what_was_added_is_there(pool, made):
    assert pool.names == list(PLANS)
    entry = pool["patterns"]
    assert (entry.rank, entry.layers) == (5, 4)
    assert entry.samples == ["patterns text 0", "patterns text 1", "patterns text 2"]
    assert entry.parameters == sum(t.numel() for t in load_file(made[1] / "patterns" / WEIGHTS).values())
    assert pool.check() == []
    loaded = pool.load("patterns").layers
    assert {name: factors.rank for name, factors in loaded.items() if "up_proj" in name} == {
        "model.layers.0.mlp.up_proj": 3,
        "model.layers.1.mlp.up_proj": 5,
    }
    assert loaded["model.layers.0.self_attn.v_proj"].scaling == pytest.approx(2 / 3)
    assert loaded["model.layers.1.mlp.up_proj"].scaling == pytest.approx(7 / 5)
    assert pool.load("rs").layers["model.layers.0.mlp.up_proj"].scaling == pytest.approx(3 / 2**0.5)


def test_removing(pool, lora):
    pool.remove("rs")
    again = AdapterPool(pool.path)
    assert "rs" not in again
    assert again.check() == []
    assert not (pool.path / "adapters" / "rs").exists()
    again.add(lora, "rs")
    assert again.names[-1] == "rs"
    with pytest.raises(HeadwaterError, match="the pool has no adapter 'nobody'"):
        again.remove("nobody")


@pytest.mark.parametrize(
    "name",
    [
        *("../evil", "/etc/x", "a/b", "..", ".hidden", "", "a b", "x" * 65, "auto", "Base", "plain", "PLAIN", "a\n"),
        *("Arrow", *WAYS),
    ],
)
def test_names_that_are_refused(pool, lora, name):
    with pytest.raises(HeadwaterError, match=r"name|already"):
        pool.add(lora, name)
    assert pool.check() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "RLORA"}, "'RLORA' adapter, and a pool holds LoRA"),
        ({"peft_type": "IA3"}, "'IA3' adapter"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"from_the_future": 3}, "from_the_future is 3"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base weights"),
        ({"init_lora_weights": "olora"}, "changed base weights"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 5}, "has rank 4, and the config says 5"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"rank_pattern": {"up_proj": 2.5}}, r"rank_pattern\[up_proj\] is 2.5"),
        ({"alpha_pattern": [1]}, "alpha_pattern should be a JSON object"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(pool, lora, fields, message):
    edit(lora, **fields)
    with pytest.raises(HeadwaterError, match=message):
        pool.add(lora, "new")
    assert "new" not in AdapterPool(pool.path)


def test_all_that_is_wrong_is_said_at_once(pool, lora):
    edit(lora, use_dora=True, bias="all")
    edit_tensors(
        lora, lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 300)})
    )
    message = refused(pool, lora, "plain/new", samples=[" "])
    for part in ("cannot be an adapter's name", "use_dora", "bias", "lora_embedding_A", "sample text is empty"):
        assert part in message


UP, X = "base_model.model.model.layers.0.mlp.up_proj", "base_model.model.x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.lora_B.weight"), "layers.0.mlp.up_proj has lora_A alone"),
        (lambda t: t[f"{UP}.lora_A.weight"].fill_(float("nan")), "not finite"),
        (lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(4, 31)}), "maps 31 -> 48, and the base model's 32"),
        (lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(3, 32)}), "A has 3 ranks and B 4"),
        (lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(4, 32).int()}), "not floating-point"),
        (lambda t: t.update({f"{X}.lora_A.weight": torch.zeros(4, 2), f"{X}.lora_B.weight": torch.ones(2, 4)}), "r x"),
        (lambda t: t.update({f"{UP}.lora_magnitude_vector.weight": torch.zeros(48)}), "not LoRA factors"),
        (lambda t: t.update({f"{UP}.base_layer.weight": torch.zeros(48, 32)}), "not LoRA factors"),
        (lambda t: t.clear(), "no LoRA factors"),
    ],
    ids=["half", "nan", "other base", "ranks", "integers", "unknown layer", "dora", "base weights", "empty"],
)  # fmt: skip
def test_weights_that_are_refused(pool, lora, change, message):
    edit_tensors(lora, change)
    assert message in refused(pool, lora)


def test_broken_pickled_and_linked_files_are_refused(pool, lora, tmp_path):
    whole = (lora / WEIGHTS).read_bytes()
    (lora / WEIGHTS).write_bytes(whole[:-100])
    assert "not a readable safetensors file" in refused(pool, lora)
    (lora / WEIGHTS).write_bytes(b"\x80\x04pickle")
    assert "not a readable safetensors file" in refused(pool, lora)
    (lora / WEIGHTS).unlink()
    torch.save({"x": torch.zeros(1)}, lora / "adapter_model.bin")
    assert "pickled file, which is never read" in refused(pool, lora)
    (tmp_path / "elsewhere").write_bytes(whole)
    (lora / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in refused(pool, lora)
    (tmp_path / "link").symlink_to(lora)
    assert "not a folder, or a link" in refused(pool, tmp_path / "link")
    (lora / CONFIG).write_text("[1")
    (lora / WEIGHTS).unlink()
    (lora / WEIGHTS).write_bytes(whole)
    assert "not readable as JSON" in refused(pool, lora)
    (lora / CONFIG).write_text("[1]")
    assert "should be a JSON object" in refused(pool, lora)


def test_a_wrong_base_model_is_refused(pool, made, lora, tmp_path):
    edit(lora, base_model_name_or_path="someone/else")
    assert "names 'someone/else' as its base model" in refused(pool, lora)
    make_tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "copy").mkdir()
    save_base(tmp_path / "copy")
    for file in (tmp_path / "copy").glob("tok*"):
        shutil.copy(file, tmp_path / "other")
    edit(lora, base_model_name_or_path=str(tmp_path / "other"))
    assert "trained on another base model" in refused(pool, lora)
    edit(lora, base_model_name_or_path=str(tmp_path / "copy"))  # the same model elsewhere
    pool.add(lora, "new")
    edit(lora, base_model_name_or_path="someone/else")
    pool.add(lora, "newer", same_base=True)
    assert pool.check() == []


def test_the_fingerprint_tells_models_apart():
    one = BaseFingerprint.of(make_tiny_llama())
    assert one.differences(BaseFingerprint.of(make_tiny_llama())) == []
    assert one.id == BaseFingerprint.of(make_tiny_llama()).id
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert one.differences(BaseFingerprint.of(make_tiny_llama().to(dtype))) == []
    assert "other weights" in one.differences(BaseFingerprint.of(make_tiny_llama(seed=1)))[0]
    tuned = make_tiny_llama()
    for parameter in tuned.parameters():
        parameter.data *= 1.02  # further trained, a little
    assert "other weights" in one.differences(BaseFingerprint.of(tuned))[0]
    assert "no layer model.layers.1" in one.differences(BaseFingerprint.of(make_tiny_llama(num_hidden_layers=1)))[0]
    assert "other sizes" in one.differences(BaseFingerprint.of(make_tiny_llama(intermediate_size=64)))[0]
    with pytest.raises(HeadwaterError, match="not the pool's base model"):
        one.require(make_tiny_llama(seed=1))


def test_a_pool_notices_what_changed(pool, tmp_path):
    adapters = pool.path / "adapters"
    edit(adapters / "plain", lora_alpha=80)
    (adapters / "rs" / WEIGHTS).unlink()
    (adapters / "twin" / WEIGHTS).unlink()
    (adapters / "twin" / WEIGHTS).symlink_to(adapters / "plain" / WEIGHTS)
    (adapters / "patterns" / "adapter_model.bin").write_bytes(b"x")
    (adapters / "stray").mkdir()
    found = "\n".join(map(str, pool.check()))
    assert f"plain/{CONFIG}: this file is not the one that was added" in found
    assert f"rs/{WEIGHTS}: this file is missing" in found
    assert f"twin/{WEIGHTS}: a pool follows no symbolic links" in found
    assert "adapter_model.bin: this does not belong to an adapter" in found
    assert "stray: the pool does not list this" in found
    for name in ("plain", "rs", "twin"):
        with pytest.raises(HeadwaterError):
            pool.load(name)
    assert pool.load("patterns").name == "patterns"


def test_a_pool_that_lost_its_adapters_says_so(pool):
    shutil.rmtree(pool.path / "adapters")
    found = pool.check()
    assert sum("this file is missing" in str(problem) for problem in found) == 2 * len(pool)


def test_a_linked_adapter_folder_is_refused_and_only_unlinked(pool, tmp_path):
    folder = pool.path / "adapters" / "plain"
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HeadwaterError, match="symbolic link"):
        pool.load("plain")
    pool.remove("plain")
    assert (tmp_path / "elsewhere" / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "pool.json"),
        ('{"schema": 2, "adapters": {}}', "schema"),
        (
            '{"schema": 1, "adapters": {"../../x": {"sha256": {}, "rank": 1, "layers": 1, "parameters": 1}}}',
            "cannot be",
        ),
        ('{"schema": 1, "adapters": {"a": {"rank": 1}}}', "adapters.a.sha256"),
    ],
)
def test_a_damaged_index_is_refused(pool, index, message):
    (pool.path / "pool.json").write_text(index)
    with pytest.raises(HeadwaterError, match=message):
        AdapterPool(pool.path)


def test_an_adapter_that_changes_while_it_is_copied_is_refused(pool, lora, monkeypatch):
    copy = shutil.copyfile

    def copy_half(source, target):
        copy(source, target)
        if target.name == WEIGHTS:
            target.write_bytes(target.read_bytes()[:100])

    monkeypatch.setattr(shutil, "copyfile", copy_half)
    assert "not a readable safetensors file" in refused(pool, lora)


ADD = """
import sys, time
from pathlib import Path
from headwater.compose import AdapterPool
pool, source, me, go = AdapterPool(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
Path(f"{go}-{me}").touch()
while not go.exists():
    time.sleep(0.001)
for i in range(15):
    pool.add(source, f"{me}-{i}", same_base=True)
    if i % 3 == 0:
        pool.remove(f"{me}-{i}")
"""


def test_two_processes_that_change_a_pool_at_once_lose_nothing(pool, lora, tmp_path):
    go = tmp_path / "go"
    command = [sys.executable, "-c", ADD, str(pool.path), str(lora)]
    both = [subprocess.Popen([*command, me, str(go)], stderr=subprocess.PIPE, text=True) for me in ("a", "b")]
    while not all((tmp_path / f"go-{me}").exists() for me in ("a", "b")):
        assert all(process.poll() is None for process in both), [process.stderr.read() for process in both]
        time.sleep(0.01)
    go.touch()
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    added = {f"{me}-{i}" for me in ("a", "b") for i in range(15) if i % 3}
    assert set(AdapterPool(pool.path).names) == {*PLANS, *added}
    assert AdapterPool(pool.path).check() == []
    pool.add(lora, "mine")  # opened before all that
    assert set(AdapterPool(pool.path).names) == {*PLANS, *added, "mine"}
    with pytest.raises(HeadwaterError, match="has an adapter 'a-1' already"):
        AdapterPool(pool.path).add(lora, "a-1")


def test_names_are_checked_against_what_is_there_now(pool, lora):
    other = AdapterPool(pool.path)
    other.add(lora, "new")
    before = (pool.folder("plain").parent / "new" / CONFIG).stat().st_mtime_ns
    with pytest.raises(HeadwaterError, match="has an adapter 'new' already"):
        pool.add(lora, "new")
    assert (pool.folder("plain").parent / "new" / CONFIG).stat().st_mtime_ns == before
    other.remove("new")
    with pytest.raises(HeadwaterError, match="no adapter 'new'"):
        pool.remove("new")


def test_a_pool_that_somebody_else_holds_is_waited_for_and_then_given_up(pool, lora, monkeypatch):
    monkeypatch.setattr("headwater.compose.pool._PATIENCE", 0.05)
    with FileLock(pool.path / ".lock"):
        with pytest.raises(HeadwaterError, match="another process has been changing this pool"):
            pool.add(lora, "new")
        assert sorted(p.name for p in (pool.path / "adapters").iterdir()) == sorted(PLANS)
    pool.add(lora, "new")


def test_a_failed_write_leaves_the_index_as_it_was(pool, lora, monkeypatch):
    before = (pool.path / "pool.json").read_bytes()

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(HeadwaterError, match="disk full"):
        pool.add(lora, "new")
    monkeypatch.undo()
    assert (pool.path / "pool.json").read_bytes() == before
    assert AdapterPool(pool.path).check() == []  # nor is the adapter left that the index does not name
    pool.add(lora, "new")
    assert AdapterPool(pool.path).check() == []


def test_no_pool(tmp_path, made):
    with pytest.raises(HeadwaterError, match="no adapter pool in this folder"):
        AdapterPool(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(HeadwaterError, match="not an empty folder"):
        AdapterPool.create(tmp_path, str(made[1] / "base"))
    assert headwater.AdapterPool is AdapterPool


def test_written_adapters_are_read_back_exactly_by_headwater_and_peft(pool, tmp_path):
    from peft import PeftModel

    for name in PLANS:
        adapter = pool.load(name)
        write_adapter(adapter, tmp_path / name, pool.base_model)
        again = read_adapter(tmp_path / name, name, pool.fingerprint.layers)
        assert again.layers.keys() == adapter.layers.keys()
        stock = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / name)
        for layer, factors in adapter.layers.items():
            assert torch.equal(again.layers[layer].A, factors.A)
            assert torch.equal(again.layers[layer].B, factors.B)
            assert again.layers[layer].scaling == pytest.approx(factors.scaling, rel=1e-12)
            delta = stock.get_submodule(f"base_model.model.{layer}").get_delta_weight("default")
            torch.testing.assert_close(delta, factors.delta(), rtol=1e-5, atol=1e-6)


def test_a_real_dora_adapter_is_refused(tmp_path):
    model = get_peft_model(
        make_tiny_llama(), LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["up_proj"])
    )
    model.save_pretrained(tmp_path / "dora")
    with pytest.raises(HeadwaterError) as caught:
        read_adapter(tmp_path / "dora", "dora")
    assert "use_dora is True" in str(caught.value)
    assert "lora_magnitude_vector" in str(caught.value)
