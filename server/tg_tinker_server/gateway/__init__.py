"""The Tinker protocol over HTTP: translates and calls the service layer, and decides nothing itself."""
