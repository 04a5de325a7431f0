import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from tg_tinker import (
    AuthorizationError,
    InvalidRequestError,
    ResourceNotFoundError,
    ServerError,
    ServiceClient,
    TrainingConfig,
)

CONFIG = TrainingConfig(model_ref="sum")
BATCH = {"input_ids": [[1, 2, 3]]}


def test_no_argument_is_needed_when_the_environment_says_it_all(server):
    with ServiceClient() as service:
        assert service.config.base_url == f"127.0.0.1:{server.port}"
        assert service.tenant_id == "clinic"
        assert "tgk_test_key" not in repr(service.config)


def test_plaintext_to_another_machine_is_refused_before_anything_is_sent():
    with pytest.raises(InvalidRequestError, match="unencrypted"):
        ServiceClient(api_key="tgk_x", base_url="10.1.2.3:50051")


def test_two_training_clients_have_ids_of_their_own_that_stay(service):
    one, two = service.create_training_client(CONFIG), service.create_training_client(CONFIG)
    assert one.id
    assert one.id != two.id
    before = one.id
    for _ in range(5):
        one.forward_backward(BATCH)
        one.optim_step().result()
    assert one.id == before
    assert (one.step, two.step) == (5, 0)


def test_a_create_whose_reply_was_lost_makes_one_run(service, server):
    server.faults["CreateTrainingClient"] = ["drop the reply"]
    service.create_training_client(CONFIG)
    assert len(server.runs) == 1


def test_a_run_starts_from_a_checkpoint(service):
    first = service.create_training_client(CONFIG)
    first.forward_backward(BATCH)
    first.optim_step()
    saved = first.save_state()
    second = service.create_training_client(CONFIG, saved.artifact_id)
    assert second.step == 1


def test_a_training_client_is_found_again_and_goes_on(service):
    tc = service.create_training_client(CONFIG)
    tc.forward_backward(BATCH)
    tc.optim_step()
    tc.sample("a")
    again = service.get_training_client(tc.id)
    assert (again.id, again.config, again.step) == (tc.id, CONFIG, 1)
    again.forward_backward(BATCH)
    assert tc.optim_step().result().step == 2  # handles of one service share the order
    with pytest.raises(ResourceNotFoundError) as caught:
        service.get_training_client("run_77")
    assert caught.value.resource_id == "run_77"


def test_runs_are_listed_newest_first_by_status(service):
    ids = [service.create_training_client(CONFIG).id for _ in range(3)]
    service.get_training_client(ids[0]).unload_model()
    infos = service.list_training_clients()
    assert [i.id for i in infos] == ids[::-1]
    assert [i.training_client_id for i in service.list_training_clients(status="completed")] == [ids[0]]
    assert len(service.list_training_clients(limit=2)) == 2
    assert infos[0].model_ref == "sum"
    assert infos[0].created.tzinfo is not None


def test_a_deleted_run_is_gone(service):
    tc = service.create_training_client(CONFIG)
    service.delete_training_client(tc.id)
    assert service.list_training_clients() == []
    with pytest.raises(ResourceNotFoundError):
        tc.get_info()


def test_threads_share_a_client(service):
    steps = []

    def train():
        tc = service.create_training_client(CONFIG)
        for _ in range(5):
            tc.forward_backward(BATCH).result(20)
            steps.append(tc.optim_step().result(20).step)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(steps) == sorted([1, 2, 3, 4, 5] * 4)


def test_waiting_holds_no_thread_per_call(service, server):
    tc = service.create_training_client(CONFIG)
    before = set(threading.enumerate())  # other tests of this process may have left some
    server.gate.clear()
    futures = [tc.forward_backward(BATCH) for _ in range(30)]
    for future in futures:
        future._operation.watch()
    time.sleep(0.2)
    new = [t for t in threading.enumerate() if t not in before and "ThreadPoolExecutor" not in t.name]
    server.gate.set()
    assert all(f.wait(20) for f in futures)
    assert len(new) < 10


