"""Runs to publish, written without training, and a reader of the pages that come of them."""

import os
from html.parser import HTMLParser

import pytest
import torch

from at_extensions.models import create_model
from at_extensions.publishing import Paper
from at_extensions.runs import RunDirectory, save_weights


def evaluation(clean=0.9, robust=0.5, *, norm="Linf", eps=8 / 255, n=10, **changes):
    """What a ``RobustnessReport.to_dict()`` holds."""
    after = {"apgd-ce": (clean + robust) / 2, "apgd-t": robust}
    return {
        "norm": norm, "eps": eps, "version": "standard", "seed": 3, "n_examples": n, "num_classes": 10,
        "clean_accuracy": clean, "robust_accuracy": robust, "interval": [robust - 0.1, robust + 0.1],
        "clean": [i < round(clean * n) for i in range(n)], "robust": [i < round(robust * n) for i in range(n)],
        "after_attack": after, "groups": None, "flags": [], "reliable": True, "settings": {}, "device": "cpu",
        "precision": "fp32", "batch_size": 250, "indices": None, "attack_seconds": dict.fromkeys(after, 6.0),
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
    """Return a function that writes a run directory: ``make_run(name, report=None, examples=None, **config)``."""

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


@pytest.fixture
def make_trained(make_run):
    """Return a function that writes a run with weights, as one on CIFAR-10 with all its test images evaluated."""

    def make(name="run", report=None, model="small_cnn", data="cifar10", classes=10, **options):
        report = evaluation(n=10_000) if report is None else report
        run = make_run(name, data={"name": data, "root": "/somebody/home", "class_counts": [5000] * classes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            options = {"width": 4} | options if model == "small_cnn" else options
            options = {"mean": [0.5] * 3, "std": [0.25] * 3} | options
            save_weights(create_model(model, classes, **options), run.weights())
        run.write_evaluation(report)
        old = run.weights().stat()
        os.utime(run.weights(), ns=(old.st_atime_ns, old.st_mtime_ns - 10**9))
        return run

    make.evaluation = evaluation
    return make


@pytest.fixture
def paper():
    return Paper("Enhanced training", "A. Sun, B. Moon", "https://example.org/sun", "ICML 2023", reported=0.51)


class Page(HTMLParser):
    """Tags and attributes of a page, its text, and whether every tag that was opened is closed."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture
def read():
    """Return a function that parses an HTML file."""
    return lambda path: Page(path.read_text(encoding="utf-8"))
