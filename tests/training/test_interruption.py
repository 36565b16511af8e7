import os
import signal

import pytest

from training.interruption import noted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_is_obeyed(number, capfd):
    before = {other: signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)}
    with noted() as interruption:
        assert interruption.name is None
        os.kill(os.getpid(), number)
        assert interruption.name == number.name
        assert [signal.getsignal(other) for other in before] == [signal.SIG_DFL] * 2
    assert {other: signal.getsignal(other) for other in before} == before
    assert (
        capfd.readouterr().err == f"\n{number.name}: saving as soon as this step is done; a second one quits at once\n"
    )
