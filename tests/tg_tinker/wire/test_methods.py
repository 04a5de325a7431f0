from tg_tinker.proto.v1 import runs_pb2, training_pb2
from tg_tinker.wire.methods import method_of, methods


def test_every_method_says_who_may_call_it():
    assert methods()
    assert [m.path for m in methods() if m.scope == "UNSPECIFIED"] == []


def test_a_method_knows_its_path_messages_and_direction():
    method = method_of(training_pb2.ForwardBackwardRequest)
    assert method.path == "/tg_tinker.v1.TrainingService/ForwardBackward"
    assert method.reply is training_pb2.Submitted
    assert method.scope == "TRAIN"
    assert not method.client_streaming
    assert {m.name for m in methods() if m.server_streaming} == {
        "SampleStream",
        "GetTokenizer",
        "SampleTokens",
        "PullArtifact",
        "ExportArtifact",
        "PullWeights",
    }
    assert {m.name for m in methods() if m.client_streaming} == {"ImportArtifact", "ImportWeights"}


def test_no_two_methods_share_a_request_message():
    assert len({m.request for m in methods()}) == len(methods())
    assert method_of(runs_pb2.GetFutureRequest).service == "tg_tinker.v1.FutureService"
