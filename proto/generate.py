"""Generate ``tg_tinker/proto/v1`` from the .proto files; ``--check`` fails when it is stale."""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

import google.rpc  # its package folder holds google/rpc/status.proto
import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parent
TARGET = ROOT.parent / "tg_tinker" / "proto" / "v1"


def generate(out: Path) -> Path:
    """Run protoc into ``out``; returns the folder holding the generated modules."""
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.proto"))
    includes = [
        ROOT,
        Path(grpc_tools.__file__).parent / "_proto",
        Path(next(iter(google.rpc.__path__))).parents[1],
    ]
    args = ["protoc", *(f"-I{i}" for i in includes), f"--python_out={out}", f"--pyi_out={out}", *sources]
    if protoc.main(args) != 0:
        raise SystemExit("protoc failed: see its message above")
    return out / "tg_tinker" / "proto" / "v1"


def main() -> int:
    with tempfile.TemporaryDirectory() as tmp:
        fresh = generate(Path(tmp))
        names = sorted(p.name for p in fresh.iterdir())
        if "--check" in sys.argv:
            old = sorted(p.name for p in TARGET.glob("*_pb2.py*"))
            stale = sorted(set(names) ^ set(old)) + [
                n for n in names if n in old and not filecmp.cmp(fresh / n, TARGET / n, shallow=False)
            ]
            if stale:
                print(f"stale generated code: {', '.join(stale)}; run `make proto`", file=sys.stderr)
                return 1
            print(f"{len(names)} generated files are fresh")
            return 0
        for old_file in TARGET.glob("*_pb2.py*"):
            old_file.unlink()
        for name in names:
            (TARGET / name).write_bytes((fresh / name).read_bytes())
        print(f"wrote {len(names)} files to {TARGET.relative_to(ROOT.parent)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
