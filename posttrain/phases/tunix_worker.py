"""Supervised fine-tuning by Tunix's own trainer, as a program of its own: `python tunix_worker.py request.json`.

It runs where Tunix is installed and imports nothing of posttrain. `posttrain/phases/tunix.py` writes the request and
reads what is said on standard output, a JSON object a line: `begun` (the step it goes on after, and the rows of the
steps that the checkpoint vouches for), `step`, then `stopped`, `done` or `failed`. A line on standard input asks it to
save and stop; its end says that whoever asked is gone.

Axes: B row, T position, V token of the vocabulary, D in, R rank; N, K heads, H head size, C and S fused projections.
"""

import collections
import functools
import json
import math
import os
import re
import resource
import sys
import threading
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import qwix
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file
from tunix.models import safetensors_loader
from tunix.sft import hooks, peft_trainer

Request = dict[str, Any]


# ---------------------------------------------------------------- families


class Family(NamedTuple):
    """One of Tunix's model classes, and where it keeps what a Hugging Face folder names."""

    model: Any
    config: Any
    keys: dict[str, Any]
    """Patterns of stored names: the place in the model, and (permutation, shape) on the way there."""
    fuse: Any
    """What joins query, key and value into one tensor after that, if the model has them joined."""


def family_of(request: Request) -> Family:
    fields = {**request["config"]}
    match request["family"]:
        case "gemma" | "gemma2" as name:
            from tunix.models.gemma import model, params_safetensors

            kinds = model.AttentionType
            fields["attention_types"] = tuple(
                kinds.LOCAL_SLIDING if sliding else kinds.GLOBAL for sliding in fields.pop("sliding_layers")
            )
            config = model.ModelConfig(**fields)
            keys = params_safetensors._get_key_and_transform_mapping(config)
            if name == "gemma":
                # Tunix reads Gemma 2 alone; in the first one this norm stands before the feed-forward block.
                norm = r"model\.layers\.([0-9]+)\.post_attention_layernorm\.weight"
                keys[norm] = (r"layers.\1.pre_ffw_norm.scale", None)
            return Family(model.Gemma, config, keys, params_safetensors._make_preprocess_fn(config))
        case "gemma3_text":
            from tunix.models.gemma3 import model as gemma3
            from tunix.models.gemma3 import params_safetensors as gemma3_params

            by = gemma3.QueryPreAttentionNormalisation
            by_head = fields.pop("scaled_by_head")
            fields["query_pre_attn_norm"] = (
                by.BY_ONE_OVER_SQRT_HEAD_DIM if by_head else by.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
            )
            config = gemma3.ModelConfig(**fields, param_dtype=jnp.float32)
            keys = gemma3_params._get_key_and_transform_mapping(config)
            return Family(gemma3.Gemma3, config, keys, gemma3_params._make_preprocess_fn(config))
        case "llama":
            from tunix.models.llama3 import model as llama
            from tunix.models.llama3 import params as llama_params

            turn_by(llama, fields["rope_theta"])
            config = llama.ModelConfig(**fields)
            return Family(llama.Llama3, config, llama_params._get_key_and_transform_mapping(config), None)
        case "qwen2":
            from tunix.models.qwen2 import model as qwen2
            from tunix.models.qwen2 import params as qwen2_params

            config = qwen2.ModelConfig(**fields)
            return Family(qwen2.Qwen2, config, qwen2_params._get_key_and_transform_mapping(config), None)
        case "qwen3":
            from tunix.models.qwen3 import model as qwen3
            from tunix.models.qwen3 import params as qwen3_params

            turn_by(qwen3, fields["rope_theta"])
            config = qwen3.ModelConfig(**fields)
            return Family(qwen3.Qwen3, config, qwen3_params._get_key_and_transform_mapping(config), None)
    raise ValueError(f"no family {request['family']!r}")


def turn_by(module: Any, rope_theta: float) -> None:
    """Tunix 0.1.7 rotates Llama and Qwen 3 by its own θ of a million, whatever their configuration says."""
    module.apply_rope = functools.partial(module.apply_rope, rope_theta=rope_theta)


def placed(family: Family, name: str) -> tuple[str, Any]:
    """Where a stored tensor goes, and how it is changed on the way."""
    for pattern, (place, change) in family.keys.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, place, name), change
    raise Fault(f"Tunix's {family.model.__name__} has no place for the tensor {name}")


