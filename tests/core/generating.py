"""What the tests of generation share: padded prompts, ways to generate, and what each must say, found by hand.

`Case.by_hand` is what each mode must say: the whole text of one unpadded row computed anew for each token, steered by
the plain hook of reference.py. What no loop by hand can follow (beams, samples) must be as `under_the_plain_hook`.
"""

import contextlib
import functools

import torch
from core.reference import FullEdit, array, edited, encode, ordinary, sample
from tiny_models import ARCHITECTURES, MULTIMODAL, make_model, make_sae
from transformers import CompileConfig

from sae_hooks import attach_saes, sites

NAN = float("nan")
NEW = 8
STRENGTH = 100.0
PROMPTS = [[2, 17, 45, 99, 23, 17, 45], [2, 31, 13, 77, 31, 13, 77, 31, 13], [2, 50, 60, 50, 60]]
WIDTH = max(map(len, PROMPTS))
LEFT = torch.tensor([[0] * (WIDTH - len(p)) + p for p in PROMPTS])
RIGHT = torch.tensor([p + [0] * (WIDTH - len(p)) for p in PROMPTS])
EVERY = [*ARCHITECTURES, MULTIMODAL]
CHOICES = ("all", "prompt", "generated")


def compiled(**settings):
    """Static cache with a compiled decoding step, also on CPU, without the minute that inductor takes."""
    config = CompileConfig(backend="eager", **settings)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


MODES = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 4},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "logits": {"output_logits": True, "return_dict_in_generate": True},
}
ALONE = {  # batches of one only
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, chunked prefill": {"prompt_lookup_num_tokens": 2, "prefill_chunk_size": 3},
}


class Case:
    """A model of random weights with an SAE of its own in the middle, and a clamp that changes what it says."""

    def __init__(self, architecture, kind="resid_post"):
        self.architecture = architecture
        self.model = make_model(architecture)
        self.site, self.written = sites.alias(self.model, 1, kind)
        x, d_out = sample(self.model, self.site, LEFT), sample(self.model, self.written, LEFT).shape[-1]
        self.sae = make_sae(x.shape[-1], 64, self.site, like=x, d_out=d_out, site_out=self.written)
        fires = (encode(self.sae, array(x))[ordinary(LEFT).numpy()] > 0).mean(0).argsort()[::-1]
        self.values = {int(fires[0]): torch.tensor([25.0, -30.0, NAN]), int(fires[1]): torch.tensor([NAN, 20.0, NAN])}

    def attached(self):
        return attach_saes(make_model(self.architecture), self.sae)

    def of_row(self, row):
        return {f: v[row:row + 1] for f, v in self.values.items()}

    def edit(self, acts, row=slice(None)):
        return edited(acts, "clamp", {f: v[row] for f, v in self.values.items()})

    @functools.cache  # noqa: B019  (cases live as long as the tests)
    def by_hand(self, row, tokens="all"):
        """(text, logits of each step) of one row; tokens None is the model without edits."""
        ids, width, steps = torch.tensor([PROMPTS[row]]), len(PROMPTS[row]), []

        def choose(ids, mask):
            columns = torch.arange(ids.shape[1])
            inside = {"all": columns >= 0, "prompt": columns < width, "generated": columns >= width}[tokens]
            return ordinary(ids) & inside

        hook = FullEdit(self.model, self.sae, lambda acts: self.edit(acts, slice(row, row + 1)), read=self.site,
                        write=self.written, choose=choose)
        for _ in range(NEW):
            if tokens is None:
                logits = self.model(input_ids=ids).logits[:, -1]
            else:
                with hook:
                    logits = self.model(input_ids=ids).logits[:, -1]
            steps.append(logits[0])
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        return ids[0].tolist(), torch.stack(steps)


case_of = functools.cache(Case)


def generate(model, ids=LEFT, **settings):
    mask = (ids != 0).long()
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False, **settings})


def texts(result, ids=LEFT):
    """The text of each row without its padding."""
    sequences = getattr(result, "sequences", result)
    padding = (ids == 0).repeat_interleave(len(sequences) // len(ids), dim=0)
    return [[*row[:ids.shape[1]][~p].tolist(), *row[ids.shape[1]:].tolist()]
            for row, p in zip(sequences, padding, strict=True)]


def by_hand(case, tokens="all"):
    return [case.by_hand(row, tokens)[0] for row in range(3)]


def under_the_plain_hook(case, ids=LEFT, choose=ordinary, seed=None, **settings):
    """generate without a cache, so that the hook sees whole texts."""
    hook = FullEdit(case.model, case.sae, case.edit, read=case.site, choose=choose)
    if seed is not None:
        torch.manual_seed(seed)
    with hook:
        return generate(case.model, ids, use_cache=False, return_dict_in_generate=True, **settings)


CHOOSE = {
    "all": ordinary,
    "prompt": lambda ids, mask: ordinary(ids, mask) & (torch.arange(ids.shape[1]) < WIDTH),
    "generated": lambda ids, mask: ordinary(ids, mask) & (torch.arange(ids.shape[1]) >= WIDTH),
}


def holds(case, features, texts):
    """Assert that captured rows are the features of each text, computed whole by the plain equations.

    What reaches the site does not depend on edits at the site, so the reference needs none.
    """
    assert features.doc_id.tolist() == [doc for doc, text in enumerate(texts) for _ in text]
    assert features.position.tolist() == [i for text in texts for i in range(len(text))]
    assert features.token_id.tolist() == [token for text in texts for token in text]
    for doc, text in enumerate(texts):
        ids = torch.tensor([text])
        acts = torch.from_numpy(encode(case.sae, array(sample(case.model, case.site, ids)))[0])
        acts[~ordinary(ids)[0]] = 0
        got = features[features.doc_id == doc].to_dense().double()
        torch.testing.assert_close(got, acts, rtol=1e-4, atol=1e-4)


def read(texts):
    """Of each text the tokens that a pass has read: all but the last."""
    return [text[:-1] for text in texts]


@contextlib.contextmanager
def adding_by_hand(layer, change, choose):
    """Add a change (d,) to what a layer gives, by a plain hook that counts the columns of passes with a cache itself.

    choose(columns) tells where: boolean (tokens,) or (batch, tokens).
    """
    begun = 0

    def hook(module, args, output):
        nonlocal begun
        x = output if isinstance(output, torch.Tensor) else output[0]
        columns = torch.arange(begun, begun + x.shape[1])
        begun += x.shape[1]
        new = x + choose(columns).unsqueeze(-1) * change
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def told_apart(make, path, width, rows, call):
    """Assert that each choice of tokens gives the text of a plain hook that counts columns, `width` of them prompt."""
    model, sae = make(), make_sae(32, 64, f"{path}.output")
    del sae.metadata["typical_norm"]
    inside = {"all": lambda c: c >= 0, "prompt": lambda c: c < width, "generated": lambda c: c >= width}
    clean, texts = call(model), {}
    for tokens, chosen in inside.items():
        with adding_by_hand(model.get_submodule(path), STRENGTH * sae.W_dec[3].detach(), chosen):
            texts[tokens] = call(model).tolist()
    attach_saes(model, sae)
    for tokens, text in texts.items():
        with model.saes.add({3: STRENGTH}, tokens=tokens, special_tokens=True) as edit:
            assert call(model).tolist() == text, tokens
        if tokens == "prompt":
            assert edit.positions_edited == width * rows
    assert len({str(text) for text in (clean.tolist(), *texts.values())}) > 2
