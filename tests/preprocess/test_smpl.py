"""SMPL's files: bodies as smplx makes them, from every kind of file; and no file runs, hangs or crashes anything."""

import copyreg
import hashlib
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from reid3d.preprocess.body import PARENTS, Body, axis_angle_to_matrix, load_body
from reid3d.preprocess.smpl import load_smpl
from tests.test_fuzz import mutated

Arrays = dict[str, np.ndarray]


def smpl_arrays(body: Body, shapes: int = 10) -> Arrays:
    """The body as SMPL's files have it, with random pose correctives; betas beyond the tenth are random too."""
    rng = np.random.default_rng(0)
    count = len(body.v_template)
    more = rng.normal(0, 0.01, (count, 3, shapes - 10))
    weights = body.weights.numpy().astype(float)
    return {
        "v_template": body.v_template.numpy().astype(float),
        "shapedirs": np.concatenate([body.shapedirs.numpy(), more], 2),
        "posedirs": rng.normal(0, 0.01, (count, 3, 207)),
        "J_regressor": body.regressor.numpy().astype(float),
        "kintree_table": np.array([[2**32 - 1, *PARENTS[1:]], range(24)], np.uint32),
        "weights": weights / weights.sum(1, keepdims=True),
        "f": body.faces.numpy().astype(np.uint32),
    }


def small_man(around: int = 6, shapes: int = 10) -> Arrays:
    """A man with a few vertices around each joint of the embedded body, which move with it and a little its parent."""
    rng = np.random.default_rng(1)
    joints = load_body("low").j_template.repeat_interleave(around, 0)
    count, owner = 24 * around, torch.arange(24).repeat_interleave(around)
    weights = 0.8 * torch.eye(24)[owner] + 0.2 * torch.eye(24)[torch.tensor(PARENTS)[owner].clamp(min=0)]
    body = Body(
        joints + torch.from_numpy(rng.normal(0, 0.05, (count, 3))),
        torch.from_numpy(rng.normal(0, 0.02, (count, 3, 10))),
        torch.arange(count - 2)[:, None] + torch.arange(3),
        weights,
        torch.eye(24)[owner].T / around,
        list(PARENTS),
    )
    return smpl_arrays(body, shapes)


def check(path: Path, arrays: Arrays) -> None:
    """What the file poses is what smplx poses of the arrays."""
    smplx = pytest.importorskip("smplx")
    # A small mesh has not the vertices whose positions smplx adds to the joints.
    picks = {name: 0 for name in smplx.vertex_ids.vertex_ids["smplh"]}
    g = torch.Generator().manual_seed(0)
    pose, betas = 0.6 * torch.randn(3, 72, generator=g), torch.randn(3, 10, generator=g)
    model = smplx.SMPL("", data_struct=smplx.utils.Struct(**arrays), vertex_ids=picks, batch_size=3)
    body = load_smpl(path)
    with torch.no_grad():
        expected = model(global_orient=pose[:, :3], body_pose=pose[:, 3:], betas=betas)
        posed = body(axis_angle_to_matrix(pose.view(3, 24, 3)), betas)
    torch.testing.assert_close(posed.verts, expected.vertices, atol=1e-5, rtol=0)
    torch.testing.assert_close(posed.joints, expected.joints[:, :24], atol=1e-5, rtol=0)
    assert body.faces.tolist() == arrays["f"].tolist() and body.parents == list(PARENTS)
    data = path.read_bytes()
    assert body.name == f"smpl-{hashlib.sha256(data).hexdigest()[:16]}"


# ---- Every kind of file


def test_the_embedded_body_as_smpl_file(tmp_path: Path) -> None:
    arrays = smpl_arrays(load_body())
    np.savez(tmp_path / "a.npz", **arrays)
    check(tmp_path / "a.npz", arrays)


