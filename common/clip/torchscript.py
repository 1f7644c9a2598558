"""Reads the tensors of TorchScript archives, such as OpenAI's CLIP files, without running code."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import zip_names
from common.errors import InputError


class _ScriptModule:
    """Stand-in for the modules of a TorchScript archive; keeps only their attributes."""


class _TorchScriptReader(pickle.Unpickler):
    """Unpickles data.pkl of a TorchScript archive.

    Modules become `_ScriptModule`; globals other than those in `find_class` are refused.
    """

    DTYPES = {
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "FloatStorage": torch.float32,
        "DoubleStorage": torch.float64,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
    }

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global that the archive names.

        Raises UnpicklingError for every global that is not listed here.
        """
        if module.split(".")[0] == "__torch__":
            return _ScriptModule
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda values, offset, size, stride, *_: values.as_strided(size, stride, offset)
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of tensors")

    def persistent_load(self, pid: Any) -> Tensor:
        """The values of a storage, a tensor [n], from the archive's file for it."""
        _, dtype, key, *_ = pid
        return torch.frombuffer(
            bytearray(self.archive.read(f"{self.root}/data/{key}")), dtype=dtype
        )


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive, as written by `torch.jit.save`."""
    return any(name.endswith("/constants.pkl") for name in zip_names(path))


def load_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive, by the attribute names of its modules.

    The archive's program is neither read nor run. Raises InputError if the archive is damaged or
    holds anything except modules of tensors, numbers and lists.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            data = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return _attributes(_TorchScriptReader(archive, data.removesuffix("/data.pkl")).load())
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        StopIteration,
        EOFError,
        OSError,
        RecursionError,
    ) as error:
        raise InputError(f"{path} is not a readable TorchScript archive ({error})") from None
    except (RuntimeError, ValueError, KeyError, AttributeError, IndexError, TypeError):
        raise InputError(
            f"{path} is not a readable TorchScript archive: it is damaged or of another format"
        ) from None


def _attributes(module: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, _ScriptModule):
            found |= {f"{name}.{inner}": tensor for inner, tensor in _attributes(value).items()}
    return found
