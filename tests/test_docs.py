"""What the pages say is so: links, commands, log lines, recipes, sections."""

import dataclasses
import functools
import importlib.util
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT, TINY_ENV, run_here
from helpers import TINY, random_tokens, randomize

import train_gpt as pg
from records import submit

PAGES = [
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("records/**/*.md"))
    if not re.match(r"\d{4}-\d\d-\d\d_", path.parent.name)  # records, which are left as they were made
]
README = (ROOT / "README.md").read_text("utf-8")
SETTINGS = {f.name.upper() for f in dataclasses.fields(pg.Hyperparameters)}
NOT_OF_THE_SCRIPT = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "REAL_TEXT_DIR", "GLOO_SOCKET_IFNAME"}


def blocks(text: str, language: str = "") -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for named, block in fences if named == language]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as web pages of repositories name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """The command lines of a page's blocks, in words, without comments; continued lines are one."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [re.split(r"\s{3,}|\s# ", line.strip())[0] if " --" not in line else line for line in lines]
    return [shlex.split(line, comments=True) for line in found if re.search(r"\b(python|torchrun|make|pip)\b", line)]


def test_the_readme_is_two_screens():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links {target}"
        assert not anchor or anchor in anchors(file.read_text("utf-8")), f"{page} links {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    for name in re.findall(
        r"`((?:records|data|tests|logs|quantization|hardware)/[\w./-]*)`", (ROOT / page).read_text()
    ):
        if not name.startswith(("data/datasets", "data/tokenizers")) and name not in ("logs/", "logs/quantization/"):
            here = [folder / name for folder in (ROOT, ROOT / "records", (ROOT / page).parent)]
            assert any(path.exists() for path in here), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one(page):
    """Its files, settings, options, make's targets; that each does what the page says is for the tests of its tool."""
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands((ROOT / page).read_text("utf-8")):
        for word in words[: words.index("python") if "python" in words else None]:
            if name := re.match(r"([A-Z][A-Z0-9_]+)=", word):
                assert name[1] in SETTINGS | NOT_OF_THE_SCRIPT, words
        if words[0] == "make":
            assert words[1] in targets, words
        scripts = [i for i, word in enumerate(words) if word.endswith(".py") and word != "packed.py"]
        if not scripts:
            continue
        script, rest = ROOT / words[scripts[0]], words[scripts[0] + 1 :]
        source = script.read_text("utf-8")
        if script.name == "submit.py":
            source = (ROOT / "records" / "submission" / f"{submit.COMMANDS[rest[0]].module}.py").read_text("utf-8")
        elif script.name in ("experiment.py", "prepare.py"):
            assert f'"{rest[0]}"' in source, words
        for option in (word for word in rest if re.match(r"--\w", word)):
            assert f'"{option}"' in source, f"{page}: {option} of {words}"


def test_the_recipes_are_those_of_the_table():
    table = re.findall(r"^\| `(records/recipes/\w+\.env)` \|", README, re.MULTILINE)
    assert sorted(table) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "records" / "recipes").glob("*"))


def test_the_sections_of_the_script_are_those_of_the_table():
    source = (ROOT / "train_gpt.py").read_text("utf-8")
    banners = [banner.split(":")[0] for banner in re.findall(r"^# -+\n# (.*)\n# -+$", source, re.MULTILINE)]
    table = README.split("| to change | section |")[1].split("\n\n")[0]
    named = [name for cell in re.findall(r"\| ([^|]*) \|$", table, re.MULTILINE) for name in cell.split(", ")]
    unchanged = {"Runtime", "Checkpoints", "Main"}
    assert [name for banner in banners for name in named if banner.startswith(name)] == named
    assert {banner for banner in banners if not any(banner.startswith(name) for name in named)} == unchanged


@pytest.fixture(scope="module")
def ran(tiny_data, tmp_path_factory):
    return run_here(tmp_path_factory.mktemp("ran"), tiny_data, TRAIN_LOG_EVERY=1, SWA_ENABLED=0)


