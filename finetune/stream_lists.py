"""What was left out of streamed rows, or changed, listed while a run goes on."""

from pathlib import Path

from finetune.data.examination import Finding
from finetune.rundir import RunDir, append_jsonl, read_jsonl, write_jsonl


class StreamLists:
    """skipped.jsonl and changed.jsonl of a run whose rows are streamed, written as it goes, by one
    process for all.

    A row is listed once, though a resumed run comes by it again, and so does every epoch.
    """

    def __init__(self, run: RunDir):
        self.run = run
        self._listed: dict[Path, set[str]] = {}

    def add(self, findings: list[Finding]) -> None:
        """List those that are not yet listed."""
        if findings and not self._listed:
            self._listed = {path: _listed_in(path) for path in (self.run.skipped, self.run.changed)}
        for finding in findings:
            path = self.run.changed if finding.kind == "changed" else self.run.skipped
            if finding.where in self._listed[path]:
                continue
            self._listed[path].add(finding.where)
            append_jsonl(path, [finding.to_json()])


def _listed_in(path: Path) -> set[str]:
    """The rows of a list, which is rewritten without a last line that was not finished."""
    lines = read_jsonl(path)
    if path.is_file():
        write_jsonl(path, lines)
    return {line["where"] for line in lines}
