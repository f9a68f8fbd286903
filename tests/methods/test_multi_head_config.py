"""What the configs refuse, and how many parameters they make."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from headwater import HeadwaterError, HydraLoraConfig, MLoraConfig, RLoraConfig, make_config
from headwater.analysis import heads

NAN, INFINITY = float("nan"), float("inf")
METHODS = ["rlora", "mlora", "hydralora"]
ALL = [
    ("r", 0), ("r", -2), ("r", 2.5), ("r", "8"), ("r", True), ("r", None),
    ("lora_alpha", 0), ("lora_alpha", -1), ("lora_alpha", NAN), ("lora_alpha", INFINITY), ("lora_alpha", "16"),
    ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("lora_dropout", NAN), ("lora_dropout", "0.1"),
    ("use_rslora", "yes"), ("use_rslora", 1), ("init_seed", "a"), ("init_seed", 1.5),
    ("rank_pattern", {"up_proj": 0}), ("rank_pattern", {"up_proj": "4"}), ("alpha_pattern", {"up_proj": -1}),
    ("num_heads", 0), ("num_heads", -1), ("num_heads", 2.0), ("num_heads", "3"), ("num_heads", False),
]  # fmt: skip
MULTI_HEAD = [
    ("head_dropout", 1), ("head_dropout", -0.1), ("head_dropout", "x"), ("gamma", 0), ("gamma", -64),
    ("gamma", INFINITY),
    ("init", "papers"), ("init", "zero"), ("init", None), ("compensation", "none"), ("compensation", True),
    ("init_norm_clip", "yes"),
]  # fmt: skip
OWN = {
    "rlora": [*MULTI_HEAD, ("router_init", "zero"), ("router_init", "random")],
    "mlora": [*MULTI_HEAD, ("head_agg", "average"), ("head_agg", None)],
    "hydralora": [
        ("input_dropout", "none"), ("input_dropout", 0.1), ("balance_loss_weight", -0.1), ("balance_loss_weight", "0"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "field", "value"), [(name, *case) for name in METHODS for case in (*ALL, *OWN[name])]
)
def test_a_bad_value_is_one_problem_that_names_field_and_value(method, field, value):
    with pytest.raises(HeadwaterError) as error:
        make_config(method, **{field: value})
    (problem,) = error.value.problems
    assert problem.where == field
    shown = next(iter(value.values())) if isinstance(value, dict) else value
    assert repr(shown) in problem.what


def test_a_pattern_of_layers_needs_the_layers():
    with pytest.raises(HeadwaterError, match="layers_pattern: needs `layers_to_transform`"):
        make_config("rlora", layers_pattern="h")


@pytest.mark.parametrize("config", [RLoraConfig, MLoraConfig, HydraLoraConfig])
def test_all_problems_of_a_config_come_at_once(config):
    with pytest.raises(HeadwaterError) as error:
        config(r="8", num_heads=0, lora_dropout=2, alpha_pattern={"up_proj": 0})
    assert [p.where for p in error.value.problems] == ["r", "lora_dropout", "alpha_pattern", "num_heads"]


@pytest.mark.parametrize("num_heads", [2, 3])
def test_zero_heads_behind_a_zero_router_are_refused_with_the_way_out(num_heads):
    with pytest.raises(HeadwaterError, match="router_init='kaiming'"):
        RLoraConfig(init="zeros", router_init="zeros", num_heads=num_heads)
    RLoraConfig(init="zeros", router_init="kaiming", num_heads=num_heads)
    RLoraConfig(init="zeros", router_init="zeros", num_heads=1)  # no symmetry to break
    MLoraConfig(init="zeros", num_heads=num_heads)


@pytest.mark.parametrize(
    ("method", "wrong", "nearest"),
    [
        ("rlora", "num_head", "num_heads"),
        ("mlora", "head_aggr", "head_agg"),
        ("hydralora", "inpt_dropout", "input_dropout"),
    ],
)
def test_an_unknown_field_names_the_nearest(method, wrong, nearest):
    with pytest.raises(HeadwaterError, match=f"unknown field '{wrong}'(.|\n)*did you mean '{nearest}'"):
        make_config(method, **{wrong: 1})


@settings(max_examples=40, deadline=None)
@given(data=st.data(), method=st.sampled_from(METHODS))
def test_a_good_config_survives_the_file(tmp_path_factory, data, method):
    fields = {
        "r": data.draw(st.integers(1, 64)),
        "num_heads": data.draw(st.integers(1, 12)),
        "lora_alpha": data.draw(st.sampled_from([1, 16, 32.5])),
        "use_rslora": data.draw(st.booleans()),
        "lora_dropout": data.draw(st.floats(0, 0.99)),
        "init_seed": data.draw(st.none() | st.integers(0, 2**40)),
        "rank_pattern": {"up_proj": data.draw(st.integers(1, 9))},
    }
    own = {
        "head_dropout": st.floats(0, 0.99),
        "gamma": st.floats(0.01, 1000),
        "init": st.sampled_from(["paper", "official_intended", "official_as_run"]),
        "compensation": st.sampled_from(["buffer", "center"]),
        "init_norm_clip": st.booleans(),
    }
    choices = {
        "rlora": {**own, "router_init": st.sampled_from(["zeros", "kaiming"])},
        "mlora": {**own, "head_agg": st.sampled_from(["mean", "sum"])},
        "hydralora": {
            "input_dropout": st.sampled_from(["shared", "per_head"]),
            "balance_loss_weight": st.floats(0, 1),
        },
    }[method]
    fields |= {name: data.draw(choice, label=name) for name, choice in choices.items()}
    config = make_config(method, target_modules=["up_proj"], **fields)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    loaded = PeftConfig.from_pretrained(folder)
    assert type(loaded) is type(config)
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.target_modules == {"up_proj"}


def count(config: PeftConfig, **sizes) -> int:
    with torch.device("meta"):
        base = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, **sizes))
    return get_peft_model(base, config).get_nb_trainable_parameters()[0]


QWEN_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(("sizes", "published"), [(QWEN_3B, 14_201_856), (QWEN_7B, 19_052_544)])
def test_trainable_parameters_are_the_papers(sizes, published):
    shapes = [(sizes["hidden_size"], sizes["intermediate_size"])] * 2 + [
        (sizes["intermediate_size"], sizes["hidden_size"])
    ]
    r, N = 4, 3
    with_router = sizes["num_hidden_layers"] * sum(r * i + N * r * o + N * i for i, o in shapes)
    router = sizes["num_hidden_layers"] * sum(N * i for i, _ in shapes)
    assert with_router == published
    assert count(RLoraConfig(r=r, num_heads=N, target_modules=MLP), **sizes) == published
    assert count(MLoraConfig(r=r, num_heads=N, target_modules=MLP), **sizes) == published - router
    assert count(HydraLoraConfig(r=r, num_heads=N, target_modules=MLP), **sizes) == published


def test_patterns_change_rank_and_scaling_where_they_match(tiny_llama):
    config = RLoraConfig(
        r=4, num_heads=2, lora_alpha=8, target_modules=MLP,
        rank_pattern={"up_proj": 9}, alpha_pattern={"layers.1.mlp.down_proj": 2},
    )  # fmt: skip
    held = heads(get_peft_model(tiny_llama(), config))
    assert len(held) == 6
    for name, h in held.items():
        r = 9 if name.endswith("up_proj") else 4
        alpha = 2 if name == "model.layers.1.mlp.down_proj" else 8
        assert h.A.shape[0] == h.B.shape[2] == r
        assert h.scaling == pytest.approx(alpha / r**0.5)


def test_rank_larger_than_the_layer_is_refused(tiny_llama):
    with pytest.raises(HeadwaterError, match=r"rank 33 is larger than layer model\.layers\.0\.mlp\.up_proj"):
        get_peft_model(tiny_llama(), RLoraConfig(r=33, target_modules=["up_proj"]))


def test_lora_by_name_is_pefts_own():
    assert type(make_config("lora", r=4, target_modules=["up_proj"])) is LoraConfig
