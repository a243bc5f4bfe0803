"""Measurements that lie in a run directory are shown in its report."""

import json

import pytest

from at_extensions.publishing import write_report

CURVE = {"change": [0.2, 0.5], "cosine": [0.9, 0.7], "loss": [2.0, 1.9]}
INSTABILITY = {"steps": [0.5, 1.0], "lr": 0.1, "direction": "update", "gradient_norm": 1.0, "recomputed": CURVE,
               "frozen": CURVE, "n_images": 8}  # fmt: skip


def induced():
    nets = {name: {"error": e, "interval": [e - 0.02, e + 0.03]} for name, e in (("a", 0.4), ("b", 0.2))}
    spread = {name: {"mean": 0.1, "stderr": 0.05} for name in ("a", "b", "test")}
    return {"rows": [{"epoch": 2, "seed": 0, "nets": nets, "dispersion": spread, "gap": None}]}


def put(run, name, found):
    folder = run.path / name
    folder.mkdir()
    (folder / f"{name}.json").write_text(json.dumps(found))


def test_a_report_shows_what_was_measured_of_its_run(make_run, tmp_path, read):
    plain, measured = make_run("plain"), make_run("measured")
    before = read(write_report([plain, measured], tmp_path / "before.html"))
    put(measured, "induced_distribution", induced())
    put(measured, "instability", {"models": {"measured": INSTABILITY}})
    after = read(write_report([plain, measured], tmp_path / "after.html"))
    assert after.tags.count("svg") == before.tags.count("svg") + 2
    assert "measured: test error of networks" in after.text
    assert "measured: change of the training gradient" in after.text
    assert "plain: test error" not in after.text


@pytest.mark.parametrize("found", [{"rows": [{"epoch": 1}]}, [], {"models": {}}])
def test_a_damaged_measurement_is_named(make_run, tmp_path, found):
    run = make_run("a")
    put(run, "induced_distribution", found)
    with pytest.raises(ValueError, match=r"induced_distribution\.json cannot be shown"):
        write_report([run], tmp_path / "r.html")
