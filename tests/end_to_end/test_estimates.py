"""What `plan` promises against what was used: memory and disk of runs, and of a GPU's steps that were recorded."""

import json
from pathlib import Path

import pytest

from posttrain.host import machine
from posttrain.pipeline import memory
from posttrain.pipeline.estimate import disk_bytes, facts_of
from posttrain.pipeline.plan import plan_run
from posttrain.pipeline.sizes import KNOWN, ModelSize, model_size
from posttrain.recipe.load import find
from posttrain.recipe.types import Execution, HubBase, Lora, Recipe
from posttrain.recipes.quickstart import TARGETS
from posttrain.run.folder import RunFolder
from tests.end_to_end.runs import posttrain, result

SIZED = Path(__file__).parent / "recipes" / "sized.py"
GPU = Path(__file__).parents[2] / "bench" / "results" / "gpu_sft.json"
MEASURED = [cell for cell in json.loads(GPU.read_text())["rows"] if cell["peak_bytes"] is not None]
WITHIN = 0.15
FITS = "--micro-batch-tokens 32768"


def recipe(name: str, **flags: object) -> Recipe:
    found = find(name)
    return found.build({flag.name: flag.default for flag in found.flags} | flags)  # type: ignore[arg-type]


def disk_used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("phases/**/*") if path.is_file())


@pytest.mark.parametrize(
    ("hidden", "samples", "recompute"),
    [(0, 4, "none"), (0, 64, "none"), (0, 64, "full"), (256, 64, "none"), (256, 64, "selective")],
)
def test_memory_and_disk_of_a_training_phase(hidden: int, samples: int, recompute: str, tmp_path: Path) -> None:
    words = ["--hidden", str(hidden), "--samples", str(samples), "--name", "r", "--runs-dir", str(tmp_path)]
    how = ["--threads", "1", "--device", "cpu", "--recompute", recompute, "--checkpoint-every-steps", "1"]
    execution = Execution(threads=1, device="cpu", recompute=recompute, checkpoint_every_steps=1)  # type: ignore[arg-type]
    wanted = recipe(str(SIZED), hidden=hidden, samples=samples)
    if not hidden:
        promised = plan_run(RunFolder(tmp_path / "r"), wanted, execution)
    done = posttrain("run", str(SIZED), *words, *how)
    assert done.returncode == 0, done.stderr
    if hidden:
        # A fresh base's vocabulary is made by the run: only then can rows be rendered.
        run = RunFolder(tmp_path / "again")
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "base").symlink_to(tmp_path / "r" / "base")
        facts = facts_of(wanted, run, execution)
        need = memory.memory(wanted, wanted.phases[1], facts.size, execution, "cpu", facts.rows)
        disk = disk_bytes(wanted, wanted.phases, facts, execution)
    else:
        need, disk = promised.phases[1].needs.memory, promised.disk_bytes
    used = result(tmp_path, "train", "r")["metrics"]["peak_memory_bytes"]
    assert need is not None
    print(f"\nhidden {hidden}, {samples} samples, {recompute}: memory {need.total / used:.3f} of {used / 1e6:.0f} MB")
    assert need.total == pytest.approx(used, rel=WITHIN)
    # One checkpoint more than is kept exists only while the newest is written.
    trained, _ = memory.trainable(wanted, wanted.phases[1], model_size(wanted, RunFolder(tmp_path / "r")))  # type: ignore[arg-type]
    kept = min(execution.keep_checkpoints, 2)
    most = disk_used(tmp_path / "r") + 12 * trained * (min(execution.keep_checkpoints + 1, 2) - kept)
    print(f"disk {disk / most:.3f} of {most / 1e6:.1f} MB")
    assert disk == pytest.approx(most, rel=WITHIN)


