"""Extraction of a common subspace: against an SVD of the weights side by side, and of a planted one."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_tiny_llama

from headwater import HeadwaterError
from headwater.subspace import SubspaceSpec, differences, extract, target_weights


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(B):
    B = B.double()
    return B @ torch.linalg.pinv(B)


NAMES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkv"]


def sources(count, sizes=(8, 4, 4), d_in=8):
    return [
        {name: noise(sizes["qkv".index(name[-6])], d_in, seed=10 * m + i) for i, name in enumerate(NAMES)}
        for m in range(count)
    ]


@pytest.mark.parametrize("scope", ["layer_qkv", "layer_projection", "global"])
def test_it_spans_what_an_svd_of_the_weights_side_by_side_does(scope):
    models = sources(3)
    bases = extract(iter(models), SubspaceSpec(r=2, scope=scope))
    assert set(bases) == set(NAMES)
    for name in NAMES:
        d_out = models[0][name].shape[0]
        mates = [
            other
            for other in NAMES
            if models[0][other].shape[0] == d_out
            and (scope == "global" or other == name or (scope == "layer_qkv" and other[:15] == name[:15]))
        ]
        U = torch.linalg.svd(torch.cat([m[other] for m in models for other in mates], dim=1)).U[:, :2]
        torch.testing.assert_close(projector(bases[name]), projector(U), rtol=0, atol=1e-5)
        torch.testing.assert_close(bases[name].T @ bases[name], torch.eye(2), rtol=0, atol=1e-5)


def test_a_planted_subspace_is_found_in_any_order_of_sources():
    U = torch.linalg.qr(noise(8, 3)).Q
    models = [{"q_proj": U @ noise(3, 20, seed=s) + 1e-3 * noise(8, 20, seed=50 + s)} for s in range(4)]
    spec = SubspaceSpec(r=3, scope="layer_projection")
    found, turned = extract(iter(models), spec), extract(iter(models[::-1]), spec)
    torch.testing.assert_close(projector(found["q_proj"]), projector(U), rtol=0, atol=1e-2)
    torch.testing.assert_close(found["q_proj"], turned["q_proj"], rtol=1e-5, atol=1e-6)
    assert torch.all(found["q_proj"].gather(0, found["q_proj"].abs().argmax(0, keepdim=True)) > 0)


@pytest.mark.parametrize("normalize", [False, True])
def test_sources_may_count_more_or_less(normalize):
    models = [{"q_proj": noise(6, 4, seed=m)} for m in range(3)]
    spec, c = SubspaceSpec(r=2, normalize=normalize), (5.0, 0.25, 1.0)
    found = extract(iter(models), spec, c)["q_proj"]
    scaled = [m["q_proj"] / (m["q_proj"].norm() if normalize else 1) * k**0.5 for m, k in zip(models, c, strict=True)]
    U = torch.linalg.svd(torch.cat(scaled, dim=1)).U[:, :2]
    torch.testing.assert_close(projector(found), projector(U), rtol=0, atol=1e-5)
    assert (projector(found) - projector(extract(iter(models), spec)["q_proj"])).abs().max() > 0.01
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(HeadwaterError, match="counts by a positive number"):
            extract(iter(models), spec, (1.0, wrong, 1.0))
    for count in (2, 4):
        with pytest.raises(ValueError, match="argument 2 is"):
            extract(iter(models), spec, [1.0] * count)


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        ("layer_qkv", r"in model\.layers\.0\.self_attn .* each: q_proj \(8 outputs\); k_proj, v_proj \(4 outputs\)"),
        ("global", r"in all layers .* each: q_proj \(8 outputs\); k_proj, v_proj \(4 outputs\)"),
        ("layer_projection", None),
    ],
)
def test_layers_that_cannot_share_are_warned_about_once(scope, said, recwarn):
    extract(iter(sources(2)), SubspaceSpec(r=2, scope=scope))
    messages = [str(w.message) for w in recwarn]
    assert len(messages) == (said is not None)
    assert said is None or re.search(said, messages[0])
    recwarn.clear()
    extract(iter(sources(2, sizes=(4, 4, 4))), SubspaceSpec(r=2, scope=scope))
    assert not recwarn.list


@pytest.mark.parametrize(("scale", "power"), [("sqrt_s", 0.5), ("s", 1.0)])
def test_columns_may_carry_their_singular_values(scale, power):
    W = noise(6, 9)
    basis = extract([{"q_proj": W}], SubspaceSpec(r=4, basis_scale=scale))["q_proj"]
    expected = torch.linalg.svdvals(W)[:4] ** power
    torch.testing.assert_close(basis.norm(dim=0).double(), expected, rtol=1e-5, atol=1e-6)


def test_input_orientation_is_that_of_the_transpose_and_needs_square_layers():
    W = noise(6, 6)
    turned = extract([{"q_proj": W}], SubspaceSpec(r=2, orientation="input"))["q_proj"]
    straight = extract([{"q_proj": W.T}], SubspaceSpec(r=2))["q_proj"]
    torch.testing.assert_close(turned, straight)
    with pytest.raises(HeadwaterError, match="not square"):
        extract([{"q_proj": noise(6, 5)}], SubspaceSpec(r=2, orientation="input"))


def test_weights_of_a_model_and_differences_to_a_base():
    model, base = make_tiny_llama(1), make_tiny_llama(0)
    weights = target_weights(model, ("q_proj", "k_proj"))
    assert set(weights) == {f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qk"}
    (delta,) = differences([weights], target_weights(base, ("q_proj", "k_proj")))
    name = "model.layers.1.self_attn.k_proj"
    assert torch.equal(delta[name], model.get_submodule(name).weight - base.get_submodule(name).weight)
    with pytest.raises(HeadwaterError, match="no linear layer named c_attn"):
        target_weights(model, ("c_attn",))


def test_what_does_not_fit_is_named():
    with pytest.raises(HeadwaterError, match="differ in layer q_proj"):
        extract([{"q_proj": noise(6, 6)}, {"q_proj": noise(4, 6)}], SubspaceSpec(r=2))
    with pytest.raises(HeadwaterError, match="fewer than r = 7"):
        extract([{"q_proj": noise(6, 6)}], SubspaceSpec(r=7))
    with pytest.raises(HeadwaterError, match="scope is one of"):
        SubspaceSpec(scope="everything")  # type: ignore[arg-type]


def test_targets_are_ends_of_names_and_each_has_to_be_there():
    model = make_tiny_llama()
    assert set(target_weights(model, ("mlp.up_proj",))) == {f"model.layers.{n}.mlp.up_proj" for n in range(2)}
    for targets, message in (
        (("q_proj", "k_porj", "roj"), "no linear layer named k_porj, roj"),
        (("q_proj", "input_layernorm"), "input_layernorm is no linear layer, but a LlamaRMSNorm"),
        (("embed_tokens",), "embed_tokens is no linear layer, but a Embedding"),
        (("mlp",), "no linear layer named mlp"),
    ):
        with pytest.raises(HeadwaterError, match=message):
            target_weights(model, targets)


def test_weights_that_are_not_finite_are_named():
    model = make_tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(HeadwaterError, match=r"layers\.1\.self_attn\.k_proj holds numbers that are not finite"):
        target_weights(model, ("q_proj", "k_proj"))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_basis_holds_no_directions_that_the_weights_do_not_have(normalize):
    spec = {"scope": "layer_projection", "normalize": normalize}
    thin = {"a.q_proj": noise(8, 3)}
    assert extract([thin], SubspaceSpec(r=3, **spec))["a.q_proj"].shape == (8, 3)
    assert extract([thin, {"a.q_proj": noise(8, 3, seed=1)}], SubspaceSpec(r=6, **spec))["a.q_proj"].shape == (8, 6)
    with pytest.raises(HeadwaterError, match=r"a\.q_proj with 8 outputs span 3 directions, fewer than r = 4"):
        extract([thin], SubspaceSpec(r=4, **spec))
    with pytest.raises(HeadwaterError, match=r"span 0 directions, fewer than r = 1\n.*all zero"):
        extract(differences([thin], thin), SubspaceSpec(r=1, **spec))


@pytest.mark.parametrize("scale", ["orthonormal", "s"])
def test_a_basis_can_be_saved_as_it_is(scale, tmp_path):
    weights = {"a.q_proj": torch.randn(6, 9, generator=torch.Generator().manual_seed(0))}
    basis = extract([weights], SubspaceSpec(r=3, targets=("q_proj",), basis_scale=scale))
    save_file(basis, tmp_path / "basis.safetensors")
