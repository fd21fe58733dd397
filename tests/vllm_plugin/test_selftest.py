"""The vLLM that is installed is one that the plugin knows."""

from treadle.serving.vllm.selftest import TOLERANCE, examine_vllm


def test_this_vllm_is_healthy() -> None:
    report = examine_vllm()
    assert report.problems == ()
    assert report.difference is not None
    assert report.change is not None
    assert report.difference < TOLERANCE / 10 < 100 * TOLERANCE < report.change
