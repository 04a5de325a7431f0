"""Privacy budgets without a server: what steps cost, what they add up to, and what to choose.

``plan`` solves for the one thing that is not known yet; ``gate_epsilon``, ``pld_epsilon`` and ``privacy_profile`` say
what a history of releases means. Accountants that need more than numpy are imported when they are asked.
"""

from tg_tinker.privacy.accounting import ProfilePoint, gate_epsilon, gdp_estimate, pld_epsilon, privacy_profile
from tg_tinker.privacy.curves import Curve
from tg_tinker.privacy.planning import plan
from tg_tinker.privacy.plans import Plan

__all__ = [
    "Curve",
    "Plan",
    "ProfilePoint",
    "gate_epsilon",
    "gdp_estimate",
    "plan",
    "pld_epsilon",
    "privacy_profile",
]
