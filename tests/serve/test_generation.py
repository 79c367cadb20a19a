"""Models of a run: found by name, in memory as long as they are asked, the same as from the sampler."""

import json

import httpx
import pytest

from posttrain.cli.serve import _served, serve
from posttrain.engine.model import load_model
from posttrain.errors import InputError
from posttrain.recipe.types import Execution, Sampling
from posttrain.rollout.in_process import InProcessSampler
from posttrain.run.folder import RunFolder
from posttrain.serve import generation as module
from posttrain.serve.asking import Ask, UnknownModel
from posttrain.serve.generation import Generation
from posttrain.serve.settings import ServedModels
from tests.end_to_end.runs import smoke
from tests.serve.serving import TOKEN, running, settings_with

PROMPT = list(range(30, 50))
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=20, max_turns=1)
ASK = Ask(temperature=0.0, max_new_tokens=20, ignore_eos=True, each_token=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    done = smoke(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def generation(runs):
    made = Generation(runs, ServedModels(execution=Execution(threads=1)))
    yield made
    made.close()


def states(runs):
    """The finished model states by their phases."""
    found = {}
    for result in (runs / "smoke" / "phases").glob("*/result.json"):
        if state := json.loads(result.read_text())["state"]:
            found[result.parent.name] = state
    return found


def answered(generation, name):
    [answer] = generation.model(name).complete([PROMPT], ASK)
    for _ in answer:
        pass
    return answer.tokens


def expected(runs, state):
    run = RunFolder(runs / "smoke")
    adapter = run.model_folder(state["adapter"]) if state["adapter"] else None
    sampler = InProcessSampler(load_model(run.model_folder(state["base"]), adapter), frozenset(), "float32", 4096)
    return sampler.sample([PROMPT], [0], GREEDY)[0].tokens


def test_every_state_of_a_run_is_served_and_few_stay_in_memory(generation, runs):
    assert generation.models() == ["smoke", "smoke/base"]
    found = states(runs)
    assert any(state["adapter"] for state in found.values()) and len({state["base"] for state in found.values()}) > 1
    for name, state in found.items():
        assert answered(generation, f"smoke/{name}") == expected(runs, state)
        assert len(generation._bases) <= module.MOST_BASES
    assert answered(generation, "smoke") in [expected(runs, state) for state in found.values()]


def test_an_adapter_shares_the_weights_of_its_base(generation, runs):
    name = next(
        name for name, state in states(runs).items() if state["adapter"] and state["base"].startswith("shipped")
    )
    adapted, bare = (generation.model(f"smoke/{one}").live.model for one in (name, "base"))
    shared = dict(bare.named_parameters())
    for path, parameter in adapted.named_parameters():
        if ".lora_" not in path and ".adapters." not in path:
            assert parameter is shared[path.replace(".base.", ".")]
    assert len(generation._bases) == 1
    assert answered(generation, "smoke/base") != answered(generation, f"smoke/{name}")


def test_a_model_that_was_forgotten_finishes_what_it_writes(generation, runs, monkeypatch):
    monkeypatch.setattr(module, "MOST_BASES", 1)
    bases = {}
    for name, state in states(runs).items():
        bases.setdefault(state["base"], (name, state))
    (first, state), (second, _), *_ = bases.values()
    ask = Ask(temperature=0.0, max_new_tokens=600, ignore_eos=True, each_token=False)
    [answer] = generation.model(f"smoke/{first}").complete([PROMPT], ask)
    answered(generation, f"smoke/{second}")
    assert len(generation._bases) == 1
    for _ in answer:
        pass
    assert answer.tokens[:20] == expected(runs, state) and len(answer.tokens) == 600


def test_what_is_not_there_is_named(generation, runs):
    for name, says in (
        ("smoke/sfd", "has no model state 'sfd'"),
        ("smoke/../smoke", "no checkpoint"),
        ("other", "'other' does not exist"),
        ("../smoke", "does not exist"),
        ("", "does not exist"),
    ):
        with pytest.raises(UnknownModel, match=says):
            generation.model(name)
    with pytest.raises(InputError, match="start it with --model"):
        generation.load_adapter("mine", runs / "smoke")


def test_the_command_says_what_is_served_first(runs):
    def served(model, *more):
        context = serve.make_context("serve", ["--runs-dir", str(runs), "--threads", "1", *more])
        given = {name: context.params[name] for name in context.params if name != "model"}
        with context.scope():
            return _served(model, given)

    assert served("smoke").first == "smoke" and not served("smoke").folders
    assert served("smoke", "--state", "base").first == "smoke/base"
    assert served(None).first is None and served(None).execution.threads == 1
    tiny = served("shipped:tiny", "--effort", "high")
    assert tiny.first == "tiny" and tiny.folders["tiny"].chat.reasoning_effort == "high"
    with pytest.raises(InputError, match="--state goes with --model"):
        served(None, "--state", "base")
    with pytest.raises(InputError, match="smoke"):
        served("smok")


def test_a_run_is_asked_over_http_beside_its_base(runs):
    settings = settings_with(RunFolder(runs).model_folder("shipped:tiny"), runs, "tiny")
    head = {"Authorization": f"Bearer {TOKEN}"}
    with running(settings) as at, httpx.Client(base_url=at.url, headers=head, timeout=60) as client:
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["tiny", "smoke", "smoke/base"]
        asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
        answers = [client.post("/v1/chat/completions", json={**asked, "model": name}).json() for name in names]
        assert all(answer["usage"]["completion_tokens"] for answer in answers)
        assert answers[0]["choices"] == answers[2]["choices"]
        assert client.get("/v1/models/smoke/base").json()["id"] == "smoke/base"
