"""What a training will take, before it is started: memory, hours and disk, on one GPU or on several (parallel.py).

Arithmetic from stated assumptions, not a measurement. Bytes are decimal: 1 GB = 10^9.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sae_hooks.errors import TrainingError
from sae_hooks.kernels.tiles import GPU_SIZE, GPU_TOKENS
from sae_hooks.sites import layers_path, resolve, text_config, width

from .codes import dense_from
from .harvest import TOKENS_PER_BATCH
from .objectives import TopK
from .recipes import Recipe

FLOAT, BF16 = 4, 2  # bytes
DENSE_TENSORS = 6  # (batch, d_sae), alive at once in the dense form
DENSE_PASSES = 20  # over (batch, d_sae), read or written, in the dense form
ENCODER_PASSES = 3  # over (batch, d_sae) in the sparse form: products written, compared, their mask scanned
DECODER_PASSES = 12  # over W_dec: its gradient's projection (9), its norms and their division (3)
ADAM_BYTES = 28  # a weight: reads it, its gradient and two moments (16), writes it and the moments (12)
ROW_ADAM_BYTES = 16  # a weight, by rows: reads it and its second moment and writes both, all features being active
PRE_BIAS_BYTES = 8  # an encoder weight: read for b_dec W_enc, and for b_dec's gradient
OUTER_BYTES = 8  # an encoder weight, in the dense form: that bias's outer product is written, read and added
PAIR_BYTES = 40  # a pair of token and feature: indices, pre-activation, gradients, the order by feature
HELD = 2.0  # pairs held for each that is active: the kernel's window, and those just below
UNKNOWN_L0 = 60.0  # where the recipe has a coefficient instead of a target
CHECKPOINTS = 3  # two are kept, and a third is being written


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU, and what share of its peaks is assumed to be reached.

    memory: bytes. bf16_flops, tf32_flops: peak of dense products, a second; the language model's are in bf16, the SAE's
    if the recipe says so. bandwidth: of its memory, link: of an all-reduce among such GPUs, bytes a second.
    """

    name: str
    memory: float
    bf16_flops: float
    tf32_flops: float
    bandwidth: float
    link: float
    model_share: float = 0.40
    sae_share: float = 0.70
    bandwidth_share: float = 0.80


H100 = Machine(name="H100", memory=80e9, bf16_flops=989e12, tf32_flops=494e12, bandwidth=3.35e12, link=400e9)


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """The language model's part: parameters in memory, FLOP of a token's forward pass as deep as the sites, and bytes
    that a token of a forward pass takes for a while. places: (d_in, d_out) of each SAE's sites, widths: d of each site
    that is read."""

    parameters: int
    flops: float
    working: float
    places: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]


def model_cost(model: nn.Module, places: Sequence[tuple[str, str]], context: int) -> ModelCost:
    """Of SAEs at places (site, site_out) of a model, whose weights may be on "meta": shapes and config are all that is
    read.

    FLOP a token: 2 a weight of the matrices in the layers up to the deepest site, and 4 * heads * head_dim * context a
    layer for its attention, which computes all pairs. Experts count as if each token went through all of them. Raises
    SiteError for a site that it has not, TrainingError where a width is not to be told without a forward pass.
    """
    config, depth = text_config(model), _depth(model, [site for place in places for site in place])
    layers: nn.ModuleList = model.get_submodule(layers_path(model))  # type: ignore[assignment]
    weights = sum(p.numel() for layer in layers[:depth] for p in layer.parameters() if p.ndim > 1)
    heads = config.num_attention_heads
    inner = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    sizes = {site: _width(model, site) for place in places for site in place}
    return ModelCost(
        parameters=sum(p.numel() for p in model.parameters()), flops=2 * weights + 4 * inner * context * depth,
        working=working_bytes(config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size), heads,
                              context),
        places=tuple((sizes[a], sizes[b]) for a, b in places), widths=tuple(sizes.values()))


def gated_decoder_cost(*, layers: int, d_model: int, d_mlp: int, heads: int, kv_heads: int, head_dim: int,
                       vocabulary: int, layer: int, context: int, saes: int = 1, norms: int = 4) -> ModelCost:
    """The same from numbers alone, for SAEs on the residual stream after `layer` of a decoder with gated MLPs, tied
    embeddings and `norms` norms a layer (Gemma 2: 4, Llama: 2).

    A layer's matrices: 2 d_model (heads + kv_heads) head_dim + 3 d_model d_mlp.
    """
    matrices = 2 * d_model * (heads + kv_heads) * head_dim + 3 * d_model * d_mlp
    parameters = vocabulary * d_model + layers * (matrices + norms * d_model) + d_model
    flops = (layer + 1) * (2 * matrices + 4 * heads * head_dim * context)
    return ModelCost(parameters=parameters, flops=flops, working=working_bytes(d_model, d_mlp, heads, context),
                     places=((d_model, d_model),) * saes, widths=(d_model,))


