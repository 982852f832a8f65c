"""The numbers at the ends of a dtype, and derivatives of all orders that are used."""

import math

import pytest
import torch
import torch.nn as nn

from hyplora import HypLoRALinear, expmap0, hyplora_reference, hyplora_update, llr, logmap0
from test_hyplora import A, B, X, adapted, close, norm, randn, textbook_expmap0


@pytest.mark.parametrize("dtype, last", [(torch.float32, 88), (torch.float64, 700)], ids=str)
def test_far_out_the_maps_are_right_and_then_loud(dtype, last):
    direction = torch.tensor([0.6, 0.0, 0.8], dtype=dtype)
    for r in (30, 46, 80, last):
        p = expmap0(r * direction, 1.0)
        close(logmap0(p, 1.0), r * direction, rtol=1e-5, atol=0)
        q = llr(p, torch.eye(3, dtype=dtype), torch.eye(3, dtype=dtype), 1.0)
        close(q, p, rtol=1e-4, atol=0)  # It has a finite time beside a finite space.
    beyond = expmap0(1.1 * last * direction, 1.0)
    assert beyond[2] == 0 and beyond[[0, 1, 3]].isinf().all()  # A zero coordinate stays 0.
    assert not logmap0(beyond, 1.0).isfinite().any()
    eye, large = torch.eye(3, dtype=dtype), 1e8 * torch.eye(3, dtype=dtype)
    close(hyplora_reference(30 * direction, eye, large, 1.0), (30 + math.log(1e8)) * direction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_the_maps_widen_narrow_numbers_before_they_square_them(dtype, size):
    v, K = (size * X).to(dtype), size**2
    p = expmap0(v, K)
    close(p, textbook_expmap0(v.double(), K).float())
    narrow = (X * size).to(dtype)  # This is a point of which space is narrow, too.
    close(logmap0(narrow, K), logmap0(narrow.double(), K).float())
    a, b = A[:, :6].to(dtype), B.to(dtype)
    close(llr(narrow, a, b, K), llr(narrow.double(), a.double(), b.double(), K).float())


def test_at_the_end_of_a_dtype_the_update_is_right_or_loud():
    eye = torch.eye(2)
    got = hyplora_update(torch.tensor([[1e10, 0.0]]), eye, 1e5 * eye, 1e-12)
    want = hyplora_update(torch.tensor([[1e10, 0.0]]).double(), eye, 1e5 * eye, 1e-12)
    close(got, want.float(), rtol=1e-5, atol=0)  # This is 2.35e-5.
    for exponent in range(15, 39):
        for gain in (1e-20, 1.0, 1e20):
            x = torch.tensor([[10.0**exponent, 0.0]])
            got = hyplora_update(x, eye, gain * eye, 1.0)
            want = hyplora_update(x.double(), eye, gain * eye, 1.0).float()
            assert not got.isfinite().all() or torch.allclose(got, want, rtol=1e-4, atol=0)


def test_the_law_holds_at_all_scales_and_time_in_all_digits():
    for scale in (1e-100, 1e-30, 1e30, 1e100):
        close(hyplora_update(scale * X, A, B, scale**2 * 0.8) / scale, hyplora_update(X, A, B, 0.8))
    assert llr(expmap0(0 * X, 0.7), A, B, 0.7)[0, 0].item() == pytest.approx(0.7**0.5, rel=1e-15)
    mixed = hyplora_reference(X, A.float(), B.float(), torch.tensor([0.8]))
    close(mixed, hyplora_reference(X, A, B, 0.8), rtol=1e-5, atol=1e-6)


def test_an_ill_conditioned_B_loses_no_digits_and_gradients_change_no_value():
    """One large direction and noise of 1e-3; the tokens are those that it does not see."""
    b = (randn(64, 1) @ randn(1, 8, seed=1) + 1e-3 * randn(64, 8, seed=2)).float()
    a = randn(8, 32, seed=3, dtype=torch.float32)
    unseen = torch.linalg.svd(b.double() @ a.double()).Vh[1:8]
    x = (11.9 * unseen).float().requires_grad_()
    want = norm(hyplora_reference(x.double(), a.double(), b.double(), 1.0))
    with_gradients, without = hyplora_update(x, a, b, 1.0), hyplora_update(x.detach(), a, b, 1.0)
    assert torch.equal(with_gradients, without)
    assert ((norm(without) - want).abs() < 1e-3).all()


@pytest.mark.parametrize("token, gain", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_gradients_of_gradients_are_those_of_the_three_maps(token, gain):
    penalties = []
    for update in (hyplora_update, hyplora_reference):
        inputs = [t.clone().requires_grad_() for t in (token * X, A, gain * B)]
        loss = update(*inputs, 0.7).square().sum() + update(*inputs, 0.7).sum()
        slopes = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum(slope.square().sum() for slope in slopes)
        penalties.append(torch.autograd.grad(penalty, inputs))
    for ours, literal in zip(*penalties):
        assert ours.isfinite().all()
        close(ours, literal)


def test_in_float16_the_layer_is_right_until_its_own_output_overflows():
    """So is LoRA's product. Then the output is infinite, and not a wrong finite number."""
    base = nn.Linear(64, 64, bias=False, dtype=torch.float16)
    layer = HypLoRALinear(base, alpha=1, curvature=1e12)  # So the update is too large more often.
    nn.init.zeros_(layer.base.weight)
    nn.init.normal_(layer.lora_B, std=200)
    x = (randn(64, 64, dtype=torch.float32) * torch.logspace(-3, 3, 64).view(-1, 1)).half()
    update = hyplora_update(*[t.double() for t in (x, layer.lora_A, layer.lora_B, layer.K)])
    out, want = layer(x), layer.scaling * update
    assert out.dtype == torch.float16
    fits = want.abs() < 60000
    error = (out.double() - want).abs() / norm(want)
    assert (error[fits] < 5e-3).all() and fits.float().mean() > 0.8
    assert not out[want.abs() > 66000].isfinite().any() and (want.abs() > 66000).any()


def test_the_output_may_be_changed_in_place():
    layer, x = adapted(nn.Sequential(nn.Linear(7, 7)))[0], X.float()
    (want,) = torch.autograd.grad((2.0 * layer(x) + x).relu().sum(), layer.lora_A)
    (got,) = torch.autograd.grad(layer(x).mul_(2.0).add_(x).relu_().sum(), layer.lora_A)
    assert torch.equal(got, want) and want.norm() > 0


def test_under_autocast_the_lengths_are_still_in_float32():
    layer = HypLoRALinear(nn.Linear(7, 6), rank=3, alpha=3)
    nn.init.normal_(layer.lora_B)
    x = 1e3 * X.float()  # Squares of such numbers are beyond float16.
    with torch.autocast("cpu", torch.float16):
        out, base = layer(x), layer.base(x)
    want = hyplora_update(*[t.double() for t in (x, layer.lora_A, layer.lora_B, layer.K)])
    assert out.dtype == torch.float16
    assert (norm(out.double() - base.double() - want) < 2e-3 * norm(base.double())).all()
