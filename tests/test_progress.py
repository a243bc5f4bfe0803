"""Progress: lines with the time left off a terminal, a bar on one, nothing where nothing is asked for."""

import io
import sys

import pytest

from at_extensions.progress import bar


def lines(capsys):
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()


def interrupt(_):
    raise KeyboardInterrupt


def test_a_line_an_item_off_a_terminal(capsys):
    epochs = bar(range(2, 5), "epoch", initial=2, total=5)
    for epoch in epochs:
        epochs.set_postfix({"loss": f"{epoch / 2:.3g}"})
    first, second, last = lines(capsys)
    assert first.startswith("epoch 3/5  loss 1  ")
    assert first.endswith("left")
    assert second.startswith("epoch 4/5  loss 1.5  ")
    assert last.startswith("epoch 5/5  loss 2  ")
    assert last.endswith("in all")


def test_few_lines_where_items_are_short(capsys):
    assert list(bar(range(100), "step", every=60)) == list(range(100))
    assert [line.split("  ")[0] for line in lines(capsys)] == ["step 100/100"]
    assert list(bar(range(100), "step", every=60, leave=False)) == list(range(100))
    assert lines(capsys) == []


def test_a_bar_advanced_by_hand_whose_total_grows(capsys):
    with bar(text="resets", total=0, unit="reset", every=60) as resets:
        for _ in range(2):
            resets.total += 3
            resets.update(2)
            resets.update()
    assert [line.split("  ")[0] for line in lines(capsys)] == ["resets 6/6 reset"]


def test_a_total_that_is_unknown_has_no_time_left(capsys):
    assert list(bar(iter("ab"), "item")) == ["a", "b"]
    assert lines(capsys) == ["item 1", "item 2"]


def test_an_interrupted_loop_prints_no_last_line(capsys):
    loop = bar(range(3), "epoch")
    for epoch in loop:
        if epoch == 1:
            break
    with pytest.raises(KeyboardInterrupt), bar(text="attack", total=1, every=60) as attack:
        interrupt(attack.update())
    assert [line.split("  ")[0] for line in lines(capsys)] == ["epoch 1/3"]


def test_nothing_where_nothing_is_asked_for_or_another_process_speaks(capsys, monkeypatch):
    assert list(bar(range(3), "epoch", show=False)) == [0, 1, 2]
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert list(bar(range(3), "epoch")) == [0, 1, 2]
    assert lines(capsys) == []


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    loop = bar(range(3), "epoch", unit="epoch")
    for _ in loop:
        loop.set_postfix({"loss": "1.5"})
    assert "\r" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "loss=1.5" in terminal.getvalue()
