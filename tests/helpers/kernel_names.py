"""Kernels' names with the names of their Configs' fields: `MmaConfig<Int8, MmaTile{m=128, n=128, …}>` for what c++filt prints as
`MmaConfig<Int8, MmaTile{128, 128, …}>`. Fields and enumerators are those that csrc declares."""

import functools
import pathlib
import re
import subprocess

CSRC = pathlib.Path(__file__).parents[2] / "csrc"


@functools.cache
def _sources() -> str:
    text = "\n".join(path.read_text() for pattern in ("*.h", "*.cu", "*.cuh") for path in sorted(CSRC.rglob(pattern)))
    return re.sub(r"//.*", "", text)


@functools.cache
def fields(struct: str) -> list[str]:
    """Of an aggregate, in their order."""
    bodies = set(re.findall(rf"^struct {struct} {{\n(.*?)^}};", _sources(), re.M | re.S))
    if len(bodies) != 1:
        raise ValueError(f"csrc declares {len(bodies)} structs {struct}, one was expected")
    declarations = re.findall(r"^ +\w+ ([\w, ]+)(?: = \w+)?;", bodies.pop(), re.M)
    return [name for declaration in declarations for name in declaration.split(", ")]


@functools.cache
def _dtypes() -> list[str]:
    return re.search(r"enum class Dtype : int32_t { ([\w, ]+) }", _sources())[1].split(", ")


def readable(demangled: str) -> str:
    """`quantize_kernel<bf16>` for `void forwardpass::quantize_kernel<(forwardpass::Dtype)2>(…)`."""
    # parameters may be of types of the template's arguments, which have parentheses of their own
    name = re.sub(r"(?<=>)\((?!.*>\().*\)$|\([^()]*\)$|^void |forwardpass::", "", demangled)
    name = re.sub(r"\(Dtype\)(\d)", lambda m: _dtypes()[int(m[1])], name)

    def with_names(m: re.Match) -> str:
        values = m[2].split(", ")
        pairs = zip(fields(m[1]), values, strict=True)
        return f"{m[1]}{{{', '.join(f'{name}={value}' for name, value in pairs)}}}"

    return re.sub(r"\b(\w+)\{([^{}]*)\}", with_names, name)


def demangle(names: list[str]) -> list[str]:
    """Readable ones for mangled ones."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [readable(line) for line in text.splitlines()]


def values(name: str) -> dict[str, str]:
    """Of all fields in a readable name."""
    return dict(re.findall(r"(\w+)=(\w+)", name))
