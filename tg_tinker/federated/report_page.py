"""federation-report.html: one self-contained page from a report's JSON. No scripts, nothing fetched, all escaped.

The page adds no claim: every number and sentence is the report's own, or follows from one of its numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from string import Template
from typing import Any, Final

from tg_tinker.errors import InvalidRequestError
from tg_tinker.federated.report import FORMAT
from tg_tinker.federated.report_grid import participation
from tg_tinker.federated.result import DIGITS
from tg_tinker.reports.page import day, facts, items, style, text
from tg_tinker.reports.statement import rounded_up, small

_GONE: Final = {"refused": "refused", "bad_update": "sent a bad update", "no_answer": "gave no answer"}


def render(report: Mapping[str, Any]) -> str:
    """The page.

    Raises:
        InvalidRequestError: it is not a report of the format that this version knows.
    """
    if report.get("format") != FORMAT:
        raise InvalidRequestError(
            f"this is not a report of format {FORMAT}", field="format", constraint="a report that verifies"
        )
    try:
        return _page(report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise InvalidRequestError(
            "this report lacks what its format promises; check it with tg-tinker audit verify",
            field="report",
            constraint="a report that verifies",
        ) from e


def _page(report: Mapping[str, Any]) -> str:
    job, guarantee = report["job"], report["guarantee"]
    template = Template(files(__package__).joinpath("report_page.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=style(),
        job=text(job["job_id"]),
        time=text(day(report["time"])),
        sentence=_sentence(guarantee["sentence"]),
        budgets=_budgets(report),
        odds=_odds(guarantee),
        warnings="".join(f'<p class="warn" role="note">{text(t)}</p>' for t in _warnings(report)),
        sites_note=_sites_note(report),
        sites="\n".join(_sites(report)),
        grid=participation(report["course"], [row["site"] for row in report["sites"]]),
        gone=_gone(report),
        method=facts(_method(report)),
        covered=items(report["coverage"]["covered"]),
        not_covered=items(report["coverage"]["not_covered"]),
        trust=facts((row["who"], text(row["what"])) for row in report["trust_model"]),
        verifier_key=text(report["integrity"]["verifier_key"]),
        checked=_checked(report),
        integrity=facts(_integrity(report)),
        writer=text(report["writer"]),
    )


def _sentence(sentence: object) -> str:
    """The guarantee, with its powers of e set as such."""
    return re.sub(r"exp\(([0-9.e+-]+|inf)\)", r"e<sup>\1</sup>", text(sentence))


def _budgets(report: Mapping[str, Any]) -> str:
    records, sites = report["guarantee"]["records"], report["guarantee"]["sites"]
    shown = []
    if records is not None:
        unit = "record" if records["unit"] == "datum" else records["unit"]
        target = float(records["target_epsilon"])
        if records["over_sites"] == "sum":
            target *= len(report["sites"])
        kind = "the sum over all sites" if records["over_sites"] == "sum" else "the largest of any site"
        shown.append(_budget(records["epsilon"], records["delta"], target, f"add or remove one {unit} · {kind}"))
    if sites is not None:
        target = float(sites["target_epsilon"])
        shown.append(_budget(sites["epsilon"], sites["delta"], target, "add or remove one whole site"))
    return "\n".join(shown) or '<p class="spent"><b>ε = ∞</b><span>nothing is promised about records</span></p>'


def _budget(epsilon: str, delta: str, target: float, about: str) -> str:
    spent = float(epsilon)
    said = f"{_shown(epsilon)} of {_plain(target)} spent"
    share, over = _share(spent, target)
    much = f"{share:.0f} % of" if math.isfinite(share) else "without limit, against"
    return (
        f'<p class="spent"><b>ε = {_shown(epsilon)}</b><span>at δ = {text(small(float(delta)))} · {text(about)}'
        f'</span></p><div class="bar{over}" role="img" aria-label="{text(said)}">'
        f'<i style="width:{min(100.0, share):.2f}%"></i></div>'
        f'<p class="ends"><span>{much} what the job allows</span><span>ε = {_plain(target)}</span></p>'
    )


def _share(spent: float, target: float) -> tuple[float, str]:
    """How much of the target is spent, in percent, and the style's class where it is more than rounding explains."""
    over = spent > float(rounded_up(target, DIGITS))
    return (100.0 * spent / target if math.isfinite(target) else 100.0), " over-limit" if over else ""


def _odds(guarantee: Mapping[str, Any]) -> str:
    """What epsilon means for a guess: posterior odds are at most exp(epsilon) times the prior odds."""
    records, sites = guarantee["records"], guarantee["sites"]
    found = []
    for part, what in ((records, ""), (sites, "site")):
        if part is None or not math.isfinite(float(part["epsilon"])):
            continue
        unit = text(what or ("record" if part["unit"] == "datum" else part["unit"]))
        sure = math.ceil(1000.0 / (1.0 + math.exp(-float(part["epsilon"])))) / 10.0
        if sure >= 100.0:
            found.append(f"so large an epsilon hardly limits what can be learnt about one {unit}.")
            continue
        found.append(
            f"whoever holds it even odds that one given {unit} took part can be made at most {sure:g} % sure by "
            f"everything released, but for a chance of {text(small(float(part['delta'])))}."
        )
    return (
        " And ".join(["In other words: " + found[0], *found[1:]]) if found else "Nothing limits what can be learnt."
    )


