"""The way to the Hub, against a server on this machine that answers as the Hub does; and the card that goes with it."""

from __future__ import annotations

import base64
import http.server
import json
import threading

import models
import pytest
import torch
from checks.state import logits

import tightfit
from tightfit import Lora, WtaCrs, chain
from tightfit.core.later import Later


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories in memory: creates one, says that every file is a regular one, takes a commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        state = self.server.state
        state["tokens"].append(self.headers.get("Authorization"))
        if state["refuses"]:
            return self.answer(403, {"error": "You don't have the rights to create a model here"})
        if self.path == "/api/repos/create":
            state["created"] = json.loads(body)
            name = "/".join(n for n in (state["created"].get("organization"), state["created"]["name"]) if n)
            return self.answer(200, {"url": f"{state['endpoint']}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    state["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{state['endpoint']}/me/mine/commit/1", "commitOid": "1" * 40})
        return self.answer(404, {"error": self.path})

    def do_GET(self):
        self.answer(404, {"error": self.path})

    do_HEAD = do_GET

    def answer(self, code, content):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants as constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    server.state = {"endpoint": endpoint, "files": {}, "tokens": [], "refuses": False, "created": None}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server.state
    server.shutdown()
    server.server_close()


def applied_bert():
    model = models.build("bert")
    applied = tightfit.apply(model, chain(Lora(rank=2), WtaCrs(min_rows=4)))
    with torch.no_grad():
        for parameter in applied.parameters():
            parameter.add_(0.01)
    return applied


def test_an_export_goes_to_the_hub_as_it_is_on_the_disk(hub, tmp_path):
    applied = applied_bert()
    applied.export(tmp_path / "out", push_to_hub="me/mine", private=True, max_shard_size=40_000)
    here = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub["files"] == here
    assert {"config.json", "README.md", "model.safetensors.index.json"} <= set(here)
    assert hub["created"]["name"] == "mine" and hub["created"]["organization"] == "me"
    assert hub["created"].get("private") or hub["created"].get("visibility") == "private"
    assert set(hub["tokens"]) == {"Bearer hf_test"}
    loaded = type(applied.model).from_pretrained(tmp_path / "out")
    batch = models.batch(applied.model)
    torch.testing.assert_close(logits(loaded, batch), logits(applied.model, batch))


def test_the_folder_stays_where_the_hub_refuses(hub, tmp_path):
    hub["refuses"] = True
    with pytest.raises(tightfit.ArtifactError, match=r"me/mine could not be written .*403.*hf upload me/mine"):
        applied_bert().export(tmp_path / "out", push_to_hub="me/mine")
    assert (tmp_path / "out" / "model.safetensors").is_file() and not hub["files"]


@pytest.mark.parametrize("name", ["a/b/c", "", "../x", "me/ mine", 3])
def test_a_name_that_is_none_is_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(tightfit.ArtifactError, match=r"push_to_hub: .* is no repository id"):
        applied_bert().export(tmp_path / "out", push_to_hub=name)
    assert not list(tmp_path.iterdir())


def test_offline_is_one_error_and_the_folder_stays(tmp_path):
    with pytest.raises(tightfit.ArtifactError, match="could not be written"):
        applied_bert().export(tmp_path / "out", push_to_hub="me/mine")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(("base", "named"), [("bert-base-uncased", True), ("/somewhere/of/mine", False), ("", False)])
def test_the_card_names_a_hub_base_and_no_folder(base, named, tmp_path):
    from huggingface_hub import ModelCard

    applied = applied_bert()
    applied.model.config._name_or_path = base
    applied.export(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and "tightfit" in card.data.tags
    assert card.data.base_model == (base if named else None)
    assert "Lora(rank=2)" in card.text and "WtaCrs(min_rows=4)" in card.text
    assert "/somewhere" not in card.content and "/somewhere" not in (tmp_path / "out" / "config.json").read_text()


def test_a_command_pushes_a_run(hub, tmp_path):
    import runs
    from typer.testing import CliRunner

    from tightfit.cli import app
    from tightfit.train.run import train

    runs.project(tmp_path)
    train(runs.recipe_file(tmp_path, [{"Lora": {"rank": 2}}], max_steps=1))
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--push-to-hub", "me/run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + result.stderr
    assert "on the Hub: me/run" in result.stdout
    assert hub["files"].keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in hub["files"]


def test_a_tensor_that_is_made_later():
    value = torch.randn(3, 4)
    calls = []
    later = Later(value, lambda: calls.append(1) or value)
    assert (later.shape, later.dtype, later.nbytes, later.untyped_storage().nbytes()) == (
        value.shape,
        torch.float32,
        48,
        48,
    )
    assert later.untyped_storage().data_ptr() != Later(value, lambda: value).untyped_storage().data_ptr()
    assert isinstance(later, torch.Tensor) and "3, 4" in repr(later) and not calls
    assert torch.equal(later.contiguous(), value) and len(calls) == 1
    assert torch.equal(later.t(), value.t()) and torch.equal(torch.cat([later, later]), torch.cat([value, value]))
