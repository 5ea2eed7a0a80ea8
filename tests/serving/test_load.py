"""The load generator: what it draws, when it sends, what it counts. Times are those of a clock that the tests set."""

import asyncio
import json
from concurrent.futures import Future
from types import SimpleNamespace

import httpx2
import pytest
from served import Gate, gated, served

from amed_engine import ConfigError, DeadlineError, EngineClosedError, NonFiniteError, QueueFullError
from amed_engine.errors import AmedError
from amed_engine.serving.load import (
    Arrival,
    EngineTarget,
    Load,
    LoadReport,
    Mix,
    Outcome,
    Percentiles,
    Refused,
    ServerTarget,
    measure,
    offer,
)

MIXED = Mix({3: 6, 5: 3, 10: 1})


# ---- what is drawn


def test_a_mix_is_numbers_and_weights():
    assert Mix.parse("3:6,5:3,10:1") == MIXED
    assert str(MIXED) == "3:6,5:3,10:1"
    assert Mix.parse("5") == Mix({5: 1.0})
    assert str(Mix.parse("5")) == "5"
    assert Mix.parse("1,4:0.5") == Mix({1: 1.0, 4: 0.5})


@pytest.mark.parametrize(
    "text", ["", "3:", "3:x", "x:1", "0:1", "-3", "3:0", "3:-1", "3:nan", "3:inf", "3:1,3:2", "3;5", "2.5"]
)
def test_what_is_no_mix_is_refused(text):
    with pytest.raises(ConfigError, match="is no mix, expected numbers of at least 1"):
        Mix.parse(text)


def test_shares_are_kept_to_the_request():
    nfes = [arrival.nfe for arrival in Load(96, MIXED).arrivals()]
    assert [nfes.count(nfe) for nfe in (3, 5, 10)] == [58, 29, 9]  # of 57.6, 28.8 and 9.6
    assert nfes != sorted(nfes)


def test_the_same_seed_arrives_the_same():
    load = Load(200, MIXED, Mix({1: 3, 4: 1}), rate=20.0, seed=7)
    assert load.arrivals() == Load(200, MIXED, Mix({1: 3, 4: 1}), rate=20.0, seed=7).arrivals()
    first = [(round(at, 9), nfe, seeds) for at, nfe, seeds in load.arrivals()[:3]]
    assert first == [(0.005514659, 5, (0,)), (0.07926816, 3, (1, 2, 3, 4)), (0.089518221, 5, (5,))]
    other = Load(200, MIXED, Mix({1: 3, 4: 1}), rate=20.0, seed=8).arrivals()
    assert [arrival.at for arrival in other] != [arrival.at for arrival in load.arrivals()]
    # At another rate the same requests come in the same order.
    faster = Load(200, MIXED, Mix({1: 3, 4: 1}), rate=40.0, seed=7).arrivals()
    assert [arrival.at for arrival in faster] == pytest.approx([arrival.at / 2 for arrival in load.arrivals()])
    assert [arrival[1:] for arrival in faster] == [arrival[1:] for arrival in load.arrivals()]


def test_gaps_are_those_of_a_poisson_process():
    times = [arrival.at for arrival in Load(20_000, MIXED, rate=50.0).arrivals()]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.01)  # 1/e
    assert min(gaps) >= 0


def test_every_sample_has_a_seed_of_its_own():
    arrivals = Load(50, MIXED, Mix({1: 1, 3: 1}), rate=1.0).arrivals()
    assert [seed for arrival in arrivals for seed in arrival.seeds] == list(range(100))
    assert sum(arrival.evaluations for arrival in arrivals) == sum(a.nfe * len(a.seeds) for a in arrivals)
    assert [arrival.at for arrival in Load(3, MIXED).arrivals()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "wrong", [{"rate": 0.0}, {"rate": float("nan")}, {"outstanding": 0}, {"timeout": -1.0}, {"requests": 0}]
)
def test_a_load_without_sense_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*, expected a number above 0"):
        Load(**{"requests": 1, "nfe": MIXED, **wrong})


def test_a_load_has_one_pace():
    with pytest.raises(ConfigError, match="exclude each other"):
        Load(1, MIXED, rate=1.0, outstanding=1)


# ---- when it is sent


