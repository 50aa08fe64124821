"""Import and export of weights: a checkpoint's tensors ↔ stacked, sharded parameters, one at a time."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from search_r3_jax.config import ModelConfig
from search_r3_jax.errors import UserError
from search_r3_jax.mesh import param_shardings
from search_r3_jax.models.attention import Backend
from search_r3_jax.models.decoder import Decoder
from search_r3_jax.models.families import layer_tensors
from search_r3_jax.text.tokenizer import EmbedToken

EMBEDDING, _FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Tables that older versions of `transformers` stored; they follow from the config.
_HARMLESS = tuple(f".rotary_emb.{table}" for table in ("inv_freq", "cos_cached", "sin_cached"))
_CHUNK_BYTES = 4 << 20
# XLA on the host adopts a buffer that begins on such a boundary, and copies any other.
_HOST_ALIGNMENT = 64

Index = tuple[slice, ...]
Fill = Callable[[np.ndarray, Index], None]


class TensorSource(Protocol):
    """A checkpoint's tensors under their `transformers` names, in torch layout."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, float32; `index` has one bounded slice per dimension."""
        ...


def build_decoder(
    config: ModelConfig,
    source: TensorSource,
    *,
    where: str,
    embed: EmbedToken,
    compute_dtype: str,
    remat: str,
    attention: Backend = "xla",
    mesh: Mesh | None = None,
    param_dtype: str = "float32",
) -> Decoder:
    """A decoder with its parameters read from a checkpoint straight onto the devices of `mesh`.

    Matrices are of `param_dtype`, norms and biases float32. The tables have `embed.vocab_size` rows. The row
    of a fresh embed token, or of one that is absent or zero, starts at the mean of the existing rows (method,
    Model). Raises UserError listing all tensors that are missing, misshapen or unknown.
    """
    _check_sizes(config, source, where)
    _check_fit(config, source, where)
    if config.tied_embeddings and HEAD in source.shapes and not _equal(source, EMBEDDING, HEAD):
        # As `transformers` does: two different tables in the file outweigh the config.
        config = replace(config, tied_embeddings=False)

    def make() -> Decoder:
        grown = replace(config, vocab_size=embed.vocab_size)
        dtype = jnp.dtype(compute_dtype)
        return Decoder(
            grown,
            rngs=nnx.Rngs(0),
            embed_id=embed.embed_id,
            compute_dtype=dtype,
            remat=remat,
            attention=attention,
        )

    decoder = nnx.eval_shape(make)
    shardings = None if mesh is None else param_shardings(decoder, mesh)

    def place(variable: nnx.Param, path: tuple[str, ...], fill: Fill) -> None:
        array = _Staging(variable.shape, _at(shardings, path)).put(fill)
        variable.set_value(array.astype(param_dtype if array.ndim > 1 else "float32"))

    place(decoder.embedding, ("embedding",), _table(source, EMBEDDING, embed))
    place(decoder.final_norm.scale, ("final_norm", "scale"), functools.partial(_copy, source, _FINAL_NORM))
    if decoder.head is not None:
        table = _table(source, HEAD, embed)
        place(decoder.head, ("head",), lambda out, index: table(out.T, index[::-1]))
    for (module, parameter), (name, transposed) in layer_tensors(config).items():
        variable = getattr(getattr(decoder.layers, module), parameter)
        names = [f"model.layers.{i}.{name}" for i in range(config.layers)]
        sharding = _at(shardings, ("layers", module, parameter))
        dtype = param_dtype if parameter == "kernel" else "float32"
        variable.set_value(_stacked(source, names, transposed, variable.shape, dtype, sharding))
    return decoder


