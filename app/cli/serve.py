"""Verbs on the server itself: serve, link, doctor."""

import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app import __version__
from app.cli.given import ENDED
from app.cli.outline import counted
from app.cli.verb import verb
from app.client import Failure, server_for

# What takes long to import is imported where it is used: `frostline --help` answers at once.
if TYPE_CHECKING:
    from app.settings import Settings


@verb
def serve(
    settings: "Settings",
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.")] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = False,
    behind_proxy: Annotated[bool, typer.Option(help="A proxy in front speaks TLS.")] = False,
    root_path: Annotated[str | None, typer.Option(help="The path that a proxy strips.")] = None,
    insecure_http: Annotated[bool, typer.Option(help="Show the token to the network.")] = False,
    stop_jobs: Annotated[bool, typer.Option(help="Stop the jobs before leaving.")] = False,
) -> None:
    """The dashboard with its embedded worker; Ctrl-C leaves jobs running."""
    from app.serving import Dashboard, listen
    from app.web.guard import check_exposure

    given = {
        "host": host,
        "port": port,
        "root_path": root_path,
        "behind_proxy": behind_proxy or None,
        "insecure_http": insecure_http or None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if root_path:
        changes["root_path"] = "/" + root_path.strip("/")
    settings = settings.model_copy(update=changes)
    try:
        check_exposure(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    listener = listen(settings.host, settings.port)
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})

    def announce(service: Any) -> None:
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{shown}:{settings.port}{settings.root_path}"
        link = f"{address}/login?link={service.make_link()}"
        print(f"Frostline {__version__} serves {settings.data_dir}")
        print(f"Open {link}", flush=True)
        print("The link works once; 'frostline link' prints another. Ctrl-C ends.", flush=True)
        if open_:
            import webbrowser

            webbrowser.open(link)

    def before_end(service: Any) -> None:
        live = [job for job in service.list_jobs(1000) if job["state"] not in ENDED]
        if live and stop_jobs:
            print(f"Stopping {counted(len(live), 'job')}, each with a checkpoint …", flush=True)
            for job in live:
                service.stop_job(job["id"])
            _wait_until_ended(service, [job["id"] for job in live])
        elif live:
            names = ", ".join(str(job["id"]) for job in live)
            one = len(live) == 1
            who, them = (f"Job {names} goes", "it") if one else (f"Jobs {names} go", "them")
            print(f"{who} on without the dashboard; its next start finds {them} again.")

    # Without handlers of our own, uvicorn would end the process by the signal it has just handled.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Dashboard(settings, listener, announce, before_end).run()


def _wait_until_ended(service: Any, jobs: list[int]) -> None:
    import asyncio

    async def wait() -> None:
        while True:
            seen = service.version
            if all(service.get_job(job)["state"] in ENDED for job in jobs):
                return
            await service.wait_for_change(seen, 1.0)

    asyncio.run(wait())


@verb
def link(settings: "Settings") -> None:
    """A new one-time login link for the running server."""
    from app.store.lock import read_holder

    if read_holder(settings.data_dir) is None:
        raise Failure(f"No server runs on {settings.data_dir}. Start one: frostline serve")
    with server_for(settings) as server:
        print(server.call("POST", "/api/links")["url"])


@verb
def doctor(settings: "Settings") -> None:
    """What is installed, which devices there are, and what is wrong, in words."""
    from app.doctor import examine

    findings = []
    for name, finding in examine(settings):
        good, words = finding
        print(f"{'ok' if good else 'WRONG':<6}{name:<15}  {words}")
        if not good:
            findings.append(name)
    if findings:
        wrong = ", ".join(findings)
        raise Failure(
            f"{len(findings)} of these {'is' if len(findings) == 1 else 'are'} wrong: {wrong}."
        )
    print("Nothing is wrong.")
