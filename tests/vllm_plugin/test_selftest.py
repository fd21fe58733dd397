"""The plugin knows the installed vLLM."""

from treadle.serving.vllm.selftest import TOLERANCE_NATS, examine_vllm


def test_this_vllm_is_healthy() -> None:
    report = examine_vllm()
    assert report.problems == ()
    assert report.difference is not None
    assert report.change is not None
    assert report.difference < TOLERANCE_NATS / 10 < 100 * TOLERANCE_NATS < report.change
