"""Parameters in parts over processes: FSDP2 makes them whole while a module runs, tensor parallelism does not."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from sae_hooks import SaeMismatchError, attach_saes

SITE = "model.layers.1.self_attn.o_proj.input"


@pytest.fixture
def mesh():
    """Of one process, data by tensors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensors"))
    dist.destroy_process_group()


def in_parts(model, mesh, tensors, data):
    """The model with its middle output projection split by tensors, and all of it by FSDP2."""
    if tensors:
        parallelize_module(model.model.layers[1].self_attn, mesh["tensors"], {"o_proj": RowwiseParallel()})
    for part in (*model.model.layers, model) if data else ():
        fully_shard(part, mesh=mesh["data"])
    assert type(model.model.layers[1].self_attn.o_proj.weight).__name__ == "DTensor"
    return model


def test_under_fsdp_an_input_is_whole_and_is_edited_as_without(random_model, random_sae, ids, mesh):
    sae, logits = random_sae(32, 64, SITE, norm=1.0), []
    for model in (random_model("Llama"), in_parts(random_model("Llama"), mesh, tensors=False, data=True)):
        attach_saes(model, sae)
        with torch.no_grad(), model.saes.clamp({3: 9.0}, special_tokens=True):
            logits.append(model(ids).logits)
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, logits[-1])
    assert torch.equal(*logits)


@pytest.mark.parametrize("data", [False, True], ids=["alone", "under fsdp"])
def test_an_input_that_tensor_parallelism_splits_is_refused(random_model, random_sae, mesh, data):
    model = in_parts(random_model("Llama"), mesh, tensors=True, data=data)
    with pytest.raises(SaeMismatchError, match="tensor parallelism"):
        attach_saes(model, random_sae(32, 64, SITE))
