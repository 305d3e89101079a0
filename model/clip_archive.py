"""CLIP's weights out of a file, without running anything that the file contains.

OpenAI publishes CLIP as TorchScript archives: zip files in which `<name>/data.pkl` pickles a tree
of module objects, `<name>/data/<key>` holds the bytes of each storage, and `<name>/code/` the
program, which is never looked at. A plain state dict (`.pt`, `.pth`) and `.safetensors` with
CLIP's key names are read too.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.clip import ClipSizes

NOT_PARAMETERS = ("input_resolution", "context_length", "vocab_size")


class ArchiveError(ValueError):
    """The file holds no CLIP that can be used here; the text is one line saying what to do."""


def read_clip(path: str | Path) -> dict[str, Tensor]:
    """Read CLIP's parameters and buffers by name.

    Args:
        path: OpenAI's TorchScript archive, a state dict saved by `torch.save` (bare or under
            `state_dict`), or `.safetensors`. Tensors saved on a GPU need none to be read.
    Returns:
        Tensors on the CPU under CLIP's names (`visual.conv1.weight`, ...), float32 except for
        integer buffers; the entries that describe sizes are left out.
    Raises:
        ArchiveError: the file is missing, damaged, something else, or asks for code to be run.
    """
    path = Path(path)
    try:
        if not path.is_file():
            remedy = "TRAIN.clip_pretrain null and TRAIN.clip_arch train without"
            raise ArchiveError(f"there is no such CLIP archive; {remedy}")
        tensors = _read_tensors(path)
        state = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        derive_sizes(state)
    except ArchiveError as problem:
        hint = "tools/prepare_datasets.md says where to download CLIP"
        raise ArchiveError(f"{path}: {problem} ({hint})") from problem
    return {
        name: tensor.float().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name not in NOT_PARAMETERS
    }


def derive_sizes(state: Mapping[str, Tensor]) -> ClipSizes:
    """Read every size off the shapes of CLIP's tensors (names as `read_clip` returns them).

    Raises:
        ArchiveError: the tensors are not those of a CLIP with a ResNet image encoder.
    """
    if any(name.startswith(("backbone.", "neck.", "decoder.")) for name in state):
        raise ArchiveError(
            "a CRIS checkpoint, not a CLIP archive: give it as TRAIN.weight to start from it"
        )
    try:
        # One row for the class token and one for each cell of a square map at stride 32.
        num_cells = state["visual.attnpool.positional_embedding"].shape[0] - 1
        transformer_width, embed_dim = state["text_projection"].shape
        return ClipSizes(
            embed_dim=embed_dim,
            image_resolution=math.isqrt(num_cells) * 32,
            vision_layers=tuple(_count_blocks(state, f"visual.layer{n}.") for n in range(1, 5)),
            vision_width=state["visual.layer1.0.conv1.weight"].shape[0],
            context_length=state["positional_embedding"].shape[0],
            vocab_size=state["token_embedding.weight"].shape[0],
            transformer_width=transformer_width,
            transformer_heads=transformer_width // 64,
            transformer_layers=_count_blocks(state, "transformer.resblocks."),
        )
    except KeyError as missing:
        held = ", ".join(list(state)[:3]) or "no tensors"
        raise ArchiveError(
            f"no CLIP with a ResNet (RN50.pt, RN101.pt, RN50x4.pt, RN50x16.pt): it has {held} ..., "
            f"but no {missing}"
        ) from None


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read whatever named tensors the file holds, by its kind."""
    with path.open("rb") as file:
        head = file.read(32)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise ArchiveError("a web page, not the file behind the link")
    try:
        if head[8:9] == b"{":  # after the length of its own head
            return load_file(path, device="cpu")
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return dict(_TreeUnpickler(archive).load().tensors())
        return _read_state_dict(path)
    except ArchiveError:
        raise
    except Exception as error:  # a parser can stumble over foreign bytes in any way
        reason = (str(error).splitlines() or [""])[0][:120]
        raise ArchiveError(
            f"cut off at {path.stat().st_size} bytes, damaged, or no file of weights "
            f"({type(error).__name__}: {reason})"
        ) from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refusal(asked[1]) from error
        raise
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    items = content.items() if isinstance(content, dict) else ()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _refusal(asked: str) -> ArchiveError:
    return ArchiveError(
        f"it asks for {asked}, which weights do not need: refused, and none of it was run; save a "
        "state dict of tensors only, or get the published file"
    )


class _Module:
    """Stand for any module of the program: its attributes and no behaviour."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in self.attributes.items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, _Module):
                yield from value.tensors(f"{prefix}{name}.")


class _TreeUnpickler(pickle.Unpickler):
    """Rebuild the tree of modules and tensors; a name outside the list ends the reading.

    An allowed name never becomes the function it names, only a builtin type or a function given
    here: there is nothing else that a pickle could call.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        (root,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name))
        super().__init__(io.BytesIO(archive.read(root)))
        self.archive, self.folder = archive, root.removesuffix(".pkl")
        self.storages: dict[str, Tensor] = {}
        lists = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
        numbers = ("Half", "BFloat16", "Float", "Double", "Short", "Int", "Long", "Bool")
        self.allowed = {
            "collections.OrderedDict": dict,
            "torch.device": str,
            "torch._utils._rebuild_tensor_v2": (
                lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset)
            ),
            "torch.jit._pickle.restore_type_tag": lambda value, _type: value,
            **{f"torch.jit._pickle.{name}": list for name in lists},
            **{f"torch.{name}Storage": getattr(torch, name.lower()) for name in numbers},
        }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        asked = f"{module}.{name}"
        if asked not in self.allowed:
            raise _refusal(asked)
        return self.allowed[asked]

    def persistent_load(self, pid: tuple) -> Tensor:
        """Read one storage as a flat tensor, wherever it lay when it was saved."""
        _, dtype, key, _device, numel = pid
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype, count=numel)
        return self.storages[key]
