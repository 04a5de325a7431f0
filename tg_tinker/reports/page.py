"""report.html: one self-contained page from a report's JSON. No scripts, nothing fetched, everything escaped.

The page adds no claim: every number and sentence is the report's own, or follows from one of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, Final

from tg_tinker.errors import InvalidRequestError
from tg_tinker.reports.charts import Chart, line_chart
from tg_tinker.reports.statement import FORMAT, rounded_up, small

_HEADINGS: Final = {"register": "registered", "raise": "budget raised", "erase": "records erased"}
_RUN: Final = (("charged", "paid for"), ("released", "released"), ("failed", "failed"), ("unsettled", "unsettled"))


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
    guarantee, coverage, integrity = report["guarantee"], report["coverage"], report["integrity"]
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=style(),
        dataset=text(report["dataset_id"]),
        time=text(day(report["time"])),
        sentence=_sentence(guarantee["sentence"]),
        warnings=_warnings(report),
        budget=_budget(guarantee),
        curve=_curve(report["curve"], guarantee),
        odds=_odds(float(guarantee["epsilon"]), guarantee),
        all_runs=text(coverage["what"]),
        runs="\n".join(_runs(coverage["runs"])),
        covered=items(coverage["covered"]),
        not_covered=items(coverage["not_covered"]),
        mechanism=facts(_mechanism(report)),
        accounting=facts(_accounting(report["accounting"], guarantee)),
        profile="\n".join(_profile(report["privacy_profile"], float(guarantee["delta"]))),
        changes=_changes(coverage["changes"]),
        trust=items(report["trust_model"]),
        audit=_audit(report["empirical_audit"]),
        verifier_key=text(integrity["verifier_key"]),
        entries=f"{len(integrity['entries']):,}",
        integrity=facts(_integrity(report)),
        checkpoint="\n".join(text(line) for line in str(integrity["checkpoint"]).rstrip("\n").split("\n")),
        footer=f"{text(report['prepared'])} Written by tg-tinker {text(report['server_version'])}; nothing on this "
        "page is fetched from elsewhere.",
    )


def style() -> str:
    """The style sheet that the pages of all kinds of reports share."""
    return files(__package__).joinpath("page.css").read_text(encoding="utf-8")


def text(value: object) -> str:
    """Any text as HTML, with what would be invisible or turn the line around made visible."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value)), quote=True)


def day(time: object) -> str:
    """The date and minute of an ISO time, as people read it.

    >>> day("2026-01-02T03:04:05.678901+00:00")
    '2026-01-02 03:04 UTC'
    """
    moment = str(time)
    return f"{moment[:10]} {moment[11:16]} UTC" if moment.endswith("+00:00") else moment


def _sentence(sentence: object) -> str:
    """The guarantee, with its power of e set as one."""
    plain = text(sentence)
    before, found, rest = plain.partition("exp(")
    power, closed, after = rest.partition(")")
    return f"{before}e<sup>{power}</sup>{after}" if found and closed else plain


def _warnings(report: Mapping[str, Any]) -> str:
    found = []
    if report["sampling"]["by_client"]:
        count, charges = report["sampling"]["by_client"], report["curve"]["charges"]
        found.append(
            f"{count:,} of {charges:,} releases rest on the client’s word about how it drew its batches. If it drew "
            "them otherwise, epsilon is larger than stated."
        )
    if report["empirical_audit"]["status"] == "alarm":
        found.insert(
            0, "An empirical audit raised an alarm; see below. Do not rely on this guarantee before it is explained."
        )
    public = sum(run["initial_weights"] == "public" for run in report["coverage"]["runs"])
    if public:
        found.append(f"{public} of the runs began from weights that are public by the client’s word alone.")
    own = sum(run.get("custom_loss") == "independent" for run in report["coverage"]["runs"])
    if own:
        found.append(
            f"In {own} of the runs callers may compute losses themselves, each from one unit by their word alone."
        )
    return "".join(f'<p class="warn" role="note">{text(t)}</p>' for t in found)


def _budget(guarantee: Mapping[str, Any]) -> str:
    spent, target = float(guarantee["epsilon"]), float(guarantee["target_epsilon"])
    unit = "record" if guarantee["privacy_unit"] == "datum" else guarantee["privacy_unit"]
    shown = "∞" if math.isinf(spent) else rounded_up(spent)
    head = (
        f'<p class="spent"><b>ε = {shown}</b><span>at δ = {small(float(guarantee["delta"]))} · '
        f"neighbours: add or remove one {text(unit)}</span></p>"
    )
    if math.isinf(target):
        return f'{head}<p class="ends"><span>No limit was set on this dataset.</span></p>'
    share = 100.0 if math.isinf(spent) else min(100.0, 100.0 * spent / target)
    style = ' class="bar over-limit"' if spent > target else ' class="bar"'
    said = f"{shown} of {target:g} spent"
    return (
        f'{head}<div{style} role="img" aria-label="{text(said)}"><i style="width:{share:.2f}%"></i></div>'
        f'<p class="ends"><span>{share:.0f} % of the budget spent</span><span>budget ε = {target:g}</span></p>'
    )


