"""Writes a GGUF file anew with all its matrices in one type."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}


def write_gguf(source: Path, to: Path, weights: str) -> None:
    """`weights` is the type of the matrices: F32, F16 or Q8_0; vectors stay float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(to, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *parts = field.types
        value = _FILE_TYPES[weights] if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, kind, sub_type=parts[-1] if parts else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1 or weights == "F32":
            writer.add_tensor(tensor.name, values)
        else:
            target = gguf.GGMLQuantizationType[weights]
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
