"""Objects that keep a state of their own: how to read it and how to give it back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from faultguard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Tracked", "tracker"]

_PAIR = 2


@dataclass(frozen=True, slots=True)
class Tracked:
    """One tracked object: `save` reads its state, `restore` gives one back."""

    source: Any
    save: Callable[[], Any]
    restore: Callable[[Any], Any]


def tracker(name: str, source: Any) -> Tracked:
    """Find out how the state of an object is read and restored.

    Raises:
        UsageError: it has no such way that is known.
    """
    if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
        return Tracked(source, source.state_dict, source.load_state_dict)
    if source is random or isinstance(source, random.Random):
        return Tracked(source, source.getstate, source.setstate)
    if isinstance(source, tuple) and len(source) == _PAIR and all(callable(part) for part in source):
        return Tracked(source, *source)
    if _is_from(source, "numpy") and hasattr(source, "get_state") and hasattr(source, "set_state"):
        return Tracked(source, source.get_state, source.set_state)
    if _is_from(source, "numpy") and hasattr(source, "bit_generator"):  # the module numpy.random has one, too: it is a submodule
        bits = source.bit_generator
        return Tracked(source, lambda: bits.state, lambda state: setattr(bits, "state", state))
    if _is_from(source, "torch") and hasattr(source, "get_state") and hasattr(source, "set_state"):
        return Tracked(source, lambda: source.get_state().numpy(), lambda state: source.set_state(_tensor(state)))
    msg = (
        f"track({name}={type(source).__name__}) is refused: it has no state_dict()/load_state_dict() and is no known random generator; "
        f"pass a pair (get, set) of callables, such as (lambda: model.coef_, set_coef)"
    )
    raise UsageError(msg)


def _is_from(source: Any, package: str) -> bool:
    module = getattr(source, "__name__", "") if type(source).__name__ == "module" else type(source).__module__
    return str(module).partition(".")[0] == package


def _tensor(state: Any) -> Any:
    import torch

    return torch.from_numpy(state)
