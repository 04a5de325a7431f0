"""demo-report.html: one self-contained page from what the demo measured, pure text from values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from tg_tinker.reports.charts import Chart, line_chart, smoothed
from tg_tinker_server.demo.ledger_file import LedgerFacts
from tg_tinker_server.demo.settings import DemoSettings
from tg_tinker_server.demo.state import Checkpoint, Measured, StepPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything on the page.

    Attributes:
        reopened_perplexity: of the checkpoint after it was decrypted into a fresh client.
        ciphertext_matches: the artifact as pulled hashes to what the server had said.
    """

    settings: DemoSettings
    source: str
    dataset_size: int
    trainable_parameters: int
    before: Measured
    after: Measured
    history: tuple[StepPoint, ...]
    checkpoint: Checkpoint
    reopened_perplexity: float
    ciphertext_matches: bool
    ledger: LedgerFacts
    made: str

    @property
    def reopened_equal(self) -> bool:
        """Whether the opened checkpoint is the model that was trained."""
        return math.isclose(self.reopened_perplexity, self.after.perplexity, rel_tol=1e-6)


def up(epsilon: float, digits: int = 3) -> str:
    """Epsilon as text, rounded up: a promise may be stated too large, never too small.

    >>> up(7.9991), up(2.0), up(math.inf)
    ('8.000', '2.000', 'inf')
    """
    if not math.isfinite(epsilon):
        return "inf"
    scale = 10**digits
    return f"{math.ceil(round(epsilon * scale, 6)) / scale:.{digits}f}"


def small(number: float) -> str:
    """A small probability as people write it.

    >>> small(2e-05), small(0.01)
    ('2e-5', '0.01')
    """
    return f"{number:g}".replace("e-0", "e-")


def render(found: Findings) -> str:
    """The whole page."""
    ledger = found.ledger
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    seconds = sum(point.seconds for point in found.history)
    return template.substitute(
        style=style(),
        epsilon=up(ledger.epsilon),
        delta=small(ledger.delta),
        lead=escape(
            f"A LoRA adapter of {found.trainable_parameters:,} parameters on {found.settings.model_ref}, trained "
            f"with DP-SGD on {found.dataset_size:,} records in {len(found.history)} steps. {found.source}."
        ),
        figures=_figures(found, seconds),
        epsilon_chart=line_chart(_epsilon_chart(found)),
        loss_chart=line_chart(_loss_chart(found)),
        samples="\n".join(_sample_rows(found)),
        promise=_promise(found),
        mechanism=_rows(_mechanism(found)),
        hashes=_rows(_hashes(found)),
        footer=escape(f"Written by tg-tinker demo on {found.made}. Nothing on this page is fetched from elsewhere."),
    )


def style() -> str:
    """The style sheet of the demos' pages."""
    return files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def _figures(found: Findings, seconds: float) -> str:
    ledger = found.ledger
    shown = [
        (f"{found.before.perplexity:.0f} → {found.after.perplexity:.0f}", "perplexity on public held-out texts"),
        (f"{up(ledger.epsilon)} of {ledger.target_epsilon:g}", f"epsilon spent, at delta {small(ledger.delta)}"),
        (f"{len(found.history)} steps", f"in {seconds:.0f} seconds of training"),
        (f"{found.checkpoint.size_bytes / 1e6:.2f} MB", f"checkpoint, {found.checkpoint.algorithm}"),
    ]
    return "\n".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in shown
    )


def _epsilon_chart(found: Findings) -> Chart:
    target = found.ledger.target_epsilon
    return Chart(
        label=f"Epsilon spent by step, up to {up(found.ledger.epsilon)} of {target:g}",
        x_name="step",
        y_name="epsilon",
        line=[(0, 0.0), *((point.step, point.epsilon) for point in found.history)],
        limit=(target, f"budget {target:g}"),
        zero=True,
    )


