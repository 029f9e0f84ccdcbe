"""Models from one form to another.

    python -m experiments.convert inspect Qwen3-30B-A3B
    python -m experiments.convert inspect path/to/checkpoint
    python -m experiments.convert to-orbax path/to/checkpoint path/to/orbax
    python -m experiments.convert to-hf runs/countdown_tiny path/to/new
    python -m experiments.convert upcycle path/to/dense path/to/moe --experts=8 --experts-per-token=2
    python -m experiments.convert adapter runs/with_lora path/to/adapter
    python -m experiments.convert merge path/to/checkpoint path/to/merged --adapter=path/to/adapter

A source is a Hugging Face folder, a folder that `to-orbax` made, or the workdir of a run; sources are never changed,
and a target must be new.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from experiments.reporting.progress import table
from experiments.setup.model_files import Model, kind_of, load_model, read_base, read_model, save_orbax, saved_dtype
from models import lora
from models.config import TransformerConfig
from models.huggingface.adapter import load_adapter, read_adapter_config, save_adapter
from models.huggingface.checkpoint import DTYPES, TensorFiles, save_pretrained
from models.huggingface.known_configs import PUBLISHED, known_config
from models.huggingface.quantized import Dequantized
from models.huggingface.tensor_map import array_shape, arrays, check_tensors
from models.upcycle import upcycle


def sizes(config: TransformerConfig) -> dict[str, int]:
  """Numbers of parameters by part of the model, and of those that one token meets ("active")."""
  found = dict.fromkeys(("embedding and head", "attention", "routed experts", "shared experts and dense MLPs"), 0)
  found |= {"routers": 0, "norms": 0}
  for path, slots in arrays(config).items():
    found[_part(path)] += int(np.prod(array_shape(slots)))
  total = sum(found.values())
  routed = found["routed experts"]
  active = total - routed + routed * config.num_experts_per_tok // config.num_experts
  return found | {"total": total, "active": active}


def _part(path: tuple[str, ...]) -> str:
  if "moe" in path:
    if path[-1].startswith("router"):
      return "routers"
    return "shared experts and dense MLPs" if path[-1] == "shared_gate" or "shared" in path else "routed experts"
  if "attention" in path:
    return "attention"
  if "mlp" in path:
    return "shared experts and dense MLPs"
  return "norms" if path[-1] == "scale" else "embedding and head"


def inspect(source: str) -> None:
  """Prints what a model is made of. source: a folder, or the name of a public model (no weights are needed)."""
  config = known_config(source) if source in PUBLISHED else read_model(source)
  if source not in PUBLISHED and kind_of(source) == "hf" and any(Path(source).glob("*.safetensors")):
    files = TensorFiles(source)
    check_tensors(config, Dequantized(files, files.shapes).shapes)
  found = sizes(config)
  total = found["total"]
  table(f"{source}: {config.model_type}", ("part", "parameters", "share"), [
    (name, f"{count:,}", f"{count / total:.1%}") for name, count in found.items()
  ])  # fmt: skip
  groups = f", in {config.topk_group} of {config.n_group} groups" if config.n_group > 1 else ""
  routed = f"{config.num_experts}, {config.num_experts_per_tok} a token{groups}"
  heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.qk_head_dim}"
  table("shape", ("", ""), [
    ("layers", f"{config.num_hidden_layers}, {config.num_moe_layers} with experts"),
    ("experts", "one, no router" if config.is_dense else routed),
    ("width of model, expert", f"{config.hidden_size}, {config.moe_intermediate_size}"),
    ("attention heads", f"{heads}, latent {config.kv_lora_rank}" if config.kv_lora_rank else heads),
    ("vocabulary", f"{config.vocab_size}"),
    ("key/value cache", f"{_cache_bytes(config):,} bytes a token in bfloat16"),
    ("routing trace", f"{3 * config.num_moe_layers * config.num_experts_per_tok:,} bytes a token"),
  ])  # fmt: skip
  table("memory", ("", ""), [
    ("weights in bfloat16", decimal(2 * total)),
    ("weights in float32", decimal(4 * total)),
    ("training: float32 weights, gradients, two Adam moments", decimal(16 * total)),
  ])  # fmt: skip


def _cache_bytes(config: TransformerConfig) -> int:
  latent = config.kv_lora_rank + config.qk_rope_head_dim
  plain = 2 * config.num_key_value_heads * config.head_dim
  return 2 * config.num_hidden_layers * (latent if config.kv_lora_rank else plain)


def convert(
  source: str,
  target: str,
  *,
  form: str = "hf",
  dtype: str | None = None,
  files: str | None = None,
  change: Callable[[Model], Model] = lambda model: model,
) -> None:
  """Reads a model, changes it, and writes it as "hf" or "orbax".

  Args:
    dtype: of what is written; None keeps the source's.
    files: folder whose tokenizer and other small files come along; None: the source, if it has some.
  """
  if Path(target).exists() and any(Path(target).iterdir()):
    raise ValueError(f"{target} is not empty; name a new folder.")
  kind, saved = kind_of(source), saved_dtype(source)
  dtype = dtype or saved
  with _bar("reading", sizes(read_model(source))["total"] * itemsize(saved)) as done:
    model = change(load_model(source, dtype=saved, progress=done))
  if form == "hf":
    model = Model(*lora.merge_lora(*model))
  count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
  with _bar("writing", count * itemsize(dtype)) as done:
    if form == "hf":
      small = files or (source if kind == "hf" else None)
      save_pretrained(target, *model, source=small, dtype=dtype, progress=done)
    else:
      cast = jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), model.params)
      save_orbax(target, model._replace(params=cast))
      done(count * itemsize(dtype))
  print(f"{target}: {count:,} parameters, {dtype}, {form}")


def itemsize(dtype: str) -> int:
  return np.dtype(DTYPES[dtype]).itemsize


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
  """A progress bar over bytes; yields what is told how many more are done."""
  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  with Progress(*columns) as progress:
    task = progress.add_task(what, total=total)
    yield lambda done: progress.advance(task, done)


def _upcycled(args: argparse.Namespace) -> Callable[[Model], Model]:
  def change(model: Model) -> Model:
    key = jax.random.key(args.seed)
    made = upcycle(*model, key, num_experts=args.experts, num_experts_per_tok=args.experts_per_token, noise=args.noise)
    return Model(*made)

  return change


def _with_adapter(folder: str) -> Callable[[Model], Model]:
  def change(model: Model) -> Model:
    config = dataclasses.replace(model.config, lora=read_adapter_config(folder, model.config))
    return Model(config, load_adapter(folder, config, model.params))

  return change


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m experiments.convert", description=__doc__.split("\n")[0][4:])
  commands = parser.add_subparsers(dest="command", required=True)

  def command(name: str, what: str, *, target: bool = True, dtype: bool = True) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=what, description=what)
    made.add_argument("source", help="a Hugging Face folder, an Orbax folder of to-orbax, or a run's workdir")
    if target:
      made.add_argument("target", help="a new folder")
    if target and dtype:
      made.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights written; default: the source's")
    return made

  command("inspect", "Parameters by part, experts, memory. Also takes the name of a public model.", target=False)
  command("to-orbax", "Writes an Orbax checkpoint.")
  to_hf = command("to-hf", "Writes a Hugging Face folder; adapters are merged.")
  to_hf.add_argument("--files", help="folder whose tokenizer and other small files come along")
  made = command("upcycle", "Makes a mixture of experts of a dense model, as a Hugging Face folder.")
  made.add_argument("--experts", type=int, required=True, help="experts of every layer")
  made.add_argument("--experts-per-token", type=int, required=True)
  made.add_argument("--noise", type=float, default=0.0, help="on the copies, as a share of each matrix's deviation")
  made.add_argument("--seed", type=int, default=0)
  command("adapter", "Writes the adapters of a run in PEFT's layout.", dtype=False)
  merge = command("merge", "Merges an adapter in PEFT's layout into its base model.")
  merge.add_argument("--adapter", required=True, help="folder with adapter_config.json")
  return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
  if args.command == "inspect":
    inspect(args.source)
  elif args.command == "to-orbax":
    convert(args.source, args.target, form="orbax", dtype=args.dtype)
  elif args.command == "to-hf":
    convert(args.source, args.target, dtype=args.dtype, files=args.files)
  elif args.command == "upcycle":
    convert(args.source, args.target, dtype=args.dtype, change=_upcycled(args))
  elif args.command == "adapter":
    model = load_model(args.source)
    save_adapter(args.target, *model, base=read_base(args.source))
  else:
    convert(args.source, args.target, dtype=args.dtype, change=_with_adapter(args.adapter))


if __name__ == "__main__":
  try:
    run(parse())
  except ValueError as error:
    sys.exit(f"error: {error}")
