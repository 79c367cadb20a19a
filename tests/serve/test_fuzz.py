"""Requests made up from the OpenAPI document: whatever they are, the server answers for itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from posttrain.data.registry import Registry
from posttrain.serve.app import make_app
from posttrain.serve.settings import Settings
from tests.serve.serving import TOKEN

HEADERS = {"Authorization": f"Bearer {TOKEN}", "Host": "localhost"}
EXAMPLES = 25


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_REGISTRY", str(folder / "datasets"))
        app = make_app(Settings(folder / "runs", folder / "data", Registry(folder / "datasets"), TOKEN))
        yield schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS).include(path_regex="^/api/")


def test_no_request_makes_the_server_fail(schema: schemathesis.BaseSchema) -> None:
    asked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def answers(case: schemathesis.Case) -> None:
            answer = case.call(headers=HEADERS)
            case.validate_response(answer, checks=[not_a_server_error])
            if answer.status_code >= 400:
                assert answer.headers["content-type"] == ["application/problem+json"], answer.text

        answers()
        asked += 1
    assert asked >= 25
