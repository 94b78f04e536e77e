"""What was left out of streamed rows, or changed, listed while a run goes on."""

import json

from finetune.data.examination import Finding
from finetune.rundir import RunDir, read_jsonl, write_jsonl


class FindingsLists:
    """skipped.jsonl and changed.jsonl of a run whose rows are streamed, written as it goes.

    A row is listed once, though a resumed run comes by it again, and so does every epoch.
    """

    def __init__(self, run: RunDir):
        self.run = run
        for path in (run.skipped, run.changed):
            if path.is_file():
                write_jsonl(path, read_jsonl(path))  # without a last line that was not finished
        self._listed = {
            path: {line["where"] for line in read_jsonl(path)}
            for path in (run.skipped, run.changed)
        }

    def add(self, findings: list[Finding]) -> None:
        """List those that are not yet listed."""
        for finding in findings:
            path = self.run.changed if finding.kind == "changed" else self.run.skipped
            if finding.where in self._listed[path]:
                continue
            self._listed[path].add(finding.where)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finding.to_json()) + "\n")