class Time:
    """A clock that goes on only by being slept on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        for _ in range(5):  # whoever is ready comes first
            await asyncio.sleep(0)
        self.now = max(self.now, until)


def offered(arrivals, ask, **options) -> list[Outcome]:
    time = Time()

    async def asked(arrival):
        await ask(time, arrival)

    return asyncio.run(offer(arrivals, asked, clock=time, sleep=time.sleep, **options))


def test_latency_counts_from_when_a_request_was_due():
    async def ask(time, arrival):
        time.now += 5.0  # and nobody else gets to run meanwhile, the generator neither

    outcomes = offered([Arrival(1.0, 3, (0,)), Arrival(2.0, 3, (1,)), Arrival(3.0, 3, (2,))], ask)
    assert [outcome.due for outcome in outcomes] == [101.0, 102.0, 103.0]
    assert outcomes[1].sent == 106.0  # four seconds late, as the first one held the machine until 106
    assert outcomes[1].done == 111.0
    assert [outcome.latency for outcome in outcomes] == [5.0, 9.0, 13.0]


def test_a_request_does_not_wait_for_the_answers_before_it():
    sent = []

    async def ask(time, arrival):
        sent.append((arrival.seeds, time.now))
        await asyncio.sleep(0.01 if len(sent) < 3 else 0)

    offered([Arrival(0.5 * k, 3, (k,)) for k in range(3)], ask)
    assert sent == [((0,), 100.0), ((1,), 100.5), ((2,), 101.0)]


def test_a_closed_loop_keeps_so_many_on_their_way():
    running, most = 0, 0

    async def ask(time, arrival):
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(100):  # longer than the generator takes to send another
            await asyncio.sleep(0)
        time.now += 1.0
        running -= 1

    outcomes = offered(Load(9, MIXED, outstanding=3).arrivals(), ask, outstanding=3)
    assert most == 3
    assert max(outcome.latency for outcome in outcomes) <= 3.0  # each counts from when it was let in
    assert max(outcome.done for outcome in outcomes) == 109.0


def test_what_goes_wrong_is_told_apart():
    async def ask(time, arrival):
        match arrival.nfe:
            case 1:
                raise Refused("full")
            case 2:
                raise DeadlineError("late")  # a TimeoutError too, and not of the generator's
            case 3:
                await asyncio.sleep(30)

    arrivals = [Arrival(0.0, nfe, (nfe,)) for nfe in (1, 2, 3, 4)]
    outcomes = offered(arrivals, ask, timeout=0.02)
    assert [(outcome.kind, outcome.reason) for outcome in outcomes] == [
        ("refused", "full"),
        ("failed", "late"),
        ("failed", "no answer within 0.02 s"),
        ("answered", ""),
    ]
    assert [outcome.arrival for outcome in outcomes] == arrivals


# ---- what is counted


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0], (1, 4.0, 4.0, 4.0, 4.0)),
        ([3.0, 1.0], (2, 2.0, 2.9, 2.98, 3.0)),
        (range(101, 0, -1), (101, 51.0, 96.0, 100.0, 101)),
        ([0.0] * 10 + [10.0], (11, 0.0, 5.0, 9.0, 10.0)),
    ],
)
def test_percentiles_of_literal_numbers(values, expected):
    found = Percentiles.of(list(values))
    assert (found.count, found.p50, found.p95, found.p99, found.max) == pytest.approx(expected)


def test_no_numbers_have_no_percentiles():
    assert Percentiles.of([]) is None


def outcome(nfe, seeds, due, done, kind="answered", reason="", sent=None, at=0.0):
    return Outcome(Arrival(at, nfe, seeds), due, due if sent is None else sent, done, kind, reason)


OUTCOMES = [
    outcome(3, (0,), 10.0, 10.5),
    outcome(3, (1, 2), 11.0, 12.5, sent=11.25, at=1.0),
    outcome(10, (3,), 12.0, 14.0, at=2.0),
    outcome(5, (4,), 12.0, 12.1, "refused", "full", at=2.0),
    outcome(5, (5,), 12.0, 13.0, "failed", "broken", at=2.0),
]


def test_the_report_s_numbers():
    report = LoadReport.of(Load(5, MIXED, rate=1.0), OUTCOMES, "here", 0.75)
    assert (report.requests, report.answered, report.refused, report.failed) == (5, 3, 1, 1)
    assert (report.samples, report.evaluations) == (4, 3 + 6 + 10)  # of those answered
    assert (report.seconds, report.samples_per_second, report.evaluations_per_second) == (4.0, 1.0, 4.75)
    assert report.latency.p50 == 1.5
    assert {nfe: found.max for nfe, found in report.by_nfe.items()} == {3: 1.5, 10: 2.0}
    assert report.late == 0.25
    assert report.reasons == {"full": 1, "broken": 1}


def test_the_report_is_json_and_a_table():
    report = LoadReport.of(Load(5, MIXED, rate=1.0), OUTCOMES, "here", 0.75)
    data = json.loads(json.dumps(report.to_json()))
    assert data["latency"] == {"count": 3, "p50": 1.5, "p95": 1.95, "p99": 1.99, "max": 2.0}
    assert set(data["by_nfe"]) == {"3", "10"}
    lines = report.table().splitlines()
    assert lines[0] == "5 requests to here, at 1 requests/s (Poisson, seed 0); NFE 3:6,5:3,10:1, samples 1"
    assert lines[1:3] == ["answered 3, refused 1, failed 1 in 4.00 s", "1 samples/s, 4.75 evaluations/s"]
    assert lines[4].split() == ["all", "3", "1500.0", "1950.0", "1990.0", "2000.0"]
    assert lines[5].split() == ["NFE", "3", "2", "1000.0", "1450.0", "1490.0", "1500.0"]
    assert lines[7:] == ["useful rows 75.0%; sent at most 250.0 ms late", "1 times: full", "1 times: broken"]


def test_nothing_answered_is_a_report_too():
    report = LoadReport.of(Load(1, MIXED), [OUTCOMES[3]], "here")
    assert (report.latency, report.by_nfe, report.samples_per_second) == (None, {}, 0.0)
    assert "useful rows not told" in report.table()
    json.dumps(report.to_json())


# ---- an engine


class Engine:
    """What a target asks of a ContinuousSampler: a future a request, and two counters."""

    model = SimpleNamespace(name="tiny")

    def __init__(self, answer=None):
        self.asked, self.answer = [], answer

    def submit(self, seeds, **options):
        self.asked.append((seeds, options))
        if isinstance(self.answer, Exception) and not isinstance(self.answer, NonFiniteError):
            raise self.answer
        future = Future()
        future.set_exception(self.answer) if self.answer else future.set_result("samples")
        return future

    def stats(self):
        evaluations = sum(len(seeds) * options["nfe"] for seeds, options in self.asked)
        return SimpleNamespace(evaluations=evaluations, evaluated=8 + 2 * evaluations)


def test_an_engine_is_asked_with_the_options_of_the_load():
    engine = Engine()
    report = asyncio.run(measure(Load(10, MIXED), EngineTarget(engine, solver="ipndm", guidance_scale=2.0)))
    assert report.answered == 10
    assert report.target == "tiny in this process"
    assert len(engine.asked) == 13  # one of each number of evaluations before, which does not count
    assert engine.asked[3:][0][1].items() >= {"solver": "ipndm", "guidance_scale": 2.0}.items()
    assert sorted(seeds for seeds, _ in engine.asked[3:]) == [[k] for k in range(10)]
    assert report.useful == 0.5


@pytest.mark.parametrize("error", [QueueFullError("full", 1.0), DeadlineError("no"), EngineClosedError("closed")])
def test_what_an_engine_turns_away_is_refused(error):
    with pytest.raises(Refused, match=type(error).__name__):
        asyncio.run(EngineTarget(Engine(error)).ask(Arrival(0.0, 3, (0,))))


def test_a_broken_sample_has_failed():
    target = EngineTarget(Engine(NonFiniteError("sample is NaN", 1, [0])))
    (found,) = asyncio.run(offer([Arrival(0.0, 3, (0,))], target.ask))
    assert (found.kind, found.reason) == ("failed", "sample is NaN")


def test_an_unknown_solver_ends_it_before_the_load():
    with pytest.raises(ConfigError, match="no such solver"):
        asyncio.run(measure(Load(10, MIXED), EngineTarget(Engine(ConfigError("no such solver")))))


def test_silence_ends_it_before_the_load():
    engine = Engine()
    engine.submit = lambda *_, **__: Future()
    with pytest.raises(AmedError, match=r"^tiny in this process gave no answer within 0.01 s$"):
        asyncio.run(measure(Load(10, MIXED, timeout=0.01), EngineTarget(engine)))


# ---- a server

METRICS = """# TYPE amed_evaluations_total counter
amed_evaluations_total{model="a",device="cpu"} 30.0
amed_evaluations_total{model="b",device="cpu"} 12.0
# TYPE amed_evaluated_total counter
amed_evaluated_total{model="a",device="cpu"} 40.0
amed_evaluated_total{model="b",device="cpu"} 16.0
"""


class Server:
    """Answers as `amed serve` does, or as it is told."""

    def __init__(self, *answers, metrics=METRICS):
        self.answers, self.metrics, self.bodies = list(answers), metrics, []

    def __call__(self, request):
        if request.url.path == "/metrics":
            return httpx2.Response(200 if self.metrics else 404, text=self.metrics or "")
        if request.url.path == "/healthz":
            return httpx2.Response(200)
        assert (request.method, request.url.path) == ("POST", "/v1/samples")
        self.bodies.append(json.loads(request.content))
        return self.answers.pop(0) if self.answers else drawn(len(self.bodies[-1]["seeds"]))


def drawn(count):
    return httpx2.Response(200, json={"data": [{"b64_json": ""}] * count})


TWO = Arrival(0.0, 3, (4, 5))


def asked(server, arrival=TWO, **options):
    """One request to the server, and then its rows."""

    async def run():
        transport = httpx2.MockTransport(server)
        async with ServerTarget("http://127.0.0.1:1/", transport=transport, **options) as target:
            await target.ask(arrival)
            return await target.rows()

    return asyncio.run(run())


def test_a_server_is_asked_with_the_options_of_the_load():
    server = Server()
    assert asked(server, model="a", solver="ipndm", guidance_scale=None) == (42, 56)
    assert server.bodies == [{"model": "a", "solver": "ipndm", "seeds": [4, 5], "nfe": 3, "format": "png"}]


def test_a_picture_is_one_sample():
    answer = httpx2.Response(200, content=b"...", headers={"Content-Type": "image/png"})
    asked(Server(answer), Arrival(0.0, 3, (4,)))
    with pytest.raises(AmedError, match="1 samples in the answer, 2 were asked for"):
        asked(Server(httpx2.Response(200, content=b"...", headers={"Content-Type": "image/png"})))


@pytest.mark.parametrize("status", [429, 503, 504])
def test_what_a_server_turns_away_is_refused(status):
    with pytest.raises(Refused, match=f"status {status}"):
        asked(Server(httpx2.Response(status, json={"error": {"message": "not now"}})))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx2.Response(422, json={"error": {"message": "unknown solver"}}), "^status 422: unknown solver$"),
        (httpx2.Response(500, text="oh"), "^status 500: oh$"),
        (httpx2.Response(404, json=["else"]), "^status 404: "),
        (drawn(1), "^1 samples in the answer, 2 were asked for$"),
        (httpx2.Response(200, text="<html>"), "^an answer that is not one of amed serve: <html>$"),
        (httpx2.Response(200, json={"images": []}), "^an answer that is not one of amed serve"),
    ],
)
def test_what_is_no_answer_has_failed(answer, message):
    with pytest.raises(AmedError, match=message) as raised:
        asked(Server(answer))
    assert not isinstance(raised.value, Refused)


@pytest.mark.parametrize("metrics", [None, "", "amed_evaluations_total 3\n"])
def test_a_server_that_counts_no_rows(metrics):
    assert asked(Server(metrics=metrics)) is None


def test_a_connection_that_breaks_has_failed():
    def server(request):
        if request.url.path == "/healthz":
            return httpx2.Response(200)
        raise httpx2.ReadError("reset")

    with pytest.raises(AmedError, match="reset"):
        asked(server)


def test_a_server_that_is_not_there():
    async def run():
        async with ServerTarget("http://127.0.0.1:9"):
            raise AssertionError("nobody listens")

    with pytest.raises(AmedError, match=r"no server answers at http://127.0.0.1:9 \(.+\); start one with amed serve"):
        asyncio.run(run())


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://[::1", ""])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match=r"URL.*write one like http://127.0.0.1:8000"):
        ServerTarget(url)


def test_a_load_on_a_server():
    async def run(server):
        async with ServerTarget("http://127.0.0.1:1", transport=httpx2.MockTransport(server)) as target:
            return await measure(Load(20, MIXED, Mix({1: 1, 2: 1})), target)

    full = httpx2.Response(429, json={"error": {"message": "full"}})
    report = asyncio.run(run(Server(drawn(1), drawn(1), drawn(1), full)))
    assert (report.answered, report.refused, report.reasons) == (19, 1, {"status 429": 1})
    assert report.target == "http://127.0.0.1:1"
    assert report.useful is None  # its counters stand still


def test_amed_serve_itself():
    from amed_engine.serving.http import make_app

    async def run(port):
        async with ServerTarget(f"http://127.0.0.1:{port}", solver="euler") as target:
            return await measure(Load(12, MIXED, Mix({1: 1, 2: 1}), outstanding=6), target)

    with gated(Gate(), rows=4) as engine, served(make_app({"tiny": [engine]})) as server:
        report = asyncio.run(run(server.port))
        stats = engine.stats()
    assert (report.answered, report.samples, report.reasons) == (12, 18, {})
    assert stats.completed == 18 + 3  # of those that came first
    assert report.useful == (stats.evaluations - 18) / (stats.evaluated - 18)
