"""From a text to the weights of the adapters: embedders, centroids, rules and the router. No model runs."""
