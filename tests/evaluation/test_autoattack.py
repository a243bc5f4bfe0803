"""``evaluate``: right verdicts, honest flags, nothing left behind."""

import json
import sys
import types

import pyautoattack
import pytest
import torch
from torch import nn

from at_extensions.commands.train import train
from at_extensions.data import load_dataset
from at_extensions.evaluation import RobustnessReport, evaluate
from at_extensions.models import load_model

ATTACKS = ["apgd-ce", "apgd-t", "fab-t"]
DUAL = {"Linf": 1, "L2": 2, "L1": float("inf")}


def margins(model, x, y, norm):
    """Distance of each image to the nearest other class of a linear model, in the norm (closed form)."""
    with torch.no_grad():
        logits = model(x)
        gaps = logits.gather(1, y[:, None]) - logits
        steps = torch.linalg.vector_norm(model.weight[y][:, None] - model.weight[None], ord=DUAL[norm], dim=2)
    return (gaps / steps.clamp_min(1e-12)).masked_fill(nn.functional.one_hot(y, logits.shape[1]).bool(), 1e9).amin(1)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.02), ("L2", 0.12), ("L1", 0.2)])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_verdicts_on_a_linear_model_are_the_closed_form(linear, make_images, label, norm, eps, classes):
    model, x = linear(classes), make_images(40)
    y = label(model, x, wrong=5)
    attacks = [name for name in ATTACKS if classes >= 4 or name != "apgd-t"]
    report = evaluate(model, x, y, norm=norm, eps=eps, version="custom", attacks=attacks, batch_size=32)
    distance = margins(model, x, y, norm)
    decided = (distance - eps).abs() > 0.02 * eps  # attacks approach the boundary, and do not reach it
    assert decided.double().mean() > 0.8
    assert torch.equal(report.robust[decided], (distance > eps)[decided])
    assert 0 < report.robust_accuracy < report.clean_accuracy == 35 / 40


def test_verdicts_equal_pyautoattack(net, make_images, label, small_suite):
    model, x = net(classes=5).eval(), make_images(40, low=0, high=1)
    y = label(model, x, wrong=3)
    report = evaluate(model, x, y, eps=0.03, version="custom", attacks=[*ATTACKS, "square"], seed=7, batch_size=40)
    reference = pyautoattack.AutoAttack(model, norm="Linf", eps=0.03, seed=7, version="standard")
    reference.fab.n_target_classes = reference.apgd_targeted.n_target_classes = 4
    reference.apgd.n_iter = reference.apgd_targeted.n_iter = reference.fab.n_iter = 10
    reference.square.n_queries = 100
    with torch.random.fork_rng(devices=[]):
        tracer = sys.gettrace()
        _, predictions = reference.run_standard_evaluation(x, y, batch_size=40)
        sys.settrace(tracer)
    assert torch.equal(report.robust, predictions == y)
    assert 0 < report.robust_accuracy < report.clean_accuracy


@pytest.mark.parametrize(
    ("classes", "attacks"),
    [(2, ["apgd-ce", "fab-t", "square"]), (3, ["apgd-ce", "fab-t", "square"]),
     (4, ["apgd-ce", "apgd-t", "fab-t", "square"]), (1000, ["apgd-ce", "apgd-t", "fab-t", "square"])],
)  # fmt: skip
def test_few_and_many_classes_run_and_few_are_marked(linear, make_images, label, small_suite, classes, attacks):
    model, x = linear(classes), make_images(16)
    report = evaluate(model, x, label(model, x), eps=0.02)
    assert list(report.after_attack) == attacks
    assert report.settings["fab-t"]["n_target_classes"] == min(9, classes - 1)
    assert [flag.name for flag in report.flags] == ([] if classes >= 4 else ["few_classes"])
    assert report.reliable  # not standard is not unreliable


@pytest.mark.parametrize(("norm", "targets", "restarts", "large"), [("Linf", 9, 1, False), ("L1", 5, 5, True)])
def test_settings_are_those_of_pyautoattacks_versions(linear, make_images, norm, targets, restarts, large):
    from at_extensions.evaluation.suite import apply_version, by_name, make_attackers, settings

    for version in ("standard", "plus", "rand"):
        attackers = make_attackers(None, norm, 0.1, "cpu")
        apply_version(attackers, version, norm)
        reference = pyautoattack.AutoAttack(nn.Identity(), norm=norm, eps=0.1, seed=0, version=version)
        for name in ("apgd", "apgd_targeted", "fab", "square"):
            assert settings(getattr(attackers, name)) == settings(getattr(reference, name))
        if version == "standard":
            suite = by_name(attackers, reference.attacks_to_run, 10)
            assert suite["apgd-t"].n_target_classes == targets
            assert (suite["apgd-ce"].n_restarts, suite["apgd-ce"].use_largereps) == (restarts, large)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_left_behind(net, make_images, label, small_suite, untouched, precision):
    model = net().train()
    model.body[1].eval()  # a BatchNorm that the user froze stays so
    model.head.bias.requires_grad_(False)
    x = make_images(20)
    y = label(model, x)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with untouched(model):
        report = evaluate(model, x, y, eps=0.05, batch_size=8, precision=precision)
    assert calls
    assert report.robust_accuracy < 1


