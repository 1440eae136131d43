"""What a submission has to keep, and how an answer follows from several runs."""

import re
from collections.abc import Iterable

CAP_BYTES = 16_000_000  # code and compressed model
CLOCK_SECONDS = 600  # each of the two clocks, on the track that has them
SEEDS = 3  # that make a record

# The checks of records/audit.py: name -> (key of compliance, the rule).
AUDITS = {
    "causal": ("causal_dependence", "A score depends on the artifact and on earlier tokens alone"),
    "normalised": ("full_distribution", "Scores come from a distribution over the whole vocabulary"),
    "score_first": ("score_first_ttt", "A token is scored for good before anything learns from it"),
    "once": ("single_pass", "Every token of the validation split is scored once, in order"),
    "unwatched": ("scores_repeat", "A run that is not asked for its scores has the same ones"),
    "documents": ("no_leak_across_documents", "Gates and tables do not look across a document's beginning"),
    "bytes": ("bytes_are_utf8", "The bytes counted are those of the decoded text"),
    "clocks": ("clocks_kept", "Training and evaluation keep the clocks that were set"),
    "size": ("size_kept", "Code and artifact keep the cap that was set"),
    "identity": ("audited_as_run", "Script, artifact and data that were audited are those of the log"),
}

# What train_gpt.py leaves out of its settings_hash, and left out when it still audited itself.
ONCE = frozenset(("audit", "audit_tokens"))
MAY_DIFFER = ONCE | frozenset(
    "seed run_id out_dir data_path tokenizer_path caseops_enabled artifact_path weights_path save_scores "
    "checkpoint_every resume".split()
)
# The same in the `Hyperparameters:` lists of other scripts. A rank is a process here; the rank of an adapter, as in
# ttt_lora_rank, is a setting.
MAY_DIFFER_ELSEWHERE = re.compile(
    r"seed|run_id|(?:\w+_)?(?:path|paths|dir|file|files)|logfile|datadir|(?:local_|global_)?rank|device|is_main_process"
)


def has_clocks(track: str) -> bool:
    """Whether the two clocks are rules of a track."""
    return "10min" in track


def may_differ(name: str, value: object, ours: bool) -> bool:
    """Whether runs of one configuration may differ in a setting: a seed, a name, a path, a process."""
    if ours:
        return name in MAY_DIFFER
    return MAY_DIFFER_ELSEWHERE.fullmatch(name) is not None or (isinstance(value, str) and "/" in value)


def verdict(answers: Iterable[bool | None]) -> bool | None:
    """False if anything is, None if anything else is unknown, else True."""
    answers = list(answers)
    return False if False in answers else None if None in answers or not answers else True


def within(values: Iterable[float | None], limit: float) -> bool | None:
    return verdict(None if value is None else value <= limit for value in values)
