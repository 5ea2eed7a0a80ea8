"""run.py CHECKOUT SCRIPT [arguments]: a script beside ComfyUI, with any torch that torchvision was built for or not."""

import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_SPEC = spec_from_file_location(
    "operators", Path(__file__).resolve().parents[3] / "benchmarks" / "torchvision_operators.py"
)
_OPERATORS = module_from_spec(_SPEC)
_SPEC.loader.exec_module(_OPERATORS)
_OPERATORS.declare()

sys.path[0], script = sys.argv[1:3]
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