def torch_tensors(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Every base tensor under its `transformers` name, in torch layout, float32; gathered one at a time."""
    yield EMBEDDING, _gather(decoder.embedding[...])
    for (module, parameter), (name, transposed) in layer_tensors(decoder.config).items():
        stacked = getattr(getattr(decoder.layers, module), parameter)[...]
        for i in range(decoder.config.layers):
            yield f"model.layers.{i}.{name}", _gather(stacked, layer=i, transposed=transposed)
    yield _FINAL_NORM, _gather(decoder.final_norm.scale[...])
    if decoder.head is not None:
        yield HEAD, _gather(decoder.head[...], transposed=True)


def _everywhere(array: jax.Array) -> jax.Array:
    """The array, of which this process can read everything; all processes call it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return array
    if not isinstance(array.sharding, NamedSharding):
        raise TypeError(f"an array over several processes, but on no mesh: {array.sharding}")
    return jax.jit(lambda x: x, out_shardings=NamedSharding(array.sharding.mesh, PartitionSpec()))(array)


def _gather(array: jax.Array, *, layer: int | None = None, transposed: bool = False) -> np.ndarray:
    """A tensor in this process's memory; of an array over several processes all call it together."""
    if not array.is_fully_addressable:
        array, layer = _everywhere(array if layer is None else array[layer]), None
    shape = array.shape if layer is None else array.shape[1:]
    gathered = np.empty(shape[::-1] if transposed else shape, np.float32)
    ours = gathered.T if transposed else gathered
    # Of copies one; the first of all may be in another process.
    for shard in {str(shard.index): shard for shard in array.addressable_shards}.values():
        if layer is None:
            ours[shard.index] = np.asarray(shard.data)
        else:
            ours[shard.index[1:]] = _layer(shard.data, layer)
    return gathered


def _layer(stacked: jax.Array, layer: int) -> np.ndarray:
    if {device.platform for device in stacked.devices()} == {"cpu"}:
        # Read in place: the allocator keeps freed slices for a while, with eight devices as much as another
        # tensor.
        return np.asarray(stacked)[layer]
    # Fetch one layer from the device, not all.
    return np.asarray(jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False))


def _check_sizes(config: ModelConfig, source: TensorSource, where: str) -> None:
    """Raise UserError for impossible sizes, before anything is computed from them."""
    sizes = {
        "vocabulary": config.vocab_size,
        "hidden size": config.hidden_size,
        "feed-forward size": config.feed_forward,
        "layers": config.layers,
        "heads": config.heads,
        "key-value heads": config.kv_heads,
        "head dimension": config.head_dim,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(
                f"{where}: {name}: {size!r} is not a positive whole number; download the config again"
            )
    for name, value in {
        "norm epsilon": config.norm_eps,
        "rope theta": config.rope_theta,
        "positions": config.max_positions,
    }.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{where}: {name}: {value!r} is not a positive number; download the config again")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise UserError(
            f"{where}: heads: {config.heads} heads, {config.kv_heads} key-value heads, {config.head_dim} "
            "dimensions each: "
            "key-value heads must divide heads and a head has an even size; download the config again"
        )
    if config.layers > len(source.shapes):
        raise UserError(
            f"{where}: layers: {config.layers}, but there are only {len(source.shapes)} tensors; download "
            "the weights again"
        )


def _check_fit(config: ModelConfig, source: TensorSource, where: str) -> None:
    """Raise UserError listing every tensor that is missing, misshapen or unknown."""
    expected = _file_shapes(config)
    shapes = {name: shape for name, shape in source.shapes.items() if not name.endswith(_HARMLESS)}
    optional = {HEAD: (config.vocab_size, config.hidden_size)} if config.tied_embeddings else {}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    for name, shape in (expected | optional).items():
        if name in shapes and shapes[name] != shape:
            problems.append(f"{name} is {list(shapes[name])}, expected {list(shape)}")
    problems += [f"{name} is unknown" for name in shapes if name not in expected and name not in optional]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{where}: the weights do not fit the config: {shown}")


def _file_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    V, D, N, K, H, F = (
        config.vocab_size,
        config.hidden_size,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.feed_forward,
    )
    kernels = {
        "q": (D, N * H),
        "k": (D, K * H),
        "v": (D, K * H),
        "o": (N * H, D),
        "gate": (D, F),
        "up": (D, F),
        "down": (F, D),
    }
    scales = {"attention_norm": D, "feed_forward_norm": D, "q_norm": H, "k_norm": H}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D), _FINAL_NORM: (D,)}
    if not config.tied_embeddings:
        shapes[HEAD] = (V, D)
    for i in range(config.layers):
        for (module, parameter), (name, transposed) in layer_tensors(config).items():
            if parameter == "kernel":
                inputs, outputs = kernels[module]
                shape = (outputs, inputs) if transposed else (inputs, outputs)
            else:
                shape = (kernels[module][1] if parameter == "bias" else scales[module],)
            shapes[f"model.layers.{i}.{name}"] = shape
    return shapes


def _at(shardings: dict[str, Any] | None, path: tuple[str, ...]) -> NamedSharding | None:
    sharding: Any = shardings
    for key in path:
        sharding = None if sharding is None else sharding[key]
    return sharding


