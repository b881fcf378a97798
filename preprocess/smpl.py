"""The user's own SMPL file as a `Body`.

SMPL's official files are pickles of Python 2 with objects of chumpy, which no longer installs; and a pickle can name
any function to be called. So no file is unpickled here: `_parse` reads one into plain values and notes of what it would
have had made, calling nothing, and `_array` makes an array of a note that means one.
"""

import codecs
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from pickletools import opcodes
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import torch

from .body import NUM_BETAS, NUM_JOINTS, PARENTS, Body

FILES = (  # in a folder, in the order of preference
    "*SMPL_NEUTRAL*.npz", "*SMPL.npz", "*SMPL[!HX+]*.npz",  # not SMPL-H, SMPL-X
    "SMPL_NEUTRAL.pkl", "basicModel_neutral_lbs_10_207_0_v1.0.0.pkl", "basicmodel_neutral_lbs_10_207_0_v1.1.0.pkl",
    "neutral_smpl_with_cocoplus_reg.pkl", "SMPL_MALE.pkl", "SMPL_FEMALE.pkl", "basic[mM]odel_f_lbs_*.pkl",
    "basic[mM]odel_m_lbs_*.pkl",
)  # fmt: skip
SHAPES: dict[str, tuple[int | str, ...]] = {
    "v_template": ("V", 3),
    "shapedirs": ("V", 3, "S"),
    "posedirs": ("V", 3, 9 * (NUM_JOINTS - 1)),
    "J_regressor": (NUM_JOINTS, "V"),
    "kintree_table": (2, NUM_JOINTS),
    "weights": ("V", NUM_JOINTS),
    "f": ("F", 3),
}
MAX_BYTES = 2**30  # of a file; the largest official one has a quarter of it
MAX_NUMBERS = 2**24  # in an array; SMPL's largest has 6.2 million


def load_smpl(path: str | Path) -> Body:
    """The body of an SMPL file, named after the file's contents: an .npz or a .pkl, or a folder with one.

    The arrays are v_template (V,3), shapedirs (V,3,S) with S >= 10, of which the first ten are used, posedirs
    (V,3,207), J_regressor (24,V), kintree_table (2,24), weights (V,24) and f (F,3), in metres; V need not be 6890. A
    pickle may hold them as objects of chumpy or sparse matrices of SciPy; neither library is needed, and no code that a
    pickle names is run. In a folder, an .npz goes before a .pkl and a neutral body before a male or female one.

    Raises:
        FileNotFoundError: there is no such file. ValueError: the file is broken, is not SMPL's, or asks for more.

    Source: Loper et al., "SMPL: A Skinned Multi-Person Linear Model", 2015, and the files published with it.
    """
    file = _find(Path(path))
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"path: {file} must have at most {MAX_BYTES} bytes, got {size}")
    data = file.read_bytes()
    try:
        return _body(_read_npz(data) if data.startswith(b"PK") else _read_pickle(data), sha256(data).hexdigest())
    except _Refused as error:
        raise ValueError(f"path: {file} {error}") from None
    except Exception as error:  # a broken file can fail those who read it in any way
        raise ValueError(f"path: {file} must be a whole .npz or .pkl, got one with {_reason(error)}") from error


def _find(path: Path) -> Path:
    names = sorted(child.name for child in path.iterdir() if child.is_file()) if path.is_dir() else []
    found = [path / name for pattern in FILES for name in names if fnmatchcase(name, pattern)]
    if not found and not path.is_file():
        raise FileNotFoundError(f"path must be an SMPL file or a folder with one (SMPL_NEUTRAL.pkl, ..), got {path}")
    return found[0] if found else path


class _Refused(ValueError):
    """What the file must be and is not, to be read after its name."""


def _asks_for(what: str) -> _Refused:
    return _Refused(f"asks for {ascii(what)[1:-1][:100]}, which no SMPL file needs: refused, nothing was run")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(ascii(str(error))[1:-1].split())[:200]}"


