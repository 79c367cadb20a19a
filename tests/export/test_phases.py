"""The merge and export phases on a toy run, through the context the pipeline gives them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from posttrain.errors import PhaseFault, Stopped
from posttrain.phases import export as export_phase
from posttrain.phases import merge as merge_phase
from posttrain.phases.context import ModelState, PhaseContext
from posttrain.phases.export import choose
from posttrain.recipe.types import (
    NOTHING_SUGGESTED,
    USUAL_TOLERANCES,
    Candidate,
    Dataset,
    Execution,
    ExportPhase,
    FolderBase,
    HarmonyFormat,
    MergePhase,
    PreparePhase,
    Recipe,
    WorldSource,
)
from posttrain.run.folder import RunFolder, digest_folder
from posttrain.run.journal import Journal
from tests.export.test_gguf import needs_llama
from tests.export.toys import toy_adapter, toy_base

CHAT = HarmonyFormat(
    kind="harmony",
    date="2026-01-01",
    knowledge_cutoff="2024-06",
    reasoning_effort="low",
    identity="You are a toy.",
)
TASKS = Dataset(
    name="tasks",
    content="tasks",
    sources=(WorldSource(kind="world", world="tools", split="heldout", count=6, seed=1),),
    max_tokens=512,
    too_long="drop",
    faulty_share=0.0,
)
PREPARE = PreparePhase(kind="prepare", name="prepare", gates=(), datasets=(TASKS,))
MERGE = MergePhase(kind="merge", name="merge", gates=(), model="sft", dtype="bfloat16")


class SilentProgress:
    def __enter__(self) -> "SilentProgress":
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def advance(self, amount: float = 1, **shown: float | str) -> None:
        return None


def export(dtype: str = "float32", **changes: Any) -> ExportPhase:
    settings: dict[str, Any] = {
        "kind": "export",
        "name": "export",
        "gates": (),
        "candidates": (
            Candidate(model="sft", evaluation="eval-sft"),
            Candidate(model="grpo", evaluation="eval-grpo"),
        ),
        "metrics": ("tools.exact", "repair.hidden"),
        "formats": ("adapter", "hf", "gguf"),
        "dtype": dtype,
        "gguf_type": "f32",
        "verify_dataset": "tasks",
        "verify_prompts": 4,
        "tolerances": USUAL_TOLERANCES,
    }
    return ExportPhase(**(settings | changes))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    base = toy_base(folder / "base", max_position_embeddings=2048)
    toy_adapter(base, folder / "sft", seed=1)
    toy_adapter(base, folder / "grpo", seed=2)
    return folder


def context(source: Path, run: Path, phase: MergePhase | ExportPhase, **scores: float) -> PhaseContext:
    recipe = Recipe(
        name="toy",
        flags={},
        seed=7,
        base=FolderBase(kind="folder", path=str(source / "base")),
        chat=CHAT,
        phases=(PREPARE, MERGE, export()),
        suggested=NOTHING_SUGGESTED,
    )
    write_tasks(run / "phases" / "prepare" / "data" / "tasks")
    states = {
        name: ModelState(
            base=str(source / "base"),
            base_digest=digest_folder(source / "base"),
            adapter=str(source / name),
            adapter_digest=digest_folder(source / name),
            phase=name,
        )
        for name in ("sft", "grpo")
    }
    metrics = {"sft": (0.9, 0.1), "grpo": (0.8, 0.5)}
    return PhaseContext(
        recipe=recipe,
        execution=Execution(threads=1),
        run=RunFolder(run),
        folder=RunFolder(run).phase(phase.name),
        fingerprint="0" * 64,
        states=states,
        results={
            "prepare": {},
            **{
                f"eval-{name}": {"metrics": {"tools.exact": tool, "repair.hidden": repair}}
                for name, (tool, repair) in metrics.items()
            },
        },
        journal=Journal(run / "events.jsonl"),
        progress=lambda label, total, unit, done: SilentProgress(),
        stop_requested=lambda: False,
        say=lambda line: None,
    )


def write_tasks(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"t{number}",
            "world": "tools",
            "prompt": {"messages": [{"role": "user", "content": f"run the tests of app{number}.py"}]},
            "reference": {},
            "solution": [],
        }
        for number in range(6)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dataset.json").write_text(json.dumps({"content": "tasks", "counts": {"rows": len(rows)}}))


def test_merge_writes_a_folder_of_the_promised_size_that_a_later_phase_can_load(source: Path, tmp_path: Path) -> None:
    outcome = merge_phase.run(context(source, tmp_path, MERGE), MERGE)
    final = tmp_path / "phases" / "merge" / "final"
    tensors = load_file(final / "model.safetensors")
    assert outcome.metrics["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert outcome.metrics["size_ratio"] == 1.0
    assert outcome.metrics["missing_tensors"] == outcome.metrics["unexpected_tensors"] == 0
    assert outcome.metrics["smoke_characters"] > 0
    assert outcome.counts == {"tensors": len(tensors), "merged_tensors": 4 * 6}
    assert outcome.state is not None
    assert (outcome.state.base, outcome.state.adapter) == ("phases/merge/final", None)
    assert outcome.state.base_digest == digest_folder(final)
    assert merge_phase.run(context(source, tmp_path, MERGE), MERGE).details == outcome.details


def test_missing_and_unexpected_tensors_are_counted(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "base" / "model.safetensors")
    tensors["model.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "base" / "config.json").read_bytes())
    metrics = merge_phase.folder_metrics(tmp_path, torch.float32)
    assert (metrics["missing_tensors"], metrics["unexpected_tensors"]) == (1, 1)


def test_the_best_candidate_is_the_one_with_the_highest_mean(source: Path, tmp_path: Path) -> None:
    given = context(source, tmp_path, export())
    chosen, table = choose(given.results, export().candidates, export().metrics)
    assert chosen.model == "grpo"
    assert [(row["model"], row["mean"], row["chosen"]) for row in table] == [
        ("sft", 0.5, False),
        ("grpo", 0.65, True),
    ]
    assert choose(given.results, export().candidates, ("tools.exact",))[0].model == "sft"
    given.results["eval-sft"]["metrics"]["repair.hidden"] = 0.5
    given.results["eval-grpo"]["metrics"]["tools.exact"] = 0.9
    assert choose(given.results, export().candidates, export().metrics)[0].model == "grpo"
    with pytest.raises(PhaseFault, match=r"eval-sft has no metric 'tools\.answer'"):
        choose(given.results, export().candidates, ("tools.answer",))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_writes_every_format_and_measures_it(source: Path, tmp_path: Path, dtype: str) -> None:
    phase = export(dtype)
    outcome = export_phase.run(context(source, tmp_path, phase), phase)
    exports = tmp_path / "phases" / "export" / "exports"
    assert outcome.outputs == (exports / "adapter", exports / "hf", exports / "gguf-f32")
    assert digest_folder(exports / "adapter") == digest_folder(source / "grpo")
    assert GGUFReader(exports / "gguf-f32" / "toy-f32.gguf").tensors
    assert outcome.details["chosen"] == "grpo"
    rows = {row["pair"]: row for row in outcome.details["verification"]}
    assert rows["engine / merged"]["status"] == rows["PEFT / merged"]["status"] == "agrees"
    assert outcome.metrics["hf_max_abs"] <= 1e-4
    assert outcome.metrics["gguf_ok"] == 1
    if dtype == "bfloat16":
        rounded = rows["merged bfloat16 / merged"]
        assert rounded["status"] == "agrees" and rounded["max_abs"] > 1e-3
        assert rounded["left_perplexity"] == pytest.approx(rounded["right_perplexity"], rel=0.05)
    assert sorted(path.name for path in exports.parent.iterdir()) == ["exports"]
    kept = export_phase.run(context(source, tmp_path, phase), phase)
    assert sum("kept" in note for note in kept.notes) == 3
    assert kept.state == outcome.state
    assert kept.metrics == outcome.metrics


@needs_llama
def test_export_is_verified_in_llama_cpp(source: Path, tmp_path: Path) -> None:
    phase = export(formats=("gguf",))
    outcome = export_phase.run(context(source, tmp_path, phase), phase)
    assert outcome.metrics["gguf_verified"] == outcome.metrics["gguf_ok"] == 1
    assert outcome.metrics["gguf_greedy_agreement"] == 1
    assert outcome.outputs == (tmp_path / "phases" / "export" / "exports" / "gguf-f32",)
    assert outcome.state is not None
    assert outcome.state.phase == "grpo"


def test_a_merge_beyond_the_tolerance_is_a_fault_with_its_numbers(source: Path, tmp_path: Path) -> None:
    phase = export(tolerances=USUAL_TOLERANCES.model_copy(update={"merged_logits": 1e-12}))
    with pytest.raises(PhaseFault, match=r"engine / merged: logits differ by .* the limit is 1e-12"):
        export_phase.run(context(source, tmp_path, phase), phase)


def test_rounding_beyond_its_tolerance_is_a_fault(source: Path, tmp_path: Path) -> None:
    phase = export("bfloat16", tolerances=USUAL_TOLERANCES.model_copy(update={"rounded_kl": 1e-12}))
    with pytest.raises(PhaseFault, match=r"merged bfloat16 / merged: the KL is .* the limit is 1e-12"):
        export_phase.run(context(source, tmp_path, phase), phase)


def test_mxfp4_alone_is_compared_and_its_limits_are_the_recipes(source: Path, tmp_path: Path) -> None:
    for least, ok in ((0.0, 1.0), (1.0, 0.0)):
        tolerances = USUAL_TOLERANCES.model_copy(update={"mxfp4_share": least, "mxfp4_agreement": least})
        phase = export("bfloat16", formats=("mxfp4",), tolerances=tolerances)
        outcome = export_phase.run(context(source, tmp_path, phase), phase)
        assert outcome.metrics["mxfp4_ok"] == ok
        row = outcome.details["verification"][-1]
        assert row["pair"] == "MXFP4 / merged" and row["left_perplexity"] > 1
        assert any("export hf in bfloat16, or base + adapter" in note for note in outcome.notes) is (ok == 0)


def test_a_gguf_that_cannot_be_written_is_a_note(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "source"
    base = toy_base(other / "base", max_position_embeddings=2048, layer_types=["full_attention"] * 4)
    for name in ("sft", "grpo"):
        toy_adapter(base, other / name)
    phase = export()
    outcome = export_phase.run(context(other, tmp_path / "run", phase), phase)
    assert outcome.metrics["gguf_ok"] == 0
    assert any("layer_types" in note for note in outcome.notes)
    assert outcome.details["unfinished"] == ["gguf"]
    assert [path.name for path in outcome.outputs] == ["adapter", "hf"]


def test_a_full_disk_is_a_fault_and_finished_formats_are_kept_afterwards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = export()
    monkeypatch.setenv("POSTTRAIN_FAULT", "export.gguf_written:full")
    with pytest.raises(OSError, match="No space left"):
        export_phase.run(context(source, tmp_path, phase), phase)
    exports = tmp_path / "phases" / "export" / "exports"
    assert sorted(path.name for path in exports.iterdir()) == ["adapter", "adapter.made.json", "hf", "hf.made.json"]
    before = digest_folder(exports / "hf")
    monkeypatch.delenv("POSTTRAIN_FAULT")
    outcome = export_phase.run(context(source, tmp_path, phase), phase)
    assert [note.split(":")[0] for note in outcome.notes if "kept" in note] == ["adapter", "hf"]
    assert digest_folder(exports / "hf") == before
    (exports / "hf" / "config.json").write_text("{}")
    assert export_phase.run(context(source, tmp_path, phase), phase).state == outcome.state
    assert digest_folder(exports / "hf") == before


def test_a_stop_request_is_honoured_before_the_first_format(source: Path, tmp_path: Path) -> None:
    phase = export()
    asked = replace(context(source, tmp_path, phase), stop_requested=lambda: True)
    with pytest.raises(Stopped):
        export_phase.run(asked, phase)
