"""Puts the dashboard on the server's app."""

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from nicegui import core, ui

from posttrain.serve.dashboard import chat, data, datasets, episodes, report, run, runs
from posttrain.serve.dashboard.frame import nowhere
from posttrain.serve.dashboard.site import ROOT, Site
from posttrain.serve.settings import Settings

PARTS = (runs, run, episodes, data, report, datasets, chat)


def add_pages(app: FastAPI, settings: Settings) -> None:
    """NiceGUI's pages are the process's: of several apps in it, the last one made has them."""
    site = Site(app, settings)

    @app.get("/", include_in_schema=False)
    def first_page() -> RedirectResponse:
        return RedirectResponse(f"{ROOT}/")

    report.routes(app, site)
    core.app.middleware_stack = None
    core.app.user_middleware.clear()
    for part in PARTS:
        part.pages(site)
    ui.run_with(
        app, root=nowhere, title="posttrain", dark=None, mount_path=ROOT, tailwind=False, show_welcome_message=False
    )
