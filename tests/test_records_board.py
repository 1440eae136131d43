"""The leaderboard: figures, order, what hostile logs and JSON files can do (nothing), and the page in a browser."""

import argparse
import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import records_corpus as corpus

from records.submission import board, foreign, runlog

LOGS = Path(__file__).resolve().parent.parent / "records" / "logs"
EVIL = (
    "<script>window.hacked=1</script>",
    "</script><img src=x onerror=window.hacked=2>",
    "<!-- <script>",
    "'\"><svg onload=window.hacked=3>",
    "javascript:window.hacked=4",
    "a | b | `c` \\| [d](javascript:alert(1)) ![e](http://127.0.0.1:9/e.png)",
    f"\x1b[31mred \x1b]0;title\x07 \u202egnp.exe\u202c \u200b\x00 {board.END} https://127.0.0.1:9/",
    "{{data}} {{policy}} ${window.hacked=5} \u2028 __proto__",
    "x" * 5000,
)


def pgolf(seed: int = 1337, bpb: float = 1.2, **changes) -> str:
    """A finished log whose headline has this val_bpb."""
    results = (*corpus.PGOLF_RESULTS[:2], corpus.Result("legal_ttt", bpb / corpus.BPB_PER_NAT, bpb))
    return corpus.pgolf(replace(corpus.run_of("pgolf"), seed=seed, results=results, **changes))


def folder(root: Path, name: str, bpbs: dict[int, float], place: str = "track_10min_16mb", **fields) -> Path:
    """A record folder with one log per seed."""
    path = root / place / name
    path.mkdir(parents=True)
    for seed, bpb in bpbs.items():
        (path / f"train_seed{seed}.log").write_text(pgolf(seed, bpb), "utf-8")
    mean = sum(bpbs.values()) / len(bpbs) if bpbs else None
    (path / "submission.json").write_text(json.dumps(dict(author="ada", date="2026-03-01", val_bpb=mean) | fields))
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    board.add_arguments(parser)
    return board.run(parser.parse_args([str(argument) for argument in arguments]))


