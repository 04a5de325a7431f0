"""The worker's own file, with an engine in vLLM's place that only notes what it is asked."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tg_tinker_server.engine.vllm.settings import WORKER

_VLLM = """
import os, sys, time, types

class Anything:
    DELTA = None
    def __init__(self, **values):
        self.__dict__.update(values)

class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        if args.how == "cannot":
            raise ValueError("this model does not fit into the cache")
        if args.how == "is full":
            raise ValueError("Free memory on device cuda:0 (1/80 GiB) on startup is less than desired")
        if args.how == "fails":
            raise RuntimeError("no driver")
        return cls()
    def add_lora(self, adapter):
        assert os.path.exists(adapter.lora_path + "/adapter_config.json")
        if "hangs" in adapter.lora_path:
            open(adapter.lora_path + ".seen", "w").close()
            time.sleep(600)
        if "bad" in adapter.lora_path:
            raise KeyError("a layer")

__version__ = "0"
EngineArgs = SamplingParams = Anything
for path, names in {
    "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": Anything},
    "vllm.sampling_params": {"RequestOutputKind": Anything},
    "vllm.v1": {}, "vllm.v1.engine": {}, "vllm.v1.engine.llm_engine": {"LLMEngine": LLMEngine},
}.items():
    sys.modules[path] = types.SimpleNamespace(**names)
"""


@pytest.fixture
def begin(tmp_path):
    (tmp_path / "vllm.py").write_text(_VLLM)
    (tmp_path / "torch.py").write_text("def set_float32_matmul_precision(precision): pass")
    workers = []

    def start(how="", answers=1):
        command = [sys.executable, str(WORKER)]
        environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
        worker = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        workers.append(worker)
        send(worker, {"how": how})
        return worker, [json.loads(worker.stdout.readline()) for _ in range(answers)]

    yield start
    for worker in workers:
        worker.kill()
        worker.wait()
        worker.stdin.close()
        worker.stdout.close()


def send(worker, message, end="\n"):
    worker.stdin.write((json.dumps(message) + end).encode())
    worker.stdin.flush()


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("last", ["", '{"do": "sample", "prompt": [1, 2'], ids=["at a line's end", "within a line"])
def test_it_ends_with_its_input_and_so_do_adapters_that_it_did_not_read(begin, tmp_path, last):
    worker, said = begin()
    assert said == [{"ready": "0"}]
    folder = adapter(tmp_path / "hangs")
    send(worker, {"do": "load", "adapter": 1, "path": str(folder)})
    while not (tmp_path / "hangs.seen").exists():
        assert worker.poll() is None
        time.sleep(0.01)
    worker.stdin.write(last.encode())
    worker.stdin.close()
    assert worker.wait(60) == 0
    assert not folder.exists()


@pytest.mark.parametrize("name", ["good", "bad"])
def test_the_folder_of_an_adapter_is_gone_when_it_was_read(begin, tmp_path, name):
    worker, _ = begin()
    folder = adapter(tmp_path / name)
    send(worker, {"do": "load", "adapter": 1, "path": str(folder)})
    said = json.loads(worker.stdout.readline())
    assert ("error" in said) == (name == "bad")
    assert not folder.exists()


@pytest.mark.parametrize(("how", "unsupported"), [("cannot", True), ("fails", False), ("is full", False)])
def test_what_would_fail_again_is_told_from_what_might_not(begin, how, unsupported):
    worker, (said,) = begin(how)
    assert said["unsupported"] is unsupported
    assert worker.wait(60) == 1
