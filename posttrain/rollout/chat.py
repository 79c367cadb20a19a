"""A conversation with a run's model in the terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.chat.conversation import Conversation, Message, tool_result
from posttrain.chat.render import Renderer, renderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.data.shard import Shard
from posttrain.engine.model import load_model
from posttrain.errors import ChatFormatError, InputError
from posttrain.recipe.types import PreparePhase, Recipe, Sampling
from posttrain.report.read import read_object
from posttrain.rollout.in_process import InProcessSampler
from posttrain.run import recipe_file
from posttrain.run.folder import RunFolder
from posttrain.worlds.environment import Environment
from posttrain.worlds.registry import start

HELP = "/task puts a held-out task, /new starts over, /quit ends. Anything else goes to the model."
SAMPLING = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=160, max_turns=1)


def finished_states(run: RunFolder, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Model states of the completed phases by name; the last is the export's choice where there is one."""
    states = {}
    for phase in recipe.phases:
        state = read_object(run.phase(phase.name).result, {}).get("state")
        if state is not None:
            states[phase.name] = state
    return states


def held_out_tasks(run: RunFolder, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Tasks of every held-out set, one of each in turn."""
    shards = [
        Shard(folder)
        for phase in recipe.phases
        if isinstance(phase, PreparePhase)
        for dataset in phase.datasets
        if dataset.content == "tasks" and all(getattr(source, "split", "") == "heldout" for source in dataset.sources)
        for folder in [run.phase(phase.name).data / dataset.name]
        if folder.exists()
    ]
    number = 0
    while shards:
        for shard in shards:
            yield shard.row(number % shard.num_rows)
        number += 1


@dataclass
class Talk:
    """The messages so far and, while a task is played, the world that answers the model's calls."""

    sampler: InProcessSampler
    render: Renderer
    conversation: Conversation = field(default_factory=lambda: Conversation(messages=()))
    environment: Environment | None = None

    def say(self, message: Message) -> None:
        self.conversation = self.conversation.model_copy(update={"messages": (*self.conversation.messages, message)})

    def answer(self) -> None:
        """Let the model write until its final message, playing or asking for tool results on the way."""
        while True:
            [sampled] = self.sampler.sample([self.render.prompt(self.conversation)], [0], SAMPLING)
            try:
                messages = self.render.parse(sampled.tokens)
            except ChatFormatError as error:
                print(f"  (no message: {error})\n  {self.render.text(sampled.tokens)}")
                return
            for message in messages:
                self.say(message)
                place = message.channel if message.recipient is None else f"calls {message.recipient}"
                print(f"  {place}: {message.content}")
            call = messages[-1]
            if call.recipient is None:
                break
            replies = self.environment.respond(messages) if self.environment else self._ask_result(call)
            if not replies:
                break
            for reply in replies:
                self.say(reply)
                print(f"  {reply.sender}: {reply.content}")
        if self.environment is not None:
            print(f"  score: {self.environment.score().parts}")
            self.environment = None

    def _ask_result(self, call: Message) -> list[Message]:
        tool = str(call.recipient).removeprefix("functions.")
        text = input(f"  result of {tool} (empty to stop) > ")
        return [tool_result(tool, text)] if text else []

    def restart(self) -> None:
        self.conversation, self.environment = Conversation(messages=()), None


def chat(run: RunFolder, state_name: str | None) -> None:
    """Read lines, answer them; raises InputError when the run has no such model state."""
    recipe = recipe_file.load(run.recipe)
    states = finished_states(run, recipe)
    if not states:
        raise InputError(f"run {run.path.name!r} has no trained model yet; type: posttrain resume {run.words}")
    name = state_name or list(states)[-1]
    if name not in states:
        raise InputError(f"run {run.path.name!r} has no model state {name!r}; it has {', '.join(states)}")
    base = run.model_folder(states[name]["base"])
    adapter: Path | None = run.model_folder(states[name]["adapter"]) if states[name]["adapter"] else None
    render = renderer(recipe.chat, Tokenizer.load(base))
    talk = Talk(InProcessSampler(load_model(base, adapter), render.stop_tokens, "float32", 65536), render)
    tasks = held_out_tasks(run, recipe)
    print(f"{run.path.name}: model state of phase {name}. {HELP}")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        match line:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/new":
                talk.restart()
                continue
            case "/task":
                task = next(tasks, None)
                if task is None:
                    print("  this run has no held-out tasks")
                    continue
                talk.restart()
                talk.conversation = Conversation.model_validate(task["prompt"])
                talk.environment = start(task)
                print("\n".join(f"  {message.role}: {message.content}" for message in talk.conversation.messages))
            case _:
                talk.say(Message(role="user", content=line))
        talk.answer()
