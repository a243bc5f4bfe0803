"""Accuracy by class and by group while training, against counting sample by sample."""

import json

import pytest
import torch

from at_extensions.attacks import PGD, RandomStream, perturb
from at_extensions.commands.train import train
from at_extensions.methods import Step
from at_extensions.training.metrics import EpochSums, merged, numbers, validate

COUNTS = [1, 9, 5, 7]  # by count: 1, 3 are the head, 2 the medium, 0 the tail


def by_class(predictions, labels, classes):
    return [
        (predictions[labels == c] == c).double().mean().item() if (labels == c).any() else None for c in range(classes)
    ]


def close(found, expected):
    assert [None if v is None else pytest.approx(v) for v in expected] == found


def test_validation_by_class_and_group_is_the_slow_count(small_net, batch, untouched):
    net = small_net(1, num_classes=4)
    batches = [batch(seed, 7, num_classes=4) for seed in (2, 3)]
    labels = torch.cat([y for _, y in batches])
    attack, stream = PGD(net, 0.1, 0.05, 2), RandomStream(5)
    with untouched(net):
        found = validate(net, batches, attack, seed=5, class_counts=COUNTS)
    plain = validate(net, batches, attack, seed=5)
    attacked = [perturb(attack, x, y, stream=stream) for x, y in batches]
    net.eval()
    for name, images in (("val_clean", [x for x, _ in batches]), ("val_robust", attacked)):
        predictions = net(torch.cat(images)).argmax(1)
        close(found["per_class"][name], by_class(predictions, labels, 4))
        for group, classes in {"head": [1, 3], "medium": [2], "tail": [0]}.items():
            members = torch.isin(labels, torch.tensor(classes))
            expected = (predictions == labels)[members].double().mean().item()
            assert found["groups"][name][group] == pytest.approx(expected)
        assert found[f"{name}_accuracy"] == plain[f"{name}_accuracy"]
    assert plain.keys() == {"val_clean_accuracy", "val_robust_accuracy"}


def test_a_class_without_images_has_no_accuracy(small_net, batch):
    images, _ = batch(6)
    row = validate(small_net(7, num_classes=4), [(images, torch.tensor([1, 1, 2, 3]))], class_counts=COUNTS)
    assert row["per_class"]["val_clean"][0] is None
    assert row["groups"]["val_clean"]["tail"] is None


def test_training_accuracy_by_class_adds_up_over_steps(no_host_sync):
    sums, generator = EpochSums(torch.device("cpu"), COUNTS), torch.Generator().manual_seed(8)
    logits, labels = torch.randn(3, 6, 4, generator=generator), torch.randint(1, 4, (3, 6), generator=generator)
    with no_host_sync():
        for z, y in zip(logits, labels):
            sums.add(Step(z.sum(), z, z), y)
    row = sums.read()
    close(row["per_class"]["train"], by_class(logits.flatten(0, 1).argmax(1), labels.flatten(), 4))
    assert row["groups"]["train"]["tail"] is None
    assert row["train_accuracy"] == pytest.approx((logits.argmax(2) == labels).double().mean().item())


def test_rows_merge_and_show_their_numbers():
    row = merged({"epoch": 1, "groups": {"train": {"tail": 0.5}}}, {"groups": {"val_clean": {"tail": None}}, "x": 0.5})
    assert row == {"epoch": 1, "groups": {"train": {"tail": 0.5}, "val_clean": {"tail": None}}, "x": 0.5}
    assert numbers(row) == {"epoch": 1, "x": 0.5}


@pytest.mark.parametrize("method", ["reat", "at_bsl"])
def test_a_long_tailed_run_writes_them(tmp_path, method):
    options = {"model_options": {"width": 4}, "method": method, "steps": 1, "epochs": 2, "val_steps": 1}
    run = train(tmp_path / "run", imbalance_ratio=0.1, **options)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    counts = run.config()["data"]["class_counts"]
    assert max(counts) > 9 * min(counts)
    for row in rows:
        for name in ("train", "val_clean", "val_robust"):
            assert len(row["per_class"][name]) == 10
            assert row["groups"][name].keys() == {"head", "medium", "tail"}
        # the validation split is balanced, so that the mean over classes is the accuracy
        assert sum(row["per_class"]["val_clean"]) / 10 == pytest.approx(row["val_clean_accuracy"], abs=0.02)
