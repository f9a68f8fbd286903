"""A small GGUF model made in code, and a cache folder of each test's own."""

from __future__ import annotations

import pytest
import torch

HIDDEN, INNER, LAYERS, HEADS = 64, 96, 2, 4
TOKENS = [bytes([b]).decode("latin-1") for b in range(33, 127)] + ["he", "<eos>"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gguf_file(tmp_path):
    """A llama of two layers in Q8_0 with a byte-pair tokenizer, and the dequantised arrays by GGUF tensor name."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_norm": (HIDDEN,), f"blk.{i}.ffn_norm": (HIDDEN,)}
        shapes |= {f"blk.{i}.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_gate": (INNER, HIDDEN), f"blk.{i}.ffn_up": (INNER, HIDDEN)}
        shapes[f"blk.{i}.ffn_down"] = (HIDDEN, INNER)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(len(TOKENS) - 1)
    writer.add_eos_token_id(len(TOKENS) - 1)
    dense = {}
    for name, shape in shapes.items():
        values = (torch.randn(shape, generator=generator) * 0.1).numpy()
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            dense[name] = values
        else:
            blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            dense[name] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, dense
