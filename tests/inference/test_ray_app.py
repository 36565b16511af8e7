"""The deployment file of Ray Serve: what it says fits, and it runs on a local Ray, which adds a replica for a queue."""

import concurrent.futures
import dataclasses
import json
import pathlib

import openai
import pytest

from data.tokenizer import ByteTokenizer
from inference.config import EngineConfig, ServerConfig
from model import huggingface
from parallel.records import from_dict
from tests.inference.small import LLAMA, parameters
from tests.processes import PATIENCE, free_port, running

psutil, yaml = pytest.importorskip("psutil"), pytest.importorskip("yaml")
FILE = pathlib.Path(__file__).parents[2] / "docs" / "launch" / "ray_serve.yaml"
TINY = dataclasses.replace(LLAMA, vocab_size=320, max_length=256)


def test_the_file_says_what_fits_together():
    (application,) = yaml.safe_load(FILE.read_text())["applications"]
    (deployment,) = application["deployments"]
    engine, server = application["args"]["engine"], application["args"]["server"]
    assert application["import_path"] == "inference.ray_app:build"
    assert deployment["max_ongoing_requests"] == engine["max_rows"] + server["queue"]
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == engine["max_rows"]
    assert from_dict(EngineConfig, engine).max_rows == 32
    assert deployment["graceful_shutdown_timeout_s"] == from_dict(ServerConfig, server).drain


@pytest.mark.slow  # Ray, and each replica compiles what it needs: one to six minutes on two cores
def test_it_runs_on_a_local_ray_scales_with_the_queue_and_leaves_nothing_behind(tmp_path, monkeypatch):
    huggingface.save(tmp_path / "model", TINY, parameters(TINY), dtype="float32")
    ByteTokenizer().save(tmp_path / "model")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for key, value in (("USAGE_STATS_ENABLED", "0"), ("AUTH_MODE", "disabled"), ("raylet_start_wait_time_s", "240")):
        monkeypatch.setenv(f"RAY_{key}", value)
    port = free_port()
    command = ["-m", "tests.inference.local_ray", str(FILE), str(tmp_path / "model"), str(port)]
    with running([command], tmp_path / "ray") as (local,):
        try:
            local.says("RUNNING {'RUNNING': 1}")
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=PATIENCE)
            name = client.models.list().data[0].id
            ask = {"model": name, "prompt": "Once", "temperature": 0, "max_tokens": 40}
            whole = client.completions.create(**ask).choices[0].text
            streamed = client.completions.create(**ask, stream=True)
            assert "".join(piece.choices[0].text for piece in streamed) == whole

            def busy(_: int) -> str:
                """Requests till a second replica runs."""
                while "'RUNNING': 2" not in local.said:
                    assert client.completions.create(**ask).choices[0].text == whole
                return client.completions.create(**ask).choices[0].text

            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                assert set(pool.map(busy, range(12))) == {whole}
            client.close()
        finally:
            started = everybody(local.handle.pid)
            local.handle.terminate()
            _, alive = psutil.wait_procs(started, timeout=PATIENCE)
            for process in alive:
                process.kill()
        assert not alive, [process.name() for process in alive]


def everybody(pid: int) -> list:
    """A process and all that come from it, as far as they live."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow  # importing ray
def test_a_wrong_file_is_refused_in_one_line(tmp_path):
    code = "from inference.ray_app import build; import json, sys; build(json.loads(sys.argv[1]))"
    wrong = [({"model": "nothing"}, "MODEL nothing"), ({"model": "smollm2", "mash": {}}, "unknown key mash")]
    with running([["-c", code, json.dumps(args)] for args, _ in wrong], tmp_path) as processes:
        for process, (_, rule) in zip(processes, wrong, strict=True):
            assert process.ends() == 1
            assert rule in process.errors.splitlines()[-1]
