"""What must not be in an ONNX file of others before a runtime loads it."""

from typing import Any

from pipeline.common.errors import DataError


def refuse_external_data(model: Any, where: str) -> None:
    """Raise DataError when a tensor of `model`, an onnx.ModelProto, lies in another file.

    The graph names that file, and a runtime would read whatever it names.
    """
    from onnx import TensorProto

    pending = [model]
    while pending:
        message = pending.pop()
        if isinstance(message, TensorProto) and message.data_location == TensorProto.EXTERNAL:
            raise DataError(f"{where}: its weights lie in another file; expected one file that holds everything")
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                pending += value if hasattr(value, "__len__") else [value]
