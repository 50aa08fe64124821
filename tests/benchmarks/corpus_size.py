"""What ten times the corpus costs: building the data set, start-up of stage 2, an index version, a step, an
evaluation.

    python tests/benchmarks/corpus_size.py [--documents 200000 2000000] [--work FOLDER]

Synthetic passages of 8 to 24 words, drawn as words of a language are, and a tiny random model: what is
measured is the work around the model. Each phase is a process as a user starts it, one after another. Seconds
are wall time; memory is the peak of what a process holds for itself (RssAnon), so pages of files that the
system may take back do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).with_suffix(".json")
WORDS, QUERIES, STEPS = 50_000, 200, 24
# Of a step, those before are warming up.
COUNTED = STEPS // 2


class Phase:
    """A process of the command line: its seconds so far, and the peak of its own memory."""

    def __init__(self, *words: str | Path, log: Path):
        command = [sys.executable, "-m", "search_r3_jax", *map(str, words)]
        self._started, self._log = time.perf_counter(), log
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
        self.peak_mib = 0.0
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def until(self, found: Callable[[], bool]) -> dict[str, float]:
        """Wait until something is so; seconds since the start, and the peak in MiB."""
        while not found():
            if self._process.poll() is not None:
                raise SystemExit(f"ended with {self._process.returncode}: {self._log.read_text()[-3000:]}")
            time.sleep(0.02)
        return {"seconds": time.perf_counter() - self._started, "peak_mib": self.peak_mib}

    def end(self) -> dict[str, float]:
        """Wait for its end."""
        if self._process.wait() != 0:
            raise SystemExit(f"ended with {self._process.returncode}: {self._log.read_text()[-3000:]}")
        return {"seconds": time.perf_counter() - self._started, "peak_mib": self.peak_mib}

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()

    def _watch(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        while self._process.poll() is None:
            try:
                (line,) = [x for x in status.read_text().splitlines() if x.startswith("RssAnon")]
            except (OSError, ValueError):
                return
            self.peak_mib = max(self.peak_mib, int(line.split()[1]) / 1024)
            time.sleep(0.05)


def write_beir(folder: Path, documents: int) -> None:
    """A BEIR folder: each query is four words of its document."""
    generator = np.random.default_rng(0)
    words = np.array([f"w{number:x}" for number in range(WORDS)])
    # Zipf's law.
    chances = 1 / np.arange(1, WORDS + 1)
    chances /= chances.sum()
    (folder / "qrels").mkdir(parents=True)
    relevant = generator.choice(documents, QUERIES, replace=False)
    wanted, texts = set(relevant.tolist()), dict[int, str]()
    with (folder / "corpus.jsonl").open("w") as file:
        for start in range(0, documents, 100_000):
            count = min(100_000, documents - start)
            lengths = generator.integers(8, 25, count)
            drawn = words[generator.choice(WORDS, int(lengths.sum()), p=chances)].tolist()
            at = 0
            for row, length in enumerate(lengths.tolist(), start):
                text = " ".join(drawn[at : at + length])
                at += length
                file.write(json.dumps({"_id": f"d{row}", "title": "", "text": text}) + "\n")
                if row in wanted:
                    texts[row] = text
    with (folder / "queries.jsonl").open("w") as file:
        for number, row in enumerate(relevant.tolist()):
            query = " ".join(texts[row].split()[:4])
            file.write(json.dumps({"_id": f"q{number}", "text": query}) + "\n")
    for split, numbers in (("train", range(QUERIES // 2)), ("test", range(QUERIES // 2, QUERIES))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{relevant[n]}\t1" for n in numbers)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def measure(work: Path, model: Path, documents: int) -> dict[str, Any]:
    """Every phase over a corpus of that size."""
    work.mkdir()
    found: dict[str, Any] = {"documents": documents}
    write_beir(work / "beir", documents)
    data, run = work / "data", work / "run"
    found["build"] = Phase(
        "data", "build", "--source", "beir", "--input", work / "beir", "--out", data, log=work / "build.log"
    ).end()
    training: list[str | Path] = ["rl", "--config", "smollm2", "--run", run, "--model", model]
    training += ["--data.sets", data, "--data.dev-queries", "0", "--text.max-query-tokens", "16"]
    training += ["--text.max-document-tokens", "64", "--lora.rank", "4", "--remat", "none"]
    training += ["--rl.steps", str(STEPS), "--rl.global-queries", "8", "--rl.group-size", "8"]
    training += ["--rl.sampler.max-think-tokens", "16", "--rl.collapse.steps", "0"]
    training += ["--rl.eval-every", "0", "--rl.save-every", str(10 * STEPS), "--index.no-local"]
    training += ["--index.max-index-age-steps", str(10 * STEPS), "--index.nice", "0"]
    trainer = Phase(*training, log=work / "rl.log")
    found["start-up"] = trainer.until((run / "checkpoints" / "0").is_dir)
    indexer = Phase("indexer", "--run", run, log=work / "indexer.log")
    metrics = run / "metrics.jsonl"
    found["index version"] = indexer.until(lambda: any((run / "index").glob("*/MANIFEST.json")))
    indexer.stop()
    peak = trainer.end()["peak_mib"]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found["step"] = {
        "seconds": statistics.median(line["seconds"] for line in lines[COUNTED:]),
        "environment_seconds": statistics.median(line["environment_seconds"] for line in lines[COUNTED:]),
        "peak_mib": peak,
    }
    evaluation = ["eval", "--model", run, "--data", data, "--vectors", work / "vectors"]
    found["evaluation"] = Phase(*evaluation, log=work / "eval.log").end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.tiny_models import write_tiny_checkpoint

    with tempfile.TemporaryDirectory(dir=asked.work) as folder:
        work = Path(folder)
        model = write_tiny_checkpoint(work / "model", "llama")
        results = [measure(work / str(documents), model, documents) for documents in asked.documents]
    RESULT.write_text(json.dumps({"cores": os.cpu_count(), "sizes": results}, indent=1) + "\n")
    for phase in ("build", "start-up", "index version", "step", "evaluation"):
        for name in results[0][phase]:
            values = "  ".join(f"{result[phase][name]:12,.2f}" for result in results)
            print(f"{phase:15} {name:22} {values}")


if __name__ == "__main__":
    main()
