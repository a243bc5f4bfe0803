"""Searching on a faster model changes neither what counts nor, but for rounding, what is found."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from at_extensions.evaluation import autoattack, evaluate, searching
from at_extensions.evaluation.searching import search_model
from at_extensions.folding import TwinWarning

EPS = {"Linf": 0.02, "L2": 0.15, "L1": 0.6}


@pytest.mark.parametrize("norm", EPS)
def test_folded_verdicts_equal_unfolded(net, make_images, label, small_suite, monkeypatch, norm):
    model, x = net(), make_images(24, low=0, high=1)
    y = label(model, x, wrong=2)
    used = []
    monkeypatch.setattr(
        autoattack, "search_model", lambda model, *a, **k: used.append(search_model(model, *a, **k)) or used[-1]
    )
    folded = evaluate(model, x, y, norm=norm, eps=EPS[norm], batch_size=12)
    assert type(used[0]).__name__ == "FoldedTwin"
    monkeypatch.setattr(autoattack, "search_model", lambda model, *a, **k: model)
    plain = evaluate(model, x, y, norm=norm, eps=EPS[norm], batch_size=12)
    assert torch.equal(folded.robust, plain.robust)
    assert folded.after_attack == plain.after_attack
    assert 0 < plain.robust_accuracy < plain.clean_accuracy


def test_what_is_found_in_bf16_is_verified_in_fp32(net, make_images, label, small_suite):
    model, x = net(), make_images(60, low=0, high=1)
    y = label(model, x)
    low, full = (evaluate(model, x, y, eps=0.02, precision=p, keep_examples=60) for p in ("bf16", "fp32"))
    assert (low.precision, full.precision) == ("bf16", "fp32")
    assert "verified in fp32" in repr(low)
    examples = low.examples
    with torch.no_grad():
        assert (model.eval()(examples.adversarial).argmax(1) != examples.labels).all()
    assert (examples.adversarial - examples.images).abs().max() <= 0.02 + 1e-6
    assert len(examples) == int((low.clean & ~low.robust).sum())
    assert (low.robust != full.robust).double().mean() <= 0.05


def test_bf16_searches_in_bf16_and_hands_out_float32(net, make_images):
    model, x = net().eval(), make_images(4)
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        search = search_model(model, x, "bf16")
        logits = search(x)
        model(x)
    assert seen[-2:] == [torch.bfloat16, torch.float32]
    assert logits.dtype == torch.float32


def test_what_the_fast_model_cannot_settle_is_searched_on_the_model_itself(linear, make_images, label, monkeypatch):
    model, x = linear(4), make_images(40)
    y = label(model, x)
    attacks = {"version": "custom", "attacks": ["apgd-t"], "eps": 0.008}
    plain = evaluate(model, x, y, **attacks)
    assert 0 < plain.robust_accuracy < 1

    def contrary(images):  # finds every image wrong already, so that no attack would look at it
        return -model(images)

    def hasty(images):  # gives way a little before the model does
        logits = model(images)
        return logits - 0.05 * nn.functional.one_hot(logits.argmax(1), 4)

    for search in (contrary, hasty):
        monkeypatch.setattr(autoattack, "search_model", lambda *a, search=search, **k: search)
        assert torch.equal(evaluate(model, x, y, **attacks).robust, plain.robust)


def test_a_twin_that_disagrees_is_not_used(net, make_images, monkeypatch):
    model, x = net().eval(), make_images(8)

    class Wrong(nn.Module):
        def __init__(self, offset):
            super().__init__()
            self.offset = offset

        def forward(self, images):
            return model(images) + self.offset

    with torch.no_grad():
        for offset, used in ((0.0, True), (1e-5, True), (torch.eye(4)[0] * 0.1, False), (float("nan"), False)):
            twin = Wrong(offset)
            monkeypatch.setattr(searching, "fold_batchnorm", lambda *_, twin=twin, **__: twin)
            again = copy.deepcopy(model)  # of which nothing was said yet
            with contextlib.nullcontext() if used else pytest.warns(TwinWarning, match="logits differ"):
                found = search_model(again, x)
            assert found is (twin if used else again)


def test_what_has_nothing_to_fold_is_searched_as_it_is(net, linear, make_images):
    x = make_images(4)
    for model in (linear(4), net().train(), lambda images: images.flatten(1)):
        assert search_model(model, x) is model


def test_a_compiled_search_finds_the_same(net, make_images, label, small_suite, monkeypatch):
    model, x = net(), make_images(24)
    y = label(model, x)
    plain = evaluate(model, x, y, eps=0.02)
    compiled = []

    def traced(search, **options):  # traced as ever, but without waiting for a C++ compiler
        compiled.append(search)
        return compile_(search, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    assert torch.equal(evaluate(model, x, y, eps=0.02, compile=True).robust, plain.robust)
    assert len(compiled) == 1
    assert compiled[0] is not model  # whose own compilation state stays as it is


def test_a_network_with_nothing_to_fold_runs_in_channels_last(make_images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4))
    x = make_images(4)
    with torch.no_grad():
        model.eval()(x)
    layouts = []
    model[2].register_forward_pre_hook(
        lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    search = search_model(model, x)
    assert search is not model
    x.requires_grad_()
    logits = search(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert layouts[-1]
    assert gradient.is_contiguous()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_network_that_flattens_by_view_is_evaluated_as_one_that_flattens(net, make_images, label, small_suite):
    class Flattened(nn.Module):
        def __init__(self, flatten):
            super().__init__()
            self.conv, self.norm, self.flatten = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), flatten
            self.head = nn.LazyLinear(4)

        def forward(self, x):
            return self.head(self.flatten(self.norm(self.conv(x)).relu()))

    torch.manual_seed(0)
    x = make_images(12, low=0, high=1)
    viewing, flat = Flattened(lambda x: x.view(x.shape[0], -1)).eval(), Flattened(nn.Flatten()).eval()
    viewing(x), flat(x)
    flat.load_state_dict(viewing.state_dict())
    y = label(flat, x)
    assert search_model(viewing, x) is not viewing
    for precision in ("fp32", "bf16"):
        ours, truth = (evaluate(model, x, y, eps=0.02, precision=precision) for model in (viewing, flat))
        assert torch.equal(ours.robust, truth.robust)


def test_a_network_without_convolutions_is_searched_as_it_is(linear, make_images):
    model = linear(4).eval()
    assert search_model(model, make_images(4)) is model
