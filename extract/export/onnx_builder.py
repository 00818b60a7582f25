"""Writes an ONNX file node by node, its weights streamed into a file beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pangu_sigma.checkpoint.tensor_file import raw_bytes, write_all

OPSET = 17  # the first with LayerNormalization; every runtime of the last years has it
IR_VERSION = 8  # what came with opset 17
_ALIGNED = 4096  # runtimes map external tensors into memory where they begin at a page


class OnnxBuilder:
    """Collects nodes; a value is known by its name. `weight` streams, `constant` is for small arrays."""

    def __init__(self, folder: Path, stem: str, advance: Callable[[int], None]) -> None:
        self.folder, self.stem, self.advance = folder, stem, advance
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple, str] = {}
        self._data = open(folder / f"{stem}.data", "xb", buffering=0)  # noqa: SIM115 (closed by save)

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output; return its name."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """A small array inside the file; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def weight(self, name: str, array: np.ndarray) -> str:
        """A tensor in the data file, float32 or int64."""
        kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        self._data.seek(-(-self._data.tell() // _ALIGNED) * _ALIGNED)
        data = raw_bytes(array)
        proto = TensorProto(name=name, data_type=kinds[array.dtype.name], dims=array.shape)
        proto.data_location = TensorProto.EXTERNAL
        where = {"location": f"{self.stem}.data", "offset": self._data.tell(), "length": len(data)}
        for key, value in where.items():
            proto.external_data.add(key=key, value=str(value))
        write_all(self._data, data)
        self.advance(len(data))
        self.initializers.append(proto)
        return name

    def call_it(self, value: str, name: str) -> None:
        """Make `value` known as `name`, for an output of the graph."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))

    def save(
        self,
        inputs: Iterable[tuple[str, type, list[int | str]]],
        outputs: Iterable[tuple[str, type, list[int | str]]],
        meanings: dict[str, str],
        metadata: dict[str, str],
    ) -> None:
        """Write the graph and close its data; (name, NumPy type, shape with names for free axes) of inputs, outputs,
        and a sentence for each by name."""

        def described(values: Iterable[tuple[str, type, list[int | str]]]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape, meanings.get(name, "")
                )
                for name, dtype, shape in values
            ]

        graph = helper.make_graph(self.nodes, "pangu_sigma", described(inputs), described(outputs), self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "pangu-sigma"
        helper.set_model_props(model, metadata)
        (self.folder / self.stem).write_bytes(model.SerializeToString())
        self.close()

    def close(self) -> None:
        """End the data file."""
        if not self._data.closed:
            os.fsync(self._data.fileno())
            self._data.close()
