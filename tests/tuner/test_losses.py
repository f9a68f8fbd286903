"""Auxiliary losses: added to the training loss whoever computes it, each token counted once, logged once."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
)

import headwater
from headwater.tuner import MethodLayer, context_of

from .helpers import LAYERS, TARGETS, adapt, assert_near, assert_same, gradients
from .penalised import PENALTY, ROW, Rows, batch, explicit_penalty, make, train_one_step
from .rows import BY_ID


@pytest.fixture
def expected(tiny_llama):
    """Gradients when the loss is added explicitly."""
    model = make(tiny_llama, penalty=0.0)
    loss, penalty, _ = explicit_penalty(model, batch())
    (loss + PENALTY * penalty).backward()
    with_penalty = gradients(model)
    model.zero_grad()
    model(**batch()).loss.backward()
    name = "base_model.model.model.layers.0.mlp.up_proj.taskprobe_branch.default.A"
    assert (with_penalty[name] - gradients(model)[name]).norm() > 0.1 * with_penalty[name].norm(), "no visible loss"
    return with_penalty


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_gradient_equals_adding_the_loss(tiny_llama, expected, mode):
    model = make(tiny_llama)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    model(**batch()).loss.backward()
    assert_near(gradients(model), expected)


def test_a_loss_computed_elsewhere_gets_it_as_well(tiny_llama, expected):
    """As trainers do that never look at `outputs.loss`."""
    model, data = make(tiny_llama), batch()
    labels = data.pop("labels")
    out = model(**data)
    assert out.loss is None
    torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    ).backward()
    assert_near(gradients(model), expected)


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("implementation", ["reference", "autograd"])
def test_what_is_done_to_the_loss_is_done_to_its_part(tiny_llama, expected, mode, implementation, monkeypatch):
    """A gradient scaler multiplies the loss by a large factor, accumulation divides it by the number of batches."""
    monkeypatch.setenv("HEADWATER_OPS", implementation)
    model = make(tiny_llama)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    for factor in (1024.0, 0.5):
        model.zero_grad()
        (model(**batch()).loss * factor).backward()
        assert_near({name: g / factor for name, g in gradients(model).items()}, expected)
    model.zero_grad()
    losses = [model(**batch()).loss * factor for factor in (3.0, -2.0)]  # each forward has its own
    sum(losses).backward()
    assert_near(gradients(model), expected)


@pytest.mark.parametrize("give", [lambda out: out.to_tuple(), lambda out: {"loss": out.loss}, lambda out: out.loss])
def test_a_loss_is_found_in_whatever_a_model_gives_back(tiny_llama, expected, give):
    model = make(tiny_llama)
    base = model.get_base_model()
    plain = type(base).forward
    base.forward = lambda *args, **kwargs: give(plain(base, *args, **kwargs))
    out = model(**batch())
    loss = out if torch.is_tensor(out) else out["loss"] if isinstance(out, dict) else out[0]
    (loss * 8).backward()
    assert_near({name: g / 8 for name, g in gradients(model).items()}, expected)


def test_a_loss_computed_elsewhere_can_be_followed(tiny_llama, expected):
    model, data = make(tiny_llama), batch()
    labels = data.pop("labels")
    for _ in range(4):
        logits = model(**data).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
        with torch.no_grad():
            model(**data)  # as a reference model; its losses are not trained on
        headwater.follow_loss(model, loss)
        (loss / 4).backward()
    assert_near(gradients(model), expected)


def test_with_a_count_of_tokens_the_trainers_factor_decides_whose_it_is(tiny_llama, expected, monkeypatch):
    """Two ranks: a trainer that counts the tokens of both doubles its loss, one that counts its own does not."""
    monkeypatch.setattr("headwater.tuner.context._ranks", lambda: 2)
    model, data = make(tiny_llama), batch()
    own = (data["labels"][:, 1:] != -100).sum()
    model(**data, num_items_in_batch=own).loss.backward()
    assert_near(gradients(model), expected)
    model.zero_grad()
    (model(**data, num_items_in_batch=2 * own).loss * 2).backward()
    assert_near(gradients(model), expected)


def test_the_first_label_of_a_row_is_none_of_the_count(tiny_llama):
    """No position predicts it."""
    found, data = [], batch()
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    for total in ({}, {"num_items_in_batch": (data["labels"][:, 1:] != -100).sum()}):
        model = make(tiny_llama)
        model(**data, **total).loss.backward()
        found.append(gradients(model))
    assert_near(*found)


def test_with_a_cache_the_mask_s_end_is_that_of_the_new_tokens(tiny_llama):
    model = make(tiny_llama).eval()
    x, ids = batch()["input_ids"], torch.tensor([0, 1, 2, 1])
    mask = torch.ones_like(x)
    mask[1:, :3] = 0  # padded at the left
    cache = model(input_ids=x[:, :8], attention_mask=mask[:, :8], headwater_task_ids=ids, use_cache=True)
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, MethodLayer))
    layer.register_forward_pre_hook(lambda m, args: seen.append(context_of(model).state.valid))
    past = cache.past_key_values
    model(input_ids=x[:, 8:], attention_mask=mask, headwater_task_ids=ids, past_key_values=past)
    assert torch.equal(seen[0], torch.ones(4, 2, dtype=torch.bool))


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_several_forwards_then_one_backward(tiny_llama, mode):
    model = make(tiny_llama, penalty=0.0)
    for seed in range(2):
        loss, penalty, _ = explicit_penalty(model, batch(seed))
        (loss + PENALTY * penalty).backward()
    expected = gradients(model)
    model = make(tiny_llama)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    sum(model(**batch(seed)).loss for seed in range(2)).backward()
    assert_near(gradients(model), expected)


def test_what_is_given_by_position_counts_as_by_keyword(tiny_llama, expected):
    model, data = make(tiny_llama, task_type=None), batch()
    ids, mask = data.pop("input_ids"), data.pop("attention_mask")
    model(ids, mask, **data).loss.backward()
    assert_near(gradients(model), expected)


def test_labels_of_a_token_classifier_are_not_shifted():
    """Its loss is of every label, so a batch that holds all of the step's labels is the whole step."""
    found = []
    for learned in ({}, {"num_items_in_batch": torch.tensor(20)}):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        base = BertForTokenClassification(BertConfig(vocab_size=300, num_labels=3, **sizes))
        model = adapt(ROW, base, **ROW.no_dropout, target_modules=["query"], task_type="TOKEN_CLS")
        x = torch.arange(20).view(4, 5)
        model(input_ids=x, labels=x % 3, headwater_task_ids=torch.tensor([0]), **learned).loss.backward()
        found.append(gradients(model))
    assert_near(*found)


