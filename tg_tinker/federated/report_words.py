"""The words of a federation report. They follow from the job and its figures, and are part of the format.

Whoever verifies a report writes them again and compares: it cannot say in words what its numbers do not.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal, localcontext
from typing import Final

from tg_tinker.federated.job import Job
from tg_tinker.federated.masking import MaskingSetting
from tg_tinker.federated.result import trust_of

INFINITE: Final = Decimal("inf")
_DIGITS = 3

COVERED: Final = (
    "The released adapter of every round, and everything that anybody computes from it later.",
    "Text sampled from the released models, however much of it.",
)
COVERED_UPDATES: Final = "Every update that a site sent, whoever saw it."
NOT_COVERED: Final = (
    "What a site released of the same data before, besides or after this job: each site's statement has the total.",
    "Choices made by looking at private data outside the sites' servers (cleaning, tuning, stopping).",
    "Groups of related units, but at a multiple of epsilon.",
    "The base model's own training data.",
    "Whether the model is any good, and whether a site trained on the data that it should have.",
)
STRATEGIES: Final = {
    "fedavg": "the mean of the updates (FedAvg, McMahan et al. 2017)",
    "fedprox": "the mean of the updates; each site is pulled back to the round's model (FedProx, Li et al. 2020)",
    "fedadam": "Adam on the mean of the updates (FedAdam, Reddi et al. 2021)",
    "fedyogi": "Yogi on the mean of the updates (FedYogi, Reddi et al. 2021)",
    "fedmedian": "the median of the updates at each coordinate (Yin et al. 2018)",
    "fedtrimmedavg": "the mean of the updates without the extremes at each coordinate (Yin et al. 2018)",
    "krum": "the one update that is closest to its neighbours (Krum, Blanchard et al. 2017)",
    "multikrum": "the mean of the updates that are closest to their neighbours (Multi-Krum, Blanchard et al. 2017)",
}
FACTORS: Final = {
    "both": "both factors of the adapter are trained and averaged, which is not the average of their products",
    "freeze_a": "factor A stays as it was drawn, so that averages are exact (FFA-LoRA, Sun et al. 2024)",
    "alternate": "rounds train one factor in turn, so that averages are exact (RoLoRA, Chen et al. 2024)",
}


def epsilon_text(epsilon: Decimal) -> str:
    """Epsilon as a decimal string of at most three digits after the point, never smaller than it is.

    >>> epsilon_text(Decimal("2.0001")), epsilon_text(Decimal("8.0")), epsilon_text(INFINITE)
    ('2.001', '8', 'inf')
    """
    if not epsilon.is_finite():
        return "inf"
    with localcontext(prec=400, rounding=ROUND_CEILING):
        shown = format(epsilon.quantize(Decimal(1).scaleb(-_DIGITS)), "f")
    return shown.rstrip("0").rstrip(".")


def delta_text(delta: Decimal) -> str:
    """A small probability as a decimal string of at most six digits, never smaller than it is.

    >>> delta_text(Decimal("0.00003")), delta_text(Decimal("0.01")), delta_text(Decimal("1.00000049e-7"))
    ('3e-5', '0.01', '1.00001e-7')
    """
    with localcontext(prec=6, rounding=ROUND_CEILING):
        shown = (+delta).normalize()
    return format(shown, "f" if shown.adjusted() >= -4 else "e")


def one(unit: str) -> str:
    """A privacy unit as people say it."""
    return "record" if unit == "datum" else unit


def records_sentence(job: Job, epsilon: str, delta: str) -> str:
    """The promise to the people in any site's records."""
    if job.records is None:
        return "Nothing is promised about any record: the job trained without privacy of records."
    if epsilon == "inf":
        return "At so large a delta, nothing is promised about any record."
    unit, count = one(job.records.unit), len(job.roster)
    where, why = "at one site", f"the largest figure of {_sites(count)}, since the job declares nobody to be at two"
    if count == 1:
        where, why = "at the only site", ""
    elif job.records.people == "shared":
        where, why = (
            f"at each of {_sites(count)} at once",
            "the sum over all sites, since anybody may be at every one",
        )
    return (
        f"Adding or removing one {unit} {where} changes the probability of any outcome of the job by at most a "
        f"factor of exp({epsilon}), except with probability {delta}{f': {why}' if why else ''}."
    )