def test_nothing_is_left_behind_by_an_error(net, make_images, label, small_suite, untouched):
    class Failing(net):
        left = 20

        def forward(self, x):
            type(self).left -= 1
            if self.left < 0:
                raise RuntimeError("out of luck")
            return super().forward(x)

    model, x = Failing().train(), make_images(8)
    y = label(model, x)
    with untouched(model), pytest.raises(RuntimeError, match="out of luck"):
        evaluate(model, x, y, eps=0.1)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_surrounding_contexts_do_not_change_verdicts(net, make_images, label, small_suite, around):
    model, x = net(), make_images(12)
    y = label(model, x)
    alone = evaluate(model, x, y, eps=0.03)
    with around():
        inside = evaluate(model, x, y, eps=0.03)
    assert torch.equal(alone.robust, inside.robust)
    assert 0 < alone.robust_accuracy < 1


def test_the_same_seed_gives_the_same_result(net, make_images, label, small_suite):
    model, x = net(), make_images(30)
    y = label(model, x)
    first, second = (evaluate(model, x, y, eps=0.02, seed=3, batch_size=8) for _ in range(2))
    assert torch.equal(first.robust, second.robust)
    assert torch.equal(first.examples.adversarial, second.examples.adversarial)
    other = evaluate(model, x, y, eps=0.02, seed=4, batch_size=8)
    assert not torch.equal(first.examples.adversarial, other.examples.adversarial)


def test_n_examples_is_a_subset_drawn_by_seed(net, make_images, label, small_suite):
    model, x = net(), make_images(50)
    y = label(model, x, wrong=25)
    report = evaluate(model, x, y, eps=0.01, n_examples=20, seed=5)
    assert report.n_examples == len(report.robust) == len(report.indices) == 20
    assert report.indices == sorted(set(report.indices)) != list(range(20))
    assert report.clean.tolist() == [i >= 25 for i in report.indices]
    assert report.indices == evaluate(model, x, y, eps=0.01, n_examples=20, seed=5).indices
    assert evaluate(model, x, y, eps=0.01, n_examples=50).indices is None


def test_the_report_adds_up(net, make_images, label, small_suite, tmp_path):
    model, x = net(classes=5), make_images(60)
    y = label(model, x, wrong=10)
    counts = [10, 50, 40, 30, 20]
    report = evaluate(model, x, y, eps=0.015, batch_size=16, class_counts=counts, keep_examples=5)
    assert report.clean.tolist() == [i >= 10 for i in range(60)]
    assert not (report.robust & ~report.clean).any()
    left = [report.clean_accuracy, *report.after_attack.values()]
    assert left == sorted(left, reverse=True)
    assert left[-1] == report.robust_accuracy == report.robust.double().mean().item()
    assert report.interval[0] < report.robust_accuracy < report.interval[1]
    assert sum(row["count"] * (row["robust"] or 0) for row in report.per_class) == pytest.approx(
        int(report.robust.sum())
    )
    assert [row["train_count"] for row in report.per_class] == counts
    tail = torch.isin(y, torch.tensor([4, 0]))  # the two rarest of five
    assert report.groups["tail"]["robust"] == pytest.approx(report.robust[tail].double().mean().item(), nan_ok=True)
    assert report.seconds >= sum(report.attack_seconds.values()) > 0

    examples = report.examples
    assert len(examples) == 5
    assert (examples.adversarial - examples.images).abs().max() <= 0.015 + 1e-6
    with torch.no_grad():
        assert torch.equal(model.eval()(examples.adversarial).argmax(1), examples.adversarial_predictions)
    assert torch.equal(examples.clean_predictions, examples.labels)
    assert (examples.adversarial_predictions != examples.labels).all()

    loaded = RobustnessReport.load(report.save(tmp_path / "evaluation.json"))
    assert loaded.to_dict() == report.to_dict() == json.loads(json.dumps(report.to_dict()))
    assert loaded.reliable == report.reliable
    assert "after fab-t" in repr(loaded)
    assert f"{100 * report.robust_accuracy:.2f} %" in repr(report)


