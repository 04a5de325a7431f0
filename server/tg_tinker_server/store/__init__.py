"""Tables and transactions; the only package that touches SQL."""
