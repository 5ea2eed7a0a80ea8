"""A server on a port: streams, clients that go away, a queue that is full, and the end."""

import http.client
import json
import signal
import socket
import time

import pytest
from served import Gate, assert_same_pictures, gated, served

from amed_engine import ContinuousSampler, Sampler

pytest.importorskip("fastapi", reason="fastapi is not installed")

from amed_engine.serving.http import Limits, make_app, streams

EULER = {"solver": "euler", "nfe": 3, "afs": False}


@pytest.fixture(scope="module")
def digits():
    with ContinuousSampler("digits", rows=4) as engine, served(make_app({"digits": [engine]})) as server:
        yield server


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def gated_engine(gate):
    with gated(gate, rows=2, queue=2) as engine:
        yield engine
        gate.open.set()


@pytest.fixture
def server(gate, gated_engine):
    with served(make_app({"gate": [gated_engine]})) as server:
        yield server
        gate.open.set()


def posted(server, body, path="/v1/samples") -> http.client.HTTPConnection:
    """A request whose answer is not waited for."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def answered(connection: http.client.HTTPConnection):
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def asked(server, path) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().status


def events(text: str) -> list[tuple[str, dict]]:
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        if not event.startswith(":"):
            name, data = event.splitlines()
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)


def taken(engine) -> int:
    """Samples that it has."""
    stats = engine.stats()
    return stats.live + stats.waiting


# ---- streams


def test_samples_come_one_by_one_and_then_the_end(digits):
    status, headers, text = answered(posted(digits, {"seeds": list(range(9)), "nfe": 4, "stream": True}))
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    *samples, (last, done) = events(text)
    assert {name for name, _ in samples} == {"sample"}
    by_index = {data["index"]: data for _, data in samples}
    assert (len(samples), sorted(by_index)) == (9, list(range(9)))
    assert [data["index"] for _, data in samples][:4] == [0, 1, 2, 3]  # four rows
    expected = Sampler("digits", nfe=4).run(list(range(9)))
    told = [by_index[index] for index in range(9)]
    assert [(each["seed"], each["class_label"]) for each in told] == list(enumerate(expected.labels.tolist()))
    assert_same_pictures([each["b64_json"] for each in told], expected.images)
    assert last == "done"
    assert done["samples"] == 9
    assert (done["model"], done["nfe"], done["backend"], done["buckets"][-1]) == ("digits", 4, "ticks", 4)


def test_the_first_sample_comes_before_the_second_is_drawn(server, gate, gated_engine):
    connection = posted(server, {**EULER, "seeds": [1, 2, 3], "stream": True})
    answer = connection.getresponse()
    assert answer.readline() == b"event: sample\n"  # two rows: of three samples one still waits, or is drawn
    assert len([name for name, _ in events("event: sample\n" + answer.read().decode()) if name == "sample"]) == 3


def test_a_stream_that_waits_says_so(server, gate, monkeypatch):
    monkeypatch.setattr(streams, "QUIET", 0.01)
    gate.open.clear()
    answer = posted(server, {**EULER, "seeds": [1], "stream": True}).getresponse()
    assert answer.readline() == b": waiting\n"
    gate.open.set()
    assert events(answer.read().decode().lstrip("\n"))[-1][0] == "done"


def test_what_is_refused_has_no_stream(digits):
    status, headers, text = answered(posted(digits, {"seeds": [-1], "stream": True}))
    assert (status, headers["content-type"]) == (422, "application/json")
    assert "error" in json.loads(text)


# ---- clients that go away


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels(server, gate, gated_engine, stream, caplog):
    gate.open.clear()
    gone = posted(server, {**EULER, "seeds": [1, 2], "stream": stream})
    until(lambda: gated_engine.stats().live == 2)
    waiting = posted(server, {**EULER, "seeds": [3]})
    until(lambda: gated_engine.stats().waiting == 1)
    gone.sock.shutdown(socket.SHUT_RDWR)
    gone.close()
    until(lambda: gated_engine.stats().cancelled == 2)
    gate.open.set()
    assert answered(waiting)[0] == 200
    assert gated_engine.stats().completed == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_client_that_goes_while_it_sends_leaves_nothing(server, gated_engine):
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(
            b"POST /v1/samples HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        until(lambda: server._app.state.service._open == 1)
    until(lambda: server._app.state.service._open == 0)
    assert answered(posted(server, {**EULER, "seeds": [1]}))[0] == 200
    assert gated_engine.stats().admitted == 1


# ---- too much, too late


def test_beyond_the_queue_it_says_when_to_come_again(server, gate, gated_engine):
    gate.open.clear()
    first = posted(server, {**EULER, "seeds": [1, 2]})
    until(lambda: gated_engine.stats().live == 2)
    second = posted(server, {**EULER, "seeds": [3, 4]})
    until(lambda: gated_engine.stats().waiting == 2)
    status, headers, text = answered(posted(server, {**EULER, "seeds": [5]}))
    error = json.loads(text)["error"]
    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert int(headers["retry-after"]) >= 1
    assert gated_engine.stats().refused == 1
    gate.open.set()
    assert {answered(first)[0], answered(second)[0]} == {200}


def test_a_deadline_that_passes_is_told(server, gate, gated_engine):
    gate.open.clear()
    first = posted(server, {**EULER, "seeds": [1, 2]})
    until(lambda: gated_engine.stats().live == 2)
    late = posted(server, {**EULER, "seeds": [3], "deadline": 0.5})
    until(lambda: gated_engine.stats().waiting == 1)
    time.sleep(0.6)
    gate.open.set()
    status, _, text = answered(late)
    assert (status, json.loads(text)["error"]["code"]) == (504, "deadline")
    assert answered(first)[0] == 200
    assert gated_engine.stats().missed == 1


# ---- the end


def test_a_signal_lets_what_is_asked_for_be_answered(gate, gated_engine):
    with served(make_app({"gate": [gated_engine]})) as server:
        gate.open.clear()
        running, streamed = (posted(server, {**EULER, "seeds": [seed], "stream": seed == 2}) for seed in (1, 2))
        queued = posted(server, {**EULER, "seeds": [3]})
        until(lambda: taken(gated_engine) == 3)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: asked(server, "/readyz") == 503)
        assert asked(server, "/healthz") == 200
        status, headers, _ = answered(posted(server, {**EULER, "seeds": [4]}))
        assert (status, headers["retry-after"]) == (503, "1")
        assert not server.should_exit
        gate.open.set()
        assert answered(running)[0] == 200
        assert events(answered(streamed)[2])[-1][0] == "done"
        assert answered(queued)[0] == 200
        until(lambda: server.should_exit)
        assert server.unanswered == 0


def test_after_the_grace_what_is_left_is_told_so(gate):
    engine = gated(gate, rows=1)
    with served(make_app({"gate": [engine]}), grace=0.1, close=lambda: engine.close(drain=False)) as server:
        gate.open.clear()
        running, streamed = (posted(server, {**EULER, "seeds": [seed], "stream": seed == 2}) for seed in (1, 2))
        until(lambda: taken(engine) == 2)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: engine.closed)
        status, headers, text = answered(running)
        assert (status, headers["retry-after"], json.loads(text)["error"]["code"]) == (503, "1", "draining")
        assert events(answered(streamed)[2])[-1][1]["error"]["code"] == "draining"
        gate.open.set()  # a tick that runs is never cut
        until(lambda: server.should_exit)
        assert server.unanswered == 2


def test_a_second_signal_cuts_the_grace_short(gate):
    engine = gated(gate, rows=1)
    with served(make_app({"gate": [engine]}), grace=1000, close=lambda: engine.close(drain=False)) as server:
        gate.open.clear()
        running = posted(server, {**EULER, "seeds": [1]})
        until(lambda: engine.stats().live == 1)
        server.handle_exit(signal.SIGINT, None)
        until(lambda: asked(server, "/readyz") == 503)
        assert not server.should_exit
        server.handle_exit(signal.SIGINT, None)
        assert answered(running)[0] == 503
        gate.open.set()
        until(lambda: server.should_exit)
        assert server.unanswered == 1


def test_what_cannot_warm_up_ends_the_server(gated_engine, monkeypatch):
    from amed_engine.serving.http.run import Server, listener

    def fail():
        raise RuntimeError("no graph")

    monkeypatch.setattr(gated_engine, "warmup", fail)
    with listener("127.0.0.1", 0) as bound, pytest.raises(RuntimeError, match="no graph"):
        Server(make_app({"gate": [gated_engine]}, limits=Limits()), 1, ready=print, close=print).run(sockets=[bound])


@pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no time limit for what nobody takes"
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(stream, monkeypatch):
    from amed_engine.serving.http import run

    monkeypatch.setattr(run, "STUCK", 1)
    with ContinuousSampler(Gate(), rows=4, shape=(3, 256, 256), verify=False) as engine:  # more than sockets hold
        app = make_app({"large": [engine]})
        with served(app) as server, socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", server.port))
            body = json.dumps({"n": 30, "solver": "euler", "nfe": 1, "afs": False, "stream": stream}).encode()
            head = (
                f"POST /v1/samples HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: engine.stats().completed)
            until(lambda: not app.state.service._open)
