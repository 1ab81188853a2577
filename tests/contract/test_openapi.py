"""Schemathesis over the OpenAPI document: no server error, no answer that it does not declare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.main import create_app
from app.settings import Settings
from tests.contract.path_driver import TOKEN, Script, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
# Streams of a living job do not end by themselves; tests of their own read them.
STREAMS = "/events"
EXAMPLES = 12


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    """A server whose only slot is taken, so that jobs that are accepted only wait."""
    with serving(tmp_path_factory.mktemp("schema"), CPU_SLOTS="1") as script:
        model = script.add_model(uri="demo:digits")["id"]
        spec = {"model_id": model, "config": {}, "dataset": {"uri": "demo:digits"}}
        job = script.call("POST", "/jobs", 201, {**spec, "training": {"epochs": 10**6}})["id"]
        script.until(f"/jobs/{job}", lambda job: job["state"] == "running")
        script.call("POST", f"/jobs/{job}/pause", 202, {"mode": "hold"})
        yield script


config = SchemathesisConfig.from_dict({"generation": {"mode": "all"}})
interface = schemathesis.openapi.from_dict(
    create_app(Settings(data_dir=Path("never-made"))).openapi(), config=config
).exclude(path_regex=STREAMS)


@interface.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_every_answer_is_one_that_the_document_declares(
    case: schemathesis.Case, script: Script
) -> None:
    case.call_and_validate(
        base_url=str(script.http.base_url),
        headers={"Authorization": f"Bearer {TOKEN}"},
        checks=CHECKS,
        timeout=30,
    )
