"""The demo: one command that trains a private model end to end, through the public client alone."""
