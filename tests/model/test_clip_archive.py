"""Reading CLIP's weights: equal to what torch.jit.load finds, without running the archive."""

import hashlib
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from model import clip_archive
from model.clip_archive import ArchiveError, ClipSizes, derive_sizes, read_clip

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

TINY = ClipSizes(96, 64, (1, 2, 1, 1), 8, 7, 32, 64, 1, 2)
PUBLISHED = {
    "RN50": ClipSizes(1024, 224, (3, 4, 6, 3), 64, 77, 49408, 512, 8, 12),
    "RN101": ClipSizes(512, 224, (3, 4, 23, 3), 64, 77, 49408, 512, 8, 12),
    "RN50x4": ClipSizes(640, 288, (4, 6, 10, 6), 80, 77, 49408, 640, 10, 12),
    "RN50x16": ClipSizes(768, 384, (6, 8, 18, 8), 96, 77, 49408, 768, 12, 12),
}


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, shortcut: bool) -> None:
        super().__init__()
        channels = (inputs, width, width, 4 * width)
        for n, kernel in ((1, 1), (2, 3), (3, 1)):
            conv = nn.Conv2d(channels[n - 1], channels[n], kernel, bias=False)
            self.add_module(f"conv{n}", conv)
            self.add_module(f"bn{n}", nn.BatchNorm2d(channels[n]))
        if shortcut:
            layers = (nn.Identity(), nn.Conv2d(inputs, 4 * width, 1, bias=False))
            layers = zip(("-1", "0", "1"), (*layers, nn.BatchNorm2d(4 * width)), strict=True)
            self.downsample = nn.Sequential(OrderedDict(layers))


class AttentionPool(nn.Module):
    def __init__(self, cells: int, width: int, embed_dim: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(cells + 1, width))
        for name in "kqv":
            self.add_module(f"{name}_proj", nn.Linear(width, width))
        self.c_proj = nn.Linear(width, embed_dim)


class VisualResNet(nn.Module):
    def __init__(self, sizes: ClipSizes) -> None:
        super().__init__()
        width = sizes.vision_width
        for n, (inputs, outputs) in enumerate(
            [(3, width // 2), (width // 2,) * 2, (width // 2, width)]
        ):
            self.add_module(f"conv{n + 1}", nn.Conv2d(inputs, outputs, 3, bias=False))
            self.add_module(f"bn{n + 1}", nn.BatchNorm2d(outputs))
        inputs = width
        for n, depth in enumerate(sizes.vision_layers):
            inner = width * 2**n
            blocks = [Bottleneck(inputs, inner, shortcut=True)]
            blocks += [Bottleneck(4 * inner, inner, shortcut=False) for _ in range(depth - 1)]
            self.add_module(f"layer{n + 1}", nn.Sequential(*blocks))
            inputs = 4 * inner
        cells = (sizes.image_resolution // 32) ** 2
        self.attnpool = AttentionPool(cells, inputs, sizes.embed_dim)


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(zip(("c_fc", "gelu", "c_proj"), layers, strict=True)))


class NamedLikeClip(nn.Module):
    """The modules and names of OpenAI's ResNet CLIP, with a forward that only touches them."""

    def __init__(self, sizes: ClipSizes) -> None:
        super().__init__()
        width = sizes.transformer_width
        self.visual = VisualResNet(sizes)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(
            *(TextBlock(width, sizes.transformer_heads) for _ in range(sizes.transformer_layers))
        )
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(sizes.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(sizes.embed_dim, width).t())
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))
        self.register_buffer("input_resolution", torch.tensor(sizes.image_resolution))
        self.register_buffer("context_length", torch.tensor(sizes.context_length))
        self.register_buffer("vocab_size", torch.tensor(sizes.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum(parameter.float().sum() for parameter in self.parameters())


def names_kept_in_half(model: nn.Module) -> set[str]:
    """The rule of the release, by the kind of module: convolutions, linear layers, attention."""
    kinds = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)
    modules = [
        (name, module) for name, module in model.named_modules() if isinstance(module, kinds)
    ]
    names = {f"{name}.{key}" for name, module in modules for key in module._parameters}
    return {name for name in names if name in model.state_dict()} | {"text_projection"}


def tiny_clip(half: bool = False) -> NamedLikeClip:
    torch.manual_seed(0)
    model = NamedLikeClip(TINY).eval()
    if half:
        kept = names_kept_in_half(model)
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.data = parameter.data.half()
    return model


def save_torchscript(model: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.trace(model, torch.zeros(1), check_trace=False), str(path))
    return path


def without_sizes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        k: v
        for k, v in state.items()
        if k not in ("input_resolution", "context_length", "vocab_size")
    }


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].device.type == "cpu"
        assert got[name].dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name