def _body(arrays: dict[str, np.ndarray], digest: str) -> Body:
    sizes: dict[int | str, int] = {}
    for key, shape in SHAPES.items():
        array = arrays[key]
        fits = array.ndim == len(shape) and array.size > 0
        for side, n in zip(shape, array.shape, strict=False):  # a letter stands for the first number that it meets
            fits = fits and n == sizes.setdefault(side, n if isinstance(side, str) else side)
        if not fits:
            wanted = ", ".join(str(sizes.get(s, s)) for s in shape)
            raise _Refused(f"must have {key} of shape ({wanted}), got {array.shape}")
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32))
        if not finite.all():
            raise _Refused(f"must have {key} finite in float32, got {array[~finite][0]}")
    if sizes["S"] < NUM_BETAS:
        raise _Refused(f"must have shapedirs for at least {NUM_BETAS} betas, got {sizes['S']}")
    faces, tree, weights = arrays["f"], arrays["kintree_table"], arrays["weights"]
    wrong = faces[(faces < 0) | (faces >= sizes["V"]) | (faces != np.floor(faces))]
    if wrong.size:
        raise _Refused(f"must have vertices 0 to {sizes['V'] - 1} in f, got {wrong[0]:g}")
    # The root's parent is any number: -1, 2^32 - 1, ..
    if (tree[0, 1:] != PARENTS[1:]).any() or (tree[1] != range(NUM_JOINTS)).any():
        got = ", ".join(f"{number:.10g}" for number in tree.ravel())
        raise _Refused(f"must have the tree of SMPL's 24 joints as kintree_table, got {got}")
    total = weights.sum(1)
    row = int(np.abs(total - 1).argmax())
    if abs(total[row] - 1) > 1e-3:
        raise _Refused(f"must have weights that sum to 1 in each row, got {total[row]:g} in row {row}")
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return Body(
        tensors["v_template"],
        tensors["shapedirs"][..., :NUM_BETAS],
        tensors["f"],
        tensors["weights"],
        tensors["J_regressor"],
        list(PARENTS),
        tensors["posedirs"],
        f"smpl-{digest[:16]}",
    )


def _arrays(found: Mapping[str, Any], make: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of SMPL among what was found, each made of its entry, in float64."""
    if lacking := [key for key in SHAPES if key not in found]:
        raise _Refused(f"must have {', '.join(SHAPES)}, lacks {', '.join(lacking)}")
    arrays = {}
    for key in SHAPES:
        try:
            array = make(found[key])
        except Exception as error:
            reason = str(error) if isinstance(error, _Refused) else _reason(error)
            raise _Refused(f"must have an array of numbers as {key}, got {reason}") from error
        if array.dtype.kind not in "fiu" or array.size > MAX_NUMBERS:
            raise _Refused(f"must have at most {MAX_NUMBERS} numbers as {key}, got {array.size} of {array.dtype}"[:200])
        arrays[key] = np.array(array, np.float64, order="C")
    return arrays


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    with ZipFile(BytesIO(data)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        return _arrays(members, partial(_member, archive))


def _member(archive: ZipFile, info: ZipInfo) -> np.ndarray:
    # Neither numpy.load nor ZipFile.read stops at a size, and the other compressions make gigabytes out of a page.
    if info.file_size > 8 * MAX_NUMBERS + 2**16 or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise _Refused(f"{info.file_size} bytes by compression {info.compress_type}")
    with archive.open(info) as file:
        return np.lib.format.read_array(BytesIO(file.read(info.file_size)), allow_pickle=False)


# ---- Pickles

# SMPL's have some thousand opcodes. Each makes an object of some hundred bytes at most, beside what it copies from the
# file, so that these limits bound the memory too: about 1 GB for a small file, ten times its size for a large one. Not
# covered: what that is on a machine that has less.
MAX_OPCODES = 10**6

KNOWN = re.compile(
    r"numpy\.(ndarray|dtype|matrixlib\.defmatrix\.matrix"
    r"|_?core\.multiarray\.(_reconstruct|scalar)|_?core\.numeric\._frombuffer)"
    r"|(__builtin__|builtins)\.(object|set|bytes|bytearray)|collections\.OrderedDict|weakref\.WeakKeyDictionary"
    r"|_codecs\.encode|(copy_reg|copyreg)\._reconstructor|chumpy\.(\w+\.)*\w+|scipy\.sparse\.(\w+\.)*cs[cr]_(matrix|array)"
)
OPCODES = {opcode.code: opcode for opcode in opcodes}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(eq=False, slots=True)
class _Note:
    """What a pickle wants: a name, once it is called with what, and what the object's state would be then."""

    module: str
    name: str
    args: tuple | None = None
    state: Any = None

    def __str__(self) -> str:
        return f"a {self.module}.{self.name}"[:100]


def _parse(data: bytes) -> Any:
    """What a pickle would be, with notes in the place of all that it would have looked up, called or made.

    Sets become lists, and keys other than text are left out: to hash a tuple in tuples overflows the stack.
    """
    file = BytesIO(data)
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def fill(mapping: dict[str, Any] | _Note, items: list[Any]) -> None:
        if isinstance(mapping, dict):
            mapping.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if isinstance(k, str))

    for _ in range(MAX_OPCODES):
        if (code := file.read(1).decode("latin-1")) not in OPCODES:
            raise _Refused(f"must be a whole .npz or .pkl, got {ascii(code)} as the opcode before byte {file.tell()}")
        opcode = OPCODES[code]
        name = opcode.name
        if name == "STRING":  # the reader of pickletools takes ASCII alone, and Python 2 kept arrays in it
            arg: Any = codecs.escape_decode(file.readline().strip()[1:-1])[0].decode("latin-1")
        else:
            arg = opcode.arg.reader(file) if opcode.arg else None
        match name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME":
                pass
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE"
                | "BINUNICODE8" | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
            ):  # fmt: skip
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(CONSTANTS[name])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                start = len(stack) - int(name[-1])
                stack[start:] = [tuple(stack[start:])]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "LIST" | "FROZENSET":
                stack.append(above_mark())
            case "DICT":
                items = above_mark()
                stack.append({})
                fill(stack[-1], items)
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS" | "ADDITEMS":
                items = above_mark()
                stack[-1].extend(items)
            case "SETITEM":
                items = [stack.pop(-2), stack.pop()]
                fill(stack[-1], items)
            case "SETITEMS":
                items = above_mark()
                fill(stack[-1], items)
            case "POP" if marks and marks[-1] == len(stack):
                marks.pop()
            case "POP":
                stack.pop()
            case "POP_MARK":
                above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GLOBAL":
                stack.append(_look_up(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_look_up(stack.pop(-2), stack.pop()))
            case "REDUCE" | "NEWOBJ":
                args, made = stack.pop(), stack.pop()
                if not isinstance(made, _Note) or made.args is not None or not isinstance(args, tuple):
                    raise _asks_for(f"a call of {made if isinstance(made, _Note) else type(made).__name__}")
                kind = args[0] if made.name == "_reconstructor" else made
                if not isinstance(kind, _Note):
                    raise _asks_for(f"the making of a {type(kind).__name__}")
                stack.append(_Note(kind.module, kind.name, args))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], _Note) or stack[-1].args is None:
                    raise _asks_for(f"the state of {stack[-1] if isinstance(stack[-1], _Note) else 'a value'}")
                stack[-1].state = state
            case "INST":
                raise _asks_for(arg.replace(" ", "."))
            case _:
                raise _asks_for(f"{name} {arg}")
    raise _Refused(f"must have at most {MAX_OPCODES} opcodes as a pickle, got more")


