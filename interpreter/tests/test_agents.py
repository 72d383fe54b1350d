"""What agents use: the tools of `python -m gpuless mcp`, and the skill file."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from gpuless import pytest_plugin
from gpuless.__main__ import USAGE
from gpuless.commands.mcp import TOOLS, _options, answer
from gpuless.commands.verify import _parser as verify_parser
from gpuless.verification.specification import FAMILIES

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def ask(method, **parameters):
    reply = answer(json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": parameters}))
    assert reply["jsonrpc"] == "2.0" and reply["id"] == 7
    return reply


def test_a_conversation(tmp_path):
    """As a client has it, with the server's process: what a script prints is no message."""
    (tmp_path / "script.py").write_text("print('words')\n")
    calls = [
        {"id": 1, "method": "initialize", "params": {"protocolVersion": "2024-11-05", "capabilities": {}}},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "tools/list"},
        {"id": 3, "method": "tools/call", "params": {"name": "run", "arguments": {"program": "script.py"}}},
    ]
    lines = "".join(json.dumps({"jsonrpc": "2.0", **c}) + "\n" for c in calls)
    command = [sys.executable, "-m", "gpuless", "mcp"]
    done = subprocess.run(command, input=lines, cwd=tmp_path, capture_output=True, text=True, check=True)
    replies = list(map(json.loads, done.stdout.splitlines()))
    assert [r["id"] for r in replies] == [1, 2, 3]
    assert replies[0]["result"]["protocolVersion"] == "2024-11-05"
    assert [t["name"] for t in replies[1]["result"]["tools"]] == list(TOOLS)
    result = replies[2]["result"]
    assert result["structuredContent"]["verdict"] == "incomplete" and not result["isError"]  # it launched nothing
    assert "words" in result["content"][0]["text"]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("compile", {}, "there are verify, run, build"),
        ("verify", {"candidate": "k.py"}, "needs reference"),
        ("run", {"program": "p", "speed": 3}, "has no speed"),
    ],
)
def test_calls_that_are_refused(name, arguments, words):
    assert words in ask("tools/call", name=name, arguments=arguments)["error"]["message"]


def test_messages_that_are_none():
    assert answer("{")["error"]["code"] == -32700
    assert answer("[]")["error"]["code"] == ask("resources/list")["error"]["code"] == -32601
    assert answer('{"method": "notifications/cancelled"}') is None
    assert ask("ping")["result"] == {}


def test_what_cannot_be_run_is_an_error_of_the_tool():
    result = ask("tools/call", name="run", arguments={"program": "nowhere.py"})["result"]
    assert result["isError"] and "there is no nowhere.py" in result["content"][0]["text"]


def test_options_of_verify_are_options_of_the_command():
    arguments = {
        "candidate": "k.py",
        "reference": "r.py",
        "size": ["rows=1..9", "cols=4"],
        "allow": ["sum"],
        "coverage": True,
    }
    options = verify_parser().parse_args(_options("verify", arguments, pathlib.Path("v.json")))
    assert options.size == ["rows=1..9", "cols=4"] and options.allow == ["sum"] and options.coverage
    actions = {action.dest for action in verify_parser()._actions}
    assert TOOLS["verify"][1].keys() <= actions


def test_the_workflow_s_commands_are_accepted():
    """Its YAML is read, and the options of its commands are parsed by the commands themselves."""
    steps = pytest.importorskip("yaml").safe_load((DOCS / "workflow.yml").read_text())["jobs"]["kernels"]["steps"]
    lines = [line for step in steps for line in step.get("run", "").replace("\\\n", " ").splitlines()]
    (install,) = [line for line in lines if line.endswith("/interpreter")]
    checkouts = [step["with"]["path"] for step in steps if "path" in step.get("with", {})]
    assert install == f"pip install --no-build-isolation ./{checkouts[0]}/interpreter"
    (command,) = [shlex.split(line) for line in lines if "gpuless verify" in line]
    options = verify_parser().parse_args(command[command.index("verify") + 1 :])
    assert str(options.sarif) in [step["with"].get("sarif_file") for step in steps if "with" in step]
    (tests,) = [shlex.split(line) for line in lines if line.startswith("pytest")]
    plugin = (pathlib.Path(pytest_plugin.__file__)).read_text()
    assert all(f'"{option.partition("=")[0]}"' in plugin for option in tests if option.startswith("--gpu"))


def test_the_skill_names_commands_and_options_that_there_are():
    text = (DOCS / "skill/SKILL.md").read_text()
    head = re.match(r"---\nname: gpuless\ndescription: .{60,}\n---\n", text)
    assert head
    commands = set(re.findall(r"python -m gpuless (\w+)", text))
    assert commands and all(f"python -m gpuless {c}" in USAGE for c in commands)
    families = re.findall(r"`(\w+)`", re.search(r"WITHOUT.*?\n\n", text, re.S)[0])
    assert set(FAMILIES) - {"random", "again"} <= set(families)
