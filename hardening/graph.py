"""A bundle's ONNX graph as a differentiable torch module, so that what is attacked and measured is the file that ships.

Nothing of the run that made the bundle is needed: weights, detector and score are those of `model.onnx`. Covers the standard
operators that Twogate's exporter writes; another operator is refused by name. `tests/hardening/test_graph.py` holds its
answers against ONNX Runtime's, and its gradients against finite differences.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from hardening.branches import BRANCHES, MPAE, TRIPWIRE
from hardening.encoders import ScaledConv2d, as_input, features
from model_store.errors import TwogateError
from model_store.session import OUTPUTS, open_session

_BATCH = 16
"""Pictures that ONNX Runtime gets at once; activations of all of them are in memory."""
_TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.BOOL: torch.bool,
}


class GraphError(TwogateError):
    """The graph holds something that cannot be differentiated here."""


class Graph(nn.Module):
    """See the module's text. Branch features and the tripwire's are found by the detector's own tensors.

    `victim` is the public victim, images [N, 3, H, W] in [0, 1] -> features [N, d], for a graph that was shipped without it.
    """

    def __init__(self, model: bytes, victim: nn.Module | None = None) -> None:
        super().__init__()
        self.victim = victim
        self._model = model
        self._sessions: dict[tuple[str, ...], ort.InferenceSession] = {}
        proto = onnx.load_from_string(model)
        self.constants: dict[str, Tensor] = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in proto.graph.initializer
        }
        self.steps: list[_Step] = []
        self.convolutions = nn.ModuleList()
        for node in proto.graph.node:
            step = _Step(node)
            if all(name in self.constants for name in step.inputs if name):
                arguments = [self.constants[name] if name else None for name in step.inputs]
                self.constants.update(zip(step.outputs, step(arguments), strict=False))
                continue
            if node.op_type == "Conv" and step.inputs[1] in self.constants:
                self.convolutions.append(step.become_module(self.constants))
            if node.op_type == "Clip":
                step.fix_bounds(self.constants)
            self.steps.append(step)
        self.requires_grad_(False)
        self._plans: dict[tuple[str, ...], list[tuple[_Step, list[str]]]] = {}
        self.feature_names = self._find_features() if victim is None else {**self._find_features(), TRIPWIRE: TRIPWIRE}

    def forward(self, images: Tensor, wanted: Sequence[str] = OUTPUTS) -> dict[str, Tensor]:
        """Images [N, 3, H, W] in [0, 1] -> the wanted values of the graph by name; runs only what they need."""
        key = tuple(wanted)
        if key not in self._plans:
            self._plans[key] = self._plan(key)
        values: dict[str, Tensor] = {"images": (images * 255).permute(0, 2, 3, 1)}
        if self.victim is not None and TRIPWIRE in key:
            values[TRIPWIRE] = self.victim(images)
        constants = self.constants
        for step, spent in self._plans[key]:
            arguments = [(values[n] if n in values else constants[n]) if n else None for n in step.inputs]
            values.update(zip(step.outputs, step(arguments), strict=False))
            for name in spent:
                values.pop(name, None)
        return {name: values[name] for name in wanted}

    def run(self, images: NDArray[np.uint8], wanted: Sequence[str]) -> dict[str, Tensor]:
        """uint8 images [N, H, W, 3] -> the wanted values of the graph by name, by ONNX Runtime; see `run_uint8`."""
        within = [name for name in wanted if name != TRIPWIRE or self.victim is None]
        parts = [self._served(within, images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
        found = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in within}
        if self.victim is not None and TRIPWIRE in wanted:
            found[TRIPWIRE] = features(self.victim, images)
        return found

    def _served(self, wanted: list[str], images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        if not wanted:
            return {}  # ONNX Runtime would answer everything
        if tuple(wanted) not in self._sessions:
            proto = onnx.load_from_string(self._model)
            shown = {output.name for output in proto.graph.output}
            proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in shown)
            self._sessions[tuple(wanted)] = open_session(proto.SerializeToString(), torch.get_num_threads())
        return dict(zip(wanted, self._sessions[tuple(wanted)].run(wanted, {"images": images}), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # A copy opens sessions of its own: ONNX Runtime's cannot be copied.
        return {**self.__dict__, "_sessions": {}}

    def encoder(self, branch: str) -> nn.Module:
        """One branch's encoder, or the tripwire's (the public victim), as a module of its own."""
        if self.victim is not None and branch == TRIPWIRE:
            return self.victim
        if branch not in self.feature_names:
            hint = ": `twogate harden` measures such a bundle while it has the victim at hand" if branch == TRIPWIRE else ""
            raise GraphError(f"this graph shows no features of {branch!r}; it has {', '.join(self.feature_names)}{hint}")
        return GraphEncoder(self, self.feature_names[branch])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Graph:
        """Constants move with the modules; whole numbers are sizes, axes and places, which are read on the processor."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.constants = {name: fn(value) if value.is_floating_point() else value for name, value in self.constants.items()}
        return self

    def _plan(self, wanted: tuple[str, ...]) -> list[tuple[_Step, list[str]]]:
        """The steps that lead to `wanted`, each with the values that no later one reads. Kept, they fill the memory."""
        steps, last = self._needed(wanted), {}
        for number, step in enumerate(steps):
            last.update(dict.fromkeys((*step.outputs, *step.inputs), number))
        spent: list[list[str]] = [[] for _ in steps]
        for name in last.keys() - set(wanted):
            spent[last[name]].append(name)
        return list(zip(steps, spent, strict=True))

    def _needed(self, wanted: Iterable[str]) -> list[_Step]:
        needed, plan = set(wanted), []
        for step in reversed(self.steps):
            if needed.intersection(step.outputs):
                plan.append(step)
                needed.update(step.inputs)
        return plan[::-1]

    def _find_features(self) -> dict[str, str]:
        """A bundle's own tensors name the branches: centres of the embedding, spaces of the detector."""
        names = {f"centre_{branch}": branch for branch in BRANCHES} | {f"detector.spaces.{TRIPWIRE}.mean": TRIPWIRE}
        found: dict[str, str] = {}
        # The detector puts the features of early stages behind those that are looked for.
        joined = {step.outputs[0]: step.inputs[0] for step in self.steps if step.kind == "Concat"}
        for step in self.steps:
            branch = names.get(step.inputs[1]) if step.kind == "Sub" else None
            # The same mean also standardises the features of changed pictures.
            if branch is not None and not any(map(_changes_the_picture, self._needed([step.inputs[0]]))):
                found[branch] = joined.get(step.inputs[0], step.inputs[0])
        # A victim that was not tuned is its own tripwire, and the exporter keeps one of two tensors that are the same.
        if TRIPWIRE not in found and any(f".{TRIPWIRE}." in name for name in self.constants):
            found[TRIPWIRE] = found[MPAE[0]]
        return found


