"""The served ``AutoAttack``: upstream's interface, pyautoattack's results, RobustBench's benchmark."""

import sys

import pyautoattack
import pytest
import torch
from autoattack import AutoAttack

ATTACKS = ["apgd-ce", "apgd-t", "fab-t", "square"]


def reference(model, x, y, bs, seed, **settings):
    """The result of pyautoattack itself."""
    attack = pyautoattack.AutoAttack(model, seed=seed, attacks=ATTACKS, version="custom", **settings)
    shorten(attack)
    tracer = sys.gettrace()
    with torch.random.fork_rng(devices=[]):
        result = attack.run_standard_evaluation(x, y, batch_size=bs)
    sys.settrace(tracer)
    return result


def shorten(attack):
    """Change the attack objects as scripts do."""
    attack.apgd.n_restarts = 1
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 20
    attack.square.n_queries = 50
    attack.fab.n_target_classes = attack.apgd_targeted.n_target_classes = 3


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.02), ("L2", 0.15), ("L1", 0.6)])
def test_results_equal_pyautoattack(net, make_images, label, norm, eps):
    model, x = net().eval(), make_images(24, low=0, high=1)
    y = label(model, x, wrong=3)
    attack = AutoAttack(model, norm, eps, seed=3, device="cpu", version="custom", attacks_to_run=ATTACKS, verbose=False)
    shorten(attack)
    state = torch.get_rng_state()
    x_adv, y_adv = attack.run_standard_evaluation(x, y, bs=10, return_labels=True)
    assert torch.equal(torch.get_rng_state(), state)
    x_ref, y_ref = reference(model, x, y, 10, 3, norm=norm, eps=eps)
    assert torch.equal(x_adv, x_ref)
    assert torch.equal(y_adv, y_ref)
    assert 0 < (y_adv == y).double().mean() < 21 / 24
    assert torch.equal(attack.run_standard_evaluation(x, y, bs=10), x_adv)


def test_a_plain_function_can_be_attacked_and_is_resumed(net, make_images, label, tmp_path):
    model, x = net().eval(), make_images(12, low=0, high=1)
    y = label(model, x)

    def attack(path, offset=0.0):
        adversary = AutoAttack(
            lambda images: model(images) + offset * torch.arange(4), eps=0.02, seed=0, device="cpu", version="custom",
            attacks_to_run=["apgd-ce", "fab"], verbose=False,
        )  # fmt: skip
        adversary.apgd.n_restarts = adversary.fab.n_restarts = 1
        adversary.apgd.n_iter = adversary.fab.n_iter = 10
        return adversary.run_standard_evaluation(x, y, bs=5, state_path=path)

    first = attack(tmp_path / "state.json")
    assert torch.equal(first, attack(tmp_path / "state.json"))
    assert torch.equal(first, attack(None))
    with pytest.raises(ValueError, match="differs in weights"):
        attack(tmp_path / "state.json", offset=-9.0)


def test_an_interrupted_run_resumes(net, make_images, label, tmp_path, monkeypatch):
    from at_extensions.evaluation.state import Store

    model, x = net().eval(), make_images(24)
    y = label(model, x, wrong=2)
    path = tmp_path / "state.json"

    def attack(state_path, seed=None, attacks=("apgd-ce", "square")):
        adversary = AutoAttack(
            model, eps=0.02, seed=seed, device="cpu", version="custom", attacks_to_run=list(attacks), verbose=False
        )
        adversary.apgd.n_restarts, adversary.apgd.n_iter, adversary.square.n_queries = 1, 10, 20
        return adversary.run_standard_evaluation(x, y, bs=8, return_labels=True, state_path=state_path)

    save, done = Store.save, []
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", lambda *a: (save(*a), done.append(1), 1 // (2 - len(done))))
        with pytest.raises(ZeroDivisionError):
            attack(path)  # no seed: the time is it
    from autoattack.state import EvaluationState

    state = EvaluationState.from_disk(path)
    assert state.run_attacks == set()
    assert state.clean_accuracy == 22 / 24
    x_adv, y_adv = attack(path)
    x_ref, y_ref = attack(None, seed=state.seed)
    assert torch.equal(x_adv, x_ref)
    assert torch.equal(y_adv, y_ref)
    assert EvaluationState.from_disk(path).robust_accuracy == pytest.approx((y_ref == y).double().mean().item())
    with pytest.raises(ValueError, match="different set of attacks"):
        attack(path, attacks=["apgd-ce"])


