"""Generated protobuf code; `make proto` writes it, nobody edits it."""
