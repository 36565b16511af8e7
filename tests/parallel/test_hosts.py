"""Processes that meet, agree and part, as real ones; nothing is trained here."""

import contextlib
import re
import signal
import socket

import pytest

from parallel import hosts
from parallel.config import HostsConfig
from tests.processes import free_port, running

PROGRAM = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from parallel import hosts
from parallel.config import HostsConfig

address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append("SIGTERM"))
with hosts.joined(HostsConfig(coordinator=address, count=count, index=index, devices=1, timeout=4)):
    assert (hosts.index(), hosts.count(), hosts.is_first()) == (index, count, index == 0)
    for turn in range(2):
        assert hosts.agreed("word", f"word {index} {turn}") == f"word 0 {turn}"
        assert hosts.combined("sum", index + turn, sum) == sum(range(count)) + turn * count
        assert hosts.first_problem("none", None) is None
        assert hosts.first_problem("some", f"bad {index}" if index else None) == "bad 1"
    split = NamedSharding(Mesh(np.array(jax.devices()), "x"), P("x"))
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(split.mesh, P()))
    ones = jax.make_array_from_callback((count,), split, lambda at: np.ones(1, np.float32))
    step, reason = 0, None
    while step < 100_000 and not reason:
        reason = hosts.stop_reason(step, lambda: asked[0] if asked else None)
        if reason:
            break
        assert jax.device_get(total(ones)) == count
        step += 1
        if step == 3:
            print("running", flush=True)
        if step == 20 and index == count - 1 and "raise" in sys.argv:
            raise ValueError("this text is\\nno text")
        time.sleep(0.02)
    print("stopped by", reason, "at", step, flush=True)
"""


@contextlib.contextmanager
def together(count, folder, *words):
    address = f"localhost:{free_port()}"
    commands = [("-c", PROGRAM, address, str(count), str(index), *words) for index in range(count)]
    with running(commands, folder) as processes:
        yield processes


def last_line(process):
    return process.errors.splitlines()[-1]


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path):
    with together(3, tmp_path) as processes:
        processes[0].says("running")
        processes[2].handle.send_signal(signal.SIGTERM)
        assert [process.ends() for process in processes] == [0, 0, 0], [process.errors for process in processes]
        ends = {re.search(r"stopped by SIGTERM at \d+", process.said)[0] for process in processes}
        assert len(ends) == 1, ends


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_one_is_named_by_the_others_which_end(victim, tmp_path):
    with together(2, tmp_path) as processes:
        processes[0].says("running")
        processes[1].says("running")
        processes[victim].handle.kill()
        survivor = processes[1 - victim]
        assert survivor.ends() == 1
        reason = "it no longer answers" if victim == 0 else "no sign of life for 4 seconds"
        assert last_line(survivor) == (
            f"error: process {victim} ({socket.gethostname()}) is gone: {reason}; "
            "what is saved is whole: start all processes again and they go on from there"
        )


def test_what_one_could_not_do_is_said_by_all(tmp_path):
    with together(2, tmp_path, "raise") as processes:
        assert [process.ends() for process in processes] == [1, 2]
        assert last_line(processes[1]) == "error: this text is no text"
        assert last_line(processes[0]).startswith(
            f"error: process 1 ({socket.gethostname()}) stopped: this text is no text; what is saved is whole"
        )


def meet(settings):
    """A process that only meets the others."""
    return (
        "-c",
        f"""
from parallel import hosts
from parallel.config import HostsConfig
with hosts.joined(HostsConfig(wait=3, {settings})):
    print("met")
""",
    )


def test_those_that_wait_in_vain_say_so(tmp_path):
    """Nobody else comes; nobody listens."""
    first, second = (f"coordinator='localhost:{free_port()}', count=2" for _ in range(2))
    with running([meet(f"{first}, index=0"), meet(f"{second}, index=1")], tmp_path) as processes:
        for index, process in enumerate(processes):
            assert process.ends() == 2, process.errors
            assert last_line(process).startswith(f"error: process {index} of 2 at hosts.coordinator=localhost:")
            assert "did not meet the others within hosts.wait=3 seconds" in last_line(process)


def test_a_port_of_somebody_else_is_refused():
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        ours = hosts.joined(HostsConfig(coordinator=address, count=2, index=0))
        with pytest.raises(OSError, match=f"cannot listen at the port of hosts.coordinator={address}: Address"), ours:
            pass


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"coordinator": "here"}, {}, "hosts.coordinator=here must be HOST:PORT"),
        ({"coordinator": "here:99999"}, {}, "hosts.coordinator=here:99999 must be HOST:PORT"),
        ({"count": -1}, {}, "hosts.count=-1 must be at least 0"),
        ({"count": 2, "index": 2}, {}, "hosts.index=2 must be below hosts.count=2"),
        ({"count": 2, "index": 0}, {}, "hosts.coordinator is missing"),
        ({"coordinator": "a:1", "index": 0}, {}, "hosts.count is missing"),
        ({"coordinator": "a:1", "count": 2}, {}, r"hosts.index is missing: .* JAX_PROCESS_ID\); hosts.count=1 runs"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two must be a whole number"),
        ({}, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "hosts.coordinator is missing"),
        ({"count": 2}, {"JAX_NUM_PROCESSES": "4"}, "hosts.count=2 but JAX_NUM_PROCESSES=4"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, environment, message):
    with pytest.raises(ValueError, match=message):
        HostsConfig(**settings).with_environment(environment)


def test_a_launchers_variables_count_where_nothing_is_set():
    launched = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert HostsConfig(devices=3).with_environment(launched) == HostsConfig(
        coordinator="a:1", count=2, index=1, devices=3
    )
    assert HostsConfig(index=1).with_environment(launched).index == 1
    assert HostsConfig().with_environment({}) == HostsConfig()
    assert HostsConfig(count=1).with_environment({"JAX_PROCESS_ID": "0"}).count == 1
    assert HostsConfig(coordinator="auto").with_environment({}).coordinator == "auto"
