"""Adapters on their way to a worker: PEFT's files, in memory, for as long as it takes to read them."""

import fcntl
import os
import stat

import numpy as np
import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tg_tinker_server.app import build_backend
from tg_tinker_server.config import ServerConfig
from tg_tinker_server.engine.models import BUNDLED_MODELS
from tg_tinker_server.engine.vllm import adapters
from tg_tinker_server.engine.vllm.adapters import Adapters, PrivateFolder, sweep, write_adapter
from tg_tinker_server.engine.vllm.settings import MEMORY_FOLDER

TOKENS = [5, 9, 30, 77, 200, 1000]


def built_in_logits(weights, tokens):
    with torch.no_grad(), weights.base.by_peft(weights.adapter):
        return weights.base.module(input_ids=torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture
def run(bundled):
    """Opens frozen weights with random adapters."""
    opened = []

    def open_(seed=3, **lora):
        config = bundled.config(lora=lora)
        session = bundled.backend.open(run_id="r", config=config)
        state = session.export_state(optimizer=False)
        rng = np.random.default_rng(seed)
        tensors = {k: rng.normal(0, 0.1, v.shape).astype(np.float32) for k, v in state.tensors.items()}
        session.import_state(type(state)(tensors=tensors, scalars=state.scalars), optimizer=False)
        opened.append(session)
        return session.live_weights()

    yield open_
    for session in opened:
        session.close()


@pytest.mark.parametrize(
    "lora", [{}, {"target_modules": "all-linear", "rank": 8, "alpha": 12}, {"target_modules": ["@mlp"]}]
)
def test_the_files_are_an_adapter_that_peft_loads(run, tmp_path, lora):
    weights = run(**lora)
    other = run(seed=4, **lora)
    write_adapter(weights, tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(BUNDLED_MODELS["tiny-llama-2m"], dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(logits, built_in_logits(weights, TOKENS), atol=2e-5)
    assert np.abs(logits - built_in_logits(other, TOKENS)).max() > 0.01


def test_the_tensors_are_those_that_peft_itself_would_save(run, tmp_path):
    weights = run()
    write_adapter(weights, tmp_path)
    theirs = peft.get_peft_model_state_dict(weights.base._peft, adapter_name=weights.adapter)
    ours = load_file(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Worker:
    """The other end of an Adapters: what was sent, and what lay in the folders then."""

    def __init__(self, memory, most=3):
        self.sent, self.seen = [], {}
        self.memory = memory
        self.adapters = Adapters(self._take, memory=memory, most=most)

    def _take(self, message):
        self.sent.append(message)
        if message["do"] == "load":
            folder = message["path"]
            self.seen[message["adapter"]] = load_file(f"{folder}/adapter_model.safetensors")
            assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700

    def folders(self):
        return sorted(self.memory.iterdir())

    def load(self, held):
        """It was loaded, and agrees."""
        self.adapters.answered(held.number, refused=False)
        assert not self.adapters.settled
        self.adapters.tried(held, agrees=True)


def test_a_folder_is_private_and_goes_whether_it_was_loaded_or_not(run, tmp_path):
    worker = Worker(tmp_path)
    first, second = worker.adapters.take(run()), worker.adapters.take(run(seed=4))
    assert len(worker.folders()) == 2
    worker.adapters.answered(first.number, refused=False)
    worker.adapters.answered(second.number, refused=True)
    assert worker.folders() == []
    assert (first.state, second.state) == ("loading", "refused")
    worker.adapters.tried(first, agrees=True)
    assert first.state == "ready"
    assert worker.adapters.settled
    worker.adapters.take(run(seed=5))
    worker.adapters.clear()
    assert worker.folders() == []


def test_nothing_is_left_of_one_that_could_not_be_written(run, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "save_file", fail)
    worker = Worker(tmp_path)
    with pytest.raises(OSError, match="No space"):
        worker.adapters.take(run())
    assert worker.folders() == []
    assert worker.sent == []


def test_equal_weights_go_over_once_and_changed_ones_again(run, tmp_path):
    worker, weights = Worker(tmp_path), run()
    first = worker.adapters.take(weights)
    assert worker.adapters.take(weights) is first
    worker.load(first)
    weights.changed()
    second = worker.adapters.take(weights)
    assert second.number != first.number
    assert [m["do"] for m in worker.sent] == ["load", "load"]
    worker.load(second)
    worker.adapters.release(first)
    assert worker.sent[-1]["do"] == "load"  # somebody still has it
    worker.adapters.release(first)
    assert worker.sent[-1] == {"do": "drop", "adapter": first.number}
    worker.adapters.release(second)
    assert worker.sent[-1]["adapter"] == first.number  # the newest stays for the next request


def test_one_that_changed_on_its_way_is_dropped_when_it_arrives(run, tmp_path):
    worker, weights = Worker(tmp_path), run()
    held = worker.adapters.take(weights)
    worker.adapters.release(held)
    weights.changed()
    worker.load(held)
    assert worker.sent[-1] == {"do": "drop", "adapter": held.number}


def test_closed_weights_are_dropped_at_once_or_after_their_last_user(run, tmp_path):
    worker = Worker(tmp_path)
    idle, used = run(), run(seed=4)
    first, second = worker.adapters.take(idle), worker.adapters.take(used)
    for held in (first, second):
        worker.load(held)
    worker.adapters.release(first)
    idle.close()
    assert worker.sent[-1] == {"do": "drop", "adapter": first.number}
    used.close()
    assert worker.sent[-1]["adapter"] == first.number
    worker.adapters.release(second)
    assert worker.sent[-1] == {"do": "drop", "adapter": second.number}


def test_the_one_unused_for_longest_makes_room_and_a_used_one_never_does(run, tmp_path):
    worker = Worker(tmp_path, most=2)
    runs = [run(seed=s) for s in (1, 2, 3)]
    held = [worker.adapters.take(w) for w in runs[:2]]
    for h in held:
        worker.load(h)
    assert worker.adapters.take(runs[2]) is None
    assert worker.folders() == []
    for h in held:
        worker.adapters.release(h)
    worker.adapters.release(worker.adapters.take(runs[0]))  # used last
    third = worker.adapters.take(runs[2])
    assert {"do": "drop", "adapter": held[1].number} in worker.sent
    assert {"do": "drop", "adapter": held[0].number} not in worker.sent
    assert third is not None


def test_folders_of_dead_processes_are_swept_and_of_living_ones_are_not(tmp_path):
    living = PrivateFolder(tmp_path)
    dead = PrivateFolder(tmp_path)
    fcntl.flock(dead._lock, fcntl.LOCK_UN)  # as the kernel does for a process that ends
    (tmp_path / "somebody-elses").mkdir()
    os.mkfifo(tmp_path / "tg-tinker-adapter-pipe")  # opening it would wait for a writer
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [living.path.name, "somebody-elses", "tg-tinker-adapter-pipe"]
    )
    living.remove()
    os.close(dead._lock)


def test_a_server_sweeps_when_it_starts_whatever_samples(tmp_path, monkeypatch):
    dead = PrivateFolder(MEMORY_FOLDER)
    fcntl.flock(dead._lock, fcntl.LOCK_UN)
    build_backend(ServerConfig(data_dir=tmp_path))
    assert not dead.path.exists()
    os.close(dead._lock)


@pytest.mark.parametrize(("module", "name"), [(fcntl, "flock"), (os, "open")])
def test_a_folder_that_was_swept_before_it_was_locked_is_made_anew(tmp_path, monkeypatch, module, name):
    real, swept = getattr(module, name), []

    def late(*args):
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].rmdir()
        return real(*args)

    monkeypatch.setattr(module, name, late)
    folder = PrivateFolder(tmp_path)
    assert list(tmp_path.iterdir()) == [folder.path] != swept
    folder.remove()


def test_a_full_memory_is_an_os_error_and_leaves_no_folder(run, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(adapters, "save_file", full)
    with pytest.raises(OSError, match="could not be written"):
        Adapters(print, memory=tmp_path).take(run())
    assert list(tmp_path.iterdir()) == []
