"""A federated job: what is trained, for how long, under which privacy. Every site agrees to it before it starts."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Literal, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from tg_tinker.types import LoRAConfig, OptimizerConfig

SiteName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$")]
"""A raw Ed25519 public key, base64 in the one way that RFC 4648 calls canonical: equal keys are equal texts."""
ROBUST = ("fedmedian", "fedtrimmedavg", "krum", "multikrum")
"""Strategies that bear poisoned updates; they need to see each one."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Strategy(_Part):
    """How updates become the next model.

    Attributes:
        name: Flower's strategies, by their usual names.
        proximal_mu: of FedProx: each local step is pulled back to the round's model (Li et al. 2020).
        server_learning_rate: of FedAdam and FedYogi (Reddi et al. 2021).
        trimmed_fraction: of the trimmed mean: share cut off at each end of every coordinate.
        num_malicious: of Krum: how many poisoned updates it must bear.
    """

    name: Literal["fedavg", "fedprox", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum", "multikrum"] = (
        "fedavg"
    )
    proximal_mu: float = Field(0.0, ge=0, allow_inf_nan=False)
    server_learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = Field(1e-3, gt=0, allow_inf_nan=False)
    trimmed_fraction: float = Field(0.2, ge=0, lt=0.5)
    num_malicious: int = Field(0, ge=0)


