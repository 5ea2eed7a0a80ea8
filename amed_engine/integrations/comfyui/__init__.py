"""ComfyUI: nodes for a predictor, its schedule and its sampler; Forge and A1111 through `webui`.

In custom_nodes/amed/__init__.py:

    from amed_engine.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
"""

from amed_engine.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
