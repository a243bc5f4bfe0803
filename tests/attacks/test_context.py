"""The attack context gives the model and the random state back, whatever happens inside."""

import copy

import pytest
import timm
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from at_extensions.attacks import NFGSM, PGD, RandomStream, attacking, check_attack, perturb

CPU = torch.device("cpu")


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_inside_the_model_is_ready_for_input_gradients(small_net, batch, untouched, batchnorm):
    net, (images, _) = small_net(1), batch(2)
    net[5].bias.requires_grad_(False)
    net[3].eval()
    with untouched(net):
        with torch.no_grad(), attacking(net, batchnorm) as inside:
            assert inside is net
            assert torch.is_grad_enabled()
            assert not any(p.requires_grad for p in net.parameters())
            assert [m.training for m in net] == [False, batchnorm == "train", False, False, False, False]
            x = images.clone().requires_grad_()
            assert torch.autograd.grad(net(x).sum(), x)[0].abs().sum() > 0
        assert torch.is_grad_enabled()


def test_batchnorm_eval_normalises_by_running_statistics_and_train_by_the_batch(small_net, batch, untouched):
    net, (images, _) = small_net(3), batch(4)
    by_hand = {}
    hidden = net[0](images)
    by_hand["eval"] = (hidden - net[1].running_mean.view(-1, 1, 1)) / (net[1].running_var.view(-1, 1, 1) + 1e-5).sqrt()
    mean, var = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), correction=0, keepdim=True)
    by_hand["train"] = (hidden - mean) / (var + 1e-5).sqrt()
    for batchnorm, expected in by_hand.items():
        with untouched(net), attacking(net, batchnorm):
            torch.testing.assert_close(net[1](net[0](images)), expected)


def test_batchnorm_of_every_kind_keeps_its_statistics(batch, untouched):
    images, _ = batch(5, channels=4, dtype=torch.float32)
    kinds = [
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        timm.layers.BatchNormAct2d(4),
    ]
    for norm in kinds:
        with untouched(norm), attacking(norm, "train" if not isinstance(norm, nn.SyncBatchNorm) else "eval"):
            norm(images)


class Broken(Exception):
    """What an attack may raise."""


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_everything_is_undone_after_an_exception(small_net, batch, untouched, batchnorm):
    net, (images, labels) = small_net(6), batch(7)
    net(images).sum().backward()
    calls = []

    def fail(logits):
        calls.append(1)
        if len(calls) == 3:
            raise Broken
        return logits.sum()

    with pytest.raises(Broken), untouched(net):
        perturb(PGD(net), images, labels, loss=fail, stream=RandomStream(8), batchnorm=batchnorm)
    assert len(calls) == 3


def test_contexts_nest(small_net, batch, untouched):
    net, (images, _) = small_net(9), batch(10)
    with untouched(net), attacking(net, "train"):
        with untouched(net, tracer=False), attacking(net, "eval"):
            assert not net[1].training
        with untouched(net, tracer=False), attacking(net, "train"):
            net(images)
        assert net[1].training


def test_tied_weights_and_shared_modules_come_back(untouched):
    layer = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    net = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer, tied))
    layer.eval()  # while both of its parents are in train mode
    with untouched(net), attacking(net):
        assert not tied.weight.requires_grad


def test_an_unknown_batchnorm_is_refused_before_anything_changes(small_net, untouched):
    net = small_net()
    said = pytest.raises(ValueError, match="unknown batchnorm 'evaluate'; did you mean 'eval'")
    with untouched(net), said, attacking(net, "evaluate"):
        pass


def draw(stream, n=3):
    with stream.on(CPU):
        return torch.rand(n)


def test_a_stream_runs_on_and_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    stream, found, drawn = RandomStream(12), [], []
    for _ in range(4):
        found.append(torch.rand(1))
        drawn.append(draw(stream))
    assert torch.equal(torch.cat(found), expected)
    torch.manual_seed(12)
    assert torch.equal(torch.cat(drawn), torch.cat([torch.rand(3) for _ in range(4)]))  # one stream, from its seed


def test_streams_of_one_seed_are_equal_and_of_two_are_not():
    assert torch.equal(draw(RandomStream(13)), draw(RandomStream(13)))
    assert not torch.equal(draw(RandomStream(13)), draw(RandomStream(14)))


def test_a_stream_goes_on_from_a_saved_state(tmp_path):
    stream = RandomStream(15)
    draw(stream)
    torch.save(stream.state_dict(), tmp_path / "state")
    upcoming = [draw(stream), draw(stream)]
    again = RandomStream(0)
    draw(again)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again.seed == 15
    assert torch.equal(torch.cat([draw(again), draw(again)]), torch.cat(upcoming))


def test_a_saved_state_does_not_move_with_its_stream():
    stream = RandomStream(16)
    draw(stream)
    state = copy.deepcopy(saved := stream.state_dict())
    draw(stream)
    assert torch.equal(saved["states"]["cpu"], state["states"]["cpu"])


def test_a_stream_that_was_never_used_is_saved_too():
    again = RandomStream(0)
    again.load_state_dict(RandomStream(17).state_dict())
    assert torch.equal(draw(again), draw(RandomStream(17)))


def test_after_an_exception_the_stream_has_moved_and_the_global_generator_has_not():
    stream, before, drawn = RandomStream(18), torch.get_rng_state(), []

    def fail():
        drawn.append(torch.rand(3))
        raise Broken

    with pytest.raises(Broken), stream.on(CPU):
        fail()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draw(stream), drawn[0])


