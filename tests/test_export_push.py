"""Uploads by huggingface_hub's own client to a hub on loopback: what arrives is what was written, and ways to fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mvp_fast.cli.main import main
from mvp_fast.errors import ConfigError
from mvp_fast.export.hub import check_target
from tests.export_cases import write_run
from tests.hub_server import READER, WRITER, FakeHub, Repository

FILES = {
    "timm": {"README.md", "config.json", "model.safetensors"},
    "hf": {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"},
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


@pytest.fixture
def logged_in(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """What HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_HOME decide when huggingface_hub is imported, decided now.

    Xet, by which large files travel where hf_xet is installed, is a protocol of its own; without it they go by LFS.
    """
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_what_arrives_is_what_was_written(
    form: str, logged_in: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "export" / form
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine, not for the world")
    (out / "deep").mkdir()
    (out / "deep" / "config.json").write_text("{}")
    assert main(["export", str(run), "--format", form, "--push", "me/my-model", "--license", "mit"]) == 0
    repository = logged_in.repositories["me/my-model"]
    assert repository.files == {name: (out / name).read_bytes() for name in FILES[form]}
    assert repository.by_lfs == {"model.safetensors"}
    assert repository.messages == [f"mvp-fast export: beitv2_base_patch16_224, step 12, {form} format"]
    assert not repository.private
    assert f"pushed   {logged_in.address}/me/my-model: " in capsys.readouterr().out
    # Again, over what is there, from another step.
    assert main(["export", str(run), "--format", form, "--push", "me/my-model", "--checkpoint", "3"]) == 0
    assert repository.files == {name: (out / name).read_bytes() for name in FILES[form]}
    assert repository.messages[1].endswith(f"step 3, {form} format")


def test_nothing_is_uploaded_without_the_flag(logged_in: FakeHub, run: Path) -> None:
    assert main(["export", str(run)]) == 0
    assert main(["export", str(run), "--format", "hf", "--license", "mit"]) == 0
    assert logged_in.requests == []


def test_private(logged_in: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--push", "me/hidden", "--private"]) == 0
    assert logged_in.repositories["me/hidden"].private
    assert logged_in.repositories["me/hidden"].files.keys() == FILES["timm"]
    assert main(["export", str(run), "--push", "me/hidden", "--private"]) == 0  # it is private already
    logged_in.repositories["me/open"] = Repository(private=False)
    capsys.readouterr()
    assert main(["export", str(run), "--push", "me/open", "--private"]) == 2
    assert "The repository is there already, and public (--push me/open)" in capsys.readouterr().err
    assert logged_in.repositories["me/open"].files == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "is not of the form OWNER/NAME"),
        ("a/b/c", "must be in the form"),
        ("me/model..x", "Cannot have -- or .."),
        ("me/mod el", "alphanumeric"),
        ("me/model.git", "cannot end by '.git'"),
        ("/model", "alphanumeric"),
    ],
)
def test_a_name_that_no_repository_can_have(
    name: str, message: str, logged_in: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--push", name]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.rstrip().endswith("Give OWNER/NAME.")
    assert not (run / "export").exists()
    assert logged_in.requests == []


def fails(run: Path, capsys: pytest.CaptureFixture[str], code: int = 4) -> str:
    """What a failing push prints: one paragraph."""
    assert main(["export", str(run), "--push", "me/my-model"]) == code
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "Traceback" not in shown
    return shown


def test_without_a_token_nothing_is_written(
    logged_in: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no token to upload with (--push me/my-model). Log in with `hf auth login`" in fails(run, capsys)
    assert not (run / "export").exists()
    assert logged_in.requests == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_old", "The hub does not accept the token: Invalid username or password (me/my-model at http://127"),
        (READER, "The token may not write to me/my-model: You don't have the rights to write here"),
    ],
    ids=["401", "403"],
)
def test_the_hub_refuses(
    token: str,
    message: str,
    logged_in: FakeHub,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    shown = fails(run, capsys)
    assert message in shown
    out = run / "export" / "timm"
    assert f"The export in {out} is whole: the same command tries again" in shown
    assert {path.name for path in out.iterdir()} == FILES["timm"]
    assert token not in shown
    assert logged_in.repositories == {}
    # The repository is there and the token may only read it.
    logged_in.repositories["me/my-model"] = Repository()
    assert message in fails(run, capsys)
    assert logged_in.repositories["me/my-model"].files == {}


def test_no_network(run: Path, logged_in: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        shown = fails(run, capsys)
    assert "The upload failed: " in shown
    assert "refused" in shown
    assert "Check the network" in shown
    assert "is whole" in shown
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in fails(run, capsys)


def test_a_hub_that_is_broken(
    logged_in: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"{logged_in.address}/not-a-hub")
    assert "The hub has no such owner or repository: Entry not found" in fails(run, capsys)


def test_a_licence_that_the_hub_does_not_know(
    logged_in: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--push", "me/my-model", "--license", "wtf"]) == 2
    shown = capsys.readouterr().err
    assert 'The hub refuses the model card: Invalid metadata in README.md. - "license" must be one of' in shown
    assert logged_in.repositories["me/my-model"].files == {}


def test_check_target_takes_a_good_name(logged_in: FakeHub) -> None:
    check_target("some-one/Model_1.2")
    with pytest.raises(ConfigError):
        check_target("")


CODE = """
import json, re, sys
from pathlib import Path
from huggingface_hub import hf_hub_download
from PIL import Image

from mvp_fast.cli.main import main

run, found = sys.argv[1], {}
Image.effect_noise((90, 70), 80).convert("RGB").save("image.png")
for form in ("timm", "hf"):
    assert main(["export", run, "--format", form, "--push", f"me/{form}"]) == 0
    card = Path(hf_hub_download(f"me/{form}", "README.md")).read_text()
    (code,) = re.findall(r"```python\\n(.+?)```", card, flags=re.DOTALL)
    names = {}
    exec(code.replace("image.jpg", "image.png"), names)
    x = names["image"] if form == "timm" else names["inputs"]["pixel_values"]
    found[form] = {"features": names["features"], "code": code}
    if form == "timm":
        first, reference = names["model"], x
    else:
        again = first.forward_head(first.forward_features(x), pre_logits=True)
        found["apart"] = float((again - names["features"]).abs().max())
print(json.dumps({"apart": found["apart"], "code": [found[form]["code"] for form in ("timm", "hf")]}))
"""


@pytest.mark.slow
def test_by_the_environment_alone_there_and_back(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    """As a user does: the variables, the push, and the card's own code, which loads from the hub."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": WRITER,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", CODE, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["apart"] <= 1e-5
    assert 'timm.create_model("hf-hub:me/timm", pretrained=True' in told["code"][0]
    assert 'BeitModel.from_pretrained("me/hf")' in told["code"][1]
    assert {name: set(each.files) for name, each in hub.repositories.items()} == {
        "me/timm": FILES["timm"],
        "me/hf": FILES["hf"],
    }
    assert "GET /me/timm/resolve/main/model.safetensors" in hub.requests