def _loss_chart(found: Findings) -> Chart:
    points = [(point.step, point.loss) for point in found.history]
    return Chart(
        label="Training loss by step, in nats per token",
        x_name="step",
        y_name="nats per token",
        line=smoothed(points),
        dots=points,
    )


def _sample_rows(found: Findings) -> Iterable[str]:
    rows = zip(found.settings.prompts, found.before.samples, found.after.samples, strict=True)
    for prompt, before, after in rows:
        yield (
            f'<tr><th>{escape(prompt)} …</th><td data-name="before">{escape(before) or "(nothing)"}</td>'
            f'<td data-name="after">{escape(after) or "(nothing)"}</td></tr>'
        )


def _promise(found: Findings) -> str:
    ledger = found.ledger
    return (
        f"Add or remove any one of the {found.dataset_size:,} records: the probability of any outcome of this "
        f"training changes by at most a factor of e<sup>{up(ledger.epsilon)}</sup>, except with probability "
        f"{small(ledger.delta)}. That is (ε, δ)-differential privacy with "
        f"ε = {up(ledger.epsilon)} and δ = {small(ledger.delta)}, which is below 1 / number of records."
    )


def _mechanism(found: Findings) -> list[tuple[str, str]]:
    ledger, settings = found.ledger, found.settings
    attested = (
        "attested by the client: it drew each batch with tg_tinker.data.PoissonSampler and says so; "
        "the server did not watch the draw"
        if ledger.vouched_by == "client"
        else "drawn by the server"
    )
    return [
        ("release per step", "sampled Gaussian mechanism, one noisy sum of clipped gradients"),
        ("noise multiplier", f"{ledger.noise_multiplier:.4f} (solved for the target over {settings.steps} steps)"),
        ("clipping bound", f"L2 norm {settings.max_grad_norm:g} per record, over all trainable parameters"),
        ("divisor", f"{settings.expected_batch_size}, the public expected batch; never the drawn size"),
        ("sampling", f"Poisson, each record with probability {ledger.sample_rate:.6f}; {attested}"),
        ("noise source", "cryptographic generator keyed by the operating system; no seed reaches it"),
        ("privacy unit", "one record; neighbouring datasets differ by adding or removing one"),
        (
            "accountant",
            f"{ledger.accountant.upper()} privacy filter, checked and charged before each step's noise is drawn",
        ),
        ("second opinion", f"{up(ledger.pld_epsilon)} by privacy loss distributions (dp-accounting), independently"),
    ]


def _hashes(found: Findings) -> list[tuple[str, str]]:
    checkpoint, ledger = found.checkpoint, found.ledger
    return [
        ("artifact", checkpoint.artifact_id),
        ("encryption", f"{checkpoint.algorithm}, key {checkpoint.key_id}, {checkpoint.size_bytes:,} bytes"),
        ("ciphertext hash", checkpoint.content_hash),
        (
            "pulled and hashed",
            _verdict(found.ciphertext_matches, "the same hash", "ANOTHER HASH: do not trust this artifact"),
        ),
        (
            "opened again",
            _verdict(
                found.reopened_equal, f"perplexity {found.reopened_perplexity:.4f}, as before", "ANOTHER PERPLEXITY"
            ),
        ),
        ("dataset", found.settings.dataset_id),
        ("ledger", f"{ledger.entries} entries, {ledger.charges} charges, in {ledger.file}"),
        ("ledger head", ledger.head),
        ("checked offline", "✓ every entry follows the one before it, and epsilon recomputed from them is the same"),
    ]


def _verdict(good: bool, yes: str, no: str) -> str:
    return f"✓ {yes}" if good else f"✗ {no}"


def _rows(facts: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"<tr><th>{escape(name)}</th><td>{_value(value)}</td></tr>" for name, value in facts)


def _value(value: str) -> str:
    text = escape(value)
    if value.startswith("✓"):
        return f'<span class="good">{text}</span>'
    if value.startswith("✗"):
        return f'<span class="bad">{text}</span>'
    if " " not in value and len(value) > 30:
        return f"<code>{text}</code>"
    return text