def _curve(curve: Mapping[str, Any], guarantee: Mapping[str, Any]) -> str:
    points = [(float(p["charge"]), float(p["epsilon"])) for p in curve["points"]]
    if not points:
        return '<p class="quiet">Nothing was released, so there is no curve to draw.</p>'
    endless = next((x for x, y in points if math.isinf(y)), None)
    if endless is not None:
        return f'<p class="quiet">Epsilon is infinite from release {endless:,.0f} of {curve["charges"]:,} on.</p>'
    target, last = float(guarantee["target_epsilon"]), points[-1][1]
    chart = Chart(
        label=f"Epsilon after each of {curve['charges']} releases, up to {last:.3f}",
        x_name="releases paid for, all runs together",
        y_name="epsilon spent",
        line=[(0.0, 0.0), *points],
        limit=(target, f"budget {target:g}") if target <= 4 * last else None,  # else the line lies flat on the axis
        zero=True,
    )
    wide = line_chart(replace(chart, width=800, height=260))
    return f'<div class="wide">{wide}</div>\n<div class="narrow">{line_chart(chart)}</div>'


def _odds(spent: float, guarantee: Mapping[str, Any]) -> str:
    """What epsilon means for a guess: posterior odds are at most exp(epsilon) times the prior odds."""
    unit = text("record" if guarantee["privacy_unit"] == "datum" else guarantee["privacy_unit"])
    if not math.isfinite(spent):
        return f"In other words: nothing limits what can be learnt about one {unit}."
    sure, chance = math.ceil(1000.0 / (1.0 + math.exp(-spent))) / 10.0, small(float(guarantee["delta"]))
    return (
        f"In other words: whoever holds it even odds that one given {unit} took part can be made at most {sure:g} % "
        f"sure by everything released, but for a chance of {chance}. That holds against any attack, known or not."
    )


