"""Methods search on the folded twin: the same training up to rounding, and nothing of it left in the model."""

import copy

import pytest
import torch
import torchattacks
from torch import nn

from at_extensions import create_model
from at_extensions.folding import FoldedTwin
from at_extensions.methods import FGSMAT, PGDAT


def trained(make, *, twin, steps=20):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("small_cnn", 3, in_chans=1, width=4).double()
    method = make(model, twin)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.rand(8, 1, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        method(x, y).loss.backward()
        optimizer.step()
    return model, method


MAKERS = {
    "pgd": lambda m, twin: PGDAT(m, eps=0.1, alpha=0.03, steps=3, twin=twin),
    "n_fgsm": lambda m, twin: FGSMAT(m, eps=0.1, twin=twin),
    "torchattacks L2": lambda m, twin: PGDAT(m, attack=torchattacks.PGDL2(m, 0.5, 0.2, 3), twin=twin),
}


@pytest.mark.parametrize("name", MAKERS)
def test_weights_after_twenty_steps_agree_to_rounding_with_and_without_the_twin(name):
    (with_twin, method), (without, plain) = (trained(MAKERS[name], twin=twin) for twin in (True, False))
    assert isinstance(method._twin[0], FoldedTwin)
    assert plain._twin is None
    for (key, a), b in zip(with_twin.state_dict().items(), without.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=key)


def test_the_twin_follows_the_weights_and_is_no_part_of_the_method():
    model, method = trained(MAKERS["pgd"], twin=True, steps=3)
    twin = method._fresh_twin()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(twin(x), copy.deepcopy(model).eval()(x), rtol=0, atol=1e-10)
    assert all(not isinstance(m, FoldedTwin) for m in method.modules())
    assert {k.removeprefix("model.") for k in method.state_dict() if k.startswith("model.")} == set(model.state_dict())
    assert method.attack.model is model


def test_where_twins_cannot_be_the_model_itself_is_searched_on():
    model = create_model("small_cnn", 3, in_chans=1, width=4)
    nested = torchattacks.MultiAttack([torchattacks.FGSM(model, 0.1), torchattacks.FFGSM(model, 0.1, 0.12)])
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    for method in (PGDAT(model, steps=1, batchnorm="train"), PGDAT(model, attack=nested), PGDAT(model, twin=False)):
        assert method._fresh_twin() is None
        assert method(x, y).x_adv.shape == x.shape
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert PGDAT(plain, steps=1)._fresh_twin() is None


def test_an_exception_in_the_attack_gives_the_attack_its_model_back():
    model = create_model("small_cnn", 3, in_chans=1, width=4)
    method = PGDAT(model, eps=0.1, alpha=0.1, steps=1)
    with pytest.raises(IndexError):  # of cross-entropy
        method.perturb(torch.rand(2, 1, 8, 8), torch.tensor([0, 7]))
    assert method.attack.model is model


def test_compiling_compiles_model_and_twin_and_changes_neither_keys_nor_results():
    def step(compiled):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = create_model("small_cnn", 3, in_chans=1, width=4).double()
        method = PGDAT(model, eps=0.1, alpha=0.03, steps=2, twin=True)
        keys = list(model.state_dict())
        if compiled:
            method.compile(backend="aot_eager")
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
        step = method(x, torch.arange(6) % 3)
        assert list(model.state_dict()) == keys
        if compiled:
            assert method._twin[0]._compiled_call_impl is not None
        return step

    for eager, compiled in zip(step(False), step(True), strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=1e-10)
