"""Each request is answered as if it were alone, whatever joins and leaves beside it."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from tiny_models import make_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    MambaConfig,
    MiniMaxConfig,
    Qwen3_5TextConfig,
)
from tuner.helpers import adapt
from tuner.rows import BY_ID, ROWS

import headwater
from headwater.compose import Adapter, LowRank, PooledModel
from headwater.evaluation.generate import decode
from headwater.serve import BusyError, ClosedError, Engine, PoolRoutes, Route, RunRoutes, Sampling

from .engines import Plain, alone, burst, make_prompts, running, sharp_llama, text_of, tokens_of

LENGTHS = [3 + i % 9 for i in range(42)]
PLAIN = Route("plain")


def greedy(lengths):
    return [Sampling(max_tokens=n) for n in lengths]


@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_answers_do_not_depend_on_the_batch(max_batch):
    routes, prompts = Plain(), make_prompts(40)
    sizes: Counter = Counter()
    with running(routes, max_batch=max_batch, on_step=lambda rows: sizes.update([rows])) as engine:
        answers = burst(engine, *zip(prompts, [PLAIN] * 40, greedy(LENGTHS[:40]), strict=True))
    expected = [alone(routes.model, p, n) for p, n in zip(prompts, LENGTHS, strict=False)]
    assert list(map(tokens_of, answers)) == expected
    assert len(set(map(tuple, expected))) > 35  # so that crossed answers would show
    assert max(sizes) == max_batch
    for tokens, pieces in zip(expected, answers, strict=True):
        assert text_of(pieces) == decode(make_tiny_tokenizer(), [t for t in tokens if t != 257])
        assert [p.finish for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish == ("stop" if tokens[-1] == 257 else "length")


METHODS = [row for row in ROWS if row.name != "taskprobe"]


@pytest.mark.parametrize("row", METHODS, ids=[row.id for row in METHODS])
def test_every_method_answers_in_a_batch_as_alone(row):
    """Conditional MixLoRA remembers what it chose for a row; task ids differ from row to row."""
    model = adapt(row, sharp_llama(), target_modules=["up_proj", "q_proj"])
    tasks = ["a", "b", "c"] if row.needs_task_ids else []
    routes, prompts = RunRoutes(model, "run", tasks), make_prompts(9)
    chosen = [routes.choose(routes.names[i % len(routes.names)], "") for i in range(9)]
    with running(routes, max_batch=4) as engine:
        answers = engine.generate(prompts, chosen, greedy(LENGTHS[:9]))
    for prompt, route, n, answer in zip(prompts, chosen, LENGTHS, answers, strict=False):
        keywords = {"headwater_task_ids": torch.tensor([route.task])} if row.needs_task_ids else {}
        if row.name == "cond_mixlora":  # what it chooses is chosen for the prompt, so it needs the cache to remember
            output = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=n,
                do_sample=False,
            )
            assert tokens_of(answer) == output[0, len(prompt) :].tolist()
        else:
            assert tokens_of(answer) == alone(model, prompt, n, **keywords)


def random_adapters(model, count):
    generator = torch.Generator().manual_seed(1)
    sizes = {name: m.weight.shape for name, m in model.named_modules() if name.endswith(("up_proj", "v_proj"))}
    return {
        f"a{i}": Adapter(
            f"a{i}",
            {
                name: LowRank(
                    torch.randn(2 + i, d_in, generator=generator), torch.randn(d_out, 2 + i, generator=generator), 0.5
                )
                for name, (d_out, d_in) in sizes.items()
            },
        )
        for i in range(count)
    }


class Named(list):
    names = property(list)


def test_rows_of_a_batch_use_different_adapters():
    """Oracle: each adapter merged into a model of its own."""
    model = sharp_llama()
    adapters = random_adapters(model, 5)
    mixture = {"a0": 0.4, "a3": 0.6}
    routes = PoolRoutes(Named(adapters), PooledModel(model, adapters.__getitem__), lambda text: mixture)
    assert routes.names == ["auto", "a0", "a1", "a2", "a3", "a4", "base"]
    merged = {}
    for name in routes.names:
        merged[name] = sharp_llama()
        parts = {"auto": mixture, "base": {}}.get(name, {name: 1.0})
        with torch.no_grad():
            for part, weight in parts.items():
                for layer, factors in adapters[part].layers.items():
                    merged[name].get_submodule(layer).weight += weight * factors.delta()
    prompts = [prompt for prompt in make_prompts(6) for _ in routes.names]
    names = routes.names * 6
    with running(routes, max_batch=8) as engine:
        answers = engine.generate(prompts, [routes.choose(n, "text") for n in names], greedy(LENGTHS))
    for prompt, name, n, answer in zip(prompts, names, LENGTHS, answers, strict=True):
        assert tokens_of(answer) == alone(merged[name], prompt, n), name
    assert len({tuple(tokens_of(a)) for a in answers[:7]}) == 7


def test_thousand_requests_from_many_threads_none_lost_none_crossed():
    routes, prompts = Plain(), make_prompts(125)
    got: dict[int, list] = {i: [] for i in range(1000)}
    done = threading.Semaphore(0)

    def take(i, piece):
        got[i].append(piece)
        if piece.finish:
            done.release()

    with running(routes, max_batch=32) as engine:

        def client(first):
            for i in range(first, 1000, 20):
                engine.submit(prompts[i % 125], PLAIN, Sampling(max_tokens=2 + i % 5), lambda p, i=i: take(i, p))

        threads = [threading.Thread(target=client, args=(first,)) for first in range(20)]
        for thread in threads:
            thread.start()
        for _ in range(1000):
            assert done.acquire(timeout=60)
    assert (engine.running, engine.waiting) == (0, 0)
    expected = [alone(routes.model, prompt, 2 + i % 5) for i, prompt in enumerate(prompts)]
    for i, pieces in got.items():
        assert sum(piece.finish is not None for piece in pieces) == 1
        assert tokens_of(pieces) == expected[i % 125]


def test_sampling_goes_by_the_seed_and_not_by_the_batch():
    routes, prompts = Plain(), make_prompts(12)
    hot = [Sampling(max_tokens=8, temperature=1.5, top_p=0.9, seed=i) for i in range(12)]
    with running(routes, max_batch=5) as engine:
        together = list(map(tokens_of, engine.generate(prompts, [PLAIN] * 12, hot)))
        one_by_one = [tokens_of(engine.generate([p], [PLAIN], [s])[0]) for p, s in zip(prompts, hot, strict=True)]
        other = [tokens_of(engine.generate(prompts[:1], [PLAIN], [Sampling(8, 1.5, seed=s)])[0]) for s in range(9)]
        fresh = [tokens_of(engine.generate(prompts[:1], [PLAIN], [Sampling(8, 1.5)])[0]) for _ in range(4)]
    assert together == one_by_one
    assert len(set(map(tuple, other))) > 5
    assert len(set(map(tuple, fresh))) > 1


def test_observed_gates_are_those_of_the_tokens():
    """Oracle: the gates of one forward over the whole text, without a cache."""
    model = adapt(BY_ID["rlora"], sharp_llama())
    prompts = make_prompts(5)
    got: list[list] = [[] for _ in prompts]
    finished = threading.Semaphore(0)

    def take(i, piece):
        got[i].append(piece)
        if piece.finish:
            finished.release()

    with running(RunRoutes(model, "run"), max_batch=3) as engine:
        for i, prompt in enumerate(prompts):
            engine.submit(prompt, Route("run"), Sampling(6), lambda p, i=i: take(i, p), gates=i != 1)
        for _ in prompts:
            assert finished.acquire(timeout=60)
    for i, prompt in enumerate(prompts):
        gates = [piece.gates for piece in got[i]]
        if i == 1:
            assert gates == [None] * len(gates)
            continue
        seen = []
        whole = torch.tensor([prompt + tokens_of(got[i])[:-1]])
        with torch.no_grad(), headwater.observe(model, lambda name, gate, s=seen: s.append(gate[0])):
            model(whole)
        expected = torch.stack(seen).mean(0)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(gates), expected, atol=1e-4, rtol=1e-3)


def test_a_full_queue_says_when_to_come_back_and_closing_finishes_what_is_there():
    engine = Engine(Plain(), make_tiny_tokenizer(), max_batch=1, max_waiting=3)
    finished, first, full = [], threading.Event(), threading.Event()

    def blocked(piece):  # holds the engine's thread, so that the queue fills
        first.set()
        full.wait()
        if piece.finish:
            finished.append(piece.finish)

    try:
        engine.submit([1, 2], PLAIN, Sampling(20), blocked)
        assert first.wait(60)
        for _ in range(3):
            engine.submit([1, 2], PLAIN, Sampling(4), blocked)
        with pytest.raises(BusyError) as busy:
            engine.submit([1, 2], PLAIN, Sampling(4), blocked)
    finally:
        full.set()
        engine.close()
    assert busy.value.retry_after > 0
    assert finished == ["length"] * 4
    with pytest.raises(ClosedError):
        engine.submit([1], PLAIN, Sampling(1), blocked)


def test_cancelled_requests_hold_no_places_in_the_queue():
    first, full = threading.Event(), threading.Event()

    def blocked(piece):  # so that no token comes with which they would leave
        first.set()
        full.wait()

    with running(Plain(), max_batch=1, max_waiting=2) as engine:
        try:
            engine.submit([1, 2], PLAIN, Sampling(2), blocked)
            assert first.wait(60)
            for _ in range(2):
                engine.submit([1, 2], PLAIN, Sampling(2), blocked).cancel()
            assert engine.waiting == 0
            engine.submit([1, 2], PLAIN, Sampling(2), blocked)
            assert engine.waiting == 1
        finally:
            full.set()


def test_cancelled_and_late_requests_leave_the_batch():
    got: dict[str, list] = {"gone": [], "late": [], "queued": [], "stays": []}
    ended = threading.Semaphore(0)
    with running(Plain(), max_batch=3) as engine:

        def take(name, piece):
            got[name].append(piece)
            if len(got["gone"]) == 3:
                gone.cancel()
            if len(got["late"]) == 5:
                late.deadline = 0.0  # as if its time were up, however fast this machine is
            if piece.finish:
                ended.release()

        with engine._wake:  # none is taken before all are there
            gone = engine.submit([5, 6], PLAIN, Sampling(400), lambda p: take("gone", p))
            late = engine.submit([7, 8], PLAIN, Sampling(400), lambda p: take("late", p), timeout=600)
            engine.submit([9, 8], PLAIN, Sampling(60), lambda p: take("stays", p))
            engine.submit([3, 8], PLAIN, Sampling(400), lambda p: take("queued", p), timeout=-1)
        for _ in range(3):
            assert ended.acquire(timeout=60)
    assert engine.running == engine.waiting == 0
    assert len(got["gone"]) == 3
    assert [piece.finish for piece in got["queued"]] == ["timeout"]
    assert [piece.finish for piece in got["late"]] == [None] * 5 + ["timeout"]
    assert tokens_of(got["stays"]) == alone(sharp_llama(), [9, 8], 60)


class Breaking(Plain):
    """A model or an adapter that fails when asked to."""

    def apply(self, routes):
        if any(route.name == "broken" for route in routes):
            raise RuntimeError("this adapter cannot be read")
        return super().apply(routes)


def test_what_breaks_one_request_breaks_no_other():
    routes, prompts = Breaking(), make_prompts(9)
    names = ["broken" if i % 3 == 1 else "plain" for i in range(9)]
    with running(routes, max_batch=4) as engine:
        answers = engine.generate(prompts, list(map(Route, names)), greedy([6] * 9))
    for prompt, name, answer in zip(prompts, names, answers, strict=True):
        if name == "broken":
            assert [(p.finish, p.error) for p in answer] == [("error", "RuntimeError in the server; its log says more")]
        else:
            assert tokens_of(answer) == alone(routes.model, prompt, 6)


def test_a_batch_that_fails_ends_and_the_engine_goes_on():
    routes = Plain()
    model, fail = routes.model, threading.Event()

    def maybe(module, args):
        if fail.is_set():
            fail.clear()
            raise RuntimeError("out of memory")

    model.model.layers[0].register_forward_pre_hook(maybe)
    ended = threading.Event()
    pieces = []

    def take(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            fail.set()
        if piece.finish:
            ended.set()

    with running(routes) as engine:
        engine.submit([4, 5], PLAIN, Sampling(50), take)
        assert ended.wait(60)
        assert (pieces[-1].finish, pieces[-1].error) == ("error", "RuntimeError in the server; its log says more")
        (answer,) = engine.generate([[6, 7]], [PLAIN], [Sampling(5)])
    assert tokens_of(answer) == alone(model, [6, 7], 5)


def test_outputs_that_are_not_numbers_are_an_error():
    routes = Plain()
    with torch.no_grad():
        routes.model.lm_head.weight[3] = float("nan")
    with running(routes) as engine:
        (answer,) = engine.generate([[6, 7]], [PLAIN], [Sampling(5)])
    assert [(p.finish, p.text) for p in answer] == [("error", "")]
    assert "NaN" in answer[0].error


def test_requests_that_cannot_be_answered_are_refused():
    with running(Plain()) as engine:
        for prompt, sampling, message in (
            ([], Sampling(3), "no tokens"),
            ([5, 300], Sampling(3), "token 300, and the model knows 0 to 299"),
            ([1] * 500, Sampling(13), "more than 512"),
        ):
            with pytest.raises(headwater.HeadwaterError, match=message):
                engine.submit(prompt, PLAIN, sampling, print)
    with pytest.raises(headwater.HeadwaterError, match="max_batch must be at least 1"):
        Engine(Plain(), make_tiny_tokenizer(), max_batch=0)
    with pytest.raises(headwater.HeadwaterError, match="does not exist here"):
        RunRoutes(adapt(BY_ID["mlora"], sharp_llama()), "run").choose("other", "")
    with pytest.raises(headwater.HeadwaterError, match="not known which tasks"):
        RunRoutes(adapt(BY_ID["mtl_lora"], sharp_llama()), "run")


def test_a_token_for_padding_that_the_model_does_not_have():
    model, tokenizer, prompts = sharp_llama(), make_tiny_tokenizer(), make_prompts(4)
    tokenizer.add_tokens([f"<{i}>" for i in range(60)])
    tokenizer.add_special_tokens({"pad_token": "<further>"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    engine = Engine(Plain(model), tokenizer, max_batch=4)
    try:
        answers = engine.generate(prompts, [PLAIN] * 4, greedy([6] * 4))
    finally:
        engine.close()
    assert list(map(tokens_of, answers)) == [alone(model, p, 6) for p in prompts]


def test_sliding_windows_are_kept():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    windows = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    more = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300, "eos_token_id": 257}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Gemma3TextConfig(**sizes, **windows, **more, attn_implementation="eager")
        model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    prompts = make_prompts(8)
    with running(Plain(model), max_batch=3) as engine:
        answers = engine.generate(prompts, [PLAIN] * 8, greedy([10] * 8))
    assert list(map(tokens_of, answers)) == [alone(model, p, 10) for p in prompts]


HYBRID = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
MIXER = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SCAN = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


def small(config, **fields):
    """A model whose likeliest token is ahead of the second, with an eos of 257."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 257}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(**{**sizes, **fields})).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.mul_(10)
    return model


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (Qwen3_5TextConfig, {**HYBRID, **MIXER, "layer_types": ["linear_attention", "full_attention"]}),
        (Lfm2Config, {**HYBRID, "layer_types": ["conv", "full_attention"]}),
        (FalconH1Config, {**HYBRID, **SCAN, "mamba_chunk_size": 8}),
    ],
)
def test_states_of_linear_attention_are_kept_per_row(config, fields):
    model, prompts = small(config, **fields), make_prompts(8)
    lengths = [10, 3, 7, 10, 1, 10, 5, 10]
    with running(Plain(model), max_batch=3) as engine:
        answers = engine.generate(prompts, [PLAIN] * 8, greedy(lengths))
    assert list(map(tokens_of, answers)) == [alone(model, p, n) for p, n in zip(prompts, lengths, strict=True)]


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (MambaConfig, {"num_hidden_layers": 1, "state_size": 4}),
        (MiniMaxConfig, {**HYBRID, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}),
    ],
)
def test_models_with_another_memory_are_refused_at_the_start(config, fields):
    with pytest.raises(headwater.HeadwaterError, match=f"{config.__name__[:-6]}ForCausalLM remembers .* another way"):
        Engine(Plain(small(config, **fields)), make_tiny_tokenizer())
