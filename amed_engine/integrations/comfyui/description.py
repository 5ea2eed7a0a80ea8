"""A node described once: a class of ComfyUI's V1 protocol, or of its V3 schema where the host has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CATEGORY = "sampling/custom_sampling/AMED"
PREDICTOR = "AMED_PREDICTOR"


@dataclass(frozen=True)
class Socket:
    """An input or an output: its name, type and tooltip. options: of a widget, as V1 names them (default, min, max, step ...).

    choices: of a list, or a function that makes it anew whenever the page is loaded.
    """

    name: str
    kind: str
    tooltip: str
    choices: list[str] | Callable[[], list[str]] | None = None
    optional: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def listed(self) -> list[str]:
        return self.choices() if callable(self.choices) else list(self.choices or [])


@dataclass(frozen=True)
class Node:
    """run: called with the inputs by name, returns a tuple of the outputs. changed: with the same, a value that differs where
    the outputs would though no input does (a file was rewritten)."""

    name: str
    title: str
    about: str
    inputs: tuple[Socket, ...]
    outputs: tuple[Socket, ...]
    function: str
    run: Callable[..., tuple]
    changed: Callable[..., Any] | None = None


def v1(node: Node) -> type:
    """The class that NODE_CLASS_MAPPINGS takes."""

    def input_types(cls: type) -> dict[str, Any]:
        kinds: dict[str, dict[str, Any]] = {}
        for socket in node.inputs:
            kind = kinds.setdefault("optional" if socket.optional else "required", {})
            widget = socket.listed() if socket.kind == "COMBO" else socket.kind
            kind[socket.name] = (widget, {"tooltip": socket.tooltip, **socket.options})
        return kinds

    members: dict[str, Any] = {
        "__doc__": node.about,
        "__module__": __name__,
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(socket.kind for socket in node.outputs),
        "RETURN_NAMES": tuple(socket.name for socket in node.outputs),
        "OUTPUT_TOOLTIPS": tuple(socket.tooltip for socket in node.outputs),
        "FUNCTION": node.function,
        "CATEGORY": CATEGORY,
        "DESCRIPTION": node.about,
        node.function: staticmethod(node.run),
    }
    if node.changed is not None:
        members["IS_CHANGED"] = staticmethod(node.changed)
    return type(node.name, (), members)


def v3(node: Node, io: Any) -> type:
    """The `io.ComfyNode`, io being the host's `comfy_api.latest.io`."""
    kinds = {"INT": io.Int, "FLOAT": io.Float, "STRING": io.String, "BOOLEAN": io.Boolean, "COMBO": io.Combo}

    def made(socket: Socket) -> Any:
        options = {"optional": socket.optional, "tooltip": socket.tooltip, **socket.options}
        if socket.kind == "COMBO":
            options["options"] = socket.listed()
        return kinds.get(socket.kind, io.Custom(socket.kind)).Input(socket.name, **options)

    def define_schema(cls: type) -> Any:
        return io.Schema(
            node_id=node.name,
            display_name=node.title,
            category=CATEGORY,
            description=node.about,
            inputs=[made(socket) for socket in node.inputs],
            # Without ids: in some releases those of inputs and outputs must differ.
            outputs=[io.Custom(s.kind).Output(display_name=s.name, tooltip=s.tooltip) for s in node.outputs],
        )

    def execute(cls: type, **inputs: Any) -> Any:
        return io.NodeOutput(*node.run(**inputs))

    members: dict[str, Any] = {"__doc__": node.about, "define_schema": classmethod(define_schema)}
    members["execute"] = classmethod(execute)
    if node.changed is not None:
        changed = node.changed
        members["fingerprint_inputs"] = classmethod(lambda cls, **inputs: changed(**inputs))
    return type(node.name, (io.ComfyNode,), members)