@pytest.mark.parametrize("cell", MEASURED, ids=lambda cell: cell["cell"])
def test_memory_of_a_gpus_steps(cell: dict) -> None:
    """GPT-OSS-20B on an H200, as bench/gpu/sft.py measured it."""
    wanted = recipe("tui")
    assert isinstance(wanted.base, HubBase) and cell["layers"] == 24
    known = model_size(wanted, RunFolder(Path("nowhere")))
    size = ModelSize(known.shapes, known.active_experts, is_packed=cell["packed"])
    weights = "packed" if cell["packed"] else "unpacked"
    execution = Execution(device="cuda", base_weights=weights, **cell["execution"])
    trained = size.adapter_parameters(Lora(kind="lora", rank=cell["rank"], alpha=1, targets=TARGETS))
    promised = (
        memory.PROCESS_BYTES["cuda"]
        + memory.weight_bytes(size, 2, cell["packed"])
        + 16 * trained
        + memory.activation_bytes(size, cell["rank"], cell["tokens"], execution, 2, "cuda")
    )
    print(f"\n{cell['cell']}: {promised / cell['peak_bytes']:.3f} of {cell['peak_bytes'] / 1e9:.1f} GB")
    assert promised == pytest.approx(cell["peak_bytes"], rel=WITHIN)


def test_the_known_base_has_the_facts_of_its_card() -> None:
    size = model_size(recipe("tui"), RunFolder(Path("nowhere")))
    assert size.parameters / 1e9 == pytest.approx(20.91, abs=0.01) and KNOWN
    ranks = {
        rank: size.adapter_parameters(Lora(kind="lora", rank=rank, alpha=1, targets=TARGETS)) for rank in (64, 128)
    }
    assert ranks[64] / 1e6 == pytest.approx(739.6, abs=0.1) and ranks[128] / 1e6 == pytest.approx(1479.3, abs=0.1)
    packed = memory.weight_bytes(size, 2, packed=True) - 2 * size.expert_parameters // 24
    assert packed / 1e9 == pytest.approx(13.8, abs=0.3)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 80 GB card as its driver tells it, in a machine with 200 GB of memory and 20 GB of disk."""
    gpu = machine.Gpu("H100", 81559 * 2**20, 81559 * 2**20, "570", "9.0")
    monkeypatch.setattr(machine, "gpus", lambda: [gpu])
    monkeypatch.setattr(machine, "memory_bytes", lambda: 200 * 10**9)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 20 * 10**9)


def short_of(wanted: Recipe, execution: Execution) -> dict[str, str]:
    """What is to be changed, by the phase, or `disk`, that there is no room for."""
    found = plan_run(RunFolder(Path("nowhere") / "r"), wanted, execution).shortages
    return {one.what if one.what == "disk" else one.said.split()[0]: one.field for one in found}


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("profile", ["aggressive", "balanced", "conservative"])
def test_the_option_that_is_named_makes_tui_fit_80_gb(profile: str) -> None:
    wanted = recipe("tui", batch_profile=profile)
    execution = Execution(**wanted.suggested.model_dump(exclude={"micro_batch_tokens"}, exclude_none=True))
    short = short_of(wanted, execution)
    assert "--keep-checkpoints 1" in short.pop("disk")
    assert short == dict.fromkeys(("agent_sft", "grpo") if profile == "aggressive" else ("grpo",), FITS)
    fitting = execution.model_copy(update={"micro_batch_tokens": int(FITS.split()[1])})
    assert short_of(wanted, fitting).keys() == {"disk"}


@pytest.mark.usefixtures("h100")
def test_options_are_put_together_where_none_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("A100", 40 * 10**9, 40 * 10**9, "570", "8.0")])
    wanted = recipe("tui", batch_profile="aggressive")
    named = short_of(wanted, Execution())["tool_sft"]
    assert named == "--base-weights packed --recompute full --mlp-tile-tokens 2048 --micro-batch-tokens 32768"
    words = named.replace("--", "").replace("-", "_").split()
    fields = {
        name: int(value) if value.isdigit() else value for name, value in zip(words[::2], words[1::2], strict=True)
    }
    assert "tool_sft" not in short_of(wanted, Execution(**fields))


@pytest.mark.usefixtures("h100")
def test_what_nothing_makes_small_enough_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 64 * 10**9)
    assert short_of(recipe("tui"), Execution())["export"] == "another base, or a machine with more"