def rows_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two tracks, a loose log, an unfinished one."""
    folder(tmp_path, "2026-03-01_core", {1: 1.2, 2: 1.21, 3: 1.19})
    folder(tmp_path, "2026-03-02_better", {1: 1.1, 2: 1.12})
    folder(tmp_path, "2026-03-03_mini", {7: 2.0}, place="track_cpu_mini")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "loose.txt").write_text(pgolf(5, 1.15), "utf-8")
    (tmp_path / "logs" / "unfinished.txt").write_text(corpus.pgolf(finished=False), "utf-8")
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def test_a_score_over_another_text_has_no_rank(tmp_path):
    for name, loss, size in (("best", 1.9, 2500), ("second", 2.0, 2437), ("third", 2.1, 2437)):
        text = corpus.log_text("pgolf", run_id=name, results=(corpus.result("legal_ttt", loss),))
        (tmp_path / f"{name}.txt").write_text(text.replace('"bytes": 2437', f'"bytes": {size}'))
    entries = board.collect([tmp_path])
    assert [(entry.name, entry.rank) for entry in entries] == [("best", None), ("second", 1), ("third", 2)]
    assert entries[0].notes[0] == "not ranked: scored over 2,500 bytes of text, most of the track over 2,437"


def test_entries_are_ranked_within_their_track_by_what_the_logs_show(tree):
    entries = board.collect([tree])
    assert [(e.track, e.rank, e.name) for e in entries] == [
        ("10min_16mb", 1, "2026-03-02_better"),
        ("10min_16mb", 2, "2026-03-01_core"),
        ("cpu_mini", 1, "2026-03-03_mini"),
        (board.LOOSE, 1, "loose"),
        (board.LOOSE, None, "unfinished"),
    ]
    core = entries[1]
    assert core.bpb == pytest.approx(1.2) and core.std == pytest.approx(0.01) and core.seeds == 3
    assert core.bytes == corpus.run_of("pgolf").bytes_total and core.author == "ada" and core.notes == ["audited"]
    assert len(core.curves) == 3 and dict(core.phases)["train"] == pytest.approx(27.0)
    assert any("unfinished" in note for note in entries[-1].notes)


def test_a_json_file_that_says_other_than_its_logs_is_noted_and_not_believed(tmp_path):
    folder(tmp_path, "liar", {1: 1.2}, val_bpb=1.0)
    folder(tmp_path, "silent", {}, val_bpb=1.05, bytes_total=15_000_000)
    folder(tmp_path, "text", {}, val_bpb="1.01")
    folder(tmp_path, "nan", {}, val_bpb=float("nan"))
    entries = {entry.name: entry for entry in board.collect([tmp_path])}
    assert entries["liar"].bpb == pytest.approx(1.2) and "1.0000" in entries["liar"].notes[0]
    assert entries["silent"].bpb == 1.05 and "as stated" in entries["silent"].notes[0]
    assert entries["silent"].bytes == 15_000_000
    assert entries["text"].bpb is None and entries["nan"].bpb is None and entries["text"].rank is None


def test_the_declared_score_counts_and_its_absence_is_noted(tmp_path):
    folder(tmp_path, "sliding", {1: 1.2, 2: 1.3}, val_bpb=None, headline="final_int6_sliding_window")
    folder(tmp_path, "wrong", {1: 1.2}, val_bpb=None, headline="final_best_ever")
    sliding, wrong = board.collect([tmp_path])
    assert sliding.bpb == pytest.approx(corpus.PGOLF_RESULTS[1].bpb) and sliding.notes == ["audited"]
    assert wrong.bpb is None and wrong.notes == ["not every log has the declared score final_best_ever", "audited"]


def test_the_board_does_not_say_where_it_was_made(tmp_path):
    (folder(tmp_path, "broken", {1: 1.2}) / "train_seed2.log").write_bytes(bytes(range(256)) * 50)
    entries = board.collect([tmp_path])
    assert entries[0].notes == ["train_seed2.log: cannot be read (train_seed2.log: not a text file)", "audited"]
    assert str(tmp_path) not in board.markdown(entries, tmp_path) + board.page(entries)


def test_the_mean_needs_a_score_from_every_log(tmp_path):
    path = folder(tmp_path, "cut", {1: 1.2, 2: 1.3}, val_bpb=None)
    (path / "train_seed3.log").write_text(corpus.pgolf(replace(corpus.run_of("pgolf"), seed=3), finished=False))
    (entry,) = board.collect([path])
    assert entry.bpb is None and any("seed 3: unfinished" in note for note in entry.notes)


def test_over_the_cap_failed_audits_and_resumed_runs_are_noted(tmp_path):
    run_over = replace(corpus.run_of("pgolf"), bytes_model=16_000_000)
    text = corpus.pgolf(run_over).replace("audit:causal pass", "audit:causal FAIL")
    (tmp_path / "over.txt").write_text(text.replace("step:200/", "resume:step:10 train_time:450ms\nstep:200/"))
    (entry,) = board.collect([tmp_path / "over.txt"])
    assert f"{run_over.bytes_total - 16_000_000:,} bytes over the cap" in entry.notes
    assert {"audit failed: causal", "taken up from a checkpoint at step 10"} <= set(entry.notes)


@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_every_dialect_has_an_entry_and_a_curve(dialect, tmp_path):
    (tmp_path / "run.log").write_text(corpus.log_text(dialect), "utf-8")
    (entry,) = board.collect([tmp_path / "run.log"])
    assert entry.bpb is not None and entry.curves[0]["train"]


def test_curves_files_and_texts_are_bounded(tmp_path, monkeypatch):
    steps = tuple(range(1, 4000))
    (tmp_path / "long.txt").write_text(pgolf(steps=steps, settings=(("ve_layers", "9," * 5000),)), "utf-8")
    (entry,) = board.collect([tmp_path / "long.txt"])
    train = entry.curves[0]["train"]
    assert len(train) <= 500 and train[0][0] == 1 and train[-1][0] == 3999
    assert max(len(value) for _, value in entry.settings) <= 200
    path = folder(tmp_path, "many", dict.fromkeys(range(20), 1.2))
    (many,) = board.collect([path])
    assert len(many.curves) == board.MAX_LOGS and any("20 logs" in note for note in many.notes)
    monkeypatch.setattr(foreign, "MAX_LOG_BYTES", 10)
    assert any("the logs have more than" in note for note in board.collect([path])[0].notes)
    (path / "submission.json").write_text("[" * 100_000)
    assert "does not parse" in board.collect([path])[0].notes[0]
    (path / "submission.json").write_text(" " * (foreign.MAX_JSON + 1))
    assert "larger than" in board.collect([path])[0].notes[0]
    monkeypatch.setattr(board, "MAX_ENTRIES", 1)
    assert run(tmp_path, "--readme", tmp_path / "R.md") == 2


@pytest.mark.parametrize("wild", [float("nan"), float("inf"), -1, 10**400, "12", [1], {"a": 1}, None, True])
def test_wild_values_in_a_result_line_are_no_figures(wild, tmp_path):
    head, _, line = pgolf().rpartition("result ")
    result = json.loads(line)
    keys = ("steps", "train_seconds", "eval_seconds", "bytes_cap", "bytes_total", "mode", "eval_cut", "device", "seed")
    result |= dict.fromkeys(keys, wild) | dict(phase_seconds={"train": wild, "x": wild}, scores=wild)
    (tmp_path / "wild.txt").write_text(f"{head}result {json.dumps(result)}\n", "utf-8")
    fields = dict(bytes_total=wild, train_time_s_max=wild, val_bpb_std=wild, author=wild, date=wild, track=wild)
    folder(tmp_path, "wild", {}, val_bpb=wild, headline=wild, hardware=wild, **fields)
    entries = board.collect([tmp_path])
    assert len(entries) == 2 and board.markdown(entries, tmp_path)
    assert len(json.loads(board.as_data(entries))["entries"]) == 2


def test_links_that_lead_out_of_a_folder_are_not_followed(tmp_path):
    outside = tmp_path / "outside.log"
    outside.write_text(pgolf(9, 0.5), "utf-8")
    path = folder(tmp_path / "in", "links", {1: 1.2})
    (path / "train_seed9.log").symlink_to(outside)
    (path.parent / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    (entry,) = board.collect([tmp_path / "in"])
    assert entry.seeds == 1


def several(root: Path, scores: dict[str, tuple[float, ...]], **fields) -> Path:
    """A folder with a log <name>_seed<1…>.log for each score of each experiment."""
    path = folder(root, "both", {}, **fields)
    for name, bpbs in scores.items():
        for seed, bpb in enumerate(bpbs, 1):
            (path / f"{name}_seed{seed}.log").write_text(pgolf(seed, bpb, run_id=f"{name}{seed}"), "utf-8")
    return path


def test_experiments_of_one_folder_are_never_averaged(tmp_path):
    scores = dict(a=(1.2001, 1.2002, 1.2003), b=(1.1001, 1.1002, 1.1003))
    (entry,) = board.collect([several(tmp_path / "declared", scores, val_bpb=1.2002)])
    assert entry.bpb == pytest.approx(1.2002) and entry.seeds == 3 and len(entry.curves) == 3
    assert entry.notes == ["3 logs of other experiments do not count", "audited"]
    (entry,) = board.collect([several(tmp_path / "open", scores, val_bpb=None)])
    assert entry.bpb is None and entry.notes == ["several experiments, and nothing says which one counts"]


def test_a_copy_of_a_log_is_no_further_seed(tmp_path):
    path = folder(tmp_path, "copied", {1: 1.2, 2: 1.3})
    shutil.copy(path / "train_seed1.log", path / "train.log")
    (entry,) = board.collect([path])
    assert entry.seeds == 2 and entry.bpb == pytest.approx(1.25) and len(entry.curves) == 2


def test_a_folder_without_a_json_file_is_shown_as_such(tmp_path):
    path = folder(tmp_path, "2026-03-05_bare", {1: 1.2, 2: 1.21})
    (path / "submission.json").unlink()
    other = folder(tmp_path, "elsewhere", {1: 1.3}, place="mine")
    (other / "submission.json").unlink()
    (other / "train_gpt.py").write_text("x = 1\n")
    for start in ([tmp_path / "track_10min_16mb", other], [path, other]):
        entries = board.collect(start)
        assert [(e.name, e.track, e.seeds) for e in entries] == [
            ("2026-03-05_bare", "10min_16mb", 2),
            ("elsewhere", "no track", 1),
        ]
        assert all(e.notes[0] == "no submission.json" for e in entries)


def test_logs_in_subfolders_are_a_folder_s_logs(tmp_path):
    path = folder(tmp_path, "deep", {})
    for seed in (1, 2, 3):
        (path / "logs" / f"seed{seed}").mkdir(parents=True)
        (path / "logs" / f"seed{seed}" / "train.log").write_text(pgolf(seed, 1.2 + seed / 1000), "utf-8")
    (entry,) = board.collect([tmp_path])
    assert entry.bpb == pytest.approx(1.202) and entry.seeds == 3


@pytest.mark.parametrize("dialect", ["baseline", "baseline-noprefix"])
def test_several_runs_in_one_log_are_several_curves(dialect, tmp_path):
    texts = [corpus.log_text(dialect, seed=seed, final_loss=2 + seed / 100) for seed in (1, 2, 3)]
    (tmp_path / "three.log").write_text("".join(texts))
    (entry,) = board.collect([tmp_path / "three.log"])
    assert [curve["seed"] for curve in entry.curves] == [1, 2, 3] and entry.seeds == 3
    assert len({tuple(curve["train"][-1]) for curve in entry.curves}) == 3
    assert all(a[0] < b[0] for curve in entry.curves for a, b in zip(curve["train"], curve["train"][1:], strict=False))


# ----------------------------------------------------------------------------------------------------------------------
# Markdown
# ----------------------------------------------------------------------------------------------------------------------


def test_a_board_of_some_folders_is_printed_and_the_repository_s_own_stays(tree, monkeypatch, capsys):
    own = tree / "own"
    monkeypatch.setattr(board, "RECORDS", own)
    assert run(tree) == 0
    assert "wrote" not in (said := capsys.readouterr().out) and rows_of(said)
    assert not own.exists()
    shutil.copytree(tree / "track_10min_16mb", own / "track_10min_16mb")
    assert run() == 0
    assert rows_of((own / "README.md").read_text("utf-8"))


def test_the_readme_is_begun_then_changed_between_its_markers_alone(tree, capsys):
    readme, page = tree / "README.md", tree / "board.html"
    assert run(tree, "--readme", readme, "--html", page) == 0
    first, html = readme.read_text("utf-8"), page.read_bytes()
    assert "(./track_10min_16mb/2026-03-02_better)" in first
    assert rows_of(first)[2][:4] == ["1", rows_of(first)[2][1], "1.1100", "0.01414"]
    readme.write_text("# Mine\n" + first + "\nand after\n", "utf-8")
    assert run(tree, "--readme", readme, "--html", page) == 0
    assert readme.read_text("utf-8") == "# Mine\n" + first + "\nand after\n"
    assert page.read_bytes() == html, "the page changed without a cause"
    folder(tree, "2026-03-04_new", {1: 1.0})
    assert run(tree, "--readme", readme) == 0
    changed = readme.read_text("utf-8")
    assert changed.startswith("# Mine\n") and changed.endswith("\nand after\n") and "2026-03-04_new" in changed


@pytest.mark.parametrize("text", ["no markers", f"{board.END}\n{board.BEGIN}\n", f"{board.BEGIN}\n" * 2 + board.END])
def test_a_readme_without_its_markers_is_left_alone(text, tree, capsys):
    readme = tree / "README.md"
    readme.write_text(text, "utf-8")
    assert run(tree, "--readme", readme) == 2
    assert readme.read_text("utf-8") == text
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("text", EVIL)
def test_no_text_leaves_its_cell(text, tmp_path):
    entry = board.Entry(board.clean(text), tmp_path / "x", board.clean(text, 40))
    entry.author = entry.device = entry.date = board.clean(text, 40)
    entry.notes, entry.bpb, entry.rank = [board.clean(text, 120)], 1.0, 1
    other = board.Entry("plain", tmp_path / "y", entry.track, author="a", date="d", device="e", notes=["n"])
    table = board.markdown([entry, other], tmp_path)
    rows = rows_of(table)
    assert len({len(row) for row in rows}) == 1 and len(rows) == 4
    assert board.END not in table and "\x1b" not in table and "\u202e" not in table
    bare = re.sub(r"`[^`\n]*`", "", table)  # what a reader of Markdown takes for more than literal text
    assert not re.search(r"[<>`\\]|javascript|http", bare)
    assert all(len(cell) < 200 for row in rows for cell in row)


def test_paths_that_are_not_there_end_in_one_line(tmp_path, capsys):
    assert run(tmp_path / "missing", "--readme", tmp_path / "R.md") == 2
    (tmp_path / "binary.log").write_bytes(bytes(range(256)) * 50)
    assert run(tmp_path / "binary.log", "--readme", tmp_path / "R.md") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    assert not (tmp_path / "R.md").exists()


def test_no_runs_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "--readme", tmp_path / "R.md", "--html", tmp_path / "b.html") == 0
    assert "No runs yet." in (tmp_path / "R.md").read_text("utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The page as text
# ----------------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A folder in which everything that can hold text is hostile."""
    for i, text in enumerate(EVIL):
        settings = ((text[:60], text), ("__proto__", text), ("matrix_lr", i))
        log = pgolf(i, 1.0 + i, settings=settings, device=text.replace("\n", " "), run_id=text)
        log = log.replace("late_qat:enabled", f"{text[:60]}:enabled").replace("phase:warmup", f"phase:{text[:60]}")
        path = folder(tmp_path, f"evil{i}", {}, "logs", author=text, date=text, track=text, blurb=text, headline=text)
        (path / "train.log").write_text(log, "utf-8")
    name = "'\"><img src=x onerror=window.hacked=6>`|[a](b)"
    (tmp_path / f"{name}.txt").write_text(pgolf(99, 0.9), "utf-8")
    return tmp_path