def rewritten(source: Path, target: Path, edit) -> Path:
    """Copy a zip, passing each entry's content through `edit(name, content)`; None drops it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = edit(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A TorchScript archive as OpenAI saves them: float16 where CLIP is."""
    return save_torchscript(tiny_clip(half=True), tmp_path_factory.mktemp("clip") / "tiny.pt")


@pytest.mark.parametrize("half", [True, False], ids=["fp16", "fp32"])
def test_torchscript_archive_gives_what_torch_jit_load_gives(tmp_path, half):
    path = save_torchscript(tiny_clip(half), tmp_path / "clip.pt")
    expected = without_sizes(torch.jit.load(str(path)).state_dict())
    assert expected["text_projection"].dtype == (torch.float16 if half else torch.float32)
    assert_same_tensors(read_clip(path, as_released=False), expected)


def test_archive_saved_on_a_gpu_is_read_on_the_cpu(archive, tmp_path):
    def moved(name, content):
        on_cpu, on_gpu = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"
        assert on_cpu in content or not name.endswith("/data.pkl")
        return content.replace(on_cpu, on_gpu) if name.endswith("/data.pkl") else content

    on_gpu = rewritten(archive, tmp_path / "gpu.pt", moved)
    assert_same_tensors(read_clip(on_gpu), read_clip(archive))