def _changes_the_picture(step: _Step) -> bool:
    """Whether it makes one of the `Views`: a blurred picture, a zoomed one."""
    return any(name.startswith("views.") and not name.startswith("views.encoders.") for name in step.inputs)


class GraphEncoder(nn.Module):
    """Images [N, 3, H, W] in [0, 1] -> features [N, d]: the part of a graph that leads to one value."""

    def __init__(self, graph: Graph, value: str) -> None:
        super().__init__()
        self._graph, self._value = [graph], value  # in a list: its other branches are no part of this module
        self.convolutions = nn.ModuleList(step.module for step in graph._needed([value]) if step.module is not None)

    @property
    def constants(self) -> list[Tensor]:
        """What its steps read beside the convolutions' weights."""
        graph = self._graph[0]
        read = (step.inputs if step.module is None else step.inputs[:1] for step in graph._needed([self._value]))
        names = dict.fromkeys(name for inputs in read for name in inputs)
        return [graph.constants[name] for name in names if name in graph.constants]

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self._graph[0](images, (self._value,))[self._value]  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GraphEncoder:
        self._graph[0]._apply(fn, recurse)
        return self

    def trainable(self) -> GraphEncoder:
        """A copy for itself alone, of the same features, whose convolutions can be trained; what else it has stays.

        A bundle's convolutions have BatchNorm folded in, and `ScaledConv2d` says why its gains must not reach Adam as small
        weights. Which part of a filter was gain is not known any more, so each filter gets the length that it has when a
        network is initialised (He et al. 2015), and the rest as its gain (weight normalisation: Salimans & Kingma 2016).
        """
        own = copy.deepcopy(self)
        graph = own._graph[0]
        graph.steps = graph._needed([own._value])
        used = {name for step in graph.steps for name in step.inputs}
        graph.constants = {name: value for name, value in graph.constants.items() if name in used}
        own.convolutions = graph.convolutions = nn.ModuleList()
        for step in graph.steps:
            if step.module is not None:
                step.module = _scaled(step.module)
                own.convolutions.append(step.module)
        return own


