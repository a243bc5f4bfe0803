"""The leaderboard page: who is ranked where, and that it needs nothing but itself."""

import json
import logging
import re
import shutil
import subprocess

import pytest

from at_extensions.publishing import leaderboard

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def result(**changes):
    return {
        "link": "https://example.org/p", "name": "A paper", "authors": "A. Sun", "additional_data": False,
        "number_forward_passes": 1, "dataset": "cifar10", "venue": "ICML 2023", "architecture": "ResNet-18",
        "eps": "8/255", "clean_acc": "80.00", "reported": "", "autoattack_acc": "50.00",
    } | changes  # fmt: skip


@pytest.fixture
def put(tmp_path):
    """Return a function that writes a result below ``model_info``."""

    def write(model_id, threat="Linf", **changes):
        info = result(**changes)
        path = tmp_path / "model_info" / info["dataset"] / threat / f"{model_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(info))

    return write


def ids(path):
    """The models of each board, in order."""
    tables = [part.split("</table>")[0] for part in path.read_text().split("<h2>")[1:]]
    return {re.match(r"[^<]*", table)[0].strip(): re.findall(r"<code>([^<]*)</code>", table) for table in tables}


def test_boards_hold_what_can_be_compared_best_first(put, tmp_path):
    put("Low", autoattack_acc="9.50")
    put("High", autoattack_acc="60.00", unreliable=True)
    put("Exposed", autoattack_acc="70.00", external="10.00")
    put("Other_eps", eps="4/255")
    put("Hundred", dataset="cifar100")
    put("Two", threat="L2", eps="0.5")
    put("Fog", threat="corruptions", eps=None, corruptions_acc="71.00", autoattack_acc="1.00")
    put("Fog_at", threat="corruptions", eps="8/255", corruptions_acc="72.00")
    assert ids(leaderboard(tmp_path)) == {
        "CIFAR-10, L2, ε = 0.5": ["Two"],
        "CIFAR-10, Linf, ε = 4/255": ["Other_eps"],
        "CIFAR-10, Linf, ε = 8/255": ["High", "Exposed", "Low"],
        "CIFAR-10, corruptions": ["Fog_at", "Fog"],
        "CIFAR-100, Linf, ε = 8/255": ["Hundred"],
    }


def test_what_a_row_says(put, tmp_path, read):
    put(
        "High",
        clean_acc="81.5",
        autoattack_acc="60.0",
        external="58.25",
        unreliable=True,
        additional_data=True,
        venue="",
    )
    page = read(leaderboard(tmp_path, title="Ours"))
    assert "Ours" in page.text
    row = "A paper A. Sun High 81.50 60.00 58.25 ✗ no yes ResNet-18 unpublished"
    assert row in page.text
    assert ("a", "href", "https://example.org/p") in page.attributes
    assert [value for tag, key, value in page.attributes if (tag, key) == ("th", "aria-sort")].count("descending") == 1


def test_sorting_uses_numbers_not_text(put, tmp_path, read):
    put("Low", autoattack_acc="9.50")
    page = read(leaderboard(tmp_path))
    assert ("td", "data-value", "9.5") in page.attributes


def test_nothing_is_fetched_and_nothing_foreign_runs(put, tmp_path, read):
    everywhere = dict.fromkeys(("name", "authors", "venue", "architecture", "footnote"), ATTACK)
    put("X", **everywhere, link="javascript:alert(1)", external="40.00")
    put("Y", dataset="digits", link='https://example.org/"onclick="alert(1)')
    path = leaderboard(tmp_path, title=ATTACK)
    page = read(path)
    assert not page.open
    assert page.tags.count("script") == 1
    assert not set(page.tags) & {"img", "link", "iframe", "object", "base"}
    assert [key for _, key, _ in page.attributes if key.startswith("on") or key == "src"] == []
    hrefs = [value for _, key, value in page.attributes if key == "href"]
    assert hrefs == ['https://example.org/"onclick="alert(1)']
    assert page.text.count(ATTACK) >= 5
    assert not re.search(r"@import|url\(", path.read_text())


def test_what_is_no_result_is_left_out_and_said(put, tmp_path, caplog):
    put("Good")
    folder = tmp_path / "model_info" / "cifar10" / "Linf"
    broken = {"Keys": {"name": "x"}, "Number": result(clean_acc="high"), "Range": result(autoattack_acc="0.5e3"),
              "Eps": result(eps="eight"), "Null": result(clean_acc=None), "List": []}  # fmt: skip
    for name, content in broken.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "Text.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        path = leaderboard(tmp_path)
    assert ids(path)["CIFAR-10, Linf, ε = 8/255"] == ["Good"]
    left_out = path.read_text().split("<h2>Left out")[1]
    for name in (*broken, "Text"):
        assert f"model_info/cifar10/Linf/{name}.json" in left_out
    assert len(caplog.records) == 7
    assert "missing: authors, link" in left_out


def test_only_model_info_counts_where_there_is_one(put, tmp_path):
    put("Good")
    (tmp_path / "evaluation.json").write_text(json.dumps({"norm": "Linf"}))
    path = leaderboard(tmp_path)
    assert "Left out" not in path.read_text()


def test_any_folder_of_results_will_do(tmp_path):
    folder = tmp_path / "results" / "Linf"
    folder.mkdir(parents=True)
    (folder / "Plain.json").write_text(json.dumps(result(autoattack_acc="0.0")))
    path = leaderboard(tmp_path / "results", tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert ids(path) == {"CIFAR-10, Linf, ε = 8/255": ["Plain"]}


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        leaderboard(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no JSON files"):
        leaderboard(tmp_path)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"none of the 1 JSON files .* x.json: it does not hold an object"):
        leaderboard(tmp_path)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
@pytest.mark.parametrize(
    ("deeds", "shown"),
    [
        ("", ["B", "C", "A"]),
        ("head('Clean').click()", ["A", "C", "B"]),
        ("head('Clean').click(); head('Clean').click()", ["B", "C", "A"]),
        ("head('Model').click()", ["A", "B", "C"]),
        ("type('moon 2023')", ["C"]),
        ("type('nobody')", []),
    ],
)
def test_a_real_browser_sorts_and_filters(put, tmp_path, deeds, shown):
    put("A", clean_acc="90.00", autoattack_acc="40.00", name="Aa")
    put("B", clean_acc="70.00", autoattack_acc="60.00", name="Bb")
    put("C", clean_acc="80.00", autoattack_acc="50.00", name="Cc", authors="B. Moon")
    page = leaderboard(tmp_path, tmp_path / "page.html")
    script = """<script>
        const head = (text) => [...document.querySelectorAll("th button")].find((b) => b.textContent.includes(text));
        const type = (text) => {
          const field = document.getElementById("filter");
          field.value = text;
          field.dispatchEvent(new Event("input"));
        };
        %s;
        const rows = [...document.querySelectorAll("tbody tr")].filter((row) => row.checkVisibility());
        document.title = "shown " + rows.map((row) => row.querySelector("code").textContent).join(" ");
    </script>"""
    page.write_text(page.read_text() + script % deeds)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert re.search("<title>shown ?([^<]*)</title>", done.stdout)[1].split() == shown
