"""The contract of every method: attack, then one training forward, and nothing else touched."""

import copy
import io

import pytest
import torch
import torchattacks
from torch.nn import functional as F

from at_extensions.attacks import NFGSM, PGD, RandomStream, perturb
from at_extensions.methods import (
    FGSMAT,
    PGDAT,
    Method,
    Standard,
    Step,
    Wrapping,
    create_method,
    list_methods,
    method_options,
)

METHODS = {
    "pgd": lambda net, **options: PGDAT(net, eps=0.1, alpha=0.03, steps=3, **options),
    "n_fgsm": lambda net, **options: FGSMAT(net, eps=0.1, **options),
    "rs_fgsm": lambda net, **options: FGSMAT(net, eps=0.1, variant="rs", **options),
    "fgsm": lambda net, **options: FGSMAT(net, eps=0.1, variant="plain", **options),
    "pgd_l2": lambda net, **options: PGDAT(net, attack=torchattacks.PGDL2(net, eps=0.5, steps=2), **options),
}
RANDOM = ["pgd", "n_fgsm", "rs_fgsm", "pgd_l2"]
each_method = pytest.mark.parametrize("name", METHODS)
each_random_method = pytest.mark.parametrize("name", RANDOM)
each_batchnorm = pytest.mark.parametrize("batchnorm", ["eval", "train"])


@each_method
@each_batchnorm
def test_the_attack_leaves_everything_as_it_was(small_net, batch, untouched, name, batchnorm):
    net, (images, labels) = small_net(1), batch(2)
    method = METHODS[name](net, batchnorm=batchnorm)
    F.cross_entropy(net(images), labels).backward()
    net[0].weight.requires_grad_(False)
    with untouched(net):
        adversarial = method.perturb(images, labels)
    assert not adversarial.requires_grad
    assert (
        0.05 < (adversarial - images).abs().max() <= (0.3 if name == "n_fgsm" else 0.5 if "l2" in name else 0.1) + 1e-9
    )


@each_method
def test_the_attack_sees_batchnorm_as_it_was_asked_to(small_net, batch, name):
    images, labels = batch(26)
    found = {}
    for batchnorm in ("eval", "train"):
        method = METHODS[name](small_net(27), batchnorm=batchnorm)
        expected = perturb(method.attack, images, labels, stream=RandomStream(0), batchnorm=batchnorm)
        found[batchnorm] = method.perturb(images, labels)
        torch.testing.assert_close(found[batchnorm], expected, rtol=0, atol=1e-12)
    assert (found["eval"] - found["train"]).abs().max() > 0.01


@each_method
@each_batchnorm
def test_a_step_updates_batchnorm_once_and_draws_only_its_dropout(small_net, batch, untouched, name, batchnorm):
    net, (images, labels) = small_net(3), batch(4)
    twin, method = copy.deepcopy(net), METHODS[name](net, batchnorm=batchnorm)
    torch.manual_seed(5)
    with untouched(net, but=("buffers", "torch's random state")):
        step = method(images, labels, torch.arange(4))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    logits = twin(step.x_adv)  # the one forward that a step is made of, on a copy
    assert torch.equal(after, torch.get_rng_state())
    assert isinstance(step, Step)
    assert torch.equal(step.logits, logits)
    assert torch.equal(step.loss, F.cross_entropy(logits, labels))
    assert net[1].num_batches_tracked == 1
    for ours, theirs in zip(net.buffers(), twin.buffers()):
        assert torch.equal(ours, theirs)


