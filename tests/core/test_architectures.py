"""Architectures that do something of their own: what the aliases mean there, layers that run again, other caches."""

import pytest
import torch
import transformers
from core.generating import LEFT, NEW, PROMPTS, STRENGTH, WIDTH
from core.reference import array, encode, ordinary, seen
from core.steering import IDS, MASK, SITE
from tiny_models import ARCHITECTURES, HIDDEN, LLAMA_LIKE, POSITIONS, VOCABULARY, make_model, make_sae

from sae_hooks import SaeAttachError, SaeMismatchError, SiteError, attach_saes, extract_features, sites
from sae_hooks.formats.hook_names import kind_of

pytestmark = pytest.mark.usefixtures("without_gradients")
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": None}
LAYERS = {"num_hidden_layers": 2}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MLA = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
       "v_head_dim": 8}
MAMBA = {"mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 4}
GPT = {"n_embd": HIDDEN, "n_head": 4, "n_layer": 2, "n_positions": POSITIONS, "rotary_dim": 4}
# architecture -> its own settings, beside the Llama's
FAMILIES = {
    "Gemma": {"head_dim": 8},
    "Cohere": {}, "Cohere2": {}, "Olmo": {}, "Olmo2": {}, "Olmo3": {}, "Granite": {}, "SmolLM3": {}, "StableLm": {},
    "Starcoder2": {}, "Phi": {}, "Glm": {"head_dim": 8}, "Glm4": {"head_dim": 8}, "Exaone4": {}, "Ministral3": {},
    "Nemotron": {"head_dim": 8}, "Llama4": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 16},
    "Mixtral": {"num_local_experts": 4}, "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Qwen2Moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**EXPERTS, "num_experts": 4, "head_dim": 8}, "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV2": {**EXPERTS, **MLA, "n_routed_experts": 4, "first_k_dense_replace": 0},
    "DeepseekV3": {**EXPERTS, **MLA, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    "Glm4Moe": {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
                "head_dim": 8},
    "Falcon": {"ffn_hidden_size": 64}, "GPTJ": GPT, "CodeGen": GPT,
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "Bamba": {**MAMBA, "attn_layer_indices": [1]}, "FalconH1": {**MAMBA, "mamba_d_ssm": 64},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "GraniteMoe": {"num_local_experts": 4},
    "Mpt": {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "lru_width": HIDDEN, "conv1d_width": 2,
                       "head_dim": 8},
    "Dbrx": {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS,
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2,
                            "ffn_act_fn": {"name": "silu"}}},
    "Qwen3Next": {**EXPERTS, "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16,
                  "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}
CONFIGS = {name: f"{name}TextConfig" for name in ("Llama4", "Gemma3n", "Qwen4Exp")}


def make(name, **settings):
    """A causal language model in float32 of small random weights, in eval mode."""
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**{**TOKENS, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


def shifted(model, site, change, *places):
    """By how much (batch, tokens, d) what modules give changes where `change` is added at a site."""
    def add(value):
        return sites.write(value, sites.read(value, site.key) + change, site.key)

    def before(module, args, kwargs):
        place = sites.find_input(args, kwargs, site.key)
        return sites.replace_input(args, kwargs, place, add(sites.input_at(args, kwargs, place)))

    given = []
    for adding in (False, True):
        hooks = []
        if adding and site.side == "output":
            hooks.append(site.module.register_forward_hook(lambda module, args, output: add(output)))
        elif adding:
            hooks.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        with seen(model, *places) as lists:
            model(input_ids=IDS, attention_mask=MASK)
        for hook in hooks:
            hook.remove()
        given.append(lists[0])
    return given[1] - given[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_aliases_are_what_the_mlp_adds_what_it_reads_and_what_the_attention_projects(name):
    model = make(name, **{**LLAMA_LIKE, **LAYERS, **FAMILIES[name]})
    layer = sites.alias(model, 1)[0].removesuffix(".output")
    places = {kind: [sites.resolve(model, site) for site in sites.alias(model, 1, kind)] for kind in sites.KINDS}

    added, change = places["mlp_out"][0], torch.linspace(-1, 1, HIDDEN)
    torch.testing.assert_close(shifted(model, added, change, f"{layer}.output"), change.expand(*IDS.shape, -1),
                               rtol=1e-3, atol=1e-3)
    heads = places["attn_out"][0]
    change = torch.linspace(-1, 1, heads.module.in_features)
    torch.testing.assert_close(shifted(model, heads, change, f"{heads.path.rpartition('.')[0]}.output"),
                               (change @ heads.module.weight.T).expand(*IDS.shape, -1), rtol=1e-3, atol=1e-3)
    read, written = places["transcoder"]
    assert written.key == added.key
    mlp = next(name for name in sites.MLPS if hasattr(model.get_submodule(layer), name))
    assert read.path.removeprefix(f"{layer}.") in (mlp, f"{mlp}.up_proj") or "norm" in read.path
    for kind in ("resid_post", "mlp_out"):
        assert sites.width(model, places[kind][0]) == HIDDEN


@pytest.mark.parametrize("name", [*ARCHITECTURES, *FAMILIES])
def test_an_sae_saved_where_an_alias_says_is_found_by_that_alias(name):
    model = make_model(name) if name in ARCHITECTURES else make(name, **{**LLAMA_LIKE, **LAYERS, **FAMILIES[name]})
    assert {kind: kind_of(*sites.alias(model, 1, kind)) for kind in sites.KINDS} == {kind: kind for kind in sites.KINDS}


def test_layers_that_are_an_attention_or_an_mlp_alone_have_the_aliases_of_that():
    settings = {"hybrid_override_pattern": "*-", "layers_block_type": ["full_attention", "mlp"], "head_dim": 8,
                "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8}
    model = make("NemotronH", **{**LLAMA_LIKE, **LAYERS, **settings})
    layers = sites.layers_path(model)
    for layer, has in enumerate(({"attn_out": "mixer.o_proj.input"}, {"mlp_out": "mixer.down_proj.output"})):
        for kind in ("attn_out", "mlp_out"):
            if kind in has:
                site, _ = sites.alias(model, layer, kind)
                assert site == f"{layers}.{layer}.{has[kind]}"
                assert kind_of(site, site) == kind
                change = torch.linspace(-1, 1, HIDDEN)
                place = sites.resolve(model, site)
                by = change if kind == "mlp_out" else change @ place.module.weight.T
                torch.testing.assert_close(shifted(model, place, change, f"{layers}.{layer}.output"),
                                           by.expand(*IDS.shape, -1), rtol=1e-3, atol=1e-3)
            else:
                with pytest.raises(SiteError, match="give the site as a module path"):
                    sites.alias(model, layer, kind)


def test_an_mlp_beside_another_one_is_not_what_is_added():
    model = make("GraniteMoeShared", **{**LLAMA_LIKE, **LAYERS}, num_local_experts=4, shared_intermediate_size=16)
    for kind in ("mlp_out", "transcoder"):
        with pytest.raises(SiteError, match=r"model\.layers\.1 has none of .*; give the site as a module path"):
            sites.alias(model, 1, kind)


@pytest.mark.parametrize(("name", "layer"), [("XLNet", "layer.1"), ("FSMT", "model.decoder.layers.1")])
def test_models_that_keep_their_tokens_first_are_refused(name, layer):
    settings = {"d_model": HIDDEN, "n_layer": 2, "n_head": 4, "d_inner": 64} if name == "XLNet" else {
        **BART, "langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, {"XLNet": "XLNetLMHeadModel", "FSMT": "FSMTForConditionalGeneration"}[name])(config)
    for whole in (model, torch.nn.Sequential(model)):
        with pytest.raises(SiteError, match=rf"{name}.* keeps its activations as \(tokens, batch, d\)"):
            attach_saes(whole, make_sae(HIDDEN, 64, f"{layer}.output"))


def sharing_a_layer():
    """A model that runs its second layer twice in a pass, as ALBERT and HRM do."""
    model = make_model("Llama")
    model.model.layers[2] = model.model.layers[1]
    return model


def test_a_layer_that_a_pass_runs_again_is_one_document_a_row_with_what_it_gave_last():
    model, inputs = sharing_a_layer(), {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    with seen(model, SITE) as runs:
        model(**inputs)
    sae = make_sae(HIDDEN, 64, SITE, like=runs[-1])
    attach_saes(model, sae)
    with model.saes.capture() as captured:
        model(**inputs)
        model(input_ids=IDS[1:], use_cache=False)
    got = captured[SITE]
    assert got.doc_id.unique().tolist() == list(range(5))
    acts = torch.from_numpy(encode(sae, array(runs[-1])))
    acts[~ordinary(IDS)] = 0
    torch.testing.assert_close(got[got.doc_id < 3].to_dense().double(), acts[MASK.bool()], rtol=1e-4, atol=1e-4)
    assert len(runs) == 2


def test_a_check_does_not_mix_the_runs_of_a_layer_that_a_pass_runs_again():
    model = attach_saes(sharing_a_layer(), make_sae(HIDDEN, 64, SITE))
    with pytest.raises(SaeAttachError, match=r"runs model\.layers\.1\.output more than once.*capture has the last"):
        model.saes.check(IDS)


class Calling(torch.nn.Module):
    """A layer that runs another one, which is no part of it."""

    def __init__(self, other):
        super().__init__()
        self.others = [other]

    def forward(self, *args, **kwargs):
        return self.others[0](*args, **kwargs)


def test_an_extraction_that_meets_a_layer_again_before_it_has_all_is_refused():
    model = make_model("Llama")
    model.model.layers[2] = Calling(model.model.layers[1])
    attach_saes(model, {site: make_sae(HIDDEN, 64) for site in (SITE, "model.norm.output")})
    with pytest.raises(SaeAttachError, match=r"runs model\.layers\.1\.output more than once.*capture"):
        list(extract_features(model, [{"input_ids": PROMPTS[0]}]))


def known_to_run_again():
    """(a model, a site whose module a pass runs several times)"""
    yield sharing_a_layer(), SITE
    albert = transformers.AlbertConfig(**TOKENS, hidden_size=HIDDEN, intermediate_size=64, num_attention_heads=4,
                                       embedding_size=16, num_hidden_layers=2)
    yield transformers.AlbertForMaskedLM(albert), "encoder.albert_layer_groups.0.albert_layers.0.output"
    if hasattr(transformers, "HrmTextConfig"):
        hrm = make("HrmText", **{**LLAMA_LIKE, **LAYERS}, head_dim=8)
        yield from ((hrm, f"model.{stack}_module.layers.1.mlp.output") for stack in "HL")


def test_an_extraction_that_would_end_with_the_first_run_of_a_layer_is_refused():
    for model, site in known_to_run_again():
        attach_saes(model, make_sae(HIDDEN, 64, site))
        with pytest.raises(SaeAttachError, match=rf"runs .*{site} more than once.*capture has the last"):
            extract_features(model, [{"input_ids": PROMPTS[0]}])
        model.saes.detach()


BART = {"d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


def test_an_encoders_features_are_extracted_and_those_of_a_decoder_with_a_text_of_its_own_refused():
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**{**TOKENS, **BART})).eval()
    inside = {part: f"model.{part}.layers.1.output" for part in ("encoder", "decoder")}
    with seen(model, inside["encoder"]) as xs:
        model(input_ids=torch.tensor(PROMPTS[:1]))
    attach_saes(model, {site: make_sae(HIDDEN, 64) for site in inside.values()})
    documents = [{"input_ids": PROMPTS[0]}]
    part, = extract_features(model, documents, sites=[inside["encoder"]], activations=True)
    torch.testing.assert_close(part.activations[inside["encoder"]], xs[0][0])
    with pytest.raises(SaeAttachError, match=r"input_ids alone.*; model\.decoder\.layers\.1\.output reads a text"):
        list(extract_features(model, documents))


def test_what_is_above_a_decoder_has_its_tokens_also_where_the_encoder_has_come_to_its_end():
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**{**TOKENS, **BART})).eval()
    places = ("model.encoder.layers.1.output", "model.decoder.layers.1.output", "lm_head.input")
    attach_saes(model, {site: make_sae(HIDDEN, 64, norm=1e9) for site in places})
    edits = [model.saes.clamp({3: 1.0}, site=site) for site in places]
    model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, 1:4])
    assert [edit.positions_edited for edit in edits] == [ordinary(IDS, MASK).sum(), *[ordinary(IDS[:, 1:4]).sum()] * 2]
    for edit in edits:
        edit.remove()


def test_several_streams_a_token_are_refused_where_positions_matter_and_edited_all_where_not():
    model = make("Gemma3n", **{**LLAMA_LIKE, **LAYERS}, head_dim=8, num_kv_shared_layers=0, laurel_rank=4,
                 hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
                 layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0, 0.0])
    sae = make_sae(HIDDEN, 64, "model.layers.0.output")
    del sae.metadata["typical_norm"]
    attach_saes(model, sae)
    for opening in (lambda: model.saes.clamp({3: 1.0}), model.saes.splice, model.saes.capture,
                    lambda: model.saes.clamp({3: torch.ones(len(IDS))}, special_tokens=True)):
        with pytest.raises(SaeAttachError, match=r"gives activations \(4, 3, 7, 32\) for tokens \(3, 7\)"), opening():
            model(input_ids=IDS)
    with model.saes.clamp({3: 1.0}, special_tokens=True) as edit:
        model(input_ids=IDS)
    assert edit.positions_edited == 4 * IDS.numel()


@pytest.mark.skipif(not hasattr(transformers, "Qwen4ExpTextConfig"), reason="transformers has no Qwen4 yet")
def test_an_sae_as_wide_as_the_streams_that_a_layer_gives_side_by_side_is_attached():
    model = make("Qwen4Exp", **{**LLAMA_LIKE, **LAYERS, **EXPERTS}, num_experts=4, head_dim=8, hc_lowrank=4,
                 shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
                 linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention"] * 2)
    sae = make_sae(4 * HIDDEN, 64, SITE, norm=1e9)
    attach_saes(model, sae)
    with model.saes.clamp({3: 1.0}) as edit:
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    assert edit.positions_edited == int(ordinary(IDS, MASK).sum())
    attach_saes(model, make_sae(HIDDEN, 64, "model.layers.0.output"))
    with pytest.raises(SaeMismatchError, match=r"reads 32 values, .* gives 128"), model.saes.capture():
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)


def test_a_cache_by_another_name_counts_as_one():
    settings = {"attn_layers": ["local"] * 2, "hidden_size": HIDDEN, "feed_forward_size": 64, "num_attention_heads": 2,
                "attention_head_size": 16, "axial_pos_embds": False, "max_position_embeddings": POSITIONS,
                "local_attn_chunk_length": 16, "is_decoder": True, "hidden_dropout_prob": 0.0}

    def call(**mode):
        return model.generate(LEFT[1:2], max_new_tokens=NEW, do_sample=False, **mode)

    model, sae = make("Reformer", **settings), make_sae(HIDDEN, 64, "reformer.encoder.layers.0.output")
    del sae.metadata["typical_norm"]
    attach_saes(model, sae)
    for tokens, count in {"all": WIDTH + NEW - 1, "prompt": WIDTH, "generated": NEW - 1}.items():
        with model.saes.add({3: STRENGTH}, tokens=tokens, special_tokens=True) as edit:
            text = call().tolist()
        assert edit.positions_edited == count
        with model.saes.add({3: STRENGTH}, tokens=tokens, special_tokens=True):
            assert call(use_cache=False).tolist() == text
    with model.saes.capture() as captured:
        text = call()[0].tolist()
    (got,) = captured.values()
    assert got.position.tolist() == list(range(WIDTH + NEW - 1))
    assert got.token_id.tolist() == text[:-1]
