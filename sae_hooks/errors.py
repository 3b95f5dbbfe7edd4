"""Every error that sae_hooks raises on purpose.

    SaeError
    ├── SaeFormatError (ValueError)          a file or config is not what its format says
    │   └── UnsafeFileError                  and reading it could run code, escape its folder or exhaust memory
    ├── SaeMismatchError (ValueError)        the SAE does not fit the model or the input
    │   └── SiteError                        the model has no such place to read or write
    ├── SaeNotFoundError (FileNotFoundError) no such repository, revision, file, layer or width
    ├── SaeDownloadError (OSError)           it may exist, but could not be fetched whole
    ├── SaeAttachError (RuntimeError)        the model's present state does not allow it
    ├── EditError (ValueError)               an edit asks for what cannot be done
    ├── DataError (ValueError)               texts, or what was computed from them, are missing, unfit or others
    └── TrainingError (RuntimeError)         a training cannot start, or cannot go on
        └── CheckpointError (ValueError)     what it should go on from is broken or another training's

A message says what was expected, what came, where, and what to do. The underlying exception is its `__cause__`.
"""


class SaeError(Exception):
    """Base of all errors of this package."""


class SaeFormatError(SaeError, ValueError):
    """A file or config is not what its format says."""


class UnsafeFileError(SaeFormatError):
    """Reading the file could run code, escape its folder or exhaust memory."""


class SaeMismatchError(SaeError, ValueError):
    """The SAE does not fit the model or the input."""


class SiteError(SaeMismatchError):
    """The model has no such place to read or write."""


class SaeNotFoundError(SaeError, FileNotFoundError):
    """No such repository, revision, file, layer or width."""


class SaeDownloadError(SaeError, OSError):
    """The file may exist, but could not be fetched whole."""


class SaeAttachError(SaeError, RuntimeError):
    """The model's present state does not allow the operation."""


class EditError(SaeError, ValueError):
    """An edit asks for what cannot be done."""


class DataError(SaeError, ValueError):
    """Texts, or what was computed from them, are missing, unfit, or not those that were meant."""


class TrainingError(SaeError, RuntimeError):
    """A training cannot start, or cannot go on."""


class CheckpointError(TrainingError, ValueError):
    """What a training should go on from is broken, or belongs to another training."""


class SaeWarning(UserWarning):
    """Something worked in a way that the caller may not have meant."""
