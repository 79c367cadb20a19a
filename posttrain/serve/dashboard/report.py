"""The before/after report of a run, in a frame of its own that may run nothing."""

from fastapi import FastAPI, Path
from fastapi.responses import HTMLResponse
from nicegui import ui

from posttrain.report import page as report_page
from posttrain.report.document import document
from posttrain.report.read import read_run
from posttrain.run.folder import NAME
from posttrain.serve.dashboard.frame import frame, page
from posttrain.serve.dashboard.site import ROOT, Site

POLICY = "sandbox allow-popups; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A report holds what a model wrote, escaped; should that ever fail, it still is a page without scripts."""


def routes(app: FastAPI, site: Site) -> None:
    @app.get(ROOT + "/report/{name}", include_in_schema=False)
    def report_file(name: str = Path(pattern=f"^{NAME.pattern}$")) -> HTMLResponse:
        """As it was written; of a run that has not come that far, as it would be now, which writes nothing."""
        run = site.run(name)
        written = run.path / "report.html"
        text = written.read_text(encoding="utf-8") if written.is_file() else report_page.page(document(read_run(run)))
        return HTMLResponse(text.encode("utf-8", "replace"), headers={"Content-Security-Policy": POLICY})


def pages(site: Site) -> None:
    @page("/run/{name}/report")
    def framed_page(name: str) -> None:
        site.run(name)
        with frame(f"{name}: report", name, "/report"):
            address = f"{ROOT}/report/{name}"
            ui.element("iframe").props(f'src="{address}" sandbox="allow-popups" title="Report of {name}"').classes(
                "report"
            )
