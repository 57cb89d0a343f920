"""Whether a cluster is set up so that nothing is lost on it: asked on every node, by a task there."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import ray

from faultguard import _ray
from faultguard._failover import recommended_ray_env
from faultguard._settings import resolve_checkpoint_dir
from faultguard.errors import FaultguardError
from faultguard.storage import open_store, store_id

__all__ = ["Finding", "examine"]

NODE_WAIT_S = 30.0
WAYS_OUT = "give checkpoint_dir a path on a file system that all nodes share, or an object store, or use one node"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: whether it is right, where, and what was seen."""

    ok: bool
    where: str
    text: str


def examine(checkpoint_dir: str | None) -> list[Finding]:
    """Look at the cluster that this process is connected to, and at the store. Nothing is changed but a new store's id.

    Args:
        checkpoint_dir: as `init` takes it.
    """
    place, expected, findings = _store_here(checkpoint_dir)
    settings = {"this process": dict(os.environ)}
    nodes: Any = ray.nodes  # type: ignore[attr-defined, unused-ignore] # Ray left it unannotated
    alive = [(node["NodeID"], f"node {node['NodeID'][:8]} ({node['NodeManagerAddress']})") for node in nodes() if node["Alive"]]
    asked = [(where, _ray.run_on_node(_look_around, node_id, place if expected else "")) for node_id, where in alive]
    deadline = time.monotonic() + NODE_WAIT_S
    for where, ref in asked:
        try:
            settings[where], found, why = _ray.get_within(ref, deadline - time.monotonic())
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            findings.append(Finding(ok=False, where=where, text=f"does not answer: {lines[0]}"))
            continue
        if expected and found == expected:
            findings.append(Finding(ok=True, where=where, text=f"sees the store {place}"))
        elif expected:
            seen = why or f"another store (id {found[:8]}, not {expected[:8]})"
            findings.append(Finding(ok=False, where=where, text=f"sees at {place}: {seen}; the directory is not shared: {WAYS_OUT}"))
    return findings + [_failover(where, environment) for where, environment in settings.items()]


def _store_here(checkpoint_dir: str | None) -> tuple[str, str, list[Finding]]:
    """The store as this process sees it: where, its id (empty: it cannot be used), and what there is to say."""
    place = str(checkpoint_dir)
    try:
        place = resolve_checkpoint_dir(checkpoint_dir)
        expected = store_id(open_store(place))
    except FaultguardError as error:
        return place, "", [Finding(ok=False, where="store", text=str(error))]
    return place, expected, [Finding(ok=True, where="store", text=f"{place} can be written and locked against a second writer")]


def _look_around(place: str) -> tuple[dict[str, str], str, str]:
    """On a node: its environment, the id of the store that it sees, or why it sees none."""
    environment = {name: os.environ[name] for name in recommended_ray_env() if name in os.environ}
    try:
        return environment, store_id(open_store(place, create=False), create=False) if place else "", ""
    except FaultguardError as error:
        return environment, "", str(error)


def _failover(where: str, environment: dict[str, str]) -> Finding:
    """Whether Ray notices there soon that a node has frozen."""
    differs = [f"{name}={value}" for name, value in recommended_ray_env().items() if environment.get(name) != value]
    if not differs:
        return Finding(ok=True, where=where, text="replaces a frozen node in about 20 s")
    text = f"replaces a frozen node only after about 440 s; set {' '.join(differs)} in its environment before Ray starts there"
    return Finding(ok=False, where=where, text=text)
