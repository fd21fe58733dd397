"""From a text to the weights of the adapters: embedders, centroids, rules and the router. No model runs."""

from treadle.common.moved import names_of

__getattr__ = names_of(
    "treadle.routing",
    "treadle.routing.router",
    "treadle.routing.rules",
    "treadle.routing.schedule",
    "treadle.routing.fitting",
)
