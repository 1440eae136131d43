"""`pack`: the packed script is the script, in fewer bytes."""

import argparse
import ast
import base64
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import linecache
import lzma
import re
import sys
import sysconfig
import traceback
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from records.submission import pack, unpack

TRAIN = ROOT / "train_gpt.py"


def command(*arguments) -> int:
    parser = argparse.ArgumentParser()
    pack.add_arguments(parser)
    return pack.run(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Import a source from a file of its own."""
    numbers = iter(range(99))

    def load(source: bytes):
        name = f"packed_sample_{next(numbers)}"
        path = tmp_path / f"{name}.py"
        path.write_bytes(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


# ----------------------------------------------------------------------------------------------------------------------
# Stripping
# ----------------------------------------------------------------------------------------------------------------------

# name -> a script that leaves its answer in RESULT
SCRIPTS = {
    "docstrings": '''
"""Module."""
class A:
    """Class."""
    "attribute"; x = 1; "another"
    def only(self): "one line"
    def also(self):
        """Docstring."""
    async def third(self):
        """Docstring."""  # comment
        "not a docstring"
def f(): "doc"; return 3
if True: "a string in an if"
else:
    "and in its else"
RESULT = [A().only(), A().also(), A.x, f(), A.__name__]
''',
    "f-strings": r"""
d, w, x = {"a": {"b": "ä"}}, 9, 3.14159
RESULT = [f"{d['a']["b"[:]]!r:>{w}}" if False else f"{d['a']['b']!r:>{w}}", f"{x:.{2}f}{{}}", f'{"a" "b"}' f"{x=}",
          rf"\{w}", f'''{
    w + 1}
  kept   spacing # no comment''', f"{'#'}" "# no comment", "" "" 'x', f"{w:{'>'}{10}}", (lambda: f"{w}")()]
""".replace("""d['a']["b"[:]]""", "d['a']['b'[:]]"),
    "decorators": """
import contextlib, functools
def shout(f):
    @functools.wraps(f)
    def g(*a: int, **k: str) -> str: return f(*a, **k) + "!"
    return g
@shout
@functools.lru_cache(maxsize=None)
def f(a: "int" = 1, /, b: (int) = 2, *rest: tuple, c: dict[str, int] | None = None, **k) -> (
    "a string"
): return f"{a}{b}{rest}{c}"
class P:
    @property
    def x(self) -> int: return 7
    @x.setter
    def x(self, v: int) -> None: self.y = v
    @staticmethod
    def s(a: int) -> int: return a
@contextlib.contextmanager
def m() -> None: yield 5
p = P(); p.x = 3
with m() as five: RESULT = [f(), f(4, 5), p.x, p.y, P.s(2), five]
""",
    "dataclasses": '''
import dataclasses
from typing import ClassVar, NamedTuple, TypedDict
@dataclasses.dataclass(frozen=True)
class D:
    """What D is."""
    x: int = 3
    y: "float" = dataclasses.field(default=2.0, metadata={"doc": "y"})
    z: ClassVar[int] = 9
    if True:
        w: str = "in an if"
class N(NamedTuple):
    """What N is."""
    a: int
    b: str = "b"
class T(TypedDict):
    k: int
RESULT = [D(), D(4) == D(4), [f.name for f in dataclasses.fields(D)], D.__module__ == __name__, N(1), N._fields,
          list(T.__annotations__)]
RESULT[0] = dataclasses.asdict(RESULT[0])
''',
    "async": """
import asyncio
async def gen(n: int) -> "AsyncIterator[int]":
    for i in range(n):
        yield i
async def main() -> list:
    "doc"
    async with asyncio.Lock() as _: found = [i async for i in gen(3)]
    return await asyncio.sleep(0, found)
RESULT = asyncio.run(main())
""",
    "match": """
def f(x: object) -> str:
    match x:
        case {"a": [1, *rest]}: return f"rest {rest}"
        case -1 | 0: return "small"
        case str() as s if s: return s
        case (1, 2): return "pair"
        case _: "nothing"
RESULT = [f(v) for v in ({"a": [1, 2]}, -1, "s", (1, 2), None)]
match = 3; case = match; RESULT.append(case)
""",
    "annotated names": """
x: int = 1
y: "str"
(z): int = 2
a: tuple = 1, 2
class Box: pass
def f(q: int = 3):
    n: int
    def g():
        nonlocal n
        n = 4
    g()
    box = Box()
    box.v: int = 5
    box.u: int
    d = {}
    d["k"]: list[int] = [6]
    return n, box.v, d, q
def unbound():
    x: int
    return x
try: unbound()
except UnboundLocalError: RESULT = ["local"]
RESULT += [x, z, a, f()]
""",
    "string annotations": """
from __future__ import annotations
import dataclasses
@dataclasses.dataclass
class D:
    x: Undefined = 1
def f(a: AlsoUndefined) -> Nowhere: return a
RESULT = [D().x, f(2)]
""",
    "annotations that are read": """
import inspect, typing, functools
def f(a: int, b: "str" = "") -> float: "doc"
class C:
    k: int
@functools.singledispatch
def g(x): return "any"
@g.register
def _(x: int): return "int"
RESULT = [str(inspect.signature(f)), {k: v.__name__ for k, v in typing.get_type_hints(f).items()}, g(1), g("")]
""",
    "annotations that an unknown decorator reads": """
kinds = {}
def kernel(f):
    kinds[f.__name__] = list(vars(f)["__annot" + "ations__"] if "x" in vars(f) else f.__code__.co_varnames); return f
def typed(f): return lambda *a: [t(x) for t, x in zip(getattr(f, "__annot" "ations__").values(), a)]
@typed
def h(a: int, b: str): pass
RESULT = h("1", 2)
""",
    "docstrings that are read": '''
"""The module's."""
def f():
    """The function's."""
class C:
    "The class's."
    "not its"
RESULT = [__doc__, f.__doc__, C.__doc__]
''',
    "tokens that must not touch": """
x = 1 .real
y = 1. if x else 2
RESULT = [x, y, 0xfor 1, 1 if x else 3, not - - 1, [*range(2)], "a" "b", '' 'x', "" "", 5 // 2, x <  - 1, ..., *(1, 2)]
RESULT += [lambda: 0, lambda *a, **k: 1][:0] + [x if x else.5, (yield_ := 3), [i for i in(1, 2)if i in[1]]]
""".replace("0xfor 1", "0xf or 1"),
    "lines": """
import sys; from os import (
    path,  # comment
    sep,
)
x = [1,
     2] + \\
    [3]; y = 4;
if x: z = 5; w = 6
for i in x:
\tif i == 2:

        # a comment at another depth
\t\tcontinue
\telse: pass
else:
    z += 1
text = '''  kept
\tas it is   # really

'''
RESULT = [x, y, z, w, text, i]
""",
    "unicode": 'é = "ü\\u2028\x0c"; ñ: str = é  # ö\ndef f(ä: int, b: "ß" = 3) -> "ô": return ä\nRESULT = é, ñ, f(1)\n',
    "crlf": 'x = """a\r\nb"""\r\ndef f(a: int) -> int:\r\n    "doc"\r\n    return a\r\nRESULT = [x, f(1)]\r\n',
    "latin-1": "# coding: latin-1\nRESULT = 'é'  # ü\n",
    "nothing": '"""Only a docstring."""\nRESULT = None\n',
}


def encoded(name: str) -> bytes:
    return SCRIPTS[name].encode("latin-1" if name == "latin-1" else "utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_packed_script_does_what_the_script_does(name, load):
    source = encoded(name)
    assert load(pack.pack(source)).RESULT == load(source).RESULT


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_left_to_strip(name):
    stripped = pack.strip(encoded(name))
    assert "#" not in re.sub(r"#'|# no comment|# really", "", stripped)
    assert pack.strip(stripped.encode()) == stripped
    ast.parse(stripped, feature_version=(3, 10))


def test_what_goes_and_what_stays():
    source = b'''
import dataclasses, triton
"""Module."""
@dataclasses.dataclass
class D:
    """Class."""
    x: int = 1  # comment
    def f(self, a: int, *b: str, c: "float" = 0.0, **d: dict) -> list[int]:
        """Function."""
        n: int = 3
        m: int
        return [n]
@triton.jit
def kernel(p, SIZE: tl.constexpr) -> None: pass
'''
    assert pack.strip(source).splitlines() == [
        "import dataclasses,triton",
        "@dataclasses.dataclass",
        "class D:",
        " x:int=1",
        " def f(self,a,*b,c=0.0,**d):",
        "  n=3",
        "  m:0",
        "  return[n]",
        "@triton.jit",
        "def kernel(p,SIZE:tl.constexpr)->None:pass",
    ]


def test_every_module_of_the_standard_library_keeps_its_tree():
    """Against a second implementation of what may go. The smaller files: each takes a moment."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.stat().st_size)
    for path in files[20:120:4]:
        source = path.read_bytes()
        assert unpack.same_program(source.decode(), pack.strip(source)) is True, path.name


STATEMENTS = st.recursive(
    st.sampled_from(
        ["x=1", "'text'", "x:int=2", "y:int", "pass", "x = 1;'s'", "def f(a:int)->int:'d'", "z=f'{x!r:>{3}}'", "# c"]
    ),
    lambda inner: st.tuples(
        st.sampled_from(
            ["if x:", "def g(a: int = 1, *, b) -> str:", "class C(object):", "for i in[]:", "async def h():"]
        ),
        st.lists(inner, min_size=1, max_size=4),
    ).map(lambda pair: "\n".join([pair[0], *("  " + line for p in pair[1] for line in p.split("\n")), "  pass"])),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STATEMENTS, max_size=6).map("\n".join))
def test_any_nesting_is_stripped_to_the_tree_it_should_have(source):
    stripped = pack.strip(source.encode())  # compares the trees itself
    kept = [node for node in ast.walk(ast.parse(stripped)) if isinstance(node, ast.Expr)]
    assert kept == [] and pack.strip(stripped.encode()) == stripped


def test_a_text_that_does_not_say_what_the_tree_says_is_refused(monkeypatch):
    monkeypatch.setattr(pack, "must_stand_apart", lambda a, b: False)
    for source in (b"x = not y\n", b"x = a is b\n"):  # another program; no program
        with pytest.raises(pack.PackError, match="cannot be stripped"):
            pack.strip(source)


@pytest.mark.parametrize("source", [b"x = (", b"def f(:\n pass", b"\0", b"\xff\xfe", b"  x\n y\n", b"(" * 9999])
def test_what_is_no_python_is_one_error_line(source, tmp_path, capsys):
    (tmp_path / "x.py").write_bytes(source)
    assert command(tmp_path / "x.py") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.py"]


# ----------------------------------------------------------------------------------------------------------------------
# The packed file
# ----------------------------------------------------------------------------------------------------------------------


def test_the_file_of_the_packed_script_is_the_packed_file(load):
    source = b"from pathlib import Path\nclass A: pass\nBYTES = Path(__file__).read_bytes()\n" + b"# filler\n" * 99
    packed = pack.pack(source)
    module = load(packed)
    assert packed == module.BYTES and len(packed) < len(source)
    assert module.A.__module__ == module.__name__ and module.__doc__ is None
    packed.decode("ascii")  # the log holds it as text


def test_tracebacks_and_inspect_see_the_lines_that_run(load):
    source = b'''
class A:
    def f(self):
        """Doc."""
        return 1
def fails():
    x = 1
    raise ValueError(x)
'''
    module = load(pack.pack(source))
    assert inspect.getsource(module.fails) == "def fails():\n x=1\n raise ValueError(x)\n"
    assert inspect.getsource(module.A) == "class A:\n def f(self):\n  return 1\n"
    linecache.checkcache()
    with pytest.raises(ValueError) as caught:
        module.fails()
    assert traceback.extract_tb(caught.value.__traceback__)[-1].line == "raise ValueError(x)"


@pytest.mark.parametrize("size, codec", [(1, "zlib"), (1500, "lzma")])
def test_the_smaller_of_both_compressors_is_taken(size, codec):
    lines = "".join(f"x{i} = {i * 7919 % 10007} + x{i * 31 % 97}\n" for i in range(size))
    packed = pack.pack(lines.encode())
    assert packed.startswith(f"import base64,linecache,{codec}\n".encode())
    assert pack.unpack(packed).decode() == pack.strip(lines.encode())


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"print()\n",
        pack.STUB.format(codec="lzma", payload='no base85 "').encode(),
        pack.STUB.format(codec="lzma", payload="0000").encode(),
        pack.STUB.format(codec="zlib", payload=base64.b85encode(lzma.compress(b"x")).decode()).encode(),
        pack.pack(b"x = 1\n") + b"y = 2\n",
    ],
)
def test_only_what_pack_made_is_unpacked(other):
    assert pack.unpack(other) is None


# ----------------------------------------------------------------------------------------------------------------------
# The project's own script
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_train(tmp_path_factory) -> Path:
    """train_gpt.py, packed by the command in a folder of its own."""
    out = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    assert command(TRAIN, "-o", out) == 0
    return out


def test_packing_is_deterministic_and_reported(packed_train, tmp_path, capsys):
    assert command(TRAIN, "-o", tmp_path / "again.py") == 0
    data, source = (tmp_path / "again.py").read_bytes(), TRAIN.read_bytes()
    assert data == packed_train.read_bytes()
    stripped = len(pack.unpack(data))
    out = capsys.readouterr().out
    assert f"source_bytes:{len(source)} stripped_bytes:{stripped} packed_bytes:{len(data)}\n" in out
    assert f"sha256:{hashlib.sha256(data).hexdigest()}\n" in out
    assert len(data) < 0.3 * len(source)
    worth = f"{len(source):,} bytes raw, {len(data):,} packed; the difference of {len(source) - len(data):,} is 1."
    assert worth in out and " % of the 16,000,000 bytes, or about " in out


def test_what_packing_is_worth_is_one_line():
    assert pack.worth(282_110, 64_110) == (
        "worth: the file that runs counts: 282,110 bytes raw, 64,110 packed; "
        "the difference of 218,000 is 1.4 % of the 16,000,000 bytes, or about 290,000 more int6 weights"
    )
    assert "difference of 6 is 3.7e-05 % of" in pack.worth(1006, 1000) and "about 8 more" in pack.worth(1006, 1000)
    assert pack.worth(1000, 1300) == "worth: nothing, packed it is 300 bytes larger; run the source"


def test_a_script_too_short_to_pack_is_told_so(tmp_path, capsys):
    (tmp_path / "short.py").write_text("print(1)\n")
    assert command(tmp_path / "short.py") == 0
    assert "worth: nothing, packed it is" in capsys.readouterr().out


def test_the_packed_script_offers_what_reviewers_read(packed_train, load):
    module = load(packed_train.read_bytes())
    hp = module.Hyperparameters
    assert (hp.model_dim, hp.num_layers, hp.vocab_size) == (512, 11, 1024)
    assert hp.__module__ == module.__name__ and dataclasses.asdict(hp())["iterations"] == 9000
    ast.parse(pack.unpack(packed_train.read_bytes()), feature_version=(3, 10))


def test_the_packed_script_makes_the_same_run(tmp_path, capsys):
    assert command(TRAIN, "-o", tmp_path / "train_gpt.py", "--prove") == 0
    out = capsys.readouterr().out
    proof = re.search(r"^prove pass artifact_sha256:[0-9a-f]{64} steps:12 legal_ttt val_bpb:\d\.\d{8}", out, re.M)
    assert proof is not None and (tmp_path / "train_gpt.py").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Proofs that fail
# ----------------------------------------------------------------------------------------------------------------------

ENDS = "import hashlib,json,os\nfrom pathlib import Path\ncode=Path(__file__).read_bytes()\n"
ENDS += "result=dict(steps=3,artifact_sha256='a',code_sha256=hashlib.sha256(code).hexdigest(),bytes_code=len(code),"
ENDS += "headline=dict(label='x',val_bpb=1.5),train_seconds=os.getpid())\n"


@pytest.fixture
def prove(tmp_path, tiny_data, capsys):
    """(exit code, stdout, stderr) of packing a small script with its proof."""

    def prove(source: str) -> tuple[int, str, str]:
        (tmp_path / "small.py").write_text(source)
        code = command(tmp_path / "small.py", "--prove", "--data", tiny_data)
        return code, *capsys.readouterr()

    return prove


def test_what_belongs_to_the_run_may_differ(prove, tmp_path):
    code, out, err = prove(ENDS + "print('result', json.dumps(result))\n")
    assert (code, err) == (0, "") and out.startswith("prove pass artifact_sha256:a steps:3 x val_bpb:1.5")
    assert (tmp_path / "small_packed.py").exists()


@pytest.mark.parametrize(
    "line, said",
    [
        ("result['steps']=len(open(__file__).readlines())", "steps is "),
        ("result['artifact_sha256']=str(b'# x' in code)  # x", "artifact_sha256 is True and packed False"),
        ("if b'# x' in code: result['scores']=1  # x", "scores is 1 and packed None"),
        ("result['bytes_code']=5", "packed states bytes_code 5"),
        ("result['code_sha256']='0'", "packed states code_sha256 0"),
    ],
)
def test_any_other_difference_is_a_failure_and_nothing_is_written(line, said, prove, tmp_path):
    code, out, err = prove(f"{ENDS}{line}\nprint('result', json.dumps(result))\n")
    assert (code, err) == (1, "") and f"prove FAIL {said}" in out
    assert not (tmp_path / "small_packed.py").exists()


@pytest.mark.parametrize(
    "source, said",
    [
        (
            "raise SystemExit('error: no such thing')",
            "the original script ended with exit code 1: error: no such thing",
        ),
        ("print('done')", "does not end with a `result` line"),
    ],
)
def test_a_run_that_proves_nothing_is_an_error(source, said, prove):
    code, out, err = prove(source)
    assert (code, out) == (2, "") and err.startswith("error: ") and said in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def test_files_that_are_no_packed_script_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "a_packed.py").write_text("mine\n")
    assert command(tmp_path / "a.py") == 2 and (tmp_path / "a_packed.py").read_text() == "mine\n"
    assert command(tmp_path / "a.py", "-o", tmp_path / "a.py") == 2
    assert command(tmp_path / "a.py", "-o", tmp_path / "b.py") == 0
    assert command(tmp_path / "a.py", "-o", tmp_path / "b.py") == 0, "its own product is"
    assert command(tmp_path / "b.py") == 2 and command(tmp_path / "absent.py") == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == errors.count("\n") == 4
    assert "b.py is packed already" in errors and "absent.py: No such file or directory" in errors


def test_data_without_a_tokenizer_is_an_error(tmp_path, capsys):
    (tmp_path / "a.py").write_text("x = 1\n")
    assert command(tmp_path / "a.py", "--prove", "--data", tmp_path) == 2
    assert "holds 0 tokenizers" in capsys.readouterr().err


def test_the_tiny_configuration_names_only_settings():
    import train_gpt

    hp = train_gpt.Hyperparameters.from_env(pack.TINY)
    assert {name for name in pack.TINY if not hasattr(hp, name.lower())} == set()
    assert json.loads(json.dumps(pack.TINY)) == pack.TINY


def test_the_checker_reads_what_was_packed():
    source = "# a comment\nimport math\n\n\ndef area(r):\n    return math.pi * r * r\n\n\nprint(area(2))\n"
    layers = unpack.unwrap(pack.pack(source.encode()).decode()).layers
    assert len(layers) == 2 and unpack.same_program(layers[-1], source)
