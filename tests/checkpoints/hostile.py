"""A corpus of hostile files, and the child process that reads them: `python hostile.py FOLDER` prints what came of each."""

from __future__ import annotations

import io
import json
import pickle
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path

CPU_SECONDS = 5  # that a file may take


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def entry(value: bytes, key: str = "model") -> bytes:
    """A pickle of {key: value}."""
    return b"\x80\x04}" + text(key) + value + b"s."


def storage(values: bytes, count: int, flat: bytes | None = None) -> bytes:
    """One storage as the older torch.save makes it, its third pickle replaced by `flat`."""
    plain = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    head = b"".join(pickle.dumps(value, 2) for value in plain)
    ident = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"J" + struct.pack("<i", count)
    )
    return head + (flat or b"\x80\x02" + ident + b"NtQ.") + pickle.dumps(["0"], 2) + struct.pack("<q", count) + values


def loaded(data: bytes) -> bytes:
    return call("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(data)) + data)


def persistent(class_name: str, source: str) -> bytes:
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": {}}
    inner = pickle.dumps(meta, 2)[2:-1]
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", inner)


def tensor(*, size: bytes, stride: bytes) -> bytes:
    flat = loaded(storage(b"\0" * 16, 4))
    return call("torch._utils", "_rebuild_tensor_v2", flat, b"K\0", size, stride, b"\x89", b"N")


def archive(canary: Path) -> bytes:
    """What today's torch.save writes, with a call of os.system in it."""
    import torch

    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {canary}",)

    file = io.BytesIO()
    torch.save({"state_dict": Evil()}, file)
    return file.getvalue()


def corpus(canary: Path) -> dict[str, bytes]:
    touch = text(f"touch {canary}")
    source = f"open({str(canary)!r}, 'w').close()"
    deep = 1_000_000
    shared = b"B" + struct.pack("<I", 1 << 20) + b"\0" * (1 << 20)
    evil = b"\x80\x02" + call("os", "system", touch) + b"."
    return {
        "os_system": entry(call("os", "system", touch)),
        "posix_system": entry(call("posix", "system", touch)),
        "subprocess": entry(call("subprocess", "getoutput", touch)),
        "builtins_eval": entry(call("builtins", "eval", text(source))),
        "builtins_exec": entry(call("builtins", "exec", text(source))),
        "builtins_getattr": entry(call("builtins", "getattr", b"ctorch.nn.modules.linear\nLinear\n", text("__init__"))),
        "dunder_import": entry(call("builtins", "__import__", text("antigravity"))),
        "functools_partial": entry(call("functools", "partial", b"cos\nsystem\n", touch)),
        "numpy_f2py": entry(call("numpy.f2py.crackfortran", "getlincoef", text(source), b"}")),
        "torch_hub": entry(call("torch.hub", "load", text("a/b"), text("c"))),
        "torch_load": entry(call("torch.serialization", "load", text(str(canary)))),
        "nested_plain": entry(loaded(evil)),
        "nested_in_storage": entry(loaded(storage(b"", 0, flat=evil))),
        "nested_twice": entry(loaded(storage(b"", 0, flat=b"\x80\x02" + loaded(evil) + b"."))),
        "embedded_source": entry(persistent("Evil", source)),
        "embedded_source_of_a_function": entry(persistent("Evil", source).replace(b"class", b"clasz", 1)),
        "build_on_a_class": entry(b"ctorch.nn.modules.linear\nLinear\n}" + text("forward") + touch + b"sb"),
        "build_on_a_dict": entry(call("dnnlib.util", "EasyDict") + b"}" + text("update") + touch + b"sb"),
        "build_twice": entry(b"ctorch.nn.modules.linear\nLinear\n)\x81}" + text("a") + b"Ksb}" + text("b") + b"K\1sb"),
        "a_class_that_is_called": entry(call("torch.nn.modules.linear", "Linear", b"K\1", b"K\1")),
        "dotted_name": entry(text("torch.nn.modules.linear") + text("Linear.__init__") + b"\x93"),
        "persistent_id": entry(text("storage") + b"Q"),
        "persistent_id_as_text": entry(b"Pstorage\n"),
        "inst": entry(b"(" + touch + b"ios\nsystem\n"),
        "obj": entry(b"(cos\nsystem\n" + touch + b"o"),
        "newobj_ex": entry(b"ctorch.nn.modules.linear\nLinear\n)}\x92"),
        "extension": entry(b"\x82\1"),
        "out_of_band_buffer": entry(b"\x97"),
        "deep_lists": b"\x80\x04" + b"]" * deep + b"a" * (deep - 1) + b".",
        "deep_tuples": b"\x80\x04)" + b"\x85" * deep + b".",
        "deep_marks": b"\x80\x04" + b"(" * deep + b"t" * deep + b".",
        "deep_lists_one_by_one": b"\x80\x04]" + b"q\0" + b"]q\0ah\0" * 300 + b"0" * 300 + b".",
        "memo_of_a_gibibyte": b"\x80\x04Nr" + struct.pack("<I", 1 << 30) + b".",
        "memo_by_text": b"Np1073741824\n.",
        "truncated": entry(call("torch._utils", "_rebuild_parameter", b"N"))[:-20],
        "no_stop": b"\x80\x04}",
        "nothing_on_the_stack": b"\x80\x04.",
        "two_on_the_stack": b"\x80\x04NN.",
        "marks_only": b"\x80\x04(.0",
        "oversized_bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.",
        "oversized_text": b"\x80\x04X" + struct.pack("<I", (1 << 31) - 1) + b"abc.",
        "oversized_integer": b"\x80\x04\x8b" + struct.pack("<i", (1 << 31) - 1) + b"abc.",
        "oversized_frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"\x8c\xff.",
        "long_decimal": b"\x80\x04L" + b"9" * 1_000_000 + b"L\n.",
        "future_protocol": b"\x80\xffN.\xff",
        "storage_larger_than_its_bytes": entry(loaded(storage(b"\0" * 8, 1 << 28))),
        "storage_of_another_size": entry(
            loaded(storage(b"\0" * 8, 2).replace(struct.pack("<q", 2), struct.pack("<q", 1 << 50)))
        ),
        "storage_with_negative_size": entry(loaded(storage(b"", -1))),
        "storage_again_and_again": b"\x80\x04]" + many_storages(),
        "tensor_beyond_its_storage": entry(tensor(size=b"(K\x05t", stride=b"(K\1t")),
        "tensor_of_a_terabyte": entry(tensor(size=b"(" + b"J\0\0\x10\0" * 2 + b"t", stride=b"(K\0K\0t")),
        "tensor_with_a_negative_stride": entry(tensor(size=b"(K\2t", stride=b"(J\xff\xff\xff\xfft")),
        "a_key_without_end": b"\x80\x04}" + b")" + b"2\x86" * 200 + b"Ns.",
        "a_set_without_end": b"\x80\x04\x8f()" + b"2\x86" * 200 + b"\x90.",
        "set_from_a_list": entry(call("builtins", "set", b"](K\1K\2e")),
        "archive_of_torch": archive(canary),
        "empty": b"",
        "noise": bytes(range(256)) * 16,
        "large_bytes_as_name": entry(shared + shared + b"\x93"),
    }


def many_storages() -> bytes:
    """A MiB of zeros, made a storage 2,000 times, each kept in a list."""
    data = storage(b"\0" * (1 << 20), 1 << 18)
    first = b"(B" + struct.pack("<I", len(data)) + data + b"tq\0"
    function = b"ctorch.storage\n_load_from_bytes\n"
    return function + first + b"Ra" + (function + b"h\0Ra") * 2000 + b"."


def peak_memory() -> int:
    """KiB. Not of getrusage, which starts from what the process that forked this one had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main(folder: Path) -> None:
    from amed_engine import AmedError
    from amed_engine.checkpoints import convert

    with suppress(AmedError):  # loads what reading needs: torch built for CUDA takes half a GiB by itself
        convert(folder / "no such file.pkl")
    outcomes, start = {}, peak_memory()

    def expired(*_):
        raise KeyboardInterrupt(f"took more than {CPU_SECONDS} s")

    signal.signal(signal.SIGVTALRM, expired)
    for file in sorted(folder.glob("*.pkl")):
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        try:
            convert(file)
            outcome = ["nothing", ""]
        except BaseException as error:  # whatever it is, the parent wants its name
            outcome = [type(error).__name__, str(error)]
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        outcomes[file.stem] = [*outcome, peak_memory() - start]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
