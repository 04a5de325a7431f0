"""What the federation is compared with: each site alone and all records in one place, at the same epsilon per site.

These runs learn from the same texts a second time and spend a second budget, under names of their own: a real site
would have to choose. Pooling is what the parties may not do; it shows what that costs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tg_tinker import ServiceClient, TrainingClient
from tg_tinker.errors import DPBudgetExceededError, InvalidRequestError, ResourceNotFoundError
from tg_tinker.types import TrainingConfig
from tg_tinker_server.demo.measure import BOUNDARY, perplexity
from tg_tinker_server.federated_demo.parties import Party
from tg_tinker_server.federated_demo.settings import FederatedDemoSettings
from tg_tinker_server.federated_demo.state import Arm, Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One arm to train.

    Attributes:
        name: of the arm.
        party: whose server trains it.
        dataset_id: whose budget it spends.
    """

    name: str
    party: Party
    dataset_id: str
    config: TrainingConfig


class Stopped(Exception):
    """The other arms are stopped; this one ends before its next step."""


def register(service: ServiceClient, dataset_id: str, texts: Sequence[str], settings: FederatedDemoSettings) -> None:
    """Register texts as records, each its own privacy unit, unless an earlier call did."""
    try:
        service.get_dataset(dataset_id)
    except ResourceNotFoundError:
        service.create_dataset(
            dataset_id,
            [BOUNDARY + text + BOUNDARY for text in texts],
            target_epsilon=settings.target_epsilon,
            target_delta=settings.target_delta,
        )


def train_all(
    plans: Sequence[Plan],
    held_out: Sequence[str],
    settings: FederatedDemoSettings,
    *,
    known: Sequence[Arm],
    tell: Callable[[Arm], None],
    check: Callable[[], None],
) -> list[Arm]:
    """Train all arms at once, each on its own party's server.

    Args:
        known: arms of an earlier call; unfinished ones go on.
        tell: called with an arm after each part of its training, one at a time.
        check: called between steps; raises to stop everything.
    """
    stop, lock = threading.Event(), threading.Lock()
    before = {arm.name: arm for arm in known}

    def told(arm: Arm) -> None:
        with lock:
            tell(arm)

    def one(plan: Plan) -> Arm:
        arm = before.get(plan.name) or Arm(name=plan.name)
        if arm.finished:
            return arm
        with plan.party.client() as service:
            return _Training(service, plan, held_out, settings, told, stop).from_(arm)

    pool = ThreadPoolExecutor(len(plans), thread_name_prefix="arm")
    try:
        futures = [pool.submit(one, plan) for plan in plans]
        for future in as_completed(futures):
            future.result()
            check()
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Training:
    service: ServiceClient
    plan: Plan
    held_out: Sequence[str]
    settings: FederatedDemoSettings
    tell: Callable[[Arm], None]
    stop: threading.Event

    def from_(self, arm: Arm) -> Arm:
        """Train from where the arm stands."""
        if arm.run_id:
            tc = self.service.get_training_client(arm.run_id)
            arm = self._settled(tc, arm)
        else:
            tc = self.service.create_training_client(self.plan.config)
            arm = arm.but(run_id=tc.id)
            self.tell(arm)
        while not arm.finished:
            part = min(self.settings.steps, (tc.step // self.settings.local_steps + 1) * self.settings.local_steps)
            spent = not self._steps(tc, part)
            found = perplexity(tc, self.held_out, batch_size=self.settings.eval_batch_size)
            epsilon = self.service.get_privacy_ledger(self.plan.dataset_id).epsilon_spent
            arm = arm.at(Point(step=tc.step, perplexity=found, epsilon=epsilon))
            arm = arm.but(finished=spent or tc.step >= self.settings.steps)
            self.tell(arm)
        return arm

    def _settled(self, tc: TrainingClient, arm: Arm) -> Arm:
        """What an interrupted call left: a batch that was drawn is stepped on, as nothing gives it back."""
        try:
            if tc.step < self.settings.steps:
                tc.optim_step().result()
        except InvalidRequestError as e:
            if e.field != "optim_step":
                raise
            # Nothing was drawn, and the refusal cost nothing.
        except DPBudgetExceededError:
            pass  # the loop that follows finds the same
        return arm.but(points=tuple(p for p in arm.points if p.step <= tc.step))

    def _steps(self, tc: TrainingClient, last: int) -> bool:
        """Steps up to ``last``; False if the budget ended before, because a paid step was lost."""
        while tc.step < last:
            if self.stop.is_set():
                raise Stopped
            try:
                tc.forward_backward(dataset=self.plan.dataset_id)
                tc.optim_step().result()
            except DPBudgetExceededError:
                return False
        return True