def working_bytes(d_model: int, d_mlp: int, heads: int, context: int) -> float:
    """A token of a forward pass in bf16, one layer at a time: 8 tensors of d_model, 3 of d_mlp, and the scores of eager
    attention, in bf16 and twice in float32."""
    return BF16 * (8 * d_model + 3 * d_mlp) + heads * context * (BF16 + 2 * FLOAT)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found. Memory in bytes of one GPU, by what it is for, disk in bytes in all, host in bytes of the
    memory of the host or hosts; times of all tokens in hours, of one step of all SAEs in milliseconds. l0s: of each of
    cost.places, the L0 that was reckoned with."""

    machine: Machine
    gpus: int
    shards: int
    recipe: Recipe
    cost: ModelCost
    l0s: tuple[float, ...]
    model_hours: float
    sae_hours: float
    step_ms: float
    dense_step_ms: float
    memory: Mapping[str, float]
    host: float
    disk: Mapping[str, float]

    @property
    def hours(self) -> float:
        """Language model and SAEs one after the other."""
        return self.model_hours + self.sae_hours

    @property
    def fits(self) -> bool:
        """Whether the memory of one GPU suffices."""
        return sum(self.memory.values()) <= self.machine.memory


def aimed_at(recipe: Recipe) -> float:
    """The features active on a token that a recipe names, or else UNKNOWN_L0."""
    return float(getattr(recipe.objective, "l0", None) or getattr(recipe.objective, "k", None) or UNKNOWN_L0)


def possible(recipe: Recipe, gpus: int, shards: int) -> bool:
    """Whether so many processes can train by a recipe: rows and features come out even, and may be split at all."""
    splits = shards == 1 or (recipe.objective.shardable and recipe.d_sae % shards == 0)
    return gpus % shards == 0 and recipe.batch_size % gpus == 0 and splits


def plan(recipe: Recipe, cost: ModelCost, *, l0s: Sequence[float] | None = None, gpus: int = 1, shards: int = 1,
         machine: Machine = H100, cache_tokens: int | None = None) -> Plan:
    """What it takes to train an SAE of recipe at each of cost.places, on one stream, with a process a GPU.

    l0s: of each of cost.places, where it is not the recipe's. `shards` of the processes share the features, and gpus /
    shards groups of them the batches. Each holds the whole language model and runs it on 1 / gpus of the tokens; the
    processes of a group exchange the rows (parallel.part). cache_tokens: how many are harvested to disk first, and read
    again if the training is longer; None: a live stream. Raises TrainingError where it is not `possible`.
    """
    if gpus < 1 or shards < 1 or not possible(recipe, gpus, shards):
        raise TrainingError(f"{gpus} processes, of which {shards} share the features, cannot train batches of "
                            f"{recipe.batch_size:,} and {recipe.d_sae:,} features by {type(recipe.objective).__name__}")
    l0s = tuple(l0s or [aimed_at(recipe)] * len(cost.places))
    groups = gpus // shards
    steps = [step_seconds(recipe, place, l0, machine, groups, shards)
             for place, l0 in zip(cost.places, l0s, strict=True)]
    harvested = recipe.tokens if cache_tokens is None else cache_tokens
    harvest = harvested * cost.flops / (machine.bf16_flops * machine.model_share) / gpus
    return Plan(
        machine=machine, gpus=gpus, shards=shards, recipe=recipe, cost=cost, l0s=l0s, model_hours=harvest / 3600,
        sae_hours=recipe.steps * sum(sparse for sparse, _ in steps) / 3600,
        step_ms=1e3 * sum(sparse for sparse, _ in steps), dense_step_ms=1e3 * sum(dense for _, dense in steps),
        memory=memory(recipe, cost, max(l0s), groups, shards), disk=disk(recipe, cost, cache_tokens),
        host=0.0 if cache_tokens is not None else _rows(recipe.buffer_tokens, cost))


def step_seconds(recipe: Recipe, place: tuple[int, int], l0: float, machine: Machine = H100, groups: int = 1,
                 shards: int = 1) -> tuple[float, float]:
    """(sparse form, dense form) of one step, forward, backward and Adam, of d_sae / shards features on batch / groups
    rows.

    Both: the larger of each product's FLOP, 2 rows features d, and the bytes of its matrix, once for each GPU_TOKENS of
    rows in the sparse form; then bytes that are moved: gradients written, DECODER_PASSES, ADAM_BYTES, PRE_BIAS_BYTES.
    Adam by rows: ROW_ADAM_BYTES in their place, in the dense form with gradients written and read. Sparse: the
    encoder's product alone, ENCODER_PASSES, and 4 gathers of HELD * l0 * rows / shards rows of d (decode and its
    backward, two gradients), all but the first in bfloat16, if the recipe says so. Dense: 5 products, DENSE_PASSES and
    OUTER_BYTES. All-reduces, in float32, of n bytes among p GPUs move 2 n (p - 1) / p: (rows, d_out) among shards, the
    gradients among groups; (rows, d_in) is gathered among shards, half as many.
    """
    (d_in, d_out), rows, features = place, recipe.batch_size / groups, recipe.d_sae / shards
    peak = machine.bf16_flops if recipe.bf16 else machine.tf32_flops
    flops, bandwidth = peak * machine.sae_share, machine.bandwidth * machine.bandwidth_share
    encode = max(2 * rows * features * d_in / flops, math.ceil(rows / GPU_TOKENS) * FLOAT * d_in * features / bandwidth)
    products = 2 * rows * features * (2 * d_in + 3 * d_out) / flops
    weights = features * (d_in + d_out)
    whole = weights * (FLOAT + ADAM_BYTES) + DECODER_PASSES * FLOAT * d_out * features * recipe.objective.unit_decoder
    by_rows = moved_by_rows(recipe, groups)
    bias = d_in * features * recipe.objective.pre_bias
    update = (weights * ROW_ADAM_BYTES if by_rows else whole) + PRE_BIAS_BYTES * bias
    dense_update = update + OUTER_BYTES * bias + weights * 2 * FLOAT * by_rows
    gathers = HELD * l0 * rows / shards * (FLOAT * d_out + (BF16 if recipe.bf16 else FLOAT) * (d_in + 2 * d_out))
    shared = rows * (d_out + d_in / 2) * (shards - 1) / shards
    reduce = 2 * FLOAT / machine.link * (shared + weights * (groups - 1) / groups)
    passes = FLOAT * rows * features
    sparse = encode + (ENCODER_PASSES * passes + gathers + update) / bandwidth + reduce
    return sparse, products + (DENSE_PASSES * passes + dense_update) / bandwidth + reduce


def moved_by_rows(recipe: Recipe, groups: int = 1) -> bool:
    """Whether a GPU's training takes Adam by rows (row_adam.py)."""
    return recipe.betas[0] == 0 and recipe.clip is None and groups == 1


