"""The server: security in front, then the routers, then the dashboard."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

from posttrain import __version__
from posttrain.serve import openai, runs
from posttrain.serve.dashboard.attach import add_pages
from posttrain.serve.problems import add_handlers
from posttrain.serve.security import Security
from posttrain.serve.settings import Settings

ROUTERS: tuple[APIRouter, ...] = (runs.router, openai.router)
PAGES: tuple[Callable[[FastAPI, Settings], None], ...] = (add_pages,)
"""What puts pages of its own on the app, after all routers."""


def make_app(settings: Settings) -> FastAPI:
    """One server; what it holds while it runs is in `app.state`."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        if hasattr(app.state, "generation"):
            app.state.generation.close()

    # The pages of FastAPI that show the OpenAPI document load their scripts from elsewhere.
    app = FastAPI(title="posttrain", version=__version__, docs_url=None, redoc_url=None, lifespan=life)
    app.state.settings = settings
    app.add_middleware(Security, settings=settings)
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    for add in PAGES:
        add(app, settings)
    return app