def test_a_run_prints_the_lines_that_matter(ran):
    (block,) = [block for block in blocks(README) if "legal_ttt_exact" in block]
    lines = [line.split("   ")[0] for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        pattern = re.escape(line).replace("…", ".*")
        pattern = re.sub(r"(?<=[:/ ])[\d\\.]+(?=ms|\\ |/|$)", r"[\\d.]+", pattern)
        assert re.search(rf"^{pattern}\s*$", ran.out, re.MULTILINE), line


def test_the_artifact_loads_in_the_lines_of_the_readme(ran):
    (lines,) = blocks(README, "python")
    names = {}
    exec(lines.replace("runs/ID/artifact.pgolf", str(ran.folder / "artifact.pgolf")), names)
    assert isinstance(names["model"], pg.GPT) and names["hp"].model_dim == 32 and names["header"]["kind"] == "artifact"


def test_every_command_of_the_tools_is_in_their_manual():
    manual = (ROOT / "records" / "README.md").read_text("utf-8")
    for name, command in submit.COMMANDS.items():
        assert f"submit.py {name} " in manual
        importlib.import_module(f"records.submission.{command.module}")


# ----------------------------------------------------------------------------------------------------------------------
# The guide "Add a technique"
# ----------------------------------------------------------------------------------------------------------------------

GUIDE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_the_tables_of_the_guide_are_in_the_script():
    for name in re.findall(r"^\| `([\w.]+)` \|", GUIDE, re.MULTILINE):
        functools.reduce(getattr, name.split("."), pg)


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """The script with the example's lines, imported from a file of its own."""
    (diff,) = blocks(GUIDE, "diff")
    source = (ROOT / "train_gpt.py").read_text("utf-8")
    for lines in (hunk.splitlines(True) for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]):
        old, new = ("".join(line[1:] for line in lines if line[0] != other) for other in "+-")
        assert source.count(old) == 1, f"the example no longer fits the script:\n{old}"
        source = source.replace(old, new)
    path = tmp_path_factory.mktemp("gated") / "train_gpt_gated.py"
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


def test_the_example_is_absent_when_off_and_the_identity_until_its_gate_opens(gated):
    off, on = (
        gated.GPT(gated.Hyperparameters(**TINY, mlp_gate=on), 16, gated.sdpa, torch.float32) for on in (False, True)
    )
    gates = {name: p for name, p in on.named_parameters() if name.endswith("mlp_gate")}
    assert len(gates) == 3 and {n for n, _ in on.named_parameters()} - gates.keys() == set(randomize(off).state_dict())
    on.load_state_dict(off.state_dict() | {name: torch.zeros(()) for name in gates})
    tokens = torch.from_numpy(random_tokens(16).astype(int))[None]
    assert torch.equal(on.logits(tokens), off.logits(tokens))
    with torch.no_grad():
        gates["blocks.1.mlp_gate"].fill_(2.0)
    assert (on.logits(tokens) - off.logits(tokens)).abs().max() > 1e-4


def test_the_example_is_trained_stored_and_read_back(gated, tiny_data, tmp_path):
    environ = TINY_ENV | dict(DATA_PATH=str(tiny_data), OUT_DIR=str(tmp_path), RUN_ID="gated", MLP_GATE="1")
    assert gated.main([], environ | dict(TTT_ENABLED="0", EVAL_STRIDE="0")) == 0
    model, hp, header = gated.load_model(tmp_path / "runs" / "gated" / "artifact.pgolf")
    assert hp.mlp_gate and all(float(block.mlp_gate.detach().abs()) > 1e-4 for block in model.blocks)
    assert ["blocks.0.mlp_gate", [], "fp32"] in header["tensors"]
    blob, _, _ = gated.read_artifact_file(tmp_path / "runs" / "gated" / "artifact.pgolf", "artifact")
    with pytest.raises(pg.ArtifactError, match="a setting that this version does not know: mlp_gate"):
        pg.unpack_artifact(blob)
