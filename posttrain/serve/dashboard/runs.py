"""All runs, and a new one."""

import time
from typing import Any

from nicegui import ui

from posttrain.recipe.flags import Flag, FlagValue
from posttrain.recipe.load import find, shipped_names
from posttrain.report import words
from posttrain.serve import control
from posttrain.serve.dashboard.frame import apart, button, frame, page, tell, watched
from posttrain.serve.dashboard.site import Site

LOOK_EVERY_S = 2.0


def pages(site: Site) -> None:
    @page("/")
    def runs_page() -> None:
        with frame("Runs", here="runs"):
            with ui.element("div").classes("toolbar"):
                button("New run", lambda: _new_run(site), "primary")
            watched("runs", lambda: _listed(site), LOOK_EVERY_S)


def _listed(site: Site) -> list[dict[str, Any]]:
    return [
        {"run": state, "ago": None if state.created is None else words.duration(time.time() - state.created)}
        for state in site.run_states()
    ]


def _new_run(site: Site) -> None:
    """A dialog with the recipe's own flags."""
    given: dict[str, FlagValue] = {}
    with ui.dialog() as dialog, ui.card().classes("dialog"):
        ui.html("New run", tag="h2")
        recipe = ui.select(shipped_names(), value="smoke", label="Recipe").props("outlined dense autofocus")
        name = ui.input("Name", placeholder="the recipe's, with its changed flags").props("outlined dense stack-label")
        fields = ui.element("div").classes("fields")

        def show_flags() -> None:
            given.clear()
            fields.clear()
            found = find(str(recipe.value))
            with fields:
                ui.label(found.purpose).classes("note")
                for flag in found.flags:
                    _field(flag, given)

        async def begin() -> None:
            start.props("disabled")
            chosen = str(recipe.value), dict(given), str(name.value or "").strip() or None
            run = await apart(control.start, site.settings, *chosen)
            start.props(remove="disabled")
            if run is not None:
                dialog.close()
                ui.navigate.to(f"/run/{run.path.name}")

        recipe.on_value_change(show_flags)
        show_flags()
        with ui.element("div").classes("toolbar end"):
            button("Cancel", dialog.close)
            start = button("Start", begin, "primary")
    dialog.on("hide", dialog.delete)
    dialog.open()


def _field(flag: Flag, given: dict[str, FlagValue]) -> None:
    """What was not touched is not given, so that the run's name says only what was changed."""

    def changed(value: Any) -> None:
        try:
            given[flag.name] = flag.type(value) if value not in (None, "") else flag.default
        except (TypeError, ValueError) as error:
            tell(error)

    label = flag.name.replace("_", " ")
    made: Any
    with ui.element("div"):
        if flag.choices:
            made = ui.select(list(flag.choices), value=flag.default, label=label)
        elif flag.type is bool:
            made = ui.switch(label, value=bool(flag.default))
        elif flag.type in (int, float):
            made = ui.number(label, value=flag.default)  # type: ignore[arg-type]  # a number: its type says so
        else:
            made = ui.input(label, value=str(flag.default or ""))
        if flag.type is not bool or flag.choices:
            made.props("outlined dense")
        ui.label(flag.help).classes("hint")
    made.on_value_change(lambda event: changed(event.value))
