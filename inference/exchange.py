"""What a server hands KV blocks over with, and has them handed: made before its service begins. Knows no API."""

from collections.abc import Callable
from typing import NamedTuple

from starlette.types import ASGIApp

from inference.disaggregation import DisaggregationConfig
from inference.engine import Engine
from inference.prefill_away import PrefillAway
from inference.prefill_door import About, PrefillDoor, about, compile_parts
from inference.service import Service


class Exchange(NamedTuple):
    """A server among others of its model."""

    about: About
    config: DisaggregationConfig
    secret: str  # that all of them know
    max_length: int

    def door(self, app: ASGIApp, service: Service) -> ASGIApp:
        """The application, where others may ask for blocks, too."""
        return PrefillDoor(app, service, self.about, secret=self.secret, max_length=self.max_length)

    async def away(self, service: Service, say: Callable[[str], None]) -> PrefillAway | None:
        """The server that computes long prompts for this one, and how fast both are; None where there is none."""
        if not self.config.prefill_from:
            return None
        url = self.config.prefill_from
        found = PrefillAway(service, self.about, url=url, secret=self.secret, config=self.config, say=say)
        rates = await found.measure(self.max_length)
        say(
            f"prompts may go to {url}: {rates.here:.0f} tokens/s here, {rates.there:.0f} there, "
            f"{rates.link / 1e6:.0f} MB/s between, {rates.delay * 1000:.0f} ms a call"
        )
        return found


def exchange(engine: Engine, config: DisaggregationConfig, *, secret: str) -> Exchange:
    """Compile what is needed, and look at the engine."""
    compile_parts(engine)
    return Exchange(about(engine), config, secret, engine.max_length)
