"""Parts of the ledger's benchmark: building a long history, and measuring a server's work on it."""
