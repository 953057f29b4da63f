from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import MIB, Settings, SettingsError, load_settings, unknown_variables


def test_every_setting_is_documented() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_flags_beat_the_environment_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "twogate.toml"
    file.write_text("port = 1\nmax_fpr = 0.02\nmax_batch = 4\n")
    monkeypatch.setenv("TWOGATE_PORT", "2")
    monkeypatch.setenv("TWOGATE_MAX_FPR", "0.03")
    settings = load_settings(file, port=3, bundle=None)
    assert (settings.port, settings.max_fpr, settings.max_batch) == (3, 0.03, 4)
    assert settings.bundle == "photos"


def test_the_file_may_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "twogate.toml"
    file.write_text('api_keys = ["one", "two"]\n')
    monkeypatch.setenv("TWOGATE_SETTINGS_FILE", str(file))
    assert [key.get_secret_value() for key in load_settings().api_keys] == ["one", "two"]


def test_keys_from_the_environment_are_split_and_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOGATE_API_KEYS", "first, second")
    settings = load_settings()
    assert [key.get_secret_value() for key in settings.api_keys] == ["first", "second"]
    assert "first" not in repr(settings)


@pytest.mark.parametrize("keys", [",", " ", "first,", "first,,second"])
def test_a_key_that_is_empty_opens_no_door(keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "twogate.toml"
    file.write_text(f"api_keys = {keys.split(',')}\n")
    with pytest.raises(SettingsError, match="empty"):
        load_settings(file)
    monkeypatch.setenv("TWOGATE_API_KEYS", keys)
    with pytest.raises(SettingsError, match="empty"):
        load_settings()


def test_a_variable_that_is_nearly_a_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TWOGATE_PORT", "TWOGATE_VENV_DEV", "TWOGATE_SETTINGS_FILE", "twogate_host"):
        monkeypatch.setenv(name, "x")
    assert unknown_variables() == []
    monkeypatch.setenv("TWOGATE_MAXFPR", "0.05")
    monkeypatch.setenv("TWOGATE_COLOUR", "red")
    assert unknown_variables() == [
        "TWOGATE_COLOUR is no setting",
        "TWOGATE_MAXFPR is no setting; did you mean TWOGATE_MAX_FPR?",
    ]


def test_variables_that_are_not_settings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOGATE_VENV", "/somewhere")
    monkeypatch.setenv("TWOGATE_PORT", "")
    assert load_settings().port == 8000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("porf = 1", "twogate.toml: there is no setting porf; did you mean port\\?"),
        ("max_fprr = 0.05", "did you mean max_fpr\\?"),
        ("colour = 1", "there is no setting colour; known are store, bundle, .*max_fpr"),
        ("port = 99999", "setting port: .*65535"),
        ("max_fpr = 0", "setting max_fpr"),
        ("max_fpr = 'x", "twogate.toml"),
        ("max_image_bytes = 99999999", "max_image_bytes must not be larger than max_body_bytes"),
        ("max_images = 100", "max_images must not be larger than max_pending_images"),
        ("max_pixels = 100000000", "decode_memory_bytes must be at least 2000000000"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "twogate.toml"
    file.write_text(content)
    with pytest.raises(SettingsError, match=message):
        load_settings(file)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no settings file"):
        load_settings(tmp_path / "nothing.toml")


def test_default_limits() -> None:
    settings = Settings()
    assert settings.max_images == 16
    assert settings.max_image_bytes == 10 * MIB
    assert (settings.limits.max_pixels, settings.limits.max_side, settings.limits.min_side) == (50_000_000, 16384, 8)
