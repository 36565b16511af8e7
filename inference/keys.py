"""API keys: where they come from, and whether one that was shown is among them. Knows no HTTP."""

import hashlib
import hmac
import os
import pathlib
import secrets
from collections.abc import Iterable

from inference.config import ServerConfig

VARIABLE = "MESHLIGHT_API_KEYS"


class Keys:
    """The keys that are let in; with none, everybody is."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._secret = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._digests)

    def admits(self, shown: bytes) -> bool:
        """Whether the key is one of them. All are looked at, in a time that does not tell how alike they are."""
        digest = hashlib.sha256(shown).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(found) or not self._digests

    def salt(self, shown: bytes) -> str:
        """A name for whoever shows the key, which tells nothing about it."""
        return hmac.digest(self._secret, shown, "sha256").hex()


def read_keys(config: ServerConfig) -> Keys:
    """The keys of the options, of the environment and of a file."""
    keys = [*config.api_key, *os.environ.get(VARIABLE, "").split(",")]
    if config.api_keys_file:
        path = pathlib.Path(config.api_keys_file)
        lines = path.read_text(encoding="utf-8").splitlines()
        in_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not in_file:
            raise ValueError(f"{path} has no key; write one a line, or leave --api-keys-file out to let everybody in")
        keys += in_file
    return Keys(dict.fromkeys(key.strip() for key in keys if key.strip()))