def test_an_artifact_is_pulled_to_memory_and_to_a_file(service, tmp_path):
    saved = service.create_training_client(CONFIG).save_state()
    destination = tmp_path / "checkpoint.bin"
    data = service.pull_artifact(saved.artifact_id, str(destination))
    assert data == b"\x00\x01\x02" * 3
    assert destination.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.bin"]
    assert service.pull_artifact(saved.artifact_id) == data


def test_a_pull_that_fails_leaves_no_file_and_keeps_the_old_one(service, tmp_path):
    destination = tmp_path / "checkpoint.bin"
    destination.write_bytes(b"old")
    with pytest.raises(ResourceNotFoundError):
        service.pull_artifact("ckpt_77", destination)
    assert destination.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_artifacts_are_listed_and_deleted(service):
    tc = service.create_training_client(CONFIG)
    ids = [tc.save_state().artifact_id for _ in range(2)]
    infos = service.list_artifacts(tc.id)
    assert [i.artifact_id for i in infos] == ids
    assert infos[0].algorithm == "AES-256-GCM"
    service.delete_artifact(ids[0])
    assert [i.artifact_id for i in service.list_artifacts()] == ids[1:]


def test_a_ledger_comes_with_what_it_takes_to_verify_it(service):
    ledger = service.get_privacy_ledger("data-1")
    ledger.verify()
    assert (ledger.dataset_id, ledger.epsilon_spent, ledger.target_epsilon) == ("data-1", 1.5, 8.0)
    assert [e.kind for e in ledger.entries] == ["open"]
    assert service.get_privacy_report("data-1") == {"dataset_id": "data-1"}


def test_audit_logs_are_asked_for_with_all_filters(service, server):
    end = datetime.now(UTC)
    (entry,) = service.get_audit_logs("run_1", "save_state", end - timedelta(hours=1), end, limit=5)
    assert (entry.operation, entry.training_client_id, entry.artifact_ids) == ("save_state", "run_1", ["ckpt_1"])
    assert entry.prev_hash == "00" * 32
    assert len(entry.record_hash) == 64
    (request,) = server.seen("GetAuditLog")
    assert request.limit == 5
    assert request.end_time.ToDatetime(UTC) == end
    service.get_audit_logs()
    assert not server.seen("GetAuditLog")[-1].HasField("start_time")
    with pytest.raises(InvalidRequestError, match="timezone"):
        service.get_audit_logs(start_time=datetime(2026, 1, 1))


def test_a_server_of_another_major_version_is_refused_before_work_begins(service, server):
    server.api_version = "2.0"
    with pytest.raises(ServerError, match=r"2\.0"):
        service.create_training_client(CONFIG)
    assert server.runs == {}
    server.api_version = "1.7"
    assert service.get_server_capabilities().api_version == "1.7"
    assert service.create_training_client(CONFIG).id
    assert [m.name for m in service.get_server_capabilities().models] == ["sum"]


def test_metadata_of_the_user_joins_that_of_every_run(server):
    with ServiceClient(user_metadata={"team": "a", "who": "x"}) as service:
        tc = service.create_training_client(TrainingConfig(model_ref="sum", metadata={"who": "y"}))
    assert tc.config.metadata == {"team": "a", "who": "y"}


def test_an_error_of_the_server_passes_through_with_its_request_id(service, server):
    server.faults["PullArtifact"] = [AuthorizationError("this key may not export")]
    with pytest.raises(AuthorizationError, match="may not export") as caught:
        service.pull_artifact("ckpt_1")
    assert caught.value.request_id


def test_a_closed_service_refuses(server):
    service = ServiceClient()
    tc = service.create_training_client(CONFIG)
    service.close()
    for call in (service.list_training_clients, lambda: tc.forward_backward(BATCH), tc.get_info):
        with pytest.raises(InvalidRequestError, match="closed"):
            call()
