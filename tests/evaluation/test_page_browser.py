"""The page of `search-r3 report` in a browser."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.report_inputs import (
    budget_record,
    eval_record,
    rollout_sample,
    write_json,
    write_lines,
    write_run,
)

from search_r3_jax.evaluation.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path: Path, width: int) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    long = "a_very_long_name_of_a_function_without_any_place_to_break_" * 6
    for seed in range(3):
        write_run(tmp_path / str(seed) / "rl", "rl", seed=seed, steps=20)
    rollout = rollout_sample(0, np.random.default_rng(0)) | {
        "query": long,
        "reply": long,
        "top": [{"document": long, "relevant": True}],
    }
    write_lines(tmp_path / "0" / "rl" / "samples.jsonl", [rollout])
    values = np.random.default_rng(0).random(8)
    files = [
        write_json(
            tmp_path / "e.json", eval_record({"direct": values, "reason": values}, model=long, name=long)
        )
    ]
    files.append(write_json(tmp_path / "b.json", budget_record(np.random.default_rng(0), model=long)))
    write_report([tmp_path / str(seed) / "rl" for seed in range(3)], files, tmp_path / "report.html")

    # In a frame, because a browser's window cannot be made as narrow as a phone; only the frame around the
    # page has a script.
    page = html.escape((tmp_path / "report.html").read_text(encoding="utf-8"))
    script = """onload = () => { const page = document.querySelector("iframe").contentDocument;
    const root = page.documentElement;
        const shown = [...page.images].filter((image) => image.complete && image.naturalWidth > 0).length;
        document.title = [root.scrollWidth, root.clientWidth, page.images.length, shown].join(" "); }"""
    frame = (
        f'<iframe style="border: 0; width: {width}px; height: 800px" '
        f'srcdoc="{page}"></iframe><script>{script}</script>'
    )
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title>not loaded</title>{frame}", encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}"]
    command += ["--window-size=1400,900", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    dumped = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HOME": str(tmp_path)},
        check=True,
    )
    scroll_width, client_width, images, shown = map(
        int, re.findall("<title>(.*?)</title>", dumped.stdout)[0].split()
    )
    assert scroll_width <= client_width <= width
    assert shown == images > 10
