"""Figures for Prometheus, and the log."""

import json
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import save_adapter
from serving import Serving, serving

TEXTS = "/v1/completions"
ADMIN = {"Authorization": "Bearer root"}
BODY: dict[str, Any] = {"model": "auto", "prompt": "add three plus four", "max_tokens": 6, "temperature": 0}


@pytest.fixture
def served(bundle_folder: Path, tmp_path: Path) -> Generator[Serving]:
    save_adapter(tmp_path / "poetry", seed=9)
    with serving(bundle_folder, admin_key="root", adapter_dir=str(tmp_path), log_format="json") as each:
        yield each


def figures(served: Serving) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(served.request("GET", "/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_the_figures_are_those_of_what_was_asked(served: Serving) -> None:
    before = figures(served)
    assert before["treadle_adapter_loaded", "math"] == 1
    assert before["treadle_adapter_weight_total", "math"] == 0  # there from the start, idle or not
    body = {**BODY, "treadle": {"trace": True}}
    usages, weights = [], []
    for _ in range(2):
        answer = served.post(TEXTS, body).json()
        usages.append(answer["usage"])
        weights += answer["choices"][0]["treadle"]["weights"]
    served.post(TEXTS, {**BODY, "model": "base"})
    served.post(TEXTS, {**BODY, "temperature": 9})
    served.request("GET", "/v1/nowhere/" + "x" * 50)
    served.wait_until_idle()
    after = figures(served)
    assert after["treadle_generated_tokens_total",] == 18
    assert after["treadle_base_tokens_total",] == 6
    assert after["treadle_prompt_tokens_total",] == 3 * len(BODY["prompt"])
    assert after["treadle_prompt_tokens_reused_total",] == len(BODY["prompt"]) - 1
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, len(BODY["prompt"]) - 1]
    for index, name in enumerate(("math", "science", "code")):
        mass = sum(row[index] for row in weights)
        assert after["treadle_adapter_weight_total", name] == pytest.approx(mass, abs=1e-4)
    assert after["treadle_requests_total", "200", TEXTS] == 3
    assert after["treadle_requests_total", "400", TEXTS] == 1
    assert after["treadle_requests_total", "404", "unknown"] == 1
    assert after["treadle_time_to_first_token_seconds_count",] == 3
    assert after["treadle_time_per_token_seconds_count",] == 15
    assert after["treadle_step_seconds_count",] == after["treadle_batch_sequences_count",] > 0
    assert after["treadle_sequences_running",] == after["treadle_sequences_waiting",] == 0
    assert 0 < after["treadle_router_seconds_total",] < after["treadle_step_seconds_sum",] + 1
    assert after["treadle_prefix_cache_bytes",] > 0


def test_labels_are_bounded_by_the_adapters_that_are_loaded(served: Serving) -> None:
    served.post("/v1/adapters", {"name": "poetry", "path": "poetry", "samples": ["loop"]}, headers=ADMIN)
    assert figures(served)["treadle_adapter_weight_total", "poetry"] == 0
    served.request("DELETE", "/v1/adapters/poetry", headers=ADMIN)
    assert not [key for key in figures(served) if "poetry" in key]
    for number in range(20):
        served.request("GET", f"/v{number}")
        served.post(TEXTS, {**BODY, "model": f"m{number}"})
    assert len([key for key in figures(served) if key[0] == "treadle_requests_total"]) < 12


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(record.message) for record in caplog.records if record.message.startswith("{")]


def test_a_line_of_the_log_says_what_was_asked_but_no_text(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "treadle.serving.openai")
    answer = served.post(TEXTS, BODY, headers={"X-Request-Id": "me-7", **ADMIN})
    served.post(TEXTS, {**BODY, "model": "s3cret model"}, headers={"Authorization": "Bearer s3cret"})
    served.wait_until(lambda: len(logged(caplog)) == 2)
    first, second = logged(caplog)
    assert (first["id"], first["path"], first["status"], first["model"]) == ("me-7", TEXTS, 200, "auto")
    assert (first["prompt_tokens"], first["tokens"]) == (len(BODY["prompt"]), 6)
    assert set(first["weights"]) == {"math", "science", "code"}
    assert first["key"] != "root"
    assert (second["status"], second["error"]) == (404, "model_not_found")
    text = json.dumps([first, second])
    assert BODY["prompt"] not in text
    assert "s3cret" not in text
    assert answer.json()["choices"][0]["text"] not in text


def test_prompts_are_logged_when_asked(bundle_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "treadle.serving.openai")
    with serving(bundle_folder, log_prompts=True, log_format="json") as served:
        answer = served.post(TEXTS, BODY).json()
        served.wait_until(lambda: len(logged(caplog)) == 1)
    (line,) = logged(caplog)
    assert line["body"]["prompt"] == BODY["prompt"]
    assert line["texts"] == [answer["choices"][0]["text"]]


def test_a_request_is_a_span_of_the_trace_that_it_names(served: Serving) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    served.post(TEXTS, {**BODY, "model": "math"}, headers={"traceparent": parent, "X-Request-Id": "me-8"})
    served.post(TEXTS, {**BODY, "model": "s3cret"})
    served.wait_until(lambda: len(exporter.get_finished_spans()) == 2)
    first, second = exporter.get_finished_spans()
    assert first.name == f"POST {TEXTS}"
    assert first.parent.trace_id == int("a" * 32, 16)
    expected = {"treadle.request_id": "me-8", "gen_ai.request.model": "math", "gen_ai.usage.output_tokens": 6}
    assert expected.items() <= first.attributes.items()
    assert (second.attributes["error.type"], second.attributes["http.response.status_code"]) == ("model_not_found", 404)
    assert "s3cret" not in second.to_json()
    assert BODY["prompt"] not in first.to_json()
