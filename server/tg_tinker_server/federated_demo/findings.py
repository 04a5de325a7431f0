"""Everything that the federated demo found, as values: the table, the verdict, each site's signed epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tg_tinker.federated.report_file import WrittenReport
from tg_tinker.federated.result import FederatedResult
from tg_tinker.federated.statement import SiteStatement, verify_statement
from tg_tinker.privacy.accounting import gate_epsilon
from tg_tinker.types import ArtifactInfo
from tg_tinker_server.demo.report import small
from tg_tinker_server.federated_demo.settings import FederatedDemoSettings
from tg_tinker_server.federated_demo.state import Arm, DemoRecord, Point

POOLED = "all pooled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table."""

    name: str
    perplexity: float
    epsilon: float | None
    remark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """What one site signed, as text.

    Attributes:
        rounds: in which it trained.
        checked: epsilon recomputed here from noise, rate and steps is the one that the site signed.
    """

    name: str
    records: int
    epsilon: str
    dataset_epsilon: str
    noise_multiplier: str
    sample_rate: str
    steps: int
    rounds: int
    log_origin: str
    checked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything on the page.

    Attributes:
        before: perplexity of the model before training.
        history: of the federated model, by round.
        arms: each site alone, by its name.
        reopened: perplexity of the final artifact, decrypted into a fresh client.
        report: the signed federation report, as it was written and checked.
    """

    settings: FederatedDemoSettings
    source: str
    in_process: bool
    before: float
    history: tuple[Point, ...]
    arms: Mapping[str, Arm]
    pooled: Arm
    sites: tuple[SiteFacts, ...]
    result: FederatedResult
    artifact: ArtifactInfo
    reopened: float
    held_out: int
    seconds: float
    made: str
    report: WrittenReport

    @property
    def federated(self) -> float:
        """Perplexity of the federated model."""
        return self.history[-1].perplexity

    @property
    def alone(self) -> float:
        """Mean perplexity of the sites alone."""
        return math.fsum(arm.perplexity for arm in self.arms.values()) / len(self.arms)

    @property
    def reopened_equal(self) -> bool:
        """Whether the artifact is the model that was measured after the last round."""
        return math.isclose(self.reopened, self.federated, rel_tol=1e-6)

    def rows(self) -> list[Row]:
        """The table."""
        return [
            Row(name="before training", perplexity=self.before, epsilon=None),
            *(
                Row(name=f"{name} alone", perplexity=arm.perplexity, epsilon=arm.points[-1].epsilon)
                for name, arm in self.arms.items()
            ),
            Row(name="mean of the lone sites", perplexity=self.alone, epsilon=None),
            Row(name="federation", perplexity=self.federated, epsilon=self.history[-1].epsilon, remark=" at most"),
            Row(
                name=POOLED,
                perplexity=self.pooled.perplexity,
                epsilon=self.pooled.points[-1].epsilon,
                remark=", which the parties may not do",
            ),
        ]

    def verdict(self) -> str:
        """Whether training together was worth it, either way."""
        gain = self.alone / self.federated
        if gain <= 1:
            return (
                f"In this run the federation does not beat training alone: {self.federated:.1f} against "
                f"{self.alone:.1f} on average."
            )
        return (
            f"The federation beats the mean of the lone sites by a factor of {gain:.2f}; pooling would be better by "
            f"another {self.federated / self.pooled.perplexity:.2f}."
        )

    def coordinator_promise(self) -> str:
        """What holds for everybody in any site's records, and what the coordinator itself spent."""
        records = self.result.records
        people = "each record is at one site, so it is the largest" if records.people == "disjoint" else "the sum"
        epsilon, delta = ("inf" if value is None else small(value) for value in (records.epsilon, records.delta))
        return (
            f"{epsilon} at delta {delta} over all sites ({people}); its own ledger is "
            "not charged: it averages what is already protected"
        )

    @property
    def verify_arguments(self) -> str:
        """What anybody can type after `tg-tinker` to check the report."""
        return f"audit verify {self.report.report} --key {self.report.verifier_key}"


def site_facts(result: FederatedResult, records: Mapping[str, int]) -> tuple[SiteFacts, ...]:
    """The sites' statements, each verified with its key and computed again.

    Args:
        records: how many each site trained on: public here, as its texts are.

    Raises:
        LogVerificationError: a statement is not signed by its site.
    """
    return tuple(
        _facts(verify_statement(envelope, result.job.roster[name]), records[name])
        for name, envelope in sorted(result.statements.items())
    )


def arms_of(record: DemoRecord, sites: Iterable[str]) -> tuple[dict[str, Arm], Arm]:
    """The lone sites by name, and pooled data."""
    return {name: record.arm(name) for name in sites}, record.arm(POOLED)


def _facts(statement: SiteStatement, records: int) -> SiteFacts:
    accounting = statement.accounting
    assert accounting is not None, "the demo's policy discloses it"
    spent = {(float(accounting.noise_multiplier), float(accounting.sample_rate)): accounting.steps}
    recomputed = gate_epsilon(spent, float(statement.delta))
    return SiteFacts(
        name=statement.site,
        records=records,
        epsilon=statement.epsilon,
        dataset_epsilon=statement.dataset_epsilon,
        noise_multiplier=accounting.noise_multiplier,
        sample_rate=accounting.sample_rate,
        steps=accounting.steps,
        rounds=len(statement.rounds),
        log_origin=statement.log_origin,
        # Signed rounded up to two digits, so that it tells no more than the noise does.
        checked=recomputed <= float(statement.epsilon) <= recomputed + 0.01 + 1e-9,
    )
