"""A server that draws concurrent requests, of any programs, in rows of one batch: python examples/serve.py 8000

curl -s localhost:8000/predict -H 'Content-Type: application/json' -d '{"seeds": [0, 1], "class_labels": 3, "nfe": 8}'
"""

import sys

import litserve

from amed_engine.integrations.serving.hosted import interrupt_at_sigterm
from amed_engine.integrations.serving.litserve import AMEDAPI

if __name__ == "__main__":
    # Options are those of `ContinuousSampler`, and of `Sampler` what draws a request that does not say: here, 5 evaluations.
    api = AMEDAPI(model="digits", nfe=5, rows=64, queue=1024)
    interrupt_at_sigterm()  # which LitServe takes no notice of
    # It knows no users: put what guards it in front.
    litserve.LitServer(api, accelerator="auto").run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)
