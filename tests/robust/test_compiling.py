"""What torch.compile is made to look at, and that what is open leaves a model one graph."""

from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import pytest
import torch
import transformers
from torch._dynamo.guards import GuardBuilder

from sae_hooks import SaeAttachError, SaeWarning, attach_saes, compiling, detach_saes, tokens

pytestmark = pytest.mark.usefixtures("nothing_compiled")
SITE = "model.layers.1.output"


@pytest.fixture
def model(random_model):
    return random_model("Llama", layers=2)


@pytest.fixture
def first_attach(monkeypatch):
    """As if nothing had been attached in this process; torch's own guard."""
    guard = getattr(GuardBuilder, compiling.GUARD)
    plain = getattr(guard, "plain", guard)
    monkeypatch.setattr(compiling, "_tables", WeakKeyDictionary())
    monkeypatch.setattr(GuardBuilder, compiling.GUARD, plain)
    return plain


@pytest.fixture
def looked_at(monkeypatch):
    """Names of the empty tables of hooks that graphs look at."""
    names, plain = [], GuardBuilder.SEQUENCE_LENGTH

    def noting(builder, guard):
        if guard.name.endswith("_hooks") and "_global_" not in guard.name and not builder.get(guard):
            names.append(guard.name)
        return plain(builder, guard)

    monkeypatch.setattr(GuardBuilder, "SEQUENCE_LENGTH", noting)
    return names


@torch.no_grad()
def logits(model, ids, **settings):
    return model(ids, use_cache=False, **settings).logits


def test_torch_looks_where_hooks_lie_while_any_model_has_saes_and_then_as_before(random_model, sae, first_attach):
    first, second = random_model("Gemma2"), random_model("Gemma2")
    attach_saes(first, sae)
    attach_saes(first, sae, name="again")
    attach_saes(second, sae)
    detach_saes(first)
    assert getattr(GuardBuilder, compiling.GUARD) is not first_attach
    detach_saes(second)
    assert getattr(GuardBuilder, compiling.GUARD) is first_attach


def test_graphs_look_only_at_tables_in_which_ours_lie_of_modules_of_a_kind(model, ids, random_sae, backend, looked_at,
                                                                          first_attach):
    sites = ("model.layers.1.mlp.output", "model.layers.0.self_attn.o_proj.input")
    attach_saes(model, {site: random_sae(32, 64, site) for site in sites})
    compiled = torch.compile(model, backend=backend)
    logits(compiled, ids)
    assert any("mlp" in name and name.endswith("_forward_hooks") for name in looked_at)
    assert any("o_proj" in name and name.endswith("_forward_pre_hooks") for name in looked_at)
    for name in looked_at:  # o_proj is a Linear, and so are other projections, and the head
        of_mlp = name.endswith("mlp']._forward_hooks")
        assert of_mlp or name.endswith(("_proj']._forward_pre_hooks", "head']._forward_pre_hooks")), name
    detach_saes(model)
    looked_at.clear()
    logits(compiled, ids)
    assert not looked_at


def test_a_module_of_a_class_made_from_that_of_the_hooked_one_is_looked_at(random_model, ids, random_sae, backend):
    """As FSDP2 makes them."""
    model = random_model("Llama")
    attach_saes(model, random_sae(32, 64, "model.layers.2.mlp.output", norm=8.0))
    kind = type("Sharded", (type(model.model.layers[0].mlp),), {})
    for layer in model.model.layers:
        layer.mlp.__class__ = kind
        layer.compile(backend=backend)
    plain = logits(model, ids)
    with model.saes.add({2: 8.0}) as add:
        assert not torch.equal(logits(model, ids), plain)
    assert add.positions_edited == ids.numel()


def test_without_our_care_torch_loses_a_hook_that_comes_late(backend, first_attach):
    """The trap itself: should torch close it, most of compiling.py can go."""
    module, calls = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), []
    compiled = torch.compile(module, backend=backend)
    compiled(torch.ones(1, 2))
    module[0].register_forward_hook(lambda module, args, output: calls.append(1))
    compiled(torch.ones(1, 2))
    assert not calls


