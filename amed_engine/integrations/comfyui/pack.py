"""What ComfyUI loads: nodes by its V3 schema where it has that, by V1 elsewhere, and entries in KSampler's lists.

In custom_nodes/amed/__init__.py:

    from amed_engine.integrations.comfyui.pack import *
"""

from __future__ import annotations

from typing import Any

from amed_engine.integrations.comfyui.description import v3
from amed_engine.integrations.comfyui.host import folders
from amed_engine.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, NODES
from amed_engine.integrations.comfyui.training_free import register

try:
    from comfy_api.latest import ComfyExtension, io  # type: ignore[import-not-found]
except ImportError:  # an older ComfyUI
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
else:
    __all__ = ["comfy_entrypoint"]

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return [v3(node, io) for node in NODES]

    async def comfy_entrypoint() -> Extension:
        return Extension()


folders()
register()
