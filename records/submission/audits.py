"""audit.json, which records/audit.py leaves beside an artifact, with the log of the run that made the artifact.

It is untrusted like a log: bounded, and believed only where it is of the log's script and artifact.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from records.submission.command import Unusable, clean_text
from records.submission.rules import AUDITS, verdict
from records.submission.runlog import RunLog

MAX_AUDIT = 1 << 18  # bytes


def parse(data: bytes, name: str) -> dict[str, Any]:
    """What is in an audit.json. Raises Unusable."""
    try:
        told = json.loads(data[: MAX_AUDIT + 1]) if len(data) <= MAX_AUDIT else None
        findings = {str(key)[:40]: finding for key, finding in told["audit"].items()}
        if not all(isinstance(finding["passed"], bool) for finding in findings.values()) or len(findings) > 40:
            raise ValueError
        return dict(sha256=dict(told["sha256"]), audit=findings)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Unusable(f"{name} is no audit.json of records/audit.py") from None


def attach(told: dict[str, Any], log: RunLog) -> bool:
    """Its findings into the log's, if it judged the artifact that the log's run made, with the script that ran; else
    False. What failed in a line of the log itself stays failed."""
    result = log.result or {}
    ours = {"artifact": result.get("artifact_sha256"), "script": log.code_sha256 or result.get("code_sha256")}
    if any(value is None or told["sha256"].get(name) != value for name, value in ours.items()):
        return False
    for name, finding in told["audit"].items():
        if log.audit.get(name, (True, ""))[0]:
            log.audit[name] = (finding["passed"], clean_text(str(finding.get("figure", ""))))
    return True


def shown(logs: Collection[RunLog]) -> dict[str, bool | None]:
    """Key of compliance -> whether that audit passed in every log."""
    return {key: verdict(log.audit.get(name, (None,))[0] for log in logs) for name, (key, _) in AUDITS.items()}


def beside(log: Path) -> Path | None:
    """The audit of the artifact of logs/<RUN_ID>.txt, if it lies where the run has put the artifact."""
    path = log.absolute().parent.parent / "runs" / log.stem / "audit.json"
    return path if path.is_file() else None