def test_data_adds_no_tag_to_the_page(hostile):
    page, empty = board.page(board.collect([hostile])), board.page([])
    assert Tags(page).found == Tags(empty).found
    assert page.count("<script") == empty.count("<script") and page.count("<!--") == empty.count("<!--")


def test_the_page_asks_nobody_for_anything():
    tags = Tags(board.page([])).found
    assert not [attrs for _, attrs in tags if {"src", "href", "style", "onclick", "action"} & attrs.keys()]
    policy = next(attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    template = board.TEMPLATE.read_text("utf-8")
    assert "innerHTML" not in template and "insertAdjacentHTML" not in template and "eval(" not in template


# ----------------------------------------------------------------------------------------------------------------------
# The page in a browser
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-dev.txt")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no browser: install chromium, or point CHROMIUM at one")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of some paths; afterwards it has neither failed nor asked for anything."""
    opened = []

    def show(*paths: Path, **options):
        file = tmp_path / "page.html"
        file.write_text(board.page(board.collect(paths) if paths else []), "utf-8")
        page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if request.url == file.as_uri() else problems.append(request.url))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.goto(file.as_uri())
        opened.append((page, problems))
        return page

    yield show
    for page, problems in opened:
        assert problems == [] and page.evaluate("window.hacked") is None
        page.close()


def names(page) -> list[str]:
    return page.locator("#table tbody td.name > bdi").all_inner_texts()


def test_columns_sort_both_ways_and_what_is_missing_stays_last(show, tree):
    page = show(tree)
    given = names(page)
    assert given == ["2026-03-02_better", "2026-03-01_core", "2026-03-03_mini", "loose", "unfinished"]
    page.click("th button[data-key=bpb]")
    assert names(page) == ["2026-03-02_better", "loose", "2026-03-01_core", "2026-03-03_mini", "unfinished"]
    page.click("th button[data-key=bpb]")
    assert names(page) == ["2026-03-03_mini", "2026-03-01_core", "loose", "2026-03-02_better", "unfinished"]
    assert page.get_attribute("th[aria-sort]", "aria-sort") == "descending"
    page.keyboard.press("Enter")  # the heading keeps the focus
    assert page.get_attribute("th[aria-sort]", "aria-sort") == "ascending"
    page.select_option("#track", label="cpu_mini")
    assert names(page) == ["2026-03-03_mini"]


def test_two_picked_runs_are_compared_and_a_third_replaces_the_first(show, tmp_path):
    for i, lr in enumerate((0.02, 0.03, 0.02)):
        settings = (("matrix_lr", lr), ("num_layers", 9), ("late_qat", True))
        (tmp_path / f"run{i}.txt").write_text(pgolf(1, 1.2 + i / 100, settings=settings), "utf-8")
    page = show(*(tmp_path / f"run{i}.txt" for i in range(3)))
    assert "Pick two runs" in page.inner_text("#diff-note")
    page.check("[data-pick='0']")
    assert "one more" in page.inner_text("#diff-note")
    page.check("[data-pick='1']")
    table = page.inner_text("#diff table")
    assert "1 of 7 settings differ" in page.inner_text("#diff-note")
    assert re.search(r"matrix_lr\s+0\.02\s+0\.03", table) and "num_layers" not in table
    assert re.search(r"val_bpb\s+1\.2000\s+1\.2100\s+\(\+0\.0100\)", table)
    page.check("#same")
    assert re.search(r"late_qat\s+true\s+true", page.inner_text("#diff table"))
    page.locator("#by-bytes .point:not(.picked)").click(force=True)
    assert [page.is_checked(f"[data-pick='{i}']") for i in range(3)] == [False, True, True]
    page.click("#unpick")
    assert page.locator("tr.picked").count() == 0


def test_curves_follow_the_choices_and_the_pointer(show):
    page = show(LOGS)
    assert page.locator("#curves .curve").count() == 5
    box = page.locator("#curves svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] / 2)
    tip = page.locator("#curves .tip")
    assert tip.is_visible() and "step 1,000" in tip.inner_text() and "2.8045" in tip.inner_text()
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    page.select_option("#axis", "time")
    page.select_option("#quantity", "val bpb")
    assert "training time, minutes" in page.locator("#curves").text_content()
    page.locator("#by-time .point").first.hover()
    assert page.is_visible("#by-time .tip") and "bpb" in page.inner_text("#by-time .tip")
    page.check("[data-pick='0']")
    page.select_option("#axis", "step")
    assert "late_qat" in page.locator("#curves").text_content()
    assert page.locator("#bars .bar").count() == 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_until_it_is_switched(scheme, show, tree):
    page = show(tree, color_scheme=scheme)
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 28)"
    back = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(back) == (light if scheme == "light" else dark)
    page.click("#theme")
    assert page.evaluate(back) == (dark if scheme == "light" else light)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_its_window(width, show, tree, hostile):
    page = show(tree, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


LONG = "2026-04-09_SP8192_3LayerRecurrence_ParallelResiduals_QKGain525_LegalScoreFirstTTT"


def test_at_1280_pixels_no_column_is_cut_and_no_word_broken(show, tmp_path):
    for i, place in enumerate(("track_10min_16mb", "track_non_record_unlimited_compute_16mb")):
        path = folder(tmp_path, f"{LONG}_{i}", {}, place, author="A participant of a long name", hardware="8xH100")
        for seed in (1337, 42, 2025):
            log = pgolf(seed, 1.1 + seed / 1e6, device="NVIDIA H100 80GB HBM3", model_params=135_991_841)
            (path / f"train_seed{seed}.log").write_text(log, "utf-8")
    page = show(tmp_path)
    table = page.locator("#table")
    assert table.evaluate("t => t.scrollWidth <= t.parentElement.clientWidth"), "the table is wider than its section"
    cut = "cells => cells.filter(c => c.scrollWidth > c.clientWidth + 1).map(c => c.innerText)"
    assert page.locator("#table th, #table td").evaluate_all(cut) == []
    broken = """cells => cells.flatMap(cell => [...cell.querySelectorAll("bdi")].flatMap(bdi => [...bdi.childNodes]
      .filter(node => node.nodeType === 3 && /^\\S+$/.test(node.data))
      .filter(node => { const r = document.createRange(); r.selectNode(node); return r.getClientRects().length > 1; })
      .map(node => node.data)))"""
    assert page.locator("#table td.name, #table td.brief").evaluate_all(broken) == []


def test_a_run_that_diverged_does_not_flatten_the_others(show, tmp_path):
    for i in range(6):
        (tmp_path / f"run{i}.txt").write_text(pgolf(i, 1.2 + i / 100, final_loss=2 + i / 100), "utf-8")
    heights = []
    for outlier in (False, True):
        if outlier:
            wild = pgolf(9, 9.5, final_loss=40.0, bytes_model=90_000_000, steps=(1, 2, 10, 200, 90_000))
            (tmp_path / "wild.txt").write_text(wild, "utf-8")
        page = show(*sorted(tmp_path.glob("*.txt")))
        boxes = [b.bounding_box()["y"] for b in page.locator("#by-bytes .point:not(.off)").all()]
        heights.append(max(boxes) - min(boxes))
        assert page.locator("#by-bytes .off").count() == outlier
        assert page.locator("#curves .off").count() == outlier
        assert ("1 beyond the axes" in page.locator("#by-bytes").text_content()) == outlier
    assert heights[1] > 0.8 * heights[0]
    page.locator("#by-bytes .off").hover()
    assert "9.5000 bpb" in page.inner_text("#by-bytes .tip")


def test_hostile_text_is_text(show, hostile):
    page = show(hostile)
    assert page.locator("script").count() == 2 and page.locator("img").count() == 0
    assert page.locator("svg[onload], [onerror]").count() == 0
    assert any("<script>" in author for author in page.locator("td.name div").all_inner_texts())
    for i in range(3):
        page.check(f"[data-pick='{i}']")
        page.click("th button[data-key=name]")
    page.check("#same")
    assert "</script>" in page.inner_text("#diff table")
    assert page.evaluate("document.title") == "Parameter golf: runs"


def test_an_empty_page_says_so(show):
    page = show()
    assert page.is_visible("#empty") and page.is_hidden("#main")


def test_the_policy_stops_what_would_be_injected(browser, tmp_path, tree):
    """The second wall: markup that got in all the same would neither run nor fetch."""
    (tmp_path / "page.html").write_text(board.page(board.collect([tree])), "utf-8")
    page, asked = browser.new_page(), []
    page.goto((tmp_path / "page.html").as_uri())
    page.on("requestfinished", lambda request: asked.append(request.url))
    markup = "<b onclick='window.hacked=9' id=x>x</b><img src=board.png onerror='window.hacked=8'>"
    page.evaluate("markup => document.body.insertAdjacentHTML('beforeend', markup)", markup)
    page.evaluate("document.getElementById('x').click()")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None and asked == []
    page.close()


def test_logs_of_the_project_are_read():
    entries = {entry.name: entry for entry in board.collect([LOGS])}
    assert entries["cpu_mini_seed1337"].bpb == pytest.approx(2.03707141)
    assert entries["cpu_mini_seed1337_swa_ema"].bpb is None
    assert isinstance(runlog.parse(LOGS / "cpu_mini_seed1337.txt"), runlog.RunLog)


def test_the_board_of_this_repository_is_the_present_one(tmp_path):
    """`python records/submit.py board` after any change of records or loose logs."""
    readme = tmp_path / "records" / "README.md"
    shutil.copytree(LOGS.parent, readme.parent)
    written = readme.read_text("utf-8")
    assert board.run(argparse.Namespace(paths=[readme.parent], readme=readme, html=None)) == 0
    assert readme.read_text("utf-8") == written