def sites_sentence(epsilon: str, delta: str) -> str:
    """The promise to whole sites."""
    return (
        "Adding or removing one whole site, with all its records, changes the probability of any released model by "
        f"at most a factor of exp({epsilon}), except with probability {delta}."
    )


def trust_model(job: Job) -> list[dict[str, str]]:
    """Who can see or do what, as who and what."""
    trust = trust_of(job)
    borne = trust["poisoned_updates_borne"]
    sites = "each update by itself"
    if not trust["coordinator_sees_updates"]:
        setting = MaskingSetting.of(job)
        colluding = setting.sites_in_league
        sites = (
            "the sum of the updates of a round, and none of them by itself, as long as "
            + (f"no more than {colluding} of the {_sites(len(job.roster))} are" if colluding else "no site is")
            + " in league with it"
        )
    coordinator = f"Sees {sites}. "
    if trust["records_protected_at_sites"]:
        coordinator += "An update was protected at its site, so it is not trusted with records."
    else:
        coordinator += "Nothing protects the records behind it."
    if trust["coordinator_is_trusted_with_site_privacy"]:
        coordinator += " It adds the noise that protects whole sites, and is trusted to do so and to keep updates"
        coordinator += (
            " and draws to itself." if trust["site_sampling_attested_by"] == "coordinator" else " to itself."
        )
    coordinator += " Who took part, and which model came of it, is its word."
    hidden = "models and updates" if trust["carrier_sees_updates"] else "models and masked updates"
    poison = (
        f"The strategy bears {borne} poisoned updates in the smallest round that counts."
        if borne
        else "One that sends a poisoned update can spoil the model; the strategy bears none."
    )
    return [
        {"who": "each site", "what": "Its server holds its data and draws its noise. That it drew it is its word."},
        {"who": "coordinator", "what": coordinator},
        {
            "who": "carrier of messages (Flower)",
            "what": f"Where it ends the encryption of a connection it sees who takes part, {hidden}. It can delay "
            "and drop messages; it cannot alter, invent or repeat one, since each is signed.",
        },
        {
            "who": "other sites",
            "what": f"See the model of every round they are asked in. {poison}",
        },
        {"who": "whoever gets a model", "what": "Is not trusted. The promise is against them."},
    ]


def covered(job: Job) -> list[str]:
    """What the promise is about."""
    if job.records is None and job.sites is None:
        return ["Nothing: neither records nor sites were protected."]
    return [*COVERED, *([COVERED_UPDATES] if job.records is not None else [])]


def not_covered(job: Job, *, missing: int) -> list[str]:
    """What it is not about, and what nobody but a signer vouches for.

    Args:
        missing: sites without a statement that counts.
    """
    found = list(NOT_COVERED)
    records, sites = job.records, job.sites
    if records is None:
        found.append("Records: the job trained without privacy of records.")
    elif records.people == "disjoint" and len(job.roster) > 1:
        found.append("People at two sites: that there are none is what the job declares, and nothing here checks it.")
    if sites is None:
        found.append("Whole sites: that one took part, and what all its records have in common, may show.")
    else:
        found.append("The roster, which is public: not who is on it is hidden, but who of them took part.")
        found.append("Updates as the coordinator sees them: whole sites are protected in what it releases.")
        if sites.sample_rate < 1:
            found.append("That sites were drawn at random, and the draw kept secret, is the coordinator's word.")
        if records is not None:
            found.append(
                "What each site spent: a statement would tell when it was drawn. Counted is the job's target, which "
                "every site's own server holds it to."
            )
    if missing and sites is None and records is not None:
        found.append(
            f"{_sites(missing)} without a signed statement: counted at the job's target, which a site's own server "
            "holds it to; that it joined with that server is the coordinator's word."
        )
    found.append("That the keys on the roster are those of the sites they name: compare them with the sites.")
    return found


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"
