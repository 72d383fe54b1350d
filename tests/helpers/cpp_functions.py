"""The functions of a C++ or CUDA file and their lengths, by its braces."""

import re

_BLANK = (r"//[^\n]*", r"/\*.*?\*/", r"^[ \t]*#(?:.*\\\n)*.*$")
_OTHERS = r"(if|for|while|switch|else|do|catch|namespace|struct|class|enum|union|return)\b"
_SIGNATURE = r"\)\s*(const|noexcept|override|->[\w:<>, &*]+|\s|:\s*.*)*$"
_LAMBDA = r"\[[^\[\]]*\]\s*(\([^()]*\))?\s*(mutable)?\s*(->.*)?$"


def functions(text):
    """[(lines, the end of its signature)], the longest first; lambdas are part of the function that they are in."""
    for pattern in _BLANK:
        text = re.sub(
            pattern,
            lambda m: re.sub(r"[^\n]", " ", m[0]),
            text,
            flags=re.DOTALL if "*" in pattern[:3] else re.MULTILINE,
        )
    text = re.sub(r'"(\\.|[^"\\\n])*"', lambda m: '"' + " " * (len(m[0]) - 2) + '"', text)
    text = re.sub(r"'(\\.|[^'\\\n])'", "' '", text)
    open_braces, lengths, after = [], [], 0
    for i, c in enumerate(text):
        if c == "{":
            head = text[after:i]
            begins = _is_signature(head.strip()) and not any(is_function for is_function, _ in open_braces)
            open_braces.append((begins, after + len(head) - len(head.lstrip())))
        elif c == "}" and open_braces:
            is_function, start = open_braces.pop()
            if is_function:
                lengths.append((text.count("\n", start, i) + 1, text[start : text.index("{", start)].split()[-3:]))
        if c in "{};":
            after = i + 1
    return sorted(lengths, reverse=True)


def _is_signature(head):
    outside = re.sub(r"\([^()]*\)", "", re.sub(r"<[^<>]*>", "", head))
    is_assigned = "=" in outside.replace("operator=", "")
    return bool(re.search(_SIGNATURE, head, re.DOTALL)) and not (
        re.match(_OTHERS, head) or re.search(_LAMBDA, head) or is_assigned
    )
