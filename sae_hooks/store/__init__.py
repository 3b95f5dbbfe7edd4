"""The feature store on disk: written shard by shard by an export, opened by `open_features`."""

from .contexts import Context
from .reading import FeatureStore, open_features

__all__ = ["Context", "FeatureStore", "open_features"]