class RecordPrivacy(_Part):
    """What each site promises the people in its records, by DP-SGD on its own server.

    Attributes:
        target_epsilon: over all rounds of the job, at ``target_delta``, per site.
        max_grad_norm: L2 bound C on one unit's contribution to a local step.
        unit: what one epsilon protects.
        people: "disjoint": nobody is at two sites, so the promise over all sites is the largest; "shared": somebody
            may be at every site, so it is the sum.
    """

    target_epsilon: float = Field(8.0, gt=0, allow_inf_nan=False)
    target_delta: float = Field(1e-5, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    unit: Literal["datum", "group", "pair", "user", "sequence"] = "datum"
    people: Literal["disjoint", "shared"] = "shared"


class AdaptiveBound(_Part):
    """The clipping bound follows a quantile of the updates' norms (Andrew et al. 2021).

    Attributes:
        quantile: share of sites whose update should lie within the bound.
        rate: geometric step of the bound.
        count_noise_multiplier: noise on the count of sites within the bound, in sites; paid with the sum.
    """

    quantile: float = Field(0.5, gt=0, lt=1)
    rate: float = Field(0.2, gt=0, le=2)
    count_noise_multiplier: float = Field(10.0, gt=0, allow_inf_nan=False)


class SitePrivacy(_Part):
    """Privacy of whole sites: nobody can tell whether a site took part. For populations, not for a handful.

    Attributes:
        population: number of sites that may be drawn; public.
        sample_rate: each is drawn for a round with this probability, by the coordinator; 1.0 takes all.
        clip: L2 bound on a site's update; the first one if ``adaptive``.
        noise_multiplier: total noise of a round over ``clip``, the count of an adaptive bound included.
    """

    population: int = Field(ge=2)
    sample_rate: float = Field(1.0, gt=0, le=1)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    noise_multiplier: float = Field(gt=0, allow_inf_nan=False)
    target_epsilon: float = Field(8.0, gt=0, allow_inf_nan=False)
    target_delta: float = Field(1e-6, gt=0, lt=1)
    adaptive: AdaptiveBound | None = None


class Masking(_Part):
    """Secure aggregation: the coordinator learns the sum of the updates and none of them (Bonawitz et al. 2017).

    Attributes:
        clip: each coordinate of an update is cut to [-clip, clip] before it is rounded.
        bits: of one rounded coordinate.
        threshold: sites that must stay for a round to close; ``None``: two thirds, rounded up, and at least 3. Of a
            sum over two, each would learn the other's update.
    """

    clip: float = Field(0.25, gt=0, allow_inf_nan=False)
    bits: int = Field(20, ge=8, le=24)
    threshold: int | None = Field(None, ge=3)


class Job(_Part):
    """All that a site must know before it agrees.

    Attributes:
        job_id: name of the job, for people.
        federated_lora: "both": factors A and B are trained and averaged (FedIT, Zhang et al. 2024); "freeze_a": A
            stays as it was drawn (FFA-LoRA, Sun et al. 2024); "alternate": odd rounds train B, even A (RoLoRA, Chen
            et al. 2024). The last two average exactly and send half.
        rounds: communication rounds.
        local_steps: optimizer steps of each site in a round.
        batch_size: expected privacy units of a site's Poisson draw; public.
        optimizer: of the sites; its schedule runs over ``rounds * local_steps``.
        records: protection of records inside each site; ``None`` trains without, which most policies refuse.
        sites: protection of whole sites at the coordinator.
        roster: each site's public key; no two alike, or one party would count as two, and none the coordinator's.
        coordinator: the coordinator's public key.
        min_sites: fewer replies than this fail the round.
        round_timeout_s: a site that needs longer is left out of the round.
        expires: after this moment sites refuse everything but "finish".
        seed: below 2**53, as every integer of a job, because JCS writes numbers as doubles.
        adapter_digest: SHA-256 of the first adapter's weights.
    """

    format: Literal["tg-tinker/federated-job/v1"] = "tg-tinker/federated-job/v1"
    job_id: SiteName
    base_model: str = Field(min_length=1, max_length=500)
    adapter: LoRAConfig = Field(default_factory=LoRAConfig)
    federated_lora: Literal["both", "freeze_a", "alternate"] = "both"
    rounds: int = Field(ge=1, le=100_000)
    local_steps: int = Field(1, ge=1, le=100_000)
    batch_size: int = Field(ge=1, le=10**9)
    max_sequence_length: int = Field(2048, ge=2)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    records: RecordPrivacy | None = Field(default_factory=RecordPrivacy)
    sites: SitePrivacy | None = None
    masking: Masking | None = None
    strategy: Strategy = Field(default_factory=Strategy)
    roster: dict[SiteName, PublicKey] = Field(min_length=1)
    coordinator: PublicKey
    min_sites: int = Field(1, ge=1)
    round_timeout_s: float = Field(600.0, gt=0, le=7 * 86_400)
    expires: datetime
    seed: int = Field(0, ge=0, lt=2**53)
    adapter_digest: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def total_steps(self) -> int:
        """Local steps of the whole job."""
        return self.rounds * self.local_steps

    def digest(self) -> str:
        """SHA-256 of the job in JCS, hex: its name in every message. Every job that can be made has one."""
        return hashlib.sha256(rfc8785.dumps(self.model_dump(mode="json"))).hexdigest()

    def frozen_factor(self, round_: int) -> Literal["a", "b"] | None:
        """Which factor of the adapter stays in a round."""
        if self.federated_lora == "both":
            return None
        return "a" if self.federated_lora == "freeze_a" or round_ % 2 == 1 else "b"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        seen = self.strategy.name in ROBUST
        if self.masking is not None and seen:
            raise ValueError(
                f"{self.strategy.name} compares the sites' updates, which masking hides: choose one of the two"
            )
        if self.masking is not None and self.sites is not None:
            raise ValueError(
                "site-level privacy clips each update at the coordinator, who sees none under masking: use "
                "record-level privacy with masking, or site-level privacy without"
            )
        if self.sites is not None and seen:
            raise ValueError(
                f"the noise of site-level privacy is for a sum of clipped updates; {self.strategy.name} is none, so "
                "the promise would not hold: use fedavg, fedprox, fedadam or fedyogi"
            )
        if self.masking is not None and self.masking.threshold is not None:
            threshold = self.masking.threshold
            if not len(self.roster) / 2 < threshold <= len(self.roster):
                raise ValueError(
                    f"masking.threshold {threshold} must be more than half of the {len(self.roster)} sites, or two "
                    "groups could each open what the other masked"
                )
        if self.expires.tzinfo is None:
            raise ValueError("expires needs a time zone, e.g. 2030-01-31T00:00:00Z")
        if self.min_sites > len(self.roster):
            raise ValueError(f"min_sites {self.min_sites} is more than the {len(self.roster)} sites of the roster")
        self._check_keys()
        try:
            rfc8785.dumps(self.model_dump(mode="json"))
        except rfc8785.CanonicalizationError as e:
            raise ValueError(
                f"the job cannot be written in canonical JSON (RFC 8785), which its name needs: {e}"
            ) from e
        return self

    def _check_keys(self) -> None:
        owner: dict[str, str] = {self.coordinator: "the coordinator"}
        for site, key in self.roster.items():
            if key in owner:
                raise ValueError(
                    f"roster: {owner[key]} and site {site} have the same public key; each party needs one of its own "
                    "(`tg-tinker federated keygen`)"
                )
            owner[key] = f"site {site}"
