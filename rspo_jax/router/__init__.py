"""The routing trace and its uses: router shift, routing replay, load balance.

Probes (functions of one layer's router output, called inside the layer scan) and arithmetic on their outputs. Functions
that run a model belong in `rspo_jax.training`, objectives in `rspo_jax.objectives`.
"""

from rspo_jax.router.balance import BalanceSums, balance_probe, load_balance_loss, router_bias_step, router_z_loss
from rspo_jax.router.shift import (
  DEVIATIONS,
  LAYERS,
  LEVELS,
  ShiftOptions,
  combine_deviation,
  expert_overlap,
  layer_deviation,
  router_drift,
  router_kl,
  router_log_shift,
)
from rspo_jax.router.trace import (
  RouterLogProb,
  RoutingDrift,
  RoutingLoad,
  drift_probe,
  expert_load,
  index_dtype,
  load_probe,
  record_experts,
  replay_from_trace,
  slots_to_layers,
  stack_trace,
  to_positions,
  to_slots,
  trace_probe,
  trace_probe_inputs,
)

__all__ = [
  "DEVIATIONS",
  "LAYERS",
  "LEVELS",
  "BalanceSums",
  "RouterLogProb",
  "RoutingDrift",
  "RoutingLoad",
  "ShiftOptions",
  "balance_probe",
  "combine_deviation",
  "drift_probe",
  "expert_load",
  "expert_overlap",
  "index_dtype",
  "layer_deviation",
  "load_balance_loss",
  "load_probe",
  "record_experts",
  "replay_from_trace",
  "router_bias_step",
  "router_drift",
  "router_kl",
  "router_log_shift",
  "router_z_loss",
  "slots_to_layers",
  "stack_trace",
  "to_positions",
  "to_slots",
  "trace_probe",
  "trace_probe_inputs",
]