def test_verbose_and_log_path_are_respected(net, make_images, label, tmp_path, capsys):
    model, x = net().eval(), make_images(10)
    y = label(model, x)
    options = {"eps": 0.02, "seed": 0, "device": "cpu", "version": "custom", "attacks_to_run": ["apgd-ce"]}
    log = tmp_path / "log.txt"
    loud = AutoAttack(model, log_path=log, **options)
    loud.apgd.n_iter = 5
    loud.run_standard_evaluation(x, y, bs=5)
    printed = capsys.readouterr().out
    for line in (
        "initial accuracy: 100.00%",
        "apgd-ce - 2/2",
        "robust accuracy after APGD-CE",
        "max Linf perturbation",
    ):
        assert line in printed
        assert line in log.read_text()
    quiet = AutoAttack(model, verbose=False, **options)
    quiet.apgd.n_iter = 5
    quiet.run_standard_evaluation(x, y)
    assert capsys.readouterr().out == ""
    AutoAttack(torch.nn.Sequential(model, torch.nn.Softmax(1)), verbose=False, **options).run_standard_evaluation(x, y)
    assert "probabilities" in capsys.readouterr().out  # warnings are not silenced


def test_each_attack_by_itself(net, make_images, label):
    model, x = net().eval(), make_images(12)
    y = label(model, x, wrong=1)
    attack = AutoAttack(
        model, eps=0.02, seed=0, device="cpu", version="custom", attacks_to_run=["apgd-ce", "square"], verbose=False
    )
    attack.apgd.n_iter, attack.square.n_queries = 5, 20
    results = attack.run_standard_evaluation_individual(x, y, bs=5, return_labels=True)
    assert list(results) == attack.attacks_to_run == ["apgd-ce", "square"]
    for name, (x_adv, y_adv) in results.items():
        attack.attacks_to_run = [name]
        assert torch.equal(x_adv, attack.run_standard_evaluation(x, y, bs=5))
        assert attack.clean_accuracy(x_adv, y, bs=5) == (y_adv == y).double().mean().item()
    assert attack.clean_accuracy(x, y) == 11 / 12


def test_the_model_keeps_its_mode_and_gets_no_gradients(net, make_images, label):
    model, x = net().train(), make_images(8)
    y = label(model, x)
    model.body[3].p = 0.0
    attack = AutoAttack(model, eps=0.02, seed=0, device="cpu", version="custom", attacks_to_run=["fab"], verbose=False)
    attack.fab.n_restarts, attack.fab.n_iter = 1, 3
    attack.run_standard_evaluation(x, y)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_versions_and_bad_input(net):
    model = net()
    attack = AutoAttack(model, device="cpu", verbose=False)
    assert attack.attacks_to_run == ATTACKS
    attack.set_version("rand")
    assert attack.attacks_to_run == ["apgd-ce", "apgd-dlr"]
    assert attack.apgd.eot_iter == 20
    with pytest.raises(ValueError, match="overridden unless"):
        AutoAttack(model, attacks_to_run=["square"])
    with pytest.raises(ValueError, match="did you mean 8/255"):
        AutoAttack(model, eps=8)
    with pytest.raises(ValueError, match="did you mean 'standard'"):
        AutoAttack(model, version="standart")
    with pytest.raises(NotImplementedError, match="TensorFlow"):
        AutoAttack(model, is_tf_model=True)
    attack.attacks_to_run = ["apgd_ce"]
    with pytest.raises(ValueError, match="did you mean 'apgd-ce'"):
        attack.run_standard_evaluation(torch.rand(2, 3, 6, 6), torch.zeros(2, dtype=torch.long))


@pytest.mark.filterwarnings("ignore")
def test_robustbench_benchmarks(make_images, label, monkeypatch, tmp_path):
    from robustbench import eval as robustbench

    model = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(192, 10, bias=False)).eval()
    generator = torch.Generator().manual_seed(0)
    model[2].weight.data = torch.randn(10, 192, generator=generator)
    model[2].weight.data -= model[2].weight.data.mean(1, keepdim=True)
    x = make_images(12, (3, 32, 32), low=0, high=1)
    y = label(model, x, wrong=2)
    monkeypatch.setattr(robustbench, "load_clean_dataset", lambda *_: (x, y))
    from at_extensions.evaluation.served import autoattack as served

    apply = served.apply_version

    def quicker(attack, version, norm):
        apply(attack, version, norm)
        attack.square.n_queries, attack.fab.n_iter = 200, 20

    monkeypatch.setattr(served, "apply_version", quicker)
    clean, robust = robustbench.benchmark(model, n_examples=12, eps=1 / 255, batch_size=8)
    assert clean == pytest.approx(10 / 12)
    assert 0 < robust < clean
    state = tmp_path / "state.json"
    log = tmp_path / "log.txt"
    options = {"n_examples": 12, "eps": 1 / 255, "batch_size": 8, "aa_state_path": state, "log_path": log}
    first = robustbench.benchmark(model, **options)
    assert "robust accuracy after SQUARE" in log.read_text()
    assert robustbench.benchmark(model, **options) == first  # from the state alone
    assert log.read_text().count("apgd-ce - 1/2") == 1
    assert first[0] == clean
