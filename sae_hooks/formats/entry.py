"""What a repository or folder offers, told from names, sizes and headers alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".distcp")
WEIGHTS = (".safetensors", ".npz", *PICKLES)


class Layout(NamedTuple):
    """What the files of an SAE are called: its weights, where N is any number, and its config, if it must have one.
    `hint`: what to say of a config that is missing."""

    weights: str
    config: str | None = None
    hint: str = ""

    def names(self, path: str) -> bool:
        """Whether a path ends in the name of such weights."""
        return re.search(rf"(?:^|/){re.escape(self.weights).replace('N', '[0-9]+')}$", path) is not None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One SAE that a source offers. None: not told by names, sizes, headers and small configs.

    `weights` and `config` are posix paths inside the source. `site` is where the SAE reads, `site_out` where it writes
    (the same except for transcoders). `kind` is what people call it: "resid_post", "mlp_out", "attn_out", "transcoder",
    "embedding"; "crosscoder" and "clt" are listed, but cannot be loaded. `l0` is the average number of active features
    a token; where Gemma Scope 2 says only "small", "medium" or "big", the middle of what that word covers. `hook`:
    the name that its config gives to where it reads, where that alone does not tell the site; `placed`: the site is
    the caller's word. `evaluation`: a small file with the L0 that was measured, read only where that decides. `flaw`:
    why its config cannot be read, where it cannot.
    """

    dialect: str
    weights: str
    config: str | None = None
    kind: str | None = None
    site: str | None = None
    site_out: str | None = None
    layer: int | None = None
    width: int | None = None
    l0: float | None = None
    d_in: int | None = None
    model_name: str | None = None
    hook: str | None = None
    placed: bool = False
    evaluation: str | None = None
    flaw: str | None = None

    @property
    def pickled(self) -> bool:
        """Whether its weights are a pickle, which is read on request only."""
        return self.weights.endswith(PICKLES)

    @property
    def shown(self) -> str:
        """What a table shows as its site."""
        return "(unreadable)" if self.flaw else self.site or f"({self.kind or 'unknown'})"


def all_of_them(found: list[Entry]) -> list[Entry]:
    """What is meant where neither site nor layer is given."""
    return found


def width_from_label(label: str) -> int:
    """Number of features that a folder name means: "16k" is 2^14, "1m" is 2^20, "131k" 2^17; digits alone are exact.

    Raises ValueError for what is no label, and for one that is near no power of two: "3k" may be 3,000 or 3,072.
    """
    found = re.fullmatch(r"(\d{1,9})([km]?)", label.lower())
    if found is None:
        raise ValueError(f"{label!r} is not a width such as '16k' or '1m'")
    number, unit = int(found[1]), found[2]
    if not unit or not number:
        return number
    about = number * {"k": 1000, "m": 1_000_000}[unit]
    near = 2 ** round(math.log2(about))
    if not 0.95 < near / about < 1.05:
        raise ValueError(f"{label!r} is near no power of two; give the number of features")
    return int(near)


def told_width(label: str) -> int | None:
    """Number of features that a folder name means, or None if it does not tell it."""
    try:
        return width_from_label(label)
    except ValueError:
        return None


def d_in_from_size(size: int, width: int | None, *, affine: bool = False, vectors: int = 2,
                   most_overhead: int = 2048) -> int | None:
    """d_in of a float32 SAE file of `size` bytes with d_out = d_in, or None if no d_in explains the size.

    The file holds W_enc, W_dec (2 d F), `vectors` such as b_enc and threshold (F each), b_dec (d), with `affine` a skip
    (d d), and headers of at most `most_overhead` bytes. One more unit of d_in costs 8 F bytes, so for larger F the
    answer is unique. Nothing says that the file is what is assumed here: one of float64 looks like 2 d + 1, and no
    model has an odd width; a compressed one can look like any.
    """
    if width is None or 8 * width <= most_overhead:
        return None
    per_unit, room = 2 * width + 1, size // 4 - vectors * width
    if room <= 0:
        return None
    d_in = (math.isqrt(per_unit * per_unit + 4 * room) - per_unit) // 2 if affine else room // per_unit
    exact = 4 * (2 * d_in * width + vectors * width + d_in + (d_in * d_in if affine else 0))
    return d_in if d_in > 0 and d_in % 2 == 0 and 0 <= size - exact <= most_overhead else None