def test_a_torch_without_the_guard_of_empty_tables_is_named_when_attaching(random_model, random_sae, monkeypatch):
    model = random_model("Gemma2")
    monkeypatch.delattr(GuardBuilder, compiling.GUARD)
    with pytest.warns(SaeWarning, match="uncompiled"):
        attach_saes(model, random_sae(32, 64, SITE))
    with pytest.warns(SaeWarning, match="uncompiled"):
        detach_saes(model)
    assert not hasattr(model, "saes")


# --- one graph


OPEN = {
    "nothing there": lambda saes, **how: saes.clamp({3: 40.0}, layer=0, **how),
    "clamp": lambda saes, **how: saes.clamp({3: 40.0}, layer=1, **how),
    "rows apart, some positions": lambda saes, **how: saes.clamp(
        {9: torch.tensor([30.0, float("nan")]), 5: 9.0}, layer=1, tokens=torch.arange(9) > 5, **how),
    "splice": lambda saes, **how: saes.splice(layer=1, **how),
}


@pytest.fixture
def hooked(model, random_sae):
    return attach_saes(model, {f"model.layers.{i}.output": random_sae(32, 64, f"model.layers.{i}.output", norm=8.0)
                               for i in range(2)})


@torch.no_grad()
def seen(model, each, case, **given):
    """Logits, positions edited, and what was captured where the edit is."""
    with OPEN[case](model.saes, special_tokens="inputs_embeds" in given) as handle:
        with model.saes.capture(layer=1, special_tokens=True) as captured:
            found = each(**given, use_cache=False).logits
        return found, handle.positions_edited, captured[SITE].to_dense(), captured[SITE].position, captured[SITE].doc_id


@pytest.mark.parametrize("case", OPEN)
@pytest.mark.parametrize("embedded", [False, True])
def test_a_model_is_one_graph_whatever_is_open(hooked, ids, backend, graphs, case, embedded):
    compiled = torch.compile(hooked, backend=backend, fullgraph=True)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"inputs_embeds": hooked.get_input_embeddings()(ids).detach()} if embedded else {"input_ids": ids}
    found = [seen(hooked, each, case, **given, attention_mask=mask) for each in (hooked, compiled, compiled)]
    for one in found[1:]:
        for ours, eager in zip(one, found[0], strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(eager))
    assert len(graphs) == 1


def test_with_nothing_open_it_is_one_graph_too(hooked, ids, backend, graphs):
    compiled = torch.compile(hooked, backend=backend, fullgraph=True)
    assert torch.equal(logits(compiled, ids), logits(hooked, ids))
    assert len(graphs) == 1


def test_a_pass_of_the_model_inside_by_itself_is_not_taken_for_the_next_one_s(hooked, ids, backend):
    compiled = torch.compile(hooked, backend=backend)
    masks = None, torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    with torch.no_grad(), hooked.saes.clamp({3: 40.0}, layer=1) as clamp:
        for mask in masks:
            compiled(ids, attention_mask=mask, use_cache=False)
        for each in (hooked, compiled):
            for mask, count in zip(masks, (18, 15), strict=True):
                hooked.model(ids, use_cache=False)
                before = clamp.positions_edited
                each(ids, attention_mask=mask, use_cache=False)  # the very same ids
                assert clamp.positions_edited - before == count


def test_a_door_that_a_pass_has_come_to_is_not_within_it_any_more(hooked, ids):
    (door,) = (hook.__self__ for hook in hooked.model._forward_pre_hooks.values())

    def look(*args):
        now = hooked.saes._runtime.begun()
        assert now.owners == {id(hooked), id(hooked.model)}
        assert not door.is_within()
        now.owners.remove(id(hooked.model))
        assert door.is_within()
        looked.append(now)

    looked = []
    hooked.model.layers[0].register_forward_hook(look)
    with torch.no_grad(), hooked.saes.clamp({3: 40.0}, layer=1):
        logits(hooked, ids)
    assert len(looked) == 1


def test_gradients_through_one_graph_are_refused_while_an_edit_is_open(hooked, ids, backend):
    compiled = torch.compile(hooked, backend=backend, fullgraph=True)
    with hooked.saes.clamp({3: 40.0}, layer=1):
        with torch.no_grad():
            expected = compiled(ids, use_cache=False).logits
        with pytest.raises(torch._dynamo.exc.Unsupported, match="sae_hooks"):
            compiled(ids, use_cache=False)
        assert torch.equal(hooked(ids, use_cache=False).logits, expected)


