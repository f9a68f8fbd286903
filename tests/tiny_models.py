"""A tiny seeded model and a tokenizer made in code, so that no test downloads anything."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_llama(seed: int = 0, *, vocab_size: int = 300, **overrides) -> LlamaForCausalLM:
    """A random float32 Llama with 2 layers, hidden size 32, in eval mode. `overrides` go to `LlamaConfig`."""
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "attn_implementation": "eager",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**fields, **overrides})).eval()


def make_tiny_gpt2(seed: int = 0, **overrides) -> GPT2LMHeadModel:
    """A random float32 GPT-2 of the same sizes, whose positions are learned. `overrides` go to `GPT2Config`."""
    fields = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 256, "eos_token_id": 257}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**{**fields, **overrides})).eval()


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 byte tokens, then bos 256, eos 257, pad 258, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
