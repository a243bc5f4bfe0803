"""The definition of a study: what cannot be right is refused, and the cells that it has."""

import re

import pytest
import torch

from at_extensions.experiments import Arm, Study


def two_arms(**more):
    arms = {"slow": Arm({"lr": 0.1}), "fast": Arm({"lr": 0.3})}
    return Study("Which?", **({"arms": arms, "pairs": [("fast", "slow")]} | more))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"arms": {}}, ValueError, "at least one arm"),
        ({"seeds": ()}, ValueError, "at least one seed"),
        ({"seeds": (0, 1, 0)}, ValueError, "once"),
        ({"seeds": (0.5,)}, TypeError, "whole number"),
        ({"pairs": [("fast", "slwo")]}, ValueError, "did you mean 'slow'"),
        ({"pairs": [("fast", "fast")]}, ValueError, "itself"),
        ({"arms": {"a/b": Arm({})}, "pairs": ()}, ValueError, "file name"),
        ({"arms": {"a": {"lr": 1}}, "pairs": ()}, TypeError, "must be an Arm"),
        ({"arms": {"a": Arm({"epoch": 1})}, "pairs": ()}, ValueError, "did you mean 'epochs'"),
        ({"common": {"seed": 3}}, ValueError, "Study.seeds"),
        ({"common": {"eps": 8}}, ValueError, "arm 'slow': eps"),
        ({"scales": {"cpu": {"epochs": 0}}}, ValueError, "arm 'slow': epochs"),
        ({"common": {"epochs": "many"}}, (TypeError, ValueError), "arm 'slow': epochs"),
        ({"scales": {"cpu": {"stepz": 3}}}, ValueError, "did you mean 'steps'"),
        ({"common": {"mean": torch.ones(3)}}, TypeError, "numbers, texts, lists and dicts"),
        ({"ablations": {"slow": Arm({})}}, ValueError, "both an arm and an ablation"),
        ({"measure": {"robust": 1}}, TypeError, "function"),
    ],
)
def test_a_definition_that_cannot_be_right_is_refused(change, error, words):
    with pytest.raises(error, match=re.escape(words)):
        two_arms(**change)


def test_cells_run_seed_by_seed_and_ablations_only_by_name():
    study = two_arms(seeds=(5, 6), ablations={"other": Arm({"lr": 1.0})})
    names = [cell.name for cell in study.cells()]
    assert names == ["slow-seed5", "fast-seed5", "slow-seed6", "fast-seed6"]
    assert [cell.first_seed for cell in study.cells()] == [True, True, False, False]
    assert [cell.name for cell in study.cells(arms=["other"], seeds=[6])] == ["other-seed6"]
