"""How much host memory an import takes beyond the parameters: `python tests/helpers/measure_import_memory.py
CHECKPOINT FSDP [random DTYPE]`.

Counted are the anonymous pages of the process (RssAnon), sampled while the checkpoint is loaded: the pages of
the mapped files are page cache, which the system takes back when it needs it, so that the resident set as a
whole (VmHWM) would count what is not spent.
"""

import json
import sys
from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

STORED = {"float32": np.float32, "bfloat16": bfloat16, "float16": np.float16}


def write_random_checkpoint(
    folder: Path,
    dtype: str,
    *,
    V: int = 60_000,
    D: int = 512,
    F: int = 1536,
    layers: int = 8,
    shards: int = 4,
) -> Path:
    """A Llama with its own head, weights from a seed, spread over several files; returns the folder."""
    from helpers.tiny_models import byte_tokenizer

    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.{name}_proj.weight": (D // 2 if name in "kv" else D, D) for name in "qkvo"
        }
        shapes |= {
            f"{at}.mlp.gate_proj.weight": (F, D),
            f"{at}.mlp.up_proj.weight": (F, D),
            f"{at}.mlp.down_proj.weight": (D, F),
        }
        shapes |= {f"{at}.{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
    folder.mkdir(parents=True)
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(shapes)
    }
    for file in sorted(set(weight_map.values())):
        held = [name for name in shapes if weight_map[name] == file]
        save_file(
            {
                name: generator.standard_normal(shapes[name], np.float32).astype(STORED[dtype])
                for name in held
            },
            folder / file,
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": D // 8}
    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": layers,
        "max_position_embeddings": 512,
    }
    other = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(heads | sizes | other))
    byte_tokenizer().save_pretrained(folder)
    return folder


def measure(folder: Path, fsdp: int) -> dict[str, float]:
    """Peak memory of an import, and of walking through all tensors of an export, beyond what is there before
    and the parameters."""
    import jax
    from flax import nnx
    from helpers.peak_memory import PeakMemory
    from helpers.tiny_models import write_tiny_checkpoint

    from search_r3_jax.hub.load_model import load_model, torch_tensors
    from search_r3_jax.hub.safetensors_folder import SafetensorsFolder
    from search_r3_jax.mesh import make_mesh

    mesh = make_mesh(fsdp=fsdp) if fsdp > 1 else None
    # The libraries' own memory is not the import's: all of it is there before counting begins.
    small = write_tiny_checkpoint(folder.parent / f"small-{fsdp}", "llama")
    for _ in torch_tensors(load_model(small, mesh=mesh).decoder):
        pass
    largest = max(4 * int(np.prod(shape)) for shape in SafetensorsFolder(folder).shapes.values())
    with PeakMemory() as loading:
        model = load_model(folder, mesh=mesh)
    parameters = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.decoder, nnx.Param)))
    with PeakMemory() as exporting:
        for _ in torch_tensors(model.decoder):
            pass
    beyond = loading.peak - loading.start - parameters
    return {
        "devices": fsdp,
        "parameters_mb": parameters / 2**20,
        "largest_mb": largest / 2**20,
        "import_beyond_mb": beyond / 2**20,
        "import_ratio": beyond / largest,
        "export_ratio": (exporting.peak - exporting.start) / largest,
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    checkpoint = Path(sys.argv[1])
    if sys.argv[3:4] == ["random"]:
        write_random_checkpoint(checkpoint, sys.argv[4])
    print(json.dumps(measure(checkpoint, int(sys.argv[2]))))
