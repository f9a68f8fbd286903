"""Conditional MixLoRA's properties, numbered as in its specification, against loops over rows, factors and tokens."""

from __future__ import annotations

import pytest
import torch
from adapted_linear import adapt, base_of, leaf, move, noise, parameters
from peft import PeftModel, get_peft_model
from stock_trainer import train
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
)

from headwater import HeadwaterError, NotMergeable, make_config, merge_with_gates, observe

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
d_in, d_out, E, r = 5, 6, 6, 3


def model_of(**fields):
    given = {"r": r, "num_factors": E, "lora_alpha": 4, "lora_dropout": 0.0, **fields}
    return move(adapt("cond_mixlora", d_in, d_out, **given), fields.get("init_seed", 1))


def held_by(model):
    """Parameters and, where routers are not trained, buffers."""
    return dict(model.base_model.model.layer.branches["default"].state_dict())


def softmax(logits: list) -> list:
    e = [torch.exp(z) for z in logits]
    return [v / sum(e) for v in e]


def best(scores: list, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda n: -float(scores[n].detach()))[:k]


def plain_choice(x, p, *, router="ifs+cfs", fusion="paper", sum_bug=False):
    """x: the tokens pooled over. Returns (I_A, their probabilities, I_B, theirs)."""
    mean = sum(x) / len(x)
    l_A = [(p["router_A"][e] * mean).sum() for e in range(E)]
    I_A, p_A = best(l_A, r), softmax(l_A)
    weight_A = [p_A[i] for i in I_A]
    if router == "tied":
        return I_A, weight_A, I_A, [torch.ones(())] * r
    p_B = softmax([(p["router_B"][e] * mean).sum() for e in range(E)])
    if router == "ifs+cfs":
        conditional = [0.0] * E
        for j, i in enumerate(I_A):
            C, a = p["router_AB"][j], p["A"][i]
            one = softmax([a.sum() * C[e].sum() if sum_bug else (C[e] * a).sum() for e in range(E)])
            conditional = [c + o for c, o in zip(conditional, one, strict=True)]
        if fusion == "release":
            conditional = softmax(conditional)
        p_B = [q + c for q, c in zip(p_B, conditional, strict=True)]
    I_B = best(p_B, r)
    return I_A, weight_A, I_B, [p_B[i] for i in I_B]


def plain_layer(x, base, p, s, pooled, *, grad="straight_through", **how):
    """x `(rows, length, d_in)`; pooled: for each row the positions that choose."""
    rows = []
    for row, positions in zip(x, pooled, strict=True):
        I_A, w_A, I_B, w_B = plain_choice([row[t] for t in positions], p, **how)
        delta = 0.0
        for j in range(r):
            weight = w_A[j] * w_B[j]
            if grad == "straight_through":
                weight = w_A[j] / w_A[j].detach() * (w_B[j] / w_B[j].detach())
            delta = delta + (torch.ones(()) if grad == "none" else weight) * torch.outer(p["B"][I_B[j]], p["A"][I_A[j]])
        rows.append(torch.stack([base(token) + s * delta @ token for token in row]))
    return torch.stack(rows)


ROUTERS = [
    {"router": "ifs+cfs"},
    {"router": "ifs+cfs", "cfs_fusion": "release"},
    {"router": "ifs+cfs", "cfs_fusion": "release", "cfs_sum_bug": True},
    {"router": "ifs"},
    {"router": "tied"},
]