def stored_names(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model folder that the model reads."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping: it has keys() only)
    return shapes


def load(family: Family, folder: Path, tied: bool) -> nnx.Module:
    names = [name for name in stored_names(folder) if not (tied and name == "lm_head.weight")]
    for name in names:
        placed(family, name)
    return safetensors_loader.load_and_create_model(
        file_dir=str(folder),
        model_class=family.model,
        config=family.config,
        key_mapping=lambda config: family.keys,
        preprocess_fn=family.fuse,
        dtype=jnp.float32,
    )


# ---------------------------------------------------------------- LoRA

ENDS = ("_lora_a", "_lora_b")
GROUPED: dict[str, tuple[Any, ...]] = {
    "q_proj": ("q_einsum",),
    "k_proj": ("kv_einsum", 0),
    "v_proj": ("kv_einsum", 1),
    "o_proj": ("attn_vec_einsum",),
}
EQUAL_HEADS = GROUPED | {"q_proj": ("qkv_einsum", 0), "k_proj": ("qkv_einsum", 1), "v_proj": ("qkv_einsum", 2)}
"""Gemma's modules by the name of the projection, and its place in them; the second where every query has its key."""


def modules_of(family: Family, targets: list[str]) -> dict[str, tuple[Any, ...]]:
    """By target: the name of Tunix's module, and its place where several projections share one."""
    if family.fuse is None:
        return {target: (target,) for target in targets}
    joined = EQUAL_HEADS if family.config.num_heads == family.config.num_kv_heads else GROUPED
    found = {target: joined.get(target, (target,)) for target in targets}
    for target, (module, *_) in found.items():
        missing = [other for other, (name, *_) in joined.items() if name == module and other not in targets]
        if missing:
            raise Fault(f"Tunix has {target} and {missing[0]} in one tensor: target both or neither")
    return found


def with_adapter(model: nnx.Module, family: Family, lora: Request, seed: int) -> nnx.Module:
    """A by PEFT's start, uniform within 1/sqrt(in); B zero."""
    names = {module for module, *_ in modules_of(family, lora["targets"]).values()}
    provider = qwix.LoraProvider(
        module_path=rf"layers/\d+/(?:attn|mlp)/(?:{'|'.join(sorted(names))})",
        rank=lora["rank"],
        alpha=lora["alpha"],
        lora_a_initializer=jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    )

    def attached(model: nnx.Module) -> nnx.Module:
        return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(seed), **model.get_model_input())

    # One program in place of one for every operation.
    return nnx.jit(attached)(model)


def flat(state: Any) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(state)}


