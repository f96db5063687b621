"""Every TensorRT name that export/ uses exists in 10.13, 10.16 and 11.4: a GPU is not needed to know that."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.builders import tensorrt as tensorrt_builder
from export.format import tensorrt_library
from export.samplers import tensorrt as tensorrt_sampler

API: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text())["versions"]
FILES = [Path(str(module.__file__)) for module in (tensorrt_library, tensorrt_sampler, tensorrt_builder)]

# What a variable or attribute of this name holds in those files.
CLASS_OF = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "_engine": "ICudaEngine",
    "_runtime": "Runtime",
    "cuda_engine": "ICudaEngine",
    "runtime_config": "IRuntimeConfig",
    "trt": "module",
}
# TensorRT-RTX has these and 10.13 does not: the code asks with getattr.
RTX_ONLY = {
    ("IExecutionContext", "is_stream_capturable"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("module", "DynamicShapesKernelSpecializationStrategy"),
}


def uses(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (class or `module`, name) for every TensorRT attribute in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            asked, name = node.args[0], node.args[1]
            assert isinstance(name, ast.Constant)
            yield CLASS_OF[getattr(asked, "attr", getattr(asked, "id", ""))], str(name.value)
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
            continue
        owner: Any = node.value
        if isinstance(owner, ast.Name) and owner.id == "trt":
            yield "module", node.attr
        elif isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "trt":
            yield owner.attr, node.attr  # trt.BuilderFlag.TF32
        elif isinstance(owner, ast.Name) and owner.id in CLASS_OF:
            yield CLASS_OF[owner.id], node.attr
        elif isinstance(owner, ast.Attribute) and owner.attr.startswith("_") and owner.attr in CLASS_OF:
            yield CLASS_OF[owner.attr], node.attr  # self._context, but not card.network
        elif isinstance(owner, ast.Call) and isinstance(owner.func, ast.Attribute):
            if owner.func.attr == "get_error":
                yield "ParserError", node.attr
            if owner.func.attr == "get_timing_cache":
                yield "ITimingCache", node.attr


USES = sorted({use for path in FILES for use in uses(path)})


def test_the_search_sees_the_whole_path() -> None:
    assert {
        ("module", "Builder"),
        ("BuilderFlag", "TF32"),
        ("IBuilderConfig", "set_timing_cache"),
        ("ITimingCache", "serialize"),
        ("OnnxParser", "parse"),
        ("ParserError", "desc"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "create_execution_context"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "set_optimization_profile_async"),
        ("IExecutionContext", "is_stream_capturable"),
    } <= set(USES)
    assert len(USES) > 25


@pytest.mark.parametrize("version", API)
def test_every_name_is_in(version: str) -> None:
    known = API[version]
    missing = [
        f"{owner}.{name}" for owner, name in USES if name not in known.get(owner, []) and (owner, name) not in RTX_ONLY
    ]
    assert missing == []


def test_every_name_is_in_the_installed_rtx() -> None:
    import tensorrt_rtx as trt

    missing = [
        f"{owner}.{name}"
        for owner, name in USES
        if not hasattr(trt if owner == "module" else getattr(trt, owner), name)
    ]
    assert missing == []
