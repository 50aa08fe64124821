"""Stand-ins for the tools of a cloud: what they were called with is recorded, what they answer is given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TPU_FLAGS = ["--project", "p", "--zone", "us-east5-a", "--poll", "0", "--pause", "0"]
# Words that a shell would take apart, or for more than words.
ODD_ARGUMENTS = [
    "sft",
    "--run",
    "/mnt/search-r3/a b",
    "--data.sets",
    "q\"uo'te",
    "$(touch hacked)",
    "`id`",
    "*",
    "-x;y",
    "ü  two",
    "",
]
# What the scripts use of the system; nothing else is on their PATH, so no real cloud is ever asked.
SYSTEM = (
    *(
        "awk",
        "basename",
        "bash",
        "cat",
        "chmod",
        "cksum",
        "cp",
        "date",
        "dirname",
        "env",
        "flock",
        "grep",
        "gzip",
        "head",
        "hostname",
        "mkdir",
        "mkfifo",
    ),
    *("mktemp", "mv", "python3", "rm", "sed", "seq", "setsid", "sleep", "tail", "tar", "tr", "wc"),
)
# A mode of its own for `tpu-vm ssh`: the command is run, in the home of each worker.
PROGRAM = """#!{python} -SE
import json, os, subprocess, sys
from pathlib import Path
folder, tool = Path({folder!r}), {tool!r}
words = sys.argv[1:]
with (folder / f"{{tool}}.calls").open("a") as calls:
    record = [words, os.environ.get("JAX_LOCAL_DEVICE_IDS", ""), sys.stdin.read() if {reads!r} else ""]
    calls.write(json.dumps(record) + "\\n")
rules = json.loads((folder / f"{{tool}}.answers").read_text())
text = " ".join(words)
found = next((number for number, rule in enumerate(rules) if rule["when"] in text), None)
if found is None:
    sys.exit(0)
rule = rules[found]
# The last answer to a question stays.
if any(other["when"] == rule["when"] for other in rules[found + 1 :]):
    del rules[found]
    (folder / f"{{tool}}.answers").write_text(json.dumps(rules))
status = rule["status"]
for home in rule["homes"]:
    command = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    shell = subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {{"HOME": home}})
    status = shell.returncode or status
sys.stdout.write(rule["out"])
sys.stderr.write(rule["err"])
sys.exit(status)
"""


class StandIns:
    """A folder of tools, and scripts that are run with these on their PATH."""

    def __init__(self, folder: Path):
        self.folder, self.tools = folder, folder / "bin"
        self.tools.mkdir(parents=True)
        for name in SYSTEM:
            (self.tools / name).symlink_to(str(shutil.which(name)))

    def add(self, tool: str, *, reads: bool = False) -> None:
        """A tool that ends with 0 until it is told what to answer; `reads` records its standard input."""
        (self.tools / tool).unlink(missing_ok=True)
        (self.folder / f"{tool}.answers").write_text("[]")
        program = PROGRAM.format(python=sys.executable, folder=str(self.folder), tool=tool, reads=reads)
        (self.tools / tool).write_text(program)
        (self.tools / tool).chmod(0o755)

    def answer(
        self,
        tool: str,
        when: str,
        *,
        out: str = "",
        err: str = "",
        status: int = 0,
        homes: tuple[Path, ...] = (),
    ) -> None:
        """What it says when its arguments hold `when`: the first rule that fits, each once and the last of a
        kind for ever."""
        file = self.folder / f"{tool}.answers"
        rule = {
            "when": when,
            "out": out,
            "err": err,
            "status": status,
            "homes": [str(home) for home in homes],
        }
        file.write_text(json.dumps([*json.loads(file.read_text()), rule]))

    def program(self, tool: str, text: str) -> None:
        """A tool that is a shell script."""
        (self.tools / tool).unlink(missing_ok=True)
        (self.tools / tool).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (self.tools / tool).chmod(0o755)

    def records(self, tool: str) -> list[tuple[list[str], str, str]]:
        """Arguments, JAX's device ids and standard input of each call."""
        file = self.folder / f"{tool}.calls"
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    def calls(self, tool: str) -> list[list[str]]:
        """Arguments of each call."""
        return [words for words, _, _ in self.records(tool)]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a script is started with: nothing of the machine's own."""
        return {
            "PATH": str(self.tools),
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "LANG": "C.UTF-8",
            **(extra or {}),
        }

    def run(self, script: str, *words: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
        """A script of `launch/` to its end."""
        return self.run_file(LAUNCH / script, *words, **extra)

    def run_file(self, script: Path, *words: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
        """The same of a script anywhere."""
        return subprocess.run(
            [str(self.tools / "bash"), str(script), *map(str, words)],
            cwd=self.folder,
            env=self.environment(extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )


def shown(output: str) -> list[list[str]]:
    """Commands that a dry run printed, as a shell reads them."""
    lines = [line for line in output.splitlines() if line and not line.startswith("#")]
    read = "import json, sys; print(json.dumps(sys.argv[1:]))"
    return [
        json.loads(
            subprocess.run(
                ["bash", "-c", f'exec "$0" -c "$1" {line}', sys.executable, read],
                check=True,
                capture_output=True,
            ).stdout
        )
        for line in lines
    ]


def has_flock() -> bool:
    """Whether this system has the tool by which a worker knows its run; Linux has."""
    return shutil.which("flock") is not None and os.name == "posix"
