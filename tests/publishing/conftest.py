"""Runs to publish: small run directories, written without training."""

import pytest
import torch

from at_extensions.runs import RunDirectory


def evaluation(clean=0.9, robust=0.5, *, norm="Linf", eps=8 / 255, n=10, **changes):
    """What a ``RobustnessReport.to_dict()`` holds."""
    after = {"apgd-ce": (clean + robust) / 2, "apgd-t": robust}
    return {
        "norm": norm, "eps": eps, "version": "standard", "seed": 3, "n_examples": n,
        "clean_accuracy": clean, "robust_accuracy": robust, "interval": [robust - 0.1, robust + 0.1],
        "clean": [i < clean * n for i in range(n)], "robust": [i < robust * n for i in range(n)],
        "after_attack": after, "groups": None, "flags": [], "reliable": True,
        "per_class": [{"class": i, "count": n // 2, "clean": clean, "robust": robust} for i in range(2)],
        "versions": {"torch": str(torch.__version__)}, "seconds": 12.0,
    } | changes  # fmt: skip


def make_examples(n=4, channels=1, size=8, eps=0.2):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, channels, size, size, generator=generator)
    signs = torch.randn(images.shape, generator=generator).sign()
    labels = torch.arange(n) % 2
    return {"images": images, "adversarial": (images + eps * signs).clamp(0, 1), "labels": labels,
            "clean_predictions": labels, "adversarial_predictions": 1 - labels}  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run directory: ``make_run(name, evaluation=None, examples=None, **config)``."""

    def make(name="run", report=None, examples=None, epochs=3, **config):
        run = RunDirectory(tmp_path / name)
        base = {
            "model": {"name": "small_cnn", "num_classes": 2, "in_chans": 1},
            "method": {"name": "pgd", "eps": 8 / 255, "alpha": 2 / 255, "steps": 10},
            "data": {"name": "digits"},
            "training": {"epochs": epochs, "batch_size": 8, "optimizer": "sgd", "lr": 0.1},
            "seed": 7,
            "versions": {"torch": str(torch.__version__)},
        }
        run.path.mkdir(parents=True)
        run.write_config(base | config)
        rows = [
            {"epoch": e, "lr": 0.1, "seconds": 2.0, "train_loss": 2 / e, "train_accuracy": 0.1 * e}
            | {"val_clean_accuracy": 0.2 * e, "val_robust_accuracy": 0.15 * e}
            for e in range(1, epochs + 1)
        ]
        if rows:
            run.write_metrics(rows)
        if report is not None:
            run.write_evaluation(report, examples)
        return run

    make.evaluation, make.examples = evaluation, make_examples
    return make
