"""The check with --run: import a script on CPU, in a subprocess that holds it.

A copy of the folder, a temporary working folder, limits of time and memory, no environment, and no network where the
kernel allows it. The line it prints is that of the community's smoke test.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from records.submission.command import clean_text
from records.submission.foreign import MAX_FOLDER, Finding, Note, load
from records.submission.runs import number

RUN_SECONDS = 120
RUN_MEMORY = 16 << 30  # of addresses: torch alone maps several GiB
# The subprocess: gives up the network and sets its limits before anything foreign runs, then imports and reports. Where
# the kernel allows it, the import happens in a process namespace whose first process is ours: with that one all end,
# also what the script has detached from its group, and it ends with its parent.
IMPORTER = """
import ctypes, importlib.util, json, os, resource, sys, time
report, path, memory, seconds, preload = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
try:
    libc = ctypes.CDLL(None)
    offline = libc.unshare(0x10000000 | 0x40000000) == 0  # CLONE_NEWUSER | CLONE_NEWNET
    alone = offline and libc.unshare(0x20000000) == 0  # CLONE_NEWPID
except (OSError, AttributeError):
    offline = alone = False
for first in (True, False) if alone else ():
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if first and code > 128:
            os.kill(os.getpid(), code - 128)  # as the import ended
        os._exit(128 - code if code < 0 else code)
    if first:
        libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
for limit, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 1 << 26),
                    (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 256)):
    resource.setrlimit(limit, (most, most))
os.write(report, json.dumps({"offline": offline}).encode() + b"\\n")
try:
    if preload:
        import torch  # outside the clock, as the community's smoke test has it
except Exception:
    pass
sys.path.insert(0, os.path.dirname(path))
start = time.perf_counter()
try:
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds}
    settings = getattr(module, "Hyperparameters", None)
    for name in ("model_dim", "num_layers", "vocab_size"):
        if settings is not None and not hasattr(settings, name):
            settings = settings()
        found[name] = int(getattr(settings, name)) if hasattr(settings, name) else None
except BaseException as error:
    found = {"error": f"{type(error).__name__}({str(error)[:200]!r})"}
os.write(report, json.dumps(found).encode() + b"\\n")
os._exit(0)
"""


def check_run(folder: Path) -> list[Finding]:
    """Import the script on CPU: a copy of the folder, limits, no environment, no network where the kernel allows it."""
    s = load(folder)
    if s.script is None:
        return [Finding("run", "skip", s.found_script[1])]
    if sum(s.files.values()) > MAX_FOLDER:
        return [Finding("run", "FAIL", f"not imported: the folder has more than {MAX_FOLDER:,} bytes")]
    with tempfile.TemporaryDirectory(prefix="check_run_") as place:
        copy, work = Path(place, "folder"), Path(place, "work")
        work.mkdir()
        for name in s.files:  # plain files only: a link would lead out
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(s.read(name, MAX_FOLDER))
        preload = any("import torch" in layer for layer in s.layers.layers)
        lines, ended = import_there(copy / s.found_script[0], work, preload)
    notes = []
    first, last = (lines[0] if lines else {}), (lines[-1] if len(lines) > 1 else {})
    if first.get("offline") is not True:
        notes.append(Note("warn", "the kernel did not allow to cut off the network"))
    if "error" in last or number(last.get("seconds")) is None:
        notes.append(Note("FAIL", f"IMPORT_FAIL error={last.get('error', ended)}"))
    else:
        sizes = dict(dim="model_dim", layers="num_layers", vocab="vocab_size")
        shown = [f"{name}={last.get(key)}" for name, key in sizes.items()]
        smoke = f"import OK in {last['seconds']:.2f}s, {', '.join(shown)}, code={len(s.script)} B, SMOKE_TEST_PASS"
        notes.append(Note("pass", smoke))
        if None in map(last.get, sizes.values()):
            notes.append(Note("warn", "Hyperparameters lacks model_dim, num_layers or vocab_size"))
    return [Finding("run", note.level, clean_text(note.what)) for note in notes]


def import_there(script: Path, work: Path, preload: bool) -> tuple[list[dict], str]:
    """(what the subprocess reported, how it ended). `preload` imports torch before the script and its clock."""
    (reader, writer), seconds = os.pipe(), RUN_SECONDS
    numbers = [str(value) for value in (RUN_MEMORY, seconds, int(preload))]
    command = [sys.executable, "-I", "-B", "-c", IMPORTER, str(writer), str(script), *numbers]
    environment = {"HOME": str(work), "TMPDIR": str(work), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
    try:
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        options = dict(cwd=work, env=environment, pass_fds=(writer,), start_new_session=True)
        process = subprocess.Popen(command, **options, **silent)
    finally:
        os.close(writer)
    try:
        code = process.wait(timeout=seconds)
        ended = f"ended with exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    except subprocess.TimeoutExpired:
        ended = f"not imported after {seconds} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
    os.set_blocking(reader, False)
    with open(reader, "rb") as file:
        data = (file.read(65536) or b"").decode("utf-8", "replace")
    reports = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            reports += [value] if isinstance(value, dict) else []
    return reports, ended
