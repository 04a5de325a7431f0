"""Command groups that need the SDK alone; ``tg_tinker.cli`` loads each when it is called for."""
