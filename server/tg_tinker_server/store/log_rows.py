"""Nodes of the tenants' Merkle trees: every complete subtree's hash, written once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import Connection, and_, bindparam, func, insert, select

from tg_tinker_server.store import tables as t

Node = tuple[int, int]  # level, index: the complete subtree over leaves [index * 2**level, (index + 1) * 2**level)

# Built once, as in `ledger_rows`: they run with every entry.
_C = t.log_nodes.c
_INSERT = insert(t.log_nodes)
_LAST_LEAF = select(_C.idx).where(_C.tenant == bindparam("tenant"), _C.level == 0).order_by(_C.idx.desc()).limit(1)
_ONE = select(_C.hash).where(
    _C.tenant == bindparam("tenant"), _C.level == bindparam("level"), _C.idx == bindparam("idx")
)
# For pairs in a list SQLite reads all nodes of the tenant; an outer join leaves it no choice but to look up each.
_WANTED = func.json_each(bindparam("nodes")).table_valued("value")
_SOME = select(_C.level, _C.idx, _C.hash).select_from(
    _WANTED.outerjoin(
        t.log_nodes,
        and_(
            _C.tenant == bindparam("tenant"),
            _C.level == func.json_extract(_WANTED.c.value, "$[0]"),
            _C.idx == func.json_extract(_WANTED.c.value, "$[1]"),
        ),
    )
)
_LEAVES = {
    table: select(table.c.leaf_index, table.c.body_json)
    .where(
        table.c.tenant == bindparam("tenant"),
        table.c.leaf_index >= bindparam("start"),
        table.c.leaf_index < bindparam("end"),
    )
    .order_by(table.c.leaf_index)
    for table in (t.ledger, t.audit)
}


def size(tx: Connection, tenant: str) -> int:
    """How many leaves a tenant's tree has."""
    last = tx.execute(_LAST_LEAF, {"tenant": tenant}).scalar()
    return 0 if last is None else int(last) + 1


def node(tx: Connection, tenant: str, at: Node) -> bytes | None:
    """One node's hash; ``None`` where the subtree is not complete."""
    found = tx.execute(_ONE, {"tenant": tenant, "level": at[0], "idx": at[1]}).scalar()
    return None if found is None else bytes(found)


def nodes(tx: Connection, tenant: str, wanted: Iterable[Node]) -> dict[Node, bytes]:
    """The hashes of these nodes; those that are not there are left out."""
    rows = tx.execute(_SOME, {"tenant": tenant, "nodes": json.dumps(list(wanted))})
    return {(int(level), int(idx)): bytes(value) for level, idx, value in rows if value is not None}


def insert_nodes(tx: Connection, tenant: str, added: Mapping[Node, bytes]) -> None:
    """Add nodes; each level only ever grows at its end."""
    tx.execute(
        _INSERT, [{"tenant": tenant, "level": at[0], "idx": at[1], "hash": value} for at, value in added.items()]
    )


def leaves(tx: Connection, tenant: str, start: int, count: int) -> Sequence[str]:
    """Canonical bodies of consecutive entries, ledger and audit alike, in the order of the tree."""
    span = {"tenant": tenant, "start": start, "end": start + count}
    found = {int(at): str(body) for query in _LEAVES.values() for at, body in tx.execute(query, span)}
    return [found[at] for at in sorted(found)]
