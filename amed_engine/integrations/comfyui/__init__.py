"""ComfyUI: nodes for predictors, their schedules and samplers, and for solvers; Forge and A1111 through `webui`.

In custom_nodes/amed/__init__.py:

    from amed_engine.integrations.comfyui.pack import *

NODE_CLASS_MAPPINGS and NODE_DISPLAY_NAME_MAPPINGS are the nodes alone, by ComfyUI's V1 protocol.
"""

from amed_engine.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
