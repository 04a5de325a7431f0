"""What an auditor needs of ledgers and audit logs, without the server's code: reading and checking them offline."""

from tg_tinker.ledger.chain import (
    AUDIT_DOMAIN,
    LEDGER_DOMAIN,
    START,
    ChainEntry,
    LedgerEntry,
    audit_body,
    entry_hash,
    verify_audit_chain,
    verify_chain,
)
from tg_tinker.ledger.dataset import PrivacyLedger

__all__ = [
    "AUDIT_DOMAIN",
    "LEDGER_DOMAIN",
    "START",
    "ChainEntry",
    "LedgerEntry",
    "PrivacyLedger",
    "audit_body",
    "entry_hash",
    "verify_audit_chain",
    "verify_chain",
]
