"""``accuracy``: the right count from any kind of data, nothing left behind."""

import pytest
import torch
import torchattacks
from torch.utils.data import DataLoader, TensorDataset

from at_extensions.attacks import PGD
from at_extensions.data import FloatSplit, make_loader
from at_extensions.evaluation import accuracy, count_correct, evaluate, predictions


def test_every_kind_of_data_gives_the_same_count(net, make_images, label):
    model, x = net(), make_images(50)
    y = label(model, x, wrong=9)
    dataset = TensorDataset(x, y)
    batches = [(x[i : i + 7], y[i : i + 7], torch.arange(7)) for i in range(0, 50, 7)]
    for data in (dataset, DataLoader(dataset, batch_size=16), batches, iter(batches)):
        assert accuracy(model, data, batch_size=12) == 41 / 50
    assert accuracy(model, x, y) == 41 / 50
    assert count_correct(model, dataset).tolist() == [41, 50]


@pytest.mark.parametrize("kind", [torchattacks.PGD, torchattacks.FGSM, PGD])
def test_accuracy_under_attack_is_that_of_a_slow_loop(net, make_images, label, kind):
    model, x = net(), make_images(30)
    y = label(model, x)
    options = {} if kind is torchattacks.FGSM else {"steps": 5}
    attack = kind(model, eps=0.03, **options)
    if hasattr(attack, "random_start"):
        attack.random_start, attack.start = False, "zero"
    model.eval()
    right = sum(int(model(attack(x[i : i + 1], y[i : i + 1])).argmax(1) == y[i]) for i in range(30))
    assert accuracy(model, x, y, attack=attack, batch_size=8) == right / 30
    assert 0 < right < 30


def test_predictions_are_a_slow_loops_clean_and_attacked(net, make_images, label):
    model, x = net().eval(), make_images(20)
    y = label(model, x)
    attack = PGD(model, eps=0.03, alpha=0.01, steps=5, start="zero")
    slow = {None: [], attack: []}
    for i in range(20):
        slow[None].append(int(model(x[i : i + 1]).argmax()))
        slow[attack].append(int(model(attack(x[i : i + 1], y[i : i + 1])).argmax()))
    for given, expected in slow.items():
        assert predictions(model, TensorDataset(x, y), attack=given, batch_size=7).tolist() == expected
    assert slow[None] != slow[attack]


def test_random_starts_are_seeded_and_differ_between_batches(net, make_images, label):
    model, x = net(), make_images(1).repeat(8, 1, 1, 1)
    attack = torchattacks.PGD(model, eps=0.03, steps=1)
    seen = []
    forward = attack.forward
    attack.forward = lambda images, labels: seen.append(forward(images, labels)) or seen[-1]
    for _ in range(2):
        accuracy(model, x, label(model, x), attack=attack, batch_size=4)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_nothing_is_left_behind(net, make_images, label, untouched):
    model, x = net().train(), make_images(20)
    model.body[1].eval()
    y = label(model, x)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    with untouched(model):
        accuracy(model, loader)
    attack = torchattacks.PGD(model, eps=0.1, steps=2)
    with untouched(model):
        accuracy(model, loader, attack=attack)

    def broken_loader():
        yield x, y
        raise OSError("disk on fire")

    with untouched(model), pytest.raises(OSError, match="on fire"):
        accuracy(model, broken_loader(), attack=attack)


def test_the_host_is_not_synchronised(net, make_images, label, no_host_sync):
    model, x = net(), make_images(12)
    y = label(model, x, wrong=2)
    batches, attack = [(x[:8], y[:8]), (x[8:], y[8:])], PGD(model, eps=0.02, steps=2)
    with no_host_sync():
        clean = count_correct(model, batches)
        robust = count_correct(model, batches, attack=attack)
    assert clean.tolist() == [10, 12]
    assert robust[0] <= clean[0]


