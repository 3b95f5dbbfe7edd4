"""What torch.compile is made to do for our hooks: forget its graphs, and look where hooks lie before it runs one.

It looks at hooks that it has traced, but by default not where it saw none: hooks that come late never run, and layers
share graphs, so that one with a hook may run the graph of one without (edits inside layers were lost in most passes).
A setting of its own has it look at six tables of hooks of every module before every step of a generation. Here it looks
at the tables in which ours lie, of modules of the same classes: other modules can share no graph with them.
"""

from collections.abc import Iterable
from functools import wraps
from threading import Lock
from typing import Any
from warnings import warn
from weakref import WeakKeyDictionary

from torch import nn

from .doors import PassHook
from .errors import SaeWarning
from .runtime import Runtime

Table = tuple[type[nn.Module], str]  # a class, and the attribute of its modules in which hooks lie
AFTER, BEFORE = "_forward_hooks", "_forward_pre_hooks"
EMPTY = PassHook.before, PassHook._before  # where these are not part of a graph, one of their own would be of nothing
GUARD = "EMPTY_NN_MODULE_HOOKS_DICT"  # what torch has in place of looking at an empty table; private: 2.11, 2.13
_tables: WeakKeyDictionary[Runtime, frozenset[Table]] = WeakKeyDictionary()
_lock = Lock()


def anew(runtime: Runtime, tables: Iterable[Table]) -> None:
    """Make torch.compile drop what it has compiled, and from now on look at tables like these, in which a runtime's
    hooks lie: at none where it has no hooks any more."""
    from torch import _dynamo as dynamo  # seconds to import, but transformers imports it with any model

    with _lock:
        _tables[runtime] = frozenset(tables)
        looked_at = frozenset[Table]().union(*_tables.values())
        builder: Any = getattr(getattr(dynamo, "guards", None), "GuardBuilder", None)
        guard: Any = getattr(builder, GUARD, None)
        if guard is None:
            warn("this version of torch is not known to sae_hooks: edits inside layers may be lost in models compiled "
                 "by torch.compile; run them uncompiled", SaeWarning, stacklevel=4)
        else:
            plain = getattr(guard, "plain", guard)
            setattr(builder, GUARD, _looking(plain, looked_at) if looked_at else plain)
        skip: Any = getattr(dynamo.eval_frame, "skip_code", lambda code: None)
        for function in EMPTY:
            skip(function.__code__)
        dynamo.reset()


def _looking(plain: Any, tables: frozenset[Table]) -> Any:
    """torch's own guard of an empty table, except for tables like these, of modules of the classes or made from them:
    those must stay empty."""
    @wraps(plain)
    def guard_empty_table(builder: Any, guard: Any) -> None:
        table = guard.originating_source
        module = builder.get(table.base)
        if any(table.member == attribute and isinstance(module, kind) for kind, attribute in tables):
            builder.SEQUENCE_LENGTH(guard)
        else:
            plain(builder, guard)

    guard_empty_table.plain = plain  # type: ignore[attr-defined]
    return guard_empty_table
