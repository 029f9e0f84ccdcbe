"""Converts models between checkpoint formats, upcycles them, merges adapters into them, or inspects them.

    python -m experiments.convert inspect Qwen3-30B-A3B
    python -m experiments.convert inspect path/to/checkpoint
    python -m experiments.convert to-orbax path/to/checkpoint path/to/orbax
    python -m experiments.convert to-hf runs/countdown_tiny path/to/new
    python -m experiments.convert upcycle path/to/dense path/to/moe --experts=8 --experts-per-token=2
    python -m experiments.convert adapter runs/with_lora path/to/adapter
    python -m experiments.convert merge path/to/checkpoint path/to/merged --adapter=path/to/adapter

A source is a Hugging Face folder, an Orbax folder written by `to-orbax`, or the workdir of a run. Sources are never
changed. A target must be a new or empty folder.
"""

import argparse
import dataclasses
import math
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
from models import TransformerConfig, merge_lora
from models.huggingface import (
  PUBLISHED,
  known_config,
  load_adapter,
  read_adapter_config,
  save_adapter,
  save_pretrained,
)
from models.huggingface.checkpoint import DTYPES
from models.huggingface.parameters import check_tensors
from models.huggingface.quantized import Dequantized
from models.huggingface.tensor_files import TensorFiles
from models.huggingface.tensor_map import param_shape, param_slices
from models.upcycle import upcycle

PARTS = ("embedding and head", "attention", "routed experts", "shared experts and dense MLPs", "routers", "norms")


def parameter_counts(config: TransformerConfig) -> dict[str, int]:
  """Numbers of parameters: of each of `PARTS`, in "total", and "active", those used for one token."""
  counts = dict.fromkeys(PARTS, 0)
  for path, slices in param_slices(config).items():
    counts[_part(path)] += math.prod(param_shape(slices))
  total, routed = sum(counts.values()), counts["routed experts"]
  active = total - routed + routed * config.num_experts_per_tok // config.num_experts
  return counts | {"total": total, "active": active}