LINF = {
    "PGD": lambda net, eps: torchattacks.PGD(net, eps=eps, alpha=eps / 2, steps=2),
    "FGSM": lambda net, eps: torchattacks.FGSM(net, eps=eps),
    "FFGSM": lambda net, eps: torchattacks.FFGSM(net, eps=eps, alpha=1.25 * eps),
    "TPGD": lambda net, eps: torchattacks.TPGD(net, eps=eps, alpha=eps / 2, steps=2),
    "BIM": lambda net, eps: torchattacks.BIM(net, eps=eps, alpha=eps / 2, steps=2),
    "MIFGSM": lambda net, eps: torchattacks.MIFGSM(net, eps=eps, alpha=eps / 2, steps=2),
    "EOTPGD": lambda net, eps: torchattacks.EOTPGD(net, eps=eps, alpha=eps / 2, steps=2, eot_iter=2),
    "APGD": lambda net, eps: torchattacks.APGD(net, eps=eps, steps=3),
    "MultiAttack": lambda net, eps: torchattacks.MultiAttack(
        [torchattacks.FGSM(net, eps=eps), torchattacks.PGD(net, eps=eps, alpha=eps / 2, steps=2)]
    ),
    "our PGD": lambda net, eps: PGD(net, eps, eps / 2, 2),
    "our NFGSM": lambda net, eps: NFGSM(net, eps / 3),
}
OTHERS = {
    "PGDL2": lambda net: torchattacks.PGDL2(net, eps=0.5, alpha=0.2, steps=3),
    "CW": lambda net: torchattacks.CW(net, steps=3),
    "FAB": lambda net: torchattacks.FAB(net, eps=0.1, steps=2, n_classes=3),
    "Square": lambda net: torchattacks.Square(net, eps=0.1, n_queries=3),
    "DeepFool": lambda net: torchattacks.DeepFool(net, steps=2),
}


@settings(max_examples=10)
@given(eps=st.floats(0.003, 0.5), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("name", LINF)
def test_radius_and_box_hold_for_torchattacks_too(small_net, batch, name, eps, seed):
    net, (images, labels) = small_net(seed, dtype=torch.float32), batch(seed, dtype=torch.float32)
    adversarial = perturb(LINF[name](net, eps), images, labels, stream=RandomStream(seed))
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    moved = (adversarial - images).abs().max()
    assert moved <= eps + 1e-6
    if name not in ("APGD", "MultiAttack"):  # these two hand back the image where they do not fool the model
        assert moved > 0


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("name", [*LINF, *OTHERS])
def test_torchattacks_attacks_leave_nothing_behind(small_net, batch, untouched, name, batchnorm):
    net, (images, labels) = small_net(19, dtype=torch.float32), batch(20, dtype=torch.float32)
    F.cross_entropy(net(images), labels).backward()  # gradients that an attack must not add to
    net[1].weight.grad, net[3].training = None, False
    attack = LINF[name](net, 0.1) if name in LINF else OTHERS[name](net)
    before = images.clone()
    with untouched(net):
        adversarial = perturb(attack, images, labels, stream=RandomStream(21), batchnorm=batchnorm)
    assert torch.equal(images, before)
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    if name == "PGDL2":
        assert (adversarial - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6


def test_without_a_stream_starts_come_from_the_global_generator(small_net, batch):
    net, (images, labels) = small_net(22), batch(23)
    attack = torchattacks.PGD(net, eps=0.1, steps=1)
    torch.manual_seed(24)
    a, b = perturb(attack, images, labels), perturb(attack, images, labels)
    torch.manual_seed(24)
    assert torch.equal(perturb(attack, images, labels), a)
    assert not torch.equal(a, b)


def test_attacks_within_an_attack_follow_the_images_too(small_net, batch):
    net, (images, labels) = small_net(25), batch(26)
    attack = torchattacks.MultiAttack([torchattacks.PGD(net, steps=1), torchattacks.FGSM(net)])
    attack.set_device(torch.device("meta"))  # as if made while the model was elsewhere
    assert perturb(attack, images, labels).device.type == "cpu"


def test_torchattacks_attacks_follow_the_images(small_net, batch):
    net = small_net(27, dtype=torch.float32)
    attack = torchattacks.PGD(net, steps=2)
    net.to("meta")
    images, labels = (t.to("meta") for t in batch(28, dtype=torch.float32))
    assert perturb(attack, images, labels).device.type == "meta"


def test_what_is_no_attack_on_the_model_is_refused(small_net):
    net = small_net()
    attack = torchattacks.PGD(net)
    assert check_attack(attack, net) is attack
    for wrong in (lambda x, y: x, torchattacks.PGD, None, "pgd"):
        with pytest.raises(TypeError, match=r"attack must be a torchattacks\.attack\.Attack, got "):
            check_attack(wrong, net)
    with pytest.raises(ValueError, match="attacks another model than the one that is trained"):
        check_attack(torchattacks.PGD(copy.deepcopy(net)), net)
    attack.set_normalization_used([0.5, 0.5], [0.2, 0.2])
    with pytest.raises(
        ValueError, match=r"normalisation belongs inside the model: create_model\(\.\.\., mean=, std=\)"
    ):
        check_attack(attack, net)