def test_a_pass_in_a_graph_is_that_of_its_own_tokens(hooked, ids, backend):
    """Other tokens, other padding, the model inside by itself, and eager passes, all in turn."""
    compiled, inner = (torch.compile(m, backend=backend) for m in (hooked, hooked.model))
    masks = torch.ones_like(ids), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    for n, mask in enumerate((*masks, *masks)):
        read = ids.flip(n % 2)
        for door, theirs in ((hooked, compiled), (hooked.model, inner), (hooked.model, hooked.model)):
            counts = []
            for each in (door, theirs):
                with torch.no_grad(), hooked.saes.clamp({3: 40.0}, layer=1) as clamp:
                    each(read, attention_mask=mask, use_cache=False)
                counts.append(clamp.positions_edited)
            assert counts == [int(mask.sum())] * 2


class Twice(transformers.LlamaForCausalLM):
    """Runs the model inside twice."""

    def forward(self, input_ids, **settings):
        return self.lm_head(self.model(input_ids, **settings)[0] + self.model(input_ids, **settings)[0].flip(1))


class Backwards(transformers.LlamaForCausalLM):
    """Gives the model inside other tokens."""

    def forward(self, input_ids, **settings):
        return self.lm_head(self.model(input_ids.flip(1), **settings)[0])


@pytest.mark.parametrize("kind", [Twice, Backwards])
def test_a_graph_in_which_the_model_inside_reads_something_else_is_refused(model, ids, random_sae, backend, kind):
    model = attach_saes(kind(model.config).eval(), random_sae(32, 64, SITE, norm=8.0))
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        plain = compiled(ids, use_cache=False)
        with model.saes.clamp({3: 40.0}, layer=1) as clamp:
            for _ in range(2):
                with pytest.raises(SaeAttachError, match="uncompiled"):
                    compiled(ids, use_cache=False)
            before = clamp.positions_edited
            model(ids, use_cache=False)
            assert clamp.positions_edited - before == ids.numel() * (2 if kind is Twice else 1)
        with model.saes.clamp({3: 40.0}, layer=1, scope="context"):
            model(ids, use_cache=False)
            with ThreadPoolExecutor(1) as others:  # who sees no edit is refused nothing
                assert torch.equal(others.submit(torch.no_grad()(compiled), ids, use_cache=False).result(), plain)
        assert torch.equal(compiled(ids, use_cache=False), plain)


class Wrapper(torch.nn.Module):
    """A third door."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.config = lm, lm.config

    def forward(self, input_ids, **settings):
        return self.lm(input_ids, **settings)


def test_tokens_that_a_graph_hands_on_are_known_by_where_they_lie_else_by_what_they_are(model, ids, random_sae,
                                                                                       backend, monkeypatch):
    outer = attach_saes(Wrapper(model), random_sae(32, 64, "lm." + SITE, norm=8.0))
    compiled = torch.compile(outer, backend=backend, fullgraph=True)
    now = tokens.Pass((2, 9), ids, None, 0, None)
    assert now.gives(ids.clone())
    assert now.gives(ids.int())
    assert not now.gives(ids.flip(1))
    assert not now.gives(ids[:, :8])
    assert [now.gives(torch.zeros(2, n, 32)) for n in (8, 9)] == [False, True]  # embeddings
    plain = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: a.is_floating_point() and plain(a, b))  # ids would wait for a GPU
    with torch.no_grad(), outer.saes.clamp({3: 40.0}) as clamp:
        compiled(ids, use_cache=False)
    assert clamp.positions_edited == ids.numel()


def test_an_encoder_decoder_s_decoder_reads_tokens_of_its_own(ids, random_sae, backend):
    config = transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
                                     decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=128,
                                     max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    attach_saes(model, random_sae(32, 64, "model.decoder.layers.1.output", norm=8.0))
    compiled = torch.compile(model, backend=backend)
    for decoder_ids in (ids[:, :5], ids.flip(1)):
        found = []
        for each in (model, compiled):
            with torch.no_grad(), model.saes.clamp({3: 40.0}) as clamp:
                found.append((each(input_ids=ids, decoder_input_ids=decoder_ids, use_cache=False).logits,
                              clamp.positions_edited))
        assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
        assert found[0][1] == found[1][1] > 0
