"""Requests made up from the server's own document: none makes it fail, and every answer is as the document says."""

import httpx
import pytest

from tests.inference.fake_engine import FakeEngine
from tests.inference.serving import serving

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis makes up requests; uv sync")
hypothesis = pytest.importorskip("hypothesis")

POSTED = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
REFUSALS = {400, 401, 404, 408, 413, 429, 503}


@pytest.fixture(scope="module")
def server():
    with serving(FakeEngine(max_length=4096), queue=1000, timeout=20.0) as running:
        yield running


def fuzz(server, path: str, method: str, mode) -> set[int]:
    """Bounded, and the same in every run; -> the statuses that were seen."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    schema.config.generation.update(modes=[mode])
    seen: set[int] = set()

    @hypothesis.settings(
        max_examples=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(case=schema[path][method].as_strategy(generation_mode=mode))
    def one(case):
        response = case.call()
        seen.add(response.status_code)
        assert response.status_code < 500, response.text
        case.validate_response(
            response,
            checks=[
                schemathesis.checks.not_a_server_error,
                schemathesis.specs.openapi.checks.status_code_conformance,
                schemathesis.specs.openapi.checks.content_type_conformance,
                schemathesis.specs.openapi.checks.response_schema_conformance,
            ],
        )

    one()
    return seen


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize("is_right", [True, False])
def test_no_request_makes_it_fail(server, path, is_right):
    mode = schemathesis.GenerationMode.POSITIVE if is_right else schemathesis.GenerationMode.NEGATIVE
    seen = fuzz(server, path, "POST", mode)
    assert seen <= {200} | REFUSALS
    assert seen & ({200} | REFUSALS)
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/health"])
def test_nor_does_looking(server, path):
    assert fuzz(server, path, "GET", schemathesis.GenerationMode.POSITIVE) <= {200} | REFUSALS


def test_the_document_tells_no_422_and_has_every_path(server):
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    assert {*POSTED, "/v1/models", "/v1/models/{name}", "/health"} <= paths.keys()
    assert all("422" not in operation["responses"] for path in paths.values() for operation in path.values())
