# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What the routers of a Chain-of-Experts model do: statistics of any forward, or of a data set.

    with record_routing(model) as routing:
        model(**batch)
    print(routing)

`callbacks` logs them in training and `balancer` acts on them, `plots` draws them; `iterations` measures what each
iteration of the chains adds. From the shell,
`coe-routing MODEL DATA --out DIR` (`cli`) measures and draws.
"""

from .iterations import measure_iterations
from .recording import find_coe_model, measure_routing, record_routing, routing_stability, watch_routers
from .statistics import LayerRouting, RoutingStatistics


__all__ = [
    "LayerRouting",
    "RoutingStatistics",
    "find_coe_model",
    "measure_iterations",
    "measure_routing",
    "record_routing",
    "routing_stability",
    "watch_routers",
]
