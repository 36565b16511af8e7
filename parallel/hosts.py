"""Several processes that run as one: how they meet, agree and part. Knows no mesh and no array.

They talk through the key-value store of jax's coordination service, which process 0 keeps. Each gives a sign of life
there; process 0 looks for them, and what it finds missing, every process says in one line before it ends itself: a
device that waits for a lost one would wait for ever.
"""

import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the client of the service has no public name

from parallel.config import HostsConfig
from parallel.platforms import cut_cpu

ROOM = "meshlight"  # every key of ours begins so
FOR_EVER = 2**31 - 1  # milliseconds: whoever waits for a lost process is ended by the watch
PAUSES = (0.1, 3.0)  # seconds between two signs of life, at least and at most
STATUS = re.compile(
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)  # of XLA
WAY_OUT = "what is saved is whole: start all processes again and they go on from there"

_watch: "Watch | None" = None  # over the other processes, where there are some
_turns: collections.Counter[str] = collections.Counter()  # how often each question was asked


def count() -> int:
    """Processes that run as one."""
    return distributed.global_state.num_processes


def index() -> int:
    """This one's number."""
    return distributed.global_state.process_id


def is_first() -> bool:
    """Whether this process is the one that speaks, names, renames and removes."""
    return index() == 0


def combined(name: str, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
    """What process 0 makes of every process's value, in order, on all of them; values and result are JSON.

    Every process asks the same questions of one name in the same order; it may do so from any thread.
    """
    if count() == 1:
        return combine([value])
    client, key = _client(), _key(name)
    if not is_first():
        client.key_value_set(f"{key}/{index()}", json.dumps(value))
        return json.loads(client.blocking_key_value_get(f"{key}/answer", FOR_EVER))
    others = [json.loads(client.blocking_key_value_get(f"{key}/{i}", FOR_EVER)) for i in range(1, count())]
    answer = json.dumps(combine([value, *others]))
    client.key_value_delete(key)  # and all below it
    client.key_value_set(f"{key}/answer", answer)
    return json.loads(answer)


def agreed(name: str, value: Any) -> Any:
    """Process 0's value, on every process; the others' is not asked for."""
    if count() == 1:
        return value
    client, key = _client(), _key(name)
    if is_first():
        client.key_value_set(f"{key}/answer", json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(f"{key}/answer", FOR_EVER))


def first_problem(name: str, problem: str | None) -> str | None:
    """The problem of the first process that has one, on all of them; None where all are well."""
    return combined(name, problem, lambda problems: next((problem for problem in problems if problem), None))


def barrier(name: str) -> None:
    """Return when every process has come so far."""
    combined(name, None, lambda _: None)


def stop_reason(step: int, asked: Callable[[], str | None]) -> str | None:
    """Why to stop after `step` steps, or None. Every process asks before each step and gets the same answer.

    `asked` is why this process was asked to stop; one that was makes all stop, a few steps later.
    """
    return asked() if _watch is None else _watch.stop_reason(step, asked)


def _key(name: str) -> str:
    _turns[name] += 1
    return f"{ROOM}/{name}/{_turns[name]}"


def _client() -> Any:
    assert distributed.global_state.client is not None
    return distributed.global_state.client


@contextlib.contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """While inside, this process is one of those of `config`. Enter it before jax's devices are used.

    With others an error inside does not come out: it is said here and told to the others, and all processes end (exit
    status 2 here where the user can mend it, else 1), since devices that wait for each other do not part in order.
    """
    global _watch
    config = config.with_environment(os.environ)
    if config.devices:
        cut_cpu(config.devices)
    if not _connect(config) or count() == 1:
        yield
        return
    _watch = watch = Watch(config)
    try:
        yield
        barrier("end")
    except BaseException as error:
        watch.leave(error)
    _watch = None
    watch.close()
    jax.distributed.shutdown()


def _connect(config: HostsConfig) -> bool:
    """Meet the other processes; False where there are none. Raises ValueError or OSError in one line."""
    on_tpu = "tpu" in (jax.config.values["jax_platforms"] or "").split(",")  # jax sets it where it finds TPU chips
    found = config.coordinator == "auto" or (on_tpu and not config.coordinator)
    if config.count == 1 or not (found or config.coordinator):
        return False
    where: dict[str, Any] = {}
    if not found:
        if config.index == 0:
            _check_port(config)
        where = {
            "coordinator_address": config.coordinator,
            "num_processes": config.count,
            "process_id": config.index,
            "cluster_detection_method": "deactivate",
        }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; training/interruption.py has it
    abort = _Abort(lambda: _refuse(_unmet(config, "nobody answered")))  # jax's client knows no other way to give up
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=config.wait,
            heartbeat_timeout_seconds=2 * config.timeout + 30,  # ours is the one that speaks
            shutdown_timeout_seconds=config.timeout,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if found and config.coordinator != "auto" and "should be defined" in str(error):
            return False  # TPU chips, but nobody who would know of more than this host
        if not found:
            raise OSError(_unmet(config, _line(error))) from error
        raise OSError(
            f"the other processes were not found: {_line(error)}; give hosts.coordinator, hosts.count and hosts.index, "
            "or hosts.count=1 to run this one alone"
        ) from error
    finally:
        abort.restore()
    return True


def _unmet(config: HostsConfig, reason: str) -> str:
    """Why the processes do not come together."""
    if config.coordinator in ("", "auto"):
        return f"the other processes did not come within hosts.wait={config.wait} seconds; start all of them"
    who = f"process {config.index} of {config.count} at hosts.coordinator={config.coordinator}"
    return (
        f"{who} did not meet the others within hosts.wait={config.wait} seconds ({reason}); start all processes with "
        "the same coordinator and count, each with its own index, and see that the port is free there and reachable"
    )


def _check_port(config: HostsConfig) -> None:
    """Raise OSError where process 0 cannot listen at its port; jax's service would crash."""
    try:
        socket.create_server(("", int(config.coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen at the port of hosts.coordinator={config.coordinator}: {error.strerror}; "
            "give all processes another one"
        ) from error


def _refuse(line: str) -> None:
    """End this process for what the user can mend."""
    _say(f"error: {line}")
    os._exit(2)


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign:
    """When a process was last seen to live, by process 0's clock."""

    beat: str
    at: float


class Watch:
    """Looks after the other processes from a thread of its own; ends this one when another has ended."""

    def __init__(self, config: HostsConfig):
        self.timeout, self.host = config.timeout, socket.gethostname()
        low, high = PAUSES
        self._pause = min(max(config.timeout / 20, low), high)
        self.hosts: dict[str, str] = combined("hosts", self.host, lambda names: dict(enumerate(names)))
        self._next = 0  # the first step after which this process can stop
        self._stop_at, self._stop_name = None, None
        self._asked: Callable[[], str | None] = lambda: None
        self._between_steps = threading.Lock()
        self._signs: dict[int, Sign] = {}
        self._closed = threading.Event()
        self._last_word = threading.Lock()
        self._coordinator = distributed.global_state.coordinator_address or ""
        self._abort = _Abort(self._aborted)
        self._thread = threading.Thread(target=self._run, name="hosts", daemon=True)
        self._thread.start()

    # What the main thread asks.

    def stop_reason(self, step: int, asked: Callable[[], str | None]) -> str | None:
        """See the function of this name."""
        self._asked = asked
        with self._between_steps:
            self._next = step + 1
            return self._stop_name if self._stop_at is not None and step >= self._stop_at else None

    def close(self) -> None:
        """Stop to look; every process has come to the end."""
        self._closed.set()
        self._thread.join()
        self._abort.restore()

    def leave(self, error: BaseException) -> None:
        """Say what went wrong here, tell the others, and end this process."""
        of_devices = isinstance(error, jax.errors.JaxRuntimeError) or STATUS.match(str(error)) is not None
        if of_devices:  # most likely another process's fault: soon the thread knows, and ends this one
            time.sleep(self.timeout + 10 * self._pause)
        if not self._last_word.acquire(blocking=False):
            time.sleep(self.timeout)  # the thread is ending this process
        mended = isinstance(error, ValueError | OSError) and not of_devices and not sys.flags.dev_mode
        with contextlib.suppress(Exception):
            self._tell(f"process {index()} ({self.host}) stopped: {_line(error)}")
        if mended:
            _say(f"error: {_line(error)}")
        else:
            _say("".join(traceback.format_exception(error)).rstrip())
        self._wait_for_ears()
        os._exit(2 if mended else 1)

    # What the thread does.

    def _run(self) -> None:
        beat, client = 0, _client()
        while not self._closed.wait(self._pause):
            beat += 1
            try:
                client.key_value_set(f"{ROOM}/alive/{index()}", str(beat), allow_overwrite=True)
                if is_first():
                    self._look(dict(client.key_value_dir_get(f"{ROOM}/alive/")))
                self._hear(dict(client.key_value_dir_get(f"{ROOM}/news/")))
            except jax.errors.JaxRuntimeError as error:
                if self._closed.is_set():
                    return
                self._end_without_first(_line(error)[:200] if _answers(self._coordinator) else None)

    def _look(self, beats: dict[str, str]) -> None:
        """Process 0: note who lives; whoever has been silent for too long is gone."""
        now = time.monotonic()
        for other in range(1, count()):
            beat = beats.get(f"{ROOM}/alive/{other}", "")
            sign = self._signs.get(other)
            if sign is None or sign.beat != beat:
                self._signs[other] = Sign(beat=beat, at=now)
            elif now - sign.at > self.timeout:
                host = self.hosts[str(other)]
                self._tell(f"process {other} ({host}) is gone: no sign of life for {self.timeout} seconds")

    def _hear(self, news: dict[str, str]) -> None:
        """What has happened: somebody has ended, somebody was asked to stop, all know when to."""
        ended, stop, stop_at = (news.get(f"{ROOM}/news/{name}") for name in ("ended", "stop", "stop_at"))
        if ended is not None:
            self._heard(ended)
        name = self._asked()
        if stop is None and name is not None:
            self._announce("stop", name)
        if stop is not None and self._stop_at is None:
            if stop_at is None:
                self._agree_to_stop()
            else:
                self._stop_name, self._stop_at = stop, int(stop_at)

    def _agree_to_stop(self) -> None:
        """All name the step they have begun, and none begins another before the latest is known: after it all stop."""
        client = _client()
        with self._between_steps:
            client.key_value_set(f"{ROOM}/steps/{index()}", str(self._next), allow_overwrite=True)
            while self._stop_at is None:
                if is_first():
                    steps = dict(client.key_value_dir_get(f"{ROOM}/steps/"))
                    if len(steps) == count():
                        self._announce("stop_at", str(max(map(int, steps.values()))))
                news = dict(client.key_value_dir_get(f"{ROOM}/news/"))
                if f"{ROOM}/news/ended" in news:
                    self._heard(news[f"{ROOM}/news/ended"])
                if f"{ROOM}/news/stop_at" in news:
                    self._stop_name = news[f"{ROOM}/news/stop"]
                    self._stop_at = int(news[f"{ROOM}/news/stop_at"])
                    return
                client.key_value_set(f"{ROOM}/alive/{index()}", f"stop {time.time()}", allow_overwrite=True)
                if is_first():
                    self._look(dict(client.key_value_dir_get(f"{ROOM}/alive/")))
                time.sleep(self._pause / 4)

    def _tell(self, what: str) -> None:
        """Make known that a process has ended; only the first such news counts."""
        self._announce("ended", what)

    def _announce(self, name: str, text: str) -> None:
        """A piece of news, unless somebody else was first."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"{ROOM}/news/{name}", text)

    def _end(self, what: str) -> None:
        """Another process has ended, so this one does."""
        if not self._last_word.acquire(blocking=False):
            time.sleep(self.timeout)  # another thread is saying it
        _say(f"error: {what}; {WAY_OUT}")
        os._exit(1)

    def _end_without_first(self, why: str | None = None) -> None:
        """Process 0 has ended; without a reason of its own, nobody answers where it listened."""
        self._end(f"process 0 ({self.hosts['0']}) is gone: {why or 'it no longer answers'}")

    def _heard(self, what: str) -> None:
        """Another process has ended and this one knows."""
        self._wait_for_ears()
        self._end(what)

    def _wait_for_ears(self) -> None:
        """Process 0 keeps the store, so it leaves as the last one, or when the others have had their time."""
        with contextlib.suppress(Exception):
            _client().key_value_set(f"{ROOM}/ears/{index()}", "", allow_overwrite=True)
            end = time.monotonic() + 3 * self._pause + 1
            while is_first() and time.monotonic() < end:
                if len(_client().key_value_dir_get(f"{ROOM}/ears/")) == count():
                    time.sleep(0.2)
                    return
                time.sleep(0.05)

    def _aborted(self) -> None:
        """jax's client ends the process the moment it loses process 0; before that, say whom it has lost."""
        if not is_first() and not _answers(self._coordinator):
            self._end_without_first()


class _Abort:
    """A function that SIGABRT calls in the thread that aborts; when it returns, the process aborts as it would have.

    Python's own handlers run in the main thread, which may be waiting for the devices.
    """

    def __init__(self, act: Callable[[], None]):
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_int)
        self._kept = prototype(lambda number: act())  # must live as long as it is installed
        self._libc = ctypes.CDLL(None)
        self._libc.signal.restype = ctypes.c_void_p
        self._libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._before = self._libc.signal(signal.SIGABRT, ctypes.cast(self._kept, ctypes.c_void_p))

    def restore(self) -> None:
        """Undo it."""
        self._libc.signal(signal.SIGABRT, self._before)


def _answers(address: str, seconds: float = 2.0) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except (OSError, ValueError):
        return False
    return True


def _say(text: str) -> None:
    """A line on stderr, past whatever holds Python's own file."""
    os.write(2, f"{text}\n".encode())
