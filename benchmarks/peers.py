"""The same work done by transformers on torch, in all settings that may be its fastest (needs the extra `parity`).

`python -m benchmarks.peers` times all of them, each in a worker process, and prints the fastest.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.sizes import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, ROW_TOKENS, ROWS, TINY
from benchmarks.timing import by_turns
from benchmarks.workers import Case, Worker


def _model(experts: str, attention: str, threads: int) -> Any:
  import torch
  from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  config = Qwen3MoeConfig(**TINY, attn_implementation=attention, experts_implementation=experts)
  model = Qwen3MoeForCausalLM(config)
  # Without a stop token no row can end early, and transformers skips the check.
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0
  return model


def sampling(
  experts: str = "grouped_mm",
  attention: str = "sdpa",
  cache: str = "dynamic",
  compiled: bool = False,
  threads: int = 2,
) -> Case:
  """64 prompts of 32 tokens, 64 new tokens each, temperature 1, no truncation, `generate` with a KV cache.

  Args:
    experts: "eager", "grouped_mm" or "batched_mm", transformers' implementations of the experts.
    attention: "sdpa" or "eager". cache: "dynamic" or "static". compiled: torch.compile the forward pass (needs the
      fixed shapes of a static cache). threads: torch's intra-op threads.
  """
  import torch

  model = _model(experts, attention, threads).eval()
  tokens = torch.randint(0, TINY["vocab_size"], (PROMPTS, PROMPT_TOKENS))
  valid = torch.ones_like(tokens)
  if compiled:
    model.forward = torch.compile(model.forward, dynamic=None)

  def call() -> Any:
    with torch.inference_mode():
      return model.generate(
        tokens,
        attention_mask=valid,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        cache_implementation=cache,
        use_cache=True,
      )

  shape = tuple(call().shape)
  if shape != (PROMPTS, PROMPT_TOKENS + NEW_TOKENS):
    raise RuntimeError(f"generate returned tokens of shape {shape}; want {(PROMPTS, PROMPT_TOKENS + NEW_TOKENS)}.")
  return Case(call, PROMPTS * NEW_TOKENS, {})


def _token_log_prob(model: Any, tokens: Any, valid: Any) -> Any:
  """[B, T-1] log-probabilities of tokens[:, 1:], without a second array [B, T, V]."""
  import torch

  logits = model(tokens, attention_mask=valid, use_cache=False).logits[:, :-1]
  chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
  return chosen - torch.logsumexp(logits, dim=-1)


def train_step(experts: str = "grouped_mm", attention: str = "sdpa", compiled: bool = False, threads: int = 2) -> Case:
  """Forward, token log-probs, clipped GRPO loss, backward, global-norm clip and AdamW on 64 rows of 96 tokens."""
  import torch

  model = _model(experts, attention, threads).train()
  tokens = torch.randint(0, TINY["vocab_size"], (ROWS, ROW_TOKENS))
  valid = torch.ones_like(tokens)
  actions = torch.zeros(ROWS, ROW_TOKENS - 1)
  actions[:, PROMPT_TOKENS - 1 :] = 1
  advantage = torch.randn(ROWS, 1)
  # The setting that users choose on a CPU: one fused kernel instead of a Python loop over parameters.
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
  log_prob = torch.compile(_token_log_prob) if compiled else _token_log_prob
  with torch.no_grad():
    old = _token_log_prob(model, tokens, valid)

  def call() -> Any:
    ratio = torch.exp(log_prob(model, tokens, valid) - old)
    term = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = -(term * actions).sum() / actions.sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  return Case(call, ROWS * ROW_TOKENS, {})


def scoring(experts: str = "grouped_mm", attention: str = "sdpa", compiled: bool = False, threads: int = 2) -> Case:
  """Log-probabilities of 64 rows of 96 tokens without gradient."""
  import torch

  model = _model(experts, attention, threads).eval()
  tokens = torch.randint(0, TINY["vocab_size"], (ROWS, ROW_TOKENS))
  valid = torch.ones_like(tokens)
  log_prob = torch.compile(_token_log_prob) if compiled else _token_log_prob

  def call() -> Any:
    with torch.inference_mode():
      return log_prob(model, tokens, valid)

  return Case(call, ROWS * ROW_TOKENS, {})


CASES: dict[str, Callable[..., Case]] = {"sampling": sampling, "train_step": train_step, "scoring": scoring}
EXPERTS = ("eager", "grouped_mm", "batched_mm")


def all_settings(case: str) -> list[dict[str, Any]]:
  """All settings of a case; trying them takes minutes, as batched_mm is a hundred times slower than the others."""
  caches = ("dynamic", "static") if case == "sampling" else (None,)
  return [
    {
      "experts": experts,
      "attention": attention,
      "threads": threads,
      "compiled": compiled,
      **({"cache": cache} if cache else {}),
    }
    for threads in (2, 1)
    for attention in ("sdpa", "eager")
    for compiled in (False, True)
    for cache in caches
    for experts in EXPERTS
    if cache != "dynamic" or not compiled  # a growing cache would compile every step
  ]


def likely_settings(case: str) -> list[dict[str, Any]]:
  """The settings that were close to the fastest when all were tried."""
  if case == "sampling":
    return [
      {"experts": "grouped_mm", "attention": "sdpa", "cache": "dynamic"},
      {"experts": "grouped_mm", "attention": "sdpa", "cache": "static"},
      {"experts": "grouped_mm", "attention": "eager", "cache": "dynamic"},
      {"experts": "eager", "attention": "sdpa", "cache": "dynamic"},
    ]
  return [
    {"experts": "eager", "attention": "sdpa"},
    {"experts": "grouped_mm", "attention": "sdpa"},
    {"experts": "eager", "attention": "eager"},
    {"experts": "grouped_mm", "attention": "sdpa", "compiled": True},
    {"experts": "eager", "attention": "sdpa", "compiled": True},
  ]


def start(case: str, setting: Mapping[str, Any]) -> Worker:
  """A worker that holds `case` in this setting.

  Args:
    setting: arguments of the case, and "wait": with "passive" (the default here) torch's OpenMP threads sleep while
      they wait for each other, with "active" (OpenMP's default) they spin. On an idle machine spinning is up to 1.7
      times faster; with other load it made the same call ten times slower. So comparisons run both.
  """
  setting = dict(setting)
  threads = str(setting.get("threads", 2))
  env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
  if setting.pop("wait", "passive") == "passive":
    env["OMP_WAIT_POLICY"] = "PASSIVE"
  return Worker(f"benchmarks.peers:{case}", setting, env=env)


def name_of(setting: Mapping[str, Any]) -> str:
  return ", ".join(f"{key} {value}" for key, value in setting.items())


def trial(case: str, settings: Iterable[Mapping[str, Any]], *, log: Any = sys.stderr, **options: Any) -> dict[str, Any]:
  """Times settings of a case, alternating, prints each, and returns the one with the fastest single repeat.

  The fastest repeat is the one least disturbed by other load. options: as in `by_turns`.
  """
  workers: dict[str, Worker] = {}
  working: dict[str, dict[str, Any]] = {}
  with contextlib.ExitStack() as stack:
    for setting in map(dict, settings):
      try:
        worker = stack.enter_context(start(case, setting))
        worker()
      except RuntimeError as error:
        print(f"{case}: transformers with {name_of(setting)} does not run here: {error}", file=log, flush=True)
      else:
        workers[name_of(setting)], working[name_of(setting)] = worker, setting
    if not workers:
      raise RuntimeError(f"transformers runs {case} in none of its settings; see the tracebacks above.")
    timings = dict(zip(workers, by_turns(list(workers.values()), **options), strict=True))
  for name, timing in timings.items():
    rate, cpu = timing.rate(workers[name].tokens), timing.median("cpu")
    print(f"{case}: transformers with {name}: {rate}, {cpu:.2f} CPU seconds", file=log, flush=True)
  return working[min(timings, key=lambda name: timings[name].best())]


def main() -> None:
  parser = argparse.ArgumentParser(description="Times every setting of transformers, three together.")
  parser.add_argument("--only", default=",".join(CASES), help=f"comma-separated: {','.join(CASES)}")
  parser.add_argument("--repeats", type=int, default=5)
  options = parser.parse_args()
  for case in options.only.split(","):
    settings = [{**setting, "wait": "active"} for setting in all_settings(case)]
    keywords = {"repeats": options.repeats, "log": sys.stdout}
    best = [trial(case, settings[first : first + 3], **keywords) for first in range(0, len(settings), 3)]
    print(f"{case}: fastest: {name_of(trial(case, best, **keywords))}", flush=True)


if __name__ == "__main__":
  main()
