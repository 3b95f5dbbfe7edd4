"""Finding, loading, saving and publishing SAEs: the only way from files to `SAE` and back."""

from .reading import SaeFile, SaeTable, find_saes, list_saes, load_sae
from .writing import push_to_hub, save_pretrained, stale_statistics

__all__ = ["SaeFile", "SaeTable", "find_saes", "list_saes", "load_sae", "push_to_hub", "save_pretrained",
           "stale_statistics"]
