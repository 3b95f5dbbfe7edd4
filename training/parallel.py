"""Several processes that train the same SAEs: what each of them holds, and what they tell each other.

They make a mesh, ("batch", "features"). Processes along "batch" train on different rows of every batch, and their
gradients are averaged. Those along "features" hold d_sae / n neighbouring features each; each reads, or has the model
make, a share of their rows and gets the others', and their parts of the reconstruction, (rows, d_out), are summed.
Backward they exchange nothing but the gradients of b_dec and the skip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sae_hooks import errors
from sae_hooks.errors import TrainingError
from sae_hooks.processes import launched_share

P = ParamSpec("P")
R = TypeVar("R")

BATCH, FEATURES = "batch", "features"
REPLICATED = ("b_dec", "W_skip")  # whole in every process; all else of the SAE is one row a feature, or a scalar
USUAL = "usual"  # lengths of gradients: one number a tensor, the same in every process


@dataclass(frozen=True)
class Parallel:
    """This process among those that train together; without a mesh it stands alone, and nothing costs anything.

    Every method but `local` and `check_features` is for all processes to call, in the same order. Made by `parallel`.
    """

    mesh: DeviceMesh | None = None

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): this process reads every n-th row of a batch, from i on. What a stream takes as its share."""
        return (0, 1) if self.mesh is None else (dist.get_rank(), self.mesh.size())

    @property
    def batches(self) -> int:
        """Number of parts that a batch has."""
        return 1 if self.mesh is None else self.mesh.size(0)

    @property
    def shards(self) -> int:
        """Number of parts that the features have."""
        return 1 if self.mesh is None else self.mesh.size(1)

    @property
    def shard(self) -> int:
        """Which of them is here."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(FEATURES)

    @property
    def batch_share(self) -> tuple[int, int]:
        """(i, n): the i-th of n parts of a batch is here."""
        return (0, 1) if self.mesh is None else (self.mesh.get_local_rank(BATCH), self.batches)

    @property
    def main(self) -> bool:
        """Whether this process reports and puts checkpoints in their place. One does."""
        return self.share[0] == 0

    @property
    def device(self) -> torch.device:
        """The accelerator that the launcher gave this process, or the CPU."""
        kind = torch.accelerator.current_accelerator(check_available=True)
        if kind is None:
            return torch.device("cpu")
        return torch.device(kind.type, torch.accelerator.current_device_index())

    def check_features(self, name: str, d_sae: int, shardable: bool) -> None:
        """Raise TrainingError where the features of an SAE to be trained can't be split. Asks no other process."""
        if self.shards > 1 and not shardable:
            raise TrainingError(f"{name}: its objective compares all features of a token, so they can't be split over "
                                f"{self.shards} processes; let these share the batches: parallel(shards=1)")
        if d_sae % self.shards:
            raise TrainingError(f"{name}: {d_sae} features can't be split evenly over {self.shards} processes; give a "
                                f"d_sae that is a multiple")

    # --- tensors that are part of a loss ---

    def over_shards(self, t: Tensor) -> Tensor:
        """The sum over the features' parts. Backward hands the gradient on: every part has the whole of it."""
        return self._reduced(t, FEATURES, 1.0) if self.shards > 1 else t

    def over_batches(self, t: Tensor) -> Tensor:
        """The mean over the batch's parts. Backward hands the gradient on: it is the gradients that are averaged."""
        return self._reduced(t, BATCH, 1 / self.batches) if self.batches > 1 else t

    def _reduced(self, t: Tensor, dim: str, factor: float) -> Tensor:
        out: Tensor = _Reduced.apply(t, self._group(dim), factor)  # type: ignore[no-untyped-call]
        return out

    # --- tensors that are not ---

    @torch.no_grad()
    def reduce_gradients(self, leaves: Mapping[str, Tensor]) -> None:
        """Make {name: leaf}'s gradients those of the whole batch by all features; a missing one counts as 0."""
        if self.mesh is None:
            return
        for name, leaf in leaves.items():
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            if name in REPLICATED and self.shards > 1:
                self._sum(leaf.grad, FEATURES)
            if self.batches > 1:
                self._sum(leaf.grad, BATCH)
                leaf.grad /= self.batches

    def sum_over_batches(self, t: Tensor) -> Tensor:
        """The sum over the batch's parts, in place."""
        return self._sum(t, BATCH) if self.batches > 1 else t

    def mean(self, t: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        if self.mesh is not None:
            dist.all_reduce(t)
            t /= self.mesh.size()
        return t

    def of_batches(self, t: Tensor) -> Tensor:
        """The tensors of all parts of a batch, one beside the other: (batches, ...)."""
        return self._gathered(t[None], BATCH) if self.batches > 1 else t[None]

    def part(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{site: rows (n, d)} of the processes that share the features, from what each of them has read."""
        return {site: self._interleaved(x, FEATURES, 1) if self.shards > 1 else x for site, x in rows.items()}

    def whole_batch(self, x: Tensor) -> Tensor:
        """The rows (batch, d) of all parts of a batch, in the order of one process."""
        return self._interleaved(x, BATCH, self.shards) if self.batches > 1 else x

    def _interleaved(self, x: Tensor, dim: str, run: int) -> Tensor:
        """The rows of all processes, `run` of one, `run` of the next, and so on, and again."""
        n = len(x) // run
        return self._gathered(x, dim).reshape(-1, n, run, x.shape[-1]).transpose(0, 1).flatten(0, 2)

    def local(self, name: str, t: Tensor) -> Tensor:
        """What this process holds of a tensor of a learner's state: a copy of its features, or t itself."""
        if self.shards == 1 or not is_per_feature(name, t):
            return t
        rows = feature_first(name, t)
        n = len(rows) // self.shards
        return feature_first(name, rows[self.shard * n:(self.shard + 1) * n].clone())

    @torch.no_grad()
    def whole(self, name: str, t: Tensor) -> Tensor:
        """The tensor of which `local` is this part, in every process; t itself if it is not split."""
        if self.shards == 1 or not is_per_feature(name, t):
            return t
        return feature_first(name, self._gathered(feature_first(name, t), FEATURES))

    def _gathered(self, t: Tensor, dim: str) -> Tensor:
        n = self.batches if dim == BATCH else self.shards
        out = t.new_empty(n * len(t), *t.shape[1:])
        dist.all_gather(list(out.chunk(n)), t.contiguous(), group=self._group(dim))
        return out

    def _sum(self, t: Tensor, dim: str) -> Tensor:
        """In place; a matrix may lie transposed in memory, as W_enc does."""
        dense = t if t.is_contiguous() else t.T
        assert dense.is_contiguous()
        dist.all_reduce(dense, group=self._group(dim))
        return t

    def _group(self, dim: str) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group(dim)

    # --- what processes do together ---

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.mesh is None:
            return flag
        up = torch.tensor(int(flag), device=self.mesh.device_type)
        dist.all_reduce(up, dist.ReduceOp.MAX)
        return bool(up)

    def together(self, do: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """do(...), in every process. Where one raises, all do, so that none waits for one that is gone: itself its
        error, the others one of its kind, if it is this package's, or TrainingError."""
        if self.mesh is None:
            return do(*args, **kwargs)
        error: Exception | None = None
        try:
            result = do(*args, **kwargs)
        except Exception as raised:
            error = raised
        if self.any(error is not None):
            told = self.told(None if error is None else (type(error).__name__, str(error)))
            i, (kind, text) = next((i, found) for i, found in enumerate(told) if found)
            raise error or getattr(errors, kind, TrainingError)(f"process {i} of {len(told)}: {kind}: {text}")
        return result

    def told(self, value: Any) -> list[Any]:
        """What each process says, in their order; it must be picklable."""
        found = [value]
        if self.mesh is not None:
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, value)
        return found

    def by_main(self, do: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """do(...) in the main process; its result, which must be picklable, in all."""
        if self.mesh is None:
            return do(*args, **kwargs)
        box = [self.together(lambda: do(*args, **kwargs) if self.main else None)]
        dist.broadcast_object_list(box, src=0)
        return cast(R, box[0])


def parallel(shards: int = 1) -> Parallel:
    """This process among those that `accelerate launch` or torchrun started: `shards` of them share the features, and
    the groups that this makes share the batches. Without a launcher it stands alone.

    On CPUs launch with torchrun: without mpirun, `accelerate launch --cpu` starts one process, whatever it is asked.
    Processes on GPUs talk through NCCL, others through gloo; only gloo has been tested. Neighbouring ranks share the
    features, for these talk at every step. Sharing the features saves memory in training, not at its ends: each process
    draws the whole SAE on the CPU first, and holds it on its device before the first step and after the last.

    Raises TrainingError where the processes don't come out even.
    """
    processes = launched_share()[1]
    if shards < 1 or processes % shards:
        raise TrainingError(f"{shards} processes are to share the features, but {processes} were launched: launch a "
                            f"multiple of {shards}, as in `accelerate launch --num_processes {max(shards, 1)}`")
    if processes == 1:
        return Parallel()
    kind = "cpu" if dist.get_backend() == "gloo" else Parallel().device.type
    return Parallel(init_device_mesh(kind, (processes // shards, shards), mesh_dim_names=(BATCH, FEATURES)))


def stated(given: Parallel | None) -> Parallel:
    """What a training was given, or, if nothing, a process that stands alone. Raises TrainingError for nothing where a
    launcher has started several: each would do the whole training, in the same folder."""
    if given is None and (processes := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        raise TrainingError(
            f"{processes} processes were launched (WORLD_SIZE), and this training was not told whether they train "
            "together: make p = parallel(), and give parallel=p, device=p.device, and the stream share=p.share. For "
            "trainings that have nothing to do with each other give parallel=Parallel(), and each a folder of its own")
    return given or ALONE


def is_per_feature(name: str, t: Tensor) -> bool:
    """Whether a tensor of a learner's state, as "W_enc", "extra.r_mag" or "adam.W_enc.exp_avg", has a row a feature."""
    return t.ndim > 0 and _plain(name) not in (*REPLICATED, USUAL)


def feature_first(name: str, t: Tensor) -> Tensor:
    """The tensor with features first, as it lies in memory; and the way back."""
    return t.T if t.ndim == 2 and _plain(name) == "W_enc" else t


def _plain(name: str) -> str:
    return name.split(".")[1] if "." in name else name


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup, factor: float) -> Tensor:
        out = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out * factor if factor != 1 else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


ALONE = Parallel()
