"""Write the golden files again, to look at what changed: python -m tests.report.golden_files."""

from __future__ import annotations

from pathlib import Path

from tests.report import results_to_show as results
from truestep.report import ci
from truestep.report.markdown import Frame, comment, summary

GOLDEN = Path(__file__).parent / "golden"
LINK = "https://github.com/acme/video/actions/runs/99"


def texts() -> dict[str, str]:
    """Name of each golden file, and what is in it."""
    found = results.everything()
    return {
        "comment.md": comment(found, Frame(link=LINK, claimed_by="a" * 40)),
        "summary.md": summary(found, Frame(link=LINK)),
        "annotations.txt": ci.workflow_commands(found),
        "results.sarif": ci.sarif(found),
        "code-quality.json": ci.code_quality(found),
        "junit.xml": ci.junit(found),
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (GOLDEN / name).write_text(text, "utf-8")
