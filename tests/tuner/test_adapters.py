"""Several adapters on one model: add, switch, combine, disable, delete, unload."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, TaskType
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import headwater
from headwater.tuner import MethodLayer, is_adapted

from .helpers import adapt, assert_same, base_weights, config, layer_output, logits, stir, task_kwargs, tokens
from .rows import BY_ID

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def with_two(row, base):
    """Adapters "default" (rank 4) and "other" (rank 2, fewer layers, another alpha), both away from their start."""
    model = adapt(row, base)
    model.add_adapter("other", config(row, r=2, lora_alpha=4, target_modules=["up_proj", "q_proj"], init_seed=7))
    stir(model, "other", seed=7)
    return model


def test_switching_gives_each_adapter_alone(row, tiny_llama):
    model = with_two(row, tiny_llama())
    first = adapt(row, tiny_llama())
    second = adapt(
        row, tiny_llama(), stirred=False, r=2, lora_alpha=4, target_modules=["up_proj", "q_proj"], init_seed=7
    )
    stir(second, seed=7)

    assert torch.equal(logits(row, model), logits(row, first))
    model.set_adapter("other")
    assert torch.equal(logits(row, model), logits(row, second))
    assert not torch.equal(logits(row, model), logits(row, first))
    model.set_adapter("default")
    assert torch.equal(logits(row, model), logits(row, first))


def test_set_adapter_moves_requires_grad_and_never_to_frozen_tensors(row, tiny_llama):
    model = with_two(row, tiny_llama())
    for active in ("other", "default"):
        model.set_adapter(active)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if f"_branch.{active}." in name}
        assert not any(b.requires_grad for b in model.buffers())
        model.train().zero_grad()
        x = tokens()
        model(input_ids=x, labels=x, **task_kwargs(row)).loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_inference_mode_adapter_is_not_trained(row, tiny_llama):
    model = adapt(row, tiny_llama(), inference_mode=True)
    assert model.get_nb_trainable_parameters()[0] == 0


def test_two_active_adapters_of_different_rank_add_up(row, tiny_llama):
    """Oracle: on the layer both adapt, the sum of what each adds alone."""
    model = with_two(row, tiny_llama())
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert isinstance(layer, MethodLayer)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))

    def output(*active: str) -> torch.Tensor:
        model.base_model.set_adapter(list(active))
        return layer_output(row, model, "model.layers.0.mlp.up_proj", x)

    plain = layer.get_base_layer()(x).detach()
    first, second, both = output("default"), output("other"), output("default", "other")
    assert (first - plain).abs().max() > 0.01
    assert (second - plain).abs().max() > 0.01
    torch.testing.assert_close(both - plain, (first - plain) + (second - plain), atol=1e-5, rtol=1e-5)


def test_delete_adapter_leaves_the_other(row, tiny_llama):
    model = with_two(row, tiny_llama())
    expected = logits(row, model)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not any("other" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    assert torch.equal(logits(row, model), expected)


def test_disable_adapter_is_exactly_the_base(row, tiny_llama):
    base = tiny_llama()
    before = base(tokens()).logits
    model = adapt(row, base).train()  # base has no dropout, so only ours could show
    with model.disable_adapter():
        assert torch.equal(logits(row, model), before)
    assert not torch.equal(logits(row, model), before)


def test_a_disabled_adapter_asks_for_no_task_ids(row, tiny_llama):
    model = adapt(row, tiny_llama())
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=tokens())


def test_unload_gives_back_the_base_without_a_trace(row, tiny_llama):
    base = tiny_llama()
    before, kinds, hooks = base_weights(base), [type(m) for m in base.modules()], hook_counts(base)
    expected = base(tokens()).logits
    model = adapt(row, base).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    x = tokens()
    model(input_ids=x, labels=x, **task_kwargs(row)).loss.backward()
    model.disable_input_require_grads()  # transformers' own hook, which enabling checkpointing sets

    unloaded = model.unload()
    assert unloaded is base
    assert not is_adapted(base)
    assert [type(m) for m in base.modules()] == kinds
    assert hook_counts(base) == hooks
    assert_same(base_weights(base), before)
    assert torch.equal(base.eval()(tokens()).logits, expected)
    assert not [k for module in base.modules() for k in module.__dict__ if "headwater" in k]
    checkpointers = {type(m.__dict__.get("_gradient_checkpointing_func")).__module__ for m in base.modules()}
    assert not any("headwater" in module for module in checkpointers)


def hook_counts(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]


def test_an_unloaded_base_can_be_adapted_again(row, tiny_llama):
    base = tiny_llama()
    first = logits(row, adapt(row, base))
    again = adapt(row, adapt(row, base).unload())
    assert torch.equal(logits(row, again), first)


def test_modules_to_save_are_trained_saved_and_loaded(row, tiny_llama, tmp_path):
    model = adapt(row, tiny_llama(), modules_to_save=["lm_head"])
    head = model.get_submodule("base_model.model.lm_head")
    assert head.modules_to_save["default"].weight.requires_grad
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(0.1)
    expected = logits(row, model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(row, loaded), expected)
    base = tiny_llama()
    with loaded.disable_adapter():
        assert torch.equal(logits(row, loaded), base(tokens()).logits)


def classifier(kind, config_class, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config_class(vocab_size=300, **sizes)).eval()


def tiny_roberta():
    """Its classifier is a block of two layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return classifier(RobertaForSequenceClassification, RobertaConfig, **sizes)


