"""Flower carries the messages: the one place that imports it (``pip install 'tg-tinker[federation]'``)."""
