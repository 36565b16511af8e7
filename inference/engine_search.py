"""Beam search over the engine: each beam is a request that is held after every token. Knows no rules of a search.

The beams that go on are forks of those before them and share their blocks.
"""

from collections.abc import Mapping, Sequence

from inference import beam
from inference.beam import Beam, Search
from inference.config import BeamConfig, SamplingConfig
from inference.engine import Engine
from inference.request import Prompt, Request, TopToken


class Held:
    """Beams as requests of the engine, beside whatever else it answers."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def likely(self, ids: Sequence[int]) -> dict[int, list[TopToken]]:
        """Step till every beam has chosen; -> the likeliest tokens after each. Other requests' outputs are not kept."""
        likely: dict[int, list[TopToken]] = {}
        while len(likely) < len(ids):
            for output in self.engine.step():
                if output.id in ids and output.finish == "error":
                    raise ValueError(output.error)
                if output.id in ids and output.tokens:
                    likely[output.id] = [top for top in output.top[0] if top.logprob > float("-inf")]
        return likely

    def fork(self, children: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """Let the engine go on with these, and with no other beam."""
        return self.engine.fork(children)


def search(
    engine: Engine, prompt: Prompt, config: BeamConfig, *, max_tokens: int, end_ids: Sequence[int]
) -> list[Beam]:
    """As many answers as beams at most, the best first. One search at a time on an engine, beside other requests."""
    max_tokens = min(max_tokens, engine.max_length - len(prompt))
    check_room(engine, prompt, config, max_tokens=max_tokens)
    request = Request(
        prompt=prompt,
        sampling=SamplingConfig(temperature=0.0, top_p=1.0),
        max_tokens=max_tokens,
        num_top=2 * config.beams,
        is_beam=True,
    )
    search = Search(engine.add(request), config, max_tokens=max_tokens, end_ids=end_ids)
    try:
        beam.run(Held(engine), [search])
    finally:
        for id in search.beams:
            engine.cancel(id)
    return search.answers


def check_room(engine: Engine, prompt: Prompt, config: BeamConfig, *, max_tokens: int) -> None:
    """ValueError where the beams cannot all be computed at once."""
    rows, size = engine.options.max_rows, engine.options.block_size
    if config.beams > rows:
        raise ValueError(f"{config.beams} beams need as many rows and the engine has {rows}; give it more max_rows")
    length = len(prompt) + max_tokens
    need, room = config.beams * (-(-length // size) + 1), engine.options.cache_tokens // size
    if need > room:
        raise ValueError(
            f"{config.beams} beams of {length} tokens need up to {need} blocks, the cache has {room}; "
            "search with fewer beams or tokens, or give the engine more cache_tokens"
        )
