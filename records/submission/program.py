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

MAX_SOURCES = 2_000_000  # characters of all layers and files of the source that are examined


def check_source(s: Submission) -> Iterator[Note]:
    """The script is the one that ran."""
    if s.script is None:
        return
    sha, compared = hashlib.sha256(s.script).hexdigest(), 0
    text = s.script.decode("utf-8", "replace").replace("\r\n", "\n").strip("\n")
    layers = {layer.strip("\n") for layer in s.layers.layers[1:]}
    for name, log in s.runs.items():
        if log.code_sha256 is not None:
            compared += 1
            if log.code_sha256 != sha:
                yield Note(
                    "FAIL", f"{name} is the log of another script: sha256 {log.code_sha256[:16]}, here {sha[:16]}"
                )
        elif log.source is not None:
            compared += 1
            logged = log.source.replace("\r\n", "\n").strip("\n")
            if logged == text:
                continue
            if logged in layers:
                yield Note("warn", f"{name} holds the unpacked source of train_gpt.py, not train_gpt.py itself")
            else:
                same = unpack.same_program(logged, text)
                what = (
                    "but for comments and annotations the source is that of"
                    if same
                    else "is the log of another script than"
                )
                yield Note(
                    "warn" if same else "FAIL", f"{name}: {what} train_gpt.py ({first_difference(logged, text)})"
                )
        elif len(log.runs) == 1:
            yield Note("warn", f"{name} neither states a hash of its source nor holds it")
        for message in log.undecided:
            if "source" in message or "code_sha256" in message:
                yield Note("FAIL" if "is not the one" in message else "warn", f"{name}: {message}")
    stated = s.meta.get("code_sha256")
    if isinstance(stated, str) and stated != sha:
        yield Note("FAIL", f"{s.json_name} states code_sha256 {stated[:16]}, train_gpt.py has {sha[:16]}")
    yield from check_companion(s)
    if compared and compared == len(s.runs):
        yield Note("pass", f"train_gpt.py, sha256 {sha[:16]}, compared with {compared} logs")


def first_difference(a: str, b: str) -> str:
    lines = zip(a.split("\n"), b.split("\n"), strict=False)
    line = next((i for i, (x, y) in enumerate(lines, 1) if x != y), min(a.count("\n"), b.count("\n")) + 2)
    return f"first difference at line {line}"


def check_companion(s: Submission) -> Iterator[Note]:
    """A readable source beside a packed script is its source."""
    for name in s.files:
        if not re.fullmatch(r"train_gpt_human\.py|\w+_decode\.py|train_gpt_readable\.py", name) or not s.layers.layers:
            continue
        try:
            readable = unpack.decode_source(s.read(name))
        except (SyntaxError, OSError) as error:
            yield Note("FAIL", f"{name}: {error}")
            continue
        if any(unpack.same_program(readable, layer) for layer in s.layers.layers):
            yield Note("pass", f"{name} is the source of train_gpt.py but for comments, docstrings and annotations")
        elif s.ours:
            yield Note("FAIL", f"{name} is not the source of train_gpt.py")
        else:
            yield Note("warn", f"{name} is not shown to be the source of train_gpt.py (names or statements differ)")


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


def check_syntax(s: Submission) -> Iterator[Note]:
    """Every layer parses on Python 3.10, and what it imports is there."""
    for name, source in sources(s):
        try:
            tree, problems = unpack.read_tree(source)
        except unpack.TooLong as error:
            yield Note("warn", f"{name}: not examined: {error.msg}")
            continue
        except SyntaxError as error:
            yield Note("FAIL", f"{name} line {error.lineno or 0}: {error.msg}")
            continue
        for problem in problems:
            yield Note("FAIL", f"{name} line {problem.line}: not Python 3.10: {problem.text}")
        yield from check_imports(s, name, tree)


@functools.lru_cache(1)
def sources(s: Submission) -> list[tuple[str, str]]:
    """(name, text) of every layer of the script and of the files of the folder that it imports or executes."""
    found, room = [], MAX_SOURCES
    for name, text in read_sources(s):
        room -= len(text)
        if room < 0:
            s.layers.problems.append(unpack.Problem(0, f"more than {MAX_SOURCES:,} characters, from {name} on"))
            break
        found.append((name, text))
    return found


def read_sources(s: Submission) -> Iterator[tuple[str, str]]:
    files = [("train_gpt.py", s.layers)] if s.script is not None else []
    for name in siblings(s):
        with contextlib.suppress(OSError, SyntaxError):
            files.append((name, unpack.unwrap(unpack.decode_source(s.read(name)))))
    for name, unwrapped in files:
        for i, layer in enumerate(unwrapped.layers):
            yield name if i == 0 else f"{name}, unpacked ({i})", layer


def siblings(s: Submission) -> list[str]:
    """Files of the folder that the script executes by name or imports."""
    names = [Path(name).name for name in s.layers.files]
    for layer in s.layers.layers:
        with contextlib.suppress(SyntaxError):
            names += [f"{module}.py" for module, _, _ in imports(unpack.read_tree(layer)[0])]
    return [name for name in dict.fromkeys(names) if name in s.files and name != "train_gpt.py"]


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """(top-level module, line, whether a missing one is provided for) of every import."""
    guarded: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and node.handlers:
            guarded |= {id(part) for statement in node.body for part in ast.walk(statement)}
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
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
    for module, line, guarded in imports(tree):
        here = module.lstrip(".")
        if f"{here}.py" in s.files or any(file.startswith(f"{here}/") for file in s.files):
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