def test_a_layer_that_runs_at_several_depths_has_the_loss_of_their_mean():
    for depth in (1, 3):
        torch.manual_seed(0)
        sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        base = AlbertForMaskedLM(AlbertConfig(vocab_size=300, num_hidden_layers=depth, **sizes))
        fields = {**ROW.no_dropout, "target_modules": ["query"], "task_type": None}
        model = adapt(ROW, base, stirred=False, **fields).train()  # B is zero, so no run changes the next one's x
        layer = next(m for m in model.modules() if isinstance(m, MethodLayer))
        seen = []
        layer.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].detach()))
        x = torch.arange(20).view(4, 5)
        output = model(input_ids=x, headwater_task_ids=torch.tensor([0]))
        (output.logits.sum() * 0).backward()  # what is left is the loss's own
        A = layer.branches["default"].A.detach().requires_grad_()
        (PENALTY * sum((h.flatten(0, 1) @ A.T).square().sum(-1).mean() for h in seen) / depth).backward()
        assert len(seen) == depth
        torch.testing.assert_close(layer.branches["default"].A.grad, A.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_label_smoothing_needs_the_labels_told(tiny_llama, tmp_path, accumulation):
    """The stock Trainer then takes `labels` out of the batch, but says how many the whole step has."""
    steps = []
    for told in (True, False):
        model = make(tiny_llama)
        rows = [{**row, **({"headwater_labels": row["labels"]} if told else {})} for row in Rows([0])]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4 // accumulation, report_to=[], use_cpu=True,
            gradient_accumulation_steps=accumulation, max_steps=1, learning_rate=1.0, optim="sgd", max_grad_norm=0.0,
            lr_scheduler_type="constant", remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
            label_smoothing_factor=0.1,
        )  # fmt: skip
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(model, arguments, train_dataset=rows).train()
        assert any("a batch came without its labels" in str(w.message) for w in caught) != told
        moved = {name: start[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}
        steps.append(moved["base_model.model.model.layers.0.mlp.up_proj.taskprobe_branch.default.A"])
    if accumulation == 1:
        torch.testing.assert_close(*steps)
    else:
        assert steps[1].norm() > 2 * steps[0].norm()


def test_padding_adds_nothing(tiny_llama, expected):
    model = make(tiny_llama)
    wider = {"input_ids": 258, "attention_mask": 0, "labels": -100}
    data = {
        name: torch.nn.functional.pad(t, (0, 5), value=wider[name]) if name in wider else t
        for name, t in batch().items()
    }
    model(**data).loss.backward()
    assert_near(gradients(model), expected)


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_it_is_logged_by_name_once(tiny_llama, mode):
    model, data = make(tiny_llama), batch()
    with torch.no_grad():
        _, _, per_layer = explicit_penalty(model, data)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    context, states = context_of(model), []
    model.get_base_model().register_forward_pre_hook(lambda m, args: states.append(context.state))
    loss = model(**data).loss
    after_forward = dict(context.last_losses)
    assert after_forward.keys() == {"penalty"}
    torch.testing.assert_close(after_forward["penalty"], torch.stack(per_layer).mean())
    assert not after_forward["penalty"].requires_grad
    loss.backward()
    assert context.last_losses == after_forward
    assert states[0].losses["penalty"][1] == len(LAYERS), "counted again when recomputed"


def test_no_loss_outside_training(tiny_llama):
    model = make(tiny_llama).eval()
    model(**batch()).loss.backward()
    plain = make(tiny_llama, penalty=0.0).eval()
    plain(**batch()).loss.backward()
    assert_same(gradients(model), gradients(plain))
    assert context_of(model).last_losses == {}


def test_nothing_is_computed_in_vain_without_gradient(tiny_llama):
    model = make(tiny_llama)
    with torch.no_grad():
        model(**batch())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "accumulation", "arguments"),
    [(2, 4, {}), (1, 8, {}), (4, 2, {"gradient_checkpointing": True})],
    ids=["4 of 2", "8 of 1", "checkpointing"],
)
def test_plain_trainer_with_accumulation_equals_one_big_batch(tiny_llama, tmp_path, size, accumulation, arguments):
    """Plain `Trainer` gives each forward the number of learned tokens of the whole step. Oracle: the explicit loss."""
    model = make(tiny_llama, penalty=0.0)
    both = {name: torch.cat([batch(0)[name], batch(1)[name]]) for name in batch()}
    loss, penalty, _ = explicit_penalty(model, both)
    (loss + PENALTY * penalty).backward()
    found = train_one_step(tiny_llama, tmp_path, size=size, accumulation=accumulation, **arguments)
    assert_near(found, gradients(model), relative=1e-3)


