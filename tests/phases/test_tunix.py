"""Tunix beside PyTorch on toys of every family: losses, what is saved, and what a stop or a kill costs."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import prepare_dataset
from posttrain.errors import InputError, MachineError, ModelError, PhaseFault, Stopped
from posttrain.host.tunix import PACKAGES, PYTHON, interpreter
from posttrain.phases import sft
from posttrain.phases.context import ModelState, PhaseContext, PhaseOutcome
from posttrain.phases.tunix import WORKER, refuse_other_work
from posttrain.phases.tunix_models import as_tunix
from posttrain.recipe.types import Execution, Recipe, RowBatch, SftPhase
from posttrain.recipes.trace_sft import trace_sft
from posttrain.run.folder import RunFolder
from posttrain.run.journal import Journal, read_lines
from tests.chat.conftest import byte_level_definition
from tests.engine.toys import save_toy, toy_config

STEPS = 5
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 288}
TOYS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 2},
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    "qwen3": {"tie_word_embeddings": True},
}
"""What Tunix can compute: windows as its own, and queries scaled by the size of a head."""

try:
    MISSING = None if interpreter() else ""
except MachineError:
    MISSING = f"Tunix is missing: make .tools/stamps/tunix, and {PYTHON}=.tools/tunix/bin/python"
needs_tunix = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")  # MISSING says how to install it


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Most of a worker's time is XLA's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("jax")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A toy's folder by its architecture, with a vocabulary that Gemma's turns can be written in."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            place = save_toy(
                tmp_path_factory.mktemp("toys") / architecture, 0, architecture, **SMALL, **TOYS[architecture]
            )
            specials = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")
            (place / "tokenizer.json").write_text(byte_level_definition(specials))
            made[architecture] = place
        return made[architecture]

    return folder


def recipe_on(base: Path, rank: int, **changes: Any) -> Recipe:
    """`trace_sft` on twenty duels, in float32."""
    recipe = trace_sft(base=str(base), rank=rank, steps=STEPS, samples_per_step=3, learning_rate=1e-2)
    data, before, training, after = recipe.phases
    traces = data.datasets[0]
    few = traces.sources[0].model_copy(update={"count": 20})
    data = data.model_copy(update={"datasets": (traces.model_copy(update={"sources": (few,)}),)})
    training = training.model_copy(update={"precision": "float32", **changes})
    return recipe.model_copy(update={"phases": (data, before, training, after)})


class Run:
    """The SFT phase of a recipe, carried out in this process on prepared data."""

    def __init__(self, folder: Path, recipe: Recipe, backend: str, **execution: Any) -> None:
        self.run, self.recipe, self.said, self.stop_at = RunFolder(folder), recipe, list[str](), 10**9
        self.at_step: Callable[[int], None] = lambda step: None
        self.base = Path(recipe.base.path)
        self.execution = Execution(backend=backend, device="cpu", threads=1, checkpoint_every_steps=2, **execution)
        self.steps = 0
        data = recipe.phases[0].datasets[0]
        place = self.run.phase("data").data / data.name
        prepare_dataset(data, recipe.chat, Tokenizer.load(self.base), place, "any", 1, lambda rows: None)

    def advance(self, amount: float = 1, **shown: object) -> None:
        self.steps += 1
        self.at_step(self.steps)

    def train(self) -> PhaseOutcome:
        state = ModelState(base=str(self.base), base_digest="", adapter=None, adapter_digest=None, phase="base")
        progress: Any = lambda *words: nullcontext(SimpleNamespace(advance=self.advance))  # noqa: E731
        context = PhaseContext(
            recipe=self.recipe,
            execution=self.execution,
            run=self.run,
            folder=self.run.phase("sft"),
            fingerprint="",
            states={"base": state},
            results={},
            journal=Journal(self.run.events),
            progress=progress,
            stop_requested=lambda: self.steps >= self.stop_at,
            say=self.said.append,
        )
        return sft.run(context, self.recipe.phases[2])

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(read_lines(self.run.phase("sft").metrics))

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def final(self) -> Path:
        return self.run.phase("sft").final

    def tensors(self) -> dict[str, torch.Tensor]:
        name = "adapter_model" if (self.final / "adapter_config.json").exists() else "model"
        return load_file(self.final / f"{name}.safetensors")


def loaded(base: Path, final: Path) -> Any:
    if (final / "adapter_config.json").exists():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final)
    return AutoModelForCausalLM.from_pretrained(final)


TOKENS = [[3, 250, 17, 99, 120, 7, 42, 200, 5, 5, 61, 33]]
ASK = f"""
import importlib.util, json, sys
import numpy as np
spec = importlib.util.spec_from_file_location("worker", {str(WORKER)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
request = json.load(open(sys.argv[1]))
worker.jax.config.update("jax_default_matmul_precision", "highest")
family = worker.family_of(request)
model = worker.load(family, worker.Path(request["base"]), request["tied"])
if request["lora"]:
    model = worker.with_adapter(model, family, request["lora"], request["seed"])
trainer = worker.Trainer(model, request)
assert trainer.train_steps == request["steps"]
tokens = worker.jnp.array({TOKENS})
size = tokens.shape[1]
mask = worker.jnp.tril(worker.jnp.ones((1, size, size), bool))
ask = worker.nnx.jit(lambda model: model(tokens, worker.jnp.arange(size)[None], None, mask)[0])
logits = ask(model)
np.save(sys.argv[2], np.asarray(logits))
"""


def tunix_logits(run: Run, place: Path) -> np.ndarray:
    """Of the model in Tunix itself, as its last checkpoint has it."""
    request = run.run.phase("sft").path / "tunix" / "request.json"
    subprocess.run([interpreter(), "-c", ASK, str(request), str(place)], check=True, capture_output=True)
    return np.load(place)


@needs_tunix
@pytest.mark.parametrize(("architecture", "rank"), [("gemma", 0), ("gemma", 4), ("qwen3", 4)])
def test_losses_are_pytorchs_and_what_is_saved_has_tunix_logits(
    architecture: str, rank: int, toy: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_on(toy(architecture), rank)
    ours, theirs = Run(tmp_path / "torch", recipe, "torch"), Run(tmp_path / "tunix", recipe, "tunix")
    ours.train()
    outcome = theirs.train()
    assert theirs.losses[0] == pytest.approx(ours.losses[0], abs=1e-5)
    assert theirs.losses[-1] < theirs.losses[0] - 0.1
    told = ("step", "learning_rate", "tokens", "target_tokens")
    assert [[row[name] for name in told] for row in theirs.rows] == [[row[name] for name in told] for row in ours.rows]
    assert outcome.details["packages"].keys() >= {"google-tunix", "jax"}
    assert theirs.rows[0].keys() == ours.rows[0].keys() and outcome.metrics["final_loss"] == theirs.losses[-1]
    if rank == 0:
        # From the same weights all steps agree; an adapter begins with other random numbers.
        assert theirs.losses == pytest.approx(ours.losses, abs=1e-5)
        norms = [[row["gradient_norm"] for row in run.rows] for run in (theirs, ours)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert {name: tensor.shape for name, tensor in theirs.tensors().items()} == {
        name: tensor.shape for name, tensor in ours.tensors().items()
    }
    with torch.no_grad():
        model = loaded(toy(architecture), theirs.final).eval()
        logits = model(torch.tensor(TOKENS)).logits.numpy()
        before = AutoModelForCausalLM.from_pretrained(toy(architecture)).eval()(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(logits - before).max() > 0.1
    own = tunix_logits(theirs, tmp_path / "logits.npy")
    apart = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    print(f"\n{architecture}, rank {rank}: first loss differs by {apart[0]:.1e}, any by {max(apart):.1e}; ", end="")
    print(f"{theirs.losses[0]:.2f} to {theirs.losses[-1]:.2f}; saved logits differ by {np.abs(logits - own).max():.1e}")
    np.testing.assert_allclose(logits, own, atol=2e-5)


@needs_tunix
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "llama", "qwen2"])
def test_other_families_begin_at_pytorchs_loss(architecture: str, toy: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_on(toy(architecture), 0, steps=1)
    ours, theirs = Run(tmp_path / "torch", recipe, "torch"), Run(tmp_path / "tunix", recipe, "tunix")
    ours.train()
    theirs.train()
    assert theirs.losses == pytest.approx(ours.losses, abs=1e-5)
    for name, tensor in ours.tensors().items():
        torch.testing.assert_close(theirs.tensors()[name], tensor, atol=1e-4, rtol=0, msg=name)


@needs_tunix
def test_a_stopped_and_a_killed_run_go_on_to_the_same_bits(toy: Callable[[str], Path], tmp_path: Path) -> None:
    """In parts of a batch, and in rows that are filled with several samples."""
    batch = RowBatch(kind="rows", rows=2, row_tokens=1024)
    recipe = recipe_on(toy("qwen3"), 4, batch=batch, steps=7)
    whole = Run(tmp_path / "whole", recipe, "tunix", micro_batch_tokens=1024)
    whole.train()
    request = json.loads((whole.run.phase("sft").path / "tunix/request.json").read_text())
    assert request["parts"] > 1

    broken = Run(tmp_path / "broken", recipe, "tunix", micro_batch_tokens=1024)
    broken.stop_at = 2
    with pytest.raises(Stopped, match=r"stopped in sft after step \d of 7; saved"):
        broken.train()
    assert 2 <= len(broken.rows) < 7

    broken.stop_at, broken.at_step = 10**9, lambda step: kill_children() if len(broken.rows) == 5 else None
    with pytest.raises(PhaseFault, match="Tunix ended with -9"):
        broken.train()
    assert any("continues after step" in line for line in broken.said)
    broken.at_step = lambda step: None
    broken.train()
    assert [row["step"] for row in broken.rows] == [1, 2, 3, 4, 5, 6, 7]
    assert broken.losses == whole.losses
    for name, tensor in whole.tensors().items():
        assert torch.equal(broken.tensors()[name], tensor), name


def kill_children() -> None:
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if WORKER.name in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(int(child), signal.SIGKILL)


@pytest.mark.parametrize("named", [None, "no-such-python"])
def test_without_tunix_the_way_to_it_is_told(named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    if named:
        monkeypatch.setenv(PYTHON, named)
    with pytest.raises(MachineError, match="no such program" if named else r"pip install google-tunix") as caught:
        interpreter()
    assert caught.value.exit_code == 5 and PACKAGES in (WORKER.parents[2] / "Makefile").read_text()


def test_what_only_pytorch_does_is_refused_with_all_reasons() -> None:
    training = trace_sft(quick_test=True).phases[2]
    assert isinstance(training, SftPhase)
    optimizer = training.optimizer.model_copy(update={"moments": "8bit"})
    asked = training.model_copy(update={"precision": "nf4", "optimizer": optimizer})
    state = ModelState(base="b", base_digest="", adapter="a", adapter_digest="", phase="x")
    with pytest.raises(InputError, match=r"merge it first; precision is nf4; optimizer\.moments is 8bit\. Use"):
        refuse_other_work(asked, state)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gpt_oss", {}, "Tunix has no gpt_oss; it has gemma, gemma2, gemma3_text, llama, qwen2, qwen3"),
        ("qwen2", {}, "layer_types is True, not False"),
        ("gemma2", {}, "query_pre_attn_scalar is 24, not 16"),
        ("gemma3_text", {}, "layer_types is .*; query_pre_attn_scalar is False"),
        (
            "llama",
            {"attention_bias": True, "hidden_act": "gelu"},
            "hidden_act is 'gelu', not 'silu'; attention_bias is True",
        ),
        ("gemma", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, not 1e-06"),
    ],
)
def test_models_that_tunix_would_compute_otherwise_are_refused(
    architecture: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        as_tunix(toy_config(architecture, **changes))
