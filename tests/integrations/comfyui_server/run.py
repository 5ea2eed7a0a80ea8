"""run.py CHECKOUT SCRIPT [arguments]: a script beside ComfyUI, with any torch that torchvision was built for or not."""

import runpy
import sys

from torchvision_operators import declare  # beside this script

declare()

sys.path[0], script = sys.argv[1:3]
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
