"""The fitters that are not embedded: SPIN's and HMR 2.0's networks, and what others found, read from a file."""

import pickle
import sys
from math import erf, pi
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from reid3d.preprocess import hmr2, spin
from reid3d.preprocess.body import Body, axis_angle_to_matrix, load_body, rotation_6d_to_matrix
from reid3d.preprocess.camera import project
from reid3d.preprocess.fit import UprightFitter, load_fitter
from reid3d.preprocess.hmr import Regressed
from reid3d.preprocess.hmr2 import Hmr2Fitter, Hmr2Net
from reid3d.preprocess.params import ParamsFitter
from reid3d.preprocess.spin import SpinFitter, SpinNet, load_net
from tests.baselines.test_resnet import by_the_book, torchvision_layout, with_statistics


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return axis_angle_to_matrix(torch.randn(count, 24, 3, generator=rng))


def six_to_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A rotation from two vectors, by QR: its first two columns have the directions of Gram-Schmidt's."""
    q, r = np.linalg.qr(np.stack([a, b], 1))
    q = q * np.sign(np.diag(r))
    return np.stack([q[:, 0], q[:, 1], np.cross(q[:, 0], q[:, 1])], 1)


@pytest.fixture
def own_smpl() -> Body:
    """A body that plays the licensed one."""
    return load_body("low")


# SPIN


@pytest.fixture(scope="module")
def spin_net() -> SpinNet:
    torch.manual_seed(0)
    net = with_statistics(SpinNet())
    with torch.no_grad():
        for block in (b for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for b in stage):
            block.bn3.weight *= 0.3  # or the features grow from block to block
        net.init_pose.copy_(torch.randn(1, 144))
        net.init_shape.copy_(torch.randn(1, 10))
        net.init_cam.copy_(torch.tensor([[0.9, 0.0, 0.0]]))
    return net.eval()


