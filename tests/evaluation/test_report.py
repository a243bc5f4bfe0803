"""The report's arithmetic against independent formulas, and its way to JSON and back."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from at_extensions.evaluation import RobustnessReport
from at_extensions.evaluation.report import accuracy_by_frequency, summary, wilson_interval


@given(st.integers(1, 2000), st.data())
def test_the_interval_equals_scipys(total, data):
    successes = data.draw(st.integers(0, total))
    reference = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, total) == pytest.approx((reference.low, reference.high), abs=1e-6)


@pytest.mark.parametrize(("classes", "tail"), [(10, [7, 8, 9]), (100, list(range(67, 100))), (5, [3, 4]), (3, [])])
def test_tail_classes_are_taken_by_rank(classes, tail):
    labels = torch.arange(classes)
    robust = torch.isin(labels, torch.tensor(tail, dtype=torch.long))
    groups = accuracy_by_frequency(labels, torch.ones(classes, dtype=torch.bool), robust, list(range(classes, 0, -1)))
    assert groups["tail"] == ({"clean": 1, "robust": 1} if tail else {"clean": None, "robust": None})
    assert groups["head"] == {"clean": 1, "robust": 0}
    # the same classes in another order
    shuffle = torch.randperm(classes, generator=torch.Generator().manual_seed(0))
    counts = torch.arange(classes, 0, -1)[shuffle].tolist()
    assert groups == accuracy_by_frequency(labels, torch.ones(classes, dtype=torch.bool), robust[shuffle], counts)


def test_the_summary_is_the_slow_count():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (37,), generator=generator)
    clean = torch.rand(37, generator=generator) < 0.8
    robust = clean & (torch.rand(37, generator=generator) < 0.5)
    facts = summary(labels, clean, robust, 5)
    for c, row in enumerate(facts["per_class"]):
        mine = [i for i in range(37) if labels[i] == c]
        assert row["count"] == len(mine)
        assert row["robust"] == (sum(bool(robust[i]) for i in mine) / len(mine) if mine else None)
    assert facts["clean_accuracy"] == pytest.approx(sum(clean.tolist()) / 37)
    assert facts["groups"] is None


def report(**changes):
    values = {
        "norm": "L2", "eps": 0.5, "version": "standard", "seed": 0, "after_attack": {"apgd-ce": 0.25},
        "flags": [], "settings": {}, "versions": {}, "device": "cpu", "precision": "fp32", "batch_size": 4,
        "seconds": 1.0, "attack_seconds": {"apgd-ce": 1.0},
    }  # fmt: skip
    robust = torch.tensor([True, False, False, False])
    return RobustnessReport(**values | summary(torch.tensor([0, 1, 0, 1]), robust | True, robust, 2) | changes)


def test_a_file_that_is_no_report_is_refused(tmp_path):
    path = report().save(tmp_path / "report.json")
    values = json.loads(path.read_text())
    del values["eps"]
    with pytest.raises(ValueError, match="missing \\['eps'\\]"):
        RobustnessReport.from_dict(values)
    with pytest.raises(ValueError, match="unknown \\['epsilon'\\]"):
        RobustnessReport.from_dict(values | {"eps": 0.1, "epsilon": 0.1})
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="not a robustness report"):
        RobustnessReport.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a robustness report"):
        RobustnessReport.load(path)
    with pytest.raises(FileNotFoundError):
        RobustnessReport.load(tmp_path / "absent.json")


def test_the_table_holds_settings_and_accuracies():
    table = repr(report())
    assert table.splitlines()[0] == "RobustnessReport: L2 eps 0.5, standard, 4 samples, seed 0"
    assert "after apgd-ce    25.00 %" in table
    assert "(8/255)" in repr(report(norm="Linf", eps=8 / 255))
    assert "searched in bf16, verified in fp32" in repr(report(precision="bf16"))
