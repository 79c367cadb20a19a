"""A conversation with a run's model, and the same one with its base beside it."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from nicegui import ui
from starlette.concurrency import run_in_threadpool

from posttrain.chat.conversation import Conversation, Message
from posttrain.errors import ChatFormatError, PosttrainError
from posttrain.report.read import read_object
from posttrain.run.folder import RunFolder
from posttrain.serve.asking import Ask, generation_of
from posttrain.serve.dashboard.frame import apart, button, frame, markup, page, refill, tell
from posttrain.serve.dashboard.messages import Shown
from posttrain.serve.dashboard.site import Site, recipe_of
from posttrain.worlds.environment import Environment
from posttrain.worlds.registry import start

DRAW_EVERY_S = 0.1
MOST_CALLS = 8
"""In one turn, of the tools of a task's world."""


def pages(site: Site) -> None:
    @page("/run/{name}/chat")
    def chat_page(name: str) -> None:
        run = site.run(name)
        with frame(f"{name}: chat", name, "/chat"):
            states = states_of(run)
            if not states:
                ui.label("No trained model yet: one comes with the first phase of training.").classes("note")
                return
            _Chat(site.app, run, states)


def states_of(run: RunFolder) -> list[str]:
    """Phases whose result is a model, the latest first."""
    found: list[str] = []
    for phase in recipe_of(run).phases:
        if read_object(run.phase(phase.name).result, {}).get("state") is not None:
            found.insert(0, phase.name)
    return found


@dataclass
class Side:
    """One model's side of the conversation."""

    model: str
    title: str
    conversation: Conversation = field(default_factory=lambda: Conversation(messages=()))
    shown: list[Shown] = field(default_factory=list)
    environment: Environment | None = None
    writing: bool = False

    def say(self, message: Message) -> None:
        self.conversation = self.conversation.model_copy(update={"messages": (*self.conversation.messages, message)})

    def play(self, task: dict[str, Any]) -> None:
        """Begin with a task; its world answers the calls."""
        self.conversation, self.environment = Conversation.model_validate(task["prompt"]), start(task)
        self.shown = [as_shown(message) for message in self.conversation.messages]

    async def answer(self, app: FastAPI, ask: Ask, draw: Callable[["Side"], None]) -> None:
        """Let the model write until it calls no tool that a world answers; raises PosttrainError."""
        self.writing = True
        try:
            model = await run_in_threadpool(lambda: generation_of(app).model(self.model))
            for _ in range(MOST_CALLS):
                [answer] = model.chat(self.conversation, ask)
                if not await self._write(answer, draw):
                    break
        finally:
            self.writing = False
            draw(self)

    async def _write(self, answer: Any, draw: Callable[["Side"], None]) -> bool:
        """Show one completion as it comes; whether a tool answered it, so that the model goes on."""
        before, drawn, channel = list(self.shown), 0.0, None
        async for written in answer:
            for piece in written.pieces:
                if piece.channel != channel:
                    self.shown.append(Shown(f"assistant {piece.channel}", piece.channel, ""))
                    channel = piece.channel
                self.shown[-1] = self.shown[-1]._replace(text=self.shown[-1].text + piece.text)
            if time.monotonic() - drawn > DRAW_EVERY_S:
                drawn = time.monotonic()
                draw(self)
        try:
            messages = answer.messages()
        except ChatFormatError as error:
            self.shown.append(Shown("no whole message", "system", str(error)))
            return False
        self.shown = [*before, *map(as_shown, messages)]
        for message in messages:
            self.say(message)
        replies = self.environment.respond(messages) if self.environment else []
        for reply in replies:
            self.say(reply)
            self.shown.append(as_shown(reply))
        if self.environment is not None and not replies:
            score = self.environment.score()
            parts = ", ".join(f"{part} {value:g}" for part, value in score.parts.items())
            self.shown.append(Shown("score", "system", score.reason or parts))
            self.environment = None
        return bool(replies)


def as_shown(message: Message) -> Shown:
    head = (message.role, message.channel, message.recipient and f"to {message.recipient}", message.sender)
    return Shown(" ".join(part for part in head if part), message.channel or message.role, message.content)


class _Chat:
    def __init__(self, app: FastAPI, run: RunFolder, states: list[str]) -> None:
        self.app, self.run = app, run
        self.tasks: Iterator[dict[str, Any]] | None = None
        with ui.element("div").classes("toolbar filters"):
            self.state = ui.select(states, value=states[0], label="Model of phase", on_change=self._anew)
            self.temperature = ui.number("Temperature", value=0.0, min=0.0, max=2.0, step=0.1)
            self.most = ui.number("New tokens", value=160, min=1, max=4096, precision=0)
            for one in (self.state, self.temperature, self.most):
                one.props("outlined dense")
            self.with_base = ui.switch("Base beside it", value=True, on_change=self._anew)
            button("A held-out task", self._play)
            button("New conversation", self._anew)
        self.place = ui.element("div").classes("talk two")
        with ui.element("div").classes("ask"):
            self.said = ui.input("Say something").props("outlined dense autofocus").on("keydown.enter", self._send)
            button("Send", self._send, "primary")
        self._anew()

    def _anew(self) -> None:
        name, state = self.run.path.name, self.state.value
        self.sides = [Side(f"{name}/{state}", f"{name}, {state}")]
        if self.with_base.value:
            self.sides.append(Side(f"{name}/base", "its base"))
        self.place.clear()
        with self.place:
            self.drawn = {side.model: markup("chat_side", "section", side=side) for side in self.sides}
        self.place.classes(remove="" if self.with_base.value else "two", add="two" if self.with_base.value else "")

    def _draw(self, side: Side) -> None:
        if side in self.sides:
            refill(self.drawn[side.model], "chat_side", side=side)

    async def _send(self) -> None:
        text = str(self.said.value or "").strip()
        if not text or any(side.writing for side in self.sides):
            return
        self.said.set_value("")
        for side in self.sides:
            side.say(Message(role="user", content=text))
            side.shown.append(Shown("user", "user", text))
        await self._answer()

    async def _play(self) -> None:
        task = await apart(self._next_task)
        if task is None:
            ui.notify("This run has no held-out tasks")
            return
        self._anew()
        for side in self.sides:
            side.play(task)
        await self._answer()

    def _next_task(self) -> dict[str, Any] | None:
        # What it stands beside imports torch, which no page but this one needs.
        from posttrain.rollout.chat import held_out_tasks

        self.tasks = self.tasks or held_out_tasks(self.run, recipe_of(self.run))
        return next(self.tasks, None)

    async def _answer(self) -> None:
        """Both at once: they share a batch where they share weights."""
        ask = Ask(temperature=float(self.temperature.value or 0.0), max_new_tokens=int(self.most.value or 160))
        ended = await asyncio.gather(
            *(side.answer(self.app, ask, self._draw) for side in self.sides), return_exceptions=True
        )
        for error in ended:
            if isinstance(error, PosttrainError):
                tell(error)
            elif error is not None:
                raise error
