#!/usr/bin/env bash
# SIGTERM ends LitServe's main process alone: its workers and its HTTP server stay, keep the port, and answer on.
#
# Versions: litserve 0.2.19, fastapi 0.165.0, uvicorn 0.54.0; Python 3.11, Linux
# Expected: SIGTERM, which systemd, `docker stop` and `timeout` send, ends a server as Ctrl-C does: what was taken is answered, and no
#   process is left.
# Seen: `LitServer.run` handles KeyboardInterrupt and leaves SIGTERM as it is. The main process dies of it at once, without the
#   cleaning up that Ctrl-C sets off; the processes that it started are nobody's children now, go on listening and predict as before.
# Why it matters: A restart by a supervisor that kills the main process finds the port taken, or two servers answering on it, the
#   old one with the old model, whose memory on the device is never freed.
# Remedy: `signal.signal(signal.SIGTERM, handler)` before `run`, with a handler that raises KeyboardInterrupt in the main process.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"; pkill -KILL -f "$folder/serve.py" || true' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet litserve==0.2.19 fastapi==0.165.0 uvicorn==0.54.0
cat >"$folder/serve.py" <<'PYTHON'
import sys

import litserve


class Doubled(litserve.LitAPI):
    def setup(self, device):
        pass

    def predict(self, x):
        return {"doubled": 2 * x["number"]}


if __name__ == "__main__":
    server = litserve.LitServer(Doubled(), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
PYTHON
cat >"$folder/show.py" <<'PYTHON'
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]


def ask():
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", b'{"number": 21}', {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


server = subprocess.Popen([sys.executable, sys.argv[1], str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
for _ in range(300):
    try:
        before = ask()
        break
    except OSError:
        time.sleep(0.2)
server.terminate()
status = server.wait(60)
time.sleep(10)
after = ask()
print(f"answered {before}; the main process ended with status {status}; ten seconds later answered {after}")
sys.exit(0 if (status, after) == (-signal.SIGTERM, before) else 1)
PYTHON
if "$folder/venv/bin/python" "$folder/show.py" "$folder/serve.py"; then
    echo "as described: the server outlives its main process"
else
    echo "changed: LitServe ends at SIGTERM" >&2
    exit 1
fi
