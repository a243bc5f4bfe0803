"""Everything works without the kernels: in a package from which their folder was deleted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import at_extensions

MEANING = """
import copy
import torch
from torch import nn
from torch.nn import functional as F
import at_extensions
from at_extensions import create_model, evaluate
from at_extensions.folding import backends, fold_batchnorm
from at_extensions.methods import PGDAT

assert at_extensions.__file__.startswith(FOLDER), at_extensions.__file__
assert backends.convolution_types() == (nn.Conv2d,)
torch.manual_seed(0)
model = create_model("cifar_resnet18", 4, width=20)  # 160 channels in the last stage
for m in model.modules():
    if isinstance(m, nn.BatchNorm2d):
        m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
model.eval()
x, y = torch.rand(12, 3, 32, 32), torch.arange(12) % 4
with torch.no_grad():
    model.get_classifier().bias -= model(x).mean(0)  # so that every class is predicted somewhere
twin = fold_batchnorm(model)
assert twin.folded == 20

def gradient(network):
    a = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(network(a), y), a)[0]

assert (gradient(twin) - gradient(model)).norm() <= 1e-4 * gradient(model).norm()
adversarial = [PGDAT(model, eps=0.1, alpha=0.03, steps=3, twin=t).perturb(x, y) for t in (True, False)]
assert ((adversarial[0] - adversarial[1]).abs() < 1e-6).double().mean() > 0.99
labels = model(x).argmax(1)
report = evaluate(model, x, labels, eps=0.002, version="custom", attacks=["apgd-ce"], progress=False)
at_extensions.evaluation.searching.fold_batchnorm = lambda *_, **__: None
plain = evaluate(model, x, labels, eps=0.002, version="custom", attacks=["apgd-ce"], progress=False)
assert torch.equal(report.robust, plain.robust) and 0 < plain.robust_accuracy < 1, plain.robust_accuracy
print("the same")
"""


def test_a_twin_an_attack_and_an_evaluation_agree_with_the_model_without_the_kernels(tmp_path):
    source = Path(at_extensions.__file__).parent
    package = shutil.copytree(source, tmp_path / "at_extensions", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(package / "folding" / "cpu")
    code = f"FOLDER = {str(tmp_path)!r}\n{MEANING}"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (result.returncode, result.stdout.strip()) == (0, "the same"), result.stderr
