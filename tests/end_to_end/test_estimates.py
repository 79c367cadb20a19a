"""What `plan` promises against what was used: memory and disk of runs, and of a GPU's steps that were recorded."""

import json
from pathlib import Path

import pytest

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


def test_what_does_not_fit_is_said_with_the_field_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.host import machine

    gpu = machine.Gpu("H100", 80 * 10**9, 80 * 10**9, "570", "9.0")
    monkeypatch.setattr(machine, "gpus", lambda: [gpu])
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 20 * 10**9)
    found = plan_run(RunFolder(tmp_path / "r"), recipe("tui"), Execution()).shortages
    assert found[0].what == "disk" and "--keep-checkpoints 1" in found[0].field
    tool = next(one for one in found if one.said.startswith("tool_sft"))
    assert (
        "its largest part is activations" in tool.said
        and tool.field == "--recompute full, then --mlp-tile-tokens 2048, then a smaller --micro-batch-tokens"
    )
