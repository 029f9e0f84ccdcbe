"""What the router did, and what is made of it: the routing trace, router shift, replay, load balance.

Probes (functions on one layer's router output, called inside the layer scan) and arithmetic on what they return.
Nothing here runs a model or knows an objective.
"""

from rspo_jax.router.balance import BalanceSums, load_balance_loss, router_bias_step, router_z_loss, watch_balance
from rspo_jax.router.shift import (
  DEVIATIONS,
  LAYERS,
  LEVELS,
  ShiftOptions,
  combine_deviation,
  expert_overlap,
  layer_deviation,
  linear_floor,
  router_drift,
  router_kl,
  router_log_shift,
)
from rspo_jax.router.trace import (
  RouterLogProb,
  RoutingDrift,
  RoutingLoad,
  count_load,
  expert_load,
  index_dtype,
  record_experts,
  record_routing,
  replay_of,
  slots_to_layers,
  stack_trace,
  to_positions,
  to_slots,
  trace_for_probe,
  watch_routing,
)

__all__ = [
  "BalanceSums",
  "DEVIATIONS",
  "LAYERS",
  "LEVELS",
  "RouterLogProb",
  "RoutingDrift",
  "RoutingLoad",
  "ShiftOptions",
  "combine_deviation",
  "count_load",
  "expert_load",
  "expert_overlap",
  "index_dtype",
  "layer_deviation",
  "linear_floor",
  "load_balance_loss",
  "record_experts",
  "record_routing",
  "replay_of",
  "router_bias_step",
  "router_drift",
  "router_kl",
  "router_log_shift",
  "router_z_loss",
  "slots_to_layers",
  "stack_trace",
  "to_positions",
  "to_slots",
  "trace_for_probe",
  "watch_balance",
  "watch_routing",
]
