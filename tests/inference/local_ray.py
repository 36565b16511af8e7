"""A Ray of this machine alone that runs a deployment file: `python -m tests.inference.local_ray FILE MODEL PORT`.

The file's application, with a small engine and quick scaling. Says how many replicas are in which state. Ends with
everything that it started when it is told to (SIGTERM).
"""

import os
import pathlib
import signal
import sys
import time

import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {"max_rows": 2, "cache_tokens": 1024, "block_size": 8, "chunk": 32, "max_length": 256}
QUICK = {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1.0, "metrics_interval_s": 0.5}


def schema_of(file: str, model: str) -> ServeDeploySchema:
    """The file for a small machine."""
    content = yaml.safe_load(pathlib.Path(file).read_text())
    (application,) = content["applications"]
    (deployment,) = application["deployments"]
    application["args"] |= {"model": model, "engine": SMALL}
    deployment["autoscaling_config"] |= QUICK
    deployment["ray_actor_options"]["num_cpus"] = 1
    deployment["graceful_shutdown_timeout_s"] = 2
    return ServeDeploySchema.model_validate(content)


def main(file: str, model: str, port: int) -> None:
    """Deploy and tell."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    environment = {key: value for key, value in os.environ.items() if key.startswith("JAX_")}
    try:
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
            _node_ip_address="127.0.0.1", runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), **environment}},
        )  # fmt: skip
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(schema_of(file, model), _blocking=False)
        while True:
            application = serve.status().applications.get("meshlight")
            if application is not None:
                states = {} if not application.deployments else application.deployments["Replica"].replica_states
                print(application.status.value, {str(key): value for key, value in states.items()}, flush=True)
                if application.status.value == "DEPLOY_FAILED":
                    print(application.message, application.deployments, flush=True)
            time.sleep(0.5)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
