"""The checks of the script: it is the one that ran, Python 3.10 reads it, and what it imports is there."""

import ast
import contextlib
import functools
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from records.submission import unpack
from records.submission.foreign import Note, Submission

COMPANION_SOURCE = re.compile(r"train_gpt_(?:human|readable)\.py|\w+_decode\.py")
# What a script may import or compile.
CODE = re.compile(r"\.(?:py|pyx|c|cc|cpp|cxx|cu|cuh|h|hpp|rs|metal|so|ptx|cubin)$")
LOADERS = {"__import__", "import_module", "find_spec", "run_module"}
MAX_PACKAGES = 5  # within one another
MAX_SOURCES = 2_000_000  # characters of all layers and files of the source that are examined


def check_source(s: Submission) -> Iterator[Note]:
    """The script is the one that ran."""
    script, why = s.found_script
    if s.script is None:
        yield Note("skip", why)
        return
    sha = hashlib.sha256(s.script).hexdigest()
    text = unpack.decode(s.script).strip("\n")
    layers = {layer.strip("\n") for layer in s.layers.layers[1:]}
    sizes = {len(s.script), len(s.script.replace(b"\r\n", b"\n")), *(len(x.encode()) for x in s.layers.layers)}
    unproved = []
    for name, log in s.runs.items():
        if log.code_sha256 is not None:
            if log.code_sha256 != sha:
                other = f"sha256 {log.code_sha256[:16]}, here {sha[:16]}"
                yield Note("FAIL", f"{name} is the log of another script: {other}")
        elif log.source is not None:
            logged = log.source.replace("\r\n", "\n").strip("\n")
            if logged in layers:
                yield Note("warn", f"{name} holds the unpacked source of {script}, not {script} itself")
            elif logged != text:
                same = unpack.same_program(logged, text)
                what = "but for comments and annotations the source is that of"
                what = what if same else "is the log of another script than"
                difference = first_difference(logged, text)
                yield Note("warn" if same else "FAIL", f"{name}: {what} {script} ({difference})")
        elif log.bytes_source is not None and log.bytes_source not in sizes:
            stated = f"{log.bytes_source:,} bytes uncompressed, {script} has {len(s.script):,}"
            yield Note("FAIL", f"{name} is the log of another script: {stated}")
        elif not {log.bytes_source, log.bytes_code} & sizes:
            unproved.append(name)
        for message in log.undecided:
            if "source" in message or "code_sha256" in message:
                yield Note("FAIL" if "is not the one" in message else "warn", f"{name}: {message}")
    stated = s.meta.get("code_sha256")
    if isinstance(stated, str) and stated != sha:
        yield Note("FAIL", f"{s.json_name} states code_sha256 {stated[:16]}, {script} has {sha[:16]}")
    if len(unproved) == len(s.runs):
        said = f"{', '.join(unproved)} state neither a hash nor a fitting size of the source, nor hold it"
        yield Note("skip", said if unproved else f"no log to compare {script} with")
    elif unproved:
        yield Note("warn", f"{', '.join(unproved)}: nothing in them is of {script}")
    yield from check_companion(s)
    yield Note("pass", f"{script}, sha256 {sha[:16]}, compared with {len(s.runs)} logs")


def first_difference(a: str, b: str) -> str:
    lines = zip(a.split("\n"), b.split("\n"), strict=False)
    line = next((i for i, (x, y) in enumerate(lines, 1) if x != y), min(a.count("\n"), b.count("\n")) + 2)
    return f"first difference at line {line}"


def check_companion(s: Submission) -> Iterator[Note]:
    """A readable source beside a packed script is its source."""
    script = s.found_script[0]
    for name in s.files:
        if not COMPANION_SOURCE.fullmatch(Path(name).name) or name == script or name in beside(s):
            continue
        try:
            readable = unpack.decode_source(s.read(name))
        except (SyntaxError, OSError) as error:
            yield Note("FAIL", f"{name}: {error}")
            continue
        if any(unpack.same_program(readable, layer) for layer in s.layers.layers):
            yield Note("pass", f"{name} is the source of {script} but for comments, docstrings and annotations")
        elif s.ours:
            yield Note("FAIL", f"{name} is not the source of {script}")
        else:
            yield Note("warn", f"{name} is not shown to be the source of {script} (names or statements differ)")


# Modules that a run may need and that are no part of the folder.
INSTALLED = set(
    "torch numpy sentencepiece tqdm huggingface_hub zstandard brotli zstd flash_attn flash_attn_interface"
    " flash_attn_3 triton mamba_ssm causal_conv1d mlx tiktoken tokenizers transformers datasets einops scipy kernels"
    " ml_dtypes safetensors cutlass cuda pynvml psutil xformers bitsandbytes torchao wandb fla liger_kernel numba"
    " cupy requests yaml pandas matplotlib setuptools packaging torch_xla jax flax optax typing_extensions blosc2"
    " lz4 constriction torchvision fused_softcap_ce cutlass_evt_fusion lightning_fabric heavyball muon regex"
    " xxhash".split()
)
FRAGILE = set("flash_attn_interface flash_attn mamba_ssm mlx triton causal_conv1d brotli zstandard fla".split())


def python_of(s: Submission) -> tuple[int, int]:
    """The Python to judge the syntax by: ours runs on 3.10, others on what their logs state, or on the challenge's."""
    stated = [tuple(map(int, log.python.split("."))) for log in s.runs.values() if log.python]
    return (3, 10) if s.ours else min(stated, default=(3, 12))


