"""Privacy budgets without a server: what steps cost, what they add up to, and what to choose."""
