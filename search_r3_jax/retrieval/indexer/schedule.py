"""Which index version each step of stage 2 was rewarded by: on the disk before the step, so that the step can
be taken again."""

from __future__ import annotations

import json
from pathlib import Path

from search_r3_jax.errors import UserError
from search_r3_jax.files import append_line, complete_lines, write_text

SCHEDULE = "index_schedule.jsonl"


class IndexSchedule:
    """The record of a run, a line a step (`step`, `index`) from step 0 on; steps that are in it are taken
    with the same index again.

    When a new index is ready depends on the machine, and nothing else in a run does: whoever repeats the
    record repeats the run.
    """

    def __init__(self, run: Path):
        """Raises UserError for a record that is not whole."""
        self._file = run / SCHEDULE
        self._versions = _read(self._file)
        # Without a last line that a kill has cut off: another will be appended.
        if self._file.is_file():
            self._write()

    def __len__(self) -> int:
        return len(self._versions)

    def version_at(self, step: int) -> int | None:
        """The recorded version of a step; None beyond the record."""
        return self._versions[step] if step < len(self._versions) else None

    def versions_from(self, step: int) -> set[int]:
        """The versions that a run which goes on from `step` needs again."""
        # It goes on with the one that was in use before.
        return set(self._versions[max(step - 1, 0) :])

    def record(self, step: int, version: int) -> None:
        """Write down the version of the next step; raises UserError when the disk refuses."""
        if step != len(self._versions):
            raise ValueError(f"step {step}: the record has {len(self._versions)} steps")
        try:
            append_line(self._file, json.dumps({"step": step, "index": version}), durable=True)
        except OSError as error:
            raise UserError(
                f"{self._file}: cannot be written ({error.strerror or error}); make room, then the same "
                "command goes on"
            ) from error
        self._versions.append(version)

    def copy(self, run: Path) -> None:
        """Take over the record of another run, for a run that has none yet; raises UserError where that run
        has none."""
        other = _read(run / SCHEDULE)
        if not other:
            raise UserError(
                f"{run / SCHEDULE}: no record to replay; give a run of stage 2 that has taken a step"
            )
        self._versions = other
        self._write()

    def truncate(self, step: int) -> None:
        """Forget the record from a step on: what follows is another run."""
        if step < len(self._versions):
            self._versions = self._versions[:step]
            self._write()

    def _write(self) -> None:
        lines = [
            json.dumps({"step": step, "index": version}) + "\n" for step, version in enumerate(self._versions)
        ]
        write_text(self._file, "".join(lines))


def _read(file: Path) -> list[int]:
    try:
        records = [json.loads(line) for line in complete_lines(file)]
        if [record["step"] for record in records] != list(range(len(records))):
            raise ValueError("its steps are not 0, 1, 2 …")
        return [int(record["index"]) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is no record of index versions ({error}); give another --run") from None
