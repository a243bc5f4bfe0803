"""Source code that rebuilds a network without this package."""

import ast
import subprocess
import sys

import pytest
import torch

from at_extensions.models import create_model, load_model
from at_extensions.publishing import publish, standalone

NETWORKS = [
    ("small_cnn", {"in_chans": 1, "width": 5}, 8),
    ("cifar_resnet18", {"width": 4}, 32),
    ("cifar_resnet50", {"width": 4}, 32),
    ("preact_resnet18", {"width": 4, "in_chans": 1}, 32),
    ("preact_resnet18", {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}, 32),
    ("wide_resnet_10_1", {"mean": [0.4, 0.5, 0.6]}, 32),
    ("dm_wide_resnet_10_1", {}, 32),
    ("resnet10t", {"drop_rate": 0.1}, 32),
]


def sources_of(recipe):
    return standalone.sources(recipe, "Sun2023Enhance", "cifar10", "Linf", "sun2023enhance_cifar10_linf")


@pytest.mark.parametrize(("name", "options", "size"), NETWORKS)
def test_the_source_builds_the_same_network(name, options, size):
    torch.manual_seed(0)
    model = create_model(name, 10, **options).eval()
    before = torch.random.get_rng_state()
    code = sources_of(model.recipe)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "at_extensions" not in code.architecture + code.zoo_entry
    namespace = {"__name__": "architecture"}
    exec(code.architecture, namespace)
    built = namespace["build"]().eval()
    built.load_state_dict(model.state_dict())
    x = torch.rand(2, model.recipe["in_chans"], size, size)
    with torch.no_grad():
        assert torch.equal(built(x), model(x))


def test_both_modules_hold_the_same_network():
    code = sources_of(create_model("small_cnn", 10).recipe)
    kinds = (ast.ClassDef, ast.FunctionDef)
    parts = [
        {n.name: ast.dump(n) for n in ast.parse(text).body if isinstance(n, kinds)}
        for text in (code.architecture, code.zoo_entry)
    ]
    assert parts[0].items() < parts[1].items()
    assert parts[1].keys() - parts[0].keys() == {"sun2023enhance_cifar10_linf"}


def test_values_of_a_recipe_are_literals():
    recipe = create_model("small_cnn", 10).recipe
    with pytest.raises((TypeError, ValueError)):
        sources_of(recipe | {"width": '4); raise SystemExit("run") #'})


def test_a_network_that_the_source_would_not_build_is_refused(monkeypatch):
    recipe = create_model("small_cnn", 10, width=4).recipe
    monkeypatch.setattr(standalone, "_parts", lambda network, recipe: standalone._Parts(
        [], ["small_cnn.py.jinja"], ["network = SmallCNN(10, width=5)"]))  # fmt: skip
    with pytest.raises(ValueError, match="cannot be rebuilt without this package"):
        sources_of(recipe)


# a bare stand-in for the real autoattack, which robustbench imports and a bare machine lacks
STUB = "class AutoAttack: ...\nclass EvaluationState: ...\n"
WITHOUT_US = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import zoo_entry
from robustbench.utils import load_model

model = load_model("Sun2023Enhance", dataset="cifar10", threat_model="Linf")
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[1], weights_only=True)), sys.argv[2])
assert not model.training
assert not any(name.split(".")[0] == "at_extensions" for name in sys.modules)
"""


def test_robustbench_loads_it_without_us(make_trained, paper, tmp_path):
    run = make_trained(model="preact_resnet18", width=4)
    folder = publish(run, paper, "Sun2023Enhance", tmp_path / "out")
    stub = tmp_path / "stub" / "autoattack"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(STUB)
    (stub / "state.py").write_text(STUB)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "x.pt")
    paths = {"PYTHONPATH": f"{stub.parent}:{folder}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=paths)
    with torch.no_grad():
        expected = load_model(run.weights())(x)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), expected)
