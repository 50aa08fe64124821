"""Pictures of runs: what is drawn are the numbers of the run's files."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes

from search_r3_jax.errors import UserError
from search_r3_jax.evaluation.curves import draw_curves


def write_run(
    folder: Path, *, reasoned: bool, steps: int = 12, seed: int = 0
) -> tuple[Path, np.ndarray, dict[int, float]]:
    """A run with made-up numbers; its InfoNCE by step and its nDCG@10 by evaluation."""
    generator = np.random.default_rng(seed)
    (folder / "eval").mkdir(parents=True)
    losses = generator.random(steps)
    lines = [{"step": step, "infonce": loss, "triplet": 0.0} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {step: float(generator.random()) for step in (0, 6, 12)}
    for step, score in scores.items():
        modes = {"direct": {"ndcg@10": score}} | ({"reason": {"ndcg@10": score / 2}} if reasoned else {})
        other = {mode: {"ndcg@10": 0.5 * values["ndcg@10"]} for mode, values in modes.items()}
        (folder / "eval" / f"dev_{step:06d}.json").write_text(
            json.dumps({"step": step, "results": {"a": modes, "b": other}})
        )
    return folder, losses, scores


def test_the_lines_are_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, losses, scores = write_run(tmp_path / "first", reasoned=True)
    second, _, _ = write_run(tmp_path / "second", reasoned=False, seed=1)
    # Kept open, so that what was drawn can be read.
    monkeypatch.setattr(pyplot, "close", lambda *_: None)
    draw_curves([first, second], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    axes: list[Axes] = pyplot.gcf().axes
    assert [axis.get_title() for axis in axes[:2]] == ["first", "second"]
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes[0].get_lines()}
    np.testing.assert_allclose(drawn["direct"], [(step, 0.75 * score) for step, score in scores.items()])
    np.testing.assert_allclose(drawn["reason"], [(step, 0.375 * score) for step, score in scores.items()])
    assert [line.get_label() for line in axes[1].get_lines()] == ["direct"]
    # A term that was left out is not drawn.
    assert [line.get_label() for line in axes[2].get_lines()] == ["infonce"]
    smoothed = np.asarray(axes[2].get_lines()[0].get_ydata())
    np.testing.assert_allclose(smoothed, [losses[max(0, i - 4) : i + 1].mean() for i in range(12)])


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / f"{name}$a$" / "sft", reasoned=False)[0] for name in ("one", "two")]
    monkeypatch.setattr(pyplot, "close", lambda *_: None)
    # The picture is a PNG whatever its name, and has that name.
    draw_curves(runs, tmp_path / "curves.jpg2")
    assert (tmp_path / "curves.jpg2").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in pyplot.gcf().axes[:2]] == ["one$a$/sft", "two$a$/sft"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl; give folders that sft or rl wrote to"):
        draw_curves([tmp_path], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
