"""Base models: GGUF files become safetensors once, whole or not at all, and every bad input is named."""

from __future__ import annotations

import os

import pytest
import torch

from headwater import base_model
from headwater.base_model import cache_dir, load_base_model, load_tokenizer
from headwater.errors import HeadwaterError

pytest.importorskip("gguf")

HIDDEN, LAYERS = 64, 2


def test_gguf_weights_equal_the_reference_dequantiser(gguf_file):
    path, dense = gguf_file
    model, tokenizer = load_base_model(str(path))
    state = model.state_dict()
    names = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    for i in range(LAYERS):
        names[f"blk.{i}.attn_v"] = f"model.layers.{i}.self_attn.v_proj"
        names[f"blk.{i}.attn_output"] = f"model.layers.{i}.self_attn.o_proj"
        for part in ("gate", "up", "down"):
            names[f"blk.{i}.ffn_{part}"] = f"model.layers.{i}.mlp.{part}_proj"
    for ours, theirs in names.items():
        expected = torch.tensor(dense[ours])
        assert torch.equal(state[f"{theirs}.weight"], expected), ours
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.convert_ids_to_tokens(tokenizer("he").input_ids) == ["he"]


def test_gguf_is_converted_once_and_found_after_it_moved(gguf_file, tmp_path, monkeypatch):
    path, _ = gguf_file
    first, _ = load_base_model(str(path))
    moved = tmp_path / "elsewhere" / path.name
    moved.parent.mkdir()
    path.rename(moved)
    monkeypatch.setattr(base_model, "_dequantise", lambda *_: pytest.fail("converted a second time"))
    second, _ = load_base_model(str(moved), dtype="bfloat16")
    assert second.dtype == torch.bfloat16
    assert torch.equal(second.lm_head.weight, first.lm_head.weight.bfloat16())
    assert len(list((cache_dir() / "gguf").iterdir())) == 1


def test_converted_model_can_be_saved_and_trained(gguf_file, tmp_path):
    """A model that still counts as quantised is refused by save_pretrained and Trainer."""
    model, _ = load_base_model(str(gguf_file[0]))
    assert getattr(model.config, "quantization_config", None) is None
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_a_conversion_that_fails_leaves_nothing(gguf_file, monkeypatch):
    def cut(_, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(base_model, "_dequantise", cut)
    with pytest.raises(HeadwaterError, match=r"No space left on device[\s\S]*float32"):
        load_base_model(str(gguf_file[0]))
    assert list((cache_dir() / "gguf").iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(gguf_file, monkeypatch):
    def interrupt(_, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model, "_dequantise", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_base_model(str(gguf_file[0]))
    assert list((cache_dir() / "gguf").iterdir()) == []


def test_two_processes_that_convert_at_once_agree(gguf_file, monkeypatch):
    """The other process's folder appears while this one is still converting."""
    real = base_model._dequantise

    def slow(path, folder):
        real(path, folder)
        other = cache_dir() / "gguf" / f"tiny-{base_model.sha256_of(path)[:16]}"
        real(path, other)

    monkeypatch.setattr(base_model, "_dequantise", slow)
    model, _ = load_base_model(str(gguf_file[0]))
    assert model.config.hidden_size == HIDDEN
    assert len(list((cache_dir() / "gguf").iterdir())) == 1


def test_a_cut_gguf_is_named(gguf_file):
    path, _ = gguf_file
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(HeadwaterError, match=r"tiny\.gguf: could not dequantise"):
        load_base_model(str(path))


def test_missing_gguf_package_names_the_extra(gguf_file, monkeypatch):
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HeadwaterError, match=r"headwater\[gguf\]"):
        load_base_model(str(gguf_file[0]))


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "a/b/c", "missing.gguf"])
def test_missing_paths_are_not_looked_up_on_the_hub(name):
    with pytest.raises(HeadwaterError, match="no such file or folder") as caught:
        load_base_model(name)
    assert name in str(caught.value)


def test_bad_folders_and_files(tmp_path, tiny_llama, tiny_tokenizer):
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(HeadwaterError, match="not a GGUF file"):
        load_base_model(str(tmp_path / "text.txt"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(HeadwaterError, match=r"no config\.json"):
        load_base_model(str(empty))
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(HeadwaterError, match="this is an adapter"):
        load_base_model(str(empty))
    tiny_tokenizer.save_pretrained(empty)
    tiny_llama().config.save_pretrained(empty)
    with pytest.raises(HeadwaterError, match=r"no \*\.safetensors"):
        load_base_model(str(empty))


def test_pickled_weights_are_refused(tmp_path, tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(HeadwaterError, match=r"no \*\.safetensors"):
        load_base_model(str(tmp_path))


def test_unreachable_hub_says_what_to_do():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(HeadwaterError, match="HF_HUB_OFFLINE is set"):
        load_base_model("nobody/no-such-model")


def test_folder_round_trip_and_pad_token(tmp_path, tiny_llama, tiny_tokenizer):
    model = tiny_llama(pad_token_id=None)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = load_base_model(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert loaded.generation_config.pad_token_id == tokenizer.eos_token_id
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(HeadwaterError, match="unknown dtype 'fp8'"):
        load_base_model(str(tmp_path), dtype="fp8")


def test_the_head_gets_its_input_in_one_piece(tmp_path, tiny_llama, tiny_tokenizer):
    """A strided one is multiplied row by row on the CPU."""
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, _ = load_base_model(str(tmp_path))
    seen = []
    forward = model.lm_head.forward
    model.lm_head.forward = lambda states: seen.append(states.is_contiguous()) or forward(states)
    model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), logits_to_keep=1)
    assert seen == [True]


def test_cache_dir(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("HEADWATER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "headwater"