def test_a_head_of_several_layers_that_is_trained_in_whole_is_unloaded(tmp_path):
    row = BY_ID["mlora"]
    base = tiny_roberta()
    before = logits(row, base)
    model = adapt(row, base, target_modules=["query", "dense"], task_type="SEQ_CLS")
    names = {m.name for m in model.modules() if isinstance(m, MethodLayer)}
    assert names
    assert not any("classifier" in name for name in names)
    with torch.no_grad():
        for parameter in model.base_model.model.classifier.modules_to_save["default"].parameters():
            parameter.add_(0.1)
    adapted = logits(row, model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_roberta(), tmp_path)
    assert torch.equal(logits(row, loaded), adapted)
    torch.testing.assert_close(logits(row, loaded.merge_and_unload()), adapted, atol=1e-5, rtol=1e-5)
    base = model.unload()
    assert not is_adapted(base)
    base.classifier.load_state_dict(tiny_roberta().classifier.state_dict())  # PEFT leaves the trained one
    assert torch.equal(logits(row, base), before)


def test_all_linear_leaves_out_what_peft_trains_in_whole():
    """PEFT goes by how a name ends, so DistilBERT's `pre_classifier` is trained in whole with its `classifier`."""
    base = classifier(
        DistilBertForSequenceClassification, DistilBertConfig, dim=32, hidden_dim=48, n_layers=2, n_heads=4
    )
    model = adapt(BY_ID["mlora"], base, target_modules="all-linear", task_type="SEQ_CLS")
    names = {m.name.rpartition(".")[2] for m in model.modules() if isinstance(m, MethodLayer)}
    assert names == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}
    assert model.base_model.model.pre_classifier.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize(
    ("kind", "task_type", "head"),
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForTokenClassification, TaskType.TOKEN_CLS, "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_all_linear_leaves_out_the_head_of_the_task(kind, task_type, head):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = classifier(kind, BertConfig, **sizes)
    model = adapt(BY_ID["mlora"], base, target_modules="all-linear", task_type=task_type, r=2)
    assert {m.name.rpartition(".")[2] for m in model.modules() if isinstance(m, MethodLayer)} == {
        "query", "key", "value", "dense"
    }  # fmt: skip
    assert getattr(model.base_model.model, head).modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "all-linear"}, LINEAR),
        ({"target_modules": r".*\.1\..*(q|down)_proj"}, {"q_proj", "down_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, {"q_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "o_proj"]}, LINEAR - {"q_proj", "o_proj"}),
    ],
    ids=["all-linear", "regex", "layers_to_transform", "exclude_modules"],
)
def test_target_choices(row, tiny_llama, fields, expected):
    model = adapt(row, tiny_llama(), **fields)
    adapted = [m.name for m in model.modules() if isinstance(m, MethodLayer)]
    assert {name.rpartition(".")[2] for name in adapted} == expected
    layers = {name.split(".")[2] for name in adapted}
    assert layers == ({"0", "1"} if fields["target_modules"] == "all-linear" else {"1"})
    assert len(adapted) == len(expected) * len(layers)
    logits(row, model)


