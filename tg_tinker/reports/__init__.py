"""Privacy reports: what a dataset's ledger says, as a document to sign, to check offline, and to read."""