def _look_up(module: Any, name: Any) -> _Note:
    full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "what has no name"
    if not KNOWN.fullmatch(full) or "." in name:
        raise _asks_for(full)
    return _Note(module, name)


def _read_pickle(data: bytes) -> dict[str, np.ndarray]:
    found = _parse(data)
    if not isinstance(found, dict):
        raise _Refused(f"must be a pickled dict, got {found if isinstance(found, _Note) else type(found).__name__}")
    return _arrays(found, _array)


def _array(value: Any) -> np.ndarray:
    """The array that a note means: NumPy's own, an expression of chumpy's, or a sparse matrix of SciPy's."""
    if not isinstance(value, _Note):
        raise _Refused(f"a {type(value).__name__}")
    match value.module.partition(".")[0], value.name:
        case "numpy", "_reconstruct":
            _, shape, dtype, fortran, content = value.state
            return _plain(content, dtype, shape, "F" if fortran else "C")
        case "numpy", "_frombuffer":
            content, dtype, shape, order = value.args or ()
            return _plain(content, dtype, shape, order)
        case "chumpy", "Ch":
            return _array(value.state["x"])
        case "chumpy", "Select":
            chosen = _array(value.state["a"]).ravel()[_array(value.state["idxs"])]
            return chosen.reshape(value.state.get("preferred_shape", chosen.shape))
        case "chumpy", "transpose":
            return np.transpose(_array(value.state["a"]), value.state.get("axes"))
        case "scipy", kind:
            return _dense(value.state, kind.startswith("csc"))
    raise _Refused(str(value))


def _plain(content: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> np.ndarray:
    if isinstance(content, _Note) and content.name == "encode" and content.args:  # Python 3's bytes for Python 2
        content = content.args[0]
    if isinstance(content, str):
        content = content.encode("latin-1")
    kind = dtype.state[1] + dtype.args[0]
    if not isinstance(kind, str) or not re.fullmatch(r"[<>=|](f[248]|[iu][1248])", kind):
        raise _Refused(f"numbers of type {ascii(kind)[:100] if isinstance(kind, str) else type(kind).__name__}")
    return np.frombuffer(content, kind).reshape(shape, order=order)


def _dense(state: dict[str, Any], by_column: bool) -> np.ndarray:
    rows, columns = state["_shape"] if "_shape" in state else state["shape"]
    values, places, ends = (_array(state[key]).ravel() for key in ("data", "indices", "indptr"))
    if not isinstance(rows, int) or not isinstance(columns, int) or not 0 <= rows * columns <= MAX_NUMBERS:
        raise _Refused("a sparse matrix of too many numbers")
    lines, width = (columns, rows) if by_column else (rows, columns)
    counts: np.ndarray = np.diff(ends.astype(np.int64))
    if len(counts) != lines or (counts < 0).any() or counts.sum() != len(values) or (places < 0).any():
        raise _Refused(f"a sparse matrix of ({rows}, {columns}) with {len(values)} values in {len(counts)} lines")
    out = np.zeros((lines, width))
    np.add.at(out, (np.repeat(np.arange(lines), counts), places), values)
    return out.T if by_column else out