def test_rank_and_alpha_patterns(row, tiny_llama, tmp_path):
    patterns = {"rank_pattern": {"down_proj": 2, r"layers.1.mlp.up_proj": 3}, "alpha_pattern": {"gate_proj": 4}}
    model = adapt(row, tiny_llama(), **patterns)
    layers = {m.name: m for m in model.modules() if isinstance(m, MethodLayer)}
    for name, layer in layers.items():
        rank = 2 if "down" in name else 3 if name == "model.layers.1.mlp.up_proj" else 4
        alpha = 4 if "gate" in name else 8
        sizes = layer.in_features, layer.out_features
        branch = layer.branches["default"]
        once = row.saved_once if name == next(iter(layers)) else {}
        assert {n: tuple(t.shape) for n, t in branch.state_dict().items()} == row.saved(rank, *sizes) | once
        divisor = (rank**0.5 if model.peft_config["default"].use_rslora else rank) if row.alpha_over_rank else 1
        assert branch.scaling == pytest.approx(alpha / divisor)

    from peft import PeftModel

    model.save_pretrained(tmp_path)
    assert torch.equal(logits(row, PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(row, model))


def test_adapters_by_row_are_refused_not_ignored(row, tiny_llama):
    model = with_two(row, tiny_llama())
    with pytest.raises(headwater.HeadwaterError, match="adapter_names"):
        logits(row, model, adapter_names=["default", "other"])


def test_transformers_own_verbs(row, tiny_llama):
    """add_adapter, set_adapter, disable_adapters, delete_adapter of a bare transformers model."""
    expected = logits(row, with_two(row, tiny_llama()))
    base = tiny_llama()
    before = base(tokens()).logits
    base.add_adapter(config(row), adapter_name="default")
    base.add_adapter(config(row, target_modules=["q_proj"], r=2), adapter_name="other")
    base.set_adapter("default")
    stir(base)
    assert torch.equal(logits(row, base), expected)
    base.disable_adapters()
    assert torch.equal(logits(row, base), before)
    base.enable_adapters()
    assert torch.equal(logits(row, base), expected)
    base.delete_adapter("other")
    assert not any(".other." in name for name, _ in base.named_parameters())
    assert torch.equal(logits(row, base), expected)


def test_two_methods_on_one_layer_are_refused_not_mixed_up(tiny_llama):
    base = tiny_llama()
    base.add_adapter(headwater.RLoraConfig(target_modules=["q_proj"]), adapter_name="a")
    with pytest.raises(headwater.HeadwaterError, match="R-LoRA"):
        base.add_adapter(headwater.MLoraConfig(target_modules=["q_proj"]), adapter_name="b")


def test_a_second_adapter_on_all_linear_layers(row, tiny_llama):
    """Those that carry the first one are meant, too."""
    model = adapt(row, tiny_llama())
    model.add_adapter("other", config(row, tiny_llama(), target_modules="all-linear"))
    adapted = [m.name for m in model.modules() if isinstance(m, MethodLayer) and "other" in m.branches]
    assert len(adapted) == 2 * len(LINEAR)
    assert {name.rpartition(".")[2] for name in adapted} == LINEAR


def test_weighted_sums_of_adapters_are_refused_with_what_there_is_instead(row, tiny_llama):
    model = with_two(row, tiny_llama())
    before = list(model.peft_config)
    with pytest.raises(headwater.HeadwaterError, match="add_weighted_adapter") as refused:
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    assert "headwater pool merge" in refused.value.problems[0].fix
    assert list(model.peft_config) == before