class _Step:
    """One node."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.kind = node.op_type
        self.inputs, self.outputs = list(node.input), list(node.output)
        self.attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        self.module: nn.Conv2d | None = None
        self.function = _OPERATORS.get(node.op_type)
        if self.function is None and node.op_type != "Conv":
            raise GraphError(f"the operator {node.op_type} cannot be differentiated here")

    def __call__(self, arguments: list[Tensor | None]) -> tuple[Tensor, ...]:
        if self.module is not None:
            return (self.module(_padded(arguments[0], self.attributes)),)
        if self.function is None:
            raise GraphError("a convolution's weights are computed from the picture")
        result = self.function(arguments, self.attributes)
        return result if isinstance(result, tuple) else (result,)

    def fix_bounds(self, constants: dict[str, Tensor]) -> None:
        """A clip between numbers: compared with tensors, and with their gradients, it is much of an attack's time."""
        bounds = [constants[name].item() for name in self.inputs[1:] if name in constants]
        if len(self.inputs) == len(bounds) + 1 == 3:
            low, high = bounds
            self.function = lambda arguments, _: F.hardtanh(arguments[0], low, high)

    def become_module(self, constants: dict[str, Tensor]) -> nn.Conv2d:
        """A convolution as a module, so that attacks on low layers can hook it."""
        weight = constants[self.inputs[1]]
        bias = constants[self.inputs[2]] if len(self.inputs) > 2 and self.inputs[2] else None
        groups = self.attributes.get("group", 1)
        self.module = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),  # type: ignore[arg-type]
            tuple(self.attributes.get("strides", (1, 1))),
            0,
            tuple(self.attributes.get("dilations", (1, 1))),
            groups,
            bias=bias is not None,
        )
        self.module.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.module.bias = nn.Parameter(bias, requires_grad=False)
        return self.module


def _scaled(conv: nn.Conv2d) -> ScaledConv2d:
    """The same convolution as filters of length sqrt(2) and a BatchNorm that gives them back their own, folded."""
    gains = (conv.weight.flatten(1).norm(dim=1) / math.sqrt(2)).clamp_min(1e-12)
    norm = nn.BatchNorm2d(conv.out_channels, eps=0).to(conv.weight.device)
    scaled = copy.deepcopy(conv)
    scaled.bias = None
    with torch.no_grad():
        scaled.weight.div_(gains.view(-1, 1, 1, 1))
        norm.weight.copy_(gains)
        norm.bias.copy_(torch.zeros_like(gains) if conv.bias is None else conv.bias)
    return ScaledConv2d(scaled, norm).to(conv.weight.device)


def _padded(x: Any, attributes: dict[str, Any]) -> Tensor:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    padded: Tensor = F.pad(x, (left, right, top, bottom)) if any((top, left, bottom, right)) else x
    return padded