@pytest.mark.parametrize("shapes", [10, 300])
@pytest.mark.parametrize("kind", [np.float64, np.float32, ">f8"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, shapes: int, kind: type | str, save: Callable) -> None:
    arrays = {k: v if k in ("f", "kintree_table") else v.astype(kind) for k, v in small_man(shapes=shapes).items()}
    save(tmp_path / "a.npz", **arrays, other=np.array([None]))
    check(tmp_path / "a.npz", {k: v.astype(v.dtype.newbyteorder("=")) for k, v in arrays.items()})


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles(tmp_path: Path, protocol: int) -> None:
    arrays = small_man()
    arrays["f"] = np.asfortranarray(arrays["f"])
    others = {
        "bs_type": "lrotmin",
        "J": np.float64(3),
        5: {(1, 2)},
        "none": [None, True, 1.5, -(2**70), "\xfc", b"", ()],
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({**others, **arrays}, protocol))
    check(tmp_path / "a.pkl", arrays)


@pytest.mark.parametrize("protocol", [0, 2])
def test_pickles_of_python_2(tmp_path: Path, protocol: int) -> None:
    arrays = small_man()
    (tmp_path / "a.pkl").write_bytes(python_2_pickle(arrays, protocol))
    loaded = pickle.loads((tmp_path / "a.pkl").read_bytes(), encoding="latin1")  # the pickle is one
    assert all(np.array_equal(loaded[key], array) for key, array in arrays.items())
    check(tmp_path / "a.pkl", arrays)


def python_2_pickle(arrays: Arrays, protocol: int) -> bytes:
    """What Python 2 writes, whose arrays are text: escaped in protocol 0, bytes in protocol 2."""
    out = b"\x80\x02(" if protocol else b"("
    for key, array in arrays.items():
        content = array.tobytes()
        text = b"T" + struct.pack("<i", len(content)) + content if protocol else f"S{repr(content)[1:]}\n".encode()
        sides = "".join(f"L{side}L\n" for side in array.shape)
        out += (
            f"S'{key}'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n({sides}t"
            f"cnumpy\ndtype\n(S'{array.dtype.str[1:]}'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
        ).encode() + text + b"tb"  # fmt: skip
    return out + b"d."


class State:
    def __init__(self, **state: object) -> None:
        self.__dict__.update(state)


class Ch(State):
    def __init__(self, **state: object) -> None:
        super().__init__(_dirty_vars={"x"}, _itr=None, _depends_on_deps={}, **state)


class Select(Ch):
    pass


class Reshape(Ch):
    pass


class transpose(Ch):
    pass


class csc_matrix(State):
    def __init__(self, dense: np.ndarray) -> None:
        lines = [np.flatnonzero(column) for column in dense.T]
        super().__init__(
            _shape=dense.shape,
            maxprint=50,
            data=np.concatenate([dense[places, j] for j, places in enumerate(lines)]),
            indices=np.concatenate(lines).astype(np.int32),
            indptr=np.cumsum([0, *map(len, lines)]).astype(np.int32),
        )


class csr_matrix(csc_matrix):
    def __init__(self, dense: np.ndarray) -> None:
        super().__init__(dense.T)
        self._shape = dense.shape


def dumps_as(monkeypatch: pytest.MonkeyPatch, value: object, protocol: int, **modules: list[type]) -> bytes:
    """The pickle of a value with classes that say they are of these modules, which are gone afterwards."""
    with monkeypatch.context() as patch:
        for module, kinds in modules.items():
            module = module.replace("__", ".")
            for dot in (i for i, letter in enumerate(f"{module}.") if letter == "."):
                if sys.modules.get(module[:dot]) is None:
                    patch.setitem(sys.modules, module[:dot], ModuleType(module[:dot]))
            for kind in kinds:
                patch.setattr(kind, "__module__", module)
                patch.setattr(sys.modules[module], kind.__name__, kind, raising=False)
        return pickle.dumps(value, protocol)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("matrix", [csc_matrix, csr_matrix])
def test_objects_of_chumpy_and_scipy(tmp_path, monkeypatch, protocol: int, matrix: type) -> None:
    arrays = small_man()
    wide = np.concatenate([arrays["shapedirs"], arrays["shapedirs"] + 1], 2)
    ten = np.arange(wide.size).reshape(wide.shape)[:, :, :10]
    odd = {
        **arrays,
        "v_template": Ch(x=arrays["v_template"]),
        "shapedirs": Select(a=Ch(x=wide), idxs=ten.ravel(), preferred_shape=ten.shape),
        "posedirs": transpose(a=Ch(x=arrays["posedirs"].transpose(2, 0, 1).copy()), axes=(1, 2, 0)),
        "weights": transpose(a=transpose(a=Ch(x=Ch(x=arrays["weights"])), axes=None)),
        "J_regressor": matrix(arrays["J_regressor"]),
    }
    kinds = {
        "chumpy__ch": [Ch],
        "chumpy__reordering": [Select, transpose],
        "scipy__sparse__csc": [csc_matrix, csr_matrix],
    }
    for name in ("chumpy", "scipy", "scipy.sparse", "scipy.sparse.csc"):
        monkeypatch.setitem(sys.modules, name, None)  # whoever imports them fails
    (tmp_path / "a.pkl").write_bytes(dumps_as(monkeypatch, odd, protocol, **kinds))
    check(tmp_path / "a.pkl", arrays)


def test_a_folder_is_searched(tmp_path: Path) -> None:
    names = [  # the best last
        "basicmodel_m_lbs_10_207_0_v1.1.0.pkl", "basicModel_f_lbs_10_207_0_v1.0.0.pkl", "SMPL_FEMALE.pkl",
        "SMPL_MALE.pkl", "neutral_smpl_with_cocoplus_reg.pkl", "basicmodel_neutral_lbs_10_207_0_v1.1.0.pkl",
        "basicModel_neutral_lbs_10_207_0_v1.0.0.pkl", "SMPL_NEUTRAL.pkl", "SMPL_MALE.npz", "SMPL_FEMALE.npz",
        "SMPL.npz", "SMPL_NEUTRAL.npz",
    ]  # fmt: skip
    for other in ("SMPLX_NEUTRAL.npz", "SMPLH_MALE.npz", "smpl_mean_params.npz", "model.pkl"):
        (tmp_path / other).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"path must be an SMPL file or a folder with one .*, got {tmp_path}"):
        load_smpl(tmp_path)
    arrays = small_man(around=1)
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(pickle.dumps({**arrays, "number": i}))  # the contents tell the kind
        assert load_smpl(str(tmp_path)).name == load_smpl(tmp_path / name).name, name
    with pytest.raises(FileNotFoundError, match="none.pkl"):
        load_smpl(tmp_path / "none.pkl")


