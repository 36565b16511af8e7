"""Replicas under Ray Serve, each an engine with the server's own application. Nothing else here imports ray.

`serve deploy docs/launch/ray_serve.yaml` on a cluster; docs/serving_many.md says what is what. Ray finds the machines,
starts as many replicas as the queue asks for, sends requests to them, and replaces the ones that fail.
"""

import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import AsyncIterator
from typing import Any, Literal

from ray import serve
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from inference.config import EngineConfig, ServerConfig
from inference.location import locate
from parallel.config import AxisRules, MeshConfig
from parallel.records import from_dict, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayConfig:
    """What every replica serves. Where replicas run, and how many, the deployment file says in Ray's own words."""

    model: str  # as MODEL of infer.py
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matmuls and the cache
    mesh: MeshConfig = MeshConfig(data=1)  # of one replica
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()  # keys and limits; address and port are Ray's
    devices: int = 0  # CPU devices of a replica; 0 takes what jax finds

    def __post_init__(self):
        require(self, "ray", "devices", low=0)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a deployment file: `import_path: inference.ray_app:build`, its `args` a RayConfig."""
    config = from_dict(RayConfig, args)
    locate(config.model)  # a wrong one is told here, not by each replica
    most = config.engine.max_rows + config.server.queue
    return serve.deployment(serve.ingress()(Replica), name="Replica", max_ongoing_requests=most).bind(config)


class Replica:
    """One engine and its server, in a process of Ray's."""

    def __init__(self, config: RayConfig):
        from inference.metrics import Metrics
        from inference.server import served
        from inference.service import Reading, Service

        engine, tokenizer = start(config)
        reading = Reading(buffer=config.server.buffer, patience=config.server.patience, timeout=config.server.timeout)
        capacity = config.engine.max_rows + config.server.queue
        self._config, self._service = config.server, Service(engine, Metrics(), capacity=capacity, reading=reading)
        self._served = served(engine, tokenizer, config.server.name or pathlib.Path(config.model).name)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The server's application; the engine's thread runs while it does."""
        from inference.keys import read_keys
        from inference.server import application

        @contextlib.asynccontextmanager
        async def running(_: Starlette) -> AsyncIterator[None]:
            self._service.start()
            try:
                yield
            finally:
                await self._service.drain(self._config.drain)
                await self._service.close()

        app = application(self._service, self._served, self._config, read_keys(self._config))
        return Starlette(routes=[Mount("/", app)], lifespan=running)

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        if self._service.failure:
            raise RuntimeError(self._service.failure)


def start(config: RayConfig) -> tuple[Any, Any]:
    """An engine that has compiled all it needs, and the model's tokenizer."""
    import jax

    from inference.engine import Engine
    from inference.weights import open_model, serving_parameters
    from parallel.compilation import cache_compilations
    from parallel.mesh import make_mesh
    from parallel.platforms import cut_cpu, look_only_where_chips_are

    look_only_where_chips_are()
    if config.devices:
        cut_cpu(config.devices)
    cache_compilations()
    model, rules = open_model(locate(config.model), dtype=config.dtype), AxisRules()
    sizes = config.mesh.axes.values()
    mesh = make_mesh(config.mesh, jax.devices() if -1 in sizes else jax.devices()[: math.prod(sizes)])
    shape, parameters = serving_parameters(model.config, model.load(mesh, rules), mesh)
    num_tokens = model.tokenizer.vocab_size
    engine = Engine(shape, parameters, mesh, rules, num_tokens=num_tokens, options=config.engine)
    engine.warm_up(lambda line: print(line, file=sys.stderr, flush=True))
    return engine, model.tokenizer
