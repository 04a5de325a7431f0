"""Checks every node of the stored Merkle trees, with nothing but SQL and SHA-256."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path


def check_trees(database: Path) -> int:
    """Every entry is a leaf, and every complete subtree has its node (RFC 6962, section 2.1); returns the leaves.

    Raises:
        AssertionError: naming the tenant and what does not fit.
    """
    with closing(sqlite3.connect(database)) as connection:
        bodies: dict[str, dict[int, str]] = {}
        for table in ("ledger", "audit"):
            for tenant, index, body in connection.execute(f"SELECT tenant, leaf_index, body_json FROM {table}"):
                if index in bodies.setdefault(tenant, {}):
                    raise AssertionError(f"{tenant}: two entries are leaf {index}")
                bodies[tenant][index] = body
        stored: dict[str, dict[tuple[int, int], bytes]] = {}
        for tenant, level, index, value in connection.execute("SELECT tenant, level, idx, hash FROM log_nodes"):
            stored.setdefault(tenant, {})[level, index] = value
    if set(bodies) != set(stored):
        raise AssertionError(f"entries of {sorted(bodies)}, but trees of {sorted(stored)}")
    for tenant, leaves in bodies.items():
        if sorted(leaves) != list(range(len(leaves))):
            raise AssertionError(f"{tenant}: {len(leaves)} entries are not leaves 0 to {len(leaves) - 1}")
        if stored[tenant] != _nodes([leaves[i] for i in range(len(leaves))]):
            raise AssertionError(f"{tenant}: the stored nodes are not those of its {len(leaves)} entries")
    return sum(map(len, bodies.values()))


def _nodes(bodies: list[str]) -> dict[tuple[int, int], bytes]:
    row = [hashlib.sha256(b"\x00" + body.encode()).digest() for body in bodies]
    nodes: dict[tuple[int, int], bytes] = {}
    level = 0
    while row:
        nodes.update({(level, i): value for i, value in enumerate(row)})
        row = [hashlib.sha256(b"\x01" + row[i] + row[i + 1]).digest() for i in range(0, len(row) - 1, 2)]
        level += 1
    return nodes
