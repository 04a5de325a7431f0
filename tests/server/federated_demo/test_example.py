"""The example runs from top to bottom; here with the bigram model and few records."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "federated_icd10.py"


def test_the_example_trains_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TG_TINKER_DATA_DIR", str(tmp_path / "user"))
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(tmp_path / prefix))
    for name in ("CLINIC", "ORTHOPAEDICS", "EMERGENCY", "COORDINATOR"):
        monkeypatch.setenv(f"{name}_API_KEY", "")  # so that what the example sets is taken back
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) < 150
    for there, here in {
        '"tiny-llama-2m", 5, 6, 128, None': '"bigram", 2, 1, 8, 40',
        'data_dir=home / name / "server"': 'data_dir=home / name / "server", backend="bigram"',
        "held_out=170": "held_out=5",
    }.items():
        assert there in source
        source = source.replace(there, here)
    exec(compile(source, str(EXAMPLE), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "round 2 of 2: perplexity" in printed
    assert printed.count("signed epsilon 8.00") + printed.count("signed epsilon 7.") == 3
    assert "10 checks of the report passed" in printed
