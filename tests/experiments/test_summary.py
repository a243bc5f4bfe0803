"""Summaries: the numbers that count, damaged results, and the committed summaries."""

import json

import pytest

from at_extensions.experiments import Arm, Study, summarise
from at_extensions.experiments.summary import numbers

STUDY = Study(
    "A question?",
    arms={"a": Arm({"method": "pgd"}), "b": Arm({"method": "standard"})},
    pairs=[("a", "b")],
    name="mine",
)


def write(folder, arm, seed, **measured):
    row = {"study": "mine", "arm": arm, "seed": seed, "options": {}, "wall_seconds": 3.0, **measured}
    (folder / f"{arm}-seed{seed}.json").write_text(json.dumps(row))


def test_numbers_are_those_at_the_top_and_every_accuracy_inside():
    measured = {
        "robust": 0.25,
        "n": 3,
        "flag": True,
        "text": "x",
        "last": {
            "clean": {"accuracy": 0.5, "images": 10, "groups": {"head": 0.75, "tail": None}},
            "more": {"x": {"accuracy": 1}},
        },
        "report": {"eps": 0.1, "accuracy": None},
    }
    expected = {"last/clean": 0.5, "last/clean/head": 0.75, "last/more/x": 1.0, "n": 3.0, "robust": 0.25}
    assert numbers(measured) == expected
    assert list(numbers(measured)) == sorted(expected)


def test_means_and_differences_are_taken_over_the_seeds_there_are(tmp_path):
    for seed, a, b in ((0, 0.5, 0.25), (1, 0.75, 0.25)):
        write(tmp_path, "a", seed, robust=a)
        write(tmp_path, "b", seed, robust=b)
    write(tmp_path, "a", 2, robust=1.0)
    summary = summarise(STUDY, tmp_path)
    assert summary.means == {"a": {"robust": 0.75}, "b": {"robust": 0.25}}
    difference = summary.differences["a - b"]["robust"]
    assert difference.seeds == (0, 1)
    assert difference.mean == 0.375
    assert "+0.3750" in repr(summary)
    assert "seeds 0, 1, 2" in repr(summary)


def test_a_failed_cell_is_named_in_the_summary(tmp_path):
    write(tmp_path, "a", 0, robust=0.5)
    (tmp_path / "b-seed0.failed.txt").write_text("Traceback")
    summary = summarise(STUDY, tmp_path)
    assert summary.to_dict()["failed"] == ["b-seed0"]
    assert "b-seed0 failed" in repr(summary)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"arm": "a", "se', "damaged"),
        ("[1]", "not the result of a study"),
        ('{"arm": "a", "seed": 0}', "lacks"),
        ('{"arm": "b", "seed": 0, "options": {}}', "holds the result of arm 'b'"),
        ('{"arm": "a", "seed": 0, "options": {}, "study": "yours"}', "belongs to the study 'yours'"),
    ],
)
def test_a_file_that_is_no_result_of_the_study_is_named(tmp_path, text, word):
    (tmp_path / "a-seed0.json").write_text(text)
    with pytest.raises(ValueError, match=word) as error:
        summarise(STUDY, tmp_path)
    assert "a-seed0.json" in str(error.value)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result"):
        summarise(STUDY, tmp_path)
