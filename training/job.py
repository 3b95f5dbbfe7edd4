"""One training as the command line starts it: recipes at places of a model, a text, a folder for all that comes out.

OUT/training.json        what the training reads; the same command goes on where it stopped
OUT/checkpoints/         its state; may be deleted when it is done
OUT/metrics.jsonl        a line a report
OUT/[SITE/][VARIANT/]    each SAE: cfg.json, sae_weights.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sae_hooks.documents import prefix_ids
from sae_hooks.errors import CheckpointError, DataError, SaeError
from sae_hooks.formats.saelens import CONFIG
from sae_hooks.hub import load_sae
from sae_hooks.hub.parsing import json_bytes, parse_json
from sae_hooks.hub.safe_files import write_atomically
from sae_hooks.identity import sae_digest
from sae_hooks.processes import launched_share
from sae_hooks.sae import SAE
from sae_hooks.sites import alias, resolve

from .assess import FirstTokens, Text
from .learner import Trainee
from .live import LiveStream
from .parallel import ALONE, Parallel, stated
from .recipes import Recipe
from .shards import harvest_infos, write_shards
from .stream import CachedStream, Stream
from .text import Windows
from .trainer import train

RECORD = "training.json"
SHARD_TOKENS = 65_536

Place = tuple[str, str]


def places(model: nn.Module, layers: Sequence[int], sites: Sequence[str]) -> list[Place]:
    """(site, site_out) of every layer and alias, and of every module path, as the model has them.

    Raises SiteError for what the model has not, or an alias without a layer.
    """
    found: list[Place] = []
    for site in sites:
        if "." in site:
            found.append((resolve(model, site).key,) * 2)
        elif not layers:
            raise DataError(f"give --layer with --site {site}, or the site as a module path, such as "
                            "model.layers.3.output")
        else:
            found += [alias(model, layer, site) for layer in layers]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Job:
    """recipes: by variant; they differ in the objective alone. places: (site, site_out). context: tokens of a window.
    cache: a folder to harvest `cache_tokens` tokens into first, or None for a live stream. epochs: how often the text
    may be read (None: as often as needed). skip: transcoders get an affine skip. dtype: the language model's, by which
    its activations differ. weights: `weights_digest` of it, for its name may be that of another one."""

    model_name: str
    recipes: Mapping[str, Recipe]
    places: Sequence[Place]
    text: Text
    out: Path
    context: int
    cache: Path | None = None
    cache_tokens: int = 0
    epochs: int | None = None
    seed: int = 0
    skip: bool = False
    dtype: str | None = None
    weights: str = ""
    data_licence: str | None = None

    def __post_init__(self) -> None:
        """Raises DataError for a skip where there is no transcoder, which alone can have one."""
        if self.skip and all(site == site_out for site, site_out in self.places):
            raise DataError("a skip is for transcoders, and none is to be trained: give such a site, or no skip")

    @property
    def recipe(self) -> Recipe:
        """Any of them, for what is the same in all."""
        return next(iter(self.recipes.values()))

    def trainees(self) -> list[Trainee]:
        """Each recipe at each place, named for its folder."""
        return [recipe.trainee(self.name(place, variant), *place, skip=self.skip and place[0] != place[1],
                               seed=self.seed) for place in self.places for variant, recipe in self.recipes.items()]

    def name(self, place: Place, variant: str) -> str:
        """The folder inside `out`; an SAE that is alone is in `out` itself, and named for its site."""
        parts = [place[0]] * (len(self.places) > 1) + [variant] * (len(self.recipes) > 1)
        return "/".join(parts) or place[0]

    def folder(self, name: str) -> Path:
        """Where an SAE goes."""
        return self.out / name if len(self.places) * len(self.recipes) > 1 else self.out

    def claim(self) -> None:
        """Take `out` for this training. Raises CheckpointError if it holds another one's state, FileExistsError if it
        holds SAEs and no state, DataError if the cache holds anything but a harvest."""
        self._check_cache()
        path, started = self.out / RECORD, any((self.out / "checkpoints").glob("step-*"))
        here = self.record()
        if started and path.exists():
            there = parse_json(path.read_bytes(), str(path))
            if other := [f"{k} was {there[k]!r}, is {v!r}" for k, v in here.items() if there.get(k, v) != v]:
                raise CheckpointError(f"{self.out} holds a training that read something else: {', '.join(other)}. Take "
                                      "another folder, or give the same command to go on with it")
        configs = [self.folder(trainee.name) / CONFIG for trainee in self.trainees()]
        taken = [config for config in configs if config.exists()]
        if taken and not started:
            raise FileExistsError(f"{taken[0]} is there already, and no training to go on with; take another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically({path: json_bytes(here)})

    def _check_cache(self) -> None:
        if self.cache is None or not self.cache.is_dir() or any(self.cache.glob("*/harvest.json")):
            return
        if (self.out / RECORD).exists() and self.out.resolve().is_relative_to(self.cache.resolve()):
            return  # what is there is of this training, which was stopped before it had harvested
        if names := sorted(path.name for path in self.cache.iterdir() if not path.name.startswith(".")):
            raise DataError(f"{self.cache} holds {names[0]}, and no activations: give --cache an empty folder, one "
                            "that is not there, or one that was harvested into")

    def record(self) -> dict[str, Any]:
        """What decides the activations, beside what the streams and the trainer compare themselves."""
        weights = {"model_weights": self.weights} if self.weights else {}
        return {"model": self.model_name, **weights, "text": self.text.name, "split": self.text.split,
                "field": self.text.field, "shuffled": self.text.shuffled, "context": self.context,
                "cached": self.cache is not None, "seed": self.seed, "dtype": self.dtype}

    def run(self, model: nn.Module, tokenizer: Any, device: str | torch.device = "cpu", *,
            parallel: Parallel | None = None, progress: bool = True) -> dict[str, SAE]:
        """Harvest, train and save: {name: SAE}; goes on where an earlier call stopped. Raises what `train` raises.

        Several processes do it together, each with its `parallel`; the main one saves.
        """
        parallel = stated(parallel)
        shown = progress and parallel.main
        stream = self.stream(model, tokenizer, device, parallel=parallel, progress=shown)
        saes = train(stream, self.trainees(), self.recipe.config(), self.out, device=device, progress=shown,
                     parallel=parallel)
        for name, sae in saes.items() if parallel.main else ():
            _keep_facts(sae, self.folder(name))
            sae.metadata |= self.described(tokenizer, stream)
            sae.save_pretrained(self.folder(name))
        return saes

    def stream(self, model: nn.Module, tokenizer: Any, device: str | torch.device = "cpu", *,
               parallel: Parallel = ALONE, progress: bool = True) -> Stream:
        """The activations, or this process' share of them: of the cache, filled first where need be, or live."""
        texts, special = self.text.windows(tokenizer, self.context, self.seed), tokenizer.all_special_ids
        sites = list(dict.fromkeys(site for place in self.places for site in place))
        if self.cache is None:
            buffer_tokens = self.recipe.buffer_tokens // parallel.share[1]  # they shuffle among as many together
            return LiveStream(model, sites, texts, special, model_name=self.model_name, seed=self.seed,
                              buffer_tokens=buffer_tokens, epochs=self.epochs, share=parallel.share, device=device)
        parallel.together(self._harvest, self.cache, model, sites, texts, special, progress)
        return CachedStream(self.cache, sites, seed=self.seed, epochs=self.epochs, share=parallel.share, device=device)

    def _harvest(self, cache: Path, model: nn.Module, sites: Sequence[str], texts: Windows, special: Sequence[int],
                 progress: bool) -> None:
        """Fill the cache with this process' part of the shards that are not there yet."""
        # what is no row: special tokens, and attention sinks, which are more than the first tokens of windows
        some = FirstTokens(texts, self.cache_tokens + self.recipe.batch_size, special)
        per_shard = max(1, SHARD_TOKENS // self.context)
        infos = harvest_infos(model, cache, sites, some, special, model_name=self.model_name, window=self.context,
                              seed=self.seed, windows_per_shard=per_shard, text=texts)
        share = self.cache_tokens // launched_share()[1]
        with tqdm(desc="harvest", unit=" tokens", total=share, disable=not progress) as bar:
            for tokens in write_shards(model, cache, infos, some, special, windows_per_shard=per_shard, text=texts):
                bar.update(tokens)

    def described(self, tokenizer: Any, stream: Stream) -> dict[str, Any]:
        """What an SAE's metadata say of the text; the first three in SAELens' words."""
        facts: dict[str, Any] = {"dataset_path": self.text.name, "context_size": self.context,
                                 "prepend_bos": bool(prefix_ids(tokenizer)), "data_licence": self.data_licence,
                                 "text_epochs": epochs_read(stream)}
        return {name: value for name, value in facts.items() if value is not None}


def _keep_facts(sae: SAE, folder: Path) -> None:
    """Give an SAE the statistics and metadata of the one in a folder, if that has its weights: what was found out since
    it was written there."""
    if not (folder / CONFIG).exists():
        return
    try:
        there = load_sae(folder)
    except (SaeError, OSError):  # it is written anew
        return
    if sae_digest(there) == sae_digest(sae):
        facts = {name: value for name, value in there.metadata.items() if name != "source"}
        sae.metadata, sae.statistics = facts | sae.metadata, there.statistics


def epochs_read(stream: Stream) -> int:
    """How often the text was read, in part or whole."""
    state = stream.state_dict()
    begun = any(isinstance(n := state.get(key, 0), int) and n > 0 for key in ("place", "document", "window"))
    return int(state["epoch"]) + begun


def facts_of(sae: SAE) -> dict[str, Any]:
    """What tells an SAE of a sweep from others, from its recipe, as plain JSON."""
    recipe = sae.metadata.get("recipe")
    objective = recipe.get("objective") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(objective, dict):
        return {}
    numbers = {**objective, **recipe, "objective": objective.get("kind")}
    names = ("objective", "l0", "k", "sparsity", "learning_rate", "seed")
    plain: dict[str, Any] = json.loads(json.dumps({n: numbers[n] for n in names if numbers.get(n) is not None}))
    return plain
