"""The guard against moved scores sees what it should, and passes the commit it stands on."""

import json
from pathlib import Path

import guard
import pytest
from conftest import ROOT, Ran, run_here

import train_gpt as pg


@pytest.fixture(scope="module")
def ran(tiny_data, tmp_path_factory) -> Ran:
    return run_here(tmp_path_factory.mktemp("run"), tiny_data, TTT_ENABLED=0, ITERATIONS=2, WARMDOWN_ITERS=1)


def changed(ran: Ran, folder: Path, change_tensor=lambda stored: stored, **scores) -> Ran:
    """That run with another first matrix or other scores."""
    header, tensors = pg.unpack_artifact(ran.artifact)
    name = next(name for name, stored in tensors.items() if stored.scale is not None)
    tensors[name] = change_tensor(tensors[name])
    (folder / "artifact.pgolf").write_bytes(pg.pack_artifact(header, tensors, "lzma"))
    (folder / "result.json").write_text(json.dumps(ran.result | dict(scores=ran.result["scores"] | scores)))
    return ran._replace(folder=folder)


def test_one_code_one_scale_and_one_digit_of_a_score_are_differences(ran, tmp_path):
    def differences(**changes) -> list[str]:
        return list(guard.differences(ran, changed(ran, tmp_path, **changes)))

    assert differences() == []
    (said,) = differences(change_tensor=lambda stored: stored._replace(data=stored.data.roll(1)))
    assert said.endswith(" differs")
    (said,) = differences(change_tensor=lambda stored: stored._replace(scale=stored.scale * 1.001))
    assert said.endswith(" differs")
    label, score = next(iter(ran.result["scores"].items()))
    (said,) = differences(**{label: score | dict(val_loss=score["val_loss"] + 1e-12)})
    assert said.startswith("scores ")
    assert list(guard.differences(ran._replace(code=2), ran)) == ["exit codes 2 and 0"]


def test_a_fit_beside_another_header_may_move_within_its_window_and_packs(ran, tmp_path):
    def fitted(name: str, packs: int, left: int, **changes) -> Ran:
        (tmp_path / name).mkdir()
        log = tmp_path / name / "log.txt"
        log.write_text(
            "".join(f"fit:{k + 1} factor:1.0 …\n" for k in range(packs)) + f"fit:factor:1.000000 left:{left}\n"
        )
        other = changed(ran, tmp_path / name, lambda stored: stored._replace(data=stored.data.roll(1)), **changes)
        header, tensors = pg.unpack_artifact(other.artifact)
        header["architecture"]["xsa_last_n"] = 0 if name != "then" else header["architecture"]["xsa_last_n"]
        (tmp_path / name / "artifact.pgolf").write_bytes(pg.pack_artifact(header, tensors, "lzma"))
        return other._replace(log=log)

    label, score = next(iter(ran.result["scores"].items()))
    then = fitted("then", 2, 100)
    assert list(guard.differences(then, fitted("near", 2, 4000))) == []
    (said,) = guard.differences(then, fitted("more", 3, 100))
    assert said == "3 packs to fit, 2 before"
    (said,) = guard.differences(then, fitted("outside", 2, 5000))
    assert said == "5000 bytes left of the cap, 100 before"
    worse = {label: score | dict(val_loss=1.01 * score["val_loss"])}
    (said,) = guard.differences(then, fitted("worse", 2, 100, **worse))
    assert said.startswith("scores ")


def test_every_recipe_is_guarded_in_both_dtypes():
    named = guard.configurations([])
    for path in (ROOT / "records" / "recipes").glob("*.env"):
        assert {f"{path.stem} fp32", f"{path.stem} bf16"} <= named.keys()
    assert list(guard.configurations(["core"])) == ["core fp32", "core bf16"]


@pytest.mark.slow
def test_the_working_tree_passes_its_own_guard(capsys):
    assert guard.main("HEAD", ["core", "lora"]) == 0
    assert "guard: 8 of 8 runs equal to HEAD" in capsys.readouterr().out