@pytest.mark.parametrize("grad", ["straight_through", "scored", "none"])
@pytest.mark.parametrize("fields", ROUTERS, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_property_3_factors_in_rank_space_are_the_explicit_update_values_and_gradients(fields, grad):
    for seed in range(4):
        model = model_of(router_grad=grad, init_seed=seed, **fields)
        own = {name: leaf(p) for name, p in held_by(model).items()}
        x, weight = noise(3, 4, d_in, seed=seed), noise(3, 4, d_out, seed=9)
        x_fused, x_plain = leaf(x), leaf(x)
        how = {
            "router": fields["router"],
            "fusion": fields.get("cfs_fusion", "paper"),
            "sum_bug": "cfs_sum_bug" in fields,
        }
        expected = plain_layer(x_plain, base_of(model), own, 4 / r, [range(4)] * 3, grad=grad, **how)
        found = model(x_fused)
        torch.testing.assert_close(found, expected, **CLOSE)
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(x_fused.grad, x_plain.grad, **CLOSE)
        for name, p in parameters(model).items():
            theirs = torch.zeros_like(p) if own[name].grad is None else own[name].grad
            found_grad = p.grad
            torch.testing.assert_close(found_grad, theirs, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
            assert not name.startswith("router") or found_grad.any(), name  # property 8
        assert any(name.startswith("router") for name in parameters(model)) == (grad != "none")


def test_property_8_straight_through_changes_no_bit_of_the_output():
    x = noise(3, 4, d_in)
    for seed in range(5):
        learns, does_not = (model_of(router_grad=grad, init_seed=seed) for grad in ("straight_through", "none"))
        does_not.load_state_dict(learns.state_dict())
        assert torch.equal(learns(x), does_not(x))


def test_property_1_starts_at_the_base():
    model = adapt("cond_mixlora", d_in, d_out, r=r, num_factors=E, lora_dropout=0.5)
    x = noise(3, 4, d_in)
    assert torch.equal(model.train()(x), base_of(model)(x))


def test_property_2_tied_factors_that_are_all_chosen_are_a_lora():
    model, x = model_of(router="tied", num_factors=r), noise(3, 4, d_in)
    A, B = parameters(model)["A"], parameters(model)["B"]
    torch.testing.assert_close(model(x), base_of(model)(x) + 4 / r * x @ A.T @ B, **CLOSE)


def test_property_4_few_factors_get_a_gradient():
    model, x = model_of(router_grad="none"), noise(1, 4, d_in)
    model(x).square().sum().backward()
    I_A, _, I_B, _ = plain_choice(list(x[0]), held_by(model))
    assert sorted(I_A) == parameters(model)["A"].grad.any(1).nonzero().flatten().tolist()
    assert sorted(I_B) == parameters(model)["B"].grad.any(1).nonzero().flatten().tolist()


def test_property_5_the_choice_is_one_per_row_and_ignores_other_rows_and_padding():
    model, x, seen = model_of(), noise(3, 4, d_in), []
    with observe(model, lambda name, gate: seen.append(gate)):
        expected = model(x)
    assert torch.equal(seen[0], seen[0][:, :1].expand_as(seen[0]))
    for pool in seen[0].chunk(2, dim=-1):  # the a's, then the b's
        assert torch.all((pool > 0).sum(-1) == r)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(3, 4))
    assert any(not torch.equal(seen[0][0], seen[0][n]) for n in (1, 2)), "all rows choose alike; this shows nothing"
    torch.testing.assert_close(torch.cat([model(row[None]) for row in x]), expected, **CLOSE)
    junk = 10 * noise(3, 2, d_in, seed=5)
    for parts, mask in (([x, junk], [1] * 4 + [0] * 2), ([junk, x], [0] * 2 + [1] * 4)):
        found = model(torch.cat(parts, 1), attention_mask=torch.tensor([mask] * 3))
        torch.testing.assert_close(found[:, torch.tensor(mask).bool()], expected, **CLOSE)


@pytest.mark.parametrize("pool", ["prompt", "all_tokens"])
def test_property_5_answers_do_not_leak_into_the_choice(pool):
    """Rows whose first two tokens are the prompt; the last row is plain text, which has none, and pools over all."""
    model, x = model_of(pool=pool), noise(3, 5, d_in)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 1, 0], [1] * 5])
    labels = torch.tensor([[-100, -100, 7, 7, 7], [-100, -100, 7, 7, -100], [7] * 5])
    found = model(x, attention_mask=mask, headwater_labels=labels)
    pooled = [range(2), range(2), range(5)] if pool == "prompt" else [range(5), range(4), range(5)]
    expected = plain_layer(x, base_of(model), parameters(model), 4 / r, pooled)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


def llama_model(base, **fields):
    config = make_config(
        "cond_mixlora", target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", lora_dropout=0.0, **fields
    )
    return move(get_peft_model(base, config).eval(), 1, size=0.3)


