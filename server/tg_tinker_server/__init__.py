"""The TG-Tinker server: training, privacy ledger and encrypted artifacts behind gRPC."""