def _part(path: tuple[str, ...]) -> str:
  """The part of the model that the parameter at a path belongs to."""
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
  """Prints a model's parameter counts, shape and memory.

  Args:
    source: a folder, or the name of a public model. Weights are not needed; if there are some, their names and shapes
      are checked.
  """
  config = known_config(source) if source in PUBLISHED else read_model(source)
  if source not in PUBLISHED and kind_of(source) == "hf" and any(Path(source).glob("*.safetensors")):
    files = TensorFiles(source)
    check_tensors(config, Dequantized(files, files.shapes).shapes)
  counts = parameter_counts(config)
  total = counts["total"]
  table(f"{source}: {config.model_type}", ("part", "parameters", "share"), [
    (name, f"{count:,}", f"{count / total:.1%}") for name, count in counts.items()
  ])  # fmt: skip
  groups = f", from {config.topk_group} of {config.n_group} groups" if config.n_group > 1 else ""
  routed = f"{config.num_experts}, {config.num_experts_per_tok} per token{groups}"
  heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, width {config.qk_head_dim}"
  table("shape", ("", ""), [
    ("layers", f"{config.num_hidden_layers}, {config.num_moe_layers} with experts"),
    ("experts", "1, no router" if config.is_dense else routed),
    ("width of model and expert", f"{config.hidden_size}, {config.moe_intermediate_size}"),
    ("attention heads", f"{heads}, latent {config.kv_lora_rank}" if config.kv_lora_rank else heads),
    ("vocabulary", f"{config.vocab_size}"),
    ("key/value cache", f"{_cache_bytes(config):,} bytes per token in bfloat16"),
    ("routing trace", f"{3 * config.num_moe_layers * config.num_experts_per_tok:,} bytes per token"),
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
  """Loads a model, applies `change`, and writes it.

  Args:
    source, target: folders; the target must be new or empty.
    form: "hf" (adapters are merged) or "orbax".
    dtype: of the written weights; None keeps that of the source.
    files: folder whose tokenizer and other small files are copied; None is the source, if it is a Hugging Face folder.
  """
  if Path(target).exists() and any(Path(target).iterdir()):
    raise ValueError(f"{target} is not empty; name a new folder.")
  kind, saved = kind_of(source), saved_dtype(source)
  dtype = dtype or saved
  with _progress_bar("reading", parameter_counts(read_model(source))["total"] * itemsize(saved)) as advance:
    model = change(load_model(source, dtype=saved, progress=advance))
  if form == "hf":
    model = Model(*merge_lora(*model))
  count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
  with _progress_bar("writing", count * itemsize(dtype)) as advance:
    if form == "hf":
      files = files or (source if kind == "hf" else None)
      save_pretrained(target, *model, source=files, dtype=dtype, progress=advance)
    else:
      cast = jax.tree.map(lambda leaf: leaf.astype(DTYPES[dtype]), model.params)
      save_orbax(target, model._replace(params=cast))
      advance(count * itemsize(dtype))
  print(f"{target}: {count:,} parameters, {dtype}, {form}")


def itemsize(dtype: str) -> int:
  """Bytes of one number of this dtype, a key of `DTYPES`."""
  return np.dtype(DTYPES[dtype]).itemsize


@contextmanager
def _progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
  """A progress bar over `total` bytes; yields a function that advances it by a number of bytes."""
  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  with Progress(*columns) as progress:
    task = progress.add_task(title, total=total)
    yield lambda count: progress.advance(task, count)


def _upcycle(args: argparse.Namespace) -> Callable[[Model], Model]:
  def change(model: Model) -> Model:
    key = jax.random.key(args.seed)
    counts = {"num_experts": args.experts, "num_experts_per_tok": args.experts_per_token}
    return Model(*upcycle(*model, key, **counts, noise=args.noise))

  return change


def _add_adapter(folder: str) -> Callable[[Model], Model]:
  def change(model: Model) -> Model:
    config = dataclasses.replace(model.config, lora=read_adapter_config(folder, model.config))
    return Model(config, load_adapter(folder, config, model.params))

  return change


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m experiments.convert", description=__doc__.split("\n")[0])
  commands = parser.add_subparsers(dest="command", required=True)

  def command(name: str, help: str, *, target: bool = True, dtype: bool = True) -> argparse.ArgumentParser:
    subparser = commands.add_parser(name, help=help, description=help)
    subparser.add_argument("source", help="a Hugging Face folder, an Orbax folder of to-orbax, or a run's workdir")
    if target:
      subparser.add_argument("target", help="a new folder")
    if target and dtype:
      subparser.add_argument("--dtype", choices=tuple(DTYPES), help="of the written weights (default: as the source)")
    return subparser

  command("inspect", "Prints parameter counts, shape and memory; also for the name of a public model.", target=False)
  command("to-orbax", "Writes an Orbax checkpoint.")
  to_hf = command("to-hf", "Writes a Hugging Face folder, with adapters merged.")
  to_hf.add_argument("--files", help="folder whose tokenizer and other small files are copied")
  to_moe = command("upcycle", "Upcycles a dense model to a mixture of experts, as a Hugging Face folder.")
  to_moe.add_argument("--experts", type=int, required=True, help="experts per layer")
  to_moe.add_argument("--experts-per-token", type=int, required=True, help="experts selected for each token")
  to_moe.add_argument("--noise", type=float, default=0.0, help="on the copies, relative to each matrix's deviation")
  to_moe.add_argument("--seed", type=int, default=0, help="of the router and the noise")
  command("adapter", "Writes the adapters of a run in PEFT's format.", dtype=False)
  merge = command("merge", "Merges an adapter in PEFT's format into its base model.")
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
    convert(args.source, args.target, dtype=args.dtype, change=_upcycle(args))
  elif args.command == "adapter":
    model = load_model(args.source)
    save_adapter(args.target, *model, base=read_base(args.source))
  else:
    convert(args.source, args.target, dtype=args.dtype, change=_add_adapter(args.adapter))


if __name__ == "__main__":
  try:
    run(parse())
  except ValueError as error:
    sys.exit(f"error: {error}")