def _warnings(report: Mapping[str, Any]) -> Iterable[str]:
    records, course = report["guarantee"]["records"], report["course"]
    if course["status"] == "failed":
        yield f"The job ended early, after {len(course['rounds']):,} of {report['job']['rounds']:,} rounds."
    if records is None:
        yield "No site protected its records. Whoever gets a model or sees an update may learn what is in them."
        return
    target = float(records["target_epsilon"])
    over = [row["site"] for row in report["sites"] if _share(float(row["epsilon"]), target)[1]]
    if over:
        yield f"By their own statements these spent more than the job allowed: {', '.join(over)}."
    if report["guarantee"]["sites"] is None and records["assumed"]:
        yield (
            f"{records['assumed']} of {len(report['sites'])} sites gave no signed statement. They are counted at the "
            "most that the job allowed them."
        )


def _sites_note(report: Mapping[str, Any]) -> str:
    records = report["guarantee"]["records"]
    if report["course"]["members"] is None:
        return (
            "Who took part is not told, because whole sites are protected: a statement would tell when its site was "
            "drawn. Each counts at what the job allowed."
        )
    if records is None:
        return "The job asked for no privacy of records."
    return (
        f"Epsilon at δ = {text(small(float(records['target_delta'])))}, as each site signed it, of "
        f"{_plain(float(records['target_epsilon']))} that the job allowed. “All its data” is everything that was "
        "ever released of it, by this job and others."
    )


def _sites(report: Mapping[str, Any]) -> Iterable[str]:
    records = report["guarantee"]["records"]
    target = float(records["target_epsilon"]) if records is not None else math.inf
    for row in report["sites"]:
        spent, whole = float(row["epsilon"]), row["all_of_its_data"]
        share, over = _share(spent, target)
        bar = f'<div class="bar{over}"><i style="width:{min(100.0, share):.1f}%"></i></div>'
        known = bar if math.isfinite(target) else ""
        at_most = "up to " if row["basis"] == "target" else ""
        total = "not told" if whole is None else f"{_shown(whole['epsilon'])} of {_shown(whole['target_epsilon'])}"
        signed = {"signed": "good", "missing": "bad"}.get(row["statement"], "quiet")
        why = report["unstated"].get(row["site"], "")
        cells = (
            ("epsilon", "", f"{at_most}<b>{_shown(row['epsilon'])}</b>{known}"),
            ("rounds trained", "n", _count(row["rounds_trained"])),
            ("rounds used", "n", _count(row["rounds_used"])),
            ("all its data", "n", total),
            (
                "statement",
                "",
                f'<span class="{signed}">{text(row["statement"])}</span>'
                + (f'<br><span class="quiet">{text(why)}</span>' if why else ""),
            ),
        )
        shown = "".join(f'<td class="{kind}" data-name="{name}">{value}</td>' for name, kind, value in cells)
        yield f"<tr><th><bdi>{text(row['site'])}</bdi></th>{shown}</tr>"


def _gone(report: Mapping[str, Any]) -> str:
    """Sites that are not members at the end, and what the coordinator says of each."""
    course = report["course"]
    rows = [
        (
            site,
            f"{text(_GONE.get(a['kind'], a['kind']))} ({text(a['reason'] or 'no reason')}): “{text(a['message'])}”",
        )
        for site, a in sorted((course["left"] or {}).items())
    ]
    rows += [(site, "never said a word") for site in course["silent"] or ()]
    if course["why"]:
        rows.append(("why the job ended", text(course["why"])))
    if not rows:
        return ""
    return (
        '\n<section>\n<h2>Who refused, left or was silent</h2>\n<table class="facts"><tbody>\n'
        f"{facts(rows)}\n</tbody></table>\n</section>\n"
    )


def _method(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    job, masking = report["job"], report["masking"]
    yield "base model", f"<bdi>{text(job['base_model'])}</bdi>"
    yield (
        "rounds",
        f"{len(report['course']['rounds']):,} of {job['rounds']:,} released, each of {job['local_steps']:,} local "
        f"step{'' if job['local_steps'] == 1 else 's'} on about {job['batch_size']:,} records of a site",
    )
    yield "updates become a model by", text(report["method"]["strategy"])
    yield "adapter", text(report["method"]["federated_lora"])
    if masking is None:
        yield "secure aggregation", "none: the coordinator sees single updates"
    else:
        yield (
            "secure aggregation",
            f"each update is masked; a round needs {masking['threshold']} sites; coordinates are cut to ±"
            f"{text(masking['clip'])} and rounded to {masking['bits']} bits, which moves one of the mean by at most "
            f"{text(small(float(masking['quantisation_error'])))}",
        )
    sites = job["sites"]
    if sites is not None:
        yield (
            "privacy of whole sites",
            f"noise multiplier {_plain(sites['noise_multiplier'])}, each of {sites['population']:,} sites drawn for "
            f"a round with probability {_plain(sites['sample_rate'])}",
        )
    yield "last adapter", f"<code>{text(report['model']['artifact_id'])}</code>"
    yield "SHA-256 of its weights", f"<code>{text(report['model']['weights_digest'])}</code>"


def _checked(report: Mapping[str, Any]) -> str:
    parts = ["the coordinator’s signature", "that its figures and words follow from the job and the statements"]
    if report["statements"]:
        parts.insert(
            1, f"{len(report['statements']):,} statements, each with its site’s signature, against the rounds"
        )
    if report["site_level_report"] is not None:
        parts.insert(1, "the report on the sites’ ledger, from its entries")
    return f"That checks {', '.join(parts[:-1])}, and {parts[-1]}."


def _integrity(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "job", f"<code>{text(report['job_digest'])}</code>"
    for row in report["sites"]:
        yield f"key of {row['site']}", f"<code>{text(row['public_key'])}</code>"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{int(value):,}"


def _shown(epsilon: str) -> str:
    return "∞" if not math.isfinite(float(epsilon)) else text(epsilon)


def _plain(value: float) -> str:
    return "∞" if not math.isfinite(float(value)) else f"{float(value):g}"
