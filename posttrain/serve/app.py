"""The server: security in front, then the routers, then the dashboard."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer

from posttrain import __version__
from posttrain.serve import datasets, duel, evaluations, models, openai, runs, trace_routes
from posttrain.serve.dashboard.attach import add_pages
from posttrain.serve.problems import add_handlers
from posttrain.serve.security import Security
from posttrain.serve.settings import Settings
from posttrain.serve.store import open_store

ROUTERS: tuple[APIRouter, ...] = (
    trace_routes.router,
    datasets.router,
    duel.router,
    runs.router,
    evaluations.router,
    models.router,
    openai.router,
)
PAGES: tuple[Callable[[FastAPI, Settings], None], ...] = (add_pages,)
"""What puts pages of its own on the app, after all routers."""


def make_app(settings: Settings) -> FastAPI:
    """One server; what it holds while it runs is in `app.state`. MachineError where its database cannot be had."""
    store = open_store(settings.database_url, settings.data_dir)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        if hasattr(app.state, "generation"):
            app.state.generation.close()
        store.close()

    # The pages of FastAPI that show the OpenAPI document load their scripts from elsewhere.
    app = FastAPI(title="posttrain", version=__version__, docs_url=None, redoc_url=None, lifespan=life)
    app.state.settings, app.state.store = settings, store
    app.add_middleware(Security, settings=settings)
    add_handlers(app)
    for router in ROUTERS:
        # `Security` asks for the token; this only says so in the OpenAPI document.
        app.include_router(router, dependencies=[Depends(HTTPBearer(auto_error=False))])
    for add in PAGES:
        add(app, settings)
    return app