def _runs(runs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for run in runs:
        counts = "".join(f'<td class="n" data-name="{name}">{int(run[key]):,}</td>' for key, name in _RUN)
        began = {"base": "the base model", "public": "public weights"}.get(
            run["initial_weights"], run["initial_weights"]
        )
        yield (
            f"<tr><th><bdi><code>{text(run['run_id'])}</code></bdi></th>{counts}"
            f'<td data-name="from">{text(began)}</td></tr>'
        )
    if not runs:
        yield "<tr><td>No run was opened on this dataset.</td></tr>"


def _mechanism(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    mechanism = report["mechanism"]
    yield "what is released", text(mechanism["name"])
    for release in mechanism["releases"]:
        times = int(release["times"])
        yield "once" if times == 1 else f"{times:,} times", text(_event(release["event"]))
    yield "noise source", text(mechanism["noise_source"])
    yield "sampling", text(report["sampling"]["claim"])
    for assumption in report["assumptions"]:
        yield "holds only if", text(assumption)


def _event(event: Mapping[str, Any]) -> str:
    words = {
        "gaussian": "Gaussian noise on a sum that any unit may be in",
        "sampled_gaussian": "Gaussian noise on a Poisson sample",
        "participation_gaussian": "Gaussian noise, charged by the growth of the largest number of steps of one unit",
        "unnoised": "a gradient WITHOUT noise",
    }
    said = [words.get(event["kind"], str(event["kind"]))]
    if "noise_multiplier" in event:
        said.append(f"noise multiplier {float(event['noise_multiplier']):.6g}")
    if "sample_rate" in event:
        said.append(f"sampling rate {float(event['sample_rate']):.6g}")
    if "releases" in event:
        said.append(f"growth {int(event['releases'])}")
    voucher = {"client": "draw attested by the client", "server": "drawn by the server"}.get(
        event.get("vouched_by", "")
    )
    return ", ".join([*said, *([voucher] if voucher else [])])


def _accounting(accounting: Mapping[str, Any], guarantee: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield (
        "claimed epsilon",
        f"<b>{_up(guarantee['epsilon'])}</b> by {text(accounting['accountant'])}: {text(accounting['gate'])}",
    )
    yield "steps chosen on the way", text(accounting["adaptivity"])
    if accounting["accountant"] != "rdp":
        yield "by the Renyi gate", _up(accounting["rdp"])
    check = accounting["cross_check"]
    second = check["epsilon"] if check["epsilon"] == "not computed" else _up(check["epsilon"])
    yield (
        "second accountant",
        f"{second} by {text(check['accountant'])}, an upper bound for these releases as recorded",
    )
    estimate = accounting["estimate"]
    if estimate is not None:
        tag = '<span class="tag">not a bound</span>'
        yield (
            "estimate",
            f"{float(estimate['epsilon']):.3f} by {text(estimate['accountant'])}, {text(estimate['note'])} {tag}",
        )


def _profile(points: Sequence[Mapping[str, Any]], delta: float) -> Iterable[str]:
    for point in points:
        own = float(point["delta"]) == delta
        b, e = ("<b>", "</b>") if own else ("", "")
        cells = "".join(
            f'<td class="n">{b}{c}{e}</td>'
            for c in (small(float(point["delta"])), _up(point["rdp"]), _up(point["pld"]))
        )
        yield f"<tr>{cells}</tr>"


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    if not changes:
        return ""
    rows = []
    for change in changes:
        when = f"{text(day(change['time']))}, key <code>{text(change['actor'])}</code>"
        heading = _HEADINGS.get(change["kind"], str(change["kind"]))
        rows.append((heading, f'{text(_change(change))}<br><span class="quiet">{when}</span>'))
    return (
        '<section>\n<h2>Changes to budget and data</h2>\n<table class="facts"><tbody>\n'
        f"{facts(rows)}\n</tbody></table>\n"
        '<p class="quiet">A raise or an erasure never lowers what was spent.</p>\n</section>'
    )


def _change(change: Mapping[str, Any]) -> str:
    match change["kind"]:
        case "register":
            return f"{int(change['slots']):,} units, budget ε = {float(change['target_epsilon']):g}"
        case "raise":
            before, after = float(change["from_epsilon"]), float(change["target_epsilon"])
            return f"from ε = {before:g} to {after:g}: “{change['reason']}”"
        case "erase":
            return f"{int(change['records']):,} records" + (", all that were left" if change["whole"] else "")
    return ""


def _audit(audit: Mapping[str, Any]) -> str:
    shown = f'<p><span class="tag">{text(audit["status"])}</span></p><p>{text(audit["note"])}</p>'
    for result in audit.get("results", []):
        shown += f'\n<table class="facts"><tbody>\n{facts(_audited(result))}\n</tbody></table>'
    return shown


def _audited(result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    bound, most = float(result["lower_bound"]), float(result["most_provable"])
    confidence = f"{100 * float(result['confidence']):g} % confidence"
    shown = f"<b>{_down(bound)}</b> with {confidence}; no more than {_down(most)} could be shown"
    yield "epsilon of that training is at least", shown
    yield (
        "claimed for that training",
        f"{_up(result['claimed_epsilon'])} at δ = {small(float(result['claimed_delta']))}",
    )
    yield (
        "attack",
        f"{int(result['canaries']):,} canaries, {text(result['mode'])} space, model {text(result['model'])}",
    )
    alarms = ", ".join(text(alarm) for alarm in result["alarms"])
    verdict = f'<span class="bad">alarm: {alarms}</span>' if alarms else '<span class="good">no alarm</span>'
    yield f"{int(result['checks']):,} checks", verdict
    yield "trained on", f"dataset {text(result['audited_dataset'])}, {text(day(result['created']))}"
    yield "attached", f"{text(day(result['time']))}, key <code>{text(result['attached_by'])}</code>"
    yield "document", f"<code>{text(result['digest'])}</code>"


def _integrity(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    integrity = report["integrity"]
    last = integrity["entries"][-1]
    yield "log", f"<code>{text(integrity['origin'])}</code>"
    yield "this report is", f"leaf {int(last['leaf_index']):,}, the last of the checkpoint below"
    yield (
        "entries shown",
        f"{len(integrity['entries']):,}, with {len(integrity['proof']):,} hashes that stand for the rest of the log",
    )
    yield "earlier reports", f"{int(report['coverage']['earlier_reports']):,}"


def _down(value: float) -> str:
    return "∞" if math.isinf(value) else f"{math.floor(value * 1000) / 1000:.3f}"


def _up(value: object) -> str:
    number = float(str(value))
    return "∞" if math.isinf(number) else rounded_up(number)


def items(lines: Iterable[object]) -> str:
    """Texts as list items."""
    return "".join(f"<li>{text(line)}</li>" for line in lines)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Rows of a table: a plain name, and a value in HTML."""
    return "\n".join(f"<tr><th>{text(name)}</th><td>{value}</td></tr>" for name, value in rows)
