"""What is checked before a server promises vLLM, and what a worker gets to know."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker_server.app import build_backend
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.vllm.settings import (
    MEMORY_FOLDER,
    WORKER,
    VllmConfig,
    engine_options,
    environment,
    is_in_memory,
    require_vllm,
)


def python_that(tmp_path: Path, status: int) -> str:
    program = tmp_path / f"python-{status}"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    program.chmod(0o755)
    return str(program)


def test_an_interpreter_with_vllm_and_a_folder_in_memory_are_enough(tmp_path):
    require_vllm(VllmConfig(python=python_that(tmp_path, 0)))


def test_the_interpreter_itself_is_asked(tmp_path):
    (tmp_path / "vllm.py").touch()
    program = tmp_path / "python"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec(sys.argv[3])"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    program.chmod(0o755)
    require_vllm(VllmConfig(python=str(program)))
    (tmp_path / "vllm.py").unlink()
    with pytest.raises(InvalidRequestError, match="has no vllm"):
        require_vllm(VllmConfig(python=str(program)))


@pytest.mark.parametrize(
    ("python", "problem"),
    [("/nowhere/python", "cannot be run"), (3, "has no vllm"), (1, "does not behave like a Python")],
)
def test_a_server_that_could_not_start_vllm_refuses_and_says_what_to_do(tmp_path, python, problem):
    path = python if isinstance(python, str) else python_that(tmp_path, python)
    config = ServerConfig(sampler="vllm", vllm_python=path, data_dir=tmp_path)
    with pytest.raises(InvalidRequestError, match=problem) as refusal:
        build_backend(config)
    assert refusal.value.field == "vllm_python"
    assert "pip install vllm" in str(refusal.value)


def test_adapters_never_go_to_a_disk(tmp_path):
    with pytest.raises(InvalidRequestError, match="mount a tmpfs"):
        require_vllm(VllmConfig(python=python_that(tmp_path, 0)), memory=Path("/proc/self"))


def test_the_kind_of_a_file_system_is_read_from_the_mount_nearest_to_the_folder(tmp_path):
    mounts = tmp_path / "mounts"
    inner = tmp_path / "memory" / "inner"
    inner.mkdir(parents=True)
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\ntmpfs {inner.parent} tmpfs rw 0 0\n")
    assert is_in_memory(inner, mounts)
    assert not is_in_memory(tmp_path, mounts)
    assert not is_in_memory(inner / "missing", mounts)
    mounts.write_text(mounts.read_text() + f"/dev/sdb {inner.parent} ext4 rw 0 0\n")  # mounted over it
    assert not is_in_memory(inner, mounts)
    assert is_in_memory(MEMORY_FOLDER)


def test_a_worker_gets_no_secret_and_no_network():
    ours = {
        "PATH": "/bin",
        "HF_HOME": "/models",
        "HF_TOKEN": "secret",
        "VLLM_API_KEY": "secret",
        "TG_TINKER_SERVER_ROOT_KEY": "secret",
        "ROOT": "secret",
        "PYTHONPATH": "/ours",
        "VLLM_NO_USAGE_STATS": "0",
    }
    found = environment("cpu", ours)
    assert "secret" not in found.values()
    assert (found["PATH"], found["HF_HOME"]) == ("/bin", "/models")
    assert "PYTHONPATH" not in found
    assert found["HF_HUB_OFFLINE"] == found["VLLM_NO_USAGE_STATS"] == found["DO_NOT_TRACK"] == "1"


@pytest.mark.parametrize(
    ("device", "seen", "expected"),
    [("cpu", "0,1", ""), ("cuda", None, "0"), ("cuda:1", None, "1"), ("cuda:1", "4,7", "7"), ("cuda", "4,7", "4")],
)
def test_a_worker_sees_the_device_of_the_server(device, seen, expected):
    ours = {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen}
    assert environment(device, ours)["CUDA_VISIBLE_DEVICES"] == expected


def test_no_pickle_is_read_and_every_position_of_the_model_is_used():
    options = engine_options(VllmConfig(cache_bytes=5), source="m", dtype="float32", max_positions=512, device="cpu")
    assert options["load_format"] == "safetensors"
    assert options["max_model_len"] == 513
    assert options["kv_cache_memory_bytes"] == 5


def test_the_worker_needs_vllm_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse(WORKER.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "vllm"}


def test_the_modules_beside_the_worker_hide_none_of_its_environment():
    code = f"import sys; sys.argv = ['-']; import runpy; print([p for p in sys.path if {str(WORKER.parent)!r} in p])"
    command = VllmConfig().command("-c", code)
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=WORKER.parent)
    assert found.stdout.strip() == "[]"


def test_vllm_needs_the_torch_backend(tmp_path):
    with pytest.raises(InvalidRequestError, match='needs backend = "torch"'):
        ServerConfig.load(None, {}, sampler="vllm", backend="bigram", data_dir=tmp_path)
