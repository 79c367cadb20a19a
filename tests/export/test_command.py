"""`posttrain export` and `posttrain push` through the command line, on toys."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from posttrain.cli.export import export as export_command
from posttrain.errors import InputError, MachineError, ModelError
from posttrain.export.hub import plan_push, push
from posttrain.export.ollama import HarmonySettings, harmony_template, settings_lines
from posttrain.report.card import licence
from posttrain.run.folder import digest_folder
from tests.export.toys import any_adapter, dense_base, toy_base


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    toy_base(root / "base")
    any_adapter(root / "base", root / "adapter")
    return root


def run(*words: str) -> str:
    result = CliRunner().invoke(export_command, [*words, "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    words = ("--base", str(source / "base"), "--output", str(tmp_path / "out"), "--formats", "hf,mxfp4,gguf,ollama")
    said = run(str(source / "adapter"), *words, "--dry-run")
    folders = [line.split()[0] for line in said.splitlines()[2:-1]]
    assert folders == ["hf", "mxfp4", "gguf-auto", "ollama"]
    assert "the disk writing" in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_adapter_folder_becomes_every_format_and_a_second_run_keeps_them(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (str(source / "adapter"), "--base", str(source / "base"), "--output", str(out))
    words = (*words, "--formats", "adapter,hf,gguf,ollama", "--gguf", "q8_0,bf16")
    run(*words)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "adapter",
        "gguf-bf16",
        "gguf-q8_0",
        "hf",
        "ollama",
    ]
    assert digest_folder(out / "adapter") == digest_folder(source / "adapter")
    assert (out / "gguf-q8_0" / "adapter-q8_0.gguf").is_file()
    modelfile = (out / "ollama" / "Modelfile").read_text()
    assert modelfile.startswith("FROM ../gguf-q8_0/adapter-q8_0.gguf\n")
    assert 'PARAMETER stop "<|return|>"\nPARAMETER stop "<|call|>"\n' in modelfile
    on_base = (out / "ollama" / "Modelfile.adapter").read_text()
    assert on_base.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n")
    again = run(*words)
    assert [line.split()[0] for line in again.splitlines() if "/out/" in line] == ["kept"] * 5


def test_verification_is_said_and_kept(source: Path, tmp_path: Path) -> None:
    said = run(str(source / "base"), "--output", str(tmp_path / "out"), "--dtype", "float32", "--verify")
    rows = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert [(row["pair"], row["status"]) for row in rows] == [
        ("engine / merged", "agrees"),
        ("engine / merged in float32", "measured"),
        ("merged float32 / merged", "agrees"),
    ]
    assert "agrees     engine / merged on 4 prompts" in said
    assert not (tmp_path / "out" / ".float32").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (source / "base", tmp_path / "out" / "hf"))
    assert all((before[name] == after[name]).all() for name in before)


def test_bad_words_are_refused(source: Path, tmp_path: Path) -> None:
    for words, message in (
        (("--formats", "hf,onnx"), "onnx is not known; allowed: hf, mxfp4, gguf, ollama, adapter"),
        (("--gguf", "q5_9"), "q5_9 is not known; allowed: f32, f16"),
    ):
        with pytest.raises(InputError, match=message):
            run(str(source / "base"), *words)
    lost = any_adapter(source / "base", tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    with pytest.raises(ModelError, match="an adapter on 'gone', which is no folder here: name its folder with --base"):
        run(str(lost))
    with pytest.raises(ModelError, match=f"--base {tmp_path} is no model folder here"):
        run(str(lost), "--base", str(tmp_path))
    out = tmp_path / "out"
    (out / "hf").mkdir(parents=True)
    with pytest.raises(InputError, match="hf exists and was not written by an export"):
        run(str(source / "base"), "--output", str(out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is neither a run nor a model"):
        run(str(tmp_path / "empty"))


def test_stop_tokens_of_other_families_come_from_their_own_files(tmp_path: Path) -> None:
    base = dense_base(tmp_path / "qwen", "qwen3")
    (base / "generation_config.json").write_text('{"eos_token_id": [3, 4], "temperature": 0.6}')
    lines = settings_lines(base, None)
    tokens = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    third, fourth = ({index: text for text, index in tokens.items()}[index] for index in (3, 4))
    assert lines == [
        f'PARAMETER stop "{third}"',
        f'PARAMETER stop "{fourth}"',
        "PARAMETER temperature 0.6",
        "PARAMETER num_ctx 512",
    ]


def test_the_harmony_template_carries_the_recipes_date_and_no_other() -> None:
    template = harmony_template(HarmonySettings("2026-01-01", "2024-06", "low", "You are a toy."))
    assert "You are a toy.\nKnowledge cutoff: 2024-06\nCurrent date: 2026-01-01\n\nReasoning: low\n" in template
    assert "Current date" not in harmony_template(None)
    assert template.count("{{ end }}") == template.count("{{ if ") + template.count("{{ range ")


# ---------------------------------------------------------------- push


class FakeHub:
    def __init__(self, answer: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answer = answer

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        if self.answer:
            raise self.answer
        self.calls.append(("create", {"repo_id": repo_id, **settings}))

    def upload_folder(self, **settings: Any) -> None:
        self.calls.append(("upload", settings))


@pytest.mark.parametrize("public", [False, True])
def test_a_push_creates_and_uploads_and_is_private_unless_told(tmp_path: Path, public: bool) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    plan = plan_push(tmp_path, "me/model", public, "# card\n")
    assert ("public" in plan.lines()[0]) is public
    assert "1 files" in plan.lines()[0]
    hub = FakeHub()
    push(plan, hub, lambda line: None)
    assert hub.calls[0] == ("create", {"repo_id": "me/model", "private": not public, "exist_ok": True})
    assert hub.calls[1][1]["folder_path"] == tmp_path
    assert (tmp_path / "README.md").read_text() == "# card\n"


def test_a_hub_that_refuses_and_names_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(MachineError, match=r"refused me/model: 401 unauthorised\. Log in"):
        push(plan_push(tmp_path, "me/model", False, ""), FakeHub(OSError("401 unauthorised")), lambda line: None)
    with pytest.raises(InputError, match="OWNER/NAME"):
        plan_push(tmp_path, "model", False, "")
    with pytest.raises(InputError, match="holds nothing to push"):
        plan_push(tmp_path / "nowhere", "me/model", False, "")


def test_the_licence_is_the_bases(tmp_path: Path) -> None:
    assert licence(tmp_path) == "unknown"
    (tmp_path / "LICENSE").write_text("                Apache License\n        Version 2.0, January 2004")
    assert licence(tmp_path) == "apache-2.0"
    (tmp_path / "LICENSE").write_text("All mine")
    assert licence(tmp_path) == "other"
