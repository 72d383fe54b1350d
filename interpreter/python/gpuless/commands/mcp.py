"""`python -m gpuless mcp`: the commands as tools of the Model Context Protocol, over stdin and stdout, for agents.

A message is a line of JSON-RPC. A tool runs the command in a process of its own, so that what a program prints, or how it
ends, is no part of the conversation.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import IO, Any

from .. import core
from ..version import __version__

PROTOCOLS = ("2025-06-18", "2025-03-26", "2024-11-05")
#: of JSON-RPC
NO_JSON, NO_METHOD, NO_PARAMETERS = -32700, -32601, -32602
#: characters of a command's output; the end is what counts
LONGEST = 20000

_GPU = {"type": "string", "enum": list(core.ARCHITECTURES), "description": "the GPU (default sm_90a, an H100)"}
_LIMIT = {"type": "number", "exclusiveMinimum": 0, "description": "seconds; a run that takes longer is incomplete"}
_TEXTS = {"type": "array", "items": {"type": "string"}}
_COVERAGE = {"type": "boolean", "description": "list the source lines of kernels that never ran"}
#: tool -> (what it does, its arguments, those that it needs)
TOOLS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "verify": (
        "Compares a GPU kernel with a reference in plain torch, without a GPU: sizes and inputs that kernels are wrong on, races, "
        "bounds. The verdict is clean, finding, incomplete or error; only clean is a success.",
        {
            "candidate": {"type": "string", "description": "KERNEL.py or KERNEL.cu"},
            "reference": {
                "type": "string",
                "description": "the file with reference(), inputs() and SIZES, or with KernelBench's Model",
            },
            "entry": {
                "type": "string",
                "description": "the function (default: candidate) or class (ModelNew) that is called",
            },
            "size": {**_TEXTS, "description": "sizes in place of the file's, such as 'rows=1..9'"},
            "allow": {**_TEXTS, "description": "operations that may be left to torch, such as 'convolution'"},
            "gpu": _GPU,
            "time_limit": _LIMIT,
            "keep_going": {"type": "boolean", "description": "do not end at the first call that fails"},
            "coverage": _COVERAGE,
        },
        ["candidate", "reference"],
    ),
    "run": (
        "Runs a Python script that uses device='cuda', or a CUDA program that `build` made, without a GPU, and checks its kernels.",
        {
            "program": {"type": "string", "description": "SCRIPT.py, or a program"},
            "arguments": {"type": "array", "items": {"type": "string"}},
            "gpu": _GPU,
            "seed": {"type": "integer", "minimum": 0, "description": "of the schedule: repeats a finding"},
            "guard": {"type": "boolean", "description": "find accesses between a tensor's elements too"},
            "time_limit": _LIMIT,
            "coverage": _COVERAGE,
        },
        ["program"],
    ),
    "build": (
        "Compiles a CUDA program for `run`, with nvcc's arguments, such as ['prog.cu', '-O3', '-o', 'prog'].",
        {"arguments": {"type": "array", "items": {"type": "string"}}},
        ["arguments"],
    ),
}


class Refusal(Exception):
    """What a request gets in place of a result."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def mcp(lines: Iterable[str] = sys.stdin, output: IO[str] = sys.stdout) -> int:
    for line in lines:
        if line.strip() and (reply := answer(line)):
            output.write(json.dumps(reply) + "\n")
            output.flush()
    return 0


def answer(line: str) -> dict[str, Any] | None:
    """The reply to a message; None to a notification."""
    try:
        message = json.loads(line)
    except ValueError:
        return _error(None, Refusal(NO_JSON, "this line is no JSON"))
    if not isinstance(message, dict) or "method" not in message:
        return _error(None, Refusal(NO_METHOD, "this message has no method"))
    if "id" not in message:
        return None
    try:
        result = _result(message["method"], message.get("params") or {})
        return {"jsonrpc": "2.0", "id": message["id"], "result": result}
    except Refusal as refusal:
        return _error(message["id"], refusal)


def _error(number: Any, refusal: Refusal) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "error": {"code": refusal.code, "message": str(refusal)}}


def _result(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    if method == "initialize":
        asked = parameters.get("protocolVersion")
        return {
            "protocolVersion": asked if asked in PROTOCOLS else PROTOCOLS[0],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "gpuless", "version": __version__},
        }
    if method == "ping":
        return {}
    if method == "tools/list":
        return {"tools": [_tool(name) for name in TOOLS]}
    if method == "tools/call":
        return _call(str(parameters.get("name")), parameters.get("arguments") or {})
    raise Refusal(NO_METHOD, f"there is no method {method}")


def _tool(name: str) -> dict[str, Any]:
    description, properties, required = TOOLS[name]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"name": name, "description": description, "inputSchema": schema}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if name not in TOOLS:
        raise Refusal(NO_PARAMETERS, f"there is no tool {name}; there are {', '.join(TOOLS)}")
    _, properties, required = TOOLS[name]
    if missing := [n for n in required if n not in arguments]:
        raise Refusal(NO_PARAMETERS, f"{name} needs {', '.join(missing)}")
    if unknown := [n for n in arguments if n not in properties]:
        raise Refusal(NO_PARAMETERS, f"{name} has no {', '.join(unknown)}; it has {', '.join(properties)}")
    with tempfile.TemporaryDirectory() as folder:
        document = pathlib.Path(folder) / "verdict.json"
        command = [sys.executable, "-m", "gpuless", name, *_options(name, arguments, document)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        verdict = json.loads(document.read_text()) if document.exists() else None
    text = (done.stdout + done.stderr).strip()[-LONGEST:] or f"{name} ended with status {done.returncode}"
    result: dict[str, Any] = {"content": [{"type": "text", "text": text}], "isError": _failed(verdict, done.returncode)}
    return result if verdict is None else {**result, "structuredContent": verdict}


def _failed(verdict: dict[str, Any] | None, status: int) -> bool:
    """A finding is an answer, and no error of the tool."""
    return status != 0 if verdict is None else verdict["verdict"] == "error"


def _options(name: str, arguments: dict[str, Any], document: pathlib.Path) -> list[str]:
    if name == "build":
        return [str(a) for a in arguments["arguments"]]
    positional = ("candidate",) if name == "verify" else ("program", "arguments")
    options = [f"--json={document}"]
    for key, value in arguments.items():
        flag = f"--{key.replace('_', '-')}"
        if key not in positional and value is not False:
            values = value if isinstance(value, list) else [value]
            options += [flag if v is True else f"{flag}={v}" for v in values]
    rest = [arguments[positional[0]], *arguments.get("arguments", [])]
    return [*options, *map(str, rest)]
