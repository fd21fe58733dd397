"""Forward passes that fail, for the tests of what a failure costs."""

from treadle.engine.runners.passes import PassInput, PassOutput


class FailingSteps:
    """A pass that takes every step, and fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def takes(self, given: PassInput) -> bool:
        return given.is_step

    def run(self, given: PassInput) -> PassOutput:
        raise self._error
