"""A peer program that takes turns with us: started once, asked for one timed round at a time. Knows no model."""

import json
import pathlib
import subprocess
from typing import Any

SCRIPTS = pathlib.Path(__file__).parent / "peers"


class Peer:
    """A process of another interpreter that answers each line with the seconds of one round."""

    def __init__(self, python: str, script: str, ask: Any):
        self._python = python
        command = [python, str(SCRIPTS / script), json.dumps(ask)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.name = json.loads(self._answer())["ready"]

    def round(self) -> float:
        """Seconds of one round."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise ValueError(
                f"the peer stopped with exit status {self._process.returncode}; its interpreter needs torch and "
                f"transformers (pip install torch==2.13.0 transformers): {self._python}"
            )
        return line

    def close(self) -> None:
        """End the peer's process."""
        self._process.kill()
        self._process.communicate()
