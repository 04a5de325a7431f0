"""Make .venv and install the project into it: the one step every make target starts from.

Standard library only, so that a bare machine with Python and pip can run it:

    python3 scripts/make_venv.py demo      # the server and the demo's texts
    python3 scripts/make_venv.py dev       # the same, and the tools of `make test` and `make check`
    python scripts/make_venv.py peers      # only the cookbook and older SDKs, into the environment that runs this

Versions come from constraints.txt. The Makefile calls it only when pyproject.toml or constraints.txt changed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The recipes that run against our server. Its dependencies are in the group `dev`, but for one (tml-renderers) that
# cannot be had in the version it asks for, and that these recipes never import.
COOKBOOK = "tinker-cookbook==0.6.1"
# SDKs that are tested beside the newest, which is in the group `dev`: each in a folder of its own, to be put before
# the others on PYTHONPATH. Their dependencies are those of the newest.
OLDER_SDKS = ("0.30.4", "0.34.0", "0.36.0")


def say(text: str) -> None:
    """Print one line at once, so that it stands above pip's own output."""
    print(f"[setup] {text}", flush=True)


def venv_python() -> Path:
    """The interpreter inside .venv."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure_venv() -> list[str]:
    """Create .venv if it is missing; return the command that runs pip for it.

    Debian splits ensurepip off Python; there the pip of the calling Python installs into the environment.
    """
    if not venv_python().exists():
        say(f"making {VENV.name} with Python {sys.version.split()[0]} ({sys.executable})")
        try:
            import ensurepip  # noqa: F401 - only asks whether venv can bring pip along
        except ImportError:
            venv.create(VENV, with_pip=False)
        else:
            venv.create(VENV, with_pip=True)
    own_pip = [str(venv_python()), "-m", "pip"]
    probe = subprocess.run([*own_pip, "--version"], capture_output=True, check=False)  # noqa: S603 - our own venv
    if probe.returncode == 0:
        return own_pip
    return [sys.executable, "-m", "pip", "--python", str(venv_python())]


def development_tools() -> list[str]:
    """The requirements of the group `dev` in pyproject.toml (older pips cannot read groups themselves)."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return list(tomllib.load(file)["dependency-groups"]["dev"])


def install(pip: list[str], *, tools: bool, torch_index: str) -> None:
    """Install the project (editable) with its extras; with ``tools`` also what tests and checks need."""
    command = [*pip, "install", "--disable-pip-version-check", "-c", "constraints.txt"]
    if not sys.stdout.isatty():
        command.append("--quiet")
    if torch_index:
        command += ["--extra-index-url", torch_index]
    command += ["-e", ".[demo,federation]"]
    if tools:
        command += development_tools()
    say("installing the project" + (" and its development tools" if tools else "") + "; the first time takes minutes")
    if sys.platform == "linux" and not torch_index:
        say(f"no GPU here? TORCH_INDEX={CPU_INDEX} fetches a torch without CUDA")
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603 - pip, with arguments made here
    if tools:
        install_peers(pip, VENV / "peers")
    say(f"installed in {time.monotonic() - started:.0f} s")


def install_peers(pip: list[str], folder: Path) -> None:
    """Install the cookbook, and older SDKs each into ``folder/tinker-<version>``; what is there stays."""
    bare = [*pip, "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
    subprocess.run([*bare, COOKBOOK], cwd=ROOT, check=True)  # noqa: S603 - pip, with arguments made here
    for version in OLDER_SDKS:
        target = folder / f"tinker-{version}"
        if not (target / f"tinker-{version}.dist-info" / "RECORD").exists():
            say(f"adding the Tinker SDK {version}")
            subprocess.run(  # noqa: S603 - as above
                [*bare, "--upgrade", "--target", str(target), f"tinker=={version}"], cwd=ROOT, check=True
            )


def main() -> int:
    """Parse the arguments, install; exit code 0 when everything is in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=["demo", "dev", "peers"])
    parser.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX", ""), help=f"e.g. {CPU_INDEX}")
    args = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        say(f"this is Python {sys.version.split()[0]}; TG-Tinker needs 3.11 or newer: make PYTHON=python3.11 ...")
        return 1
    try:
        if args.what == "peers":
            install_peers([sys.executable, "-m", "pip"], Path(sys.prefix) / "peers")
            return 0
        install(ensure_venv(), tools=args.what == "dev", torch_index=args.torch_index)
    except subprocess.CalledProcessError as e:
        say(f"pip failed with exit code {e.returncode}; what it said stands above")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