def test_balance_loss_of_hydralora_is_its_formula(tiny_llama):
    """Oracle: for each row sum_n mean(g_n) mean(one-hot argmax g)_n over its tokens that are not padding, gradients
    through g only; the mean over rows and layers."""
    row = BY_ID["hydralora-balance"]
    data = {name: t for name, t in batch().items() if name != "headwater_task_ids"}
    weight = row.fields["balance_loss_weight"]

    def make_model(balance):
        return adapt(row, tiny_llama(), **row.no_dropout, balance_loss_weight=balance).train()

    model, inputs = make_model(0.0), {}
    for layer in model.modules():
        if isinstance(layer, MethodLayer):
            layer.register_forward_pre_hook(lambda m, args: inputs.__setitem__(m, args[0]))
    loss = model(**data).loss
    for layer, x in inputs.items():
        for one, mask in zip(x, data["attention_mask"].bool(), strict=True):
            gate = torch.softmax(one[mask] @ layer.branches["default"].router.T, dim=-1)
            chosen = torch.nn.functional.one_hot(gate.argmax(-1), gate.shape[-1]).float()
            loss = loss + weight / len(LAYERS) / len(x) * (gate.mean(0) * chosen.mean(0)).sum()
    loss.backward()
    with_loss = make_model(weight)
    with_loss(**data).loss.backward()
    assert_near(gradients(with_loss), gradients(model))
    assert context_of(with_loss).last_losses.keys() == {"balance"}


