"""Every setting of the service, documented where it is declared.

Priority: flags (arguments) > environment (`TWOGATE_<NAME>`) > settings file (TOML) > default.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from model_store.errors import TwogateError
from model_store.pixels import Limits
from model_store.store import DEFAULT_BUNDLE, EMBEDDED_STORE
from service.choices import OnFlag, Provider

MIB = 1024 * 1024
_PREFIX = "TWOGATE_"
FILE_VARIABLE = f"{_PREFIX}SETTINGS_FILE"
_OTHERS = (FILE_VARIABLE, "TWOGATE_VENV", "TWOGATE_VENV_DEV")
"""Variables that are known, and no settings: the last two are the Makefile's."""
LARGEST_BYTES_PER_PIXEL = 20
"""What decoding one pixel takes at worst (WebP); `engine/decode.py` has the table."""


class SettingsError(TwogateError):
    """A setting is unknown or out of range; the message names it."""


class Settings(BaseSettings):
    """What an operator may choose. Immutable once made."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    # What is served
    store: Path = Field(EMBEDDED_STORE, description="folder of bundles, `<store>/<name>/<version>/`")
    bundle: str = Field(DEFAULT_BUNDLE, description="`name` (its newest version) or `name/version`")
    provider: Provider = Field("cpu", description="where the graph runs")
    allow_fallback: bool = Field(False, description="serve on the CPU where `provider` cannot be had, not refuse")
    threads: int | None = Field(
        None, ge=1, description="cores that one forward uses; default: those that this process may use"
    )

    # The verdict
    max_fpr: float = Field(
        0.01, gt=0, lt=1, description="share of clean images that may be flagged; flagged if p_value <= max_fpr"
    )
    on_flag: OnFlag = Field(
        "flag",
        description="flag: answer 200 with the verdict; reject: answer 422 adversarial-suspected and no embedding",
    )

    # Where and for whom
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="bearer keys that open /v1, separated by commas; none: open to everybody"
    )

    # What one request may bring
    max_images: int = Field(16, ge=1, description="images in one request")
    max_image_bytes: int = Field(10 * MIB, ge=1, description="bytes of one encoded image, after base64 is undone")
    max_body_bytes: int = Field(32 * MIB, ge=1, description="bytes of one request body on the wire")
    max_pixels: int = Field(Limits.max_pixels, ge=64, description="pixels of one image, by its header")
    max_side: int = Field(Limits.max_side, ge=8, description="longer side of one image, pixels")
    min_side: int = Field(Limits.min_side, ge=1, description="shorter side of one image, pixels")

    # What all requests together may hold
    max_inflight_bytes: int = Field(
        64 * MIB, ge=1, description="body bytes held by all requests; about 3 times as much memory while JSON is read"
    )
    max_pending_images: int = Field(64, ge=1, description="images admitted and not yet answered")
    decode_memory_bytes: int = Field(
        1024 * MIB, ge=1, description="memory that all decoding together may take, estimated from the headers"
    )
    decode_threads: int | None = Field(
        None, ge=1, description="images decoded at a time; default: the cores that this process may use"
    )

    # Time
    request_timeout_s: float = Field(
        30, gt=0, description="seconds from the first byte to the answer; `X-Request-Timeout` may ask for less"
    )
    body_timeout_s: float = Field(20, gt=0, description="seconds in which a request body must have arrived")
    drain_delay_s: float = Field(
        0,
        ge=0,
        description="seconds to go on answering after SIGTERM, while /health/ready says 503; 5 suits a load balancer",
    )
    shutdown_grace_s: int = Field(20, ge=1, description="seconds that requests in flight get to finish after that")

    # Batching
    max_batch: int = Field(4, ge=1, description="images in one forward; on CPUs more of them take memory and gain no speed")
    max_wait_ms: float = Field(2, ge=0, description="milliseconds that an image waits for others to share a forward")

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        keys = value.split(",") if isinstance(value, str) and value else value
        if isinstance(keys, list | tuple):
            keys = tuple(key.strip() if isinstance(key, str) else key for key in keys)
            # A variable that was not set in `${KEY}` must not open the door.
            if "" in keys:
                raise ValueError("one of the keys is empty")
        return keys or ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for small, large in (
            ("max_image_bytes", "max_body_bytes"),
            ("max_body_bytes", "max_inflight_bytes"),
            ("max_images", "max_pending_images"),
            ("min_side", "max_side"),
        ):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(f"{small} must not be larger than {large}")
        needed = self.max_pixels * LARGEST_BYTES_PER_PIXEL
        if needed > self.decode_memory_bytes:
            raise ValueError(
                f"decode_memory_bytes must be at least {needed}, "
                f"or max_pixels at most {self.decode_memory_bytes // LARGEST_BYTES_PER_PIXEL}: "
                "else the largest image that is admitted could never be decoded"
            )
        return self

    @property
    def limits(self) -> Limits:
        """What an image's header may promise."""
        return Limits(max_pixels=self.max_pixels, max_side=self.max_side, min_side=self.min_side)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the settings file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(file: Path | None = None, **flags: Any) -> Settings:
    """Gather the settings; a flag that is None was not given.

    `file` is a TOML file with one key per setting, by default the one that TWOGATE_SETTINGS_FILE names.
    SettingsError names the setting that is unknown or out of range.
    """
    if file is None and os.environ.get(FILE_VARIABLE):
        file = Path(os.environ[FILE_VARIABLE])
    if file is not None and not file.is_file():
        raise SettingsError(f"there is no settings file {file}")

    class _FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return _FromFile(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise SettingsError("; ".join(_explained(error, file))) from None
    except ValueError as error:  # TOML that cannot be read
        raise SettingsError(f"{file}: {error}") from None


def unknown_variables() -> list[str]:
    """What to say of each variable of the environment that looks like a setting and is none.

    They are no error: a platform may set variables of its own that begin like this.
    """
    lines = []
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix(_PREFIX).lower()
        if variable.upper().startswith(_PREFIX) and variable not in _OTHERS and name not in Settings.model_fields:
            close = _nearest(name)
            lines.append(f"{variable} is no setting" + (f"; did you mean {_PREFIX}{close.upper()}?" if close else ""))
    return lines


def _nearest(name: str) -> str | None:
    """The setting that was probably meant."""
    return next(iter(difflib.get_close_matches(name, Settings.model_fields, n=1)), None)


def _explained(error: ValidationError, file: Path | None) -> list[str]:
    lines = []
    for found in error.errors(include_input=False, include_url=False):
        name = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            close = _nearest(name)
            hint = f"did you mean {close}?" if close else f"known are {', '.join(Settings.model_fields)}"
            lines.append(f"{file}: there is no setting {name}; {hint}")
            continue
        message = found["msg"].removeprefix("Value error, ")
        lines.append(f"setting {name}: {message}" if name else message)
    return lines