@pytest.fixture(scope="module")
def spin_file(spin_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("spin") / "model_checkpoint.pt"
    adam = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    old = {key: value for key, value in spin_net.state_dict().items() if not key.endswith("num_batches_tracked")}
    content = {"model": old, "optimizer": adam.state_dict(), "epoch": 3, "dataset_perm": [2, 0, 1]}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # SPIN's is of 2019
    return path


def spin_by_the_book(state, images, iterations=3):
    features = by_the_book(state, images, 50, 2).mean((2, 3))
    pose, betas, cam = (state[f"init_{name}"].repeat(len(images), 1) for name in ("pose", "shape", "cam"))
    for _ in range(iterations):
        hidden = torch.cat([features, pose, betas, cam], 1)
        for name in ("fc1", "fc2"):
            hidden = hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        pose, betas, cam = (
            value + hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"]
            for name, value in (("decpose", pose), ("decshape", betas), ("deccam", cam))
        )
    rotmats = [[six_to_matrix(six[0::2], six[1::2]) for six in row.reshape(24, 6)] for row in pose.numpy()]
    return torch.from_numpy(np.array(rotmats)), betas, cam


def test_spin_agrees_with_the_book(spin_net, spin_file, rng, own_smpl) -> None:
    crop = rng.integers(0, 256, (560, 200, 3), dtype=np.uint8)
    canvas = np.zeros((672, 672, 3), np.uint8)  # 1.2 times 560
    canvas[56:-56, 236:-236] = crop
    seen = np.asarray(Image.fromarray(canvas).resize((224, 224), Image.Resampling.BILINEAR)) / 255.0
    seen = (seen - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    images = torch.from_numpy(seen).permute(2, 0, 1)[None]
    state = {key: value.double() for key, value in spin_net.state_dict().items()}
    rotmats, betas, cam = spin_by_the_book(state, images)
    assert (cam - state["init_cam"]).abs().max() > 1e-3

    fit = SpinFitter(spin_file, own_smpl)([crop], ["a"])
    torch.testing.assert_close(fit.rotmats.double(), rotmats, atol=1e-3, rtol=0)
    torch.testing.assert_close(fit.betas.double(), betas, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(fit.cam.double(), cam * torch.tensor([1.2, 1, 1]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(fit.verts, own_smpl(fit.rotmats, fit.betas).verts)
    assert 0 < float(fit.confidence) < 1  # a random net finds another pose in the mirror

    embedded = load_fitter(f"spin:{spin_file}")
    alone = embedded([crop], ["a"])
    torch.testing.assert_close(alone.rotmats, fit.rotmats)
    assert not alone.betas.any() and len(embedded.faces) == len(load_body().faces)


def test_spin_iterates_three_times(spin_net) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    state = {key: value.double() for key, value in spin_net.state_dict().items()}
    with torch.no_grad():
        out = spin_net(images)
    for iterations in (2, 3, 4):
        rotmats, _, cam = spin_by_the_book(state, images.double(), iterations)
        same = torch.allclose(out.rotmats.double(), rotmats, atol=1e-3) and torch.allclose(
            out.cam.double(), cam, atol=1e-3
        )
        assert same == (iterations == 3)


def test_spin_layout() -> None:
    with torch.device("meta"):
        net = SpinNet()
    head = {"fc1": (1024, 2048 + 144 + 10 + 3), "fc2": (1024, 1024), "decpose": (144, 1024), "decshape": (10, 1024)}
    head |= {"deccam": (3, 1024)}
    expected = torchvision_layout(50) | {"init_pose": (1, 144), "init_shape": (1, 10), "init_cam": (1, 3)}
    expected |= {f"{name}.weight": shape for name, shape in head.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in head.items()}
    state = net.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert len(state) == 331
    assert sum(p.numel() for p in net.parameters()) == 26_977_501


# HMR 2.0


TINY = {"size": (64, 48), "width": 16, "depth": 2, "heads": 4, "decoder_width": 12}
TINY |= {"decoder_depth": 3, "decoder_heads": 3, "head_width": 5, "hidden": 7}


@pytest.fixture
def tiny() -> Hmr2Net:
    net = Hmr2Net(**TINY)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * (0.4 if tensor.dim() > 1 else 0.8))
    return net.double().eval()


def hmr2_by_the_book(state, images, heads, decoder_heads):
    """One image at a time, one head at a time, in NumPy."""
    state = {key: value.double().numpy() for key, value in state.items()}

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def norm(name, x, eps):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2

    def attention(q, k, v, heads):
        gathered = []
        for q1, k1, v1 in zip(*(np.split(x, heads, 1) for x in (q, k, v)), strict=True):
            weights = np.exp(q1 @ k1.T / np.sqrt(q1.shape[1]))
            gathered.append(weights / weights.sum(1, keepdims=True) @ v1)
        return np.concatenate(gathered, 1)

    def depth(pattern):
        return len({key.split(".")[pattern.count(".")] for key in state if key.startswith(pattern)})

    outputs = []
    for image in images.numpy():
        rows, columns = (side // 16 for side in image.shape[1:])
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
        patches = np.stack(
            [padded[:, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16].ravel() for i in range(rows) for j in range(columns)]
        )
        weight = state["backbone.patch_embed.proj.weight"]
        x = patches @ weight.reshape(len(weight), -1).T + state["backbone.patch_embed.proj.bias"]
        position = state["backbone.pos_embed"][0]
        x = x + position[1:] + position[0]
        for i in range(depth("backbone.blocks.")):
            name = f"backbone.blocks.{i}"
            q, k, v = np.split(linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x, 1e-6)), 3, 1)
            x = x + linear(f"{name}.attn.proj", attention(q, k, v, heads))
            x = x + linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x, 1e-6))))
        context = norm("backbone.last_norm", x, 1e-6)
        head = "smpl_head.transformer"
        token = state[f"{head}.to_token_embedding.bias"] + state[f"{head}.pos_embedding"][0]  # embedding of 0
        for i in range(depth(f"{head}.transformer.layers.")):
            name = f"{head}.transformer.layers.{i}"
            q, k, v = np.split(linear(f"{name}.0.fn.to_qkv", norm(f"{name}.0.norm", token, 1e-5)), 3, 1)
            token = token + linear(f"{name}.0.fn.to_out.0", attention(q, k, v, decoder_heads))
            q = linear(f"{name}.1.fn.to_q", norm(f"{name}.1.norm", token, 1e-5))
            k, v = np.split(linear(f"{name}.1.fn.to_kv", context), 2, 1)
            token = token + linear(f"{name}.1.fn.to_out.0", attention(q, k, v, decoder_heads))
            hidden = gelu(linear(f"{name}.2.fn.net.0", norm(f"{name}.2.norm", token, 1e-5)))
            token = token + linear(f"{name}.2.fn.net.3", hidden)
        pose = (state["smpl_head.init_body_pose"] + linear("smpl_head.decpose", token)).reshape(24, 6)
        betas = state["smpl_head.init_betas"] + linear("smpl_head.decshape", token)
        cam = state["smpl_head.init_cam"] + linear("smpl_head.deccam", token)
        outputs.append((np.stack([six_to_matrix(six[:3], six[3:]) for six in pose]), betas[0], cam[0]))
    return [torch.from_numpy(np.stack(part)) for part in zip(*outputs, strict=True)]