def memory(recipe: Recipe, cost: ModelCost, l0: float, groups: int = 1, shards: int = 1) -> dict[str, float]:
    """Bytes of one GPU.

    Language model in bf16, and its working memory for TOKENS_PER_BATCH tokens. Each SAE's weights, gradients and two
    moments of Adam in float32, 16 bytes a weight; by rows one moment, and gradients only in the dense form. Activations
    of one SAE at a time, in the larger of its forms: dense, DENSE_TENSORS of (rows, features), which TopK's auxiliary
    loss takes, too, at most, where nearly all features are dead; sparse, PAIR_BYTES a pair and 3 tensors of (rows,
    features), or of GPU_SIZE numbers; and 6 of the rows themselves. Temporary: two more of W_dec's size while it is
    projected, if not by rows.
    """
    features, d_in, d_out = recipe.d_sae / shards, *(max(sizes) for sizes in zip(*cost.places, strict=True))
    weights = sum(features * (a + b + 2) + b for a, b in cost.places)
    rows, moments = 6 * FLOAT * recipe.batch_size / groups * (d_in + d_out), 1 if moved_by_rows(recipe, groups) else 2
    return {"language model": BF16 * cost.parameters, "its forward pass": cost.working * TOKENS_PER_BATCH,
            "SAE weights": FLOAT * weights, "gradients": FLOAT * weights, "Adam": moments * FLOAT * weights,
            "activations": max(activation_bytes(recipe, l0, groups, shards)) + rows,
            "temporary": 2 * FLOAT * features * d_out * (moments == 2)}


def activation_bytes(recipe: Recipe, l0: float, groups: int = 1, shards: int = 1) -> tuple[float, float]:
    """(dense form, sparse form) of one SAE's features on a batch; see `memory`."""
    features, rows = recipe.d_sae / shards, recipe.batch_size / groups
    pairs = HELD * l0 * rows / shards
    return DENSE_TENSORS * FLOAT * rows * features, PAIR_BYTES * pairs + 3 * FLOAT * min(rows * features, GPU_SIZE)


def disk(recipe: Recipe, cost: ModelCost, cache_tokens: int | None = None) -> dict[str, float]:
    """Bytes: CHECKPOINTS of weights and moments, 12 bytes a weight at most, with the unread rows of a live stream's
    buffer; the SAEs that come out; cache_tokens activations in bf16."""
    weights = sum(recipe.d_sae * (a + b + 2) + b for a, b in cost.places)
    buffer = 0.0 if cache_tokens is not None else _rows(recipe.buffer_tokens, cost)
    found = {"checkpoints, at most": CHECKPOINTS * (3.0 * FLOAT * weights + buffer), "finished SAEs": FLOAT * weights}
    return found if cache_tokens is None else {**found, "cached activations": _rows(cache_tokens, cost)}