def check_syntax(s: Submission) -> Iterator[Note]:
    """Every layer parses on the Python that ran it, and what it imports is there."""
    if s.script is None:
        yield Note("skip", s.found_script[1])
        return
    version = python_of(s)
    shown = ".".join(map(str, version))
    for name, source in sources(s):
        try:
            tree, problems = unpack.read_tree(source, version)
        except unpack.TooLong as error:
            yield Note("skip", f"{name}: not examined: {error.msg}")
            continue
        except SyntaxError as error:
            where = f"{name} line {error.lineno or 0}: {error.msg}"
            if version > sys.version_info[:2]:
                yield Note("skip", f"{where}: Python {shown} may read it, this one cannot: run check with {shown}")
            else:
                yield Note("FAIL", where)
            continue
        for problem in problems:
            yield Note("FAIL", f"{name} line {problem.line}: not Python {shown}: {problem.text}")
        yield from check_imports(s, name, tree)
    yield Note("pass", f"as Python {shown}")


@functools.lru_cache(1)
def sources(s: Submission) -> list[tuple[str, str]]:
    """(name, text) of every layer of the script and of the files of the folder that it imports or executes."""
    found, room = [], MAX_SOURCES
    for file, unwrapped in ({s.found_script[0]: s.layers} | beside(s)).items():
        for i, layer in enumerate(unwrapped.layers if unwrapped is not None else ()):
            name = file if i == 0 else f"{file}, unpacked ({i})"
            room -= len(layer)
            if room < 0:
                s.layers.problems.append(unpack.Problem(0, f"more than {MAX_SOURCES:,} characters, from {name} on"))
                return found
            found.append((name, layer))
    return found


@functools.lru_cache(1)
def beside(s: Submission) -> dict[str, unpack.Unwrapped | None]:
    """Code of the folder that runs with the script: what it imports, executes or compiles, and what that does. None
    for what is no Python, of which only the size counts."""
    script = s.found_script[0]
    if s.script is None:
        return {}
    found: dict[str, unpack.Unwrapped | None] = {}
    waiting = [(script, s.layers)]
    while waiting:
        user, unwrapped = waiting.pop(0)
        for name in used_by(s, user, unwrapped):
            if name in found or name == script:
                continue
            found[name] = None
            if name.endswith(".py") or name in unwrapped.files:
                with contextlib.suppress(OSError, SyntaxError):
                    text = unpack.decode_source(s.read(name))
                    found[name] = unpack.unwrap(text, functools.partial(s.read_for, name))
                    waiting.append((name, found[name]))
    return found


def used_by(s: Submission, user: str, unwrapped: unpack.Unwrapped) -> Iterator[str]:
    """Files of the folder that a script names: as a module, as what it executes, or as code in a constant."""
    here = Path(user).parent
    places = [here, Path(".")]
    wanted = [place / name for name in unwrapped.files for place in places]
    by_name: dict[str, list[str]] = {}
    for name in s.files:
        if CODE.search(name):
            by_name.setdefault(Path(name).name, []).append(name)
    for layer in unwrapped.layers:
        with contextlib.suppress(SyntaxError, RecursionError):
            for node in ast.walk(unpack.read_tree(layer)[0]):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    for module in modules(node):
                        path = module.replace(".", "/")
                        wanted += [place / f"{path}{end}" for place in places for end in (".py", "/__init__.py")]
                elif (text := unpack.text_of(node)) is not None and len(text) < 200:
                    yield from by_name.get(text.rpartition("/")[2], ())
                elif isinstance(node, ast.Call) and unpack.name_of(node.func) in LOADERS:
                    named = [unpack.text_of(part) for part in node.args]
                    wanted += [place / f"{name}.py" for name in named if name is not None for place in places]
    yield from (path.as_posix() for path in wanted if path.as_posix() in s.files)


def modules(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Dotted names of all that an import may bring from the folder, and the packages around them."""
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [node.module or "", *(f"{node.module or ''}.{name}".strip(".") for name in names)]
    for name in names:
        parts = name.split(".")[:MAX_PACKAGES]
        yield from (".".join(parts[: i + 1]) for i in range(len(parts)) if all(parts))


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """(top-level module, line, whether a missing one is provided for) of every import."""
    guarded: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and node.handlers:
            guarded |= {id(part) for statement in node.body for part in ast.walk(statement)}
        if isinstance(node, unpack.Function):
            guarded |= {id(part) for part in ast.walk(node)}  # imported when needed, not with the script
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno, id(node) in guarded
        elif isinstance(node, ast.ImportFrom):
            yield ("." if node.level else "") + (node.module or "").split(".")[0], node.lineno, id(node) in guarded


def check_imports(s: Submission, name: str, tree: ast.Module) -> Iterator[Note]:
    required = ""
    if "requirements.txt" in s.files:
        with contextlib.suppress(OSError):
            required = s.read("requirements.txt").decode("utf-8", "replace").lower().replace("-", "_")
    place = Path(name.partition(",")[0]).parent
    for module, line, guarded in imports(tree):
        here = module.lstrip(".")
        roots = {(folder / here).as_posix() for folder in (place, Path("."))}
        if any(f"{root}.py" in s.files or any(f.startswith(f"{root}/") for f in s.files) for root in roots):
            continue
        if module.startswith("."):
            yield Note("FAIL", f"{name} line {line}: imports {module}, which the folder lacks")
        elif module in sys.stdlib_module_names or here.lower() in required or guarded and module in INSTALLED:
            continue
        elif module in FRAGILE:
            yield Note("warn", f"{name} line {line}: needs {module} to be imported at all")
        elif module not in INSTALLED:
            text = f"{name} line {line}: imports {module}, which is no file of the folder and in no requirements.txt"
            yield Note("warn" if guarded else "FAIL", text)