def test_the_archives_program_is_not_looked_at(archive, tmp_path):
    bare = rewritten(archive, tmp_path / "bare.pt", lambda n, c: None if "/code/" in n else c)
    assert_same_tensors(read_clip(bare), read_clip(archive))


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
        pytest.param(b"cos\nsystem\n", id="os.system"),
        pytest.param(b"cbuiltins\neval\n", id="eval"),
        pytest.param(b"ctorch._utils\n_rebuild_parameter\n", id="torch-but-not-listed"),
        pytest.param(b"ctorch.jit._pickle\nos.system\n", id="dotted"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole-pickle", "inside"])
def test_torchscript_pickle_that_asks_for_anything_else_is_refused_and_not_run(
    archive, tmp_path, call, whole
):
    marker = tmp_path / "was_run"

    def doctored(name, content):
        if not name.endswith("/data.pkl"):
            return content
        if whole:
            return call + f"(V{f'touch {marker}'}\ntR.".encode()
        return content.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", call)

    path = rewritten(archive, tmp_path / "evil.pt", doctored)
    asked = ".".join(call.decode()[1:].split())
    with pytest.raises(ArchiveError, match=f"evil.pt: it asks for {asked}.*refused"):
        read_clip(path)
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
    with pytest.raises(ArchiveError, match=r"asks for (builtins\.)?exec.*refused"):
        read_clip(path)
    assert not marker.exists()


@pytest.mark.parametrize("offset", [-4, 1 << 40])
def test_tensor_that_lies_outside_its_storage_is_an_error(archive, tmp_path, offset):
    def doctored(name, content):
        if not name.endswith("/data.pkl"):
            return content
        # A tensor's offset follows its storage: BINPERSID, BINPUT n, then BININT1 0.
        number = b"\x8a\x08" + offset.to_bytes(8, "little", signed=True)
        return re.sub(rb"(Qq.)K\0", lambda found: found[1] + number, content, flags=re.DOTALL)

    with pytest.raises(ArchiveError, match=r"damaged.*([Ss]torage|offset)"):
        read_clip(rewritten(archive, tmp_path / "outside.pt", doctored))


@pytest.mark.parametrize("form", ["bare", "legacy", "wrapped", "module", "safetensors"])
def test_plain_state_dict_in_any_wrapping_gives_the_same_tensors(tmp_path, form):
    state = tiny_clip().state_dict()
    expected = without_sizes(state)
    path = tmp_path / "clip.pth"
    if form == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        path = tmp_path / "clip.safetensors"
        safetensors.save_file({k: v.contiguous() for k, v in state.items()}, path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif form == "module":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "bare")
    assert_same_tensors(read_clip(path, as_released=False), expected)


def test_float32_weights_are_rounded_through_float16_where_the_release_does(tmp_path):
    model = tiny_clip()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    expected = without_sizes(model.state_dict())
    for name in names_kept_in_half(model):
        expected[name] = expected[name].half()
    assert_same_tensors(read_clip(tmp_path / "clip.pt"), expected)


def test_rounding_leaves_a_float16_archive_as_it_is(archive):
    assert_same_tensors(read_clip(archive), read_clip(archive, as_released=False))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_the_published_archives_follow_from_shapes(name):
    with torch.device("meta"):
        state = NamedLikeClip(PUBLISHED[name]).state_dict()
    assert derive_sizes(state) == PUBLISHED[name]


def test_sizes_follow_from_what_was_read(archive):
    assert derive_sizes(read_clip(archive)) == TINY


def test_file_with_a_published_name_is_compared_with_the_published_digest(
    archive, tmp_path, monkeypatch
):
    path = tmp_path / "RN50.pt"
    path.write_bytes(archive.read_bytes())
    with pytest.warns(UserWarning, match=r"not the published RN50\.pt.*SHA-256.*afeb0e10") as seen:
        state = read_clip(path)
    assert len(seen) == 1
    assert_same_tensors(state, read_clip(archive))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_archive.PUBLISHED_DIGESTS, "RN50.pt", digest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_clip(path)


def saved(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def only_line(path: Path) -> str:
    with pytest.raises(ArchiveError) as caught:
        read_clip(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_file_says_where_to_get_it(tmp_path):
    assert "tools/prepare_datasets.md" in only_line(tmp_path / "RN50.pt")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "an empty file"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>403</html>", "a web page"),
        (b'<?xml version="1.0"?><Error>BlobNotFound</Error>', "a web page"),
        (b"import os\n" * 100, "no file of weights"),
        (bytes(range(256)) * 8, "no file of weights"),
        (b"PK\x03\x04" + bytes(100), "cut off or damaged at 104 bytes"),
    ],
    ids=["empty", "html", "xml", "text", "noise", "zip-head"],
)
def test_file_that_is_something_else_says_what_it_is(tmp_path, content, problem):
    path = tmp_path / "RN50.pt"
    path.write_bytes(content)
    message = only_line(path)
    assert problem in message
    assert "tools/prepare_datasets.md" in message


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_off_archive_is_named_as_such(archive, tmp_path, share):
    content = archive.read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(content[: int(len(content) * share)])
    assert "cut off" in only_line(path)


def test_archive_with_a_flipped_byte_is_refused(archive, tmp_path):
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as entries:
        largest = max(entries.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path = tmp_path / "flipped.pt"
    path.write_bytes(content)
    assert "cut off or damaged" in only_line(path)


def test_zip_of_something_else_is_refused(tmp_path):
    path = tmp_path / "photos.pt"
    with zipfile.ZipFile(path, "w") as photos:
        photos.writestr("photos/1.jpg", b"jpeg")
    assert "no file of weights" in only_line(path)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_cris_checkpoint_is_pointed_to_train_weight(tmp_path, prefix, wrapper):
    state = {
        f"{prefix}backbone.visual.conv1.weight": torch.zeros(1),
        f"{prefix}neck.a": torch.zeros(1),
    }
    content = {"epoch": 1, "cur_iou": 0.5, wrapper: state} if wrapper else state
    message = only_line(saved(tmp_path / "best_model.pth", content))
    assert "CRIS checkpoint" in message
    assert "TRAIN.weight" in message


@pytest.mark.parametrize(
    ("width", "patch", "name"), [(768, 32, "ViT-B/32"), (1024, 14, "ViT-L/14")]
)
def test_vit_is_named_together_with_the_archives_that_work(tmp_path, width, patch, name):
    state = {
        "visual.class_embedding": torch.zeros(width),
        "visual.conv1.weight": torch.zeros(1).expand(width, 3, patch, patch),
        "visual.proj": torch.zeros(1, 1),
    }
    message = only_line(saved(tmp_path / "clip.pt", state))
    assert name in message
    assert "RN50.pt, RN101.pt, RN50x4.pt, RN50x16.pt" in message


def test_missing_entries_are_named(tmp_path):
    state = tiny_clip().state_dict()
    del state["text_projection"], state["visual.layer3.0.conv1.weight"]
    message = only_line(saved(tmp_path / "clip.pt", state))
    assert "2 of the entries" in message
    assert "visual.layer3.0.conv1.weight, text_projection" in message
    message = only_line(saved(tmp_path / "hf.pt", {"text_model.x": torch.zeros(1)}))
    assert "it has text_model.x" in message
    assert "no tensors" in only_line(saved(tmp_path / "none.pt", {"epoch": 1}))


def test_whole_tensor_instead_of_a_state_dict_is_refused(tmp_path):
    assert "a Tensor saved by torch.save" in only_line(saved(tmp_path / "t.pt", torch.zeros(2)))


def test_positions_that_form_no_square_are_an_error():
    with torch.device("meta"):
        state = NamedLikeClip(TINY).state_dict()
        state["visual.attnpool.positional_embedding"] = torch.empty(7, 256)
    with pytest.raises(ArchiveError, match="6 cells"):
        derive_sizes(state)


def test_safetensors_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "clip.safetensors"
    path.write_bytes(bytes(16))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in only_line(path)


def test_damaged_safetensors_is_an_error(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "clip.safetensors"
    path.write_bytes(b"\xff" * 64)
    assert "no file of weights" in only_line(path)