def describe(plans: Sequence[Plan]) -> str:
    """Plans of the same training on different numbers of GPUs, as a table with what was assumed."""
    first = plans[0]
    cells = [["", *(f"{p.gpus} x {p.machine.name}" for p in plans)], ["--shards", *(str(p.shards) for p in plans)]]
    rows = {
        "hours": [_hours(p.hours) for p in plans],
        "  language model, to the deepest site": [_hours(p.model_hours) for p in plans],
        "  SAE steps": [_hours(p.sae_hours) for p in plans],
        "one step, sparse / dense form (ms)": [f"{p.step_ms:,.1f} / {p.dense_step_ms:,.1f}" for p in plans],
        "memory of one GPU (GB)": [f"{sum(p.memory.values()) / 1e9:,.1f}{'' if p.fits else ': too much'}"
                                   for p in plans],
        **{f"  {name}": [_gb(p.memory[name]) for p in plans] for name in first.memory},
        "memory of the hosts: shuffle buffers (GB)": [_gb(p.host) for p in plans],
        "disk (GB)": [_gb(sum(p.disk.values())) for p in plans],
        **{f"  {name}": [_gb(p.disk[name]) for p in plans] for name in first.disk}}
    cells += [[name, *found] for name, found in rows.items()]
    left, right = (max(len(row[i]) for row in cells) for i in (0, -1))
    table = "\n".join(row[0].ljust(left) + "".join(cell.rjust(right + 3) for cell in row[1:]) for row in cells)
    return f"{_headline(first)}\n\n{table}\n\n{_assumptions(first)}"


def _headline(p: Plan) -> str:
    shapes = ", ".join(f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in sorted(set(p.cost.places)))
    return (f"{len(p.cost.places)} x {p.recipe.d_sae:,} features for {shapes} values; {p.recipe.tokens:,} tokens in "
            f"{p.recipe.steps:,} steps of {p.recipe.batch_size:,}")


def _assumptions(p: Plan) -> str:
    m, cost = p.machine, p.cost
    l0s = ", ".join(f"{l0:g}" for l0 in dict.fromkeys(p.l0s))
    kind, peak = ("bf16", m.bf16_flops) if p.recipe.bf16 else ("TF32", m.tf32_flops)
    dense = (f"Steps are dense while more than {dense_from('cuda', p.recipe.bf16):.1%} of the pairs are held, as at "
             "the start of a training from low thresholds.")
    if isinstance(p.recipe.objective, TopK):
        dense = ("TopK and BatchTopK have no dense form; their auxiliary loss takes up to as much, while nearly all "
                 "features are dead.")
    return textwrap.fill(
        f"Arithmetic, not a measurement. Assumed: the language model ({cost.parameters / 1e9:.2f} G parameters in "
        f"bf16, {cost.flops / 1e9:.2f} GFLOP a token) at {m.model_share:.0%} of {m.bf16_flops / 1e12:.0f} TFLOP/s; "
        f"the SAE's products in {kind} at {m.sae_share:.0%} of {peak / 1e12:.0f}; memory at "
        f"{m.bandwidth_share:.0%} of {m.bandwidth / 1e12:.2f} TB/s; all-reduce at {m.link / 1e9:.0f} GB/s; L0 "
        f"{l0s}, and {HELD:g} pairs held for each that is active; every step in the sparse form. {dense} On "
        f"several GPUs --shards of them share the features and exchange their rows; the language model is whole on "
        f"each.", 100)


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def _gb(value: float) -> str:
    return f"{value / 1e9:,.1f}" if value >= 1e8 else f"{value / 1e9:.3f}"


def _rows(tokens: float, cost: ModelCost) -> float:
    """Bytes of so many activations of every site in bf16."""
    return float(BF16 * tokens * sum(cost.widths))


def _depth(model: nn.Module, sites: Sequence[str]) -> int:
    """How many layers run until the deepest of the sites is met; all of them for a site outside the layers."""
    found: list[int] = []
    path = layers_path(model)
    for site in sites:
        inside = re.match(rf"{re.escape(path)}\.(\d+)(\.|$)", resolve(model, site).path)
        found.append(int(inside[1]) + 1 if inside else len(model.get_submodule(path)))  # type: ignore[arg-type]
    return max(found)


def _width(model: nn.Module, site: str) -> int:
    found = width(model, resolve(model, site))
    if found is None:
        raise TrainingError(f"how wide {site} is cannot be told without a forward pass; plan for another site of the "
                            "same width")
    return found
