"""Rounds of preference training: who is asked, what is paired and learned, and the traps of LASeR's public code."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from trl import DPOTrainer

from headwater.errors import HeadwaterError
from headwater.evaluation.forward import evaluating
from headwater.preference.bandits import Exp3, LinUCB, Picker, RoundRobin, Single
from headwater.preference.trainer import REFERENCE
from headwater.tuner import context_of
from headwater.tuner.context import LABELS

from .tiny import Spy, make_policy, make_task, make_trainer

NAMES = ["s0", "s1", "s2"]


@pytest.fixture
def make(tmp_path):
    def made(method="lora", method_fields=None, seed=0, folder="run", **options):
        policy = make_policy(make_tiny_llama(seed), method, **(method_fields or {}))
        return make_trainer(policy, make_tiny_tokenizer(), tmp_path / folder, **options)

    return made


def adapter(model, name="default"):
    return {k: v.detach().clone() for k, v in model.state_dict().items() if f".{name}." in k or k.endswith(f".{name}")}


def log_prob(model, prompt, completion):
    """Sum of log p(token) over the completion, read plainly in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    logs = logits.log_softmax(-1)
    return sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(completion))


def watch(trainer):
    """Every batch that reaches the loss, with its sequences split at their completions."""
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        rows = []
        for ids, mask, learned in zip(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True
        ):
            real, learned = ids[mask.bool()].tolist(), learned[mask.bool()].tolist()
            split = learned.index(1)
            rows.append((tuple(real[:split]), tuple(real[split:])))
        half = len(rows) // 2
        loss = original(model, inputs, *args, **kwargs)
        seen.append((list(zip(rows[:half], rows[half:], strict=True)), float(loss.detach())))
        return loss

    trainer.compute_loss = compute_loss
    return seen


@pytest.mark.parametrize(
    "picker", [LinUCB(NAMES, 65), Exp3(NAMES), Picker(NAMES), RoundRobin(NAMES), Single(NAMES, "s1")], ids=type
)
def test_exactly_one_source_is_asked_in_each_batch(make, picker):
    spies = [Spy(), Spy("xyz"), Spy("0123456789")]
    asked = []
    trainer = make(spies=spies, picker=picker, max_steps=6)
    original = trainer._ask

    def ask(*args):
        before = [len(spy.calls) for spy in spies]
        result = original(*args)
        asked.append([i for i, spy in enumerate(spies) if len(spy.calls) > before[i]])
        return result

    trainer._ask = ask
    trainer.train()
    assert [len(a) for a in asked] == [1] * 6
    assert [[NAMES[i] for i in a] for a in asked] == [r.queried for r in trainer.rounds]


def test_an_ensemble_asks_all_in_each_batch(make):
    trainer = make(ensemble=True, max_steps=3)
    trainer.train()
    assert [r.queried for r in trainer.rounds] == [NAMES] * 3
    assert all(r.reward is None for r in trainer.rounds)


def test_an_ensemble_hears_all_whom_it_asks(make):
    letters = Spy("abcdefghijklmnopqrstuvwxyz")
    trainer = make(ensemble=True, max_steps=3, spies=[lambda **_: 1.0, letters, lambda **_: 2.0])
    seen = watch(trainer)
    trainer.train()
    assert all(r.pairs for r in trainer.rounds)
    for pairs, _ in seen:
        for (_, chosen), (_, rejected) in pairs:
            better, worse = (
                letters(prompt="", response=trainer.tokenizer.decode(ids, skip_special_tokens=True), answer="", task="")
                for ids in (chosen, rejected)
            )
            assert better > worse


def test_sources_see_the_rows_of_one_task_and_never_the_test_rows(make):
    spy = Spy()
    make(spies=[spy], max_steps=8).train()
    for task, prompt, response, answer in spy.calls:
        assert prompt.startswith(f"train {task} ")
        assert not response.startswith(prompt)
        assert answer in (" x", " y")
    assert {task for task, *_ in spy.calls} == {"a", "b"}