def test_property_6_cached_decoding_keeps_the_choice_of_the_prompt(tiny_llama):
    """Logits of cached decoding are those of one forward whose choice is the prompt's; pads on the left."""
    model = llama_model(tiny_llama())
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 0
    labels = torch.where(torch.arange(9) < 5, -100, ids)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).logits
    out = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], use_cache=True)
    seen = []
    for t in range(5, 9):
        out = model(
            input_ids=ids[:, t : t + 1],
            attention_mask=mask[:, : t + 1],
            position_ids=positions[:, t : t + 1],
            past_key_values=out.past_key_values,
        )
        seen.append(out.logits)
    torch.testing.assert_close(torch.cat(seen, 1), whole[:, 5:], atol=1e-5, rtol=1e-4)
    free = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert (free - whole).abs().max() > 1e-3, "the answer would choose alike; this shows nothing"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_does_not_choose_under_a_static_cache_s_mask_either(tiny_llama, attention):
    model = llama_model(tiny_llama(attn_implementation=attention))
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 258, "output_logits": True}
    static = {"cache_implementation": "static", "disable_compile": True}
    expected, found = (
        model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **how, **kind).logits
        for kind in ({}, static)
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_model_in_training_mode_writes_what_it_writes_in_eval_mode(tiny_llama):
    """As trainers do that sample from the model they train."""
    model = llama_model(tiny_llama())
    prompts = torch.randint(0, 250, (2, 6), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 258}
    expected = model.generate(input_ids=prompts, **how)
    assert torch.equal(model.train().generate(input_ids=prompts, **how), expected)


def test_labels_of_a_token_classifier_are_no_prompt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForTokenClassification(BertConfig(vocab_size=99, num_labels=3, **sizes))
    config = make_config("cond_mixlora", target_modules=["query", "value"], task_type="TOKEN_CLS", lora_dropout=0.0)
    model = move(get_peft_model(base, config).eval(), 1, size=0.3)
    ids = torch.randint(5, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(9) % 3 == 0, -100, 1).repeat(2, 1)
    assert torch.equal(model(input_ids=ids, labels=labels).logits, model(input_ids=ids).logits)


def test_property_6_one_generation_does_not_remember_another(tiny_llama):
    model = llama_model(tiny_llama())
    prompts = torch.randint(0, 250, (2, 6), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 258}
    together = model.generate(input_ids=prompts, **how)
    again = torch.cat([model.generate(input_ids=prompts[n : n + 1], **how) for n in (0, 1)])
    assert torch.equal(together, again)


def test_two_adapters_made_from_one_config_choose_by_themselves(tiny_llama):
    config = make_config("cond_mixlora", r=r, num_factors=E, target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("other", config)
    move(model, 1).eval().base_model.set_adapter(["default", "other"])
    written = {"input_ids": torch.tensor([[4, 5, 6], [7, 8, 9]]), "max_new_tokens": 6, "do_sample": False}
    found, plain = (
        torch.stack(model.generate(**written, use_cache=cache, output_logits=True, return_dict_in_generate=True).logits)
        for cache in (True, False)
    )
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_property_7_pairing_matters_and_the_order_of_the_pools_does_not():
    model, x = model_of(router="ifs"), noise(3, 4, d_in)
    expected, p = model(x), parameters(model)
    branch = model.base_model.model.layer.branches["default"]
    choose = branch.choose

    def swapped(logits):
        index_a, weight_a, index_b, weight_b = choose(logits)
        order = [1, 0, 2]
        return index_a, weight_a, index_b[:, order], weight_b[:, order]

    branch.choose = swapped
    assert (model(x) - expected).abs().max() > 1e-3
    del branch.choose
    with torch.no_grad():
        for order, names in (([5, 3, 1, 0, 2, 4], ("A", "router_A")), ([1, 2, 3, 4, 5, 0], ("B", "router_B"))):
            for name in names:
                p[name].copy_(p[name][order].clone())
    torch.testing.assert_close(model(x), expected, **CLOSE)


@pytest.mark.parametrize("grad", ["straight_through", "none"])
def test_property_8_a_file_keeps_the_routers_and_so_the_choices(tiny_llama, tmp_path, grad):
    """The released file leaves them out, though they decide everything."""
    model, ids, shown = llama_model(tiny_llama(), router_grad=grad), torch.arange(20).view(2, 10), ([], [])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    outputs = []
    for which, seen in zip((model, loaded), shown, strict=True):
        with observe(which, lambda name, gate, seen=seen: seen.append(gate)):
            outputs.append(which(input_ids=ids).logits)
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*shown, strict=True))