def _max_pool(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    if attributes.get("ceil_mode") or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise GraphError("MaxPool with ceil_mode or auto_pad cannot be differentiated here")
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    # Padding that no maximum takes, also where the sides differ.
    padded = F.pad(arguments[0], (left, right, top, bottom), value=-torch.inf)
    kernel = attributes["kernel_shape"]
    return F.max_pool2d(padded, kernel, attributes.get("strides", (1, 1)), dilation=attributes.get("dilations", (1, 1)))


def _average_pool(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right) or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise GraphError("AveragePool with uneven padding or auto_pad cannot be differentiated here")
    return F.avg_pool2d(
        arguments[0],
        attributes["kernel_shape"],
        attributes.get("strides", (1, 1)),
        (top, left),
        bool(attributes.get("ceil_mode")),
        bool(attributes.get("count_include_pad")),
    )


def _layer_norm(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, weight, bias = [*arguments, None][:3]
    return F.layer_norm(x, x.shape[attributes.get("axis", -1) :], weight, bias, attributes.get("epsilon", 1e-5))


def _axes(arguments: list[Any], attributes: dict[str, Any]) -> tuple[int, ...] | None:
    if len(arguments) > 1 and arguments[1] is not None:
        return tuple(arguments[1].tolist())
    return tuple(attributes["axes"]) if "axes" in attributes else None


def _reducer(function: Callable[[Tensor, Any, bool], Tensor]) -> Callable[[list[Any], dict[str, Any]], Tensor]:
    def run(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
        axes = _axes(arguments, attributes)
        dims = tuple(range(arguments[0].dim())) if axes is None else axes
        return function(arguments[0], dims, bool(attributes.get("keepdims", 1)))

    return run


def _elementwise(function: Callable[..., Any]) -> Callable[[list[Any], dict[str, Any]], Tensor]:
    return lambda arguments, _: reduce(function, arguments)


def _unary(function: Callable[[Any], Any]) -> Callable[[list[Any], dict[str, Any]], Tensor]:
    return lambda arguments, _: function(arguments[0])


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() or b.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _clip(arguments: list[Any], _: dict[str, Any]) -> Tensor:
    x, low, high = [*arguments, None, None][:3]
    if low is not None:
        x = torch.maximum(x, low.to(x.dtype))
    return x if high is None else torch.minimum(x, high.to(x.dtype))


def _batch_norm(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, weight, bias, mean, var = arguments
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, attributes.get("epsilon", 1e-5))


def _gemm(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    a, b, c = [*arguments, None][:3]
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    product: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    return product if c is None else product + attributes.get("beta", 1.0) * c


def _depth_to_space(arguments: list[Any], attributes: Mapping[str, Any]) -> Tensor:
    if attributes.get("mode", b"DCR") != b"CRD":
        raise GraphError("DepthToSpace in the order DCR cannot be differentiated here")
    return F.pixel_shuffle(arguments[0], attributes["blocksize"])


def _reshape(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, shape = arguments
    sizes = shape.tolist()
    if not attributes.get("allowzero"):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)  # type: ignore[no-any-return]


def _expand(arguments: list[Any], _: dict[str, Any]) -> Tensor:
    x, shape = arguments
    # ONNX's Expand goes both ways: a size of 1 in the shape keeps the tensor's own.
    sizes = np.broadcast_shapes(tuple(x.shape), tuple(shape.tolist()))
    return x.expand(sizes)  # type: ignore[no-any-return]


def _unsqueeze(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, axes = arguments[0], _axes(arguments, attributes) or ()
    for axis in sorted(a % (x.dim() + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x  # type: ignore[no-any-return]


def _squeeze(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    axes = _axes(arguments, attributes)
    return arguments[0].squeeze() if axes is None else arguments[0].squeeze(axes)  # type: ignore[no-any-return]


def _gather(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, index = arguments
    axis = attributes.get("axis", 0) % max(x.dim(), 1)
    index = index.long().to(x.device)
    index = torch.where(index < 0, index + x.shape[axis], index)
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])  # type: ignore[no-any-return]


def _gather_nd(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, index = arguments
    if attributes.get("batch_dims"):
        raise GraphError("GatherND with batch_dims cannot be differentiated here")
    return x[tuple(index.long().unbind(-1))]  # type: ignore[no-any-return]


def _pad(arguments: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, pads = arguments[:2]
    mode = attributes.get("mode", b"constant").decode()
    before, after = pads.tolist()[: x.dim()], pads.tolist()[x.dim() :]
    sides = [size for axis in reversed(range(x.dim())) for size in (before[axis], after[axis])]
    while len(sides) > 2 and not any(sides[-2:]):
        sides = sides[:-2]
    return F.pad(x, sides, {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[mode])


def _slice(arguments: list[Any], _: dict[str, Any]) -> Tensor:
    x, starts, ends, axes, steps = [*arguments, None, None][:5]
    chosen = range(len(starts)) if axes is None else axes.tolist()
    for k, axis in enumerate(chosen):
        step = 1 if steps is None else int(steps[k])
        bounds = range(x.shape[axis])[int(starts[k]) : int(ends[k]) : step]
        x = x.index_select(axis, torch.tensor(list(bounds), device=x.device))
    return x  # type: ignore[no-any-return]


_OPERATORS: dict[str, Callable[[list[Any], dict[str, Any]], Any]] = {
    "Add": _elementwise(operator.add),
    "Sub": _elementwise(operator.sub),
    "Mul": _elementwise(operator.mul),
    "Div": _elementwise(_div),
    "Pow": _elementwise(torch.pow),
    "Min": _elementwise(torch.minimum),
    "Max": _elementwise(torch.maximum),
    "MatMul": _elementwise(operator.matmul),
    "Neg": _unary(operator.neg),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Abs": _unary(torch.abs),
    "Relu": _unary(F.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Erf": _unary(torch.erf),
    "HardSigmoid": lambda a, t: (t.get("alpha", 0.2) * a[0] + t.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "Clip": _clip,
    "Where": lambda a, _: torch.where(a[0].bool(), a[1], a[2]),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Gemm": _gemm,
    "Softmax": lambda a, t: a[0].softmax(t.get("axis", -1)),
    "Cast": lambda a, t: a[0] if a[0].is_floating_point() and t["to"] == onnx.TensorProto.FLOAT else a[0].to(_TYPES[t["to"]]),
    "Concat": lambda a, t: torch.cat(a, dim=t["axis"]),
    "Transpose": lambda a, t: a[0].permute(t.get("perm", tuple(reversed(range(a[0].dim()))))),
    "Reshape": _reshape,
    "DepthToSpace": _depth_to_space,
    "Flatten": lambda a, t: a[0].flatten(t.get("axis", 1)),
    "Expand": _expand,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Shape": lambda a, t: torch.tensor(a[0].shape[t.get("start", 0) : t.get("end")], dtype=torch.int64),
    "Range": lambda a, _: torch.arange(int(a[0]), int(a[1]), int(a[2])),
    "Pad": _pad,
    "Slice": _slice,
    "ReduceMean": _reducer(lambda x, dims, keep: x.mean(dims, keepdim=keep)),
    "ReduceSum": _reducer(lambda x, dims, keep: x.sum(dims, keepdim=keep)),
    "ReduceMax": _reducer(lambda x, dims, keep: x.amax(dims, keepdim=keep)),
    "ReduceMin": _reducer(lambda x, dims, keep: x.amin(dims, keepdim=keep)),
    "ReduceL2": _reducer(lambda x, dims, keep: torch.linalg.vector_norm(x, dim=dims, keepdim=keep)),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _unary(lambda x: x.mean((2, 3), keepdim=True)),
}


def run_uint8(graph: Graph, images: NDArray[np.uint8], wanted: Sequence[str], device: str = "cpu") -> dict[str, Tensor]:
    """Values of the graph on uint8 images [N, H, W, 3], without gradients, on the CPU.

    As it is served: by ONNX Runtime, which on a CPU is several times quicker than torch. By torch on an accelerator.
    """
    return run_torch(graph, images, wanted, device) if device != "cpu" else graph.run(images, wanted)


def run_torch(
    graph: Graph, images: NDArray[np.uint8], wanted: Sequence[str], device: str = "cpu", batch: int = 64
) -> dict[str, Tensor]:
    """What `run_uint8` answers, computed by the steps that gradients go through."""
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with torch.no_grad():
        for start in range(0, len(images), batch):
            for name, value in graph(as_input(images[start : start + batch], device), wanted).items():
                parts[name].append(value.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}