def test_hmr2_agrees_with_the_book(tiny) -> None:
    images = torch.randn(3, 3, 64, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        out = tiny(images)
    for got, expected in zip(out, hmr2_by_the_book(tiny.state_dict(), images, 4, 3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (out.cam[0] - out.cam[1]).abs().max() > 1e-3  # the image matters


def test_hmr2_layout_at_full_size() -> None:
    with torch.device("meta"):
        net = Hmr2Net()
    expected = {"backbone.patch_embed.proj.weight": (1280, 3, 16, 16), "backbone.patch_embed.proj.bias": (1280,)}
    expected["backbone.pos_embed"] = (1, 193, 1280)

    def norm(name, width):
        expected[f"{name}.weight"] = expected[f"{name}.bias"] = (width,)

    def linear(name, outputs, inputs, bias=True):
        expected[f"{name}.weight"] = (outputs, inputs)
        if bias:
            expected[f"{name}.bias"] = (outputs,)

    for i in range(32):
        name = f"backbone.blocks.{i}"
        norm(f"{name}.norm1", 1280)
        linear(f"{name}.attn.qkv", 3840, 1280)
        linear(f"{name}.attn.proj", 1280, 1280)
        norm(f"{name}.norm2", 1280)
        linear(f"{name}.mlp.fc1", 5120, 1280)
        linear(f"{name}.mlp.fc2", 1280, 5120)
    norm("backbone.last_norm", 1280)
    linear("smpl_head.transformer.to_token_embedding", 1024, 1)
    expected["smpl_head.transformer.pos_embedding"] = (1, 1, 1024)
    for i in range(6):
        name = f"smpl_head.transformer.transformer.layers.{i}"
        for k in range(3):
            norm(f"{name}.{k}.norm", 1024)
        linear(f"{name}.0.fn.to_qkv", 1536, 1024, bias=False)
        linear(f"{name}.0.fn.to_out.0", 1024, 512)
        linear(f"{name}.1.fn.to_q", 512, 1024, bias=False)
        linear(f"{name}.1.fn.to_kv", 1024, 1280, bias=False)
        linear(f"{name}.1.fn.to_out.0", 1024, 512)
        linear(f"{name}.2.fn.net.0", 1024, 1024)
        linear(f"{name}.2.fn.net.3", 1024, 1024)
    for name, outputs in (("decpose", 144), ("decshape", 10), ("deccam", 3)):
        linear(f"smpl_head.{name}", outputs, 1024)
    expected |= {"smpl_head.init_body_pose": (1, 144), "smpl_head.init_betas": (1, 10), "smpl_head.init_cam": (1, 3)}
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == expected
    assert sum(p.numel() for p in net.parameters()) == 670_459_037
    out = net(torch.zeros(2, 3, 256, 192, device="meta"))
    assert [tuple(part.shape) for part in out] == [(2, 24, 3, 3), (2, 10), (2, 3)]


def test_hmr2_reads_a_lightning_checkpoint(tiny, tmp_path, monkeypatch, rng) -> None:
    class CfgNode(dict):
        """yacs' in all that a pickle shows: a dictionary with attributes of its own."""

        def __init__(self, values=()):
            super().__init__(values)
            self.__dict__.update({"__immutable__": False, "__deprecated_keys__": set(), "__new_allowed__": False})

        def __getattr__(self, name):
            raise AttributeError(name)

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs, config = ModuleType("yacs"), ModuleType("yacs.config")
    config.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", yacs)
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    state = {**tiny.float().state_dict(), "smpl.v_template": torch.zeros(5, 3), "initialized": torch.tensor(True)}
    state["discriminator.D_alpha.fc.weight"] = torch.zeros(2)
    cfg = CfgNode({"MODEL": CfgNode({"IMAGE_SIZE": 256, "BBOX_SHAPE": [192, 256]}), "mean": np.float64(0.5)})
    path = tmp_path / "hmr2.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {"cfg": cfg}, "epoch": 35, "loops": {"a": [1]}}, path)
    for name in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, name)

    monkeypatch.setattr(hmr2, "Hmr2Net", lambda: Hmr2Net(**TINY))
    monkeypatch.setattr(Hmr2Fitter, "size", (64, 48))
    safe = set(torch.serialization.get_safe_globals())
    fitter = load_fitter(f"hmr2:{path}")
    assert "yacs.config" not in sys.modules and set(torch.serialization.get_safe_globals()) == safe
    for key, value in fitter.net.state_dict().items():
        assert torch.equal(value, state[key]), key
    crop = rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)  # fills the window, pixel by pixel
    fit = fitter([crop], ["a"])
    seen = (crop / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    rotmats, _, cam = hmr2_by_the_book(tiny.state_dict(), torch.from_numpy(seen).permute(2, 0, 1)[None], 4, 3)
    torch.testing.assert_close(fit.rotmats.double(), rotmats, atol=1e-3, rtol=0)
    torch.testing.assert_close(fit.cam.double(), cam, atol=1e-3, rtol=1e-3)
    assert not fit.betas.any() and 0 < float(fit.confidence) < 1


# both


def test_layouts_of_six_numbers_are_not_interchangeable(tiny, spin_net) -> None:
    known = rotations(1)
    columns = known[..., :2]  # (1,24,3,2)
    spins, hmr2s = columns.reshape(1, 144), columns.mT.reshape(1, 144)
    assert spins[0, :6].tolist() == [known[0, 0, i, j].item() for i in range(3) for j in range(2)]
    assert hmr2s[0, :6].tolist() == [known[0, 0, i, j].item() for j in range(2) for i in range(3)]
    torch.testing.assert_close(rotation_6d_to_matrix(columns), known)

    with torch.device("meta"):
        net = SpinNet()
    state = {key: torch.zeros_like(value) for key, value in spin_net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    tiny = tiny.float()
    with torch.no_grad():
        tiny.smpl_head.decpose.weight.zero_()
        tiny.smpl_head.decpose.bias.zero_()
        for six, by_spin, by_hmr2 in ((spins, True, False), (hmr2s, False, True)):
            net.init_pose.copy_(six)
            tiny.smpl_head.init_body_pose.copy_(six)
            for model, images, right in ((net, (1, 3, 32, 32), by_spin), (tiny, (1, 3, 64, 48), by_hmr2)):
                apart = (model.eval()(torch.zeros(images)).rotmats - known).abs().amax((0, 2, 3))
                assert (apart < 1e-5).all() if right else (apart > 0.1).float().mean() > 0.9


class Spotter(nn.Module):
    """Plays a network: the pelvis of an upright body lies on the brightest pixel of the window, a metre is 0.4 high."""

    S = 0.8

    def __init__(self, body: Body) -> None:
        super().__init__()
        upright = torch.eye(3).repeat(1, 24, 1, 1)
        upright[:, 0] = axis_angle_to_matrix(torch.tensor([pi, 0, 0]))
        self.register_buffer("upright", upright)
        self.register_buffer("pelvis", body.joints(upright, torch.zeros(1, 10))[1][0, 0, :2])

    def forward(self, images: torch.Tensor) -> Regressed:
        size = images.new_tensor(images.shape[:1:-1])  # width, height
        best = images.sum(1).flatten(1).argmax(1)
        pixel = torch.stack([best % images.shape[3], best // images.shape[3]], 1) + 0.5
        at = (2 * pixel - size) / size[1]  # half window heights from the centre
        cam = torch.cat([torch.full_like(at[:, :1], self.S), at / self.S - self.pelvis], 1)
        count = len(images)
        return Regressed(self.upright.expand(count, -1, -1, -1), images.new_zeros(count, 10), cam)


@pytest.mark.parametrize("module", [spin, hmr2])
def test_camera_of_the_window_becomes_that_of_the_crop(module, monkeypatch) -> None:
    body = load_body("low")
    monkeypatch.setattr(module, "load_net", lambda *_: Spotter(body))
    fitter = (SpinFitter if module is spin else Hmr2Fitter)("unused", body)
    spots = {(300, 100): (250, 70), (130, 390): (20, 301), (200, 200): (100, 33)}  # (h, w): row, column
    crops = []
    for (height, width), (row, column) in spots.items():
        crop = np.full((height, width, 3), 30, np.uint8)
        crop[row - 4 : row + 5, column - 4 : column + 5] = 120
        crop[row - 1 : row + 2, column - 1 : column + 2] = 255
        crops.append(crop)
    fit = fitter(crops, ["a", "b", "c"])
    for i, ((height, width), (row, column)) in enumerate(spots.items()):
        one, aspect = fit.select(torch.arange(len(crops)) == i), torch.tensor([width / height])
        for h, w in ((height, width), (128, 64)):
            x, y, _ = project(one.joints, one.cam, h, w, aspect)[0, 0].tolist()
            assert x == pytest.approx((column + 0.5) / width * w, abs=2 * w / width)
            assert y == pytest.approx((row + 0.5) / height * h, abs=2 * h / height)
        x, y, _ = project(one.joints, one.cam, height, width, aspect)[0].T
        head, foot = 15, 10
        assert y[head] < y[0] < y[foot]  # upright on the picture
        metres = (one.joints[0, foot, 1] - one.joints[0, head, 1]).item()
        window = 1.2 * max(height, width) if module is spin else max(height, width * 4 / 3)
        assert (y[foot] - y[head]).item() == pytest.approx(metres * Spotter.S / 2 * window, rel=1e-4)


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class Foreign:
    """Plays another library's class."""

    def __reduce__(self):
        return (eval, ("code of the file ran",))


@pytest.mark.parametrize(
    "kind", ["alone", "under", "parallel", "half", "safetensors", "uncounted", "foreign", "legacy"]
)
def test_checkpoints_in_all_their_forms(kind, tmp_path) -> None:
    net = small_net()
    state = net.state_dict()
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        if kind == "parallel":
            state = {f"module.{key}": value for key, value in state.items()}
        if kind == "half":
            state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        if kind == "uncounted":
            state = {key: value for key, value in state.items() if "num_batches" not in key}
        content = state if kind == "alone" else {"weights": state, "epoch": 1}
        if kind == "foreign":
            content |= {"args": Foreign(), "best": np.float64(1), "dtype": np.dtype("f4"), "array": np.ones(3)}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    safe = set(torch.serialization.get_safe_globals())
    loaded = load_net(small_net, path, "weights")
    for key, value in loaded.state_dict().items():
        expected = net.state_dict()[key]
        assert value.dtype == expected.dtype and torch.allclose(value, expected, atol=1e-3)
    assert set(torch.serialization.get_safe_globals()) == safe


def test_checkpoint_errors(tmp_path) -> None:
    def refused(path):
        with pytest.raises(ValueError) as caught:
            load_net(small_net, path, "weights")
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match="weights must be a file, got .*a.pt"):
        load_net(small_net, path, "weights")
    for content in (b"", b"text", b"\xff\xd8\xff", pickle.dumps([1], protocol=2), b"PK\x05\x06" + b"\0" * 18):
        path.write_bytes(content)
        assert "weights must be a checkpoint of tensors" in refused(path) and ": ;" not in refused(path)
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"text")
    assert "weights must be a checkpoint of tensors" in refused(broken)
    torch.save({"weights": small_net().state_dict(), "args": Foreign()}, path, _use_new_zipfile_serialization=False)
    message = refused(path)
    assert (
        "Unsupported global: GLOBAL eval;" in message and "torch.load(file, weights_only=False)['weights']" in message
    )
    for content in ([1], {}, {"weights": {}}, {"weights": {"a": 1}}, {"weights": {"a": np.ones(2)}}):
        torch.save(content, path)
        assert "weights must be a state dict, alone or under 'weights'" in refused(path)
    state = small_net().state_dict()
    state["0.bias"] = torch.zeros(4)
    del state["0.weight"]
    state |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    torch.save(state, path)
    message = refused(path)
    assert "lacks '0.weight';" in message and "has in another shape '0.bias'" in message
    assert "has besides 'extra0', 'extra1', 'extra2' and 2 more" in message


# params


@pytest.fixture
def table(tmp_path):
    """Writes a file of params with `changes`, None to leave a key out."""

    def write(**changes):
        count = 3
        pose = np.random.default_rng(1).normal(size=(count, 72)) * 0.5
        arrays = {"names": np.array(["query/a.jpg", "query/b.jpg", "c.jpg"]), "pose": pose}
        arrays["cam"] = np.array([[1.0, 0.1, 0.2], [0.9, 0.0, 0.1], [0.8, -0.1, 0.0]])
        arrays |= changes
        path = tmp_path / "params.npz"
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write


CROP = np.zeros((30, 12, 3), np.uint8)


def test_params_of_poses(table, own_smpl) -> None:
    betas = np.random.default_rng(0).normal(size=(3, 16))
    names = ["query/b.jpg", "c.jpg"]
    path = table(betas=betas, confidence=np.array([1, 0.25, 0.5]))
    with np.load(path) as file:
        pose, cam = torch.from_numpy(file["pose"]).float(), torch.from_numpy(file["cam"]).float()
    rotmats = axis_angle_to_matrix(pose.view(3, 24, 3))
    fit = ParamsFitter(path, own_smpl)([CROP] * 2, names)
    torch.testing.assert_close(fit.rotmats, rotmats[1:])
    torch.testing.assert_close(fit.betas, torch.from_numpy(betas[1:, :10]).float())
    torch.testing.assert_close(fit.cam, cam[1:])
    assert fit.confidence.tolist() == [0.25, 0.5]
    expected = own_smpl(rotmats, torch.from_numpy(betas[:, :10]).float())
    torch.testing.assert_close(fit.verts, expected.verts[1:])
    torch.testing.assert_close(fit.joints, expected.joints[1:])

    embedded = load_fitter(f"params:{path}")([CROP] * 2, names)
    assert not embedded.betas.any()
    for form in (pose.view(3, 24, 3), rotmats):
        again = ParamsFitter(table(pose=form.numpy(), betas=betas[:, :4]))([CROP] * 2, names)
        torch.testing.assert_close(again.verts, embedded.verts, atol=1e-5, rtol=0)
        assert again.confidence.tolist() == [1, 1]
    few = ParamsFitter(table(betas=betas[:, :4]), own_smpl)([CROP], ["c.jpg"])
    assert few.betas[0].tolist() == [*betas[2, :4].astype(np.float32).tolist(), *[0.0] * 6]


def test_params_of_vertices(table) -> None:
    rng = np.random.default_rng(0)
    verts, faces = rng.normal(size=(3, 5, 3)), np.array([[0, 1, 2], [2, 3, 4]], np.int32)
    fitter = ParamsFitter(table(pose=None, verts=verts, faces=faces))
    assert fitter.faces.tolist() == faces.tolist()
    fit = fitter([CROP, CROP], ["c.jpg", "query/a.jpg"])
    torch.testing.assert_close(fit.verts, torch.from_numpy(verts[[2, 0]]).float())
    assert fit.rotmats is None and fit.betas is None and fit.joints is None
    whole = rng.normal(size=(3, len(load_body().v_template), 3))
    assert torch.equal(ParamsFitter(table(pose=None, verts=whole)).faces, load_body().faces)


def test_params_find_crops_by_name(table) -> None:
    names = np.array(["query/a.jpg", "gallery/a.jpg", "b.jpg", "gallery/c.jpg", "d/e.jpg", "e.jpg"])
    count = len(names)
    cam = np.ones((count, 3)) * np.arange(1, count + 1)[:, None]
    path = table(names=names, pose=np.zeros((count, 72)), cam=cam)
    wanted = {
        "query/a.jpg": 1, "gallery/a.jpg": 2, "a.jpg": 0, "b.jpg": 3, "query/b.jpg": 3, "c.jpg": 4, "gallery/c.jpg": 4,
        "query/c.jpg": 0, "d/e.jpg": 5, "e.jpg": 6, "query/e.jpg": 0, "d.jpg": 0, "": 0,
    }  # fmt: skip
    fit = ParamsFitter(path)([CROP] * len(wanted), list(wanted))
    assert fit.cam[:, 0].nan_to_num(0).tolist() == list(wanted.values())
    found = torch.tensor([row > 0 for row in wanted.values()])
    assert torch.equal(fit.confidence, found.float())
    assert torch.equal(fit.verts.isnan().flatten(1).all(1), ~found)
    assert torch.equal(fit.verts.isnan().flatten(1).any(1), ~found)
    assert torch.equal(fit.joints.isnan().flatten(1).any(1), ~found)


@pytest.mark.parametrize("key", ["pose", "betas", "cam", "confidence", "behind"])
def test_params_of_failures(table, key) -> None:
    arrays = {"pose": np.zeros((3, 72)), "betas": np.zeros((3, 10)), "cam": np.ones((3, 3)), "confidence": np.ones(3)}
    if key == "behind":
        arrays["cam"][1, 0] = -1
    else:
        arrays[key].reshape(3, -1)[1, -1] = np.nan
    fit = ParamsFitter(table(**arrays))([CROP] * 3, ["query/a.jpg", "query/b.jpg", "c.jpg"])
    assert fit.confidence.tolist() == [1, 0, 1]
    assert fit.verts.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("whole", [False, True], ids=["crop", "whole image"])
def test_params_of_a_perspective_camera(table, whole) -> None:
    width, height, focal = 640.0, 480.0, np.array([900.0, 1200.0, 5000.0])
    transl = np.array([[-0.8, 0.3, 5.0], [0.6, -0.1, 9.0], [0.0, 0.2, 40.0]])
    image = np.array([width, height])
    where = focal[:, None] * transl[:, :2] / transl[:, 2:] + image / 2  # of the bodies' origins
    box = np.concatenate([where - [45.3, 110.5], where + [51, 130.25]], 1)
    changes = {"cam": None, "transl": transl, "focal": focal, "image_size": image, "pose": np.zeros((3, 72))}
    if whole:
        box = np.array([[0, 0, width, height]] * 3)
    else:
        changes["crop_box"] = box
    fit = ParamsFitter(table(**changes))([CROP] * 3, ["query/a.jpg", "query/b.jpg", "c.jpg"])

    def in_crop(points):
        """Pixels of points (3,P,3) of the body by the true camera, from the crop's corner."""
        moved = points.double().numpy() + transl[:, None]
        return focal[:, None, None] * moved[..., :2] / moved[..., 2:] + image / 2 - box[:, None, :2]

    size = box[:, 2:] - box[:, :2]
    flat = fit.joints * torch.tensor([1.0, 1, 0])  # all at the depth of the body
    for points, tolerance in ((flat, 1e-3), (fit.joints, None)):
        true = in_crop(points)
        for i in range(3):
            seen = project(points[i : i + 1].double(), fit.cam[i : i + 1].double(), size[i, 1], size[i, 0], None)[
                0, :, :2
            ].numpy()
            if tolerance is None:  # off by the perspective alone: in proportion to the depth from the body's
                reach = np.abs(true[i] + box[i, :2] - image / 2).max() * points[i, :, 2].abs().max().item()
                tolerance_i = reach / (transl[i, 2] - points[i, :, 2].abs().max().item())
                assert 1e-3 < np.abs(seen - true[i]).max() < 1.01 * tolerance_i
            else:
                np.testing.assert_allclose(seen, true[i], atol=tolerance)
    scalar = ParamsFitter(table(**{**changes, "focal": np.float64(900), "image_size": np.array([image] * 3)}))
    torch.testing.assert_close(scalar.cam[0], fit.cam[0])
    gone = ParamsFitter(table(**{**changes, "transl": transl * [1, 1, -1]}))([CROP], ["c.jpg"])
    assert gone.confidence.tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": None}, r"names must be text \(any,\), got no such key"),
        ({"names": np.arange(3)}, r"names must be text \(any,\), got int64 \(3,\)"),
        ({"names": np.array([["a"], ["b"], ["c"]])}, r"names must be text \(any,\), got <U1 \(3, 1\)"),
        ({"names": np.array([], "U1")}, "names must name a crop, got none"),
        ({"names": np.array(["a", "b", "a"])}, "names must differ, got 'a' more than once"),
        ({"pose": None}, "keys must include one of pose and verts, got neither"),
        ({"verts": np.zeros((3, 5, 3))}, "keys must include one of pose and verts, got pose and verts"),
        ({"cam": None}, "keys must include one of cam and transl, got neither"),
        ({"transl": np.ones((3, 3))}, "keys must include one of cam and transl, got cam and transl"),
        ({"beta": np.zeros((3, 10))}, "keys must be among names, .*, got 'beta'"),
        ({"pose": np.zeros((2, 72))}, r"pose must be numbers \(3, 72\) or .* or .*, got float64 \(2, 72\)"),
        ({"pose": np.array(["a"] * 3)}, r"pose must be numbers .*, got <U1 \(3,\)"),
        ({"pose": np.ones((3, 24, 3, 3))}, "pose must be rotation matrices, got others in row 0"),
        ({"pose": np.tile(-np.eye(3), (3, 24, 1, 1))}, "pose must be rotation matrices, got others in row 0"),
        ({"betas": np.zeros(10)}, r"betas must be numbers \(3, any\), got float64 \(10,\)"),
        ({"cam": np.zeros((3, 2))}, r"cam must be numbers \(3, 3\), got float64 \(3, 2\)"),
        ({"focal": np.ones(3)}, "focal must come with transl, got focal without it"),
        ({"crop_box": np.ones((3, 4))}, "crop_box must come with transl, got crop_box without it"),
        ({"faces": np.zeros((1, 3), int)}, "faces must come with verts, got faces without it"),
        ({"confidence": np.array([0, 2, 1])}, "confidence must be in 0..1, got 2 in row 1"),
        ({"confidence": np.ones(2)}, r"confidence must be numbers \(3,\), got float64 \(2,\)"),
        (
            {"pose": None, "verts": np.zeros((3, 5, 3))},
            "verts must have the body's .* vertices, or faces beside them, got 5 vertices",
        ),
        (
            {"pose": None, "verts": np.zeros((3, 5, 3)), "faces": np.array([[0, 1, 5]])},
            r"faces must be triangles of vertices 0..4, got 0..5",
        ),
        ({"pose": None, "verts": np.zeros((3, 5, 3)), "betas": np.zeros((3, 10))}, "betas must come with pose"),
        ({"cam": None, "transl": np.ones((3, 3))}, r"focal must be numbers \(\) or \(3,\), got no such key"),
        ({"cam": None, "transl": np.ones((3, 3)), "focal": np.ones(3)}, r"image_size must be .*, got no such key"),
        (
            {"cam": None, "transl": np.ones((3, 3)), "focal": np.float32(-1), "image_size": np.array([9, 9])},
            "focal must be positive, got -1.0",
        ),
        (
            {
                "cam": None,
                "transl": np.ones((3, 3)),
                "focal": np.float32(1),
                "image_size": np.array([9, 9]),
                "crop_box": np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 4, 1, 2]]),
            },
            r"crop_box must be x0 < x1, y0 < y1, got \[0 4 1 2\] in row 2",
        ),
    ],
)
def test_params_errors(table, changes, message) -> None:
    path = table(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        ParamsFitter(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_params_of_what_is_no_npz(tmp_path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match="params must be a file, got .*a.npz"):
        ParamsFitter(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="params must be an .npz of plain arrays, got .*a.npz"):
        ParamsFitter(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="params must be an .npz of plain arrays, got .*a.npz"):
        ParamsFitter(path)
    np.savez(path, names=np.array(["a", None], object))
    with pytest.raises(ValueError, match="params must be an .npz of plain arrays, got .*a.npz"):
        ParamsFitter(path)


def test_fingerprints_cover_the_file(table) -> None:
    base = ParamsFitter(table()).fingerprint()
    assert ParamsFitter(table()).fingerprint() == base
    verts = {"pose": None, "verts": np.zeros((3, 5, 3))}
    others = [
        {"names": np.array(["query/a.jpg", "query/b.jpg", "d.jpg"])},
        {"pose": np.zeros((3, 72))},
        {"cam": np.ones((3, 3))},
        {"confidence": np.zeros(3)},
        {**verts, "faces": np.array([[0, 1, 2]])},
        {**verts, "faces": np.array([[0, 1, 3]])},
    ]
    prints = {ParamsFitter(table(**changes)).fingerprint() for changes in others}
    assert len(prints) == len(others) and base not in prints


# the others


def test_mean_is_upright_and_fills_the_crop() -> None:
    fitter = load_fitter("mean")
    assert isinstance(fitter, UprightFitter)
    crops = [np.zeros((64, 32, 3), np.uint8), np.zeros((100, 20, 3), np.uint8)]
    fit = fitter(crops, ["a", "b"])
    assert fit.confidence.tolist() == [0, 0]
    for i, crop in enumerate(crops):
        height, width = crop.shape[:2]
        one = fit.select(torch.arange(len(crops)) == i)
        xy = project(one.verts, one.cam, height, width, torch.tensor([width / height]))[0, :, :2]
        low, high = xy.amin(0), xy.amax(0)
        assert low.min() >= 0 and high[0] <= width and high[1] <= height
        torch.testing.assert_close((low + high) / 2, torch.tensor([width / 2, height / 2]), atol=1e-3, rtol=0)
        share = torch.maximum((high - low)[0] / width, (high - low)[1] / height)
        assert share.item() == pytest.approx(UprightFitter.FILL, abs=1e-4)
    y = fit.joints[0, :, 1]
    assert y[15] < y[0] < y[7]  # head, pelvis, ankle: y is down


@pytest.mark.parametrize("spec", ["", "spin", "spin:", "smplx:a.pt", "mean:a", "default:a", ":a"])
def test_unknown_specifications(spec) -> None:
    with pytest.raises(ValueError, match=f"fitter must be one of default, spin:FILE, .*, mean, got '{spec}'"):
        load_fitter(spec)


@pytest.mark.parametrize("kind", ["spin", "hmr2", "params"])
def test_specifications_of_no_file(kind, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="must be a file, got .*nothing"):
        load_fitter(f"{kind}:{tmp_path}/nothing")


def test_crops_are_checked(table, monkeypatch) -> None:
    monkeypatch.setattr(spin, "load_net", lambda *_: Spotter(load_body("low")))
    for fitter in (SpinFitter("unused"), ParamsFitter(table()), UprightFitter()):
        with pytest.raises(TypeError, match="crops must be uint8, got float64"):
            fitter([np.zeros((8, 4, 3))], ["a"])
        with pytest.raises(ValueError, match=r"crops must be \(H, W, 3\), got \(8, 4\)"):
            fitter([np.zeros((8, 4), np.uint8)], ["a"])