def test_one_pairing_merges_for_all_rows():
    model, x = model_of(), noise(1, 4, d_in)
    with pytest.raises(NotMergeable, match="merge_with_gates"):
        model.merge_and_unload()
    I_A, _, I_B, _ = plain_choice(list(x[0]), parameters(model))
    pairing = torch.zeros(E, E)
    pairing[I_A, I_B] = 1
    expected = model(x)
    with pytest.raises(NotMergeable, match="merge_with_gates"):
        merge_with_gates(model, "uniform")
    with pytest.raises(HeadwaterError, match=r"\(E, E\)"):
        merge_with_gates(model, {"layer": torch.zeros(E, E + 1)})
    torch.testing.assert_close(merge_with_gates(model, {"layer": pairing})(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", ["straight_through", "scored"])
def test_observers_of_merging_see_each_row_s_pairing(grad):
    model, x, seen = model_of(router_grad=grad), noise(3, 4, d_in), []
    with observe(model, lambda name, gate: seen.append(gate), merging=True):
        expected = model(x)
    assert seen[0].shape == (3, 4, E, E)
    for n, row in enumerate(x):
        I_A, w_A, I_B, w_B = plain_choice(list(row), parameters(model))
        pairing = torch.zeros(E, E, dtype=torch.float64)
        for i, w_i, j, w_j in zip(I_A, w_A, I_B, w_B, strict=True):
            pairing[i, j] += w_i.item() * w_j.item() if grad == "scored" else 1.0
        torch.testing.assert_close(seen[0][n].double(), pairing.expand(4, E, E), rtol=1e-5, atol=1e-6)
    alone = merge_with_gates(model, {"layer": seen[0][0, 0]})
    torch.testing.assert_close(alone(x[:1]), expected[:1], rtol=1e-5, atol=1e-5)


def test_starts_and_counts_as_released():
    model = adapt("cond_mixlora", 2048, 8, num_factors=16, r=4, dtype=torch.float32)
    p = parameters(model)
    assert sum(t.numel() for t in p.values()) == 16 * (2048 + 8) + 2 * 16 * 2048 + 4 * 16 * 2048
    for name, fan_in in (("A", 2048), ("router_A", 2048), ("router_B", 2048), ("router_AB", 4 * 2048)):
        assert p[name].abs().max() <= fan_in**-0.5
        assert p[name].std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)


@pytest.mark.parametrize("router", ["ifs+cfs", "ifs", "tied"])
def test_plain_trainer_lowers_the_loss_and_moves_every_router(tiny_llama, tmp_path, router):
    """The released routers have no gradient, and stay the random numbers they began as."""
    _, losses, still = train(tiny_llama(), tmp_path, "cond_mixlora", router=router, r=2, num_factors=6, lora_alpha=8)
    assert sum(losses[-4:]) / 4 < losses[0] - 0.2
    assert not still


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"num_factors": 3}, "num_factors"),
        ({"rank_pattern": {"up_proj": 17}}, "num_factors"),
        ({"router": "x"}, "router"),
        ({"cfs_fusion": "x"}, "cfs_fusion"),
        ({"router_grad": "x"}, "router_grad"),
        ({"pool": "x"}, "pool"),
        ({"cfs_sum_bug": 1}, "cfs_sum_bug"),
    ],
)
def test_a_bad_value_is_one_problem_that_names_its_field(fields, where):
    with pytest.raises(HeadwaterError) as refused:
        make_config("cond_mixlora", **fields)
    assert [problem.where for problem in refused.value.problems] == [where]


def test_activations_that_show_no_rows_are_refused_not_cut_into_rows():
    """DeBERTa projects a table of relative positions, one for all rows, with the layers that read the rows."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **sizes, num_attention_heads=2, relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"],
            position_buckets=4, max_relative_positions=8,
        )
    )  # fmt: skip
    config = make_config("cond_mixlora", r=2, num_factors=4, target_modules=["query_proj"], task_type="SEQ_CLS")
    model = get_peft_model(base, config).eval()
    ids = torch.arange(3, 17).view(2, 7)
    with pytest.raises(HeadwaterError, match=r"query_proj, \(1, 8\), do not show which of 2 rows"):
        model(input_ids=ids)
    model(input_ids=ids[:1])  # one row is all there is


def recurrent_model(kind):
    """Mamba's cache has another keyword and counts no positions; that of MiniMax's first layer counts none."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 2}
    return MiniMaxForCausalLM(MiniMaxConfig(**sizes, **heads, layer_types=["linear_attention", "full_attention"]))


@pytest.mark.parametrize("kind", ["mamba", "minimax"])
def test_choices_outlive_caches_of_running_states(kind):
    fields = {"num_factors": 6, "r": 2, "task_type": "CAUSAL_LM", "target_modules": ["in_proj", "q_proj", "qkv_proj"]}
    model = move(get_peft_model(recurrent_model(kind), make_config("cond_mixlora", **fields)), 1).eval()
    generate = {
        "input_ids": torch.arange(3, 17).view(2, 7), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False,
        "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    cached, whole = (model.generate(**generate, use_cache=use).logits for use in (True, False))
    for found, expected in zip(cached, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
