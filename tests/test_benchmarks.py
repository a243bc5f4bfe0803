"""The benchmark programs: that each loads, and that the studies ask for what exists."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from at_extensions.experiments import PairedDifference, summarise
from at_extensions.experiments.summary import read_results

FOLDER = Path(__file__).parent.parent / "benchmarks"
RESULTS = FOLDER / "results"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in PROGRAMS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_loads_and_says_what_it_does(name):
    module = importlib.import_module(name)
    assert len(module.__doc__) > 40
    assert name in ("measuring", "step_cost") or callable(module.main)


def test_a_program_hides_no_installed_module():
    import at_extensions  # noqa: F401  # serves autoattack

    sys.path.remove(str(FOLDER))
    assert [name for name in PROGRAMS if importlib.util.find_spec(name) is not None] == []


def test_every_study_has_cells_at_both_scales():
    reproduce = importlib.import_module("reproduce")
    for name, study in reproduce.STUDIES.items():
        assert study.name == name
        for scale in ("cpu", "gpu"):
            cells = study.cells(scale, arms=list(study.every_arm))
            assert len(cells) == len(study.every_arm) * len(study.seeds)
            assert all("eps" in cell.options for cell in cells)


@pytest.mark.parametrize("name", ["baseline", "reat", "deat", "random_labels", "induced_distribution"])
def test_committed_results_were_measured_with_the_options_of_their_study(name):
    study, folder = importlib.import_module("reproduce").STUDIES[name], RESULTS / f"{name}-cpu"
    rows = read_results(study, folder)
    assert len(rows) == len(list(folder.glob("*-seed*.json"))) > 0
    for row in rows:
        (cell,) = study.cells("cpu", arms=[row["arm"]], seeds=[row["seed"]])
        assert json.loads(json.dumps(cell.options)) == row["options"]
        if name in ("baseline", "reat", "deat"):
            assert ("autoattack" in row) == (row["seed"] == study.seeds[0])
        assert "/" not in row["command"].partition("--data")[2].split()[0]


@pytest.mark.parametrize("name", ["reat", "deat", "random_labels", "induced_distribution"])
def test_committed_summaries_follow_from_their_results(name):
    study, folder = importlib.import_module("reproduce").STUDIES[name], RESULTS / f"{name}-cpu"
    text = (folder / "summary.json").read_text()
    assert json.dumps(summarise(study, folder).to_dict(), indent=2) + "\n" == text


def test_the_results_page_is_what_the_results_give(monkeypatch, tmp_path):
    results = importlib.import_module("results")
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    assert results.main() == 0, "benchmarks/RESULTS.md is out of date: make results"
    changed = tmp_path / "RESULTS.md"
    changed.write_text((FOLDER / "RESULTS.md").read_text().replace("holds", "may hold", 1))
    monkeypatch.setattr(sys, "argv", ["results.py", "--check", "--out", str(changed)])
    assert results.main() == 1


def test_a_figure_of_the_results_page_follows_its_file(tmp_path):
    results = importlib.import_module("results")
    shutil.copytree(RESULTS / "baseline-cpu", tmp_path / "baseline-cpu")
    path = tmp_path / "baseline-cpu" / "n_fgsm-seed0.json"
    row = json.loads(path.read_text())
    assert "70.3 %" in results.page(tmp_path)
    row["best"]["clean"]["accuracy"] = 0.1234
    path.write_text(json.dumps(row))
    page = results.page(tmp_path)
    assert "12.3 %" in page
    assert "70.3 %" not in page
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## Accuracy of the baseline"]


def test_the_results_page_names_a_file_that_lacks_its_figures(tmp_path):
    results = importlib.import_module("results")
    (tmp_path / "criticality.json").write_text('{"machine": {}}')
    with pytest.raises(ValueError, match=r"criticality.json lacks .*'Speed of layer criticality'"):
        results.page(tmp_path)
    (tmp_path / "criticality.json").write_text('{"cas')
    with pytest.raises(ValueError, match=r"criticality.json cannot be read"):
        results.page(tmp_path)


def random_labels_result(arm, seed, options, robust, share):
    """A result of the study of random labels, as its measurement writes it."""
    accuracies = {name: {"accuracy": value, "images": 1000} for name, value in (("clean", 0.9), ("pgd10", robust))}
    noisy = {"flipped": accuracies, "corrected": accuracies} if arm.endswith("r1") else {}
    return {
        "study": "random_labels", "question": "Which?", "arm": arm, "seed": seed, "scale": "cpu", "options": options,
        "command": f"python benchmarks/reproduce.py random_labels --arms {arm} --seeds {seed}",
        "machine": {"device": "a CPU", "cores": 2, "threads": 1, "versions": {"torch": "2.14.1"}},
        "flipped_share": 0.9 if noisy else 0.0, "instability_recomputed": 1.0, "instability_frozen": 1.0 - share,
        "instability_attack": share, "last": {"train": accuracies, "test": accuracies} | noisy,
    }  # fmt: skip


def test_the_claims_on_random_labels_follow_their_files(tmp_path):
    results = importlib.import_module("results")
    study, folder = importlib.import_module("reproduce").STUDIES["random_labels"], tmp_path / "random_labels-cpu"
    folder.mkdir()
    robust, share = {"pgd": 0.1, "trades": 0.4, "standard": 0.0}, {"pgd": 0.5, "trades": 0.2, "standard": 0.0}

    def page():
        for cell in study.cells("cpu"):
            method, jitter = cell.arm.partition("-")[0], 0.01 * cell.seed if cell.arm.startswith("pgd") else 0
            row = random_labels_result(
                cell.arm, cell.seed, cell.options, robust[method] + jitter, share[method] + jitter
            )
            (folder / f"{cell.name}.json").write_text(json.dumps(row))
        return results.page(tmp_path)

    claims = [line for line in page().splitlines() if "PGD-AT memorises" in line or "The attack makes" in line]
    assert claims[0].endswith("| +29.0 (+26.5 to +31.5) | holds |")
    assert claims[1].endswith("| +0.310 (+0.285 to +0.335) | holds |")
    assert "PGD-3 in training" in page()
    assert "| TRADES | 100 % | 1.000 | 0.800 | 0.200 |" in page()
    robust["pgd"], share["pgd"] = 0.39, 0.1
    claims = [line for line in page().splitlines() if "PGD-AT memorises" in line or "The attack makes" in line]
    assert claims[0].endswith("| not decided at this scale |")
    assert claims[1].endswith("| does not hold |")
    for path in folder.glob("trades-*"):
        path.unlink()
    assert "PGD-AT memorises" not in results.page(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.1, 0.2, "holds"), (-0.2, -0.1, "does not hold"), (-0.1, 0.2, "not decided at this scale")],
)
def test_a_verdict_follows_from_the_interval(low, high, words):
    importlib.import_module("results")
    difference = PairedDifference((0, 1), (low, high), (low + high) / 2, (low, high))
    assert sys.modules["results_page.words"].verdict(difference.differs, difference.mean) == words


def test_deat_is_compared_at_equal_nominal_and_at_equal_effective_rates():

    from at_extensions.analysis.diffusion import effective_lr
    from at_extensions.training import create_optimizer

    reproduce = importlib.import_module("reproduce")
    study = reproduce.STUDIES["deat"]
    weights = torch.nn.Linear(1, 1)

    def rates(arm):
        options = (study.arms | study.ablations)[arm].options
        return options["lr"], effective_lr(create_optimizer(weights, options["optimizer"], lr=options["lr"],
                                                            momentum=options.get("momentum", 0.9)))  # fmt: skip

    equal = {"nominal": 0, "effective": 0}
    for arm, reference in study.pairs:
        (lr, effective), (other_lr, other_effective) = rates(arm), rates(reference)
        same = {"nominal": lr == pytest.approx(other_lr), "effective": effective == pytest.approx(other_effective)}
        assert sum(same.values()) == 1
        equal = {name: equal[name] + same[name] for name in equal}
    assert equal == {"nominal": 4, "effective": 4}


def test_convolutions_are_compared_with_their_errors(monkeypatch, tmp_path):
    convolutions = importlib.import_module("convolutions")
    monkeypatch.setattr(convolutions, "keep_freed_memory", lambda: None)
    out = tmp_path / "convolutions.json"
    options = ["--shapes", "160x192x8", "--batch-size", "8", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["convolutions.py", *options])
    convolutions.main()
    found = json.loads(out.read_text())["shapes"]["160x192x8"]["fp32"]
    assert [len(seconds) for seconds in found["seconds"].values()] == [2, 2]
    assert max(found["errors"]["torch"]) < min(found["errors"]["twin"])  # two ways indeed
    assert max(found["errors"]["twin"]) < 1e-5


def test_kernels_are_switched_one_by_one_and_the_environment_stays(monkeypatch):
    kernels = importlib.import_module("kernels")
    from at_extensions.folding.cpu.convolution import WinogradConv2d
    from at_extensions.models import create_model

    model = create_model("cifar_resnet18", 10, width=20)  # 160 channels in the last stage
    monkeypatch.setenv("AT_EXTENSIONS_KERNELS", "1")
    found = {way: kernels.twin_with(on, model) for way, on in kernels.KERNELS.items()}
    counts = {way: sum(type(m) is WinogradConv2d for m in twin.modules()) for way, twin in found.items()}
    assert counts == {"folding": 0, "folding_again": 0, "winograd": 3}
    assert os.environ["AT_EXTENSIONS_KERNELS"] == "1"


def test_search_precision_tells_winograds_way_from_the_direct_one(monkeypatch, tmp_path):
    import numpy as np

    from at_extensions.models import create_model
    from at_extensions.runs import save_weights

    precision = importlib.import_module("search_precision")
    monkeypatch.setattr(precision, "keep_freed_memory", lambda: None)
    torch.manual_seed(0)
    model = create_model("cifar_resnet18", 10, width=8)
    path, out = tmp_path / "model.safetensors", tmp_path / "out.json"
    save_weights(model, path)
    least = precision.convolution._CHANNELS
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), np.arange(200) % 10
    data = {f"{part}_{what}": v for part in ("train", "test") for what, v in (("images", images), ("labels", labels))}
    np.savez(tmp_path / "data.npz", **data)
    options = [
        "--data",
        f"npz:{tmp_path / 'data.npz'}",
        "--n-examples",
        "32",
        "--batch-size",
        "16",
        "--channels",
        "16",
        "--steps",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["search_precision.py", str(path), *options, "--out", str(out)])
    precision.main()
    assert least == precision.convolution._CHANNELS
    found = json.loads(out.read_text())["models"][str(path)]
    ways = found["ways"]
    errors = {way: numbers["relative_error"] for way, numbers in ways.items()}
    assert errors["fp32"] < errors["fp32, Winograd"] < 1e-4 < errors["bf16"]
    assert ways["fp32"]["equal_signs"] > ways["bf16"]["equal_signs"] > 0.8
    assert all(0 <= numbers["withstand"] <= 32 for numbers in ways.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_ntk_is_compared_with_peers_whose_parts_add_up(monkeypatch, tmp_path):
    ntk = importlib.import_module("ntk")
    out, ran = tmp_path / "ntk.json", []

    def in_process(work, outputs, threads, argv):
        ran.append((work, outputs, threads))
        return ntk.WORK[work](ntk.parse(argv), outputs)

    monkeypatch.setattr(ntk, "in_process", in_process)
    options = ["--network", "cifar_resnet18:4", "--n-images", "6", "--peer-images", "3", "--threads", "1"]
    argv = ["ntk.py", *options, "--device", "cpu", "--memory-limit", str(8 * 2**20), "--output", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    ntk.main()
    assert ran == [(work, outputs, 1) for outputs in ("one", "class") for work in ("ours", "peers")]
    found = json.loads(out.read_text())
    for run in found["runs"]:
        assert run["largest_relative_difference"] < 1e-2  # a ReLU may open in one batch size alone
        parts, loop = run["measured_parts"], run["peers"]["loop"]
        expected = 6 * parts["seconds_per_image"]["loop"]["cpu"] + parts["gram_seconds"]["cpu"]
        assert loop["seconds"]["cpu"] == pytest.approx(expected)
        assert loop["bytes"] == 4 * 6 * parts["parameters"]
        assert run["peers"]["func_limited"]["image_gradients"] >= run["peers"]["func"]["image_gradients"]
    results = importlib.import_module("results")
    page = results.page(tmp_path)
    assert "## Speed of the empirical NTK" in page
    assert f"| {found['runs'][0]['times_as_fast']['loop']['cpu']:.1f} |" in page


def test_parameters_are_grouped_within_the_limit():
    ntk = importlib.import_module("ntk")
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 5))
    assert ntk.parameter_groups(model, 3, 10**6) == [["0.weight", "0.bias", "1.weight", "1.bias"]]
    assert ntk.parameter_groups(model, 3, 4 * 3 * 110) == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]


def test_the_verdicts_on_induced_distributions_follow_from_paired_seeds(tmp_path):
    results, reproduce = importlib.import_module("results"), importlib.import_module("reproduce")
    study, folder = reproduce.STUDIES["induced_distribution"], tmp_path / "induced_distribution-cpu"
    folder.mkdir()
    used = {"steps": 10, "net_epochs": 15, "a_images": 2000, "test_images": 2000}
    machine = {"device": "a CPU", "cores": 2, "threads": 1, "versions": {"torch": "2"}}
    for cell in study.cells("cpu", arms=["piecewise"]):
        rows = []
        for epoch, a in ((6, 0.3), (24, 0.6)):
            errors = {
                "a": a + 0.01 * cell.seed,
                "b": 0.3 + 0.02 * cell.seed,
                "clean": 0.5 + 0.03 * (cell.seed - 1) ** 2,
            }
            rows.append({"epoch": epoch, "seed": cell.seed, "nets": {n: {"error": e} for n, e in errors.items()},
                         "dispersion": {n: {"mean": 0.1} for n in ("a", "b", "test")}, "gap": 0.25})  # fmt: skip
        row = {"study": study.name, "question": study.question, "arm": cell.arm, "seed": cell.seed, "scale": "cpu",
               "command": "python x", "options": cell.options, "epochs": [], "training_seconds": 1.0,
               "induced": {"options": used, "rows": rows}, "machine": machine, "wall_seconds": 1.0}  # fmt: skip
        (folder / f"{cell.name}.json").write_text(json.dumps(row))
    page = results.page(tmp_path)
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| piecewise")]
    assert lines[1][:6] == ["piecewise", "24", "61.0 %", "32.0 %", "52.0 %", "25.0 %"]
    claims = {line[1]: (line[2].split(" ")[0], line[3]) for line in lines if len(line) == 5}
    assert claims == {
        "IDE on A - clean": ("+9.0", "holds"),
        "IDE on A - IDE on B": ("+29.0", "holds"),
        "IDE on B - clean": ("-20.0", "does not hold"),
        "IDE on A, epoch 24 - 6": ("+30.0", "holds"),
        "IDE on B, epoch 24 - 6": ("+0.0", "not decided at this scale"),
    }


def test_the_induced_study_measures_every_kept_epoch_with_the_seed_of_its_cell(monkeypatch, tmp_path):
    reproduce = importlib.import_module("reproduce")
    from at_extensions.runs import RunDirectory

    calls = []

    class Found:
        def to_dict(self):
            nets = {name: {"error": e} for name, e in (("a", 0.3), ("b", 0.2), ("clean", 0.1))}
            return {"rows": [{}, {"nets": nets}]}

    monkeypatch.setattr(reproduce, "induced_distribution", lambda run, out, **o: (calls.append((out, o)), Found())[1])
    for scale in ("cpu", "gpu"):
        cell = reproduce.STUDIES["induced_distribution"].cells(scale, seeds=[2])[0]
        measured = reproduce.induced(RunDirectory(tmp_path), cell)
        assert {k: v for k, v in measured.items() if k != "induced"} == {"ide_a": 0.3, "ide_b": 0.2, "clean": 0.1}
        out, options = calls[-1]
        assert options["seeds"] == [2]
        from at_extensions.settings import InducedDistributionSettings

        InducedDistributionSettings(out=str(out), **options)  # every option exists
        trained = cell.options
        assert trained["epochs"] % trained["keep_every"] == 0
        assert trained["train_size"] <= 0.5 * (50_000 - 10 * round(5000 * trained["val_fraction"]))
