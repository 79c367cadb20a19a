"""What every page has around it: style, navigation, and what becomes of errors."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nicegui import ui
from starlette.concurrency import run_in_threadpool

import posttrain.report
from posttrain.errors import PosttrainError
from posttrain.run.redaction import redact
from posttrain.serve.dashboard.site import ROOT, fragment
from posttrain.serve.problems import Problem

STYLE = "".join(
    path.read_text()
    for path in (Path(posttrain.report.__file__).with_name("page.css"), Path(__file__).with_name("style.css"))
)
KEEP_FOCUS = Path(__file__).with_name("keep_focus.js").read_text()
RUN_PAGES = {"": "Overview", "/episodes": "Episodes", "/data": "Data", "/report": "Report", "/chat": "Chat"}
CLOSE = [{"label": "Close", "color": "white"}]
"""Of a message in red."""
Given = ParamSpec("Given")
Result = TypeVar("Result")


@contextmanager
def frame(title: str, run_name: str | None = None, here: str = "") -> Iterator[None]:
    """A page called `title`; within a run, with links to its other pages. `here`: which of them is open."""
    ui.page_title(f"{title} · posttrain")
    ui.add_head_html(f"<style>{STYLE}</style><script>{KEEP_FOCUS}</script>")
    pages = (
        {f"{ROOT}/run/{run_name}{part}": (told, part == here) for part, told in RUN_PAGES.items()} if run_name else {}
    )
    ui.html(fragment("frame", title=title, run_name=run_name, here=here, pages=pages), sanitize=False, tag="header")
    # Within the `main` that NiceGUI makes of every page.
    with ui.element("div").props("id=content tabindex=-1"):
        yield


def page(path: str) -> Callable[[Callable[Given, None]], Callable[Given, None]]:
    """A page that says what is wrong where it cannot be built."""

    def decorate(build: Callable[Given, None]) -> Callable[Given, None]:
        @wraps(build)
        def built(*given: Given.args, **named: Given.kwargs) -> None:
            try:
                build(*given, **named)
            except PosttrainError as error:
                ui.context.slot.parent.clear()
                _refused(error.status if isinstance(error, Problem) else 422, str(error))

        ui.page(path)(built)
        return built

    return decorate


def nowhere() -> None:
    """What is at every address that no page has."""
    _refused(404, "There is no such page. The links above lead to those that there are.")


def _refused(status: int, why: str) -> None:
    ui.status_code(status)
    with frame("Not found" if status == 404 else "Not to be shown"):
        ui.label(redact(why)).props("role=alert").classes("fault")


def markup(name: str = "", tag: str = "div", **given: Any) -> ui.html:
    """A fragment's place on the page; empty until `refill` where no name is given."""
    return ui.html(fragment(name, **given) if name else "", sanitize=False, tag=tag)


def refill(place: ui.html, name: str, **given: Any) -> None:
    """Show the fragment, unless it is shown already: what has not changed keeps its selection."""
    content = fragment(name, **given)
    if place.content != content:
        place.set_content(content)


def watched(name: str, read: Callable[[], Any], seconds: float) -> None:
    """The fragment `name`, which shows under that name what `read` finds: nothing yet, then anew now and again."""
    nothing: dict[str, Any] = {name: None}
    place = markup(name, **nothing)

    async def look() -> None:
        found = await apart(read)
        if found is not None:
            refill(place, name, **{name: found})

    every(seconds, look)


async def apart(function: Callable[Given, Result], *given: Given.args, **named: Given.kwargs) -> Result | None:
    """The function's result from a thread; what a person can mend is told and None returned."""
    try:
        return await run_in_threadpool(function, *given, **named)
    except PosttrainError as error:
        tell(error)
        return None


def tell(error: Exception) -> None:
    ui.notify(redact(str(error)), type="negative", multi_line=True, position="top", timeout=12_000, actions=CLOSE)


def button(told: str, do: Callable[[], Any], kind: str = "") -> ui.element:
    """A button of the browser's own: focus, Enter and Space are its business."""
    made = ui.element("button").props("type=button").classes(f"button {kind}").on("click", lambda: do())
    with made:
        ui.label(told)
    return made


def stepping(step: Callable[[int], Any]) -> None:
    """`j` and `k` call it with 1 and -1: the next one and the one before."""

    def pressed(event: Any) -> Any:
        if event.action.keydown and event.key.name in ("j", "k"):
            return step(1 if event.key.name == "j" else -1)

    ui.keyboard(on_key=pressed, ignore=["input", "select", "textarea"])


def every(seconds: float, look: Callable[[], Awaitable[None]]) -> ui.timer:
    """`look` now and again; the next one waits for the one before."""
    return ui.timer(seconds, look)
