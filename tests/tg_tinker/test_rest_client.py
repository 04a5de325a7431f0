import asyncio

import pytest

from tg_tinker import InvalidRequestError, LoRAConfig, ResourceNotFoundError, ServiceClient, TrainingConfig
from tg_tinker_server.app import EmbeddedServer
from tg_tinker_server.config import ServerConfig


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    config = ServerConfig(port=0, backend="bigram", data_dir=tmp_path_factory.mktemp("server"), log_level="error")
    with (
        EmbeddedServer(config) as server,
        ServiceClient(api_key=server.mint_key("clinic"), base_url=server.address) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def runs(service):
    config = TrainingConfig(model_ref="bigram", batch_size=1, metadata={"who": "me"})
    return [service.create_training_client(config) for _ in range(5)]


@pytest.fixture(scope="module")
def rest(service):
    return service.create_rest_client()


def test_pages_of_runs_are_disjoint_and_complete(rest, runs):
    pages = [rest.list_training_runs(limit=2, offset=offset).result() for offset in (0, 2, 4)]
    found = [r.training_run_id for page in pages for r in page.training_runs]
    assert found == [r.id for r in reversed(runs)]
    assert [len(p.training_runs) for p in pages] == [2, 2, 1]
    assert pages[1].cursor.total_count == 5
    assert pages[1].cursor.offset == 2


def test_one_run_with_its_checkpoints(rest, runs):
    run = runs[0]
    state, sampler = run.save_state("a"), run.save_weights_for_sampler("a")
    found = rest.get_training_run(run.id).result()
    assert (found.base_model, found.is_lora, found.status, found.step) == ("bigram", False, "active", 0)
    assert found.user_metadata == {"who": "me"}
    assert found.last_checkpoint.tinker_path == state.path
    assert found.last_sampler_checkpoint.tinker_path == sampler.path
    assert rest.get_weights_info_by_tinker_path(state.path).training_run_id == run.id
    with pytest.raises(ResourceNotFoundError):
        rest.get_training_run("run_0")


def test_checkpoints_are_listed_and_deleted(rest, runs):
    run = runs[1]
    saved = [run.save_state(f"ck-{i}") for i in range(3)]
    assert [c.tinker_path for c in rest.list_checkpoints(run.id).checkpoints] == [s.path for s in reversed(saved)]
    rest.delete_checkpoint(run.id, "weights/ck-0")
    rest.delete_checkpoint(run.id, saved[1].path)
    rest.delete_checkpoint(run.id, "ck-2")
    for s in saved:
        with pytest.raises(ResourceNotFoundError):
            run.load_state(s.path)
    assert rest.list_checkpoints(run.id).checkpoints == []


def test_another_runs_checkpoint_is_none_of_this_one(rest, runs):
    saved = runs[2].save_state("mine")
    for name in (saved.path, "weights/mine", "mine"):
        with pytest.raises(ResourceNotFoundError):
            rest.delete_checkpoint(runs[3].id, name)
    assert runs[2].load_state(saved.path).artifact_id


def test_pages_of_checkpoints(rest, runs):
    for i in range(3):
        runs[4].save_state(f"p-{i}")
    pages = [rest.list_user_checkpoints(limit=2, offset=offset) for offset in (0, 2)]
    found = [c.checkpoint_id for page in pages for c in page.checkpoints]
    assert len(set(found)) == 4
    assert pages[0].cursor.total_count == rest.list_user_checkpoints().cursor.total_count >= 3


def test_how_long_a_checkpoint_is_kept(rest, runs, service):
    saved = runs[0].save_state("ttl")
    kept = rest.set_checkpoint_ttl_from_tinker_path(saved.path, 60)
    assert 50 < (kept.expires_at - saved.timestamp).total_seconds() < 70
    assert rest.set_checkpoint_ttl_from_tinker_path(saved.path, None).expires_at is None
    assert service.get_artifact(saved.path).path == saved.path
    assert service.set_artifact_ttl(saved.artifact_id, 60).expires is not None


def test_archives_and_the_audit_log(rest, runs, service, tmp_path):
    saved = runs[0].save_state("archive")
    data = rest.get_checkpoint_archive(saved.path, tmp_path / "archive")
    assert data == service.pull_artifact(saved.artifact_id) == (tmp_path / "archive").read_bytes()
    entries = rest.get_audit_log(runs[0].id, "save_state")
    assert entries
    assert {e.training_client_id for e in entries} == {runs[0].id}


def test_twins(rest, runs):
    async def main():
        saved = runs[3].save_state("twin")
        assert (await (await rest.list_training_runs_async(1))).cursor.limit == 1
        assert (await rest.get_training_run_async(runs[3].id)).last_checkpoint.tinker_path == saved.path
        await rest.delete_checkpoint_async(runs[3].id, "twin")
        assert (await rest.list_checkpoints_async(runs[3].id)).checkpoints == []

    asyncio.run(main())


def test_adapters_need_something_to_train(service):
    with pytest.raises(InvalidRequestError, match="at least one of"):
        service.create_lora_training_client("bigram", train_mlp=False, train_attn=False, train_unembed=False)
    assert LoRAConfig(rank=32).rank == 32
