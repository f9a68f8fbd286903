"""Equal trainable parameters: counted, not computed, and the nearest there is."""

import pytest
from peft import get_peft_model
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater import make_config, methods
from headwater.compare.budget import _nearest, field_to_solve, solve, trainable_parameters
from headwater.config import RunConfig
from headwater.errors import HeadwaterError

METHODS = ["lora", *(m.name for m in methods() if m.family != "test")]
# cora as a saved adapter, so that no file of a basis is needed
FIELDS = {"cora": {"basis_sha256": "0"}, "smora": {"top_k": 1, "r": 8}, "moe_lora": {"num_experts": 4}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough for ranks to have room, and one layer deep."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama(hidden_size=128, intermediate_size=192, num_hidden_layers=1).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def config_of(model, **method):
    fields = {"target_modules": ["up_proj", "down_proj"], **method}
    tasks = [{"name": "a", "train": "a.jsonl"}, {"name": "b", "train": "b.jsonl"}]
    return RunConfig(model_name_or_path=str(model), method=fields, tasks=tasks, output_dir="out")


def really_trained(section):
    """Trainable parameters of the adapter on a real model, with weights."""
    fields = dict(section)
    model = make_tiny_llama(hidden_size=128, intermediate_size=192, num_hidden_layers=1)
    adapted = get_peft_model(model, make_config(fields.pop("name"), task_type="CAUSAL_LM", **fields))
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("match", ["rank", "heads"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_comes_as_near_as_its_field_allows(model, name, match):
    config, budget = config_of(model, name=name, **FIELDS.get(name, {})), 11_000
    field = field_to_solve(name, match)
    section, count = solve(config, field, budget)
    assert count == really_trained(section)
    value = section.get(field, getattr(make_config(**config.method), field))
    off = abs(count - budget)
    for other in (value - 1, value + 1):
        try:
            known = trainable_parameters(config, {**config.method, field: other})
        except HeadwaterError:
            continue
        assert abs(known - budget) >= off, (other, known, count)


def test_the_scale_of_the_update_does_not_change_with_the_rank(model):
    for name, fields in (("lora", {}), ("lora", {"use_rslora": True}), ("rlora", {}), ("hydralora", {})):
        config = config_of(model, name=name, r=4, lora_alpha=6, **fields)
        section, _ = solve(config, "r", 20_000)
        assert section["r"] > 4
        root = 0.5 if make_config(**config.method).use_rslora else 1.0
        assert section["lora_alpha"] / section["r"] ** root == pytest.approx(6 / 4**root, rel=1e-12)
    smora = config_of(model, name="smora", r=8, lora_alpha=6)  # its scale is alpha itself
    assert solve(smora, "r", 20_000)[0].get("lora_alpha") == 6


def test_what_is_near_already_stays_as_given(model):
    config = config_of(model, name="lora", r=5, lora_alpha=7)
    budget = trainable_parameters(config, config.method) + 3
    assert solve(config, "r", budget)[0] == config.method


def test_what_was_solved_for_is_in_the_section_though_it_is_the_default(model):
    config = config_of(model, name="hydralora")
    count = trainable_parameters(config, config.method)
    for field, default in (("r", 8), ("num_heads", 3)):
        assert solve(config, field, count)[0] == {**config.method, field: default}


def test_heads_are_solved_without_touching_the_rank(model):
    section, _ = solve(config_of(model, name="hydralora", r=4, lora_alpha=8), "num_heads", 20_000)
    assert section["num_heads"] > 3
    assert (section["r"], section["lora_alpha"]) == (4, 8)


def test_a_start_that_goes_by_the_base_weights_can_be_counted(model):
    config = config_of(model, name="rlora", init_norm_clip=True)
    assert trainable_parameters(config, config.method) == really_trained(config.method)


def test_a_rule_between_fields_leaves_values_out(model):
    config = config_of(model, name="smora", r=8, top_k=4, rank_block=4)
    section, _ = solve(config, "r", 11_000)
    assert section["r"] % 4 == 0


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_rank_or_an_alpha_per_layer_cannot_be_solved(model, pattern):
    config = config_of(model, name="lora", **{pattern: {"up_proj": 3}})
    with pytest.raises(HeadwaterError, match="no single rank to solve for"):
        solve(config, "r", 5000)


def test_an_adapter_that_fits_nowhere_says_why(model):
    with pytest.raises(HeadwaterError, match="no layer of the model is called 'nothing'"):
        solve(config_of(model, name="lora", target_modules=["nothing"]), "r", 5000)


@pytest.mark.parametrize(("match", "said"), [("num_experts", "no field 'num_experts'"), ("init", "no field 'init'")])
def test_only_a_number_can_be_solved_for(match, said):
    with pytest.raises(HeadwaterError, match=said):
        field_to_solve("rlora", match)
    assert field_to_solve("malora", "shared_rank") == "shared_rank"


def refuses(limit, count):
    def counted(value):
        if not limit(value):
            raise HeadwaterError(f"{value} does not fit")
        asked.append(value)
        return count(value)

    asked: list[int] = []
    return counted, asked


@pytest.mark.parametrize("start", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    ("count", "limit"),
    [
        (lambda v: 100 * v, lambda v: True),
        (lambda v: 900 + 17 * v, lambda v: v <= 60),
        (lambda v: v * v + 5 * v, lambda v: True),
        (lambda v: 2 ** min(v, 60), lambda v: v <= 500),
        (lambda v: 1234, lambda v: v <= 100),
    ],
)
def test_the_search_finds_what_trying_all_finds(count, limit, start):
    allowed = range(1, 1001)
    for budget in (1, 90, 950, 2_000, 7_777, 10**6):
        counted, asked = refuses(limit, count)
        best = min((v for v in allowed if limit(v)), key=lambda v: abs(count(v) - budget))
        assert abs(count(_nearest(counted, allowed, start, budget)) - budget) == abs(count(best) - budget)
        assert len(asked) <= 18


@pytest.mark.parametrize("start", [1, 2, 3, 9])
def test_of_two_equally_near_the_smaller_is_taken(start):
    assert _nearest(lambda value: 100 * value, range(1, 10), start, 250) == 2


def test_where_only_the_given_value_fits_it_is_taken():
    counted, _ = refuses(lambda v: v == 8, lambda v: 10 * v)
    assert _nearest(counted, range(1, 100), 8, 500) == 8
    counted, _ = refuses(lambda v: False, lambda v: v)
    with pytest.raises(HeadwaterError, match="8 does not fit"):
        _nearest(counted, range(1, 100), 8, 500)
