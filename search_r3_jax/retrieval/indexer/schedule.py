"""The schedule of index versions: the one that each step of stage 2 uses, written before the step."""

from __future__ import annotations

from pathlib import Path

from search_r3_jax.errors import UserError, not_written
from search_r3_jax.files import append_json_line, read_json_lines, write_json_lines

SCHEDULE = "index_schedule.jsonl"


class IndexSchedule:
    """The schedule of a run, a line a step (`step`, `index`) from step 0 on.

    A repeated step uses the version that the schedule names. Only the moment at which a new version is ready
    depends on the machine: repeating the schedule repeats the run.
    """

    def __init__(self, run: Path):
        """Read the schedule of `run`; raises UserError where it is incomplete."""
        self._file = run / SCHEDULE
        self._versions = _read(self._file)
        # Rewrite it without a last line that was cut off, because lines will be appended.
        if self._file.is_file():
            self._write()

    def __len__(self) -> int:
        return len(self._versions)

    def version_at(self, step: int) -> int | None:
        """The version of a step; None beyond the schedule."""
        return self._versions[step] if step < len(self._versions) else None

    def versions_from(self, step: int) -> set[int]:
        """The versions that a run resuming from `step` needs."""
        # Including the version in use before it.
        return set(self._versions[max(step - 1, 0) :])

    def record(self, step: int, version: int) -> None:
        """Append the version of the next step; raises UserError or TransientError when the disk refuses."""
        if step != len(self._versions):
            raise ValueError(f"step {step}: the schedule has {len(self._versions)} steps")
        try:
            append_json_line(self._file, {"step": step, "index": version}, durable=True)
        except OSError as error:
            raise not_written(self._file, error, "make room, then the same command goes on") from error
        self._versions.append(version)

    def copy(self, run: Path) -> None:
        """Copy the schedule of another run into a run that has none.

        Raises UserError where that run has none.
        """
        other = _read(run / SCHEDULE)
        if not other:
            raise UserError(
                f"{run / SCHEDULE}: no schedule to replay; give a run of stage 2 that has taken a step"
            )
        self._versions = other
        self._write()

    def truncate(self, step: int) -> None:
        """Drop the schedule from a step on; the steps from there are another run."""
        if step < len(self._versions):
            self._versions = self._versions[:step]
            self._write()

    def _write(self) -> None:
        write_json_lines(
            self._file, ({"step": step, "index": version} for step, version in enumerate(self._versions))
        )


def _read(file: Path) -> list[int]:
    try:
        entries = read_json_lines(file)
        if [entry["step"] for entry in entries] != list(range(len(entries))):
            raise ValueError("its steps are not 0, 1, 2 …")
        return [int(entry["index"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is no index schedule ({error}); give another --run") from None
