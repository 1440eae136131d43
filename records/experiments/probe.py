"""What a version of train_gpt.py makes of settings, asked in a process of its own: python probe.py SCRIPT < environs.

Reads a JSON list of environments (name: text). Prints {"sections": {NAME: section}, "machine", "torch", "environs":
[{"settings": {NAME: value}, "data": [training, validation, tokenizer]} or {"error": line}]}, settings being those that
differ from the script's defaults.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

NOT_THE_EXPERIMENT = {"run"}  # names, paths, intervals; but for what changes the arithmetic:
ARITHMETIC = {"DEVICE", "DTYPE", "COMPILE", "ATTENTION"}


def load(path: str):
    spec = importlib.util.spec_from_file_location("script", path)
    module = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def machine() -> str:
    """What computes: the GPUs, or the processor and its cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def main() -> None:
    script, environs = load(sys.argv[1]), json.load(sys.stdin)
    sections = {f.name.upper(): f.metadata["section"] for f in dataclasses.fields(script.Hyperparameters)}

    @functools.cache
    def data(*_: str) -> list[str]:
        validation = script.load_validation(hp)
        training = script.data_fingerprint(script.find_shards(hp, "train"))
        return [training[:16], validation.fingerprint[:16], validation.tokenizer_sha256[:16]]

    answers = []
    for environ in environs:
        try:
            hp = script.Hyperparameters.from_env(environ)
            answer = dict(data=data(hp.data_path, hp.tokenizer_path, hp.vocab_size))
        except script.UserError as error:
            answer = dict(error=str(error))
        else:
            changed = hp.changed().items()
            kept = {k: v for k, v in changed if sections[k] not in NOT_THE_EXPERIMENT or k in ARITHMETIC}
            answer["settings"] = kept
        answers.append(answer)
    version = str(getattr(sys.modules.get("torch"), "__version__", ""))
    print(json.dumps(dict(sections=sections, machine=machine(), torch=version, environs=answers)))


if __name__ == "__main__":
    main()