def test_bad_input(net, make_images):
    model, x = net(), make_images(6)
    y = torch.zeros(6, dtype=torch.long)
    with pytest.raises(TypeError, match="labels"):
        accuracy(model, x)
    with pytest.raises(ValueError, match="not class numbers"):
        accuracy(model, x, y + 4)
    with pytest.raises(ValueError, match="no samples"):
        accuracy(model, [])
    with pytest.raises(ValueError, match=r"labels of shape \(6, 4\)"):
        accuracy(model, [(x, torch.zeros(6, 4))])
    with pytest.raises(TypeError, match="batches have their own"):
        accuracy(model, iter([(x, y)]), y)
    with pytest.raises(TypeError, match="got int"):
        accuracy(model, 3)
    with pytest.raises(ValueError, match="another model"):
        accuracy(model, x, y, attack=torchattacks.FGSM(net()))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        accuracy(lambda images: images, x, y)


@pytest.mark.parametrize("search", ["fp32", "bf16"])
def test_a_faster_search_is_verified_by_the_model_itself(net, make_images, label, untouched, search):
    model, x = net(), make_images(40)
    y = label(model, x, wrong=4)
    attack = PGD(model, eps=0.03, alpha=0.01, steps=5)
    seen, forward = [], attack.forward

    def search_and_note(images, labels):
        seen.append((attack.model, forward(images, labels), labels))
        return seen[-1][1]

    attack.forward = search_and_note
    with untouched(model):
        right, total = count_correct(model, x, y, attack=attack, batch_size=16, search=search).tolist()
    assert attack.model is model
    assert all(searched is not model for searched, _, _ in seen)
    assert seen[0][0] is seen[-1][0]  # built once
    model.eval()
    assert right == sum(int((model(adversarial).argmax(1) == labels).sum()) for _, adversarial, labels in seen)
    plain = accuracy(model, x, y, attack=PGD(model, eps=0.03, alpha=0.01, steps=5), batch_size=16)
    assert abs(right / total - plain) <= 0.05  # the same attack but for rounding
    assert plain < 36 / 40


def test_an_unknown_search_is_refused(net, make_images, label):
    model, x = net(), make_images(4)
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        accuracy(model, x, label(model, x), attack=PGD(model), search="bf61")


def test_images_with_a_range_of_their_own_are_attacked_in_it(net, make_images, label):
    model, x = net(), 8 * make_images(40) - 3.5
    x = x.clamp(-0.5, 1.5)
    y = label(model, x)
    limits = (-0.5, 1.5)
    split = FloatSplit(x, y, int(y.max()) + 1, image_range=limits)
    attack = PGD(model, 0.03, 0.03, 1, start="zero", image_range=limits)
    expected = (model.eval()(attack(x, y)).argmax(1) == y).float().mean().item()
    for data in (split, make_loader(split, 16, shuffle=False)):
        assert accuracy(model, data) == 1.0
        assert accuracy(model, data, attack=attack) == pytest.approx(expected)
    assert accuracy(model, x, y, attack=attack) == pytest.approx(expected)
    assert accuracy(model, x, y, image_range=limits) == 1.0
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        accuracy(model, x, y)
    for other in (PGD(model), torchattacks.FGSM(model)):
        with pytest.raises(ValueError, match=r"clips images to \[0, 1\], but these lie in \[-0.5, 1.5\]"):
            accuracy(model, split, attack=other)


def test_autoattack_refuses_images_that_may_leave_the_unit_interval(net, make_images, label):
    model, x = net(), make_images(10)
    split = FloatSplit(x, label(model, x), 10, image_range=(-0.1, 1.1))
    with pytest.raises(ValueError, match=r"AutoAttack searches within \[0, 1\]"):
        evaluate(model, split, eps=0.1, version="custom", attacks=["apgd-ce"])
    inside = FloatSplit(x, label(model, x), 10)
    assert evaluate(model, inside, eps=0.01, version="custom", attacks=["apgd-ce"]).clean_accuracy == 1.0
