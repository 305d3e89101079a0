"""Reading CLIP's weights: equal to what torch.jit.load finds, without running the archive."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clips import KEPT_IN_HALF, TINY, assert_same_tensors, save_archive, tiny_clip, without_sizes
from safetensors.torch import save_file
from torch import nn

from model import clip_archive
from model.clip import DenseCLIP
from model.clip_archive import ArchiveError, read_clip
from model.segmenter import load_backbone

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def rewritten(source: Path, target: Path, edit: Callable[[bytes], bytes]) -> Path:
    """Copy an archive without its program, its pickle passed through `edit`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if "/code/" not in name:
                new.writestr(name, edit(content) if name.endswith("/data.pkl") else content)
    return target


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A TorchScript archive as OpenAI saves them: float16 where CLIP is."""
    return save_archive(tiny_clip(half=True), tmp_path_factory.mktemp("clip") / "tiny.pt")


def only_line(path: Path, content: object = None) -> str:
    """Return how reading ends, of a file that is there or of bytes or objects saved in it."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ArchiveError) as caught:
        read_clip(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("half", [True, False], ids=["fp16", "fp32"])
def test_torchscript_archive_gives_what_torch_jit_load_gives(tmp_path, half):
    path = save_archive(tiny_clip(half), tmp_path / "clip.pt")
    expected = without_sizes(torch.jit.load(str(path)).state_dict())
    assert expected["text_projection"].dtype == (torch.float16 if half else torch.float32)
    assert_same_tensors(read_clip(path), expected)


def test_an_archive_saved_on_a_gpu_is_read_on_the_cpu_and_its_program_not_looked_at(
    archive, tmp_path
):
    def moved(tree: bytes) -> bytes:
        on_cpu, on_gpu = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"
        assert on_cpu in tree
        return tree.replace(on_cpu, on_gpu)

    on_gpu = rewritten(archive, tmp_path / "gpu.pt", moved)
    assert_same_tensors(read_clip(on_gpu), read_clip(archive))


class Assorted(nn.Module):
    """Attributes of every kind that TorchScript stores beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ints, self.floats, self.flags = [1, 2], [0.5], [True]
        self.pair, self.table, self.device = (1, "a"), {"a": 1}, torch.device("cpu")
        self.loose = [torch.ones(1)]
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.layers[1].weight = self.layers[0].weight
        self.register_buffer("columns", torch.arange(6).view(2, 3).t()[:, 1:])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("nothing", None)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        x = x + self.ints[0] + self.floats[0] + self.pair[0] + self.table["a"] + self.loose[0]
        return x.to(self.device) if self.flags[0] else x


def test_shared_strided_and_empty_tensors_and_other_attributes_are_read(tmp_path):
    path = tmp_path / "assorted.pt"
    torch.jit.save(torch.jit.script(Assorted()), str(path))
    expected = torch.jit.load(str(path)).state_dict()
    assert expected["columns"].stride() == (1, 3)
    got = clip_archive._read_tensors(path)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor)
        assert got[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    "call",
    [
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch._utils\n_rebuild_parameter\n",  # torch's own, and not listed
        b"ctorch.jit._pickle\nos.system\n",  # dotted
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole-pickle", "inside"])
def test_torchscript_pickle_that_asks_for_anything_else_is_refused_and_not_run(
    archive, tmp_path, call, whole
):
    marker = tmp_path / "was_run"

    def doctored(tree: bytes) -> bytes:
        if whole:
            return call + f"(Vtouch {marker}\ntR.".encode()
        return tree.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", call)

    line = only_line(rewritten(archive, tmp_path / "evil.pt", doctored))
    assert re.search(f"asks for {'.'.join(call.decode()[1:].split())}.*refused", line)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_saved_objects_other_than_tensors_are_refused_and_not_run(tmp_path, zipped):
    marker = tmp_path / "was_run"

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(marker)!r}, 'w')",)

    path = tmp_path / "evil.pt"
    state = {**tiny_clip().state_dict(), "extra": Evil()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert re.search(r"asks for (builtins\.)?exec.*refused", only_line(path))
    assert not marker.exists()


@pytest.mark.parametrize("offset", [-4, 1 << 40])
def test_tensor_that_lies_outside_its_storage_is_an_error(archive, tmp_path, offset):
    def doctored(tree: bytes) -> bytes:
        # A tensor's offset follows its storage: BINPERSID, BINPUT n, then BININT1 0.
        number = b"\x8a\x08" + offset.to_bytes(8, "little", signed=True)
        return re.sub(rb"(Qq.)K\0", lambda found: found[1] + number, tree, flags=re.DOTALL)

    line = only_line(rewritten(archive, tmp_path / "outside.pt", doctored))
    assert re.search("damaged.*([Ss]torage|offset)", line)


@pytest.mark.parametrize("form", ["bare", "legacy", "wrapped", "safetensors"])
def test_plain_state_dict_in_any_wrapping_gives_the_same_tensors(tmp_path, form):
    state = tiny_clip().state_dict()
    path = tmp_path / f"clip.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(state, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "bare")
    assert_same_tensors(read_clip(path), without_sizes(state))


def test_the_backbone_gets_float32_weights_rounded_through_float16_where_the_release_does():
    state = without_sizes(tiny_clip().state_dict())
    expected = {k: v.half() if KEPT_IN_HALF.search(k) else v for k, v in state.items()}
    backbone = DenseCLIP(TINY)
    load_backbone(backbone, state)
    got = backbone.state_dict()
    assert_same_tensors({name: got[name] for name in expected}, expected)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        pytest.param("RN50.pt", None, "there is no such CLIP archive", id="missing"),
        pytest.param("RN50.pt", b"", "cut off at 0 bytes", id="empty"),
        pytest.param("RN50.pt", b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "a web page", id="html"),
        pytest.param("RN50.pt", b'<?xml version="1.0"?><Error>', "a web page", id="xml"),
        pytest.param("RN50.pt", b"import os\n" * 100, "no file of weights", id="text"),
        pytest.param("RN50.pt", bytes(range(256)) * 8, "no file of weights", id="noise"),
        pytest.param("RN50.pt", b"PK\x03\x04" + bytes(100), "cut off at 104 bytes", id="zip-head"),
        pytest.param("clip.safetensors", b"\xff" * 64, "no file of weights", id="safetensors"),
    ],
)
def test_file_that_is_missing_or_something_else_says_what_it_is(tmp_path, name, content, problem):
    message = only_line(tmp_path / name, content)
    assert problem in message
    assert "tools/prepare_datasets.md" in message


def test_an_archive_that_is_cut_off_or_has_a_flipped_byte_is_named_as_such(archive, tmp_path):
    content = bytearray(archive.read_bytes())
    for share in (0.1, 0.5, 0.99):
        cut = bytes(content[: int(len(content) * share)])
        assert "cut off" in only_line(tmp_path / "cut.pt", cut)
    with zipfile.ZipFile(archive) as entries:
        largest = max(entries.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    assert "damaged" in only_line(tmp_path / "flipped.pt", bytes(content))


def test_zip_of_something_else_is_refused(tmp_path):
    path = tmp_path / "photos.pt"
    with zipfile.ZipFile(path, "w") as photos:
        photos.writestr("photos/1.jpg", b"jpeg")
    assert "no file of weights" in only_line(path)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_cris_checkpoint_is_pointed_to_train_weight(tmp_path, prefix, wrapper):
    state = {f"{prefix}{key}": torch.zeros(1) for key in ("backbone.visual.conv1.weight", "neck.a")}
    content = {"epoch": 1, "cur_iou": 0.5, wrapper: state} if wrapper else state
    message = only_line(tmp_path / "best_model.pth", content)
    assert "CRIS checkpoint" in message
    assert "TRAIN.weight" in message


def test_content_that_is_no_clip_is_named(tmp_path):
    path, state = tmp_path / "clip.pt", tiny_clip().state_dict()
    del state["text_projection"]
    assert "no 'text_projection'" in only_line(path, state)
    assert "it has text_model.x" in only_line(path, {"text_model.x": torch.zeros(1)})
    for content in ({"epoch": 1}, torch.zeros(2)):
        assert "no tensors" in only_line(path, content)
    vit = only_line(path, {"visual.class_embedding": torch.zeros(8)})
    assert "no CLIP with a ResNet (RN50.pt, RN101.pt, RN50x4.pt, RN50x16.pt)" in vit