WITH_LOSSES = {
    "hydralora": ("hydralora", {"balance_loss_weight": 0.5}, None),
    "mixtral": ("moe_lora", {"balance_loss": "mixtral", "balance_loss_weight": 0.5, "z_loss_weight": 0.1}, None),
    "localized": (
        "moe_lora",
        {"balance_loss": "localized", "balance_loss_weight": 0.5, "top_k": 0, "task_types": [0, 1, 1]},
        None,
    ),
    "malora": ("malora", {"balance_loss": "mola", "balance_loss_weight": 0.5}, None),
    "align lora": ("lora", {}, {"kind": "kl", "weight": 0.5}),
    "align rlora": ("rlora", {"head_dropout": 0.0}, {"kind": "mmd", "weight": 0.5}),
}


@pytest.mark.parametrize("case", WITH_LOSSES)
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_a_methods_loss_under_accumulation_is_the_weighted_mean_over_micro_batches(
    case, reentrant, tiny_llama, tmp_path
):
    """Oracle: each micro-batch alone, without a trainer; its gradient weighs as its share of the learned tokens."""
    method, fields, alignment = WITH_LOSSES[case]

    def make_model(with_losses=True):
        torch.manual_seed(1)
        shared = {"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        off = {name: 0.0 for name in fields if name.endswith("_weight") and not with_losses}
        model = get_peft_model(
            tiny_llama(), headwater.make_config(method, **shared, **{**fields, "lora_dropout": 0.0, **off})
        )
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
        if alignment is not None:
            headwater.align(model, **{**alignment, **({} if with_losses else {"weight": 0.0})})
        return model.train()

    rows = [{name: t[n] for name, t in batch(seed).items()} for seed in range(4) for n in range(4)]
    for row in rows:
        row["headwater_task_ids"] = row["headwater_task_ids"] % 2
    for number, row in enumerate(rows):  # micro-batches of unequal shares
        row["labels"] = row["labels"].masked_fill(torch.arange(10) > 3 + number // 4 * 2, -100)

    def expected(with_losses):
        micro = [{name: torch.stack([r[name] for r in rows[i : i + 4]]) for name in rows[0]} for i in range(0, 16, 4)]
        items = torch.tensor([(m["labels"][:, 1:] != -100).sum() for m in micro]).float()
        assert len(set(items.tolist())) > 1
        total = {}
        for m, share in zip(micro, items / items.sum(), strict=True):
            model = make_model(with_losses)
            model(**m).loss.backward()
            for name, gradient in gradients(model).items():
                total[name] = total.get(name, 0) + share * gradient
        return total

    model = make_model()
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1,
        optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[],
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True,
        **({} if reentrant is None else checkpointing),
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    step = {name: start[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert_near(step, expected(True), relative=2e-3)
    without = expected(False)
    moved = [name for name in step if (without[name] - step[name]).norm() > 2e-2 * step[name].norm()]
    assert moved, "the loss has no share in the gradient, so this test shows nothing"