def adapter_tensors(model: nnx.Module, family: Family, folder: Path, targets: list[str]) -> dict[str, np.ndarray]:
    """The adapter under PEFT's names and in its shapes. Projections that share a tensor share A."""
    arrays, found = flat(nnx.state(model, nnx.LoRAParam)), {}
    modules = modules_of(family, targets)
    for name in stored_names(folder):
        path, _, target = name.removesuffix(".weight").rpartition(".")
        if target not in modules or not name.endswith(".weight"):
            continue
        module, *place = modules[target]
        layer, block = path.split(".")[2:4]
        at = f"layers.{layer}.{'attn' if block == 'self_attn' else 'mlp'}.{module}."
        a, b = (
            next(array for key, array in arrays.items() if key.startswith(at) and key.endswith(end)) for end in ENDS
        )
        rank = a.shape[-1]
        b = b[:, place[0]] if place else b
        found[f"base_model.model.{path}.{target}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, rank).T)
        found[f"base_model.model.{path}.{target}.lora_B.weight"] = np.ascontiguousarray(b.reshape(rank, -1).T)
    return found


# ---------------------------------------------------------------- full parameters


def model_tensors(model: nnx.Module, family: Family, folder: Path, tied: bool) -> dict[str, np.ndarray]:
    """Every tensor as the folder that was read names and shapes it, in float32."""
    arrays = parted(flat(nnx.state(model, nnx.Param)))
    found = {}
    for name, shape in stored_names(folder).items():
        if tied and name == "lm_head.weight":
            continue
        place, change = placed(family, name)
        array = arrays[place]
        permutation = change[0] if change else None
        if permutation:
            array = array.reshape([shape[axis] for axis in permutation]).transpose(np.argsort(permutation))
        found[name] = np.ascontiguousarray(array.reshape(shape), np.float32)
    return found


def parted(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the projections that Gemma joins apart, [D, N, H] each, as they were before they were joined."""
    found = dict(arrays)
    for key, array in arrays.items():
        layer = key.split(".")[1]
        match key.split(".")[-2]:
            case "q_einsum":
                parts = {"q": array}
            case "kv_einsum":
                parts = dict(zip("kv", array, strict=True))
            case "qkv_einsum":
                parts = dict(zip("qkv", array, strict=True))
            case _:
                continue
        found |= {f"tmp.layers.{layer}.attn.{part}": one.transpose(1, 0, 2) for part, one in parts.items()}
    return found


# ---------------------------------------------------------------- training


class Norm(NamedTuple):
    value: jax.Array


def recorded_norm() -> optax.GradientTransformation:
    """Changes nothing, and keeps the norm of the whole step's gradient: that of its parts is not its own."""

    def update(updates: Any, state: Norm, parameters: Any = None) -> tuple[Any, Norm]:
        return updates, Norm(optax.global_norm(updates))

    return optax.GradientTransformation(lambda parameters: Norm(jnp.zeros(())), update)


def optimizer_of(request: Request) -> optax.GradientTransformation:
    rates, adamw = jnp.asarray(request["learning_rates"], jnp.float32), request["adamw"]
    return optax.chain(
        recorded_norm(),
        optax.clip_by_global_norm(adamw["clip_norm"]),
        optax.adamw(
            lambda step: rates[step],
            b1=adamw["beta1"],
            b2=adamw["beta2"],
            eps=adamw["epsilon"],
            weight_decay=adamw["weight_decay"],
            mask=lambda parameters: jax.tree.map(lambda parameter: parameter.ndim >= 2, parameters),
        ),
    )


class Data:
    """Padded rows from the prepared dataset's own files."""

    def __init__(self, request: Request) -> None:
        folder = Path(request["dataset"])
        self.tokens, self.targets, self.offsets = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "targets", "offsets")
        )
        self.samples = np.load(request["samples"])
        """[step, row] sample of each step's rows; -1 is an empty row."""
        self.parts = request["parts"]
        self.length = request["length"]

    def part(self, step: int, part: int) -> dict[str, np.ndarray]:
        """Part of a 0-based step. `weight_B` makes the mean over the parts the mean over the step's targets."""
        rows = self.samples[step].reshape(self.parts, -1)
        tokens_BT = np.zeros((rows.shape[1], self.length), np.int32)
        targets_BT = np.zeros(tokens_BT.shape, bool)
        for row, sample in enumerate(rows[part]):
            if sample >= 0:
                span = slice(self.offsets[sample], self.offsets[sample + 1])
                size = int(span.stop - span.start)
                tokens_BT[row, :size], targets_BT[row, :size] = self.tokens[span], self.targets[span]
        used = [range(self.offsets[s], self.offsets[s + 1]) for s in self.samples[step] if s >= 0]
        count = sum(int(np.count_nonzero(self.targets[span.start + 1 : span.stop])) for span in used)
        weight_B = np.full(rows.shape[1], self.parts / count, np.float32)
        return {"tokens_BT": tokens_BT, "targets_BT": targets_BT, "weight_B": weight_B}


def loss(model: nnx.Module, tokens_BT: jax.Array, targets_BT: jax.Array, weight_B: jax.Array) -> jax.Array:
    """Cross entropy of the targets; a row sees itself alone, and what pads it comes after all that is looked at."""
    rows, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length), (rows, length))
    seen_BTT = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
    logits_BTV, _ = model(tokens_BT, positions_BT, None, seen_BTT)
    logits_BTV = logits_BTV[:, :-1].astype(jnp.float32)
    said_BT = jnp.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    missed_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - said_BT
    return jnp.sum(jnp.where(targets_BT[:, 1:], missed_BT, 0.0) * weight_B[:, None])


