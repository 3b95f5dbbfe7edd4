"""sae_hooks: sparse autoencoders as hooks in a running Hugging Face model.

model = attach_saes(gemma, "google/gemma-scope-9b-pt-res")
with model.saes.clamp({1234: 80.0}, layer=20):
    out = model.generate(**inputs)
"""

from .attach import attach_saes, detach_saes
from .edits import Edits
from .errors import (
    CheckpointError,
    DataError,
    EditError,
    SaeAttachError,
    SaeDownloadError,
    SaeError,
    SaeFormatError,
    SaeMismatchError,
    SaeNotFoundError,
    SaeWarning,
    SiteError,
    TrainingError,
    UnsafeFileError,
)
from .export import export_features
from .extract import Extracted, extract_features
from .find import FoundFeature, find_features
from .hub import list_saes, load_sae
from .sae import SAE
from .sparse import SparseFeatures
from .statistics import FeatureStatistics
from .store import FeatureStore, open_features

__version__ = "0.1.0"
__all__ = [
    "SAE",
    "CheckpointError",
    "DataError",
    "EditError",
    "Edits",
    "Extracted",
    "FeatureStatistics",
    "FeatureStore",
    "FoundFeature",
    "SaeAttachError",
    "SaeDownloadError",
    "SaeError",
    "SaeFormatError",
    "SaeMismatchError",
    "SaeNotFoundError",
    "SaeWarning",
    "SiteError",
    "SparseFeatures",
    "TrainingError",
    "UnsafeFileError",
    "attach_saes",
    "detach_saes",
    "export_features",
    "extract_features",
    "find_features",
    "list_saes",
    "load_sae",
    "open_features",
]
