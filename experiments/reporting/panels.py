"""The figures of a training run: which metrics each one shows, and its explanation in the report."""

from typing import NamedTuple

from experiments.reporting.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY


class Curve(NamedTuple):
  """One curve: a metric, its label, its colour. marker: of the points, for metrics that are measured only at times."""

  metric: str
  label: str
  color: str
  marker: str = ""


class Panel(NamedTuple):
  """One figure.

  Attributes:
    name: of its file. unit: of the y axis. explanation: its caption. phase: whose steps are on the x axis.
    log: logarithmic y axis. bounds: y limits that are always included; None leaves that side to the data.
  """

  name: str
  title: str
  unit: str
  curves: tuple[Curve, ...]
  explanation: str
  phase: str = "rl"
  log: bool = False
  bounds: tuple[float | None, float | None] = (None, None)


PANELS = (
  Panel(
    "success", "Success", "share of completions",
    (
      Curve("reward/success", "training problems", BLUE),
      Curve("eval/success", "held-out, sampled", ORANGE, marker="o"),
      Curve("eval/greedy_success", "held-out, greedy", GREEN, marker="D"),
    ),
    "Share of the completions that solve their problem. The held-out problems are never trained on.", bounds=(0, 1),
  ),
  Panel(
    "reward", "Reward", "mean reward", (Curve("reward/mean", "mean of a step's completions", BLUE),),
    "The quantity that training maximises.", bounds=(0, None),
  ),
  Panel(
    "entropy", "Policy entropy", "nats per token", (Curve("policy/entropy", "mean over tokens", BLUE),),
    "A slow decrease is normal during learning; near zero the policy no longer explores.", bounds=(0, None),
  ),
  Panel(
    "ratio", "Importance ratio", "new / old probability (log)",
    (
      Curve("ratio/max", "max", PURPLE), Curve("ratio/p99", "p99", ORANGE),
      Curve("ratio/p50", "median", BLACK), Curve("ratio/p1", "p1", BLUE),
    ),
    "Change of token probabilities by the updates of one step, new over sampling policy; 1 is no change.", log=True,
  ),
  Panel(
    "clip", "Clipped terms, floored tokens", "share",
    (
      Curve("clip/low", "low", BLUE), Curve("clip/high", "high", ORANGE),
      Curve("clip/effective", "no gradient", PURPLE), Curve("shift/floor_fraction", "gamma at floor", GREEN),
    ),
    "Tokens clipped at a bound, tokens without gradient because of clipping, tokens whose gamma is at its floor.",
    bounds=(0, None),
  ),
  Panel(
    "gamma", "Router-shift weight gamma", "gamma",
    (Curve("shift/gamma_mean", "mean", BLUE), Curve("shift/gamma_p10", "p10", ORANGE)),
    "Weight of a token by the drift of its routing since sampling; 1 is no drift.", bounds=(None, 1),
  ),
  Panel(
    "drift", "Router drift by layer", "unit of the deviation", (Curve("shift/layer_drift", "layer", BLUE),),
    "Change of the router on the old experts since sampling, by default the mean absolute change of log-probability.",
    bounds=(0, None),
  ),
  Panel(
    "overlap", "Overlap with the old policy", "share",
    (Curve("router/overlap", "old experts still chosen", BLUE), Curve("ratio/ess", "effective sample size", ORANGE)),
    "1 right after sampling; decreases as the updates of one step change router and policy.", bounds=(None, 1),
  ),
  Panel(
    "replay", "Log-ratio explained by routing", "share of squared log-ratio",
    (
      Curve("replay/experts_share", "old experts replayed", BLUE, marker="o"),
      Curve("replay/gates_share", "and their gates", ORANGE, marker="D"),
    ),
    "1: changes of routing alone cause the importance ratios; 0: they contribute nothing.",
  ),
  Panel(
    "noise", "Gradient noise-to-signal ratio", "variance / squared norm (log)",
    (
      Curve("noise/all", "all", BLACK, marker="o"), Curve("noise/router", "router", ORANGE, marker="o"),
      Curve("noise/experts", "experts", BLUE, marker="o"), Curve("noise/attention", "attention", GREEN, marker="o"),
      Curve("noise/embedding", "embedding", PURPLE, marker="o"),
    ),
    "Of a minibatch gradient, estimated from the variation between its parts; above 1 noise dominates.", log=True,
  ),
  Panel(
    "kl", "Divergence from the sampling policy", "nats per token", (Curve("kl/approx", "KL(old, new), k3", BLUE),),
    "Distance of the policy from the sampling policy after the updates of one step.", bounds=(0, None),
  ),
  Panel(
    "gradient", "Gradient norm", "global norm (log)", (Curve("grad/norm", "before clipping, mean of updates", BLUE),),
    "Spikes indicate instability; values near zero indicate groups without signal.", log=True,
  ),
  Panel(
    "length", "Response length", "tokens",
    (Curve("length/mean", "mean", BLUE), Curve("length/max", "longest", SKY)),
    "Including the end token.", bounds=(0, None),
  ),
  Panel(
    "rates", "Groups and format", "share",
    (
      Curve("reward/format", "in format", BLUE), Curve("groups/zero_variance", "groups without signal", ORANGE),
      Curve("length/truncated", "truncated", GREEN),
    ),
    "A group in which all completions have the same reward gives no gradient.", bounds=(0, 1),
  ),
  Panel(
    "load", "Expert load", "tokens over mean tokens", (Curve("router/load_max_over_mean", "busiest expert", BLUE),),
    "1 is balanced; the largest possible value is experts / active experts.", bounds=(1, None),
  ),
  Panel(
    "router_entropy", "Router entropy", "nats", (Curve("router/entropy", "mean over tokens and layers", BLUE),),
    "Values near 0 mean nearly deterministic routing.", bounds=(0, None),
  ),
  Panel(
    "dead", "Experts without a token", "share of experts", (Curve("router/dead_fraction", "all layers", BLUE),),
    "Experts that received no token of a minibatch.", bounds=(0, 1),
  ),
  Panel(
    "warm_start", "Warm-start loss", "nats per token", (Curve("loss/warm_start", "cross-entropy", BLUE),),
    "Supervised loss on the demonstrations, before RL.", phase="warm_start", bounds=(0, None),
  ),
  Panel(
    "speed", "Speed", "tokens per second",
    (
      Curve("speed/sample_tokens_per_second", "sampling", BLUE),
      Curve("speed/score_tokens_per_second", "scoring", GREEN),
      Curve("speed/train_tokens_per_second", "training", ORANGE),
    ),
    "The first step includes compilation.", bounds=(0, None),
  ),
)  # fmt: skip
