"""A server that draws concurrent requests in one batch: python examples/serve.py 8000

curl -s localhost:8000/predict -H 'Content-Type: application/json' -d '{"seeds": [0, 1], "class_labels": 3}'
"""

import sys

import litserve

from amed_engine.integrations.serving.litserve import AMEDAPI

if __name__ == "__main__":
    # Options are those of `Sampler`; requests that arrive within 10 ms share a batch.
    api = AMEDAPI(max_batch_size=16, model="digits", nfe=5)
    # It knows no users: put what guards it in front.
    litserve.LitServer(api, accelerator="auto").run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
