"""What a run's dataset has spent, and what more steps would cost."""

from __future__ import annotations

import math

from tg_tinker._transport import Transport
from tg_tinker.errors import InvalidRequestError
from tg_tinker.wire import requests
from tg_tinker.wire.privacy import Forecast, forecast_from_proto


class PrivacyView:
    """Asks the ledger anew each time, because other runs may spend from the same dataset."""

    def __init__(self, transport: Transport, run_id: str) -> None:
        self._transport = transport
        self._run_id = run_id

    @property
    def total_epsilon(self) -> float:
        """Spent by every run on the dataset, at ``delta``."""
        return self._forecast(0).epsilon_now

    @property
    def delta(self) -> float:
        """The delta that epsilon is stated at."""
        return self._forecast(0).delta

    @property
    def ledger_head(self) -> str:
        """Hash of the ledger's last entry, in hex; ``service.get_privacy_ledger`` fetches the whole ledger."""
        return self._forecast(0).ledger_head.hex()

    def steps_remaining(self) -> float:
        """Steps of this run that the budget still allows, a whole number; ``inf`` without a finite target."""
        remaining = self._forecast(0).steps_remaining
        return math.inf if remaining < 0 else remaining

    def epsilon_after(self, steps: int) -> float:
        """What the dataset will have spent after ``steps`` more steps of this run, if nobody else spends.

        Raises:
            InvalidRequestError: ``steps`` is negative.
        """
        return self._forecast(steps).epsilon_after

    def __repr__(self) -> str:
        return f"<PrivacyView of {self._run_id}>"

    def _forecast(self, steps: int) -> Forecast:
        if not 0 <= steps < 2**63:
            raise InvalidRequestError("steps must be 0 or more", field="steps", constraint=">= 0")
        return forecast_from_proto(self._transport.call(requests.forecast(self._run_id, steps)))
