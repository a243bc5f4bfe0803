"""The choice between a twin and the model: fixed, by the number of steps, or by the seconds of the first attacks."""

import pytest
import torch
import torchattacks

from at_extensions.attacks import NFGSM, PGD
from at_extensions.folding import TwinChoice, choosing, count_steps
from at_extensions.methods import FGSMAT, PGDAT
from at_extensions.models import create_model


@pytest.mark.parametrize(
    ("mode", "used"), [("auto", [False, False, True, True]), (True, [True] * 4), (False, [False] * 4)]
)
def test_a_choice_without_a_measurement_depends_on_the_steps_alone(mode, used):
    choice, x, twin = TwinChoice(mode), torch.rand(2, 3, 4, 4), object()
    for steps, expected in zip((1, 2, 3, 10), used):
        assert choice.may_use(steps) == expected
        with choice.turn(x, steps, lambda: twin) as given:
            assert (given is twin) == expected
    assert choice.state_dict() == {}


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="unknown twin 'mesure'; did you mean 'measure'"):
        TwinChoice("mesure")


def test_steps_are_counted():
    model = create_model("small_cnn", 3, width=4)
    attacks = (PGD(model, steps=7), NFGSM(model), torchattacks.FGSM(model), torchattacks.PGDL2(model, steps=4))
    assert [count_steps(attack) for attack in attacks] == [7, 1, 1, 4]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that stand still but for what a test adds."""
    now = [0.0]
    monkeypatch.setattr(choosing, "_now", lambda device: now[0])
    return now


def attack(choice, clock, seconds, x=None, steps=10):
    """One attack that takes ``seconds[way]``; which way it took."""
    with choice.turn(torch.zeros(2, 3, 4, 4) if x is None else x, steps, object) as twin:
        way = "model" if twin is None else "twin"
        clock[0] += seconds[way].pop(0) if isinstance(seconds[way], list) else seconds[way]
    return way


@pytest.mark.parametrize("faster", ["twin", "model"])
def test_ways_take_turns_then_the_faster_is_taken_and_the_first_of_each_ignored(faster, clock):
    slower = "model" if faster == "twin" else "twin"
    choice = TwinChoice("measure")
    seconds = {faster: [100.0, 1.0, 1.0, 1.0] + [1.0] * 9, slower: [0.1, 2.0, 2.0, 2.0] + [2.0] * 9}
    assert [attack(choice, clock, seconds) for _ in range(8)] == ["twin", "model"] * 4
    assert [attack(choice, clock, seconds) for _ in range(5)] == [faster] * 5
    assert list(choice.chosen().values()) == [faster]


def test_kinds_of_attacks_are_measured_apart(clock):
    choice, seconds = TwinChoice("measure"), {"twin": 1.0, "model": 2.0}
    for _ in range(8):
        attack(choice, clock, seconds)
    images = torch.zeros(2, 3, 4, 4)
    others = [images[:1], images.double(), images.contiguous(memory_format=torch.channels_last)]
    for x in others:
        assert [attack(choice, clock, {"twin": 2.0, "model": 1.0}, x) for _ in range(9)][-1] == "model"
    assert [attack(choice, clock, {"twin": 2.0, "model": 1.0}, steps=1) for _ in range(9)][-1] == "model"
    assert attack(choice, clock, seconds) == "twin"


def test_a_resumed_choice_goes_on_where_it_was(clock):
    seconds = {"twin": 2.0, "model": 1.0}
    for done in (3, 8):
        first, second = TwinChoice("measure"), TwinChoice("measure")
        for _ in range(done):
            attack(first, clock, seconds)
        second.load_state_dict(first.state_dict())
        ways = [[attack(choice, clock, seconds) for _ in range(8)] for choice in (first, second)]
        assert ways[0] == ways[1]
        assert ways[0][-1] == "model"


def test_an_attack_that_fails_is_not_counted(clock):
    choice = TwinChoice("measure")
    with pytest.raises(ZeroDivisionError), choice.turn(torch.zeros(2, 3, 4, 4), 10, object):
        _ = 1 / 0
    assert choice.state_dict() == {}


def test_single_step_methods_search_on_the_model_and_others_on_the_twin():
    model = create_model("small_cnn", 3, in_chans=1, width=4)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    for method, uses in (
        (FGSMAT(model, eps=0.1), False),
        (FGSMAT(model, eps=0.1, twin=True), True),
        (PGDAT(model, eps=0.1, alpha=0.1, steps=2), False),
        (PGDAT(model, eps=0.1, alpha=0.1, steps=3), True),
        (PGDAT(model, eps=0.1, alpha=0.1, steps=3, twin=False), False),
    ):
        method(x, y)
        assert bool(method._twin) == uses


def test_a_measured_choice_is_part_of_a_methods_state():
    torch.manual_seed(0)
    model = create_model("small_cnn", 3, in_chans=1, width=4)
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    method = PGDAT(model, eps=0.1, alpha=0.1, steps=1, twin="measure")
    plain = PGDAT(model, eps=0.1, alpha=0.1, steps=1)
    for _ in range(8):
        method(x, y)
    other = PGDAT(model, eps=0.1, alpha=0.1, steps=1, twin="measure")
    other.load_state_dict(method.state_dict())
    assert other._choice.chosen() == method._choice.chosen()
    assert len(other._choice.chosen()) == 1
    assert torch.equal(other.perturb(x, y), method.perturb(x, y))
    assert set(plain.get_extra_state()) == {"stream"}
