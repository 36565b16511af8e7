"""Several real processes that run as one, on this machine: for tests of what only they show."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 300.0  # seconds: the machine may be busy with other tests


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


class Process:
    """One of them; what it says goes to files, so that no full pipe holds it up."""

    def __init__(self, command: Sequence[str], folder: pathlib.Path, index: int):
        self.said_in, self.errors_in = folder / f"{index}.out", folder / f"{index}.err"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        with open(self.said_in, "w") as said, open(self.errors_in, "w") as errors:
            self.handle = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=errors)

    @property
    def said(self) -> str:
        """Its stdout so far."""
        return self.said_in.read_text()

    @property
    def errors(self) -> str:
        """Its stderr so far."""
        return self.errors_in.read_text(errors="replace")

    def ends(self) -> int:
        """Wait for its exit status."""
        return self.handle.wait(PATIENCE)

    def says(self, text: str) -> None:
        """Wait until it has said this."""
        self.waits(lambda: text in self.said)

    def waits(self, happened: Callable[[], bool]) -> None:
        """Wait for something while it runs."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.handle.poll() is None, f"ended with {self.handle.returncode}: {self.said}{self.errors}"
            assert time.monotonic() < end, f"waited in vain: {self.said}{self.errors}"
            time.sleep(0.02)


@contextlib.contextmanager
def running(commands: Sequence[Sequence[str]], folder: pathlib.Path) -> Iterator[list[Process]]:
    """The commands at once, each told apart by its place; none outlives the test."""
    folder.mkdir(exist_ok=True)
    processes = [Process([sys.executable, *command], folder, index) for index, command in enumerate(commands)]
    try:
        yield processes
    finally:
        for process in processes:
            process.handle.kill()
            process.handle.wait()