# ---- The body


def test_pose_correctives_of_zero_change_nothing() -> None:
    body = load_body("low")
    buffers = (body.v_template, body.shapedirs, body.faces, body.weights, body.regressor, body.parents)
    with_zeros = Body(*buffers, posedirs=torch.zeros(len(body.v_template), 3, 207))
    g = torch.Generator().manual_seed(0)
    rotmats, betas = axis_angle_to_matrix(torch.randn(2, 24, 3, generator=g)), torch.randn(2, 10, generator=g)
    assert torch.equal(with_zeros(rotmats, betas).verts, Body(*buffers)(rotmats, betas).verts)
    assert body.posedirs is None and Body(*buffers).name == ""
    assert [load_body(lod).name for lod in ("full", "low")] == ["embedded-full", "embedded-low"]


def test_the_number_of_threads_does_not_change_a_body() -> None:
    threads = torch.get_num_threads()
    try:
        bodies = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            bodies.append(dict(load_body.__wrapped__("full").named_buffers()))
    finally:
        torch.set_num_threads(threads)
    for name, buffer in bodies[0].items():
        assert all(torch.equal(buffer, other[name]) for other in bodies[1:]), name


# ---- Hostile files


class Call:
    """Pickled, the call of a function."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.what = function, args

    def __reduce__(self) -> tuple:
        return self.what


def stack_global(module: str, name: str, argument: str) -> bytes:
    texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, argument)]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."


def hostile_pickles(sentinel: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the sentinel, or do other harm, and what is to be said of them."""
    command, python = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')"
    system = pickle.dumps(Call(os.system, command), 0)
    text, one = f"S'{command}'\n".encode(), b"S'x'\n"
    scalar = (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR"
        + f"V{system.decode()!r}\n".encode()
        + b"tR"
    )
    v_template = {k: v for k, v in small_man(around=1).items() if k != "v_template"}
    entry = lambda value: pickle.dumps(v_template, 2)[:-1] + b"U\x0av_template" + value + b"s."  # noqa: E731
    lists = b"]" + b"q\x000(h\x00h\x00l" * 64  # 2^64 of them, to those who follow each
    refused = ", which no SMPL file needs: refused, nothing was run"
    return {
        "system": (system, f"asks for posix.system{refused}"),
        "os.system": (b"cos\nsystem\n(" + text + b"tR.", f"a.pkl asks for os.system{refused}"),
        "eval": (pickle.dumps(Call(eval, python)), "builtins.eval"),
        "exec": (pickle.dumps(Call(exec, python), 0), "__builtin__.exec"),
        "getattr": (pickle.dumps(Call(getattr, [], "append")), "builtins.getattr"),
        "popen": (pickle.dumps(Call(subprocess.Popen, ["touch", str(sentinel)])), "subprocess.Popen"),
        "loads": (pickle.dumps(Call(pickle.loads, system)), "_pickle.loads"),
        "numpy.load": (pickle.dumps(Call(np.load, "x", None, True)), "numpy.load"),
        "in an entry": (entry(system[:-1]), "posix.system"),
        "pickle in a scalar": (entry(scalar), "v_template, got a numpy.core.multiarray.scalar"),
        "objects": (entry(pickle.dumps(np.array([Call(len, [])], object), 2)[2:-1]), "builtin__.len"),
        "array of objects": (entry(pickle.dumps(np.array([None]), 2)[2:-1]), "v_template, got numbers of type .*O8"),
        "record": (entry(pickle.dumps(np.zeros(2, "f8,f8"), 2)[2:-1]), "v_template, got numbers of type .*V16"),
        "text": (entry(pickle.dumps(np.array(["x"]), 2)[2:-1]), "v_template, got numbers of type .*U1"),
        "reduce of chumpy": (b"cchumpy.ch\nCh\n)\x81cos\nsystem\n" + text + b"\x85Rb.", "os.system"),
        "dotted": (stack_global("numpy", "f2py.os.system", command), "numpy.f2py.os.system"),
        "dotted name of chumpy": (stack_global("chumpy", "os.system", command), "chumpy.os.system"),
        "dotted name that is known": (stack_global("numpy", "core.multiarray.scalar", "x"), "core.multiarray.scalar"),
        "no name": (b"\x80\x04NN\x93.", "what has no name"),
        "lines": (stack_global("os\n", "\x1b\n" * 100, "x"), r"asks for os\\n"),
        "import": (b"cmodule_with_effects\nthing\n.", "module_with_effects.thing"),
        "inst": (b"(" + text + b"ios\nsystem\n.", "os.system"),
        "obj": (b"(cos\nsystem\n" + text + b"o.", "os.system"),
        "obj of chumpy": (b"(cchumpy\nCh\no.", "OBJ"),
        "newobj": (b"\x80\x02cos\nsystem\n" + text + b"\x85\x81.", "os.system"),
        "newobj_ex": (b"\x80\x04cchumpy\nCh\n)}\x92.", "NEWOBJ_EX"),
        "reconstructor": (b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.", "os.system"),
        "reconstructor of text": (b"ccopy_reg\n_reconstructor\n(" + 3 * one + b"tR.", "the making of a str"),
        "call of a value": (one + b"(tR.", "a call of str"),
        "call of an object": (b"cchumpy\nCh\n(tR(tR.", "a call of a chumpy.Ch"),
        "state of a class": (b"\x80\x02cnumpy\nndarray\n}U\x0c__setstate__Nsb.", "the state of a numpy.ndarray"),
        "state of a list": (b"]}b.", "the state of a value"),
        "persistent": (b"Psomething\n.", "PERSID something"),
        "binary persistent": (one + b"Q.", "BINPERSID"),
        "extension": (b"\x80\x02\x82\x07(" + text + b"tR.", "EXT1 7"),
        "buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", "pickled dict, got NoneType"),
        "long text": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00abc.", "whole .npz or .pkl, got .* 4 remain"),
        "long array": (b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00abc.", "whole .npz or .pkl, got .* 4 remain"),
        "tuples as key": (b"}(" + b")" + b"\x85" * 900_000 + b"Nu.", "lacks v_template"),
        "tuples as set": (b"c__builtin__\nset\n](" + b")" + b"\x85" * 900_000 + b"e\x85R.", "got a __builtin__.set"),
        "many lists": (b"(" + b"]" * 2_000_000 + b"l.", "at most 1000000 opcodes"),
        "lists of lists": (entry(lists), "v_template, got a list"),
        "state of states": (entry(b"cchumpy\nCh\n)\x81q\x00}U\x01xh\x00sb"), "v_template, got RecursionError"),
        "dtype of lists": (entry(numpy_array(dtype=lists)), "v_template, got TypeError"),
        "byte order of lists": (entry(numpy_array(order=lists)), "v_template, got numbers of type list|TypeError"),
        "byte order of two": (entry(numpy_array(order=b"S'f8,<'\n")), "v_template, got numbers of type 'f8,<f8'"),
        "shape of lists": (entry(numpy_array(shape=lists)), "v_template, got TypeError"),
        "shape of billions": (entry(numpy_array(shape=b"I2000000000\n")), "v_template, got ValueError"),
        "wide": (entry(sparse((2**31, 2**31))), "a sparse matrix of too many numbers"),
        "list as width": (entry(sparse(([0], 2**31 - 1))), "a sparse matrix of too many numbers"),
        "backwards": (entry(sparse((3, 2), (0, 5, 1))), r"a sparse matrix of \(3, 2\) with 1 values in 2 lines"),
        "far": (entry(sparse((3, 2), (0, 0, 2**40))), r"a sparse matrix of \(3, 2\) with 1 values in 2 lines"),
        "outside": (entry(sparse((3, 2), places=(3,))), "v_template, got IndexError"),
        "before": (entry(sparse((3, 2), places=(-1,))), r"a sparse matrix of \(3, 2\)"),
    }  # fmt: skip


def numpy_array(dtype: bytes = b"S'f8'\n", order: bytes = b"S'<'\n", shape: bytes = b"I1\n") -> bytes:
    dtype = b"cnumpy\ndtype\n(" + dtype + b"tR(I3\n" + order + b"tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    return made + b"(I1\n(" + shape + b"t" + dtype + b"I00\nS'12345678'\ntb"


def sparse(shape: tuple, ends: tuple = (0, 1, 1), places: tuple = (0,)) -> bytes:
    state = {"_shape": shape, "data": np.ones(1), "indices": np.array(places), "indptr": np.array(ends)}
    return b"cscipy.sparse\ncsc_matrix\n)\x81" + pickle.dumps(state, 2)[2:-1] + b"b"


@pytest.fixture
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that must not come to be, and a limit on memory."""
    path = tmp_path / "ran"
    (tmp_path / "module_with_effects.py").write_text(f"open({str(path)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    copyreg.add_extension("posix", "system", 7)
    pickle.loads(b"\x80\x02\x82\x07.")  # which the unpickler remembers
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, limits[1]))
    yield path
    resource.setrlimit(resource.RLIMIT_AS, limits)
    copyreg.remove_extension("posix", "system", 7)
    assert not path.exists() and "module_with_effects" not in sys.modules


def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path: Path, sentinel: Path) -> None:
    path = tmp_path / "a.pkl"
    for what, (data, words) in hostile_pickles(sentinel).items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words) as caught:
            load_smpl(path)
        message = str(caught.value)
        assert message.startswith(f"path: {path} ") and message.isprintable() and len(message) < 500, what
        assert not sentinel.exists(), what


@pytest.mark.parametrize("what", ["os.system", "loads", "in an entry", "inst", "obj", "extension"])
def test_those_pickles_would_run_elsewhere(sentinel: Path, what: str) -> None:
    pickle.load(io.BytesIO(hostile_pickles(sentinel)[what][0]), encoding="latin1")
    assert sentinel.exists()
    sentinel.unlink()


def test_what_is_not_needed_is_not_made(tmp_path: Path, sentinel: Path) -> None:
    value = hostile_pickles(sentinel)["pickle in a scalar"][0]
    arrays = small_man(around=1)
    v_template = b"U\x0av_template" + pickle.dumps(arrays["v_template"], 2)[2:-1]
    (tmp_path / "a.pkl").write_bytes(value.replace(b"v_template", b"some_other")[:-1] + v_template + b"s.")
    check(tmp_path / "a.pkl", arrays)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_archives_that_swell(tmp_path: Path, sentinel: Path, compression: int) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **{k: v for k, v in small_man(around=1).items() if k != "f"})
    with zipfile.ZipFile(path, "a", compression) as archive, archive.open("f.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|i1", "fortran_order": False, "shape": (2**28 // 4, 4)})
        for _ in range(2**8):
            file.write(bytes(2**20))
    with pytest.raises(
        ValueError, match=f"must have an array of numbers as f, got 2684.* by compression {compression}"
    ):
        load_smpl(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_a_thousand_broken_files(tmp_path: Path, kind: str, sentinel: Path) -> None:
    path, rng = tmp_path / f"a.{kind}", np.random.default_rng(0)
    arrays = {k: v.astype("u1" if k == "f" else "f2" if v.dtype == float else v.dtype) for k, v in small_man(1).items()}
    if kind == "npz":
        np.savez_compressed(path, **arrays)
    else:
        path.write_bytes(pickle.dumps(arrays, 2))
    whole, refused = path.read_bytes(), 0
    load_smpl(path)
    for _ in range(1000):
        path.write_bytes(mutated(whole, rng))
        try:
            body = load_smpl(path)
        except ValueError as error:
            assert str(error).startswith(f"path: {path} ") and str(error).isprintable()
            refused += 1
        else:
            assert body.v_template.shape == (24, 3) and body.v_template.isfinite().all() and body.faces.max() < 24
    assert 500 < refused < 1000


# ---- Files that are not SMPL's


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("v_template", lambda a: a[:, :2], r"must have v_template of shape \(144, 3\), got \(144, 2\)"),
        ("v_template", lambda a: a[0], r"must have v_template of shape \(V, 3\), got \(3,\)"),
        ("v_template", lambda a: a + 1j, "v_template, got .*(complex128|c16)"),
        ("v_template", lambda a: a * 1e300, "must have v_template finite in float32, got "),
        ("shapedirs", lambda a: a[1:], r"must have shapedirs of shape \(144, 3, S\), got \(143, 3, 10\)"),
        ("shapedirs", lambda a: a[..., :9], "must have shapedirs for at least 10 betas, got 9"),
        ("posedirs", lambda a: a[..., :90], r"must have posedirs of shape \(144, 3, 207\), got \(144, 3, 90\)"),
        ("J_regressor", lambda a: a.T, r"must have J_regressor of shape \(24, 144\), got \(144, 24\)"),
        ("weights", lambda a: a * np.nan, "must have weights finite in float32, got nan"),
        ("weights", lambda a: a + 0.1, r"must have weights that sum to 1 in each row, got 3\.4 in row "),
        ("f", lambda a: a + 1, "must have vertices 0 to 143 in f, got 144"),
        ("f", lambda a: a.astype(int) - 1, "must have vertices 0 to 143 in f, got -1"),
        ("f", lambda a: a + 0.5, "must have vertices 0 to 143 in f, got 0.5"),
        ("f", lambda a: a[:0], r"must have f of shape \(.*, 3\), got \(0, 3\)|numbers as f, got "),
        ("kintree_table", lambda a: a[:, :20], r"must have kintree_table of shape \(2, 24\), got \(2, 20\)"),
        ("kintree_table", lambda a: a[:, ::-1].copy(), "must have the tree of SMPL's 24 joints as kintree_table, got "),
        ("kintree_table", lambda a: np.roll(a, 1, 1), "must have the tree of SMPL's 24 joints as kintree_table, got "),
        ("weights", None, "must have v_template, .*, lacks weights"),
        ("weights", lambda a: np.array([None]), "must have an array of numbers as weights, got .*(Object arrays|O8)"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_what_is_no_smpl_body(tmp_path: Path, key: str, change: Callable | None, words: str, kind: str) -> None:
    arrays, path = small_man(), tmp_path / f"a.{kind}"
    values = {k: change(v) if k == key and change else v for k, v in arrays.items() if change or k != key}
    if kind == "npz":
        np.savez(path, **values)
    else:
        path.write_bytes(pickle.dumps(values, 2))
    with pytest.raises(ValueError, match=words) as caught:
        load_smpl(path)
    assert str(caught.value).startswith(f"path: {path} must have ") and str(caught.value).isprintable()


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pickle.dumps(small_man(around=1))
    reshape = {**small_man(around=1), "weights": Reshape(a=Ch(x=1), newshape=(24, 24))}
    for data, words in (
        (b"", "must be a whole .npz or .pkl, got '' as the opcode before byte 0"),
        (whole[:-1], "must be a whole .npz or .pkl, got '' as the opcode"),
        (whole[: len(whole) // 2], "must be a whole .npz or .pkl, got one with ValueError: expected"),
        (b"# OBJ file", "must be a whole .npz or .pkl, got '#' as the opcode before byte 1"),
        (b"PK\x03\x04", "must be a whole .npz or .pkl, got one with BadZipFile"),
        (pickle.dumps([1]), "must be a pickled dict, got list"),
        (dumps_as(monkeypatch, reshape, 2, chumpy=[Ch, Reshape]), "weights, got a chumpy.Reshape"),
    ):
        (tmp_path / "a.pkl").write_bytes(data)
        with pytest.raises(ValueError, match=words):
            load_smpl(tmp_path / "a.pkl")
    with open(tmp_path / "b.pkl", "wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(ValueError, match="b.pkl must have at most 1073741824 bytes, got 1073741825"):
        load_smpl(tmp_path / "b.pkl")