def test_every_sample_broken_or_wrong(linear, make_images, label, small_suite):
    model, x = linear(4), make_images(10)
    y = label(model, x, wrong=10)
    report = evaluate(model, x, y, eps=0.1)
    assert (report.clean_accuracy, report.robust_accuracy, report.examples) == (0, 0, None)
    report = evaluate(model, x, label(model, x), eps=0.9, keep_examples=0)
    assert (report.clean_accuracy, report.robust_accuracy, report.examples) == (1, 0, None)
    assert list(report.after_attack.values()) == [0, 0, 0, 0]


# progress


def test_a_line_for_each_attack_off_a_terminal(net, make_images, label, small_suite, capsys, monkeypatch):
    model, x = net(), make_images(20)
    y = label(model, x)
    report = evaluate(model, x, y, eps=0.02, batch_size=8)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, (attack, robust) in zip(lines, report.after_attack.items()):
        assert line.startswith(f"{attack} ")
        assert f"{100 * robust:.2f} % robust accuracy" in line
        assert line.endswith(" in all")
    evaluate(model, x, y, eps=0.02, batch_size=8, progress=False)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_a_line_a_minute_within_an_attack(net, make_images, label, capsys, monkeypatch):
    from at_extensions import progress

    clock = iter(range(0, 10**6, 45))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    model, x = net(), make_images(20)
    y = label(model, x)
    evaluate(model, x, y, eps=0.001, batch_size=4, version="custom", attacks=["apgd-ce"])
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 5
    assert "/5 batches" in lines[0]
    assert lines[0].endswith("left")


# flags


class Softmax(nn.Sequential):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class Quantised(nn.Sequential):
    def forward(self, x):
        return super().forward((x * 15).round() / 15)


class Purifying(nn.Sequential):
    def forward(self, x):
        with torch.enable_grad():
            moved = x.detach().requires_grad_()
            gradient = torch.autograd.grad(super().forward(moved).logsumexp(1).sum(), moved)[0]
        return super().forward(x + 0.001 * gradient)


@pytest.mark.parametrize(
    ("wrapper", "flag"),
    [(Softmax, "probabilities"), (Noisy, "randomized"), (Quantised, "zero_gradient"), (Purifying, "dynamic")],
)
def test_defences_raise_their_flags(linear, make_images, label, small_suite, wrapper, flag):
    model, x = wrapper(linear(4)), make_images(16)
    with torch.random.fork_rng(devices=[]):
        y = label(model, x)
    report = evaluate(model, x, y, eps=0.02)
    assert flag in [f.name for f in report.flags]
    assert not report.reliable
    plain = evaluate(model[0], x, label(model[0], x), eps=0.02)
    assert plain.flags == []
    assert plain.reliable


def test_rand_is_for_randomized_models(linear, make_images, label, small_suite):
    model, x = Noisy(linear(4)), make_images(12)
    with torch.random.fork_rng(devices=[]):
        y = label(model, x)
    first, second = (evaluate(model, x, y, eps=0.02, version="rand") for _ in range(2))
    assert first.flags == []
    assert first.settings["apgd-ce"]["eot_iter"] == 20
    assert torch.equal(first.robust, second.robust)  # the model's draws are seeded too


def test_only_examples_that_fool_the_model_within_reach_count(linear, make_images, label, monkeypatch):
    from at_extensions.evaluation import sequence

    model, x = linear(4), make_images(12)
    y = label(model, x)

    class Cheat:
        """Returns images outside the ball, outside the box, and some that do not fool the model."""

        norm, eps, logger = "Linf", 0.01, None
        model = None

        def perturb(self, images, labels):
            far = images - 0.2 * torch.sign(model.weight[labels] - model.weight[(labels + 1) % 4]).view_as(images)
            outside = far.clone()
            outside[:, :, 0, 0] = 1.5
            return torch.cat([far[:4], outside[4:8], images[8:]])

    monkeypatch.setattr(sequence, "by_name", lambda *_: {"apgd-ce": Cheat()})
    report = evaluate(model, x, y, eps=0.01, version="custom", attacks=["apgd-ce"])
    assert report.robust_accuracy == 1
    report = evaluate(model, x, y, eps=0.5, version="custom", attacks=["apgd-ce"])
    assert report.robust.tolist() == [False] * 4 + [True] * 8


# bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": 8}, ValueError, "did you mean 8/255"),
        ({"norm": "linf"}, ValueError, "did you mean 'Linf'"),
        ({"version": "standart"}, ValueError, "did you mean 'standard'"),
        ({"attacks": ["apgd-ce"]}, ValueError, 'goes with version="custom"'),
        ({"version": "custom"}, ValueError, 'goes with version="custom"'),
        ({"version": "custom", "attacks": ["apgd"]}, ValueError, "unknown attack"),
        ({"version": "custom", "attacks": ["fab", "fab"]}, ValueError, "different names"),
        ({"precision": "fp16"}, ValueError, "unknown precision"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"n_examples": 99}, ValueError, "there are only 6"),
        ({"class_counts": [1, 2]}, ValueError, "2 class_counts for a model of 4"),
        ({"labels": None}, TypeError, "labels"),
        ({"labels": torch.full((6,), 4)}, ValueError, "from 0 to 3"),
        ({"data": torch.randn(6, 3, 6, 6)}, ValueError, "normalisation belongs inside"),
        ({"data": (torch.rand(6, 3, 6, 6) * 255).byte()}, TypeError, "float"),
        ({"data": torch.utils.data.DataLoader([1])}, TypeError, r"pass loader\.dataset"),
        ({"model": lambda x: x}, TypeError, "torch.nn.Module"),
    ],
)
def test_bad_arguments(linear, change, error, message):
    arguments = {"data": torch.rand(6, 3, 6, 6), "labels": torch.zeros(6, dtype=torch.long), "eps": 0.1} | change
    model = arguments.pop("model", linear(4))
    with pytest.raises(error, match=message):
        evaluate(model, **arguments)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: (x.flatten(1) @ torch.ones(108, 4), 0), "one tensor of logits"),
        (lambda x: x, r"logits \(B, K\)"),
        (lambda x: x.flatten(1)[:, :4] / 0 * 0, "not finite"),
        (lambda x: x.flatten(1)[:, :4].detach(), "carry no gradient"),
    ],
)
def test_models_without_logits_or_gradients_are_refused(body, message):
    model = nn.Identity()
    model.forward = body
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(model, torch.rand(6, 3, 6, 6), torch.zeros(6, dtype=torch.long), eps=0.1)


def test_a_model_of_another_precision_is_refused(linear):
    with pytest.raises(ValueError, match=r"model\.float"):
        evaluate(linear(4).double(), torch.rand(6, 3, 6, 6), torch.zeros(6, dtype=torch.long), eps=0.1)


def test_attacks_that_are_undefined_are_refused_where_asked_for(linear, make_images):
    with pytest.raises(ValueError, match="3 classes"):
        evaluate(
            linear(3),
            make_images(4),
            torch.zeros(4, dtype=torch.long),
            eps=0.1,
            version="custom",
            attacks=["apgd-t"],
        )


@pytest.mark.parametrize(("counts", "message"), [([5, 5, 5], "got 3 class_counts"), ([5, 5, 0, 5], "class_counts")])
def test_class_counts_that_cannot_be_right_are_refused(linear, make_images, label, counts, message):
    model, x = linear(4), make_images(8)
    options = {"eps": 0.01, "version": "custom", "attacks": ["apgd-ce"]}
    with pytest.raises(ValueError, match=message):
        evaluate(model, x, label(model, x), class_counts=counts, **options)


@pytest.fixture(scope="module")
def robust(tmp_path_factory):
    """A network trained by N-FGSM on scanned digits, test images with labels, and the ones stock finds robust."""
    options = {"eps": 0.15, "epochs": 6, "model_options": {"width": 8}, "augment": "none", "progress": False}
    run = train(tmp_path_factory.mktemp("robust") / "run", method="n_fgsm", lr=0.2, **options)
    x, y = load_dataset("digits").test.tensors(48)
    model = load_model(run.published_weights()).eval()
    reference = pyautoattack.AutoAttack(model, norm="Linf", eps=0.15, seed=3, version="standard")
    with torch.random.fork_rng(devices=[]):
        tracer = sys.gettrace()
        _, predictions = reference.run_standard_evaluation(x, y, batch_size=48)
        sys.settrace(tracer)
    return model, x, y, predictions == y


@pytest.mark.parametrize("batch_size", [48, 24])
def test_a_robust_model_is_as_robust_as_pyautoattack_says(robust, batch_size):
    model, x, y, stock = robust
    report = evaluate(model, x, y, eps=0.15, seed=3, batch_size=batch_size)
    assert 0.2 < stock.double().mean() < report.clean_accuracy
    if batch_size == 48:  # the same random draws
        assert torch.equal(report.robust, stock)
    low, high = report.interval
    assert low <= stock.double().mean() <= high
    assert not report.flags
