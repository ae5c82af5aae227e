"""hooks/latency.py: what counts as a wait, and the table of a call."""

from __future__ import annotations

from conftest import Loaded, LoadHook, PretendCall, conversation


def rows(latency: Loaded) -> dict[str, int]:
    """The table that latency.py has logged, as {row: ms}."""
    return {line.split(" ", 1)[1].rsplit(None, 2)[0]: int(line.split()[-2].replace(",", "")) for line in latency.log}


async def test_latency_is_told_as_the_articles_table_with_median_and_worst(hook: LoadHook) -> None:
    latency = hook("latency")
    steps = ["0.1 model_asked", "0.373 model_spoke"]
    for turn, ms in enumerate((359, 389, 420, 421, 598), 1):
        steps += [f"{turn * 10} caller_spoke", f"{turn * 10 + 1} caller_paused"]
        steps += [f"{turn * 10 + 1 + ms / 1000} model_spoke"]
    await latency.tell_all(PretendCall(), *conversation(*steps))
    assert rows(latency) == {
        "Greeting (from response.create)": 273,
        **{"Turn 1": 359, "Turn 2": 389, "Turn 3": 420, "Turn 4": 421, "Turn 5": 598},
        **{"Median of the turns": 420, "Worst (Turn 5)": 598},
    }
    assert latency.log[1] == "CA1 " + "Turn 1".ljust(31) + "    359 ms"


async def test_a_greeting_is_measured_from_its_first_response_create_even_before_the_call_starts(
    hook: LoadHook,
) -> None:
    latency, call = hook("latency"), PretendCall()
    await latency.tell_all(call, *conversation("-0.4 model_asked", "0.2 model_asked", "0.5 model_spoke"))
    assert rows(latency) == {"Greeting (from response.create)": 900}


async def test_a_pause_after_which_the_caller_goes_on_talking_has_no_row(hook: LoadHook) -> None:
    latency = hook("latency")
    steps = ["1 caller_spoke", "2 caller_paused", "2.3 caller_spoke", "4 caller_paused", "4.25 model_spoke"]
    steps += ["6 caller_spoke", "7 caller_paused", "7.3 caller_spoke", "7.4 model_spoke"]  # which is no answer
    await latency.tell_all(PretendCall(), *conversation(*steps))
    assert rows(latency) == {"Turn 1": 250, "Median of the turns": 250, "Worst (Turn 1)": 250}


async def test_words_that_no_caller_waited_for_are_not_timed(hook: LoadHook) -> None:
    latency = hook("latency")
    steps = ["1 caller_spoke", "2 caller_paused", "2.3 model_spoke", "20 model_asked", "21 model_spoke"]
    await latency.tell_all(PretendCall(), *conversation(*steps))
    assert rows(latency) == {"Turn 1": 300, "Median of the turns": 300, "Worst (Turn 1)": 300}


async def test_a_turn_is_measured_to_the_models_first_sound_and_a_tool_has_its_own_row(hook: LoadHook) -> None:
    latency = hook("latency")
    tool = "tool_used name=get_weather arguments={} result=晴れ seconds=0.95"
    silent_until_used = ["1 caller_spoke", "2 caller_paused", f"3.2 {tool}", "3.2 model_asked", "3.4 model_spoke"]
    said_a_word_first = ["10 caller_spoke", "11 caller_paused", "11.3 model_spoke", f"12.5 {tool}"]
    said_a_word_first += ["12.5 model_asked", "12.8 model_spoke"]
    await latency.tell_all(PretendCall(), *conversation(*silent_until_used, *said_a_word_first))
    assert [line.split()[1:3] for line in latency.log][:4] == [
        ["Tool", "get_weather"], ["Turn", "1"], ["Turn", "2"], ["Tool", "get_weather"]
    ]  # fmt: skip
    assert rows(latency)["Turn 1"] == 1400
    assert rows(latency)["Turn 2"] == 300
    assert rows(latency)["Tool get_weather"] == 950


async def test_a_caller_who_speaks_before_the_greeting_sounds_gets_a_turn_and_no_greeting(hook: LoadHook) -> None:
    latency = hook("latency")
    steps = ["0.1 model_asked", "0.2 caller_spoke", "1 caller_paused", "1.3 model_spoke"]
    await latency.tell_all(PretendCall(), *conversation(*steps))
    assert rows(latency) == {"Turn 1": 300, "Median of the turns": 300, "Worst (Turn 1)": 300}


async def test_latency_counts_a_barge_in_as_the_beginning_of_a_turn(hook: LoadHook) -> None:
    latency = hook("latency")
    steps = ["1 caller_spoke", "2 caller_paused", "2.4 model_spoke", "3 caller_spoke"]
    steps += ["3 model_interrupted heard_ms=600 sent_ms=4000", "4 caller_paused", "4.2 model_spoke", "9 model_spoke"]
    await latency.tell_all(PretendCall(), *conversation(*steps))
    assert rows(latency) == {"Turn 1": 400, "Turn 2": 200, "Median of the turns": 300, "Worst (Turn 1)": 400}


async def test_the_latency_table_is_had_as_text_while_the_call_goes_on(hook: LoadHook) -> None:
    latency, call = hook("latency"), PretendCall()
    await latency.tell_all(call, *conversation("1 caller_spoke", "2 caller_paused", "2.4 model_spoke")[:-1])
    assert latency.log == []
    assert latency.module.table(call).splitlines()[0] == "Turn 1".ljust(19) + "    400 ms"


async def test_the_latencies_of_two_calls_are_kept_apart(hook: LoadHook) -> None:
    latency, one, other = hook("latency"), PretendCall("CA1"), PretendCall("CA2")
    steps = [(one, step) for step in conversation("1 caller_spoke", "2 caller_paused", "2.4 model_spoke")]
    steps += [(other, step) for step in conversation("1.5 caller_spoke", "2.1 caller_paused", "2.2 model_spoke")]
    for call, step in sorted(steps, key=lambda step: step[1][1]):
        latency.tell(call, step)
    await latency.finish()
    assert "CA1 " + "Turn 1".ljust(19) + "    400 ms" in latency.log
    assert "CA2 " + "Turn 1".ljust(19) + "    100 ms" in latency.log
