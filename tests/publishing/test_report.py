"""The HTML report: what it says, that it needs nothing else, and that nothing in it runs."""

import re

import pytest

from at_extensions.publishing import write_report

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def test_two_runs_are_compared(make_run, tmp_path, read):
    flags = [{"name": "square", "message": "Square finds more than the white-box attacks"}]
    weak = make_run("standard", make_run.evaluation(0.98, 0.01, flags=flags, reliable=False), make_run.examples())
    strong = make_run("pgd_at", make_run.evaluation(0.953, 0.714), make_run.examples())
    path = write_report([weak, strong], tmp_path / "out", title="Digits")
    page = read(path)
    assert path == tmp_path / "out" / "report.html"
    assert not page.open
    assert "pgd_at keeps 71.4 % and standard keeps 1.0 % of the test images right" in page.text
    assert "95.3 %" in page.text
    assert "61.4 % to 81.4 %" in page.text
    assert "Linf, ε = 8/255" in page.text
    assert "square : Square finds more than the white-box attacks" in page.text
    assert page.text.count("✗ no") == 1
    assert page.text.count("✓ yes") == 1
    settings = "--eps 8/255 --alpha 2/255 --steps 10 --epochs 3 --batch-size 8 --seed 7"
    assert f"at-extensions train pgd_at {settings}" in page.text
    assert "at-extensions evaluate pgd_at --eps 8/255" in page.text
    assert "batch_size: 8" in page.text
    assert page.tags.count("svg") == 6  # bars, attacks, classes, curves and two triples


def test_nothing_is_fetched(make_run, tmp_path, read):
    page_file = write_report([make_run("a", make_run.evaluation(), make_run.examples())], tmp_path / "r.html")
    page = read(page_file)
    assert page_file.name == "r.html"
    addresses = [value for _, key, value in page.attributes if key in ("src", "href", "xlink:href", "data", "action")]
    assert addresses
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in addresses)
    text = page_file.read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not set(page.tags) & {"script", "link", "iframe", "object", "embed", "base"}


def test_html_in_names_and_values_stays_text(make_run, tmp_path, read):
    run = make_run(
        "a&<b>--", make_run.evaluation(flags=[{"name": ATTACK, "message": ATTACK}], versions={ATTACK: ATTACK},
                                       after_attack={ATTACK: 0.5}, version=ATTACK), make_run.examples(),
        model={"name": ATTACK}, method={"name": ATTACK, ATTACK: ATTACK}, data=ATTACK, seed=ATTACK,
    )  # fmt: skip
    page = read(
        write_report([run, make_run("other")], tmp_path, title=ATTACK, command=ATTACK, class_names=[ATTACK] * 2)
    )
    assert not page.open
    assert not set(page.tags) & {"script", "img", "b"}
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert page.text.count(ATTACK) >= 9


def test_a_run_that_only_began_is_said_not_crashed_on(make_run, tmp_path, read):
    empty = make_run("empty", epochs=0)
    (empty.path / "config.yaml").unlink()
    page = read(write_report([empty], tmp_path))
    for sentence in ("No run has been evaluated yet", "not evaluated yet", "No metrics were written",
                     "None were kept", "holds no config.yaml", "No evaluation by class"):  # fmt: skip
        assert sentence in page.text


def test_one_run_of_two_evaluated(make_run, tmp_path, read):
    page = read(write_report([make_run("new"), make_run("done", make_run.evaluation())], tmp_path))
    assert "done keeps 50.0 % of the test images right" in page.text
    assert page.text.count("not evaluated yet") == 1
    assert "at-extensions evaluate new " not in page.text


def test_different_threat_models_are_not_ranked(make_run, tmp_path, read):
    runs = [make_run("a", make_run.evaluation()), make_run("b", make_run.evaluation(norm="L2", eps=0.5))]
    page = read(write_report(runs, tmp_path))
    assert "different threat models" in page.text
    assert "L2, ε = 0.5" in page.text


def test_groups_and_a_partial_suite_are_shown(make_run, tmp_path, read):
    groups = {"head": {"clean": 0.9, "robust": 0.7}, "tail": {"clean": 0.345, "robust": None}}
    page = read(
        write_report([make_run("a", make_run.evaluation(groups=groups, version="custom", precision="bf16"))], tmp_path)
    )
    assert "custom, searched in bf16, verified in fp32" in page.text
    assert "tail 34.5 % –" in page.text
    assert "not comparable with RobustBench" in page.text


def test_runs_of_the_same_name_are_told_apart(make_run, tmp_path, read):
    page = read(write_report([make_run("x/pgd"), make_run("y/pgd")], tmp_path))
    assert "x/pgd" in page.text
    assert "y/pgd" in page.text


def test_no_path_of_this_machine_is_in_the_page(make_run, tmp_path):
    path = write_report([make_run("a", make_run.evaluation(), make_run.examples())], tmp_path)
    assert str(tmp_path) not in path.read_text()


def test_bad_input(tmp_path, make_run):
    from at_extensions.runs import RunDirectory

    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path)
    with pytest.raises(FileNotFoundError, match="train first"):
        write_report([RunDirectory(tmp_path / "nowhere")], tmp_path)


def test_robust_overfitting_is_in_the_page_with_its_onset(make_run, tmp_path, read):
    values = [0.30, 0.40, 0.45, 0.40, 0.38, 0.36, 0.35]
    rows = [
        {"epoch": i, "val_robust_accuracy": v, "val_clean_accuracy": 0.6, "train_accuracy": 0.3 + 0.05 * i,
         "train_loss": 1.0}
        for i, v in enumerate(values, 1)
    ]  # fmt: skip
    overfit, short = make_run("overfit"), make_run("short")
    overfit.write_metrics(rows)
    short.write_metrics(rows[:3])
    text = read(write_report([overfit, short], tmp_path / "r.html")).text
    assert "45.0 % (epoch 3)" in text
    assert "10.0 points" in text
    assert "Robust overfitting since epoch 5" in text
    assert text.count("points") == 1


def test_catastrophic_overfitting_and_a_guards_events_are_in_the_page(make_run, tmp_path, read):
    def rows(values):
        return [
            {"epoch": i, "val_robust_accuracy": v, "val_clean_accuracy": 0.6, "train_accuracy": 0.3 + 0.05 * i,
             "train_loss": 1.0}
            for i, v in enumerate(values, 1)
        ]  # fmt: skip

    collapsed, guarded = make_run("collapsed"), make_run("guarded")
    collapsed.write_metrics(rows([0.30, 0.40, 0.41, 0.02, 0.0]))
    kept = rows([0.30, 0.40, 0.41, 0.42, 0.43])
    kept[3]["events"] = [
        {"event": "rollback", "observer": "CollapseGuard", "epoch": 4, "step": 150, "back_to_step": 50,
         "reason": "one step 90 %, PGD 1 %", "remedy": "n_fgsm"}
    ]  # fmt: skip
    guarded.write_metrics(kept)
    text = read(write_report([collapsed, guarded], tmp_path / "r.html")).text
    assert "Catastrophic overfitting in epoch 4: use weights of before" in text
    assert text.count("Catastrophic overfitting in epoch") == 1
    assert "Robust overfitting since" not in text  # a collapse is none
    assert "rollback to step 50" in text
    assert "one step 90 %, PGD 1 %" in text
