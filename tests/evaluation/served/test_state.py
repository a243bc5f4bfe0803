"""The served ``EvaluationState``: there and back, with flags that have a mean."""

import math

import pytest
import torch

from at_extensions.evaluation.served.state import EvaluationState


def test_there_and_back(tmp_path):
    path = tmp_path / "state.json"
    state = EvaluationState({"apgd-ce", "square"}, path, seed=5)
    state.to_disk()
    fresh = EvaluationState.from_disk(path)
    assert fresh.attacks_to_run == {"apgd-ce", "square"}
    assert fresh.robust_flags is None
    assert math.isnan(fresh.clean_accuracy)
    with pytest.raises(ValueError, match="not set yet"):
        _ = fresh.robust_accuracy
    state.robust_flags = torch.tensor([True, False, True, True])
    state.clean_accuracy = 0.9
    state.add_run_attack("apgd-ce")
    fresh = EvaluationState.from_disk(str(path))
    assert fresh.run_attacks == {"apgd-ce"}
    assert fresh.robust_flags.mean().item() == fresh.robust_accuracy == 0.75
    assert (fresh.clean_accuracy, fresh.seed) == (0.9, 5)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "state.json"
    for text in ("", "[]", '{"_attacks_to_run": "{\'apgd-ce\'}", "_robust_flags": [true]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a state that at-extensions wrote"):
            EvaluationState.from_disk(path)
    with pytest.raises(FileNotFoundError):
        EvaluationState.from_disk(tmp_path / "absent.json")


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    EvaluationState({"square"}).to_disk()
    assert list(tmp_path.iterdir()) == []
