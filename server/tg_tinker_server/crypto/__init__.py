"""Keys and ciphers; the only package that touches cryptography."""
