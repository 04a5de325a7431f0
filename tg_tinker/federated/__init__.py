"""Several owners of data train one model together and share none of it.

Each site has its own tg-tinker server with its data, keys and ledger; only protected updates of an adapter leave it.
A coordinator aggregates. Messages travel over a link (``link.py``); Flower is one, memory is another.
"""
