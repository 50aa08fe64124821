"""What an index of so many passages would take, computed from what was measured of a small one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from real_vectors import row_flops

from search_r3_jax.config import IndexConfig, ModelConfig
from search_r3_jax.planning.models import PUBLISHED

SECONDS_AN_HOUR, HOURS_A_YEAR = 3600.0, 8766.0
MODELS = {
    "SmolLM2-135M": PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"],
    "Qwen2.5-1.5B": PUBLISHED["Qwen/Qwen2.5-1.5B-Instruct"],
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the plan cannot measure.

    Attributes:
        passages: how many there shall be.
        passage_tokens: of each, beside the prompt's.
        host_gb: memory of a host that the index may have (10⁹ bytes); a TPU v5p host has 448.
        chips: that encode.
        chip_tflops: a chip's peak; 459 is a v5p's in bfloat16.
        share_of_peak: what encoding reaches of it.
        shard_passages: passages of one ScaNN index; a host has several.
    """

    passages: int = 1_000_000_000
    passage_tokens: int = 128
    host_gb: float = 448.0
    chips: int = 64
    chip_tflops: float = 459.0
    share_of_peak: float = 0.4
    shard_passages: int = 10_000_000


def plan(record: Mapping[str, Any], assumed: Assumptions) -> Iterator[str]:
    """A Markdown table with a column a model, and what it rests on; raises SystemExit where a measurement is
    missing."""
    missing = [name for name in ("real", "decoder") if name not in record]
    if missing:
        raise SystemExit(
            f"--plan: nothing measured of {' and '.join(missing)} vectors; measure first, with --data and "
            "--decoder-data"
        )
    columns = [dict(rows_of(config, record, assumed)) for config in MODELS.values()]
    yield f"| {assumed.passages:,} passages of {assumed.passage_tokens} tokens | {' | '.join(MODELS)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for name in columns[0]:
        yield f"| {name} | {' | '.join(column[name] for column in columns)} |"
    yield ""
    yield from grounds(record, assumed)


def rows_of(
    config: ModelConfig, record: Mapping[str, Any], assumed: Assumptions
) -> Iterator[tuple[str, str]]:
    """Name and value of each row of a model's column."""
    real, encoding = record["real"], record["decoder"]["encoding"]
    measured = real["rows"] * real["dimension"]
    components = assumed.passages * config.hidden_size
    yield "dimension", f"{config.hidden_size:,}"
    for dtype, version in real["index"].items():
        vectors, scann = (version[name] / measured * components for name in ("vector_bytes", "scann_bytes"))
        yield f"vectors, {dtype}", terabytes(vectors)
        yield f"ScaNN's files, {dtype} candidates", terabytes(scann)
        host = assumed.host_gb * 1e9
        yield f"hosts of {assumed.host_gb:g} GB for ScaNN's files, {dtype}", f"{math.ceil(scann / host):,}"
        yield (
            f"hosts of {assumed.host_gb:g} GB for these and the vectors, {dtype}",
            f"{math.ceil((scann + vectors) / host):,}",
        )
    shards = math.ceil(assumed.passages / assumed.shard_passages)
    built = (
        real["index"]["float32"]["build_seconds"]
        / measured
        * assumed.shard_passages
        * config.hidden_size
        / SECONDS_AN_HOUR
    )
    growth = math.sqrt(assumed.shard_passages / real["rows"])
    yield (
        f"build of one of {shards:,} shards, {real['cores']} cores",
        f"{built:.1f} to {built * growth:.0f} h",
    )
    prompt = {name: encoding[name] for name in ("prefix_tokens", "tail_tokens")}
    flops = row_flops(config, assumed.passage_tokens, **prompt)
    chips_flops = assumed.chips * assumed.chip_tflops * 1e12 * assumed.share_of_peak
    yield "FLOPs a passage", f"{flops / 1e9:,.1f} · 10⁹"
    here = assumed.passages * flops / encoding["flops_per_second"] / SECONDS_AN_HOUR
    yield f"encoding all here, {record['decoder']['cores']} cores", f"{here / HOURS_A_YEAR:,.1f} years"
    yield (
        f"encoding all on {assumed.chips} chips",
        f"{assumed.passages * flops / chips_flops / SECONDS_AN_HOUR:,.2f} h",
    )
    budget = IndexConfig().refresh_budget
    yield "passages encoded anew in a step, at most", f"{budget:,} ({budget / assumed.passages:.1e} of all)"
    yield "that takes, on one chip", f"{1000 * budget * flops / chips_flops * assumed.chips:,.1f} ms"


def terabytes(size: float) -> str:
    """In units of 10¹² bytes."""
    return f"{size / 1e12:.2f} TB"


def grounds(record: Mapping[str, Any], assumed: Assumptions) -> Iterator[str]:
    """What the table rests on."""
    real, decoder = record["real"], record["decoder"]
    index, encoding = real["index"]["float32"], decoder["encoding"]
    yield (
        f"- Bytes and build seconds: measured on {real['rows']:,} vectors of {real['dimension']} "
        f"({index['settings']['method']},"
        f" {index['build_seconds']:.0f} s), taken to grow with passages times dimension."
    )
    yield (
        "- Building grows with passages alone where training on a sample dominates, and with passages^1.5 "
        "where assigning each of N to √N"
        " partitions does: both ends are given. Shards are built one by one or on as many hosts as there are."
    )
    yield (
        "- Memory: ScaNN's files hold the hashed vectors and a copy of the vectors for scoring candidates; "
        "the vectors themselves are"
        " mapped from disk, or in memory too. Ids, and the memory of building, are not counted."
    )
    yield (
        f"- FLOPs: matrix products and attention of one forward pass of {assumed.passage_tokens} tokens and "
        "the prompt's"
        f" {encoding['tail_tokens']} behind them, which attend to a shared prefix of "
        f"{encoding['prefix_tokens']}."
    )
    yield (
        f"- Here: {encoding['flops_per_second'] / 1e9:,.0f} · 10⁹ FLOP/s, measured at "
        f"{encoding['documents_per_second']:,.0f} documents a"
        f" second of {encoding['tokens_per_document']:.0f} tokens, the same for both models. Chips: "
        f"{assumed.share_of_peak:.0%} of"
        f" {assumed.chip_tflops:g} TFLOP/s each, not measured."
    )
    yield (
        "- Anew in a step: `index.refresh_budget`; the rest of the index keeps its vectors until the next "
        "version."
    )
