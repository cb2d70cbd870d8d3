import io

import pytest
from rich.console import Console

from train.progress import Display, counted, duration, summary

VALUES = {"loss": 1.2345, "bits_per_byte": 1.781, "tokens_per_second": 12345.6, "mfu": 0.4321}


def test_summary_shows_a_dash_for_what_is_unknown():
    assert summary(VALUES) == "loss 1.234 bits/byte 1.781 tokens/s 12,346 MFU 43.2%"
    assert summary({"loss": float("nan")}) == "loss nan bits/byte - tokens/s - MFU -"


def test_a_terminal_gets_a_bar():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with Display(20, console=console) as display:
        display.start(5)
        display.record(10, VALUES, seconds_left=65.0)
        display.step(12)
        display.note("step 12: [saved]")
    text = stream.getvalue()
    assert "12/20" in text and summary(VALUES) + " left 1:05" in text
    assert "step 12: [saved]" in text


def test_elsewhere_it_prints_lines(capsys):
    with Display(20) as display:
        display.start(5)
        display.step(9)
        display.record(10, VALUES, seconds_left=65.0)
        display.record(11, {"loss": 1.0}, seconds_left=None)
        display.note("a line that is not wrapped however long it is: " + "x" * 200)
    assert capsys.readouterr().out.splitlines() == [
        f"step 10/20 {summary(VALUES)} left 1:05",
        "step 11/20 loss 1.000 bits/byte - tokens/s - MFU - left -",
        "a line that is not wrapped however long it is: " + "x" * 200,
    ]


def test_items_are_counted_on_a_terminal_and_in_silence_elsewhere():
    for is_terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=is_terminal, width=80)
        items = counted(iter("abc"), 3, "evaluating", console=console)
        assert "".join(items) == "abc"
        assert ("evaluating" in stream.getvalue() and "3/3" in stream.getvalue()) == is_terminal
    assert stream.getvalue() == ""


def test_evaluation_stands_on_the_bar_and_then_what_was_there():
    stream = io.StringIO()
    with Display(20, console=Console(file=stream, force_terminal=True, width=80)) as display:
        assert list(display.counted(iter("ab"), 2, "evaluating")) == ["a", "b"]  # before the first step
        display.start(0)
        display.record(5, VALUES, seconds_left=None)
        assert list(display.counted(iter("abc"), 3, "evaluating")) == ["a", "b", "c"]
        assert display._bar.tasks[0].fields["values"].startswith("loss 1.234")
    assert "evaluating" in stream.getvalue() and "2/2" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text
