"""`twogate serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.choices import OnFlag, Provider


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 takes a free one.", show_default="8000")] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Folder of bundles, `<store>/<name>/<version>/`.", show_default="the store that comes with Twogate"
        ),
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(help="NAME (its newest version) or NAME/VERSION.", show_default="photos")
    ] = None,
    max_fpr: Annotated[
        float | None, typer.Option(help="Share of clean images that may be flagged, 0 to 1.", show_default="0.01")
    ] = None,
    on_flag: Annotated[
        OnFlag | None,
        typer.Option(help="Answer with the verdict, or refuse the image with 422.", show_default="flag"),
    ] = None,
    provider: Annotated[Provider | None, typer.Option(help="Where the graph runs.", show_default="cpu")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores that one forward uses.", show_default="those it may use")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="TOML file with one key per setting.", show_default="TWOGATE_SETTINGS_FILE")
    ] = None,
) -> None:
    """Serve a bundle over HTTP: embeddings and verdicts for images.

    - `twogate serve`: the default bundle on port 8000

    - `twogate serve --port 9000 --on-flag reject`: refuse what looks adversarial

    - `TWOGATE_API_KEYS=key1,key2 twogate serve --host 0.0.0.0`: other machines may ask, with a key

    Every setting can also be an environment variable, `TWOGATE_<SETTING>`, or a line of the settings file; a flag counts
    most, then the environment, then the file. API keys have no flag, because other users of a machine can read
    a command line.
    """
    from service.server import serve as serve_settings
    from service.settings import SettingsError, load_settings, unknown_variables

    try:
        chosen = load_settings(
            settings,
            host=host,
            port=port,
            store=store,
            bundle=bundle,
            max_fpr=max_fpr,
            on_flag=on_flag,
            provider=provider,
            threads=threads,
        )
    except SettingsError as error:
        typer.echo(f"twogate: {error}", err=True)
        raise typer.Exit(2) from None
    for line in unknown_variables():
        typer.echo(f"twogate: warning: {line}", err=True)
    raise typer.Exit(serve_settings(chosen))