def _table(source: TensorSource, name: str, embed: EmbedToken) -> Fill:
    """Fill rows [V,D]: those of the file, zeros after them, and the embed token's."""
    V, D = source.shapes[name]
    embed_id, row = embed.embed_id, None
    at_token = slice(embed_id, embed_id + 1), slice(0, D)
    if embed.fresh or embed_id >= V or not np.any(source.read(name, at_token)):
        total = np.zeros(D, np.float64)
        for rows in _row_chunks(slice(0, V), D):
            total += source.read(name, (rows, slice(0, D))).sum(axis=0, dtype=np.float64)
        row = (total / V).astype(np.float32)

    def fill(out: np.ndarray, index: Index) -> None:
        rows, columns = index
        known = min(max(V - rows.start, 0), rows.stop - rows.start)
        if known:
            _copy(source, name, out[:known], (slice(rows.start, rows.start + known), columns))
        out[known:] = 0.0
        if row is not None and rows.start <= embed_id < rows.stop:
            out[embed_id - rows.start] = row[columns]

    return fill


def _copy(source: TensorSource, name: str, out: np.ndarray, index: Index) -> None:
    """Copy a part of a tensor into `out`, a few rows at a time."""
    rows, *rest = index
    for chunk in _row_chunks(rows, math.prod(part.stop - part.start for part in rest)):
        out[chunk.start - rows.start : chunk.stop - rows.start] = source.read(name, (chunk, *rest))


def _row_chunks(rows: slice, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // (4 * width))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _equal(source: TensorSource, first: str, second: str) -> bool:
    V, D = source.shapes[first]
    parts = ((rows, slice(0, D)) for rows in _row_chunks(slice(0, V), D))
    return all(np.array_equal(source.read(first, part), source.read(second, part)) for part in parts)


class _Staging:
    """Host buffers for this process's shards of one array, put on their devices when filled.

    XLA on the host adopts the buffers instead of copying them: refill only when the array made of them is no
    longer in use.
    """

    def __init__(self, shape: tuple[int, ...], sharding: Sharding | None):
        self._shape, self._sharding = shape, sharding
        self._devices: dict[tuple[tuple[int, ...], ...], list[Any]] = {}
        if sharding is None:
            self._devices[tuple((0, size) for size in shape)] = [None]
        else:
            for device, index in sharding.addressable_devices_indices_map(shape).items():
                bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
                self._devices.setdefault(bounds, []).append(device)
        self._buffers = {
            bounds: _aligned([stop - start for start, stop in bounds]) for bounds in self._devices
        }

    def put(self, fill: Fill) -> jax.Array:
        shards = []
        for bounds, devices in self._devices.items():
            buffer = self._buffers[bounds]
            fill(buffer, tuple(slice(*bound) for bound in bounds))
            shards += [jax.device_put(buffer, device) for device in devices]
        if self._sharding is None:
            return shards[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def _aligned(shape: list[int]) -> np.ndarray:
    size = 4 * math.prod(shape)
    raw = np.empty(size + _HOST_ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _HOST_ALIGNMENT
    return raw[offset : offset + size].view(np.float32).reshape(shape)


def _stacked(
    source: TensorSource,
    names: list[str],
    transposed: bool,
    shape: tuple[int, ...],
    dtype: str,
    sharding: NamedSharding | None,
) -> jax.Array:
    """[L,…] on its devices, written layer by layer: the host holds one layer's tensor at a time."""
    staging = _Staging(
        shape[1:],
        None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])),
    )
    stack = jnp.zeros(shape, dtype, device=sharding)
    for i, name in enumerate(names):

        def fill(out: np.ndarray, index: Index, name: str = name) -> None:
            _copy(source, name, *((out.T, index[::-1]) if transposed else (out, index)))

        stack = _write_layer(stack, staging.put(fill), i, sharding)
        jax.block_until_ready(stack)
    return stack


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write_layer(stack: jax.Array, layer: jax.Array, i: int, sharding: NamedSharding | None) -> jax.Array:
    written = jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), i, 0)
    return written if sharding is None else jax.lax.with_sharding_constraint(written, sharding)


def parameter_hash(params: nnx.State) -> str:
    """sha256 over every array's path and bytes; of arrays over several processes all call it together."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(_everywhere(leaf)).tobytes())
    return digest.hexdigest()