def test_responses_of_a_prompt_are_sampled_and_all_different(make):
    """Greedy decoding gave 30 copies of one response, and pairs of a text with itself."""
    # Of 24 single tokens some are the same.
    options = {"responses": 24, "temperature": 0.8, "max_new_tokens": 1}
    trainer = make(preference=options, spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    seen, drawn, original = watch(trainer), [], trainer._sample

    def sample(*args):
        drawn.append(original(*args))
        return drawn[-1]

    trainer._sample = sample
    trainer.train()
    for responses in drawn:
        assert all(len(texts) == len(set(texts)) > 1 for texts in responses.texts)
        # Cut off after one token, none of them says that it ends there.
        assert not any(trainer.tokenizer.eos_token_id in ids[1:] for of_prompt in responses.ids for ids in of_prompt)
    assert min(len(texts) for responses in drawn for texts in responses.texts) < 24
    assert len(seen) > 1
    for pairs, _ in seen:
        assert all(chosen[1] != rejected[1] for chosen, rejected in pairs)


@pytest.mark.parametrize(("temperature", "most"), [(1e-5, 1), (1.0, 12)])
def test_responses_are_sampled_at_the_temperature(make, temperature, most):
    """Near 0 all responses are the likeliest one."""
    trainer = make(preference={"responses": 12, "temperature": temperature, "max_new_tokens": 6})
    task = trainer.tasks[0]
    responses = trainer._sample(task.train[:3], trainer.prompts[0][:3], task, 0)
    assert [len(texts) for texts in responses.texts] == [most] * 3


def test_pairs_stay_within_their_prompt_and_only_responses_are_learned(make):
    trainer = make()
    seen, drawn, original = watch(trainer), [], trainer._sample

    def sample(rows, prompts, *args):
        responses = original(rows, prompts, *args)
        drawn.append({tuple(p): set(map(tuple, ids)) for p, ids in zip(prompts, responses.ids, strict=True)})
        return responses

    trainer._sample = sample
    trainer.train()
    spy, decode = Spy(), trainer.tokenizer.decode
    assert seen
    learned = [(r, d) for r, d in zip(trainer.rounds, drawn, strict=True) if r.pairs]
    for (round_, answers), (pairs, _) in zip(learned, seen, strict=True):
        spy.liked = {"s0": "aeiou", "s1": "xyz", "s2": "0123456789"}[round_.queried[0]]
        for (prompt, chosen), (same, rejected) in pairs:
            assert prompt == same
            assert {chosen, rejected} <= answers[prompt]
            better, worse = (
                spy(prompt="", response=decode(ids, skip_special_tokens=True), answer="", task="")
                for ids in (chosen, rejected)
            )
            assert better > worse


def test_few_enough_pairs_that_differ_enough_reach_the_loss(make):
    letters = Spy("abcdefghijklmnopqrstuvwxyz")
    options = {"pairs_per_prompt": 2, "min_gap": 1.0, "responses": 24}
    trainer = make(preference=options, spies=[letters], max_steps=6)
    seen = watch(trainer)
    trainer.train()

    def score(ids):
        return letters(prompt="", response=trainer.tokenizer.decode(ids, skip_special_tokens=True), answer="", task="")

    assert seen
    for pairs, _ in seen:
        assert all(score(chosen) - score(rejected) > 1 for (_, chosen), (_, rejected) in pairs)
        prompts = [prompt for (prompt, _), _ in pairs]
        assert max(map(prompts.count, prompts)) <= 2
    assert max(len(pairs) for pairs, _ in seen) > 3  # two of some prompt


def test_dpo_starts_at_log_two_with_a_gradient_that_parts_the_pair(make):
    """In the public code policy and reference were one object: the loss was log 2 for ever, without a gradient."""
    trainer = make(preference={"objective": "dpo"}, max_steps=1, spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    seen = watch(trainer)
    before = adapter(trainer.model)
    trainer.train()
    ((pairs, loss),) = seen
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert any(not torch.equal(before[k], v) for k, v in adapter(trainer.model).items())

    def margin():
        return sum(log_prob(trainer.model, *w) - log_prob(trainer.model, *r) for w, r in pairs)

    trainer.model.eval()
    after = margin()
    with trainer.model.disable_adapter():  # this LoRA started at zero
        start = margin()
    assert after > start + 1e-4


def test_the_loss_is_dpo_and_nll_of_the_chosen_response(make):
    """Against a plain reading: float64 log-probabilities of both responses under policy and reference."""
    trainer = make(max_steps=3, preference={"beta": 0.3}, spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    seen, checked, original = watch(trainer), [], trainer.training_step

    def step(model, inputs, *args):
        count = len(seen)
        weights = adapter(trainer.model)
        loss = original(model, inputs, *args)
        assert all(torch.equal(weights[k], v) for k, v in adapter(trainer.model).items())  # the step comes later
        for pairs, found in seen[count:]:
            trainer.model.eval()
            policy = [(log_prob(trainer.model, *w), log_prob(trainer.model, *r)) for w, r in pairs]
            trainer.model.set_adapter(REFERENCE)
            frozen = [(log_prob(trainer.model, *w), log_prob(trainer.model, *r)) for w, r in pairs]
            trainer.model.set_adapter("default")
            trainer.model.train()
            dpo = [
                -math.log(1 / (1 + math.exp(-0.3 * ((w - rw) - (r - rr)))))
                for (w, r), (rw, rr) in zip(policy, frozen, strict=True)
            ]
            tokens = sum(len(chosen[1]) for chosen, _ in pairs)
            nll = -sum(w for w, _ in policy) / tokens
            checked.append((found, sum(dpo) / len(dpo) + nll))
        return loss

    trainer.training_step = step
    trainer.train()
    assert len(checked) == 3
    assert checked[2][1] != pytest.approx(checked[2][0] + 0.1)
    for found, expected in checked:
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_chosen_response_becomes_likelier(make):
    trainer = make(max_steps=5, tasks=[make_task(0, rows=3)], spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    seen = watch(trainer)
    trainer.train()
    chosen = [w for w, _ in seen[0][0]]

    def nll():
        return -sum(log_prob(trainer.model, *w) for w in chosen)

    trainer.model.eval()
    after = nll()
    with trainer.model.disable_adapter():
        assert after < nll() - 0.1


def test_raft_learns_the_best_response_alone(make):
    trainer = make(max_steps=2, preference={"objective": "raft"}, spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    seen = watch(trainer)
    trainer.train()
    for pairs, loss in seen[:1]:
        assert len(pairs) <= 3  # one for each prompt
        with trainer.model.disable_adapter():
            trainer.model.eval()
            tokens = sum(len(w[1]) for w, _ in pairs)
            assert loss == pytest.approx(-sum(log_prob(trainer.model, *w) for w, _ in pairs) / tokens, abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "rlora", "cond_mixlora"])
def test_the_reference_is_the_policy_at_the_start_of_the_iteration(make, method):
    """A random buffer that the copy lacked would make another model of it."""
    fields = {"head_dropout": 0.0} if method == "rlora" else {}
    trainer = make(method, fields, max_steps=9, spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    batches = len(trainer.get_train_dataloader())
    assert batches == 8  # so that the ninth begins the second iteration
    states, original = [], trainer.training_step

    def step(model, inputs, *args):
        before = adapter(trainer.model)
        loss = original(model, inputs, *args)
        reference = adapter(trainer.model, REFERENCE)
        states.append((before, {k.replace(f".{REFERENCE}", ".default"): v for k, v in reference.items()}))
        assert not any(p.requires_grad for n, p in trainer.model.named_parameters() if f".{REFERENCE}." in n)
        return loss

    trainer.training_step = step
    trainer.train()

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    for number, (policy, reference) in enumerate(states):
        assert same(reference, states[number // 8 * 8][0])
        assert same(reference, policy) == (number % 8 == 0)


def broken(**_):
    raise RuntimeError("the server is gone")


def test_a_source_that_fails_is_dropped_and_the_run_goes_on(make):
    calls = []

    def fails_later(*, response, **_):
        calls.append(response)
        if len(calls) > 1:
            raise RuntimeError("the server is gone")
        return 0.0

    trainer = make(spies=[fails_later, Spy("abcdefghijklmnopqrstuvwxyz"), lambda **_: math.nan], max_steps=6)
    trainer.picker = RoundRobin(NAMES)
    with pytest.warns(UserWarning, match="reward source s. failed and is asked no more") as warned:
        trainer.train()
    assert len(warned) >= 2
    assert [r.queried for r in trainer.rounds] == [["s1"]] * 6
    assert trainer.picker.dropped["s0"] == "RuntimeError: the server is gone"
    assert "not a finite number" in trainer.picker.dropped["s2"]


def test_when_no_source_is_left_the_run_ends_with_the_reasons(make):
    trainer = make(spies=[broken, broken], picker=Picker(["s0", "s1"]))
    with (
        pytest.warns(UserWarning, match="asked no more"),
        pytest.raises(HeadwaterError, match=r"no reward source is left.*the server is gone"),
    ):
        trainer.train()


def test_an_ensemble_goes_on_with_the_others(make):
    trainer = make(spies=[Spy("abc"), broken, Spy("xyz")], ensemble=True, max_steps=2)
    with pytest.warns(UserWarning, match="s1 failed"):
        trainer.train()
    assert [r.queried for r in trainer.rounds] == [["s0", "s2"]] * 2


def test_a_loss_that_is_no_number_ends_the_run(make, monkeypatch):
    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda *args, **kwargs: nan)
    with pytest.raises(HeadwaterError, match="loss is nan at step 1; lower learning_rate"):
        make().train()


def test_a_batch_without_a_pair_changes_nothing(make):
    picker = LinUCB(NAMES, 65)
    trainer = make(spies=[lambda **_: 1.0] * 3, picker=picker, max_steps=3, weight_decay=0.1)
    before = adapter(trainer.model)
    trainer.train()
    assert all(torch.equal(before[k], v) for k, v in adapter(trainer.model).items())
    assert [(r.pairs, r.loss, r.reward) for r in trainer.rounds] == [(0, None, None)] * 3
    assert not picker.b.any()
    assert trainer.scale.history == []


@pytest.mark.parametrize("reward", ["loss", "loss_decrease", "validation"])
def test_what_a_pick_was_worth(make, reward):
    picker = LinUCB(NAMES, 65)
    seen, told, choose = [], [], picker.choose
    picker.choose = lambda context: seen.append(context) or choose(context)
    picker.update = lambda arm, context, worth, p: told.append((arm, context, worth))
    letters = Spy("abcdefghijklmnopqrstuvwxyz")
    trainer = make(picker=picker, spies=[letters] * 3, preference={"bandit_reward": reward}, max_steps=3)
    values, original = [], trainer.training_step
    played, play = [], trainer._play
    trainer._play = lambda batch: played.append(play(batch)) or played[-1]
    tasks = {task.name: task for task in trainer.tasks}

    def validation(task):
        total = 0.0
        tokenizer, model = trainer.tokenizer, trainer.model
        was = model.training
        model.eval()
        for row in tasks[task].validation:
            prompt = tokenizer(row.prompt).input_ids
            answer = tokenizer(row.completion).input_ids
            total += log_prob(model, prompt, answer) / len(answer)
        model.train(was)
        return total / len(tasks[task].validation)

    def step(model, inputs, *args):
        before = {task: validation(task) for task in tasks}
        loss = original(model, inputs, *args)
        values.append((before, float(loss)))
        return loss

    trainer.training_step = step
    settle = trainer.settle

    def settled():
        with evaluating(trainer.model), torch.no_grad():
            lowered = DPOTrainer.compute_loss(trainer, trainer.model, trainer._prepare_inputs(played[-1].inputs))
        settle()
        before, loss = values[-1]
        round_ = trainer.rounds[-1]
        if reward == "loss":
            assert round_.raw == pytest.approx(-loss, abs=1e-6)
        elif reward == "validation":
            assert round_.raw == pytest.approx(validation(round_.task) - before[round_.task], abs=1e-5)
        else:
            assert 0 < round_.raw < loss
            assert round_.raw == pytest.approx(loss - float(lowered), abs=1e-6)

    trainer.settle = settled
    trainer.train()
    assert [(NAMES[arm], worth) for arm, _, worth in told] == [(r.queried[0], r.reward) for r in trainer.rounds]
    assert len({context.tobytes() for context in seen}) > 1
    assert all(np.array_equal(context, at) for (_, context, _), at in zip(told, seen, strict=True))
    assert trainer.scale.history == [r.raw for r in trainer.rounds]


def test_methods_that_go_by_task_get_their_task(make):
    trainer = make("mtl_lora", {"num_tasks": 2}, max_steps=4, spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append(inputs["headwater_task_ids"].tolist())
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    for ids, round_ in zip(seen, trainer.rounds, strict=True):
        assert ids == ["ab".index(round_.task)] * (2 * round_.pairs)


def test_methods_that_go_by_the_prompt_are_told_what_it_is(make):
    spies = [Spy("abcdefghijklmnopqrstuvwxyz")]
    trainer = make("cond_mixlora", {"num_factors": 8}, max_steps=2, spies=spies, learning_rate=0.1)
    seen, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        rows = [inputs[key] for key in ("input_ids", "attention_mask", "completion_mask", LABELS)]
        for ids, mask, learned, labels in zip(*rows, strict=True):
            prompt, real = mask.bool() & ~learned.bool(), ids[mask.bool()].tolist()
            size = int(prompt.sum())
            assert labels.tolist() == [-100] * size + real[size:] + [-100] * int((~mask.bool()).sum())
            seen.append(size)
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert seen


@pytest.mark.parametrize("method", ["moe_lora", "malora"])
def test_a_loss_that_goes_by_task_gets_the_task_though_no_forward_needs_it(make, method):
    fields = {"balance_loss": "localized", "task_types": [1, 0], "num_experts": 4, "balance_loss_weight": 0.5}
    trainer = make(method, fields, max_steps=2, spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    trainer.train()
    assert all(r.pairs for r in trainer.rounds)
    assert context_of(trainer.model).last_losses["balance"] > 0


def test_auxiliary_losses_are_divided_by_accumulation_as_the_loss_is(make):
    fields = {"balance_loss_weight": 0.5}
    trainer = make("hydralora", fields, max_steps=1, gradient_accumulation_steps=4)
    states, original = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = original(*args, **kwargs)
        states.extend(context_of(trainer.model)._local.with_losses)
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    assert {float(state.gradient) for state in states} == {0.25}  # a batch without a pair has none


@pytest.mark.parametrize("context", ["policy", "base"])
def test_contexts_are_of_the_policy_or_of_the_base_model(make, context):
    trainer = make(preference={"context": context}, max_steps=6, spies=[Spy("abcdefghijklmnopqrstuvwxyz")])
    place = [(0, 0)]
    before = trainer._hidden(place)
    trainer.train()
    assert np.allclose(trainer._hidden(place), before, atol=1e-6) == (context == "base")
    trainer.states.clear()  # what was known of the base model is found anew
    assert np.allclose(trainer._hidden(place), before, atol=1e-6) == (context == "base")


def test_a_checkpoint_holds_the_bandit_as_safetensors_and_json_and_resumes_exactly(make, tmp_path):
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine"}
    whole = make(picker=LinUCB(NAMES, 65), folder="whole", **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    assert json.loads((checkpoint / "bandit.json").read_text())["picker"]["round"] == 5
    assert (checkpoint / "bandit.safetensors").is_file()
    resumed = make(picker=LinUCB(NAMES, 65), folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.rounds == whole.rounds
    assert {r.queried[0] for r in whole.rounds} > {"s0"}
    for name in ("default", REFERENCE):
        expected = adapter(whole.model, name)
        assert all(torch.equal(expected[k], v) for k, v in adapter(resumed.model, name).items())
    assert np.array_equal(resumed.picker.inverse, whole.picker.inverse)
    assert np.array_equal(resumed.picker.b, whole.picker.b)
