"""`amed bench-serve`: what it offers, prints and refuses. The load itself is tested in tests/serving."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@pytest.fixture
def server():
    """Answers every request for samples at once, in the shape of amed serve, of the model "full" only the first; (its URL, the
    bodies it got)."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200 if self.path == "/healthz" else 404, b"{}")

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            full = len(bodies) > 1 and bodies[-1].get("model") == "full"
            self._send(429 if full else 200, json.dumps({"data": [{}] * len(bodies[-1]["seeds"])}).encode())

        def _send(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", bodies
        running.shutdown()
        thread.join()


def test_a_load_on_an_engine_in_this_process(amed, tmp_path):
    options = ("--saturate", "--requests", 8, "--nfe", "3:3,4:1", "--samples", "1,2", "--solver", "ipndm", "--rows", 4)
    code, out, err = amed("bench-serve", *options, "--json", tmp_path / "report.json", "--device", "cpu")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["requests"], report["answered"], report["samples"]) == (8, 8, 12)
    assert report["latency"]["count"] == 8
    assert set(report["by_nfe"]) == {"3", "4"}
    assert 0 < report["useful"] <= 1
    assert "8 requests to digits in this process, all at once; NFE 3:3,4:1, samples 1:1,2:1" in out
    assert "answered 8, refused 0, failed 0" in out


def test_a_load_that_is_paced(amed):
    options = ("--rate", 200, "--requests", 5, "--seed", 3, "--guidance", 2.0, "--json", "-", "--device", "cpu")
    code, out, _ = amed("bench-serve", *options)
    report = json.loads(out)
    assert (code, report["answered"]) == (0, 5)
    assert report["pace"] == "at 200 requests/s (Poisson, seed 3)"


def test_a_load_on_a_server(amed, server):
    url, bodies = server
    options = ("--outstanding", 2, "--requests", 6, "--nfe", 3, "--samples", 2, "--model", "tiny", "--solver", "euler")
    code, out, err = amed("bench-serve", "--url", url, *options)
    assert (code, err) == (0, "")
    told = {"model": "tiny", "solver": "euler", "nfe": 3, "format": "png"}
    # Of two at any time either may arrive first.
    assert sorted(bodies[1:], key=lambda body: body["seeds"]) == [
        {**told, "seeds": [2 * k, 2 * k + 1]} for k in range(6)
    ]
    assert "answered 6, refused 0, failed 0" in out
    assert "useful rows not told" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of --rate, --saturate and --outstanding"),
        (("--rate", 1, "--saturate"), "one of --rate, --saturate and --outstanding"),
        (("--rate", 0), "--rate"),
        (("--saturate", "--nfe", "0:1"), "'0:1' is no mix"),
        (("--saturate", "--samples", "1:x"), "'1:x' is no mix"),
        (("--saturate", "--requests", 0), "--requests"),
        (("--saturate", "--timeout", "nan"), "timeout is nan"),
        (("--saturate", "--unknown", 1), "No such option"),
        (("--saturate", "--solver", "nope", "--device", "cpu"), "unknown solver 'nope'"),
        (("--saturate", "--url", "127.0.0.1:8000"), "is not the URL of a server"),
        (("--saturate", "--url", "http://127.0.0.1:9", "--rows", 4, "--device", "cpu"), "leave --device, --rows out"),
    ],
)
def test_what_it_refuses(amed, arguments, message):
    code, out, err = amed("bench-serve", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_server_that_is_not_there(amed):
    code, out, err = amed("bench-serve", "--url", "http://127.0.0.1:9", "--saturate")
    assert (code, out) == (1, "")
    assert "no server answers at http://127.0.0.1:9" in err
    assert "start one with amed serve" in err


def test_nothing_answered_is_a_failure(amed, server):
    code, out, err = amed("bench-serve", "--url", server[0], "--saturate", "--requests", 2, "--model", "full")
    assert code == 1
    assert "answered 0, refused 2, failed 0" in out
    assert "2 times: status 429" in out
    assert "no request was answered" in err
