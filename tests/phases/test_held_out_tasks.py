"""Tasks asked while a phase trains: the same scores as those of an evaluation of the same weights."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from posttrain.chat.render import renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.prepare import prepare_dataset
from posttrain.data.shard import Shard
from posttrain.engine.model import load_model
from posttrain.phases.evaluate import answer_tasks, counts, means
from posttrain.phases.held_out import task_metrics
from posttrain.recipe.types import Dataset, Execution, HeldOutTasks, Sampling, WorldSource
from posttrain.recipes.quickstart import CHAT, evaluation
from posttrain.rollout.in_process import InProcessSampler
from posttrain.run.folder import ASSETS

BASE = ASSETS / "tiny_base"
SAMPLING = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=12, max_turns=1)


def test_scores_are_those_of_an_evaluation_and_the_unscorable_are_counted(tmp_path: Path) -> None:
    sources = tuple(
        WorldSource(kind="world", world=world, split="heldout", count=count, seed=0)
        for world, count in (("calculator", 3), ("duel", 2))
    )
    dataset = Dataset(
        name="mixed", content="tasks", sources=sources, max_tokens=1024, too_long="drop", faulty_share=0.0
    )
    tokenizer = Tokenizer.load(BASE)
    prepare_dataset(dataset, CHAT, tokenizer, tmp_path / "mixed", "any", 1, lambda rows: None)
    context: Any = SimpleNamespace(
        dataset_folder=lambda name: tmp_path / name,
        base_folder=lambda state: BASE,
        states={"base": None},
        recipe=SimpleNamespace(seed=0, chat=CHAT),
        execution=Execution(device="cpu", threads=1),
    )
    phase: Any = SimpleNamespace(model="base", precision="float32")
    model = load_model(BASE)
    found = task_metrics(context, phase, HeldOutTasks(dataset="mixed", every_steps=5, sampling=SAMPLING), model)
    assert found.every_steps == 5
    # The untrained base never calculates anything, so that no call was faulty, and names no action in a duel.
    assert found.measure() == {"score": 0.0, "exact": 0.0, "format": 1.0, "used": 0.0, "unscorable": 2.0}

    render, shard = renderer(CHAT, tokenizer), Shard(tmp_path / "mixed")
    sampler = InProcessSampler(model, render.stop_tokens, "float32", 65536)
    asked = evaluation("eval", "base").model_copy(update={"sampling": SAMPLING})
    tasks = [shard.row(number) for number in range(shard.num_rows)]
    show: Any = lambda *words: nullcontext(SimpleNamespace(advance=lambda *amount: None))  # noqa: E731
    answers = answer_tasks(sampler, render, asked, "mixed", tasks, 0, show)
    scores = {name.removeprefix("mixed."): value for name, value in means(answers).items()}
    assert found.measure() == scores | {"unscorable": float(counts(answers)["mixed.unscorable"])}