class Trainer(peft_trainer.PeftTrainer):
    """Tunix's trainer, which tells each step's row before it may save; a checkpoint holds the rows since the last."""

    def __init__(self, model: nnx.Module, request: Request) -> None:
        every = request["checkpoint_every_steps"]
        self.rows: collections.deque[dict[str, Any]] = collections.deque(maxlen=every)
        self._since = time.monotonic()
        config = peft_trainer.TrainingConfig(
            eval_every_n_steps=every,
            gradient_accumulation_steps=request["parts"],
            checkpoint_root_directory=request["checkpoints"],
            checkpointing_options=ocp.CheckpointManagerOptions(
                save_interval_steps=every,
                max_to_keep=request["keep_checkpoints"],
                enable_async_checkpointing=False,
            ),
        )
        super().__init__(model, optimizer_of(request), config)
        self.with_loss_fn(loss).with_gen_model_input_fn(lambda batch: batch)
        # What a step returns is bound to its device; given so from the first one on, there is one program to compile.
        for part in (self.model, self.optimizer):
            nnx.update(part, jax.device_put(nnx.state(part), jax.devices()[0]))
        self.rows.extend(self._restored_custom_metadata.get("rows", []))

    def custom_checkpoint_metadata(self) -> dict[str, Any]:
        return {"rows": list(self.rows)}

    def _post_process_train_step(self, aux: Any) -> None:
        parts = self.config.gradient_accumulation_steps
        if (self.iter_steps + 1) % parts:
            return
        step, now = self.train_steps + 1, time.monotonic()
        value = float(np.mean([np.asarray(one) for one in self._buffered_train_metrics.losses]))
        norm = float(self.optimizer.opt_state.inner_opt_state[0].value[...])
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise Fault(
                f"step {step}: loss {value}, gradient norm {norm}: not finite; nothing of this step was saved. Lower "
                f"optimizer.learning_rate, or look at this step's rows"
            )
        row = {"step": step, "loss": value, "gradient_norm": norm, "seconds": now - self._since}
        self._since = now
        self.rows.append(row | {"peak_memory_bytes": peak_memory()})
        say("step", row=self.rows[-1])


class Batches(hooks.DataHooks):
    """The next part of a step, or nothing more once all is done or a stop was asked for between two steps."""

    def __init__(self, data: Data, steps: int, stop: threading.Event) -> None:
        self.data, self.steps, self.stop = data, steps, stop

    def load_next_train_batch(self, train_ctx: peft_trainer.PeftTrainer) -> dict[str, np.ndarray] | None:
        step, part = divmod(train_ctx.iter_steps, self.data.parts)
        if step >= self.steps or (part == 0 and self.stop.is_set()):
            return None
        return self.data.part(step, part)

    def load_next_eval_batch(self, train_ctx: peft_trainer.PeftTrainer) -> None:
        return None


def peak_memory() -> int:
    """Of the accelerator, or of this process on a CPU."""
    told = jax.devices()[0].memory_stats() or {}
    return int(told.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


# ---------------------------------------------------------------- the program

OUT = os.fdopen(os.dup(1), "w", buffering=1)


class Fault(Exception):
    """What the user should read."""


def say(event: str, **fields: Any) -> None:
    OUT.write(json.dumps({"event": event, **fields}) + "\n")


def listen(stop: threading.Event) -> None:
    for _ in sys.stdin:
        stop.set()
    os._exit(1)


def run(request: Request) -> None:
    jax.config.update("jax_default_matmul_precision", "bfloat16" if request["precision"] == "bfloat16" else "highest")
    stop = threading.Event()
    threading.Thread(target=listen, args=(stop,), daemon=True).start()
    family, folder = family_of(request), Path(request["base"])
    model = load(family, folder, request["tied"])
    if request["lora"]:
        model = with_adapter(model, family, request["lora"], request["seed"])
    trainer = Trainer(model, request)
    versions = {name: metadata.version(name) for name in ("google-tunix", "qwix", "jax", "flax", "optax")}
    say("begun", step=trainer.train_steps, rows=list(trainer.rows), versions=versions)
    trainer.with_data_hooks(Batches(Data(request), request["steps"], stop))
    trainer.train(())
    if trainer.train_steps < request["steps"]:
        say("stopped", step=trainer.train_steps)
        return
    if request["lora"]:
        tensors = adapter_tensors(model, family, folder, request["lora"]["targets"])
    else:
        tensors = model_tensors(model, family, folder, request["tied"])
    save_file(tensors, request["output"], metadata={"format": "pt"})
    say("done")


def main() -> None:
    # Libraries print; what is read is the protocol alone.
    os.dup2(2, 1)
    try:
        run(json.loads(Path(sys.argv[1]).read_text()))
    except Fault as fault:
        say("failed", reason=str(fault))
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


def leave(code: int) -> None:
    """At once: the thread that waits for input would be in the way of an orderly end."""
    OUT.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
