"""RL with a remote engine: it samples with the weights of the step, and its log-probs agree with the trainer's."""

import functools
import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.setup.build import build, build_collector, build_update, optimizers
from experiments.setup.config_flags import read_config
from experiments.setup.weight_sync import write_weights
from models.huggingface.checkpoint import load_pretrained
from models.policy import build_policy
from rspo_jax.rl_step import rl_step
from rspo_jax.rollout.sampling import sample
from rspo_jax.rollout.token_sampling import SamplingOptions
from rspo_jax.training.state import init_state
from tests.support.configs import SETTINGS, changed
from tests.support.documents import FLAG, resolve
from tests.support.engine_server import EngineServer
from tests.support.paths import DOCS

PROMPT = 24


class Served:
  """A policy behind an engine: loads what is published, draws each completion with its seed."""

  def __init__(self, config):
    self.policy = build_policy(config.model)
    self.loaded: list = []
    self._options = SamplingOptions(config.sampling.max_new_tokens, stop_ids=(0,), record_experts=True)
    self._lock = threading.Lock()

  def update(self, body):
    self.loaded.append(load_pretrained(body["model_path"])[1])

  @functools.cached_property
  def _run(self):
    return jax.jit(functools.partial(sample, self.policy, options=self._options))

  def complete(self, body):
    ids = body["prompt"]
    tokens = np.zeros((1, PROMPT), np.int32)
    tokens[0, -len(ids) :] = ids
    valid = np.arange(PROMPT)[None] >= PROMPT - len(ids)
    with self._lock:
      drawn = jax.device_get(self._run(self.loaded[-1], tokens, jnp.asarray(valid), jax.random.key(body["seed"])))
    (mask,), (inside,) = drawn.action_mask, drawn.valid
    return drawn.tokens[0][mask].tolist(), drawn.log_prob[0][mask].tolist(), drawn.expert_index[0][inside][1:]


def make_config(tmp_path_factory, url, **keys):
  given = {
    key.replace(".", "__"): value
    for key, value in SETTINGS.items()
    if key.startswith(("model.", "data.", "rl.minib", "sampling.samples"))
  }
  given |= {
    "collector__prompts": 8,
    "data__data_dir": str(tmp_path_factory.getbasetemp() / "data"),
    "runtime__mesh": {"data": 8},
    "warm_start__batch_size": 8,
    "mismatch__correction": "tis",
    "loss__replay": "sampler",
    "loss__entropy_coefficient": 0.1,  # random answers earn nothing, and would teach nothing
    "engine__urls": url,
    "engine__folder": str(tmp_path_factory.mktemp("published") / "weights"),
  }
  return read_config(changed(**given | keys))


def test_two_steps_of_rl_draw_with_the_weights_of_each_and_agree_with_the_trainer(tmp_path_factory):
  with EngineServer(lambda body: None, experts_as="bare") as engine:
    config = make_config(tmp_path_factory, engine.url)
    served = Served(config)
    engine.complete, engine.update = served.complete, served.update
    components = build(config)
    optimizer, _ = optimizers(config)["rl"]
    collector, functions = build_collector(components), build_update(components, optimizer)
    step = functools.partial(rl_step, collector=collector, functions=functions)
    state = init_state(components.policy, optimizer, 0, components.layout)
    for number in range(2):
      before = jax.device_get(state.params)
      state, metrics = step(state, number)
      assert len(served.loaded) == number + 1  # published once a step
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(served.loaded[-1]), before)
      assert metrics["mismatch/weight_mean"] == pytest.approx(1.0, abs=1e-4)
    asked = [path for path, _ in engine.requests]
    assert asked.count("/v1/completions") == 2 * 8 * 2 and asked[0] == "/update_weights_from_disk"
    assert not np.array_equal(served.loaded[0]["embedding"], served.loaded[1]["embedding"])
    # An engine with other weights is seen.
    engine.update = lambda body: served.loaded.append(jax.tree.map(lambda leaf: leaf * 1.2, served.loaded[-1]))
    _, metrics = step(state, 2)
    assert abs(metrics["mismatch/weight_mean"] - 1.0) > 1e-3


def test_weights_are_written_over_the_old_ones_and_other_files_stay(tmp_path_factory):
  config = make_config(tmp_path_factory, "http://127.0.0.1:1")
  params = jax.jit(build_policy(config.model).init)(jax.random.key(0))
  folder = write_weights(config.engine.folder, config.model, params, ())
  (folder / "notes.txt").write_text("mine")
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  assert write_weights(config.engine.folder, config.model, other, ()) == folder
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(load_pretrained(folder)[1]), other)
  assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_the_model_that_the_run_began_with_is_not_overwritten(tmp_path_factory):
  folder = tmp_path_factory.mktemp("source")
  (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
  config = make_config(tmp_path_factory, "http://127.0.0.1:1", pretrained=str(folder), engine__folder=str(folder))
  with pytest.raises(ValueError, match="the folder that the model comes from"):
    write_weights(config.engine.folder, config.model, {}, (config.pretrained, config.tokenizer))


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"engine__kind": "tgi"}, "config.engine.kind is 'tgi'; want one of sglang, vllm"),
    ({"engine__folder": ""}, "config.engine.folder is ''; name a folder"),
    ({"sampling__rows": 8}, "rows are our own sampler's"),
    ({"sampling__temperature": 0.7}, "compares log-probabilities at temperature 1"),
  ],
)
def test_settings_that_cannot_work_together_are_refused(tmp_path_factory, keys, message):
  with pytest.raises(ValueError, match=message):
    make_config(tmp_path_factory, "http://127.0.0.1:1", **keys)


def test_the_flags_of_the_document_exist():
  text = (DOCS / "remote_engine.md").read_text()
  flags = re.findall(FLAG, text)
  assert len(flags) >= 8
  for path, _ in flags:
    resolve(path)