@each_method
def test_backward_gives_the_gradients_of_the_loss_alone(small_net, batch, name):
    net, (images, labels) = small_net(6), batch(7)
    twin = copy.deepcopy(net)
    torch.manual_seed(8)
    step = METHODS[name](net)(images, labels)
    step.loss.backward()
    torch.manual_seed(8)
    F.cross_entropy(twin(step.x_adv), labels).backward()
    for ours, theirs in zip(net.parameters(), twin.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad.abs().sum() > 0


class Broken(Exception):
    """What a model may raise while it is attacked."""


@each_method
@each_batchnorm
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_within_the_attack_leaves_everything_as_it_was(
    small_net, batch, untouched, name, batchnorm, where
):
    net, (images, labels) = small_net(9), batch(10)
    method = METHODS[name](net, batchnorm=batchnorm)

    def fail(*_):
        raise Broken

    hook = net[2].register_forward_hook(fail) if where == "forward" else net[2].register_full_backward_hook(fail)
    with pytest.raises(Broken), untouched(net):
        method(images, labels)
    hook.remove()
    assert torch.isfinite(method(images, labels).loss)


@each_random_method
def test_starts_differ_from_batch_to_batch_and_the_seed_decides_them(small_net, batch, name):
    net, (images, labels) = small_net(11), batch(12)

    def three(seed, global_seed):
        torch.manual_seed(global_seed)
        method = METHODS[name](net, seed=seed)
        return [method.perturb(images, labels) for _ in range(3)]

    once, again, other = three(0, 1), three(0, 2), three(3, 1)
    for i in range(3):
        assert torch.equal(once[i], again[i])
        assert not torch.equal(once[i], other[i])
        assert not torch.equal(once[i], once[i - 1])


@each_random_method
def test_starts_go_on_from_a_state_dict(small_net, batch, name):
    images, labels = batch(13)
    method = METHODS[name](small_net(14))
    method.perturb(images, labels)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    upcoming = [method.perturb(images, labels) for _ in range(2)]
    file.seek(0)
    again = METHODS[name](small_net(99), seed=7)
    again.perturb(images, labels)
    again.load_state_dict(torch.load(file, weights_only=True))
    for expected in upcoming:
        assert torch.equal(again.perturb(images, labels), expected)


@each_method
@each_batchnorm
def test_batchnorm_that_the_user_froze_stays_frozen(small_net, batch, untouched, name, batchnorm):
    net, (images, labels) = small_net(15), batch(16)
    net[1].eval()
    method = METHODS[name](net, batchnorm=batchnorm)
    with untouched(net, but=("torch's random state",)):  # not even the training forward may move its statistics
        method(images, labels)
    assert [m.training for m in net] == [True, False, True, True, True, True]


@each_method
def test_no_step_after_the_first_reads_the_device(small_net, batch, no_host_sync, name):
    method, (images, labels) = METHODS[name](small_net(17)), batch(18)
    method(images, labels)  # the first batch is checked in full
    with no_host_sync():
        method(images, labels).loss.backward()


def test_a_deep_copy_attacks_its_own_model(small_net, batch):
    images, labels = batch(19)
    method = PGDAT(small_net(20), steps=2)
    twin = copy.deepcopy(method)
    assert twin.attack.model is twin.model is not method.model
    assert torch.equal(twin.perturb(images, labels), method.perturb(images, labels))
    twin.perturb(images, labels)
    assert not torch.equal(twin.perturb(images, labels), method.perturb(images, labels))  # its stream is its own


def test_a_method_is_a_module_around_the_users_own_model(small_net):
    net = small_net(21)
    method = PGDAT(net)
    assert method.model is net
    assert {f"model.{name}" for name, _ in net.named_parameters()} == {name for name, _ in method.named_parameters()}
    method.eval()
    assert not net.training
    method.to(torch.float32)
    assert net[0].weight.dtype == torch.float32


def test_compiled_in_place_it_makes_the_same_step(small_net, batch):
    net, (images, labels) = small_net(22), batch(23)
    net[3].p = 0.0
    compiled = copy.deepcopy(net)
    compiled.compile(backend="aot_eager")
    steps = []
    for model in (net, compiled):
        method = PGDAT(model, eps=0.1, alpha=0.03, steps=2)
        method(images, labels).loss.backward()
        steps.append(method(images, labels))
    assert torch.equal(steps[0].x_adv, steps[1].x_adv)
    torch.testing.assert_close(steps[0].logits, steps[1].logits)
    assert compiled.state_dict().keys() == net.state_dict().keys()
    for ours, theirs in zip(net.parameters(), compiled.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("make", [PGDAT, FGSMAT, Method])
def test_attacks_that_do_not_fit_are_refused(small_net, make):
    net = small_net()
    normalising = torchattacks.PGD(net)
    normalising.set_normalization_used([0.5, 0.5], [0.2, 0.2])
    with pytest.raises(ValueError, match="normalisation belongs inside the model"):
        make(net, attack=normalising)
    with pytest.raises(ValueError, match="attacks another model than the one that is trained"):
        make(net, attack=PGD(small_net()))
    with pytest.raises(TypeError, match=r"torchattacks\.attack\.Attack, got type"):
        make(net, attack=torchattacks.PGD)
    with pytest.raises(ValueError, match="unknown batchnorm 'off'"):
        make(net, batchnorm="off")


@pytest.mark.parametrize("make", [PGDAT, FGSMAT, Standard])
def test_what_is_no_model_is_refused(make):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        make("resnet18")


def test_every_method_is_listed_with_one_line():
    listed = list_methods()
    assert {"pgd", "n_fgsm", "rs_fgsm", "fgsm", "standard"} <= set(listed)
    assert list(listed) == sorted(listed)
    for line in listed.values():
        assert line
        assert "\n" not in line


BY_NAME = {
    "pgd": ({"eps": 0.1, "alpha": 0.03, "steps": 3}, lambda net: METHODS["pgd"](net)),
    "n_fgsm": ({"eps": 0.1, "k": 1.0, "alpha": 0.05}, lambda net: FGSMAT(net, eps=0.1, k=1.0, alpha=0.05)),
    "rs_fgsm": ({"eps": 0.1, "alpha": 0.05}, lambda net: FGSMAT(net, eps=0.1, alpha=0.05, variant="rs")),
    "fgsm": ({"eps": 0.1}, lambda net: METHODS["fgsm"](net)),
    "standard": ({}, lambda net: Standard(net)),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_by_name_is_the_same_method(small_net, batch, name):
    images, labels = batch(24)
    options, make = BY_NAME[name]
    a, b = create_method(name, small_net(25), **options), make(small_net(25))
    assert torch.equal(a.perturb(images, labels), b.perturb(images, labels))


def test_options_are_the_names_that_create_method_takes(small_net):
    assert method_options("standard") == ["twin", "seed"]
    assert {"eps", "alpha", "steps"} <= set(method_options("te"))
    assert "steps" not in method_options("n_fgsm")
    with pytest.raises(ValueError, match="did you mean 'pgd'"):
        method_options("pdg")


def test_what_is_offered_is_taken_where_it_fits_and_gives_way_to_what_is_asked(small_net):
    offered = {"eps": 0.1, "seed": 3, "class_counts": [1, 2, 3]}
    assert create_method("pgd", small_net(), offered=offered).attack.eps == 0.1
    assert create_method("pgd", small_net(), offered=offered, eps=0.2).attack.eps == 0.2
    assert create_method("n_fgsm", small_net(), offered=offered).stream.seed == 3
    assert create_method("standard", small_net(), offered=offered).attack is None
    assert offered == {"eps": 0.1, "seed": 3, "class_counts": [1, 2, 3]}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("pdg", {}, "unknown method 'pdg'; did you mean 'pgd'"),
        ("NFGSM", {}, "unknown method 'NFGSM'; did you mean 'n_fgsm'"),
        ("pgd", {"epsilon": 0.1}, "unknown option of method 'pgd' 'epsilon'; did you mean 'eps'"),
        ("fgsm", {"alpha": 0.1}, "unknown option of method 'fgsm' 'alpha'"),
        ("n_fgsm", {"steps": 10}, "unknown option of method 'n_fgsm' 'steps'"),
        ("standard", {"eps": 0.1}, "unknown option of method 'standard' 'eps'; known: seed, twin"),
        ("pgd", {"eps": 8}, "did you mean 8/255"),
        ("rs_fgsm", {"eps": 8}, "did you mean 8/255"),
    ],
)
def test_unknown_names_and_options_bring_the_nearest(small_net, name, options, says):
    with pytest.raises(ValueError, match=says):
        create_method(name, small_net(), **options)


def test_the_range_of_images_is_the_attacks_also_in_wrappings_and_for_an_exchanged_attack(small_net):
    net = small_net(3)
    method = Wrapping(Wrapping(PGDAT(net)))
    assert method.image_range == (0.0, 1.0)
    method.image_range = (-0.1, 1.1)
    assert method.inner.inner.image_range == method.attack.image_range == method.image_range == (-0.1, 1.1)
    assert Wrapping(PGDAT(net, attack=PGD(net, image_range=(-1, 2)))).image_range == (-1.0, 2.0)
    method.attack = NFGSM(net)
    method.perturb(torch.zeros(2, 2, 5, 5, dtype=torch.float64) - 0.1, torch.tensor([0, 1]))
    assert method.attack.image_range == (-0.1, 1.1)


def test_attacks_of_torchattacks_are_refused_outside_the_unit_interval(small_net):
    net = small_net(4)
    method = PGDAT(net, attack=torchattacks.PGD(net, steps=1))
    method.image_range = (0, 1)
    with pytest.raises(ValueError, match=r"PGD clips images to \[0, 1\].*use attacks.PGD"):
        method.image_range = (-0.1, 1.1)
    assert method.image_range == (0.0, 1.0)
    method = PGDAT(net)
    method.image_range = (-0.1, 1.1)
    method.attack = torchattacks.FGSM(net)
    with pytest.raises(ValueError, match=r"FGSM clips images to \[0, 1\]"):
        method.perturb(torch.zeros(2, 2, 5, 5, dtype=torch.float64), torch.tensor([0, 1]))
